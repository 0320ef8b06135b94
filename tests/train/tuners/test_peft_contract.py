"""What every tuner of headtune owes PEFT and the trainers on top of it, whatever it computes.

One suite over a table of tuners and a few families. A new tuner is a row of TUNERS; what it computes is tested
elsewhere (test_adapter.py, test_slices.py).
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from headtune.train.tuners.head_slices import HeadSlicesConfig
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.tiny import KINDS, Kind, tiny_model, tiny_tokenizer
from helpers.trainers import config_of

HEADS = [[0, 1], [2, 0], [2, 3]]  # one layer without, one with one, one with two
OTHERS = [[1, 2], [2, 3]]  # a layer that HEADS does not touch, and a head in common


def mlps(heads: list[list[int]]) -> list[int]:
    return sorted({layer for layer, _ in heads})


@dataclass(frozen=True)
class Tuner:
    """A way of tuning: `config(heads, **options of any PeftConfig)`, and what its parameters' names begin with."""

    config: Callable[..., PeftConfig]
    prefix: str = "head_tuning_"


TUNERS = {
    "scale": Tuner(lambda heads, **o: HeadTuningConfig(heads=heads, offset=False, **o)),
    "scale-head": Tuner(lambda heads, **o: HeadTuningConfig(heads=heads, scale="head", **o)),
    "offset": Tuner(lambda heads, **o: HeadTuningConfig(heads=heads, scale="none", **o)),
    "gates": Tuner(lambda heads, **o: HeadTuningConfig(heads=heads, gates=True, **o)),
    "mlp": Tuner(lambda heads, **o: HeadTuningConfig(mlp_layers=mlps(heads), **o)),
    "everything": Tuner(lambda heads, **o: HeadTuningConfig(heads=heads, gates=True, mlp_layers=mlps(heads), **o)),
    "slices": Tuner(lambda heads, **o: HeadSlicesConfig(heads=heads, **o), "head_slices_"),
    "slices-o": Tuner(lambda heads, **o: HeadSlicesConfig(heads=heads, parts=["o"], **o), "head_slices_"),
    "slices-rank": Tuner(lambda heads, **o: HeadSlicesConfig(heads=heads, rank=2, alpha=2, **o), "head_slices_"),
    "slices-shared": Tuner(
        lambda heads, **o: HeadSlicesConfig(heads=heads, parts=["o"], rank=2, alpha=2, share="layer", **o),
        "head_slices_",
    ),
}
FAMILIES = ("llama-gqa", "gpt2", "phi3", "gpt_neox")


@pytest.fixture(params=TUNERS)
def tuner(request: pytest.FixtureRequest) -> Tuner:
    return TUNERS[request.param]


@pytest.fixture(params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def build(kind: Kind) -> Any:
    return tiny_model(kind.family, **kind.config)


def batch(rows: int = 2) -> Tensor:
    return torch.randint(3, 300, (rows, 7), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch(), use_cache=False).logits
    return found


def gradients(model: Any, tuner: Tuner, tokens: Tensor | None = None) -> dict[str, Tensor]:
    """Of a fixed batch's loss, by parameter name; gates and dropout draw what they draw after seed 0."""
    model.zero_grad()
    tokens = batch() if tokens is None else tokens
    torch.manual_seed(0)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()  # autograd.grad fails where it reenters
    found = {name: parameter.grad for name, parameter in sorted(adapter_parameters(model, tuner).items())}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    return {name.removeprefix("module."): gradient.clone() for name, gradient in found.items() if gradient is not None}


def adapter_parameters(model: nn.Module, tuner: Tuner, adapter: str = "default") -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if f".{tuner.prefix}" in name and name.endswith(f".{adapter}")
    }


def randomise(model: nn.Module, tuner: Tuner, adapter: str = "default", seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, tuner, adapter).values():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def adapted(tuner: Tuner, kind: Kind, heads: list[list[int]] = HEADS, seed: int = 3, **options: Any) -> Any:
    """A PeftModel with a random adapter, in eval mode."""
    model = get_peft_model(build(kind), tuner.config(heads, **options))
    randomise(model, tuner, seed=seed)
    return model.eval()


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


# --- off, on, another -------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_the_base_exactly_and_only_it_trains(tuner: Tuner, kind: Kind) -> None:
    model = get_peft_model(build(kind), tuner.config(HEADS)).eval()
    assert torch.equal(logits(model), logits(build(kind)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_parameters(model, tuner)) and trained


def test_disable_adapter_is_the_base_exactly(tuner: Tuner, kind: Kind) -> None:
    base, model = logits(build(kind)), adapted(tuner, kind)
    changed = logits(model)
    assert (changed - base).abs().max() > 1e-3, "the random adapter must matter"
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), changed)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", FAMILIES[:2], indirect=True)
def test_several_adapters(tuner: Tuner, kind: Kind, tmp_path: Path) -> None:
    """Each is itself, whichever was added, loaded or deleted before."""
    expected = {
        "default": logits(adapted(tuner, kind)),
        "other": logits(adapted(tuner, kind, OTHERS, seed=4)),
        "third": logits(adapted(tuner, kind, [[1, 0]], seed=5)),
    }
    model = adapted(tuner, kind)
    model.add_adapter("other", tuner.config(OTHERS))
    randomise(model, tuner, "other", seed=4)
    model.add_adapter("third", tuner.config([[1, 0]]))
    randomise(model, tuner, "third", seed=5)
    assert torch.equal(logits(model), expected["default"]), "adding an adapter must not switch it on"
    for name in expected:
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == set(adapter_parameters(model, tuner, name))

    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(build(kind), str(tmp_path)).eval()
    for name in ("other", "third"):
        loaded.load_adapter(str(tmp_path / name), name)
        assert torch.equal(logits(loaded), expected["default"])
    for name in reversed(expected):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), expected[name])

    loaded.set_adapter("other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that another adapter becomes active
        loaded.delete_adapter("other")
    assert not adapter_parameters(loaded, tuner, "other")
    assert loaded.active_adapters == ["default"]
    assert torch.equal(logits(loaded), expected["default"])
    loaded.set_adapter("third")
    assert torch.equal(logits(loaded), expected["third"])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES[1:3], indirect=True)
def test_saved_and_loaded_is_the_same(tuner: Tuner, kind: Kind, tmp_path: Path) -> None:
    base_folder, folder = tmp_path / "base", tmp_path / "adapter"
    base = build(kind)
    base.save_pretrained(base_folder)
    base.name_or_path = str(base_folder)
    model = get_peft_model(base, tuner.config(HEADS, task_type="CAUSAL_LM"))
    randomise(model, tuner)
    expected = logits(model.eval())
    model.save_pretrained(str(folder), save_embedding_layers=False)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    parameters = adapter_parameters(model, tuner)
    stored = load_file(folder / "adapter_model.safetensors")
    same({f"{name}.default": tensor for name, tensor in sorted(stored.items())}, dict(sorted(parameters.items())))

    loaded = PeftModel.from_pretrained(build(kind), str(folder)).eval()
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.peft_config["default"].to_dict() == model.peft_config["default"].to_dict() | {"inference_mode": True}
    frugal = PeftModel.from_pretrained(build(kind), str(folder), low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(frugal), expected)
    resumed = PeftModel.from_pretrained(build(kind), str(folder), is_trainable=True)
    assert all(parameter.requires_grad for parameter in adapter_parameters(resumed, tuner).values())
    auto = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    assert torch.equal(logits(auto), expected)
    plain = build(kind)
    plain.load_adapter(str(folder))  # transformers' own way, without a PeftModel
    assert torch.equal(logits(plain.eval()), expected)


@pytest.mark.slow
def test_another_process_loads_it_after_the_import(tmp_path: Path) -> None:
    """`import headtune.train` is all it takes, after PEFT; before it: test_the_import_is_cheap_and_leaves_nothing."""
    kind = KINDS["llama"]
    base = build(kind)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    for name in ("everything", "slices"):
        model = get_peft_model(copy.deepcopy(base), TUNERS[name].config(HEADS, task_type="CAUSAL_LM"))
        randomise(model, TUNERS[name])
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        save_file({"logits": logits(model.eval())}, tmp_path / f"{name}.safetensors")
    script = f"""
import sys, torch
import peft, headtune.train
from safetensors.torch import load_file
for name in ("everything", "slices"):
    folder = {str(tmp_path)!r} + "/" + name
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    found = model(torch.tensor({batch().tolist()}), use_cache=False).logits
    assert torch.equal(found, load_file(folder + ".safetensors")["logits"]), name
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_the_import_is_cheap_and_leaves_nothing_behind() -> None:
    """Neither PEFT nor torch comes with it; transformers looks for PEFT without importing it; then it is imported."""
    script = """
import sys, headtune.train, headtune.cli.main
assert not {"peft", "torch", "transformers"} & set(sys.modules)
import importlib.util
assert importlib.util.find_spec("peft") is not None and "peft" not in sys.modules
import peft
assert {"HEAD_TUNING", "HEAD_SLICES"} <= {str(kind.value) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("headtune")]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merge_and_unload_is_a_plain_model_with_the_same_logits(tuner: Tuner, kind: Kind) -> None:
    model = adapted(tuner, kind)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not any(tuner.prefix in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_merge_then_unmerge_is_bit_exact(tuner: Tuner, kind: Kind) -> None:
    model = adapted(tuner, kind)
    expected, before = logits(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.get(name, -tensor))
    }
    assert changed, "merging must change the weights"
    model.unmerge_adapter()
    same(dict(model.state_dict()), dict(before))
    assert torch.equal(logits(model), expected)


def test_unload_gives_the_base_back(tuner: Tuner, kind: Kind) -> None:
    """Also after merging in half precision, where weights that were computed back would be rounded."""
    for dtype in (torch.bfloat16, torch.float16):
        before = dict(build(kind).to(dtype).state_dict())
        model = get_peft_model(build(kind).to(dtype), tuner.config(HEADS))
        randomise(model, tuner)
        model.merge_adapter()
        model.unmerge_adapter()
        same(dict(model.unload().state_dict()), before)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_float32_adapter_over_a_bfloat16_base(tuner: Tuner, kind: Kind) -> None:
    model = get_peft_model(build(kind).to(torch.bfloat16), tuner.config(HEADS)).eval()
    parameters = adapter_parameters(model, tuner)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert torch.equal(logits(model), logits(build(kind).to(torch.bfloat16)))
    randomise(model, tuner)
    expected = logits(adapted(tuner, kind))
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(
        gradient.dtype == torch.float32 and gradient.abs().max() > 0 for gradient in gradients(model, tuner).values()
    )


def test_gradient_checkpointing_gives_the_same_gradients(tuner: Tuner, kind: Kind) -> None:
    """In training mode: what gates draw must be drawn again in the recomputation."""
    model = adapted(tuner, kind).train()
    expected = gradients(model, tuner)
    model.enable_input_require_grads()  # reentrant checkpoints see no gradient without
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert model.is_gradient_checkpointing
        same(gradients(model, tuner), expected, 1e-6)


class StopAfterSave(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def trainer_of(tuner: Tuner, folder: Path, callbacks: list[TrainerCallback] | None = None) -> Any:
    from datasets import Dataset  # here, so that the processes of the last test start without them
    from trl import SFTTrainer

    rows = [
        {"prompt": f"List five cities in {name}.\n1.", "completion": " Rome\n"} for name in ("Italy", "Japan", "Spain")
    ]
    return SFTTrainer(
        build(KINDS["llama-gqa"]),
        train_dataset=Dataset.from_list(rows),
        peft_config=tuner.config(HEADS, task_type="CAUSAL_LM"),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        args=config_of(folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.05),
    )


@pytest.mark.parametrize("name", ["everything", "slices", "slices-rank"])
def test_a_resumed_run_ends_where_it_would_have(name: str, tmp_path: Path) -> None:
    tuner = TUNERS[name]
    whole = trainer_of(tuner, tmp_path / "whole")
    whole.train()
    expected = adapter_parameters(whole.model, tuner)
    assert all(parameter.abs().max() > 0 for parameter in expected.values())

    trainer_of(tuner, tmp_path / "broken", [StopAfterSave()]).train()
    checkpoint = tmp_path / "broken" / "checkpoint-2"
    assert load_file(checkpoint / "adapter_model.safetensors")
    assert not list(checkpoint.glob("adapter_model*.bin"))
    resumed = trainer_of(tuner, tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    same(dict(adapter_parameters(resumed.model, tuner)), dict(expected))


PARALLEL = ("everything", "slices")


def one_rank(rank: int, folder: str) -> None:
    """Two processes, half the batch each; every one draws the same gates."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for name in PARALLEL:
        model = adapted(TUNERS[name], KINDS["llama-gqa"]).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        found = gradients(parallel, TUNERS[name], batch(4)[2 * rank : 2 * rank + 2])
        save_file(found, Path(folder) / f"{name}.{rank}.safetensors")
        torch.distributed.barrier()
        del parallel  # which holds on to the group
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    for name in PARALLEL:
        expected = gradients(adapted(TUNERS[name], KINDS["llama-gqa"]).train(), TUNERS[name], batch(4))
        for rank in range(2):
            found = load_file(tmp_path / f"{name}.{rank}.safetensors")
            same(dict(sorted(found.items())), expected, 1e-6)
