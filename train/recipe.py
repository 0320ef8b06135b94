"""The typed recipe: strict at every level, so that a typo is an error and not a default.

    recipe: lofit            which family; decides what `method` may hold
    model, heads, task, method, training, evaluation, tracking, name, output_dir, seed

`training` takes the keys of TRL's `SFTConfig` (`DPOConfig` where the objective is dpo), checked against the real
dataclass. `key.sub=value` overrides any key; the value is YAML and giving a block replaces the block.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import hashlib
import importlib.resources
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..analysis.errors import InputError, nearest
from ..analysis.inside import require_plain_name
from ..analysis.redaction import require_no_secrets
from . import blocks
from .blocks import (
    METHODS,
    STEERING,
    WITHOUT_HEADS,
    Block,
    EvaluationBlock,
    HeadsBlock,
    ModelBlock,
    SeekrMethod,
    SteerMethod,
    TaskBlock,
    TrackingBlock,
    TrainedMethod,
)

# What a run sets itself; saying it in `training` as well could only contradict.
_OWN_TRAINING_KEYS = {
    "output_dir": "output_dir",
    "seed": "seed",
    "run_name": "name",
    "report_to": "tracking",
    "remove_unused_columns": None,
    "max_length": None,
    "eval_strategy": "evaluation",
    "eval_on_start": "evaluation",
    "resume_from_checkpoint": "--resume",
}


# Which strategies of recipe seekr read a key. A recipe may hold others, so that one file serves all strategies; the
# resolved recipe of a run holds what it read.
_READ_BY = {
    "distil": ("seekr", "der", "lwf"),
    "replay": ("seekr", "replay", "der"),
    "der_weight": ("der",),
    "ewc_weight": ("ewc",),
    "ewc_rows": ("ewc",),
    "lwf_weight": ("lwf",),
}


_CHOOSING = ("choice", "heads", "layers", "selection")  # of method.distil, where the recipe names no heads


def _unread(method: SeekrMethod) -> list[str]:
    return sorted(key for key, strategies in _READ_BY.items() if method.strategy not in strategies)


class Recipe(Block):
    """A whole recipe. `method` is the block of the family named by `recipe`."""

    recipe: Literal["lofit", "jola", "masked", "steer", "lora", "full", "ln", "regularise", "seekr"]
    model: ModelBlock = ModelBlock()
    heads: HeadsBlock | None = None
    task: TaskBlock = TaskBlock()
    method: TrainedMethod | SteerMethod | SeekrMethod
    training: dict[str, Any] = Field(default_factory=dict)
    evaluation: EvaluationBlock = EvaluationBlock()
    tracking: TrackingBlock = TrackingBlock()
    name: str = ""
    output_dir: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what numpy takes

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def dump(self) -> dict[str, Any]:
        """As written to the run: every default spelt out."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if self.task.sequence is not None:
            del data["task"]["train"]  # the sequence stands in its place
        if isinstance(self.method, SeekrMethod):
            for key in _unread(self.method):
                data["method"].pop(key)
            if self.heads is not None and "distil" in data["method"]:
                for key in _CHOOSING:
                    data["method"]["distil"].pop(key, None)
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)


def parse(data: Any, where: str = "recipe") -> Recipe:
    """Check a recipe and fill in name and output folder.

    Raises:
        InputError: the first thing that is wrong: a secret, an unknown key (with the nearest known one), a wrong type,
            a value out of range.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where}: a recipe is a mapping of keys, found {type(data).__name__}")
    require_no_secrets(data, where)  # first of all: what else is refused is refused by its value
    family = data.get("recipe")
    if not isinstance(family, str) or family not in METHODS:
        hint = nearest(str(family), METHODS) if family else "known: " + ", ".join(METHODS)
        raise InputError(f"{where}: recipe {family!r} is unknown; {hint}")
    # Checked on its own, so that errors name method.x and not one alternative of a union.
    settings = {} if data.get("method") is None else data["method"]
    method = _check(_method_block(family, settings, where), settings, where, "method.")
    recipe: Recipe = _check(Recipe, {**data, "method": method}, where)
    _check_method(recipe, where)
    if isinstance(method, blocks.ObjectiveBlock):
        _check_training(recipe.training, where, "DPOConfig" if method.objective == "dpo" else "SFTConfig")
    elif isinstance(method, SeekrMethod):
        _check_training(recipe.training, where, "SFTConfig")
    elif recipe.training:
        raise InputError(
            f"{where}: training.{next(iter(recipe.training))}: recipe steer trains nothing; remove training"
        )
    digest = hashlib.sha256(json.dumps(recipe.dump(), sort_keys=True).encode()).hexdigest()[:6]
    name = recipe.name or f"{family}-{_heads_label(recipe.heads)}-s{recipe.seed}-{digest}"
    require_plain_name(name, f"{where}: name")
    return recipe.model_copy(update={"name": name, "output_dir": recipe.output_dir or f"runs/{name}"})


def _method_block(family: str, settings: Any, where: str) -> type[Block]:
    if family != "steer" or not isinstance(settings, dict) or "kind" not in settings:
        return METHODS[family]
    kind = settings["kind"]
    if kind not in STEERING:
        raise InputError(f"{where}: method.kind {kind!r} is unknown; {nearest(str(kind), STEERING)}")
    return STEERING[kind]


def _check_method(recipe: Recipe, where: str) -> None:
    """Refuse a method without the heads that it needs, and settings that contradict each other."""
    method, heads = recipe.method, recipe.heads
    if (recipe.task.sequence is None) == isinstance(method, SeekrMethod):
        raise InputError(
            f"{where}: task.sequence "
            + (
                "is missing; list the tasks in the order they are learnt"
                if isinstance(method, SeekrMethod)
                else f"is for recipe seekr, found recipe {recipe.recipe!r}; give task.train"
            )
        )
    if recipe.evaluation.general and not isinstance(method, SeekrMethod):
        raise InputError(f"{where}: evaluation.general is for recipe seekr, found recipe {recipe.recipe!r}; remove it")
    if isinstance(method, blocks.RegulariseMethod) and not method.regularisers:
        raise InputError(f"{where}: method.regularisers is empty; give at least one, such as {{kind: attention_kl}}")
    if isinstance(method, SeekrMethod):
        if heads is not None and method.strategy != "seekr" and not method.regularisers:
            raise InputError(f"{where}: heads are of no use to method.strategy {method.strategy!r}; remove heads")
        if method.strategy == "der" and method.distil.logits_top is not None:
            raise InputError(f"{where}: method.distil.logits_top keeps too little for strategy der; remove it")
        if method.strategy == "der" and method.distil.teacher == "latest":
            raise InputError(f"{where}: method.distil.teacher=latest is for strategy seekr; remove it")
        if heads is not None and heads.learnt:
            raise InputError(f"{where}: heads.lofit and heads.probe choose on one task; name a head set (heads.from)")
    for index, term in enumerate(getattr(method, "regularisers", [])):
        if term.heads is None and heads is None:
            raise InputError(f"{where}: method.regularisers.{index} has no heads, and the recipe names none")
        if term.heads is not None and (term.heads.learnt or term.heads.identify):
            raise InputError(
                f"{where}: method.regularisers.{index}.heads must be there before; use from, random, all or list"
            )
        if isinstance(term, blocks.PruneGates) and recipe.recipe != "regularise":
            raise InputError(f"{where}: method.regularisers.{index}: kind prune is for recipe regularise")
    finds_its_own = isinstance(method, blocks.SinkMethod | blocks.InterceptMethod)
    if heads is None and not finds_its_own and recipe.recipe not in WITHOUT_HEADS:
        raise InputError(f"{where}: heads is missing; give from, identify, lofit, probe, random, all or list")
    if heads is not None and finds_its_own:
        raise InputError(f"{where}: method.kind {method.kind!r} finds its own heads; remove heads")  # type: ignore[union-attr]
    if heads is not None and heads.lofit is not None and recipe.recipe == "steer":
        raise InputError(
            f"{where}: heads.lofit needs an objective to train with, recipe steer has none; use heads.probe"
        )
    given = heads is None or not (heads.learnt or heads.identify)
    if isinstance(method, blocks.LofitMethod) and method.select_only and given:
        raise InputError(
            f"{where}: method.select_only stops after choosing heads, and none are chosen; use heads.lofit, probe "
            "or identify"
        )
    whole = isinstance(method, blocks.FullMethod) or (
        isinstance(method, blocks.RegulariseMethod | SeekrMethod) and method.tune == "full"
    )
    if whole and recipe.model.dtype != "float32":
        raise InputError(
            f"{where}: model.dtype {recipe.model.dtype!r} would round most steps of full fine-tuning away; set it to "
            "float32, and training.bf16=true to compute in bfloat16"
        )
    if whole and getattr(method, "objective", None) == "answer_set" and method.answer_set.retention:  # type: ignore[union-attr]
        raise InputError(
            f"{where}: method.answer_set.retention compares with the model without its adapter, and full fine-tuning "
            "has none; set it to 0"
        )


def _heads_label(heads: HeadsBlock | None) -> str:
    if heads is None:
        return "none"
    if heads.every:
        return "all"
    if heads.pairs:
        return f"list{len(heads.pairs)}"
    if heads.learnt:
        return f"{'lofit' if heads.lofit else 'probe'}{heads.top}"
    return ("random-" if heads.random else "") + f"{heads.role}{heads.top}"


def _check(kind: type[Any], data: Any, where: str, prefix: str = "") -> Any:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {_one_line(error, kind, prefix)}") from None


def _one_line(error: ValidationError, kind: type[BaseModel], prefix: str) -> str:
    # Unknown keys first: a misspelt key is usually why another seems to be missing.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    path = prefix + ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(kind, problem["loc"][:-1])
        return f"unknown key {path!r}; {nearest(str(problem['loc'][-1]), known)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = problem["input"]
    shown = "" if isinstance(value, dict | list) and len(str(value)) > 80 else f", found {value!r}"
    return f"{path.rstrip('.') or 'recipe'}: {message}{shown}"


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
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for inner in typing.get_args(annotation) for block in _blocks_in(inner)]


def _check_training(values: Mapping[str, Any], where: str, config: str) -> None:
    """Check `training` against TRL's config class: names and types (an int passes for a float)."""
    import trl

    kind = getattr(trl, config)
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key in _OWN_TRAINING_KEYS:
            use = _OWN_TRAINING_KEYS[key]
            raise InputError(f"{where}: training.{key} is set by the run; {f'use {use}' if use else 'remove it'}")
        if key not in fields:
            raise InputError(f"{where}: unknown key 'training.{key}'; {_nearest_few(key, fields, config)}")
        choices = _enum_values(hints[key])
        if isinstance(value, str) and choices:  # transformers takes its enums (schedulers, strategies) by value
            if value not in choices:
                raise InputError(f"{where}: training.{key} {value!r} is unknown; {nearest(value, choices)}")
            continue
        try:
            TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError:
            expected = str(hints[key]).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
            raise InputError(f"{where}: training.{key} must be {expected}, found {value!r}") from None


def _enum_values(hint: Any) -> list[str]:
    """What the enums among a field's types can be; empty where there is none."""
    options = [hint, *typing.get_args(hint)]
    return [str(m.value) for kind in options if isinstance(kind, type) and issubclass(kind, enum.Enum) for m in kind]


def _nearest_few(word: str, known: Iterable[str], config: str) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.4)
    return f"did you mean 'training.{close[0]}'?" if close else f"it is not a field of TRL's {config}"


# --- files and overrides ----------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """The recipes that come with headtune, by their path without the ending: `lofit/one_to_many`."""
    root = importlib.resources.files("headtune.recipes")
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.yaml')}"
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )


def read_source(name: str) -> str:
    """The text of a recipe, by path or by built-in name.

    Raises:
        InputError: there is no such recipe.
    """
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"recipe {name!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if name in recipe_names():
        return (importlib.resources.files("headtune.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    raise InputError(f"recipe {name!r} is neither a file nor built in; {nearest(name, recipe_names())}")


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides, check it.

    Raises:
        InputError: no such recipe, malformed YAML (with its line), a bad override, or anything `parse` refuses.
    """
    try:
        data = read_yaml(read_source(name))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise InputError(f"{name}: not YAML{line}: {getattr(error, 'problem', None) or error}") from None
    if isinstance(data, dict):
        for override in overrides:
            data = _apply(data, override)
    return parse(data, name)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; everybody who writes a learning rate means the number."""


_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """YAML with the safe loader, numbers such as `1e-3` included (yaml.YAMLError where it is none)."""
    return yaml.load(text, _Loader)


def _apply(data: dict[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise InputError(f"override {override!r} must read key=value, such as training.max_steps=3")
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        raise InputError(f"override {path}=...: the value is not YAML; put it in quotes") from None
    data = dict(data)
    current = data
    for depth, key in enumerate(keys[:-1]):
        inner = current.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise InputError(f"override {path}=...: {'.'.join(keys[: depth + 1])} is a value, not a block")
        current[key] = dict(inner or {})
        current = current[key]
    current[keys[-1]] = value
    return data
