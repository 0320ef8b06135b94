"""Which layers of a model may be kept: those below the lowest trained one, unless something there changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from headtune.analysis.models.structure import architecture_for
from headtune.analysis.utils.errors import InputError
from headtune.train import distributed
from headtune.train.losses.activation_capture import dropout_of


@dataclass(frozen=True)
class ModelParts:
    """Where a model keeps its layers, and what comes before them."""

    config: Any
    backbone: nn.Module
    layers: list[nn.Module]
    front: dict[str, nn.Module]  # embeddings and the like, by name within the backbone


def model_parts(model: Any) -> ModelParts:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    row = architecture_for(base)
    path, _, name = row.layers.rpartition(".")
    backbone: nn.Module = base.get_submodule(path)
    layers: Any = backbone.get_submodule(name)
    later = (name, row.final_norm.rpartition(".")[2])
    front = {key: module for key, module in backbone.named_children() if key not in later}
    return ModelParts(base.config, backbone, list(layers), front)


def lowest_trained(model: Any) -> int:
    """The lowest layer with a parameter that requires grad, or the number of layers where only later parts are trained.

    Raises:
        InputError: embeddings are trained, which every layer depends on.
    """
    parts = model_parts(model)
    for name, module in parts.front.items():
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError(f"{name} is trained, and every layer depends on it; freeze it (or untie the unembedding)")
    for index, layer in enumerate(parts.layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    return len(parts.layers)


def refusal(model: Any, trainer: Any = None, rows_change: bool = False) -> str | None:
    """Why keeping the layers below the trained ones would be wrong or useless, or None where it is right.

    Args:
        model: a causal language model of a supported family, with or without a PEFT adapter.
        trainer: the transformers or TRL trainer that is going to train it; None looks at the model alone.
        rows_change: the rows of an epoch are drawn anew, so that no row comes twice.
    """
    try:
        lowest = lowest_trained(model)
    except InputError as error:
        return str(error)
    if lowest == 0:
        return "layer 0 is trained, so there is nothing below to keep"
    if rows_change:
        return "rows are drawn anew in every epoch, so none comes twice"
    parts = model_parts(model)
    named = parts.front | {f"layer {index}": layer for index, layer in enumerate(parts.layers[:lowest])}
    below = [(name, module) for name, top in named.items() for module in top.modules()]
    for name, module in [("the model", parts.backbone), *below]:
        if isinstance(module, BaseTunerLayer):
            return f"{name} carries an adapter that is not trained, and which one is active may change"
        if drops := dropout_of(module):
            return f"{name} drops at random ({drops}); set dropout to 0"
    if any(parameter.device.type == "meta" for parameter in parts.backbone.parameters()):
        return "weights are offloaded"
    return None if trainer is None else _trainer_refusal(trainer)


def _trainer_refusal(trainer: Any) -> str | None:
    arguments, accelerator = trainer.args, trainer.accelerator
    if distributed.partitioned(accelerator):
        return f"{distributed.strategy(accelerator)} keeps only a part of each layer in a process"
    if getattr(arguments, "packing", False):
        return "packing puts several examples into one row"
    if getattr(arguments, "padding_free", False) or getattr(trainer, "padding_free", False):
        return "padding_free puts the whole batch into one row"
    if getattr(arguments, "neftune_noise_alpha", None):
        return f"neftune_noise_alpha={arguments.neftune_noise_alpha} adds noise to the embeddings"
    if getattr(arguments, "torch_compile", False):
        return "torch_compile would compile the layers that are skipped"
    if arguments.n_gpu > 1:
        return f"one process copies the model to {arguments.n_gpu} GPUs at every step; launch one process a GPU"
    return None
