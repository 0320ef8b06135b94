"""How a process ends badly: one line, and only one where several processes end for the same reason."""

from __future__ import annotations

import contextlib
import signal
import time

from headtune.analysis.utils.processes import rank, world_size

LAUNCHER_SECONDS = 20.0  # seconds that a rank leaves to the launcher to end it because of another


def exit_with(message: str, code: int) -> int:
    """Print an error as one line and return its exit code; a rank other than 0 only speaks if it fails alone.

    Whatever is wrong with a recipe all ranks notice, and rank 0's exit has the launcher end the others while they wait.
    """
    from . import console

    if number := rank():
        wait_for_launcher()
        message = f"rank {number}: {message}"
    return console.print_error(message, code)


def wait_for_launcher() -> None:
    """Leave the launcher the time to end this process because another one has ended badly."""
    with contextlib.suppress(ValueError):  # only the main thread may; training answers SIGTERM in its own way
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(LAUNCHER_SECONDS)


def leave_process_group() -> None:
    """Tell the other processes of a launch that this one is done."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def exit_for_lost_peer(error: RuntimeError) -> int:
    """The one who is gone is the one to speak, and its launcher names it; this rank speaks only if neither happens."""
    wait_for_launcher()
    from . import console

    reason = str(error).splitlines()[0][:200]
    return console.print_error(f"rank {rank()} lost the connection to another process ({reason})", 1)
