"""The retrieval score of a planted head is 1, one pass is token-by-token decoding, and only that head matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headtune.analysis.methods import retrieval
from headtune.analysis.methods.behaviour import Behaviour, answer_success, first_token_accuracy, require_behaviour
from headtune.analysis.methods.registry import METHODS, score, score_examples
from headtune.analysis.methods.retrieval import copied
from headtune.analysis.models import hooks
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.synthetic.metrics import auroc
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.planted_needle import N_HEADS, needle_model, needle_task
from helpers.tiny import tiny_model, tiny_tokenizer

DECOYS = [(0, head) for head in range(1, N_HEADS)]


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return needle_model()


@pytest.fixture(scope="module")
def examples(model: HeadModel) -> list[Encoded]:
    return encode(needle_task(), model.tokenizer, model.positions).examples


def decoded(model: HeadModel, encoded: Encoded, n: int) -> tuple[list[int], np.ndarray]:
    """Greedy decoding a token at a time, and the share of the needle that each head's strongest keys copy."""
    tokens, needle = encoded.tokens.tolist(), encoded.spans["needle"]
    copied_positions: dict[tuple[int, int], set[int]] = {}
    for _ in range(n):
        with torch.no_grad(), record_rows(torch.tensor([len(tokens) - 1])) as rows:
            token = int(model.hf(torch.tensor([tokens])).logits[0, -1].argmax())
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                key = int(rows.pattern[layer][0, head].argmax())
                if key in needle and tokens[key] == token:
                    copied_positions.setdefault((layer, head), set()).add(key)
        tokens.append(token)
    shares = np.zeros((model.n_layers, model.n_heads), dtype=np.float32)
    for head, positions in copied_positions.items():
        shares[head] = len(positions) / len(needle)
    return tokens[len(encoded.tokens) :], shares


def test_the_planted_head_retrieves_and_no_other(model: HeadModel, examples: list[Encoded]) -> None:
    scores = score_examples(model, examples, "retrieval")
    mean = scores.mean("retrieval.copy")
    assert mean[0, 0] == 1.0 and mean[0, 1:].max() <= 0.05
    assert auroc(mean, [(0, 0)], DECOYS) == 1.0
    assert scores.counts() == {"retrieval": len(examples)}
    low, high = scores.interval("retrieval.copy")
    assert low[0, 0] == high[0, 0] == 1.0
    halves = [scores.subset(range(start, len(examples), 2)).mean("retrieval.copy") for start in (0, 1)]
    assert all(half.argmax() == 0 for half in halves)


def test_one_pass_is_decoding_token_by_token(model: HeadModel, examples: list[Encoded]) -> None:
    for encoded in examples[:4]:
        written, shares = decoded(model, encoded, 5)
        assert model.tokenizer.decode(written) == encoded.example.answers[0]
        assert np.array_equal(copied(model, encoded)["retrieval.copy"], shares)


def test_one_pass_with_layers_and_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model with tied embeddings writes words of its prompt again; its heads look here and there."""
    hf = tiny_model("llama", num_key_value_heads=2, tie_word_embeddings=True)
    hf.get_input_embeddings().weight.data *= 20  # a word's own direction outweighs what the layers add
    llama = wrap_model(hf, tiny_tokenizer(), "tiny")
    prompt = "Rome Milan Naples Rome Turin Milan Rome"
    example = Example(prompt, "Rome", ("Rome",), spans={"needle": ((0, len(prompt)),)})
    (encoded,) = encode(Task("words", (example,)), llama.tokenizer).examples
    written, shares = decoded(llama, encoded, 3)
    assert 0 < (shares > 0).sum() < shares.size, "the test must tell heads apart"
    monkeypatch.setattr(retrieval, "answer_tokens", lambda *_: torch.tensor(written))
    assert np.array_equal(copied(llama, encoded)["retrieval.copy"], shares)


def test_a_needle_token_counts_once(model: HeadModel, examples: list[Encoded]) -> None:
    """A share of the needle, not a number of hits: of a longer span it is less, of a shorter one not more."""
    encoded = examples[0]
    needle = encoded.spans["needle"]
    wider = replace(encoded, spans={"needle": (*range(needle[0] - len(needle), needle[0]), *needle)})
    assert copied(model, wider)["retrieval.copy"][0, 0] == 0.5
    assert copied(model, replace(encoded, spans={"needle": needle[:2]}))["retrieval.copy"][0, 0] == 1.0


def test_only_the_planted_head_matters(model: HeadModel, examples: list[Encoded]) -> None:
    assert answer_success(model, examples).accuracy == 1.0
    with hooks.ablate(model, [(0, 0)]):
        assert answer_success(model, examples).accuracy == 0.0
        assert copied(model, examples[0]) == {}
    with hooks.ablate(model, DECOYS):
        assert answer_success(model, examples).accuracy == 1.0


def test_prompts_that_fail_have_no_score(model: HeadModel, examples: list[Encoded]) -> None:
    failing = replace(examples[0], example=replace(examples[0].example, answers=("w0 w0",)))
    scores = score_examples(model, [failing, *examples], "retrieval")
    assert np.isnan(scores.by_example["retrieval.copy"][0]).all()
    assert scores.counts() == {"retrieval": len(examples)} and scores.mean("retrieval.copy")[0, 0] == 1.0


def test_refusals(model: HeadModel, examples: list[Encoded]) -> None:
    with pytest.raises(InputError, match=r"retrieval' needs the span 'needle', and 1 of 12 prompts have none"):
        score_examples(model, [replace(examples[0], spans={}), *examples[1:]], "retrieval")
    with pytest.raises(InputError, match=r"has no span 'needle'"):
        copied(model, replace(examples[0], spans={}))
    with (
        hooks.ablate(model, [(0, 0)]),
        pytest.raises(InputError, match=r"whole answer in 0\.000 of 12 prompts") as error,
    ):
        score(model, needle_task(), "retrieval")
    assert "\n" not in str(error.value)
    # One success in twelve is not told from none.
    failing = [replace(e, example=replace(e.example, answers=("w0",))) for e in examples[1:]]
    with pytest.raises(InputError, match=r"0\.083 of 12 prompts .* below chance \+ 3 standard errors"):
        score_examples(model, [examples[0], *failing], "retrieval")
    longest = replace(examples[0], example=replace(examples[0].example, answers=(" ".join(["w3"] * 70),)))
    with pytest.raises(InputError, match=r"exceeds the 128 positions of planted needle"):
        copied(model, longest)


def test_a_method_names_its_quantities() -> None:
    assert METHODS["retrieval"].quantities == ("copy",) and METHODS["dla"].quantities == ("target",)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_chance_and_three_standard_errors() -> None:
    subjects = [str(i) for i in range(100)]
    coin = Behaviour([1.0] * 60 + [0.0] * 40, subjects, 0.5, "right")
    assert coin.threshold == pytest.approx(0.5 + 3 * 0.05)  # of guessing; of the accuracy it is .0492
    with pytest.raises(InputError, match=r"right in 0\.600 of 100 prompts \(chance 0\.5\), below .* \(0\.650\)"):
        require_behaviour(coin, "coin")
    require_behaviour(Behaviour([1.0] * 70 + [0.0] * 30, subjects, 0.5, "right"), "coin")
    # Examples of one subject count once.
    with pytest.raises(InputError):
        require_behaviour(Behaviour([1.0] * 70 + [0.0] * 30, [s[-1] for s in subjects], 0.5, "right"), "coin")


def test_first_tokens_against_wrong_ones(model: HeadModel, examples: list[Encoded]) -> None:
    plain = first_token_accuracy(model, examples)
    assert (
        plain.accuracy == 1.0
        and plain.chance == pytest.approx(1 / 40)
        and list(plain.right) == list(plain.greedy or ())
    )
    wrong = [replace(e, example=replace(e.example, incorrect=("w0",))) for e in examples]
    assert first_token_accuracy(model, wrong).chance == 0.5 and first_token_accuracy(model, wrong).accuracy == 1.0
    # A wrong answer that the model prefers.
    preferred = [
        replace(e, target_tokens=(0,), example=replace(e.example, incorrect=(e.example.answers[0].split()[0],)))
        for e in examples
    ]
    assert first_token_accuracy(model, preferred).accuracy == 0.0
    with pytest.raises(InputError, match=r"likelier than the best wrong one in 0\.000"):
        require_behaviour(first_token_accuracy(model, preferred), "needles")
