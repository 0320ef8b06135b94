"""An adapter of ours that no recipe trained: from its folder to a stock checkpoint, or to a LoRA of PEFT's own type.

The folder is what `save_pretrained` or a trainer writes, `adapter_config.json` beside `adapter_model.safetensors`: a
trainer's `output_dir`, or one of its checkpoints. The base is the one that the configuration names, or another. What is
proven is what is proven of a run (see `checkpoint`), on the prompts of a task, `TASK` where none is named.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headtune.analysis.models.loading import load_plain, load_tokenizer, parse_dtype
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import require_new_folder, sha256_of
from headtune.analysis.utils.paths import check_links_stay_inside
from headtune.analysis.utils.progress import Notify, Progress, silent
from headtune.analysis.utils.state_files import read_state
from headtune.analysis.utils.verbosity import silence_libraries
from headtune.train.tuners.base import HeadPeftType
from headtune.train.tuners.weights_io import ADAPTER, read_adapter, with_adapter

from . import adapter, checkpoint
from .model_card import Origin

log = logging.getLogger(__name__)
CONFIG = "adapter_config.json"
TASK = "one_to_many:test"  # built in: prompts that any language model can continue


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on its base, in float32 and in eval mode, with the tokenizer that lies beside it, or else the base's.

    Attributes:
        config: the content of adapter_config.json.
        base: the name that the base was loaded by.
        revision: of the base, where it is one of the hub.
    """

    path: Path
    config: dict[str, Any]
    base: str
    revision: str | None
    model: Any
    tokenizer: Any

    @property
    def origin(self) -> Origin:
        """What is known of where it comes from: base and heads, and the digest of its weights."""
        digest = {"name": self.path.resolve().name, "sha256": sha256_of(self.path / ADAPTER)}
        return Origin(
            run=self.path.resolve().name,
            base=self.base,
            revision=self.revision,
            heads=self.config["heads"],
            inputs={"adapter": digest},
        )


def load_adapter(folder: Path | str, base: str | None = None, notify: Notify = log.info) -> AdapterFolder:
    """Load an adapter of ours from its folder, with its base.

    Args:
        base: a built-in name, a model folder or a hub id, in place of the one that adapter_config.json names.

    Raises:
        InputError: no adapter in the folder, one of another kind, a base that is not named or not there, or one that
            the adapter does not fit.
        CheckError: the adapter's weights are damaged, or hold numbers that are not finite.
    """
    folder = Path(folder)
    config = _config(folder)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if base is None and not named:
        raise InputError(f"{str(folder / CONFIG)!r} names no base model; give it: --base MODEL (base= in Python)")
    name = str(base or named)
    if name != named:
        revision = None
        notify(f"the adapter names the base {named!r}; {name!r} is taken in its place")
    # The weights first: they are small.
    for key, tensor in read_adapter(folder).items():
        if not tensor.isfinite().all():
            raise CheckError(f"{folder / ADAPTER}: {key} holds numbers that are not finite")
    try:
        plain, tokenizer = load_plain(name, "float32", revision)
    except InputError as error:
        if base is not None:
            raise
        raise InputError(f"the base of the adapter in {str(folder)!r}: {error}; give another: --base MODEL") from error
    try:
        model = with_adapter(plain, folder)
    except (InputError, CheckError) as error:
        raise InputError(f"the adapter in {str(folder)!r} does not fit the base {name!r}: {error}") from error
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(str(folder))
        notify(f"tokenizer and chat template are those of {folder}")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer in {str(folder)!r} has {len(tokenizer)} tokens and the base {name!r} {rows} embeddings; "
            "tokens that were added in training are not in the adapter: give the base with them: --base MODEL"
        )
    return AdapterFolder(folder, config, name, revision, model.eval(), tokenizer)


def _config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json, of an adapter of ours whose weights are there in safetensors.

    Raises:
        InputError: no folder, no adapter, another kind, no weights, or a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a run and no folder; give a run, or a folder that holds an adapter")
    if not (folder / CONFIG).is_file():
        inner = sorted((path.parent for path in folder.glob(f"*/{CONFIG}")), key=_by_number)
        hint = f"; its folder {inner[-1].name!r} does: give {str(inner[-1])!r}" if inner else ""
        raise InputError(
            f"{str(folder)!r} is not a run (it holds no recipe.yaml), and not an adapter (no {CONFIG})"
            f"{hint or '; give a folder that headtune train, save_pretrained or a trainer wrote'}"
        )
    check_links_stay_inside(folder, "adapter", (CONFIG, ADAPTER))
    config = read_state(folder / CONFIG)
    kind = config.get("peft_type")
    if kind not in {each.value for each in HeadPeftType}:
        raise InputError(
            f"the adapter in {str(folder)!r} is a {kind}, not one of headtune's; fold it with PEFT: "
            f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(OUT)"
        )
    if not (folder / ADAPTER).is_file():
        has_pickle = (folder / "adapter_model.bin").is_file()
        reason = " (adapter_model.bin is a pickle, which is not read)" if has_pickle else ""
        raise InputError(f"{str(folder)!r} holds {CONFIG} and no {ADAPTER}{reason}; save the adapter anew")
    return config


def _by_number(path: Path) -> tuple[int, str]:
    """Checkpoints in the order of their steps, other folders before them."""
    number = path.name.rpartition("-")[2]
    return (int(number) if path.name.startswith("checkpoint-") and number.isdigit() else -1, path.name)


@silence_libraries()
def export_adapter_folder(
    folder: Path | str,
    target: Path | str,
    base: str | None = None,
    task: str | Task = TASK,
    dtype: str = "float32",
    n_prompts: int = 20,
    max_shard_size: str = "5GB",
    adapter_alone: bool = False,
    progress: Progress = silent,
    notify: Notify = log.info,
) -> dict[str, Any]:
    """Export an adapter that no recipe trained; see `checkpoint.export` for what is proven and returned.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        target: a new folder.
        base: the model below the adapter, where it is not the one that adapter_config.json names.
        task: whose prompts are compared: a task, or whatever `load_task` takes.
        adapter_alone: write head slices of low rank as a stock LoRA in place of a checkpoint.

    Raises:
        InputError: as `load_adapter` and `checkpoint.export`; `adapter_alone` of an adapter that is no LoRA.
        CheckError: the reloaded model differs; nothing is left at `target`.
    """
    folder, target = Path(folder), Path(target)
    # Refuse before a model is loaded.
    parse_dtype(dtype)
    checkpoint.require_size(max_shard_size)
    require_new_folder(target, "choose another folder")
    config = _config(folder)
    if adapter_alone and not config.get("rank"):
        raise InputError(
            f"{str(folder)!r} is the {config['peft_type']} adapter alone already, and no LoRA; leave --adapter out for "
            "a stock checkpoint"
        )
    prompts = load_task(task) if isinstance(task, str) else task
    loaded = load_adapter(folder, base, notify)
    notify(f"the adapter of {folder} on {loaded.base}; the prompts compared are those of {prompts.name}")
    if adapter_alone:
        return adapter.write_lora(
            loaded.model, loaded.tokenizer, prompts, target, loaded.origin, n_prompts, progress, notify
        )
    return checkpoint.export(
        loaded.model,
        loaded.tokenizer,
        prompts,
        target,
        dtype,
        loaded.origin,
        n_prompts,
        max_shard_size=max_shard_size,
        progress=progress,
        notify=notify,
    )
