"""Tiny random models of every family, a real tokenizer and a small task, all made offline within a second.

model = tiny_model("llama", num_key_value_heads=2)      heads = view(model, tiny_tokenizer())
folder = save_tiny(tmp_path / "model", "gpt2")          what a command line takes as MODEL
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from headtune.analysis.tasks import Task, Template, build

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


def tiny_tokenizer(bos: bool = False, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer that behaves like GPT-2's: " Rome" is one token, another one than "Rome".

    Args:
        bos: put `<bos>` in front, as llama's tokenizers do.
        trim_offsets: leave the leading space out of a token's character offsets.
    """
    backend = Tokenizer.from_str(_trained())
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)]))
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
}


def tiny_model(family: str, seed: int = 0, attn_implementation: str = "sdpa", **config: Any) -> PreTrainedModel:
    """A random float32 model in eval mode; the same `family`, `seed` and `config` give the same weights.

    Biases and norms start at 0 and 1, where a forgotten one goes unnoticed: they get noise too.
    """
    vocabulary = len(tiny_tokenizer())
    settings = _CONFIGS.get(family, {}) | {
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
