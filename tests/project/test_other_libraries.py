"""The pages' way of reading heads.json, in libraries that are not headtune: the heads are silenced there as here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headtune.analysis.models.loading import load_model
from helpers import documents
from helpers.paths import ROOT
from helpers.small_runs import head_set

PAGE = ROOT / "docs" / "howto" / "other-libraries.md"
READ, *LIBRARIES = [block.text for block in documents.blocks(PAGE) if block.language == "python"]


@pytest.fixture
def heads(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """heads.json as headtune writes it, read as the page reads it."""
    monkeypatch.chdir(tmp_path)
    found = head_set(load_model(str(tiny_llama)).identity())
    found.save(tmp_path / "runs" / "heads")
    names: dict[str, Any] = {}
    exec(READ.replace('"suppression"', '"recall"'), names)
    assert names["heads"] == [(0, 0), (1, 2)] == found.top("recall", 2)
    return names["heads"]


def expected_logits(folder: Path, heads: list[tuple[int, int]]) -> torch.Tensor:
    """By hooks of PyTorch alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    width = model.config.hidden_size // model.config.num_attention_heads

    def silence(columns: slice) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            z = inputs[0].clone()
            z[..., columns] = 0
            return (z,)

        return hook

    tokens = AutoTokenizer.from_pretrained(folder)("Some city in Italy:", return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model(tokens).logits
        for layer, head in heads:
            projection = model.model.layers[layer].self_attn.o_proj
            projection.register_forward_pre_hook(silence(slice(head * width, (head + 1) * width)))
        without: torch.Tensor = model(tokens).logits
    assert (whole - without).abs().max() > 1e-3, "the heads make no difference"
    return without


@pytest.mark.parametrize(("number", "library"), list(enumerate(["nnsight", "nnterp", "transformer_lens"])))
def test_the_heads_are_silenced_in_another_library(
    number: int, library: str, heads: list[tuple[int, int]], tiny_llama: Path, tmp_path: Path
) -> None:
    try:
        importlib.import_module(library)
    except ImportError as error:
        pytest.skip(f"{library} is not there, or does not go with what is ({error}): pip install {library}")
    names: dict[str, Any] = {"heads": heads}
    script = tmp_path / f"with_{library}.py"  # nnsight reads the source of what is inside `with`
    script.write_text(LIBRARIES[number].replace("MODEL", str(tiny_llama)))
    exec(compile(script.read_text(), str(script), "exec"), names)
    torch.testing.assert_close(names["logits"].detach(), expected_logits(tiny_llama, heads), atol=1e-4, rtol=1e-4)


def test_the_file_holds_what_the_page_says(heads: list[tuple[int, int]], tmp_path: Path) -> None:
    content = json.loads((tmp_path / "runs" / "heads" / "heads.json").read_text())
    assert {"layer", "head", "score", "ci"} <= content["roles"]["recall"][0].keys()
