"""What goes wrong around a run rather than in it, in one line each: a full disk, too little memory, a damaged file.

The line says what to do, and the run is kept as it was: its newest whole checkpoint stays, and `--resume` goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.processes import world_size

_DISK = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "check the disk",
}
_ALSO_READING = {errno.EACCES, errno.EPERM, errno.EIO}  # of a file elsewhere, they say that it cannot be read
_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)


@contextlib.contextmanager
def explained_failures(folder: Path) -> Iterator[None]:
    """Inside the block, where a run in `folder` goes on, what the machine refuses is told in one line.

    Raises:
        CheckError: in place of an error about the disk or about memory.
    """
    try:
        yield
    except (InputError, CheckError):
        raise
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        line = _line(error, folder)
        if line is None:
            raise
        raise CheckError(line) from error


def advice(folder: Path) -> str:
    """How to go on with what is left of a run in `folder`."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        return "start it again"
    together = " (launched as before)" if world_size() > 1 else ""
    return f"go on with: headtune train {recipe} --resume{together}"


def _line(error: BaseException, folder: Path) -> str | None:
    again = advice(folder)
    if isinstance(error, MemoryError) or _MEMORY.search(str(error)):
        reason = (str(error).strip() or "no memory left").splitlines()[0].split(". ")[0]
        return (
            f"out of memory ({reason}); free some and {again}, or start anew with a lower "
            "training.per_device_train_batch_size (and as much more training.gradient_accumulation_steps), "
            "evaluation.batch_size or method.prefix_memory_gb"
        )
    number = _disk_error(error, folder)
    if number is None:
        return None
    path = getattr(error, "filename", None) or folder
    return f"cannot write {str(path)!r}: {os.strerror(number)}; {_DISK[number]}, then {again}"


def _disk_error(error: BaseException | None, folder: Path) -> int | None:
    """The number of the error of the disk behind an error; libraries that write files wrap it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return error.errno if error.errno not in _ALSO_READING or _inside(error.filename, folder) else None
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
            return int(match.group(1)) if int(match.group(1)) in _DISK else None
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):  # torch.save tells no reason
            return _reason_to_refuse(folder)
        error = error.__cause__ or error.__context__
    return None


def _inside(name: Any, folder: Path) -> bool:
    if name is None:  # as of what fails after the file was opened; the recipe and its tasks are read before the run is
        return folder.is_dir()
    return Path(os.fsdecode(name)).resolve().is_relative_to(folder.resolve())


def _reason_to_refuse(folder: Path) -> int:
    probe = folder / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(1 << 20))
    except OSError as error:
        return error.errno if error.errno in _DISK else errno.EIO
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return errno.ENOSPC
