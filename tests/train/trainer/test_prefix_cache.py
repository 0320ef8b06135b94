"""Training on kept hidden states is training: same losses and gradients, whatever the family, padding or trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils import tensor_store
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.config.methods import AnswerSetConfig
from headtune.train.trainer.answer_set_trainer import AnswerSetCollator, AnswerSetTrainer
from headtune.train.trainer.prefix_cache import (
    CacheStats,
    PrefixCache,
    eligibility,
    lowest_trained,
    refusal,
    release_pages,
)
from headtune.train.trainer.training_rows import answer_set_rows
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.tiny import HARD_KINDS, KINDS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

# Two families drop at random unless told not to.
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
HEADS = [[1, 1], [2, 0], [2, 3]]
Batch = dict[str, Tensor]


def adapted(kind: str = "llama", heads: list[list[int]] = HEADS, **changes: Any) -> Any:
    """A tiny model with an adapter that already does something, in training mode."""
    row = KINDS[kind]
    model = tiny_model(row.family, **(NO_DROPOUT.get(row.family, {}) | row.config | changes))
    torch.manual_seed(1)
    return get_peft_model(model, HeadTuningConfig(heads=heads, init_std=0.3)).train()


def backbone(model: Any) -> nn.Module:
    return eligibility.model_parts(model).backbone


def layers(model: Any) -> list[nn.Module]:
    return eligibility.model_parts(model).layers


def rows(n: int = 6, seed: int = 0) -> list[Tensor]:
    """Rows of 4 to 9 + n tokens, all longer than no window and some longer than a window of 5."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (4 + 5 * i % 11,), generator=generator) for i in range(n)]


def batch(of: list[Tensor], side: str, explicit: bool = False) -> Batch:
    """Padded rows with `labels`; `explicit`: with position ids that start at each row's own first token."""
    width = max(map(len, of))
    made: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in of:
        pad = (width - len(row), 0) if side == "left" else (0, width - len(row))
        made["input_ids"].append(nn.functional.pad(row, pad, value=0))
        made["attention_mask"].append(nn.functional.pad(torch.ones_like(row), pad))
        unlabelled = row.index_fill(0, torch.tensor([0]), -100)  # a padding position would predict the first token
        made["labels"].append(nn.functional.pad(unlabelled, pad, value=-100))
    result = {name: torch.stack(values) for name, values in made.items()}
    if explicit:
        result["position_ids"] = (result["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return result


def epochs(side: str, explicit: bool) -> list[list[Batch]]:
    """The same six rows in batches of two, of four and two, and of one."""
    of = rows()
    groups = [[[0, 1], [2, 3], [4, 5]], [[5, 0, 3, 2], [4, 1]], [[i] for i in range(6)]]
    return [[batch([of[i] for i in group], side, explicit) for group in epoch] for epoch in groups]


def step(model: Any, inputs: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and the gradients of everything trained."""
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, gradient in expected[1].items():
        scale = max(1.0, gradient.abs().max().item())
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * scale, name


@contextmanager
def counted(model: Any, layer: int = 0) -> Iterator[list[int]]:
    """Batch sizes of the passes through a layer's real inside."""
    norm = next(module for module in layers(model)[layer].modules() if "norm" in type(module).__name__.lower())
    seen: list[int] = []
    handle = norm.register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def installed(model: Any, **options: Any) -> Iterator[CacheStats]:
    with PrefixCache(model, **options).installed() as stats:
        yield stats


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HARD_KINDS)
def test_losses_and_gradients_are_those_without(kind: str) -> None:
    for side in ("right", "left", "left, positions"):
        require_losses_and_gradients_without(adapted(kind), side)


def require_losses_and_gradients_without(model: Any, side: str) -> None:
    plan = epochs(side.split(",")[0], "positions" in side)
    expected = [[step(model, inputs) for inputs in epoch] for epoch in plan]
    with installed(model) as stats, counted(model) as seen:
        for number, epoch in enumerate(plan):
            checked = stats.checked
            seen.clear()
            for inputs, without in zip(epoch, expected[number], strict=True):
                assert_same(step(model, inputs), without)
            if number == 0:
                assert sum(seen) == stats.misses == 6
            elif side != "left":  # where no positions are given, another width is another position
                assert seen == [1] * (stats.checked - checked), "only rows that are checked run again"
    assert stats.layers == 1 and not stats.plain and stats.checked
    assert [step(model, inputs)[0] for inputs in plan[0]] == [loss for loss, _ in expected[0]]


def test_the_lowest_layers_are_skipped_and_no_others() -> None:
    model = adapted(heads=[[2, 1]])
    inputs = batch(rows(3), "right")
    with installed(model) as stats, counted(model, 1) as second, counted(model, 2) as third:
        for _ in range(3):
            step(model, inputs)
        assert stats.layers == 2
        assert second == [3, 1, 1] and third == [3, 3, 3]  # once for all, twice for a row that is checked


def test_unknown_rows_alone_are_computed() -> None:
    model, of = adapted(), rows()
    expected = step(model, batch(of[:4], "right"))
    with installed(model) as stats, counted(model) as seen:
        step(model, batch(of[1:3], "right"))
        assert_same(step(model, batch(of[:4], "right")), expected)
        assert seen == [2, 2] and (stats.hits, stats.misses) == (2, 4)
        step(model, batch([of[5], of[5]], "right"))
        assert seen == [2, 2, 1], "a row that comes twice in a batch is computed once"


def test_the_same_tokens_elsewhere_are_another_row() -> None:
    """gpt2 adds a vector by position."""
    model, row = adapted("gpt2"), rows(1)[0]
    plain, shifted = batch([row], "right", explicit=True), batch([row], "right", explicit=True)
    shifted["position_ids"] = shifted["position_ids"] + 3
    expected = [step(model, inputs) for inputs in (plain, shifted)]
    assert expected[0][0] != pytest.approx(expected[1][0], rel=1e-3)
    with installed(model):
        for _ in range(2):
            for inputs, without in zip((plain, shifted), expected, strict=True):
                assert_same(step(model, inputs), without)


def test_given_and_implied_positions_are_told_apart() -> None:
    """opt counts positions from the first present token, whatever its column."""
    model = adapted("opt")
    implied = batch([rows(1)[0], rows(2)[1]], "left")
    given = implied | {"position_ids": torch.arange(implied["input_ids"].shape[1]).expand(2, -1)}
    expected = [step(model, inputs) for inputs in (implied, given)]
    assert expected[0][0] != pytest.approx(expected[1][0], rel=1e-3)
    with installed(model):
        for inputs, without in zip((implied, given), expected, strict=True):
            assert_same(step(model, inputs), without)


def test_a_row_keeps_no_more_memory_than_its_own() -> None:
    model = adapted()
    cache = PrefixCache(model)
    with cache.installed() as stats:
        step(model, batch(rows(), "right"))
        assert cache._store is not None
        kept = cache._store._memory.values()
        assert (
            stats.memory_bytes == sum(row.untyped_storage().nbytes() for row in kept) == 4 * 32 * sum(map(len, rows()))
        )


@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3-sliding"])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    plain = adapted(kind)
    expected = [step(plain, inputs) for inputs in epochs("right", False)[0]]
    model = adapted(kind)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with installed(model) as stats, counted(model) as seen, counted(model, 1) as trained:
        for _ in range(2):
            for inputs, without in zip(epochs("right", False)[0], expected, strict=True):
                assert_same(step(model, inputs), without)
        assert sum(seen) == 6 + stats.checked
        assert len(trained) == 2 * 6, "the first trained layer is checkpointed: once forward, once backward"
        assert model.training and all(layer.training for layer in layers(model))


def test_passes_with_and_without_the_adapter_share_rows() -> None:
    model, of = adapted(), rows(4)
    inputs = batch(of, "left", explicit=True)
    some = {name: value[:2] for name, value in inputs.items()}

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            on = model(**inputs, use_cache=False).logits
            with model.disable_adapter():
                return on, model(**some, use_cache=False).logits

    expected = both()
    assert (expected[0][:2] - expected[1]).abs().max() > 0.1
    present = inputs["attention_mask"].bool()
    with installed(model) as stats:
        for _ in range(2):
            on, off = both()
            torch.testing.assert_close(on[present], expected[0][present], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(off[present[:2]], expected[1][present[:2]], rtol=1e-5, atol=1e-5)
    assert (stats.misses, stats.hits) == (4, 8)


def test_autocast_has_rows_of_its_own() -> None:
    model, inputs = adapted(), batch(rows(2), "right")

    def half() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, inputs)[0]

    expected = [half(), step(model, inputs)[0]]
    with installed(model) as stats:
        for _ in range(3):
            assert half() == pytest.approx(expected[0], rel=1e-3)
            assert step(model, inputs)[0] == pytest.approx(expected[1], rel=1e-6)
    assert expected[0] != expected[1] and stats.misses == 4


# --- passes that are not served ---------------------------------------------------------------------------------------


def test_generation_is_untouched() -> None:
    model = adapted().eval()
    inputs = batch(rows(3), "left")
    inputs.pop("labels")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with installed(model) as stats:
        model(**inputs, use_cache=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    assert stats.plain == {"a key-value cache is in use": 6}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_cache": True}, "key-value cache"),
        ({"past_key_values": DynamicCache()}, "key-value cache"),
        ({"output_hidden_states": True}, "argument output_hidden_states"),
        ({"inputs_embeds": torch.ones(1, 6, 32), "input_ids": None}, "no input_ids"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "attention mask that is not"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "padding between"),
        ({"attention_mask": torch.zeros(1, 6).long()}, "without tokens"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "attention_mask": None}, "packed"),
    ],
)
def test_other_passes_run_every_layer(changes: dict[str, Any], reason: str) -> None:
    model = adapted().eval()
    tokens = torch.arange(5, 11)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False} | changes
    with torch.no_grad():
        expected = model(**inputs)
        inputs |= {"past_key_values": DynamicCache()} if "past_key_values" in changes else {}
        with installed(model) as stats, counted(model) as seen:
            model(input_ids=tokens, use_cache=False)
            found = model(**inputs)
            assert seen == [1, 1]
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0, equal_nan=True)
    assert len(stats.plain) == 1 and reason in next(iter(stats.plain))
    if expected.hidden_states is not None:
        for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(a, b)


def test_outputs_asked_for_in_the_configuration_run_every_layer() -> None:
    model, inputs = adapted(), batch(rows(2), "right")
    backbone(model).config.output_hidden_states = True  # type: ignore[union-attr]
    expected = model(**inputs, use_cache=False).hidden_states
    with installed(model) as stats:
        for _ in range(2):
            found = model(**inputs, use_cache=False).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert stats.plain == {"the configuration asks for output_hidden_states": 2}


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model, inputs = adapted(), batch(rows(2), "right")
    expected = step(model, inputs)
    with installed(model), counted(model) as seen:
        for _ in range(3):  # the next pass is no one that checks a row
            step(model, inputs)
        handle = model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs, use_cache=False)
        handle.remove()
        seen.clear()
        model(**inputs, use_cache=True)
        assert seen == [2], "the real layers, not what was put together for the pass that failed"
        assert_same(step(model, inputs), expected)


# --- before, during, after --------------------------------------------------------------------------------------------


def state(model: Any) -> dict[str, Any]:
    return {
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "state": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "training": [module.training for module in model.modules()],
    }


def test_everything_is_put_back() -> None:
    model, inputs = adapted(heads=[[2, 1]]), batch(rows(3), "right")
    layers(model)[1].eval()  # modes are mixed, and stay so
    given = layers(model)[0]
    given.forward = given.forward  # type: ignore[method-assign]  # as accelerate's device hooks leave it
    before, own = state(model), given.forward
    with installed(model):
        step(model, inputs)
        during = state(model)
        assert all(during[part] == before[part] for part in ("parameters", "state", "training"))
    assert state(model) == before and given.forward == own
    with pytest.raises(KeyboardInterrupt), installed(model):
        step(model, inputs)
        raise KeyboardInterrupt
    assert state(model) == before


def test_one_cache_is_installed_once() -> None:
    cache = PrefixCache(adapted())
    with cache.installed(), pytest.raises(InputError, match="installed already"), cache.installed():
        pass
    with cache.installed():
        pass


def test_changed_weights_are_noticed() -> None:
    model, inputs = adapted(), batch(rows(2), "right")
    with installed(model) as stats:
        step(model, inputs)
        step(model, inputs)
        assert stats.checked == 1
        with torch.no_grad():
            layers(model)[0].get_submodule("mlp.down_proj").weight.mul_(1.02)  # type: ignore[operator]
        with pytest.raises(CheckError, match="something else for a row than before"):
            step(model, inputs)
    step(model, inputs)


def test_noise_below_is_noticed() -> None:
    model, inputs = adapted(), batch(rows(2), "right")
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _args, output: output + 0.05 * torch.randn_like(output))
    with installed(model), pytest.raises(CheckError, match="something else for a row than before"):
        for _ in range(2):
            step(model, inputs)


def test_memory_of_skipped_layers_is_given_back_once_no_unknown_rows_come(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[set[int]] = []
    monkeypatch.setattr(
        "headtune.train.trainer.prefix_cache.cache.release_pages",
        lambda tensors: calls.append({id(tensor) for tensor in tensors}),
    )
    model, known, unknown = adapted(), batch(rows(2), "right"), batch(rows(2, seed=1), "right")
    with installed(model):
        for _ in range(8):
            step(model, known)
        assert not calls
        step(model, known)
        assert calls == [{id(parameter) for parameter in layers(model)[0].parameters()}]
        for _ in range(7):
            step(model, known)
        assert len(calls) == 1, "they are not in memory"
        step(model, known)
        assert len(calls) == 2, "the sixteenth pass checked a row"
    calls.clear()
    with installed(model):
        for inputs in [*[known] * 8, unknown, *[known] * 7]:
            step(model, inputs)
    assert not calls


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="resident size is read from /proc")
def test_paged_out_tensors_are_read_as_before(tmp_path: Path) -> None:
    def mapped_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))

    path, n = tmp_path / "weights.bin", 4 << 20
    torch.arange(n, dtype=torch.float32).numpy().tofile(path)
    own, mapped = torch.arange(n, dtype=torch.float32), torch.from_file(str(path), shared=False, size=n)
    total = mapped.double().sum()
    before = mapped_kib()
    release_pages.release_pages([own, mapped, mapped[:3], mapped.view(-1, 2).T])
    if before - mapped_kib() < 15 << 10:
        pytest.skip("this system does not page out")
    assert mapped.double().sum() == total and torch.equal(own, mapped)


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 2000)  # two rows or so of 32 float32 each


def run_epochs(model: Any, stats: CacheStats) -> list[tuple[float, dict[str, Tensor]]]:
    return [step(model, inputs) for epoch in epochs("right", False) for inputs in epoch]


def index_of(folder: Path) -> Path:
    (path,) = folder.glob("*/rank-0/index.json")
    return path


@pytest.mark.usefixtures("small_shards")
def test_rows_beyond_memory_go_to_disk_and_serve_the_next_run(tmp_path: Path) -> None:
    model = adapted()
    expected = [step(model, inputs) for epoch in epochs("right", False) for inputs in epoch]
    limit = 3000 / 2**30
    sizes = sorted(4 * 32 * len(row) for row in rows())
    for run in range(2):
        with installed(model, memory_gb=limit, folder=tmp_path) as stats, counted(model) as seen:
            for found, without in zip(run_epochs(model, stats), expected, strict=True):
                assert_same(found, without)
            computed = sum(seen) - stats.checked
        assert 0 < stats.memory_bytes <= 3000
        assert stats.memory_bytes + stats.disk_bytes == sum(sizes), "each row is in one place"
        if run == 0:
            assert computed == stats.misses == 6
    assert computed == stats.misses < 6, "what went to disk is not computed again"
    shards = json.loads(index_of(tmp_path).read_text())["shards"]
    assert len(shards) >= 1 and sum(len(shard["rows"]) for shard in shards.values()) == 6 - computed


@pytest.mark.usefixtures("small_shards")
def test_without_a_folder_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = adapted()
    with installed(model, memory_gb=0) as stats, counted(model) as seen:
        run_epochs(model, stats)
        assert list(tmp_path.glob("headtune-tensors-*/shard-*"))
        assert sum(seen) == 6 + stats.checked
    assert stats.memory_bytes == 0 and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "index"])
def test_damaged_shards_are_computed_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    with installed(model, memory_gb=0, folder=tmp_path) as stats:
        expected = run_epochs(model, stats)
    shard = sorted(index_of(tmp_path).parent.glob("shard-*"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    if damage == "flip":
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-9])
    elif damage == "remove":
        shard.unlink()
    else:
        index_of(tmp_path).write_text("{")
    with installed(model, memory_gb=0, folder=tmp_path) as stats:
        for found, before in zip(run_epochs(model, stats), expected, strict=True):
            assert_same(found, before)
    assert str(shard if damage != "index" else index_of(tmp_path)) in caplog.text and "computed again" in caplog.text
    assert (stats.lost, 0 < stats.misses < 6) == ((1, True) if damage != "index" else (0, False))
    with installed(model, memory_gb=0, folder=tmp_path) as stats:
        run_epochs(model, stats)
    assert (stats.lost, stats.misses) == (0, 0), "what was written again is whole"


@pytest.mark.usefixtures("small_shards")
def test_another_model_has_rows_of_its_own(tmp_path: Path) -> None:
    def misses(**changes: Any) -> int:
        model = adapted(**changes)
        with installed(model, memory_gb=0, folder=tmp_path) as stats:
            run_epochs(model, stats)
        return stats.misses

    assert misses() == 6
    assert misses() == 0
    assert misses(heads=[[1, 3]]) == 0, "what is trained above does not matter"
    assert misses(heads=[[2, 3]]) == 6, "another depth"
    assert misses(seed=1) == 6, "other weights"
    assert misses(rms_norm_eps=1e-2) == 6, "the same weights, used otherwise"


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_is_said_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_store, "save_file", full)
    model = adapted()
    expected = [step(model, inputs) for epoch in epochs("right", False) for inputs in epoch]
    with installed(model, memory_gb=0, folder=tmp_path) as stats:
        for found, without in zip(run_epochs(model, stats), expected, strict=True):
            assert_same(found, without)
    assert stats.unkept and "No space left" in caplog.text


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_lowest_trained() -> None:
    assert [lowest_trained(adapted(heads=[[layer, 0]])) for layer in range(N_LAYERS)] == [0, 1, 2]
    model = tiny_model("llama").requires_grad_(False)
    assert lowest_trained(model) == N_LAYERS
    model.get_submodule("model.norm").requires_grad_(True)
    model.get_submodule("lm_head").requires_grad_(True)
    assert lowest_trained(model) == N_LAYERS
    layers(model)[1].requires_grad_(True)
    assert lowest_trained(model) == 1


def test_training_what_follows_the_layers() -> None:
    model = tiny_model("llama").requires_grad_(False).train()
    model.get_submodule("model.norm").requires_grad_(True)
    inputs = batch(rows(3), "right")
    expected = step(model, inputs)
    with installed(model) as stats, counted(model, N_LAYERS - 1) as seen:
        for _ in range(3):
            assert_same(step(model, inputs), expected)
        assert stats.layers == N_LAYERS and seen == [3, 1, 1]


def frozen(family: str = "llama", **config: Any) -> Any:
    model = tiny_model(family, **config).requires_grad_(False)
    eligibility.model_parts(model).layers[2].requires_grad_(True)
    return model


def test_what_is_refused() -> None:
    assert refusal(adapted()) is None and refusal(frozen("gpt2", **NO_DROPOUT["gpt2"])) is None
    assert "layer 0 is trained" in str(refusal(adapted(heads=[[0, 1], [2, 2]])))
    assert "drawn anew" in str(refusal(adapted(), rows_change=True))
    assert "drops at random" in str(refusal(frozen("gpt2")))
    assert "drops at random" in str(refusal(frozen("opt")))
    assert "drops at random" in str(refusal(frozen(attention_dropout=0.1)))
    assert "drops at random" in str(refusal(frozen("phi", embd_pdrop=0.1)))
    assert "drops at random" in str(refusal(frozen("opt", dropout=0.0, layerdrop=0.1)))
    tied = frozen(tie_word_embeddings=True)
    tied.lm_head.weight.requires_grad_(True)
    assert "embed_tokens is trained" in str(refusal(tied))
    wider = adapted(heads=[[0, 1]])
    wider.add_adapter("upper", HeadTuningConfig(heads=[[2, 1]]))
    wider.set_adapter("upper")
    assert "an adapter that is not trained" in str(refusal(wider))
    with pytest.raises(InputError, match="layer 0 is trained"):
        PrefixCache(adapted(heads=[[0, 1]]))
    with pytest.raises(InputError, match="memory_gb"):
        PrefixCache(adapted(), memory_gb=-1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"engine": "FSDP"}, "FSDP"),
        ({"zero": 3}, "ZeRO-3"),
        ({"zero": 2}, None),
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
        ({"torch_compile": True}, "torch_compile"),
        ({"n_gpu": 2}, "one process a GPU"),
    ],
)
def test_what_is_refused_of_a_trainer(change: dict[str, Any], reason: str | None) -> None:
    zero = change.pop("zero", None)
    engine = change.pop("engine", "NO" if zero is None else "DEEPSPEED")
    plugins = {"deepspeed_plugin": SimpleNamespace(zero_stage=zero), "fsdp_plugin": SimpleNamespace(fsdp_version=2)}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**({"n_gpu": 0} | change)),
        accelerator=SimpleNamespace(
            distributed_type=SimpleNamespace(value=engine), num_processes=1, state=SimpleNamespace(**plugins)
        ),
    )
    found = refusal(adapted(), trainer)
    assert found is None if reason is None else reason in str(found)


# --- through the trainers ---------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


def curve(make: Any, cached: bool) -> tuple[list[float], dict[str, Tensor], CacheStats | None]:
    """Losses and the trained adapter of a whole training, with and without the cache."""
    trainer = make()
    assert refusal(trainer.model, trainer) is None
    stats = None
    if cached:
        with PrefixCache(trainer.model).installed() as stats:
            trainer.train()
    else:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, trained, stats


def assert_same_training(make: Any, rows_seen: int, n_rows: int) -> None:
    losses, trained, _ = curve(make, cached=False)
    found, weights, stats = curve(make, cached=True)
    assert found == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert len(set(losses)) == len(losses), "the model is training"
    for name, weight in trained.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
    assert stats is not None and not stats.plain
    assert stats.misses == n_rows and stats.hits + stats.misses == rows_seen


def preference_rows() -> list[dict[str, str]]:
    examples = tiny_task(subjects=4).examples
    return [{"prompt": e.prompt, "chosen": f" {e.answers[-1]}\n", "rejected": " Rome\n"} for e in examples]


def test_sft_trainer(tmp_path: Path) -> None:
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows()]

    def make() -> SFTTrainer:
        return SFTTrainer(
            tiny_model("llama"),
            args=SFTConfig(str(tmp_path), **COMMON),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tiny_tokenizer(),
            peft_config=HeadTuningConfig(heads=HEADS),
        )

    assert_same_training(make, rows_seen=3 * len(data), n_rows=len(data))


def test_answer_set_trainer(tmp_path: Path) -> None:
    encoded = encode(tiny_task(subjects=4), tiny_tokenizer())

    def make() -> AnswerSetTrainer:
        return AnswerSetTrainer(
            tiny_model("llama"),
            args=SFTConfig(str(tmp_path), remove_unused_columns=False, **COMMON),
            train_dataset=answer_set_rows(encoded),
            processing_class=tiny_tokenizer(),
            peft_config=HeadTuningConfig(heads=HEADS),
            data_collator=AnswerSetCollator(0),
            block=AnswerSetConfig(own_lists=0.0, retention=1.0),
        )

    n = len(encoded.examples)
    assert_same_training(make, rows_seen=3 * (n + n // 4), n_rows=n)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_trainer(checkpointing: bool, tmp_path: Path) -> None:
    data = preference_rows()

    def make() -> DPOTrainer:
        return DPOTrainer(
            tiny_model("llama"),
            args=DPOConfig(str(tmp_path), gradient_checkpointing=checkpointing, **COMMON),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tiny_tokenizer(),
            peft_config=HeadTuningConfig(heads=HEADS),
        )

    assert_same_training(make, rows_seen=3 * 2 * 2 * len(data), n_rows=len({*map(str, data)}) * 2)


def test_lora_on_upper_layers(tmp_path: Path) -> None:
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows()]

    def make() -> SFTTrainer:
        return SFTTrainer(
            tiny_model("llama"),
            args=SFTConfig(str(tmp_path), **COMMON),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2], task_type="CAUSAL_LM"),
        )

    assert_same_training(make, rows_seen=3 * len(data), n_rows=len(data))
