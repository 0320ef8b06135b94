"""What of this machine headtune works with: packages, devices, DeepSpeed, W&B, the hub, caches, the default model.

Nothing is asked of the network and nothing is written. Of keys only their presence is told.
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
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        found: what is there.
        fix: what to do about it; empty where all is well.
        broken: headtune does not work without the fix; otherwise a part of it, that is named.
    """

    name: str
    found: str
    fix: str = ""
    broken: bool = False


def examine() -> list[Finding]:
    """All findings, in the order in which they are read."""
    found = list(_versions())
    if any(finding.broken for finding in found):
        return found  # nothing else can be asked
    parts = (_devices, _deepspeed, _wandb, _hub, _caches, _data)
    return [*found, *(finding for part in parts for finding in part())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding("headtune", f"{_version('headtune') or 'not installed'}, Python {platform.python_version()}")
    wanted = {one.name: one.specifier for one in map(Requirement, importlib.metadata.requires("headtune") or [])}
    for package in PACKAGES:
        version, needs = _version(package), wanted.get(package)
        install = f'pip install "{package}{needs or ""}"'
        if version is None:
            yield Finding(package, "not installed", install, broken=True)
        elif needs and not needs.contains(version, prereleases=True):
            yield Finding(package, f"{version}, and headtune needs {needs}", install, broken=True)
        else:
            yield Finding(package, version)


def _devices() -> Iterator[Finding]:
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    yield Finding("cpu", f"{os.cpu_count()} cores, {_gib(memory.available)} of {_gib(memory.total)} free")
    import torch

    if not torch.cuda.is_available():
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        if shutil.which("nvidia-smi"):
            fix = "install the torch that suits the driver, see pytorch.org/get-started"
            yield Finding("gpu", f"there may be one, but torch finds none ({built})", fix)
        else:
            yield Finding("gpu", f"none ({built}); models run on the CPU")
        return
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
    version = _version("deepspeed")
    if version is None:
        yield Finding(
            "deepspeed", "not installed; only the zero configurations need it", 'pip install "headtune[deepspeed]"'
        )
        return
    if not _cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn about having to guess
    try:
        import deepspeed  # noqa: F401
    except Exception as error:  # whatever its build or its compiler says
        first = (str(error) or type(error).__name__).splitlines()[0]
        yield Finding("deepspeed", f"{version} cannot be imported ({first})", "pip install --force-reinstall deepspeed")
        return
    beside = Path(sys.executable).parent / "ninja"
    tools = {"ninja": bool(shutil.which("ninja")) or beside.is_file(), "c++": bool(shutil.which("c++"))}
    missing = [name for name, there in tools.items() if not there]
    if missing and not _cuda():
        fix = {"ninja": "pip install ninja", "c++": "install a C++ compiler, such as the package g++"}[missing[0]]
        yield Finding("deepspeed", f"{version}, but it builds a part of itself and finds no {missing[0]}", fix)
    else:
        yield Finding("deepspeed", version)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _wandb() -> Iterator[Finding]:
    from headtune.train.tracking.wandb_run import mode_by_key, requested_mode

    try:
        mode = requested_mode(None)
    except InputError as error:
        found, _, fix = str(error).partition("; ")
        yield Finding("W&B", found, fix, broken=True)
        return
    key = mode_by_key() == "online"
    there = "a key is there" if key else "no key"
    if mode is not None:
        yield Finding("W&B", f"{mode}, as WANDB_MODE says; {there}")
    elif key:
        yield Finding("W&B", f"online; {there}")
    else:
        yield Finding("W&B", f"offline: {there}; runs stay in their folders, and with WANDB_API_KEY they are sent")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    how = "offline, as HF_HUB_OFFLINE says" if constants.HF_HUB_OFFLINE else "not switched off, and not tried"
    token = "a token is there" if get_token() else "no token; only gated and private models need one"
    yield Finding("hub", f"{how}; {token}")


def _caches() -> Iterator[Finding]:
    from huggingface_hub import constants

    from headtune.analysis.models.loading import cache_folder

    for name, folder, variable in (
        ("cache", cache_folder(), "HEADTUNE_CACHE"),
        ("hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME"),
        ("here", Path.cwd(), ""),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        found = f"{folder}, {_gib(free)} of disk free"
        elsewhere = f"set {variable} to another folder" if variable else "change to another folder"
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            yield Finding(name, f"{folder} cannot be written to", elsewhere, broken=name == "cache")
        elif free < LITTLE_DISK:
            yield Finding(name, found, f"make room, or {elsewhere}")
        else:
            yield Finding(name, found)


def _data() -> Iterator[Finding]:
    from headtune.analysis.models import builtin
    from headtune.analysis.models.loading import EMBEDDED, cache_folder
    from headtune.analysis.tasks.loading import builtin_names
    from headtune.train.config.recipe import recipe_names

    if builtin.is_installed(EMBEDDED):
        ready = (cache_folder() / EMBEDDED / "config.json").is_file()
        yield Finding("model", f"{EMBEDDED} is installed, {'converted' if ready else 'converted at its first use'}")
    else:
        lacking = "without it neither headtune demo nor the recipes run as they are"
        yield Finding("model", f"{EMBEDDED} is not installed; {lacking}", builtin.BUILT_IN[EMBEDDED].install)
    try:
        yield Finding("data", f"{len(recipe_names())} recipes, {len(builtin_names())} tasks")
    except (OSError, InputError) as error:
        yield Finding("data", str(error), "pip install --force-reinstall headtune", broken=True)


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
