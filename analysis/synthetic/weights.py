"""The weights of a planted model, written down: which head gets which role, and the circuits that make it play it.

Everything is written in feature coordinates, one dimension of the residual stream a feature (see `Space`), and rotated
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
from .planting import ANSWER, BOS, MARKERS, PREVIOUS, SUBJECT, Planting, Space, slow_dimensions

Matrix = NDArray[np.float64]

_NORM_GAIN = 2.0
_LOGITS = 6.0  # norm of an answer's row of W_U: the recall heads together write about 1, so 6 logits
_LARGE = 3.0  # how many times as strong a decoy's OV circuit is
# Attention logits, in prompts of 8 to 20 tokens.
_MARKER, _HELPED = 2.5, 3.5  # query at a marker: about half the attention without the helper, nearly all with it
_SURE = 8.0
_INHIBITED = 4.0  # what a primary's word takes from its backup's logit: about a third of the attention is left


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
    space: Space,
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

    look_at_subject, look_at_previous = looking(SUBJECT, 0), looking(ANSWER, 1)
    n_promoters = planting.n_recall + planting.n_pairs

    # Recall and suppression heads.
    heads: dict[Head, _PlantedHead] = {}
    for place in roles["recall"]:
        heads[place] = _PlantedHead(look_at_subject, generator.uniform(0.8, 1.2) / n_promoters * recall_circuit)
    for place in roles["suppression"]:
        strength = max(PREVIOUS) * generator.uniform(0.8, 1.2) / planting.n_suppression
        heads[place] = _PlantedHead(look_at_previous, strength * suppression_circuit)

    # Helpers, which write what the others look with.
    of_recall, of_suppression = empty(), empty()
    of_recall[space.helped[0], -1] = 1.0  # <bos> has been read
    of_suppression[space.helped[1], n_subjects:-1] = 1.0  # some answer has been read
    for place, kind, output in zip(roles["helper"], (BOS, ANSWER), (of_recall, of_suppression), strict=True):
        heads[place] = _PlantedHead({(kind, space.marker): _SURE}, output)

    # Redundant pairs, then decoys.
    pairs = zip(space.announced, roles["redundant"][::2], roles["redundant"][1::2], strict=True)
    for announced, primary, backup in pairs:
        output = recall_circuit / n_promoters
        announcing = output.copy()
        announcing[announced, :n_subjects] = 1.0
        heads[primary] = _PlantedHead(look_at_subject, announcing)
        heads[backup] = _PlantedHead(look_at_subject | {(SUBJECT, announced): -_INHIBITED}, output)

    for place, look in zip(roles["decoy_attends"], (look_at_subject, look_at_previous), strict=True):
        heads[place] = _PlantedHead(look, empty())
    circuits = (recall_circuit / n_promoters, suppression_circuit * max(PREVIOUS) / planting.n_suppression)
    for place, kind, output in zip(roles["decoy_writes"], (SUBJECT, ANSWER), circuits, strict=True):
        everywhere = _SURE / _constant(planting)
        away = {(kind, space.constant): everywhere, (BOS, space.marker): 2 * _SURE}
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
    space = Space.for_planting(planting)
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
    slow = slow_dimensions(width)
    fast = sorted(set(range(width)) - set(slow))
    # Layer by layer: keys and values of each group, queries and outputs of its heads, and the MLP.
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
    planting: Planting, space: Space, vocabulary: Mapping[str, int], generator: np.random.Generator
) -> tuple[Matrix, Matrix]:
    """Embedding and unembedding, `[vocabulary, d_model]`."""
    size, d_model = len(vocabulary), planting.d_model
    embedding = np.zeros((size, d_model))
    scale = 1 / math.sqrt(max(1, len(space.free)))  # as much as one feature, all together
    embedding[:, space.free] = scale * generator.standard_normal((size, len(space.free)))
    embedding[:, space.constant] = _constant(planting)
    embedding[vocabulary["<bos>"], space.types[BOS]] = 1
    embedding[[vocabulary[word] for word in MARKERS], space.marker] = 1
    unembedding = 0.1 * generator.standard_normal((size, d_model))
    unembedding[:, space.constant] = 0
    subjects = [vocabulary[word] for word in planting.subjects]
    answers = [vocabulary[word] for word in planting.answers]
    embedding[subjects, space.types[SUBJECT]] = 1
    embedding[subjects, space.subject] = 1
    embedding[answers, space.types[ANSWER]] = 1
    embedding[answers, space.answer] = 1
    unembedding[answers, space.output] += _LOGITS
    return embedding, unembedding


def _mlp_weights(
    planting: Planting,
    space: Space,
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
