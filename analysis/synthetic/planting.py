"""What to plant in a model, and which dimension of its residual stream means what."""

from __future__ import annotations

from dataclasses import dataclass

from headtune.analysis.utils.errors import InputError

MARKERS = (".", "-")  # the tokens after which an answer comes: END is one of them
PREVIOUS = (1, 2, 3)  # how many answers a prompt has already given
ROPE_THETA = 1e10
SUBJECT, ANSWER, BOS = range(3)  # key features


@dataclass(frozen=True)
class Planting:
    """What to plant. The same planting gives the same weights.

    Attributes:
        name: the kind of model, for tables.
        n_layers, n_heads, n_kv_heads, head_dim, d_model: sizes.
        seed: of everything random: places, strengths, facts, bases, noise.
        n_recall, n_suppression: heads of each role.
        n_pairs: redundant pairs, which recall together with the recall heads.
        n_subjects, n_answers, answers_per_subject: facts; answers are shared between subjects.
        noise: standard deviation of the activation that random weights add to every query, key and value feature (of
            size 1), and to MLP outputs.
        background: standard deviation, per feature, of what a background head writes; recall heads write about
            `1 / n_recall`.
        amplification: the last MLP adds this many times what the heads have written toward answers, so that the total
            effect of a head is `1 + amplification` times its direct one.
    """

    name: str = "gqa"
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 24
    d_model: int = 192
    seed: int = 0
    n_recall: int = 3
    n_suppression: int = 3
    n_pairs: int = 0
    n_subjects: int = 8
    n_answers: int = 12
    answers_per_subject: int = 6
    noise: float = 0.005
    background: float = 0.03
    amplification: float = 0.0

    @property
    def subjects(self) -> list[str]:
        return [f"Land{index:02d}" for index in range(self.n_subjects)]

    @property
    def answers(self) -> list[str]:
        return [f"town{index:02d}" for index in range(self.n_answers)]


@dataclass(frozen=True)
class Space:
    """Which dimension of the residual stream, in feature coordinates, means what.

    Attributes:
        constant: `2 sqrt(d_model)` at every position.
        types: is the token a subject, an answer, `<bos>`? In the order of the key features.
        marker: does an answer come next?
        helped: written by the helpers of recall and of suppression.
        announced: written by the primary of each redundant pair.
        subject, answer: which one is this token?
        output: answers promoted here; what W_U reads.
        free: without meaning.
    """

    constant: int
    types: range
    marker: int
    helped: range
    announced: range
    subject: range
    answer: range
    output: range
    free: range

    @classmethod
    def for_planting(cls, planting: Planting) -> Space:
        """The dimensions in order, as many of each as the planting needs."""
        taken = 0

        def take(n: int) -> range:
            nonlocal taken
            taken += n
            return range(taken - n, taken)

        return cls(
            constant=take(1)[0],
            types=take(3),
            marker=take(1)[0],
            helped=take(2),
            announced=take(planting.n_pairs),
            subject=take(planting.n_subjects),
            answer=take(planting.n_answers),
            output=take(planting.n_answers),
            free=take(max(0, planting.d_model - taken)),
        )

    @property
    def n_meant(self) -> int:
        """How many dimensions mean something."""
        return self.free.start

    @property
    def values(self) -> list[int]:
        """What every key-value group reads: identities, and whether the token is `<bos>`."""
        return [*self.subject, *self.answer, self.types[BOS]]


def slow_dimensions(head_dim: int) -> list[int]:
    """Rotary dimensions that turn by less than 0.01 over 32 positions (i and i + head_dim/2 turn together)."""
    half = head_dim // 2
    slow = [i for i in range(half) if 32 * ROPE_THETA ** (-i / half) < 0.01]
    return [*slow, *(i + half for i in slow)]


def check_planting(planting: Planting) -> None:
    """Refuse sizes that cannot hold what is to be planted (InputError)."""
    space = Space.for_planting(planting)
    p, least = planting, max(PREVIOUS) + 1
    slow, n_keys, n_values = len(slow_dimensions(p.head_dim)), len(space.types), len(space.values)
    needs = (
        (p.n_layers >= 3, f"n_layers={p.n_layers}", "at least 3: helpers, recall, suppression"),
        (p.n_heads % p.n_kv_heads == 0, f"n_kv_heads={p.n_kv_heads}", f"a divisor of n_heads={p.n_heads}"),
        (p.d_model % p.n_heads == 0, f"d_model={p.d_model}", f"a multiple of n_heads={p.n_heads}"),
        (p.d_model >= space.n_meant, f"d_model={p.d_model}", f"at least {space.n_meant}, the number of features"),
        (p.head_dim % 2 == 0, f"head_dim={p.head_dim}", "an even number"),
        (p.head_dim >= n_values, f"head_dim={p.head_dim}", f"at least {n_values}, the number of values"),
        (slow >= n_keys, f"head_dim={p.head_dim}", f"wide enough for {n_keys} slow rotary dimensions"),
        (p.n_recall >= 1, f"n_recall={p.n_recall}", "at least 1"),
        (p.n_suppression >= 1, f"n_suppression={p.n_suppression}", "at least 1"),
        (p.n_pairs >= 0, f"n_pairs={p.n_pairs}", "at least 0"),
        (2 <= p.n_subjects <= 100, f"n_subjects={p.n_subjects}", "2 to 100"),
        (least <= p.n_answers <= 100, f"n_answers={p.n_answers}", f"{least} to 100"),
        (
            least <= p.answers_per_subject <= p.n_answers,
            f"answers_per_subject={p.answers_per_subject}",
            f"{least} to n_answers={p.n_answers}",
        ),
    )
    for met, value, expected in needs:
        if not met:
            raise InputError(f"planting {p.name!r} has {value}; expected {expected}")
