"""A stock checkpoint from a run, proven equal before it appears.

The adapter is folded into the weights: a scale into the columns of the output projection, an offset into its bias. The
result is reloaded by plain transformers in a process that never imports headtune; logits and greedy generations are
compared with those of the adapted model. Only then does the folder get its name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.architectures import Architecture, architecture_of
from ..analysis.errors import CheckError, InputError
from ..analysis.files import atomic_folder, require_new_folder, write_json, write_text
from ..analysis.model import parse_dtype
from ..analysis.tasks import Task
from .adapter import HeadTuningLayer

FLOAT32_TOLERANCE = (
    1e-3  # largest logit difference; folding reorders float32 sums, which moves logits by about 1e-5..1e-4
)
# Rounding every weight to 8 (or 11) bits of mantissa moves logits by a few per cent of their scale.
HALF_TOLERANCE = 0.1

# Runs under `python -I`: no PYTHONPATH, no current folder, so nothing but installed packages can be imported.
_PROBE = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, request, answer = sys.argv[1:]
rows = json.load(open(request))
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not any(name.split(".")[0] == "headtune" for name in sys.modules)
model.eval()
result = {}
with torch.no_grad():
    for index, row in enumerate(rows["prompts"]):
        tokens = torch.tensor([row])
        result[f"logits.{index}"] = model(tokens).logits[0].float().contiguous()
        result[f"greedy.{index}"] = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
            max_new_tokens=rows["new_tokens"], pad_token_id=rows["pad"])[0]
save_file(result, answer)
"""


def fold(model: Any) -> PreTrainedModel:
    """Merge a PeftModel's adapter into a stock model of the same family.

    Raises:
        InputError: an offset in a family that has no output bias to carry it.
    """
    base = model.get_base_model()
    architecture = architecture_of(base.config.get_text_config().model_type)
    layers = [module for module in base.modules() if isinstance(module, HeadTuningLayer)]
    has_offset = any(len(layer.head_tuning_offset) for layer in layers)
    if has_offset and architecture.export == "none":
        raise InputError(
            f"family {base.config.model_type!r} has no output bias to carry an offset; train with method.offset=false, "
            "or use the PEFT adapter in the run's adapter/ folder"
        )
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    if has_offset and architecture.export == "attention_bias":
        return _with_attention_bias(merged, architecture)
    return merged


def _with_attention_bias(merged: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    """The same weights in a model whose config says `attention_bias: true`; biases that were not there are zero.

    Without the flag a reload would drop the biases with no more than a log line.
    """
    config = merged.config.__class__.from_dict(merged.config.to_dict())
    config.attention_bias = True
    state = merged.state_dict()
    with torch.device("meta"):
        stock: Any = AutoModelForCausalLM.from_config(config, dtype=merged.dtype)
    biases = [
        f"{architecture.attention}.{name}.bias" for name in (*architecture.input_biases, architecture.output_projection)
    ]
    for name, parameter in stock.state_dict().items():
        if name not in state:
            if not any(name.endswith(bias) for bias in biases):
                raise CheckError(f"folding does not know how to fill {name}")
            state[name] = torch.zeros(parameter.shape, dtype=merged.dtype, device=merged.device)
    stock.load_state_dict(state, strict=True, assign=True)
    stock.tie_weights()
    # Buffers that are computed, not stored (rotary frequencies), are on meta still; the merged model has them.
    for name, buffer in merged.named_buffers():
        owner, _, leaf = name.rpartition(".")
        stock.get_submodule(owner)._buffers[leaf] = buffer
    stock.generation_config = merged.generation_config
    return stock.eval()


@torch.no_grad()
def _reference(model: Any, prompts: Sequence[list[int]], new_tokens: int, pad: int) -> tuple[list[Any], list[Any]]:
    logits, greedy = [], []
    for row in prompts:
        tokens = torch.tensor([row], device=model.device)
        logits.append(model(tokens).logits[0].float().cpu())
        greedy.append(
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=pad,
            )[0].cpu()
        )
    return logits, greedy


def export(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    target: Path,
    dtype: str = "float32",
    card: str = "",
    n_prompts: int = 20,
    new_tokens: int = 24,
) -> dict[str, Any]:
    """Fold, save, reload elsewhere, compare, and only then give the folder its name.

    Args:
        model: a PeftModel in float32.
        task: its prompts are those compared.
        target: a new folder.
        dtype: of the stored weights. The comparison is always with the adapted float32 model.
        card: text of the model card.

    Returns:
        The content of `export.json`: largest and mean logit difference, logit scale, generations that agree, verdict.

    Raises:
        InputError: the folder exists or cannot be written, an unknown dtype, or a family without an output bias.
        CheckError: the reloaded model differs by more than the tolerance; nothing is left at `target`.
    """
    stored = parse_dtype(dtype)
    require_new_folder(target, "choose another folder")
    texts = [example.prompt for example in task.limited(n_prompts).examples]
    prompts = [tokenizer(text).input_ids for text in texts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.eval()
    logits, greedy = _reference(model, prompts, new_tokens, pad)
    folded = fold(model).to(stored)  # type: ignore[arg-type]
    if target.is_dir():
        target.rmdir()  # empty, as was checked; rename needs the name free
    with atomic_folder(target) as temporary:
        folded.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        request, answer = temporary / "request.json", temporary / "answer.safetensors"
        write_json(request, {"prompts": prompts, "new_tokens": new_tokens, "pad": pad})
        command = [sys.executable, "-I", "-c", _PROBE, str(temporary), str(request), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckError(f"the exported checkpoint does not load in plain transformers: {last}")
        reloaded = load_file(answer)
        result = _compare(logits, greedy, reloaded, dtype)
        request.unlink()
        answer.unlink()
        if not result["passed"]:
            raise CheckError(
                f"the exported checkpoint differs: largest logit difference {result['max_logit_difference']:.3g} "
                f"(allowed {result['tolerance']:.3g}), {result['identical_generations']} of {len(prompts)} generations "
                "identical; nothing was written"
            )
        write_text(temporary / "README.md", card or "# Exported by headtune\n")
        write_json(temporary / "export.json", result)
    return result


def _compare(logits: Sequence[Any], greedy: Sequence[Any], reloaded: dict[str, Any], dtype: str) -> dict[str, Any]:
    gaps = [(reference - reloaded[f"logits.{index}"]).abs() for index, reference in enumerate(logits)]
    # torch's max, unlike Python's, does not lose a NaN on the way.
    scale = torch.stack([reference.abs().max() for reference in logits]).max().item()
    largest = torch.stack([gap.max() for gap in gaps]).max().item()
    same = sum(torch.equal(row, reloaded[f"greedy.{index}"]) for index, row in enumerate(greedy))
    exact = dtype == "float32"
    tolerance = FLOAT32_TOLERANCE if exact else HALF_TOLERANCE * scale
    return {
        "dtype": dtype,
        "prompts": len(logits),
        "max_logit_difference": largest,
        "mean_logit_difference": sum(gap.mean().item() for gap in gaps) / len(gaps),
        "logit_scale": scale,
        "tolerance": tolerance,
        "identical_generations": same,
        # Rounded weights may flip a near-tie, so half-precision generations are reported and not required.
        "passed": bool(largest <= tolerance and (same == len(greedy) or not exact)),
    }


def model_card(recipe: dict[str, Any], heads: Sequence[Sequence[int]], evaluation: dict[str, Any]) -> str:
    """A short model card: base, recipe, heads, before and after."""
    lines = [
        "# Exported by headtune",
        "",
        f"Base model: `{recipe['model']['name']}` (its licence applies). Recipe: `{recipe['recipe']}`, "
        f"run `{recipe['name']}`, seed {recipe['seed']}.",
        "",
        "A stock checkpoint: loads in transformers without headtune. `export.json` holds the measured difference from "
        "the adapted model.",
        "",
        "Heads changed: " + (", ".join(f"L{layer}H{head}" for layer, head in heads) or "see the recipe") + ".",
        "",
    ]
    if evaluation:
        lines += [f"Task: `{evaluation['task']}`.", "", "| | before | after |", "|---|---|---|"]
        for name, before in evaluation["before"].items():
            after = evaluation.get("after", {}).get(name)
            if name == "n" or after is None:
                continue
            lines.append(f"| {name} | {_show(before)} | {_show(after)} |")
        lines.append("")
    return "\n".join([*lines, "```json", json.dumps(recipe, indent=1), "```", ""])


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.3g} [{value['ci'][0]:.3g}, {value['ci'][1]:.3g}]"
    return f"{value:.4g}"
