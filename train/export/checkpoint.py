"""A stock checkpoint from a run, proven equal before it appears.

Adapters are folded into the weights (see `headtune.train.tuners.convert`): a scale into the columns of the output
projection, an offset into its bias. The result is reloaded by plain transformers in a process that never imports
headtune; logits and greedy generations are compared with those of the adapted model. Only then does the folder get its
name. Where a family has no place for what was trained, the adapter alone can be written (`adapter`).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headtune.analysis.models.architectures import architecture_of
from headtune.analysis.models.generation import generate, padding_id
from headtune.analysis.models.loading import parse_dtype
from headtune.analysis.tasks.chat import as_chat
from headtune.analysis.tasks.prompt_tokens import token_ids
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import atomic_folder, require_new_folder, sha256_of, write_json, write_text
from headtune.analysis.utils.progress import Notify, Progress, silent
from headtune.analysis.utils.verbosity import silence_libraries
from headtune.train.config.methods import TaskConfig
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.continual.sequence import steps_of
from headtune.train.runs.load_run import load_run
from headtune.train.tracking.post_run_jobs import tracked_export
from headtune.train.tuners.convert import conversion, fold

from .model_card import Origin, checkpoint_card, origin_of

log = logging.getLogger(__name__)
FLOAT32_TOLERANCE = (
    1e-3  # largest logit difference; folding reorders float32 sums, which moves logits by about 1e-5..1e-4
)
# Rounding every weight to 8 (or 11) bits of mantissa moves logits by a few per cent of their scale.
HALF_TOLERANCE = 0.1
_TOGETHER = 10  # prompts that are continued in one batch

# Runs under `python -I`: no PYTHONPATH, no current folder, so nothing but installed packages can be imported.
_RELOAD_SCRIPT = """
import json, os, sys, warnings
import torch
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer,
    GenerationConfig)
for job in json.load(open(sys.argv[1])):
    folder = job["folder"]
    known = type(AutoConfig.from_pretrained(folder, revision=job["revision"])) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    model, info = auto.from_pretrained(
        folder, dtype=job["dtype"], revision=job["revision"], output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if job["adapter"] is None:
        config = json.load(open(os.path.join(folder, "config.json")))
        assert config["architectures"] == [type(model).__name__], config["architectures"]
        assert not {"auto_map", "quantization_config"} & config.keys(), sorted(config)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        from peft import PeftModel
        # PEFT only warns of weights that it lacks.
        warnings.filterwarnings("error", "Found missing adapter keys|Some weights of")
        model = PeftModel.from_pretrained(model, job["adapter"])
    assert "headtune" not in {name.split(".")[0] for name in sys.modules}
    model.eval()
    # Greedy, whatever generation_config.json asks for; what settings leave open is filled in from the model's.
    base = model if job["adapter"] is None else model.get_base_model()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=job["new_tokens"], bos_token_id=base.generation_config.bos_token_id,
        eos_token_id=base.generation_config.eos_token_id, pad_token_id=job["pad"])
    base.generation_config = GenerationConfig()
    result = {}
    with torch.no_grad():
        for index, row in enumerate(job["prompts"]):
            if job["texts"] is not None:  # without what the tokenizer appends, or a second BOS
                ids = tokenizer(job["texts"][index], add_special_tokens=job["special"]).input_ids
                skipped = int(ids[:1] == row[:1] != row[1:2] and ids[1:2] == row[:1])
                assert row == ids[skipped:len(row) + skipped], "the tokenizer has changed"
            result[f"logits.{index}"] = model(torch.tensor([row])).logits[0].float().contiguous()
        for first, rows, mask in job["batches"]:
            generated = model.generate(
                torch.tensor(rows), attention_mask=torch.tensor(mask), generation_config=settings)
            result |= {f"greedy.{first + i}": row.clone() for i, row in enumerate(generated)}
    save_file(result, job["answer"])
"""


@dataclass(frozen=True)
class Prompts:
    """What two models are compared on.

    Attributes:
        rows: token ids of each prompt.
        texts: the prompts, where the reloaded tokenizer has to give the same ids; None to leave it out.
        new_tokens: generated greedily after each.
        pad: the padding token's id.
        special: the tokenizer adds its special tokens to the texts; a chat template has written them.
    """

    rows: Sequence[list[int]]
    texts: Sequence[str] | None
    new_tokens: int
    pad: int | None
    special: bool = True

    def batches(self) -> list[tuple[int, list[list[int]], list[list[int]]]]:
        """Rows that are continued together: the first one's number, the rows padded on the left, and their mask."""
        result = []
        for first in range(0, len(self.rows), _TOGETHER):
            rows = self.rows[first : first + _TOGETHER]
            short = [max(map(len, rows)) - len(row) for row in rows]
            padded = [[self.pad or 0] * n + row for n, row in zip(short, rows, strict=True)]
            mask = [[0] * n + [1] * len(row) for n, row in zip(short, rows, strict=True)]
            result.append((first, padded, mask))
        return result


@dataclass(frozen=True)
class ModelOutputs:
    """What a model says to prompt i.

    Attributes:
        logits: float32 `[n_tokens, vocabulary]` each.
        greedy: token ids of the prompt and its continuation, padded to its batch on the left and after its end.
    """

    logits: Sequence[Tensor]
    greedy: Sequence[Tensor]


def export_prompts(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, n: int = 20, new_tokens: int = 24
) -> Prompts:
    """The first prompts of a task's seeded order, as the model was given them: chats in the chat template."""
    special = not task.chat_template
    texts = [example.prompt for example in as_chat(task.limited(n), tokenizer).examples]
    return Prompts(token_ids(tokenizer, texts, special), texts, new_tokens, padding_id(model, tokenizer), special)


@torch.no_grad()
def model_outputs(model: Any, prompts: Prompts, progress: Progress = silent) -> ModelOutputs:
    """What a model in this process computes, on its own device."""
    model.eval()
    logits = [
        model(torch.tensor([row], device=model.device)).logits[0].float().cpu()
        for row in progress(prompts.rows, "asking the adapted model")
    ]
    greedy: list[Tensor] = []
    for _, *batch in progress(prompts.batches(), "letting it go on"):
        tokens, mask = (torch.tensor(part, device=model.device) for part in batch)
        greedy += generate(model, tokens, mask, prompts.new_tokens, prompts.pad).cpu()
    return ModelOutputs(logits, greedy)


def reload_in_subprocess(
    folders: Sequence[Path], prompts: Prompts, base: tuple[str, str | None] | None = None
) -> list[ModelOutputs]:
    """What plain transformers computes from these folders, one after the other, in one process without headtune.

    Args:
        base: where folders hold adapters for PEFT: the model below them, a folder or a hub id with its revision.

    Raises:
        CheckError: a folder does not load there as it stands: parameters too many or too few, another tokenizer.
    """
    with tempfile.TemporaryDirectory() as temporary:
        answers = [Path(temporary) / f"{index}.safetensors" for index in range(len(folders))]
        jobs = [
            {
                "folder": base[0] if base else str(folder.resolve()),  # the process may stand elsewhere
                "revision": base[1] if base else None,
                "dtype": "float32" if base else "auto",
                "adapter": str(folder.resolve()) if base else None,
                "answer": str(answer),
                "prompts": prompts.rows,
                "batches": prompts.batches(),
                "texts": prompts.texts,
                "special": prompts.special,
                "new_tokens": prompts.new_tokens,
                "pad": prompts.pad,
            }
            for folder, answer in zip(folders, answers, strict=True)
        ]
        request = Path(temporary) / "request.json"
        write_json(request, jobs)
        command = [sys.executable, "-I", "-c", _RELOAD_SCRIPT, str(request)]
        # What it loads of the hub is in the cache by now.
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            what = "adapter does not load in plain PEFT" if base else "checkpoint does not load in plain transformers"
            raise CheckError(f"the exported {what}: {last}")
        results = [load_file(answer) for answer in answers]
    numbers = range(len(prompts.rows))
    return [
        ModelOutputs([row[f"logits.{i}"] for i in numbers], [row[f"greedy.{i}"] for i in numbers]) for row in results
    ]


def compare(expected: ModelOutputs, reloaded: ModelOutputs, dtype: str) -> dict[str, Any]:
    """Largest and mean logit difference, the logits' scale, generations that agree, and the verdict.

    The verdict is a largest difference within `FLOAT32_TOLERANCE` and all generations identical; for weights in half
    precision within `HALF_TOLERANCE` of the scale, and generations are reported and not required: rounded weights may
    flip a near-tie.
    """
    gaps = [(mine - other).abs() for mine, other in zip(expected.logits, reloaded.logits, strict=True)]
    # torch's max, unlike Python's, does not lose a NaN on the way.
    scale = torch.stack([logits.abs().max() for logits in expected.logits]).max().item()
    largest = torch.stack([gap.max() for gap in gaps]).max().item()
    same = sum(torch.equal(mine, other) for mine, other in zip(expected.greedy, reloaded.greedy, strict=True))
    exact = dtype == "float32"
    tolerance = FLOAT32_TOLERANCE if exact else HALF_TOLERANCE * scale
    return {
        "dtype": dtype,
        "prompts": len(gaps),
        "max_logit_difference": largest,
        "mean_logit_difference": sum(gap.mean().item() for gap in gaps) / len(gaps),
        "logit_scale": scale,
        "tolerance": tolerance,
        "identical_generations": same,
        "passed": bool(largest <= tolerance and (same == len(gaps) or not exact)),
    }


def require_equal(result: Mapping[str, Any], what: str) -> None:
    """Refuse an export whose comparison did not pass.

    Args:
        result: of `compare`.
        what: was exported, as the message calls it.

    Raises:
        CheckError: it differs.
    """
    if not result["passed"]:
        raise CheckError(
            f"the exported {what} differs: largest logit difference {result['max_logit_difference']:.3g} "
            f"(allowed {result['tolerance']:.3g}), {result['identical_generations']} of {result['prompts']} "
            "generations identical; nothing was written"
        )


def write_stock(
    folded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: str = "5GB"
) -> None:
    """Safetensors shards, configuration, generation configuration and tokenizer."""
    folded.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)


def export(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    target: Path,
    dtype: str = "float32",
    origin: Origin | None = None,
    n_prompts: int = 20,
    new_tokens: int = 24,
    max_shard_size: str = "5GB",
    progress: Progress = silent,
    notify: Notify = log.info,
) -> dict[str, Any]:
    """Fold, save, reload elsewhere, compare, and only then give the folder its name.

    Args:
        model: a PeftModel or a fine-tuned model, in float32; it is used up.
        task: its prompts are those compared.
        target: a new folder.
        dtype: of the stored weights. The comparison is always with the adapted float32 model.
        origin: what the model card says of the run.
        max_shard_size: of one file of weights, such as "5GB".
        progress: wraps the prompts.
        notify: told what happens, a line at a time.

    Returns:
        The content of `export.json`: the comparison (see `compare`), the conversion of the family, the origin, and the
        SHA-256 of every file written.

    Raises:
        InputError: the folder exists or cannot be written, an unknown dtype or size, or a model that has no exact stock
            form (see `fold`).
        CheckError: the reloaded model differs by more than the tolerance; nothing is left at `target`.
    """
    # Refuse before anything is computed.
    stored = parse_dtype(dtype)
    require_size(max_shard_size)
    require_new_folder(target, "choose another folder")
    origin = origin or Origin()
    # What the adapted model computes, before it is used up.
    prompts = export_prompts(model, tokenizer, task, n_prompts, new_tokens)
    notify(f"logits and generations of the adapted model on {len(prompts.rows)} prompts")
    expected = model_outputs(model, prompts, progress)
    # Fold, write beside the target, reload and compare; the folder gets its name at the end.
    notify("folding the adapter into stock weights")
    source = copy.deepcopy(model.config)
    folded = fold(model).to(stored)  # type: ignore[arg-type]
    converted = conversion(source, folded.config)
    if target.is_dir():
        target.rmdir()  # empty, as was checked; rename needs the name free
    with atomic_folder(target) as temporary:
        notify(f"writing {dtype} weights")
        write_stock(folded, tokenizer, temporary, max_shard_size)
        notify(f"reloading them in a process of its own, and comparing {len(prompts.rows)} prompts")
        result = compare(expected, reload_in_subprocess([temporary], prompts)[0], dtype)
        require_equal(result, "checkpoint")
        result |= {"conversion": converted, **origin.summary()}
        caveat = architecture_of(converted["written"]).bias_caveat if converted["flags"] else ""
        write_text(temporary / "README.md", checkpoint_card(origin, result, caveat))
        finish(temporary, result)
    return result


@silence_libraries()
def export_run(
    run: Path | str,
    target: Path | str,
    dtype: str = "float32",
    n_prompts: int = 20,
    max_shard_size: str = "5GB",
    progress: Progress = silent,
    notify: Notify = log.info,
) -> dict[str, Any]:
    """Export a finished run; see `export`. The prompts compared are of its held-out task or tasks.

    Raises:
        InputError, CheckError: as `export`, and where the folder is not a finished run.
    """
    run, target = Path(run), Path(target)
    parse_dtype(dtype)  # what is refused is refused before a model is loaded
    require_size(max_shard_size)
    require_new_folder(target, "choose another folder")
    model, tokenizer, recipe = load_run(run)
    origin = origin_of(run, recipe.dump())
    held_out = held_out_task(recipe.task, n_prompts)

    def make() -> dict[str, Any]:
        return export(
            model,
            tokenizer,
            held_out,
            target,
            dtype,
            origin,
            n_prompts,
            max_shard_size=max_shard_size,
            progress=progress,
            notify=notify,
        )

    return tracked_export(run, recipe, target, make)


def held_out_task(block: TaskConfig, n: int) -> Task:
    """The held-out prompts to choose `n` from, however few the run was evaluated on; `n` of a sequence's by turns."""
    block = block.model_copy(update={"max_eval_examples": None})
    if block.sequence is None:
        return tasks_of(block)[1]
    steps = steps_of(block)
    turns = itertools.zip_longest(*(step.held_out.limited(n).examples for step in steps))
    examples = [example for turn in turns for example in turn if example is not None]
    return dataclasses.replace(steps[0].held_out, name="sequence", examples=tuple(examples[:n]))


def require_size(size: str) -> None:
    """Refuse what is no size of a file (InputError)."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", size):
        raise InputError(f"max shard size {size!r} is not a size; give a whole number of MB or GB, such as 5GB")


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Record the hash of every file and write export.json."""
    result["files"] = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / "export.json", result)
