"""The typed blocks of a recipe: what each key may hold. No unknown keys, no conversion between types.

`headtune.train.config.recipe` reads them from YAML and says what is wrong; here is what a recipe can say. Heads,
penalties on heads and sequences of tasks have files of their own, and are found here as well.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .base import ChatConfig, LoraSizes, StrictConfig, chat_block
from .continual import DistilConfig, ReplayConfig, SeekrConfig
from .heads import (
    ControlConfig,
    FewShotConfig,
    FirstStageConfig,
    HeadsConfig,
    IdentifyConfig,
    InContextHeadsConfig,
    ProbeConfig,
    RandomConfig,
)
from .objective_registry import ObjectiveName
from .regularisers import (
    AnyRegulariser,
    AttentionKl,
    AttributionHinge,
    NegativeAttention,
    OutputDrift,
    PruneGates,
    Regulariser,
    WeightDrift,
)

__all__ = [  # of the files beside
    "AnyRegulariser",
    "AttentionKl",
    "AttributionHinge",
    "ControlConfig",
    "DistilConfig",
    "FirstStageConfig",
    "HeadsConfig",
    "IdentifyConfig",
    "InContextHeadsConfig",
    "LoraSizes",
    "NegativeAttention",
    "OutputDrift",
    "ProbeConfig",
    "PruneGates",
    "RandomConfig",
    "Regulariser",
    "ReplayConfig",
    "SeekrConfig",
    "StrictConfig",
    "WeightDrift",
]


class ModelConfig(StrictConfig):
    """Which model: a built-in name, a local folder or a hub id."""

    name: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False


class SplitConfig(StrictConfig):
    """How one task becomes train, validation and test; no subject is in two of them.

    `by: file` takes `train` and `eval` as they are, as published splits are, whose subjects may recur.
    """

    by: Literal["subject", "file"] = "subject"
    seed: int = 0


class StepConfig(StrictConfig):
    """One task of a sequence: a task to split by subject, or two to train on and to measure on."""

    train: str
    eval: str | None = None
    name: str | None = None


class MixConfig(StrictConfig):
    """One task of a mixture, whole: the mixture is split by subject. `weight` is its share of the training rows."""

    name: str
    weight: Annotated[float, Field(gt=0)] | None = None


class TaskConfig(StrictConfig):
    """What is learnt and what is measured. The same name twice is split by subject: train / test.

    `kind` says how answers are scored, where the task's own format does not. `sequence` lists the tasks of recipe seekr
    in the order they are learnt, and stands in place of `train` and `eval`; the limits then hold for each.
    `chat_template` gives the prompts as chats; where it is left out, tasks of `messages` are chats and others are not.
    `mix` lists tasks that are learnt together and stands in place of `train`: all rows of each, or, with weights, as
    many as can be had in these shares without taking one twice. `columns` says which columns of a file or of hub data
    hold prompt, subject and answers, where they have other names (see `headtune.analysis.tasks.columns`).
    `validation` names what evaluation during training measures, where it is not the validation part of `train`.
    """

    train: str = "one_to_many"
    eval: str | None = None
    validation: str | None = None
    mix: Annotated[list[MixConfig], Field(min_length=2)] | None = None
    columns: dict[str, str] | None = None
    sequence: Annotated[list[StepConfig], Field(min_length=2)] | None = None
    kind: Literal["lists", "exact_match", "multiple_choice"] | None = None
    chat_template: Annotated[
        ChatConfig | None, BeforeValidator(chat_block, json_schema_input_type=bool | ChatConfig | None)
    ] = None
    split: SplitConfig = SplitConfig()
    max_train_examples: Annotated[int, Field(ge=1)] | None = None
    max_eval_examples: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("mix"), list):
            if data.get("sequence") is not None or data.get("train") is not None:
                fix = "on the command line task='{mix: [...]}' replaces the whole block"
                raise ValueError(f"give one of train, mix and sequence; {fix}")
            parts = [{"name": part} if isinstance(part, str) else part for part in data["mix"]]
            names = [str(part.get("name")) for part in parts if isinstance(part, dict)]
            return data | {"mix": parts, "train": "+".join(names)}
        if isinstance(data, dict) and isinstance(data.get("sequence"), list):
            if data.get("train") is not None or data.get("eval") is not None:
                raise ValueError("give train (and eval), or a sequence of tasks, not both")
            steps = [{"train": step} if isinstance(step, str) else step for step in data["sequence"]]
            return {key: value for key, value in data.items() if key not in ("train", "eval")} | {"sequence": steps}
        return data


class AnswerSetConfig(StrictConfig):
    """The `answer_set` objective: see `headtune.train.losses.answer_set.answer_set`.

    Attributes:
        unlikelihood: weight of the term against previous answers.
        own_lists: share of the training prompts whose previous answers are what the base model itself wrote; the rest
            are the task's own prompts.
        own_items: how many items the base model writes on a prompt.
        retention: weight of the KL divergence to the base model at other positions of the same prompts; it is measured
            on a quarter of each batch.
        retention_positions: at how many positions, drawn anew at every step.
    """

    unlikelihood: Annotated[float, Field(ge=0)] = 1.0
    own_lists: Annotated[float, Field(ge=0, le=1)] = 0.5
    own_items: Annotated[int, Field(ge=1)] = 4
    retention: Annotated[float, Field(ge=0)] = 1.0
    retention_positions: Annotated[int, Field(ge=1)] = 8


class DpoConfig(StrictConfig):
    """Preference pairs: `one` a question (best answer, first incorrect one; as LoFiT publishes), or `all` of them."""

    pairs: Literal["one", "all"] = "one"


class ObjectiveConfig(StrictConfig):
    """What the training minimises, and whether what lies below the trained layers is run once and kept.

    Attributes:
        objective: `answer_set` (any answer not given yet), `sft` (cross-entropy on an answer), or `dpo` (preference of
            right over wrong answers; the reference is the model with the adapter switched off; beta is training.beta).
        prefix_cache: run the layers below the lowest trained one once per example (see
            `headtune.train.trainer.prefix_cache`); it switches itself off, with the reason, where it would
            change the result.
        prefix_memory_gb: what it may keep in memory; more goes to memory-mapped files in the run's folder.
        regularisers: penalties on heads that are added to the objective (see `headtune.train.losses.regularisers`).
    """

    objective: ObjectiveName = "answer_set"
    answer_set: AnswerSetConfig = AnswerSetConfig()
    dpo: DpoConfig = DpoConfig()
    prefix_cache: bool = True
    prefix_memory_gb: Annotated[float, Field(ge=0)] = 2.0
    regularisers: list[AnyRegulariser] = Field(default_factory=list)


class StartConfig(StrictConfig):
    """Offsets to start from: those of another run's adapter, such as one of steer."""

    source: str = Field(alias="from")


class LofitConfig(ObjectiveConfig):
    """The head adapter: scale and offset on chosen heads, everything else frozen.

    LoFiT as published trains offsets alone (`scale: none`, `init_std: 1e-3`) on the heads of its own first stage
    (`heads: {lofit: {...}}`). `select_only` stops after the choice of heads.

    Attributes:
        init_std: standard deviation of the first values; 0 starts at the base model.
        init: start the offsets at those of another run instead, which must have one for every head.
    """

    scale: Literal["none", "head", "vector"] = "vector"
    offset: bool = True
    init_std: Annotated[float, Field(ge=0)] = 0.0
    init: StartConfig | None = None
    select_only: bool = False


class JolaConfig(ObjectiveConfig):
    """JoLA: scale and offset with a HardConcrete gate on each, `z <- (1 + g2 a) z + g1 v`; chooses while it tunes.

    Its penalty, schedule, start and rate of the gates are not those of JoLA's authors: see recipes/jola/README.md.

    Attributes:
        l0: weight of the mean probability that a gate is open, in 0..1.
        l0_warmup: share of the steps over which that weight grows from 0.
        gate_learning_rate: of the gates' log alpha, which travels 4.8 from open to closed; the rest has the run's.
    """

    init_std: Annotated[float, Field(ge=0)] = 1e-3
    l0: Annotated[float, Field(ge=0)] = 1.0
    l0_warmup: Annotated[float, Field(ge=0, le=1)] = 0.2
    gate_learning_rate: Annotated[float, Field(gt=0)] = 0.2


class MaskedConfig(ObjectiveConfig):
    """Fine-tune the slices of W_Q, W_K, W_V, W_O that belong to chosen heads (K and V by KV group).

    Attributes:
        parts: which slices.
        rank: train `(alpha / rank) B A` for each slice instead of the whole slice; it exports as a stock LoRA.
        alpha: see rank.
        share: `head`: B for each head. `layer`: one B for the heads of a layer, with `parts: [o]` (HeadMap).
    """

    parts: Annotated[list[Literal["q", "k", "v", "o"]], Field(min_length=1)] = Field(default=["q", "k", "v", "o"])
    rank: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[int, Field(ge=1)] = 16
    share: Literal["head", "layer"] = "head"


class LoraConfig(LoraSizes, ObjectiveConfig):
    """LoRA on all linear layers, the baseline; `heads` is ignored by it and may be left out."""


class FullConfig(ObjectiveConfig):
    """Full fine-tuning, the upper baseline. `keep` writes the whole model to the run's `model/` folder."""

    keep: bool = True


class LnConfig(ObjectiveConfig):
    """Train the gains and biases of all norms (LN tuning, Zhao et al. 2023), a baseline of few parameters."""


class RegulariseConfig(ObjectiveConfig):
    """Train everything else while the heads of `heads` are held by `regularisers` (at least one).

    Attributes:
        tune: the whole model, or a LoRA.
        keep: write the whole model to the run's `model/` folder; a LoRA is kept as an adapter, and merged where heads
            were pruned.
    """

    tune: Literal["full", "lora"] = "full"
    lora: LoraSizes = LoraSizes()
    keep: bool = True


class ScaleConfig(StrictConfig):
    """No training: chosen heads multiplied by a factor."""

    kind: Literal["scale"] = "scale"
    factor: float = 1.25


class ItiConfig(StrictConfig):
    """No training: inference-time intervention, `z <- z + alpha * sigma * theta` with mass-mean directions."""

    kind: Literal["iti"]
    alpha: float = 15.0
    per_prompt: Annotated[int, Field(ge=1)] | None = None
    max_examples: Annotated[int, Field(ge=1)] | None = None


class InContextConfig(FewShotConfig):
    """No training: a few-shot prompt as offsets, `z <- z + factor * (mean z with examples - mean z without)`.

    The means are at the last token of the questions that the model solves with examples; the offset acts everywhere.
    """

    kind: Literal["in_context"]
    factor: float = 1.0


class SinkConfig(StrictConfig):
    """No training: last-layer heads that look at the first position more than `tau` are multiplied by `gamma`."""

    kind: Literal["sink"]
    tau: Annotated[float, Field(ge=0, le=1)] = 0.5
    gamma: Annotated[float, Field(ge=0)] = 0.5


class InterceptConfig(StrictConfig):
    """No training: the last MLP's intercept is taken away, `M <- M - beta * b`, fitted on the prompts of `fit`."""

    kind: Literal["intercept"]
    beta: float = 1.0
    fit: str | None = None


STEERING: dict[str, type[StrictConfig]] = {
    "scale": ScaleConfig,
    "iti": ItiConfig,
    "in_context": InContextConfig,
    "sink": SinkConfig,
    "intercept": InterceptConfig,
}


class EvaluationConfig(StrictConfig):
    """How the model is measured.

    Attributes:
        n_items: list items scored per prompt.
        batch_size: prompts generated together.
        preamble: text before multiple-choice questions: none, or the six questions and answers that the usual
            TruthfulQA evaluation puts there.
        scoring: of multiple choice: as lm-evaluation-harness, or as ITI and LoFiT (iti: an instruction and the six
            questions before each prompt, a full stop behind every choice, a tie is lost).
        before: evaluation.json of another run, whose measurement of the same base model on the same prompts is taken
            over instead of being repeated.
        general: tasks measured besides, before and after a sequence: what the model could do anyway.
    """

    n_items: Annotated[int, Field(ge=1)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 16
    preamble: Literal["none", "truthfulqa"] = "none"
    scoring: Literal["harness", "iti"] = "harness"
    before: str | None = None
    general: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_preamble(self) -> EvaluationConfig:
        if self.scoring == "iti" and self.preamble != "none":
            raise ValueError("scoring iti puts an instruction and the six questions before prompts; leave preamble out")
        return self


class TrackingConfig(StrictConfig):
    """Where the run is filed. `wandb`: online, offline, disabled, or null to use W&B where a key is present.

    `report_to`: trackers that get the numbers as well, whose packages have to be installed.
    """

    project: str = "headtune"
    group: str | None = None
    tags: list[str] = Field(default_factory=list)
    wandb: Literal["online", "offline", "disabled"] | None = None
    report_to: list[Literal["tensorboard", "trackio", "mlflow"]] = Field(default_factory=list)

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if twice := [name for name in value if value.count(name) > 1]:
            raise ValueError(f"{twice[0]} is named twice; name each tracker once")
        return value
