"""Direct logit attribution of heads at the last token, whole and split by the tokens a head reads (Token Lens per
head).

    dla[l, h](token) = z[l, h] . (W_O[l, h]^T u_l(token))
    lens[l, h, S](token) = sum_{t in S} A[l, h, last, t] v[l, h, t] . (W_O[l, h]^T u_l(token))

u_l = HeadModel.unembedding_directions, carried back through the layer's post-attention norm (at its own scale in this
run) where the family has one. So the dla of all heads and the decoded embedding, MLP outputs and biases sum to the
logit (before the model's cap on logits, if any).

The sources S partition the positions, so the lens terms sum to dla. No tensor of size d_model per head or position is
formed. Source: Yan & Jia 2025, section 3 (Token Lens), per head instead of per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headtune.analysis.models import hooks
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded

from .scores import Array


@torch.no_grad()
def attribute(model: HeadModel, encoded: Encoded, vocabulary: Tensor | None = None) -> dict[str, Array]:
    """Direct logit attribution of every head at the last token, toward the remaining and toward the previous answers.

    Each toward-quantity is the mean over the answers' first tokens, in logits.

    Args:
        vocabulary: `[d_model]`, `mean_unembedding` of the model; computed where it is not given.

    Returns:
        name -> `[n_layers, n_heads]`: `dla.target`, `dla.previous`, and both less the other subjects' answers
        (`dla.target_contrast`, ...) and less the vocabulary's mean (`dla.target_centred`, ...), as in
        `patching.effects`; `lens.<source>.target`, `lens.<source>.previous`
        with sources subject, previous (all of them), previous_1.., first, end, rest; and `attention.<source>`, the
        attention mass. Quantities about previous answers are absent where there are none.
    """
    # One pass, in which attention rows, head outputs and the norms' inputs are seen.
    tokens = encoded.tokens[None].to(model.device)
    end = torch.tensor([encoded.end], device=model.device)
    post_norms = {layer: norm for layer in range(model.n_layers) if (norm := model.post_attention_norm(layer))}
    with (
        record_rows(end) as rows,
        hooks.capture(model, positions=end) as z,
        hooks.watch([model.final_norm, *post_norms.values()]) as seen,
    ):
        model.hf(tokens, use_cache=False, logits_to_keep=1)

    def at_end(norm: nn.Module) -> Tensor:
        """A norm's input at the last token, `[d_model]`."""
        return seen[norm][0][0, encoded.end]

    # Directions of the answers' tokens, and which tokens each source holds.
    answer_tokens = torch.tensor([*encoded.target_tokens, *encoded.previous_tokens], device=model.device)
    n_targets = len(encoded.target_tokens)
    residual = at_end(model.final_norm)
    weight: Any = model.hf.get_output_embeddings().weight
    center = mean_unembedding(model) if vocabulary is None else vocabulary
    others = center
    if encoded.others:
        tokens_of_others, weights = zip(*encoded.others, strict=True)
        rows_of_others = weight[torch.tensor(tokens_of_others, device=weight.device)].float()
        others = torch.tensor(weights, device=weight.device) @ rows_of_others
    baselines = model.norm_directions(model.final_norm, residual, torch.stack([others, center.to(others)]))
    answers = model.unembedding_directions(residual, answer_tokens)
    directions = torch.cat([answers, baselines])  # [n + 2, d_model]
    groups = encoded.sources()
    membership = torch.zeros(len(groups), len(encoded.tokens), device=model.device)
    for row, span in enumerate(groups.values()):
        membership[row, span] = 1

    # Layer by layer: what heads write in those directions, whole and by source.
    dla, lens, mass = [], [], []
    for layer in range(model.n_layers):
        norm = post_norms.get(layer)
        of_layer = directions if norm is None else model.norm_directions(norm, at_end(norm), directions)
        output = model.output_weight(layer).float()
        read = torch.einsum("hdm,nm->hdn", output, of_layer.to(output.device))  # [heads, head_dim, n + 2]
        dla.append(torch.einsum("hd,hdn->hn", z[layer][0].float(), read).to(model.device))
        read = read[..., :-2]
        pattern = rows.pattern[layer][0]  # [heads, seq]
        by_token = pattern[..., None] * torch.einsum("htd,hdn->htn", rows.values[layer][0].float(), read)
        pattern, by_token = pattern.to(model.device), by_token.to(model.device)
        lens.append(torch.einsum("gt,htn->ghn", membership, by_token))
        mass.append(membership @ pattern.T)  # [groups, heads]
    # By quantity; all previous answers together are one more source.
    toward = torch.stack(dla)
    result = dict(_toward("dla", toward[..., :-2], n_targets))
    for name, baseline in (("contrast", toward[..., -2:-1]), ("centred", toward[..., -1:])):
        less = _toward("dla", toward[..., :-2] - baseline, n_targets)
        result |= {f"{quantity}_{name}": value for quantity, value in less}
    by_group = dict(zip(groups, torch.stack(lens, dim=1), strict=True))  # group -> [layers, heads, n]
    mass_by_group = dict(zip(groups, torch.stack(mass, dim=1), strict=True))
    previous = [name for name in groups if name.startswith("previous_")]
    if previous:
        by_group["previous"] = torch.stack([by_group[name] for name in previous]).sum(0)
        mass_by_group["previous"] = torch.stack([mass_by_group[name] for name in previous]).sum(0)
    for name, value in by_group.items():
        result |= dict(_toward(f"lens.{name}", value, n_targets))
    result |= {f"attention.{name}": value.cpu().numpy() for name, value in mass_by_group.items()}
    return result


@torch.no_grad()
def mean_unembedding(model: HeadModel) -> Tensor:
    """The mean row of the unembedding, `[d_model]` float32: its direction is the vocabulary's mean logit."""
    weight: Any = model.hf.get_output_embeddings().weight
    return torch.stack([rows.float().sum(0) for rows in weight.split(1 << 14)]).sum(0) / len(weight)


def _toward(prefix: str, values: Tensor, n_targets: int) -> Iterator[tuple[str, Array]]:
    """Means of `[layers, heads, n]` over the target tokens and over the previous ones."""
    yield f"{prefix}.target", values[..., :n_targets].mean(-1).cpu().numpy()
    if values.shape[-1] > n_targets:
        yield f"{prefix}.previous", values[..., n_targets:].mean(-1).cpu().numpy()
