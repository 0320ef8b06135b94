"""The whole recipe, typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, SerializeAsAny

from .method_registry import method_rules, tuning_method_names
from .methods import EvaluationConfig, HeadsConfig, ModelConfig, StrictConfig, TaskConfig, TrackingConfig


def _names_in_schema(schema: dict[str, Any]) -> None:
    schema["enum"] = tuning_method_names()


class _ConfigsInSchema:
    """The JSON schema of `method:`: that of any method's config."""

    def __get_pydantic_json_schema__(self, _schema: Any, handler: Any) -> dict[str, Any]:
        rules = [method_rules(name) for name in tuning_method_names()]
        configs = [config for each in rules for config in (each.kinds.values() or [each.config])]
        return {"anyOf": [handler(config.__pydantic_core_schema__) for config in configs]}


class Recipe(StrictConfig):
    """A whole recipe. `method` is the block of the family named by `recipe`.

    Attributes:
        plugins: modules outside of headtune that the recipe needs, which --plugin or an import has loaded before.
    """

    recipe: Annotated[str, Field(json_schema_extra=_names_in_schema)]
    model: ModelConfig = ModelConfig()
    heads: HeadsConfig | None = None
    task: TaskConfig = TaskConfig()
    method: Annotated[SerializeAsAny[Any], _ConfigsInSchema()]  # the method's config, see `method_registry`
    training: dict[str, Any] = Field(default_factory=dict)
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    plugins: list[str] = Field(default_factory=list)
    name: str = ""
    output_dir: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what numpy takes

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def dump(self) -> dict[str, Any]:
        """As written to the run: every default spelt out."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if not self.plugins:
            del data["plugins"]
        if self.task.sequence is not None or self.task.mix is not None:
            del data["task"]["train"]  # the sequence or mixture stands in its place
        method_rules(self.recipe).drop_unread(self.method, self.heads is not None, data["method"])
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)
