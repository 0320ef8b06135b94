"""Processes of one launch."""

from __future__ import annotations

import os


def lost_another(error: RuntimeError) -> bool:
    """Whether it is a collective operation that failed: another process is gone or stuck."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and ("gloo/transport" in str(error) or type(error).__name__.startswith("Dist"))
