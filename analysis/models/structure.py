"""Where a family that no row of the table names keeps its heads, found by structure.

    architecture_for(model)     # its row, or what is found; `wrap_model` proves it by the self-check

Modules tell sizes and places; one pass over a tiny batch tells what is added to the residual stream. Nothing here is
believed by itself: the self-check compares it with what the model computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from headtune.analysis.utils.errors import InputError

from .architectures import ARCHITECTURES, FOUND, Architecture

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # what families call their attention output projection
_FLAGS = ("attention_bias", "mlp_bias", "use_bias")
_KEPT = "_headtune_architecture"
_OTHER_TOWERS = ("vision", "visual", "audio", "image")


def architecture_for(model: PreTrainedModel) -> Architecture:
    """The row of a model's family, with paths as this model has them; without a row, what its structure says.

    A text model inside a larger one (a vision tower beside it) has the paths that lead to it.

    Raises:
        InputError: no heads can be told apart; the message says why.
    """
    family = model.config.get_text_config().model_type
    row = ARCHITECTURES.get(family)
    if row is None:
        # Kept with the model: an adapter put in later hides what is looked for.
        if _KEPT not in vars(model):
            setattr(model, _KEPT, _find(model))
        FOUND[family] = getattr(model, _KEPT)
        return FOUND[family]
    if _has(model, row.layers):
        return row
    layers, layer_list = _layers(model)
    if not _has(layer_list[0], row.attention):
        raise InputError(
            f"a {type(model).__name__} has no {row.attention!r} in {layers}.0; give the text-only checkpoint"
        )
    prefix = layers.removesuffix(row.layers.rpartition(".")[2])
    return replace(row, layers=layers, final_norm=prefix + row.final_norm.rpartition(".")[2])


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class of a language model: a model of text, or one of images and text whose text part is used."""
    both = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if both else AutoModelForCausalLM


def architecture_of_config(config: PreTrainedConfig) -> Architecture:
    """The same from a configuration alone: no weight is read.

    Raises:
        InputError: see `architecture_for`.
    """
    family = config.get_text_config().model_type
    if family in ARCHITECTURES:
        return ARCHITECTURES[family]
    with torch.device("meta"):
        try:
            model = auto_class(config).from_config(config)
        except ValueError as error:  # an encoder, a model of images: no causal language model
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"family {config.model_type!r} is no causal language model of transformers: {first}"
            ) from None
    return architecture_for(model)


def _find(model: PreTrainedModel) -> Architecture:
    config: Any = model.config.get_text_config()
    path, layers = _layers(model)
    if not hasattr(inspect.getmodule(type(model)), "ALL_ATTENTION_FUNCTIONS"):
        raise InputError(
            f"model family {config.model_type!r} is not supported: its attention does not go through transformers' "
            "attention interface, so attention rows cannot be read"
        )
    name, block = _attention(layers, path, config)
    output, projection = _output_projection(block, f"{path}.0.{name}", config)
    head_dim = _inputs(projection) // config.num_attention_heads
    names, layout = _queries_keys_values(block, head_dim, config)
    plain = Architecture(
        path,
        name,
        output,
        _final_norm(model, path),
        in_out_weight=isinstance(projection, Conv1D),
        bias_flags=tuple(flag for flag in _FLAGS if getattr(config, flag, None) is not None),
        mlp=_mlp(layers[0], name, f"{path}.0"),
        mlp_projection=None,
        qkv=names,
        qkv_layout=layout,
    )
    if _on_meta(model):
        return plain
    norm: Any = model.get_submodule(plain.final_norm)
    return _what_is_added(model, replace(plain, gain_offset=_gain_offset(norm)))


def _on_meta(model: PreTrainedModel) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _layers(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Path of the list of decoder layers, and the layers."""
    config: Any = model.config.get_text_config()
    lists = {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and not any(tower in path for tower in _OTHER_TOWERS)
    }
    with_heads = {path: each for path, each in lists.items() if any(_blocks(layer) for layer in each)}
    family = config.model_type
    if not with_heads:
        raise InputError(
            f"model family {family!r} is not supported: no list of {config.num_hidden_layers} layers holds attention "
            "blocks (state-space and other layers without heads have none to tune); supported by a row: "
            f"{', '.join(ARCHITECTURES)}"
        )
    if len(with_heads) > 1:
        raise InputError(
            f"model family {family!r} is not supported: {', '.join(with_heads)} all hold layers with attention, "
            "such as an encoder's and a decoder's"
        )
    return next(iter(with_heads.items()))


def _blocks(layer: nn.Module) -> list[str]:
    """Children of a layer that are attention blocks: linear projections, under a class called so."""
    return [
        name
        for name, child in layer.named_children()
        if "attention" in type(child).__name__.lower()
        and any(isinstance(module, nn.Linear | Conv1D) for module in child.modules())
    ]


def _attention(layers: Sequence[nn.Module], path: str, config: Any) -> tuple[str, nn.Module]:
    blocks = [_blocks(layer) for layer in layers]
    if without := [index for index, names in enumerate(blocks) if not names]:
        raise InputError(
            f"model family {config.model_type!r} is not supported: layers {', '.join(map(str, without))} have no "
            "attention heads (a hybrid of attention and other layers); use a model whose layers all have heads"
        )
    names = {name for each in blocks for name in each}
    if len(names) > 1:
        raise InputError(
            f"model family {config.model_type!r} is not supported: its layers hold attention blocks of several names, "
            f"{', '.join(sorted(names))} (cross-attention, or layers of several kinds)"
        )
    (name,) = names
    block = layers[0].get_submodule(name)
    if getattr(block, "sinks", None) is not None:
        raise InputError(
            f"model family {config.model_type!r} is not supported: its attention has sinks ({path}.0.{name}.sinks), so "
            "that attention rows do not sum to 1, which rows, distillation and regularisers rely on"
        )
    if getattr(block, "layer_idx", None) is None:
        raise InputError(
            f"model family {config.model_type!r} is not supported: {path}.0.{name} does not know its layer, as "
            "transformers' attention interface needs, so attention rows cannot be read"
        )
    return name, block


def _inputs(projection: Any) -> int:
    return int(projection.nx if isinstance(projection, Conv1D) else projection.in_features)


def _outputs(projection: Any) -> int:
    return int(projection.nf if isinstance(projection, Conv1D) else projection.out_features)


def _output_projection(block: nn.Module, path: str, config: Any) -> tuple[str, nn.Module]:
    projections = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for name in _OUTPUTS:
        module = projections.get(name)
        if module is None or _outputs(module) != config.hidden_size:
            continue
        if _inputs(module) % config.num_attention_heads:
            break
        return name, module
    raise InputError(
        f"model family {config.model_type!r} is not supported: {path} has no projection to {config.hidden_size} values "
        f"from {config.num_attention_heads} heads of equal size among {', '.join(projections)}; its output is not one "
        "z a head"
    )


def _queries_keys_values(block: nn.Module, head_dim: int, config: Any) -> tuple[tuple[str, ...], Any]:
    """Names and layout of the input projections; none where they are not three of the sizes of plain heads."""
    names = ("q_proj", "k_proj", "v_proj")
    kv = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    sizes = (config.num_attention_heads * head_dim, kv, kv)
    modules: list[Any] = [getattr(block, name, None) for name in names]
    plain = all(isinstance(module, nn.Linear) for module in modules)
    if plain and [_outputs(module) for module in modules] == [*sizes]:
        return names, "separate"
    return (), "separate"


def _final_norm(model: PreTrainedModel, layers: str) -> str:
    parent, _, name = layers.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    after = [child for child, _ in children].index(name)  # norms of embeddings stand before the layers
    norms = [child for child, module in children[after:] if _is_norm(module)]
    if not norms:
        raise InputError(
            f"model family {model.config.get_text_config().model_type!r} is not supported: {parent} has no norm with a "
            "gain after its layers, through which a head's part of a logit could be read"
        )
    return f"{parent}.{norms[0]}"


def _is_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    return "weight" in parameters and all(each.ndim == 1 for each in parameters.values())


def _mlp(layer: nn.Module, attention: str, path: str) -> str:
    """The layer's other part with matrices in it."""
    others = [
        name
        for name, child in layer.named_children()
        if name != attention and any(parameter.ndim > 1 for parameter in child.parameters())
    ]
    if len(others) != 1:
        raise InputError(f"{path}: beside its attention a layer must have one MLP, and here is {others or 'none'}")
    return others[0]


def _gain_offset(norm: Any) -> float:
    """What is added to a norm's weight to make its gain: 1.0 where a weight of zero leaves the input's direction."""
    width = norm.weight.shape[0]
    x = torch.linspace(-1.0, 1.5, width, device=norm.weight.device)[None]
    with torch.no_grad():
        out = norm(x.to(norm.weight.dtype)).float()[0]
    weight = norm.weight.detach().float()
    bias = getattr(norm, "bias", None)
    plain = x[0] - x[0].mean() if isinstance(norm, nn.LayerNorm) else x[0]
    plain = plain / plain.pow(2).mean().sqrt()
    gaps = [(plain * (weight + gain) + (0 if bias is None else bias.float()) - out).abs().max() for gain in (0.0, 1.0)]
    return 0.0 if gaps[0] <= gaps[1] else 1.0


@torch.no_grad()
def _what_is_added(model: PreTrainedModel, row: Architecture) -> Architecture:
    """With the modules whose outputs a layer adds to the residual stream, by what layer 0 does to a tiny batch."""
    from .hooks import watch
    from .self_check import probe, probe_logits

    layers: Any = model.get_submodule(row.layers)
    layer = layers[0]
    block, mlp = layer.get_submodule(row.attention), layer.get_submodule(row.mlp)
    norms = [name for name, child in layer.named_children() if _is_norm(child)]
    linears = [name for name, child in mlp.named_modules() if isinstance(child, nn.Linear | Conv1D)]
    parts = [layer, block, mlp, *(layer.get_submodule(name) for name in norms)]
    with watch([*parts, *(mlp.get_submodule(name) for name in linears)]) as seen:
        probe_logits(model, probe(model))
    before, after = (each.float() for each in seen[layer])
    change = after - before

    def part(module: nn.Module) -> Tensor | None:
        value = seen[module][1].float() if module in seen else None
        return None if value is None or value.numel() != change.numel() else value.view_as(change)

    attention = {None: part(block), **{name: part(layer.get_submodule(name)) for name in norms}}
    feed_forward = {row.mlp: part(mlp), **{name: part(layer.get_submodule(name)) for name in norms}}
    for norm, first in attention.items():
        for module, second in feed_forward.items():
            if first is None or second is None or norm == module:
                continue
            if (first + second - change).abs().max() <= 1e-4 * max(1.0, float(change.abs().max())):
                # Its last projection is the whole MLP's output only where there are no experts, in any layer.
                last = [name for name in linears if module == row.mlp and _same(part(mlp.get_submodule(name)), second)]
                projection = f"{row.mlp}.{last[-1]}" if last and "expert" not in last[-1] else None
                if projection is not None and not all(_has(each, projection) for each in layers):
                    projection = None
                return replace(row, post_attention_norm=norm, mlp=module, mlp_projection=projection)
    raise InputError(
        f"model family {model.config.get_text_config().model_type!r} is not supported: {row.layers}.0 adds other than "
        f"the outputs of {row.attention} and {row.mlp}, or of a norm after them, to the residual stream, such as a "
        "multiple of them"
    )


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and bool(torch.equal(one, other))
