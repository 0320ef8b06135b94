"""A model's attention and logits on rows of text, put into a teacher store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import InputError
from headtune.train.losses.attention_distillation import RowRecorder
from headtune.train.losses.label_logits import label_mask, positions_only
from headtune.train.trainer.rows import TrainingRow, filled, padded

from .teacher_store import TeacherStore
from .teachers import Heads, Teacher, by_layer, pairs_of


@torch.no_grad()
def compute_teacher(
    model: HeadModel,
    rows: Sequence[TrainingRow],
    heads: Heads,
    positions: Mapping[str, Sequence[int]],
    store: TeacherStore,
    batch_size: int,
) -> int:
    """Store what the model, as it is now, says about rows of text; returns how many rows were computed.

    A key that the store has keeps its positions, its logits and the rows that it has: only heads that it lacks are
    added, from the model as it is now, and nothing is run where it lacks none. The model is run in eval mode and left
    as it was found.

    Args:
        heads: layer -> query heads; empty: logits alone are kept.
        positions: key -> sorted query positions (see `query_positions`); not needed without heads.

    Raises:
        InputError: a row without positions, or of others than the store has for its key.
        CheckError: see `RowRecorder.record` and `TeacherStore.put`.
    """
    requested = set(pairs_of(heads))
    lacking: dict[str, dict[int, list[int]]] = {}
    for row in rows:
        queries = list(positions.get(row.key, []))
        if requested and not queries:
            raise InputError(f"row {row.key!r} has no query positions; give some for every row")
        if requested and row.key in store and store.positions(row.key) != queries:
            raise InputError(f"row {row.key!r}: the store has other query positions; give those, or another store")
        lacking[row.key] = by_layer(requested - set(store.heads(row.key) if row.key in store else []))
    todo = {row.key for row in rows if row.key not in store or lacking[row.key]}
    # Rows of about one length share a batch, so that little of it is padding. Batches are those of all rows, whatever
    # is there already: the last bits of a row depend on its batch, and a broken run is to end as an unbroken one.
    ordered = sorted(rows, key=lambda row: row.length)
    with model.measuring():
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            if any(row.key in todo for row in batch):
                _teach(model, batch, todo, lacking, positions, store)
    store.flush()
    return len(todo)


def _teach(
    model: HeadModel,
    rows: Sequence[TrainingRow],
    todo: set[str],
    lacking: Mapping[str, dict[int, list[int]]],
    positions: Mapping[str, Sequence[int]],
    store: TeacherStore,
) -> None:
    """One batch; what is kept is that of the rows of `todo`."""
    recorder = RowRecorder(by_layer({pair for row in rows for pair in pairs_of(lacking[row.key])}))
    queries = [list(positions.get(row.key, [])) for row in rows]
    inputs = padded(rows, 0, model.device)
    mask = label_mask(inputs.pop("labels"))
    with recorder.record(filled(queries, -1)) as recorded, positions_only(model.hf, mask):
        logits = model.hf(**inputs, use_cache=False).logits[0].float()
    for at, (row, row_queries, row_logits) in enumerate(
        zip(rows, queries, logits.split(mask.sum(1).tolist()), strict=True)
    ):
        if row.key not in todo:
            continue
        attention = {}
        for layer, chosen in lacking[row.key].items():
            places = [recorder.heads[layer].index(head) for head in chosen]
            attention[layer] = recorded[layer][at, places, : len(row_queries), : row_queries[-1] + 1].exp()
        if row.key in store:
            store.add_heads(row.key, lacking[row.key], attention)
        else:
            store.put(row.key, Teacher(row_queries, lacking[row.key], attention, row_logits))
