"""Where information passes: attention knocked out, and runs with noisy words restored layer by layer.

Attention knockout asks what a run would come to if the last token did not look at some positions S: A[last, S] := 0
after the softmax, in all heads and layers. Its effect on an MLP is decode(full run's output) - decode(knocked-out run's
output), each with its own run's final-norm scale (see `logit_lens`).

Causal tracing (Meng et al. 2022; Yan & Jia 2025) adds noise to the embeddings of some words, and then puts the clean
run's attention or MLP outputs back, in a window of layers and at one group of positions at a time. Where that brings
the answer back, the information passes.

Tracing is many runs of one prompt, so a restored run is computed only where it can differ from the noisy run it starts
from: in the layers from its window on, and at the positions from its group on. All else is shared. See `batches`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headtune.analysis.models.attention import AttentionCall, attend_with, masked, softcapped
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import InputError

from .batches import rows_in_memory
from .intervention import CLEAN, Intervention
from .last_token import LastTokenRunner
from .logit_lens import PARTS, decode

# --- attention knockout -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knockout:
    """The effect of the last token's attention to each source: full run less knocked-out run, in logits.

    Positive = the attention raises the logits.

    Attributes:
        attention, mlp: `[sources, n_layers, n_tokens]` of the decoded outputs of each layer's attention and MLP.
        logits: `[sources, n_tokens]` of the final logits.
    """

    attention: Tensor
    mlp: Tensor
    logits: Tensor


@torch.no_grad()
def knockout(
    runner: LastTokenRunner, sources: Mapping[str, Sequence[int]], tokens: Tensor, renormalise: bool = False
) -> Knockout:
    """Knock each source out of the last token's attention, in all heads and layers at once.

    Args:
        sources: name -> positions; an empty one has no effect.
        tokens: `[n]` token ids to decode toward.
        renormalise: let the attention that is left, if any, sum to 1 again; Yan & Jia do not.
    """
    rows = [CLEAN, *(Intervention(knocked_out=tuple(at), renormalise=renormalise) for at in sources.values())]
    result = runner.run(rows, record=PARTS)
    decoded = decode(runner.model, result, tokens)
    logits = result.logits[:, tokens.to(result.logits.device)].float()
    return Knockout(*(part[:1] - part[1:] for part in (decoded.attention, decoded.mlp, logits)))


# --- causal tracing ---------------------------------------------------------------------------------------------------

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = ("attention", "mlp")
Measure = Callable[[Tensor], Tensor]  # `[rows, vocabulary]` next-token logits -> `[rows, n_measures]`


@dataclass(frozen=True)
class Trace:
    """What was measured on one prompt, float32.

    Attributes:
        clean: `[n_measures]` without noise.
        noisy: `[n_noise, n_measures]` with it.
        restored: `[n_noise, kinds, groups, centres, n_measures]` with the clean outputs put back, kinds as in KINDS.
    """

    clean: Tensor
    noisy: Tensor
    restored: Tensor


def window_of(centre: int, window: int, n_layers: int) -> range:
    """The layers restored around `centre`: from `centre - window // 2`, `window` layers, as far as they exist."""
    first = centre - window // 2
    return range(max(0, first), min(n_layers, first + window))


@torch.no_grad()
def embedding_deviation(model: HeadModel, tokens: Tensor) -> float:
    """The standard deviation of all entries of some tokens' word embeddings, as they enter the first layer.

    Args:
        tokens: `[n]` ids; one that stands there twice counts twice.
    """
    embedded: Tensor = model.hf.get_input_embeddings()(tokens.to(model.device))
    return float(embedded.float().std())


def noise_of(model: HeadModel, deviation: float, n_noise: int, n_positions: int, seed: int = 0) -> Tensor:
    """Gaussian noise of a standard deviation for word embeddings, `[n_noise, n_positions, d_model]` float32."""
    weight: Tensor = model.hf.get_input_embeddings().weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    return deviation * torch.randn(n_noise, n_positions, weight.shape[1], generator=generator)


@torch.no_grad()
def causal_trace(
    model: HeadModel,
    tokens: Tensor,
    noisy: Sequence[int],
    groups: Mapping[str, Sequence[int]],
    measure: Measure,
    *,
    deviation: float,
    n_noise: int = 10,
    window: int = 10,
    centres: Sequence[int] | None = None,
    seed: int = 0,
) -> Trace:
    """Noise on the embeddings at `noisy`, then each kind of output put back at each group and window.

    Restoring a group before the noise, or an empty one, restores nothing: such rows are the noisy run's.

    Args:
        tokens: `[seq]` ids of one prompt.
        groups: name -> positions where outputs are put back.
        measure: reduces next-token logits.
        deviation: standard deviation of the noise; in the literature 3 times that of the embeddings of what the noise
            is put on, over all prompts (see `embedding_deviation`).
        n_noise: how many noisy copies.
        window: layers restored together (see `window_of`).
        centres: layers to centre windows at; default: all.
        seed: of the noise.

    Raises:
        InputError: counts below 1, no positions for the noise, or positions or layers out of range.
    """
    # Refuse what cannot be traced.
    seq = len(tokens)
    centres = range(model.n_layers) if centres is None else centres
    if n_noise < 1 or window < 1:
        raise InputError(f"n_noise={n_noise} and window={window} must be at least 1")
    if not noisy:
        raise InputError("there are no positions for the noise; give those of the subject or of a previous answer")
    positions = {position for group in (noisy, *groups.values()) for position in group}
    if outside := [p for p in sorted(positions) if not 0 <= p < seq]:
        raise InputError(f"position {outside[0]} is out of range; expected 0 to {seq - 1}, the prompt's positions")
    if outside := [c for c in centres if not 0 <= c < model.n_layers]:
        raise InputError(f"centre {outside[0]} is out of range; expected layers 0 to {model.n_layers - 1}")
    # As many noisy copies at a time as memory allows.
    noise = noise_of(model, deviation, n_noise, len(noisy), seed)
    tokens = tokens.to(model.device)
    traces = []
    # One more row is the clean run; the keys and values of all layers are kept.
    size = max(1, rows_in_memory(model, seq, positions=seq, copied=seq * model.n_layers) - 1)
    for start in range(0, n_noise, size):
        runs = _NoisyRuns(model, tokens, noisy, noise[start : start + size])
        bases = measure(runs.logits).float()
        rows = bases[1:, None, None, None].expand(-1, len(KINDS), len(groups), len(centres), -1).clone()
        for index, at in enumerate(groups.values()):
            # Before the noise, noisy and clean run are the same.
            if after := [position for position in at if position >= min(noisy)]:
                rows[:, :, index] = runs.restored(
                    after, [window_of(c, window, model.n_layers) for c in centres], measure
                )
        traces.append(Trace(bases[0], bases[1:], rows))
    return Trace(traces[0].clean, torch.cat([t.noisy for t in traces]), torch.cat([t.restored for t in traces]))


@dataclass(frozen=True)
class _Restored:
    """One restored run: which noisy run it starts from, and what is put back in which layers."""

    noise: int
    kind: Kind
    layers: range


class _NoisyRuns:
    """The clean run and noisy runs of one prompt, and what restored runs need of them.

    Attributes:
        logits: `[1 + n_noise, vocabulary]`, the clean run first.
    """

    def __init__(self, model: HeadModel, tokens: Tensor, noisy: Sequence[int], noise: Tensor) -> None:
        self.model, self.tokens, self.n_noise = model, tokens, len(noise)
        self.embedded = torch.empty(0)  # [1 + n_noise, seq, d_model]
        self.keys: dict[int, Tensor] = {}  # layer -> [1 + n_noise, n_kv_heads, seq, head_dim]
        self.values: dict[int, Tensor] = {}
        self.clean: dict[tuple[Kind, int], Tensor] = {}  # -> [seq, d_model]
        self._masks: dict[int, Tensor | None] = {}

        def add_noise(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[1:, list(noisy)] += noise.to(output)
            self.embedded = output
            return output

        def look(call: AttentionCall) -> None:
            self.keys[call.layer], self.values[call.layer] = call.key.float(), call.value.float()
            self._masks[call.layer] = None if call.mask is None else call.mask[0]

        def keep(kind: Kind, layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                self.clean[kind, layer] = _first_of(output).reshape(1 + self.n_noise, len(tokens), -1)[0]

            return hook

        with contextlib.ExitStack() as stack:
            stack.enter_context(attend_with(look))
            stack.callback(model.hf.get_input_embeddings().register_forward_hook(add_noise).remove)
            for kind, layer, module in _modules(model):
                stack.callback(module.register_forward_hook(keep(kind, layer)).remove)
            batch = tokens[None].expand(1 + self.n_noise, -1)
            self.logits = model.hf(batch, use_cache=False, logits_to_keep=1).logits[:, -1]

    def restored(self, at: Sequence[int], windows: Sequence[range], measure: Measure) -> Tensor:
        """`[n_noise, kinds, windows, n_measures]` with the clean outputs put back at positions `at`."""
        rows = [_Restored(noise, kind, layers) for noise in range(self.n_noise) for kind in KINDS for layers in windows]
        order = sorted(range(len(rows)), key=lambda index: rows[index].layers.start)
        seq, start = len(self.tokens), min(at)
        # Keys and values are gathered, then joined with the row's.
        size = rows_in_memory(self.model, seq, positions=seq - start, copied=2 * seq)
        parts = [
            measure(self._run_batch([rows[i] for i in order[first : first + size]], at, start)).float()
            for first in range(0, len(order), size)
        ]
        measured = torch.cat(parts)[torch.tensor(order).argsort().to(parts[0].device)]
        return measured.view(self.n_noise, len(KINDS), len(windows), -1)

    def _run_batch(self, rows: Sequence[_Restored], at: Sequence[int], start: int) -> Tensor:
        """Logits of rows sorted by their first layer, computed from position `start` on.

        The batch begins with the noisy runs that the rows start from; each row joins, in its first layer, as a copy of
        its noisy run.
        """
        model = self.model
        noises = sorted({row.noise for row in rows})
        # Batch index -> index of its run in `embedded`, `keys` and `values`, where the clean run is the first.
        origin = torch.tensor(
            [1 + noise for noise in (*noises, *(row.noise for row in rows))], device=self.tokens.device
        )
        joining = {layer: [row for row in rows if row.layers.start == layer] for layer in range(model.n_layers)}
        columns = torch.tensor([position - start for position in at])

        # What hooks do: start from noisy embeddings, let rows join, put clean outputs back.
        def embed(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return self.embedded[origin[: len(noises)], start:].to(output)

        def join(new: Sequence[_Restored]) -> Any:
            bases = [noises.index(row.noise) for row in new]

            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden = torch.cat([hidden, hidden[bases]])
                return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

            return hook

        def put_back(kind: Kind, layer: int) -> Any:
            indices = [i for i, row in enumerate(rows, len(noises)) if row.kind == kind and layer in row.layers]

            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                tensor = _first_of(output)
                changed = tensor.reshape(-1, len(self.tokens) - start, tensor.shape[-1]).clone()
                changed[torch.tensor(indices)[:, None], columns] = self.clean[kind, layer][list(at)].to(changed)
                changed = changed.view_as(tensor)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return hook if indices else None

        def attend(call: AttentionCall) -> Tensor:
            return self._attend(call, origin[: len(call.query)], start)

        # The pass over the positions that can differ.
        with contextlib.ExitStack() as stack:
            stack.enter_context(attend_with(attend))
            stack.callback(model.hf.get_input_embeddings().register_forward_hook(embed).remove)
            for layer, new in joining.items():
                if new:
                    handle = model.layers[layer].register_forward_pre_hook(join(new), with_kwargs=True)
                    stack.callback(handle.remove)
            for kind, layer, module in _modules(model):
                if hook := put_back(kind, layer):
                    stack.callback(module.register_forward_hook(hook).remove)
            batch = self.tokens[None, start:].expand(len(noises), -1)
            positions = torch.arange(start, len(self.tokens), device=self.tokens.device)[None]
            logits = model.hf(batch, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits[len(noises) :]

    def _attend(self, call: AttentionCall, origin: Tensor, start: int) -> Tensor:
        """`[batch, queries, n_heads, head_dim]`: keys and values before `start` are those of each row's noisy run."""
        rows, n_heads, n_queries, _ = call.query.shape
        n_kv = self.model.n_kv_heads
        runs = origin.to(call.query.device)
        key = torch.cat([self.keys[call.layer][runs, :, :start], call.key.float()], 2)
        value = torch.cat([self.values[call.layer][runs, :, :start], call.value.float()], 2)
        # A group of query heads shares its keys: [rows, n_kv, group * queries, head_dim] x [rows, n_kv, head_dim, seq].
        folded = call.query.float().reshape(rows, n_kv, n_heads // n_kv * n_queries, -1)
        scores = (folded @ key.transpose(2, 3)).view(rows, n_heads, n_queries, -1)
        scores = softcapped(scores * call.scaling, call.softcap)
        seq = scores.shape[-1]
        mask = self._masks[call.layer]
        if mask is None:
            mask = torch.ones(seq, seq, dtype=torch.bool, device=scores.device).tril()
        pattern = masked(scores, mask[..., start:, :seq]).softmax(-1)
        out = pattern.view(rows, n_kv, -1, seq) @ value
        return out.view(rows, n_heads, n_queries, -1).transpose(1, 2).to(call.query.dtype)


def _modules(model: HeadModel) -> list[tuple[Kind, int, nn.Module]]:
    """The modules whose outputs are put back: what attention and MLP of each layer add to the residual stream."""
    by_kind = {"attention": model.attention_added, "mlp": model.mlp}
    return [(kind, layer, by_kind[kind](layer)) for kind in KINDS for layer in range(model.n_layers)]


def _first_of(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
