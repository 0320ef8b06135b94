"""Heads that a run chooses by training, by probes, or by few-shot prompts."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headtune.analysis.heads.head_set import RankedHead
from headtune.analysis.methods import in_context
from headtune.analysis.methods.scores import Scores
from headtune.analysis.tasks.messages import chat_entry
from headtune.analysis.tasks.task import Task
from headtune.train import distributed
from headtune.train.config.resolve_heads import ResolvedHeads, ranked_heads, selected
from headtune.train.trainer import training
from headtune.train.trainer.objectives import objective_of
from headtune.train.trainer.run_context import RunContext
from headtune.train.tuners import head_tuning, iti_probes
from headtune.train.types import Penalty, require_enough

NORM = "lofit.norm"


def lofit_heads(context: RunContext, train: Task, rows: Any) -> ResolvedHeads:
    """LoFiT's first stage: the heads whose scale grows most when all heads' scales are trained under an L1 penalty.

        score[l, h] = ||A[l, h]||_2 after training   z <- (1 + A) z   on   loss + l1 * sum |A|

    The adapter is thrown away: `model.hf` is the untouched base afterwards. (Yin et al. 2024, section 3.)

    Args:
        rows: what the objective prepared.
    """
    recipe, model, notify = context.recipe, context.model, context.notify
    assert recipe.heads is not None and recipe.heads.lofit is not None
    block, top = recipe.heads.lofit, recipe.heads.top
    everyone = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    config = head_tuning.HeadTuningConfig(
        heads=[list(pair) for pair in everyone],
        scale="vector",
        offset=False,
        init_std=block.init_std,
        task_type="CAUSAL_LM",
    )
    training.set_pad_token(model)
    data = objective_of(recipe.method).data(recipe, model, train, rows, notify)
    changes: dict[str, Any] = {
        "learning_rate": block.learning_rate,
        "output_dir": str(context.folder / "select"),
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
    }
    if block.max_steps is not None:
        changes["max_steps"] = block.max_steps
    notify(f"choosing heads: scales on all {len(everyone)} heads, {data.n_rows} rows")
    model.record_attention(False)
    arguments = training.training_arguments(recipe, **changes)
    stage = context.tracker.stage("select")
    trainer = training.train_adapter(
        context, config, data, arguments, logs=stage, penalty=l1_penalty(block.l1), everywhere=True
    )
    # The scales are read, and the adapter is taken off.
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    norms = scale_norms(adapted, model.n_layers, model.n_heads)
    model.hf = adapted.unload()
    shutil.rmtree(changes["output_dir"], ignore_errors=True)
    context.tracker.log({"select/steps": trainer.state.global_step})
    method = {"parameters": block.model_dump() | {"objective": recipe.method.objective}, **trainer.timing}
    ranked = ranked_heads(norms, top, "heads.lofit.learning_rate")
    return selected("lofit", {NORM: norms}, ranked, recipe.seed, model, data.summary, method)


def l1_penalty(weight: float) -> Penalty:
    """`sum |A|` over every trained scale."""

    def penalty(model: Any, _progress: float) -> dict[str, tuple[Tensor, float]]:
        with distributed.gathered_parameters(distributed.trainable_modules(model)):
            scales = [p for name, p in model.named_parameters() if "head_tuning_scale" in name and p.requires_grad]
            return {"l1": (torch.stack([scale.abs().sum() for scale in scales]).sum(), weight)}

    return penalty


@torch.no_grad()
def scale_norms(model: Any, n_layers: int, n_heads: int) -> Tensor:
    """`[n_layers, n_heads]` ||a||_2 of an adapter's scales; 0 where a head has none."""
    norms = torch.zeros(n_layers, n_heads)
    for module in model.modules():
        if isinstance(module, head_tuning.HeadTuningLayer):
            for name, scale in module.head_tuning_scale.items():
                norms[module.layer, module.chosen_heads[name]] = scale.float().norm(dim=-1).cpu()
    return norms


def probed_heads(context: RunContext, train: Task) -> ResolvedHeads:
    """The heads whose output a linear probe reads right from wrong answers best (Li et al. 2023)."""
    recipe, model = context.recipe, context.model
    assert recipe.heads is not None and recipe.heads.probe is not None
    block = recipe.heads.probe
    part = train.limited(recipe.task.max_train_examples, recipe.seed).limited(block.max_examples, recipe.seed)
    probes = iti_probes.probe_heads(model, part, recipe.seed, block.folds, block.per_prompt, context.progress)
    ranked, scores = probes.ranked(recipe.heads.top), {iti_probes.ACCURACY: probes.accuracy}
    resolved = selected("probe", scores, ranked, recipe.seed, model, _summary(part), {"parameters": probes.note})
    return replace(resolved, probed=probes)


def in_context_heads(context: RunContext, train: Task) -> ResolvedHeads:
    """The heads whose mean output in few-shot prompts restores the right answer best (Todd et al. 2024)."""
    recipe, model = context.recipe, context.model
    assert recipe.heads is not None and recipe.heads.in_context is not None
    block, top = recipe.heads.in_context, recipe.heads.top
    require_enough(top, model.n_layers * model.n_heads)
    part = train.limited(recipe.task.max_train_examples, recipe.seed)
    prompts = in_context.few_shot_prompts(model, part, block.shots, block.prompts, block.separator, recipe.seed)
    means = in_context.in_context_means(model, prompts, part.name, context.progress)
    scores = in_context.indirect_effects(model, means, block.scored, context.progress)
    parameters = {"shots": block.shots, "separator": block.separator, "scored": len(scores.subjects), **means.note}
    effects = {in_context.CIE: torch.from_numpy(scores.mean(in_context.CIE))}
    ranked = ranked_by_effect(scores, top)
    return selected("in_context", effects, ranked, recipe.seed, model, _summary(part), {"parameters": parameters})


def ranked_by_effect(scores: Scores, top: int) -> tuple[RankedHead, ...]:
    """The `top` heads by average indirect effect, best first, with its interval where there are several subjects."""
    mean, (low, high) = scores.mean(in_context.CIE), scores.interval(in_context.CIE)
    order = (-mean).argsort(axis=None, kind="stable")[:top].tolist()
    ranked = []
    for layer, head in (divmod(index, mean.shape[1]) for index in order):
        interval = float(low[layer, head]), float(high[layer, head])
        finite = all(map(math.isfinite, interval))
        ranked.append(RankedHead(layer, head, float(mean[layer, head]), interval if finite else None))
    return tuple(ranked)


def _summary(task: Task) -> dict[str, Any]:
    """A head set's block `task`."""
    examples = len(task.examples)
    summary = {"name": task.name, "sha256": task.sha256, "n_examples": examples, "n_dropped": 0, "dropped": {}}
    return summary | chat_entry(task.chat_template)
