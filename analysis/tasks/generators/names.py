"""Indirect objects: "When Mary and John went to the store, John gave a drink to" is to go on with Mary, not John.

`answers` is the indirect object IO and the subject S, `previous` is S: `<method>.target` is about IO,
`<method>.previous` about S. The counterpart (`corrupt`) has a third name in place of S's second mention, so that
nothing says which of the two is meant. Prompts of both orders (ABBA, BABA) take turns.

Source: Wang et al. 2022 (arXiv 2211.00593); the templates are theirs in form.
"""

from __future__ import annotations

from headtune.analysis.tasks.task import Example

from .base import Draw, require_length
from .words import word_lists

TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {thing} to",
    "Then, {A} and {B} went to the {place}. {S} gave a {thing} to",
    "After {A} and {B} went to the {place}, {S} gave a {thing} to",
    "While {A} and {B} were at the {place}, {S} gave a {thing} to",
)
TRIES = 50  # draws for a prompt, until names begin with different tokens and the counterpart has as many


def ioi(draw: Draw) -> list[Example]:
    """Prompts with two names; the subject (for splits and intervals) is IO.

    Raises:
        InputError: names of this tokenizer do not make as many prompts.
    """
    lists = word_lists()
    examples: list[Example] = []
    for index in range(draw.n):
        generator = draw.random("ioi", index)
        text = TEMPLATES[index // 2 % len(TEMPLATES)]
        for _ in range(TRIES):
            indirect, subject, third = generator.sample(lists["first_names"], 3)
            place, thing = generator.choice(lists["places"]), generator.choice(lists["things"])
            first, second = (indirect, subject) if index % 2 == 0 else (subject, indirect)
            names = {"{A}": first, "{B}": second, "{place}": place, "{thing}": thing}
            prompt, marks = _filled(text, names | {"{S}": subject})
            corrupt, _ = _filled(text, names | {"{S}": third})
            if len(draw.ids(prompt)) != len(draw.ids(corrupt)):
                draw.dropped["the counterpart has another length"] += 1
            elif None in (firsts := draw.first_tokens(prompt, [indirect, subject])):
                draw.dropped["a name has no first token of its own"] += 1
            elif firsts[0] == firsts[1]:
                draw.dropped["the names begin with the same token"] += 1
            else:
                mentions = {"{A}": marks["{A}"], "{B}": marks["{B}"]}
                spans = {
                    "io": (mentions["{A}" if first == indirect else "{B}"],),
                    "s1": (mentions["{B}" if first == indirect else "{A}"],),
                    "s2": (marks["{S}"],),
                }
                examples.append(Example(prompt, indirect, (indirect, subject), (subject,), corrupt, (subject,), spans))
                break
    return require_length(draw, examples, "ioi")


def _filled(template: str, values: dict[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """The text, and the characters of each value, which occurs once."""
    text, rest = "", template
    marks: dict[str, tuple[int, int]] = {}
    while rest:
        key = min((key for key in values if key in rest), key=rest.index, default=None)
        if key is None:
            return text + rest, marks
        before, rest = rest.split(key, 1)
        text += before + values[key]
        marks[key] = (len(text) - len(values[key]), len(text))
    return text, marks
