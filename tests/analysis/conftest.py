"""The model that most tests of the analysis look at."""

import pytest

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from helpers.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def llama() -> HeadModel:
    """A tiny llama with grouped heads. What changes it puts it right again."""
    return wrap_model(tiny_model("llama", num_key_value_heads=2), tiny_tokenizer(), "tiny llama")
