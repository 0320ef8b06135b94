"""Tiny models for the logit lens and causal tracing, and attention written out in loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headtune.analysis.interventions.intervention import Intervention
from headtune.analysis.models.attention import AttentionCall
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from helpers.tiny import tiny_model, tiny_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 12},
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
    "phi": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": None, "sliding_window": 6, "max_position_embeddings": 256,
    },
}  # fmt: skip


def model_of(family: str) -> HeadModel:
    attention = "eager" if family == "gemma2" else "sdpa"
    return wrap_model(tiny_model(family, attn_implementation=attention, **SIZES[family]), tiny_tokenizer(), family)


def slow_attention(row: Intervention, end: int) -> Any:
    """Attention head by head and query by query, with a row's knock-out from END on."""

    def attend(call: AttentionCall) -> Tensor:
        batch, n_heads, n_queries, _ = call.query.shape
        group = n_heads // call.key.shape[1]
        out = torch.zeros_like(call.query)
        for b in range(batch):
            for h in range(n_heads):
                for q in range(n_queries):
                    scores = call.key[b, h // group, : q + 1] @ call.query[b, h, q] * call.scaling
                    if call.softcap is not None:
                        scores = call.softcap * torch.tanh(scores / call.softcap)
                    if call.mask is not None:
                        scores = scores.masked_fill(~call.mask[0, 0, q, : q + 1], float("-inf"))
                    weights = scores.softmax(-1)
                    if q >= end and (row.layers is None or call.layer in row.layers):
                        weights[[p for p in row.knocked_out if p <= q]] = 0
                        if row.renormalise:
                            weights = weights / weights.sum()
                    out[b, h, q] = weights @ call.value[b, h // group, : q + 1]
        return out.transpose(1, 2)

    return attend
