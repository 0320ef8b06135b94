"""The training and the evaluation task that a recipe names."""

from __future__ import annotations

import dataclasses

from headtune.analysis.tasks.chat import with_chat
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.messages import ChatTemplate, chat_in_words
from headtune.analysis.tasks.task import Task, split_subjects, take_split
from headtune.analysis.utils.errors import InputError

from .methods import TaskConfig


def tasks_of(block: TaskConfig) -> tuple[Task, Task]:
    """The training and the evaluation task of a recipe; one task is split by subject.

    Raises:
        InputError: no such task, subjects shared by the two, or only one of them of conversations.
    """
    train, evaluation = load_task(block.train, block.split.seed), load_task(block.eval or block.train, block.split.seed)
    if block.kind is not None:
        train, evaluation = (dataclasses.replace(task, kind=block.kind) for task in (train, evaluation))
    train, evaluation = (with_chat(task, chat_setting(block)) for task in (train, evaluation))
    if train.chat_template != evaluation.chat_template:
        raise InputError(
            f"task {train.name!r} gives {chat_in_words(train.chat_template)} and task {evaluation.name!r} "
            f"{chat_in_words(evaluation.chat_template)}; set task.chat_template=true"
        )
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


def chat_setting(block: TaskConfig) -> bool | ChatTemplate | None:
    """How a recipe's prompts are given; None where it leaves that to its tasks."""
    return None if block.chat_template is None else block.chat_template.setting


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


def in_words(block: TaskConfig, train: Task, evaluation: Task) -> str:
    """Where the two tasks of `tasks_of` are from: one task's parts, with the part that is in neither, or two tasks."""
    chats = f", as {chat_in_words(train.chat_template)}" if train.chat_template else ""
    if (block.eval or block.train) != block.train or load_task(block.train, block.split.seed).split is not None:
        return f"{train.name} and {evaluation.name} as they are{chats}"
    aside = split_subjects(load_task(block.train).subjects, block.split.seed)["validation"]
    return (
        f"{block.train} split by subject (seed {block.split.seed}): {train.name} is learnt, "
        f"{evaluation.name} held out, validation ({len(aside)} subject{'s' * (len(aside) != 1)}) in neither{chats}"
    )
