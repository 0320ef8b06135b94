"""Generation has settings of its own: the model's generation_config.json does not act in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from headtune.analysis.heads.self_contrast import self_contrast
from headtune.analysis.models.generation import generate, padding_id, with_padding_token
from headtune.analysis.models.loading import load_plain, wrap_model
from headtune.train.evaluation.evaluate import generate_answers, generate_lists
from headtune.train.export.checkpoint import Prompts, model_outputs, reload_in_subprocess
from headtune.train.trainer.on_policy_lists import on_policy_examples
from helpers.tiny import save_tiny, tiny_model, tiny_task, tiny_tokenizer

# What changes greedy decoding, or is a traceback without a tokenizer.
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "num_beams": {"num_beams": 4, "length_penalty": 3.0, "early_stopping": True},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": list(range(3, 200))},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9},
    "stop_strings": {"stop_strings": ["o"]},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "suppress_tokens": {"suppress_tokens": list(range(300)), "bad_words_ids": [[301]]},
    "max_length": {"max_length": 3},
    "cache": {"use_cache": False, "cache_implementation": "static"},
    "sequence_bias": {"sequence_bias": [[[5], -100.0]], "forced_bos_token_id": 7, "forced_eos_token_id": 8},
}


def with_settings(model: Any, settings: dict[str, Any]) -> Any:
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_the_models_generation_config_does_not_act(name: str) -> None:
    tokenizer, task = tiny_tokenizer(), tiny_task()
    plain, set_up = tiny_model("llama"), with_settings(tiny_model("llama"), SETTINGS[name])
    if "eos_token_id" in SETTINGS[name]:  # that one is the model's own
        plain.generation_config.eos_token_id = SETTINGS[name]["eos_token_id"]
    before = set_up.generation_config.to_dict()
    written = [[scored.text for scored in generate_lists(model, tokenizer, task)] for model in (plain, set_up)]
    assert written[0] == written[1]
    assert [a.text for a in generate_answers(plain, tokenizer, task)] == [
        a.text for a in generate_answers(set_up, tokenizer, task)
    ]
    sampled = [generate_lists(model, tokenizer, task, sample_seed=3) for model in (plain, set_up)]
    assert [scored.text for scored in sampled[0]] == [scored.text for scored in sampled[1]]
    assert on_policy_examples(plain, tokenizer, task, 2) == on_policy_examples(set_up, tokenizer, task, 2)
    prompts = Prompts([[5, 6, 7], [8, 9]], None, 6, 0)
    outputs = [model_outputs(model, prompts).greedy for model in (plain, set_up)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    pairs = [
        self_contrast(wrap_model(model, tokenizer, "tiny"), task.limited(4), [(0, 1), (1, 2)], max_tokens=6)
        for model in (plain, set_up)
    ]
    assert pairs[0].examples == pairs[1].examples
    assert set_up.generation_config.to_dict() == before, "the model keeps its own"


def test_greedy_is_the_likeliest_token_each_step() -> None:
    model = with_settings(tiny_model("gpt2"), SETTINGS["repetition_penalty"])
    tokens = torch.tensor([[5, 6, 7]])
    output = generate(model, tokens, torch.ones_like(tokens), 8, 0)[0].tolist()
    expected = [5, 6, 7]
    with torch.no_grad():
        while len(expected) < len(output):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert output == expected and len(output) == 11


def test_all_ends_of_text_end_it() -> None:
    model, tokens = tiny_model("gpt2"), torch.tensor([[5, 6, 7]])
    third = generate(model, tokens, torch.ones_like(tokens), 8, 0)[0, 5].item()
    model.generation_config.eos_token_id = [2, third]
    ended = generate(model, tokens, torch.ones_like(tokens), 8, 0)[0].tolist()
    assert ended[-1] == third and len(ended) <= 6


def test_an_adapted_model_likewise() -> None:
    tokenizer, task = tiny_tokenizer(), tiny_task(subjects=2)
    base = with_settings(tiny_model("llama"), SETTINGS["repetition_penalty"])
    expected = [scored.text for scored in generate_lists(tiny_model("llama"), tokenizer, task)]
    adapted: Any = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    for _ in range(2):
        assert [scored.text for scored in generate_lists(adapted, tokenizer, task)] == expected
    assert adapted.get_base_model().generation_config.repetition_penalty == 1.8


@pytest.mark.slow
def test_the_proof_of_an_export_generates_so_as_well(tmp_path: Path) -> None:
    folders = [save_tiny(tmp_path / name, "llama") for name in ("plain", "penalty")]
    config = json.loads((folders[1] / "generation_config.json").read_text())
    (folders[1] / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 1.8, "num_beams": 3}))
    prompts = Prompts([[5, 6, 7], [8, 9]], None, 6, 0)
    plain, penalty = reload_in_subprocess(folders, prompts)
    here = model_outputs(load_plain(str(folders[1]))[0], prompts)
    for rows in zip(plain.greedy, penalty.greedy, here.greedy, strict=True):
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_padding_is_a_token_that_the_model_has() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert padding_id(model, tokenizer) == 0
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    assert padding_id(model, tokenizer) == tokenizer.eos_token_id == 2
    expected = [scored.text for scored in generate_lists(model, tiny_tokenizer(), tiny_task())]
    assert [scored.text for scored in generate_lists(model, tokenizer, tiny_task())] == expected
    with_padding_token(model, tokenizer)
    assert tokenizer.pad_token == "<eos>"
    with_padding_token(model, other := tiny_tokenizer())
    assert other.pad_token == "<pad>"
    other.pad_token = other.eos_token = None
    assert padding_id(model, other) == 0
