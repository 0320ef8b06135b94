"""A causal language model seen as `n_layers x n_heads` attention heads."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .architectures import Architecture
from .attention import IMPLEMENTATION


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model takes; None where its configuration does not say.

    Learned positions end there; rotary ones go on, but the model was not made for them.
    """
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model has embeddings for; None where it does not say. A tokenizer may know more."""
    embeddings: Any = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None) or getattr(model.config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


@dataclass
class HeadModel:
    """A causal language model seen as `n_layers x n_heads` attention heads.

    Attributes:
        hf: the transformers model, in eval mode, with the row-recording attention (SDPA for everything else).
        tokenizer: its tokenizer.
        name: what the user called it.
        architecture: its family's row of the table.
        n_layers, n_heads, n_kv_heads, head_dim, d_model: sizes; `head_dim` is the projection's input width divided by
            `n_heads`, never `d_model // n_heads`.
        max_memory: bytes that batches of counterfactual runs may take (see `interventions.batches.rows_in_memory`).
        plain_attention: the implementation that the model came with (see `record_attention`).
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    architecture: Architecture
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    revision: str | None = None
    max_memory: int = 1 << 30
    plain_attention: str = "sdpa"

    @property
    def positions(self) -> int | None:
        """How many tokens the model takes; None where its configuration does not say."""
        return positions_of(self.hf)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model has embeddings for."""
        return vocabulary_of(self.hf)

    def record_attention(self, on: bool) -> None:
        """Switch between the attention whose rows can be recorded and the model's own, which training uses."""
        self.hf.set_attn_implementation(IMPLEMENTATION if on else self.plain_attention)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """In eval mode, with the attention whose rows can be recorded; afterwards as before."""
        training = [module for module in self.hf.modules() if module.training]
        implementation = self.hf.config._attn_implementation
        self.hf.eval()
        self.record_attention(True)
        try:
            yield
        finally:
            self.hf.set_attn_implementation(implementation)
            for module in training:
                module.training = True

    @property
    def device(self) -> torch.device:
        """Where tokens go and results come from: the input embedding's device. Layers may lie on others."""
        embedding: Any = self.hf.get_input_embeddings()
        device: torch.device = embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @cached_property
    def layers(self) -> list[nn.Module]:
        layers: Any = self.hf.get_submodule(self.architecture.layers)
        return list(layers)

    def attention(self, layer: int) -> nn.Module:
        """The attention block of a layer; the first item of its output is the projection's."""
        return self.layers[layer].get_submodule(self.architecture.attention)

    def projection(self, layer: int) -> nn.Module:
        """The attention output projection of a layer."""
        return self.attention(layer).get_submodule(self.architecture.output_projection)

    def attention_added(self, layer: int) -> nn.Module:
        """The module whose output is what a layer's attention adds to the residual stream."""
        return self.post_attention_norm(layer) or self.attention(layer)

    def post_attention_norm(self, layer: int) -> nn.Module | None:
        """The norm between a layer's attention block and the residual stream, in families that have one."""
        path = self.architecture.post_attention_norm
        return None if path is None else self.layers[layer].get_submodule(path)

    def mlp(self, layer: int) -> nn.Module:
        """The module whose output is what a layer's MLP adds to the residual stream."""
        return self.layers[layer].get_submodule(self.architecture.mlp)

    def output_weight(self, layer: int) -> Tensor:
        """`W_O` by head: `[n_heads, head_dim, d_model]`; a head's contribution is `z[l, h] @ W_O[l, h]`."""
        weight = self.projection(layer).weight
        in_out: Tensor = weight if self.architecture.in_out_weight else weight.T  # type: ignore[assignment]
        return in_out.reshape(self.n_heads, self.head_dim, self.d_model)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding."""
        return self.hf.get_submodule(self.architecture.final_norm)

    def norm_directions(self, norm: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
        """Carry directions back through one of the model's norms, linearised with this run's own scale.

        `norm(x) = gain * (x - mean(x)) / scale(x) + bias`; an RMSNorm has no mean and no bias. With the scale held at
        that of x, a part p of x contributes `direction . gain * (p - mean(p)) / scale(x) = result . p`: parts add up.

        Args:
            x: `[d_model]`, the norm's input.
            directions: `[n, d_model]`, for the norm's output.

        Returns:
            `[n, d_model]` float32, for the norm's input, on the norm's device.
        """
        weight: Any = norm.weight
        gain = weight.float() + self.architecture.gain_offset
        carried = directions.to(gain) * gain
        x = x.to(gain)
        if isinstance(norm, nn.LayerNorm):
            carried = carried - carried.mean(-1, keepdim=True)
            return carried * torch.rsqrt(x.var(unbiased=False) + norm.eps)
        epsilon: Any = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        return carried * torch.rsqrt(x.pow(2).mean() + epsilon)

    def unembedding_directions(self, residual: Tensor, tokens: Tensor) -> Tensor:
        """Residual-stream directions whose dot product with a component is its part of a token's logit.

        `u = J^T W_U[token]` with `J` the final norm linearised with this run's own scale (see `norm_directions`), so
        that parts add up: `logit[token] = u . residual (+ the norm's and the unembedding's bias)`. Where a model caps
        its logits (Gemma 2: `cap * tanh(logit / cap)`), this is the logit before the cap.

        What a layer's attention block puts out passes a norm of its own first in families that have one: its directions
        are `norm_directions(post_attention_norm(layer), attention output, u)`.

        Args:
            residual: `[d_model]`, the final norm's input at the position decoded.
            tokens: `[n]` token ids.

        Returns:
            `[n, d_model]` float32, on the final norm's device.
        """
        weight: Any = self.hf.get_output_embeddings().weight
        return self.norm_directions(self.final_norm, residual, weight[tokens.to(weight.device)])

    def next_tokens(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest token after each prompt, given as token ids, one pass each."""
        tokens = []
        with torch.no_grad():
            for row in rows:
                ids = torch.tensor([list(row)], device=self.device)
                tokens.append(int(self.hf(ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax()))
        return tokens

    def identity(self) -> dict[str, Any]:
        """The `model` block of heads.json: what a head set must match to be used again."""
        return {
            "name": self.name,
            "revision": self.revision,
            "config_sha256": self.config_sha256,
            "weights_sha256": self.weights_sha256,
            "model_type": self.hf.config.model_type,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @cached_property
    def config_sha256(self) -> str:
        """SHA-256 of the configuration, less what depends on the library or on how it was loaded."""
        config = self.hf.config.to_dict()
        for key in ("transformers_version", "_name_or_path", "dtype", "use_cache", "_attn_implementation"):
            config.pop(key, None)
        return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over name and bytes of every parameter, in name order, as loaded."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.hf.named_parameters()):
            digest.update(name.encode())
            stored: Any = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
            digest.update(stored)
        return digest.hexdigest()
