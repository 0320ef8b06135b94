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
    """Tells how the training goes, and how long it takes yet, at every logging step; stops it where the loss is no
    number any more."""

    class ProgressLogger(TrainerCallback):
        start, first = time.monotonic(), 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start, self.first = time.monotonic(), state.global_step  # a resumed run does not begin at 0

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
                parts = [
                    f"{_PRINTED.get(name, name)} {float(value):.4g}"
                    for name, value in logs.items()
                    if name not in _LEFT_OUT
                ]
                done, more = state.global_step - self.first, state.max_steps - state.global_step
                if done > 0 and more > 0:
                    parts.append(f"about {in_words((time.monotonic() - self.start) / done * more)} left")
                notify(f"step {state.global_step}/{state.max_steps}: " + ", ".join(parts))

    return ProgressLogger()


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


# Parts of the loss with the names of what they train, which are no rates of it: the files keep the short names.
_PRINTED = {"recall": "recall loss", "suppression": "suppression loss"}
_LEFT_OUT = {"epoch", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy"}
_LEFT_OUT |= {f"{part}/{which}" for part in ("logps", "logits") for which in ("chosen", "rejected")}
