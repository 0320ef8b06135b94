"""Files that are damaged, gone or others than they were: passed over and named, or refused, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from headtune.train.trainer import checkpoints
from helpers import machine as machines
from helpers.machine import Machine

pytestmark = pytest.mark.slow  # every fault needs processes of its own

Made = Callable[[str], Path]


@pytest.fixture
def copy(broken: Made, tmp_path: Path) -> Made:
    """A broken run of a family, to be broken further."""

    def run(family: str) -> Path:
        return Path(shutil.copytree(broken(family), tmp_path / "here"))

    return run


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def weights(checkpoint: Path) -> Path:
    (path,) = checkpoint.glob("*model.safetensors")
    return path


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "damage", "reason"),
    [
        ("lofit", lambda folder: truncate(weights(folder)), "bytes, not"),
        ("full", lambda folder: flip(folder / "optimizer.pt"), "SHA-256"),
        ("seekr", lambda folder: truncate(weights(folder)), "bytes, not"),
    ],
    ids=["lofit-truncated", "full-flipped", "seekr-truncated"],
)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    family: str, damage: Callable[[Path], None], reason: str, copy: Made, machine: Machine, unbroken: Made
) -> None:
    folder = copy(family)
    older, newest = machines.checkpoints_in(folder)[-2:]
    damage(newest)
    code, said = machine.run(folder, "--resume")
    assert code == 0, said
    (line,) = (line for line in said.splitlines() if "is passed over" in line)
    assert newest.name in line and reason in line
    steps = [int(line.split()[1].split("/")[0]) for line in said.splitlines() if line.startswith("step ")]
    assert steps[0] == int(older.name.partition("-")[2]) + 1
    machines.require_same(folder, unbroken(family))


def test_where_no_checkpoint_is_whole_the_training_begins_anew(copy: Made, machine: Machine, unbroken: Made) -> None:
    folder = copy("lofit")
    for checkpoint in machines.checkpoints_in(folder):
        (checkpoint / "rng_state.pth").unlink()
    code, said = machine.run(folder, "--resume")
    assert code == 0 and said.count("rng_state.pth is missing") == 2 and "step 1/" in said, said
    machines.require_same(folder, unbroken("lofit"))


DAMAGES: dict[str, list[Callable[[Path], object]]] = {
    "complete.json is damaged": [
        lambda folder: truncate(folder / checkpoints.MARK),
        lambda folder: (folder / checkpoints.MARK).write_text("[]"),
        lambda folder: (folder / checkpoints.MARK).write_text('{"files": {"a": 1}}'),
    ],
    "did not come to its end": [lambda folder: (folder / checkpoints.MARK).unlink()],
    "trainer_state.json is missing": [lambda folder: (folder / "trainer_state.json").unlink()],
    "rng_state.pth has other bytes": [lambda folder: flip(folder / "rng_state.pth")],
    "scheduler.pt has": [lambda folder: truncate(folder / "scheduler.pt")],
}


def test_why_a_checkpoint_is_not_whole(broken: Made, tmp_path: Path) -> None:
    for number, (reason, damage) in enumerate((reason, one) for reason, all_ in DAMAGES.items() for one in all_):
        folder = Path(shutil.copytree(broken("lofit"), tmp_path / str(number)))
        older, newest = machines.checkpoints_in(folder)[-2:]
        damage(newest)
        said: list[str] = []
        assert checkpoints.newest(folder / "run", said.append) == older
        passed_over, taken = said
        assert newest.name in passed_over and reason in passed_over
        assert taken == f"going on from {older}"
        assert newest.is_dir(), "what is damaged is left to be looked at"


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_word_of_caution(copy: Made) -> None:
    folder = copy("lofit")
    newest = machines.checkpoints_in(folder)[-1]
    (newest / checkpoints.MARK).write_text('{"step": 8}')
    said: list[str] = []
    assert checkpoints.newest(folder / "run", said.append) == newest
    assert "not verified" in said[0]


def test_older_checkpoints_are_removed_once_the_new_one_is_whole(tmp_path: Path) -> None:
    class Arguments:
        output_dir = str(tmp_path)
        save_total_limit: int | None = 2

    class State:
        is_world_process_zero, best_model_checkpoint, global_step = True, str(tmp_path / "checkpoint-1"), 6

    for step in (1, 2, 3, 4, 5, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step not in (5, 6):
            checkpoints.mark(tmp_path / f"checkpoint-{step}", step)
    callback = checkpoints.Mark(Arguments)
    assert Arguments.save_total_limit is None, "transformers would remove them before"
    callback.on_save(Arguments, State, None)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-1", "checkpoint-4", "checkpoint-6", "checkpoint-9"}
    assert (tmp_path / "checkpoint-6" / checkpoints.MARK).is_file()


# --- what a run is of -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lofit", "seekr"])
def test_a_run_is_not_taken_up_with_other_examples(family: str, copy: Made, machine: Machine) -> None:
    folder = copy(family)
    task = folder / ("train0.jsonl" if family == "seekr" else "cities.jsonl")
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    rows[0]["answers"] = ["Atlantis"]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = machines.checkpoints_in(folder)
    code, said = machine.run(folder, "--resume")
    assert code == 2 and "was started with" in machines.complaint(said) and "other" in machines.complaint(said)
    task.unlink()
    code, said = machine.run(folder, "--resume")
    assert code == 2 and f"{task.name!r} does not exist" in machines.complaint(said)
    assert machines.checkpoints_in(folder) == before


@pytest.mark.parametrize(
    ("family", "name"),
    [("lofit", "run.json"), ("full", "recipe.yaml"), ("seekr", "run.json"), ("seekr", "sequence.json")],
)
def test_what_a_run_knows_of_itself_is_damaged(family: str, name: str, copy: Made, machine: Machine) -> None:
    folder = copy(family)
    truncate(folder / "run" / name)
    before = machines.checkpoints_in(folder)
    code, said = machine.run(folder, "--resume")
    assert code == 2 and name in machines.complaint(said)
    assert machines.checkpoints_in(folder) == before


def test_a_damaged_measurement_of_the_base_is_made_again(copy: Made, machine: Machine, unbroken: Made) -> None:
    folder = copy("full")
    truncate(folder / "run" / "evaluation.json")
    code, said = machine.run(folder, "--resume")
    assert code == 0 and "evaluating the base model" in said, said
    machines.require_same(folder, unbroken("full"))


def test_a_damaged_base_model_is_refused(machine: Machine, tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    folder = machines.write("lofit", tmp_path / "here", model)
    truncate(model / "model.safetensors")
    code, said = machine.run(folder)
    assert code == 2 and "cannot be loaded" in machines.complaint(said) and not (folder / "run").exists()


def test_a_run_is_not_taken_up_with_other_weights(machine: Machine, tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    folder = machines.write("lofit", tmp_path / "here", model, max_steps=1, save_steps=1)
    child = machine.start(folder)
    child.wait_for("training on")
    child.signal(9)
    child.wait()
    flip(model / "model.safetensors")
    code, said = machine.run(folder, "--resume")
    assert code == 2 and "started with other weights" in machines.complaint(said)


def test_a_damaged_head_set_is_refused(machine: Machine, tiny_llama: Path, tmp_path: Path) -> None:
    folder = machines.write("lofit", tmp_path / "here", tiny_llama)
    (folder / "heads.json").write_text('{"format": 1, "roles": {"recall": [')
    code, said = machine.run(folder, "heads={from: heads.json}")
    assert code == 2 and "heads.json" in machines.complaint(said) and not (folder / "run").exists()


def test_a_damaged_checkpoint_is_none_of_those_kept(tmp_path: Path) -> None:
    """Of two that are to be kept, the other one is the newest that is whole."""
    for step in (25, 50, 75, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(bytes(8))
        if step < 100:
            checkpoints.mark(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-75" / "weights").write_bytes(bytes(7) + b"1")
    arguments = SimpleNamespace(save_total_limit=2, output_dir=str(tmp_path))
    marking = checkpoints.Mark(arguments)
    assert arguments.save_total_limit is None  # transformers removes none itself
    state = SimpleNamespace(global_step=100, is_world_process_zero=True, best_model_checkpoint=None)
    marking.on_save(arguments, state, None)
    assert sorted(checkpoints.by_step(tmp_path)) == [50, 100]
    assert checkpoints.newest(tmp_path, lambda _line: None) == tmp_path / "checkpoint-100"
