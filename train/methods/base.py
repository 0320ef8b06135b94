"""What a tuning method brings: everything that depends on which one a recipe names.

A method needs a `name`, a `config`, and `peft_config`; all else has defaults. Decorate the class with
`register_tuning_method`. `docs/howto/plugins.md` has an example.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import atomic_folder
from headtune.train.config.method_registry import MethodRules, method_rules
from headtune.train.memory.estimate import Objective, Setup
from headtune.train.memory.model_shape import Shape, Trained

if TYPE_CHECKING:  # they load PyTorch, which reading a recipe does not need
    from peft import PeftConfig

    from headtune.analysis.identify.pipeline import Progress
    from headtune.analysis.models.head_model import HeadModel
    from headtune.analysis.tasks.task import Task
    from headtune.train.config.resolve_heads import ResolvedHeads
    from headtune.train.config.schema import Recipe
    from headtune.train.types import Penalty

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ComputedModel:
    """A model that was changed without training.

    Attributes:
        model: with the adapter.
        pairs: the heads that it changes.
        note: JSON-able, what was computed; run.json holds it as `steering`.
    """

    model: Any
    pairs: list[tuple[int, int]]
    note: dict[str, Any]


class TuningMethod(MethodRules):
    """A way of tuning a model."""

    def require_usable(self, recipe: Recipe, model: HeadModel, train: Task, pairs: Pairs | None) -> None:
        """Refuse what does not fit the model or the task, before anything is written (InputError).

        Args:
            pairs: the heads; None where the run has yet to choose them.
        """

    # --- training -----------------------------------------------------------------------------------------------------

    def peft_config(self, config: Any, pairs: Pairs, model: Any) -> PeftConfig | None:
        """PEFT's configuration of the adapter that is trained; None trains all of the model's weights."""
        raise NotImplementedError(f"tuning method {self.name} has no peft_config")

    def set_start(self, config: Any, model: HeadModel, adapted: Any) -> None:
        """Change the first values of what is trained, which PEFT has made already."""

    def penalty(self, config: Any) -> Penalty | None:
        """A term of the loss that belongs to the method."""
        return None

    def learning_rates(self, config: Any) -> dict[str, float]:
        """Rates that differ from the run's, by a part of the parameters' names."""
        return {}

    def heads_after(
        self, recipe: Recipe, model: HeadModel, trained: Any, resolved: ResolvedHeads, data: dict[str, Any]
    ) -> ResolvedHeads | None:
        """The heads that the training itself chose, which become the run's heads.json; None where it chooses none.

        Args:
            data: the training data, as run.json describes it.
        """
        return None

    def compute(
        self, config: Any, model: HeadModel, resolved: ResolvedHeads, task: Task, seed: int, progress: Progress
    ) -> ComputedModel:
        """The changed model of a method that does not train."""
        raise NotImplementedError(f"tuning method {self.name} trains nothing and has no compute")

    # --- what is kept -------------------------------------------------------------------------------------------------

    def keeps_model(self, config: Any) -> bool:
        """Whether a model without an adapter is written to the run's `model/`."""
        return getattr(config, "keep", True) not in (False, "none")

    def save(self, config: Any, trained: Any, tokenizer: Any, folder: Path) -> None:
        """Write what was trained, for `load_run`: an adapter to `adapter/`, a whole model to `model/`."""
        from peft import PeftModel

        from headtune.train.tuners import weights_io

        adapter = isinstance(trained, PeftModel)
        if not adapter and not self.keeps_model(config):
            return
        target = folder / ("adapter" if adapter else "model")
        shutil.rmtree(target, ignore_errors=True)
        with atomic_folder(target) as temporary:
            weights_io.write(trained, temporary)
            if not adapter:
                tokenizer.save_pretrained(str(temporary))

    def why_no_model(self, config: Any, folder: Path) -> str | None:
        """Why a finished run holds no model, and what to do; None where it should hold one."""
        if self.keeps_model(config):
            return None
        return f"run {str(folder)!r} did not keep its model; run it again with method.keep=true"

    def carries_offsets(self, config: Any) -> frozenset[str]:
        """Which output projections get a bias when the adapter is merged: of `attention`, of the `mlp`, or none."""
        return frozenset()

    def has_stock_lora(self, config: Any) -> bool:
        """Whether the adapter is head slices of low rank, which `headtune export --adapter` writes as PEFT's LoRA."""
        return False

    # --- memory -------------------------------------------------------------------------------------------------------

    def trained_weights(self, config: Any, shape: Shape, pairs: Pairs) -> Trained:
        """What is trained of a model of this shape, for `headtune plan`."""
        raise InputError(f"recipe {self.name!r} has no plan; a tuning method has one where it defines trained_weights")

    def objective(self, recipe: Recipe, trained: Trained, setup: Setup, pairs: Pairs | None) -> Objective:
        """What the loss looks at. `pairs`: the recipe's heads, None where it names none."""
        method: Any = recipe.method
        compares = [t for t in method.regularisers if t.kind in ("attention_kl", "output_drift", "attribution_hinge")]
        copies = int(trained.kind == "full" and (method.objective == "dpo" or bool(compares)))
        columns = method.answer_set.retention_positions if method.objective == "answer_set" else 0
        columns = columns if columns and method.answer_set.retention else 0
        return Objective(method.objective, copies, columns=columns)

    def stored_bytes(self, recipe: Recipe, shape: Shape, setup: Setup, rows: int, pairs: Pairs | None) -> int:
        """Bytes on disk that the training reads again, besides checkpoints and the prefix cache."""
        return 0


def method_named(name: str) -> TuningMethod:
    """A tuning method by the name that `recipe:` says."""
    method = method_rules(name)
    if not isinstance(method, TuningMethod):
        raise InputError(f"tuning method {name!r} is no subclass of headtune.train.methods.base.TuningMethod")
    return method


def as_lists(pairs: Pairs) -> list[list[int]]:
    """Heads as a PEFT configuration keeps them."""
    return [list(pair) for pair in pairs]
