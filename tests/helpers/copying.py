"""A tiny model that solves a task: it repeats the last word, and its heads disturb that a little."""

from __future__ import annotations

from typing import Any

import torch

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Example, Task
from helpers.tiny import FACTS, tiny_model, tiny_tokenizer


def copying_task() -> Task:
    """ "I know Italy", and the answer is " Italy": right for a model that repeats the last token."""
    return Task("copies", tuple(Example(f"I know {name}", name, (name,)) for name in FACTS), kind="exact_match")


def copying_model(family: str = "llama", strength: float = 12.0, **config: Any) -> HeadModel:
    """`strength`: of the embeddings against what heads and MLPs add; from 14 up nothing is wrong any more."""
    hf = tiny_model(family, tie_word_embeddings=True, **config)
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(strength)
    return wrap_model(hf, tiny_tokenizer(), family)
