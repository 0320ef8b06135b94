"""The card of a head: what it reads and writes at END, as data, as portraits.json, and as HTML.

`headtune.analysis.reports.head_profiles` fills it in from the model; without the model, the page is made again from the
file.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from headtune.analysis.heads.head_set import RankedHead
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_json

from .html import bars, html_table, number, percent, signed, unbroken

SCHEMA = 1
# What a head can read, in words; the order is the page's.
SOURCES = {
    "subject": "subject",
    "previous": "given answers",
    "first": "first token",
    "end": "last token",
    "rest": "everything else",
}
ANSWERS = {"target": "remaining answers", "previous": "given answers"}
# A head copies (suppresses) a source if the token's own logit is within the top (bottom) 5% of the vocabulary.
COPIES = 0.05
LONG_PROMPT, QUIET, CONTEXT = 80, 0.05, 4  # of a longer prompt, tokens below 5% of the strongest are left out
OPEN_CARDS = 2
NAMED_MASS = 0.05  # of attention: a source below it is not worth a word
NAMED_ANSWERS = 6


@dataclass(frozen=True)
class Written:
    """A token and how far the head moves its logit, against the mean over the vocabulary."""

    token: str
    logits: float


@dataclass(frozen=True)
class Read:
    """A token string, the attention it gets where it occurs (mean over these examples), and in how many it occurs."""

    token: str
    mass: float
    examples: int


@dataclass(frozen=True)
class Copying:
    """What full attention on a token would do to that same token, over all tokens of a source in all examples.

    Attributes:
        tokens: how many.
        own: mean logit given to the token itself, against the mean over the vocabulary.
        others: the same for tokens of this source in other examples that the prompt does not hold; None without any.
        above: median share of the vocabulary (of an even sample of a large one) that gets a larger logit than the token
            itself: 0 = first, 1 = last.
    """

    tokens: int
    own: float
    others: float | None
    above: float

    @property
    def verdict(self) -> str:
        return "copies" if self.above <= COPIES else "suppresses" if self.above >= 1 - COPIES else "neither"


@dataclass(frozen=True)
class Prompt:
    """One prompt, token by token; END is the last. Of all, the one with the most typical attributions.

    Attributes:
        tokens, sources: strings, and the source each token belongs to (see `Encoded.sources`).
        attention: the head's attention row at END.
        target, previous: each token's part of the head's direct attribution to the mean logit of the remaining and
            of the previous answers; `previous` is None where there are none.
        targets, given: first tokens of the remaining and of the previous answers.
        raises, lowers: the tokens that the head raises and lowers most here, against what it writes on average.
    """

    tokens: tuple[str, ...]
    sources: tuple[str, ...]
    attention: tuple[float, ...]
    target: tuple[float, ...]
    previous: tuple[float, ...] | None
    targets: tuple[str, ...]
    given: tuple[str, ...]
    raises: tuple[Written, ...]
    lowers: tuple[Written, ...]


@dataclass(frozen=True)
class HeadPortrait:
    """What one head reads and writes at END.

    Attributes:
        layer, head: zero-based.
        examples: how many examples it was drawn from.
        attention: source (subject, previous, first, end, rest) -> mean attention mass; sums to 1.
        reads: the token strings that get most attention where they occur.
        raises, lowers: the tokens it moves most on average, strongest first.
        copying: source -> test, for those of COPIED that the examples have.
        prompt: one prompt in full.
    """

    layer: int
    head: int
    examples: int
    attention: dict[str, float]
    reads: tuple[Read, ...]
    raises: tuple[Written, ...]
    lowers: tuple[Written, ...]
    copying: dict[str, Copying]
    prompt: Prompt

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeadPortrait:
        """The inverse of `to_json`, also after a round through JSON text.

        Raises:
            KeyError, TypeError: something is missing or unknown.
        """

        def written(block: dict[str, Any]) -> dict[str, Any]:
            return {name: tuple(Written(**entry) for entry in block[name]) for name in ("raises", "lowers")}

        prompt = {
            key: tuple(value) if isinstance(value, list | tuple) else value for key, value in data["prompt"].items()
        }
        changed = {
            "reads": tuple(Read(**entry) for entry in data["reads"]),
            "copying": {source: Copying(**entry) for source, entry in data["copying"].items()},
            "prompt": Prompt(**(prompt | written(data["prompt"]))),
        }
        return cls(**(data | written(data) | changed))


def write(portraits: Sequence[HeadPortrait], path: Path) -> None:
    """Write portraits.json."""
    write_json(path, {"schema": SCHEMA, "portraits": [portrait.to_json() for portrait in portraits]})


def read(path: Path) -> list[HeadPortrait]:
    """Read portraits.json.

    Raises:
        InputError: not there, not JSON, or not what `write` writes.
    """
    where = f"portraits file {str(path)!r}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}; headtune identify writes it") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}; run headtune identify again") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"{where} is not of schema {SCHEMA}; run headtune identify again")
    try:
        return [HeadPortrait.from_json(entry) for entry in data["portraits"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{where} is damaged ({error}); run headtune identify again") from None


# --- HTML -------------------------------------------------------------------------------------------------------------

GUIDE = (
    "One card a head; they open. <b>Reads</b>: where its attention goes at the end of the prompt, where the next "
    "answer is to start. <b>Writes</b>: the tokens whose logits its output moves most, against the average token. "
    "<b>One prompt</b>: the one with attributions closest to the head's medians, token by token: the attention that "
    "each token gets, and how far what is read there moves the answers (<span class='tk p' style='--w:.6'>red</span> "
    "raises, <span class='tk n' style='--w:.6'>blue</span> lowers). <span class='tk subject'>Dotted</span> is the "
    "subject, <span class='tk previous'>underlined</span> are the given answers; ␣ is a space, ⏎ a new line."
)


def visible(token: str) -> str:
    """A token as HTML: white space and control characters are shown, everything else is escaped."""
    named = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    return "".join(
        named.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c)[0] in "CZ" else escape(c)) for c in token
    )


def anchor(head: RankedHead, role: str) -> str:
    """The id of a head's card on the page."""
    return escape(f"{role}-{head.name}".replace(" ", "-"))


def card(head: RankedHead, role: str, rank: int, portrait: HeadPortrait) -> str:
    """One head of a role, `rank` counting from 1; the first OPEN_CARDS are open."""
    prompt = portrait.prompt
    writes = f"<section><h4>Writes on average</h4>{_writes(portrait.raises, portrait.lowers)}</section>"
    if prompt.raises or prompt.lowers:
        writes += f"<section><h4>Writes here, beyond that</h4>{_writes(prompt.raises, prompt.lowers)}</section>"
    return (
        f"<details class='card' id='{anchor(head, role)}'{' open' if rank <= OPEN_CARDS else ''}><summary>"
        f"<b>{head.name}</b> <span class='role'>{escape(role)} {rank}</span> "
        f"<span class='gist'>{gist(portrait)}</span></summary>"
        f"<div class='sides'><section><h4>Reads</h4>{_reads(portrait)}</section>"
        f"<section><h4>Copies or suppresses</h4>{_copying(portrait.copying)}</section></div>"
        f"<h4>One prompt</h4>{_prompt(prompt)}<div class='sides'>{writes}</div></details>"
    )


def gist(portrait: HeadPortrait) -> str:
    """Where most of the attention goes, and what the head does to what it reads there."""
    ordered = sorted(portrait.attention.items(), key=lambda item: -item[1])
    named = [source for source, mass in ordered if mass >= NAMED_MASS]
    text = ", ".join(f"{percent(portrait.attention[source])} {SOURCES[source]}" for source in named)
    for verdict in ("copies", "suppresses"):
        which = [s for s in named if s in portrait.copying and portrait.copying[s].verdict == verdict]
        if which:
            text += f"; <b>{verdict}</b> the {' and the '.join(SOURCES[source] for source in which)}"
    return text


def _reads(portrait: HeadPortrait) -> str:
    rows = [(SOURCES[source], mass) for source, mass in portrait.attention.items()]
    tokens = " ".join(
        f"<span class='chip' title='in {read.examples} of {portrait.examples} prompts'>{visible(read.token)} "
        f"<small>{percent(read.mass)}</small></span>"
        for read in portrait.reads
    )
    return (
        f"{bars(rows)}<p class='note'>Most attended where they occur, over {portrait.examples} prompts:</p>"
        f"<p class='chips'>{tokens}</p>"
    )


def _writes(raises: Sequence[Written], lowers: Sequence[Written]) -> str:
    lines = [
        f"<dt>{word}</dt><dd class='chips'>"
        + " ".join(
            f"<span class='chip {kind}'>{visible(written.token)} <small>{signed(written.logits)}</small></span>"
            for written in tokens
        )
        + "</dd>"
        for word, kind, tokens in (("raises", "up", raises), ("lowers", "down", lowers))
        if tokens
    ]
    return f"<dl class='writes'>{''.join(lines)}</dl>" if lines else "<p>Nothing: its output is zero.</p>"


def _copying(tests: Mapping[str, Copying]) -> str:
    rows = [
        [
            {"subject": "subject", "previous": "given answer"}[source],
            f"<b>{test.verdict}</b>" if test.verdict != "neither" else "neither",
            signed(test.own),
            unbroken(_rank(test.above)),
            signed(test.others),
        ]
        for source, test in tests.items()
    ]
    n = " and ".join(str(test.tokens) for test in tests.values())
    return html_table(["", "", "own logit", "rank", "others"], rows) + (
        "<p class='note'>If it attended to one such token alone: how far that moves this very token's logit, against "
        "the average token; where that puts it in the vocabulary; how far it moves such tokens of other prompts. Means "
        f"and median of {n} tokens.</p>"
    )


def _rank(above: float) -> str:
    if above in (0, 1):
        return "last of all" if above else "first of all"
    return f"top {100 * above:.2g}%" if above <= 0.5 else f"bottom {100 * (1 - above):.2g}%"


@dataclass(frozen=True)
class _Panel:
    """One number a token: `limit` is drawn strongest."""

    title: str
    parts: Sequence[float]
    limit: float
    text: Callable[[float], str]
    colour: Callable[[float], str]

    def weight(self, t: int) -> float:
        return abs(self.parts[t]) / self.limit if self.limit else 0.0


def _panels(prompt: Prompt) -> list[_Panel]:
    """Attention, then the parts in logits, which share a scale."""
    toward = {name: parts for name, parts in (("target", prompt.target), ("previous", prompt.previous)) if parts}
    limit = max(abs(part) for parts in toward.values() for part in parts)
    return [_Panel("attention", prompt.attention, max(prompt.attention), percent, lambda _: "a")] + [
        _Panel(
            f"moves the {ANSWERS[name]} by {signed(sum(parts))}",
            parts,
            limit,
            signed,
            lambda part: "p" if part > 0 else "n",
        )
        for name, parts in toward.items()
    ]


def _prompt(prompt: Prompt) -> str:
    panels = _panels(prompt)
    shown = _shown([max(panel.weight(t) for panel in panels) for t in range(len(prompt.tokens))])
    drawn = []
    for panel in panels:
        strongest = sorted(range(len(panel.parts)), key=lambda t: -panel.weight(t))[:3]
        listed = ", ".join(f"<code>{visible(prompt.tokens[t])}</code> {panel.text(panel.parts[t])}" for t in strongest)
        drawn.append(
            f"<section><h5>{panel.title}</h5><p class='tokens'>{_tokens(prompt, panel, shown)}</p>"
            f"<p class='note'>{listed}</p></section>"
        )
    answers = f"The remaining answers start with {_named(prompt.targets)}"
    if prompt.given:
        answers += f"; the given ones with {_named(prompt.given)}"
    note = f"{answers}. Darkest: {percent(panels[0].limit)} of the attention, {number(panels[1].limit)} logits."
    return f"<div class='sides'>{''.join(drawn)}</div><p class='note'>{note}</p>"


def _named(tokens: Sequence[str]) -> str:
    text = ", ".join(f"<code>{visible(token)}</code>" for token in tokens[:NAMED_ANSWERS])
    return text + (f" and {len(tokens) - NAMED_ANSWERS} more" if len(tokens) > NAMED_ANSWERS else "")


def _shown(weights: Sequence[float]) -> list[bool]:
    """Which tokens of a prompt are drawn: all of a short one; of a long one those that carry weight, with context."""
    n = len(weights)
    if n <= LONG_PROMPT:
        return [True] * n
    loud = [0, n - 1, *(t for t, weight in enumerate(weights) if weight >= QUIET)]
    near = {t for at in loud for t in range(at - CONTEXT, at + CONTEXT + 1)}
    return [t in near for t in range(n)]


def _tokens(prompt: Prompt, panel: _Panel, shown: Sequence[bool]) -> str:
    result: list[str] = []
    left_out: list[float] = []
    for t, (token, source, part) in enumerate(zip(prompt.tokens, prompt.sources, panel.parts, strict=True)):
        if not shown[t]:
            left_out.append(part)
            continue
        if left_out:
            result.append(f"<span class='gap'>⋯ {len(left_out)} tokens, {panel.text(sum(left_out))} ⋯</span>")
            left_out = []
        kinds = f"tk {'previous' if source.startswith('previous_') else source} {panel.colour(part)}"
        weight = panel.weight(t)
        style = f" style='--w:{weight:.2f}'" if weight >= 0.005 else ""
        result.append(f"<span class='{kinds}'{style} title='{panel.text(part)}'>{visible(token)}</span>")
        result.append("<br>" if token.endswith("\n") else "<wbr>")
    return "".join(result)
