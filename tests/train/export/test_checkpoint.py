"""What is exported is a stock checkpoint that computes what the adapted model computes, or it is not there at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headtune.analysis.models import builtin
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import sha256_of, write_json
from headtune.cli.main import main
from headtune.train.export import checkpoint
from headtune.train.export.adapter import export_adapter
from headtune.train.export.checkpoint import (
    ModelOutputs,
    Prompts,
    compare,
    export,
    export_run,
    model_outputs,
)
from headtune.train.export.model_card import Origin, adapter_card, checkpoint_card, is_hub_id, licence_of, origin_of
from headtune.train.runs.load_run import load_run
from headtune.train.tuners.convert import fold
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.small_runs import train, write_recipe
from helpers.tiny import save_tiny, tiny_model, tiny_task, tiny_tokenizer

HEADS = [[0, 1], [2, 0], [2, 3]]


def adapted(family: str, **options: Any) -> Any:
    """A PeftModel with a random adapter, far from zero."""
    model = get_peft_model(tiny_model(family), HeadTuningConfig(heads=HEADS, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head_tuning_" in name:
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    return found.float()


@pytest.fixture
def llama_run(tmp_path: Path) -> Path:
    """A finished run on a model folder that names its licence, without training."""
    base = save_tiny(tmp_path / "base", "llama")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert train(write_recipe(tmp_path, base, recipe="steer", method={"factor": 2.0}, training=None)) == 0
    return tmp_path / "run"


def run_export(model: Any, target: Path, dtype: str = "float32", **options: Any) -> dict[str, Any]:
    return export(model, tiny_tokenizer(), tiny_task(), target, dtype, n_prompts=3, new_tokens=4, **options)


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("new_interpreters")
def test_export_to_another_family(tmp_path: Path) -> None:
    """Folded, converted, split into shards, reloaded elsewhere, described: and nothing else is left behind."""
    model = adapted("qwen2")
    expected = logits(model)
    target = tmp_path / "exported"
    origin = Origin(run="my-run", method="lofit", base="org/base", heads=HEADS, evaluation={})
    result = run_export(model, target, origin=origin, max_shard_size="40KB")
    assert result["passed"] is True and result["prompts"] == 3 and result["identical_generations"] == 3
    assert 0 <= result["mean_logit_difference"] <= result["max_logit_difference"] < 1e-5 * result["logit_scale"]
    assert json.loads((target / "export.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["exported"], "nothing temporary is left beside it"

    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(shards) > 1 and (target / "model.safetensors.index.json").is_file()
    present = {path.name for path in target.iterdir()}
    assert set(result["files"]) == present - {"export.json"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", *shards} <= present
    assert all(sha256_of(target / name) == digest for name, digest in result["files"].items())

    assert len({(target / name).stat().st_mode for name in ("config.json", *shards)}) == 1, "a server can read all"

    stored = json.loads((target / "config.json").read_text())
    assert stored["architectures"] == ["LlamaForCausalLM"] and stored["attention_bias"] is True
    assert "headtune" not in json.dumps(stored)
    assert result["conversion"]["source"] == "qwen2" and result["conversion"]["written"] == "llama"
    assert (result["run"], result["method"], result["heads"]) == ("my-run", "lofit", HEADS)
    loaded, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval()), expected, atol=1e-5, rtol=1e-5)
    text = "List five cities in Italy.\n1."
    assert AutoTokenizer.from_pretrained(target)(text).input_ids == tiny_tokenizer()(text).input_ids
    card = (target / "README.md").read_text()
    assert "`qwen2` -> `llama`" in card and f"{result['max_logit_difference']:.2g}" in card


@pytest.mark.slow
def test_half_precision_is_reported(tmp_path: Path) -> None:
    result = run_export(adapted("llama"), tmp_path / "exported", "bfloat16")
    assert result["dtype"] == "bfloat16" and result["passed"]
    assert 1e-4 < result["max_logit_difference"] < result["tolerance"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert loaded.dtype == torch.bfloat16


# --- what is not right does not appear --------------------------------------------------------------------------------


def tampering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that gets one weight slightly wrong."""

    def wrong(model: Any) -> Any:
        folded = fold(model)
        with torch.no_grad():
            folded.get_parameter("model.layers.1.self_attn.o_proj.weight")[0, 0] += 0.5
        return folded

    monkeypatch.setattr(checkpoint, "fold", wrong)


@pytest.mark.slow
def test_a_wrong_fold_leaves_nothing_and_exits_with_1(
    llama_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tampering(monkeypatch)
    capsys.readouterr()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["export", str(llama_run), str(tmp_path / "exported"), "--prompts", "2"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("headtune: the exported checkpoint differs: largest logit difference")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_checkpoint_that_drops_its_biases_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent trap this module is built around: without the config flag a reload drops the biases."""
    monkeypatch.setattr(checkpoint, "fold", lambda model: model.merge_and_unload())
    with pytest.raises(CheckError, match="does not load in plain transformers"):
        run_export(adapted("llama"), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Own"}}, "auto_map"),
    ],
)
def test_a_config_that_names_another_class_is_caught(
    change: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_stock

    def tampered(folded: Any, tokenizer: Any, folder: Path, *rest: Any) -> None:
        write(folded, tokenizer, folder, *rest)
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | change)

    monkeypatch.setattr(checkpoint, "write_stock", tampered)
    with pytest.raises(CheckError, match=complaint):
        run_export(adapted("llama"), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_tokenizer_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_stock
    other = tiny_tokenizer(bos=True)
    monkeypatch.setattr(checkpoint, "write_stock", lambda model, _, folder, *rest: write(model, other, folder, *rest))
    with pytest.raises(CheckError, match="the tokenizer has changed"):
        run_export(adapted("llama"), tmp_path / "exported")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "gpt_neox", "phi"])
def test_prompts_that_go_on_together_go_on_as_each_alone(family: str) -> None:
    """More than a batch, of uneven lengths: what was padded is what generation of one row gives."""
    model: Any = tiny_model(family)
    rows = [torch.arange(10, 10 + 3 + 5 * i % 14).tolist() for i in range(12)]
    found = model_outputs(model, Prompts(rows, None, 6, 0))
    assert len(found.greedy) == len(found.logits) == len(rows)
    for row, logits, greedy in zip(rows, found.logits, found.greedy, strict=True):
        tokens = torch.tensor([row])
        with torch.no_grad():
            torch.testing.assert_close(logits, model(tokens).logits[0], atol=1e-5, rtol=0)
        alone = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=6, pad_token_id=0
        )[0].tolist()
        said = greedy.tolist()
        start = said.index(row[0])
        assert said[:start] == [0] * start
        assert said[start : start + len(alone)] == alone and not any(said[start + len(alone) :])


def test_the_verdict() -> None:
    """Differences, generations and what is not a number, whatever prompt it is on."""

    def verdict(gap: float, dtype: str = "float32", same: bool = True, where: int = 1) -> dict[str, Any]:
        expected = ModelOutputs(
            [torch.full((2, 3), 5.0), torch.full((2, 3), -10.0)], [torch.tensor([1, 2]), torch.tensor([3, 4])]
        )
        found = ModelOutputs([row.clone() for row in expected.logits], [row.clone() for row in expected.greedy])
        found.logits[where][1, 2] += gap
        if not same:
            found.greedy[0][1] = 7
        return compare(expected, found, dtype)

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


def test_an_unknown_dtype_or_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'float8'"):
        run_export(adapted("llama"), tmp_path / "exported", "float8")
    for size in ("big", "0GB", "-1GB", "5"):
        with pytest.raises(InputError, match=repr(size)):
            run_export(adapted("llama"), tmp_path / "exported", max_shard_size=size)
    assert not list(tmp_path.iterdir())


# --- the card ---------------------------------------------------------------------------------------------------------

METRIC = {"mean": 0.25, "ci": [0.125, 0.5]}
EVALUATION = {
    "task": "cities:test",
    "task_sha256": "7a5c",
    "weights_sha256": "b19e",
    "before": {"repeat_rate": METRIC, "neutral_perplexity": 20.0, "n": {}},
    "after": {"repeat_rate": METRIC | {"mean": 0.125}, "neutral_perplexity": 21.0, "n": {}},
}
RESULT = {
    "dtype": "float32",
    "prompts": 20,
    "max_logit_difference": 3e-6,
    "logit_scale": 12.0,
    "tolerance": 1e-3,
    "identical_generations": 20,
    "conversion": {"source": "qwen2", "written": "llama", "flags": ["attention_bias"], "why": "it has the bias"},
}


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    matter: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return matter


def test_the_card_says_what_was_changed_and_measured() -> None:
    origin = Origin("my-run", "lofit", "org/base", None, {"seed": 3}, [[0, 1], [2, 3]], {"sha256": "da7a"}, EVALUATION)
    card = checkpoint_card(origin, RESULT, "Beware.")
    for words in (
        "org/base",
        "my-run",
        "seed: 3",
        "L0H1, L2H3",
        "cities:test",
        "7a5c",
        "b19e",
        "da7a",
        "Beware.",
        "3e-06",
    ):
        assert words in card
    assert "| repeat_rate | 0.25 [0.125, 0.5] | 0.125 [0.125, 0.5] |" in card
    assert "| neutral_perplexity | 20 | 21 |" in card
    matter = front_matter(card)
    assert matter["base_model"] == "org/base" and matter["base_model_relation"] == "finetune"
    assert matter["library_name"] == "transformers" and matter["tags"] == ["headtune", "lofit", "llama"]
    assert "license" not in matter and "Licence: not known here" in card


def test_an_adapters_card_says_how_to_load_it() -> None:
    origin = Origin("my-run", "lofit", "org/base", heads=HEADS, evaluation=EVALUATION)
    own, pefts = adapter_card(origin, "headtune.train"), adapter_card(origin, None)
    assert "import headtune.train  # before the adapter is loaded" in own and "import headtune" not in pefts
    assert front_matter(own)["library_name"] == "peft" and front_matter(own)["base_model_relation"] == "adapter"
    built_in = adapter_card(Origin("my-run", "lofit", "smollm2-135m"), "headtune.train")
    assert 'load_plain("smollm2-135m")' in built_in
    assert front_matter(built_in)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_licences_are_those_that_are_known(tmp_path: Path) -> None:
    assert licence_of("smollm2-135m") == {"license": "apache-2.0"}
    gemma = licence_of("gemma3-270m")
    assert gemma["license"] == "other" and "gemma" in gemma["license_name"] and gemma["license_link"].startswith("http")
    assert all(licence_of(name) for name in builtin.BUILT_IN)
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == {"license": "mit"}
    for text in ("# A model\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlanguage: en\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(str(tmp_path)) == {}
    assert licence_of(str(tmp_path / "none")) == licence_of("org/name") == {}
    assert is_hub_id("org/name") and not is_hub_id(str(tmp_path)) and not is_hub_id("smollm2-135m")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_exported_with_its_origin(llama_run: Path, tmp_path: Path) -> None:
    told: list[str] = []
    result = export_run(llama_run, tmp_path / "out", n_prompts=2, notify=told.append)
    assert [line.split()[0] for line in told] == ["logits", "folding", "writing", "reloading"]
    evaluation = json.loads((llama_run / "evaluation.json").read_text())
    assert result["prompts"] == 2 and result["max_logit_difference"] < 1e-5 * max(1, result["logit_scale"])
    assert result["method"] == "steer" and result["heads"] == HEADS
    assert result["base"] == {
        "name": str(tmp_path / "base"),
        "revision": None,
        "weights_sha256": evaluation["weights_sha256"],
    }
    assert result["evaluation_task_sha256"] == evaluation["task_sha256"]
    assert result["conversion"]["flags"] == [], "a scale alone needs no bias"
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card)["license"] == "mit" and "before | after" in card


def test_an_adapter_alone_is_exported(llama_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter-alone"
    result = export_adapter(llama_run, out)
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "export.json",
    }
    assert json.loads((out / "export.json").read_text()) == result
    assert result["adapter"] == "HEAD_TUNING" and result["import_first"] == "headtune.train"
    assert all(sha256_of(out / name) == digest for name, digest in result["files"].items())
    run_model, _, _ = load_run(llama_run)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, str(out)).eval()
    assert torch.equal(logits(again), logits(run_model))
    with pytest.raises(InputError, match="exists and is not empty"):
        export_adapter(llama_run, out)


@pytest.mark.slow
def test_the_import_that_an_adapters_card_names_is_enough(llama_run: Path, tmp_path: Path) -> None:
    """The card's own code, in a process that has imported nothing else of headtune."""
    out = tmp_path / "adapter-alone"
    export_adapter(llama_run, out)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("PATH", str(out))
    command = [sys.executable, "-c", code + "\nprint(type(model).__name__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip().splitlines()[-1:] == ["PeftModelForCausalLM"], done.stderr[-2000:]


def test_a_broken_adapter_or_none_is_refused(llama_run: Path, tmp_path: Path) -> None:
    weights = llama_run / "adapter" / "adapter_model.safetensors"
    state = load_file(weights)
    save_file({name: tensor * float("nan") for name, tensor in state.items()}, weights)
    with pytest.raises(CheckError, match="not finite"):
        export_adapter(llama_run, tmp_path / "out")
    weights.with_name("adapter_config.json").unlink()
    with pytest.raises(InputError, match="has no adapter"):
        export_adapter(llama_run, tmp_path / "out")
    with pytest.raises(InputError, match="is not a run"):
        export_adapter(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_loaded_whole_or_not_at_all(
    llama_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT alone would put initial values where the file has none."""
    weights = llama_run / "adapter" / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(name for name in state if "layers.2." in name)
    lacking = {key: tensor for key, tensor in state.items() if "layers.2." not in key}
    for content, said in (
        (lacking, f"lacks {len(state) - len(lacking)} weights of {len(state)}, such as {re.escape(name)}"),
        (state | {"other": torch.ones(1)}, "holds 1 that are none of this adapter's, such as other"),
        (state | {name: torch.ones(1, 99)}, f"holds 1 of another shape, such as {re.escape(name)}"),
    ):
        save_file(content, weights)
        with warnings.catch_warnings(record=True) as warned, pytest.raises(CheckError, match=f"safetensors {said}"):
            load_run(llama_run)
        assert not [warning for warning in warned if "weights" in str(warning.message)]
    save_file(lacking, weights)
    capsys.readouterr()
    assert main(["export", str(llama_run), str(tmp_path / "out")]) == 1
    assert f"{weights} lacks" in complaint(capsys) and not (tmp_path / "out").exists()


def test_what_is_cut_short_in_a_run_is_told_in_one_line(
    llama_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for name, code in (
        ("run.json", 2),
        ("evaluation.json", 2),
        ("adapter/adapter_config.json", 2),
        ("adapter/adapter_model.safetensors", 1),
    ):
        path = llama_run / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        for options in ([], ["--adapter"]):
            assert main(["export", str(llama_run), str(tmp_path / "out"), *options]) == code
            assert str(path) in complaint(capsys)
        path.write_bytes(whole)
    assert not (tmp_path / "out").exists()


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which a command says why it failed."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("headtune: "))
    return line


def test_a_run_without_an_evaluation_has_an_origin_all_the_same(tmp_path: Path) -> None:
    origin = origin_of(tmp_path, {"name": "n", "recipe": "lofit", "model": {"name": "org/base"}})
    assert origin.evaluation == {} and origin.summary()["base"]["weights_sha256"] is None
    assert "org/base" in adapter_card(origin, None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lofit", "jola", "masked", "lora", "ln", "full"])
def test_a_trained_run_is_exported(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    method = {"answer_set": {"own_lists": 0.0, "retention": 0.0 if recipe == "full" else 0.5}}
    assert train(write_recipe(tmp_path, tiny_llama, recipe=recipe, method=method)) == 0
    result = export_run(tmp_path / "run", tmp_path / "out", n_prompts=2)
    assert result["prompts"] == 2 and result["max_logit_difference"] < 1e-5 * max(1, result["logit_scale"])
    assert result["method"] == recipe and result["training_data"]
