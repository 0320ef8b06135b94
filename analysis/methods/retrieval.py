"""The retrieval score: while the model copies a needle, how much of it does each head look at, token for token?

Prompt and answer go through the model in one pass. At the step that writes token y_t, a head hits if its strongest key
j* lies in the needle and is that token, `x[j*] = y_t`:

    retrieval.copy[l, h] = |{j* of all hits}| / |needle|        in 0..1, over prompts whose answer is written in full

A needle's token counts once, as in the paper (|g_h & k| / |k|); its code counts repeats, and can exceed 1. The model's
greedy decoding writes the answer if and only if every token of it is the likeliest after those before, so one pass
with the answer given is the token-by-token decoding. Prompts that fail have no score (NaN), and
`Scores.counts()["retrieval"]` is how many do not. A retrieval head has a score of at least 0.1.

Source: Wu et al. 2024, "Retrieval head mechanistically explains long-context factuality" (arXiv 2404.15574), section 2;
there a success is a ROUGE-1 recall above 50, here the exact answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headtune.analysis.models.attention import AttentionCall, head_log_rows, look_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError

from .behaviour import answer_tokens, require_behaviour, written_in_full
from .scores import Array, Scores

SPAN = "needle"
THRESHOLD = 0.1  # the paper's, of a retrieval head


def copied(model: HeadModel, encoded: Encoded) -> dict[str, Array]:
    """`retrieval.copy` of one prompt, `[n_layers, n_heads]` float32; nothing where its answer is not written in full.

    Takes one forward pass; of one layer at a time `[n_heads, answer tokens, keys]` attention rows.

    Raises:
        InputError: no span `needle`, or an answer that has no tokens by itself.
    """
    if SPAN not in encoded.spans:
        raise InputError(f"prompt {encoded.example.prompt[:40]!r}... has no span {SPAN!r}")
    answer = answer_tokens(model, encoded)
    tokens = torch.cat([encoded.tokens, answer[:-1]])
    steps = torch.arange(len(encoded.tokens) - 1, len(tokens))  # the positions that write the answer
    strongest: dict[int, torch.Tensor] = {}

    def look(call: AttentionCall) -> None:
        rows = head_log_rows(call, range(model.n_heads), steps[None])
        strongest[call.layer] = rows[0].argmax(-1).cpu()  # [n_heads, steps]

    with torch.no_grad(), look_with(look):
        logits = model.hf(tokens.to(model.device)[None], use_cache=False, logits_to_keep=len(answer)).logits[0]
    if not torch.equal(logits.argmax(-1).cpu(), answer):
        return {}
    keys = torch.stack([strongest[layer] for layer in range(model.n_layers)])  # [n_layers, n_heads, steps]
    same = tokens[keys] == answer
    needle = torch.tensor(encoded.spans[SPAN])
    hit = ((keys[..., None] == needle) & same[..., None]).any(-2)  # [n_layers, n_heads, needle]
    return {"retrieval.copy": hit.float().mean(-1).numpy()}


def require_successes(scores: Scores, examples: Sequence[Encoded]) -> None:
    """Refuse scores of a model that does not retrieve (see `behaviour.require_behaviour`)."""
    subjects = [encoded.example.subject for encoded in examples]
    values = scores.by_example.get("retrieval.copy")
    right = np.zeros(len(examples)) if values is None else (~np.isnan(values[:, 0, 0])).astype(float)
    require_behaviour(written_in_full(right.tolist(), subjects), SPAN)
