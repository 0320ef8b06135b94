"""metrics.jsonl holds what was logged, W&B holds the same, and no trouble of W&B's costs a number."""

import hashlib
import json
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headtune.analysis.utils.errors import InputError
from headtune.train.tracking import wandb_offline, wandb_run
from headtune.train.tracking.lineage import tree_sha256
from headtune.train.tracking.tracker import Tracker, trainer_callback, without_secrets


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no server and no setting of the user who runs the tests."""
    for name in (
        "RANK",
        "WANDB_DISABLED",
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_DATA_DIR",
        "WANDB_IDENTITY_TOKEN_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in the one run under `run_dir`."""
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def of_type(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


def numbers(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if not key.startswith("_") and key != "time"}


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_lines_are_what_was_logged_and_are_there_at_once(tmp_path: Path) -> None:
    logged = [({"train/loss": 2.5, "n": 3}, 0), ({"train/loss": 1.25}, 1), ({"eval/p": 0.1 + 0.2}, None)]
    with Tracker(tmp_path, "x", {}, wandb_mode="disabled") as tracker:
        for count, (values, step) in enumerate(logged, start=1):
            tracker.log(values, step)
            assert len(lines(tmp_path)) == count, "a line is not on disk when log returns"
    found = lines(tmp_path)
    assert [(numbers(line) | {"step": line["step"]}) for line in found] == [v | {"step": s} for v, s in logged]
    assert all(line["time"].endswith("+00:00") for line in found)
    assert tracker.wandb_id is None
    assert not (tmp_path / "wandb").exists()


def test_a_second_tracker_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with Tracker(tmp_path, "x", {}, wandb_mode="disabled") as tracker:
            tracker.log({"a": step}, step)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_with_one_warning(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(tmp_path, "x", {}, wandb_mode="disabled") as tracker:
        tracker.log({"train/loss": value, "train/lr": 0.1}, 7)
        tracker.log({"train/loss": value}, 8)
    first, second = lines(tmp_path)
    assert first["train/loss"] is None and first["train/lr"] == 0.1 and second["train/loss"] is None
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "train/loss" in warning and "step 7" in warning and str(value) in warning


def test_scalars_of_torch_are_numbers_and_other_things_are_refused(tmp_path: Path) -> None:
    with Tracker(tmp_path, "x", {}, wandb_mode="disabled") as tracker:
        tracker.log({"a": torch.tensor(1.5), "b": torch.tensor([2])}, 0)  # type: ignore[dict-item]
        for bad in ("text", None, torch.tensor([1.0, 2.0]), [1]):
            with pytest.raises(TypeError, match="'loss'"):
                tracker.log({"loss": bad}, 1)  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="'time'"):
            tracker.log({"time": 1.0}, 1)
    assert [numbers(line) for line in lines(tmp_path)] == [{"step": 0, "a": 1.5, "b": 2}]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    picture = tmp_path / "x.png"
    run_dir = tmp_path / "run"
    with Tracker(run_dir, "x", {}, wandb_mode="offline") as tracker:
        tracker.log({"a": 1.0}, 0)
        tracker.image("i", picture)
        tracker.table("t", ["a"], [[1]])
        tracker.artifact(picture, "n", "t")
        tracker.summary({"a": 1})
    assert not tracker.is_main and tracker.wandb_id is None
    assert not run_dir.exists()


# --- configuration and digests ----------------------------------------------------------------------------------------


def test_secrets_are_dropped_at_every_depth_and_named(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "api_key": "s3cret",
        "HF_TOKEN": "s3cret",
        "apiKey": "s3cret",
        "model": {"name": "x", "hub_token": "s3cret", "rows": [{"password": "s3cret", "n": 1}]},
        "client_secrets": "s3cret",
        "credentials": {"user": "s3cret"},
        "wandb_api_keys": ["s3cret"],
        "max_new_tokens": 5,
        "tokenizer": "t",
        "tokens_per_second": 1.5,
        "path": Path("a/b"),
        "none": None,
    }
    with caplog.at_level(logging.INFO):
        clean = without_secrets(config)
    assert "s3cret" not in json.dumps(clean)
    assert clean == {
        "model": {"name": "x", "rows": [{"n": 1}]},
        "max_new_tokens": 5,
        "tokenizer": "t",
        "tokens_per_second": 1.5,
        "path": "a/b",
        "none": None,
    }
    assert "model.hub_token" in caplog.text and "s3cret" not in caplog.text


def test_digest_of_a_folder_is_that_of_its_sha256sum_listing(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes(b"2")
    (tmp_path / "a.txt").write_bytes(b"1")
    listing = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in (("a.txt", b"1"), ("b/z.txt", b"2"))
    )
    assert tree_sha256(tmp_path) == hashlib.sha256(listing.encode()).hexdigest()
    assert tree_sha256(tmp_path / "a.txt") == hashlib.sha256(b"1").hexdigest()
    with pytest.raises(InputError, match="missing"):
        tree_sha256(tmp_path / "missing")


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_an_unknown_mode_is_refused(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "environment":
        monkeypatch.setenv("WANDB_MODE", "onlin")
    source = "WANDB_MODE" if where == "environment" else "tracking.wandb"
    with pytest.raises(InputError, match=f"{source} is 'onlin'; choose one of offline, online, disabled"):
        Tracker(tmp_path, "x", {}, wandb_mode="onlin" if where == "argument" else None)


def test_the_argument_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Tracker(tmp_path, "x", {}, wandb_mode="disabled") as tracker:
        assert tracker.wandb_id is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracker(tmp_path, "x", {}) as tracker:
        assert tracker.wandb_id is None


@pytest.mark.parametrize("value", ["true", "1", "YES", "on"])
def test_wandb_disabled_is_heard(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' own trainer hears it; a key, and WANDB_MODE, do not undo it. The recipe does."""
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with Tracker(tmp_path, "x", {}) as tracker:
        assert tracker.wandb_id is None
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_run.requested_mode(None) == "disabled"
    assert wandb_run.requested_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_DISABLED", "false")
    assert wandb_run.requested_mode(None) == "online"


def test_importing_needs_neither_wandb_nor_transformers() -> None:
    code = (
        "import sys, headtune.train.tracking.tracker as t, pathlib, tempfile\n"
        "with t.Tracker(pathlib.Path(tempfile.mkdtemp()), 'x', {}, wandb_mode='disabled') as k: k.log({'a': 1}, 0)\n"
        "print([n for n in ('wandb', 'transformers', 'torch') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- W&B --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_offline_run_holds_the_same_as_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "map.png")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "weights.bin").write_bytes(b"\0" * 64)
    run_dir = tmp_path / "run"
    config = {"seed": 3, "api_key": "0123-s3cret", "model": {"name": "tiny", "hub_token": "s3cret"}}
    options: dict[str, Any] = {"project": "p", "group": "g", "job_type": "identify", "tags": ["a", "b"]}
    # No mode is asked for and no key is there: offline.
    with Tracker(run_dir, "run-name", config, **options) as tracker:
        for step in (5, 6, 2):  # back to an earlier step, as after a resumed checkpoint
            tracker.log({"train/loss": step / 8}, step)
        tracker.log({"train/loss": math.nan}, 3)
        tracker.image("heatmaps/dla.target", tmp_path / "map.png")
        tracker.table("heads", ["head", "score", "note"], [["L0H1", 0.5, None], ["L1H0", 1, "x"]])
        digest = tracker.artifact(adapter, "adapter", "model")
        tracker.summary({"final/p_previous": 0.25})
    assert capfd.readouterr() == ("", "")

    found = records(run_dir)
    (run,) = of_type(found, "run")
    assert run["run_id"] == tracker.wandb_id
    assert (run["project"], run["display_name"], run["run_group"], run["job_type"]) == (
        "p",
        "run-name",
        "g",
        "identify",
    )
    assert sorted(run["tags"]) == ["a", "b"]
    assert {k: v for k, v in run["config"]["update"].items() if k != "_wandb"} == {"seed": 3, "model": {"name": "tiny"}}
    assert not run.get("host") and "git" not in run

    history = [record["item"] for record in of_type(found, "history")]
    assert [numbers(item) for item in history[:3]] == [numbers(line) for line in lines(run_dir)[:3]]
    assert history[3]["train/loss"] == "NaN" and history[3]["step"] == 3 and lines(run_dir)[3]["train/loss"] is None
    assert len(lines(run_dir)) == 4
    assert history[4]["heatmaps/dla.target._type"] == "image-file" and history[4]["step"] == 3
    assert history[5]["heads._type"] == "table-file" and history[5]["heads.nrows"] == 2

    (artifact,) = [record for record in of_type(found, "artifact") if record["type"] == "model"]
    contents = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    assert contents == {name: adapter / name for name in ("adapter_config.json", "weights.bin")}
    summary = {k: v for update in of_type(found, "summary") for k, v in update.get("update", {}).items()}
    assert summary["outputs/model/sha256"] == digest == tree_sha256(adapter)
    assert summary["final/p_previous"] == 0.25
    assert of_type(found, "exit")[0]["exit_code"] == 0

    # Nothing of the machine, the code or the environment, and no secret in any byte of it.
    files = [path for path in (run_dir / "wandb").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert not names & {"requirements.txt", "wandb-metadata.json", "diff.patch", "conda-environment.yaml", "output.log"}
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    staged = [record for record in of_type(found, "artifact") if record["type"] == "run_table"]
    assert all(Path(e["local_path"]).is_relative_to(run_dir) for a in staged for e in a["manifest"]["contents"])


def test_a_failed_run_is_marked_and_a_resumed_one_keeps_its_id(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with (
        pytest.raises(RuntimeError, match="stop"),
        Tracker(run_dir, "x", {}, wandb_mode="offline", resume_id="abc123") as tracker,
    ):
        tracker.log({"a": 1.0}, 0)
        raise RuntimeError("stop")
    tracker.finish()  # again, without effect
    assert tracker.wandb_id == "abc123"
    found = records(run_dir)
    assert of_type(found, "run")[0]["run_id"] == "abc123"
    assert of_type(found, "exit")[0]["exit_code"] == 1


def test_trouble_in_the_middle_costs_a_warning_and_no_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracker(tmp_path, "x", {}, wandb_mode="offline") as tracker:
        run_id = tracker.wandb_id
        tracker.log({"a": 0}, 0)
        tracker.image("i", tmp_path / "no-such.png")
        tracker.log({"a": 1}, 1)
        tracker.log({"a": 2}, 2)
    assert [line["a"] for line in lines(tmp_path)] == [0, 1, 2]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "no-such.png" in warning and "metrics.jsonl" in warning
    assert tracker.wandb_id == run_id is not None


def test_without_a_wandb_that_works_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ImportError
    with Tracker(tmp_path, "x", {}) as tracker:
        tracker.log({"a": 1}, 1)
    monkeypatch.undo()
    assert len(lines(tmp_path)) == 1
    assert len(caplog.records) == 1 and "metrics.jsonl alone" in caplog.text


def test_an_upload_that_does_not_end_is_given_up_with_the_way_to_repeat_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(tmp_path, "x", {}, wandb_mode="offline")
    run = tracker._run
    assert run is not None and run.settings.finish_timeout == run.settings.init_timeout == 60
    assert run.settings.finish_timeout_raises
    really_finish = run.finish

    def finish(exit_code: int) -> None:
        really_finish(exit_code)
        raise TimeoutError

    monkeypatch.setattr(run, "finish", finish)
    tracker.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in caplog.text


@pytest.fixture
def slow_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A tracker whose W&B says that it is done when its file has no more than a header, as a busy machine's may."""
    tracker = Tracker(tmp_path, "x", {}, wandb_mode="offline")
    run = tracker._run
    assert run is not None
    file = Path(run.settings.sync_file)
    really_finish = run.finish

    def finish(exit_code: int) -> None:
        really_finish(exit_code)
        while not wandb_offline.has_end(file):
            time.sleep(0.01)
        whole = file.read_bytes()
        file.write_bytes(whole[:7])
        threading.Timer(0.5, file.write_bytes, [whole]).start()

    monkeypatch.setattr(run, "finish", finish)
    return tracker


def test_an_offline_run_has_its_end_when_it_is_finished(slow_service: Tracker, tmp_path: Path) -> None:
    slow_service.log({"a": 1}, 1)
    slow_service.finish()
    (found,) = wandb_offline.offline_runs(tmp_path)
    assert (found.state, found.steps) == ("ready", 1)


def test_an_offline_run_that_gets_no_end_is_given_up(
    slow_service: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(wandb_run, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    slow_service.finish()
    assert "has no end after 60 seconds" in caplog.text


KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": KEY}, "", "online"),
        ({}, f"machine 127.0.0.1:9 login user password {KEY}", "online"),
        ({}, f"machine elsewhere login user password {KEY}", "offline"),
        ({}, "machine 127.0.0.1:9 login user password short", "offline"),
    ],
)
def test_online_only_with_a_key_and_without_a_question(
    environment: dict[str, str],
    netrc: str,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    for name, value in (
        {"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"} | environment
    ).items():
        monkeypatch.setenv(name, value)
    wandb_run.silence()
    assert wandb_run.mode_by_key() == mode
    assert capfd.readouterr() == ("", "")


UNREACHABLE = """
import logging, sys, pathlib
logging.basicConfig(format="%(levelname)s %(message)s")
from headtune.train.tracking.tracker import Tracker
with Tracker(pathlib.Path(sys.argv[1]), "x", {}, wandb_mode="online") as tracker:
    for step in range(20):
        tracker.log({"train/loss": step / 4}, step)
print(tracker.wandb_id)
"""


@pytest.mark.slow
def test_an_unreachable_server_costs_seconds_and_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In its own process, since the whole of it must end: W&B may also hold up the exit.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    command = [sys.executable, "-c", UNREACHABLE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)  # W&B left to itself never ends
    assert result.returncode == 0, result.stderr
    warnings = result.stderr.strip().splitlines()
    assert len(warnings) == 1 and "offline" in warnings[0], result.stderr
    assert [line["train/loss"] for line in lines(tmp_path)] == [step / 4 for step in range(20)]
    history = [record["item"] for record in of_type(records(tmp_path), "history")]
    assert [item["step"] for item in history] == list(range(20))
    assert result.stdout.split()[0] == of_type(records(tmp_path), "run")[0]["run_id"]


# --- the Trainer's callback -------------------------------------------------------------------------------------------


def test_the_callback_forwards_numbers_under_their_split(tmp_path: Path) -> None:
    state: Any = SimpleNamespace(global_step=4)
    nothing: Any = None
    with Tracker(tmp_path, "x", {}, wandb_mode="disabled") as tracker:
        callback = trainer_callback(tracker)
        callback.on_log(nothing, state, nothing, logs={"loss": 0.5, "grad_norm": torch.tensor(2.0), "text": "no"})
        callback.on_log(nothing, state, nothing, logs={"eval_loss": 0.25, "eval/p_previous": 0.1, "test_x": 1})
        callback.on_log(nothing, state, nothing, logs={"text": "no"})
    assert [numbers(line) for line in lines(tmp_path)] == [
        {"step": 4, "train/loss": 0.5, "train/grad_norm": 2.0},
        {"step": 4, "eval/loss": 0.25, "eval/p_previous": 0.1, "test/x": 1},
    ]


def test_a_real_trainer_logs_every_step(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": ((x * self.weight - 1) ** 2).mean()}

    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    with Tracker(tmp_path, "x", {}, wandb_mode="disabled") as tracker:
        data: Any = [{"x": torch.ones(1)} for _ in range(8)]
        Trainer(Tiny(), arguments, train_dataset=data, callbacks=[trainer_callback(tracker)]).train()
    by_step = {line["step"]: line["train/loss"] for line in lines(tmp_path) if "train/loss" in line}
    assert sorted(by_step) == [1, 2, 3] and by_step[1] == 1.0 and by_step[3] < by_step[1]


def test_a_busy_machine_is_given_longer_than_a_server_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("INIT", "FINISH"):
        monkeypatch.delenv(f"WANDB_{name}_TIMEOUT", raising=False)
    offline, online = (wandb_run.settings(mode, tmp_path) for mode in ("offline", "online"))
    assert (offline.init_timeout, offline.finish_timeout) == (60.0, 60.0)
    assert (online.init_timeout, online.finish_timeout) == (5.0, 5.0)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7")
    assert [wandb_run.settings(mode, tmp_path).finish_timeout for mode in ("offline", "online")] == [7.0, 7.0]
