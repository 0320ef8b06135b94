"""The weights of a planted model, written down: which head gets which role, and the circuits that make it play it.

Everything is written in feature coordinates, one dimension of the residual stream a feature (see `_Space`), and rotated
by a random orthogonal matrix at the end. A constant `c = 2 sqrt(d_model)` dominates the residual stream and RMSNorm's
gain is 2, so that `norm(x)` is x to a few percent. Keys are token types, in the slowest rotary dimensions, which a
prompt does not turn; values are identities, in a random basis. Keys and values are the same for all heads of a
key-value group, so a role is a matter of each query head's W_Q and W_O, as grouped-query attention wants it.

The roles themselves are described in `planted`, which makes models of these weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from headtune.analysis.utils.errors import InputError

from .metrics import Head

Matrix = NDArray[np.float64]

MARKERS = (".", "-")  # the tokens after which an answer comes: END is one of them
PREVIOUS = (1, 2, 3)  # how many answers a prompt has already given
ROPE_THETA = 1e10
_NORM_GAIN = 2.0
_LOGITS = 6.0  # norm of an answer's row of W_U: the recall heads together write about 1, so 6 logits
_LARGE = 3.0  # how many times as strong a decoy's OV circuit is
# Attention logits, in prompts of 8 to 20 tokens.
_MARKER, _HELPED = 2.5, 3.5  # query at a marker: about half the attention without the helper, nearly all with it
_SURE = 8.0
_INHIBITED = 4.0  # what a primary's word takes from its backup's logit: about a third of the attention is left


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


# --- the residual stream ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Space:
    """Which dimension of the residual stream, in feature coordinates, means what.

    Attributes:
        constant: `2 sqrt(d_model)` at every position.
        types: is the token a subject, an answer, `<bos>`? In the order of the key features.
        marker: does an answer come next?
        helped: written by the helpers of recall and of suppression.
        said: written by the primary of each redundant pair.
        subject, answer: which one is this token?
        output: answers promoted here; what W_U reads.
        free: without meaning.
    """

    constant: int
    types: range
    marker: int
    helped: range
    said: range
    subject: range
    answer: range
    output: range
    free: range

    @classmethod
    def of(cls, planting: Planting) -> _Space:
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
            said=take(planting.n_pairs),
            subject=take(planting.n_subjects),
            answer=take(planting.n_answers),
            output=take(planting.n_answers),
            free=take(max(0, planting.d_model - taken)),
        )

    @property
    def n_meant(self) -> int:
        return self.free.start

    @property
    def values(self) -> list[int]:
        """What every key-value group reads: identities, and whether the token is `<bos>`."""
        return [*self.subject, *self.answer, self.types[_BOS]]


_SUBJECT, _ANSWER, _BOS = range(3)  # key features


def _slow_dimensions(head_dim: int) -> list[int]:
    """Rotary dimensions that turn by less than 0.01 over 32 positions (i and i + head_dim/2 turn together)."""
    half = head_dim // 2
    slow = [i for i in range(half) if 32 * ROPE_THETA ** (-i / half) < 0.01]
    return [*slow, *(i + half for i in slow)]


def check_planting(planting: Planting) -> None:
    """Refuse sizes that cannot hold what is to be planted (InputError)."""
    space = _Space.of(planting)
    p, least = planting, max(PREVIOUS) + 1
    slow, n_keys, n_values = len(_slow_dimensions(p.head_dim)), len(space.types), len(space.values)
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


# --- the heads --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PlantedHead:
    """The query and output circuits of one head, in feature coordinates.

    Attributes:
        query: (key feature, residual feature) -> attention logit between a query that has the one and a key that has
            the other.
        output: `[d_model, n_values]` what is written for each value read.
    """

    query: Mapping[tuple[int, int], float]
    output: Matrix = field(repr=False)


def assign_roles(planting: Planting, generator: np.random.Generator) -> dict[str, tuple[Head, ...]]:
    """Give every head one role: helpers in the first layer, suppression in the last two, recall in between, each
    backup above its primary, decoys anywhere above the helpers.

    Raises:
        InputError: more roles than heads in some layer.
    """
    last = planting.n_layers - 1
    vacant = [generator.permutation(planting.n_heads).tolist() for _ in range(planting.n_layers)]

    def deal(n: int, first: int, final: int, offset: int = 0) -> tuple[Head, ...]:
        dealt = []
        for index in range(n):
            layer = first + (index + offset) % (final - first + 1)
            if not vacant[layer]:
                raise InputError(
                    f"planting {planting.name!r} has more roles than n_heads={planting.n_heads} in layer {layer}; "
                    "give it more heads or layers"
                )
            dealt.append((layer, vacant[layer].pop()))
        return tuple(dealt)

    roles = {
        "recall": deal(planting.n_recall, 1, last - 1),
        "suppression": deal(planting.n_suppression, last - 1, last),
        "helper": deal(2, 0, 0),
        "decoy_attends": deal(2, 1, last),
        "decoy_writes": deal(2, 1, last, offset=2),
        "redundant": tuple(
            head for _ in range(planting.n_pairs) for head in (*deal(1, 1, last - 1), *deal(1, last, last))
        ),
    }
    rest = [(layer, head) for layer, heads in enumerate(vacant) for head in sorted(heads)]
    return roles | {"background": tuple(rest)}


def _planted_heads(
    planting: Planting,
    space: _Space,
    roles: Mapping[str, tuple[Head, ...]],
    facts: Mapping[str, list[str]],
    generator: np.random.Generator,
) -> dict[Head, _PlantedHead]:
    """The circuits of all heads but the background's.

    The recall heads (and pairs) write about 1 in all; the suppression heads 3, which attention divides between up to
    three previous answers.
    """
    n_values, n_subjects = len(space.values), planting.n_subjects

    def empty() -> Matrix:
        return np.zeros((planting.d_model, n_values))

    recall_circuit, suppression_circuit = empty(), empty()
    recall_circuit[space.output, :n_subjects] = [
        [float(answer in facts[subject]) for subject in planting.subjects] for answer in planting.answers
    ]
    suppression_circuit[space.output, n_subjects:-1] = -np.eye(planting.n_answers)

    def looking(kind: int, helper: int) -> dict[tuple[int, int], float]:
        return {(kind, space.marker): _MARKER, (kind, space.helped[helper]): _HELPED}

    look_at_subject, look_at_previous = looking(_SUBJECT, 0), looking(_ANSWER, 1)
    n_promoters = planting.n_recall + planting.n_pairs

    heads: dict[Head, _PlantedHead] = {}
    for place in roles["recall"]:
        heads[place] = _PlantedHead(look_at_subject, generator.uniform(0.8, 1.2) / n_promoters * recall_circuit)
    for place in roles["suppression"]:
        strength = max(PREVIOUS) * generator.uniform(0.8, 1.2) / planting.n_suppression
        heads[place] = _PlantedHead(look_at_previous, strength * suppression_circuit)

    of_recall, of_suppression = empty(), empty()
    of_recall[space.helped[0], -1] = 1.0  # <bos> has been read
    of_suppression[space.helped[1], n_subjects:-1] = 1.0  # some answer has been read
    for place, kind, output in zip(roles["helper"], (_BOS, _ANSWER), (of_recall, of_suppression), strict=True):
        heads[place] = _PlantedHead({(kind, space.marker): _SURE}, output)

    pairs = zip(space.said, roles["redundant"][::2], roles["redundant"][1::2], strict=True)
    for said, primary, backup in pairs:
        output = recall_circuit / n_promoters
        announcing = output.copy()
        announcing[said, :n_subjects] = 1.0
        heads[primary] = _PlantedHead(look_at_subject, announcing)
        heads[backup] = _PlantedHead(look_at_subject | {(_SUBJECT, said): -_INHIBITED}, output)

    for place, look in zip(roles["decoy_attends"], (look_at_subject, look_at_previous), strict=True):
        heads[place] = _PlantedHead(look, empty())
    circuits = (recall_circuit / n_promoters, suppression_circuit * max(PREVIOUS) / planting.n_suppression)
    for place, kind, output in zip(roles["decoy_writes"], (_SUBJECT, _ANSWER), circuits, strict=True):
        everywhere = _SURE / _constant(planting)
        away = {(kind, space.constant): everywhere, (_BOS, space.marker): 2 * _SURE}
        heads[place] = _PlantedHead(away, _LARGE * output)
    return heads


# --- the weights ------------------------------------------------------------------------------------------------------


def _constant(planting: Planting) -> float:
    return _NORM_GAIN * math.sqrt(planting.d_model)


def state_dict(
    planting: Planting,
    roles: Mapping[str, tuple[Head, ...]],
    facts: Mapping[str, list[str]],
    vocabulary: Mapping[str, int],
    generator: np.random.Generator,
) -> dict[str, Matrix]:
    """All weights of a `LlamaForCausalLM` by name, whose heads play `roles` and know `facts`.

    Args:
        facts: subject -> answers.
        vocabulary: token -> id; holds `<bos>`, the markers, all subjects and all answers.
    """
    space = _Space.of(planting)
    heads = _planted_heads(planting, space, roles, facts, generator)
    d_model, noise, constant = planting.d_model, planting.noise, _constant(planting)

    def reading(n: int, std: float) -> Matrix:
        """Random `[n, d_model]` whose output has about `std` from the constant and from every feature of size 1."""
        weight = std * generator.standard_normal((n, d_model))
        weight[:, space.constant] /= constant
        return weight

    def orthogonal(n: int) -> Matrix:
        q, r = np.linalg.qr(generator.standard_normal((n, n)))
        return np.asarray(q * np.sign(np.diag(r)))  # signs fixed: the same on every machine

    rotation = orthogonal(d_model)
    embedding, unembedding = _vocabulary_weights(planting, space, vocabulary, generator)
    state = {
        "model.embed_tokens.weight": embedding @ rotation.T,
        "lm_head.weight": unembedding @ rotation.T,
        "model.norm.weight": np.full(d_model, _NORM_GAIN),
    }
    width, group = planting.head_dim, planting.n_heads // planting.n_kv_heads
    slow = _slow_dimensions(width)
    fast = sorted(set(range(width)) - set(slow))
    for layer in range(planting.n_layers):
        queries, keys, values, outputs = [], [], [], []
        for kv_head in range(planting.n_kv_heads):
            slots = generator.permutation(slow)[: len(space.types)]
            basis = orthogonal(width)[:, : len(space.values)]
            key, value = reading(width, noise), reading(width, noise)
            key[slots, space.types] += 1
            key[fast, space.constant] += generator.standard_normal(len(fast)) / constant  # seen by position only
            value[:, space.values] += basis
            keys.append(key)
            values.append(value)
            for index in range(kv_head * group, (kv_head + 1) * group):
                planted = heads.get((layer, index))
                query = reading(width, math.sqrt(width) * (noise if planted else 1.0))
                if planted:
                    for (kind, feature), logit in planted.query.items():
                        query[slots[kind], feature] += math.sqrt(width) * logit
                    output = planted.output @ basis.T
                else:
                    output = planting.background * generator.standard_normal((d_model, width))
                    output[space.values] = 0  # or a strong decoy would read at <bos> what the background wrote there
                queries.append(query)
                outputs.append(output)
        gate, up, down = _mlp_weights(planting, space, layer, reading, generator)
        prefix = f"model.layers.{layer}."
        state |= {
            f"{prefix}input_layernorm.weight": np.full(d_model, _NORM_GAIN),
            f"{prefix}post_attention_layernorm.weight": np.full(d_model, _NORM_GAIN),
            f"{prefix}self_attn.q_proj.weight": np.concatenate(queries) @ rotation.T,
            f"{prefix}self_attn.k_proj.weight": np.concatenate(keys) @ rotation.T,
            f"{prefix}self_attn.v_proj.weight": np.concatenate(values) @ rotation.T,
            f"{prefix}self_attn.o_proj.weight": rotation @ np.concatenate(outputs, axis=1),
            f"{prefix}mlp.gate_proj.weight": gate @ rotation.T,
            f"{prefix}mlp.up_proj.weight": up @ rotation.T,
            f"{prefix}mlp.down_proj.weight": rotation @ down,
        }
    return state


def _vocabulary_weights(
    planting: Planting, space: _Space, vocabulary: Mapping[str, int], generator: np.random.Generator
) -> tuple[Matrix, Matrix]:
    """Embedding and unembedding, `[vocabulary, d_model]`."""
    size, d_model = len(vocabulary), planting.d_model
    embedding = np.zeros((size, d_model))
    scale = 1 / math.sqrt(max(1, len(space.free)))  # as much as one feature, all together
    embedding[:, space.free] = scale * generator.standard_normal((size, len(space.free)))
    embedding[:, space.constant] = _constant(planting)
    embedding[vocabulary["<bos>"], space.types[_BOS]] = 1
    embedding[[vocabulary[word] for word in MARKERS], space.marker] = 1
    unembedding = 0.1 * generator.standard_normal((size, d_model))
    unembedding[:, space.constant] = 0
    subjects = [vocabulary[word] for word in planting.subjects]
    answers = [vocabulary[word] for word in planting.answers]
    embedding[subjects, space.types[_SUBJECT]] = 1
    embedding[subjects, space.subject] = 1
    embedding[answers, space.types[_ANSWER]] = 1
    embedding[answers, space.answer] = 1
    unembedding[answers, space.output] += _LOGITS
    return embedding, unembedding


def _mlp_weights(
    planting: Planting,
    space: _Space,
    layer: int,
    reading: Callable[[int, float], Matrix],
    generator: np.random.Generator,
) -> tuple[Matrix, Matrix, Matrix]:
    """Gate, up and down projections: noise, and in the last layer one ever-open unit an answer that amplifies it."""
    units, opened = 2 * planting.n_answers, 4.0
    gate, up = reading(units, 0.5), reading(units, 0.5)
    down = planting.noise / math.sqrt(units) * generator.standard_normal((planting.d_model, units))
    if layer == planting.n_layers - 1 and planting.amplification:
        of_answers = range(planting.n_answers)
        gate[of_answers], up[of_answers], down[:, of_answers] = 0, 0, 0
        gate[of_answers, space.constant] = opened / _constant(planting)
        up[of_answers, space.output] = 1
        silu = opened / (1 + math.exp(-opened))
        down[space.output, of_answers] = planting.amplification / silu
    return gate, up, down
