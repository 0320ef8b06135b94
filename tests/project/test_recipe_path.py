"""The recipe goes down through the rooms: whoever carries out a run does not hand it back and forth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import headtune
from headtune.train.config.recipe import load_recipe
from headtune.train.config.schema import Recipe
from headtune.train.runs.run import run_recipe
from helpers.small_runs import write_recipe

PACKAGE = Path(headtune.__file__).parent
CALLS = 200


def rooms_that_receive(work: Callable[[], Any]) -> list[str]:
    """The rooms of the functions called by `work` that receive a Recipe or the run's context, in order of the calls."""
    rooms: list[str] = []

    def watch(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [frame.f_locals.get(name) for name in names if name != "self"]
        if any(isinstance(value, Recipe) or type(value).__name__ == "RunContext" for value in values):
            rooms.append(str(Path(code.co_filename).relative_to(PACKAGE).parent))

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return rooms


def returns(rooms: list[str]) -> int:
    """How often a room is entered again after it was left."""
    changes = [room for index, room in enumerate(rooms) if index == 0 or room != rooms[index - 1]]
    return len(changes) - len(set(changes))


def test_a_room_that_the_recipe_has_left_is_not_entered_again(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path, tiny_llama)))
    rooms = rooms_that_receive(lambda: run_recipe(recipe))[:CALLS]
    assert "train/trainer" in rooms
    assert returns(rooms) <= 6, rooms
