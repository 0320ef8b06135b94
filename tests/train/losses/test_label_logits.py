"""Leaving out positions without loss changes neither loss, gradients nor metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from headtune.train.losses.label_logits import labelled_positions
from helpers.tiny import tiny_model, tiny_task, tiny_tokenizer


def model_and_batch(family: str, adapted: bool) -> tuple[Any, dict[str, Tensor]]:
    model: Any = tiny_model(family)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if adapted:
        target = {"gpt2": ["c_attn"]}.get(family, ["q_proj"])
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM")
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (3, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 7 + [0] * 2])
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, :5] = labels[1, :4] = labels[2, 1:5] = -100  # the last row's first label is predicted by nothing
    return model, {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_losses_gradients_and_values_are_those_without(family: str, adapted: bool) -> None:
    model, inputs = model_and_batch(family, adapted)

    def values() -> tuple[Any, dict[str, Tensor]]:
        model.zero_grad()
        outputs = model(**inputs, fused_lm_head=True)
        outputs.loss.backward()
        return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = values()
    seen: list[int] = []
    base = model.get_base_model() if adapted else model
    with labelled_positions(model):
        base.base_model.register_forward_hook(lambda _m, _a, output: seen.append(output.last_hidden_state.shape[:2]))
        found, own = values()
    n = int((inputs["labels"][:, 1:] != -100).sum())
    assert seen == [(1, n + 1)] and n == 4 + 2 + 2
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    mask = expected.label_mask
    for name in ("log_probs", "entropy", "is_top1"):
        torch.testing.assert_close(getattr(found, name).flatten(), getattr(expected, name)[mask], rtol=1e-5, atol=1e-6)
    assert int(found.label_mask.sum()) == n
    assert own.keys() == gradients.keys() and own
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)
    assert values()[0].log_probs.shape == mask.shape, "afterwards the model is what it was"


@torch.no_grad()
def test_other_calls_are_untouched() -> None:
    model, inputs = model_and_batch("llama", True)
    none = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
    calls: list[dict[str, Any]] = [inputs, none | {"fused_lm_head": True}, {"input_ids": inputs["input_ids"]}]
    expected = [model(**call) for call in calls]
    generated = model.generate(input_ids=inputs["input_ids"], max_new_tokens=3, do_sample=False)
    with labelled_positions(model):
        for call, without in zip(calls, expected, strict=True):
            found = model(**call)
            assert found.keys() == without.keys()
            for name in ("loss", "logits", "log_probs"):
                if isinstance(without.get(name), Tensor):
                    torch.testing.assert_close(found[name], without[name], rtol=0, atol=0)
        assert torch.equal(model.generate(input_ids=inputs["input_ids"], max_new_tokens=3, do_sample=False), generated)


def test_through_the_trainer(tmp_path: Path) -> None:
    rows = [{"prompt": e.prompt, "completion": f" {e.answers[-1]}\n"} for e in tiny_task(subjects=4).examples]

    def history(labelled: bool) -> list[dict[str, float]]:
        trainer = SFTTrainer(
            tiny_model("llama"),
            args=SFTConfig(
                str(tmp_path),
                num_train_epochs=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=0.05,
                logging_steps=1,
                save_strategy="no",
                eval_strategy="epoch",
                report_to="none",
                bf16=False,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=datasets.Dataset.from_list(rows[:3]),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        if labelled:
            with labelled_positions(trainer.model):
                trainer.train()
        else:
            trainer.train()
        names = ("loss", "eval_loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_entropy", "num_tokens")
        return [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]

    found, expected = history(True), history(False)
    assert len({entry["loss"] for entry in expected if "loss" in entry}) > 2
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_hooks_are_removed_after_an_error() -> None:
    model, _ = model_and_batch("llama", False)

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    with pytest.raises(KeyboardInterrupt), labelled_positions(model):
        assert hooks() == before + 2
        raise KeyboardInterrupt
    assert hooks() == before


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model, inputs = model_and_batch("llama", True)
    expected = model(input_ids=inputs["input_ids"]).logits
    with labelled_positions(model):
        handle = model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs, fused_lm_head=True)
        handle.remove()
        assert torch.equal(model(input_ids=inputs["input_ids"]).logits, expected)
