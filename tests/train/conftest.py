"""The model folder that most runs start from."""

from pathlib import Path

import pytest

from helpers.tiny import save_tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny llama with grouped heads. Read-only."""
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama", num_key_value_heads=2)
