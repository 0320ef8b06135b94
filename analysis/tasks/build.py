"""Task files from facts and templates."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_text

from .readers import read_json, read_relation
from .task import Example, Task, _require_bare, canonical, normalise, to_jsonl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """How a list prompt is written: `header` holds `{subject}`, each item `{i}` (optional) and `{answer}`."""

    header: str
    item: str = "\n{i}. {answer}"

    def __post_init__(self) -> None:
        for text, need in ((self.header, "{subject}"), (self.item, "{answer}")):
            if need not in text:
                raise InputError(f"template {text!r} does not hold {need}; add it where it belongs")

    def prompt(self, subject: str, previous: Sequence[str]) -> str:
        """The list with `previous` answers, ending right before the next answer."""
        header = self.header.replace("{subject}", subject)
        items = "".join(
            self.item.replace("{i}", str(i)).replace("{answer}", answer) for i, answer in enumerate(previous, start=1)
        )
        begun = self.item.split("{answer}")[0].replace("{i}", str(len(previous) + 1))
        return (header + items + begun).rstrip(" ")

    @property
    def readable(self) -> bool:
        """Whether continuations are read as they are written: a line an item, with a number, a bullet or nothing."""
        return re.fullmatch(r"\n[ \t]*((\{i\}[.)]|[-*•])[ \t]*)?\{answer\}", self.item) is not None


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
    spellings: dict[str, str] = {}
    for subject, answers in facts.items():
        if (other := spellings.setdefault(" ".join(subject.casefold().split()), subject)) != subject:
            raise InputError(
                f"facts: subjects {other!r} and {subject!r} differ by case or white space alone, and would lie in "
                "train and test; join them"
            )
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
                drawn = generator.sample(list(answers[: max(familiar, count)]), count)
                examples.append(Example(template.prompt(subject, drawn), subject, tuple(answers), tuple(drawn)))
    return examples


def invert(samples: Iterable[tuple[str, str]], at_least: int) -> dict[str, list[str]]:
    """Turn many-to-one facts (subject, object) round: object -> its subjects, where there are `at_least` so many."""
    table: dict[str, list[str]] = {}
    for subject, thing in samples:
        present = {canonical(answer, thing) for answer in table.setdefault(thing, [])}
        if canonical(subject, thing) not in present and normalise(subject):
            table[thing].append(subject.strip())
    return {thing: subjects for thing, subjects in table.items() if len(subjects) >= at_least}


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
    for content, path, what in ((table, facts, "subjects"), (chosen, templates, "templates")):
        if not content:
            raise InputError(f"{path} holds no {what}; add at least one")
    for template in chosen:
        if not template.readable:
            raise InputError(
                f"{templates}: item {template.item!r} would not be read back as written: lists are read line by line, "
                "each with a number, a bullet or nothing and no text behind {answer}; write it as '\\n{i}. {answer}', "
                "'\\n{i}) {answer}', '\\n- {answer}' or '\\n{answer}'"
            )
    task = Task(out.stem, tuple(build(table, chosen, **options)))
    write_text(out, to_jsonl(task.examples))
    return task


def _template(row: Any, source: str) -> Template:
    if (
        not isinstance(row, dict)
        or not {"header"} <= set(row) <= {"header", "item"}
        or not all(isinstance(text, str) for text in row.values())
    ):
        raise InputError(
            f'{source}: template {row!r} must be {{"header": "... {{subject}}", "item": "... {{answer}}"}}'
        )
    return Template(**row)
