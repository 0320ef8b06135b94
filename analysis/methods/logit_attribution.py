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

import torch
from torch import Tensor, nn

from headtune.analysis.models import hooks
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded

from .scores import Array


@torch.no_grad()
def attribute(model: HeadModel, encoded: Encoded) -> dict[str, Array]:
    """Direct logit attribution of every head at the last token, toward the remaining and toward the previous answers.

    Each toward-quantity is the mean over the answers' first tokens, in logits.

    Returns:
        name -> `[n_layers, n_heads]`: `dla.target`, `dla.previous`, `lens.<source>.target`, `lens.<source>.previous`
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
    directions = model.unembedding_directions(at_end(model.final_norm), answer_tokens)  # [n, d_model]
    groups = encoded.sources()
    membership = torch.zeros(len(groups), len(encoded.tokens), device=model.device)
    for row, span in enumerate(groups.values()):
        membership[row, span] = 1

    # Layer by layer: what heads write in those directions, whole and by source.
    dla, lens, mass = [], [], []
    for layer in range(model.n_layers):
        norm = post_norms.get(layer)
        of_layer = directions if norm is None else model.norm_directions(norm, at_end(norm), directions)
        weight = model.output_weight(layer).float()
        read = torch.einsum("hdm,nm->hdn", weight, of_layer.to(weight.device))  # [heads, head_dim, n]
        dla.append(torch.einsum("hd,hdn->hn", z[layer][0].float(), read).to(model.device))
        pattern = rows.pattern[layer][0]  # [heads, seq]
        by_token = pattern[..., None] * torch.einsum("htd,hdn->htn", rows.values[layer][0].float(), read)
        pattern, by_token = pattern.to(model.device), by_token.to(model.device)
        lens.append(torch.einsum("gt,htn->ghn", membership, by_token))
        mass.append(membership @ pattern.T)  # [groups, heads]
    # By quantity; all previous answers together are one more source.
    result = dict(_toward("dla", torch.stack(dla), n_targets))
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


def _toward(prefix: str, values: Tensor, n_targets: int) -> Iterator[tuple[str, Array]]:
    """Means of `[layers, heads, n]` over the target tokens and over the previous ones."""
    yield f"{prefix}.target", values[..., :n_targets].mean(-1).cpu().numpy()
    if values.shape[-1] > n_targets:
        yield f"{prefix}.previous", values[..., n_targets:].mean(-1).cpu().numpy()
