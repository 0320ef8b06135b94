"""A head's dashboard on the report, made ready for `templates/head_dashboard.html.j2`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headtune.analysis.heads.head_set import RankedHead

from .head_profiles import Copying, HeadProfile, Prompt
from .html import percent, signed

SOURCE_NAMES = {
    "subject": "subject",
    "previous": "given answers",
    "first": "first token",
    "end": "last token",
    "rest": "everything else",
}
ANSWERS = {"target": "remaining answers", "previous": "given answers"}
LONG_PROMPT, QUIET, CONTEXT = 80, 0.05, 4  # of a longer prompt, tokens below 5% of the strongest are left out
OPEN_CARDS = 2
NAMED_MASS = 0.05  # of attention: a source below it is not worth a word
NAMED_ANSWERS = 6


@dataclass(frozen=True)
class Piece:
    """A token of a drawn prompt, or, with `left_out`, so many tokens that are counted and not drawn.

    Attributes:
        token: its string.
        value: its number, or the sum over those left out, as text.
        kinds: CSS classes: the token's source and its colour.
        weight: how strongly it is shaded, 0 to 1.
    """

    value: str
    token: str = ""
    kinds: str = ""
    weight: float = 0.0
    left_out: int = 0


@dataclass(frozen=True)
class Panel:
    """The prompt with one number a token.

    Attributes:
        limit: what the darkest shade stands for.
        pieces: what is drawn, in order.
        strongest: the three tokens with the largest numbers, and these as text.
    """

    title: str
    limit: float
    pieces: list[Piece]
    strongest: list[tuple[str, str]]


@dataclass(frozen=True)
class Dashboard:
    """What the template shows of one head of a role.

    Attributes:
        anchor: its id on the page.
        rank: within the role, from 1; the first OPEN_CARDS are open.
        attention: (source, mass), all of them.
        mostly: those with a mass of NAMED_MASS or more, largest first.
        verdicts: `copies` or `suppresses`, and the sources of `mostly` that the head does it to.
        copying: (source, rank of the own token in words, test).
        panels: the prompt with attention, then with the parts of the attributions, in logits.
    """

    anchor: str
    name: str
    role: str
    rank: int
    open: bool
    profile: HeadProfile
    attention: list[tuple[str, float]]
    mostly: list[tuple[str, float]]
    verdicts: list[tuple[str, list[str]]]
    copying: list[tuple[str, str, Copying]]
    panels: list[Panel]
    named_answers: int = NAMED_ANSWERS


def dashboard(head: RankedHead, role: str, rank: int, profile: HeadProfile) -> Dashboard:
    """The dashboard of a head from its profile."""
    ordered = sorted(profile.attention.items(), key=lambda item: -item[1])
    mostly = [(source, mass) for source, mass in ordered if mass >= NAMED_MASS]
    verdicts = []
    for verdict in ("copies", "suppresses"):
        sources = [s for s, _ in mostly if s in profile.copying and profile.copying[s].verdict == verdict]
        if sources:
            verdicts.append((verdict, [SOURCE_NAMES[source] for source in sources]))
    copied = {"subject": "subject", "previous": "given answer"}
    return Dashboard(
        anchor=f"{role}-{head.name}".replace(" ", "-"),
        name=head.name,
        role=role,
        rank=rank,
        open=rank <= OPEN_CARDS,
        profile=profile,
        attention=[(SOURCE_NAMES[source], mass) for source, mass in profile.attention.items()],
        mostly=[(SOURCE_NAMES[source], mass) for source, mass in mostly],
        verdicts=verdicts,
        copying=[(copied[source], _rank(test.above), test) for source, test in profile.copying.items()],
        panels=_panels(profile.prompt),
    )


def _rank(above: float) -> str:
    if above in (0, 1):
        return "last of all" if above else "first of all"
    return f"top {100 * above:.2g}%" if above <= 0.5 else f"bottom {100 * (1 - above):.2g}%"


# --- one prompt -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Numbers:
    """One number a token: `limit` is drawn strongest."""

    title: str
    parts: Sequence[float]
    limit: float
    text: Callable[[float], str]
    colour: Callable[[float], str]

    def weight(self, t: int) -> float:
        return abs(self.parts[t]) / self.limit if self.limit else 0.0


def _panels(prompt: Prompt) -> list[Panel]:
    """Attention, then the parts in logits, which share a scale."""
    toward = {name: parts for name, parts in (("target", prompt.target), ("previous", prompt.previous)) if parts}
    limit = max(abs(part) for parts in toward.values() for part in parts)
    attention = _Numbers("attention", prompt.attention, max(prompt.attention), percent, lambda _: "a")
    logits = [
        _Numbers(
            f"moves the {ANSWERS[name]} by {signed(sum(parts))}",
            parts,
            limit,
            signed,
            lambda part: "p" if part > 0 else "n",
        )
        for name, parts in toward.items()
    ]
    everything = [attention, *logits]
    drawn = _drawn([max(numbers.weight(t) for numbers in everything) for t in range(len(prompt.tokens))])
    result = []
    for numbers in everything:
        strongest = sorted(range(len(numbers.parts)), key=lambda t: -numbers.weight(t))[:3]
        listed = [(prompt.tokens[t], numbers.text(numbers.parts[t])) for t in strongest]
        result.append(Panel(numbers.title, numbers.limit, _pieces(prompt, numbers, drawn), listed))
    return result


def _drawn(weights: Sequence[float]) -> list[bool]:
    """Which tokens of a prompt are drawn: all of a short one; of a long one those that carry weight, with context."""
    n = len(weights)
    if n <= LONG_PROMPT:
        return [True] * n
    loud = [0, n - 1, *(t for t, weight in enumerate(weights) if weight >= QUIET)]
    near = {t for at in loud for t in range(at - CONTEXT, at + CONTEXT + 1)}
    return [t in near for t in range(n)]


def _pieces(prompt: Prompt, numbers: _Numbers, drawn: Sequence[bool]) -> list[Piece]:
    result: list[Piece] = []
    left_out: list[float] = []
    for t, (token, source, part) in enumerate(zip(prompt.tokens, prompt.sources, numbers.parts, strict=True)):
        if not drawn[t]:
            left_out.append(part)
            continue
        if left_out:
            result.append(Piece(numbers.text(sum(left_out)), left_out=len(left_out)))
            left_out = []
        kinds = f"tk {'previous' if source.startswith('previous_') else source} {numbers.colour(part)}"
        result.append(Piece(numbers.text(part), token, kinds, numbers.weight(t)))
    return result
