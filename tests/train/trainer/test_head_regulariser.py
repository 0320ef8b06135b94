"""Penalties on heads in a trainer of one's own: the loss is that of a recipe, and the model is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, SFTTrainer

from headtune import HeadRegulariserMixin, HeadTuningConfig
from headtune.analysis.models.loading import load_model, wrap_model
from headtune.analysis.tasks.task import to_jsonl
from headtune.analysis.utils.errors import InputError
from headtune.train.config.recipe import parse
from headtune.train.config.regularisers import OutputDrift
from headtune.train.trainer import attach_regularisers, head_regulariser, penalised_trainers
from helpers.small_runs import head_set
from helpers.tiny import save_tiny, tiny_model, tiny_task, tiny_tokenizer
from helpers.trainers import config_of

HEADS = [[0, 1], [2, 0], [2, 3]]
TERMS: list[dict[str, Any]] = [
    {"kind": "output_drift", "weight": 2.0, "heads": {"list": HEADS}},
    {"kind": "attention_kl", "weight": 0.5, "heads": {"list": HEADS[:2]}},
    {"kind": "weight_drift", "weight": 0.1, "heads": {"list": HEADS}},
]
ROWS = [{"input_ids": [5, 6, 7, 8 + n, 9, 10], "labels": [-100, -100, -100, 8 + n, 9, 10]} for n in range(8)]


class Own(HeadRegulariserMixin, SFTTrainer):
    pass


class OwnPlain(HeadRegulariserMixin, Trainer):
    pass


class OwnDpo(HeadRegulariserMixin, DPOTrainer):
    pass


def lora() -> LoraConfig:
    targets = ["q_proj", "v_proj", "o_proj"]
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")


def settings(folder: Path, kind: str = "SFTConfig", **changes: Any) -> Any:
    keys: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    return config_of(folder, kind, **(keys | {"save_strategy": "no", "max_length": None} | changes))


def losses(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def recipes_losses(folder: Path, terms: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The same, as a recipe has it."""
    torch.manual_seed(0)
    model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    trainer = penalised_trainers.SFT(
        model.hf,
        args=settings(folder),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=model.tokenizer,
        peft_config=lora(),
    )
    recipe = parse({"recipe": "lora", "method": {"regularisers": terms}})
    model.record_attention(False)
    with attach_regularisers.with_regularisers(recipe, model, [], tiny_task(), trainer, lambda _line: None):
        return losses(trainer)


def own(folder: Path, terms: Any, model: Any = None, **options: Any) -> Own:
    torch.manual_seed(0)
    return Own(
        tiny_model("llama") if model is None else model,
        args=settings(folder),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        regularisers=terms,
        **({"peft_config": lora()} if model is None else {}),
        **options,
    )


def test_the_loss_is_that_of_a_recipe(tmp_path: Path) -> None:
    trainer = own(tmp_path / "own", TERMS)
    mine, expected = losses(trainer), recipes_losses(tmp_path / "recipe", TERMS)
    plain = SFTTrainer(
        get_peft_model(tiny_model("llama"), lora()),
        args=settings(tmp_path / "plain"),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )
    assert len(mine) == 3
    for here, there in zip(mine, expected, strict=True):
        for name in ("loss", "output_drift", "attention_kl", "weight_drift"):
            assert here[name] == pytest.approx(there[name], rel=1e-6), name
    assert mine[0]["output_drift"] > 0.01 and mine[0]["loss"] > losses(plain)[0]["loss"] + 0.01


def test_the_model_is_left_as_it_was_and_evaluations_have_no_penalty(tmp_path: Path) -> None:
    trainer = own(tmp_path, [OutputDrift(weight=1e6, heads={"list": [(0, 1)]})])  # type: ignore[arg-type]
    trainer.train()
    assert trainer.penalty is None
    base = trainer.model.get_base_model()
    assert base.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in base.modules())
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_loss"] < 100


def test_transformers_own_trainer_and_a_ready_adapter(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), HeadTuningConfig(heads=HEADS, init_std=0.3))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = OwnPlain(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        regularisers=[{"kind": "output_drift", "weight": 1.0, "heads": [(1, 0), (1, 3)]}],
    )
    lines = losses(trainer)
    assert len(lines) == 2 and all(line["output_drift"] > 0 for line in lines)


def test_dpo(tmp_path: Path) -> None:
    rows = [{"prompt": "Where?", "chosen": " Rome", "rejected": " Paris"}] * 4
    trainer = OwnDpo(
        tiny_model("llama"),
        args=settings(tmp_path, "DPOConfig"),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=HeadTuningConfig(heads=HEADS, init_std=0.3),
        regularisers=[{"kind": "output_drift", "weight": 1.0, "heads": HEADS}],
    )
    assert all(line["output_drift"] > 0 for line in losses(trainer))


def test_heads_of_a_head_set_and_fisher_information(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A head set that was made on the base fits the model that carries an adapter."""
    folder = save_tiny(tmp_path / "model", "llama")
    (tmp_path / "task.jsonl").write_text(to_jsonl(tiny_task().examples))
    head_set(load_model(str(folder)).identity()).save(tmp_path / "heads")
    term = {"kind": "weight_drift", "fisher": True, "weight": 10.0, "task": str(tmp_path / "task.jsonl")}
    term["heads"] = {"from": str(tmp_path / "heads"), "role": "recall", "top": 2}
    model = get_peft_model(load_model(str(folder)).hf, lora())
    trainer = own(tmp_path, [term], model)
    assert all(line["weight_drift"] >= 0 for line in losses(trainer))
    assert "other weights" not in caplog.text


REFUSED: list[tuple[Any, str]] = [
    ([], "regularisers names none"),
    ([{"kind": "output_drft", "heads": HEADS}], "output_drft"),
    ([{"kind": "output_drift", "wieght": 1.0, "heads": HEADS}], "did you mean 'weight'"),
    ([{"kind": "output_drift"}], "regularisers.0 has no heads"),
    ([{"kind": "output_drift", "heads": [[7, 0]]}], "L7H0"),
    ([{"kind": "output_drift", "heads": {"identify": {}}}], "regularisers.0.heads must be there before"),
    ([{"kind": "prune", "heads": HEADS}], "kind prune is for recipe regularise"),
    ([{"kind": "weight_drift", "fisher": True, "heads": HEADS}], "give its name: task="),
]


@pytest.mark.parametrize("terms, message", REFUSED)
def test_refusals(terms: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        own(tmp_path, terms)
    assert message in str(refused.value) and "method." not in str(refused.value)


def test_checkpointing_that_hides_the_pass(tmp_path: Path) -> None:
    arguments = settings(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="re-entrant checkpointing hides"):
        Own(
            tiny_model("llama"),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(ROWS),
            processing_class=tiny_tokenizer(),
            regularisers=TERMS,
        )


def test_the_digest_of_the_base_under_an_adapter() -> None:
    plain = wrap_model(tiny_model("llama"), tiny_tokenizer()).weights_sha256
    for config in (lora(), HeadTuningConfig(heads=HEADS)):
        adapted = get_peft_model(tiny_model("llama"), config)
        assert head_regulariser._heads_of(adapted, tiny_tokenizer()).weights_sha256 == plain
