"""Which heads' attention a sequence of tasks depends on, and which heads lose it: SEEKR's importance (He et al. 2024).

    S_k[l, h] = E_rows ||dL/dA[l, h]||_F                       how much task k's loss feels the head's attention
    F_k[l, h] = E_rows ||A[l, h] after - A[l, h] before||_F    how far learning task k moved it
    I = S * F,  S = sum_k layer_normalised(S_k),  F = sum_k F_k

with A the post-softmax attention of all queries of a row over the keys they may see, L the row's loss, and rows those
of task k that will be replayed. Both norms are exact and no head's `[seq, seq]` is ever whole: blocks of query rows are
made, squared, summed and dropped. (Where a family caps its attention scores, its own forward pass is not so frugal.)

    dL/dA[i, j] = dL/dz[i] . v[j]      as z = A V: one backward pass gives dL/dz of every layer
    A = softmax(q k^T ...)             from queries and keys, which grow linearly with the row

    before = remember(model, rows)                  # the model that is about to learn task k
    ...                                             # it learns, in place
    importance = importance.add(sensitivity(model, rows), forgetting(model, rows, before))
    chosen = choose(importance.value(), layers=24, heads=128)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from headtune.analysis.models import hooks
from headtune.analysis.models.attention import AttentionCall, head_log_rows, look_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import atomic_folder, atomic_path, require_new_folder
from headtune.analysis.utils.progress import Progress, silent

IGNORED = -100  # a label that carries no loss
_BLOCK = 1 << 22  # attention entries made at once: 16 MiB in float32

# A row of training data: equally long `input_ids` and `labels`, -100 where nothing is learnt.
TokenRow = Mapping[str, Sequence[int]]


# --- sensitivity ------------------------------------------------------------------------------------------------------


def sensitivity(model: HeadModel, rows: Sequence[TokenRow], batch_size: int = 1, progress: Progress = silent) -> Tensor:
    """`S[l, h] = mean over rows of ||dL/dA[l, h]||_F`, L the row's mean cross-entropy over its label tokens.

    The norm is over the entries a query may see: those of the future, of padding and beyond a sliding window are no
    attention weights, and are left out, although autograd has a number for them. A is taken after the softmax, as free
    entries. One forward and one backward pass a batch, without parameter gradients; logits exist where a label is.

    Returns:
        `[n_layers, n_heads]` float32 on the CPU, never negative.

    Raises:
        InputError: no rows, or a row of which nothing is learnt.
        CheckError: a value is not finite.
    """
    _require(rows, labels=True)
    total = torch.zeros(model.n_layers, model.n_heads, dtype=torch.float64)
    for batch in progress(_batches(rows, batch_size), "sensitivity"):
        total += _gradient_squares(model, batch).sqrt().sum(0)
    return _finite(total / len(rows), "sensitivity")


def _gradient_squares(model: HeadModel, batch: Sequence[TokenRow]) -> Tensor:
    """`||dL/dA[l, h]||_F^2` of each row, `[batch, n_layers, n_heads]` float64."""
    squares = torch.zeros(len(batch), model.n_layers, model.n_heads, dtype=torch.float64)
    calls: dict[int, AttentionCall] = {}

    def measured(layer: int) -> Callable[[Tensor], Tensor]:
        def edit(z: Tensor) -> Tensor:
            call = calls.pop(layer)

            def of_gradient(gradient: Tensor) -> None:
                for example, row in enumerate(batch):
                    squares[example, layer] = _gradient_square(
                        call, example, gradient[example, : len(row["input_ids"])]
                    )

            z.register_hook(of_gradient)
            return z

        return edit

    def look(call: AttentionCall) -> None:
        calls[call.layer] = call

    with model.measuring(), _graph_from_embeddings(model) as leaves, torch.enable_grad():
        with look_with(look), hooks.at_projections(model, {layer: measured(layer) for layer in range(model.n_layers)}):
            loss = _losses(model, batch).sum()
        torch.autograd.grad(loss, leaves)
    return squares


def _gradient_square(call: AttentionCall, example: int, gradient: Tensor) -> Tensor:
    """`sum over visible i, j of (dL/dz[i] . v[j])^2`, `[n_heads]` float64.

    Args:
        gradient: `[queries, n_heads, head_dim]`, dL/dz of the example, without padding.
    """
    n_heads, n_kv_heads = call.query.shape[1], call.key.shape[1]
    square = torch.zeros(n_heads, dtype=torch.float64)
    for start, stop in _blocks(len(gradient), n_heads):
        part = _beginning(call, example, stop)
        value = part.value[0].detach().float()  # [n_kv_heads, stop, head_dim]
        grouped = gradient[start:stop].float().transpose(0, 1).reshape(n_kv_heads, -1, gradient.shape[-1])
        entries = (grouped @ value.transpose(1, 2)).view(n_heads, stop - start, stop)
        square += entries.masked_fill_(~_visible(part, start), 0).square_().sum((1, 2)).double().cpu()
    return square


def _visible(call: AttentionCall, start: int) -> Tensor:
    """`[heads or 1, queries - start, keys]` bool: what the queries from `start` on may attend to."""
    queries, keys, device = call.query.shape[2], call.key.shape[2], call.query.device
    if call.mask is None:
        return (torch.arange(keys, device=device) <= torch.arange(start, queries, device=device)[:, None])[None]
    mask = call.mask[0, :, start:]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _losses(model: HeadModel, batch: Sequence[TokenRow]) -> Tensor:
    """`[batch]` float32: each row's mean cross-entropy over the tokens with a label."""
    ids, mask = _padded(model, batch)
    labels = torch.full_like(ids, IGNORED)
    for example, row in enumerate(batch):
        labels[example, : len(row["labels"])] = torch.tensor(row["labels"])
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # what each position has to predict
    kept = (following != IGNORED).any(0).nonzero()[:, 0]
    logits = model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits.float()
    targets = following[:, kept].to(logits.device)
    # The vocabulary comes last: along another dimension PyTorch's sum over a large one is good to 1e-4 only.
    values = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    return values.sum(1) / (targets != IGNORED).sum(1)


@contextlib.contextmanager
def _graph_from_embeddings(model: HeadModel) -> Iterator[list[Tensor]]:
    """Inside, gradients flow down to the token embeddings' output, which is collected, and into no parameter."""
    leaves: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    embeddings: Any = model.hf.get_input_embeddings()
    trained = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    handle = embeddings.register_forward_hook(keep)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield leaves
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def layer_normalised(sensitivities: Tensor) -> Tensor:
    """`S[l, h] / sum over h' of S[l, h']`: every layer of every task weighs the same; a layer of zeros stays zero.

    The paper's "layer-normalised" sensitivity is read as its authors' code has it. Gradient norms differ by orders of
    magnitude between depths and between tasks, and a sum over tasks would otherwise be one task's, a ranking of layers
    one of depths. LayerNorm proper (less the mean, over the standard deviation) is no choice: half of a layer's heads
    would be negative, so that of two of them the one that moved less would be the more important, and the layers' sums,
    by which layers are chosen, would say nothing.

    Args:
        sensitivities: `[n_layers, n_heads]`, not negative.
    """
    total = sensitivities.sum(1, keepdim=True)
    return torch.where(total > 0, sensitivities / total, torch.zeros_like(sensitivities))


# --- forgetting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembered:
    """Queries and keys of a model on rows: what its attention can be made from again.

    Attributes:
        memory: of each row, `tokens` `[seq]`, and by layer `<layer>.query` `[n_heads, seq, head_dim]` and
            `<layer>.key` `[n_kv_heads, seq, head_dim]`, after the rotary embedding, in the model's dtype; or
        folder: where a file of each row holds the same, and is read memory-mapped, a layer at a time.
    """

    memory: tuple[Mapping[str, Tensor], ...] = ()
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.memory) if self.folder is None else len(list(self.folder.glob("row-*.safetensors")))

    def get(self, row: int, name: str) -> Tensor:
        """One tensor of a row.

        Raises:
            CheckError: its file is missing, damaged, or of another model.
        """
        if self.folder is None:
            return self.memory[row][name]
        path = _row_path(self.folder, row)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckError(f"remembered attention {path} cannot be read ({error}); remember the rows again") from None


def _row_path(folder: Path, row: int) -> Path:
    return folder / f"row-{row:05d}.safetensors"


@torch.no_grad()
def remember(
    model: HeadModel,
    rows: Sequence[TokenRow],
    folder: Path | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Remembered:
    """Keep what the model's attention on these rows is made from, for `forgetting` once it has changed.

    `(n_heads + n_kv_heads) * head_dim` numbers a layer and token: on SmolLM2-135M 90 KiB a token in float32.

    Args:
        folder: a new folder to keep it in, whole or absent, which `Remembered(folder=...)` opens again; None: in main
            memory.

    Raises:
        InputError: no rows, or the folder exists.
    """
    _require(rows)
    if folder is None:
        return Remembered(memory=tuple(_queries_and_keys(model, rows, batch_size, progress)))
    require_new_folder(folder, "give a new one, or open it with Remembered(folder=...)")
    with atomic_folder(folder) as temporary:
        for index, kept in enumerate(_queries_and_keys(model, rows, batch_size, progress)):
            save_file(kept, _row_path(temporary, index))
    return Remembered(folder=folder)


def _queries_and_keys(
    model: HeadModel, rows: Sequence[TokenRow], batch_size: int, progress: Progress
) -> Iterator[dict[str, Tensor]]:
    """What `Remembered` holds of each row, in order."""
    for batch in progress(_batches(rows, batch_size), "remembering attention"):
        kept = [{"tokens": torch.tensor(row["input_ids"])} for row in batch]
        _run(model, batch, _keeping(kept))
        yield from kept


def _keeping(kept: Sequence[dict[str, Tensor]]) -> Callable[[AttentionCall], None]:
    def look(call: AttentionCall) -> None:
        for example, of_row in enumerate(kept):
            part = _beginning(call, example, len(of_row["tokens"]))
            for name, tensor in (("query", part.query), ("key", part.key)):
                of_row[f"{call.layer}.{name}"] = tensor[0].cpu().clone(memory_format=torch.contiguous_format)

    return look


@torch.no_grad()
def forgetting(
    model: HeadModel, rows: Sequence[TokenRow], before: Remembered, batch_size: int = 1, progress: Progress = silent
) -> Tensor:
    """`F[l, h] = mean over rows of ||A[l, h] - A_before[l, h]||_F`, with A the attention of the model as it is now.

    Args:
        rows: the rows that were remembered, in their order.
        before: what `remember` kept of the same model, with the weights it had then.

    Returns:
        `[n_layers, n_heads]` float32 on the CPU, never negative.

    Raises:
        InputError: no rows, or others than those remembered.
        CheckError: what was remembered is damaged or of another model, or a value is not finite.
    """
    _require(rows)
    if len(before) != len(rows):
        raise InputError(f"{len(before)} rows were remembered and {len(rows)} are given; give the same rows")
    for index, row in enumerate(rows):
        if before.get(index, "tokens").tolist() != list(row["input_ids"]):
            raise InputError(f"row {index} is not the one that was remembered; give the same rows in the same order")
    total = torch.zeros(model.n_layers, model.n_heads, dtype=torch.float64)
    done = 0
    for batch in progress(_batches(rows, batch_size), "forgetting"):
        _run(model, batch, _comparing(batch, before, done, total))
        done += len(batch)
    return _finite(total / len(rows), "forgetting")


def _comparing(
    batch: Sequence[TokenRow], before: Remembered, first: int, total: Tensor
) -> Callable[[AttentionCall], None]:
    """Add the distances of a batch, whose rows were remembered from `first` on, to `total`."""

    def look(call: AttentionCall) -> None:
        for example, row in enumerate(batch):
            then = (before.get(first + example, f"{call.layer}.{name}") for name in ("query", "key"))
            total[call.layer] += _difference_square(_beginning(call, example, len(row["input_ids"])), *then).sqrt()

    return look


def _difference_square(call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
    """`sum over i, j of (A[i, j] - A_then[i, j])^2`, `[n_heads]` float64, of a call of one example.

    Args:
        query, key: `[n_heads, seq, head_dim]` and `[n_kv_heads, seq, head_dim]` of then.
    """
    if (query.shape, key.shape) != (call.query.shape[1:], call.key.shape[1:]):
        raise CheckError(
            f"layer {call.layer}: queries {list(query.shape)} and keys {list(key.shape)} were remembered, the model "
            f"has {list(call.query.shape[1:])} and {list(call.key.shape[1:])}; remember the rows with this model"
        )
    then = replace(call, query=query.to(call.query.device)[None], key=key.to(call.key.device)[None])
    n_heads = call.query.shape[1]
    square = torch.zeros(n_heads, dtype=torch.float64)
    for start, stop in _blocks(call.query.shape[2], n_heads):
        positions = torch.arange(start, stop, device=call.query.device)[None]
        one, other = (
            head_log_rows(_beginning(which, 0, stop), range(n_heads), positions).exp_() for which in (call, then)
        )
        square += one.sub_(other).square_().sum((0, 2, 3)).double().cpu()
    return square


# --- what both share --------------------------------------------------------------------------------------------------


def _require(rows: Sequence[TokenRow], labels: bool = False) -> None:
    if not rows:
        raise InputError("no rows to measure heads on; give at least one")
    for index, row in enumerate(rows):
        if len(row["input_ids"]) != len(row["labels"]) or not row["input_ids"]:
            raise InputError(
                f"row {index} has {len(row['input_ids'])} tokens and {len(row['labels'])} labels; expected a label of "
                "each token"
            )
        if labels and all(label == IGNORED for label in row["labels"][1:]):
            raise InputError(f"row {index} has no label after its first token, so it has no loss; leave it out")


def _batches(rows: Sequence[TokenRow], size: int) -> list[Sequence[TokenRow]]:
    if size < 1:
        raise InputError(f"batches of {size} rows; expected at least 1")
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _padded(model: HeadModel, batch: Sequence[TokenRow]) -> tuple[Tensor, Tensor]:
    """`[batch, seq]` token ids, padded on the right, and the mask of what is no padding."""
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for example, row in enumerate(batch):
        ids[example, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[example, : len(row["input_ids"])] = 1
    return ids.to(model.device), mask.to(model.device)


def _run(model: HeadModel, batch: Sequence[TokenRow], look: Callable[[AttentionCall], None]) -> None:
    ids, mask = _padded(model, batch)
    with model.measuring(), look_with(look):
        model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


def _blocks(queries: int, n_heads: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of queries whose attention entries, `n_heads * block * queries`, fit `_BLOCK`."""
    size = max(1, _BLOCK // (n_heads * queries))
    for start in range(0, queries, size):
        yield start, min(queries, start + size)


def _beginning(call: AttentionCall, example: int, n: int) -> AttentionCall:
    """The call of one example of the batch and its first `n` tokens."""
    mask = call.mask
    if mask is not None:
        mask = mask[example % len(mask)][None, :, :n, :n]
    query, key, value = (tensor[example : example + 1, :, :n].detach() for tensor in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, mask=mask)


def _finite(values: Tensor, name: str) -> Tensor:
    wrong = (~values.isfinite()).nonzero().tolist()
    if wrong:
        layer, head = wrong[0]
        raise CheckError(
            f"{name} of {len(wrong)} heads, such as L{layer}H{head}, is not finite; has training diverged?"
        )
    return values.float()


# --- importance -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """Heads' importance over the tasks learnt so far.

    Attributes:
        sensitivity: `sum_k layer_normalised(S_k)`, `[n_layers, n_heads]` float32.
        forgetting: `sum_k F_k`, the same shape.
        tasks: how many were added.
    """

    sensitivity: Tensor
    forgetting: Tensor
    tasks: int = 0

    @classmethod
    def none(cls, n_layers: int, n_heads: int) -> Importance:
        """Before the first task."""
        return cls(torch.zeros(n_layers, n_heads), torch.zeros(n_layers, n_heads))

    def add(self, sensitivity: Tensor, forgetting: Tensor) -> Importance:
        """With one more task, whose sensitivity is given as measured: it is normalised here.

        Raises:
            InputError: other shapes.
        """
        if not sensitivity.shape == forgetting.shape == self.sensitivity.shape:
            raise InputError(
                f"sensitivity {list(sensitivity.shape)} and forgetting {list(forgetting.shape)} do not fit an "
                f"importance of {list(self.sensitivity.shape)} heads; measure them on the same model"
            )
        normalised = self.sensitivity + layer_normalised(sensitivity)
        return Importance(normalised, self.forgetting + forgetting, self.tasks + 1)

    def value(self) -> Tensor:
        """`S * F`, `[n_layers, n_heads]` float32, never negative; the authors' code sums `S_k * F_k` instead."""
        return self.sensitivity * self.forgetting

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {"sensitivity": self.sensitivity, "forgetting": self.forgetting, "tasks": torch.tensor(self.tasks)}
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> Importance:
        """Read what `save` wrote.

        Raises:
            CheckError: there is no such file, or it is damaged.
        """
        try:
            found = load_file(path)
            return cls(found["sensitivity"], found["forgetting"], int(found["tasks"]))
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckError(f"importance {path} cannot be read ({error}); measure it again") from None


def choose(importance: Tensor, layers: int, heads: int) -> list[tuple[int, int]]:
    """The `layers` layers with the highest `sum_h I[l, h]`, then the `heads` heads with the highest I in them.

    Args:
        importance: `[n_layers, n_heads]`.

    Returns:
        `(layer, head)`, best first; of equals, the lower layer and head.

    Raises:
        InputError: a budget that the model does not have, or an importance that is not finite.
    """
    n_layers, n_heads = importance.shape
    if not 1 <= layers <= n_layers:
        raise InputError(f"a budget of {layers} layers; expected 1 to {n_layers}, the layers of the model")
    if not 1 <= heads <= layers * n_heads:
        raise InputError(f"a budget of {heads} heads; expected 1 to {layers * n_heads}, those of {layers} layers")
    if not importance.isfinite().all():
        raise InputError("the importance holds values that are not finite; measure it again")
    values = importance.double()
    best = values.sum(1).argsort(descending=True, stable=True)[:layers]
    within = torch.full_like(values, -torch.inf)
    within[best] = values[best]
    flat = within.flatten().argsort(descending=True, stable=True)[:heads]
    return [divmod(int(index), n_heads) for index in flat]
