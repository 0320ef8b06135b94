"""The typed blocks of a recipe: what each key may hold. No unknown keys, no conversion between types.

`headtune.train.recipe` reads them from YAML and says what is wrong; here is what a recipe can say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Block(BaseModel):
    """A part of a recipe: no unknown keys, no conversion between types, no NaN or infinity, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


class ModelBlock(Block):
    """Which model: a built-in name, a local folder or a hub id."""

    name: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False


class IdentifyBlock(Block):
    """Find the heads first, on the training task."""

    method: str = "all"
    max_examples: Annotated[int, Field(ge=1)] | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        from ..analysis.methods import chosen

        chosen(value)
        return value


class SelectBlock(Block):
    """LoFiT's first stage (Yin et al. 2024, section 3): train a scale on *every* head, rank heads by its size.

        z <- (1 + A) * z,  A ~ N(0, init_std),  minimise  loss + l1 * sum |A|;  score of a head = ||A_h||_2

    The rest of `training` (batch, epochs, schedule) and the objective are the recipe's own. A is thrown away.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    l1: Annotated[float, Field(ge=0)] = 5e-4
    init_std: Annotated[float, Field(ge=0)] = 1e-3
    max_steps: Annotated[int, Field(ge=1)] | None = None


class ProbeBlock(Block):
    """Rank heads by how well a linear probe on their output tells right answers from wrong ones (ITI).

    `per_prompt` draws so many right and so many wrong answers a prompt; null takes all.
    """

    folds: Annotated[int, Field(ge=2)] = 5
    per_prompt: Annotated[int, Field(ge=1)] | None = None
    max_examples: Annotated[int, Field(ge=1)] | None = None


class RandomBlock(Block):
    """Random heads, as many in each layer as the heads chosen from `like` with this block's role and top."""

    like: str
    seed: int = 0


class HeadsBlock(Block):
    """Which heads: exactly one of `from`, `identify`, `lofit`, `probe`, `random`, `all`, `list`.

    `role` and `top` choose from a head set; `both` takes the top recall and the top suppression heads. What `lofit`,
    `probe` and JoLA's gates choose has the role `selected`.
    """

    source: str | None = Field(None, alias="from")
    identify: IdentifyBlock | None = None
    lofit: SelectBlock | None = None
    probe: ProbeBlock | None = None
    random: RandomBlock | None = None
    every: Literal[True] | None = Field(None, alias="all")
    pairs: Annotated[list[tuple[int, int]], Field(min_length=1)] | None = Field(None, alias="list")
    role: Literal["recall", "suppression", "both", "selected"] = "both"
    top: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, data: Any) -> Any:
        # YAML and JSON have no tuples; strict mode would refuse their lists.
        if isinstance(data, dict) and isinstance(data.get("list"), list):
            data = data | {"list": [tuple(pair) if isinstance(pair, list) else pair for pair in data["list"]]}
        return data

    @model_validator(mode="after")
    def _one_source(self) -> HeadsBlock:
        sources = {
            "from": self.source,
            "identify": self.identify,
            "lofit": self.lofit,
            "probe": self.probe,
            "random": self.random,
            "all": self.every,
            "list": self.pairs,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise ValueError(f"give exactly one of {', '.join(sources)} (found: {names})")
        return self

    @property
    def learnt(self) -> bool:
        """The heads come out of this run's own first stage."""
        return self.lofit is not None or self.probe is not None


class SplitBlock(Block):
    """How one task becomes train, validation and test; no subject is in two of them.

    `by: file` takes `train` and `eval` as they are, as published splits are, whose subjects may recur.
    """

    by: Literal["subject", "file"] = "subject"
    seed: int = 0


class StepBlock(Block):
    """One task of a sequence: a task to split by subject, or two to train on and to measure on."""

    train: str
    eval: str | None = None
    name: str | None = None


class TaskBlock(Block):
    """What is learnt and what is measured. The same name twice is split by subject: train / test.

    `kind` says how answers are scored, where the task's own format does not. `sequence` lists the tasks of recipe seekr
    in the order they are learnt, and stands in place of `train` and `eval`; the limits then hold for each.
    """

    train: str = "one_to_many"
    eval: str | None = None
    sequence: Annotated[list[StepBlock], Field(min_length=2)] | None = None
    kind: Literal["lists", "exact_match", "multiple_choice"] | None = None
    split: SplitBlock = SplitBlock()
    max_train_examples: Annotated[int, Field(ge=1)] | None = None
    max_eval_examples: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("sequence"), list):
            if data.get("train") is not None or data.get("eval") is not None:
                raise ValueError("give train (and eval), or a sequence of tasks, not both")
            steps = [{"train": step} if isinstance(step, str) else step for step in data["sequence"]]
            return {key: value for key, value in data.items() if key not in ("train", "eval")} | {"sequence": steps}
        return data


class AnswerSetBlock(Block):
    """The `answer_set` objective: see `headtune.train.objectives.answer_set`.

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


class Regulariser(Block):
    """What all penalties on heads have.

    Attributes:
        weight: of the term in the loss.
        heads: which heads; the recipe's own where it is left out.
        schedule: `constant`, or `linear` growth from 0 over the share `warmup` of the steps.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    heads: HeadsBlock | None = None
    schedule: Literal["constant", "linear"] = "constant"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if (self.schedule == "linear") != (self.warmup > 0):
            raise ValueError("schedule linear and a warmup above 0 go together")
        return self


class AttentionKl(Regulariser):
    """KL divergence of chosen heads' attention from the base model's, at `rows` query positions a sample."""

    kind: Literal["attention_kl"]
    rows: Annotated[int, Field(ge=1)] = 32


class OutputDrift(Regulariser):
    """Squared distance of chosen heads' outputs z from the base model's, relative to the base's size."""

    kind: Literal["output_drift"]
    relative: bool = True


class WeightDrift(Regulariser):
    """Squared distance of chosen heads' weight slices from where they started (L2-SP).

    Attributes:
        fisher: weigh each weight by its Fisher information (EWC) on answers of `task`; that which is trained on where
            it is left out.
        max_examples: prompts of that task, one backward pass each.
        parts: which slices.
    """

    kind: Literal["weight_drift"]
    fisher: bool = False
    task: str | None = None
    max_examples: Annotated[int, Field(ge=1)] = 64
    parts: Annotated[list[Literal["q", "k", "v", "o"]], Field(min_length=1)] = ["q", "k", "v", "o"]

    @model_validator(mode="after")
    def _task(self) -> Self:
        if self.task is not None and not self.fisher:
            raise ValueError("task is what Fisher information is taken from, and fisher is false")
        return self


class AttributionHinge(Regulariser):
    """Suppression heads may not lower a right answer's logit by more than `margin`; recall heads keep their part."""

    kind: Literal["attribution_hinge"]
    role: Literal["suppression", "recall"] = "suppression"
    margin: Annotated[float, Field(ge=0)] = 0.0


class NegativeAttention(Regulariser):
    """Align what chosen heads attend to between two options that the prompt names (NASA)."""

    kind: Literal["negative_attention"]
    positive: str = " Yes"
    negative: str = " No"


class PruneGates(Regulariser):
    """A HardConcrete gate on each chosen head and a penalty on the share that is open: prune while training.

    `learning_rate` is that of the gates' log alpha, which travels 4.8 from open to closed: at least 24 steps of 0.2
    before the learning-rate schedule lowers it; the rest has the run's. With `sparsity`, the share of heads to be
    closed, what costs is the distance from it; it grows over `warmup`.
    """

    kind: Literal["prune"]
    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 0.2


AnyRegulariser = Annotated[
    AttentionKl | OutputDrift | WeightDrift | AttributionHinge | NegativeAttention | PruneGates,
    Field(discriminator="kind"),
]


class PairsBlock(Block):
    """Preference pairs: `one` a question (best answer, first incorrect one; as LoFiT publishes), or `all` of them."""

    pairs: Literal["one", "all"] = "one"


class ObjectiveBlock(Block):
    """What the training minimises, and whether what lies below the trained layers is run once and kept.

    Attributes:
        objective: `answer_set` (any answer not given yet), `sft` (cross-entropy on an answer), or `dpo` (preference of
            right over wrong answers; the reference is the model with the adapter switched off; beta is training.beta).
        prefix_cache: run the layers below the lowest trained one once per example (see `headtune.train.prefix_cache`);
            it switches itself off, with the reason, where it would change the result.
        prefix_memory_gb: what it may keep in memory; more goes to memory-mapped files in the run's folder.
        regularisers: penalties on heads that are added to the objective (see `headtune.train.regularisers`).
    """

    objective: Literal["answer_set", "sft", "dpo"] = "answer_set"
    answer_set: AnswerSetBlock = AnswerSetBlock()
    dpo: PairsBlock = PairsBlock()
    prefix_cache: bool = True
    prefix_memory_gb: Annotated[float, Field(ge=0)] = 2.0
    regularisers: list[AnyRegulariser] = []


class LofitMethod(ObjectiveBlock):
    """The head adapter: scale and offset on chosen heads, everything else frozen.

    LoFiT as published trains offsets alone (`scale: none`, `init_std: 1e-3`) on the heads of its own first stage
    (`heads: {lofit: {...}}`). `select_only` stops after the choice of heads.
    """

    scale: Literal["none", "head", "vector"] = "vector"
    offset: bool = True
    init_std: Annotated[float, Field(ge=0)] = 0.0
    select_only: bool = False


class JolaMethod(ObjectiveBlock):
    """JoLA: scale and offset with a HardConcrete gate on each, `z <- (1 + g2 a) z + g1 v`; chooses while it tunes.

    Attributes:
        l0: weight of the mean probability that a gate is open, in 0..1.
        l0_warmup: share of the steps over which that weight grows from 0.
        gate_learning_rate: of the gates' log alpha, which travels 4.8 from open to closed; the rest has the run's.
    """

    init_std: Annotated[float, Field(ge=0)] = 1e-3
    l0: Annotated[float, Field(ge=0)] = 1.0
    l0_warmup: Annotated[float, Field(ge=0, le=1)] = 0.2
    gate_learning_rate: Annotated[float, Field(gt=0)] = 0.2


class MaskedMethod(ObjectiveBlock):
    """Fine-tune the slices of W_Q, W_K, W_V, W_O that belong to chosen heads (K and V by KV group)."""

    parts: Annotated[list[Literal["q", "k", "v", "o"]], Field(min_length=1)] = ["q", "k", "v", "o"]


class LoraMethod(ObjectiveBlock):
    """LoRA on all linear layers, the baseline; `heads` is ignored by it and may be left out."""

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[int, Field(ge=1)] = 16
    target_modules: str | list[str] = "all-linear"


class FullMethod(ObjectiveBlock):
    """Full fine-tuning, the upper baseline. `keep` writes the whole model to the run's `model/` folder."""

    keep: bool = True


class LnMethod(ObjectiveBlock):
    """Train the gains and biases of all norms (LN tuning, Zhao et al. 2023), a baseline of few parameters."""


class LoraSizes(Block):
    """The shape of a LoRA where one is trained beside something else."""

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[int, Field(ge=1)] = 16
    target_modules: str | list[str] = "all-linear"


class RegulariseMethod(ObjectiveBlock):
    """Train everything else while the heads of `heads` are held by `regularisers` (at least one).

    Attributes:
        tune: the whole model, or a LoRA.
        keep: write the whole model to the run's `model/` folder; a LoRA is kept as an adapter, and merged where heads
            were pruned.
    """

    tune: Literal["full", "lora"] = "full"
    lora: LoraSizes = LoraSizes()
    keep: bool = True


class ReplayBlock(Block):
    """What of earlier tasks is seen again: a random sample of each task's rows, evenly interleaved.

    Attributes:
        ratio: of a task's training rows, at least one row.
        count: rows of each task, instead of a ratio.
    """

    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.ratio is None) == (self.count is None):
            raise ValueError("give one of ratio and count")
        return self


class DistilBlock(Block):
    """SEEKR's distillation (He et al. 2024): L_task + l1 L_replay + (1 - l1) L_logits + l2 L_attention.

    Attributes:
        replay_weight: l1.
        attention_weight: l2, on the mean KL divergence over samples, heads and query rows.
        choice: how heads are chosen where the recipe names none: by I = S * F, by S or F alone; or, as controls, drawn
            once from all heads (`random`), or after each task from those that I does not choose, as many in each layer
            (`random_matched`).
        layers: budget B_L, layers of the highest summed importance; null takes all.
        heads: budget B_H, heads in those layers.
        queries: budget B_T, random query rows of a sample.
        selection: heads are chosen anew for all tasks after each task (`global`), or for the samples of the task just
            learnt alone (`per_task`, as the reference code does).
        teacher: a sample's teacher is the model after its `own` task, or the `latest` before the task being learnt.
        dtype: of the stored teacher rows.
        logits_top: keep only so many of the teacher's logits and the mass of the rest; null keeps all.
    """

    replay_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    attention_weight: Annotated[float, Field(ge=0)] = 1000.0
    choice: Literal["importance", "sensitivity", "forgetting", "random", "random_matched"] = "importance"
    layers: Annotated[int, Field(ge=1)] | None = 24
    heads: Annotated[int, Field(ge=1)] = 128
    queries: Annotated[int, Field(ge=1)] = 100
    selection: Literal["global", "per_task"] = "global"
    teacher: Literal["own", "latest"] = "own"
    dtype: Literal["float32", "float16"] = "float32"
    logits_top: Annotated[int, Field(ge=1)] | None = None


class SeekrMethod(Block):
    """A sequence of tasks learnt one after the other, and what is done so that earlier ones are not forgotten.

    Attributes:
        strategy: `seekr`; or a baseline: `sequential` (nothing), `replay`, `der` (DER++, Buzzega et al. 2020), `ewc`
            (Kirkpatrick et al. 2017), `lwf` (Li & Hoiem 2016), `multitask` (all tasks at once, the upper bound).
        tune: the whole model, or one LoRA through all tasks.
        der_weight: of the squared distance to the stored logits.
        ewc_weight: of the Fisher-weighted distance to the weights after the previous task.
        lwf_weight: of the KL divergence to the previous model on the new task's rows.
        keep: which models stay in the run: the `last`, `all` (after each task), or `none`.
    """

    strategy: Literal["seekr", "sequential", "replay", "der", "ewc", "lwf", "multitask"] = "seekr"
    tune: Literal["full", "lora"] = "full"
    lora: LoraSizes = LoraSizes()
    replay: ReplayBlock = ReplayBlock(ratio=0.1)
    distil: DistilBlock = DistilBlock()
    der_weight: Annotated[float, Field(ge=0)] = 0.5
    ewc_weight: Annotated[float, Field(ge=0)] = 1000.0
    lwf_weight: Annotated[float, Field(ge=0)] = 1.0
    regularisers: list[AnyRegulariser] = []
    keep: Literal["last", "all", "none"] = "last"

    @property
    def replays(self) -> bool:
        return self.strategy in ("seekr", "replay", "der")


class ScaleMethod(Block):
    """No training: chosen heads multiplied by a factor."""

    kind: Literal["scale"] = "scale"
    factor: float = 1.25


class ItiMethod(Block):
    """No training: inference-time intervention, `z <- z + alpha * sigma * theta` with mass-mean directions."""

    kind: Literal["iti"]
    alpha: float = 15.0
    per_prompt: Annotated[int, Field(ge=1)] | None = None
    max_examples: Annotated[int, Field(ge=1)] | None = None


class SinkMethod(Block):
    """No training: last-layer heads that look at the first position more than `tau` are multiplied by `gamma`."""

    kind: Literal["sink"]
    tau: Annotated[float, Field(ge=0, le=1)] = 0.5
    gamma: Annotated[float, Field(ge=0)] = 0.5


class InterceptMethod(Block):
    """No training: the last MLP's intercept is taken away, `M <- M - beta * b`, fitted on the prompts of `fit`."""

    kind: Literal["intercept"]
    beta: float = 1.0
    fit: str | None = None


STEERING: dict[str, type[Block]] = {
    "scale": ScaleMethod,
    "iti": ItiMethod,
    "sink": SinkMethod,
    "intercept": InterceptMethod,
}
SteerMethod = ScaleMethod | ItiMethod | SinkMethod | InterceptMethod
TrainedMethod = LofitMethod | JolaMethod | MaskedMethod | LoraMethod | FullMethod | LnMethod | RegulariseMethod
METHODS: dict[str, type[Block]] = {
    "lofit": LofitMethod,
    "jola": JolaMethod,
    "masked": MaskedMethod,
    "steer": ScaleMethod,
    "lora": LoraMethod,
    "full": FullMethod,
    "ln": LnMethod,
    "regularise": RegulariseMethod,
    "seekr": SeekrMethod,
}
WITHOUT_HEADS = ("lora", "full", "ln", "regularise", "seekr")  # families that change the whole model


class EvaluationBlock(Block):
    """How the model is measured.

    Attributes:
        n_items: list items scored per prompt.
        batch_size: prompts generated together.
        preamble: text before multiple-choice questions: none, or the six questions and answers that the usual
            TruthfulQA evaluation puts there.
        before: evaluation.json of another run, whose measurement of the same base model on the same prompts is taken
            over instead of being repeated.
        general: tasks measured besides, before and after a sequence: what the model could do anyway.
    """

    n_items: Annotated[int, Field(ge=1)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 16
    preamble: Literal["none", "truthfulqa"] = "none"
    before: str | None = None
    general: list[str] = []


class TrackingBlock(Block):
    """Where the run is filed. `wandb`: online, offline, disabled, or null to use W&B where a key is present."""

    project: str = "headtune"
    group: str | None = None
    tags: list[str] = []
    wandb: Literal["online", "offline", "disabled"] | None = None
