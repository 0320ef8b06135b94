"""How large a model is, from its configuration alone: sizes and parameter counts, exact, without weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError, nearest

# Published sizes of models that cannot be fetched without an account.
_LLAMA = {
    "llama-3.2-1b": (2048, 16, 32, 8, 8192, 128256, True),
    "llama-3.1-8b": (4096, 32, 32, 8, 14336, 128256, False),
    "llama-3.1-70b": (8192, 80, 64, 8, 28672, 128256, False),
    "llama-3.1-405b": (16384, 126, 128, 8, 53248, 128256, False),
}


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer.

    Attributes:
        name: within the decoder layer.
        inputs, outputs: features.
        reads: linear layers with the same word read the same tensor.
    """

    name: str
    inputs: int
    outputs: int
    reads: str


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model.

    Attributes:
        gated: the MLP multiplies two projections, as llama's.
        parameters: all, a tied unembedding counted once.
        per_layer: of a decoder layer.
        norms: of all norms.
        linears: of a decoder layer.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    gated: bool
    parameters: int
    per_layer: int
    norms: int
    linears: tuple[Linear, ...]

    @property
    def z(self) -> int:
        """Width of all heads' outputs."""
        return self.n_heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all keys, or all values."""
        return self.n_kv_heads * self.head_dim

    @property
    def unembedding(self) -> int:
        return self.vocabulary * self.d_model

    @property
    def linear(self) -> int:
        """Weights of the linear layers of a decoder layer: what a token is multiplied by."""
        return sum(part.inputs * part.outputs for part in self.linears)


def shape_of(name: str, revision: str | None = None) -> Shape:
    """The shape of a model: a built-in name, one of `known()`, a folder with a config.json, or a hub id.

    Raises:
        InputError: there is no such model, or its family is not supported.
    """
    from transformers import AutoConfig, LlamaConfig

    from headtune.analysis.models.builtin import BUILT_IN
    from headtune.analysis.models.hub import local_only, offline
    from headtune.analysis.models.loading import resolve

    if name.lower() in _LLAMA:
        hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = _LLAMA[name.lower()]
        config: Any = LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=intermediate,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
        return of_config(config, name)
    if "/" not in name and name not in BUILT_IN and not Path(name).is_dir():
        raise InputError(
            f"model {name!r} is no folder, hub id (org/name) or known shape; {nearest(name, [*BUILT_IN, *_LLAMA])}"
        )
    source = resolve(name)
    local = not Path(source).is_dir() and local_only(source, revision)
    try:
        with offline(local):
            config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=local)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {name!r} has no configuration that can be read ({str(error).strip().splitlines()[0]}); give a "
            f"folder with a config.json, a hub id you can reach, or one of {', '.join(known())}"
        ) from None
    return of_config(config, name)


def known() -> list[str]:
    """Names of the shapes that are kept as data."""
    return list(_LLAMA)


def of_config(config: Any, name: str = "") -> Shape:
    """The shape of the model that a transformers configuration describes.

    Raises:
        InputError: the family is not supported.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from headtune.analysis.models.structure import architecture_for

    text = config.get_text_config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(text)
    row = architecture_for(model)
    layers = model.get_submodule(row.layers)
    linear_layers: list[tuple[str, int, int]] = []
    for path, module in layers[0].named_modules():
        if isinstance(module, Conv1D):
            linear_layers.append((path, module.nx, module.nf))
        elif isinstance(module, torch.nn.Linear):
            linear_layers.append((path, module.in_features, module.out_features))
    output = f"{row.attention}.{row.output_projection}"
    last = linear_layers[-1][0]  # of the MLP
    linears = tuple(
        Linear(path, inputs, outputs, path if path in (output, last) else path.rpartition(".")[0])
        for path, inputs, outputs in linear_layers
    )
    sizes = {part.name: part for part in linears}
    n_heads = text.num_attention_heads
    intermediate = sizes[last].inputs
    # Gate and up, in two layers or one, are twice as wide as what the last layer reads.
    inner = [part for part in linears if part.name != last and not part.name.startswith(f"{row.attention}.")]
    return Shape(
        name=name,
        n_layers=len(layers),
        d_model=sizes[output].outputs,
        n_heads=n_heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or n_heads,
        head_dim=sizes[output].inputs // n_heads,
        intermediate=intermediate,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        gated=sum(part.outputs for part in inner) == 2 * intermediate,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        per_layer=sum(parameter.numel() for parameter in layers[0].parameters()),
        norms=sum(_vectors(module) for module in model.modules()),
        linears=linears,
    )


def _vectors(module: Any) -> int:
    """Parameters of a norm: a module without others inside, all of whose parameters are vectors; 0 of any other."""
    parameters = list(module.parameters(recurse=False))
    is_norm = not list(module.children()) and all(parameter.ndim == 1 for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters) if is_norm else 0


@dataclass(frozen=True)
class Trained:
    """What a training trains.

    Attributes:
        kind: `heads` (scale, offset), `slices` (of chosen heads), `lora`, `norms` or `full`.
        parameters: how many.
        lowest: the lowest layer with any; autograd keeps nothing of the layers below it.
        layers: those with any.
        scaled: a scale is trained, whose gradient needs the heads' outputs.
        width: of slices: numbers of a token, a mean over the layers, that are added to or chosen of the heads' widths,
            and those between two factors.
        reads: slices of queries, keys or values are among them, which read what the layer's first norm gives.
        targets: names of the linear layers with a LoRA; `rank`: its rank.
    """

    kind: str
    parameters: int
    lowest: int
    layers: frozenset[int]
    scaled: bool = False
    width: int = 0
    reads: bool = True
    targets: tuple[str, ...] = ()
    rank: int = 0


def everything(shape: Shape) -> Trained:
    return Trained("full", shape.parameters, 0, frozenset(range(shape.n_layers)))


def head_values(
    shape: Shape, pairs: Collection[tuple[int, int]], scale: str = "vector", offset: bool = True, gates: bool = False
) -> Trained:
    """Scale and offset on chosen heads; `gates`: one more number for each of the two."""
    widths = {"none": 0, "head": 1, "vector": shape.head_dim}
    each = widths[scale] + shape.head_dim * offset + gates * ((scale != "none") + offset)
    layers = frozenset(layer for layer, _ in pairs)
    return Trained("heads", each * len(pairs), min(layers), layers, scaled=scale != "none")


def head_slices(shape: Shape, pairs: Collection[tuple[int, int]], parts: Collection[str]) -> Trained:
    """Slices of W_Q, W_K, W_V, W_O of chosen heads, keys and values by KV group."""
    n = sum(_slices_of(shape, pairs, parts).values())
    return _slices(shape, pairs, parts, n * shape.head_dim * shape.d_model, 0)


def low_rank_slices(
    shape: Shape, pairs: Collection[tuple[int, int]], parts: Collection[str], rank: int, share: bool = False
) -> Trained:
    """The same slices by factors: `rank (head_dim + d_model)` each; `share`: one B, `rank d_model`, for a layer."""
    n = sum(_slices_of(shape, pairs, parts).values())
    n_of_b = len({layer for layer, _ in pairs}) if share else n
    parameters = rank * (n * shape.head_dim + n_of_b * shape.d_model)
    return _slices(shape, pairs, parts, parameters, n_of_b * rank)


def _slices(
    shape: Shape, pairs: Collection[tuple[int, int]], parts: Collection[str], parameters: int, between: int
) -> Trained:
    """`between`: numbers of a token between two factors, over all layers."""
    layers = frozenset(layer for layer, _ in pairs)
    numbers = sum(_slices_of(shape, pairs, parts).values()) * shape.head_dim + between
    reads = not set(parts) <= {"o"}
    return Trained("slices", parameters, min(layers), layers, width=numbers // len(layers), reads=reads)


def _slices_of(shape: Shape, pairs: Collection[tuple[int, int]], parts: Collection[str]) -> dict[str, int]:
    """How many slices of each part belong to chosen heads."""
    group = shape.n_heads // shape.n_kv_heads
    counts = {"q": len(set(pairs)), "k": len({(layer, head // group) for layer, head in pairs})}
    counts |= {"v": counts["k"], "o": counts["q"]}
    return {part: counts[part] for part in parts}


def lora(shape: Shape, rank: int, targets: str | list[str], only: Collection[int] | None = None) -> Trained:
    """A LoRA on linear layers of all decoder layers, or those of `only`: `rank (inputs + outputs)` each.

    Raises:
        InputError: no linear layer has such a name, or the model has no such layer.
    """
    names_of_targets = [targets] if isinstance(targets, str) else targets
    chosen = [
        part
        for part in shape.linears
        if targets == "all-linear"
        or any(part.name == word or part.name.endswith(f".{word}") for word in names_of_targets)
    ]
    if not chosen:
        names = ", ".join(part.name.rpartition(".")[2] for part in shape.linears)
        raise InputError(f"target_modules {targets!r} names no linear layer of {shape.name!r}; it has {names}")
    each = sum(rank * (part.inputs + part.outputs) for part in chosen)
    layers = frozenset(range(shape.n_layers) if only is None else only)
    if beyond := sorted(layer for layer in layers if layer >= shape.n_layers):
        raise InputError(f"lora layers {beyond} are beyond the {shape.n_layers} layers of {shape.name!r}")
    return Trained("lora", each * len(layers), 0, layers, targets=tuple(part.name for part in chosen), rank=rank)


def norm_gains(shape: Shape) -> Trained:
    return Trained("norms", shape.norms, 0, frozenset(range(shape.n_layers)))


def inputs_of(shape: Shape, names: Collection[str]) -> Mapping[str, int]:
    """Widths of the different tensors that linear layers read, by `Linear.reads`."""
    return {part.reads: part.inputs for part in shape.linears if part.name in names}
