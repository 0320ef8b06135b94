"""Processes of one launch, as the launcher describes them in the environment. Light: it does not import torch."""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number among all of the launch; 0 for a process alone."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether it is a collective operation that failed: another process is gone or stuck."""
    return world_size() > 1 and ("gloo/transport" in str(error) or type(error).__name__.startswith("Dist"))
