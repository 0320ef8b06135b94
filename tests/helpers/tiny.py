"""Tiny random models of every family, a real tokenizer and a small task, all made offline within a second.

model = tiny_model("llama", num_key_value_heads=2)      heads = view(model, tiny_tokenizer())
folder = save_tiny(tmp_path / "model", "gpt2")          what a command line takes as MODEL
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from headtune.analysis.tasks.build import Template, build
from headtune.analysis.tasks.task import Task

FACTS = {
    "Italy": ["Rome", "Milan", "Naples", "Turin", "Genoa", "Venice"],
    "Japan": ["Tokyo", "Osaka", "Kyoto", "Kobe", "Nagoya", "Sapporo"],
    "France": ["Paris", "Lyon", "Nice", "Lille", "Nantes", "Bordeaux"],
    "Spain": ["Madrid", "Sevilla", "Bilbao", "Malaga", "Toledo", "Vigo"],
    "Germany": ["Berlin", "Hamburg", "Munich", "Dresden", "Leipzig", "Bonn"],
    "England": ["London", "York", "Leeds", "Bristol", "Oxford", "Derby"],
    "Canada": ["Toronto", "Ottawa", "Calgary", "Winnipeg", "Regina", "Halifax"],
    "America": ["New York", "Boston", "Chicago", "Denver", "Seattle", "Houston"],
}
TEMPLATES = (Template("List five cities in {subject}."), Template("Some cities in {subject}:", "\n- {answer}"))
_OTHER_WORDS = "List five cities in Some Here is a list of New York Mexico City I know and then 1. 2. 3. 4. 5. - :"


def tiny_task(previous: tuple[int, ...] = (2,), subjects: int = 8, name: str = "cities") -> Task:
    """List prompts over `FACTS`: `subjects` x two templates x `previous`."""
    facts = dict(list(FACTS.items())[:subjects])
    return Task(name, tuple(build(facts, TEMPLATES, previous)))


@functools.cache
def _trained() -> str:
    """A byte-level BPE, as JSON, that knows the words of `FACTS` with and without a leading space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [word for subject, answers in FACTS.items() for name in (subject, *answers) for word in name.split()]
    words += _OTHER_WORDS.split()
    corpus = [f"{word} {word}" for word in words for _ in range(3)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    backend.decoder = decoders.ByteLevel()
    return str(backend.to_str())


def tiny_tokenizer(bos: bool = False, trim_offsets: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer that behaves like GPT-2's: " Rome" is one token, another one than "Rome".

    Args:
        bos: put `<bos>` in front, as llama's tokenizers do.
        trim_offsets: leave the leading space out of a token's character offsets.
        eos: append `<eos>`, as tokenizers with `add_eos_token` do.
    """
    backend = Tokenizer.from_str(_trained())
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos or eos:
        single = "<bos> " * bos + "$A" + " <eos>" * eos
        steps.append(processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)]))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


N_LAYERS, N_HEADS, D_MODEL = 3, 4, 32

# Every family's own names for the same sizes; qwen3's head_dim would otherwise be 128.
_LLAMA = {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_HEADS,
    "max_position_embeddings": 256,
}
# Wider heads than d_model / n_heads, as Gemma has them, and a mix of layer types in three layers.
_GEMMA = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 2},
    "qwen2": _LLAMA | {"num_key_value_heads": 2},
    "qwen3": _LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": 256},
    "opt": {
        "hidden_size": D_MODEL,
        "word_embed_proj_dim": D_MODEL,
        "ffn_dim": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "max_position_embeddings": 256,
    },
    "gpt_neox": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    "phi": _LLAMA,
    "phi3": _LLAMA | {"num_key_value_heads": 2},
    "gemma": _LLAMA | {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": _LLAMA | _GEMMA,
    "gemma3_text": _LLAMA | _GEMMA,
}


@dataclass(frozen=True)
class Kind:
    """A tiny model: its family, what sets it apart, and the sizes that a view of it must find."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    n_kv_heads: int = N_HEADS
    head_dim: int = 8


_SLIDING = {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
# Windows of 5 are shorter than every prompt of the tests; caps of 1 and 2 bend scores and logits of that size a lot.
KINDS = {
    "llama": Kind("llama"),
    "mistral": Kind("mistral", n_kv_heads=2),
    "qwen2": Kind("qwen2", n_kv_heads=2),
    "qwen3": Kind("qwen3", n_kv_heads=2),
    "gemma": Kind("gemma", n_kv_heads=2, head_dim=16),
    "gemma2": Kind("gemma2", n_kv_heads=2, head_dim=16),
    "gemma3": Kind("gemma3_text", n_kv_heads=2, head_dim=16),
    "gpt2": Kind("gpt2"),
    "opt": Kind("opt"),
    "gpt_neox": Kind("gpt_neox"),
    "phi": Kind("phi"),
    "phi3": Kind("phi3", n_kv_heads=2),
    "llama-gqa": Kind("llama", {"num_key_value_heads": 2}, n_kv_heads=2),
    "llama-mqa": Kind("llama", {"num_key_value_heads": 1}, n_kv_heads=1),
    "llama-head-dim": Kind("llama", {"head_dim": 16}, head_dim=16),
    "llama-gqa-head-dim": Kind("llama", {"head_dim": 16, "num_key_value_heads": 2}, n_kv_heads=2, head_dim=16),
    "llama-bias": Kind("llama", {"attention_bias": True}),
    "llama-tied": Kind("llama", {"tie_word_embeddings": True}),
    "mistral-head-dim": Kind("mistral", {"head_dim": 16}, n_kv_heads=2, head_dim=16),
    "mistral-sliding": Kind("mistral", {"sliding_window": 5}, n_kv_heads=2),
    "qwen2-sliding": Kind("qwen2", {"use_sliding_window": True} | _SLIDING, n_kv_heads=2),
    "qwen3-bias": Kind("qwen3", {"attention_bias": True}, n_kv_heads=2),
    "gemma2-sliding": Kind("gemma2", _SLIDING, n_kv_heads=2, head_dim=16),
    "gemma2-caps": Kind(
        "gemma2", _SLIDING | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}, n_kv_heads=2, head_dim=16
    ),
    "gemma2-no-caps": Kind(
        "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, n_kv_heads=2, head_dim=16
    ),
    "gemma2-bias-mqa": Kind("gemma2", {"attention_bias": True, "num_key_value_heads": 1}, n_kv_heads=1, head_dim=16),
    "gemma3-sliding": Kind("gemma3_text", _SLIDING, n_kv_heads=2, head_dim=16),
    "gemma3-mqa": Kind("gemma3_text", _SLIDING | {"num_key_value_heads": 1}, n_kv_heads=1, head_dim=16),
    "gemma3-bias": Kind("gemma3_text", {"attention_bias": True}, n_kv_heads=2, head_dim=16),
    "gpt2-inverse-layer": Kind("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt-no-bias": Kind("opt", {"enable_bias": False}),
    "gpt_neox-sequential": Kind("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-no-bias": Kind("gpt_neox", {"attention_bias": False}),
    "phi-norm": Kind("phi", {"qk_layernorm": True}),
    "phi3-sliding": Kind("phi3", {"sliding_window": 5}, n_kv_heads=2),
    "phi3-mqa": Kind("phi3", {"num_key_value_heads": 1}, n_kv_heads=1),
}

# Families without a row of the table, found by their structure. Their view is tested as that of the others, and what is
# computed through it by way of them.
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FOUND_KINDS = {
    "olmo2": Kind("olmo2", n_kv_heads=2),
    "olmo3": Kind("olmo3", n_kv_heads=2),
    "smollm3": Kind("smollm3", n_kv_heads=2),
    "qwen3_moe": Kind("qwen3_moe", _MOE | {"num_experts": 4}, n_kv_heads=2),
    "mixtral": Kind("mixtral", {"num_local_experts": 4}, n_kv_heads=2),
    "olmoe": Kind("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, n_kv_heads=2),
    "llama4_text": Kind(
        "llama4_text",
        {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
        n_kv_heads=2,
    ),
    "glm4": Kind("glm4", {"head_dim": 8}, n_kv_heads=2),
    "starcoder2": Kind("starcoder2", n_kv_heads=2),
    "stablelm": Kind("stablelm", n_kv_heads=2),
    "exaone4": Kind("exaone4", n_kv_heads=2),
    "helium": Kind("helium", {"head_dim": 8}, n_kv_heads=2),
    "nemotron": Kind("nemotron", n_kv_heads=2),
    "persimmon": Kind("persimmon", {"num_key_value_heads": N_HEADS}),
    "deepseek_v3": Kind(
        "deepseek_v3",
        {
            "num_key_value_heads": N_HEADS,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}

# Where a test is no part of what every kind owes (its view, its rows, adapters, slices): what goes wrong first, that is
# grouped and wide heads, fused and interleaved projections, biases, learnt positions, caps and windows.
HARD_KINDS = {
    name: KINDS[name]
    for name in (
        "llama-gqa",
        "llama-mqa",
        "llama-head-dim",
        "gpt2",
        "opt",
        "gpt_neox",
        "phi3",
        "gemma2-caps",
        "gemma3-sliding",
    )
}


_MADE: dict[str, tuple[PreTrainedModel, torch.Tensor]] = {}


def tiny_model(family: str, seed: int = 0, attn_implementation: str | None = None, **config: Any) -> PreTrainedModel:
    """A random float32 model in eval mode; the same `family`, `seed` and `config` give the same weights.

    `attn_implementation` None is the library's choice: SDPA, or eager attention where a family has no SDPA (gemma2).
    Biases and norms start at 0 and 1, where a forgotten one goes unnoticed: they get noise too.
    """
    key = repr((family, seed, attn_implementation, sorted(config.items())))
    if key not in _MADE:
        _MADE[key] = (_tiny_model(family, seed, attn_implementation, config), torch.get_rng_state())
    model, random_state = _MADE[key]
    torch.set_rng_state(random_state)  # what is drawn after it is the same each time
    return copy.deepcopy(model)


def _tiny_model(family: str, seed: int, attn_implementation: str | None, config: dict[str, Any]) -> PreTrainedModel:
    vocabulary = len(tiny_tokenizer())
    settings = _CONFIGS.get(family, _LLAMA | {"num_key_value_heads": 2}) | {
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings = AutoConfig.for_model(family, **(settings | config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attn_implementation, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:  # strong enough that no part of the model is lost in rounding
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.eval()


def save_tiny(folder: Path, family: str, seed: int = 0, **config: Any) -> Path:
    """Save a tiny model with its tokenizer; returns `folder`, which loads like any model folder."""
    tiny_model(family, seed, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shorten_neutral_text(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Measure perplexity on the first sentences of the text: the tiny tokenizer makes 5,000 tokens of the whole."""
    from headtune.train.evaluation import evaluate

    text = evaluate.neutral_text()[:500]
    set_attribute(evaluate, "neutral_text", lambda: text)


def quick_among(values: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters of a test, those that are not named here among the slow ones."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]
