"""What the view of a model's heads claims, verified on a tiny batch before anybody relies on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headtune.analysis.utils.errors import CheckError, InputError

from . import hooks
from .attention import look_with, record_rows, softcapped
from .head_model import HeadModel
from .model_folder import not_a_decoder

_SENTENCE = "The capital of France is Paris, and the capital of Italy is"


def probe(model: PreTrainedModel) -> Tensor:
    """The tiny batch, `[2, 7]` random tokens, where the model takes them."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    embedding: Any = model.get_input_embeddings()
    return torch.randint(0, vocabulary, (2, 7), generator=generator).to(embedding.weight.device)


@torch.no_grad()
def probe_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """`[batch, seq, vocabulary]` float32."""
    return model(tokens, use_cache=False).logits.float()


def require_finite(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Tensor:
    """Refuse a model whose logits are not finite, on the tiny batch or on a sentence with the tokenizer's BOS.

    Returns:
        The tiny batch's logits, `[batch, seq, vocabulary]` float32.

    Raises:
        InputError: they overflow in the dtype of the weights, or the weights themselves hold NaN.
    """
    tokens = probe(model)
    logits = probe_logits(model, tokens)
    sentence = torch.tensor([tokenizer(_SENTENCE).input_ids], device=tokens.device)
    known_tokens = sentence[sentence < int(model.config.get_text_config().vocab_size)][None]
    require_finite_logits(logits, model.dtype, name)
    if known_tokens.shape[1]:
        require_finite_logits(probe_logits(model, known_tokens), model.dtype, name)
    return logits


def require_finite_logits(logits: Tensor, dtype: torch.dtype, name: str) -> None:
    """Refuse logits with NaN or infinities (InputError); `dtype` is the weights'."""
    if logits.isfinite().all():
        return
    kind = str(dtype).removeprefix("torch.")
    fix = "use bfloat16 or float32" if kind == "float16" else "its weights are damaged; get a whole copy of it"
    raise InputError(f"model {name!r}: logits are not finite in {kind}; {fix}")


def require_causal(model: PreTrainedModel, logits: Tensor, name: str) -> None:
    """Refuse a model in which a token's logits depend on a later token: an encoder.

    Args:
        logits: of the tiny batch.

    Raises:
        InputError: they do.
    """
    changed = probe(model)
    changed[:, -1] = (changed[:, -1] + 1) % int(model.config.get_text_config().vocab_size)
    tolerance = (1e-5 if model.dtype == torch.float32 else 2e-2) * logits.abs().max().item()
    if not (probe_logits(model, changed)[:, :-1] - logits[:, :-1]).abs().max().item() <= tolerance:
        raise InputError(not_a_decoder(name, "an encoder (its logits depend on later tokens)"))


@torch.no_grad()
def check(model: HeadModel, reference: Tensor | None = None) -> None:
    """Verify on a tiny batch that the view describes the model.

    Logits equal the untouched model's; every layer's head contributions plus bias sum to the attention block's
    output; what attention and MLP are said to add to the residual stream is what a layer changes; recorded attention
    rows sum to 1 and have the key heads of the configuration; every norm that attribution passes, linearised at its
    input, gives its output, and the unembedding of that the logits; silencing a head takes what it writes, and
    nothing else, out of its block's output (a head that writes nothing, such as a pruned one, may stay without
    effect). Tolerance 1e-5 of the largest value in float32 (rounding of a sum over at most a few thousand terms),
    2e-2 in half precision.

    Raises:
        CheckError: naming the module that failed.
    """
    # One pass in which everything that is compared is seen.
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    tokens = probe(model.hf)
    last = torch.full((tokens.shape[0],), tokens.shape[1] - 1, device=tokens.device)
    unembedding = model.hf.get_output_embeddings()
    norms = {model.architecture.final_norm: model.final_norm}
    for layer in range(model.n_layers):
        if (norm := model.post_attention_norm(layer)) is not None:
            norms[f"{model.architecture.layers}.{layer}.{model.architecture.post_attention_norm}"] = norm
    blocks = [model.attention(layer) for layer in range(model.n_layers)]
    mlps = [model.mlp(layer) for layer in range(model.n_layers)]
    key_heads: dict[int, int] = {}
    with (
        record_rows(last) as rows,
        look_with(lambda call: key_heads.update({call.layer: call.key.shape[1]})),
        hooks.capture(model) as z,
        hooks.watch([*model.layers, *blocks, *mlps, *norms.values(), unembedding]) as seen,
    ):
        logits = probe_logits(model.hf, tokens)
    # The logits are those of the model as it came.
    if reference is not None and not torch.allclose(logits, reference, atol=tolerance * reference.abs().max().item()):
        gap = (logits - reference).abs().max().item()
        raise CheckError(f"{model.name}: logits under the head view differ from the model's by {gap:.2g}")
    # Layer by layer: heads add up to attention, attention and MLP to the layer, attention rows to 1.
    for layer, block in enumerate(blocks):
        path = f"{model.architecture.layers}.{layer}.{model.architecture.attention}"
        contributions = torch.einsum("bshd,hdm->bsm", z[layer].float(), model.output_weight(layer).float())
        bias: Any = model.projection(layer).bias
        total = contributions if bias is None else contributions + bias.float()
        expected = seen[block][1].float()
        gap = (total - expected).abs().max().item()
        if not gap <= tolerance * max(1.0, expected.abs().max().item()):
            raise CheckError(f"{path}: head contributions plus bias differ from the block's output by {gap:.2g}")
        before, after = (tensor.float() for tensor in seen[model.layers[layer]])
        added = seen[model.attention_added(layer)][1].float() + seen[mlps[layer]][1].float().view_as(after)
        if not (before + added - after).abs().max().item() <= tolerance * max(1.0, after.abs().max().item()):
            raise CheckError(
                f"{model.architecture.layers}.{layer}: adds more or other than its attention and its MLP "
                f"({model.architecture.mlp}) to the residual stream"
            )
        if layer not in rows.pattern:
            raise CheckError(f"{path}: does not go through the attention interface, so its rows cannot be read")
        if key_heads[layer] != model.n_kv_heads:
            raise CheckError(
                f"{path}: attends with {key_heads[layer]} key heads, and the configuration says {model.n_kv_heads}"
            )
        if not (rows.pattern[layer].sum(-1) - 1).abs().max().item() <= 1e-5:
            raise CheckError(f"{path}: attention rows do not sum to 1")
    # Norms and unembedding, linearised; and an edit of a head reaches the logits.
    for path, norm in norms.items():
        _check_norm(model, path, norm, *seen[norm], tolerance)
    _check_decoding(model, tokens[0], seen[model.final_norm][0], seen[unembedding][1], logits, tolerance)
    _check_silencing(model, tokens, z[0].float(), seen[blocks[0]][1].float(), tolerance)


def _check_silencing(model: HeadModel, tokens: Tensor, z: Tensor, output: Tensor, tolerance: float) -> None:
    """Silence the head of layer 0 that writes most: its block's output, `[batch, seq, d_model]`, less its part."""
    written = torch.einsum("bshd,hdm->bshm", z, model.output_weight(0).float())
    head = int(written.norm(dim=-1).mean((0, 1)).argmax())
    expected = output - written[:, :, head]
    with hooks.ablate(model, [(0, head)]), hooks.watch([model.attention(0)]) as seen:
        probe_logits(model.hf, tokens)
    gap = (seen[model.attention(0)][1].float() - expected).abs().max().item()
    if not gap <= tolerance * max(1.0, output.abs().max().item()):
        raise CheckError(
            f"{model.architecture.layers}.0: silencing head {head} does not take what it writes out of the attention "
            f"block's output (off by {gap:.2g})"
        )


def _check_norm(model: HeadModel, path: str, norm: nn.Module, inputs: Tensor, output: Tensor, tolerance: float) -> None:
    """At one position, for up to 256 dimensions, each compared relative to its own size: a wrong gain is not lost
    behind one large dimension."""
    x, expected = inputs[0, -1].float(), output[0, -1].float()
    some = torch.linspace(0, len(x) - 1, min(len(x), 256), device=x.device).long()
    linearised = model.norm_directions(norm, x, functional.one_hot(some, len(x))) @ x
    if (bias := getattr(norm, "bias", None)) is not None:
        linearised = linearised + bias[some].float()
    expected = expected[some]
    if not torch.allclose(linearised, expected, rtol=tolerance, atol=tolerance * expected.abs().mean().item()):
        gap = ((linearised - expected) / expected).abs().median().item()
        raise CheckError(f"{path}: the linearised norm differs from its output, by {gap:.2g} of it (gain 1 + weight?)")


def _check_decoding(
    model: HeadModel, tokens: Tensor, residual: Tensor, decoded: Tensor, logits: Tensor, tolerance: float
) -> None:
    unembedding: Any = model.hf.get_output_embeddings()
    name = f"{model.name}: the unembedding"
    cap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
    capped = softcapped(decoded.float(), cap).to(logits)
    if not (capped - logits).abs().max().item() <= tolerance * logits.abs().max().item():
        raise CheckError(f"{name}'s output is not the logits (soft cap: {cap})")
    x, norm = residual[0, -1].float(), model.final_norm
    linearised = model.unembedding_directions(x, tokens) @ x
    rows = unembedding.weight[tokens.to(unembedding.weight.device)].float()
    if (bias := getattr(norm, "bias", None)) is not None:
        linearised = linearised + (rows @ bias.to(rows)).to(linearised)
    if unembedding.bias is not None:
        linearised = linearised + unembedding.bias.to(linearised)[tokens.to(linearised.device)]
    expected = decoded[0, -1].to(linearised)[tokens.to(linearised.device)]
    if not (linearised - expected).abs().max().item() <= tolerance * decoded.abs().max().item():
        raise CheckError(f"{name} of the linearised final norm differs from the logits")
