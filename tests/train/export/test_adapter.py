"""A run of low-rank head slices: exported as a stock LoRA that is proven equal, or folded into the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.cli.main import main
from headtune.train.config.recipe import load_recipe
from headtune.train.export import adapter
from headtune.train.export.adapter import export_adapter
from headtune.train.export.checkpoint import ModelOutputs, Prompts, export_run
from headtune.train.runs.load_run import load_run
from headtune.train.tuners.head_slices import stock_lora
from helpers.small_runs import train, write_recipe
from helpers.tiny import save_tiny

HEADS = [[0, 1], [2, 0], [2, 3]]


def logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run: rank 2 on the queries and outputs of three heads, with weight decay."""
    folder = tmp_path_factory.mktemp("rank")
    base = save_tiny(folder / "base", "llama", num_key_value_heads=2)
    method = {"objective": "sft", "rank": 2, "alpha": 4, "parts": ["q", "o"]}
    recipe = write_recipe(folder, base, recipe="masked", heads={"list": HEADS}, method=method)
    assert train(recipe, "training.weight_decay=0.1") == 0
    return folder / "run"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof reloads in this process; what another process adds is in a slow test."""

    def reload(folders: list[Path], prompts: Prompts, base: tuple[str, str | None] | None = None) -> list[ModelOutputs]:
        assert base is not None and base[1] is None and prompts.texts is None
        plain = AutoModelForCausalLM.from_pretrained(base[0])
        return [adapter.model_outputs(PeftModel.from_pretrained(plain, str(folder)), prompts) for folder in folders]

    monkeypatch.setattr(adapter, "reload_in_subprocess", reload)


@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_of_low_rank_is_exported_as_a_stock_lora(rank_run: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "lora", []
    result = export_adapter(rank_run, out, 3, notify=lines.append)
    assert [line.split()[0] for line in lines] == ["logits", "writing", "reloading"]
    assert json.loads((out / "export.json").read_text()) == result
    assert (result["adapter"], result["import_first"], result["rank"]) == ("LORA", None, 4), "two heads of rank 2"
    assert result["passed"] and result["prompts"] == 3 and result["identical_generations"] == 3
    assert result["max_logit_difference"] < 2e-6 * max(1, result["logit_scale"])
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "export.json")
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert (config["target_modules"], config["layers_to_transform"]) == (["o_proj", "q_proj"], [0, 2])
    assert config["base_model_name_or_path"] == str(rank_run.parent / "base")
    card = (out / "README.md").read_text()
    assert "import headtune" not in card and "LoRA of rank 4" in card and "--enable-lora" in card

    base = AutoModelForCausalLM.from_pretrained(rank_run.parent / "base")
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, str(out)).eval()
    run_model, _, recipe = load_run(rank_run)
    expected = logits(run_model)
    assert (expected - before).abs().max() > 1e-3, "the training must matter"
    torch.testing.assert_close(logits(loaded), expected, atol=2e-6, rtol=2e-6)
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.share) == (2, 4, "head")


def test_a_lora_that_computes_something_else_is_not_kept(
    rank_run: Path, tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: Any) -> Any:
        config, weights = stock_lora(model)
        config.lora_alpha += 100
        return config, weights

    monkeypatch.setattr(adapter, "stock_lora", other)
    with pytest.raises(CheckError, match="the exported adapter differs"):
        export_adapter(rank_run, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_quantised_run_is_refused(rank_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = rank_run / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(CheckError, match="not finite"):
        export_adapter(rank_run, tmp_path / "out")
    weights.write_bytes(whole)

    def quantised(folder: Path) -> Any:
        model, tokenizer, recipe = load_run(folder)
        model.get_base_model().config.quantization_config = {"quant_method": "other"}
        return model, tokenizer, recipe

    monkeypatch.setattr(adapter, "load_run", quantised)
    with pytest.raises(InputError, match="is quantised"):
        export_adapter(rank_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_rank_says_nothing_of_it(rank_run: Path, tmp_path: Path) -> None:
    """The recipe that a run writes holds what is read, and loads again."""
    recipe = write_recipe(tmp_path, rank_run.parent / "base", recipe="masked", method={"objective": "sft"})
    dump = load_recipe(str(recipe)).dump()
    assert not {"rank", "alpha", "share"} & set(dump["method"])


def test_it_is_folded_into_a_checkpoint(rank_run: Path, tmp_path: Path) -> None:
    result = export_run(rank_run, tmp_path / "folded", n_prompts=2)
    assert result["passed"] and result["max_logit_difference"] < 2e-6 * max(1, result["logit_scale"])
    base = AutoModelForCausalLM.from_pretrained(rank_run.parent / "base").state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "folded").state_dict().items():
        moved = (weight != base[name]).nonzero()
        if name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
            assert {axis // 8 for axis in moved[:, int("o_proj" in name)].tolist()} == {1}, "head 1 alone"
        elif "layers.2" not in name or not name.endswith(("q_proj.weight", "o_proj.weight")):
            assert not len(moved), name


@pytest.mark.slow
def test_another_process_loads_it(rank_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(rank_run), str(tmp_path / "lora"), "--adapter", "--prompts", "2"]) == 0
    assert "the LORA adapter alone, rank 4, largest logit difference" in " ".join(capsys.readouterr().out.split())
