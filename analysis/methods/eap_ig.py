"""The two integrated gradients of Hanna et al. 2024 (EAP-IG, arXiv 2403.17806), for heads as nodes.

Both multiply how far a head's output is from its counterpart's with a gradient meaned over a path, at all positions t:

    score[l, h] = sum_t sum_d (z[l, h, t] - z'[l, h, t])_d * mean_k dm/dz[l, h, t]_d    k = 1..steps

with z of the prompt, z' of its corrupted counterpart (as many tokens), m the mean logit of the answers' first tokens.
They differ in the run in which the gradient is taken:

    inputs         the word embeddings stand at e' + k/steps * (e - e'), between the counterpart's and the prompt's;
                   all else follows. One pass a step gives all heads. Their sum is nothing in particular
    activations    the prompt's run, in which z[l, h] alone stands at z' + k/steps * (z - z') at all positions. As steps
                   grow, a head's score tends to its exact effect (`corrupt_all`): m(clean) - m(this head at z')

Positive = the head, as it is, raises m. A head's output is taken before the output projection; after it, as in the
authors' code, the product is the same. Steps are theirs, 5 by default: the end of the path belongs to it, its beginning
does not. In their code of the second (`get_scores_ig_activations`) the heads of a layer move together, and every head's
gradient is meaned over all runs, whichever node moves; here each head moves alone, and only its own runs count.

`attribution_patching.integrated_gradients` is neither of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headtune.analysis.interventions.batches import entered, growing, rows_in_memory
from headtune.analysis.interventions.counterfactuals import outputs
from headtune.analysis.interventions.intervention import Head
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError

from .patching import answer_probabilities, every_head, with_contrast
from .scores import Array

STEPS = 5


def eap_ig_inputs(
    model: HeadModel, encoded: Encoded, corrupt: Tensor, name: str = "eap_ig_inputs", steps: int = STEPS
) -> dict[str, Array]:
    """Gradients while the word embeddings go from the counterpart's to the prompt's, times the difference of z.

    Args:
        corrupt: `[seq]` ids of the counterpart.
        name: prefix of the quantities.
        steps: of the path; its end, the prompt itself, is the last.

    Returns:
        `<name>.target`, `<name>.target_contrast` and, where there are previous answers, `<name>.previous` and
        `<name>.previous_contrast`: `[n_layers, n_heads]` float32, in logits (see `patching.effects`).

    Raises:
        InputError: fewer than one step, or a counterpart of another length.
    """
    levels = _levels(steps, encoded, corrupt)
    difference, _ = _difference(model, encoded, corrupt)
    embedding = model.hf.get_input_embeddings()
    with torch.no_grad():
        start, end = (embedding(tokens.to(model.device)) for tokens in (corrupt, encoded.tokens))
    totals: dict[str, Tensor] = {}
    for part in levels.split(_rows_of_graph(model, encoded)):
        with torch.enable_grad():
            embedded = (start + part.to(start)[:, None, None] * (end - start)).requires_grad_()
            logits, z = _from_embeddings(model, encoded.tokens, embedded)
            for quantity, value in answer_probabilities(logits, encoded).metrics.items():
                gradients = torch.autograd.grad(value.sum(), z, retain_graph=True)
                # [n_layers, n_heads, seq, head_dim], summed over steps
                total = torch.stack([gradient.float().sum(0).transpose(0, 1).to(difference) for gradient in gradients])
                totals[quantity] = totals.get(quantity, 0) + (total * difference).sum((2, 3))
    result = with_contrast({quantity: total / steps for quantity, total in totals.items()})
    return {f"{name}.{quantity}": score.cpu().numpy() for quantity, score in result.items()}


def eap_ig_activations(
    model: HeadModel, encoded: Encoded, corrupt: Tensor, name: str = "eap_ig_activations", steps: int = STEPS
) -> dict[str, Array]:
    """Gradients while one head's z at all positions goes from the counterpart's to the prompt's, times the difference.

    Each head takes `steps` rows, forth and back, which enter at its layer. Args, returns and errors: see
    `eap_ig_inputs`.
    """
    levels = _levels(steps, encoded, corrupt)
    difference, counterpart = _difference(model, encoded, corrupt)
    rows = [(head, float(level)) for head in every_head(model) for level in levels]
    size = _rows_of_graph(model, encoded)
    scores: dict[str, list[Tensor]] = {}
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        away = torch.stack([difference[head] for head, _ in part])  # [rows, seq, head_dim]
        with torch.enable_grad():
            put = torch.stack([counterpart[head] + level * difference[head] for head, level in part]).requires_grad_()
            logits = _with_heads(model, encoded.tokens, [head for head, _ in part], put)
            for quantity, value in answer_probabilities(logits, encoded).metrics.items():
                # Rows do not depend on each other: the gradient of their sum holds each row's own.
                (gradient,) = torch.autograd.grad(value.sum(), put, retain_graph=True)
                scores.setdefault(quantity, []).append((gradient * away).sum((1, 2)))
    shape = (model.n_layers, model.n_heads, steps)
    result = with_contrast({quantity: torch.cat(parts).view(shape).mean(-1) for quantity, parts in scores.items()})
    return {f"{name}.{quantity}": score.cpu().numpy() for quantity, score in result.items()}


def _levels(steps: int, encoded: Encoded, corrupt: Tensor) -> Tensor:
    """`[steps]` from 1 / steps to 1."""
    if steps < 1:
        raise InputError(f"EAP-IG with steps={steps}; expected at least 1, and {STEPS} are the authors'")
    if len(corrupt) != len(encoded.tokens):
        raise InputError(
            f"EAP-IG with a counterpart of {len(corrupt)} tokens for a prompt of {len(encoded.tokens)}; "
            "they must be as long"
        )
    return torch.arange(1, steps + 1) / steps


def _difference(model: HeadModel, encoded: Encoded, corrupt: Tensor) -> tuple[Tensor, Tensor]:
    """`z - z'` and `z'`, `[n_layers, n_heads, seq, head_dim]` float32."""
    clean, counterpart = (outputs(model, tokens, last_only=False) for tokens in (encoded.tokens, corrupt))
    return clean - counterpart, counterpart


def _rows_of_graph(model: HeadModel, encoded: Encoded) -> int:
    """Rows whose graph fits into memory: `rows_in_memory` counts one layer, a graph holds them all."""
    seq = len(encoded.tokens)
    return max(1, rows_in_memory(model, seq, positions=seq) // model.n_layers)


def _from_embeddings(model: HeadModel, tokens: Tensor, embedded: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Next-token logits `[rows, vocabulary]` from embeddings `[rows, seq, d_model]`, and z by layer, with their graph.

    z is `[rows, seq, n_heads, head_dim]`.
    """
    z: dict[int, Tensor] = {}

    def keep(layer: int, value: Tensor) -> Tensor:
        z[layer] = value
        return value  # in place of what it is a view of, so that the logits depend on it

    edits = {layer: lambda value, layer=layer: keep(layer, value) for layer in range(model.n_layers)}
    handle = model.hf.get_input_embeddings().register_forward_hook(lambda _module, _args, output: embedded.to(output))
    try:
        with hooks.at_projections(model, edits):
            batch = tokens.to(model.device)[None].expand(len(embedded), -1)
            logits: Tensor = model.hf(batch, use_cache=False, logits_to_keep=1).logits[:, -1]
    finally:
        handle.remove()
    return logits, [z[layer] for layer in range(model.n_layers)]


def _with_heads(model: HeadModel, tokens: Tensor, heads: list[Head], put: Tensor) -> Tensor:
    """Next-token logits `[rows, vocabulary]` with `put[i]` as the output of `heads[i]` in row i, with their graph.

    Args:
        heads: a row each, layer by layer; a row enters at its layer.
        put: `[rows, seq, head_dim]`.
    """

    def change(layer: int, z: Tensor) -> Tensor:
        rows = torch.tensor([row for row, head in enumerate(heads) if head[0] == layer], device=put.device)
        columns = torch.tensor([head for at, head in heads if at == layer], device=z.device)
        z = z.clone()
        z[rows.to(z.device) + 1, :, columns] = put[rows].to(z)  # row 0 is the clean run
        return z

    edits = {layer: lambda z, layer=layer: change(layer, z) for layer in {layer for layer, _ in heads}}
    with growing(model, entered([layer for layer, _ in heads], model.n_layers)), hooks.at_projections(model, edits):
        logits: Tensor = model.hf(tokens.to(model.device)[None], use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits[1:]
