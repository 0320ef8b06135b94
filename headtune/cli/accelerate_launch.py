"""Start a recipe in the processes that an accelerate configuration file describes.

    headtune train RECIPE --config_file accelerate_configs/zero2.yaml

The file and the recipe are checked first, before any process starts. The launch itself is accelerate's own, without its
reports: a process that refuses something says so itself, in one line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headtune import plugins
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import require_new_folder
from headtune.analysis.utils.processes import world_size
from headtune.train.config.recipe import load_recipe
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.config.schema import Recipe

from .accelerate_config import LaunchFile, check


def launch(path: Path, name: str, overrides: Sequence[str], flags: Sequence[str]) -> int:
    """`headtune train NAME OVERRIDES FLAGS --config_file PATH`: check all that can be, launch, return the exit code.

    Raises:
        InputError: the file, the recipe, or a run that the launch does not fit.
    """
    if world_size() > 1:
        raise InputError("--config_file launches the run, which a launcher has already done; leave one of them out")
    file = check(path)
    recipe = load_recipe(name, overrides)
    require_machine(file)
    check_recipe(recipe, file, "--resume" in flags)
    return start(file, [name, *overrides, *flags, *plugins.arguments_for(recipe.plugins)])


def require_machine(file: LaunchFile) -> None:
    """Refuse a file that this machine cannot carry out.

    Raises:
        InputError: fewer GPUs than processes, FSDP on the CPU, DeepSpeed not installed, an unnamed first machine.
    """
    name = f"launch configuration {str(file.path)!r}"
    if file.engine == "FSDP" and file.use_cpu:
        raise InputError(
            f"{name}: on the CPU accelerate turns FSDP into DDP without a word; use accelerate_configs/ddp_cpu_2.yaml "
            "or zero3_cpu_2.yaml"
        )
    if file.engine == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise InputError(f'{name}: DeepSpeed is not installed; pip install "headtune[deepspeed]"')
    if file.n_machines > 1:
        for key in ("main_process_ip", "main_process_port", "machine_rank"):
            if file.keys.get(key) is None:
                raise InputError(
                    f"{name}: {key} is missing; with several machines set main_process_ip, main_process_port and "
                    "machine_rank in the file, or use accelerate launch with these options (see the head of "
                    "accelerate_configs/multi_node_ddp.yaml)"
                )
        if not 0 <= file.keys["machine_rank"] < file.n_machines:
            raise InputError(f"{name}: machine_rank must be from 0 to {file.n_machines - 1}")
    if file.use_cpu:
        return
    import torch

    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    chosen = str(file.keys.get("gpu_ids") or "all")
    usable = there if chosen == "all" else min(there, len(chosen.split(",")))
    if file.processes_here > usable:
        which = "" if chosen == "all" else f" (gpu_ids: {chosen})"
        fix = "lower num_processes" if usable else "use a file for the CPU, such as accelerate_configs/cpu.yaml"
        raise InputError(
            f"{name}: {file.processes_here} processes on this machine need as many GPUs, and there are "
            f"{usable}{which}; {fix}"
        )


def check_recipe(recipe: Recipe, file: LaunchFile, resume: bool) -> None:
    """What can be said against a run without its model: folder, tasks, numbers that contradict the launch.

    Raises:
        InputError: any of these.
    """
    if not resume:
        fix = "choose another output_dir or name, or continue it with --resume"
        require_new_folder(recipe.folder, fix, "recipe.yaml")
    elif not (recipe.folder / "recipe.yaml").is_file():
        raise InputError(
            f"nothing to resume in {str(recipe.folder)!r}: it holds no recipe.yaml; start it without --resume"
        )
    task = recipe.task
    parts = [{"train": step.train, "eval": step.eval, "sequence": None} for step in task.sequence or []]
    for part in parts or [{}]:
        tasks_of(task.model_copy(update=part))
    block = file.keys.get("deepspeed_config") or {}
    for key, of_recipe, default in (
        ("gradient_accumulation_steps", "gradient_accumulation_steps", 1),
        ("gradient_clipping", "max_grad_norm", 1.0),
    ):
        value, expected = block.get(key, "auto"), recipe.training.get(of_recipe, default)
        if value != "auto" and float(value) != float(expected):
            raise InputError(
                f"launch configuration {str(file.path)!r}: deepspeed_config.{key} is {value}, the recipe's "
                f"training.{of_recipe} {expected}; leave it out of the file"
            )


def start(file: LaunchFile, words: Sequence[str]) -> int:
    """Launch `headtune train` with `words` through accelerate, wait for it, and return its exit code.

    The code is that of the process that failed first; a process that was killed by a signal cannot speak for itself, so
    its rank is named here, and the code is 128 + the signal. SIGTERM and SIGINT are passed on to the processes, which
    decide how they end.
    """
    import subprocess

    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--config_file", str(file.path), "--num_processes", str(file.n_processes)]
    if file.deepspeed_file is not None:  # accelerate would look for it in the current folder
        options += ["--deepspeed_config_file", str(file.deepspeed_file.resolve())]
    if file.n_machines == 1 and file.keys.get("main_process_port") is None:
        options += ["--main_process_port", "0"]  # a free one: two runs at a time do not meet
    arguments = launch_command_parser().parse_args([*options, "-m", "headtune.train", *words])
    # The launcher's own answer to a signal is to end its processes after 30 seconds.
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"
    with patch_environment(**_environment(file)), _silent(), _passing_on(signal.SIGTERM, signal.SIGINT) as passed:
        try:
            launch_command(arguments)
        except ChildFailedError as error:
            ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except subprocess.CalledProcessError as error:
            ended = {0: error.returncode}
        except (ConnectionError, ValueError) as error:  # the port is taken; what accelerate itself refuses
            raise InputError(f"launch configuration {str(file.path)!r}: {' '.join(str(error).split())}") from None
        else:
            return 0
    return _code(ended, passed)


def _environment(file: LaunchFile) -> dict[str, str]:
    """What the launcher does not hand on by itself."""
    # The switch for several processes, which the launcher sets for one only. It would switch DeepSpeed off.
    result = {"accelerate_use_cpu": str(file.use_cpu and file.engine != "DEEPSPEED").lower()}
    if file.use_cpu and file.engine == "DEEPSPEED":
        result |= {"cuda_visible_devices": "", "ds_accelerator": "cpu"}
    if file.engine == "DEEPSPEED":  # which builds with the ninja of its own environment
        result["path"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return result


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the launcher's own log, a page for every process that ended badly."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _passing_on(*signals: signal.Signals) -> Iterator[set[int]]:
    """Pass signals on to the processes below this one, and wait for them as before; yields those that were.

    Raises:
        KeyboardInterrupt: there is no process yet.
    """
    passed: set[int] = set()

    def pass_on(number: int, _frame: Any) -> None:
        import psutil  # type: ignore[import-untyped]

        children = psutil.Process().children()
        if not children and not passed:
            raise _before_it_began(number)
        passed.add(number)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                # A terminal sends Ctrl-C to a process of the same group by itself.
                if number == signal.SIGTERM or os.getpgid(child.pid) != os.getpgrp():
                    child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield passed
        return
    before = {number: signal.signal(number, pass_on) for number in signals}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _before_it_began(number: int) -> KeyboardInterrupt:
    stop = KeyboardInterrupt(f"interrupted by {signal.Signals(number).name} before the run began; start it again")
    stop.exit_code = 0 if number == signal.SIGTERM else 130  # type: ignore[attr-defined]
    return stop


def _code(ended: Mapping[int, int], passed: Collection[int] = ()) -> int:
    """The exit code of the process that failed first; the others were stopped by the launcher, or fell with it.

    Raises:
        KeyboardInterrupt: all were ended by a signal that was passed on to them, before the run could answer it.
    """
    from .console import print_error

    rank, code = next(iter(ended.items()))  # in the order in which they ended
    if code >= 0:
        return code  # it said why itself
    if -code in passed:
        if 0 in ended:
            raise _before_it_began(-code)
        return 0 if code == -signal.SIGTERM else 130  # rank 0 answered, and said so
    name = signal.Signals(-code).name
    why = " (as the system does when memory runs out)" if name == "SIGKILL" else ""
    others = "" if len(ended) == 1 else ", and all others were stopped"
    return print_error(f"rank {rank} was ended by {name}{why}{others}; continue the run with --resume", 128 - code)
