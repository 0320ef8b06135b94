"""How far learning a task moves each head's attention: F of SEEKR's importance (see `importance`).

F[l, h] = mean over rows of ||A[l, h] after - A[l, h] before||_F
A = softmax(q k^T ...)             from queries and keys, which grow linearly with the row

before = snapshot_attention(model, rows)        # the model that is about to learn the task
...                                             # it learns, in place
moved = measure_forgetting(model, rows, before)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headtune.analysis.models.attention import AttentionCall, head_log_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import atomic_folder, require_new_folder
from headtune.analysis.utils.progress import Progress, silent

from .attention_entries import TokenRow, batches, call_of_example, query_blocks, require_finite, require_rows, run_rows


@dataclass(frozen=True)
class AttentionSnapshot:
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
def snapshot_attention(
    model: HeadModel,
    rows: Sequence[TokenRow],
    folder: Path | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> AttentionSnapshot:
    """Keep what the model's attention on these rows is made from, for `measure_forgetting` once it has changed.

    `(n_heads + n_kv_heads) * head_dim` numbers a layer and token: on SmolLM2-135M 90 KiB a token in float32.

    Args:
        folder: a new folder to keep it in, whole or absent, which `AttentionSnapshot(folder=...)` opens again; None: in
            main memory.

    Raises:
        InputError: no rows, or the folder exists.
    """
    require_rows(rows)
    if folder is None:
        return AttentionSnapshot(memory=tuple(_queries_and_keys(model, rows, batch_size, progress)))
    require_new_folder(folder, "give a new one, or open it with AttentionSnapshot(folder=...)")
    with atomic_folder(folder) as temporary:
        for index, tensors in enumerate(_queries_and_keys(model, rows, batch_size, progress)):
            save_file(tensors, _row_path(temporary, index))
    return AttentionSnapshot(folder=folder)


def _queries_and_keys(
    model: HeadModel, rows: Sequence[TokenRow], batch_size: int, progress: Progress
) -> Iterator[dict[str, Tensor]]:
    """What `AttentionSnapshot` holds of each row, in order."""
    for batch in progress(batches(rows, batch_size), "remembering attention"):
        batch_tensors = [{"tokens": torch.tensor(row["input_ids"])} for row in batch]
        run_rows(model, batch, _recording(batch_tensors))
        yield from batch_tensors


def _recording(batch_tensors: Sequence[dict[str, Tensor]]) -> Callable[[AttentionCall], None]:
    def look(call: AttentionCall) -> None:
        for example, tensors in enumerate(batch_tensors):
            part = call_of_example(call, example, len(tensors["tokens"]))
            for name, tensor in (("query", part.query), ("key", part.key)):
                tensors[f"{call.layer}.{name}"] = tensor[0].cpu().clone(memory_format=torch.contiguous_format)

    return look


@torch.no_grad()
def measure_forgetting(
    model: HeadModel,
    rows: Sequence[TokenRow],
    before: AttentionSnapshot,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Tensor:
    """`F[l, h] = mean over rows of ||A[l, h] - A_before[l, h]||_F`, with A the attention of the model as it is now.

    Args:
        rows: the rows that were remembered, in their order.
        before: what `snapshot_attention` kept of the same model, with the weights it had then.

    Returns:
        `[n_layers, n_heads]` float32 on the CPU, never negative.

    Raises:
        InputError: no rows, or others than those remembered.
        CheckError: what was remembered is damaged or of another model, or a value is not finite.
    """
    require_rows(rows)
    if len(before) != len(rows):
        raise InputError(f"{len(before)} rows were remembered and {len(rows)} are given; give the same rows")
    for index, row in enumerate(rows):
        if before.get(index, "tokens").tolist() != list(row["input_ids"]):
            raise InputError(f"row {index} is not the one that was remembered; give the same rows in the same order")
    total = torch.zeros(model.n_layers, model.n_heads, dtype=torch.float64)
    done = 0
    for batch in progress(batches(rows, batch_size), "forgetting"):
        run_rows(model, batch, _comparing(batch, before, done, total))
        done += len(batch)
    return require_finite(total / len(rows), "forgetting")


def _comparing(
    batch: Sequence[TokenRow], before: AttentionSnapshot, first: int, total: Tensor
) -> Callable[[AttentionCall], None]:
    """Add the distances of a batch, whose rows were remembered from `first` on, to `total`."""

    def look(call: AttentionCall) -> None:
        for example, row in enumerate(batch):
            then = (before.get(first + example, f"{call.layer}.{name}") for name in ("query", "key"))
            total[call.layer] += _difference_square(call_of_example(call, example, len(row["input_ids"])), *then).sqrt()

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
    for start, stop in query_blocks(call.query.shape[2], n_heads):
        positions = torch.arange(start, stop, device=call.query.device)[None]
        one, other = (
            head_log_rows(call_of_example(which, 0, stop), range(n_heads), positions).exp_() for which in (call, then)
        )
        square += one.sub_(other).square_().sum((0, 2, 3)).double().cpu()
    return square
