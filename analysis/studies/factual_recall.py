"""Key mechanisms of factual recall (Lv et al. 2024), measured on a task of one's own.

1. Argument-passing heads carry what is asked about (a country) to END, for the MLPs after them. Path patching of one
   head at END, its mean over other subjects put in, other heads frozen, MLPs recomputed:

       LD = mean logit of the remaining answers' first tokens - mean logit of the vocabulary
       ratio of means = 100 * mean(LD_clean - LD_patched) / |mean(LD_clean)|     over the prompts, in percent
       mean of ratios = 100 * mean((LD_clean - LD_patched) / |LD_clean|)

   Positive = the head raises the answer; the paper's score is the negative. The authors take the ratio of means, which
   ranks the heads here; the mean of ratios, which prompts with a small LD can rule, stands beside it.
2. MLPs amplify or erase what single heads brought, and add a vector of their own, the applied function: see `mlp`.
3. Anti-overconfidence: p(answer), decoded after every layer, falls in the last layers; last-layer heads look at the
   first position and bring frequent tokens from there; the last MLP's intercept follows token frequency: see
   `frequency`.
4. Two knobs that undo some of it, with p(answer) and accuracy, on subjects that the intercept was not fitted on: see
   `knobs`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headtune.analysis.interventions.counterfactuals import Counterfactuals
from headtune.analysis.interventions.last_layer import scale_sink_heads, subtract_mlp_intercept
from headtune.analysis.interventions.mlp_regression import (
    Decomposition,
    LastTokenParts,
    Moments,
    decoded,
    last_token_parts,
    moments_of,
    regress,
    split_subjects,
)
from headtune.analysis.methods.patching import answer_probabilities, path_logits
from headtune.analysis.methods.scores import Array, Scores, stack
from headtune.analysis.models.attention import softcapped
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress
from headtune.analysis.utils.stats import change_interval, mean_interval, tails

from .base import Analysis
from .factual_recall_figures import page
from .token_frequency import Frequencies, frequencies

TAU = 0.5  # attention to the first position above which a last-layer head counts as one that looks there
# What the knobs are set to: (factor on heads that look at the first position, share of the intercept taken away).
SETTINGS: dict[str, tuple[float, float]] = {
    "both off": (1.0, 0.0),
    "sink gamma=0.5": (0.5, 0.0),
    "sink gamma=0": (0.0, 0.0),
    "intercept beta=0.25": (1.0, 0.25),
    "intercept beta=0.5": (1.0, 0.5),
    "intercept beta=1": (1.0, 1.0),
    "sink gamma=0.5, intercept beta=0.5": (0.5, 0.5),
}
_TOP_TOKENS = 8

Means = dict[str, Any]  # {"mean", "ci": [low, high]}


def answer_difference(logits: Tensor, encoded: Encoded) -> Tensor:
    """`[rows]` LD of `[rows, vocabulary]` logits: the remaining answers' first tokens against the vocabulary's mean."""
    logits = logits.float()
    return logits[:, list(encoded.target_tokens)].mean(-1) - logits.mean(-1)


def argument_differences(
    model: HeadModel, examples: Sequence[Encoded], index: int, references: Counterfactuals
) -> dict[str, Array]:
    """What one example says of how far the answer rests on each head's knowledge of the subject.

    Returns:
        `[n_layers, n_heads]` each: `argument.clean` LD_clean, the same for all heads; `argument.change` LD_clean -
        LD_patched, in logits; `argument.share` the change in percent of |LD_clean|.

    Raises:
        InputError: LD is 0, so that no share of it can be given.
    """
    encoded = examples[index]
    differences = answer_difference(path_logits(model, encoded, references.mean(index)), encoded)
    clean, patched = differences[0], differences[1:]
    if clean == 0:
        raise InputError(
            f"{encoded.example.prompt!r}: the answers' logit is the vocabulary's mean; leave the example out"
        )
    change = clean - patched
    values = {"clean": clean.expand_as(change), "change": change, "share": 100 * change / clean.abs()}
    return {
        f"argument.{name}": value.reshape(model.n_layers, model.n_heads).cpu().numpy() for name, value in values.items()
    }


@dataclass(frozen=True)
class ArgumentScores:
    """One of the two scores of argument-passing heads, percent, `[n_layers, n_heads]`; `low` and `high`: 95%."""

    mean: Array
    low: Array
    high: Array


def ratio_of_means(scores: Scores) -> ArgumentScores:
    """`100 * mean(change) / |mean(clean)|`, the authors' score; intervals from the ratios of resamplings."""
    ratio = 100 * scores.mean("argument.change") / np.abs(scores.mean("argument.clean"))
    # The same seed draws the same subjects for both.
    draws = 100 * scores.bootstrap("argument.change") / np.abs(scores.bootstrap("argument.clean"))
    low, high = np.percentile(draws, tails(0.95), axis=0)
    return ArgumentScores(ratio.astype(np.float32), low.astype(np.float32), high.astype(np.float32))


def mean_of_ratios(scores: Scores) -> ArgumentScores:
    """`100 * mean(change / |clean|)`."""
    return ArgumentScores(scores.mean("argument.share"), *scores.interval("argument.share"))


@torch.no_grad()
def answers_by_layer(model: HeadModel, after: Tensor, encoded: Encoded) -> NDArray[np.float64]:
    """p(remaining answers' first tokens) if the model ended after each layer (logit lens: its own norm, unembedding).

    Args:
        after: `[n, d_model]` residual streams at END.

    Returns:
        `[n]` total probability; of the last layer's residual stream, it is the model's.
    """
    norm: Any = model.final_norm
    unembed: Any = model.hf.get_output_embeddings()
    cap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
    residual = norm(after.to(device=norm.weight.device, dtype=model.dtype))
    logits = softcapped(unembed(residual.to(unembed.weight.device)).float(), cap)
    result: NDArray[np.float64] = answer_probabilities(logits, encoded).target.double().cpu().numpy()
    return result


def fall(p: NDArray[np.float64], subjects: Sequence[str]) -> Means:
    """How far p(answer) falls from the layer where it is highest to the last one.

    The layer is chosen, for each subject, by the mean over all *other* subjects: a maximum found on the same examples
    would fall even where there is only noise.

    Args:
        p: `[n_examples, n_layers]` of at least two subjects.

    Returns:
        `{"mean", "ci"}`, the interval over subjects.
    """
    names = np.asarray(subjects)
    drops = np.empty(len(names))
    for subject in set(subjects):
        same = names == subject
        drops[same] = p[same, p[~same].mean(0).argmax()] - p[same, -1]
    return _change(np.zeros(len(drops)), drops, subjects)


def _change(before: NDArray[np.float64], after: NDArray[np.float64], subjects: Sequence[str]) -> Means:
    """The interval of a difference of probabilities or hits; of one subject all that a difference can be, -1 to 1."""
    change = change_interval(before, after, subjects)
    return change if len(set(subjects)) > 1 else change | {"ci": [-1.0, 1.0]}


# --- one pass over the examples ---------------------------------------------------------------------------------------


@dataclass
class Survey:
    """What one clean run per example tells.

    Attributes:
        fitted, others: moments of the subjects that MLPs are fitted on, and of those held out.
        p: per example, `[n_layers]` p(answer) after each layer.
        first: per example, `[n_heads]` attention of the last layer's heads from END to the first position.
        to_subject: per example, `[n_layers, n_heads]` attention from END to the subject.
        final: sum of the residual streams after the last layer, `[d_model]`.
        last, brought: sums of what the last layer's heads add, and of what of it comes from the first position,
            `[n_heads, d_model]`.
    """

    fitted: Moments
    others: Moments
    p: list[NDArray[np.float64]]
    first: list[Array]
    to_subject: list[Array]
    final: Tensor
    last: Tensor
    brought: Tensor

    @classmethod
    def empty(cls, model: HeadModel) -> Survey:
        d_model, per_head = torch.zeros(model.d_model), torch.zeros(model.n_heads, model.d_model)
        sums = (tensor.double().to(model.device) for tensor in (d_model, per_head, per_head))
        return cls(Moments.empty(model), Moments.empty(model), [], [], [], *sums)

    def add(self, model: HeadModel, encoded: Encoded, parts: LastTokenParts, held_out: bool) -> None:
        (self.others if held_out else self.fitted).add(moments_of(parts))
        self.p.append(answers_by_layer(model, parts.after, encoded))
        self.first.append(parts.pattern[-1, :, 0].cpu().numpy())
        self.to_subject.append(parts.pattern[:, :, list(encoded.subject)].sum(-1).cpu().numpy())
        self.final += parts.final
        self.last += parts.heads[-1]
        self.brought += parts.first

    @property
    def n(self) -> int:
        return len(self.p)


def frequency_rows(
    model: HeadModel, survey: Survey, mlp: Decomposition, table: Frequencies
) -> tuple[list[dict[str, Any]], Array]:
    """How far what the last layer writes, decoded, follows token frequency; and, to compare with, what else does.

    Returns:
        One dictionary a vector: `what`, `kind`, and what `Frequencies.correlate` gives; and the decoded intercept of
        the last MLP, `[vocabulary]`.
    """
    last, middle = model.n_layers - 1, model.n_layers // 2
    final = (survey.final / survey.n).float()
    names = [(f"L{last}H{head}", "head") for head in range(model.n_heads)]
    names += [(f"L{last}H{head} from the first position", "first position") for head in range(model.n_heads)]
    names += [
        (f"intercept of MLP {last}", "intercept"),
        (f"intercept of MLP {middle}", "comparison"),
        ("the model's mean logits", "comparison"),
    ]
    vectors = torch.cat(
        [
            (survey.last / survey.n).float(),
            (survey.brought / survey.n).float(),
            mlp.intercept[[last, middle]],
            final[None],
        ]
    )
    logits = decoded(model, final, vectors).cpu().numpy()
    rows = [
        {"what": what, "kind": kind, **table.correlate(row)} for (what, kind), row in zip(names, logits, strict=True)
    ]
    return rows, logits[2 * model.n_heads]


@torch.no_grad()
def knob_effects(
    model: HeadModel, examples: Sequence[Encoded], intercept: Tensor, progress: Progress
) -> list[dict[str, Any]]:
    """p(answer) and top-1 accuracy (is the likeliest token an answer's first?) at END under every one of SETTINGS.

    Returns:
        One dictionary a setting: `setting`, `gamma`, `beta`, and `p`, `accuracy`, `p_change`, `accuracy_change`
        (against both knobs off, paired), each `{"mean", "ci"}`.
    """
    subjects = [encoded.example.subject for encoded in examples]
    results: dict[str, NDArray[np.float64]] = {}  # [n_examples, 2]
    for name, (gamma, beta) in progress(list(SETTINGS.items()), "turning knobs"):
        with contextlib.ExitStack() as stack:
            if gamma != 1:
                stack.enter_context(scale_sink_heads(model, TAU, gamma))
            if beta != 0:
                stack.enter_context(subtract_mlp_intercept(model, intercept, beta))
            results[name] = np.array([_answer_and_hit(model, encoded) for encoded in examples])
    off = next(iter(results.values()))
    return [
        {
            "setting": name,
            "gamma": gamma,
            "beta": beta,
            "p": mean_interval(results[name][:, 0].tolist(), subjects),
            "accuracy": mean_interval(results[name][:, 1].tolist(), subjects),
            "p_change": _change(off[:, 0], results[name][:, 0], subjects),
            "accuracy_change": _change(off[:, 1], results[name][:, 1], subjects),
        }
        for name, (gamma, beta) in SETTINGS.items()
    ]


def _answer_and_hit(model: HeadModel, encoded: Encoded) -> tuple[float, float]:
    logits = model.hf(encoded.tokens[None].to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
    hit = int(logits[0].argmax()) in encoded.target_tokens
    return answer_probabilities(logits, encoded).target.item(), float(hit)


# --- the study --------------------------------------------------------------------------------------------------------


def factual_recall(
    model: HeadModel,
    examples: Sequence[Encoded],
    progress: Progress,
    *,
    frequency_text: str | None = None,
    held_out: float = 0.3,
    top: int = 10,
    seed: int = 0,
) -> Analysis:
    """All four parts, on examples of at least two subjects.

    Args:
        frequency_text: text file or folder to count tokens in; None uses a small built-in table (see `frequency`).
        held_out: share of the subjects on which MLP fits and knobs are judged; the fits see only the others.
        top: argument-passing heads listed.
        seed: of the draw of held-out subjects.

    Raises:
        InputError: fewer than two subjects, a text that cannot be read, or an option out of range.
    """
    if top < 1:
        raise InputError(f"top is {top}; expected at least 1 head to list")
    subjects = [encoded.example.subject for encoded in examples]
    apart = split_subjects(subjects, held_out, seed)
    table = frequencies(model.tokenizer, frequency_text)
    references = Counterfactuals(model, examples, seed)

    survey = Survey.empty(model)
    for encoded in progress(examples, "taking runs apart"):
        survey.add(model, encoded, last_token_parts(model, encoded.tokens), encoded.example.subject in apart)
    mlp = regress(survey.fitted)
    # Path patching, token frequency, and what the interventions on the last layer change.
    indices = range(len(examples))
    rows = [argument_differences(model, examples, i, references) for i in progress(indices, "patching paths")]
    scores = stack(rows, subjects)
    correlations, intercept_logits = frequency_rows(model, survey, mlp, table)
    judged = [encoded for encoded in examples if encoded.example.subject in apart]
    knobs = knob_effects(model, judged, mlp.intercept[-1], progress)

    # The numbers, as the page shows them.
    p = np.stack(survey.p)
    first = np.stack(survey.first)
    data: dict[str, Any] = {
        "n": {"examples": len(examples), "subjects": len(set(subjects)), "held_out_subjects": sorted(apart)},
        "argument": {
            "ratio_of_means": ratio_of_means(scores).mean.tolist(),
            "mean_of_ratios": mean_of_ratios(scores).mean.tolist(),
            "top": _ranked(scores, np.mean(survey.to_subject, axis=0), mlp, top),
        },
        "mlp": {
            "heads": mlp.heads.tolist(),
            "residual": mlp.residual.tolist(),
            "r2": mlp.r2(survey.fitted),
            "held_out_r2": mlp.r2(survey.others),
            "tokens": _top_tokens(model, (survey.final / survey.n).float(), mlp),
        },
        "overconfidence": {
            "p_by_layer": [mean_interval(p[:, layer].tolist(), subjects) for layer in range(model.n_layers)],
            "peak_layer": int(p.mean(0).argmax()),
            "fall": fall(p, subjects),
            "attention_to_first": [mean_interval(first[:, head].tolist(), subjects) for head in range(model.n_heads)],
        },
        "frequency": {
            "source": table.source,
            "tokens_seen": int(table.masks()["seen"].sum()),
            "correlations": correlations,
        },
        "knobs": {"examples": len(judged), "tau": TAU, "settings": knobs},
    }
    return Analysis("factual_recall", data, page(data, table, intercept_logits))


def _ranked(scores: Scores, to_subject: Array, mlp: Decomposition, top: int) -> list[dict[str, Any]]:
    both = {"ratio_of_means": ratio_of_means(scores), "mean_of_ratios": mean_of_ratios(scores)}
    mean = both["ratio_of_means"].mean
    order = np.argsort(-mean, axis=None, kind="stable")[:top]
    pairs = [tuple(int(i) for i in np.unravel_index(flat, mean.shape)) for flat in order]
    return [
        {
            "layer": layer,
            "head": head,
            **{
                name: {
                    "mean": float(score.mean[layer, head]),
                    "ci": [float(score.low[layer, head]), float(score.high[layer, head])],
                }
                for name, score in both.items()
            },
            "attention_to_subject": float(to_subject[layer, head]),
            "mlp_coefficient": float(mlp.heads[layer, head]),
        }
        for layer, head in pairs
    ]


def _top_tokens(model: HeadModel, final: Tensor, mlp: Decomposition) -> list[list[str]]:
    """By layer, the tokens that the MLP's intercept raises most."""
    chosen = decoded(model, final, mlp.intercept).topk(_TOP_TOKENS).indices.tolist()
    decode: Any = model.tokenizer.decode
    return [[decode([token]) for token in row] for row in chosen]
