"""TensorBoard, trackio and MLflow get the numbers of metrics.jsonl through accelerate's trackers, beside W&B."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import pytest

from headtune.analysis.utils.errors import InputError
from headtune.train.config.recipe import parse
from headtune.train.tracking import other_trackers
from headtune.train.tracking.other_trackers import flat
from headtune.train.tracking.tracker import Tracker
from helpers.small_runs import STEPS, train, write_recipe

CLASSES = {"tensorboard": "TensorBoardTracker", "trackio": "TrackioTracker", "mlflow": "MLflowTracker"}


class Stub:
    """What accelerate's trackers have in common; keeps what it gets."""

    all: ClassVar[list[Stub]] = []
    broken: ClassVar[str] = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args, self.options, self.calls = args, options, []
        Stub.all.append(self)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> None:
            if name == Stub.broken:
                raise OSError("no server\nat all")
            self.calls.append((name, *args, *options.values()))

        return call


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[Stub]:
    """The three packages as if installed."""
    Stub.all, Stub.broken = [], ""
    for name in CLASSES.values():
        monkeypatch.setattr(accelerate.tracking, name, Stub)
    monkeypatch.setattr(other_trackers, "_installed", lambda _package: True)
    return Stub.all


def test_each_gets_the_configuration_and_every_finite_number(stubs: list[Stub], tmp_path: Path) -> None:
    config = {"recipe": "lofit", "heads_block": {"top": 2, "list": [[0, 1]]}, "api_key": "x" * 20, "K": None}
    options: dict[str, Any] = {"project": "p", "group": "study", "wandb_mode": "disabled", "report_to": list(CLASSES)}
    with Tracker(tmp_path, "first", config, **options) as tracker:
        tracker.log({"train/loss": 2.5, "train/x": math.nan}, 3)
        tracker.log({"after/mc1": 0.5})
    assert [(stub.args, stub.options) for stub in stubs] == [
        (("tensorboard", tmp_path), {}),
        (("p",), {"name": "first", "group": "study"}),
        (("p",), {"run_name": "first", "tags": {"group": "study", "job_type": "train"}}),
    ]
    values = {"recipe": "lofit", "heads_block.top": 2, "heads_block.list": "[[0, 1]]", "K": "None"}
    for stub in stubs:
        assert stub.calls == [
            ("start",),
            ("store_init_configuration", values),
            ("log", {"train/loss": 2.5}, 3),
            ("log", {"after/mc1": 0.5}, None),
            ("finish",),
        ]


@pytest.mark.parametrize("broken", ["start", "store_init_configuration", "log", "finish"])
def test_one_that_fails_costs_one_warning_and_no_number(
    broken: str, stubs: list[Stub], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Stub.broken = broken
    with Tracker(tmp_path, "first", {}, wandb_mode="disabled", report_to=["mlflow"]) as tracker:
        for step in range(3):
            tracker.log({"a": step}, step)
    assert [json.loads(line)["a"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["mlflow failed (no server); going on without it"]


def test_other_ranks_start_none(stubs: list[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Tracker(tmp_path, "first", {}, wandb_mode="disabled", report_to=["mlflow"]) as tracker:
        tracker.log({"a": 1}, 1)
    assert stubs == []


def test_a_missing_package_is_refused_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(other_trackers, "_installed", lambda _package: False)
    recipe = write_recipe(tmp_path, tiny_llama)
    for words in ([], ["--dry-run"]):
        assert train(recipe, "tracking.report_to=[mlflow]", *words) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "tracking.report_to names mlflow, whose package is not installed; pip install mlflow" in message
    assert not (tmp_path / "run").exists()


def test_the_key_takes_the_three_names_once_each() -> None:
    block = {"recipe": "lofit", "heads": {"list": [[0, 0]]}}
    assert parse(block).tracking.report_to == []
    for names, message in ((["wandb"], "tracking.report_to"), (["mlflow", "mlflow"], "mlflow is named twice")):
        with pytest.raises(InputError, match=message):
            parse(block | {"tracking": {"report_to": names}})


def test_a_run_tells_all_of_them_its_losses(stubs: list[Stub], tiny_llama: Path, tmp_path: Path) -> None:
    assert train(write_recipe(tmp_path, tiny_llama), "tracking.report_to=[trackio]") == 0
    (stub,) = stubs
    losses = [call for call in stub.calls if call[0] == "log" and "train/loss" in call[1]]
    assert [call[2] for call in losses] == list(range(1, STEPS + 1))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed: pip install tensorboard"
)
def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, "x", {"a": {"b": 1}}, wandb_mode="disabled", report_to=["tensorboard"]) as tracker:
        for step in range(1, 4):
            tracker.log({"train/loss": 1 / step}, step)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 4)
    ]


def test_blocks_become_dotted_keys() -> None:
    assert flat({"a": {"b": {"c": 1.5}, "d": True}, "e": [1], "f": {}}) == {"a.b.c": 1.5, "a.d": True, "e": "[1]"}
