"""Loading a model, and the view of its heads that checks itself before anybody relies on it.

The per-head point is the *input* of the attention output projection, `z[l, h]`, of shape
`[batch, seq, n_heads, head_dim]`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import builtin
from .architectures import Architecture, architecture_of
from .attention import IMPLEMENTATION
from .checks import check, probe, probe_logits
from .encoding import positions_of
from .errors import InputError, nearest
from .inside import require_safe_weights

EMBEDDED = "smollm2-135m"  # the built-in model that the demo and the recipes use
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class HeadModel:
    """A causal language model seen as `n_layers x n_heads` attention heads.

    Attributes:
        model: the transformers model, in eval mode, with the row-recording attention (SDPA for everything else).
        tokenizer: its tokenizer.
        name: what the user called it.
        architecture: its family's row of the table.
        n_layers, n_heads, n_kv_heads, head_dim, d_model: sizes; `head_dim` is the projection's input width divided by
            `n_heads`, never `d_model // n_heads`.
        max_memory: bytes that batches of hypothetical runs may take (see `interventions.rows_in_memory`).
        plain_attention: the implementation that the model came with (see `record_attention`).
    """

    model: PreTrainedModel
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
        return positions_of(self.model)

    def record_attention(self, on: bool) -> None:
        """Switch between the attention whose rows can be recorded and the model's own, which training uses."""
        self.model.set_attn_implementation(IMPLEMENTATION if on else self.plain_attention)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """In eval mode, with the attention whose rows can be recorded; afterwards as before."""
        training = [module for module in self.model.modules() if module.training]
        own = self.model.config._attn_implementation
        self.model.eval()
        self.record_attention(True)
        try:
            yield
        finally:
            self.model.set_attn_implementation(own)
            for module in training:
                module.training = True

    @property
    def device(self) -> torch.device:
        """Where tokens go and results come from: the input embedding's device. Layers may lie on others."""
        embedding: Any = self.model.get_input_embeddings()
        device: torch.device = embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def layers(self) -> list[nn.Module]:
        layers: Any = self.model.get_submodule(self.architecture.layers)
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
        return self.model.get_submodule(self.architecture.final_norm)

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
        weight: Any = self.model.get_output_embeddings().weight
        return self.norm_directions(self.final_norm, residual, weight[tokens.to(weight.device)])

    def identity(self) -> dict[str, Any]:
        """The `model` block of heads.json: what a head set must match to be used again."""
        return {
            "name": self.name,
            "revision": self.revision,
            "config_sha256": self.config_sha256,
            "weights_sha256": self.weights_sha256,
            "model_type": self.model.config.model_type,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @cached_property
    def config_sha256(self) -> str:
        """SHA-256 of the configuration, less what depends on the library or on how it was loaded."""
        config = self.model.config.to_dict()
        for key in ("transformers_version", "_name_or_path", "dtype", "use_cache", "_attn_implementation"):
            config.pop(key, None)
        return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over name and bytes of every parameter, in name order, as loaded."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(name.encode())
            stored: Any = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
            digest.update(stored)
        return digest.hexdigest()


def view(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "", revision: str | None = None
) -> HeadModel:
    """Wrap a loaded model and check the wrapping on a tiny batch (see `check`).

    Raises:
        InputError: the family, or the layout of this member of it, is not supported, or weights are offloaded.
        CheckError: the view does not describe the model; the message names the module.
    """
    config = model.config.get_text_config()
    architecture = architecture_of(config.model_type)
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
    try:
        layers: Any = model.get_submodule(architecture.layers)
    except AttributeError:
        raise InputError(
            f"model {name!r}: a {type(model).__name__} has no {architecture.layers!r}, where {config.model_type!r} has "
            "its layers; give the text-only checkpoint of the family"
        ) from None
    projection: Any = layers[0].get_submodule(architecture.attention).get_submodule(architecture.output_projection)
    in_features, d_model = projection.weight.shape if architecture.in_out_weight else projection.weight.shape[::-1]
    model.eval()
    reference = probe_logits(model, probe(model))
    own = model.config._attn_implementation
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
        plain_attention=own if own != IMPLEMENTATION else "sdpa",
    )
    check(heads, reference)
    return heads


def cache_folder() -> Path:
    """`$HEADTUNE_CACHE`, else `$XDG_CACHE_HOME/headtune`, else `~/.cache/headtune`."""
    if own := os.environ.get("HEADTUNE_CACHE"):
        return Path(own)
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


def _require_on_hub(name: str, revision: str | None) -> None:
    """Ask the hub once, briefly: loading an unknown name would be retried for half a minute.

    Raises:
        InputError: there is no such model, or the hub cannot be reached and the model is not in the local cache.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    expected = f"{builtin.EXPECTED}, a model folder, or a hub id (org/name)"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"model {name!r} is neither a folder nor in the local hub cache (offline mode); {expected}"
            )
        HfApi().model_info(name, revision=revision, timeout=10)
    except HFValidationError:
        raise InputError(f"model {name!r} is not a folder and not a valid hub id; {expected}") from None
    except InputError:
        raise
    except Exception as error:  # network, HTTP and repository errors come from several libraries
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model {name!r} is neither a folder nor reachable on the hub ({reason}); {expected}"
        ) from None


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
        InputError: there is no such model, its folder cannot be read, its weights are no safetensors of its own, or
            some are lacking.
    """
    source = resolve(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if Path(source).is_dir():
        require_safe_weights(Path(source))
    else:
        _require_on_hub(name, revision)
    with _refused_by_name(name):
        architecture_of(AutoConfig.from_pretrained(source, **options).get_text_config().model_type)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=parse_dtype(dtype),
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    if lacking := sorted(info["missing_keys"]):  # transformers draws them at random
        raise InputError(
            f"model {name!r} lacks {len(lacking)} of its weights, such as {lacking[0]}; give a whole copy of it"
        )
    return model, tokenizer


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer without its weights, by built-in name, local folder or hub id.

    Raises:
        InputError: there is no such model, or its tokenizer cannot be read.
    """
    source = resolve(name)
    if not Path(source).is_dir():
        _require_on_hub(name, revision)
    with _refused_by_name(name):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _refused_by_name(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model {name!r} cannot be loaded: {builtin.EXPECTED}, a model folder or a hub id you can reach ({reason})"
        ) from error


def load(
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
        return view(model, tokenizer, name, revision)
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device is None and gpus and rank >= gpus:
        raise InputError(f"process {rank + 1} of this machine has no GPU: there are {gpus}; start one process a GPU")
    own_gpu = f"cuda:{rank}"
    target = device or (own_gpu if torch.cuda.is_available() else "cpu")
    return view(model.to(target), tokenizer, name, revision)  # type: ignore[arg-type]
