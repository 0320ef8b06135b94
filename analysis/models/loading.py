"""Loading a model, and the view of its heads that checks itself before anybody relies on it.

The per-head point is the *input* of the attention output projection, `z[l, h]`, of shape
`[batch, seq, n_heads, head_dim]`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.processes import local_rank

from . import builtin
from .architectures import Architecture
from .attention import IMPLEMENTATION
from .head_model import HeadModel
from .hub import local_only, offline
from .loaded_weights import require_same_weights
from .model_folder import (
    check_is_decoder,
    check_model_folder,
    check_tokenizer,
    check_tokenizer_files,
    refuse_adapter,
)
from .self_check import check, require_causal, require_finite
from .structure import architecture_for, architecture_of_config, auto_class

log = logging.getLogger(__name__)
EMBEDDED = "smollm2-135m"  # the built-in model that the demo and the recipes use
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def wrap_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "", revision: str | None = None
) -> HeadModel:
    """Wrap a loaded model and check the wrapping on a tiny batch (see `check`).

    Raises:
        InputError: the family, or the layout of this member of it, is not supported, weights are offloaded, logits are
            not finite, or the model reads later tokens.
        CheckError: the view does not describe the model; the message names the module.
    """
    # Refuse what cannot be taken apart into heads.
    config = model.config.get_text_config()
    try:
        architecture = architecture_for(model)
    except InputError as error:
        raise InputError(f"model {name!r}: {error}" if name else str(error)) from None
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size or not getattr(
        config, "do_layer_norm_before", True
    ):
        raise InputError(
            f"model {name!r} projects its embeddings or normalises after its blocks, which makes head contributions "
            "non-additive; use another member of the family"
        )
    offloaded = [parameter for parameter, value in model.named_parameters() if value.device.type == "meta"]
    if offloaded:
        raise InputError(
            f"model {name!r}: {len(offloaded)} weights, such as {offloaded[0]}, are offloaded and cannot be read; "
            "use a device_map that keeps every layer in a device's memory, or a smaller dtype"
        )
    layers: Any = model.get_submodule(architecture.layers)
    # Sizes, from the modules themselves.
    projection: Any = layers[0].get_submodule(architecture.attention).get_submodule(architecture.output_projection)
    in_features, d_model = projection.weight.shape if architecture.in_out_weight else projection.weight.shape[::-1]
    # Another attention implementation is put in; the view is checked against the model before.
    model.eval()
    reference = require_finite(model, tokenizer, name or str(model.name_or_path))
    require_causal(model, reference, name or str(model.name_or_path))
    implementation = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    heads = HeadModel(
        model,
        tokenizer,
        name or str(model.name_or_path),
        architecture,
        n_layers=len(layers),
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=in_features // config.num_attention_heads,
        d_model=d_model,
        revision=revision,
        plain_attention=implementation if implementation != IMPLEMENTATION else "sdpa",
    )
    check(heads, reference)
    return heads


def load_architecture(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Architecture:
    """Where a named model has its heads, from its configuration alone.

    Raises:
        InputError: there is no such model, or no heads can be told apart in it.
    """
    return architecture_of_config(_config(name, revision, trust_remote_code))


def cache_folder() -> Path:
    """`$HEADTUNE_CACHE`, else `$XDG_CACHE_HOME/headtune`, else `~/.cache/headtune`."""
    if folder := os.environ.get("HEADTUNE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headtune"


def resolve(name: str) -> str:
    """The folder or hub id behind a model name; a built-in model is converted at the first call (about a minute).

    Raises:
        InputError: a built-in model whose packages are not installed.
    """
    if name not in builtin.BUILT_IN:
        return name
    target = cache_folder() / name
    if not (target / "config.json").exists():
        builtin.convert(name, target)
    return str(target)


def parse_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; {nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def load_plain(
    name: str,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer by built-in name, local folder or hub id.

    Args:
        device_map: as transformers takes it; None loads on the CPU.

    Raises:
        InputError: there is no such model, its folder cannot be read or is an adapter's, it is an encoder, its weights
            are no safetensors of its own, or they are not those that its configuration announces.
    """
    source, options = _source(name, revision, trust_remote_code)
    local = bool(options.get("local_files_only"))
    with offline(local), _refused_by_name(name):
        config = AutoConfig.from_pretrained(source, **options)
        check_is_decoder(config.get_text_config(), name)
        architecture_of_config(config)
    tokenizer = _tokenizer(name, source, options)
    with offline(local), _refused_by_name(name):
        loaded: Any = auto_class(config).from_pretrained(
            source,
            dtype=parse_dtype(dtype),
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
            **options,
        )
    model, info = loaded
    require_same_weights(name, config, info)
    return model, tokenizer


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer without its weights, by built-in name, local folder or hub id.

    Raises:
        InputError: there is no such model, or its tokenizer cannot be read.
    """
    source, options = _source(name, revision, trust_remote_code, whole=False)
    return _tokenizer(name, source, options)


def _source(name: str, revision: str | None, trust_remote_code: bool, whole: bool = True) -> tuple[str, dict[str, Any]]:
    """The checked folder or hub id behind a name, and the options with which everything of it is loaded.

    Args:
        whole: the folder has to hold a model, not a tokenizer alone.
    """
    source = resolve(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not Path(source).is_dir():
        options["local_files_only"] = local_only(source, revision)
        with _refused_by_name(name):
            adapter = find_adapter_config_file(source, revision=revision, local_files_only=options["local_files_only"])
        if whole and adapter is not None:
            refuse_adapter(name, Path(adapter))
    elif whole:
        check_model_folder(Path(source), name)
    if trust_remote_code:
        log.warning("model.trust_remote_code: code that comes with %s runs with your rights", name)
    return source, options


def _tokenizer(name: str, source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    if Path(source).is_dir():
        check_tokenizer_files(Path(source), name)
    with offline(bool(options.get("local_files_only"))), _refused_by_name(name, "its tokenizer "):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    check_tokenizer(tokenizer, name)
    return tokenizer


def _config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    source, options = _source(name, revision, trust_remote_code, whole=False)
    with offline(bool(options.get("local_files_only"))), _refused_by_name(name):
        return AutoConfig.from_pretrained(source, **options)


def sizes_of(name: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[int | None, int | None]:
    """How many tokens a model takes, and for how many it has embeddings, from its configuration alone.

    Raises:
        InputError: there is no such model, or its configuration cannot be read.
    """
    config = _config(name, revision, trust_remote_code)
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)


@contextlib.contextmanager
def _refused_by_name(name: str, part: str = "") -> Iterator[None]:
    """Errors of the libraries as one line that names the model.

    Args:
        part: of the model, where that is what cannot be loaded.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise InputError(
                f"model {name!r} comes with code of its own, which would run with your rights; read it, then allow it: "
                "model.trust_remote_code=true in a recipe, --trust-remote-code on the command line, "
                "trust_remote_code=True in Python"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if part:
            raise InputError(f"model {name!r}: {part}cannot be loaded ({reason})") from error
        raise InputError(
            f"model {name!r} cannot be loaded: {builtin.EXPECTED}, a model folder or a hub id you can reach ({reason})"
        ) from error


def load_model(
    name: str,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> HeadModel:
    """Load a model and return its checked head view.

    Args:
        name: a built-in model (`smollm2-135m`, `gemma3-270m`), a local folder, or a hub id.
        dtype: float32, bfloat16 or float16.
        device: where to put it; default: the process's own GPU, else the CPU.
        device_map: instead of `device`, how to spread it, as transformers takes it (`"auto"`, `{"": "cpu"}`).

    Raises:
        InputError: no such model, an unsupported family, `device` and `device_map` together, or a map that offloads.
        CheckError: the view does not describe the model.
    """
    if device is not None and device_map is not None:
        raise InputError(f"device {device!r} and device_map {device_map!r} are both given; give one of them")
    model, tokenizer = load_plain(name, dtype, revision, trust_remote_code, device_map)
    if device_map is not None:
        return wrap_model(model, tokenizer, name, revision)
    rank, gpus = local_rank(), torch.cuda.device_count()
    if device is None and gpus and rank >= gpus:
        raise InputError(f"process {rank + 1} of this machine has no GPU: there are {gpus}; start one process a GPU")
    own_gpu = f"cuda:{rank}"
    target = device or (own_gpu if torch.cuda.is_available() else "cpu")
    return wrap_model(model.to(target), tokenizer, name, revision)  # type: ignore[arg-type]
