"""Set before any library reads it: no network, no telemetry, no W&B server, no forked tokenizers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and a second thread only costs

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from transformers import PreTrainedTokenizerFast

from headtune.analysis.tasks.task import Task
from helpers import stock, tiny

# What takes longest begins first (`make` hands out whole files), so that no process ends long after the others.
FIRST = (
    "train/test_distributed.py",
    "faults",
    "cli/test_demo.py",
    "project/test_real_model.py",
    "cli/test_accelerate_launch.py",
    "train/export",
    "train/continual",
    "train/tracking",
)
_DRAWN = Figure.savefig


@pytest.hookimpl(tryfirst=True)  # before slow ones are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if "machine" in getattr(item, "fixturenames", ()):  # runs in processes of their own
            item.add_marker("slow")

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).as_posix() if item.path.is_relative_to(here) else ""
        return next((index for index, first in enumerate(FIRST) if name.startswith(first)), len(FIRST))

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_collected() -> None:
    """accelerate collects garbage after every training, through all modules that are loaded: 0.4 s for nothing."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _short_neutral_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_neutral_text(patch.setattr)
        yield


@pytest.fixture(scope="session", autouse=True)
def _pictures_are_blank() -> Iterator[None]:
    """Figures are made and not drawn: most pages are written by tests of something else. See `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _save_blank)
        yield


def _save_blank(figure: Figure, file: Any, **options: Any) -> None:
    Image.new("1", (1, 1)).save(file, format="png")


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn."""
    monkeypatch.setattr(Figure, "savefig", _DRAWN)


@pytest.fixture(scope="session", autouse=True)
def _exports_are_read_in_forks() -> Iterator[None]:
    with stock.forked() as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


@pytest.fixture
def new_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are read by an interpreter that is started for it, as they are by users."""
    monkeypatch.setattr(subprocess, "run", stock.RUN)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer. Treat it as read-only; ask `tiny.tiny_tokenizer()` for one to change."""
    return tiny.tiny_tokenizer()


@pytest.fixture
def cities() -> Task:
    """Eight subjects, six cities each, two given."""
    return tiny.tiny_task()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny llama and its tokenizer, for everything that takes a model by name. Read-only."""
    return tiny.save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")
