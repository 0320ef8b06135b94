"""Weights in a file against the places that a configuration has for them.

Transformers draws weights that a file lacks at random, and leaves out those that the configuration does not announce:
either way another model than the one in the file is measured. Both are refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from headtune.analysis.utils.errors import InputError

from .structure import auto_class

# Buffers that old versions saved and the model computes (rotary frequencies, causal masks, positions), and heads that
# other programs put beside a language model and that change no logit.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb|rope)\.(inv_freq|cos_cached|sin_cached)$"
    r"|(^|\.)inv_freq$"
    r"|(^|\.)(attn|attention|self_attn|self_attention)\.(masked_bias|bias)$"
    r"|(^|\.)position_ids$"
    r"|^v_head\."
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
# What wrappers put before every name, and how the model in them is saved.
_WRAPPERS = {
    "module.": "by DistributedDataParallel or DeepSpeed; save what is in it: model.module.save_pretrained(FOLDER)",
    "_orig_mod.": "by torch.compile; save what is in it: model._orig_mod.save_pretrained(FOLDER)",
    "base_model.model.": "by PEFT; merge first: model.merge_and_unload().save_pretrained(FOLDER)",
    "model.": "by a module around the model, such as Lightning's; save what is in it: "
    "module.model.save_pretrained(FOLDER)",
}


def require_same_weights(name: str, config: PreTrainedConfig, info: Mapping[str, Any]) -> None:
    """Refuse a model whose file and configuration do not name the same weights, in the same shapes.

    Tied weights, whether the file has them or not, are no difference; nor are buffers that a model computes.

    Args:
        info: what `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` gives.

    Raises:
        InputError: a weight that is lacking, that has no place, or of another shape; the message names it and the
            key of config.json that would announce it.
    """
    lacking = sorted(info["missing_keys"])
    extra = sorted(key for key in info["unexpected_keys"] if not _HARMLESS.search(key))
    if (prefix := _wrapper(lacking, extra)) is not None:
        raise InputError(f"model {name!r}: every weight's name begins with {prefix!r}, put there {_wrapped_by(prefix)}")
    if other := sorted(info["mismatched_keys"]):
        key, stored, expected = other[0]
        raise InputError(
            f"model {name!r}: {key} is {list(stored)} in its file and {list(expected)} by its configuration "
            f"({len(other)} such weights); get config.json and weights from one place"
        )
    if lacking:
        beside = f", and holds {len(extra)} without a place, such as {extra[0]}" if extra else ""
        raise InputError(
            f"model {name!r} lacks {len(lacking)} of its weights, such as {lacking[0]}{beside}; give a whole copy of it"
        )
    if extra:
        raise InputError(
            f"model {name!r} holds {len(extra)} weight{'s' * (len(extra) > 1)} that its configuration has no place "
            f"for, such as {extra[0]}; {_fix(config, extra)}"
        )


def _wrapper(lacking: Collection[str], extra: Collection[str]) -> str | None:
    """What stands before every name in a file, where the names would fit without it."""
    if not lacking or not extra:
        return None
    prefixes = [key[: -len(name)] for key in extra for name in lacking if key.endswith("." + name)]
    if not prefixes:
        return None
    prefix = min(prefixes, key=len)
    return prefix if all(key.startswith(prefix) for key in extra) else None


def _wrapped_by(prefix: str) -> str:
    return next(
        (how for known_prefix, how in _WRAPPERS.items() if prefix.startswith(known_prefix)),
        "by a module around the model; save the model that is in it: save_pretrained(FOLDER)",
    )


def _fix(config: PreTrainedConfig, extra: Collection[str]) -> str:
    """The key of config.json that announces these weights, found by trying."""
    text = config.get_text_config()
    numbers = [int(match[1]) for key in extra if (match := _LAYER.search(key))]
    if numbers and max(numbers) >= text.num_hidden_layers:
        key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        return f"set {key} to {max(numbers) + 1} in config.json (it is {text.num_hidden_layers})"
    places = _places(config)
    flags = [
        key
        for key, value in text.to_dict().items()
        if value is False and re.search(r"bias|norm", key) and key != "tie_word_embeddings"
    ]
    for flag in flags:
        wider = copy.deepcopy(config)
        setattr(wider.get_text_config(), flag, True)
        added = _places(wider) - places
        announced = {key for key in extra if any(key == place or place.endswith("." + key) for place in added)}
        if announced:
            zeros = " (and save zeros for the biases it then lacks)" if len(added) > len(announced) else ""
            return f"set {flag} to true in config.json{zeros}"
    return f"no key of a {text.model_type}'s config.json announces them; get the config.json that belongs to them"


def _places(config: PreTrainedConfig) -> set[str]:
    try:
        with torch.device("meta"):
            return set(auto_class(config).from_config(config).state_dict())
    except Exception:  # a flag that this family refuses, or code of the model's own
        return set()
