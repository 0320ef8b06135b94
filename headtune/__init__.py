"""Find the attention heads that recall and the heads that suppress, prove it causally, and tune exactly those.

    from headtune import HeadTuningConfig, identify, load_model, load_task

    model = load_model("smollm2-135m")
    result = identify(model, load_task("country_cities:train"))
    result.save("runs/heads")

The names below are the stable ones. Each is imported from its room when it is used, so that `import headtune` loads
neither torch nor anything else that takes time; it does make the adapters known to PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headtune.peft_types import register as _register

if TYPE_CHECKING:
    from headtune.analysis.heads.head_set import HeadSet as HeadSet
    from headtune.analysis.identify.pipeline import identify as identify
    from headtune.analysis.methods.registry import register_scoring_method as register_scoring_method
    from headtune.analysis.methods.registry import score as score
    from headtune.analysis.models.head_model import HeadModel as HeadModel
    from headtune.analysis.models.loading import load_model as load_model
    from headtune.analysis.tasks.generators.make import make_task as make_task
    from headtune.analysis.tasks.loading import load_task as load_task
    from headtune.analysis.tasks.messages import ChatTemplate as ChatTemplate
    from headtune.analysis.utils.errors import CheckError as CheckError
    from headtune.analysis.utils.errors import InputError as InputError
    from headtune.train.config.method_registry import register_tuning_method as register_tuning_method
    from headtune.train.config.objective_registry import register_objective as register_objective
    from headtune.train.config.recipe import load_recipe as load_recipe
    from headtune.train.config.regularisers import Regulariser as Regulariser
    from headtune.train.evaluation.compare import compare_runs as compare_runs
    from headtune.train.evaluation.evaluate import evaluate as evaluate
    from headtune.train.export.adapter_folder import export_adapter_folder as export_adapter_folder
    from headtune.train.export.checkpoint import export_run as export_run
    from headtune.train.losses.registry import HeadPenalty as HeadPenalty
    from headtune.train.losses.registry import register_regulariser as register_regulariser
    from headtune.train.methods.base import TuningMethod as TuningMethod
    from headtune.train.runs.load_run import load_run as load_run
    from headtune.train.runs.run import run_recipe as run_recipe
    from headtune.train.trainer.head_regulariser import HeadRegulariserMixin as HeadRegulariserMixin
    from headtune.train.trainer.objectives import TrainingObjective as TrainingObjective
    from headtune.train.tuners.head_slices import HeadSlicesConfig as HeadSlicesConfig
    from headtune.train.tuners.head_tuning import HeadTuningConfig as HeadTuningConfig

# Where each name is.
_ROOMS = {
    "load_model": "analysis.models.loading",
    "load_task": "analysis.tasks.loading",
    "make_task": "analysis.tasks.generators.make",
    "ChatTemplate": "analysis.tasks.messages",
    "score": "analysis.methods.registry",
    "identify": "analysis.identify.pipeline",
    "HeadModel": "analysis.models.head_model",
    "HeadSet": "analysis.heads.head_set",
    "HeadTuningConfig": "train.tuners.head_tuning",
    "HeadSlicesConfig": "train.tuners.head_slices",
    "load_recipe": "train.config.recipe",
    "run_recipe": "train.runs.run",
    "evaluate": "train.evaluation.evaluate",
    "load_run": "train.runs.load_run",
    "export_run": "train.export.checkpoint",
    "export_adapter_folder": "train.export.adapter_folder",
    "compare_runs": "train.evaluation.compare",
    "register_scoring_method": "analysis.methods.registry",
    "register_tuning_method": "train.config.method_registry",
    "TuningMethod": "train.methods.base",
    "register_objective": "train.config.objective_registry",
    "TrainingObjective": "train.trainer.objectives",
    "register_regulariser": "train.losses.registry",
    "Regulariser": "train.config.regularisers",
    "HeadPenalty": "train.losses.registry",
    "HeadRegulariserMixin": "train.trainer.head_regulariser",
    "InputError": "analysis.utils.errors",
    "CheckError": "analysis.utils.errors",
}
__all__ = list(_ROOMS)

_register()


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'headtune' has no attribute {name!r}; it has {', '.join(_ROOMS)}")
    value = globals()[name] = getattr(importlib.import_module(f"headtune.{_ROOMS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
