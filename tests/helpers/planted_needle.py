"""A one-layer GPT-2 whose head 0 copies a needle, and chains of words in filler for it to copy.

Word t is followed by word t + 1 in every needle. Position embeddings are zero; head 0's query of word t is the key of
word t + 1, its output is the word it reads, and the unembedding reads nothing else. The other heads are random.
"""

from __future__ import annotations

import functools
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Example, Task

WORDS, N_HEADS = 40, 4


def needle_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: w0, w1, ..."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w39", pad_token="w39")  # in no chain


@functools.cache
def needle_model() -> HeadModel:
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=128,
        n_embd=N_HEADS * WORDS,
        n_layer=1,
        n_head=N_HEADS,
        n_inner=4,
        tie_word_embeddings=False,
        bos_token_id=WORDS - 1,
        eos_token_id=WORDS - 1,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    width, block = config.n_embd, model.transformer.h[0]
    word = torch.eye(width)[:WORDS]  # a word's direction in the residual stream; what head 0 writes has the next WORDS
    with torch.no_grad():
        model.transformer.wte.weight.copy_(word)
        model.transformer.wpe.weight.zero_()
        attention = block.attn.c_attn.weight  # [width, 3 x width], in x out
        attention.normal_(0, 0.3)
        query, key, value = attention.split(width, dim=1)  # views
        for part in (query, key, value):
            part[:, :WORDS] = 0
        query[:WORDS, :WORDS] = 6 * torch.eye(WORDS).roll(1, dims=1)  # word t asks for word t + 1
        key[:WORDS, :WORDS] = torch.eye(WORDS)
        value[:WORDS, :WORDS] = torch.eye(WORDS)
        out = block.attn.c_proj.weight.zero_()
        out[:WORDS, WORDS : 2 * WORDS] = torch.eye(WORDS)
        out[WORDS:, 2 * WORDS :].normal_(0, 0.3)
        block.mlp.c_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, WORDS : 2 * WORDS] = torch.eye(WORDS)
    return wrap_model(model, needle_tokenizer(), "planted needle")


def needle_task(n: int = 12, length: int = 60, words: int = 5) -> Task:
    """Chains of `words` words after a first one, which the prompt ends with, in `length` words of filler."""
    examples = []
    for index in range(n):
        generator = random.Random(index)
        first = generator.randrange(1, WORDS - words - 1)
        chain = [f"w{first + i}" for i in range(words + 1)]
        # w(t + 1) after the chain would go on with it, were it asked.
        filler = [f"w{i}" for i in range(WORDS) if not first <= i <= first + words + 1]
        text = generator.choices(filler, k=length)
        place = generator.randrange(5, length - 5)
        prompt = " ".join([*text[:place], *chain, *text[place:], chain[0]])
        start = len(" ".join([*text[:place], chain[0]])) + 1
        needle = " ".join(chain[1:])
        examples.append(
            Example(
                prompt, f"{text[0]} {text[1]} {text[2]}", (needle,), spans={"needle": ((start, start + len(needle)),)}
            )
        )
    return Task("needles", tuple(examples), kind="exact_match")
