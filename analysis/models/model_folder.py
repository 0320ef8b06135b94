"""What a model's folder holds, looked at before anything in it is loaded: each refusal names what it is instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.paths import check_weights_are_safe

ADAPTER_CONFIG = "adapter_config.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_TOKENIZER_FILES = (
    "token*",
    "vocab*",
    "spiece.model",
    "sentencepiece*.model",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
)


def check_model_folder(folder: Path, name: str) -> None:
    """Refuse a folder that holds no whole model: an adapter, git-lfs pointers, no configuration, a pickle.

    Raises:
        InputError: with what the folder is, and what to give instead.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        refuse_adapter(name, folder / ADAPTER_CONFIG)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_POINTER):
            raise InputError(
                f"model {name!r}: {path.name} is a git-lfs pointer, not the file itself; run `git lfs pull` in it"
            )
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model {name!r} is a folder without config.json; a model's folder holds config.json, its weights as "
            "safetensors and its tokenizer"
        )
    check_weights_are_safe(folder)


def refuse_adapter(name: str, config: Path) -> None:
    """Refuse a PEFT adapter in place of a model; transformers would load its base in silence, and the adapter on it.

    Raises:
        InputError: always.
    """
    try:
        data: Any = json.loads(config.read_text(encoding="utf-8"))
        kind, base = data.get("peft_type"), data.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        kind = base = None
    base_words = f" of {base!r}" if base else ""
    raise InputError(
        f"model {name!r} is a PEFT adapter ({kind or 'of no known type'}){base_words}, not a whole model; merge it "
        "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(FOLDER)), or give "
        f"{repr(base) if base else 'its base'}"
    )


def check_tokenizer_files(folder: Path, name: str) -> None:
    """Refuse a folder without any file of a tokenizer: some families would make an empty one of nothing.

    Raises:
        InputError: there is none.
    """
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise InputError(
            f"model {name!r} is a folder without a tokenizer; put it there: "
            f"AutoTokenizer.from_pretrained(BASE).save_pretrained({str(folder)!r})"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that knows special tokens alone.

    Raises:
        InputError: it has no vocabulary.
    """
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"model {name!r}: its tokenizer has no vocabulary; put the files of its own tokenizer there")


def check_is_decoder(config: PreTrainedConfig, name: str) -> None:
    """Refuse what its configuration calls an encoder, or an encoder with a decoder.

    `wrap_model` tests it too: logits of a decoder do not depend on later tokens, whatever the configuration says.

    Raises:
        InputError: attention looks both ways, or there is an encoder.
    """
    family = config.model_type
    both_ways = getattr(config, "use_bidirectional_attention", None)
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "an encoder with a decoder"
    elif both_ways in (True, "all"):  # "vision": between the tokens of one picture alone
        reason = f"an encoder (use_bidirectional_attention is {both_ways!r} in config.json)"
    elif getattr(config, "is_causal", True) is False:
        reason = "an encoder (is_causal is false in config.json)"
    elif family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        reason = f"an encoder (a {family} whose is_decoder is false)"
    if reason is not None:
        raise InputError(not_a_decoder(name, reason))


def not_a_decoder(name: str, reason: str) -> str:
    return (
        f"model {name!r} is {reason}, such as embedding models are; give a decoder, a language model that reads from "
        "left to right"
    )
