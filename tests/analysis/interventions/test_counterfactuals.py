"""What heads are replaced by: from other subjects, of the same shape, drawn the same way in whatever order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions.counterfactuals import Counterfactuals, outputs, shape_of
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import FACTS, tiny_model, tiny_task, tiny_tokenizer

KINDS: dict[str, Callable[[Counterfactuals, int], Tensor | None]] = {
    "mean": Counterfactuals.mean,
    "resample": Counterfactuals.resample,
    "corrupt": Counterfactuals.corrupt,
    "mean_everywhere": Counterfactuals.mean_everywhere,
    "resample_everywhere": Counterfactuals.resample_everywhere,
    "corrupt_everywhere": Counterfactuals.corrupt_everywhere,
}


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", num_key_value_heads=2), tiny_tokenizer(), "tiny llama")


@pytest.fixture(scope="module")
def examples(model: HeadModel) -> list[Encoded]:
    """Eight subjects in two templates, two cities given."""
    return encode(tiny_task(), model.tokenizer).examples


def encoded(model: HeadModel, *examples: Example) -> list[Encoded]:
    return encode(Task("own", examples), model.tokenizer).examples


def example(prompt: str, subject: str, corrupt: str | None = None) -> Example:
    return Example(prompt, subject, tuple(FACTS[subject]), corrupt=corrupt)


@torch.no_grad()
def slow_outputs(model: HeadModel, tokens: Tensor) -> Tensor:
    """`[n_layers, n_heads, seq, head_dim]` cut out of the projections' inputs."""
    taken: list[Tensor] = []
    handles = [
        model.projection(layer).register_forward_pre_hook(lambda _module, args: taken.append(args[0][0]))
        for layer in range(model.n_layers)
    ]
    model.hf(tokens[None], use_cache=False)
    for handle in handles:
        handle.remove()
    width = model.head_dim
    cut = [[z[:, head * width : (head + 1) * width] for head in range(model.n_heads)] for z in taken]
    return torch.stack([torch.stack(of_heads) for of_heads in cut])


def is_of(model: HeadModel, value: Tensor, examples: list[Encoded], end_only: bool) -> list[int]:
    """Which examples' outputs `value` is."""
    runs = [slow_outputs(model, other.tokens) for other in examples]
    runs = [run[:, :, -1] if end_only else run for run in runs]
    return [i for i, run in enumerate(runs) if run.shape == value.shape and torch.allclose(run, value, atol=1e-6)]


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "previous", "expected"),
    [
        ("Cities in Italy:", "Italy", (), "Cities in {}:"),
        ("Cities in Italy. 1. Rome 2. Milan 3.", "Italy", ("Rome", "Milan"), "Cities in {}. 1. {} 2. {} 3."),
        ("Rome? Cities in Italy. 1. Rome 2.", "Italy", ("Rome",), "Rome? Cities in {}. 1. {} 2."),
        ("Italy, Italy:", "Italy", (), "{}, Italy:"),
        ("Cities in York. 1. New York 2.", "York", ("New York",), "Cities in {}. 1. {} 2."),
        ("1. New York 2.", "York", ("New York",), "1. {} 2."),  # the subject is only there as part of an answer
    ],
)
def test_the_shape_is_the_prompt_without_subject_and_previous_answers(
    prompt: str, subject: str, previous: tuple[str, ...], expected: str
) -> None:
    assert shape_of(Example(prompt, subject, ("x",), previous)) == expected


def test_templates_and_counts_have_shapes_of_their_own() -> None:
    shapes = {shape_of(example) for example in tiny_task(previous=(1, 2)).examples}
    assert len(shapes) == 4


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_are_the_heads_part_of_the_projections_input(model: HeadModel, examples: list[Encoded]) -> None:
    tokens = examples[0].tokens
    whole = slow_outputs(model, tokens)
    torch.testing.assert_close(outputs(model, tokens, last_only=False), whole)
    torch.testing.assert_close(outputs(model, tokens), whole[:, :, -1])


# --- which examples ---------------------------------------------------------------------------------------------------


def test_the_mean_is_over_other_subjects_of_the_same_shape(model: HeadModel, examples: list[Encoded]) -> None:
    references = Counterfactuals(model, examples)
    for index in (0, 3, len(examples) - 1):
        own = examples[index].example
        others = [
            other.tokens
            for other in examples
            if other.example.subject != own.subject and shape_of(other.example) == shape_of(own)
        ]
        assert len(others) == 7
        runs = [slow_outputs(model, tokens) for tokens in others]
        torch.testing.assert_close(references.mean(index), torch.stack([run[:, :, -1] for run in runs]).mean(0))
        everywhere = references.mean_everywhere(index)
        torch.testing.assert_close(everywhere, torch.cat(runs, 2).mean(2, keepdim=True))


def test_without_a_prompt_of_the_same_shape_the_mean_is_over_all_others(model: HeadModel) -> None:
    found = encoded(
        model,
        example("Some cities in Italy:", "Italy"),
        example("List of cities in Japan:", "Japan"),
        example("Here is a list of cities in Spain:", "Spain"),
        example("I know cities in Italy:", "Italy"),
    )
    expected = torch.stack([slow_outputs(model, found[i].tokens)[:, :, -1] for i in (1, 2)]).mean(0)
    torch.testing.assert_close(Counterfactuals(model, found).mean(0), expected)


def test_resample_is_another_subjects_run(model: HeadModel, examples: list[Encoded]) -> None:
    references = Counterfactuals(model, examples)
    shapes, drawn = set(), set()
    for index, own in enumerate(examples):
        (at_end,) = is_of(model, references.resample(index), examples, end_only=True)
        assert examples[at_end].example.subject != own.example.subject
        drawn.add(at_end)
        shapes.add(shape_of(examples[at_end].example) == shape_of(own.example))
        everywhere = references.resample_everywhere(index)
        as_long = [
            i
            for i, other in enumerate(examples)
            if other.example.subject != own.example.subject and len(other.tokens) == len(own.tokens)
        ]
        assert (everywhere is None) == (not as_long)
        if everywhere is not None:
            (found,) = is_of(model, everywhere, examples, end_only=False)
            assert found in as_long
    assert shapes == {True, False}  # whatever its shape
    assert len(drawn) > len(examples) // 4  # every example has a draw of its own


def test_a_counterpart_has_another_subject_the_same_shape_and_where_it_can_the_same_length(
    model: HeadModel, examples: list[Encoded]
) -> None:
    references = Counterfactuals(model, examples)
    for index, own in enumerate(examples):
        tokens = references.corrupt_tokens(index)
        assert tokens is not None
        (other,) = [other for other in examples if torch.equal(other.tokens, tokens)]
        assert other.example.subject != own.example.subject
        assert shape_of(other.example) == shape_of(own.example)
        lengths = {len(examples[i].tokens) for i in references.others(index)}
        assert len(tokens) == len(own.tokens) or len(own.tokens) not in lengths
        torch.testing.assert_close(references.corrupt(index), slow_outputs(model, tokens)[:, :, -1])


def test_at_end_shape_comes_before_length(model: HeadModel) -> None:
    """ "New York" makes the only prompt of the same shape longer; another prompt is as long."""
    found = encoded(
        model,
        example("Some cities in Italy:", "Italy"),
        Example("Some cities in New York City:", "New York City", ("Boston", "Denver")),
        example("List cities in Japan:", "Japan"),
    )
    assert [len(one.tokens) for one in found] == [5, 7, 5]
    references = Counterfactuals(model, found)
    assert torch.equal(references.corrupt_tokens(0), found[1].tokens)
    assert torch.equal(references.corrupt_tokens(0, same_length=True), found[2].tokens)


def test_an_examples_own_counterpart_goes_first(model: HeadModel) -> None:
    corrupt = "Some cities in Spain:"
    found = encoded(
        model,
        example("Some cities in Italy:", "Italy", corrupt),
        example("Some cities in Japan:", "Japan", "Some cities in New York City:"),
    )
    references = Counterfactuals(model, found)
    own = torch.tensor(model.tokenizer(corrupt).input_ids)
    torch.testing.assert_close(references.corrupt(0), slow_outputs(model, own)[:, :, -1])
    torch.testing.assert_close(references.corrupt_everywhere(0), slow_outputs(model, own))
    # Its own, though it is longer and the other example is not: at END lengths do not matter, at all positions they do.
    longer = torch.tensor(model.tokenizer("Some cities in New York City:").input_ids)
    torch.testing.assert_close(references.corrupt(1), slow_outputs(model, longer)[:, :, -1])
    assert references.corrupt_everywhere(1) is None


def test_no_prompt_as_long_means_no_reference_at_all_positions(model: HeadModel) -> None:
    found = encoded(model, example("Some cities in Italy:", "Italy"), example("Cities, in Japan, 1.", "Japan"))
    assert len(found[0].tokens) != len(found[1].tokens)
    references = Counterfactuals(model, found)
    assert references.resample_everywhere(0) is None and references.corrupt_everywhere(0) is None
    torch.testing.assert_close(references.corrupt(0), slow_outputs(model, found[1].tokens)[:, :, -1])


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_work_changes_nothing(model: HeadModel, examples: list[Encoded], kind: str) -> None:
    chosen, forward, backward = (
        [0, 5, 9],
        Counterfactuals(model, examples, seed=3),
        Counterfactuals(model, examples, seed=3),
    )
    first = {index: KINDS[kind](forward, index) for index in chosen}
    second = {index: KINDS[kind](backward, index) for index in reversed(chosen)}
    for index in chosen:
        one, other = first[index], second[index]
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("draw", [Counterfactuals.resample, Counterfactuals.corrupt])
def test_another_seed_draws_others(
    model: HeadModel, examples: list[Encoded], draw: Callable[[Counterfactuals, int], Tensor]
) -> None:
    drawn = [torch.stack([draw(Counterfactuals(model, examples, seed), i) for i in range(6)]) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_outputs_at_end_are_computed_once(
    model: HeadModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    capture = hooks.capture
    monkeypatch.setattr(hooks, "capture", lambda *a, **k: passes.append(1) or capture(*a, **k))
    references = Counterfactuals(model, examples)
    for index in range(len(examples)):
        references.mean(index)
        references.resample(index)
    assert len(passes) == len(examples)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_one_subject_is_refused(model: HeadModel) -> None:
    one = encode(tiny_task(subjects=1), model.tokenizer).examples
    with pytest.raises(InputError, match="need examples of at least two subjects; add some, or use zero ablation"):
        Counterfactuals(model, one)
