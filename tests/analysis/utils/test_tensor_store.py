"""Tensors on disk are whole, or absent, or said to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headtune.analysis.utils import tensor_store
from headtune.analysis.utils.tensor_store import DamagedFile, TensorStore, load_tensors, save_tensors


def test_a_file_comes_back_or_is_damaged(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", {"a": torch.rand(3, 4).T, "b": torch.tensor(2.5)}
    save_tensors(path, tensors)
    for name, tensor in load_tensors(path).items():
        assert tensor.shape == tensors[name].shape and torch.equal(tensor, tensors[name])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedFile, match=r"x\.safetensors is damaged \("):
        load_tensors(path)
    with pytest.raises(DamagedFile):
        load_tensors(tmp_path / "absent.safetensors")


def test_shards_are_checked_once_an_index_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 100)
    store, rows = TensorStore(tmp_path), torch.rand(4, 20)
    full = [store.add({str(index): row.clone()}) for index, row in enumerate(rows)]
    assert full == [False, True, True, True] and store.pending_bytes == rows.nbytes
    assert store.write() == "shard-00000.safetensors" and not store.pending
    store.add({"4": rows[0].clone()})
    assert store.write() == "shard-00001.safetensors"
    again = TensorStore(tmp_path, {"shard-00001.safetensors": store.checksums["shard-00001.safetensors"]})
    value = again.get("shard-00001.safetensors", "4")
    assert value is not None and torch.equal(value, rows[0])
    assert again.get("shard-00001.safetensors", "3") is None
    with pytest.raises(DamagedFile, match="shard-00000"):
        again.get("shard-00000.safetensors", "3")
    (tmp_path / "shard-00001.safetensors").write_bytes((tmp_path / "shard-00000.safetensors").read_bytes())
    with pytest.raises(DamagedFile, match="SHA-256"):
        TensorStore(tmp_path, again.checksums).get("shard-00001.safetensors", "4")
    again.add({"5": rows[1].clone()})
    assert again.write() == "shard-00002.safetensors"  # no name of an index is used twice
    with pytest.raises(DamagedFile, match=r"index\.json"):
        TensorStore(tmp_path, {"../shard-00000.safetensors": ""})


def test_a_temporary_store_leaves_nothing() -> None:
    store = TensorStore(None)
    assert store.folder is None
    store.add({"a": torch.ones(2)})
    store.write()
    assert store.folder is not None
    folder = store.folder
    assert folder.is_dir()
    store.close()
    assert not folder.exists()
