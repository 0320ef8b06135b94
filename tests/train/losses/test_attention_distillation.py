"""Distillation against eager attention with everything materialised, and the recorder in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from headtune.analysis.models.attention import IMPLEMENTATION
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.losses.attention_distillation import (
    RowRecorder,
    TopLogits,
    attention_distillation,
    logit_kl,
    query_positions,
    row_kl,
    top_logits,
)
from headtune.train.losses.label_logits import label_mask, positions_only
from helpers.head_rows import HEADS, POSITIONS, padded
from helpers.tiny import HARD_KINDS, N_LAYERS, Kind, tiny_model

CHOSEN = {0: HEADS, 2: [1]}


def ours(family: str = "llama", **config: Any) -> Any:
    return tiny_model(family, attn_implementation=IMPLEMENTATION, **config)


def eager_rows(model: Any, inputs: dict[str, Tensor], positions: Tensor) -> dict[int, Tensor]:
    """Layer -> `[batch, heads, T, keys]` probabilities, cut from the whole matrices of all layers."""
    attentions = model(**inputs, output_attentions=True).attentions
    batch = torch.arange(len(positions))[:, None, None]
    return {
        layer: attentions[layer][batch, torch.tensor(heads)[:, None], positions.clamp(min=0)[:, None]]
        for layer, heads in CHOSEN.items()
    }


def slow_kl(student: dict[int, Tensor], teacher: dict[int, Tensor], present: Tensor, reduction: str) -> Tensor:
    """Row by row, over the keys that are seen."""
    found = []
    for layer, rows in student.items():
        for sample, head, query in (present[:, None].expand(rows.shape[:3])).nonzero().tolist():
            p, q = teacher[layer][sample, head, query], rows[sample, head, query]
            seen = p > 0
            found.append((p[seen] * (p[seen].log() - q[seen].log())).sum())
    return torch.stack(found).sum() / (len(found) if reduction == "mean" else len(present))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest gradient, parameter by parameter; what is in one alone is zero."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-3
    for name in found.keys() | expected.keys():
        other = found.get(name, expected.get(name))
        assert other is not None
        left, right = (side.get(name, torch.zeros_like(other)) for side in (found, expected))
        torch.testing.assert_close(left, right, atol=tolerance * largest, rtol=0)


# --- against eager attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HARD_KINDS.values(), ids=HARD_KINDS)
def test_loss_and_gradients_are_those_of_eager_attention(kind: Kind) -> None:
    require_loss_of_eager_attention(kind, "right", "mean")
    require_loss_of_eager_attention(kind, "left", "sum")


def require_loss_of_eager_attention(kind: Kind, side: str, reduction: Any) -> None:
    inputs, positions = padded(side), POSITIONS[side]
    present = positions >= 0
    student = ours(kind.family, **kind.config)
    eager, other = (tiny_model(kind.family, seed, attn_implementation="eager", **kind.config) for seed in (0, 1))
    with torch.no_grad():
        teacher = eager_rows(other, inputs, positions)
    with RowRecorder(CHOSEN).record(positions) as rows:
        student(**inputs)
    loss = attention_distillation(rows, teacher, present, reduction)
    loss.backward()
    expected = slow_kl(eager_rows(eager, inputs, positions), teacher, present, reduction)
    expected.backward()
    assert expected > 0.02
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    same_gradients(gradients(student), gradients(eager))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_examples_at_the_beginning_are_left_out(family: str) -> None:
    model, inputs, positions = ours(family), padded("right"), POSITIONS["right"]
    with torch.no_grad():
        with RowRecorder(CHOSEN).record(positions) as whole:
            model(**inputs)
        with RowRecorder(CHOSEN).record(positions[1:], first=1) as part:
            model(**inputs)
    for layer in CHOSEN:
        assert torch.equal(part[layer], whole[layer][1:])


# --- training ---------------------------------------------------------------------------------------------------------


def losses(model: Any, checkpointing: bool | None, backward_inside: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of distillation plus something of the logits, in training mode; None: no checkpointing."""
    inputs, positions = padded("right"), POSITIONS["right"]
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    other = tiny_model("llama", 1, attn_implementation="eager", num_key_value_heads=2)
    with torch.no_grad():
        teacher = eager_rows(other, inputs, positions)
    with RowRecorder(CHOSEN).record(positions) as rows:
        logits = model(**inputs, use_cache=False).logits
        loss = attention_distillation(rows, teacher, positions >= 0) + logits.square().mean()
        before = {layer: row.detach().clone() for layer, row in rows.items()}
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert all(torch.equal(rows[layer], row) for layer, row in before.items()), "computing again changed the rows"
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_gradient_checkpointing_changes_nothing(backward_inside: bool) -> None:
    expected, of_parameters = losses(ours(num_key_value_heads=2), None)
    model = ours(num_key_value_heads=2)
    runs = []
    model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    found, own = losses(model, False, backward_inside)
    assert len(runs) == 2, "nothing was checkpointed"
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    same_gradients(own, of_parameters, 1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(CheckError, match="use_reentrant"):
        losses(ours(num_key_value_heads=2), True)


@pytest.mark.parametrize("checkpointing", [None, False])
def test_lora(checkpointing: bool | None) -> None:
    """Gradients of the adapter are those of eager attention under the same adapter."""

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    model = adapted(ours(num_key_value_heads=2))
    if checkpointing is not None:
        model.enable_input_require_grads()
    found, own = losses(model, checkpointing)
    eager = adapted(tiny_model("llama", attn_implementation="eager", num_key_value_heads=2))
    inputs, positions = padded("right"), POSITIONS["right"]
    with torch.no_grad():
        teacher = eager_rows(
            tiny_model("llama", 1, attn_implementation="eager", num_key_value_heads=2), inputs, positions
        )
    expected = slow_kl(eager_rows(eager, inputs, positions), teacher, positions >= 0, "mean")
    expected = expected + eager(**inputs).logits.square().mean()
    expected.backward()
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    same_gradients(own, gradients(eager))
    assert own and all("lora" in name for name in own)


def test_rows_are_before_dropout() -> None:
    model, inputs, positions = ours(attention_dropout=0.5), padded("right"), POSITIONS["right"]
    with torch.no_grad():
        with RowRecorder({0: [1]}).record(positions) as expected:
            model(**inputs)
        with RowRecorder({0: [1]}).record(positions) as rows:
            model.train()(**inputs)
    assert torch.equal(rows[0], expected[0])


def test_what_the_recorder_refuses() -> None:
    inputs, positions = padded("right"), POSITIONS["right"]
    plain = tiny_model("llama")

    def run(model: Any, heads: dict[int, list[int]], at: Tensor, times: int = 1) -> None:
        with RowRecorder(heads).record(at):
            for _ in range(times):
                model(**inputs)

    with pytest.raises(CheckError, match=r"layers \[0, 2\].*record_attention"):
        run(plain, CHOSEN, positions)
    with pytest.raises(CheckError, match=rf"layers \[{N_LAYERS}\]"):
        run(ours(), {0: [1], N_LAYERS: [0]}, positions)
    with pytest.raises(CheckError, match="twice"):
        run(ours(), CHOSEN, positions, times=2)
    with pytest.raises(InputError, match="no head 4"):
        run(ours(), {1: [4]}, positions)
    with pytest.raises(InputError, match="no head -1"):
        run(ours(), {1: [-1]}, positions)
    with pytest.raises(InputError, match="up to 9 for a batch of 3 x 9"):
        run(ours(), CHOSEN, positions + 1)
    with pytest.raises(InputError, match="batch of 3 x 9"):
        run(ours(), CHOSEN, positions[:2])
    with pytest.raises(ZeroDivisionError), RowRecorder(CHOSEN).record(positions):
        raise ZeroDivisionError  # and not that nothing was recorded


# --- the losses themselves --------------------------------------------------------------------------------------------


def attention_kl(student_log: Tensor, teacher: Tensor, present: Tensor, reduction: Any = "mean") -> Tensor:
    """`attention_distillation` of one layer: `[batch, heads, T, keys]` twice, present `[batch, (heads,) T]`."""
    return attention_distillation({0: student_log}, {0: teacher}, {0: present}, reduction)


def log_rows(seed: int, *shape: int) -> Tensor:
    """Random causal log rows: query t sees keys 0 to t."""
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    visible = torch.ones(shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~visible, float("-inf")).log_softmax(-1)


def test_identical_rows_have_no_loss_and_no_gradient() -> None:
    student = log_rows(0, 2, 3, 4, 6).requires_grad_()
    loss = attention_kl(student, student.detach().exp(), torch.ones(2, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and not student.grad.any()


def test_masked_and_absent_rows_make_no_nan() -> None:
    scores = torch.randn(2, 3, 4, 6, requires_grad=True)
    visible = torch.ones(4, 6, dtype=torch.bool).tril()
    student = scores.masked_fill(~visible, float("-inf")).log_softmax(-1)
    teacher = log_rows(1, 2, 3, 4, 6).exp()
    teacher[1] = 0
    teacher[0, :, 2, 1] = 0  # a key that underflowed
    present = torch.tensor([[True] * 4, [False] * 4])
    loss = attention_kl(student, teacher, present)
    loss.backward()
    assert torch.isfinite(loss) and scores.grad is not None and torch.isfinite(scores.grad).all()
    assert not scores.grad[1].any() and scores.grad[0].any()
    none = attention_kl(student.detach().requires_grad_(), teacher, torch.zeros_like(present))
    assert none.item() == 0 and none.requires_grad


def test_half_precision_teachers_are_normalised_in_float32() -> None:
    """Underflow of many small entries takes mass away: it is spread over the others."""
    scores = torch.randn(1, 1, 1, 5000, generator=torch.Generator().manual_seed(0)) * 4
    teacher = scores.softmax(-1).half()
    assert abs(teacher.double().sum().item() - 1) > 1e-5
    student = log_rows(1, 1, 1, 5000, 5000)[:, :, -1:]
    p = teacher.double() / teacher.double().sum()
    expected = torch.special.xlogy(p, p).sum() - (p * student.double()).sum()
    torch.testing.assert_close(row_kl(student, teacher).double().sum(), expected, atol=1e-6, rtol=1e-6)


def test_reductions() -> None:
    student, teacher = (log_rows(seed, 3, 2, 4, 4) for seed in (0, 1))
    kl = row_kl(student, teacher.exp())
    assert kl.shape == (3, 2, 4) and (kl[:, :, 1:] > 0).all()
    present = torch.tensor([[True, True, False, True], [False] * 4, [False, True, False, False]])
    by_head = present[:, None] & torch.tensor([True, False])[:, None]
    close = torch.testing.assert_close
    close(attention_kl(student, teacher.exp(), present), kl[present[:, None].expand_as(kl)].mean())
    close(attention_kl(student, teacher.exp(), present, "sum"), kl[present[:, None].expand_as(kl)].sum() / 2)
    close(attention_kl(student, teacher.exp(), by_head), kl[by_head].mean())
    both, of_both = {0: student, 3: student[:, :1]}, {0: teacher.exp(), 3: teacher[:, :1].exp()}
    pooled = torch.cat([kl[by_head], kl[:, 0][present]])
    close(attention_distillation(both, of_both, {0: by_head, 3: present}), pooled.mean())
    close(attention_distillation(both, of_both, {0: by_head, 3: present}, "sum"), pooled.sum() / 2)
    # Layer by layer, sample by sample: the first has three rows of one head, the third one; the second has none.
    means = [kl[0, 0][present[0]].mean(), kl[2, 0][present[2]].mean()]
    first = [kl[0, 0][present[0]].mean(), kl[2, 0][present[2]].mean()]
    close(attention_distillation(both, of_both, {0: by_head, 3: present}, "layers"), torch.stack(means + first).mean())
    by_layer = [sum(kl[i][:, present[i]].mean() for i in (0, 2)) / 2, sum(means) / 2]
    layers = attention_distillation(both, of_both, present, "layers")
    close(layers, sum(by_layer) / 2)
    assert abs(layers - attention_distillation(both, of_both, present)) > 1e-3
    # A layer of which no row is there is no layer; a sample without rows in one of the layers counts all the same.
    none = torch.zeros_like(present)
    close(attention_distillation(both, of_both, {0: present, 3: none}, "layers"), by_layer[0])
    alone = torch.tensor([[True] * 4, [False] * 4, [False] * 4])
    close(
        attention_distillation(both, of_both, {0: present, 3: alone}, "layers"), (by_layer[0] + kl[0, 0].mean() / 2) / 2
    )


def test_shapes_and_layers_must_agree() -> None:
    student = log_rows(0, 1, 2, 4, 4)
    present = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="shape"):
        attention_kl(student, student[:, :1].exp(), present)
    with pytest.raises(InputError, match="layers"):
        attention_distillation({0: student}, {1: student.exp()}, present)


@pytest.mark.parametrize("top", [None, 1, 5, 49])
def test_logit_kl(top: int | None) -> None:
    """Against the definition over buckets; the gradient flows to the student alone."""
    generator = torch.Generator().manual_seed(0)
    student = (2 * torch.randn(6, 50, generator=generator)).requires_grad_()
    teacher = 2 * torch.randn(6, 50, generator=generator)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    if top is not None:
        tokens = teacher.topk(top).indices
        p, q = (torch.cat([x.gather(-1, tokens), 1 - x.gather(-1, tokens).sum(-1, keepdim=True)], -1) for x in (p, q))
    expected = (p * (p / q).log()).sum(-1).mean()
    (slow,) = torch.autograd.grad(expected, student)
    found = logit_kl(student, teacher, top)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, slow, atol=1e-6, rtol=1e-5)
    if top is not None:
        assert found <= logit_kl(student, teacher) + 1e-6, "a lower bound"
        kept = top_logits(teacher, top)
        assert isinstance(kept, TopLogits) and torch.equal(logit_kl(student, kept), found)


def test_logit_kl_of_nothing_and_of_the_same() -> None:
    logits = torch.randn(4, 30, requires_grad=True)
    assert logit_kl(logits[:0], logits[:0].detach()).item() == 0
    assert logit_kl(logits, logits.detach()).item() == 0
    assert abs(logit_kl(logits, logits.detach(), top=3).item()) < 1e-6
    with pytest.raises(InputError, match="top 30 of 30"):
        logit_kl(logits, logits.detach(), top=30)
    with pytest.raises(InputError, match="already keeps its top 2"):
        logit_kl(logits, top_logits(logits.detach(), 2), top=1)
    with pytest.raises(InputError, match="positions for 4"):
        logit_kl(logits, top_logits(logits[:2].detach(), 2))
    with pytest.raises(InputError, match="shape"):
        logit_kl(logits, logits[:2].detach())


# --- positions --------------------------------------------------------------------------------------------------------


def test_query_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [query_positions(20, 6, generator) for _ in range(300)]
    assert all(len(set(some)) == 6 and some == sorted(some) for some in drawn)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=20)
    assert counts.shape == (20,) and counts.min() > 50, "every position has its turn"
    assert query_positions(4, 6, generator) == [0, 1, 2, 3]
    assert query_positions(20, 6, torch.Generator().manual_seed(0)) == drawn[0]
    with pytest.raises(InputError, match="0 query positions"):
        query_positions(4, 0, generator)


@pytest.mark.parametrize("kind", HARD_KINDS.values(), ids=HARD_KINDS)
def test_logits_at_positions_only(kind: Kind) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    require_logits_at_positions(tiny_model(kind.family, **kind.config))
    require_logits_at_positions(get_peft_model(tiny_model(kind.family, **kind.config), lora))


def require_logits_at_positions(model: Any) -> None:
    inputs = padded("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, :5] = labels[1, 1:] = -100
    mask = label_mask(labels)
    assert mask.nonzero().tolist() == [[0, 4], [0, 5], [0, 6], [0, 7], [2, 0], [2, 1], [2, 2]]
    whole = model(**inputs).logits
    whole[mask].square().sum().backward()
    expected = gradients(model)
    widths: list[int] = []
    unembedding = model.get_output_embeddings()
    handle = unembedding.register_forward_hook(lambda _m, args, _o: widths.append(args[0].shape[1]))
    with positions_only(model, mask):
        logits = model(**inputs).logits
        assert model(**inputs).logits.shape == logits.shape
    handle.remove()
    assert widths == [7, 7] and logits.shape == (1, 7, whole.shape[-1])
    torch.testing.assert_close(logits[0], whole[mask], atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    same_gradients(gradients(model), expected)
    assert model(**inputs).logits.shape == whole.shape, "afterwards the model is what it was"


def test_a_batch_of_another_shape_is_refused() -> None:
    model, mask = tiny_model("llama"), torch.ones(3, 8, dtype=torch.bool)
    with pytest.raises(InputError, match=r"\(3, 9\) for a mask of \(3, 8\)"), positions_only(model, mask):
        model(**padded("right"))
