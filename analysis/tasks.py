"""Tasks: prompts whose next words are known answers, with the answers already given and where everything stands.

A task is a JSONL file, a `datasets` hub id or a built-in name, with an optional split: `one_to_many:test`. One example
a line: `{"prompt", "subject", "answers", "previous", "corrupt", "incorrect"}`; see the README for the format. Data of
other layouts is named with its format: `truthfulqa:fold_0_test.csv` (see `formats`).
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .errors import InputError, nearest
from .files import write_text

log = logging.getLogger(__name__)

SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        prompt: the text up to END; the answer would come next.
        subject: what is asked about; occurs in the prompt.
        answers: all accepted answers, those already given included.
        previous: the answers already given, in order; empty for single-fact prompts.
        corrupt: counterpart prompt for patching, if there is one.
        incorrect: wrong answers, for preference pairs and multiple choice; `answers[0]` is then the best right one.
    """

    prompt: str
    subject: str
    answers: tuple[str, ...]
    previous: tuple[str, ...] = ()
    corrupt: str | None = None
    incorrect: tuple[str, ...] = ()

    @property
    def remaining(self) -> tuple[str, ...]:
        """Accepted answers not given yet."""
        given = {canonical(answer, self.subject) for answer in self.previous}
        return tuple(answer for answer in self.answers if canonical(answer, self.subject) not in given)


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
        chat_template: give the prompts to the model as a chat, in its tokenizer's own template (see `as_chat`).
        kind: how it is evaluated: the next items of a list, one answer, or a choice among `answers` and `incorrect`.
        split: which part of a larger task this is, if `take_split` made it.
    """

    name: str
    examples: tuple[Example, ...]
    chat_template: bool = False
    kind: Kind = "lists"
    split: str | None = None

    @property
    def subjects(self) -> list[str]:
        return sorted({example.subject for example in self.examples})

    @property
    def sha256(self) -> str:
        how = "chat" * self.chat_template + ("" if self.kind == "lists" else self.kind)
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


_LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ð": "d", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe", "’": "'"})


def normalise(answer: str) -> str:
    """Answers are compared without case, accents, outer punctuation, a leading "the", and with "Saint" as "St"."""
    plain = unicodedata.normalize("NFKD", answer.casefold().translate(_LETTERS))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    words = plain.strip(" \t\n.,;:!?\"'`*_()[]").removeprefix("the ").replace("saint ", "st ").replace("st. ", "st ")
    return " ".join(words.split())


def canonical(answer: str, subject: str) -> str:
    """`normalise`, and "Quebec City" is "Quebec", unless what is left is the subject itself ("Mexico City")."""
    name = normalise(answer)
    short = name.removesuffix(" city")
    return name if short == normalise(subject) else short


# --- building ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """How a list prompt is written: `header` holds `{subject}`, each item `{i}` (optional) and `{answer}`."""

    header: str
    item: str = "\n{i}. {answer}"

    def __post_init__(self) -> None:
        for text, need in ((self.header, "{subject}"), (self.item, "{answer}")):
            if need not in text:
                raise InputError(f"template {text!r} does not hold {need}; add it where it belongs")

    def prompt(self, subject: str, given: Sequence[str]) -> str:
        """The list with `given` answers, ending right before the next answer."""
        header = self.header.replace("{subject}", subject)
        items = "".join(self._item(i, answer) for i, answer in enumerate(given, start=1))
        return (header + items + self._item(len(given) + 1, "")).rstrip(" ")

    def _item(self, i: int, answer: str) -> str:
        return self.item.replace("{i}", str(i)).replace("{answer}", answer)


def build(
    facts: Mapping[str, Sequence[str]],
    templates: Sequence[Template],
    previous: Sequence[int] = (1, 2, 3, 4),
    seed: int = 0,
    familiar: int = 12,
) -> list[Example]:
    """Turn `{subject: [answers, best known first]}` into examples.

    Every subject gets every template with every number of `previous` answers; which answers were "already given" is
    drawn, seeded, from the subject's `familiar` best known, and always leaves at least one answer to give.

    Raises:
        InputError: a subject with too few answers, an empty or repeated answer, or one with white space around it.
    """
    examples = []
    for subject, answers in facts.items():
        seen = Counter(canonical(answer, subject) for answer in answers)
        repeated = [a for a in answers if seen[canonical(a, subject)] > 1 or not normalise(a)]
        if repeated:
            raise InputError(f"facts of {subject!r} repeat or leave empty the answer {repeated[0]!r}; remove it")
        for answer in answers:
            _require_bare(answer, f"facts of {subject!r}")
        if len(answers) <= (most := max(previous)):
            has, gives = (f"{n} answer{'s' * (n != 1)}" for n in (len(answers), most))
            raise InputError(
                f"facts of {subject!r} have {has}, and a prompt that gives {gives} needs at least {most + 1}: "
                "add answers or lower --previous"
            )
        for template in templates:
            for count in previous:
                # Seeded by content, not by order: adding a subject leaves the others' examples as they were.
                generator = random.Random(f"{seed}/{subject}/{template.header}/{template.item}/{count}")
                given = generator.sample(list(answers[: max(familiar, count)]), count)
                examples.append(Example(template.prompt(subject, given), subject, tuple(answers), tuple(given)))
    return examples


def to_jsonl(examples: Iterable[Example]) -> str:
    # Without an empty `incorrect`, which came to the format later: files and digests from before stay what they were.
    rows = ({k: v for k, v in asdict(example).items() if k != "incorrect" or v} for example in examples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def invert(samples: Iterable[tuple[str, str]], at_least: int) -> dict[str, list[str]]:
    """Turn many-to-one facts (subject, object) round: object -> its subjects, where there are `at_least` so many."""
    table: dict[str, list[str]] = {}
    for subject, thing in samples:
        known = {canonical(answer, thing) for answer in table.setdefault(thing, [])}
        if canonical(subject, thing) not in known and normalise(subject):
            table[thing].append(subject.strip())
    return {thing: subjects for thing, subjects in table.items() if len(subjects) >= at_least}


def read_relation(path: Path) -> list[tuple[str, str]]:
    """Read `{"samples": [{"subject", "object"}, ...]}` (the layout of the LRE relations) or the bare list."""
    data = read_json(path, "relation", object)
    samples = data.get("samples") if isinstance(data, dict) else data
    if not isinstance(samples, list) or not all(
        isinstance(row, dict) and isinstance(row.get("subject"), str) and isinstance(row.get("object"), str)
        for row in samples
    ):
        raise InputError(f'relation file {str(path)!r} must hold a list of {{"subject": ..., "object": ...}}')
    return [(row["subject"], row["object"]) for row in samples]


def build_files(facts: Path, templates: Path | None, out: Path, inverted: bool = False, **options: Any) -> Task:
    """Build a task file from users' own files: facts `{subject: [answers]}`, templates `[{"header", "item"}]`.

    Args:
        inverted: `facts` is a many-to-one relation (see `read_relation`), to be turned round: "landmarks in Italy".
            Objects with too few subjects for the prompts asked for are left out.
    """
    if inverted:
        samples, least = read_relation(facts), max(options.get("previous", (1, 2, 3, 4))) + 1
        table = invert(samples, least)
        if few := len({thing for _, thing in samples}) - len(table):
            log.warning("%s: %d objects have fewer than %d subjects each and are left out", facts, few, least)
    else:
        table = read_json(facts, "facts", dict)
    for subject, answers in table.items():
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise InputError(f"{facts}: subject {subject!r} must map to a list of strings, not {answers!r}"[:300])
    if templates is None:
        chosen = [Template("List of answers for {subject}:")]
    else:
        rows = read_json(templates, "templates", list)
        chosen = [_template(row, str(templates)) for row in rows]
    for found, path, what in ((table, facts, "subjects"), (chosen, templates, "templates")):
        if not found:
            raise InputError(f"{path} holds no {what}; add at least one")
    task = Task(out.stem, tuple(build(table, chosen, **options)))
    write_text(out, to_jsonl(task.examples))
    return task


def _template(row: Any, where: str) -> Template:
    if (
        not isinstance(row, dict)
        or not {"header"} <= set(row) <= {"header", "item"}
        or not all(isinstance(text, str) for text in row.values())
    ):
        raise InputError(f'{where}: template {row!r} must be {{"header": "... {{subject}}", "item": "... {{answer}}"}}')
    return Template(**row)


# What files of a user's own hold, as messages show it.
_SHAPES = {
    "facts": '{"subject": ["answer", ...], ...}',
    "templates": '[{"header": "... {subject} ...", "item": "... {answer}"}, ...]',
}
_JSON_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def read_json(path: Path, what: str, kind: type) -> Any:
    """What a JSON file holds, which must be a `kind`; `what` names it in messages.

    Raises:
        InputError: not there, not UTF-8, not JSON, a task's lines, or another kind.
    """
    file = f"{what} file {str(path)!r}"
    try:
        text = _utf8(path, what)
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; check the path") from None
    if _is_task(text):
        raise InputError(
            f"{file} looks like a task (JSONL), which needs no building; look at it with: headtune task show {path}"
        )
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if not isinstance(data, kind):
        found, expected = _JSON_KINDS.get(type(data), "a number"), _JSON_KINDS[kind]
        shape = f", {_SHAPES[what]}" if what in _SHAPES else ""
        fix = "; put it in [ ]" if kind is list and isinstance(data, dict) and what in _SHAPES else ""
        raise InputError(f"{file} holds {found}; expected {expected}{shape}{fix}")
    return data


def _utf8(path: Path, what: str) -> str:
    """A file's text; the mark that Windows editors put before it (BOM) is no part of it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} file {str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from None


def _is_task(text: str) -> bool:
    """Whether the first line is an example by itself."""
    try:
        row = json.loads(text.lstrip().split("\n", 1)[0])
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and {"prompt", "subject", "answers"} <= set(row)


# --- loading ----------------------------------------------------------------------------------------------------------


def builtin_names() -> list[str]:
    return list(_builtin_table()["tasks"])


def _builtin_table() -> dict[str, Any]:
    data = importlib.resources.files("headtune.recipes") / "data"
    table: dict[str, Any] = json.loads((data / "tasks.json").read_text(encoding="utf-8"))
    return table


def _builtin(name: str) -> list[Example]:
    table = _builtin_table()
    data = importlib.resources.files("headtune.recipes") / "data"
    relations = json.loads((data / "one_to_many.json").read_text(encoding="utf-8"))["relations"]
    entry = table["tasks"][name]
    examples = []
    for relation in entry["relations"]:
        phrase = table["phrases"][relation]
        templates = [Template(row["header"].replace("{things}", phrase), row["item"]) for row in entry["templates"]]
        examples += build(
            relations[relation]["facts"], templates, entry["previous"], seed=0, familiar=entry["familiar"]
        )
    return examples


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
    kept = tuple(example for example in task.examples if example.subject in chosen)
    if not kept:
        raise InputError(f"split {split!r} of task {task.name!r} is empty: {len(task.subjects)} subjects are too few")
    return replace(task, name=f"{task.name}:{split}", examples=kept, split=split)


def load_task(name: str, split_seed: int = 0) -> Task:
    """Load a task by built-in name, JSONL path, `datasets` hub id or `FORMAT:PATH`, each with an optional `:split`.

    The formats, and what `PATH` may be in each, are those of `formats`; a built-in task is one of lists. So are JSONL
    and hub data where any row has `previous`, be it empty; else each row is a single fact, and `kind` is `exact_match`.

    Raises:
        InputError: no such task or format, or a malformed line (named by its number).
    """
    from . import formats  # which reads rows with this module

    shape, colon, source = name.partition(":")
    if colon and shape in formats.FORMATS:
        base, colon, split = _parts(source)
        if colon and formats.has_files(shape, base):
            return formats.read(shape, base, split)
        task = formats.read(shape, base)
        return take_split(task, split, split_seed) if colon else task
    base, colon, split = _parts(name)
    if base in builtin_names():
        task = Task(base, tuple(_builtin(base)))
    elif ":" in base and len(shape) > 1 and not {"/", "\\", "."} & set(shape) and not Path(base).exists():
        raise InputError(f"task format {shape!r} of {name!r} is unknown; {nearest(shape, formats.FORMATS)}")
    elif base.endswith((".jsonl", ".json")) or Path(base).exists():
        _require_lines(Path(base))
        task = _of_rows(Path(base).stem, json_lines(Path(base)))
        if not task.examples:
            raise InputError(f"task file {base!r} holds no examples; write one JSON object a line")
    elif base.count("/") == 1:
        task = _of_rows(base, hub_rows(base, "train"))
    else:
        known = [*builtin_names(), *formats.FORMATS]
        raise InputError(f"task {base!r} is neither a file, a hub id nor built in; {nearest(base, known)}")
    return take_split(task, split, split_seed) if colon else task


def _parts(name: str) -> tuple[str, str, str]:
    """`base`, `:` and the split of `base:split`; what follows a colon inside a path is no split."""
    base, colon, split = name.rpartition(":")
    return (name, "", "") if not colon or "/" in split or "\\" in split else (base, colon, split)


def _of_rows(name: str, rows: Iterable[tuple[str, Any]]) -> Task:
    examples: list[Example] = []
    kind: Kind = "exact_match"
    for where, row in rows:
        examples.append(parse_example(row, where))
        if row.get("previous") is not None:
            kind = "lists"
    return Task(name, tuple(examples), kind=kind)


def _require_lines(path: Path) -> None:
    """Refuse what is no file, and a whole JSON document, by the kind of file that it looks like."""
    if not path.is_file():
        raise InputError(
            f"task file {str(path)!r} does not exist; check the path or build it with: headtune task build"
        )
    try:
        whole = json.loads(_utf8(path, "task"))
    except json.JSONDecodeError:
        return  # as it should be, if there is more than one line; what else is wrong has its line named later
    if isinstance(whole, list):
        raise InputError(f"task file {str(path)!r} is one JSON list; write one JSON object a line")
    if not isinstance(whole, dict) or "prompt" in whole:
        return
    if isinstance(whole.get("samples"), list):
        raise InputError(f"task file {str(path)!r} looks like a relation; name its format: relation:{path}")
    if whole and all(isinstance(answers, list) for answers in whole.values()):
        raise InputError(
            f"task file {str(path)!r} looks like a facts file; make a task of it: "
            f"headtune task build {path} --out {path.with_suffix('.jsonl').name}"
        )


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """What each line of a JSONL file holds, with its place (`file:line`); empty lines are passed over."""
    # Not splitlines: JSON strings may hold U+2028 and the like, which end no JSONL line.
    for number, line in enumerate(_utf8(path, "task").split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not a JSON object ({error.msg} at column {error.colno})") from None


def hub_rows(name: str, split: str, config: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a `datasets` hub data set, with their places."""
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many kinds; every one means the same to the user
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"task {name!r} is not a file and cannot be loaded from the hub: {reason}") from error
    for number, row in enumerate(rows):
        yield f"{name} row {number}", dict(row)


def _require_bare(answer: str, what: str) -> None:
    """Refuse an answer with white space around it, whose first token would be that of a space (InputError)."""
    if answer != answer.strip():
        raise InputError(
            f"{what}: {answer!r} has white space around it; write {answer.strip()!r}, a space before it is added"
        )


def parse_example(row: Any, where: str) -> Example:
    """Check one example strictly.

    Raises:
        InputError: a missing, unknown or ill-typed key, a subject or previous answer that the prompt does not hold, a
            prompt that ends in a space, or an answer with white space around it.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    known = {"prompt": str, "subject": str, "answers": list, "previous": list, "corrupt": str, "incorrect": list}
    for key in row:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; {nearest(key, known)}")
    for key, kind in known.items():
        if row.get(key) is None:
            if key in ("previous", "corrupt", "incorrect"):
                continue
            raise InputError(f"{where}: key {key!r} is missing; an example needs prompt, subject and answers")
        if not isinstance(row[key], kind):
            raise InputError(f"{where}: {key!r} must be a {kind.__name__}, found {row[key]!r}"[:300])
        if kind is list and not all(isinstance(item, str) and item.strip() for item in row[key]):
            raise InputError(f"{where}: {key!r} must hold non-empty strings, found {row[key]!r}"[:300])
        for item in row[key] if kind is list else ():
            _require_bare(item, f"{where}: {key!r}")
    for key in ("prompt", "corrupt"):
        if (row.get(key) or "").endswith((" ", "\t")):
            raise InputError(f"{where}: the {key} ends in a space; remove it: an answer is written after a space")
    example = Example(
        row["prompt"],
        row["subject"],
        tuple(row["answers"]),
        tuple(row.get("previous") or ()),
        row.get("corrupt"),
        tuple(row.get("incorrect") or ()),
    )
    if not example.subject or example.subject not in example.prompt:
        raise InputError(
            f"{where}: the prompt does not contain its subject {example.subject!r}; write it as in the prompt"
        )
    for answer in example.previous:
        if answer not in example.prompt:
            raise InputError(f"{where}: the prompt does not contain the previous answer {answer!r}")
    if not example.remaining:
        raise InputError(f"{where}: every accepted answer is already given; add the remaining ones to 'answers'")
    return example
