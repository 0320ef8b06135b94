"""Weights of a model in training, written to a folder and put back into the same model.

A folder holds what stock loaders take: a PEFT adapter, or a whole checkpoint in safetensors. It is there whole or not
at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from headtune.analysis.utils.errors import CheckError
from headtune.analysis.utils.files import atomic_folder
from headtune.analysis.utils.state_files import read_state

ADAPTER = "adapter_model.safetensors"


def save(model: Any, folder: Path) -> None:
    """Write the adapter of a PeftModel, or all weights and the configuration of a plain model, in their own dtype."""
    with atomic_folder(folder) as temporary:
        write(model, temporary)


def write(model: Any, folder: Path) -> None:
    """As `save`, into a folder that is there."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)
        remove_card(folder)
    else:
        model.save_pretrained(str(folder))


def remove_card(folder: Path) -> None:
    """Take away the empty form that PEFT lays beside an adapter as its model card."""
    (folder / "README.md").unlink(missing_ok=True)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The weights of the adapter in a folder.

    Raises:
        CheckError: their file is missing or damaged.
    """
    path = folder / ADAPTER
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckError(f"{path} cannot be read: {error}") from error


def with_adapter(model: Any, folder: Path) -> PeftModel:
    """A plain model with the adapter in a folder, for use and not for training.

    Raises:
        InputError: the adapter's configuration is damaged.
        CheckError: its weights are damaged, or are not those that the configuration asks for.
    """
    read_state(folder / "adapter_config.json")
    weights = read_adapter(folder)
    with warnings.catch_warnings():
        # Of weights that are missing or of another shape PEFT only warns, and leaves its initial values in their place.
        warnings.filterwarnings("ignore", "Found missing adapter keys|Some weights of")
        adapted = PeftModel.from_pretrained(model, str(folder), ignore_mismatched_sizes=True)
    _require_all(adapted, weights, folder)
    return adapted


def _require_all(model: PeftModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse weights that are not, by name and shape, all those of the model's adapter."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, other = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    shaped = {name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape}
    differences = [
        (f"lacks {len(missing)} weights of {len(expected)}", missing),
        (f"holds {len(other)} that are none of this adapter's", other),
        (f"holds {len(shaped)} of another shape", shaped),
    ]
    if reasons := [f"{what}, such as {min(names)}" for what, names in differences if names]:
        raise CheckError(f"{folder / ADAPTER} {', and '.join(reasons)}; put back a whole copy of it")


@torch.no_grad()
def restore(model: Any, folder: Path) -> None:
    """Put a folder's weights into the model that they came from, in place.

    Raises:
        CheckError: the folder lacks weights of the model, holds others, or is damaged.
    """
    if isinstance(model, PeftModel):
        weights = read_adapter(folder)
        _require_all(model, weights, folder)
        set_peft_model_state_dict(model, weights)
        return
    state = model.state_dict()
    missing = set(state)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  a file of safetensors is no mapping
                    if name not in state or list(state[name].shape) != list(file.get_slice(name).get_shape()):
                        raise CheckError(f"{path}: {name} is no weight of this model")
                    state[name].copy_(file.get_tensor(name))
                    missing.discard(name)
        except (OSError, SafetensorError) as error:
            raise CheckError(f"{path} cannot be read: {error}") from error
    tied = {state[name].data_ptr() for name in state.keys() - missing}
    left = sorted(name for name in missing if state[name].data_ptr() not in tied)
    if left:
        raise CheckError(f"{folder} lacks {len(left)} weights, such as {left[0]}")
