"""The losses against slow loops in double precision, and where float32 would lose its digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headtune.train.losses.answer_set import answer_set, kl_to_base

VOCABULARY = 11


def random_logits(rows: int, scale: float = 1.5, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def slow_answer_set(logits: Tensor, remaining: list[list[int]], previous: list[list[int]], weight: float) -> Tensor:
    """The definition in its plainest form, a loop over rows. `[3]`: loss, recall, suppression."""
    recall, suppression = [], []
    for row, remain, given in zip(logits, remaining, previous, strict=True):
        p = torch.exp(row) / torch.exp(row).sum()
        recall.append(-torch.log(torch.stack([p[token] for token in remain]).sum()))
        mass = sum((p[token] for token in given), start=p.new_zeros(()))
        suppression.append(-torch.log(1 - mass))
    loss = torch.stack([r + weight * s for r, s in zip(recall, suppression, strict=True)]).mean()
    return torch.stack([loss, torch.stack(recall).mean(), torch.stack(suppression).mean()])


def padded(rows: list[list[int]]) -> Tensor:
    """Padded with -1 on the left and on the right in turn: the padding may stand anywhere."""
    width = max(1, *(len(row) for row in rows))
    return torch.tensor(
        [
            [-1] * (width - len(row)) + row if index % 2 else row + [-1] * (width - len(row))
            for index, row in enumerate(rows)
        ]
    )


REMAINING = [[1], [2, 5, 7], [0, 10], [4, 3]]
PREVIOUS = [[0, 2, 5], [], [3, 4, 5], [6]]


@pytest.mark.parametrize("weight", [0.0, 1.0, 4.0])
def test_answer_set_is_the_definition(weight: float) -> None:
    logits = random_logits(4)
    found = answer_set(logits, padded(REMAINING), padded(PREVIOUS), weight)
    expected = slow_answer_set(logits.double(), REMAINING, PREVIOUS, weight)
    terms = torch.stack([found["loss"], found["recall"], found["suppression"]])
    torch.testing.assert_close(terms.double(), expected, atol=1e-6, rtol=1e-6)
    assert expected.min() > 0.05, "every term must matter in this test"


def test_answer_set_gradient_is_that_of_the_definition() -> None:
    logits = random_logits(4).requires_grad_()
    reference = logits.detach().double().requires_grad_()
    answer_set(logits, padded(REMAINING), padded(PREVIOUS), 2.0)["loss"].backward()
    slow_answer_set(reference, REMAINING, PREVIOUS, 2.0)[0].backward()
    assert logits.grad is not None and reference.grad is not None
    torch.testing.assert_close(logits.grad.double(), reference.grad, atol=1e-6, rtol=1e-5)


def test_the_definition_itself_by_finite_differences() -> None:
    """The slow reference's own gradient, so that the test above does not rest on autograd alone."""
    logits = random_logits(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: slow_answer_set(x, REMAINING, PREVIOUS, 2.0), logits)


def test_no_previous_answers_anywhere() -> None:
    logits = random_logits(2).requires_grad_()
    terms = answer_set(logits, padded([[1], [2, 3]]), torch.full((2, 1), -1), 4.0)
    assert terms["suppression"].item() == 0.0
    assert terms["loss"].item() == terms["recall"].item()
    terms["loss"].backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    # A previous token never seen as padding: -1 must not stand for the last entry, nor for token 0.
    for token in (0, VOCABULARY - 1):
        sure = torch.zeros(1, VOCABULARY)
        sure[0, token] = 20.0
        assert answer_set(sure, torch.tensor([[3, -1]]), torch.tensor([[-1]]))["recall"].item() > 10
        assert answer_set(sure, torch.tensor([[token]]), torch.tensor([[-1]]))["suppression"].item() == 0.0


@pytest.mark.parametrize("sure", [2.0, 8.0, 16.0, 17.0, 40.0, 1e3])
def test_nearly_all_mass_on_a_repeat_stays_finite_and_is_pushed_down(sure: float) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4] = sure
    logits.requires_grad_()
    terms = answer_set(logits, torch.tensor([[1]]), torch.tensor([[4]]))
    terms["loss"].backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert logits.grad[0, 4] > 0 and logits.grad[0, 1] < 0, "descent lowers the repeat and raises the answer"
    # Beyond 1 - 1e-6 the term is held at its cap, -log(1e-6); below, it is exact.
    exact = math.log1p(math.exp(sure) / (VOCABULARY - 1)) if sure < 100 else math.inf
    assert terms["suppression"].item() == pytest.approx(min(exact, -math.log(1e-6)), rel=2e-2 if sure > 10 else 1e-5)


def test_tiny_mass_keeps_its_digits() -> None:
    """-log(1 - m) is m where m is small; taken naively in float32 it would be 0."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4] = -20.0
    mass = math.exp(-20.0) / (VOCABULARY - 1)
    assert answer_set(logits, torch.tensor([[1]]), torch.tensor([[4]]))["suppression"].item() == pytest.approx(
        mass, rel=1e-4
    )


def test_half_precision_logits_are_reduced_in_float32() -> None:
    logits = random_logits(4)
    found = answer_set(logits.bfloat16(), padded(REMAINING), padded(PREVIOUS))
    expected = answer_set(logits.bfloat16().float(), padded(REMAINING), padded(PREVIOUS))
    for name, term in found.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, expected[name])


def test_retention_is_the_divergence_from_the_base() -> None:
    adapted, base = random_logits(3, seed=1), random_logits(3, scale=0.3, seed=2)
    expected = []
    for q_row, p_row in zip(adapted.double().softmax(-1), base.double().softmax(-1), strict=True):
        expected.append(sum(float(p) * math.log(float(p) / float(q)) for p, q in zip(p_row, q_row, strict=True)))
    assert kl_to_base(adapted, base).item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    backwards = kl_to_base(base, adapted).item()
    assert abs(backwards - sum(expected) / 3) > 0.05, "the direction must matter in this test"


def test_retention_of_equal_logits_is_zero_without_gradient() -> None:
    logits = random_logits(3).requires_grad_()
    value = kl_to_base(logits, logits.detach() + 5.0)  # a constant shift is the same distribution
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6


def test_retention_is_positive_otherwise() -> None:
    for seed in range(5):
        logits = random_logits(3, seed=seed)
        assert kl_to_base(logits + 0.1 * random_logits(3, seed=seed + 50), logits).item() > 1e-4


def test_retention_without_positions_is_zero_and_part_of_the_graph() -> None:
    logits = torch.zeros(0, VOCABULARY, requires_grad=True)
    value = kl_to_base(logits, torch.zeros(0, VOCABULARY))
    assert value.item() == 0.0
    value.backward()
