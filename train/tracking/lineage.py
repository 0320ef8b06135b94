"""Head set -> adapter -> export: how each says what it was made from, and how a run is filed in W&B.

A product is known by its digest. A run's `run.json`, its W&B configuration (`inputs/<kind>/sha256`) and summary
(`outputs/<kind>/sha256`) and an export's `export.json` name the same digests, so that the way back from an export to
the head set needs neither W&B's server nor the paths of the machine that made it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import sha256_of
from headtune.analysis.utils.paths import check_links_stay_inside

if TYPE_CHECKING:
    from headtune.train.config.heads import HeadsConfig
    from headtune.train.config.schema import Recipe

PINNED = ("recipe", "heads", "K", "role", "parameters")
HEADS_BLOCK = "heads_block"  # where the recipe's own `heads` is kept: the pinned key names the heads themselves


def tree_sha256(path: Path, within: Path | None = None) -> str:
    """SHA-256 of a file, or of a folder's `<sha256>  <relative path>` lines in order of path.

    Args:
        within: the folder, `path` itself or one that holds it directly, that links in `path` must not lead out of.

    Raises:
        InputError: nothing at `path`, or a link in it that leads out of it.
    """
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        raise InputError(f"artifact {str(path)!r} does not exist; name a file or a folder")
    check_links_stay_inside(within or path, "artifact", ("",) if within in (None, path) else (path.name,))
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{sha256_of(file)}  {name}\n" for name, file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def artifact_name(text: str) -> str:
    """`text` as W&B takes it for an artifact's name."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", text)[:128]


# --- how a run is filed -----------------------------------------------------------------------------------------------


def config_keys(
    recipe: str, heads: Sequence[Sequence[int]] | None, role: str | None, parameters: int | None
) -> dict[str, Any]:
    """The configuration keys that every run has: `recipe`, `heads` ("L0H1 L2H0"), `K`, `role`, `parameters`.

    Args:
        heads: (layer, head) pairs, or None where the method has none or they are not chosen yet.
        parameters: trained; None before training, and where nothing is trained.
    """
    names = [f"L{layer}H{head}" for layer, head in heads or ()]
    values = (recipe, " ".join(names) or None, len(names) or None, role, parameters)
    return dict(zip(PINNED, values, strict=True))


def role_of(block: HeadsConfig | None) -> str | None:
    """In a word, what the heads of a recipe are: a role of the head set, or `list`, `all`, `random (<role>)`."""
    if block is None:
        return None
    if block.learnt:
        return "selected"
    if block.every or block.pairs:
        return "all" if block.every else "list"
    return f"random ({block.role})" if block.random is not None else block.role


def config_of(recipe: Recipe) -> dict[str, Any]:
    """A run's W&B configuration: the whole recipe, its block `heads` as `heads_block`, and the pinned keys."""
    whole = recipe.dump()
    if "heads" in whole:
        whole[HEADS_BLOCK] = whole.pop("heads")
    return whole | config_keys(recipe.recipe, None, role_of(recipe.heads), None)


def group_of(recipe: Recipe) -> str:
    """`tracking.group`, or a name that all seeds of the recipe share and no other recipe has."""
    if recipe.tracking.group is not None:
        return recipe.tracking.group
    whole = {
        key: value for key, value in recipe.dump().items() if key not in ("seed", "name", "output_dir", "tracking")
    }
    return f"{recipe.recipe}-{hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:6]}"


def wandb_run_args(recipe: Recipe, job_type: str) -> dict[str, Any]:
    """Where the runs of a recipe are filed: arguments of `tracking.Tracker`."""
    return {
        "project": recipe.tracking.project,
        "group": group_of(recipe),
        "job_type": job_type,
        "tags": [recipe.recipe, *recipe.tracking.tags],
        "wandb_mode": recipe.tracking.wandb,
        "report_to": () if job_type == "export" else tuple(recipe.tracking.report_to),  # an export has no numbers
    }


# --- what a product is made from --------------------------------------------------------------------------------------


def head_set_of(recipe: Recipe) -> Path | None:
    """The heads.json that a recipe names (`heads.from`, `heads.random.like`); None where it is not there."""
    block = recipe.heads
    source = block and (block.source or (block.random.like if block.random else None))
    if not source:
        return None
    path = Path(source) / "heads.json" if Path(source).is_dir() else Path(source)
    return path if path.is_file() else None


def heads_name(path: Path) -> str:
    """The artifact name of a heads.json: that of its folder."""
    return artifact_name(f"{path.resolve().parent.name}-heads")


def inputs_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    """What a training takes besides data and weights: `{"heads": {"name", "sha256"}}`, or {}.

    Where offsets start at those of another run, its adapter is `start`.
    """
    path, init = head_set_of(recipe), getattr(recipe.method, "init", None)
    inputs = {"heads": {"name": heads_name(path), "sha256": sha256_of(path)}} if path else {}
    if init is not None and (Path(init.source) / "adapter").is_dir():
        name = artifact_name(f"{Path(init.source).resolve().name}-adapter")
        inputs["start"] = {"name": name, "sha256": tree_sha256(Path(init.source) / "adapter", Path(init.source))}
    return inputs


def input_artifacts(run: Path, state: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What an export or a measurement of a finished run is made from: its heads and its adapter, or its model.

    Args:
        state: the content of the run's run.json.

    Returns:
        `{"heads": {"name", "sha256"}, "adapter": {"name", "sha256"}}`. The heads are those that the run was given,
        else those it chose itself.
    """
    inputs: dict[str, dict[str, str]] = {}
    if (run / "heads.json").is_file():
        inputs["heads"] = {"name": heads_name(run / "heads.json"), "sha256": sha256_of(run / "heads.json")}
    inputs |= {kind: dict(entry) for kind, entry in state.get("inputs", {}).items()}
    for kind in ("adapter", "model"):
        if (run / kind).is_dir():
            inputs[kind] = {"name": artifact_name(f"{state.get('name', run.name)}-{kind}")}
            inputs[kind]["sha256"] = tree_sha256(run / kind, run)
            break
    return inputs


def digests(inputs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """`inputs/<kind>/name` and `inputs/<kind>/sha256`, as they stand in a W&B configuration."""
    return {f"inputs/{kind}/{key}": value for kind, entry in inputs.items() for key, value in entry.items()}
