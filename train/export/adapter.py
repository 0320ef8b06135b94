"""A run's adapter alone, as PEFT loads it, with a model card that says how.

Head slices of low rank are written as a LoRA of PEFT's own type, which needs nothing of headtune. It is another
arrangement of the same numbers, so it is proven as a checkpoint is: reloaded by plain PEFT in another process, and
compared with the run's model, before the folder gets its name. Every other adapter is written as the run has it.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file

from headtune.analysis.models.loading import resolve
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import atomic_folder, require_new_folder, write_json, write_text
from headtune.analysis.utils.progress import Notify, Progress, silent
from headtune.analysis.utils.state_files import read_state
from headtune.analysis.utils.verbosity import silence_libraries
from headtune.train.config.recipe import load_recipe
from headtune.train.methods.base import method_named
from headtune.train.runs.load_run import load_run
from headtune.train.tracking.post_run_jobs import tracked_export
from headtune.train.tuners.convert import require_stock
from headtune.train.tuners.head_slices import stock_lora
from headtune.train.tuners.weights_io import ADAPTER, read_adapter

from .checkpoint import (
    compare,
    export_prompts,
    finish,
    held_out_task,
    model_outputs,
    reload_in_subprocess,
    require_equal,
)
from .model_card import Origin, adapter_card, origin_of

log = logging.getLogger(__name__)


@silence_libraries()
def export_adapter(
    run: Path | str,
    target: Path | str,
    n_prompts: int = 20,
    progress: Progress = silent,
    notify: Notify = log.info,
) -> dict[str, Any]:
    """Write a run's adapter alone; see the head of this module.

    The base model is named as the recipe names it, not by where this machine keeps it.

    Args:
        n_prompts: of the held-out task, on which a stock LoRA is compared with the run's model.
        progress: wraps the prompts.
        notify: told what happens, a line at a time.

    Returns:
        The content of `export.json`: the adapter's type, the origin, the SHA-256 of every file written; of a stock LoRA
        also its rank and the comparison.

    Raises:
        InputError: the folder is not a run, has no adapter (full fine-tuning) or a damaged file, or `target` is not
            free.
        CheckError: the adapter's weights cannot be read, or hold numbers that are not finite; a stock LoRA computes
            something else than the run's model, and nothing is left at `target`.
    """
    run, target = Path(run), Path(target)
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{str(run)!r} is not a run: it holds no recipe.yaml; give a folder that headtune train wrote")
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise InputError(
            f"run {str(run)!r} has no adapter: it is not finished, or trained the model itself; export the checkpoint "
            "without --adapter"
        )
    require_new_folder(target, "choose another folder")
    recipe = load_recipe(str(run / "recipe.yaml"))
    origin = origin_of(run, recipe.dump())

    def make() -> dict[str, Any]:
        _require_finite(run / "adapter")
        if method_named(recipe.recipe).has_stock_lora(recipe.method):
            model, tokenizer, _ = load_run(run)
            task = held_out_task(recipe.task, n_prompts)
            return write_lora(model, tokenizer, task, target, origin, n_prompts, progress, notify)
        return _write_adapter(run, target, origin)

    return tracked_export(run, recipe, target, make)


def _require_finite(adapter: Path) -> None:
    read_state(adapter / "adapter_config.json")
    for name, tensor in read_adapter(adapter).items():
        if not tensor.isfinite().all():
            raise CheckError(f"the adapter's {name} holds numbers that are not finite")


def _write_adapter(run: Path, target: Path, origin: Origin) -> dict[str, Any]:
    config = read_state(run / "adapter" / "adapter_config.json")
    config |= {"base_model_name_or_path": origin.base, "revision": origin.revision}
    module = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]].__module__
    import_first = "headtune.train" if module.startswith("headtune.train.") else None
    result = {"adapter": config["peft_type"], "import_first": import_first, **origin.summary()}
    if target.is_dir():
        target.rmdir()
    with atomic_folder(target) as temporary:
        (temporary / ADAPTER).write_bytes((run / "adapter" / ADAPTER).read_bytes())
        write_json(temporary / "adapter_config.json", config)
        write_text(temporary / "README.md", adapter_card(origin, import_first))
        finish(temporary, result)
    return result


def write_lora(
    model: Any,
    tokenizer: Any,
    task: Task,
    target: Path,
    origin: Origin,
    n_prompts: int,
    progress: Progress = silent,
    notify: Notify = log.info,
) -> dict[str, Any]:
    """Head slices of low rank as a stock LoRA; see the head of this module.

    Args:
        model: a PeftModel with that adapter.
        task: its prompts are those compared.
        origin: names the base, which another process loads.

    Raises:
        CheckError: the LoRA computes something else; nothing is left at `target`.
    """
    # What the adapted model computes, and its adapter arranged anew.
    require_stock(model.get_base_model())
    prompts = export_prompts(model, tokenizer, task, n_prompts)
    notify(f"logits and generations of the adapted model on {len(prompts.rows)} prompts")
    expected = model_outputs(model, prompts, progress)
    lora, weights = stock_lora(model)
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in lora.to_dict().items()}
    config |= {"base_model_name_or_path": origin.base, "revision": origin.revision}
    # Write it beside the target, reload and compare; the folder gets its name at the end.
    if target.is_dir():
        target.rmdir()
    with atomic_folder(target) as temporary:
        notify(f"writing a LoRA of rank {lora.r}")
        save_file(weights, temporary / ADAPTER, metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", config)
        notify(f"reloading it with plain PEFT in a process of its own, and comparing {len(prompts.rows)} prompts")
        base = (_base(origin.base), origin.revision)
        reloaded = reload_in_subprocess([temporary], dataclasses.replace(prompts, texts=None), base)
        result = compare(expected, reloaded[0], "float32")
        require_equal(result, "adapter")
        result |= {"adapter": "LORA", "import_first": None, "rank": lora.r, **origin.summary()}
        write_text(temporary / "README.md", adapter_card(origin, None, result))
        finish(temporary, result)
    return result


def _base(name: str) -> str:
    """A base model as another process finds it: a whole path, or a hub id."""
    source = resolve(name)
    return str(Path(source).resolve()) if Path(source).is_dir() else source
