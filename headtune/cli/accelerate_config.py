"""What an accelerate configuration file may say, checked before anything starts.

Checked is what accelerate would drop without a word (the number of processes, the CPU, FSDP, the saving of a model,
keys of a block), what it fails on in the middle of its own code, and what it would only notice in every process. What
it refuses clearly when it launches is left to it; `accelerate_launch.start` hands that on in one line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headtune.analysis.utils.errors import InputError, nearest

# The engines that headtune is tested with, and the block of the file that each reads.
BLOCKS = {"NO": None, "MULTI_GPU": None, "DEEPSPEED": "deepspeed_config", "FSDP": "fsdp_config"}
# What else is a block for accelerate. Only compilation works beside every engine.
OTHER_BLOCKS = ("dynamo_config", "fp8_config", "megatron_lm_config", "mpirun_config", "parallelism_config")
# Keys that accelerate reads without looking at their kind, and fails on in the middle of its own code.
KINDS: dict[str, tuple[Any, str]] = {
    "num_processes": (int, "a whole number from 1"),
    "num_machines": (int, "a whole number from 1"),
    "machine_rank": (int, "a number from 0"),
    "main_process_port": (int, "a number such as 29500"),
    "gpu_ids": (str, "'0,1' in quotes, or all"),
    "mixed_precision": (str, "'no' in quotes: YAML reads a bare no as false"),
    "same_network": (bool, "true or false"),
    "use_cpu": (bool, "true or false"),
}
DEVICES = ("none", "cpu", "nvme")
# Beside a DeepSpeed file accelerate stops on these, with a report for every process.
IN_DEEPSPEED_FILE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_save_16bit_model",
)


@dataclass(frozen=True)
class LaunchFile:
    """A configuration file of accelerate that passed `check`.

    Attributes:
        engine: accelerate's distributed_type: NO, MULTI_GPU, DEEPSPEED or FSDP.
        n_processes: of all machines together.
        deepspeed_file: DeepSpeed's own file, which the configuration names relative to itself.
        keys: everything that the file says.
    """

    path: Path
    engine: str
    n_processes: int
    n_machines: int
    use_cpu: bool
    deepspeed_file: Path | None
    keys: Mapping[str, Any]

    @property
    def processes_here(self) -> int:
        """Processes on this machine."""
        return self.n_processes // self.n_machines


def check(path: Path) -> LaunchFile:
    """Read a configuration file and refuse what accelerate would misread, drop or only notice in every process.

    Raises:
        InputError: no such file, an unknown key (with the nearest known one) or engine, a value of the wrong kind, or
            one of the combinations that accelerate accepts and does not carry out.
    """
    name = f"launch configuration {str(path)!r}"
    try:
        return _check(_read(path), path)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    """The file's keys, all of which accelerate knows."""
    from accelerate.commands.config.config_args import ClusterConfig

    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError("it does not exist; see accelerate_configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"not YAML{f' at line {mark.line + 1}' if mark else ''}") from None
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise InputError("it must hold keys, such as num_processes: 2")
    fields = ClusterConfig.__dataclass_fields__
    for key in keys:
        if key not in fields:
            raise InputError(f"unknown key {key!r}; {nearest(key, fields)}")
    return keys


def _check(keys: dict[str, Any], path: Path) -> LaunchFile:
    # Kinds of values, then the engine.
    for key, (kind, example) in KINDS.items():
        value: Any = keys.get(key)
        if value is not None and (type(value) is not kind or (key.startswith("num_") and value < 1)):
            raise InputError(f"{key} is {value!r}; expected {example}")
    engine = keys.get("distributed_type")
    engine = "NO" if engine is False else engine  # a bare NO is false in YAML
    if engine == "MULTI_CPU":
        raise InputError(
            "distributed_type MULTI_CPU starts one process, whatever num_processes says; for several on the CPU write "
            "MULTI_GPU and use_cpu: true"
        )
    if engine not in BLOCKS:
        raise InputError(f"distributed_type {engine!r} is not supported; expected one of {', '.join(BLOCKS)}")
    if (place := keys.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        raise InputError(f"compute_environment {place!r} is not supported; expected LOCAL_MACHINE")

    # Numbers of processes, and precision.
    n_machines = keys.get("num_machines") or 1
    n_processes = keys.get("num_processes") or (1 if engine == "NO" else None)
    if n_processes is None:
        raise InputError("num_processes is missing; set it to the processes of all machines together")
    if engine == "NO" and n_processes > 1:
        raise InputError(f"num_processes is {n_processes}, of which distributed_type NO starts one; write MULTI_GPU")
    if n_processes % n_machines:
        raise InputError(
            f"num_processes {n_processes} counts the processes of all {n_machines} machines together and must be a "
            "multiple of num_machines"
        )
    if keys.get("mixed_precision") not in (None, "no"):
        raise InputError(
            f"mixed_precision {keys['mixed_precision']!r} would stand in no recipe; write 'no' here and "
            "training.bf16=true in the recipe"
        )

    # Blocks: the engine's own, and compilation.
    for name in ("deepspeed_config", "fsdp_config", *OTHER_BLOCKS):
        block = keys.get(name) or {}
        if not isinstance(block, dict):
            raise InputError(f"{name} must hold keys, found {block!r}")
        if block and name not in (BLOCKS[engine], "dynamo_config"):
            raise InputError(f"{name} does nothing under distributed_type {engine}; remove it")
        _check_block(name, block)
    deepspeed_file = _check_deepspeed(keys, path) if engine == "DEEPSPEED" else None
    if engine == "FSDP":
        _check_fsdp(keys.get("fsdp_config") or {})
    return LaunchFile(path, engine, n_processes, n_machines, bool(keys.get("use_cpu")), deepspeed_file, keys)


def _check_block(name: str, block: Mapping[str, Any]) -> None:
    """Every key of a block is an option of accelerate's launcher, and its value one that the option takes."""
    if not block:
        return
    from accelerate.commands.launch import launch_command_parser

    prefix = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_"}.get(name, "")
    titles = {"deepspeed_config": "DeepSpeed Arguments", "dynamo_config": "Resource Selection Arguments"}
    title = titles.get(name, "FSDP Arguments")
    groups = {group.title: group._group_actions for group in launch_command_parser()._action_groups}
    options: dict[str, argparse.Action] = {a.dest: a for a in groups[title] if a.dest.startswith(prefix)}
    for key, value in block.items():
        if value == "auto" and key in ("gradient_accumulation_steps", "gradient_clipping"):
            continue  # they follow the recipe
        option = options.get(key if key.startswith(prefix) else prefix + key)
        if option is None:
            raise InputError(f"unknown key '{name}.{key}'; {nearest(key, options)}")
        try:
            text = str(value)
            fits = option.type(text) is not None if callable(option.type) else True
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            fits = False
        if not fits or (option.choices is not None and text.lower() not in [str(c).lower() for c in option.choices]):
            expected = f"one of {', '.join(map(str, option.choices))}" if option.choices else "another kind of value"
            raise InputError(f"{name}.{key} is {value!r}; expected {expected}")


def _check_deepspeed(keys: Mapping[str, Any], path: Path) -> Path | None:
    """DeepSpeed's own file, or None. Both ways of configuring it must let a split model be saved."""
    block = keys.get("deepspeed_config") or {}
    file, stage, saves = None, block.get("zero_stage"), block.get("zero3_save_16bit_model")
    fix = "add deepspeed_config.zero3_save_16bit_model: true"
    if (name := block.get("deepspeed_config_file")) is not None:
        file = path.parent / str(name)
        twice = [key for key in IN_DEEPSPEED_FILE if key in block]
        twice += ["mixed_precision"] if keys.get("mixed_precision") is not None else []
        if twice:
            raise InputError(f"{twice[0]} stands beside deepspeed_config_file; say it in {str(name)!r} alone")
        try:
            zero = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
            stage, saves = zero.get("stage"), zero.get("stage3_gather_16bit_weights_on_model_save")
        except OSError as error:
            raise InputError(
                f"deepspeed_config_file {str(file)!r} cannot be read ({error.strerror}); it is looked for relative to "
                "the configuration"
            ) from None
        except (ValueError, AttributeError):
            raise InputError(f"deepspeed_config_file {str(file)!r} holds no JSON object") from None
        fix = f"set zero_optimization.stage3_gather_16bit_weights_on_model_save in {str(name)!r}"
    if type(stage) is not int or not 1 <= stage <= 3:
        raise InputError(f"the ZeRO stage must be 1, 2 or 3, found {stage!r}; set deepspeed_config.zero_stage")
    for key in ("offload_optimizer_device", "offload_param_device"):
        if block.get(key, "none") not in DEVICES:
            raise InputError(f"deepspeed_config.{key} is {block[key]!r}; expected one of {', '.join(DEVICES)}")
    if stage == 3 and saves is not True:
        raise InputError(f"a model that ZeRO-3 splits would not be saved; {fix}")
    if keys.get("num_machines", 1) > 1 and block.get("deepspeed_multinode_launcher") != "standard":
        raise InputError("with several machines headtune needs deepspeed_config.deepspeed_multinode_launcher: standard")
    return file


def _check_fsdp(block: Mapping[str, Any]) -> None:
    block = {key.removeprefix("fsdp_"): value for key, value in block.items()}
    if str(block.get("version", 1)) != "2":
        raise InputError(f"fsdp_config.fsdp_version must be 2, found {block.get('version', 'none, which is 1')}")
    if (kind := block.get("state_dict_type")) != "FULL_STATE_DICT":
        raise InputError(
            f"fsdp_config.fsdp_state_dict_type must be FULL_STATE_DICT, found {kind or 'none'}: a model that is saved "
            "in shards is not written, without a word"
        )
    if (policy := block.get("auto_wrap_policy")) not in ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP"):
        raise InputError(
            f"fsdp_config.fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP, found {policy or 'none'}: the model "
            "would be gathered as a whole, and no memory saved"
        )
