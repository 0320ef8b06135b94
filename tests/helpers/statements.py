"""Models of several families, a task with listed wrong answers, and z read row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Example, Task
from helpers.tiny import N_LAYERS, tiny_model, tiny_tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", *["sliding_attention"] * 2],
    },
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
    "gemma2": {},
}
LAST = N_LAYERS - 1


def family_model(family: str = "llama", **config: Any) -> HeadModel:
    return wrap_model(tiny_model(family, **(FAMILIES.get(family, {}) | config)), tiny_tokenizer(), family)


def listed_task(n: int = 8) -> Task:
    """Questions with their own wrong answers; right ones are all of one country, wrong ones of another."""
    subjects = ["Spain", "Germany", "England", "Canada", "America", "Italy", "Japan", "France"][:n]
    examples = [
        Example(f"I know cities in {s}:", s, ("Rome", "Milan"), incorrect=("Tokyo", "Osaka", "Kobe")) for s in subjects
    ]
    return Task("listed", tuple(examples), kind="multiple_choice")


@torch.no_grad()
def z_one_by_one(model: HeadModel, rows: list[list[int]], layer: int) -> Tensor:
    """`[n, n_heads, head_dim]` z at the last token, every row run on its own."""
    found = []
    for row in rows:
        with hooks.capture(model) as z:
            model.hf(torch.tensor([row]), use_cache=False)
        found.append(z[layer][0, -1])
    return torch.stack(found)
