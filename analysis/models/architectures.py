"""One row of data per model family: where its layers, attention output projections and norms are.

Nothing else in headtune knows a family by name. Paths are attribute paths, those of `layers`, `final_norm` from the
causal language model, the others from one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from headtune.analysis.utils.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps what headtune reads and changes.

    Attributes:
        layers: path of the list of decoder layers.
        attention: path of the attention block within a layer.
        output_projection: name, within the attention block, of the projection whose *input* is
            `[batch, seq, n_heads * head_dim]`, heads contiguous in order.
        final_norm: path of the norm before the unembedding.
        in_out_weight: the projection stores its weight as `[in, out]` (GPT-2's Conv1D), not `[out, in]`.
        bias_flags: config flags of the family, each of which gives a bias to projections that have none without it. An
            offset on a head or an MLP is exported as such a bias; a family whose projections all have one needs none.
        bias_caveat: what the model card says of those biases where other programs are known to leave them out.
        twin: a family of the same computation that has flags where this one has none; what keeps a model from being
            written as its twin is in `headtune.train.tuners.convert`.
        fused: projections, by their path within a layer, that the twin has in parts, in the order of the rows.
        mlp: path, within one layer, of the last module of the MLP: its output is what is added to the residual stream.
        post_attention_norm: path, within one layer, of a norm between the attention block and the residual stream: what
            is added is `norm(attention output)`. None where the attention output is added as it is.
        gain_offset: added to a norm's weight to make its gain; Gemma's norms multiply by `1 + weight`.
        mlp_projection: path, within one layer, of the last linear projection of the MLP, whose output is what the MLP
            adds to the residual stream. None where a norm follows it.
        qkv: names, within the attention block, of the projections to queries, keys and values: three, or one fused.
        qkv_layout: order of the outputs of `qkv`, in blocks of head_dim. `separate`: a projection each for the query
            heads, the key heads and the value heads; `blocks`: one projection, all query heads, then all key heads,
            then all value heads; `per_head`: one projection, query, key and value of head 0, then of head 1, and so on.
    """

    layers: str
    attention: str
    output_projection: str
    final_norm: str
    in_out_weight: bool = False
    bias_flags: tuple[str, ...] = ()
    bias_caveat: str = ""
    twin: str | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mlp: str = "mlp"
    post_attention_norm: str | None = None
    gain_offset: float = 0.0
    mlp_projection: str | None = "mlp.down_proj"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_layout: Literal["separate", "blocks", "per_head"] = "separate"


_LLAMA = ("model.layers", "self_attn", "o_proj", "model.norm")
_GEMMA = Architecture(
    *_LLAMA,
    bias_flags=("attention_bias",),
    mlp="post_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    gain_offset=1.0,
    mlp_projection=None,
)

_QWEN3_CAVEAT = (
    "vLLM's own implementation of Qwen3 (as of 2025) has no bias on the attention output projection and skips this one "
    "in silence: serve the checkpoint with `--model-impl transformers`."
)
_PHI3_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(*_LLAMA, bias_flags=("attention_bias", "mlp_bias")),
    "mistral": Architecture(*_LLAMA, twin="llama"),
    "qwen2": Architecture(*_LLAMA, twin="llama"),
    "qwen3": Architecture(*_LLAMA, bias_flags=("attention_bias",), bias_caveat=_QWEN3_CAVEAT),
    "gemma": Architecture(*_LLAMA, bias_flags=("attention_bias",), gain_offset=1.0),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Architecture(*_LLAMA, twin="llama", fused=_PHI3_FUSED, qkv=("qkv_proj",), qkv_layout="blocks"),
    "gpt2": Architecture(
        "transformer.h",
        "attn",
        "c_proj",
        "transformer.ln_f",
        in_out_weight=True,
        mlp_projection="mlp.c_proj",
        qkv=("c_attn",),
        qkv_layout="blocks",
    ),
    "opt": Architecture(
        "model.decoder.layers",
        "self_attn",
        "out_proj",
        "model.decoder.final_layer_norm",
        bias_flags=("enable_bias",),
        mlp="fc2",
        mlp_projection="fc2",
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        "attention",
        "dense",
        "gpt_neox.final_layer_norm",
        bias_flags=("attention_bias",),
        mlp_projection="mlp.dense_4h_to_h",
        qkv=("query_key_value",),
        qkv_layout="per_head",
    ),
    "phi": Architecture("model.layers", "self_attn", "dense", "model.final_layernorm", mlp_projection="mlp.fc2"),
}


# Families without a row, as `structure` found them in a model of this process.
FOUND: dict[str, Architecture] = {}


def architecture_of(model_type: str) -> Architecture:
    """The row of `model_type` (a transformers config's `model_type`), or what was found in a model of this process.

    Raises:
        InputError: the family is not in the table, and no model of it was looked at.
    """
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if model_type in FOUND:
        return FOUND[model_type]
    raise InputError(
        f"model family {model_type!r} has no row; load a model of it first; rows: {', '.join(ARCHITECTURES)}"
    )
