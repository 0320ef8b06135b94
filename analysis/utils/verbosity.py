"""How much is heard of the libraries below headtune: their progress bars, and their advice to their own developers.

The command line calls `set_verbosity` before anything heavy is imported and `silence_model_libraries` in the commands
that load a model; what is started from Python runs inside `silence_libraries`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def set_verbosity(quiet: bool = False, verbose: bool = False) -> None:
    """Set how much this process says, by headtune's logger; the libraries' telemetry and advice is off."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The level is what `console` and `silence_model_libraries` look at; without either option the latter sets it.
    logging.getLogger("headtune").setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.NOTSET)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        _ignore_developers_warnings()


def silence_model_libraries() -> None:
    """Silence what only commands that load a model import; under --verbose the libraries warn and show their bars."""
    # Not at the top: --help and --version import this module, and torch and transformers take seconds.
    import transformers

    if _without_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ.get("WANDB_MODE") == "offline":  # transformers prints so on import, into what --json prints
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("transformers.integrations.integration_utils")
    logger = logging.getLogger("headtune")
    if logger.level == logging.DEBUG:
        transformers.utils.logging.set_verbosity_warning()
        transformers.utils.logging.enable_progress_bar()
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Within it, no progress bars of transformers and datasets, and neither their advice nor torch's on their own code.

    All is as before afterwards. What the user asks to hear is heard: warnings with `python -W` or PYTHONWARNINGS, the
    library's log with TRANSFORMERS_VERBOSITY, everything with `--verbose` (headtune's logger at DEBUG).
    """
    # Not at the top: see silence_model_libraries.
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    with contextlib.ExitStack() as stack:
        if _without_gpu() and "DS_ACCELERATOR" not in os.environ:
            os.environ["DS_ACCELERATOR"] = "cpu"
            stack.callback(os.environ.pop, "DS_ACCELERATOR", None)
        if logging.getLogger("headtune").level == logging.DEBUG:
            yield
            return
        if not sys.warnoptions:
            stack.enter_context(warnings.catch_warnings())
            _ignore_developers_warnings()
        if "TRANSFORMERS_VERBOSITY" not in os.environ:
            stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
            transformers_logging.set_verbosity_error()
        if transformers_logging.is_progress_bar_enabled():
            stack.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()
        if not are_progress_bars_disabled():
            stack.callback(enable_progress_bars)
            disable_progress_bars()
        yield


def _ignore_developers_warnings() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def _without_gpu() -> bool:
    """Where DeepSpeed, once imported, would warn that it has to guess."""
    import torch

    return not torch.cuda.is_available()
