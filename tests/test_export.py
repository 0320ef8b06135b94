"""What is exported is a stock checkpoint that computes what the adapted model computes, or it is not there at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from small_runs import train, write_recipe
from tiny import tiny_model, tiny_task, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headtune.analysis.architectures import ARCHITECTURES
from headtune.analysis.errors import CheckError, InputError
from headtune.train import export as exporting
from headtune.train.adapter import HeadTuningConfig, HeadTuningLayer
from headtune.train.cli import main
from headtune.train.export import export, fold, model_card

HEADS = [[0, 1], [2, 0], [2, 3]]
SLOW = pytest.mark.slow
# Each export loads transformers in a process of its own: a few seconds.
KINDS = [
    pytest.param("llama", {"num_key_value_heads": 2}, True, id="llama-gqa"),
    pytest.param("gpt2", {}, False, id="gpt2"),
    pytest.param("llama", {}, True, id="llama", marks=SLOW),
    pytest.param("llama", {"attention_bias": True}, True, id="llama-bias", marks=SLOW),
    pytest.param("llama", {"head_dim": 12, "tie_word_embeddings": True}, True, id="llama-head-dim-tied", marks=SLOW),
    pytest.param("qwen3", {}, True, id="qwen3", marks=SLOW),
    pytest.param("opt", {}, False, id="opt", marks=SLOW),
    pytest.param("gpt_neox", {}, False, id="gpt_neox", marks=SLOW),
    pytest.param("phi", {}, False, id="phi", marks=SLOW),
]


def adapted(family: str, config: dict[str, Any] | None = None, **options: Any) -> Any:
    """A PeftModel with a random adapter, far from zero."""
    model = get_peft_model(tiny_model(family, **(config or {})), HeadTuningConfig(heads=HEADS, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, HeadTuningLayer):
                for parameters in (module.head_tuning_scale, module.head_tuning_offset):
                    for parameter in parameters.values():
                        parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    return found.float()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def run_export(model: Any, target: Path, dtype: str = "float32") -> dict[str, Any]:
    return export(model, tiny_tokenizer(), tiny_task(), target, dtype, n_prompts=3, new_tokens=4)


# --- folding, in this process -----------------------------------------------------------------------------------------

FOLDED = {
    "llama": {},
    "llama-gqa": {"num_key_value_heads": 2},
    "llama-head-dim": {"head_dim": 12},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-bias": {"attention_bias": True},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
    "phi": {},
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_model_is_stock_and_equal(name: str, tmp_path: Path) -> None:
    family, config = name.split("-")[0], FOLDED[name]
    model = adapted(family, config)
    expected, plain = logits(model), logits(tiny_model(family, **config))
    assert (expected - plain).abs().max() > 0.1
    folded = fold(model)
    assert type(folded) is type(tiny_model(family, **config))
    assert not any(isinstance(module, HeadTuningLayer) for module in folded.modules())
    close(logits(folded), expected)
    folded.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(logits(loaded.eval()), expected)
    biases = [n for n, _ in loaded.named_parameters() if n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    if ARCHITECTURES[family].export == "attention_bias":
        assert loaded.config.attention_bias is True and len(biases) == 9
        if name != "llama-bias":
            assert all(loaded.get_parameter(n).abs().max() == 0 for n in biases)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3"])
def test_a_family_without_an_output_bias_takes_a_scale_but_no_offset(family: str) -> None:
    with pytest.raises(InputError) as caught:
        fold(adapted(family))
    assert (
        "\n" not in str(caught.value)
        and repr(family) in str(caught.value)
        and "method.offset=false" in str(caught.value)
    )
    model = adapted(family, offset=False)
    expected = logits(model)
    assert (expected - logits(tiny_model(family))).abs().max() > 0.1
    close(logits(fold(model)), expected)


def test_every_family_of_the_table_is_exported_or_refused() -> None:
    folded = {name.split("-")[0] for name in FOLDED}
    assert folded | {"qwen2", "mistral", "phi3"} == set(ARCHITECTURES)


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "config", "flag"), KINDS)
def test_export(family: str, config: dict[str, Any], flag: bool, tmp_path: Path) -> None:
    model = adapted(family, config)
    expected = logits(model)
    target = tmp_path / "exported"
    result = run_export(model, target)
    assert result["passed"] is True and result["prompts"] == 3 and result["identical_generations"] == 3
    assert 0 <= result["mean_logit_difference"] <= result["max_logit_difference"] < 1e-4 < result["logit_scale"]
    assert json.loads((target / "export.json").read_text()) == result
    stored = json.loads((target / "config.json").read_text())
    if flag:
        assert stored["attention_bias"] is True
    assert "headtune" not in (target / "config.json").read_text()
    assert not {path.name for path in target.iterdir()} & {"request.json", "answer.safetensors", "adapter_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["exported"], "nothing temporary is left beside it"
    loaded, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(logits(loaded.eval()), expected)
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = "List five cities in Italy.\n1."
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids


@pytest.mark.slow
def test_half_precision_is_reported(tmp_path: Path) -> None:
    result = run_export(adapted("llama"), tmp_path / "exported", "bfloat16")
    assert result["dtype"] == "bfloat16" and result["passed"]
    assert 1e-4 < result["max_logit_difference"] < result["tolerance"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert loaded.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_a_scale_alone_is_exported_to_a_family_without_bias(family: str, tmp_path: Path) -> None:
    assert run_export(adapted(family, offset=False), tmp_path / "exported")["passed"]


# --- what is not right does not appear --------------------------------------------------------------------------------


def tampering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that gets one weight slightly wrong."""

    def wrong(model: Any) -> Any:
        folded = fold(model)
        with torch.no_grad():
            folded.get_parameter("model.layers.1.self_attn.o_proj.weight")[0, 0] += 0.5
        return folded

    monkeypatch.setattr(exporting, "fold", wrong)


def test_a_wrong_fold_leaves_nothing_and_exits_with_1(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write_recipe(tmp_path, tiny_llama, recipe="steer", method={"factor": 2.0}, training=None)) == 0
    tampering(monkeypatch)
    capsys.readouterr()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported"), "--prompts", "2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("headtune: the exported checkpoint differs: largest logit difference")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_checkpoint_that_drops_its_biases_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent trap this module is built around: without the config flag a reload drops the biases."""
    monkeypatch.setattr(exporting, "fold", lambda model: model.merge_and_unload())
    with pytest.raises(CheckError, match="does not load in plain transformers"):
        run_export(adapted("llama"), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_the_verdict() -> None:
    """Differences, generations and what is not a number, whatever prompt it is on."""

    def verdict(gap: float, dtype: str = "float32", same: bool = True, where: int = 1) -> dict[str, Any]:
        reference = [torch.full((2, 3), 5.0), torch.full((2, 3), -10.0)]
        greedy = [torch.tensor([1, 2]), torch.tensor([3, 4])]
        reloaded = {f"logits.{i}": row.clone() for i, row in enumerate(reference)}
        reloaded |= {f"greedy.{i}": row.clone() for i, row in enumerate(greedy)}
        reloaded[f"logits.{where}"][1, 2] += gap
        if not same:
            reloaded["greedy.0"][1] = 7
        return exporting._compare(reference, greedy, reloaded, dtype)

    fine = verdict(1e-5)
    assert fine["passed"] and fine["logit_scale"] == 10.0
    assert fine["max_logit_difference"] == pytest.approx(1e-5, rel=0.1)
    assert fine["mean_logit_difference"] == pytest.approx(1e-5 / 12, rel=0.1)
    assert not verdict(2e-3)["passed"] and not verdict(-2e-3)["passed"]
    assert not verdict(0.0, same=False)["passed"]
    assert verdict(0.0, same=False)["identical_generations"] == 1
    assert verdict(0.5, "bfloat16", same=False)["passed"], "half precision is reported, within a tenth of the scale"
    assert not verdict(1.5, "bfloat16")["passed"]
    for where in (0, 1):
        assert not verdict(float("nan"), where=where)["passed"]
        assert not verdict(float("nan"), "bfloat16", where=where)["passed"]
        assert not verdict(float("inf"), where=where)["passed"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_target_is_refused_and_kept(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    kept = target / "mine.txt" if kind == "folder" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(InputError, match="exists and is not empty" if kind == "folder" else "is a file"):
        run_export(adapted("llama"), target)
    assert kept.read_text() == "precious"


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'float8'"):
        run_export(adapted("llama"), tmp_path / "exported", "float8")
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_was_changed_and_measured() -> None:
    recipe = {"model": {"name": "base/model"}, "recipe": "lofit", "name": "my-run", "seed": 3}
    metric = {"mean": 0.25, "ci": [0.125, 0.5]}
    evaluation = {
        "task": "cities:test",
        "before": {"repeat_rate": metric, "neutral_perplexity": 20.0, "n": {}},
        "after": {"repeat_rate": metric | {"mean": 0.125}, "neutral_perplexity": 21.0, "n": {}},
    }
    card = model_card(recipe, [[0, 1], [2, 3]], evaluation)
    for words in ("base/model", "my-run", "seed 3", "L0H1, L2H3", "cities:test"):
        assert words in card
    assert "| repeat_rate | 0.25 [0.125, 0.5] | 0.125 [0.125, 0.5] |" in card
    assert "| neutral_perplexity | 20 | 21 |" in card


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lofit", "lora"])
def test_a_run_is_exported_by_the_command_line(
    recipe: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write_recipe(tmp_path, tiny_llama, recipe=recipe)) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--prompts", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == 2 and result["max_logit_difference"] < 1e-4
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Exported by headtune")
