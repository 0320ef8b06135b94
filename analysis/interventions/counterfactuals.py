"""What a head's output is replaced by: other examples of the task, instead of zeros.

    mean      the mean over examples of other subjects, of the same prompt shape where there are such
    resample  one other example, of another subject, drawn at random
    corrupt   the example's counterpart: its own `corrupt` prompt, else the same prompt about another subject

The shape of a prompt is its text without subject and previous answers, so a counterpart of "List five cities in Italy.
1. Rome" is "List five cities in Japan. 1. Osaka". All draws are seeded by example, whatever the order of work.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.task import Example
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError


def shape_of(example: Example) -> str:
    """The prompt with `{}` in the place of the subject (its first occurrence) and of each previous answer."""
    text, cursor = example.prompt, len(example.prompt)
    cuts = []
    for answer in reversed(example.previous):
        cursor = text.rfind(answer, 0, cursor)
        cuts.append((cursor, len(answer)))
    start = text.index(example.subject)
    if all(start + len(example.subject) <= cut or start >= cut + size for cut, size in cuts):
        cuts.append((start, len(example.subject)))
    for cut, size in sorted(cuts, reverse=True):
        text = text[:cut] + "{}" + text[cut + size :]
    return text


@torch.no_grad()
def outputs(model: HeadModel, tokens: Tensor, last_only: bool = True) -> Tensor:
    """Head outputs z of one prompt, at the last token or at all positions.

    Returns:
        `[n_layers, n_heads, head_dim]` at the last token, or `[n_layers, n_heads, seq, head_dim]`.
    """
    position = torch.tensor([len(tokens) - 1], device=model.device) if last_only else None
    with hooks.capture(model, positions=position) as z:
        model.hf(tokens[None].to(model.device), use_cache=False, logits_to_keep=1)
    stacked = torch.stack([z[layer][0].float().to(model.device) for layer in range(model.n_layers)])
    return stacked if last_only else stacked.transpose(1, 2)


@dataclass
class Counterfactuals:
    """Replacements for the heads' outputs in each example of a task.

    Attributes:
        model: the model.
        examples: all examples; the mean needs every one of them, whoever works on which.
        seed: of the draws.
    """

    model: HeadModel
    examples: Sequence[Encoded]
    seed: int = 0
    _last: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _sums: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _shapes: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._shapes = [shape_of(encoded.example) for encoded in self.examples]
        if len({encoded.example.subject for encoded in self.examples}) < 2:
            raise InputError(
                "mean, resample and corrupt references need examples of at least two subjects; add some, or use zero "
                "ablation"
            )

    def others(self, index: int, same_length: bool = False) -> list[int]:
        """Examples of other subjects: those of the same shape where there are any; all of one length if asked for."""
        example = self.examples[index]
        matches = [
            i
            for i, other in enumerate(self.examples)
            if other.example.subject != example.example.subject
            and (not same_length or len(other.tokens) == len(example.tokens))
        ]
        return [i for i in matches if self._alike(i, index)] or matches

    def _alike(self, one: int, other: int) -> bool:
        return self._shapes[one] == self._shapes[other]

    def last_token(self, index: int) -> Tensor:
        """`[n_layers, n_heads, head_dim]` outputs at the last token of an example, computed once."""
        if index not in self._last:
            self._last[index] = outputs(self.model, self.examples[index].tokens)
        return self._last[index]

    def mean(self, index: int) -> Tensor:
        """`[n_layers, n_heads, head_dim]` mean at the last token over `others`."""
        return torch.stack([self.last_token(i) for i in self.others(index)]).mean(0)

    def resample(self, index: int) -> Tensor:
        """`[n_layers, n_heads, head_dim]` at the last token of another subject's example, whatever its shape."""
        subject = self.examples[index].example.subject
        others = [i for i, other in enumerate(self.examples) if other.example.subject != subject]
        return self.last_token(self._draw(index).choice(others))

    def corrupt(self, index: int) -> Tensor:
        """`[n_layers, n_heads, head_dim]` of the counterpart, at the last token."""
        tokens = self.corrupt_tokens(index)
        assert tokens is not None  # another subject's example of any length always exists
        return outputs(self.model, tokens)

    def corrupt_tokens(self, index: int, same_length: bool = False) -> Tensor | None:
        """`[seq]` ids of the counterpart: of the same shape where there is one, and of those as long as the example.

        None where `same_length` is asked for and no counterpart is as long.
        """
        example = self.examples[index]
        if example.corrupt is not None:
            return None if same_length and len(example.corrupt) != len(example.tokens) else example.corrupt
        others = self.others(index, same_length=True)
        if not same_length and not any(self._alike(i, index) for i in others):
            # At the last token, the same prompt about another subject is a better counterpart than another prompt as
            # long.
            others = [i for i in self.others(index) if self._alike(i, index)] or others or self.others(index)
        return self.examples[self._draw(index).choice(others)].tokens if others else None

    def mean_everywhere(self, index: int) -> Tensor:
        """`[n_layers, n_heads, 1, head_dim]` mean over all positions of `others`."""
        others = self.others(index)
        for i in others:
            if i not in self._sums:
                of_example = outputs(self.model, self.examples[i].tokens, last_only=False)
                self._sums[i] = of_example.sum(2, keepdim=True)
        positions = sum(len(self.examples[i].tokens) for i in others)
        return torch.stack([self._sums[i] for i in others]).sum(0) / positions

    def resample_everywhere(self, index: int) -> Tensor | None:
        """`[n_layers, n_heads, seq, head_dim]` of another subject's example, any shape; None if none is as long."""
        example = self.examples[index]
        others = [
            i
            for i, other in enumerate(self.examples)
            if other.example.subject != example.example.subject and len(other.tokens) == len(example.tokens)
        ]
        if not others:
            return None
        return outputs(self.model, self.examples[self._draw(index).choice(others)].tokens, last_only=False)

    def corrupt_everywhere(self, index: int) -> Tensor | None:
        """`[n_layers, n_heads, seq, head_dim]` of the counterpart; None if none is as long."""
        tokens = self.corrupt_tokens(index, same_length=True)
        return None if tokens is None else outputs(self.model, tokens, last_only=False)

    def _draw(self, index: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.examples[index].example.prompt}")


Counterfactual = Callable[[Counterfactuals, int], Tensor | None]  # None: this example has no such counterpart
