"""Which weight slices a head-slices adapter trains, and where they lie in the projections of each family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headtune.analysis.models.architectures import Architecture
from headtune.analysis.utils.errors import InputError

from ..base import HeadPeftType, HeadTunerConfig

PARTS = ("q", "k", "v", "o")
SHARES = ("head", "layer")
SHARED = ("k", "v")  # one per KV group, not per head

HeadSlice = tuple[str, int]  # a part and its index: that of a head for q and o, that of a KV group for k and v


@dataclass
class HeadSlicesConfig(HeadTunerConfig):
    """Which slices to train, and how freely.

    Attributes:
        heads: `[[layer, head], ...]`.
        parts: any of `q`, `k`, `v`, `o`: the slices of W_Q, W_K, W_V, W_O.
        rank: None trains every number of a slice; r trains a product of rank r, `D = (alpha / r) B A`.
        alpha: of the product; not read without `rank`.
        share: `head`: each slice has factors of its own. `layer`: the heads of a layer share B, for `parts: [o]` alone,
            whose slices write to the same space (HeadMap); not read without `rank`.
        n_kv_heads: KV groups per layer; read from the model when left out.
        target_modules: the projections that hold the slices; read from the family's row when left out.
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    rank: int | None = None
    alpha: int = 16
    share: str = "head"
    n_kv_heads: int | None = None
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HeadPeftType.HEAD_SLICES
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(PARTS):
            raise InputError(f"parts {self.parts} are not understood; give some of {', '.join(PARTS)}, each once")
        self.parts = [part for part in PARTS if part in self.parts]
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} is {value!r}; expected a whole number from 1 up")
        if self.share not in SHARES:
            raise InputError(f"share {self.share!r} is unknown; choose one of {', '.join(SHARES)}")
        if self.rank is not None and self.share == "layer" and self.parts != ["o"]:
            raise InputError(
                f"share 'layer' is for parts ['o'], found {self.parts}: heads write to one space and read through rows "
                "of their own; use share 'head', or parts ['o']"
            )

    def slices_of(self, layer: int) -> set[HeadSlice]:
        """The trained slices of a layer, each `head_dim` rows or columns wide."""
        assert self.n_heads is not None and self.n_kv_heads is not None
        group = self.n_heads // self.n_kv_heads
        heads = [head for of_layer, head in self.heads if of_layer == layer]
        return {(part, head // group if part in SHARED else head) for part in self.parts for head in heads}


def projection_slices(architecture: Architecture, projection: str, n_heads: int, n_kv_heads: int) -> list[HeadSlice]:
    """What each `head_dim` outputs of a projection are (for the output projection: inputs), in order."""
    if projection == architecture.output_projection:
        return [("o", head) for head in range(n_heads)]
    if architecture.qkv_layout == "per_head":
        return [(part, head) for head in range(n_heads) for part in "qkv"]
    parts = "qkv" if architecture.qkv_layout == "blocks" else "qkv"[architecture.qkv.index(projection)]
    return [(part, index) for part in parts for index in range(n_kv_heads if part in SHARED else n_heads)]


def target_projections(architecture: Architecture, parts: Sequence[str]) -> list[str]:
    """Paths, within a layer, of the projections that hold any of the parts."""
    if not architecture.qkv and (lacking := [part for part in parts if part != "o"]):
        raise InputError(
            f"parts {lacking}: this family was found by its structure, and its projections to queries, keys and values "
            "are not three of plain heads; give parts: [o]"
        )
    names = [*architecture.qkv, architecture.output_projection]
    parts_in = {name: {part for part, _ in projection_slices(architecture, name, 1, 1)} for name in names}
    return [f"{architecture.attention}.{name}" for name in names if parts_in[name] & set(parts)]
