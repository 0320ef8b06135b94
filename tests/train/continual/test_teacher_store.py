"""Teachers kept on disk: what goes in comes out, what is damaged is not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor

from headtune.analysis.models.attention import IMPLEMENTATION
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.utils import tensor_store
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.continual.compute_teacher import compute_teacher
from headtune.train.continual.teacher_store import TeacherStore
from headtune.train.continual.teachers import Teacher
from headtune.train.losses.attention_distillation import RowRecorder, TopLogits, attention_distillation, logit_kl
from headtune.train.losses.label_logits import label_mask, positions_only
from headtune.train.trainer.rows import TrainingRow
from helpers.tiny import HARD_KINDS, KINDS, Kind, tiny_model, tiny_tokenizer

HEADS = {0: [0, 3], 2: [1]}
VOCABULARY = 40


def random_teacher(seed: int, positions: list[int], heads: dict[int, list[int]], labels: int = 3) -> Teacher:
    generator = torch.Generator().manual_seed(seed)
    keys = positions[-1] + 1
    visible = torch.arange(keys) <= torch.tensor(positions)[:, None]
    attention = {}
    for layer, chosen in heads.items():
        scores = torch.randn(len(chosen), len(positions), keys, generator=generator)
        attention[layer] = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return Teacher(positions, heads, attention, torch.randn(labels, VOCABULARY, generator=generator))


def same(found: Teacher, expected: Teacher, tolerance: float = 0) -> None:
    assert found.positions == expected.positions and found.heads == expected.heads
    for layer, rows in expected.attention.items():
        torch.testing.assert_close(found.attention[layer], rows, rtol=tolerance, atol=tolerance)
    assert isinstance(found.logits, Tensor) and isinstance(expected.logits, Tensor)
    torch.testing.assert_close(found.logits, expected.logits, rtol=tolerance, atol=tolerance)


def rows_of(*lengths: int) -> list[TrainingRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append(TrainingRow(f"task/{index}", tuple(tokens), tuple([-100] * (length - 2) + tokens[-2:])))
    return rows


def positions_of(rows: list[TrainingRow]) -> dict[str, list[int]]:
    return {row.key: [0, row.length // 2, row.length - 1] for row in rows}


def a_view(kind: Kind) -> HeadModel:
    return wrap_model(tiny_model(kind.family, **kind.config), tiny_tokenizer())


# --- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_put_comes_back(tmp_path: Path, dtype: Any, flushed: bool) -> None:
    store = TeacherStore(tmp_path / "store", dtype)
    teachers = {f"a/{i} é": random_teacher(i, [0, 2 + i, 9], HEADS, labels=i) for i in range(3)}
    for key, teacher in teachers.items():
        store.put(key, teacher)
    if flushed:
        store.flush()
        store = TeacherStore(tmp_path / "store", dtype)
    for key, teacher in teachers.items():
        assert key in store and store.positions(key) == teacher.positions
        assert store.heads(key) == [(0, 0), (0, 3), (2, 1)]
        same(store.get(key), teacher, 1e-3 if dtype == "float16" else 0)
        one = store.get(key, {0: [3]})
        assert list(one.attention) == [0] and one.attention[0].dtype == torch.float32
        assert torch.equal(one.attention[0], store.get(key).attention[0][1:])
    assert "b" not in store


def test_keys_that_nobody_sees_are_not_kept(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path)
    store.put("a", random_teacher(0, [1, 9], HEADS))
    store.flush()
    with safe_open(tmp_path / "shard-00000.safetensors", framework="pt") as shard:
        assert shard.get_tensor("attention/a").shape == (3, 2 + 10)


def test_logits_top(tmp_path: Path) -> None:
    teacher = random_teacher(0, [0, 4], HEADS)
    assert isinstance(teacher.logits, Tensor)
    store = TeacherStore(tmp_path, logits_top=5)
    store.put("a", teacher)
    store.flush()
    kept = TeacherStore(tmp_path, logits_top=5).logits("a")
    assert isinstance(kept, TopLogits) and kept.tokens.dtype == torch.long
    assert torch.equal(kept.logits, teacher.logits.gather(-1, kept.tokens)) and kept.logits.shape == (3, 5)
    whole = torch.cat([kept.logits, kept.rest[:, None]], -1).logsumexp(-1)
    torch.testing.assert_close(whole, teacher.logits.logsumexp(-1))
    student = torch.randn(3, VOCABULARY)
    torch.testing.assert_close(logit_kl(student, kept), logit_kl(student, teacher.logits, top=5))


def test_further_heads(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path)
    for key in ("a", "b"):
        store.put(key, random_teacher(0, [1, 6], HEADS))
    more = random_teacher(1, [1, 6], {0: [1], 1: [2]})
    store.add_heads("a", more.heads, more.attention)
    for opened in (store, None):
        if opened is None:
            store.flush()
            opened = TeacherStore(tmp_path)
        assert opened.heads("a") == [(0, 0), (0, 1), (0, 3), (1, 2), (2, 1)]
        assert opened.heads("b") == [(0, 0), (0, 3), (2, 1)]
        both = opened.get("a")
        assert torch.equal(both.attention[0][1], more.attention[0][0])
        assert torch.equal(both.attention[0][0], opened.get("b").attention[0][0])
        assert torch.equal(both.attention[1], more.attention[1])
        assert torch.equal(opened.logits("a"), opened.logits("b"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"head \(0, 1\) already"):
        store.add_heads("a", more.heads, more.attention)
    with pytest.raises(CheckError, match=r"no rows of head \(0, 1\)"):
        store.get("b", {0: [0, 1]})


def test_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 2000)
    store = TeacherStore(tmp_path)
    teachers = {str(i): random_teacher(i, [1, 6], HEADS) for i in range(9)}
    for key, teacher in teachers.items():
        store.put(key, teacher)
    store.flush()
    assert len(list(tmp_path.glob("shard-*"))) == 3
    again = TeacherStore(tmp_path)
    for key, teacher in teachers.items():
        same(again.get(key), teacher)


def test_what_was_not_flushed_is_all_that_is_lost(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path)
    store.put("a", random_teacher(0, [1, 6], HEADS))
    store.flush()
    store.put("b", random_teacher(1, [1, 6], HEADS))
    (tmp_path / "shard-00001.safetensors").write_bytes(b"a shard that no index knows")
    again = TeacherStore(tmp_path)
    assert "a" in again and "b" not in again
    again.put("b", random_teacher(1, [1, 6], HEADS))
    again.flush()
    same(TeacherStore(tmp_path).get("b"), random_teacher(1, [1, 6], HEADS))


def test_damage_is_an_error(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path)
    store.put("a", random_teacher(0, [1, 6], HEADS))
    store.flush()
    shard, index = tmp_path / "shard-00000.safetensors", tmp_path / "index.json"
    data, text = shard.read_bytes(), index.read_text()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckError, match=r"shard-00000.*SHA-256.*compute its teachers again"):
        TeacherStore(tmp_path).get("a")
    shard.unlink()
    with pytest.raises(CheckError, match=r"shard-00000.*damaged"):
        TeacherStore(tmp_path).get("a")
    shard.write_bytes(data)
    TeacherStore(tmp_path).get("a")
    for broken in (text[:40], "[]", json.dumps({"format": 1})):
        index.write_text(broken)
        with pytest.raises(CheckError, match=r"index\.json is damaged"):
            TeacherStore(tmp_path)
    index.write_text(text)
    with pytest.raises(CheckError, match="no teacher of 'b'"):
        TeacherStore(tmp_path).get("b")


def test_what_the_store_refuses(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path / "one", "float16")
    good = random_teacher(0, [1, 6], HEADS)
    store.put("a", good)
    store.flush()
    with pytest.raises(InputError, match="has a teacher already"):
        store.put("a", good)
    with pytest.raises(InputError, match="sorted"):
        store.put("b", Teacher([6, 1], HEADS, good.attention, good.logits))
    with pytest.raises(InputError, match="expected some"):
        store.put("b", Teacher([], HEADS, good.attention, good.logits))
    with pytest.raises(InputError, match=r"expected \(2, 3, 7\)"):
        store.put("b", Teacher([1, 3, 6], HEADS, good.attention, good.logits))
    for wrong in (2.0, float("nan")):
        rows = {layer: rows * wrong for layer, rows in good.attention.items()}
        with pytest.raises(CheckError, match="sum to 1"):
            store.put("b", Teacher([1, 6], HEADS, rows, good.logits))
    with pytest.raises(CheckError, match="not finite in float16"):
        store.put("b", Teacher([1, 6], HEADS, good.attention, torch.full((1, VOCABULARY), 1e6)))
    with pytest.raises(InputError, match="float16"):
        TeacherStore(tmp_path / "one")
    with pytest.raises(InputError, match="logits_top"):
        TeacherStore(tmp_path / "one", "float16", logits_top=3)
    with pytest.raises(InputError, match="bfloat16"):
        TeacherStore(tmp_path / "two", "bfloat16")  # type: ignore[arg-type]


def test_a_batch_is_padded_on_the_right(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path)
    teachers = {"a": random_teacher(0, [1, 4, 6], HEADS, 2), "b": random_teacher(1, [3], {0: [1, 3]}, 1)}
    for key, teacher in teachers.items():
        store.put(key, teacher)
    batch = store.batch(["b", None, "a"], 8)
    assert batch.positions.tolist() == [[3, -1, -1], [-1, -1, -1], [1, 4, 6]]
    assert batch.heads == {0: [0, 1, 3], 2: [1]}
    assert batch.attention[0].shape == (3, 3, 3, 8) and batch.attention[2].shape == (3, 1, 3, 8)
    assert batch.present[0].long().sum(-1).tolist() == [[0, 1, 1], [0, 0, 0], [3, 0, 3]]
    assert batch.present[2].long().sum(-1).tolist() == [[0], [0], [3]]
    assert torch.equal(batch.attention[0].sum(-1) > 0, batch.present[0])
    assert torch.equal(batch.attention[0][2, [0, 2], :, :7], teachers["a"].attention[0])
    assert torch.equal(batch.attention[0][0, 1:, :1, :4], teachers["b"].attention[0])
    expected = torch.cat([teachers["b"].logits, teachers["a"].logits])  # type: ignore[arg-type, list-item]
    assert isinstance(batch.logits, Tensor) and torch.equal(batch.logits, expected)
    some = store.batch(["a", "b"], 7, {"a": {2: [1]}, "b": {0: [3]}})
    assert some.heads == {0: [3], 2: [1]} and some.present[0].any(-1).tolist() == [[False], [True]]
    assert store.batch([None], 4).logits is None
    with pytest.raises(InputError, match="position 6 in a batch of 6"):
        store.batch(["a"], 6)


# --- computing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HARD_KINDS.values(), ids=HARD_KINDS)
def test_computed_teachers_are_what_eager_attention_says(tmp_path: Path, kind: Kind) -> None:
    """In batches with padding, against each row alone."""
    rows = rows_of(7, 11, 5)
    store = TeacherStore(tmp_path)
    assert compute_teacher(a_view(kind), rows, HEADS, positions_of(rows), store, batch_size=2) == 3
    eager = tiny_model(kind.family, attn_implementation="eager", **kind.config)
    for row in rows:
        with torch.no_grad():
            output = eager(torch.tensor([row.input_ids]), output_attentions=True)
        found, positions = TeacherStore(tmp_path).get(row.key), positions_of(rows)[row.key]
        assert found.positions == positions and found.heads == HEADS
        for layer, heads in HEADS.items():
            expected = output.attentions[layer][0][heads][:, positions]
            torch.testing.assert_close(found.attention[layer], expected, atol=1e-5, rtol=1e-4)
        logits = output.logits[0, row.length - 3 : row.length - 1]
        assert isinstance(found.logits, Tensor)
        torch.testing.assert_close(found.logits, logits, atol=1e-4, rtol=1e-4)


def test_only_what_is_lacking_is_computed(tmp_path: Path) -> None:
    rows, store = rows_of(6, 8), TeacherStore(tmp_path)
    model, later = a_view(KINDS["llama"]), wrap_model(tiny_model("llama", 1), tiny_tokenizer())
    positions = positions_of(rows)
    assert compute_teacher(model, rows, {0: [0, 3]}, positions, store, 4) == 2
    before = store.get("task/0")
    assert compute_teacher(later, rows, {0: [3]}, positions, store, 4) == 0
    assert compute_teacher(later, rows, {0: [3, 1], 1: [2]}, positions, store, 4) == 2
    after = store.get("task/0")
    assert after.heads == {0: [0, 1, 3], 1: [2]}
    assert torch.equal(after.attention[0][[0, 2]], before.attention[0])
    assert torch.equal(store.logits("task/0"), before.logits)  # type: ignore[arg-type]
    whole = TeacherStore(tmp_path / "later")
    compute_teacher(later, rows, {0: [1], 1: [2]}, positions, whole, 4)
    assert torch.equal(after.attention[1], whole.get("task/0").attention[1])
    with pytest.raises(InputError, match="other query positions"):
        compute_teacher(later, rows, {0: [2]}, {row.key: [1] for row in rows}, store, 4)
    with pytest.raises(InputError, match="'task/1' has no query positions"):
        compute_teacher(later, rows, {0: [2]}, {"task/0": positions["task/0"]}, store, 4)


class Broken(Exception):
    pass


@pytest.mark.parametrize(("adding", "shard_bytes"), [("put", 6000), ("add_heads", 200)])  # about two rows a shard
def test_a_broken_computation_ends_as_the_unbroken_one(
    adding: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken within a batch, some rows on disk and one lost with the memory: taken up, the same to the bit."""
    rows = rows_of(7, 11, 5, 9, 6, 10)
    first, later = a_view(KINDS["llama"]), wrap_model(tiny_model("llama", 1), tiny_tokenizer())
    further = {0: [0, 1, 3], 1: [2], 2: [1]}
    model, heads, n_heads = (first, HEADS, 3) if adding == "put" else (later, further, 5)
    real, calls = getattr(TeacherStore, adding), 0

    def breaking(store: TeacherStore, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Broken
        real(store, *args)

    for name in ("whole", "broken"):
        if adding == "add_heads":
            compute_teacher(first, rows, HEADS, positions_of(rows), TeacherStore(tmp_path / name), 4)
        if name == "broken":
            with monkeypatch.context() as patch:
                patch.setattr(tensor_store, "SHARD_BYTES", shard_bytes)
                patch.setattr(TeacherStore, adding, breaking)
                with pytest.raises(Broken):
                    compute_teacher(model, rows, heads, positions_of(rows), TeacherStore(tmp_path / name), 4)
            store = TeacherStore(tmp_path / name)
            done = [row for row in rows if row.key in store and len(store.heads(row.key)) == n_heads]
            assert len(done) == 2, "three were made, one of them was not on disk yet"
        compute_teacher(model, rows, heads, positions_of(rows), TeacherStore(tmp_path / name), 4)
    whole, again = (TeacherStore(tmp_path / name) for name in ("whole", "broken"))
    for row in rows:
        same(again.get(row.key), whole.get(row.key))


def test_logits_alone(tmp_path: Path) -> None:
    rows, store = rows_of(6, 8), TeacherStore(tmp_path)
    compute_teacher(a_view(KINDS["llama"]), rows, {}, {}, store, 4)
    batch = TeacherStore(tmp_path).batch([row.key for row in rows], 8, {row.key: {} for row in rows})
    assert batch.positions.shape == (2, 0) and batch.heads == {} and batch.attention == {}
    assert isinstance(batch.logits, Tensor) and len(batch.logits) == 4


@pytest.mark.parametrize("kind", [KINDS["llama"], KINDS["gemma2"]])
def test_the_model_is_left_as_it_was(tmp_path: Path, kind: Kind) -> None:
    heads, rows = a_view(kind), rows_of(6, 8)
    heads.record_attention(False)
    heads.hf.train()
    frozen = heads.layers[0]
    frozen.eval()
    training = {module: module.training for module in heads.hf.modules()}
    compute_teacher(heads, rows, HEADS, positions_of(rows), TeacherStore(tmp_path), 4)
    assert heads.hf.config._attn_implementation == heads.plain_attention != IMPLEMENTATION
    assert training == {module: module.training for module in heads.hf.modules()}


@pytest.mark.parametrize("adapted", [False, True])
def test_a_student_that_is_its_teacher_has_no_loss(tmp_path: Path, adapted: bool) -> None:
    """The whole way: computed in other batches, stored, loaded, and compared in training mode; a step parts them."""
    heads, rows = a_view(KINDS["qwen2"]), rows_of(7, 11, 5, 9)
    model: Any = heads.hf
    if adapted:
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(heads.hf, config)
    store = TeacherStore(tmp_path)
    compute_teacher(heads, rows, HEADS, positions_of(rows), store, 3)
    model.train()
    teacher = store.batch([None, rows[3].key, rows[1].key], 11)
    given = [rows[0], rows[3], rows[1]]
    tokens, labels = (
        torch.tensor([[*values, *[filler] * (11 - len(values))] for values in side])
        for side, filler in (([row.input_ids for row in given], 0), ([row.labels for row in given], -100))
    )
    mask = label_mask(labels)
    mask[0] = False

    def losses() -> tuple[Tensor, Tensor]:
        with RowRecorder(teacher.heads).record(teacher.positions) as seen, positions_only(model, mask):
            attention_mask = (labels != -100).flip(1).cummax(1).values.flip(1).long()
            logits = model(input_ids=tokens, attention_mask=attention_mask).logits[0]
        assert teacher.logits is not None
        return attention_distillation(seen, teacher.attention, teacher.present), logit_kl(logits, teacher.logits)

    attention, logits = losses()
    assert abs(attention.item()) < 1e-6 and abs(logits.item()) < 1e-6
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn_like(parameter)
    attention, logits = losses()
    assert attention > 1e-3 and logits > 1e-3
    for loss in (attention, logits):
        assert any(
            g is not None and g.any() for g in torch.autograd.grad(loss, trained, allow_unused=True, retain_graph=True)
        )
