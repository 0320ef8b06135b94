"""Small recipes on a tiny model folder, and the command line called in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from headtune.analysis.heads.head_set import HeadSet, RankedHead
from headtune.analysis.synthetic.planted import plant
from headtune.analysis.synthetic.planting import Planting
from headtune.analysis.tasks.task import Example, to_jsonl
from headtune.analysis.utils.files import write_text
from headtune.cli.main import main
from helpers.tiny import FACTS, tiny_task

STEPS = 4


def write_task(folder: Path, subjects: int = 8) -> Path:
    """The tiny task as JSONL."""
    path = folder / "cities.jsonl"
    write_text(path, to_jsonl(tiny_task(subjects=subjects).examples))
    return path


def save_planted(folder: Path, examples: int = 24) -> tuple[Path, dict[str, str]]:
    """A model that has recall and suppression heads (a random one has none), as a folder, and its task for a recipe."""
    planted = plant(Planting("gqa"))
    planted.model.save_pretrained(folder)
    planted.tokenizer.save_pretrained(folder)
    write_text(folder / "task.jsonl", to_jsonl(planted.task.limited(examples).examples))
    return folder, {"train": str(folder / "task.jsonl")}


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """A recipe of seconds in `folder`, whose run goes to `folder/run`; `changes` replace its blocks."""
    recipe = {
        "recipe": "lofit",
        "model": {"name": str(model)},
        "heads": {"list": [[0, 1], [2, 0], [2, 3]]},
        "task": {"train": str(write_task(folder))},
        "method": {"answer_set": {"own_lists": 0.0}},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
        },
        "evaluation": {"n_items": 1},
        "tracking": {"wandb": "disabled"},
        "output_dir": str(folder / "run"),
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}), encoding="utf-8"
    )
    return path


def train(recipe: Path, *words: str) -> int:
    """`headtune train RECIPE ...`, its exit code."""
    return main(["train", str(recipe), *words])


def head_set(identity: dict[str, Any], **changes: Any) -> HeadSet:
    """A head set of a model with two recall heads and one suppression head."""

    def ranked(*pairs: tuple[int, int]) -> tuple[RankedHead, ...]:
        return tuple(RankedHead(layer, head, 1.0 - 0.1 * i, (0.5, 1.5)) for i, (layer, head) in enumerate(pairs))

    return HeadSet(
        model=identity | changes,
        task={"name": "cities", "sha256": "0" * 64, "n_examples": 16, "n_dropped": 0, "dropped": {}},
        method={"name": "dla", "parameters": {}, "seed": 0},
        roles={"recall": ranked((0, 0), (1, 2)), "suppression": ranked((2, 1))},
        stability={"recall": 1.0, "suppression": 1.0, "bootstrap": 0},
    )


DISTIL = {"layers": 2, "heads": 3, "queries": 4, "attention_weight": 10.0}
SENTENCES = ("Some city in {}:", "List cities in {}. 1.", "Here is a city I know in {}:")


def write_sequence(folder: Path) -> list[dict[str, str]]:
    """Three tasks of eight answers each, measured on what is trained on: some is learnt, and some forgotten."""
    steps = []
    for index, sentence in enumerate(SENTENCES):
        examples = [Example(sentence.format(name), name, (cities[index],)) for name, cities in FACTS.items()]
        for part in ("train", "test"):
            write_text(folder / f"{part}{index}.jsonl", to_jsonl(examples))
        names = {part: str(folder / f"{part}{index}.jsonl") for part in ("train", "test")}
        steps.append({"train": names["train"], "eval": names["test"], "name": f"cities{index}"})
    return steps


def write_sequence_recipe(folder: Path, model: Path, method: dict[str, Any], **changes: Any) -> Path:
    """Recipe seekr on `write_sequence` in `folder`; see `write_recipe`."""
    settings = {
        "recipe": "seekr",
        "heads": None,
        "task": {"sequence": write_sequence(folder), "kind": "exact_match", "split": {"by": "file"}},
        "method": {"replay": {"count": 2}, "distil": dict(DISTIL), **method},
        "training": {
            "max_steps": 20,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
        },
    }
    return write_recipe(folder, model, **(settings | changes))
