"""A broken run goes on where it stopped, two processes find what one finds, and neither changes a bit of the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from headtune.analysis.identify import pipeline, verification
from headtune.analysis.identify.pipeline import IdentifyResult, partial_folder
from headtune.analysis.methods import logit_attribution, parallel_map, patching, registry
from headtune.analysis.methods.parallel_map import ParallelMap
from headtune.analysis.methods.scores import Array
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.cli import console, exits
from headtune.cli.main import main
from helpers.paths import ROOT
from helpers.small_runs import head_set, write_task
from helpers.tiny import tiny_model, tiny_task, tiny_tokenizer


class Broken(Exception):
    """What stops a run in the middle."""


def breaking(after: int, step: str = "", error: type[BaseException] = Broken) -> Callable[..., Iterator[Any]]:
    """Progress that ends the steps named `step...` before item `after`, counted from 0."""

    def progress(items: Sequence[Any], what: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == after and what.startswith(step):
                raise error
            yield item

    return progress


def silent(items: Sequence[Any], _what: str) -> Iterator[Any]:
    return iter(items)


class Work:
    """Rows that tell their index, and which were asked for."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, index: int) -> dict[str, Array]:
        self.calls.append(index)
        generator = np.random.default_rng(index)
        return {
            "a": generator.normal(size=(2, 3)).astype(np.float32),
            "turned": np.asfortranarray(generator.normal(size=(3, 2)).astype(np.float32)),
        }


def same_rows(found: Sequence[dict[str, Array]], expected: Sequence[dict[str, Array]]) -> bool:
    return len(found) == len(expected) and all(
        row.keys() == other.keys() and all(np.array_equal(row[name], other[name]) for name in row)
        for row, other in zip(found, expected, strict=True)
    )


def expected_rows(n: int) -> list[dict[str, Array]]:
    return [Work()(index) for index in range(n)]


# --- one process ------------------------------------------------------------------------------------------------------


def test_a_broken_map_computes_only_the_rest(tmp_path: Path) -> None:
    first, second, third = Work(), Work(), Work()
    with pytest.raises(Broken):
        ParallelMap(tmp_path / "kept", {"seed": 0}).map(7, first, breaking(3), "some step")
    assert first.calls == [0, 1, 2]
    found = ParallelMap(tmp_path / "kept", {"seed": 0}).map(7, second, silent, "some step")
    assert second.calls == [3, 4, 5, 6] and same_rows(found, expected_rows(7))
    assert same_rows(ParallelMap(tmp_path / "kept", {"seed": 0}).map(7, third, silent, "some step"), expected_rows(7))
    assert third.calls == []


def test_progress_counts_what_is_left(tmp_path: Path) -> None:
    left: list[list[int]] = []

    def progress(items: Sequence[int], _what: str) -> Sequence[int]:
        left.append(list(items))
        return items

    with pytest.raises(Broken):
        ParallelMap(tmp_path).map(4, Work(), breaking(2), "step")
    ParallelMap(tmp_path).map(4, Work(), progress, "step")
    assert left == [[2, 3]]


def test_steps_and_keys_are_kept_apart(tmp_path: Path) -> None:
    ParallelMap(tmp_path, {"seed": 0, "model": {"a": 1, "b": 2}}).map(3, Work(), silent, "one")
    for key, what in (
        ({"seed": 1, "model": {"a": 1, "b": 2}}, "one"),
        ({"seed": 0, "model": {"a": 1, "b": 3}}, "one"),
        (None, "one"),
        ({"seed": 0, "model": {"a": 1, "b": 2}}, "another"),
    ):
        work = Work()
        ParallelMap(tmp_path, key).map(3, work, silent, what)
        assert work.calls == [0, 1, 2], (key, what)
    work = Work()
    ParallelMap(tmp_path, {"model": {"b": 2, "a": 1}, "seed": 0}).map(3, work, silent, "one")
    assert work.calls == []  # the order of a key's parts says nothing


@pytest.mark.parametrize("damage", [b"", b"\0" * 5, b"\xff" * 200, "cut"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: bytes | str) -> None:
    ParallelMap(tmp_path).map(3, Work(), silent, "step")
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:-7] if isinstance(damage, str) else damage)
    work = Work()
    assert same_rows(ParallelMap(tmp_path).map(3, work, silent, "step"), expected_rows(3))
    assert work.calls == [1]


def test_an_example_that_says_nothing_is_finished_too(tmp_path: Path) -> None:
    """A method may have nothing to say of an example: an empty row, not a missing one."""
    kept = [ParallelMap(tmp_path).map(2, lambda _index: {}, silent, "step") for _ in range(2)]
    assert kept == [[{}, {}], [{}, {}]]


def test_once(tmp_path: Path) -> None:
    calls = []

    def work() -> dict[str, Array]:
        calls.append(1)
        return expected_rows(1)[0]

    for _ in range(2):
        assert same_rows([ParallelMap(tmp_path).once("gates", work)], expected_rows(1))
    assert len(calls) == 1
    ParallelMap().once("gates", work)
    ParallelMap().once("gates", work)
    assert len(calls) == 3


def test_finish_removes_everything_and_no_folder_keeps_nothing(tmp_path: Path) -> None:
    kept = ParallelMap(tmp_path / "kept", {"seed": 0})
    ParallelMap(tmp_path / "kept", {"seed": 1}).map(2, Work(), silent, "left over")
    kept.map(2, Work(), silent, "step")
    kept.finish()
    kept.finish()
    assert list(tmp_path.iterdir()) == []
    ParallelMap().map(2, Work(), silent, "step")
    ParallelMap().finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [InputError, CheckError, ZeroDivisionError])
def test_an_error_is_raised_and_what_is_finished_stays(tmp_path: Path, error: type[Exception]) -> None:
    def work(index: int) -> dict[str, Array]:
        if index == 2:
            raise error("example 2")
        return Work()(index)

    with pytest.raises(error, match="example 2"):
        ParallelMap(tmp_path).map(4, work, silent, "step")
    again = Work()
    ParallelMap(tmp_path).map(4, again, silent, "step")
    assert again.calls == [2, 3]
    with pytest.raises(error, match="example 2"):
        ParallelMap(tmp_path).once("whole", lambda: work(2))


# --- identify ---------------------------------------------------------------------------------------------------------


def model_of(seed: int = 0) -> HeadModel:
    return wrap_model(tiny_model("llama", seed, num_attention_heads=8, num_key_value_heads=4), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return model_of()


TASK = tiny_task(subjects=5)
OPTIONS: dict[str, Any] = {"top": 3, "verify_top": 2, "n_random": 3}


@pytest.fixture(scope="module")
def unbroken(model: HeadModel) -> IdentifyResult:
    return pipeline.identify(model, TASK, **OPTIONS)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that direct attribution is asked for, as it is asked."""
    prompts: list[str] = []
    right = logit_attribution.attribute

    def spy(model: HeadModel, encoded: Any, *rest: Any) -> Any:
        prompts.append(encoded.example.prompt)
        return right(model, encoded, *rest)

    monkeypatch.setattr(logit_attribution, "attribute", spy)
    return prompts


def same(found: IdentifyResult, expected: IdentifyResult) -> None:
    """Bit for bit, but for when and by which command."""
    unsigned = [replace(one.heads, created="", command="") for one in (found, expected)]
    assert unsigned[0] == unsigned[1]
    for mine, other in (
        (found.scores.by_example, expected.scores.by_example),
        (found.scores.whole, expected.scores.whole),
    ):
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[name], other[name], equal_nan=True) for name in other)


@pytest.mark.parametrize("step", ["scoring heads", "verifying"])
def test_a_broken_identification_ends_as_an_unbroken_one(
    model: HeadModel, unbroken: IdentifyResult, scored: list[str], tmp_path: Path, step: str
) -> None:
    partial = tmp_path / "kept"
    with pytest.raises(Broken):
        pipeline.identify(model, TASK, **OPTIONS, partial=partial, progress=breaking(4, step))
    before = list(scored)
    assert len(before) == (4 if step == "scoring heads" else len(TASK.examples))
    found = pipeline.identify(model, TASK, **OPTIONS, partial=partial)
    assert sorted(scored) == sorted(example.prompt for example in TASK.examples)
    same(found, unbroken)
    assert partial.exists()
    found.save(tmp_path / "out")
    assert not partial.exists()


@pytest.mark.slow
def test_what_other_arguments_finished_is_not_used(model: HeadModel, scored: list[str], tmp_path: Path) -> None:
    partial = tmp_path / "kept"

    def calls(of: HeadModel = model, task: Task = TASK, method: str = "all", **changes: Any) -> int:
        scored.clear()
        with pytest.raises(Broken):
            pipeline.identify(
                of, task, method, **(OPTIONS | changes), partial=partial, progress=breaking(0, "verifying")
            )
        return len(scored)

    n = len(TASK.examples)
    assert calls() == n
    assert calls() == 0, "the same arguments go on"
    assert calls(method="dla,ablation") == calls(method="ablation, dla,dla") - n == 0, "'all' is these two"
    assert calls(seed=1) == n
    assert calls(method="dla") == n
    assert calls(task=Task("cities", TASK.examples[:-1])) == n - 1
    assert calls(task=Task("cities", TASK.examples[::-1])) == n
    assert calls(of=model_of(seed=1)) == n
    assert calls(controls={"other": head_set(model.identity())}) == n
    assert calls(controls={"another": head_set(model.identity())}) == n
    assert calls(threshold=0.1) == n
    assert calls(rank_by="raw") == n
    assert calls() == 0, "and all of them are still there"


def test_a_whole_task_method_goes_on_too(
    model: HeadModel, scored: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed once for the task; the other method's finished examples are not computed again, nor is it."""
    fits = []

    def whole(model: HeadModel, examples: Sequence[Any], seed: int, progress: Any) -> dict[str, Array]:
        fits.append(seed)
        values = np.linspace(-1, 1, model.n_layers * model.n_heads, dtype=np.float32).reshape(model.n_layers, -1)
        for _ in progress(range(3), "fitting"):
            values = values[::-1]
        return {"gates.target": values, "gates.previous": -values, "gates.irrelevant": np.abs(values)}

    monkeypatch.setitem(registry.METHODS, "gates", replace(registry.METHODS["gates"], whole=whole))
    expected = pipeline.identify(model, TASK, "dla,gates", **OPTIONS)
    for step, n_scored, n_fits in (("fitting", len(TASK.examples), 1), ("verifying", 0, 1), ("nothing", 0, 0)):
        scored.clear()
        fits.clear()
        try:
            found = pipeline.identify(
                model, TASK, "dla,gates", **OPTIONS, partial=tmp_path / "kept", progress=breaking(1, step)
            )
        except Broken:
            assert step != "nothing"
        assert (len(scored), len(fits)) == (n_scored, n_fits), step
    same(found, expected)


def test_the_elbow_and_controls_are_kept_too(model: HeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS | {"top": "elbow", "controls": {"other": head_set(model.identity())}}
    expected = pipeline.identify(model, TASK, **options)
    with pytest.raises(Broken):
        pipeline.identify(model, TASK, **options, partial=tmp_path / "kept", progress=breaking(4, "verifying"))
    asked = []
    right = patching.set_probabilities

    def spy(model: HeadModel, encoded: Any, sets: Any) -> Any:
        asked.append(len(sets))
        return right(model, encoded, sets)

    monkeypatch.setattr(verification, "set_probabilities", spy)
    same(pipeline.identify(model, TASK, **options, partial=tmp_path / "kept"), expected)
    assert len(asked) == len(TASK.examples) - 4, "nothing but the verification of the other examples"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, subjects=4)
    return tmp_path


def words(model: Path, out: str, *more: str) -> list[str]:
    given = ["identify", str(model), "--task", "cities.jsonl", "--out", out, "--top", "2", "--wandb", "disabled"]
    return [*given, *more]


def test_an_interrupted_command_says_how_to_go_on(
    place: Path,
    tiny_llama: Path,
    scored: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = words(tiny_llama, "runs/heads")
    with monkeypatch.context() as patched:
        patched.setattr(console, "progress", breaking(3, error=KeyboardInterrupt))
        assert main(command) == 130
    captured = capsys.readouterr()
    assert captured.err == "headtune: interrupted; run the same command again to go on\n" and captured.out == ""
    assert not (place / "runs" / "heads").exists()
    assert (place / "runs" / ".heads.partial").is_dir() and len(scored) == 3

    assert main(command) == 0
    assert len(scored) == 8
    assert [path.name for path in (place / "runs").iterdir()] == ["heads"]
    assert {"heads.json", "scores.safetensors", "report.html"} <= {
        path.name for path in (place / "runs/heads").iterdir()
    }


def test_a_command_interrupted_before_anything_is_kept_just_says_so(
    place: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "progress", breaking(0, error=KeyboardInterrupt))
    assert main(words(tiny_llama, "heads")) == 130
    assert capsys.readouterr().err == "headtune: interrupted; run the same command again\n"
    assert [path.name for path in place.iterdir()] == ["cities.jsonl"]


def test_partial_results_lie_beside_the_output(place: Path) -> None:
    assert partial_folder(Path("runs/heads")) == place / "runs" / ".heads.partial"
    assert partial_folder(Path("heads/")) == place / ".heads.partial"
    assert partial_folder(Path(".")) == place.parent / f".{place.name}.partial"


# --- two processes ----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
import numpy as np
from headtune.analysis.methods.parallel_map import ParallelMap, rank_and_world
from headtune.analysis.utils.errors import InputError

rank, world = rank_and_world()
calls = []

def work(index):
    calls.append(index)
    if index == 5:
        raise InputError("example 5 is wrong")
    return {"a": np.full((1, 2), index, np.float32)}

def whole():
    calls.append("whole")
    return {"a": np.full((1, 2), 7, np.float32)}

silent = lambda items, _what: iter(items)
kept = ParallelMap(__import__("pathlib").Path(sys.argv[1]), None, share=True)
told = {"world": world}
told["rows"] = [int(row["a"][0, 0]) for row in kept.map(5, work, silent, "five")]
told["one"] = [int(row["a"][0, 0]) for row in kept.map(1, work, silent, "one")]
told["none"] = kept.map(0, work, silent, "none")
told["whole"] = int(kept.once("whole", whole)["a"][0, 0])
alone = ParallelMap()
told["alone"] = [alone.rank, alone.world]
try:
    kept.map(6, work, silent, "six")
    told["refused"] = None
except InputError as error:
    told["refused"] = str(error)
told["again"] = [int(row["a"][0, 0]) for row in ParallelMap(kept._top, None, share=True).map(5, work, silent, "five")]
told["calls"] = calls
with open(os.path.join(sys.argv[2], f"{rank}.json"), "w") as file:
    json.dump(told, file)
import torch.distributed
torch.distributed.barrier()
kept.finish()
torch.distributed.destroy_process_group()
"""


def launch(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with two processes on the CPU, as the configuration's header says."""
    started = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
    started += [str(ROOT / "accelerate_configs" / "ddp_cpu_2.yaml"), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(started, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.slow
def test_two_processes_share_examples_and_errors(tmp_path: Path) -> None:
    """Each example in one process, results in order in both; what one refuses is refused by both, so none waits."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch("script.py", "kept", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0].pop("calls") == [0, 2, 4, 0, "whole", 0, 2, 4]
    assert told[1].pop("calls") == [1, 3, 1, 3, 5]
    assert (
        told[0]
        == told[1]
        == {
            "world": 2,
            "rows": [0, 1, 2, 3, 4],
            "one": [0],
            "none": [],
            "whole": 7,
            "alone": [0, 1],
            "refused": "example 5 is wrong",
            "again": [0, 1, 2, 3, 4],
        }
    )
    assert not (tmp_path / "kept").exists()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as each launched process has: sums are rounded otherwise with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_what_one_finds(place: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Methods by example, with references, and of the whole task; the elbow and a control; files of the first alone."""
    head_set(json.loads((_identity(tiny_llama, place)).read_text())["model"]).save(place / "control.json")
    capsys.readouterr()
    more = ["--method", "dla,ablation,mean,gates", "--control", "other=control.json", "--json"]
    more = ["elbow" if word == "2" else word for word in words(tiny_llama, "OUT", *more)]
    assert main(["one" if word == "OUT" else word for word in more]) == 0
    one = json.loads(capsys.readouterr().out)
    done = launch("-m", "headtune.analysis", *("two" if word == "OUT" else word for word in more), cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)
    assert two == json.loads((place / "two" / "heads.json").read_text())
    for heads in (one, two):
        del heads["created"], heads["command"]
    assert one == two
    assert {"gates", "mean"} <= {name.split(".")[0] for name in load_file(place / "two/scores.safetensors")}
    scores = [load_file(place / name / "scores.safetensors") for name in ("one", "two")]
    assert scores[0].keys() == scores[1].keys()
    assert all(np.array_equal(scores[0][name], scores[1][name]) for name in scores[0])
    files = [sorted(str(f.relative_to(place / name)) for f in (place / name).rglob("*")) for name in ("one", "two")]
    assert files[0] == files[1]
    assert not list(place.glob(".*"))


def _identity(model: Path, place: Path) -> Path:
    assert main(words(model, "first", "--method", "dla", "--max-examples", "2")) == 0
    return place / "first" / "heads.json"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_wrong_task_is_said_once_and_soon(
    rank: str, place: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process finds it before it meets the others; all but the first leave the launcher the time to end them."""
    waited: list[str] = []
    monkeypatch.setattr(exits, "wait_for_launcher", lambda: waited.append(rank))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["cities.jsonl:tset" if word == "cities.jsonl" else word for word in words(tiny_llama, "heads")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("headtune: ") == 1 and "did you mean 'test'" in said
    assert waited == ([] if rank == "0" else ["1"]) and ("rank 1: " in said) == bool(waited)
    assert [path.name for path in place.iterdir()] == ["cities.jsonl"]


def test_more_processes_than_joined_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched twice, but accelerate sees one process: two halves of the examples would be taken for the whole."""
    import accelerate

    class Alone:
        num_processes, process_index = 1, 0

        def __init__(self, **_options: Any) -> None:
            pass

    monkeypatch.setattr(accelerate, "PartialState", Alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckError, match="2 processes were launched but 1 joined"):
        parallel_map.rank_and_world()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel_map.rank_and_world() == (0, 1)
