"""What is wrong with a recipe: of single keys (types, ranges, names), and of keys that contradict each other."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from headtune.analysis.utils.errors import nearest

from . import during_training, methods
from .errors import Keys, Problem
from .method_registry import MethodRules, method_rules
from .regularisers import REGULARISERS, Regulariser

if TYPE_CHECKING:
    from .schema import Recipe

# What a run sets itself; saying it in `training` as well could only contradict.
OWN_TRAINING_KEYS = {
    "output_dir": "output_dir",
    "seed": "seed",
    "run_name": "name",
    "report_to": "tracking",
    "remove_unused_columns": None,
    "max_length": None,
    "eval_on_start": "evaluation",
    "resume_from_checkpoint": "--resume",
}


# Keys of TRL that go with data or models of another kind than a run has, where they are switched on; and why.
NOT_OF_A_RUN = {
    "packing": "rows are not joined: each has its own prompt, answers and loss",
    "eval_packing": "rows are not joined: each has its own prompt, answers and loss",
    "padding_free": "the head view needs every row of a batch by itself",
    "assistant_only_loss": "the loss is on the answers already; it is for rows of `messages`, which TRL would mask",
    "chat_template_path": "a run leaves the tokenizer as it is; give the tokenizer its template and save it with the "
    "model",
}
EARLY = (during_training.PATIENCE, during_training.THRESHOLD)  # keys of `training` that TRL does not have


class _Range(NamedTuple):
    words: str
    holds: Callable[[float], bool]


_FROM_ONE = _Range("at least 1", lambda value: value >= 1)
_ABOVE_ZERO = _Range("above 0", lambda value: value > 0)
_FROM_ZERO = _Range("at least 0", lambda value: value >= 0)
_EVERY = _Range(
    "a whole number from 1 (steps) or between 0 and 1 (a share of the run)",
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
)
_BETA = _Range("at least 0 and below 1", lambda value: 0 <= value < 1)

# Numbers of `training`, of which transformers checks few, and those late. A share of the run is what it takes itself.
_RANGES = {
    "per_device_train_batch_size": _FROM_ONE,
    "per_device_eval_batch_size": _FROM_ONE,
    "gradient_accumulation_steps": _FROM_ONE,
    "max_steps": _Range("at least 1, or -1 to go by num_train_epochs", lambda value: value >= 1 or value == -1),
    "num_train_epochs": _ABOVE_ZERO,
    "learning_rate": _ABOVE_ZERO,
    "warmup_steps": _Range("at least 0 (below 1: a share of the run)", lambda value: value >= 0),
    "logging_steps": _EVERY,
    "save_steps": _EVERY,
    "eval_steps": _EVERY,
    "weight_decay": _FROM_ZERO,
    "max_grad_norm": _FROM_ZERO,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _FROM_ZERO,
    "dataloader_num_workers": _FROM_ZERO,
}


def of_block(error: ValidationError, kind: type[BaseModel], prefix: Keys = ()) -> Iterator[Problem]:
    """What pydantic finds in a block at `prefix`, in our words."""
    for problem in error.errors():
        path = (*prefix, *problem["loc"])
        name = ".".join(str(part) for part in path)
        if problem["type"] == "extra_forbidden":
            allowed = _keys_at(kind, problem["loc"][:-1])
            yield Problem(path, f"unknown key {name!r}; {nearest(str(problem['loc'][-1]), allowed)}", True)
            continue
        message = problem["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        value = problem["input"]
        shown = "" if isinstance(value, dict | list) and len(str(value)) > 80 else f", found {value!r}"
        yield Problem(path, f"{name or 'recipe'}: {message}{shown}")


def _keys_at(kind: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The keys known at a path of nested blocks; where a list takes blocks of several kinds, the path names which."""
    current = [kind]
    for part in path:
        if isinstance(part, int):
            continue
        named = [block for block in current if block.model_fields.keys() & {"kind"} and part in _kinds(block)]
        if len(current) > 1 and named:
            current = named
            continue
        fields = [f for block in current for n, f in block.model_fields.items() if part in (n, f.alias)]
        current = [inner for field in fields for inner in _blocks_in(field.annotation)]
        if not current:
            return []
    return [field.alias or name for name, field in current[0].model_fields.items()]


def _kinds(block: type[BaseModel]) -> tuple[Any, ...]:
    return typing.get_args(block.model_fields["kind"].annotation)


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    """The blocks that a field's type is made of."""
    if annotation is Regulariser:
        return list(REGULARISERS.values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for inner in typing.get_args(annotation) for block in _blocks_in(inner)]


def of_training(values: Mapping[str, Any], config: str) -> Iterator[Problem]:
    """What of `training` TRL's config class does not have or take: names, types (an int passes for a float), ranges."""
    import trl

    kind = getattr(trl, config)
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    yield from during_training.of_early_stopping(values)
    fields_of_trl, _ = during_training.split_keys(values)
    for key, value in fields_of_trl.items():
        if not isinstance(key, str):
            continue  # pydantic says so
        path = ("training", key)
        if key in OWN_TRAINING_KEYS:
            use = OWN_TRAINING_KEYS[key]
            yield Problem(path, f"training.{key} is set by the run; {f'use {use}' if use else 'remove it'}")
            continue
        if key == "push_to_hub" or key.startswith("hub_"):
            fix = "remove it, write what is to be shared with headtune export and upload that folder"
            yield Problem(path, f"training.{key}: a run sends no checkpoint anywhere; {fix}")
            continue
        if key in NOT_OF_A_RUN and (value is True or isinstance(value, str)):
            yield Problem(path, f"training.{key} does not go with a run: {NOT_OF_A_RUN[key]}; remove it")
            continue
        if key not in fields:
            yield Problem(path, f"unknown key 'training.{key}'; {_nearest_few(key, {*fields, *EARLY}, config)}", True)
            continue
        choices = _enum_values(hints[key])
        if isinstance(value, str) and choices:  # transformers takes its enums (schedulers, strategies) by value
            if value not in choices:
                yield Problem(path, f"training.{key} {value!r} is unknown; {nearest(value, choices)}")
            continue
        try:
            TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError:
            expected = str(hints[key]).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
            yield Problem(path, f"training.{key} must be {expected}, found {value!r}")
            continue
        if message := _out_of_range(key, value):
            yield Problem(path, message)


def _out_of_range(key: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    if not math.isfinite(value):
        return f"training.{key} must be a finite number, found {value!r}"
    allowed = _RANGES.get(key)
    return "" if allowed is None or allowed.holds(value) else f"training.{key} must be {allowed.words}, found {value!r}"


def _enum_values(hint: Any) -> list[str]:
    """What the enums among a field's types can be; empty where there is none."""
    options = [hint, *typing.get_args(hint)]
    return [str(m.value) for kind in options if isinstance(kind, type) and issubclass(kind, enum.Enum) for m in kind]


def _nearest_few(word: str, allowed: Iterable[str], config: str) -> str:
    close = difflib.get_close_matches(word, sorted(allowed), n=1, cutoff=0.4)
    return f"did you mean 'training.{close[0]}'?" if close else f"it is not a field of TRL's {config}"


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """A method without the heads that it needs, and settings that contradict each other."""
    method: Any = recipe.method
    rules, heads = method_rules(recipe.recipe), recipe.heads
    if not rules.learns_sequence:
        if recipe.task.sequence is not None:
            message = f"task.sequence is for recipe seekr, found recipe {recipe.recipe!r}; give task.train"
            yield Problem(("task", "sequence"), message)
        if recipe.evaluation.general:
            message = f"evaluation.general is for recipe seekr, found recipe {recipe.recipe!r}; remove it"
            yield Problem(("evaluation", "general"), message)
    yield from rules.issues(recipe)
    for index, term in enumerate(getattr(method, "regularisers", [])):
        path, name = ("method", "regularisers", index), f"method.regularisers.{index}"
        if term.heads is None and heads is None:
            yield Problem(path, f"{name} has no heads, and the recipe names none")
        if term.heads is not None and (term.heads.learnt or term.heads.identify):
            message = f"{name}.heads must be there before; use from, random, control, all or list"
            yield Problem((*path, "heads"), message)
        if isinstance(term, methods.PruneGates) and not rules.prunes:
            yield Problem((*path, "kind"), f"{name}: kind prune is for recipe regularise")
    yield from during_training.contradictions(recipe)
    yield from _of_heads(recipe, rules)
    if rules.tunes_everything(method):
        yield from _of_full_tuning(recipe)


def _of_heads(recipe: Recipe, rules: MethodRules) -> Iterator[Problem]:
    method, heads = recipe.method, recipe.heads
    if heads is None and rules.needs_heads(method):
        sources = "from, identify, lofit, probe, in_context, random, control, all or list"
        yield Problem(("heads",), f"heads is missing; give {sources}")
    if heads is not None and not rules.takes_heads(method):
        yield Problem(("heads",), f"method.kind {method.kind!r} finds its own heads; remove heads")
    if heads is not None and heads.lofit is not None and not rules.trains:
        message = f"heads.lofit needs an objective to train with, recipe {recipe.recipe} has none; use heads.probe"
        yield Problem(("heads", "lofit"), message)


def _of_full_tuning(recipe: Recipe) -> Iterator[Problem]:
    method: Any = recipe.method
    if recipe.model.dtype != "float32":
        message = (
            f"model.dtype {recipe.model.dtype!r} would round most steps of full fine-tuning away; set it to float32, "
            "and training.bf16=true to compute in bfloat16"
        )
        yield Problem(("model", "dtype"), message)
    if getattr(method, "objective", None) == "answer_set" and method.answer_set.retention:
        message = (
            "method.answer_set.retention compares with the model without its adapter, and full fine-tuning has none; "
            "set it to 0"
        )
        yield Problem(("method", "answer_set", "retention"), message)
