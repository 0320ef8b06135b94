"""Which heads a head-tuning adapter acts on, and what it trains of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from headtune.analysis.utils.errors import InputError

from ..base import HeadPeftType, HeadTunerConfig

SCALES = ("none", "head", "vector")


@dataclass
class HeadTuningConfig(HeadTunerConfig):
    """Which heads to tune, and how.

    Attributes:
        heads: `[[layer, head], ...]`.
        scale: `vector` trains one factor per dimension of a head, `head` one per head, `none` no factor.
        offset: train an offset vector.
        gates: train a gate per head on each of these. Where `a` and `v` are 0 their gates get no gradient, so with
            an `init_std` of 0 the task moves them from the second step on.
        mlp_layers: layers whose MLP output gets an offset vector.
        init_std: standard deviation of the initial `a`, `v` and `w`; 0 starts exactly at the base model.
        n_heads: query heads per layer; read from the model when left out.
        target_modules: the output projections; read from the family's row when left out.
        mlp_projection: the MLP's last projection within a layer; read from the family's row when left out.
    """

    scale: str = "vector"
    offset: bool = True
    gates: bool = False
    mlp_layers: list[int] = field(default_factory=list)
    init_std: float = 0.0
    target_modules: list[str] | str | None = None
    mlp_projection: str | None = None
    exclude_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HeadPeftType.HEAD_TUNING
        if self.scale not in SCALES:
            raise InputError(f"scale {self.scale!r} is unknown; choose one of {', '.join(SCALES)}")
        self.mlp_layers = sorted(int(layer) for layer in self.mlp_layers)
        if self.heads and self.scale == "none" and not self.offset:
            raise InputError("an adapter with scale 'none' and offset false trains nothing; switch one on")
        if len(set(self.mlp_layers)) < len(self.mlp_layers):
            raise InputError(f"mlp_layers {self.mlp_layers} name a layer twice; remove the repeats")
        if self.gates and not self.heads:
            raise InputError("gates: true gates heads, and the adapter names none; give heads: [[layer, head], ...]")

    def heads_of(self, layer: int) -> list[int]:
        return [head for of_layer, head in self.heads if of_layer == layer]
