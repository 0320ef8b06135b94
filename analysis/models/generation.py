"""Generate with settings that are headtune's: what a model's generation_config.json asks for does not act in silence.

Such files hold repetition penalties, beams, minimal lengths, strings to stop at. A repeat rate would be that of the
penalty. Only the ids of BOS, end of text and padding are taken from the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .head_model import vocabulary_of


def padding_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows up with, which is masked: the tokenizer's padding, else the end of text, else 0.

    A padding token that was added to the tokenizer alone has no embedding, and is not taken.
    """
    vocabulary = vocabulary_of(model)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (vocabulary is None or token < vocabulary):
            return int(token)
    return 0


def with_padding_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the end of text pad rows where the tokenizer has no token for that, or one that the model lacks."""
    vocabulary = vocabulary_of(model)
    token = tokenizer.pad_token_id
    if token is None or (vocabulary is not None and token >= vocabulary):
        tokenizer.pad_token = tokenizer.eos_token


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    padding: int | None,
    sampled: bool = False,
    **more: Any,
) -> Tensor:
    """Continue prompts, each step with the likeliest token, or one drawn from the whole distribution.

    Args:
        model: a transformers model, or one wrapped by PEFT.
        input_ids, attention_mask: `[rows, seq]`, padded on the left.
        padding: the id behind the end of a row.
        more: for `model.generate`, such as `stopping_criteria`.

    Returns:
        `[rows, seq + at most max_new_tokens]`, the prompts included.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before: GenerationConfig = base.generation_config
    settings = GenerationConfig(
        bos_token_id=before.bos_token_id,
        eos_token_id=before.eos_token_id,
        pad_token_id=padding,
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        **({"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {}),
    )
    # What settings leave open is filled in from the model's, so these are put aside.
    holders = [holder for holder in (model, base) if "generation_config" in vars(holder)]
    put_aside = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        output: Tensor = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, **more
        )
    finally:
        for holder, config in zip(holders, put_aside, strict=True):
            holder.generation_config = config
    return output
