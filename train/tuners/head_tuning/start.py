"""Offsets to start from: those of another run's adapter in the place of zeros or noise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.state_files import read_state

from ..base import HeadPeftType
from ..weights_io import ADAPTER, read_adapter
from .layer import HeadTuningLayer

Offsets = Mapping[tuple[int, int], Tensor]  # (layer, head) -> [head_dim]


def read_offsets(run: Path | str) -> dict[tuple[int, int], Tensor]:
    """The offsets of a run's adapter, or of an adapter's folder.

    Raises:
        InputError: no adapter there, one of another type, or one that does more than add offsets to heads.
        CheckError: its weights cannot be read.
    """
    folder = Path(run)
    folder = folder if (folder / "adapter_config.json").is_file() else folder / "adapter"
    if not (folder / "adapter_config.json").is_file() or not (folder / ADAPTER).is_file():
        raise InputError(f"{str(run)!r} holds no adapter to start from; name a finished run of steer or lofit")
    config = read_state(folder / "adapter_config.json")
    only_offsets = config.get("scale") == "none" and not config.get("gates") and not config.get("mlp_layers")
    if config.get("peft_type") != HeadPeftType.HEAD_TUNING.value or not only_offsets or not config.get("heads"):
        raise InputError(
            f"the adapter of {str(run)!r} is not of offsets on heads alone, which is what a training can start from; "
            "name a run of steer (kind iti or in_context) or of lofit with scale none"
        )
    rows: dict[int, list[Tensor]] = {}
    for name, values in read_adapter(folder).items():
        if match := re.search(r"\.(\d+)\..*head_tuning_offset$", name):
            rows[int(match.group(1))] = list(values)
    heads = sorted((layer, head) for layer, head in config["heads"])
    return {(layer, head): rows[layer].pop(0) for layer, head in heads}


def require_offsets(offsets: Offsets, heads: Iterable[tuple[int, int]], head_dim: int, source: str) -> None:
    """Refuse to start heads that have no offset, or offsets of another model (InputError)."""
    missing = [f"L{layer}H{head}" for layer, head in heads if (layer, head) not in offsets]
    if missing:
        raise InputError(
            f"{source!r} has no offset for {missing[0]} ({len(missing)} of the heads); tune its heads: "
            f"heads='{{from: {source}}}'"
        )
    width = next(iter(offsets.values())).numel()
    if width != head_dim:
        raise InputError(f"{source!r} has offsets of {width} numbers, and this model's heads have {head_dim}")


@torch.no_grad()
def start_offsets(model: nn.Module, offsets: Offsets) -> None:
    """Put offsets into the adapters of a model, for every head that they tune."""
    for module in model.modules():
        if isinstance(module, HeadTuningLayer):
            for name, parameter in module.head_tuning_offset.items():
                rows = [offsets[module.layer, head] for head in module.chosen_heads[name]]
                parameter.copy_(torch.stack(rows).to(parameter))
