"""The training and the evaluation task that a recipe names."""

from __future__ import annotations

import dataclasses

from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Task, split_subjects, take_split
from headtune.analysis.utils.errors import InputError

from .methods import TaskConfig


def tasks_of(block: TaskConfig) -> tuple[Task, Task]:
    """The training and the evaluation task of a recipe; one task is split by subject.

    Raises:
        InputError: no such task, or subjects shared by the two.
    """
    train, evaluation = load_task(block.train, block.split.seed), load_task(block.eval or block.train, block.split.seed)
    if block.kind is not None:
        train, evaluation = (dataclasses.replace(task, kind=block.kind) for task in (train, evaluation))
    if block.split.by == "file" and block.eval is None:
        raise InputError("task.split.by=file takes train and eval as they are, and task.eval is missing; name its file")
    if (block.eval or block.train) == block.train and train.split is None:
        train, evaluation = (take_split(train, part, block.split.seed) for part in ("train", "test"))
    shared = sorted(set(train.subjects) & set(evaluation.subjects))
    if shared and block.split.by == "subject":
        if (block.eval or block.train) == block.train:
            raise InputError(_not_held_out(block, train))
        raise InputError(
            f"tasks {train.name!r} and {evaluation.name!r} share {len(shared)} subjects (such as {shared[0]!r}); "
            "name one task to have it split by subject, give a task.eval with other subjects, or set task.split.by=file"
        )
    # One seed for every run: the same examples are compared, whatever the recipe's own seed.
    return train, evaluation.limited(block.max_eval_examples, seed=0)


def _not_held_out(block: TaskConfig, train: Task) -> str:
    """What is wrong where task.eval is task.train, and this names one part of a task."""
    why = f"task.train {block.train!r} is one part of a task, and task.eval is the same"
    why += " (it is task.train where it is not given)" if block.eval is None else ""
    whole, _, part = block.train.rpartition(":")
    if part != train.split or not whole:
        return f"{why}: nothing is held out; give a task.eval with other subjects"
    other = "test" if part != "test" else "train"
    fix = f"give task.train={whole}, which is split by subject, or task.eval={whole}:{other}"
    return f"{why}: nothing is held out; {fix}"


def validation_of(block: TaskConfig, train: Task, evaluation: Task) -> Task:
    """What evaluation during training measures: a task of its own, or the part set aside; never what is held out.

    Of one task that is split by subject, and of `NAME:train`, it is the validation part.

    Args:
        train, evaluation: those of `tasks_of`.

    Raises:
        InputError: there is no such part, or it shares subjects or prompts with the others.
    """
    whole, _, part = block.train.rpartition(":")
    if block.validation is not None:
        task = load_task(block.validation, block.split.seed)
    elif (block.eval or block.train) == block.train:
        task = take_split(load_task(block.train, block.split.seed), "validation", block.split.seed)
    elif whole and part == train.split == "train":
        task = load_task(f"{whole}:validation", block.split.seed)
    else:
        raise InputError(
            f"training.eval_strategy needs rows to evaluate on, and task.train {block.train!r} has no validation part "
            "beside task.eval; name them: task.validation=..., or set eval_strategy=no"
        )
    task = dataclasses.replace(task, kind=train.kind, chat_template=train.chat_template)
    prompts = {example.prompt for example in task.examples}
    for name, other in (("task.train", train), ("task.eval", evaluation)):
        shared = sorted(set(task.subjects) & set(other.subjects)) if block.split.by == "subject" else []
        shared = shared or ([] if name == "task.train" else [e.prompt for e in other.examples if e.prompt in prompts])
        if shared:
            raise InputError(
                f"validation rows of {task.name!r} share {len(shared)} subjects or prompts with {name} {other.name!r} "
                f"(such as {shared[0]!r}); name others: task.validation=..."
            )
    return task.limited(block.max_eval_examples, seed=0)


def in_words(block: TaskConfig, train: Task, evaluation: Task, validated: bool = False) -> str:
    """Where the two tasks of `tasks_of` are from: one task's parts, with the part that is in neither, or two tasks.

    Args:
        validated: that part is evaluated during training.
    """
    if (block.eval or block.train) != block.train or load_task(block.train, block.split.seed).split is not None:
        return f"{train.name} and {evaluation.name} as they are"
    aside = split_subjects(load_task(block.train).subjects, block.split.seed)["validation"]
    use = "evaluated during training" if validated and block.validation is None else "in neither"
    return (
        f"{block.train} split by subject (seed {block.split.seed}): {train.name} is learnt, "
        f"{evaluation.name} held out, validation ({len(aside)} subject{'s' * (len(aside) != 1)}) {use}"
    )
