"""The metric of a causal method is an argument; the default is as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headtune import identify, score
from headtune.analysis.methods import patching
from headtune.analysis.methods.patching import METRICS, ablation_effects, effects, every_head, silenced_logits
from headtune.analysis.methods.registry import METHODS, parse_method_names
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", num_key_value_heads=2), tiny_tokenizer())


@pytest.fixture(scope="module")
def encoded(model: HeadModel) -> Encoded:
    return encode(tiny_task(), model.tokenizer).examples[0]


def test_the_metrics_are_their_definitions(model: HeadModel, encoded: Encoded) -> None:
    logits = silenced_logits(model, encoded.tokens, [(), *([head] for head in every_head(model))])
    p = logits.double().softmax(-1)
    target, previous = (sorted(set(tokens)) for tokens in (encoded.target_tokens, encoded.previous_tokens))
    difference = logits[:, target].mean(-1) - logits[:, previous].mean(-1)
    expected = {
        "logit_difference": difference[0] - difference[1:],
        "probability": p[0, target].sum() - p[1:, target].sum(-1),
        "kl": torch.stack([torch.sum(p[0] * (p[0] / row).log()) for row in p[1:]]),
    }
    for metric, values in expected.items():
        scores = ablation_effects(model, encoded, metric=metric)  # type: ignore[arg-type]
        assert list(scores) == [f"ablation.{metric}"]
        assert scores[f"ablation.{metric}"].shape == (N_LAYERS, N_HEADS)
        np.testing.assert_allclose(scores[f"ablation.{metric}"].ravel(), values.numpy(), rtol=1e-3, atol=2e-6)
    assert (scores["ablation.kl"] > 0).any() and (scores["ablation.kl"] > -1e-6).all()


def test_the_default_is_the_logit(model: HeadModel, encoded: Encoded) -> None:
    plain, named = ablation_effects(model, encoded), ablation_effects(model, encoded, metric="logit")
    assert plain.keys() == named.keys() and "ablation.target_logp" in plain
    assert all(np.array_equal(plain[name], named[name]) for name in plain)
    everywhere = patching.everywhere_effects("ablation_all", model, encoded, metric="kl")
    assert list(everywhere) == ["ablation_all.kl"]


def test_refused_in_one_line(model: HeadModel, encoded: Encoded) -> None:
    logits = torch.zeros(1 + N_LAYERS * N_HEADS, 600)
    single = replace(encoded, previous_tokens=())
    for metric, example, words in (
        ("logits", encoded, "metric 'logits' is unknown; did you mean 'logit'"),
        ("logit_difference", single, "needs previous answers"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            effects("ablation", model, logits, example, metric)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert METRICS[0] == "logit"


def test_every_causal_method_has_them_by_name(model: HeadModel) -> None:
    """`NAME@METRIC` is what the function gives with that metric, beside the method itself."""
    task = tiny_task(subjects=3)
    examples = encode(task, model.tokenizer).examples
    for name in ("ablation", "mean", "corrupt", "mean_all", "path"):
        assert METHODS[name].by_metric is not None
        scores = score(model, task, f"{name}@kl,{name}@probability")
        assert {*scores.by_example} == {f"{name}.kl", f"{name}.probability"}, name
    both = score(model, task, "ablation,ablation@kl")
    expected = ablation_effects(model, examples[2], metric="kl")["ablation.kl"]
    assert np.array_equal(both.by_example["ablation.kl"][2], expected) and "ablation.target" in both


def test_heads_are_ranked_by_them(model: HeadModel) -> None:
    result = identify(model, tiny_task(), "ablation@kl", 2, 1, n_random=1, roles=["loud=ablation.kl:+"])
    assert [*result.heads.roles] == ["loud"]
    means = result.scores.mean("ablation.kl")
    ranked = [means[each.layer, each.head] for each in result.heads.roles["loud"]]
    assert ranked == sorted(ranked, reverse=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dla@kl", "dla has no other metric; those that have one: ablation, mean"),
        ("ablation@klt", "metric 'klt' is unknown; did you mean 'kl'"),
        ("ablation@", "metric '' is unknown"),
        ("ablations@kl", "method 'ablations' is unknown"),
    ],
)
def test_names_that_no_method_has(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_method_names(name)
