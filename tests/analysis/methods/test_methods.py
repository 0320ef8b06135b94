"""Every way of scoring heads, through the one signature: names, shapes, and what each is by a slow way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions.counterfactuals import Counterfactuals
from headtune.analysis.methods import attribution_patching, eap_ig, head_gating, patching, registry
from headtune.analysis.methods.logit_attribution import attribute
from headtune.analysis.methods.registry import DEFAULT, METHODS, parse_method_names, score, score_examples
from headtune.analysis.methods.scores import Array, Scores
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, EncodedTask, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

ANY_TASK = [name for name, method in METHODS.items() if not method.needs]  # the others' tests are elsewhere
EXACT = [name for name, method in METHODS.items() if method.causal and method.score is not None]
NEEDS_OTHERS = {
    "mean",
    "resample",
    "corrupt",
    "mean_all",
    "resample_all",
    "corrupt_all",
    "path",
    "attribution_patching_corrupt",
    "integrated_gradients",
    "integrated_gradients_corrupt",
    "eap_ig_inputs",
    "eap_ig_activations",
}


@pytest.fixture(autouse=True)
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates that are fitted a little: what they come to is tested in test_gates."""
    monkeypatch.setattr(head_gating, "fit_gates", partial(head_gating.fit_gates, steps=3))


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", num_key_value_heads=2), tiny_tokenizer(), "tiny llama")


@pytest.fixture(scope="module")
def task(model: HeadModel) -> EncodedTask:
    """Four subjects, one template, one and two cities given: each prompt has another of its length."""
    task = encode(Task("cities", tiny_task(previous=(1, 2), subjects=4).examples[:16]), model.tokenizer)
    assert all(Counterfactuals(model, task.examples).others(i, same_length=True) for i in range(len(task.examples)))
    return task


def by_slow_passes(
    model: HeadModel, encoded: Encoded, replaced: Callable[[int, int], Tensor], end_only: bool
) -> dict[str, Array]:
    """Clean minus replaced: mean logits of the answers, the same less the other subjects' answers and less
    the vocabulary's mean, and the log-probability of the answers. One whole forward pass a head."""
    position = torch.tensor([len(encoded.tokens) - 1]) if end_only else None
    tokens = {"target": list(set(encoded.target_tokens)), "previous": list(set(encoded.previous_tokens))}
    forms = ("", "_contrast", "_centred", "_logp")
    result = {f"{name}{form}": np.zeros((N_LAYERS, N_HEADS), dtype=np.float32) for name in tokens for form in forms}
    with torch.no_grad():
        clean = model.hf(encoded.tokens[None]).logits[0, -1]
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                with hooks.replace(model, {(layer, head): replaced(layer, head)}, position):
                    logits = model.hf(encoded.tokens[None]).logits[0, -1]
                change = clean - logits
                others = sum(weight * change[token] for token, weight in encoded.others)
                for name, ids in tokens.items():
                    result[name][layer, head] = change[ids].mean()
                    result[f"{name}_contrast"][layer, head] = change[ids].mean() - others
                    result[f"{name}_centred"][layer, head] = change[ids].mean() - change.mean()
                    logs = (of.log_softmax(-1)[ids].logsumexp(0) for of in (clean, logits))
                    result[f"{name}_logp"][layer, head] = next(logs) - next(logs)
    return result


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANY_TASK)
def test_every_method_scores_both_kinds_of_answers(model: HeadModel, task: EncodedTask, name: str) -> None:
    few = EncodedTask(task.task, task.examples[::3])
    found = score(model, few, name)
    assert isinstance(found, Scores)
    for quantity in (f"{name}.target", f"{name}.previous"):
        mean = found.mean(quantity)
        assert mean.shape == (N_LAYERS, N_HEADS) and mean.dtype == np.float32
        assert np.isfinite(mean).all() and np.abs(mean).max() > 1e-4
        if METHODS[name].score is not None:
            assert found.by_example[quantity].shape == (len(few.examples), N_LAYERS, N_HEADS)
            assert len(found.interval(quantity)) == 2
            assert f"{quantity}_contrast" in found
        else:
            with pytest.raises(InputError, match="no interval"):
                found.interval(quantity)
    assert list(found.subjects) == [example.example.subject for example in few.examples]
    if name != "dla":  # which also reads attention and the lens
        assert all(quantity.startswith(f"{name}.") for quantity in found.means())


@pytest.mark.parametrize("name", ANY_TASK)
def test_single_facts_have_no_previous_answers(model: HeadModel, name: str) -> None:
    found = score(model, Task("single", tiny_task(previous=(0,), subjects=2).examples), name)
    assert f"{name}.target" in found and np.isfinite(found.mean(f"{name}.target")).all()
    assert not [quantity for quantity in found.means() if quantity.startswith(f"{name}.previous")]


@pytest.mark.parametrize("name", ANY_TASK)
def test_the_same_seed_gives_the_same_scores(model: HeadModel, task: EncodedTask, name: str) -> None:
    few = task.examples[::3]
    first, again = (score_examples(model, few, name, seed=5).means() for _ in range(2))
    assert all(np.array_equal(first[quantity], again[quantity]) for quantity in first)


@pytest.mark.parametrize("name", ANY_TASK)
def test_one_subject_is_enough_where_nothing_is_borrowed(model: HeadModel, name: str) -> None:
    one = Task("one", tiny_task(subjects=1).examples)
    if name in NEEDS_OTHERS:
        with pytest.raises(InputError, match="at least two subjects"):
            score(model, one, name)
    else:
        assert f"{name}.target" in score(model, one, name)


def test_names_of_methods_and_their_quantities() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert all((method.score is None) != (method.whole is None) for method in METHODS.values())
    assert all(method.summary and "\n" not in method.summary for method in METHODS.values())


def test_the_signature_is_a_model_a_task_and_a_name() -> None:
    parameters = inspect.signature(score).parameters
    assert list(parameters)[:3] == ["model", "task", "method"]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in list(parameters.values())[3:])


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_several_methods_at_once_are_each_alone(model: HeadModel, task: EncodedTask) -> None:
    few = EncodedTask(task.task, task.examples[::5])
    both = score(model, few, "attribution_patching, ablation,ablation")
    alone = [score(model, few, name).means() for name in ("ablation", "attribution_patching")]
    assert set(both.means()) == set(alone[0]) | set(alone[1])
    for name, value in (alone[0] | alone[1]).items():
        assert np.array_equal(both.mean(name), value)


def test_all_is_the_pair_that_identify_ranks_by() -> None:
    assert [method.name for method in parse_method_names("all")] == list(DEFAULT) == ["dla", "ablation"]


def test_a_task_is_encoded_where_it_is_not_yet(model: HeadModel) -> None:
    task = tiny_task(subjects=2)
    plain, ready = score(model, task, "dla"), score(model, encode(task, model.tokenizer), "dla")
    assert np.array_equal(plain.mean("dla.target"), ready.mean("dla.target"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ablatoin", "method 'ablatoin' is unknown; did you mean 'ablation'?"),
        ("dla,integrated_gradient", "method 'integrated_gradient' is unknown; did you mean 'integrated_gradients'?"),
        ("", "method '' is unknown; known: ablation, ablation_all, all, "),
    ],
)
def test_an_unknown_method_is_refused(model: HeadModel, given: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        score(model, tiny_task(subjects=2), given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_progress_goes_through_every_example_once(model: HeadModel, task: EncodedTask) -> None:
    told: list[tuple[int, str]] = []

    def progress(items: Sequence[object], what: str) -> Sequence[object]:
        told.append((len(items), what))
        return items

    score_examples(model, task.examples[:3], "dla,ablation", progress=progress)
    assert told == [(3, "scoring heads")]


# --- against slow references ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EXACT if name != "path"])
def test_exact_methods_are_slow_passes(model: HeadModel, task: EncodedTask, name: str) -> None:
    examples, end_only = task.examples[:8], not name.endswith("_all")
    found = score_examples(model, examples, name, seed=2)
    references = Counterfactuals(model, examples, seed=2)
    kind = name.removesuffix("_all")
    for index in (0, 5):
        if kind == "ablation":
            value = torch.zeros(N_LAYERS, N_HEADS, model.head_dim)
        else:
            value = getattr(references, kind if end_only else f"{kind}_everywhere")(index)
        slow = by_slow_passes(model, examples[index], lambda layer, head, value=value: value[layer, head], end_only)
        for quantity, expected in slow.items():
            actual = found.by_example[f"{name}.{quantity}"][index]
            np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_direct_attribution_in_contrast_is_the_difference_of_what_is_written_toward_tokens(
    model: HeadModel, task: EncodedTask
) -> None:
    """Each head's output times the direction of every token of the vocabulary, one by one."""
    encoded = task.examples[2]
    end = torch.tensor([encoded.end])
    with torch.no_grad(), hooks.capture(model, positions=end) as z, hooks.watch([model.final_norm]) as seen:
        model.hf(encoded.tokens[None], use_cache=False)
        residual = seen[model.final_norm][0][0, encoded.end]
        everything = model.unembedding_directions(residual, torch.arange(model.hf.config.vocab_size))
        written = [torch.einsum("hd,hdm->hm", z[layer][0], model.output_weight(layer)) for layer in range(N_LAYERS)]
        toward = torch.stack(written) @ everything.T  # [layers, heads, vocabulary]
    others = sum(weight * toward[..., token] for token, weight in encoded.others)
    found = attribute(model, encoded)
    for name, tokens in (("target", encoded.target_tokens), ("previous", encoded.previous_tokens)):
        mean = toward[..., list(tokens)].mean(-1)
        np.testing.assert_allclose(found[f"dla.{name}_contrast"], mean - others, atol=2e-5)
        np.testing.assert_allclose(found[f"dla.{name}_centred"], mean - toward.mean(-1), atol=2e-5)


def test_path_is_path_patching_to_the_mean(model: HeadModel, task: EncodedTask) -> None:
    """`path_logits` itself is checked against slow passes in test_interventions."""
    examples = task.examples[:8]
    found, mean = score_examples(model, examples, "path"), Counterfactuals(model, examples).mean(3)
    logits = patching.path_logits(model, examples[3], mean)
    tokens = list(examples[3].target_tokens)
    expected = (logits[0] - logits[1:])[:, tokens].mean(-1).view(N_LAYERS, N_HEADS)
    np.testing.assert_allclose(found.by_example["path.target"][3], expected.numpy(), atol=2e-5)
    # The last layer's heads have no head behind them: patching with all else frozen is patching.
    patched = score_examples(model, examples, "mean")
    np.testing.assert_allclose(
        found.by_example["path.target"][:, -1], patched.by_example["mean.target"][:, -1], atol=2e-5
    )


@pytest.mark.parametrize(
    ("estimate", "reference"),
    [
        ("attribution_patching", None),
        ("attribution_patching_corrupt", Counterfactuals.corrupt),
        ("integrated_gradients", Counterfactuals.mean),
        ("integrated_gradients_corrupt", Counterfactuals.corrupt),
    ],
)
def test_estimates_use_the_reference_they_name(
    model: HeadModel, task: EncodedTask, estimate: str, reference: Callable[[Counterfactuals, int], Tensor] | None
) -> None:
    examples = task.examples
    found = score_examples(model, examples, estimate, seed=1)
    value = None if reference is None else reference(Counterfactuals(model, examples, seed=1), 4)
    direct = getattr(attribution_patching, estimate.removesuffix("_corrupt"))(model, examples[4], value, name="x")
    for quantity in ("target", "previous"):
        assert np.array_equal(found.by_example[f"{estimate}.{quantity}"][4], direct[f"x.{quantity}"])


@pytest.mark.parametrize("name", ["eap_ig_inputs", "eap_ig_activations"])
def test_eap_ig_comes_from_the_counterpart_as_long(model: HeadModel, task: EncodedTask, name: str) -> None:
    counterpart = Counterfactuals(model, task.examples, seed=1).corrupt_tokens(4, same_length=True)
    assert counterpart is not None
    direct = getattr(eap_ig, name)(model, task.examples[4], counterpart)
    row = METHODS[name].score(model, task.examples, 4, METHODS[name].prepare(model, task.examples, 1))  # type: ignore[misc]
    assert set(row) == set(direct) and all(np.array_equal(row[quantity], direct[quantity]) for quantity in direct)


@pytest.mark.parametrize("name", ["resample_all", "corrupt_all", "eap_ig_inputs", "eap_ig_activations"])
def test_an_example_without_a_counterpart_has_no_score_and_is_counted(model: HeadModel, name: str) -> None:
    """At all positions a counterpart must be as long; the mean is over the examples that have one."""
    examples = encode(tiny_task(subjects=8), model.tokenizer).examples
    has_one = [bool(Counterfactuals(model, examples).others(i, same_length=True)) for i in range(len(examples))]
    assert True in has_one and False in has_one
    found = score_examples(model, examples, name)
    rows = found.by_example[f"{name}.target"]
    assert [bool(np.isfinite(row).all()) for row in rows] == has_one
    assert np.isfinite(found.mean(f"{name}.target")).all()
    np.testing.assert_allclose(found.mean(f"{name}.target"), rows[has_one].mean(0), atol=1e-6)


# --- registering ------------------------------------------------------------------------------------------------------


def test_a_registered_method_scores_as_the_others_do(model: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))

    @registry.register_scoring_method(
        "depth", "a head's layer", prepare=lambda _model, examples, seed: len(examples) + seed
    )
    def depth(model: HeadModel, _examples: Any, index: int, shared: int) -> dict[str, Array]:
        layers = np.arange(model.n_layers, dtype=np.float32)[:, None].repeat(model.n_heads, 1)
        return {"depth.target": layers, "depth.shared": layers * 0 + 100 * shared + index}

    assert registry.METHODS["depth"].score is not None and "depth" not in METHODS
    scores = score(model, tiny_task(), "depth,dla", seed=3)
    assert {"depth.target", "dla.target"} <= set(scores.means())
    n = len(scores.subjects)
    assert scores.mean("depth.target")[:, 0].tolist() == list(range(model.n_layers))
    assert scores.by_example["depth.shared"][:, 0, 0].tolist() == [100 * (n + 3) + index for index in range(n)]
    for name, message in (
        ("depth", "registered already"),
        ("dla", "registered"),
        ("all", "registered"),
        ("a,b", "letters"),
    ):
        with pytest.raises(InputError, match=message):
            registry.register_scoring_method(name, "another")(depth)
