"""The training and the evaluation task that a recipe names."""

from __future__ import annotations

import dataclasses
import math

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
    train, evaluation = _loaded(block, block.train), _loaded(block, block.eval or block.train)
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
    if block.mix is not None:
        train = _in_shares(block, train)
    # One seed for every run: the same examples are compared, whatever the recipe's own seed.
    return train, evaluation.limited(block.max_eval_examples, seed=0)


def chat_setting(block: TaskConfig) -> bool | ChatTemplate | None:
    """How a recipe's prompts are given; None where it leaves that to its tasks."""
    return None if block.chat_template is None else block.chat_template.setting


def _loaded(block: TaskConfig, name: str) -> Task:
    """A task that the block names; `block.train` is the whole mixture, where there is one."""
    if block.mix is None or name != block.train:
        return load_task(name, block.split.seed, block.columns)
    parts = _parts_of(block)
    first = parts[0]
    for part, config in zip(parts, block.mix, strict=True):
        if part.split is not None:
            raise InputError(f"task.mix names {config.name!r}, a part of a task; name the whole: the mixture is split")
        if block.kind is None and part.kind != first.kind:
            raise InputError(
                f"task.mix: {first.name!r} is scored as {first.kind} and {part.name!r} as {part.kind}; set task.kind"
            )
        if part.chat_template != first.chat_template:
            raise InputError(f"task.mix: of {first.name!r} and {part.name!r} one is of chats; mix tasks of one form")
    if len({part.name for part in parts}) < len(parts):
        raise InputError(f"task.mix names a task twice in {block.train}; give each once, with a weight")
    examples = tuple(example for part in parts for example in part.examples)
    return dataclasses.replace(first, name="+".join(part.name for part in parts), examples=examples, about={})


def _parts_of(block: TaskConfig) -> list[Task]:
    return [load_task(part.name, block.split.seed, block.columns) for part in block.mix or []]


def _in_shares(block: TaskConfig, train: Task) -> Task:
    """The mixture's training rows in the shares that its weights ask for, each row once.

    With shares `s_i = w_i / sum w` of tasks of `n_i` rows, there are `min(n_i / s_i)` rows in all, or
    `task.max_train_examples` of them. Without weights `w_i = n_i`: all rows. A weight that is left out beside others is
    1. `about` says how many of each.

    Raises:
        InputError: a task with no subject in the training part, or with too small a share for one row.
    """
    subjects = set(train.subjects)
    parts = [
        dataclasses.replace(part, examples=tuple(example for example in part.examples if example.subject in subjects))
        for part in _parts_of(block)
    ]
    for part in parts:
        if not part.examples:
            raise InputError(f"task.mix: no subject of {part.name!r} is in the training part; give it more subjects")
    named_weights = [config.weight for config in block.mix or []]
    sizes = [len(part.examples) for part in parts]
    weights = [float(n) for n in sizes]
    if any(weight is not None for weight in named_weights):
        weights = [1.0 if weight is None else weight for weight in named_weights]
    shares = [weight / sum(weights) for weight in weights]
    total = min(math.floor(n / share + 1e-9) for n, share in zip(sizes, shares, strict=True))
    total = min(total, block.max_train_examples or total)
    # Whole rows: what rounding down leaves over goes to the largest remainders.
    counts = [math.floor(total * share + 1e-9) for share in shares]
    order = sorted(range(len(parts)), key=lambda index: counts[index] - total * shares[index])
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    for part, count in zip(parts, counts, strict=True):
        if count < 1:
            raise InputError(f"task.mix: the share of {part.name!r} is less than one of {total} rows; raise its weight")
    chosen = [part.limited(count, block.split.seed) for part, count in zip(parts, counts, strict=True)]
    examples = tuple(example for part in chosen for example in part.examples)
    rows = {part.name: [count, n] for part, count, n in zip(parts, counts, sizes, strict=True)}
    return dataclasses.replace(train, examples=examples, about={"mix": rows})


def _mix_in_words(train: Task) -> str:
    """How many rows of each task are learnt, and of how many; empty where there is no mixture."""
    rows = train.about.get("mix", {})
    listed = ", ".join(f"{count} of {n} rows of {name}" for name, (count, n) in rows.items())
    return f" ({listed})" if rows else ""


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
        task = _loaded(block, block.validation)
    elif (block.eval or block.train) == block.train:
        task = take_split(_loaded(block, block.train), "validation", block.split.seed)
    elif whole and part == train.split == "train":
        task = _loaded(block, f"{whole}:validation")
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
    chats = f", as {chat_in_words(train.chat_template)}" if train.chat_template else ""
    if (block.eval or block.train) != block.train or _loaded(block, block.train).split is not None:
        return f"{train.name}{_mix_in_words(train)} and {evaluation.name} as they are{chats}"
    aside = split_subjects(_loaded(block, block.train).subjects, block.split.seed)["validation"]
    use = "evaluated during training" if validated and block.validation is None else "in neither"
    return (
        f"{block.train} split by subject (seed {block.split.seed}): {train.name} is learnt{_mix_in_words(train)}, "
        f"{evaluation.name} held out, validation ({len(aside)} subject{'s' * (len(aside) != 1)}) {use}{chats}"
    )
