"""What differs between training engines: where the weights are while a model trains, and how to have them back whole.

    engine          each process holds
    single, DDP     everything
    ZeRO-1, ZeRO-2  the weights whole; a part of the optimiser's state (and of the gradients)
    ZeRO-3, FSDP2   a part of the weights; a layer is put together for as long as it computes

Under the last two, code that reads weights outside the model's own forward pass finds parts or nothing at all:

    with gathered_parameters(modules):          # penalties: whole tensors, with gradient to the parts
    empty = meta_copy(trainer.model)            # before training
    model = gather_full_model(trainer, empty)   # after it: the same model, whole, without the engine

Every process has to call these, in the same order: they communicate.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.processes import world_size

PARTITIONED = ("ZeRO-3", "FSDP2")


def strategy(accelerator: Any) -> str:
    """`single`, `DDP`, `ZeRO-1`, `ZeRO-2`, `ZeRO-3` or `FSDP2`.

    Raises:
        InputError: the first version of FSDP, which flattens weights, so that no head's are there to be read.
    """
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == "FSDP":
        if getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise InputError("fsdp_version is 1, which flattens weights; set fsdp_config.fsdp_version to 2")
        return "FSDP2"
    return "single" if accelerator.num_processes == 1 else "DDP"


def partitioned(accelerator: Any) -> bool:
    """Whether each process holds a part of the weights only."""
    return strategy(accelerator) in PARTITIONED


# --- refusals ---------------------------------------------------------------------------------------------------------


def require_full_state(accelerator: Any) -> None:
    """Refuse a state dict in parts, of which transformers writes nothing into a checkpoint, without a word.

    Raises:
        InputError: FSDP2 with another `fsdp_state_dict_type` than FULL_STATE_DICT.
    """
    if strategy(accelerator) == "FSDP2":
        kind = str(accelerator.state.fsdp_plugin.state_dict_type).rpartition(".")[2]
        if kind != "FULL_STATE_DICT":
            raise InputError(
                f"fsdp_state_dict_type is {kind}, of which no weights are saved; set fsdp_config.fsdp_state_dict_type "
                "to FULL_STATE_DICT"
            )


def require_launch(accelerator: Any) -> None:
    """Refuse the launcher's silent traps: processes that each train alone, an engine that was asked for and dropped.

    Raises:
        InputError: what runs is not what was launched.
    """
    launched = world_size()
    if accelerator.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched but the trainer sees {accelerator.num_processes}; on a CPU launch "
            "with ACCELERATE_USE_CPU=true and accelerate_configs/ddp_cpu_2.yaml"
        )
    for name in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true" and accelerator.distributed_type.value != name:
            raise InputError(
                f"{name} was launched but {accelerator.distributed_type.value} is what runs; see the head of the "
                "file in accelerate_configs/ for its launch line"
            )


# --- while it trains --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gathered_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, the modules' own parameters (not their children's) are whole tensors.

    Gradients reach the parts: of what the processes computed with them the mean, as of a loss. Not for a forward pass
    inside the block. Where nothing is split, nothing happens.
    """
    split = [
        (module, name, parameter)
        for module in _distinct(modules)
        for name, parameter in module._parameters.items()
        if parameter is not None and _is_part(parameter)
    ]
    if not split:
        yield
        return
    tensors = _gathered([parameter for _, _, parameter in split])
    for module, name, parameter in split:
        module._parameters[name] = tensors[id(parameter)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, parameter in split:
            module._parameters[name] = parameter


@torch.no_grad()
def scatter_into(parameter: Any, values: Tensor) -> None:
    """Give a parameter values that every process knows; one that ZeRO-3 has split has got them from its checkpoint."""
    if _is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements)
    elif hasattr(parameter, "ds_id"):
        return
    parameter.copy_(values)


def all_reduce_mean(size: Tensor) -> Tensor:
    """The mean over processes of a number without gradient, such as the one that a penalty's sum is divided by.

    Processes see rows of other lengths. The mean of their quotients is not that of the whole batch; the mean of sums
    that are all divided by the same is.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return size
    total = size.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def trainable_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that own a parameter that is trained."""
    return [
        module
        for module in model.modules()
        if any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values())
    ]


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def _is_part(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id") or _is_dtensor(parameter)


def _is_dtensor(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _gathered(parameters: list[Any]) -> dict[int, Tensor]:
    """`id(parameter) -> ` the whole tensor."""
    tensors: dict[int, Tensor] = {}
    away = []
    for parameter in {id(parameter): parameter for parameter in parameters}.values():
        if _is_dtensor(parameter):
            tensors[id(parameter)] = _Gathered.apply(parameter) if parameter.requires_grad else parameter.full_tensor()
        elif parameter.ds_status.name == "AVAILABLE":
            tensors[id(parameter)] = parameter.clone()
        else:
            away.append(parameter)
    if away:
        import deepspeed

        with deepspeed.zero.GatheredParameters(away):
            # A copy: the parameter is emptied again, and the copy's gradient needs only its shape as it is now.
            tensors |= {id(parameter): parameter.clone() for parameter in away}
    return tensors


class _Gathered(torch.autograd.Function):
    """A DTensor's whole tensor; its gradient is the mean over the processes, cut as the tensor is."""

    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        with torch.no_grad():
            full: Tensor = parameter.full_tensor()
        return full

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        from torch.distributed.tensor import DTensor, Replicate

        mean = gradients[0].contiguous().clone()
        for axis in range(ctx.mesh.ndim):
            distributed.all_reduce(mean, group=ctx.mesh.get_group(axis))
        mean /= ctx.mesh.size()
        alike = DTensor.from_local(mean, ctx.mesh, [Replicate()] * ctx.mesh.ndim, run_check=False)
        return alike.redistribute(placements=ctx.placements)


# --- after it ---------------------------------------------------------------------------------------------------------


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without its weights (they are on the meta device), to be filled by `gather_full_model`.

    The engines change a model for good: classes, hooks, parameters. This copy is what it was.
    """
    on_meta: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    copied = copy.deepcopy(model, on_meta)
    for module in copied.modules():
        module.__dict__.pop("forward", None)  # a trainer's own, which calls the model that it was made for
    return copied


@torch.no_grad()
def gather_full_model(trainer: Any, empty: nn.Module, everywhere: bool = False) -> nn.Module:
    """Fill a `meta_copy` with the weights of a trainer's model, as trained, and let the engine go.

    Args:
        trainer: under ZeRO-3 or FSDP2; it cannot train any more, and its `model` is the result.
        empty: the `meta_copy` of its model, made before the training.
        everywhere: every process gets the weights; otherwise rank 0, and the others keep an empty copy.

    Raises:
        CheckError: a weight that is not there, or not whole.
    """
    accelerator = trainer.accelerator
    holds_weights = everywhere or accelerator.is_main_process
    there = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in accelerator.unwrap_model(trainer.model).named_parameters(remove_duplicate=False)
    }
    filled: dict[int, nn.Parameter] = {}
    for name, empty_parameter in empty.named_parameters():
        if name not in there:
            raise CheckError(f"the trained model has no weight {name}; nothing was saved")
        part = there[name]
        tensor = _gathered([part])[id(part)] if _is_part(part) else part
        if holds_weights:
            filled[id(empty_parameter)] = nn.Parameter(
                tensor.detach().to("cpu", copy=True), requires_grad=empty_parameter.requires_grad
            )
    _let_go(trainer)
    if holds_weights:
        for module in empty.modules():
            for name, placeholder in module._parameters.items():
                if placeholder is not None:
                    module._parameters[name] = filled[id(placeholder)]
        empty.to(accelerator.device)
        require_complete(empty)
    trainer.model = trainer.model_wrapped = empty
    return empty


def _let_go(trainer: Any) -> None:
    """Free the engine's memory: optimiser state, gradients, parts of weights."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # with it, generation on rank 0 would wait for the other processes
    if (deepspeed := getattr(trainer, "deepspeed", None)) is not None:
        deepspeed.destroy()
    for name in ("deepspeed", "optimizer", "lr_scheduler"):
        setattr(trainer, name, None)
    trainer.accelerator.free_memory()


def require_complete(model: nn.Module) -> None:
    """Refuse to save what an engine has left in parts.

    Raises:
        CheckError: a weight without numbers (the empty placeholder of ZeRO-3), on the meta device, or split.
    """
    for name, parameter in model.named_parameters():
        if _is_dtensor(parameter) or parameter.numel() == 0 or parameter.device.type == "meta":
            raise CheckError(
                f"{name} is not whole in this process (shape {list(parameter.shape)}, {parameter.device.type}); "
                "nothing was saved"
            )


def base_of(model: Any) -> Any:
    """The transformers model, under an adapter or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
