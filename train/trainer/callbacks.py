"""What is noted and told while a trainer trains."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from transformers import TrainerCallback

from headtune.analysis.utils.errors import CheckError
from headtune.analysis.utils.progress import Notify


class Timer(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def summary(self) -> dict[str, float]:
        if not self.seconds:
            return {}
        return {"seconds_per_step": statistics.median(self.seconds), "seconds": sum(self.seconds)}


def progress_logger(notify: Notify) -> TrainerCallback:
    """Tells how the training goes, at every logging step, and stops it where the loss is no number any more."""

    class ProgressLogger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                # In fp16 a gradient beyond the numbers is skipped by the scaler, and no sign of anything.
                for what, key in (("loss", "loss"), *(() if args.fp16 else (("norm of the gradient", "grad_norm"),))):
                    if not math.isfinite(float(logs.get(key, 0.0))):
                        untrained = "; or use bfloat16 or float32: no weight has changed yet"
                        raise CheckError(
                            f"the {what} is {logs[key]} at step {state.global_step}; lower training.learning_rate "
                            f"(it was {logs.get('learning_rate')}){untrained if state.global_step == 1 else ''}"
                        )
                parts = [f"{name} {float(value):.4g}" for name, value in logs.items() if name not in _LEFT_OUT]
                notify(f"step {state.global_step}/{state.max_steps}: " + ", ".join(parts))

    return ProgressLogger()


_LEFT_OUT = {"epoch", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy"}
_LEFT_OUT |= {f"{part}/{which}" for part in ("logps", "logits") for which in ("chosen", "rejected")}
