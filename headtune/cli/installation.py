"""What of this machine headtune works with: packages, devices, DeepSpeed, W&B, the hub, caches, the default model.

Nothing is asked of the network and nothing is written. Of keys only their presence is told. `accelerate env` and
`transformers env` print versions and devices for a bug report; here each line says whether headtune can use the part,
and how to mend it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headtune.analysis.utils.errors import InputError

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "wandb")
LITTLE_DISK = 2 << 30  # bytes: a small model and the checkpoints of one run
REINSTALL = "pip install --force-reinstall"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: what is there.
        fix: what to do about it; empty where all is well.
        broken: headtune does not work without the fix; otherwise a part of it, that is named.
    """

    name: str
    status: str
    fix: str = ""
    broken: bool = False


def examine() -> list[Finding]:
    """All findings, in the order in which they are read."""
    findings = list(_versions())
    if not any(finding.broken for finding in findings):  # else nothing more can be asked
        for part in (_devices, _deepspeed, _wandb, _hub, _folders, _data):
            findings += part()
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding("headtune", f"{_version('headtune') or 'not installed'}, Python {platform.python_version()}")
    needs = {one.name: one.specifier for one in map(Requirement, importlib.metadata.requires("headtune") or [])}
    for package in PACKAGES:
        version, need = _version(package), needs.get(package)
        fix = f'pip install "{package}{need or ""}"'
        if version is None:
            yield Finding(package, "not installed", fix, broken=True)
        elif need and not need.contains(version, prereleases=True):
            yield Finding(package, f"{version}, and headtune needs {need}", fix, broken=True)
        else:
            yield Finding(package, version)


def _devices() -> Iterator[Finding]:
    import psutil  # type: ignore[import-untyped]
    import torch

    memory = psutil.virtual_memory()
    yield Finding("cpu", f"{os.cpu_count()} cores, {_gib(memory.available)} of {_gib(memory.total)} free")
    if not torch.cuda.is_available():
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        if shutil.which("nvidia-smi"):
            fix = "install the torch that suits the driver, see pytorch.org/get-started"
            yield Finding("gpu", f"there may be one, but torch finds none ({built})", fix)
        else:
            yield Finding("gpu", f"none ({built}); models run on the CPU")
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            fix = "look at it with nvidia-smi, or hide it with CUDA_VISIBLE_DEVICES"
            yield Finding(f"gpu {index}", f"does not answer ({str(error).splitlines()[0]})", fix, broken=True)
            continue
        half = "" if torch.cuda.is_bf16_supported() else ", no bfloat16"
        yield Finding(f"gpu {index}", f"{torch.cuda.get_device_name(index)}, {_gib(free)} of {_gib(total)} free{half}")


def _deepspeed() -> Iterator[Finding]:
    import torch

    status, fix = _version("deepspeed"), ""
    if status is None:
        status, fix = "not installed; only the zero configurations need it", 'pip install "headtune[deepspeed]"'
    else:
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn about having to guess
        try:
            import deepspeed  # noqa: F401
        except Exception as error:  # whatever its build or its compiler says
            first = (str(error) or type(error).__name__).splitlines()[0]
            status, fix = f"{status} cannot be imported ({first})", f"{REINSTALL} deepspeed"
        else:
            ninja = shutil.which("ninja") or (Path(sys.executable).parent / "ninja").is_file()
            missing = "" if ninja and shutil.which("c++") else "c++" if ninja else "ninja"
            if missing and on_cpu:
                status += f", but it builds a part of itself and finds no {missing}"
                fix = "pip install ninja" if missing == "ninja" else "install a C++ compiler, such as the package g++"
    yield Finding("deepspeed", status, fix)


def _wandb() -> Iterator[Finding]:
    from headtune.train.tracking.wandb_run import mode_by_key, requested_mode

    try:
        mode = requested_mode(None)
    except InputError as error:
        status, _, fix = str(error).partition("; ")
        yield Finding("W&B", status, fix, broken=True)
        return
    key = "a key is there" if mode_by_key() == "online" else "no key"
    if mode is not None:
        source = "WANDB_MODE" if mode != "disabled" or os.environ.get("WANDB_MODE") == mode else "WANDB_DISABLED"
        yield Finding("W&B", f"{mode}, as {source} says; {key}")
    elif key != "no key":
        yield Finding("W&B", f"online; {key}")
    else:
        yield Finding("W&B", "offline: no key; runs stay in their folders, and with WANDB_API_KEY they are sent")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    how = "offline, as HF_HUB_OFFLINE says" if constants.HF_HUB_OFFLINE else "not switched off, and not tried"
    token = "a token is there" if get_token() else "no token; only gated and private models need one"
    yield Finding("hub", f"{how}; {token}")


def _folders() -> Iterator[Finding]:
    from huggingface_hub import constants

    from headtune.analysis.models.loading import cache_folder

    for name, folder, fix in (
        ("cache", cache_folder(), "set HEADTUNE_CACHE to another folder"),
        ("hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to another folder"),
        ("here", Path.cwd(), "change to another folder"),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            yield Finding(name, f"{folder} cannot be written to", fix, broken=name == "cache")
        else:
            fix = f"make room, or {fix}" if free < LITTLE_DISK else ""
            yield Finding(name, f"{folder}, {_gib(free)} of disk free", fix)


def _data() -> Iterator[Finding]:
    from headtune.analysis.models import builtin
    from headtune.analysis.models.loading import EMBEDDED, cache_folder
    from headtune.analysis.tasks.loading import builtin_names
    from headtune.train.config.recipe import recipe_names

    if builtin.is_installed(EMBEDDED):
        ready = (cache_folder() / EMBEDDED / "config.json").is_file()
        yield Finding("model", f"{EMBEDDED} is installed, {'converted' if ready else 'converted at its first use'}")
    else:
        why = "without it neither headtune demo nor the recipes run as they are"
        yield Finding("model", f"{EMBEDDED} is not installed; {why}", builtin.BUILT_IN[EMBEDDED].install)
    try:
        yield Finding("data", f"{len(recipe_names())} recipes, {len(builtin_names())} tasks")
    except (OSError, InputError) as error:
        yield Finding("data", str(error), f"{REINSTALL} headtune", broken=True)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
