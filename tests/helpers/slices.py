"""Where the slices of heads lie in the weights, worked out plainly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headtune.train.tuners.head_slices import PARTS
from helpers.tiny import D_MODEL, N_HEADS, Kind


def batch() -> Tensor:
    return torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch(), use_cache=False).logits
    return found


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(batch(), labels=batch(), use_cache=False).loss
    return loss


def slice_of(kind: Kind, layer: int, head: int, part: str) -> tuple[str, int, int]:
    """Of one head: the weight, the axis, and where on it the slice of `head_dim` begins."""
    size, group = kind.head_dim, head // (N_HEADS // kind.n_kv_heads)
    own = size * (group if part in "kv" else head)
    match kind.family:
        case "gpt2":  # Conv1D: [in, out]; q, k, v one after the other
            if part == "o":
                return f"transformer.h.{layer}.attn.c_proj.weight", 0, own
            return f"transformer.h.{layer}.attn.c_attn.weight", 1, own + D_MODEL * "qkv".index(part)
        case "gpt_neox":  # q, k, v of a head, then of the next
            if part == "o":
                return f"gpt_neox.layers.{layer}.attention.dense.weight", 1, own
            start = head * 3 * size + size * "qkv".index(part)
            return f"gpt_neox.layers.{layer}.attention.query_key_value.weight", 0, start
        case "phi3":
            if part == "o":
                return f"model.layers.{layer}.self_attn.o_proj.weight", 1, own
            before = {"q": 0, "k": N_HEADS, "v": N_HEADS + kind.n_kv_heads}[part]
            return f"model.layers.{layer}.self_attn.qkv_proj.weight", 0, own + size * before
        case "opt":
            name = "out" if part == "o" else part
            return f"model.decoder.layers.{layer}.self_attn.{name}_proj.weight", int(part == "o"), own
        case "phi" if part == "o":
            return f"model.layers.{layer}.self_attn.dense.weight", 1, own
        case _:
            return f"model.layers.{layer}.self_attn.{part}_proj.weight", int(part == "o"), own


def masks_of(kind: Kind, heads: list[list[int]], parts: tuple[str, ...] = PARTS) -> dict[str, tuple[int, list[int]]]:
    """By weight: the head axis and the trained positions on it, ascending."""
    found: dict[str, tuple[int, set[int]]] = {}
    for layer, head in heads:
        for part in parts:
            name, axis, start = slice_of(kind, layer, head, part)
            found.setdefault(name, (axis, set()))[1].update(range(start, start + kind.head_dim))
    return {name: (axis, sorted(positions)) for name, (axis, positions) in found.items()}
