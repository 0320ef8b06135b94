"""Peak memory and time of a training step as torch's own trackers give them, beside `headtune plan` and real steps.

    python benchmarks/plan_trackers.py                all cases and attempts; writes results/plan_trackers.json
    python benchmarks/plan_trackers.py --only lora    some of them, by name
    python benchmarks/plan_trackers.py --table        write the table of docs/scale.md

A case is a training of benchmarks/plan.py: the same model, adapter, sizes and loss, as a loop of two steps (forward,
backward, AdamW), in a process of its own for each of these:

    measured      the loop on real tensors, one thread; the peak as benchmarks/plan.py measures it, the time of a step
    ours          the plan's peak, without its overhead
    mem_tracker   torch.distributed._tools.mem_tracker.MemTracker around the same loop on fake tensors

MemTracker refuses frozen parameters and PEFT makes no adapter of fake tensors (both are among the attempts). So for it
the model is made on the meta device, its tensors are replaced by fake ones, and what is frozen becomes buffers. The
trainer chooses labelled positions by a mask; the loop has their indices, which is all that fake tensors can follow.

An attempt is one thing that a plan has to answer, given to a tracker: a figure, or the first line of the error. Times
are CPU seconds of one thread, which other processes stretch less than time by the clock; `resident` is what a process
came to hold beyond its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plan as planning
from readme import put, rows

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "plan_trackers.json"
DOCUMENT = "docs/scale.md"
MODEL = planning.MODEL
CASES = [name for name, (family, *_) in planning.CASES.items() if family in ("lora", "full", "lofit", "masked")]
CASES = [name for name in CASES if "cache" not in name]  # which is the trainer's
MORE, LABELS = 3, 18  # as benchmarks/plan.py's rows come out of the tokenizer: tokens beyond its length, and labels
GPUS = 64
LARGE, LARGE_LENGTH = "llama-3.1-8b", 512


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A model with its adapter, and what a step of its training needs.

    Attributes:
        inputs: all tensors that a step is given.
        step: forward pass, backward pass, optimiser.
    """

    model: Any
    optimizer: Any
    inputs: tuple[Any, ...]
    step: Callable[[], None]


def recipe_of(name: str) -> Any:
    """The recipe of a case, for one step."""
    from headtune.train.config import recipe

    family, changes, batch, _ = planning.CASES[name]
    return recipe.parse(
        {
            "recipe": family,
            "model": {"name": MODEL, "dtype": "float32"},
            **({"heads": changes["heads"]} if "heads" in changes else {}),
            "task": {"train": "train.jsonl", "eval": "eval.jsonl", "kind": "exact_match", "split": {"by": "file"}},
            "method": {"objective": "sft"},
            "training": {
                "max_steps": 1,
                "per_device_train_batch_size": batch,
                "gradient_checkpointing": changes.get("checkpointing", False),
            },
            "output_dir": "runs/none",
        }
    )


def adapted_model(name: str) -> Any:
    """A case's model in training mode, its weights drawn at random."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from headtune.analysis.models.loading import resolve
    from headtune.train.methods.base import method_named

    parsed = recipe_of(name)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve(MODEL)))
    if parsed.training["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    pairs = parsed.heads.pairs if parsed.heads else []
    config = method_named(parsed.recipe).peft_config(parsed.method, pairs, model)
    return (model if config is None else get_peft_model(model, config)).train()


def faked(model: Any) -> Any:
    """Give a model of the meta device fake tensors; in a block of FakeTensorMode."""
    import torch

    fakes: dict[int, Any] = {}  # a tied weight stays tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    empty: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    fakes[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = fakes[id(tensor)]
    return model


def fake_model(name: str) -> Any:
    """`adapted_model` of fake tensors; in a block of FakeTensorMode."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("meta"):
        model = adapted_model(name)
    return faked(model)


def without_frozen_parameters(model: Any) -> Any:
    """Make buffers of parameters that are not trained."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, parameter, persistent=False)
    return model


def loop_of(model: Any, batch: int, length: int, labels: int = LABELS) -> Loop:
    """Two batches are the same; rows are of three lengths, and the last tokens of each are labels."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(3, 1000, (batch, length))
    mask = torch.ones_like(ids)
    ends = [length - 3 * (row % 3) for row in range(batch)]
    for row, end in enumerate(ends):
        mask[row, end:] = 0
    at_rows = torch.arange(batch).repeat_interleave(labels)
    at_columns = torch.cat([torch.arange(end - labels - 1, end - 1) for end in ends])
    # As `headtune.train.losses.label_logits.labelled_positions` does with a mask.
    targets = torch.cat([ids.new_full((1,), -100), ids[at_rows, at_columns + 1]])[None]

    def after(_module: Any, _arguments: Any, output: Any) -> Any:
        hidden = output.last_hidden_state[at_rows, at_columns]
        output["last_hidden_state"] = torch.cat([hidden, hidden[-1:]])[None]
        return output

    base.base_model.register_forward_hook(after)

    def step() -> None:
        output = model(input_ids=ids, attention_mask=mask, labels=targets, fused_lm_head=True)
        (-output.log_probs.sum() / (batch * labels)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Loop(model, optimizer, (ids, mask, at_rows, at_columns, targets), step)


def sizes_of(name: str) -> tuple[int, int]:
    """Rows of a batch and tokens of the longest."""
    *_, batch, length = planning.CASES[name]
    return batch, length + MORE


# --- one case ---------------------------------------------------------------------------------------------------------


def measure(name: str) -> dict[str, Any]:
    """The loop on real tensors, then five steps by the clock of the CPU."""
    loop = loop_of(adapted_model(name), *sizes_of(name))
    peaks: list[int] = []
    with planning.measured(loop.model, peaks):
        loop.step()
        loop.step()
    times = [_seconds(loop.step) for _ in range(5)]
    return {"peak": max(peaks), "step_seconds": statistics.median(times), "matmul_rate": _matmul_rate()}


def ours(name: str, rate: float) -> dict[str, Any]:
    """What the plan says; its time of a step for a machine that multiplies matrices at this rate."""
    from headtune.train.memory import estimate, model_shape
    from headtune.train.runs import memory_of_recipe

    batch, length = sizes_of(name)
    parsed = recipe_of(name)
    shape = model_shape.shape_of(MODEL)
    start = time.process_time()
    setup = memory_of_recipe.setup_of(parsed, "single", 1, length, LABELS, "cpu")
    stage = memory_of_recipe.stages(parsed, shape, setup)[-1]
    formulas = time.process_time() - start
    assert setup.batch == batch
    return {
        "peak": stage.memory.peak - estimate.OVERHEAD["cpu"],
        "step_seconds": list(stage.seconds(rate)),
        "formula_seconds": formulas,
    }


def mem_tracker(name: str) -> dict[str, Any]:
    """The loop on fake tensors under MemTracker."""
    from torch._subclasses import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        loop = loop_of(without_frozen_parameters(fake_model(name)), *sizes_of(name))
        tracker = MemTracker()
        tracker.track_external(loop.model, loop.optimizer, *loop.inputs)
        two_steps(loop, tracker)
    return {"peak": total(tracker), "parts": parts(tracker)}


def two_steps(loop: Loop, tracker: Any) -> None:
    with tracker:
        loop.step()
        tracker.reset_mod_stats()  # it refuses a second pass with the statistics of the first
        loop.step()


def total(tracker: Any) -> int:
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())


def parts(tracker: Any) -> dict[str, int]:
    snapshots = tracker.get_tracker_snapshot("peak").values()
    sizes = [item for snapshot in snapshots for item in snapshot.items()]
    return {kind.value: size for kind, size in sizes if kind != "Total" and size}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _matmul_rate() -> float:
    """Operations a second of this machine's matrix products, the best of ten."""
    import torch

    left = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(_seconds(lambda: left @ left) for _ in range(10))


# --- attempts ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake() -> Iterator[None]:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        yield


def adapter_of_fake_tensors() -> dict[str, Any]:
    with fake():
        adapted_model("lora")
    return {}


def frozen_parameters() -> dict[str, Any]:
    from torch.distributed._tools.mem_tracker import MemTracker

    with fake():
        loop = loop_of(fake_model("lora"), *sizes_of("lora"))
        with MemTracker():
            loop.step()
    return {}


def second_step() -> dict[str, Any]:
    from torch.distributed._tools.mem_tracker import MemTracker

    with fake():
        loop = loop_of(fake_model("full"), *sizes_of("full"))
        with MemTracker():
            loop.step()
            loop.step()
    return {}


def trainer_of_fake_tensors() -> dict[str, Any]:
    """The trainer of a recipe, given a fake model."""
    import tempfile

    from datasets import Dataset

    from headtune.analysis.models.loading import load_tokenizer
    from headtune.train.trainer import penalised_trainers, training

    tokenizer = load_tokenizer(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    batch, length = sizes_of("full")
    ids = list(range(3, 3 + length))
    row = {"input_ids": ids, "labels": [-100] * (length - LABELS) + ids[-LABELS:]}
    with tempfile.TemporaryDirectory() as folder, fake():
        arguments = training.training_arguments(recipe_of("full"), output_dir=folder)
        data = Dataset.from_list([row] * batch)
        model = fake_model("full")
        penalised_trainers.SFT(model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    return {}


def labels_of_fake_tensors() -> dict[str, Any]:
    """A pass over rows whose labelled positions are chosen by a mask, as around the trainer."""
    import torch

    from headtune.train.losses.label_logits import labelled_positions

    with fake():
        model = fake_model("full")
        ids = torch.randint(3, 1000, sizes_of("full"))
        labels = ids.clone()
        labels[:, :-LABELS] = -100
        with labelled_positions(model):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    return {}


def model_of_fake_tensors() -> dict[str, Any]:
    from headtune.analysis.models.loading import load_model

    with fake():
        load_model(MODEL)
    return {}


def identify_on_fake_tensors() -> dict[str, Any]:
    """Identify heads, without the check of the model that comes before."""
    from unittest import mock

    from headtune.analysis.identify.pipeline import identify
    from headtune.analysis.models import loading
    from headtune.analysis.tasks.loading import load_task

    tokenizer = loading.load_tokenizer(MODEL)
    task = load_task("country_cities:train").limited(3)
    with fake(), mock.patch.object(loading, "check"):
        identify(loading.wrap_model(fake_model("full"), tokenizer, MODEL), task, verify_top=1, n_random=1)
    return {}


def runtime_estimator(mode: str) -> dict[str, Any]:
    """An operation that fails is told afterwards: the error itself would end the process without a word."""
    from torch.distributed._tools.runtime_estimator import RuntimeEstimator

    errors: list[Exception] = []
    with fake():
        loop = loop_of(fake_model("full"), *sizes_of("full"))
        estimator = RuntimeEstimator()(mode)
        estimate = estimator._estimate

        def guarded(function: Any, arguments: Any, options: Any) -> Any:
            try:
                return estimate(function, arguments, options)
            except Exception as error:
                if not errors:
                    errors.append(error.with_traceback(None))  # which would hold the operation's tensors
                return function(*arguments, **options or {}), 0.0

        estimator._estimate = guarded
        with estimator:
            loop.step()
    if errors:
        raise errors[0]
    return {"step_seconds": estimator.total_runtime / 1e3}


def unguarded_estimator(name: str) -> dict[str, Any]:
    """A step under an estimator of torch.distributed._tools, as it is."""
    from torch.distributed._tools.runtime_estimator import RuntimeEstimator
    from torch.distributed._tools.sac_estimator import SACEstimator

    kinds: dict[str, Any] = {"RuntimeEstimator": RuntimeEstimator, "SACEstimator": SACEstimator}
    with fake():
        loop = loop_of(fake_model("full"), *sizes_of("full"))
        with kinds[name]()(estimate_mode_type="operator-level-cost-model"):
            loop.step()
    return {}


def fsdp(name: str) -> dict[str, Any]:
    """A case under FSDP2 on many pretended processes."""
    import torch
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from headtune.train.memory import estimate, model_shape
    from headtune.train.runs import memory_of_recipe

    batch, length = sizes_of(name)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=GPUS)
    mesh = init_device_mesh("cpu", (GPUS,))
    with fake():
        model = fake_model(name)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for module in (*base.model.layers, model):
            fully_shard(module, mesh=mesh)
        loop = loop_of(model, batch, length)
        tracker = FSDPMemTracker(loop.model, loop.optimizer)
        tracker.track_inputs(loop.inputs)
        two_steps(loop, tracker)
    parsed, shape = recipe_of(name), model_shape.shape_of(MODEL)
    setup = memory_of_recipe.setup_of(parsed, "fsdp2", GPUS, length, LABELS, "cpu")
    memory = memory_of_recipe.stages(parsed, shape, setup)[-1].memory
    return {"peak": total(tracker), "parts": parts(tracker), "ours": memory.peak - estimate.OVERHEAD["cpu"]}


def large_model() -> dict[str, Any]:
    """Full fine-tuning of a model whose weights are not here."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl.trainer.utils import add_fused_lm_head

    from headtune.train.memory import estimate, model_shape

    shape = model_shape.shape_of(LARGE)
    config = LlamaConfig(
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    with fake():
        with unset_fake_temporarily(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
            add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        loop = loop_of(faked(model), 2, LARGE_LENGTH)
        tracker = MemTracker()
        tracker.track_external(loop.model, loop.optimizer, *loop.inputs)
        two_steps(loop, tracker)
    setup = estimate.Setup(batch=2, length=LARGE_LENGTH, labels=LABELS, device="cpu")
    memory = estimate.training(shape, model_shape.everything(shape), setup)
    return {"peak": total(tracker), "parts": parts(tracker), "ours": memory.peak - estimate.OVERHEAD["cpu"]}


ATTEMPTS: dict[str, tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
    # name -> (what is attempted, function, its arguments)
    "adapter": ("PEFT puts a LoRA on a model of fake tensors", adapter_of_fake_tensors, ()),
    "frozen": ("MemTracker on a model with frozen parameters", frozen_parameters, ()),
    "second step": ("MemTracker over two steps without reset_mod_stats", second_step, ()),
    "trainer": ("the recipe's trainer on fake tensors", trainer_of_fake_tensors, ()),
    "labels": ("labelled positions of fake tensors", labels_of_fake_tensors, ()),
    "load": ("load_model on fake tensors", model_of_fake_tensors, ()),
    "identify": ("identify on fake tensors", identify_on_fake_tensors, ()),
    "benchmark": ("RuntimeEstimator, operator-level-benchmark", runtime_estimator, ("operator-level-benchmark",)),
    "cost model": ("RuntimeEstimator, operator-level-cost-model", runtime_estimator, ("operator-level-cost-model",)),
    "estimator": ("RuntimeEstimator, cost model, errors not caught", unguarded_estimator, ("RuntimeEstimator",)),
    "sac": ("SACEstimator, cost model, errors not caught", unguarded_estimator, ("SACEstimator",)),
    "fsdp2": (f"FSDPMemTracker, full on {GPUS} pretended processes", fsdp, ("full",)),
    "fsdp2, lofit": (f"FSDPMemTracker, lofit on {GPUS} pretended processes", fsdp, ("lofit, layer 0 up",)),
    "large": (f"MemTracker, full on {LARGE}, 2 x {LARGE_LENGTH} tokens", large_model, ()),
}


# --- processes --------------------------------------------------------------------------------------------------------


def _answer(answers: Any, quiet: bool, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)  # what libraries print
    before, start = _resident(), time.process_time()
    try:
        result = work(*arguments)
    except Exception as error:
        if not quiet:
            import traceback

            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answers.send(result | {"seconds": time.process_time() - start, "resident": max(0, peak - before)})


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _forked(quiet: bool, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function answers in a process of its own, how long it took and how much memory it came to need."""
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe()
    process = fork.Process(target=_answer, args=(theirs, quiet, work, arguments))
    process.start()
    theirs.close()
    try:
        result: dict[str, Any] = mine.recv()
    except EOFError:
        process.join()
        result = {"error": f"the process ended with {process.exitcode}"}
    process.join()
    return result


def case_of(name: str, quiet: bool) -> dict[str, Any]:
    real = _forked(quiet, measure, name)
    answers = {
        "measured": real,
        "ours": _forked(quiet, ours, name, real.get("matmul_rate", 1.0)),
        "mem_tracker": _forked(quiet, mem_tracker, name),
    }
    for what, answer in answers.items():
        if "error" in answer:
            sys.exit(f"{name}, {what}: {answer['error']}; see why with --only {name!r} --verbose")
    batch, length = sizes_of(name)
    return {"name": name, "batch": batch, "length": length, "labels": LABELS, **answers}


def main(arguments: argparse.Namespace) -> None:
    # Imported once; each measurement is a fork of this process, with nothing of another's in memory.
    import trl.trainer.sft_trainer  # noqa: F401

    import headtune.train.runs.run  # noqa: F401

    old: dict[str, Any] = {"cases": [], "attempts": []}
    if arguments.only and RESULT.exists():
        old = json.loads(RESULT.read_text(encoding="utf-8"))
    results = {key: {entry["name"]: entry for entry in old[key]} for key in ("cases", "attempts")}
    for name in arguments.only or [*CASES, *ATTEMPTS]:
        if name in CASES:
            results["cases"][name] = case = case_of(name, not arguments.verbose)
            print(f"{name}: {', '.join(_line(case))}")
        else:
            what, work, details = ATTEMPTS[name]
            results["attempts"][name] = {"name": name, "what": what, **_forked(not arguments.verbose, work, *details)}
            print(f"{what}: {results['attempts'][name]}")
        content = {
            "command": "python benchmarks/plan_trackers.py",
            "date": datetime.now(UTC).date().isoformat(),
            "model": MODEL,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
            "resident_after_imports": _resident(),
            "cases": [results["cases"][name] for name in CASES if name in results["cases"]],
            "attempts": [results["attempts"][name] for name in ATTEMPTS if name in results["attempts"]],
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# --- table ------------------------------------------------------------------------------------------------------------


def _line(case: dict[str, Any]) -> list[str]:
    measured, answers = case["measured"]["peak"], (case["ours"], case["mem_tracker"])
    sizes = [text for answer in answers for text in (_mib(answer["peak"]), f"{answer['peak'] / measured - 1:+.1%}")]
    return [_mib(measured), *sizes, *(f"{answer['seconds']:.2g} s" for answer in answers)]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def trackers_table() -> str:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    columns = ["run", "measured", "ours", "off by", "MemTracker", "off by", "ours takes", "MemTracker takes"]
    return rows(columns, [[case["name"], *_line(case)] for case in content["cases"]])


def fill(check: bool = False) -> list[str]:
    """Write the document's table, or (`check`) only say whether it is not what it should be."""
    return [] if put(DOCUMENT, "trackers", trackers_table(), check) else ["trackers"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", choices=[*CASES, *ATTEMPTS])
    parser.add_argument("--table", action="store_true", help=f"write the table of {DOCUMENT} from the result file")
    parser.add_argument("--verbose", action="store_true", help="show what the runs print")
    parsed = parser.parse_args()
    if parsed.table:
        fill()
    else:
        main(parsed)
