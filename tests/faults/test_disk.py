"""Disks that are full or cannot be written: one line, nothing valid lost, and the run goes on once there is room."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headtune.analysis.utils import state_files
from headtune.analysis.utils.errors import CheckError
from headtune.train.trainer import failures
from helpers import machine as machines
from helpers.machine import FAMILIES, Machine
from helpers.small_runs import train, write_recipe

Unbroken = Callable[[str], Path]


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int, *options: str) -> Iterator[Path]:
    """A file system of its own at `place`."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={megabytes}m", *options]), "none", str(place)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """Take all the room that is left."""
    path = place / "filler"
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    return path


@pytest.mark.parametrize(
    ("family", "when"),
    [
        ("lofit", "step 5/"),  # a checkpoint
        pytest.param("seekr", "importance of heads", marks=pytest.mark.slow),  # and teachers
        pytest.param("full", "evaluating the adapted model", marks=pytest.mark.slow),
        pytest.param("lofit", f"step {machines.STEPS}/", marks=pytest.mark.slow),  # the adapter
    ],
)
def test_a_disk_that_fills_up(
    family: str, when: str, machine: Machine, unbroken: Unbroken, tiny_llama: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        folder = machines.write(family, disk / "here", tiny_llama, save_steps=4)
        child = machine.start(folder, log=tmp_path / "log")
        child.wait_for(when)
        child.signal(signal.SIGSTOP)  # it may be in the middle of anything
        before = machines.checkpoints_in(folder)
        filler = fill(disk)
        child.signal(signal.SIGCONT)
        assert child.wait() == 1, child.said()
        line = machines.complaint(child.said())
        assert "No space left on device; make room, then go on with: headtune train " in line and "--resume" in line
        assert set(before) <= set(machines.checkpoints_in(folder)), "what was whole is whole"
        filler.unlink()
        code, said = machine.run(folder, "--resume")
        assert code == 0, said
        machines.require_same(folder, unbroken(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_disk_that_cannot_be_written_is_refused(
    family: str, machine: Machine, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = machines.write(family, tmp_path / "here", tiny_llama)
    with small_disk(folder / "run", 1, "ro"):
        code, said = machine.run(folder)
        assert code == 2 and "cannot write to 'run': Read-only file system" in machines.complaint(said)


def test_a_broken_run_on_a_disk_that_cannot_be_written_is_kept(
    machine: Machine, broken: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    with small_disk(folder, 64) as disk:
        subprocess.run(["cp", "-r", f"{broken('lofit')}/.", str(disk)], check=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = machines.checkpoints_in(folder)
        child = machine.start(folder, "--resume", log=tmp_path / "log")
        assert child.wait() == 1
        line = machines.complaint(child.said())
        assert "Read-only file system; make it writable, then go on with" in line
        assert machines.checkpoints_in(folder) == before


def test_a_limit_on_the_size_of_files(machine: Machine, unbroken: Unbroken, tiny_llama: Path, tmp_path: Path) -> None:
    """`ulimit -f`: what a batch system may set; the model's file would be larger."""
    folder = machines.write("full", tmp_path / "here", tiny_llama)
    child = machine.start(folder, file_limit=100_000)
    assert child.wait() == 1
    assert "File too large; raise the limit on the size of files" in machines.complaint(child.said())
    assert machines.checkpoints_in(folder) == [] and machines.state(folder) == "failed"
    code, said = machine.run(folder, "--resume")
    assert code == 0 and "is passed over" in said
    machines.require_same(folder, unbroken("full"))


def test_errors_that_are_not_of_the_disk_or_of_memory_stay_as_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes"), FileNotFoundError(2, "No such file"), CheckError("one")):
        with pytest.raises(type(error)) as caught, failures.explained_failures(tmp_path):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EPERM])
def test_a_file_elsewhere_that_cannot_be_read_is_not_the_disk_of_the_run(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def told(*where: str) -> type[BaseException]:
        with pytest.raises((CheckError, OSError)) as caught, failures.explained_failures(folder):
            raise OSError(number, os.strerror(number), *where)
        return caught.type

    assert issubclass(told(), OSError), "before there is a run"
    folder.mkdir()
    assert told() is told(str(folder / "metrics.jsonl")) is CheckError
    assert issubclass(told(str(tmp_path / "facts.jsonl")), OSError)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_a_file_elsewhere_cannot_be_written(number: int, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="cannot write '/cache/rows'"), failures.explained_failures(tmp_path):
        raise OSError(number, os.strerror(number), "/cache/rows")


def test_an_unreadable_task_is_told_as_one(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unreadable = Path("/proc/self/mem")  # whoever reads its beginning gets EIO
    if not unreadable.is_file():
        pytest.skip("there is no /proc")
    recipe = write_recipe(tmp_path, tiny_llama, task={"train": str(unreadable)})
    assert train(recipe) == 2
    said = machines.complaint(capsys.readouterr().err)
    assert "Input/output error" in said and "cannot write" not in said and not (tmp_path / "run").exists()


def test_half_a_line_of_metrics_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    state_files.mend_lines(path)
    assert not path.exists()
    for content, expected in ((b'{"a": 1}\n{"b"', b'{"a": 1}\n'), (b'{"a": 1}\n', b'{"a": 1}\n'), (b'{"a', b"")):
        path.write_bytes(content)
        state_files.mend_lines(path)
        assert path.read_bytes() == expected
