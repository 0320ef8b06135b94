"""Steering without training: factors and directions computed from a model and a task, as values of the head adapter.

    steered = steer(model, ItiConfig(kind="iti", alpha=15), heads, task, seed=0)
    model = apply(model.hf, steered)       # a PeftModel that evaluates, saves, merges and exports like a trained one

    scale       z[l, h] <- factor * z[l, h]                      the heads given
    iti         z[l, h] <- z[l, h] + alpha * sigma * theta       theta: from false towards true (Li et al. 2023)
    in_context  z[l, h] <- z[l, h] + factor * (few - zero)       means with examples in the prompt and without
    sink        z[L, h] <- gamma * z[L, h]                       last-layer heads that look at the first position
    intercept   M_L <- M_L - beta * b_L                          what the last MLP adds whatever the input

`few` and `zero` are those of `headtune.analysis.methods.in_context`, after the function vectors of Todd et al. (2024),
whose vector is the sum of `few` through W_O, added to the residual stream after one layer; the offset stays in its
heads, and leaves out what they put out anyway. The last two are knobs of `headtune.analysis.interventions.last_layer`
in a form that does not depend on the input, so that it can be folded into weights.

`iti_probes` says what theta and sigma are. An offset on z lies before W_O, so the residual stream moves by
alpha * sigma * W_O theta (through the norm after attention, in families that have one). The adapter adds it at every
position, the papers at the last one of each step of decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from headtune.analysis.interventions.last_layer import FIT, Intercept
from headtune.analysis.interventions.mlp_regression import decompose
from headtune.analysis.methods import in_context
from headtune.analysis.models import hooks
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.chat import as_chat, with_chat
from headtune.analysis.tasks.messages import ChatTemplate
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.progress import Progress, silent
from headtune.train.config.methods import InContextConfig, InterceptConfig, ItiConfig, ScaleConfig, SinkConfig
from headtune.train.types import ProbeResult

from .head_tuning import HeadTuningConfig
from .iti_probes import (
    end_batches,
    mass_mean,
    read_statements,
    tokenised,
)

Pairs = Sequence[tuple[int, int]]  # (layer, head)
Settings = ScaleConfig | ItiConfig | InContextConfig | SinkConfig | InterceptConfig


# --- reading attention ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sink_attention(model: HeadModel, task: Task, progress: Progress = silent) -> Tensor:
    """`[n_heads]` attention of the last layer's heads from END to the first position, mean over a task's prompts."""
    rows = tokenised(model, [example.prompt for example in as_chat(task, model.tokenizer).examples], task)
    total = torch.zeros(model.n_heads, dtype=torch.float64)
    for _, ids, mask, ends in progress(end_batches(model, rows), "reading attention"):
        with record_rows(ends) as recorded:
            model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        total += recorded.pattern[model.n_layers - 1][:, :, 0].sum(0).double().cpu()
    return total / len(rows)


# --- adapters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steered:
    """An adapter that nobody trained.

    Attributes:
        config: which heads and MLPs, and what is set on them.
        values: the content of the adapter's file: name -> value, float32.
        note: JSON-able: what was set, and what it was found on.
    """

    config: HeadTuningConfig
    values: dict[str, Tensor]
    note: dict[str, Any]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The heads changed, (layer, head), sorted; none for an intercept."""
        return [(layer, head) for layer, head in self.config.heads]


def steer(
    model: HeadModel,
    settings: Settings,
    pairs: Pairs | None,
    task: Task,
    seed: int = 0,
    progress: Progress = silent,
    probed: ProbeResult | None = None,
) -> Steered:
    """Compute an adapter from a model and a task.

    Args:
        model: the plain model, before any adapter and with the attention that `view` gave it.
        pairs: the heads to scale or to move; the last two kinds find theirs themselves: None.
        task: whose answers, or prompts, are looked at; an intercept is fitted on its own `fit` instead, given as chats
            where the task is.
        seed: of what is drawn (see `probe_heads` and `few_shot_prompts`).
        probed: what probes have read already: ITI takes its directions over where they are of the same statements.

    Raises:
        InputError: heads missing, given needlessly, twice, or not in the model; no heads that attend to the first
            position enough; a family whose MLP output has no projection to carry an offset; see also `statements`,
            `few_shot_prompts` and `in_context_means`.
    """
    match settings:
        case ScaleConfig():
            note = {"kind": "scale", "factor": settings.factor}
            return _scaled(model, _chosen_heads(model, pairs), settings.factor, note)
        case ItiConfig():
            return _iti(model, settings, _chosen_heads(model, pairs), task, seed, progress, probed)
        case InContextConfig():
            return _in_context(model, settings, _chosen_heads(model, pairs), task, seed, progress)
    if pairs:
        raise InputError(
            f"steering {settings.kind!r} finds what it changes itself; leave out the {len(pairs)} heads given"
        )
    if isinstance(settings, SinkConfig):
        return _sink(model, settings, task, progress)
    return _intercept(model, settings, task.chat_template, progress)


def apply(model: Any, steered: Steered) -> PeftModel:
    """Put an adapter on a plain model: the PeftModel, in eval mode.

    Raises:
        CheckError: the adapter has other parameters than those computed.
    """
    adapted = get_peft_model(model, steered.config)
    set_peft_model_state_dict(adapted, dict(steered.values))
    stored = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if wrong := sorted(stored.keys() ^ steered.values.keys()):
        raise CheckError(f"the adapter does not hold what was computed for it: {wrong[0]}")
    return adapted.eval()


def _chosen_heads(model: HeadModel, pairs: Pairs | None) -> list[tuple[int, int]]:
    if not pairs:
        raise InputError("no heads are given to steer; name them")
    hooks.require_heads(model, pairs)
    if len(set(pairs)) < len(pairs):
        raise InputError(f"heads {[list(pair) for pair in pairs]} name a head twice; remove the repeats")
    return sorted(pairs)


def _parameter(model: HeadModel, layer: int, path: str, name: str) -> str:
    """A parameter's name in an adapter's file; `path` is its module's within a layer."""
    return f"base_model.model.{model.architecture.layers}.{layer}.{path}.{name}"


def _of_heads(model: HeadModel, name: str, values: Mapping[tuple[int, int], Tensor]) -> dict[str, Tensor]:
    """Values of heads as the adapter has them: one tensor a layer, heads in order."""
    path = f"{model.architecture.attention}.{model.architecture.output_projection}"
    by_layer: dict[int, list[Tensor]] = {}
    for pair in sorted(values):
        by_layer.setdefault(pair[0], []).append(values[pair].float().cpu())
    return {_parameter(model, layer, path, name): torch.stack(rows) for layer, rows in by_layer.items()}


def _scaled(model: HeadModel, pairs: Pairs, factor: float, note: dict[str, Any]) -> Steered:
    config = HeadTuningConfig(heads=[list(pair) for pair in pairs], scale="head", offset=False, task_type="CAUSAL_LM")
    values = _of_heads(model, "head_tuning_scale", {pair: torch.tensor([factor - 1.0]) for pair in pairs})
    return Steered(config, values, note | {"heads": [list(pair) for pair in pairs]})


def _iti(
    model: HeadModel,
    settings: ItiConfig,
    pairs: Pairs,
    task: Task,
    seed: int,
    progress: Progress,
    probed: ProbeResult | None,
) -> Steered:
    if probed is not None and probed.read(task, seed, settings.per_prompt):
        statements = probed.note
        moves = {pair: probed.sigma[pair] * probed.directions[pair] for pair in pairs}
    else:
        layers = sorted({layer for layer, _ in pairs})
        z, true, _, statements = read_statements(model, task, layers, seed, settings.per_prompt, progress)
        of_layer = {layer: mass_mean(z[layer].to(model.device).float(), true) for layer in layers}
        moves = {(layer, head): of_layer[layer][0][head] * of_layer[layer][1][head] for layer, head in pairs}
    offsets = {pair: settings.alpha * move for pair, move in moves.items()}
    heads = [{"layer": layer, "head": head, "sigma": float(moves[layer, head].norm())} for layer, head in pairs]
    note = {
        "kind": "iti",
        "alpha": settings.alpha,
        "per_prompt": settings.per_prompt,
        "statements": statements,
        "heads": heads,
    }
    return moved(model, offsets, note)


def moved(model: HeadModel, offsets: Mapping[tuple[int, int], Tensor], note: dict[str, Any]) -> Steered:
    """An adapter that adds `[head_dim]` offsets to heads' outputs."""
    heads = [list(pair) for pair in sorted(offsets)]
    config = HeadTuningConfig(heads=heads, scale="none", offset=True, task_type="CAUSAL_LM")
    return Steered(config, _of_heads(model, "head_tuning_offset", offsets), note)


def _in_context(
    model: HeadModel, settings: InContextConfig, pairs: Pairs, task: Task, seed: int, progress: Progress
) -> Steered:
    prompts = in_context.few_shot_prompts(model, task, settings.shots, settings.prompts, settings.separator, seed)
    means = in_context.in_context_means(model, prompts, task.name, progress)
    offsets = means.offsets(pairs, settings.factor)
    note = {
        "kind": "in_context",
        "factor": settings.factor,
        "shots": settings.shots,
        "separator": settings.separator,
        "task": task.name,
        "sha256": task.sha256,
        **means.note,
        "heads": [{"layer": layer, "head": head, "norm": float(offsets[layer, head].norm())} for layer, head in pairs],
    }
    return moved(model, offsets, note)


def _sink(model: HeadModel, settings: SinkConfig, task: Task, progress: Progress) -> Steered:
    """The static form of `knobs.scale_sink_heads`: heads are chosen once, by their mean over the task's prompts.

    The knob scales a head at those positions where it looks at the first position with more than tau; this scales the
    heads that do so at END on average, at every position of every prompt.
    """
    last, attention = model.n_layers - 1, sink_attention(model, task, progress)
    pairs = [(last, head) for head in range(model.n_heads) if attention[head] > settings.tau]
    if not pairs:
        raise InputError(
            f"no head of layer {last} attends to the first position with more than tau={settings.tau} on average over "
            f"task {task.name!r}; the most is {attention.max().item():.3g}: lower tau"
        )
    note = {
        "kind": "sink",
        "tau": settings.tau,
        "gamma": settings.gamma,
        "layer": last,
        "task": task.name,
        "sha256": task.sha256,
        "prompts": len(task.examples),
        "attention": [round(value, 6) for value in attention.tolist()],
    }
    return _scaled(model, pairs, settings.gamma, note)


def _intercept(model: HeadModel, settings: InterceptConfig, chat: bool | ChatTemplate, progress: Progress) -> Steered:
    """`knobs.subtract_mlp_intercept` as an offset on the last layer's MLP output: the same at every position."""
    last, path = model.n_layers - 1, model.architecture.mlp_projection
    if path is None:
        raise InputError(
            f"family {model.hf.config.get_text_config().model_type!r} has a norm after its MLP, so no projection "
            "carries an offset on its output; use the intercept knob of headtune.analysis.interventions.last_layer"
        )
    fit = settings.fit or FIT
    task = with_chat(Intercept(settings.beta, fit).task(), chat or None)
    encoded = encode(task, model.tokenizer, model.positions, model.vocabulary)
    regression, r2 = decompose(model, encoded.examples, progress=progress)
    config = HeadTuningConfig(heads=[], mlp_layers=[last], scale="none", offset=True, task_type="CAUSAL_LM")
    offset = -settings.beta * regression.intercept[-1]
    values = {_parameter(model, last, path, "head_tuning_mlp_offset"): offset.float().cpu()}
    note = {
        "kind": "intercept",
        "beta": settings.beta,
        "fit": fit,
        "layer": last,
        "fit_examples": regression.n,
        "held_out_r2": r2[-1],
        "fit_data": encoded.summary(),
    }
    return Steered(config, values, note)
