"""What an accelerate configuration file may say, checked before anything starts.

accelerate passes over keys that it does not know below the top level of a file, and some of what it does know it drops
without a word: the number of processes, the CPU, FSDP, the saving of a model.
"""

from __future__ import annotations

import argparse
import dataclasses
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
        InputError: no such file, an unknown key (with the nearest known one), a value of the wrong kind, or one of the
            combinations that accelerate accepts and does not carry out.
    """
    from accelerate.commands.config.config_args import ClusterConfig

    keys = _read(path)
    where = f"launch configuration {str(path)!r}"
    for key in keys:
        if key not in (known := {field.name for field in dataclasses.fields(ClusterConfig)}):
            raise InputError(f"{where}: unknown key {key!r}; {nearest(key, known)}")
    engine = _engine(keys, where)
    counts = {name: _count(keys, name, where) for name in ("num_processes", "num_machines")}
    n_processes, n_machines = counts["num_processes"], counts["num_machines"]
    use_cpu = keys.get("use_cpu", False)
    if not isinstance(use_cpu, bool):
        raise InputError(f"{where}: use_cpu must be true or false, found {use_cpu!r}")
    if engine == "NO" and n_processes > 1:
        raise InputError(
            f"{where}: num_processes is {n_processes}, of which distributed_type NO starts one; write MULTI_GPU"
        )
    if n_processes % n_machines:
        raise InputError(
            f"{where}: num_processes {n_processes} counts the processes of all {n_machines} machines together and "
            "must be a multiple of num_machines"
        )
    _check_kinds(keys, where)
    if keys.get("mixed_precision") not in (None, "no"):
        raise InputError(
            f"{where}: mixed_precision {keys['mixed_precision']!r} would stand in no recipe; write 'no' here and "
            "training.bf16=true in the recipe"
        )
    own = BLOCKS[engine]
    for name in ("deepspeed_config", "fsdp_config", *OTHER_BLOCKS):
        block = keys.get(name) or {}
        if not isinstance(block, dict):
            raise InputError(f"{where}: {name} must hold keys, found {block!r}")
        if block and name not in (own, "dynamo_config"):
            raise InputError(f"{where}: {name} does nothing under distributed_type {engine}; remove it")
        _check_block(name, block, where)
    deepspeed_file = None
    if engine == "DEEPSPEED":
        deepspeed_file = _check_deepspeed(keys, path, where)
    elif engine == "FSDP":
        _check_fsdp(keys, where)
    return LaunchFile(path, engine, n_processes, n_machines, use_cpu, deepspeed_file, keys)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"launch configuration {str(path)!r} does not exist; see accelerate_configs/")
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise InputError(f"launch configuration {str(path)!r}: not YAML{line}") from None
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"launch configuration {str(path)!r} must hold keys, such as num_processes: 2")
    return keys


def _check_kinds(keys: Mapping[str, Any], where: str) -> None:
    """What accelerate reads without looking, and fails on in the middle of its own code."""
    for key, kind, example in (
        ("gpu_ids", str, "'0,1' in quotes, or all"),
        ("main_process_port", int, "a number such as 29500"),
        ("machine_rank", int, "a number from 0"),
        ("same_network", bool, "true or false"),
        ("mixed_precision", str, "'no' in quotes: YAML reads a bare no as false"),
    ):
        value = keys.get(key)
        if value is not None and type(value) is not kind:
            raise InputError(f"{where}: {key} is {value!r}; expected {example}")
    ids = keys.get("gpu_ids")
    if keys.get("distributed_type") == "MULTI_GPU" and ids not in (None, "all") and "," not in str(ids):
        raise InputError(
            f"{where}: gpu_ids {ids!r} is one GPU, of which MULTI_GPU needs two or more; name them, or all"
        )


def _engine(keys: Mapping[str, Any], where: str) -> str:
    place = keys.get("compute_environment", "LOCAL_MACHINE")
    if place != "LOCAL_MACHINE":
        raise InputError(f"{where}: compute_environment {place!r} is not supported; expected LOCAL_MACHINE")
    given = keys.get("distributed_type")
    engine = "NO" if given is False else given  # a bare NO is False in YAML
    if engine == "MULTI_CPU":
        raise InputError(
            f"{where}: distributed_type MULTI_CPU starts one process, whatever num_processes says; for several on the "
            "CPU write MULTI_GPU and use_cpu: true"
        )
    if engine not in BLOCKS:
        raise InputError(f"{where}: distributed_type {given!r} is not supported; expected one of {', '.join(BLOCKS)}")
    return str(engine)


def _count(keys: Mapping[str, Any], name: str, where: str) -> int:
    default = 1 if name == "num_machines" or keys.get("distributed_type") in ("NO", False) else None
    value = keys.get(name, default)
    if type(value) is not int or value < 1:
        raise InputError(f"{where}: {name} must be a whole number from 1, found {value!r}")
    return value


def _check_block(name: str, block: Mapping[str, Any], where: str) -> None:
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
            raise InputError(f"{where}: unknown key '{name}.{key}'; {nearest(key, options)}")
        try:
            text = str(value)
            fits = option.type(text) is not None if callable(option.type) else True
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            fits = False
        if not fits or (option.choices is not None and text.lower() not in [str(c).lower() for c in option.choices]):
            expected = f"one of {', '.join(map(str, option.choices))}" if option.choices else "another kind of value"
            raise InputError(f"{where}: {name}.{key} is {value!r}; expected {expected}")


def _check_deepspeed(keys: Mapping[str, Any], path: Path, where: str) -> Path | None:
    """DeepSpeed's own file, or None. Both ways of configuring it must let a split model be saved."""
    block = keys.get("deepspeed_config") or {}
    if (named := block.get("deepspeed_config_file")) is not None:
        file = path.parent / str(named)
        if both := [*(key for key in IN_DEEPSPEED_FILE if key in block), *(["mixed_precision"] * _precise(keys))]:
            raise InputError(f"{where}: {both[0]} stands beside deepspeed_config_file; say it in {str(named)!r} alone")
        try:
            zero = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
            stage, saves = zero.get("stage"), zero.get("stage3_gather_16bit_weights_on_model_save")
        except OSError as error:
            raise InputError(
                f"{where}: deepspeed_config_file {str(file)!r} cannot be read ({error.strerror}); it is looked for "
                "relative to the configuration"
            ) from None
        except (ValueError, AttributeError):
            raise InputError(f"{where}: deepspeed_config_file {str(file)!r} holds no JSON object") from None
        fix = f"set zero_optimization.stage3_gather_16bit_weights_on_model_save in {str(named)!r}"
    else:
        file, stage, saves = None, block.get("zero_stage"), block.get("zero3_save_16bit_model")
        fix = "add deepspeed_config.zero3_save_16bit_model: true"
    if type(stage) is not int or not 1 <= stage <= 3:
        raise InputError(f"{where}: the ZeRO stage must be 1, 2 or 3, found {stage!r}; set deepspeed_config.zero_stage")
    for key in ("offload_optimizer_device", "offload_param_device"):
        if block.get(key, "none") not in DEVICES:
            raise InputError(f"{where}: deepspeed_config.{key} is {block[key]!r}; expected one of {', '.join(DEVICES)}")
    if stage == 3 and saves is not True:
        raise InputError(f"{where}: a model that ZeRO-3 splits would not be saved; {fix}")
    if keys.get("num_machines", 1) > 1 and block.get("deepspeed_multinode_launcher") != "standard":
        raise InputError(
            f"{where}: with several machines headtune needs deepspeed_config.deepspeed_multinode_launcher: standard"
        )
    return file


def _precise(keys: Mapping[str, Any]) -> bool:
    return keys.get("mixed_precision") is not None


def _check_fsdp(keys: Mapping[str, Any], where: str) -> None:
    block = {key.removeprefix("fsdp_"): value for key, value in (keys.get("fsdp_config") or {}).items()}
    if str(block.get("version", 1)) != "2":
        raise InputError(
            f"{where}: fsdp_config.fsdp_version must be 2, found {block.get('version', 'none, which is 1')}"
        )
    if (kind := block.get("state_dict_type")) != "FULL_STATE_DICT":
        raise InputError(
            f"{where}: fsdp_config.fsdp_state_dict_type must be FULL_STATE_DICT, found {kind or 'none'}: a model that "
            "is saved in shards is not written, without a word"
        )
    if (policy := block.get("auto_wrap_policy")) not in ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP"):
        raise InputError(
            f"{where}: fsdp_config.fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP, found {policy or 'none'}: "
            "the model would be gathered as a whole, and no memory saved"
        )
