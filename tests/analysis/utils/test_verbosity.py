"""A run started from Python says nothing by itself, and leaves warnings and bars as it found them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from datasets.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from headtune.analysis.utils.verbosity import silence_libraries
from helpers.small_runs import write_recipe

FROM_PYTHON = """
import sys
from pathlib import Path
import headtune
headtune.run_recipe(headtune.load_recipe(sys.argv[1]))
headtune.export_run(Path(sys.argv[2]), Path(sys.argv[3]), n_prompts=1)
"""


@pytest.mark.slow
def test_a_run_and_an_export_from_python_are_silent(tmp_path: Path, tiny_llama: Path) -> None:
    path = write_recipe(tmp_path, tiny_llama)
    command = [sys.executable, "-c", FROM_PYTHON, str(path), str(tmp_path / "run"), str(tmp_path / "out")]
    environment = {
        key: value for key, value in os.environ.items() if key not in {"TRANSFORMERS_VERBOSITY", "WANDB_MODE"}
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_libraries_speak_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setattr(sys, "warnoptions", [])

    def loudness() -> tuple[int, bool, bool, int]:
        bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
        return transformers_logging.get_verbosity(), *bars, len(warnings.filters)

    before = loudness()
    with silence_libraries():
        assert loudness()[:3] == (transformers_logging.ERROR, False, False)
        with warnings.catch_warnings(record=True) as heard:
            warnings.warn("of their own code", FutureWarning, stacklevel=1)
            warnings.warn("of the user's", UserWarning, stacklevel=1)
        assert [str(warning.message) for warning in heard] == ["of the user's"]
    assert loudness() == before


def test_what_the_user_asks_to_hear_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    before = transformers_logging.get_verbosity()
    with silence_libraries(), warnings.catch_warnings(record=True) as heard:
        assert transformers_logging.get_verbosity() == before
        warnings.warn("of their own code", FutureWarning, stacklevel=1)
    assert len(heard) == 1
