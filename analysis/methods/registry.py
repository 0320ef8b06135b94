"""Every way of scoring heads behind one signature: `score(model, task, method) -> Scores`.

    from headtune import load_model, load_task, score
    scores = score(load_model("smollm2-135m"), load_task("country_cities"), "attribution_patching")
    scores.mean("attribution_patching.previous")          # [n_layers, n_heads], positive = the head raises it

Whatever the method, `<method>.target` is its estimate of how far a head raises the mean logit of the remaining answers
(first tokens), `<method>.previous` that of the answers already given, in logits unless the table says otherwise;
`<method>.target_contrast` and `<method>.previous_contrast` are the same less the other subjects' answers, which heads
are ranked by (a logit that all tokens share changes nothing).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from headtune import plugins
from headtune.analysis.interventions.counterfactuals import Counterfactual, Counterfactuals
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, EncodedTask, encode
from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.progress import Progress, silent

from . import attribution_patching, eap_ig, head_gating, logit_attribution, patching, retrieval
from .parallel_map import ParallelMap
from .scores import Array, Scores, stack

Shared = Any  # what a method computes once from all examples
ScoreExample = Callable[[HeadModel, Sequence[Encoded], int, Shared], dict[str, Array]]
Prepare = Callable[[HeadModel, Sequence[Encoded], int], Shared]


@dataclass(frozen=True)
class Method:
    """One way of scoring heads.

    Attributes:
        name: prefix of its quantities.
        summary: one line for people.
        score: (model, examples, index, shared) -> quantities of that example, `[n_layers, n_heads]` each; none where
            the example has no counterpart to patch from, which `Scores.counts` tells.
        prepare: what all examples share, computed once: (model, examples, seed) -> anything.
        whole: instead of `score`: quantities that only the task as a whole has.
        causal: an intervention, as against a reading or a linear estimate.
        quantities: what it always has, without its name: `copy` is `<name>.copy`.
        needs: the spans that every example must have.
        check: refuses the scores of a model that does not do what the task asks.
        left_out: why an example may have no scores, in words after "the others".
        by_metric: the same method by another metric than logits, for `NAME@METRIC`: `<name>.<metric>` is all that it
            has, see `patching.metric_of`; None where it has none.
    """

    name: str
    summary: str
    score: ScoreExample | None = None
    prepare: Prepare = lambda *_: None
    whole: Callable[[HeadModel, Sequence[Encoded], int, Progress], dict[str, Array]] | None = None
    causal: bool = True
    quantities: tuple[str, ...] = ("target",)
    needs: tuple[str, ...] = ()
    check: Callable[[Scores, Sequence[Encoded]], None] = lambda *_: None
    left_out: str = "have no counterpart of their length"
    by_metric: Callable[[patching.Metric], Method] | None = None


def _with_metrics(build: Callable[[patching.Metric], Method]) -> Method:
    """A causal method by logits, which `NAME@METRIC` measures by another metric."""

    def by_metric(metric: patching.Metric) -> Method:
        method = build(metric)
        summary = f"{method.summary}; by {metric.replace('_', ' ')}"
        return replace(method, name=f"{method.name}@{metric}", summary=summary, quantities=(), check=_has(metric))

    return replace(build("logit"), by_metric=by_metric)


def _has(metric: str) -> Callable[[Scores, Sequence[Encoded]], None]:
    def check(scores: Scores, _examples: Sequence[Encoded]) -> None:
        if not any(name.endswith(f".{metric}") for name in scores.by_example):
            raise InputError(f"no example has a counterpart of its length, so nothing has the metric {metric}")

    return check


def _ablation(name: str, summary: str) -> Method:
    def build(metric: patching.Metric) -> Method:
        def one(model: HeadModel, examples: Sequence[Encoded], index: int, _shared: Shared) -> dict[str, Array]:
            return patching.ablation_effects(model, examples[index], metric=metric)

        return Method(name, summary, one)

    return _with_metrics(build)


def _patched(name: str, summary: str, reference: Callable[[Counterfactuals, int], Tensor]) -> Method:
    def build(metric: patching.Metric) -> Method:
        def one(model: HeadModel, examples: Sequence[Encoded], index: int, shared: Counterfactuals) -> dict[str, Array]:
            return patching.patching_effects(name, model, examples[index], reference(shared, index), metric)

        return Method(name, summary, one, prepare=Counterfactuals)

    return _with_metrics(build)


def _everywhere(name: str, summary: str, reference: Counterfactual | None) -> Method:
    def build(metric: patching.Metric) -> Method:
        def one(model: HeadModel, examples: Sequence[Encoded], index: int, shared: Counterfactuals) -> dict[str, Array]:
            values = None if reference is None else reference(shared, index)
            if reference is not None and values is None:
                return {}
            return patching.everywhere_effects(name, model, examples[index], values, metric)

        return Method(name, summary, one, prepare=(lambda *_: None) if reference is None else Counterfactuals)

    return _with_metrics(build)


def _path(name: str, summary: str, reference: Callable[[Counterfactuals, int], Tensor]) -> Method:
    def build(metric: patching.Metric) -> Method:
        def one(model: HeadModel, examples: Sequence[Encoded], index: int, shared: Counterfactuals) -> dict[str, Array]:
            return patching.path_effects(name, model, examples[index], reference(shared, index), metric)

        return Method(name, summary, one, prepare=Counterfactuals)

    return _with_metrics(build)


def _eap_ig(name: str, summary: str, estimate: Callable[..., dict[str, Array]]) -> Method:
    def one(model: HeadModel, examples: Sequence[Encoded], index: int, shared: Counterfactuals) -> dict[str, Array]:
        counterpart = shared.corrupt_tokens(index, same_length=True)
        return {} if counterpart is None else estimate(model, examples[index], counterpart, name)

    return Method(name, summary, one, prepare=Counterfactuals, causal=False)


_ALL = (
    Method(
        "dla",
        "direct logit attribution, and the Token Lens: split by the tokens a head reads",
        lambda model, examples, index, vocabulary: logit_attribution.attribute(model, examples[index], vocabulary),
        prepare=lambda model, *_: logit_attribution.mean_unembedding(model),
        causal=False,
    ),
    _ablation("ablation", "exact: each head silenced at the last token"),
    _patched("mean", "exact: each head at the last token set to its mean over other subjects", Counterfactuals.mean),
    _patched(
        "resample", "exact: each head at the last token set to what it is in another example", Counterfactuals.resample
    ),
    _patched(
        "corrupt",
        "exact: each head at the last token set to what it is in the corrupted counterpart",
        Counterfactuals.corrupt,
    ),
    _everywhere("ablation_all", "exact: each head silenced at all positions", None),
    _everywhere("mean_all", "exact: each head set to its mean, at all positions", Counterfactuals.mean_everywhere),
    _everywhere(
        "resample_all", "exact: another example's run put in, at all positions", Counterfactuals.resample_everywhere
    ),
    _everywhere("corrupt_all", "exact: the corrupted run put in, at all positions", Counterfactuals.corrupt_everywhere),
    _path(
        "path",
        "path patching head -> logits at the last token, mean over other subjects, other heads frozen",
        Counterfactuals.mean,
    ),
    Method(
        "attribution_patching",
        "gradient estimate of silencing each head at the last token: one forward and one backward pass",
        lambda model, examples, index, _shared: attribution_patching.attribution_patching(model, examples[index]),
        causal=False,
    ),
    Method(
        "attribution_patching_corrupt",
        "gradient estimate of putting in the corrupted counterpart at the last token",
        lambda model, examples, index, shared: attribution_patching.attribution_patching(
            model, examples[index], shared.corrupt(index), "attribution_patching_corrupt"
        ),
        prepare=Counterfactuals,
        causal=False,
    ),
    Method(
        "integrated_gradients",
        "the gradient meaned while all heads at the last token fade to their means together; sums to their effect",
        lambda model, examples, index, shared: attribution_patching.integrated_gradients(
            model, examples[index], shared.mean(index)
        ),
        prepare=Counterfactuals,
        causal=False,
    ),
    Method(
        "integrated_gradients_corrupt",
        "the gradient meaned while all heads at the last token fade to the corrupted counterpart together",
        lambda model, examples, index, shared: attribution_patching.integrated_gradients(
            model, examples[index], shared.corrupt(index), "integrated_gradients_corrupt"
        ),
        prepare=Counterfactuals,
        causal=False,
    ),
    _eap_ig(
        "eap_ig_inputs",
        "EAP-IG (inputs): the gradient meaned while the embeddings go from the corrupted counterpart's to the prompt's",
        eap_ig.eap_ig_inputs,
    ),
    _eap_ig(
        "eap_ig_activations",
        "EAP-IG (activations): the gradient meaned while one head at all positions goes from the counterpart to itself",
        eap_ig.eap_ig_activations,
    ),
    Method(
        "gates",
        "learned gates (causal head gating): facilitating, interfering and irrelevant heads",
        whole=head_gating.gate_scores,
    ),
    Method(
        "retrieval",
        "how much of a needle each head looks at while the model copies it; the task needs the span 'needle'",
        lambda model, examples, index, _shared: retrieval.copied(model, examples[index]),
        causal=False,
        quantities=("copy",),
        needs=(retrieval.SPAN,),
        check=retrieval.require_successes,
        left_out="have an answer that the model does not write in full",
    ),
)
METHODS: dict[str, Method] = {}


def add_method(method: Method) -> None:
    """Make a method known by its name, to `score` and to `--method`.

    Raises:
        InputError: a name that is taken, or that `--method` could not hold.
    """
    if method.name in (*METHODS, "all"):
        raise InputError(f"method {method.name!r} is registered already; choose another name")
    if not re.fullmatch(r"[A-Za-z]\w*", method.name):
        raise InputError(f"method {method.name!r} must be a name of letters, digits and underscores")
    METHODS[method.name] = method


def register_scoring_method(
    name: str,
    summary: str,
    prepare: Prepare = lambda *_: None,
    causal: bool = True,
    quantities: tuple[str, ...] = ("target",),
    needs: tuple[str, ...] = (),
) -> Callable[[ScoreExample], ScoreExample]:
    """Decorator that makes a function a method: (model, examples, index, shared) -> quantities of that example.

        @register_scoring_method("norm", "the norm of each head's output", causal=False)
        def norm(model, examples, index, shared):
            return {"norm.target": ...}  # [n_layers, n_heads] float32; `norm.previous` where there are such answers

    Args:
        name, summary, prepare, causal, quantities, needs: see `Method`.

    Raises:
        InputError: a name that is taken, or that `--method` could not hold.
    """

    def register(score: ScoreExample) -> ScoreExample:
        add_method(Method(name, summary, score, prepare, causal=causal, quantities=quantities, needs=needs))
        return score

    return register


for _method in _ALL:
    add_method(_method)
# What `identify` runs unless told otherwise: attribution finds, exact ablation confirms.
DEFAULT = ("dla", "ablation")


def parse_method_names(names: str) -> list[Method]:
    """The methods behind `--method`: names with commas; `all` is the pair that identify ranks by; `NAME@METRIC`
    (`ablation@kl`) is a causal method by another metric, see `patching.metric_of`.

    Raises:
        InputError: an unknown name or metric, or a metric of a method that has none.
    """
    requested = list(DEFAULT) if names == "all" else [name.strip() for name in names.split(",")]
    if not METHODS.keys() >= {name.partition("@")[0] for name in requested}:
        plugins.load_installed()
    return [_method_named(name) for name in dict.fromkeys(requested)]


def _method_named(text: str) -> Method:
    name, by, metric = text.partition("@")
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown; {nearest(name, ['all', *METHODS])}")
    method = METHODS[name]
    if not by:
        return method
    if method.by_metric is None:
        having = ", ".join(other.name for other in METHODS.values() if other.by_metric is not None)
        raise InputError(f"method {text!r}: {name} has no other metric; those that have one: {having}")
    others = [each for each in patching.METRICS if each != "logit"]
    if metric not in others:
        raise InputError(f"method {text!r}: metric {metric!r} is unknown; {nearest(metric, others, listed=True)}")
    return method.by_metric(metric)


def score_examples(
    model: HeadModel,
    examples: Sequence[Encoded],
    names: str,
    seed: int = 0,
    progress: Progress = silent,
    parallel: ParallelMap | None = None,
) -> Scores:
    """Scores of all heads by one or several methods (names with commas) on encoded examples.

    Args:
        parallel: how examples are shared among processes and kept; default: this process alone, nothing kept.
    """
    parallel = parallel or ParallelMap()
    methods = parse_method_names(names)
    for method in methods:
        _require_spans(method, examples)
    per_example = [method for method in methods if method.score is not None]
    shared = {method.name: method.prepare(model, examples, seed) for method in per_example}

    def one(index: int) -> dict[str, Array]:
        row: dict[str, Array] = {}
        for method in per_example:
            row |= method.score(model, examples, index, shared[method.name])  # type: ignore[misc]
        return row

    rows = parallel.map(len(examples), one, progress, "scoring heads") if per_example else []
    whole: dict[str, Array] = {}
    for method in methods:
        if (of_task := method.whole) is not None:
            whole |= parallel.once(method.name, partial(of_task, model, examples, seed, progress))
    scores = stack(rows, [example.example.subject for example in examples], whole)
    for method in methods:
        method.check(scores, examples)
        if any(f"{method.name}.{quantity}" not in scores for quantity in method.quantities):
            raise InputError(
                f"method {method.name!r} needs examples of other subjects with as many tokens, and there are none: add "
                "examples or corrupt prompts of equal length, or use a method of the last token alone"
            )
    return scores


def _require_spans(method: Method, examples: Sequence[Encoded]) -> None:
    for span in method.needs:
        lacking = [encoded for encoded in examples if span not in encoded.spans]
        if lacking:
            raise InputError(
                f"method {method.name!r} needs the span {span!r}, and {len(lacking)} of {len(examples)} prompts have "
                f"none, such as {lacking[0].example.prompt[:40]!r}...; see: headtune task make needle --help"
            )


def score(
    model: HeadModel, task: Task | EncodedTask, method: str, seed: int = 0, progress: Progress = silent
) -> Scores:
    """Scores of all heads of a model on a task.

    Args:
        method: a key of METHODS, several with commas, or `all`.
        seed: of whatever the method draws.

    Raises:
        InputError: an unknown method, or a task that cannot be scored on this model.
    """
    encoded = (
        task if isinstance(task, EncodedTask) else encode(task, model.tokenizer, model.positions, model.vocabulary)
    )
    return score_examples(model, encoded.examples, method, seed, progress)
