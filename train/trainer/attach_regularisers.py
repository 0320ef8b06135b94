"""A recipe's regularisers, put on a trainer for the time of its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.chat import with_chat
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Task, take_split
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Notify
from headtune.train.config import methods
from headtune.train.config.resolve_heads import resolve_heads
from headtune.train.config.resolve_tasks import chat_setting
from headtune.train.config.schema import Recipe
from headtune.train.losses import regularisers
from headtune.train.losses.activation_capture import warn_of_dropout
from headtune.train.losses.registry import head_penalties_of
from headtune.train.losses.weight_penalties import fisher_diagonal
from headtune.train.tuners import head_pruning
from headtune.train.tuners.head_weights import head_weights

from .rows import rows_of

Pairs = Sequence[tuple[int, int]]


def combined(*parts: Any) -> Any:
    """One penalty of several; None where there is none."""
    penalties = [part for part in parts if part is not None]
    if len(penalties) < 2:
        return penalties[0] if penalties else None
    return _Combined(penalties)


class _Combined:
    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def see(self, inputs: Any) -> None:
        for part in self.parts:
            if hasattr(part, "see"):
                part.see(inputs)

    def __call__(self, model: Any, progress: float) -> dict[str, tuple[Tensor, float]]:
        return {name: term for part in self.parts for name, term in part(model, progress).items()}


def require_usable(recipe: Recipe, model: HeadModel, train: Task) -> None:
    """Refuse, before anything is written, regularisers that do not fit the model, the tokenizer or each other.

    Heads that the recipe is yet to find are taken to be there.

    Raises:
        InputError: heads that do not exist, options that are no single tokens, a Fisher task that cannot be read, two
            of them, two terms that prune.
    """
    terms = _terms(recipe)
    if sum(isinstance(term, methods.PruneGates) for term in terms) > 1:
        raise InputError("method.regularisers prunes twice; give one term of kind prune, with the heads of both")
    stiff = [term for term in terms if isinstance(term, methods.WeightDrift) and term.fisher]
    if len({(term.task, term.max_examples) for term in stiff}) > 1:
        raise InputError(
            "method.regularisers takes Fisher information from two tasks or numbers of examples; give one task and one "
            "max_examples"
        )
    if stiff:
        rows_of(_fisher_task(recipe, train, stiff[0]), model.tokenizer, 0, recipe.seed)
    for term in terms:
        pairs = resolve_heads(term.heads, model, train, notify=lambda _line: None).pairs if term.heads else [(0, 0)]
        if not isinstance(term, methods.PruneGates):
            regularisers.Regularisers(model, [(term, pairs)], fisher={})


@contextlib.contextmanager
def with_regularisers(
    recipe: Recipe, model: HeadModel, pairs: Pairs, train: Task, trainer: Any, notify: Notify
) -> Iterator[head_pruning.HeadGates | None]:
    """Inside the block the trainer's loss has the recipe's regularisers.

    Args:
        model: the model that is trained; its adapter, if any, is on it already.
        pairs: the recipe's own heads.
        train: the task that is trained on.

    Yields:
        The gates of a `prune` term, which stay on the model after the block.

    Raises:
        InputError: heads that do not exist, options that are no single tokens.
    """
    # Each term with its heads; gates go on the model, what is left becomes penalties.
    terms = [
        (term, list(pairs) if term.heads is None else resolve_heads(term.heads, model, train, notify=notify).pairs)
        for term in _terms(recipe)
    ]
    gates: head_pruning.HeadGates | None = None
    penalised: list[tuple[methods.AnyRegulariser, Pairs]] = []
    for term, heads in terms:
        if isinstance(term, methods.PruneGates):
            gates = head_pruning.attach(trainer.model, heads)
            trainer.rates = {**trainer.rates, head_pruning.NAME: term.learning_rate}
            trainer.add_callback(head_pruning.GatesInCheckpoints())
            price = head_pruning.l0_penalty(gates, term.weight, term.warmup, term.sparsity)
            trainer.penalty = combined(trainer.penalty, price)
        else:
            penalised.append((term, heads))
    # Penalties watch the passes of the training, for as long as the block lasts.
    with contextlib.ExitStack() as exit_stack:
        if penalised:
            penalties = head_penalties_of(model, penalised).values()
            if any(penalty.captures().attention for penalty in penalties):
                exit_stack.enter_context(_recorded(model))
            if compared := [penalty.config.kind for penalty in penalties if penalty.compares_with_base]:
                warn_of_dropout(model.hf, " and ".join(compared), notify)
            watching = regularisers.Regularisers(
                model, penalised, fisher=_fisher(recipe, model, train, terms, trainer.model, notify)
            )
            exit_stack.enter_context(watching.installed())
            trainer.penalty = combined(trainer.penalty, watching)
            exit_stack.callback(_report_skipped, watching, notify)
        yield gates


def require_visible_pass(args: Any) -> None:
    """Refuse checkpointing that hides from penalties what a training pass computed.

    Raises:
        InputError: re-entrant checkpointing, which adapters under ZeRO-3 are given by TRL.
    """
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise InputError(
            "method.regularisers read the training pass, which re-entrant checkpointing hides (adapters under ZeRO-3 "
            "have no other); set training.gradient_checkpointing to false, or launch with ZeRO-2 or FSDP2"
        )


def _report_skipped(watching: regularisers.Regularisers, notify: Notify) -> None:
    for name in watching.penalties:
        if skipped := watching.counts[f"{name}.skipped"]:
            notify(
                f"{name} skipped {skipped} of {watching.counts[f'{name}.rows']} rows, which do not name both options"
            )


def _terms(recipe: Recipe) -> Sequence[methods.AnyRegulariser]:
    return getattr(recipe.method, "regularisers", [])


@contextlib.contextmanager
def _recorded(model: HeadModel) -> Iterator[None]:
    """Attention rows can be read inside the block, whatever the attention was before."""
    before = model.hf.config._attn_implementation
    model.record_attention(True)
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


def _fisher_task(recipe: Recipe, train: Task, term: methods.WeightDrift) -> Task:
    """The prompts that Fisher information is taken from."""
    if term.task is None:
        return train.limited(term.max_examples, recipe.seed)
    task = with_chat(load_task(term.task, recipe.task.split.seed), chat_setting(recipe.task))
    if task.split is None:
        task = take_split(task, "train", recipe.task.split.seed)
    return task.limited(term.max_examples, recipe.seed)


def _fisher(
    recipe: Recipe, model: HeadModel, train: Task, terms: Sequence[tuple[Any, Pairs]], trained: Any, notify: Notify
) -> dict[str, Tensor] | None:
    """The Fisher diagonal of the weights that are held by it, by their names without an adapter.

    It is that of the model they are held to: the one that training starts from, with its adapter off where it has one.

    Args:
        trained: what is trained: `model.hf`, or the PeftModel around it.
    """
    stiff = [(term, heads) for term, heads in terms if isinstance(term, methods.WeightDrift) and term.fisher]
    if not stiff:
        return None
    task = _fisher_task(recipe, train, stiff[0][0])
    notify(f"Fisher information on {len(task.examples)} prompts of {task.name}")
    rows = [row.plain for row in rows_of(task, model.tokenizer, 0, recipe.seed)]
    weights = {slices.weight for term, heads in stiff for slices in head_weights(model, heads, term.parts)}
    names = {name: name.replace(".base_layer", "") for name, _ in model.hf.named_parameters()}
    with trained.disable_adapter() if isinstance(trained, PeftModel) else contextlib.nullcontext():
        fisher = fisher_diagonal(model.hf, rows, [name for name, plain in names.items() if plain in weights])
    return {names[name]: value for name, value in fisher.items()}
