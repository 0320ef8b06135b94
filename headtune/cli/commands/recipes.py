"""`headtune recipes`: list, show and check recipes; `headtune validate` is its check under a shorter name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..arguments import Add, adder, completed, plugin_arguments, print_json

ACTION = "list, show, validate or schema (default: list)"


def add_parsers(add: Add) -> None:
    p = add("recipes", "list, show and check recipes", "recipes", "recipes show lofit/one_to_many")
    p.set_defaults(do=_list)
    actions = adder(p.add_subparsers(dest="action", metavar="ACTION", help=ACTION), "headtune recipes")
    actions("list", "list the recipes that come with headtune", "list").set_defaults(do=_list)
    q = actions("show", "print a recipe", "show lofit/one_to_many > my_recipe.yaml")
    completed(q.add_argument("name", help="path, or name without the ending"), "recipe")
    q.set_defaults(do=_show)
    _validate_arguments(actions("validate", "check recipes, and say all that is wrong", "validate my_recipe.yaml"))
    q = actions("schema", "print the JSON schema of recipes", "schema > recipe.schema.json")
    q.set_defaults(do=_schema)

    _validate_arguments(
        add(
            "validate",
            "check recipes, and say all that is wrong, by line",
            "validate my_recipe.yaml",
            "validate lofit/one_to_many training.max_steps=20",
        )
    )


def _validate_arguments(p: argparse.ArgumentParser) -> None:
    files = p.add_argument("files", nargs="+", metavar="FILE", help="paths or names; key.sub=value overrides in all")
    completed(files, "recipe")
    plugin_arguments(p)
    p.set_defaults(do=_validate)


def _list(arguments: argparse.Namespace) -> int:
    from headtune.train.config.recipe import recipe_names

    if arguments.json:
        print_json(recipe_names())
    else:
        print("\n".join(recipe_names()))
    return 0


def _schema(_arguments: argparse.Namespace) -> int:
    from headtune.train.config.schema import Recipe

    print_json(Recipe.model_json_schema())
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from headtune.train.config.recipe import read_source

    print(read_source(arguments.name), end="")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.errors import InputError
    from headtune.analysis.utils.secrets import redact
    from headtune.train.config.errors import RecipeError
    from headtune.train.config.recipe import load_recipe, require_whole

    files, overrides = _files_and_overrides(arguments.files)
    if not files:
        raise InputError(
            f"headtune validate needs a recipe, found overrides alone: {overrides[0].partition('=')[0]}=..."
        )
    require_whole(overrides)
    issues: dict[str, list[str]] = {}
    for name in files:
        try:
            loaded = load_recipe(name, overrides)
        except InputError as error:
            issues[name] = error.lines if isinstance(error, RecipeError) else [str(error)]
            for line in () if arguments.json else issues[name]:
                print(redact(line), file=sys.stderr)
        else:
            issues[name] = []
            if not arguments.json:
                print(f"{name}: valid ({loaded.recipe}, {loaded.name}); paths are checked by train --dry-run")
    if arguments.json:
        print_json({name: [redact(line) for line in lines] for name, lines in issues.items()})
    return InputError.exit_code if any(issues.values()) else 0


def _files_and_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Recipes, and overrides with what a shell cut off them at their spaces."""
    from headtune.train.config.recipe import is_key, recipe_names

    files: list[str] = []
    overrides: list[str] = []
    after = False  # an override
    for word in words:
        is_recipe = Path(word).is_file() or word in recipe_names()
        cut_off = after and not word.endswith((".yaml", ".yml"))
        after = not is_recipe and ("=" in word or cut_off or is_key(word))
        (overrides if after else files).append(word)
    return files, overrides
