"""A finished run as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headtune.analysis.models.loading import load_plain
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.paths import check_links_stay_inside
from headtune.analysis.utils.state_files import read_state
from headtune.train.config import recipe as recipes
from headtune.train.config.schema import Recipe
from headtune.train.methods.base import method_named
from headtune.train.tuners import weights_io

OWN = ("recipe.yaml", "run.json", "evaluation.json", "adapter", "model")  # what is read of a run that is done


def read_run_file(folder: Path) -> dict[str, Any]:
    """The content of run.json; empty where there is none."""
    path = folder / "run.json"
    return read_state(path) if path.is_file() else {}


def load_run(folder: Path | str) -> tuple[Any, Any, Recipe]:
    """The adapted model in float32 (a PeftModel; after full fine-tuning a plain one), its tokenizer, its recipe.

    Raises:
        InputError: the folder is not a run, holds no trained model, a damaged file, or links that lead out of it.
        CheckError: the adapter's weights are damaged, or not all there.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise InputError(
            f"{str(folder)!r} is not a run: it holds no recipe.yaml; give a folder that headtune train wrote"
        )
    check_links_stay_inside(folder, "run", OWN)
    recipe = recipes.load_recipe(str(folder / "recipe.yaml"))
    block = recipe.model
    method = method_named(recipe.recipe)
    why_no_model = method.why_no_model(recipe.method, folder)
    if method.stops_after_heads(recipe.method):
        raise InputError(str(why_no_model))
    if (state := read_run_file(folder).get("state")) != "done":
        raise InputError(f"run {str(folder)!r} is {state}; finish it with: headtune train RECIPE --resume")
    if (folder / "model" / "config.json").is_file():
        model, tokenizer = load_plain(str(folder / "model"), "float32")
        return model.eval(), tokenizer, recipe
    if not (folder / "adapter" / "adapter_config.json").is_file():
        if why_no_model is not None:
            raise InputError(why_no_model)
        raise InputError(f"run {str(folder)!r} has no adapter yet; finish it with: headtune train RECIPE --resume")
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():  # else PEFT would take a pickle
        raise InputError(f"run {str(folder)!r} has an adapter without adapter_model.safetensors; train it anew")
    model, tokenizer = load_plain(block.name, "float32", block.revision, block.trust_remote_code)
    return weights_io.with_adapter(model, folder / "adapter").eval(), tokenizer, recipe
