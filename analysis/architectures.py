"""One row of data per model family: where its layers, attention output projections and norms are.

Nothing else in headtune knows a family by name. Paths are attribute paths, those of `layers`, `final_norm` from the
causal language model, the others from one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import InputError


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
        export: how an offset on a head becomes part of a stock checkpoint. `bias`: the projection has a bias;
            `attention_bias`: the family's config flag adds it (with q, k, v biases, written as zeros);
            `none`: the family has no such bias.
        input_biases: the projections that `attention_bias` gives a bias besides the output projection.
        mlp: path, within one layer, of the last module of the MLP: its output is what is added to the residual stream.
        post_attention_norm: path, within one layer, of a norm between the attention block and the residual stream: what
            is added is `norm(attention output)`. None where the attention output is added as it is.
        gain_offset: added to a norm's weight to make its gain; Gemma's norms multiply by `1 + weight`.
    """

    layers: str
    attention: str
    output_projection: str
    final_norm: str
    export: Literal["bias", "attention_bias", "none"]
    in_out_weight: bool = False
    input_biases: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    mlp: str = "mlp"
    post_attention_norm: str | None = None
    gain_offset: float = 0.0


_LLAMA = ("model.layers", "self_attn", "o_proj", "model.norm")
_GEMMA = Architecture(
    *_LLAMA,
    export="attention_bias",
    mlp="post_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    gain_offset=1.0,
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(*_LLAMA, export="attention_bias"),
    "mistral": Architecture(*_LLAMA, export="none"),
    "qwen2": Architecture(*_LLAMA, export="none"),
    "qwen3": Architecture(*_LLAMA, export="attention_bias"),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Architecture(*_LLAMA, export="none"),
    "gpt2": Architecture("transformer.h", "attn", "c_proj", "transformer.ln_f", export="bias", in_out_weight=True),
    "opt": Architecture(
        "model.decoder.layers", "self_attn", "out_proj", "model.decoder.final_layer_norm", export="bias", mlp="fc2"
    ),
    "gpt_neox": Architecture("gpt_neox.layers", "attention", "dense", "gpt_neox.final_layer_norm", export="bias"),
    "phi": Architecture("model.layers", "self_attn", "dense", "model.final_layernorm", export="bias"),
}


def architecture_of(model_type: str) -> Architecture:
    """The row of `model_type` (a transformers config's `model_type`).

    Raises:
        InputError: the family is not in the table; the message lists those that are.
    """
    if model_type not in ARCHITECTURES:
        raise InputError(f"model family {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]
