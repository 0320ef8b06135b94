"""Memory of a recipe before it runs, from the model's sizes alone: what each GPU holds, part by part.

    weights         of the model and, where there is one, of the model it is compared with
    gradients       of what is trained
    optimiser       AdamW's two moments, and DeepSpeed's float32 copy of what it trains
    activations     what autograd keeps between forward and backward pass (`saved`)
    logits          and what the loss makes of them
    workspace       what is alive for a moment: a layer's gradients, gathered weights, buffers of communication

Gradients grow while activations shrink, so the peak is not the sum:

    peak = weights + optimiser + max(activations + logits, gradients + one layer) + workspace

The formulas hold for llama-like layers under SDPA, bytes for bytes in float32 (tests/train/runs/test_memory.py); other
families are close. What the runtime itself takes comes on top: `OVERHEAD`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from headtune.analysis.utils.errors import InputError

from .model_shape import Shape, Trained, inputs_of

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
GIB = 1 << 30
OVERHEAD = {"cuda": GIB, "cpu": 0}  # CUDA's context, kernels' workspaces and NCCL; assumed, not measured
_BUCKET = 500_000_000  # elements: DeepSpeed's reduce and allgather buckets
_LIVE = 1_000_000_000  # parameters: what ZeRO-3 lets be gathered at once
_TILE = (4096, 32768)  # positions and tokens of the vocabulary that TRL projects at once


@dataclass(frozen=True)
class Setup:
    """How a recipe is run.

    Attributes:
        engine: one of ENGINES; gpus: processes, one GPU each.
        batch: rows of a process at once; accumulation: such batches a step.
        length: tokens of a row; labels: those of them that carry loss.
        half: weights are loaded in half precision; autocast: the computation is in half precision.
        checkpointing: layers keep their inputs alone and are computed again.
        padded: rows differ in length, so attention needs a mask.
        device: `cuda` or `cpu`.
    """

    engine: str = "single"
    gpus: int = 1
    batch: int = 1
    accumulation: int = 1
    length: int = 1024
    labels: int = 16
    half: bool = False
    autocast: bool = False
    checkpointing: bool = False
    padded: bool = True
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"engine {self.engine!r} is unknown; choose one of {', '.join(ENGINES)}")
        for name in ("gpus", "batch", "accumulation", "length", "labels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if (self.engine == "single") != (self.gpus == 1):
            fix = "give --gpus" if self.gpus == 1 else f"choose one of {', '.join(ENGINES[1:])}"
            raise InputError(f"engine {self.engine!r} on {self.gpus} GPU{'s' * (self.gpus > 1)}; {fix}")

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def compute_bytes(self) -> int:
        return 2 if self.half or self.autocast else 4

    @property
    def weight_bytes(self) -> int:
        """Of a parameter as the forward pass finds it; DeepSpeed casts the whole model where bfloat16 is on."""
        return 2 if self.half or (self.autocast and self.engine.startswith("zero")) else 4

    @property
    def casts(self) -> bool:
        """Autocast makes half-precision copies of float32 weights."""
        return self.autocast and self.weight_bytes == 4


@dataclass(frozen=True)
class Objective:
    """What the loss looks at, beyond one pass over the rows.

    Attributes:
        kind: `sft`, `answer_set`, `dpo` or `sequence` (SEEKR's trainer and its baselines).
        copies: further models in memory, such as a frozen reference.
        again: rows of a batch that are seen again besides its own.
        distilled: heads whose attention rows are compared; queries: rows of each.
        columns: positions of the answer-set objective's retention.
    """

    kind: str = "sft"
    copies: int = 0
    again: int = 0
    distilled: int = 0
    queries: int = 0
    columns: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of a process.

    Attributes:
        parts: on the device, by name; what is not there at the same time is counted in full.
        peak: the most at once, overhead included.
        host: in main memory; disk: in files of the run.
    """

    parts: Mapping[str, int]
    peak: int
    host: int = 0
    disk: int = 0
    notes: tuple[str, ...] = field(default=())


# --- what autograd keeps ----------------------------------------------------------------------------------------------


def saved(shape: Shape, trained: Trained, setup: Setup) -> int:
    """Bytes that autograd keeps of one forward pass up to the final norm, by formula.

    A layer above the lowest trained one keeps, a token, with c bytes of a computed number and q, k the widths of all
    queries and all keys (padded rows: keys and values repeated for every head, and a row of the mask):

        2 (4 d + 4)          both norms' inputs, float32       c (2 q + 2 k) + 4 heads      q, k, v, output, log-sums
        c 3 f                gate, its activation, up          and what trained weights multiply (`_inputs`)
    """
    layers = range(shape.n_layers)
    norm = 4 * shape.d_model + 4
    final = norm + (_normalised(shape, setup) if trained.kind in ("full", "norms") else 0)
    if setup.checkpointing:
        residual = (2 if setup.weight_bytes == 2 else 4) * shape.d_model
        # Inputs are made to require a gradient, so no layer is below the trained ones.
        return setup.tokens * (residual * shape.n_layers + final)
    whole = sum(_layer(shape, trained, setup, layer) for layer in layers)
    casts = 0
    if setup.casts:
        casts = 2 * shape.linear * sum(layer >= trained.lowest for layer in layers)
    rotary = 2 * setup.length * shape.head_dim * setup.compute_bytes
    return setup.tokens * (whole + final) + casts + rotary


def one_layer(shape: Shape, trained: Trained, setup: Setup) -> int:
    """Bytes that the backward pass of a layer needs besides: its activations made again, and their gradients."""
    gradients = setup.compute_bytes * (3 * shape.intermediate + shape.d_model) + 4 * shape.d_model
    again = _layer(shape, trained, setup, shape.n_layers - 1) if setup.checkpointing else 0
    return setup.tokens * (gradients + again)


def _normalised(shape: Shape, setup: Setup) -> int:
    """A norm's output before its gain, which the gain's gradient needs."""
    return (2 if setup.weight_bytes == 2 else 4) * shape.d_model


def _layer(shape: Shape, trained: Trained, setup: Setup, layer: int) -> int:
    """Bytes a token."""
    if layer < trained.lowest:
        return 0
    c = setup.compute_bytes
    norm = 4 * shape.d_model + 4
    attention = c * (2 * shape.z + 2 * (shape.z if setup.padded else shape.kv)) + 4 * shape.n_heads
    if setup.padded:
        attention += c * setup.length
    mlp = c * (3 if shape.gated else 2) * shape.intermediate
    weights = _inputs(shape, trained, setup, layer)
    if layer == trained.lowest and trained.kind == "heads":
        # Nothing before the heads' outputs asks for a gradient; a scale alone needs those outputs.
        return norm + mlp + (weights or c * shape.z * trained.scaled)
    if layer == trained.lowest and trained.kind == "slices":
        if not trained.reads:  # as above
            return norm + mlp + weights
        return norm + attention + mlp + weights
    return 2 * norm + attention + mlp + weights


def _inputs(shape: Shape, trained: Trained, setup: Setup, layer: int) -> int:
    """What a layer keeps, a token, because of what is trained in it."""
    c, casts = setup.compute_bytes, setup.compute_bytes == 2
    if layer not in trained.layers:
        return 0
    if trained.kind == "heads":  # in float32, whatever the model computes in
        return 4 * shape.z if casts and trained.scaled else 0
    if trained.kind == "slices":
        copies = 3 if casts else 1  # queries, keys and values each cast what they read
        return c * (copies * shape.d_model * trained.reads + trained.width)
    if trained.kind == "norms":
        return 2 * _normalised(shape, setup)
    names = trained.targets or tuple(part.name for part in shape.linears)
    chosen = [part for part in shape.linears if part.name in names]
    output = next(part for part in shape.linears if part.reads == part.name)  # reads what attention keeps anyway
    if casts and (trained.kind == "lora" or setup.casts):  # each projection has a copy of its own
        total = sum(part.inputs for part in chosen if trained.kind == "lora" or part is not output)
    else:
        total = sum(width for reads, width in inputs_of(shape, names).items() if reads != output.name)
    total = c * (total + trained.rank * len(chosen))
    return total + (2 * _normalised(shape, setup) if trained.kind == "full" else 0)


# --- a training -------------------------------------------------------------------------------------------------------


def training(shape: Shape, trained: Trained, setup: Setup, objective: Objective | None = None) -> Memory:
    """Memory of a process that trains; the optimiser is AdamW."""
    objective = objective or Objective()
    parts = _states(shape, trained, setup)
    # A frozen copy is made before the engine divides anything.
    parts["weights"] += objective.copies * (2 if setup.half else 4) * shape.parameters
    rows = setup.batch * (2 if objective.kind == "dpo" else 1) + objective.again
    wide = replace(setup, batch=rows)
    parts["activations"] = saved(shape, trained, wide)
    activations, passing = _loss(shape, trained, wide, objective)
    parts["logits"] = activations + passing
    layer = one_layer(shape, trained, wide)
    parts["workspace"] = _communication(shape, trained, setup)
    parts["overhead"] = OVERHEAD[setup.device]
    standing = parts["weights"] + parts["optimiser"] + parts["workspace"] + parts["overhead"]
    standing += parts["gradients"] if setup.accumulation > 1 else 0
    start = parts["activations"] + activations + max(passing, layer)
    end = 0 if setup.accumulation > 1 else parts["gradients"]
    if trained.kind == "full":
        # The embedding's gradient is made whole before it is added to what the unembedding's gave.
        end += setup.weight_bytes * shape.unembedding if shape.tied else 0
    parts["workspace"] += layer
    return Memory({name: size for name, size in parts.items() if size}, standing + max(start, end + layer))


def _states(shape: Shape, trained: Trained, setup: Setup) -> dict[str, int]:
    """Weights, gradients and optimiser of a process."""
    share = setup.gpus
    full = trained.kind == "full"
    frozen = 0 if full else shape.parameters
    # Adapters stay float32, but where DeepSpeed casts the model.
    own_bytes = setup.weight_bytes if full or setup.engine.startswith("zero") else 4
    weights = setup.weight_bytes * frozen + own_bytes * trained.parameters
    gradients = own_bytes * trained.parameters
    optimiser = 8 * trained.parameters
    if setup.engine.startswith("zero"):
        optimiser = (8 + 4) * trained.parameters // share  # with float32 copies of its share
    if setup.engine in ("zero2", "zero3", "fsdp2"):
        gradients //= share
    if setup.engine in ("zero3", "fsdp2"):
        weights //= share
    if setup.engine == "fsdp2":
        optimiser //= share
    return {"weights": weights, "gradients": gradients, "optimiser": optimiser}


def _communication(shape: Shape, trained: Trained, setup: Setup) -> int:
    own = setup.weight_bytes if trained.kind == "full" else 4
    match setup.engine:
        case "ddp":  # gradients are copied into buckets
            return own * trained.parameters
        case "zero1" | "zero2":
            return setup.weight_bytes * min(trained.parameters, _BUCKET) * 2
        case "zero3":
            gathered = max(min(shape.parameters, _LIVE), shape.unembedding)
            return 2 * min(trained.parameters, _BUCKET) + setup.weight_bytes * gathered
        case "fsdp2":  # the layer at work and the next one; embedding and unembedding stay gathered
            ends = shape.unembedding * (1 if shape.tied else 2)
            return setup.compute_bytes * (2 * shape.per_layer + ends)
    return 0


def _loss(shape: Shape, trained: Trained, setup: Setup, objective: Objective) -> tuple[int, int]:
    """Bytes of the loss: kept from the forward pass to the backward pass, and alive for a moment."""
    vocabulary, c = shape.vocabulary, setup.compute_bytes
    labels = setup.batch * min(setup.labels, setup.length)
    if objective.kind in ("sft", "dpo"):
        # Labelled positions alone, in tiles; float32 copies of a tile where there is no Triton.
        positions = labels + 1 if objective.kind == "sft" else setup.tokens
        if setup.device == "cuda":
            positions = labels
        tile = min(positions, _TILE[0]) * min(vocabulary, _TILE[1])
        passing = tile * (c if setup.device == "cuda" else c + 4 * 5)
        passing += 4 * shape.unembedding if trained.kind == "full" else 0
        return 4 * 3 * positions * shape.d_model, passing
    if objective.kind == "answer_set":
        rows = setup.batch
        logits = rows * (1 + objective.columns) * vocabulary
        compared = max(1, rows // 4) * objective.columns * vocabulary
        return c * logits + 4 * (2 * rows * vocabulary + 3 * compared), c * logits + 4 * (rows * vocabulary + compared)
    # A sequence: float32 logits of all labelled positions, their logarithms, the teacher's beside those seen again.
    logits = labels * vocabulary
    compared = logits * objective.again // setup.batch
    attention = 4 * 4 * objective.again * objective.distilled * objective.queries * setup.length
    kept = (4 + (c if c == 2 else 0)) * logits + 4 * logits + 4 * 4 * compared + attention
    return kept, 4 * (logits + compared)


# --- identify ---------------------------------------------------------------------------------------------------------


def identify(shape: Shape, setup: Setup, max_memory: int = GIB, spread: int = 1) -> Memory:
    """Memory of finding heads by direct attribution and exact ablation, `headtune identify`'s default.

    Each process has the model whole and works on prompts of its own, one at a time: a pass over the prompt, then one
    token for every head in rows, as many at once as `max_memory` allows, and every row's logits.

    Args:
        spread: GPUs of one machine over which one process spreads the model (`--device-map auto`).
    """
    c = 2 if setup.half else 4
    rows = 1 + shape.n_layers * shape.n_heads
    at_once = min(rows, rows_at_once(shape, setup.length, max_memory))
    cache = 4 * 2 * shape.kv * setup.length * shape.n_layers
    logits = rows * shape.vocabulary
    # The chunks' logits, joined, and put in order: three at once; then float32 and its exponentials beside one.
    gathered = max(3 * c * logits, c * logits + (4 * logits if c == 2 else 0) + 4 * logits)
    at_work = c * at_once * (4 * shape.d_model + 3 * shape.intermediate + 4 * shape.z)
    prompt = c * setup.length * (3 * shape.intermediate + 4 * shape.d_model + 4 * shape.z)
    parts = {
        "weights": -(-c * shape.parameters // spread),
        "keys and values": -(-cache // spread),
        "logits": gathered,
        "workspace": max(prompt, at_work),
        "overhead": OVERHEAD[setup.device],
    }
    return Memory(parts, parts["weights"] + parts["keys and values"] + max(gathered, prompt) + parts["overhead"])


def rows_at_once(shape: Shape, length: int, max_memory: int = GIB) -> int:
    """Hypothetical runs of one token in a batch, as `interventions.rows_in_memory` says."""
    per_position = 6 * shape.d_model + 3 * shape.intermediate + 6 * shape.z + 2 * shape.n_heads * length
    return max(1, max_memory // (4 * (per_position + 2 * shape.vocabulary)))
