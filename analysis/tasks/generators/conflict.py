"""What the model knows against what the prompt says: "The capital of Peru is Oslo. The capital of Peru is".

The prompt gives a wrong object O' of the subject and asks for it again: O is the answer from memory, O' that of the
context. `answers` is both and `previous` is O', so `<method>.target` is about memory and `<method>.previous` about the
context; as a list of one item, a repetition is the context's answer.

Sources: the contradicting prompts of Yu et al. 2023 (arXiv 2310.15910) and Jin et al. 2024 (PH3, arXiv 2402.18154).
"""

from __future__ import annotations

from pathlib import Path

from headtune.analysis.tasks.readers import read_json, read_relation
from headtune.analysis.tasks.task import Example, canonical
from headtune.analysis.utils.errors import InputError

from .base import Draw, require_length

_TEMPLATE = "The {relation} of {subject} is"


def conflict(draw: Draw, facts: Path | str, relation: str, template: str = _TEMPLATE) -> list[Example]:
    """Every subject with wrong objects of other subjects, drawn, in turn.

    Args:
        facts: `{subject: [object, ...]}`, the first is asked for; or a relation, see `readers.read_relation`.
        relation: what the object is of the subject, such as `capital`.
        template: the statement up to the object, with `{relation}` and `{subject}`.

    With a model, only subjects whose object it writes first by itself, without the contradiction, are taken.

    Raises:
        InputError: an unusable file or template, or too few facts.
    """
    if "{subject}" not in template:
        raise InputError(f"template {template!r} does not hold {{subject}}; add it where it belongs")
    table = _facts(Path(facts))

    def statement(subject: str) -> str:
        return template.replace("{relation}", relation).replace("{subject}", subject)

    # Facts whose objects can be told apart, and which the model knows.
    first = {subject: draw.first_tokens(statement(subject), [thing])[0] for subject, thing in table.items()}
    subjects = [subject for subject in table if first[subject] is not None]
    if draw.model is not None:
        tokens = {subject: first[subject] or () for subject in subjects}
        prompts = [draw.ids(statement(subject)) + list(tokens[subject][:-1]) for subject in subjects]
        written = dict(zip(subjects, draw.model.next_tokens(prompts), strict=True))
        known_by_heart = [subject for subject in subjects if written[subject] == tokens[subject][-1]]
        draw.dropped["the model does not know it"] += len(subjects) - len(known_by_heart)
        draw.about["asked"] = {"subjects": len(subjects), "right": len(known_by_heart)}
        subjects = known_by_heart
    examples: list[Example] = []
    others: dict[str, list[str]] = {}
    for subject in subjects:
        thing = table[subject]
        alike = [
            s for s in table if len(first[s] or ()) == len(first[subject] or ())
        ]  # both, or neither, after a space
        different = {table[s] for s in alike if first[s] != first[subject]}
        usable = sorted(
            other
            for other in different
            if canonical(other, subject) != canonical(thing, subject) and subject not in other and other not in subject
        )
        draw.random(subject).shuffle(usable)
        others[subject] = usable
    rounds = max(map(len, others.values()), default=0)
    for k in range(rounds):
        for subject in subjects:
            if k < len(others[subject]) and len(examples) < draw.n:
                text, wrong = statement(subject), others[subject][k]
                examples.append(
                    Example(
                        f"{text} {wrong}. {text}", subject, (table[subject], wrong), (wrong,), spans=_spans(text, wrong)
                    )
                )
    return require_length(draw, examples, f"conflict of {str(facts)!r}")


def _spans(statement: str, wrong: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """The wrong statement and, in it, the wrong object."""
    start = len(statement) + 1
    return {"statement": ((0, start + len(wrong) + 1),), "context": ((start, start + len(wrong)),)}


def _facts(path: Path) -> dict[str, str]:
    data = read_json(path, "facts", object)
    if isinstance(data, dict) and "samples" not in data:
        for subject, things in data.items():
            if not isinstance(things, list) or not things or not all(isinstance(thing, str) for thing in things):
                raise InputError(f"{path}: subject {subject!r} must map to a list of strings, not {things!r}"[:300])
        return {subject: things[0].strip() for subject, things in data.items()}
    facts: dict[str, str] = {}
    for subject, thing in read_relation(path):
        facts.setdefault(subject, thing.strip())
    return facts
