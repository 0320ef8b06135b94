"""What MLPs do with what heads bring: a linear decomposition of MLP outputs at the last token (Lv et al. 2024).

For example i and layer l, over the heads h of that layer:

    M_i ~ sum_h c_h a_{h,i} + c_r r_i + b          c: one number per input; b: a vector

with M the MLP's output, a_h what head h adds to the residual stream and r the residual stream that enters the layer.
Least squares with an intercept: with X_k the inputs, `X~_k` and `M~` centred over examples,

    G[k, k'] = sum_i <X~_{k,i}, X~_{k',i}>     g[k] = sum_i <X~_{k,i}, M~_i>
    c = (G + ridge diag(G))^-1 g               b = mean(M) - sum_k c_k mean(X_k)

The ridge is a share of each input's own variance, so that c does not depend on the inputs' units. c_h > 0: the MLP
amplifies what head h brought; c_h near -1: it erases it; b, decoded, is what the MLP adds whatever the input: the
"applied function". An MLP is not linear; how much of it this describes is the R^2 on subjects that the fit has not
seen.

In families whose attention and MLP run side by side (GPT-NeoX, Phi) an MLP does not read its own layer's heads: there
c_h is correlation and no more.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from headtune.analysis.models import hooks
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.progress import Progress, silent

RIDGE = 1e-6
_CONSTANT = 1e-10  # an input does not vary whose variance is at most this share of its mean square


# --- parts of a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastTokenParts:
    """What the clean run of one prompt adds up to at the last token, float32 on the view's device.

    Attributes:
        inputs: `[n_layers, d_model]` the residual stream that enters each layer.
        heads: `[n_layers, n_heads, d_model]` what each head adds to it. In families with a norm after attention: the
            head's part of the norm's output, the norm's scale held at the run's own, so that parts add up.
        mlps: `[n_layers, d_model]` what each MLP adds.
        final: `[d_model]` the residual stream after the last layer.
        pattern: `[n_layers, n_heads, seq]` attention from the last token.
        first: `[n_heads, d_model]` what the last layer's heads bring from the first position, `A[last, 0] v_0 W_O`.
    """

    inputs: Tensor
    heads: Tensor
    mlps: Tensor
    final: Tensor
    pattern: Tensor
    first: Tensor

    @property
    def after(self) -> Tensor:
        """`[n_layers, d_model]` the residual stream after each layer."""
        return torch.cat([self.inputs[1:], self.final[None]])


@torch.no_grad()
def last_token_parts(model: HeadModel, tokens: Tensor) -> LastTokenParts:
    """Take the run of one prompt (`[seq]` ids) apart at the last token.

    Raises:
        CheckError: what attention and MLPs add is not the difference between one layer's input and the next one's.
    """
    end = torch.tensor([len(tokens) - 1], device=model.device)
    all_layers = range(model.n_layers)
    added = [model.attention_added(layer) for layer in all_layers]
    mlps = [model.mlp(layer) for layer in all_layers]
    watched = [*added, *mlps, *model.layers, model.final_norm]
    with record_rows(end) as rows, hooks.capture(model, positions=end) as z, hooks.watch(watched) as seen:
        model.hf(tokens[None].to(model.device), use_cache=False, logits_to_keep=1)
    entered = {module: _at_end(inputs, model.device) for module, (inputs, _) in seen.items() if inputs is not None}
    left = {module: _at_end(output, model.device) for module, (_, output) in seen.items()}
    last = model.n_layers - 1
    read = rows.pattern[last][0, :, :1] * rows.values[last][0, :, 0].float()  # [n_heads, head_dim]
    parts = LastTokenParts(
        torch.stack([entered[layer] for layer in model.layers]),
        torch.stack([_contributions(model, layer, z[layer][0].float(), entered) for layer in all_layers]),
        torch.stack([left[module] for module in mlps]),
        entered[model.final_norm],
        torch.stack([rows.pattern[layer][0].to(model.device) for layer in all_layers]),
        _contributions(model, last, read, entered),
    )
    total = parts.inputs + torch.stack([left[module] for module in added]) + parts.mlps
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    gap = ((total - parts.after).abs().amax(1) / parts.after.abs().amax(1)).max().item()
    if not gap <= tolerance:
        raise CheckError(f"{model.name}: attention and MLP outputs miss the residual stream by {gap:.2g} of it")
    return parts


def _at_end(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])[-1].float().to(device)


def _contributions(model: HeadModel, layer: int, z: Tensor, entered: Mapping[nn.Module, Tensor]) -> Tensor:
    """`[n_heads, d_model]` what heads with outputs `z` (`[n_heads, head_dim]`) add to the residual stream."""
    parts = torch.einsum("hd,hdm->hm", z, model.output_weight(layer).float()).to(model.device)
    norm = model.post_attention_norm(layer)
    return parts if norm is None else through_norm(model, norm, entered[norm], parts)


def through_norm(model: HeadModel, norm: nn.Module, x: Tensor, parts: Tensor) -> Tensor:
    """Parts of a norm's input as they leave it, its scale held at that of `x`: they add up to its output less its bias.

    Args:
        x: `[d_model]`, the norm's input.
        parts: `[n, d_model]`.

    Returns:
        `[n, d_model]` float32, on the device of `parts`.
    """
    # `norm_directions` carries directions backwards, d -> J^T d; the derivative of <J^T d, part> by d is J part.
    with torch.enable_grad():
        directions = torch.zeros_like(parts, dtype=torch.float32, requires_grad=True)
        carried = model.norm_directions(norm, x, directions)
        (moved,) = torch.autograd.grad((carried * parts.to(carried)).sum(), directions)
    return moved


@torch.no_grad()
def decoded(model: HeadModel, residual: Tensor, parts: Tensor) -> Tensor:
    """`W_U norm(part)`: the logits that parts of the residual stream write directly.

    Args:
        residual: `[d_model]`, the final norm's input whose scale is used.
        parts: `[n, d_model]`.

    Returns:
        `[n, vocabulary]` float32, before any cap on logits, without biases.
    """
    weight = model.hf.get_output_embeddings().weight
    moved = through_norm(model, model.final_norm, residual, parts)
    logits: Tensor = functional.linear(moved.to(weight.device), weight.float())
    return logits


# --- the regression ---------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Sums over examples that the regression and its R^2 need, in float64: memory does not grow with the examples.

    Attributes:
        n: examples.
        x: `[n_layers, K, d_model]` sums of the inputs: the heads, then the residual stream.
        m: `[n_layers, d_model]` sums of the MLP outputs.
        xx: `[n_layers, K, K]`, xm: `[n_layers, K]`, mm: `[n_layers]` sums of inner products over d_model.
    """

    n: int
    x: Tensor
    m: Tensor
    xx: Tensor
    xm: Tensor
    mm: Tensor

    @classmethod
    def empty(cls, model: HeadModel) -> Moments:
        """Of no example."""
        n_layers, k, d_model = model.n_layers, model.n_heads + 1, model.d_model
        shapes = ((n_layers, k, d_model), (n_layers, d_model), (n_layers, k, k), (n_layers, k), (n_layers,))
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=model.device) for shape in shapes))

    @classmethod
    def of_example(cls, inputs: Tensor, outputs: Tensor) -> Moments:
        """Of one example: inputs `[n_layers, K, d_model]`, outputs `[n_layers, d_model]`."""
        x, m = inputs.double(), outputs.double()
        return cls(1, x, m, x @ x.mT, (x @ m[..., None])[..., 0], m.square().sum(-1))

    def add(self, other: Moments) -> None:
        self.n += other.n
        for name in ("x", "m", "xx", "xm", "mm"):
            getattr(self, name).add_(getattr(other, name))


def moments_of(parts: LastTokenParts) -> Moments:
    """One example's moments, in every layer."""
    return Moments.of_example(torch.cat([parts.heads, parts.inputs[:, None]], 1), parts.mlps)


@dataclass(frozen=True)
class Decomposition:
    """The fitted regression of every layer.

    Attributes:
        heads: `[n_layers, n_heads]` c_h; 0 for a head whose contribution does not vary over examples: it is in b.
        residual: `[n_layers]` c_r; 0 likewise.
        intercept: `[n_layers, d_model]` b, float32.
        mean: `[n_layers, d_model]` mean MLP output of the examples fitted, float64.
        n: examples fitted.
    """

    heads: Tensor
    residual: Tensor
    intercept: Tensor
    mean: Tensor
    n: int

    def r2(self, moments: Moments) -> list[float | None]:
        """By layer, over all coordinates: `1 - sum_i |M_i - fit_i|^2 / sum_i |M_i - mean(M of the fit)|^2`.

        None where the MLP's output is the fit's mean in every example. At most 1, below 0 where the mean does better.
        """
        c = torch.cat([self.heads, self.residual[:, None]], 1).double()
        b = self.intercept.double()
        x_b = (moments.x @ b[..., None])[..., 0]
        left = (
            moments.mm
            - 2 * (c * moments.xm).sum(-1)
            - 2 * (b * moments.m).sum(-1)
            + torch.einsum("lj,ljk,lk->l", c, moments.xx, c)
            + 2 * (c * x_b).sum(-1)
            + moments.n * b.square().sum(-1)
        )
        total = moments.mm - 2 * (self.mean * moments.m).sum(-1) + moments.n * self.mean.square().sum(-1)
        pairs = zip(left.tolist(), total.tolist(), moments.mm.tolist(), strict=True)
        return [1 - rest / all_ if all_ > _CONSTANT * size else None for rest, all_, size in pairs]


def regress(moments: Moments, ridge: float = RIDGE) -> Decomposition:
    """Solve the regression of every layer.

    Raises:
        InputError: fewer than two examples.
    """
    if moments.n < 2:
        raise InputError(f"an MLP is decomposed over examples that differ; {moments.n} is too few, give at least 2")
    mean_x, mean_m = moments.x / moments.n, moments.m / moments.n
    gram = moments.xx - moments.n * mean_x @ mean_x.mT
    right = moments.xm - moments.n * (mean_x @ mean_m[..., None])[..., 0]
    variance = gram.diagonal(dim1=1, dim2=2)
    varies = variance > _CONSTANT * moments.xx.diagonal(dim1=1, dim2=2)  # [n_layers, K]
    gram = gram * (varies[:, :, None] & varies[:, None, :])
    gram = gram + torch.diag_embed(torch.where(varies, ridge * variance, torch.ones_like(variance)))
    c = torch.linalg.solve(gram, right * varies)
    intercept = mean_m - (c[:, None] @ mean_x)[:, 0]
    return Decomposition(c[:, :-1].float(), c[:, -1].float(), intercept.float(), mean_m, moments.n)


def split_subjects(subjects: Sequence[str], held_out: float, seed: int = 0) -> set[str]:
    """The subjects held out: a seeded draw of the share `held_out`, at least one and not all.

    Raises:
        InputError: a share outside (0, 1), or a single subject.
    """
    names = sorted(set(subjects))
    if not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out}; expected a share of the subjects between 0 and 1, such as 0.3")
    if len(names) < 2:
        raise InputError(f"{len(names)} subject is too few to hold one out; give examples of at least two subjects")
    random.Random(seed).shuffle(names)
    return set(names[: min(max(1, round(held_out * len(names))), len(names) - 1)])


def decompose(
    model: HeadModel,
    examples: Sequence[Encoded],
    held_out: float = 0.3,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Decomposition, list[float | None]]:
    """Fit the MLPs of all layers on a task.

    Returns:
        The fit, on the subjects that are not held out, and its R^2 by layer on those that are.

    Raises:
        InputError: see `split_subjects` and `regress`.
    """
    apart = split_subjects([example.example.subject for example in examples], held_out, seed)
    fitted, others = Moments.empty(model), Moments.empty(model)
    for example in progress(examples, "decomposing MLPs"):
        (others if example.example.subject in apart else fitted).add(
            moments_of(last_token_parts(model, example.tokens))
        )
    decomposition = regress(fitted)
    return decomposition, decomposition.r2(others)
