"""How a trainer of the tests is set up: on the CPU, in float32, telling nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def config_of(folder: Path, kind: str = "SFTConfig", **settings: Any) -> Any:
    """A configuration of TRL's that writes to `folder`."""
    import trl  # here, so that processes of a test start without it

    quiet: dict[str, Any] = {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    return getattr(trl, kind)(**(quiet | settings))
