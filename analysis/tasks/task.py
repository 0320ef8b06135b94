"""Examples and tasks: prompts whose next words are known answers, checked strictly; splits by subject."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from headtune.analysis.utils.errors import InputError, nearest

from .answers import canonical as canonical
from .answers import normalise as normalise
from .messages import ChatTemplate, Turns, as_rows, joined, parse_messages
from .spans import Spans, parse_spans

SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        prompt: the text right before the answer.
        subject: what is asked about; occurs in the prompt.
        answers: all accepted answers, those already given included.
        previous: the answers already given, in order; empty for single-fact prompts.
        corrupt: counterpart prompt for patching, if there is one.
        incorrect: wrong answers, for preference pairs and multiple choice; `answers[0]` is then the best right one.
        spans: named parts of the prompt, as pieces: a text that occurs once, or (start, end) characters (see `spans`).
        messages: the turns of a conversation, (role, content); `prompt` is then their text, with an empty line between
            turns, and only a chat template writes what a model gets (see `messages`).
    """

    prompt: str
    subject: str
    answers: tuple[str, ...]
    previous: tuple[str, ...] = ()
    corrupt: str | None = None
    incorrect: tuple[str, ...] = ()
    spans: Spans = field(default_factory=dict, hash=False)
    messages: Turns = ()

    @property
    def remaining(self) -> tuple[str, ...]:
        """Accepted answers not given yet."""
        previous = {canonical(answer, self.subject) for answer in self.previous}
        return tuple(answer for answer in self.answers if canonical(answer, self.subject) not in previous)


Kind = Literal["lists", "exact_match", "multiple_choice"]


def scored(kind: Kind, n_items: int) -> str:
    """How answers are scored, in words."""
    if kind == "lists":
        return f"scored as lists of {n_items}"
    return "scored by exact match of one answer" if kind == "exact_match" else "scored by multiple choice"


@dataclass(frozen=True)
class Task:
    """A named list of examples.

    Attributes:
        name: of the task.
        examples: the prompts.
        chat_template: give the prompts to the model as a chat, in its tokenizer's own template: True, or how it is
            written (see `as_chat`).
        kind: how it is evaluated: the next items of a list, one answer, or a choice among `answers` and `incorrect`.
        split: which part of a larger task this is, if `take_split` made it.
        about: where its examples come from: the first line of a generated task file (see `header`).
    """

    name: str
    examples: tuple[Example, ...]
    chat_template: bool | ChatTemplate = False
    kind: Kind = "lists"
    split: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def subjects(self) -> list[str]:
        return sorted({example.subject for example in self.examples})

    @property
    def sha256(self) -> str:
        how = "chat" if self.chat_template else ""
        if isinstance(self.chat_template, ChatTemplate) and (settings := self.chat_template.as_json()) is not True:
            how += json.dumps(settings, sort_keys=True)
        how += "" if self.kind == "lists" else self.kind
        return hashlib.sha256((to_jsonl(self.examples) + how).encode()).hexdigest()

    def limited(self, max_examples: int | None, seed: int = 0) -> Task:
        """At most `max_examples` examples, spread evenly over subjects (a seeded shuffle, subject by subject)."""
        if max_examples is None or max_examples >= len(self.examples):
            return self
        by_subject: dict[str, list[Example]] = {}
        for example in self.examples:
            by_subject.setdefault(example.subject, []).append(example)
        generator = random.Random(seed)
        queues = list(by_subject.values())
        generator.shuffle(queues)
        for queue in queues:
            generator.shuffle(queue)
        rounds = (queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue))
        return replace(self, examples=tuple(example for example, _ in zip(rounds, range(max_examples), strict=False)))


def to_jsonl(examples: Iterable[Example]) -> str:
    return "".join(json.dumps(_row(example), ensure_ascii=False) + "\n" for example in examples)


def _row(example: Example) -> dict[str, Any]:
    # Without the empty ones of what came to the format later: files and digests from before stay what they were.
    late = ("incorrect", "spans", "messages")
    row = {k: v for k, v in asdict(example).items() if k not in late or v}
    if not example.messages:
        return row
    # A conversation says what its prompt is.
    return {"messages": as_rows(example.messages)} | {k: v for k, v in row.items() if k not in ("prompt", "messages")}


def task_lines(task: Task) -> list[str]:
    """A task file's lines: `{"about": ...}` where the task has it, then the examples without keys that say nothing.

    An empty `previous` says that a task is of lists.
    """
    silent = ("corrupt",) if task.kind == "lists" else ("corrupt", "previous")
    lines = [json.dumps({"about": {"kind": task.kind, **task.about}}, ensure_ascii=False)] if task.about else []
    for example in task.examples:
        row = json.loads(to_jsonl([example]))
        lines.append(json.dumps({k: v for k, v in row.items() if v or k not in silent}, ensure_ascii=False))
    return lines


def header(row: Any, place: str) -> dict[str, Any] | None:
    """What a task file's first line says about it, if it is no example: `{"about": {"kind": ..., ...}}`.

    Raises:
        InputError: `about` is not an object, or its `kind` is unknown.
    """
    if not isinstance(row, dict) or set(row) != {"about"}:
        return None
    about = row["about"]
    if not isinstance(about, dict):
        raise InputError(f"{place}: 'about' must be an object, found {about!r}"[:300])
    if (kind := about.get("kind", "lists")) not in get_args(Kind):
        raise InputError(f"{place}: kind {kind!r} is unknown; {nearest(str(kind), get_args(Kind))}")
    return about


def split_subjects(subjects: Iterable[str], seed: int = 0) -> dict[str, list[str]]:
    """Deal subjects, shuffled by `seed`, into train (60%), validation (15%) and test (25%)."""
    names = sorted(set(subjects))
    random.Random(seed).shuffle(names)
    parts, start = {}, 0
    for index, (split, share) in enumerate(SPLITS.items()):
        end = len(names) if index == len(SPLITS) - 1 else start + round(share * len(names))
        parts[split] = sorted(names[start:end])
        start = end
    return parts


def take_split(task: Task, split: str, seed: int = 0) -> Task:
    """The examples whose subject falls into `split`; no subject is in two splits."""
    if split not in SPLITS:
        raise InputError(f"split {split!r} of task {task.name!r} is unknown; {nearest(split, SPLITS)}")
    chosen = set(split_subjects(task.subjects, seed)[split])
    examples = tuple(example for example in task.examples if example.subject in chosen)
    if not examples:
        raise InputError(f"split {split!r} of task {task.name!r} is empty: {len(task.subjects)} subjects are too few")
    return replace(task, name=f"{task.name}:{split}", examples=examples, split=split)


def _require_bare(answer: str, what: str) -> None:
    """Refuse an answer with white space around it, whose first token would be that of a space (InputError)."""
    if answer != answer.strip():
        raise InputError(
            f"{what}: {answer!r} has white space around it; write {answer.strip()!r}, a space before it is added"
        )


def _conversation(row: dict[str, Any], place: str) -> tuple[dict[str, Any], Turns]:
    """A row of `messages` with the prompt that they are, and its turns; any other row as it is."""
    if row.get("messages") is None:
        return {key: value for key, value in row.items() if key != "messages"}, ()
    for key in ("prompt", "corrupt"):
        if row.get(key) is not None:
            raise InputError(f"{place}: a line with 'messages' takes no {key!r}; leave one of them out")
    turns = parse_messages(row["messages"], place)
    return {key: value for key, value in row.items() if key != "messages"} | {"prompt": joined(turns)}, turns


def parse_example(row: Any, place: str, published: bool = False) -> Example:
    """Check one example strictly.

    Args:
        published: of a published data set, some of whose rows name an answer as right and as wrong: taken as they are.

    Raises:
        InputError: a missing, unknown or ill-typed key, a subject or previous answer that the prompt does not hold, a
            prompt that ends in a space, an answer with white space around it, one that is incorrect as well, or a span
            that is none of the prompt.
    """
    # The keys and the types of their values.
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(row).__name__}")
    row, messages = _conversation(row, place)
    allowed = {"prompt": str, "subject": str, "answers": list, "previous": list, "corrupt": str, "incorrect": list}
    for key in row:
        if key not in (*allowed, "spans"):
            if key == "about":
                raise InputError(f"{place}: 'about' stands in the first line of a task file, alone; remove it here")
            raise InputError(f"{place}: unknown key {key!r}; {nearest(key, [*allowed, 'spans', 'messages'])}")
    for key, kind in allowed.items():
        if row.get(key) is None:
            if key in ("previous", "corrupt", "incorrect"):
                continue
            needed = "an example needs prompt (or messages), subject and answers"
            raise InputError(f"{place}: key {key!r} is missing; {needed}")
        if not isinstance(row[key], kind):
            raise InputError(f"{place}: {key!r} must be a {kind.__name__}, found {row[key]!r}"[:300])
        if kind is list and not all(isinstance(item, str) and item.strip() for item in row[key]):
            raise InputError(f"{place}: {key!r} must hold non-empty strings, found {row[key]!r}"[:300])
        for item in row[key] if kind is list else ():
            _require_bare(item, f"{place}: {key!r}")
    # What an answer is written after.
    for key in ("prompt", "corrupt"):
        if (row.get(key) or "").endswith((" ", "\t")):
            raise InputError(f"{place}: the {key} ends in a space; remove it: an answer is written after a space")
    example = Example(
        row["prompt"],
        row["subject"],
        tuple(row["answers"]),
        tuple(row.get("previous") or ()),
        row.get("corrupt"),
        tuple(row.get("incorrect") or ()),
        parse_spans(row.get("spans"), row["prompt"], place),
        messages,
    )
    # The prompt holds what the example names, and leaves something to answer.
    if not example.subject or example.subject not in example.prompt:
        raise InputError(
            f"{place}: the prompt does not contain its subject {example.subject!r}; write it as in the prompt"
        )
    for answer in example.previous:
        if answer not in example.prompt:
            raise InputError(f"{place}: the prompt does not contain the previous answer {answer!r}")
    if not example.remaining:
        raise InputError(f"{place}: every accepted answer is already given; add the remaining ones to 'answers'")
    right = {normalise(answer) or answer: answer for answer in example.remaining}
    for answer in () if published else example.incorrect:
        if (same := right.get(normalise(answer) or answer)) is not None:
            raise InputError(
                f"{place}: incorrect answer {answer!r} is the answer {same!r} as well (compared without case, accents "
                "and outer punctuation); remove it from one of the two"
            )
    return example
