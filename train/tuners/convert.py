"""Trained weights as a stock model: adapters merged, under a configuration that keeps every one of them on a reload.

Merging may give a projection a bias that the configuration does not announce. A reload would then drop it with no more
than a log line. Such parameters are found by comparing the merged model's names with those of a model built from its
configuration, so it does not matter which method made them. They are kept, in this order, by

    the family's own config flags (`attention_bias`, `mlp_bias`, `enable_bias`), or
    the family of the same computation that has such flags (qwen2, mistral, phi3 -> llama), or
    not at all: the model is refused, with the reason.

Biases that a flag announces and the model does not have are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from headtune.analysis.models.structure import architecture_for, architecture_of_config, auto_class
from headtune.analysis.utils.errors import CheckError, InputError

ALTERNATIVE = (
    "train a scale alone (lofit: method.offset=false), or write the adapter alone: headtune export RUN OUT --adapter"
)
# What a configuration says about itself, not about its model.
_IDENTITY = {"model_type", "architectures", "transformers_version", "_name_or_path"}


def fold(model: Any) -> PreTrainedModel:
    """A model with its adapter merged, as a stock model in eval mode. The model given is used up.

    Args:
        model: a PeftModel whose adapter can be merged (head tuning, head slices, LoRA, LayerNorm tuning), or a
            fine-tuned model itself; in float32, where merging rounds least.

    Returns:
        A model of a transformers class that `save_pretrained` and `from_pretrained` carry over whole: every parameter
        has its place in the configuration.

    Raises:
        InputError: a parameter that neither the family nor its twin has a place for, a quantised model, or a class of
            the model's own repository.
        CheckError: merged weights that are not finite.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    require_stock(base)
    if base is not model:
        _separate_trained_embeddings(base)
        try:
            base = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise CheckError(f"the adapter cannot be merged: {str(error).splitlines()[0]}") from error
    return as_stock(base).eval()


def why_not_stock(model: PreTrainedModel, biased: Collection[str], layers: Collection[int]) -> str | None:
    """Why `fold` would refuse this model once it is tuned, from its configuration alone; None where it would not.

    Args:
        biased: what will carry an offset, `attention` or `mlp`: the output projections that get a bias.
        layers: in which layers; which ones decides nothing, but whether there are any.
    """
    try:
        require_stock(model)
        row = architecture_for(model)
        paths = {"attention": f"{row.attention}.{row.output_projection}", "mlp": row.mlp_projection}
        places = [path for name in sorted(biased) if (path := paths[name]) is not None]
        if places and layers:
            like: Any = _on_meta(copy.deepcopy(model.config))
            for path in places:
                projection = like.get_submodule(row.layers)[min(layers)].get_submodule(path)
                if projection.bias is None:
                    d_out = projection.weight.shape[1 if row.in_out_weight else 0]
                    projection.bias = torch.nn.Parameter(torch.zeros(d_out, device="meta"))
            as_stock(like)
    except InputError as error:
        return str(error)
    return None


def conversion(source: PreTrainedConfig, written: PreTrainedConfig) -> dict[str, Any]:
    """What `fold` did to the configuration: `{"source": family, "written": family, "flags": [...], "why": ...}`."""
    row, before, after = architecture_of_config(written), source.get_text_config(), written.get_text_config()
    flags = [flag for flag in row.bias_flags if getattr(after, flag) and not getattr(before, flag, False)]
    why = "the family stays what it is: no parameter was added"
    if written.model_type != source.model_type:
        why = (
            f"{source.model_type} has no place for the biases that carry the offsets; {written.model_type} computes "
            f"the same and has one ({' and '.join(flags)})"
        )
    elif flags:
        why = f"{' and '.join(flags)} switched on for the biases that carry the offsets; those not trained are zero"
    return {"source": source.model_type, "written": written.model_type, "flags": flags, "why": why}


def require_stock(model: PreTrainedModel) -> None:
    """Refuse a model that plain transformers cannot have as it stands.

    Raises:
        InputError: it is quantised, or its class is one of its own repository.
    """
    config: Any = model.config
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"model {config._name_or_path!r} is quantised and cannot be merged exactly; load its unquantised weights"
        )
    module = type(model).__module__
    if not module.startswith("transformers."):
        raise InputError(
            f"model {config._name_or_path!r} is a {type(model).__name__} from {module.split('.')[0]}, which plain "
            "transformers does not have; load it without trust_remote_code"
        )


def _separate_trained_embeddings(base: PreTrainedModel) -> None:
    """Give a tied embedding weights of its own where an adapter trains it: its twin is not to change with it."""
    for embedding in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(embedding, BaseTunerLayer):
            layer: Any = embedding.get_base_layer()
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def as_stock(merged: PreTrainedModel) -> PreTrainedModel:
    """The same weights under a configuration that has a place for each of them; see the head of this module.

    Raises:
        InputError: there is no such configuration.
    """
    config: Any = merged.config
    if hasattr(config, "auto_map"):
        del config.auto_map  # the class is transformers' own
    if config.tie_word_embeddings and not _shares_embeddings(merged):
        config.tie_word_embeddings = False
    state = merged.state_dict()
    left_over = sorted(state.keys() - _places(config))
    if not left_over:
        return merged
    # What a file would hold: nothing of how this model was loaded is carried over.
    config = type(config).from_dict(copy.deepcopy(config.to_dict()))
    row = architecture_of_config(config)
    stock = _announced(config, state)
    if stock is None and row.twin is not None and config.get_text_config() is config:
        twin = _as_twin(config, row.twin)
        stock = _announced(twin, _unfused(state, row.layers, row.fused, twin))
    if stock is None:
        raise InputError(
            f"family {config.model_type!r} has no place for {left_over[0]} ({len(left_over)} parameters in all), which "
            f"carries an offset; {ALTERNATIVE}"
        )
    # Buffers that are computed, not stored (rotary frequencies), are on meta still; the merged model has them.
    for name, buffer in stock.named_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            stock.get_submodule(owner)._buffers[leaf] = merged.get_buffer(name)
    stock.generation_config = merged.generation_config
    return stock


def _shares_embeddings(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return bool(head.weight.data_ptr() == embedding.weight.data_ptr())


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> Any:
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=dtype)


def _places(config: PreTrainedConfig) -> set[str]:
    return set(_on_meta(config).state_dict())


def _announced(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel | None:
    """`state` in a model of this family, with the fewest bias flags that announce all of it; None if none do."""
    text = config.get_text_config()  # the configuration itself, but where a model has other towers
    off = [flag for flag in architecture_of_config(config).bias_flags if not getattr(text, flag)]
    for count in range(1, len(off) + 1):
        for flags in combinations(off, count):
            wider = copy.deepcopy(config)
            for flag in flags:
                setattr(wider.get_text_config(), flag, True)
            if state.keys() <= _places(wider):
                return _filled(wider, state)
    return None


def _filled(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    like = next(iter(state.values()))
    stock = _on_meta(config, like.dtype)
    whole = dict(state)
    for name, place in stock.state_dict().items():
        if name not in whole:
            if not name.endswith(".bias"):
                raise CheckError(f"folding does not know how to fill {name}")
            whole[name] = torch.zeros(place.shape, dtype=like.dtype, device=like.device)
    stock.load_state_dict(whole, strict=True, assign=True)
    stock.tie_weights()
    model: PreTrainedModel = stock
    return model


def _as_twin(config: PreTrainedConfig, family: str) -> PreTrainedConfig:
    """The configuration of another family with all that the two have in common: sizes, rope, norms, special tokens.

    Raises:
        InputError: this model computes something that the other family does not.
    """
    window = getattr(config, "sliding_window", None)
    reach: int = config.max_position_embeddings
    rope = dict(config.rope_parameters)
    rotary = rope.pop("partial_rotary_factor", 1.0)  # 1 is what a family without the key does
    reason = None
    if window is not None and window < reach:
        reason = f"attends within a sliding window of {window}, shorter than its {reach} positions"
    elif rotary != 1:
        reason = f"rotates only {rotary:g} of each head's dimensions"
    elif rope["rope_type"] == "longrope" and rope.get("original_max_position_embeddings", reach) < reach:
        reason = f"changes its rotary frequencies after {rope['original_max_position_embeddings']} positions"
    if reason is not None:
        raise InputError(
            f"this {config.model_type} {reason}; {family}, which could carry an offset, does not: {ALTERNATIVE}"
        )
    config_keys = AutoConfig.for_model(family).to_dict().keys() - _IDENTITY
    values = {name: value for name, value in config.to_dict().items() if name in config_keys}
    try:
        return AutoConfig.for_model(family, **(values | {"rope_parameters": rope}))
    except StrictDataclassError as error:  # sizes that the other family does not allow
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(
            f"this {config.model_type} cannot be written as a {family} ({reason}): {ALTERNATIVE}"
        ) from error


def _unfused(
    state: Mapping[str, Tensor], layers: str, fused: Mapping[str, tuple[str, ...]], twin: PreTrainedConfig
) -> dict[str, Tensor]:
    """`state` with each fused projection, `[sum of rows, in]`, split into the parts that the twin has.

    Splitting copies: parts of one tensor would share its memory, which a checkpoint cannot.
    """
    rows = {name: tensor.shape[0] for name, tensor in _on_meta(twin).state_dict().items()}
    split = dict(state)
    for name in state:
        prefix, _, rest = name.removeprefix(f"{layers}.").partition(".")
        projection, _, kind = rest.rpartition(".")
        if name.startswith(f"{layers}.") and projection in fused:
            parts = [f"{layers}.{prefix}.{part}.{kind}" for part in fused[projection]]
            # A bias' rows are its weight's.
            sizes = [rows[f"{layers}.{prefix}.{part}.weight"] for part in fused[projection]]
            pieces = split.pop(name).split(sizes)
            split |= {part: piece.clone() for part, piece in zip(parts, pieces, strict=True)}
    return split
