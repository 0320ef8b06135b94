"""The page on one's own TRL script, carried out from top to bottom: its data, its Python, its commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from headtune.analysis.models.loading import load_model
from headtune.cli.main import main
from helpers import documents
from helpers.documents import ROOT
from helpers.small_runs import head_set
from helpers.tiny import save_tiny, tiny_tokenizer

PAGE = ROOT / "docs" / "howto" / "your-trainer.md"
QUIET = "use_cpu=True, report_to='none', logging_steps=1, disable_tqdm=True"
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None], use_cache=False).logits


def test_the_page_is_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "model", "llama", num_key_value_heads=2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    head_set(load_model(str(model)).identity()).save(tmp_path / "runs" / "heads")
    blocks = documents.blocks(PAGE)
    for block in blocks:
        if block.language == "jsonl":
            (tmp_path / block.head.split('"')[1]).write_text(block.text, encoding="utf-8")
    sft, dpo, regularised = (block.text for block in blocks if block.language == "python")
    assert len([line for line in sft.splitlines() if line.strip()]) <= 22, "a script of twenty lines"

    names: dict[str, Any] = {}
    for source in (sft, dpo, regularised):
        # As on a machine without a GPU; the head set of the test has fewer heads.
        source = source.replace('"MODEL"', repr(str(model))).replace("top=8", "top=1")
        source = re.sub(r"(= ?(?:SFT|DPO)Config\()", rf"\1{QUIET}, output_dir=", source)
        exec(compile(source, PAGE.name, "exec"), names)
        if source.startswith("from datasets"):
            first = names["trainer"]
            evaluated = [line["eval_loss"] for line in first.state.log_history if "eval_loss" in line]
            assert len(evaluated) == 3 and first.state.best_metric == min(evaluated)
            folder = Path(first.state.best_model_checkpoint)
            best = tmp_path / "trained" / "best" / "adapter_model.safetensors"
            assert (folder / best.name).read_bytes() == best.read_bytes()
    logged = names["trainer"].state.log_history
    assert any("output_drift" in line for line in logged) and any("attention_kl" in line for line in logged)

    exports = [words[1:] for words in documents.commands(PAGE) if words[1] == "export"]
    assert exports == [["export", "trained/best", "chat-model"], ["export", "preferred", "chat-model-2"]]
    for words in exports:
        assert main([*words, "--prompts", "2"]) == 0
        result = json.loads((tmp_path / words[2] / "export.json").read_text())
        assert result["passed"] and result["identical_generations"] == 2
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), words[1])
        stock = AutoModelForCausalLM.from_pretrained(words[2])
        torch.testing.assert_close(logits(stock), logits(adapted), atol=1e-4, rtol=1e-4)
        assert (logits(stock) - logits(AutoModelForCausalLM.from_pretrained(model))).abs().max() > 1e-3
        assert (tmp_path / words[2] / "chat_template.jinja").read_text() == CHAT
