"""An adapter that no recipe trained is exported from its folder, proven as a run is, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from headtune import export_adapter_folder
from headtune.analysis.tasks.task import to_jsonl
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.cli.main import main
from headtune.train.tuners.head_slices import HeadSlicesConfig
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.tiny import save_tiny, tiny_task, tiny_tokenizer

HEADS = [[0, 1], [2, 0], [2, 3]]


def written(folder: Path, base: Path, config: Any) -> tuple[Path, Tensor]:
    """A random adapter as `save_pretrained` writes it, and the adapted model's logits."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder, logits(model)


def logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = model.eval()(tokens, use_cache=False).logits
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model", "llama", num_key_value_heads=2)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    return written(tmp_path_factory.mktemp("trained") / "checkpoint-4", base, HeadTuningConfig(heads=HEADS))


@pytest.fixture
def copy(adapter: tuple[Path, Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter[0], tmp_path / "copy"))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "cities.jsonl"
    path.write_text(to_jsonl(tiny_task().examples))
    return path


def test_an_adapter_folder_is_exported_and_proven(
    adapter: tuple[Path, Tensor], base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = adapter
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out), "--task", str(task), "--prompts", "3"]) == 0
    captured = capsys.readouterr()
    printed = " ".join((captured.out + captured.err).split())
    assert "3 of 3 greedy generations identical" in printed
    assert "the prompts compared are those of cities" in printed
    stock = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(stock), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    result = json.loads((out / "export.json").read_text())
    assert result["passed"] and result["heads"] == HEADS and result["base"]["name"] == str(base)
    assert result["inputs"]["adapter"]["name"] == "checkpoint-4" and result["run"] == "checkpoint-4"
    card = (out / "README.md").read_text()
    assert "heads (3): L0H1, L2H0, L2H3; no recipe made it" in card


def test_another_base_and_the_tokenizer_beside_the_adapter(copy: Path, base: Path, task: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base, tmp_path / "moved")
    config = json.loads((copy / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/nowhere/model"}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(copy)
    lines: list[str] = []
    with pytest.raises(InputError, match=r"/nowhere/model.*give another: --base MODEL"):
        export_adapter_folder(copy, tmp_path / "out", task=str(task))
    result = export_adapter_folder(copy, tmp_path / "out", str(moved), str(task), n_prompts=2, notify=lines.append)
    assert result["passed"] and result["base"]["name"] == str(moved)
    assert lines[0] == f"the adapter names the base '/nowhere/model'; {str(moved)!r} is taken in its place"
    assert f"tokenizer and chat template are those of {copy}" in lines
    assert "message['content']" in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_slices_of_low_rank_without_a_recipe_become_a_stock_lora(base: Path, task: Path, tmp_path: Path) -> None:
    config = HeadSlicesConfig(heads=HEADS, parts=["q", "o"], rank=2)
    folder, expected = written(tmp_path / "slices", base, config)
    words = ["export", str(folder), str(tmp_path / "lora"), "--adapter", "--task", str(task), "--prompts", "2"]
    assert main(words) == 0
    result = json.loads((tmp_path / "lora" / "export.json").read_text())
    assert (result["adapter"], result["rank"], result["identical_generations"]) == ("LORA", 4, 2)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def _lora(folder: Path, base: Path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(folder)


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


def _in_a_checkpoint(folder: Path) -> None:
    for step in (50, 100):
        ignore = shutil.ignore_patterns("checkpoint-*")
        shutil.copytree(folder, folder / f"checkpoint-{step}", ignore=ignore)
    (folder / "adapter_config.json").unlink()


def _link(folder: Path) -> None:
    shutil.move(folder / "adapter_model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "adapter_model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


REFUSALS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "nothing": (lambda folder, _: (folder / "adapter_config.json").unlink(), "not an adapter (no adapter_config.json)"),
    "output_dir": (lambda folder, _: _in_a_checkpoint(folder), "its folder 'checkpoint-100' does: give "),
    "lora": (_lora, "is a LORA, not one of headtune's; fold it with PEFT: AutoPeftModel"),
    "no base": (lambda folder, _: _config(folder, base_model_name_or_path=None), "names no base model; give it: --"),
    "weights": (lambda folder, _: (folder / "adapter_model.safetensors").unlink(), "and no adapter_model.safetensors"),
    "link": (lambda folder, _: _link(folder), "is a link that leads out of"),
    "shapes": (lambda folder, _: _weights(folder, lambda t: t[..., :-1].contiguous()), "does not fit the base"),
    "heads": (lambda folder, _: _config(folder, heads=[[9, 1]]), "head L9H1 is out of range"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_of_an_adapter_folder(
    name: str, copy: Path, base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = REFUSALS[name]
    damage(copy, base)
    assert main(["export", str(copy), str(tmp_path / "out"), "--task", str(task)]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_more_refusals(copy: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    other = save_tiny(tmp_path / "other", "llama", num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(InputError, match=r"does not fit the base '.*other'.*n_heads 4 but the model 8"):
        export_adapter_folder(copy, out, str(other))
    with pytest.raises(InputError, match="HEAD_TUNING adapter alone already, and no LoRA"):
        export_adapter_folder(copy, out, adapter_alone=True)
    grown = tiny_tokenizer()
    grown.add_tokens([f"<more{i}>" for i in range(3)])
    grown.save_pretrained(copy)
    with pytest.raises(InputError, match=r"embeddings; tokens that were added in training"):
        export_adapter_folder(copy, out)
    _weights(copy, lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(CheckError, match="numbers that are not finite"):
        export_adapter_folder(copy, out)
    (copy / "recipe.yaml").write_text("recipe: lofit\n")
    assert main(["export", str(copy), str(out), "--base", str(base)]) == 2
    assert "--base is for an adapter without a recipe" in capsys.readouterr().err
    assert not out.exists()
