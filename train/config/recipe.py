"""The typed recipe: strict at every level, so that a typo is an error and not a default.

    recipe: lofit            which family; decides what `method` may hold
    model, heads, task, method, training, evaluation, tracking, name, output_dir, seed

`training` takes the keys of TRL's `SFTConfig` (`DPOConfig` where the objective is dpo), checked against the real
dataclass. `key.sub=value` overrides any key; the value is YAML and giving a block replaces the block.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from headtune import plugins
from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.paths import check_file_name
from headtune.analysis.utils.secrets import require_no_secrets

from . import validation
from .errors import Problem, Source, given_twice
from .method_registry import MethodRules, method_rules, tuning_method_names
from .methods import FullConfig, HeadsConfig
from .objective_registry import objective_rules, trl_config_of
from .schema import Recipe


def parse(data: Any, source_name: str = "recipe") -> Recipe:
    """Check a recipe and fill in name and output folder.

    Raises:
        RecipeError: what is wrong: unknown keys (with the nearest known one), wrong types, values out of range,
            contradictions.
        InputError: a secret.
    """
    return _parsed(data, Source(source_name))


def _parsed(data: Any, source: Source) -> Recipe:
    if not isinstance(data, dict):
        raise InputError(f"{source.name}: a recipe is a mapping of keys, found {type(data).__name__}")
    require_no_secrets(data, source.name)  # first of all: what else is refused is refused by its value
    recipe, problems = _check(data)
    if recipe is None or problems or any(given_twice(source.root)):
        raise source.refuse([*problems, *given_twice(source.root)])
    recipe = recipe.model_copy(update={"plugins": _plugins_of(recipe)})
    digest = hashlib.sha256(json.dumps(recipe.dump(), sort_keys=True).encode()).hexdigest()[:6]
    name = recipe.name or f"{recipe.recipe}-{_heads_label(recipe.heads)}-s{recipe.seed}-{digest}"
    check_file_name(name, f"{source.name}: name")
    return recipe.model_copy(update={"name": name, "output_dir": recipe.output_dir or f"runs/{name}"})


def _check(data: dict[Any, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, and all that is wrong with it. What depends on a part that is wrong itself is left out."""
    family, problems = data.get("recipe"), []
    rules: MethodRules | None = None
    if missing := _not_loaded(data.get("plugins")):
        fix = f"if you trust it, give --plugin {missing[0]} (in Python: import it before the recipe is read)"
        message = f"plugins names {missing[0]!r}, and a recipe does not load code by itself; {fix}"
        problems.append(Problem(("plugins",), message))
    elif isinstance(family, str) and family in tuning_method_names():
        rules = method_rules(family)
    else:
        names = tuning_method_names()
        hint = nearest(str(family), names) if family else "known: " + ", ".join(names)
        problems.append(Problem(("recipe",), f"recipe {family!r} is unknown; {hint}"))
    # Checked by itself, so that errors name method.x and not the recipe.
    settings: Any = {} if data.get("method") is None else data["method"]
    method: Any = None
    if rules is not None:
        kind = settings.get("kind") if rules.kinds and isinstance(settings, dict) else None
        if kind is not None and kind not in rules.kinds:
            message = f"method.kind {kind!r} is unknown; {nearest(str(kind), rules.kinds)}"
            problems.append(Problem(("method", "kind"), message))
        else:
            block = rules.config if kind is None else rules.kinds[kind]
            try:
                method = block.model_validate(settings)
            except ValidationError as error:
                problems += validation.of_block(error, block, ("method",))
    recipe = None
    try:
        stand_in = {} if method else {"recipe": "full"}
        recipe = Recipe.model_validate({**data, "method": method or FullConfig(), **stand_in})
    except ValidationError as error:
        problems += validation.of_block(error, Recipe)
    training = data.get("training")
    if isinstance(training, dict) and training and rules is not None and not rules.trains:
        message = f"training.{next(iter(training))}: recipe {family} trains nothing; remove training"
        problems.append(Problem(("training",), message))
    elif isinstance(training, dict) and rules is not None:
        objective = settings.get("objective") if isinstance(settings, dict) else None
        problems += validation.of_training(training, trl_config_of(objective))
    if recipe is not None and method is not None:
        problems += validation.contradictions(recipe)
    return recipe, problems


def _not_loaded(names: Any) -> list[str]:
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return plugins.not_loaded(listed)


def _plugins_of(recipe: Recipe) -> list[str]:
    """The modules outside of headtune that a recipe needs: those it names, and those of what it uses."""
    method: Any = recipe.method
    used: list[Any] = [method_rules(recipe.recipe), *(type(term) for term in getattr(method, "regularisers", []))]
    if getattr(method, "objective", None) not in (None, *plugins.OBJECTIVES):
        used.append(objective_rules(method.objective))
    return list(dict.fromkeys([*recipe.plugins, *filter(None, map(plugins.module_of, used))]))


def _heads_label(heads: HeadsConfig | None) -> str:
    if heads is None:
        return "none"
    if heads.every:
        return "all"
    if heads.pairs:
        return f"list{len(heads.pairs)}"
    if heads.learnt:
        return f"{heads.first_stage}{heads.top}"
    kind = "random-" if heads.random else f"{heads.control.kind}-" if heads.control else ""
    return f"{kind}{heads.role}{heads.top}"


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
    raise InputError(f"recipe {name!r} is neither a file nor built in; {_nearest_recipes(path)}")


def _nearest_recipes(path: Path) -> str:
    """The built-in recipes and the files beside `path` with the nearest names, by whole name or by its last part."""
    folder = [str(file) for ending in ("yaml", "yml") for file in path.parent.glob(f"*.{ending}")]
    by_word = {name.removesuffix(".yaml").removesuffix(".yml"): name for name in [*recipe_names(), *sorted(folder)]}
    word = str(path).removesuffix(".yaml").removesuffix(".yml")
    parts = sorted({name.rpartition("/")[2] for name in by_word})
    close = difflib.get_close_matches(word, sorted(by_word), n=3, cutoff=0.6)
    for part in difflib.get_close_matches(path.stem, parts, n=3, cutoff=0.6):
        close += [name for name in sorted(by_word) if name.rpartition("/")[2] == part and name not in close]
    close = close or [name for name in recipe_names() if name.startswith(f"{word}/")]
    if not close:
        return "headtune recipes lists those built in"
    return f"did you mean {' or '.join(repr(by_word[name]) for name in close[:3])}?"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides, check it.

    Raises:
        InputError: no such recipe, malformed YAML, a bad override, or anything `parse` refuses; with line and column.
    """
    text = read_source(name)
    try:
        data, root = read_yaml(text), yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InputError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if isinstance(data, dict):
        require_whole(overrides)
        for override in overrides:
            data = _apply(data, override)
    keys = [tuple(override.partition("=")[0].split(".")) for override in overrides]
    return _parsed(data, Source(name, root, keys))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; everybody who writes a learning rate means the number."""


_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """YAML with the safe loader, numbers such as `1e-3` included (yaml.YAMLError where it is none)."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def is_key(word: str) -> bool:
    """Whether a word reads as the key of an override: `training.max_steps`."""
    return re.fullmatch(r"\w+(\.\w+)*", word) is not None and word.split(".")[0] in Recipe.model_fields


def require_whole(overrides: Sequence[str]) -> None:
    """Refuse overrides that the shell took apart at their spaces. Values are not shown: they may be secrets.

    Raises:
        InputError: a word that is no override follows another.
    """
    for index, word in enumerate(overrides):
        key, equals, _ = word.partition("=")
        rest = list(itertools.takewhile(lambda part: "=" not in part and not is_key(part), overrides[index + 1 :]))
        if not rest:
            continue
        if equals:
            fix = f"quote the whole value where it holds spaces: {key}='...'"
            raise InputError(f"override {key}=... ends at a space, and what follows is no override; {fix}")
        if is_key(word):
            value = rest[0] if re.fullmatch(r"[-+.\deE]+|true|false", rest[0]) else "VALUE"
            raise InputError(f"override {word!r} must read key=value; did you mean {word}={value}?")


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
