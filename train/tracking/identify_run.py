"""The W&B run of an identification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .lineage import artifact_name, config_keys
from .media import show_heads
from .tracker import Tracker

if TYPE_CHECKING:
    from headtune.analysis.identify.pipeline import IdentifyResult


def track_identify(
    result: IdentifyResult,
    folder: Path,
    project: str = "headtune",
    group: str | None = None,
    wandb_mode: str | None = None,
) -> None:
    """File an identification in W&B: its parameters, maps and tables of heads, heads.json and stability.

    Args:
        folder: where the result was saved; the maps are written there too.
    """
    heads = result.heads
    config = config_keys("identify", result.ranked(), " ".join(heads.roles), None)
    config |= {"model": heads.model, "task": heads.task, "method": heads.method}
    with Tracker(
        folder,
        folder.name,
        config,
        project=project,
        group=group,
        wandb_mode=wandb_mode,
        job_type="identify",
        tags=["identify"],
    ) as tracker:
        artifact = artifact_name(f"{folder.resolve().name}-heads")
        show_heads(tracker, heads, result.scores.means(), folder, artifact)
        stability = {role: heads.stability[role] for role in heads.roles}
        tracker.log({f"stability/{role}": float(v) for role, v in stability.items() if v is not None}, step=0)
