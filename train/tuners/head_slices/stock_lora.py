"""Low-rank head slices as a LoRA of PEFT's own type, which PEFT and servers load without headtune.

A LoRA adds `(lora_alpha / r) B A`, with A `[r, in]` and B `[out, r]`, to a whole projection. The factors of the slices
are put side by side, and zeros fill the rest:

    o:         A [n * rank, in]: a head's A_h in its rows and the head's columns      B [out, n * rank]: the B_h
    o, share:  A [rank, in]: every A_h in the same rows and its head's columns        B [out, rank]
    q, k, v:   A [n * rank, in]: the A_h                B [out, n * rank]: a head's B_h in its rows and columns

Layers differ in how many heads are chosen. All are filled up with zeros to the largest rank R, and `lora_alpha` is
`alpha R / rank`, so that one rank and one scale hold everywhere: vLLM reads no `rank_pattern`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from headtune.analysis.utils.errors import InputError

from .config import HeadSlicesConfig
from .layer import HeadSlicesLayer


@torch.no_grad()
def stock_lora(model: Any, adapter: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter with a rank as PEFT's LoRA: its configuration and its weights, by the names of their file.

        config, weights = stock_lora(peft_model)
        config.save_pretrained(folder)
        safetensors.torch.save_file(weights, folder + "/adapter_model.safetensors")

    Args:
        model: a PeftModel with head slices, not merged.

    Raises:
        InputError: the adapter is none of head slices, or has no rank.
    """
    config = model.peft_config.get(adapter)
    if not isinstance(config, HeadSlicesConfig) or config.rank is None:
        raise InputError(
            f"adapter {adapter!r} is no low-rank one of head slices; train it with HeadSlicesConfig(rank=8)"
        )
    modules = dict(model.get_base_model().named_modules())
    layers = {
        name: module
        for name, module in modules.items()
        if isinstance(module, HeadSlicesLayer) and adapter in module.head_slices_A
    }
    factors = {name: lora_factors(layer, adapter) for name, layer in layers.items()}
    rank = max(len(a) for a, _ in factors.values())
    weights = {}
    for name, (a, b) in factors.items():
        more = rank - len(a)
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.cat([a, a.new_zeros(more, a.shape[1])])
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), more)], 1)
    indices = sorted({layer.layer for layer in layers.values()})
    # `model.layers.3.self_attn.o_proj`: the name of the list of layers, before the number.
    path = next(iter(layers)).split(".")
    pattern = path[path.index(str(layers[".".join(path)].layer)) - 1]
    lora = LoraConfig(
        task_type=config.task_type or "CAUSAL_LM",
        r=rank,
        lora_alpha=config.alpha * (rank // config.rank),
        target_modules=_shortest_names(layers, modules, indices),
        layers_to_transform=indices,
        layers_pattern=pattern,
        fan_in_fan_out=next(iter(layers.values())).in_out,
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )
    return lora, weights


def lora_factors(layer: HeadSlicesLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A `[r, in]` and B `[out, r]` of a layer, float32 on the CPU; r is the rank, times the slices that share no B."""
    a, b = (factors[adapter].detach().float().cpu() for factors in (layer.head_slices_A, layer.head_slices_B))
    chosen, size = layer.head_slices_chosen[adapter].tolist(), layer.head_dim
    n, rank, _ = a.shape
    shared = len(b) < n
    whole_a = torch.zeros(rank if shared else n * rank, layer.in_features)
    whole_b = torch.zeros(layer.out_features, len(whole_a))
    for i, position in enumerate(chosen):
        inner = slice(0, rank) if shared else slice(i * rank, (i + 1) * rank)
        outer = slice(position * size, (position + 1) * size)
        if layer.on_input:
            whole_a[inner, outer] = a[i]
            whole_b[:, inner] = b[0 if shared else i]
        else:
            whole_a[inner] = a[i]
            whole_b[outer, inner] = b[i]
    return whole_a, whole_b


def _shortest_names(layers: dict[str, HeadSlicesLayer], modules: dict[str, Any], indices: list[int]) -> list[str]:
    """`o_proj`, or with the block before it (`attn.c_proj`) where a layer has another module of that name."""
    names = set()
    for name in layers:
        short = name.rpartition(".")[2]
        others = [
            other
            for other in modules
            if other.endswith(f".{short}") and other not in layers and set(other.split(".")) & set(map(str, indices))
        ]
        names.add(".".join(name.split(".")[-2:]) if others else short)
    return sorted(names)
