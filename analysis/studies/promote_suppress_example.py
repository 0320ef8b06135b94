"""What `promote` measures on one example, toward the subject, the previous answers and the remaining ones.

Measurements are arrays whose last axis is the names: subject, o1, ..., o<depth>, next, remaining, where depth is the
largest number of previous answers in the task; NaN for what the example does not have. Next is the remaining answer
with the highest logit, remaining the mean over all of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headtune.analysis.interventions.causal_tracing import KINDS, causal_trace, embedding_deviation, knockout
from headtune.analysis.interventions.intervention import CLEAN, Intervention
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.interventions.logit_lens import PARTS, answer_tokens, decode, string_logprobs, token_lens
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded

Values = NDArray[np.float64]

AT_ONCE = 8  # answers scored together in search of the likeliest
NOISE = 3.0  # of causal tracing, in standard deviations of the embeddings it is put on


@dataclass(frozen=True)
class Names:
    """First tokens of what is measured in one example.

    Attributes:
        tokens: all of them, each once.
        mean: `[n_names, n_tokens]` weights of the mean over a name's tokens; NaN for a name without any.
        left_out: previous answers without a token of their own, because a remaining answer has the same.
        alike: previous answers whose token is also that of the subject or of an earlier answer; they are kept.
    """

    tokens: Tensor
    mean: Tensor
    left_out: int
    alike: int

    @classmethod
    def for_example(cls, model: HeadModel, encoded: Encoded, depth: int, logits: Tensor) -> Names:
        """The names of an example; `logits`, `[vocabulary]`, are those of its clean run at END."""
        strings = [answer_tokens(model.tokenizer, encoded, answer) for answer in encoded.example.previous]
        firsts = [None if ids is None else ids[0] for ids in strings]
        of_previous = [[] if first is None or first in encoded.ambiguous else [first] for first in firsts]
        absent: list[list[int]] = [[]] * (depth - len(of_previous))
        subject = [int(encoded.tokens[encoded.subject[0]])]
        following = max(encoded.target_tokens, key=lambda token: float(logits[token]))
        groups = [subject, *of_previous, *absent, [following], list(encoded.target_tokens)]
        tokens = sorted({token for group in groups for token in group})
        mean = torch.zeros(len(groups), len(tokens))
        for row, group in enumerate(groups):
            mean[row, [tokens.index(token) for token in group]] = 1 / max(1, len(group))
            if not group:
                mean[row] = torch.nan
        return cls(
            torch.tensor(tokens, device=model.device),
            mean.to(model.device),
            sum(first in encoded.ambiguous for first in firsts),
            sum(bool(group) and group in [subject, *of_previous[:index]] for index, group in enumerate(of_previous)),
        )

    def means(self, logits: Tensor) -> Values:
        """`[..., n_tokens]` -> `[..., n_names]`."""
        result: Values = (logits.float() @ self.mean.to(logits.device).T).double().cpu().numpy()
        return result

    def measure(self, logits: Tensor) -> Tensor:
        """`[rows, vocabulary]` -> `[rows, 2 * n_names]`: total probabilities, then mean logits."""
        logits = logits.float()
        chosen = logits[:, self.tokens.to(logits.device)]
        mean = self.mean.to(logits.device)
        total = torch.where(mean.isnan(), mean, (mean > 0).float())
        return torch.cat([(chosen - logits.logsumexp(-1, keepdim=True)).exp() @ total.T, chosen @ mean.T], 1)


@torch.no_grad()
def measured(model: HeadModel, encoded: Encoded, depth: int, renormalise: bool) -> dict[str, Values]:
    """All that is measured on one example but the traces.

    Returns:
        `attention`, `mlp` (early decoding), `lens.<source>`, `knockout.<source>.attention` and `.mlp`:
        `[n_layers, n_names]`; `heads` and `heads.<source>`: `[n_layers, n_heads, n_names]`; `knockout.<source>.logits`:
        `[n_names]`; `strings.<condition>`: see `strings`; `count.*`: see Names.
    """
    runner = LastTokenRunner(model, encoded.tokens)
    clean = runner.run([CLEAN], record=PARTS)
    names = Names.for_example(model, encoded, depth, clean.logits[0])
    decoded = decode(model, clean, names.tokens)
    result = {"attention": names.means(decoded.attention[0]), "mlp": names.means(decoded.mlp[0])}
    sources = encoded.sources()
    by_source = names.means(token_lens(runner, sources, names.tokens))  # [sources, n_layers, n_heads, n_names]
    result["heads"] = by_source.sum(0)  # the sources partition the positions
    for source, lens in zip(sources, by_source, strict=True):
        result |= {f"heads.{source}": lens, f"lens.{source}": lens.sum(1)}
    previous = tuple(position for span in encoded.previous for position in span)
    spans: dict[str, Sequence[int]] = {"subject": encoded.subject}
    spans |= {f"previous_{i}": span for i, span in enumerate(encoded.previous, start=1)}
    if previous:
        spans["previous"] = previous
    spans["end"] = [encoded.end]
    effect = knockout(runner, spans, names.tokens, renormalise)
    for index, name in enumerate(spans):
        for part in ("attention", "mlp", "logits"):
            result[f"knockout.{name}.{part}"] = names.means(getattr(effect, part)[index])
    result |= {"count.left_out": np.array(names.left_out), "count.alike": np.array(names.alike)}
    return result | strings(model, encoded, clean.logits[0], depth, renormalise)


def strings(model: HeadModel, encoded: Encoded, logits: Tensor, depth: int, renormalise: bool) -> dict[str, Values]:
    """Whole answers, with nothing, the subject or all previous answers knocked out.

    Args:
        logits: `[vocabulary]` of the clean run at END.

    Returns:
        `strings.<condition>`: `[depth + 1]` log p of each previous answer, and of the remaining answer that is the
        likeliest with nothing knocked out; `count.merged`: answers that have no tokens of their own.
    """
    answers = [*encoded.example.previous, *encoded.example.remaining]
    ids = [answer_tokens(model.tokenizer, encoded, answer) for answer in answers]
    n = len(encoded.previous)
    of_previous = [tokens for tokens in ids[:n] if tokens is not None]
    best = likeliest(model, encoded, [tokens for tokens in ids[n:] if tokens is not None], logits)
    columns = [*(index for index, tokens in enumerate(ids[:n]) if tokens is not None), depth]
    previous = [position for span in encoded.previous for position in span]
    knocked = {"without_subject": list(encoded.subject)} | ({"without_previous": previous} if previous else {})
    rows = [CLEAN, *(Intervention(knocked_out=positions, renormalise=renormalise) for positions in knocked.values())]
    scored = string_logprobs(model, encoded.tokens, [*of_previous, best], rows).cpu().numpy()
    result = {"count.merged": np.array(ids.count(None))}
    for condition, values in zip(("baseline", *knocked), scored, strict=True):
        result[f"strings.{condition}"] = np.full(depth + 1, np.nan)
        result[f"strings.{condition}"][columns] = values
    return result


def likeliest(
    model: HeadModel, encoded: Encoded, answers: Sequence[tuple[int, ...]], logits: Tensor
) -> tuple[int, ...]:
    """The answer that is the likeliest as a whole string.

    No answer is likelier than its first token, so answers are scored in the order of these, until none can be better.
    """
    first = logits.float().log_softmax(-1)[[answer[0] for answer in answers]].tolist()
    order = sorted(range(len(answers)), key=lambda index: -first[index])
    best, best_logp = answers[order[0]], -np.inf
    for start in range(0, len(order), AT_ONCE):
        if first[order[start]] <= best_logp:
            break
        chunk = [answers[index] for index in order[start : start + AT_ONCE]]
        logp = string_logprobs(model, encoded.tokens, chunk)[0]
        if float(logp.max()) > best_logp:
            best, best_logp = chunk[int(logp.argmax())], float(logp.max())
    return best


def noise_deviations(model: HeadModel, examples: Sequence[Encoded]) -> dict[str, float]:
    """Standard deviation of the noise on the subject and on the first previous answer: NOISE times that of embeddings.

    Of the tokens of all examples' subjects, and of all their previous answers, as Yan & Jia have it (they embed the
    names alone, and the answers to come as well). A task without previous answers has none for these.
    """
    spans = {"subject": [encoded.tokens[list(encoded.subject)] for encoded in examples]}
    spans["previous_1"] = [encoded.tokens[list(span)] for encoded in examples for span in encoded.previous]
    return {name: NOISE * embedding_deviation(model, torch.cat(tokens)) for name, tokens in spans.items() if tokens}


def traced(
    model: HeadModel,
    encoded: Encoded,
    noisy: str,
    deviation: float,
    depth: int,
    n_noise: int,
    window: int,
    centres: range,
    seed: int,
) -> dict[str, Values]:
    """Causal tracing with noise on one source.

    Args:
        deviation: of the noise, see `noise_deviations`.

    Returns:
        Means over the noise: `clean` and `noisy`, `[2, n_names]` (probability, logit), and `effect.<kind>.<group>`,
        restored less noisy, `[centres, 2, n_names]`.
    """
    names = Names.for_example(model, encoded, depth, LastTokenRunner(model, encoded.tokens).run([CLEAN]).logits[0])
    groups = encoded.sources()
    groups["rest"] = groups.pop("first") + groups.pop("rest")
    trace = causal_trace(
        model,
        encoded.tokens,
        groups[noisy],
        groups,
        names.measure,
        deviation=deviation,
        n_noise=n_noise,
        window=window,
        centres=centres,
        seed=random.Random(f"{seed}/{noisy}/{encoded.example.prompt}").getrandbits(63),
    )

    def arrays(values: Tensor) -> Values:
        result: Values = values.unflatten(-1, (2, -1)).double().cpu().numpy()
        return result

    result = {"clean": arrays(trace.clean), "noisy": arrays(trace.noisy.mean(0))}
    effect = arrays((trace.restored - trace.noisy[:, None, None, None]).mean(0))  # [kinds, groups, centres, 2, n_names]
    for kind, of_kind in zip(KINDS, effect, strict=True):
        result |= {f"effect.{kind}.{group}": values for group, values in zip(groups, of_kind, strict=True)}
    return result
