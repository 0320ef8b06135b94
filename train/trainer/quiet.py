"""Keep what the libraries say to their own developers out of a run that is started from Python."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Within it, no progress bars of transformers and datasets, and neither their advice nor torch's on their own code.

    All is as before afterwards. What the user asks to hear is heard: warnings with `python -W` or PYTHONWARNINGS, the
    library's log with TRANSFORMERS_VERBOSITY, everything with `--verbose` (headtune's logger at DEBUG).
    """
    with ExitStack() as stack:
        if not (torch.cuda.is_available() or "DS_ACCELERATOR" in os.environ):
            # DeepSpeed, once imported, would warn of having to guess.
            os.environ["DS_ACCELERATOR"] = "cpu"
            stack.callback(os.environ.pop, "DS_ACCELERATOR", None)
        if logging.getLogger("headtune").level == logging.DEBUG:
            yield
            return
        if not sys.warnoptions:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")
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
