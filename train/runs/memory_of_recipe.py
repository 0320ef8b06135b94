"""From a recipe to its plan: the stages it runs through, memory, time, and what to change where it is too much.

    identify   heads: {identify: ...}     every process holds the model whole
    select     heads: {lofit: ...}        scales on all heads are trained first
    train      the method itself

Time is an estimate: floating-point operations over a share of the hardware's peak that is seldom left at either end,
and no less than starting the layers' kernels takes.

    forward    2 parameters tokens + 4 layers z length tokens / 2     (attention sees half of the square)
    backward   as much again for gradients of activations above the lowest trained layer, and of trained weights
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError
from headtune.train.config.methods import HeadsConfig
from headtune.train.config.schema import Recipe
from headtune.train.memory import estimate as plan
from headtune.train.memory import model_shape
from headtune.train.memory.estimate import GIB, Memory, Objective, Setup
from headtune.train.memory.model_shape import Shape, Trained
from headtune.train.methods.base import method_named

UTILISATION = (0.2, 0.45)  # of the peak rate, slow and fast end; identify's single tokens are half as efficient
PEAK_RATE = {2: 989e12, 4: 67e12}  # H100 SXM: dense bfloat16, and float32 without tensor cores; operations a second
LAYER_SECONDS = (0.5e-3, 2e-3)  # a pass through a layer takes at least that: its kernels have to be started
MACHINE = 8  # GPUs of one machine


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        memory: of each process.
        operations: floating-point operations of a process for one `unit`.
        passes: of a `unit` through single layers.
        units: steps (prompts of `identify`) of a process.
        rate_bytes: width of the numbers computed with.
    """

    name: str
    memory: Memory
    operations: float
    passes: int
    unit: str
    units: int | None
    rate_bytes: int

    def seconds(self, peak_rate: float | None = None) -> tuple[float, float]:
        """Fast and slow end of all units, or of one where their number is unknown."""
        rate = (peak_rate or PEAK_RATE[self.rate_bytes]) * (0.5 if self.name == "identify" else 1.0)
        units = self.units or 1
        slow, fast = (self.operations / (rate * share) for share in UTILISATION)
        starting = [each * self.passes for each in LAYER_SECONDS]
        return units * max(fast, starting[0]), units * max(slow, starting[1])


def setup_of(recipe: Recipe, engine: str, gpus: int, length: int, labels: int, device: str = "cuda") -> Setup:
    """How a recipe says it is run.

    Raises:
        InputError: an engine that is unknown, does not go with the number of GPUs, or cannot run this recipe.
    """
    training = recipe.training
    half = recipe.model.dtype != "float32"
    setup = Setup(
        engine=engine,
        gpus=gpus,
        batch=training.get("per_device_train_batch_size", 16),
        accumulation=training.get("gradient_accumulation_steps", 1),
        length=length,
        labels=min(labels, length),
        half=half,
        autocast=bool(training.get("bf16", recipe.model.dtype == "bfloat16") or training.get("fp16", False)),
        checkpointing=bool(training.get("gradient_checkpointing", False)),
        device=device,
    )
    return setup


def stages(recipe: Recipe, shape: Shape, setup: Setup, prompts: int | None = None) -> list[Stage]:
    """What a recipe runs through, with the memory and the operations of each process.

    Args:
        prompts: of the training data; the recipe's limit where there is one.
    """
    if not method_named(recipe.recipe).trains:
        raise InputError(
            f"recipe {recipe.recipe} trains nothing, and takes the memory of loading the model; plan another recipe"
        )
    rows = min(filter(None, (recipe.task.max_train_examples, prompts)), default=None)
    heads, result = recipe.heads, [_load_stage(shape, setup)]
    if heads is not None and heads.identify is not None:
        result.append(identify_stage(shape, setup, heads.identify.max_examples or rows))
    if heads is not None and heads.lofit is not None:
        everyone = [(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
        scales = model_shape.head_values(shape, everyone, offset=False)
        result.append(_train_stage("select", recipe, shape, scales, setup, rows, heads.lofit.max_steps))
    if not method_named(recipe.recipe).stops_after_heads(recipe.method):
        result.append(_train_stage("train", recipe, shape, trained_of(recipe, shape), setup, rows))
    return result


def _load_stage(shape: Shape, setup: Setup) -> Stage:
    """The model as it is loaded, and measured before training: whole, on every process, whatever the engine."""
    width = 2 if setup.half else 4  # an engine that casts does so later
    parts = {"weights": width * shape.parameters, "overhead": plan.OVERHEAD[setup.device]}
    return Stage("load", plan.Memory(parts, sum(parts.values())), 0.0, 0, "", None, 2 if setup.half else 4)


def identify_stage(shape: Shape, setup: Setup, prompts: int | None, spread: int = 1) -> Stage:
    """Finding heads on prompts that the processes share."""
    rows = shape.n_layers * shape.n_heads
    # A row enters at its own layer: half of the layers on average, and the unembedding.
    each = 2 * (shape.per_layer * shape.n_layers / 2 + shape.unembedding)
    operations = _forward(shape, setup.length, setup.length, shape.n_layers) + rows * each
    share = None if prompts is None else -(-prompts // (1 if spread > 1 else setup.gpus))
    memory = plan.identify(shape, setup, spread=spread)
    passes = shape.n_layers * (2 + -(-rows // plan.rows_at_once(shape, setup.length)))  # attribution has one of its own
    return Stage("identify", memory, operations, passes, "prompt", share, 2 if setup.half else 4)


def trained_of(recipe: Recipe, shape: Shape) -> Trained:
    """What a recipe's method trains. Heads that are yet to be found are taken to reach down to layer 0."""
    method, pairs = method_named(recipe.recipe), _pairs(recipe, shape) or []
    return method.trained_weights(recipe.method, shape, pairs)


def _pairs(recipe: Recipe, shape: Shape) -> list[tuple[int, int]] | None:
    return None if recipe.heads is None else heads_of(recipe.heads, shape)


def heads_of(block: HeadsConfig, shape: Shape) -> list[tuple[int, int]]:
    """A recipe's heads as far as they are known; those that are not, spread over the layers from 0 up."""
    if block.pairs is not None:
        for layer, head in block.pairs:
            if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
                raise InputError(
                    f"head [{layer}, {head}] does not exist: {shape.name} has layers 0-{shape.n_layers - 1} and heads "
                    f"0-{shape.n_heads - 1}"
                )
        return list(block.pairs)
    if block.every:
        return [(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
    if block.source is not None and Path(block.source).exists():
        return _read(block, shape)
    n_pairs = min(block.top * (2 if block.role == "both" and not block.learnt else 1), shape.n_layers * shape.n_heads)
    return sorted((index % shape.n_layers, index // shape.n_layers) for index in range(n_pairs))


def _read(block: HeadsConfig, shape: Shape) -> list[tuple[int, int]]:
    from headtune.analysis.heads.head_set import HeadSet

    assert block.source is not None
    source = Path(block.source)
    heads = HeadSet.load(source)
    roles = ("recall", "suppression") if block.role == "both" else (block.role,)
    if block.role == "both" and set(heads.roles) == {"selected"}:
        roles = ("selected",)
    if block.role != "both":
        heads.top(block.role)  # which refuses roles that the set does not hold
    pairs = {(entry.layer, entry.head) for role in roles for entry in heads.roles.get(role, ())[: block.top]}
    if not pairs or max(layer for layer, _ in pairs) >= shape.n_layers:
        raise InputError(f"heads.from {block.source!r} holds no {' or '.join(roles)} heads of {shape.name}")
    return sorted(pairs)


def objective_of(recipe: Recipe, shape: Shape, setup: Setup) -> Objective:
    """What a recipe's loss looks at."""
    return method_named(recipe.recipe).objective(recipe, trained_of(recipe, shape), setup, _pairs(recipe, shape))


def _train_stage(
    name: str,
    recipe: Recipe,
    shape: Shape,
    trained: Trained,
    setup: Setup,
    rows: int | None,
    max_steps: int | None = None,
) -> Stage:
    objective = objective_of(recipe, shape, setup)
    memory = plan.training(shape, trained, setup, objective)
    host = disk = 0
    cached = 0
    method: Any = recipe.method
    keeps = getattr(method, "prefix_cache", False) and not method.regularisers and trained.lowest > 0
    if keeps and rows is not None and setup.engine not in ("zero3", "fsdp2"):
        cached = trained.lowest
        size = rows // setup.gpus * setup.length * shape.d_model * (2 if setup.half else 4)
        host = min(size, int(method.prefix_memory_gb * GIB))
        disk = size - host
    if rows is not None:
        disk += method_named(recipe.recipe).stored_bytes(recipe, shape, setup, rows, _pairs(recipe, shape))
    if setup.device == "cpu":  # one memory
        memory = replace(memory, parts={**memory.parts, **({"prefix cache": host} if host else {})})
        memory = replace(memory, peak=memory.peak + host)
        host = 0
    memory = replace(memory, host=host, disk=disk)
    steps = max_steps or recipe.training.get("max_steps", 0)
    if steps <= 0 and rows is not None:
        at_once = setup.batch * setup.accumulation * setup.gpus
        steps = math.ceil(float(recipe.training.get("num_train_epochs", 3)) * math.ceil(rows / at_once))
    steps *= len(recipe.task.sequence or [None])
    operations = setup.accumulation * _step(shape, trained, setup, objective, cached)
    above = shape.n_layers - trained.lowest
    passes = setup.accumulation * (shape.n_layers - cached + 2 * above + shape.n_layers * setup.checkpointing)
    return Stage(name, memory, operations, passes, "step", steps if steps > 0 else None, setup.compute_bytes)


def _forward(shape: Shape, tokens: int, length: int, layers: int, positions: int = 1) -> float:
    attention = 2 * layers * shape.z * length * tokens
    return 2.0 * layers * shape.linear * tokens + attention + 2.0 * positions * shape.unembedding


def _step(shape: Shape, trained: Trained, setup: Setup, objective: Objective, cached: int) -> float:
    """Operations of one batch: forward, backward, what checkpointing repeats, what the loss compares with."""
    rows = setup.batch * (2 if objective.kind == "dpo" else 1) + objective.again
    tokens, labels = rows * setup.length, rows * setup.labels
    above = shape.n_layers - trained.lowest
    upper = _forward(shape, tokens, setup.length, above, labels)
    lower = _forward(shape, tokens, setup.length, trained.lowest - cached, 0)
    total = lower + 2 * upper  # activations' gradients cost as much as the forward pass
    if trained.kind == "full":
        total += _forward(shape, tokens, 0, shape.n_layers, labels)
    else:
        total += 4.0 * trained.parameters * tokens
    if setup.checkpointing:
        total += _forward(shape, tokens, setup.length, shape.n_layers, 0)
    if objective.copies or objective.kind == "dpo":
        total += _forward(shape, tokens, setup.length, shape.n_layers, labels)
    return total


# --- what to change ---------------------------------------------------------------------------------------------------


def cheapest(recipe: Recipe, shape: Shape, setup: Setup, gpu_memory: int, most: int = 1024) -> Setup | None:
    """The setup nearest to this one with which every stage fits, or None where none of those tried does.

    In this order: as it is, smaller batches and more of them, checkpointing, another engine, more GPUs up to `most`; at
    the same number of rows a step as long as the number of GPUs stays the same.
    """
    for changed in _changes(recipe, setup, most):
        if peak(recipe, shape, changed) <= gpu_memory:
            return changed
    return None


def least(recipe: Recipe, shape: Shape, setup: Setup) -> int:
    """The lowest peak of those setups with as many GPUs."""
    return min(peak(recipe, shape, changed) for changed in _changes(recipe, setup, setup.gpus))


def peak(recipe: Recipe, shape: Shape, setup: Setup) -> int:
    """Bytes of the stage that needs most."""
    return max(stage.memory.peak for stage in stages(recipe, shape, setup))


def _changes(recipe: Recipe, setup: Setup, most: int) -> Iterator[Setup]:
    gpus = setup.gpus
    while gpus <= most:
        engines = ["single"] if gpus == 1 else [setup.engine, *(e for e in plan.ENGINES[1:] if e != setup.engine)]
        for engine in engines:
            if gpus > 1 and engine == "single":
                continue
            for checkpointing in sorted({setup.checkpointing, True}):
                batch, accumulation = setup.batch, setup.accumulation
                while True:
                    smaller = replace(setup, batch=batch, accumulation=accumulation, checkpointing=checkpointing)
                    yield replace(smaller, engine=engine, gpus=gpus)
                    if batch == 1:
                        break
                    batch, accumulation = -(-batch // 2), accumulation * 2
        gpus *= 2


def change(old: Setup, new: Setup) -> str:
    """What to change, in the words of the command line."""
    changes = []
    if new.gpus != old.gpus:
        changes.append(f"{new.gpus} GPUs")
    if new.engine != old.engine:
        changes.append(f"engine {new.engine}")
    if new.batch != old.batch:
        changes.append(
            f"training.per_device_train_batch_size={new.batch} training.gradient_accumulation_steps={new.accumulation}"
        )
    if new.checkpointing != old.checkpointing:
        changes.append("training.gradient_checkpointing=true")
    return ", ".join(changes)
