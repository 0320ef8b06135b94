"""What the trainers train on, and that the trained loss is the objective, whatever the padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headtune.analysis.models import loading
from headtune.analysis.tasks.task import Example, Kind, Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.train.config.methods import AnswerSetConfig
from headtune.train.config.recipe import load_recipe
from headtune.train.evaluation.evaluate import Scored, parse_items, score_items
from headtune.train.losses.answer_set import answer_set, kl_to_base
from headtune.train.trainer import on_policy_lists, penalised_trainers, training, training_rows
from headtune.train.trainer.answer_set_trainer import AnswerSetCollator, AnswerSetTrainer
from headtune.train.trainer.objectives import objective_of
from headtune.train.trainer.on_policy_lists import answer_set_task, on_policy_examples
from headtune.train.trainer.training_rows import answer_set_rows, sft_rows
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.small_runs import write_recipe
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.trainers import config_of

ITALY = Example(
    "List five cities in Italy.\n1. Rome\n2.", "Italy", ("Rome", "Milan", "Naples", "Turin", "Genoa"), ("Rome",)
)


def writes(monkeypatch: pytest.MonkeyPatch, text: str) -> list[dict[str, Any]]:
    """Every prompt is continued with `text`; returns the calls."""
    calls: list[dict[str, Any]] = []

    def generate(_model: Any, _tokenizer: Any, task: Task, n_items: int, batch_size: int) -> list[Scored]:
        calls.append({"task": task, "n_items": n_items, "batch_size": batch_size})
        items = parse_items(text, n_items)
        return [Scored(e, text, tuple(items), tuple(score_items(e, items, n_items)), {}) for e in task.examples]

    monkeypatch.setattr(on_policy_lists, "generate_lists", generate)
    return calls


def own(monkeypatch: pytest.MonkeyPatch, text: str, example: Example = ITALY, n_items: int = 4) -> list[Example]:
    writes(monkeypatch, text)
    return on_policy_examples(None, None, Task("t", (example,)), n_items)  # type: ignore[arg-type]


# --- the model's own lists --------------------------------------------------------------------------------------------


def test_every_item_border_is_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = own(monkeypatch, " Milan\n3. Tokyo\n4. Tokyo\n5. Genoa\n")
    assert [example.prompt for example in found] == [
        ITALY.prompt + " Milan\n3.",
        ITALY.prompt + " Milan\n3. Tokyo\n4.",
        ITALY.prompt + " Milan\n3. Tokyo\n4. Tokyo\n5.",
    ]
    assert [example.previous for example in found] == [
        ("Rome", "Milan"),
        ("Rome", "Milan", "Tokyo"),
        ("Rome", "Milan", "Tokyo", "Tokyo"),
    ]
    assert all((example.subject, example.answers) == (ITALY.subject, ITALY.answers) for example in found)
    assert [example.remaining for example in found][-1] == ("Naples", "Turin", "Genoa")
    # They are examples like any other: spans and first tokens can be found.
    assert not encode(Task("own", tuple(found)), tiny_tokenizer()).dropped


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        (" Milan, the fashion capital\n3. Turin", [" Milan, the fashion capital\n3."]),
        (" Milan\n- Turin\n* Genoa", [" Milan\n-", " Milan\n- Turin\n*"]),
        (" Milan\n3) Turin", [" Milan\n3)"]),
        (" Milan\nThat is all.\n3. Turin", []),  # no longer a list
        (" Milan\n\n3. Turin", []),
        (" Milan", []),
        ("", []),
    ],
)
def test_where_a_list_is_no_list_any_more(text: str, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [example.prompt for example in own(monkeypatch, text)] == [ITALY.prompt + prompt for prompt in prompts]


def test_a_prompt_with_nothing_left_to_give_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Example("Cities in Italy:\n1. Rome\n2.", "Italy", ("Rome", "Milan", "Turin"), ("Rome",))
    found = own(monkeypatch, " Milan\n3. Turin\n4. Oslo", small)
    assert [example.previous for example in found] == [("Rome", "Milan")]


@pytest.mark.parametrize(("share", "n_given", "n_own"), [(0.0, 8, 0), (0.25, 6, 2), (1.0, 0, 8)])
def test_the_share_of_own_lists(share: float, n_given: int, n_own: int, cities: Task, monkeypatch: Any) -> None:
    calls = writes(monkeypatch, " Rome\n4. Tokyo\n5. Paris\n6. Oslo\n7. Lima\n")
    block = AnswerSetConfig(own_lists=share, own_items=3)
    task = answer_set_task(None, None, cities, block, 8, seed=0, batch_size=5)  # type: ignore[arg-type]
    given = [example for example in task.examples if example in cities.examples]
    assert (len(given), len(task.examples) - len(given)) == (n_given, n_own)
    assert task.examples == answer_set_task(None, None, cities, block, 8, seed=0).examples  # type: ignore[arg-type]
    if n_own:
        other = answer_set_task(None, None, cities, block, 8, seed=1)  # type: ignore[arg-type]
        assert other.examples != task.examples
        assert calls[0]["n_items"] == 4 and calls[0]["batch_size"] == 5
    else:
        assert not calls, "nothing is generated that nobody asked for"


def test_a_model_that_writes_no_lists_is_refused(cities: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    writes(monkeypatch, " Rome and that is it")
    with pytest.raises(InputError, match=r"own_lists=0"):
        answer_set_task(None, None, cities, AnswerSetConfig(own_lists=0.5), 8, seed=0)  # type: ignore[arg-type]


def test_written_lists_are_kept_and_read_back(cities: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path / "cache"))
    # U+2028 and U+0085 end a line for str.splitlines, not for JSON.
    calls = writes(monkeypatch, " Rome\u2028x\x85y\n4. Tokyo\n5. Paris\n")
    block, model = AnswerSetConfig(own_lists=1.0, own_items=2), tiny_model("llama")

    def task(**changes: Any) -> Task:
        options = {"n_rows": 8, "seed": 0, "batch_size": 4, "weights_sha256": "a" * 64} | changes
        return answer_set_task(model, tiny_tokenizer(), cities, block, **options)

    first = task()
    assert task().examples == first.examples
    assert len(calls) == 1, "the same model on the same prompts writes once"
    task(weights_sha256="b" * 64)
    task(n_rows=4)
    assert len(calls) == 3, "another model or other prompts are written anew"


# --- rows and batches -------------------------------------------------------------------------------------------------


def test_answer_set_rows(cities: Task, tokenizer: Any) -> None:
    encoded = encode(cities, tokenizer)
    rows = answer_set_rows(encoded)
    assert len(rows) == len(encoded.examples) > 8
    for row, example in zip(rows, encoded.examples, strict=True):
        assert row["input_ids"] == tokenizer(example.example.prompt).input_ids
        firsts = {tokenizer(f" {answer}").input_ids[0] for answer in example.example.remaining}
        assert set(row["remaining"]) == firsts - set(example.ambiguous)
        given = {tokenizer(f" {answer}").input_ids[0] for answer in example.example.previous}
        assert set(row["previous"]) == given - set(example.ambiguous)
        assert len(set(row["previous"])) == len(row["previous"])
        assert len(row["labels"]) == len(row["input_ids"])
        assert set(row["labels"][:-1]) == {-100} and row["labels"][-1] in row["remaining"]


def test_sft_rows(cities: Task) -> None:
    rows = sft_rows(cities, seed=0)
    for row, example in zip(rows, cities.examples, strict=True):
        assert row["prompt"] == example.prompt
        assert row["completion"][0] == " " and row["completion"][-1] == "\n"
        assert row["completion"][1:-1] in example.remaining
    assert sft_rows(cities, seed=0)["completion"] == rows["completion"]
    assert sft_rows(cities, seed=1)["completion"] != rows["completion"]


@pytest.mark.parametrize(("kind", "end"), [("lists", ["\n"]), ("exact_match", ["\n", "<eos>"])])
def test_a_list_stays_open_and_one_answer_ends(
    kind: Kind, end: list[str], cities: Task, tiny_llama: Path, tmp_path: Path
) -> None:
    """What TRL is given has a loss on the answer and its line's end, and on the text's end where there is no more."""
    heads, task = loading.load_model(str(tiny_llama)), replace(cities, kind=kind)
    recipe = load_recipe(str(write_recipe(tmp_path, tiny_llama, method={"objective": "sft"})))
    rows = objective_of(recipe.method).prepare(recipe, heads, task)
    trainer = penalised_trainers.SFT(heads.hf, args=training.training_arguments(recipe), train_dataset=rows)
    for row, example in zip(trainer.train_dataset, task.examples, strict=False):
        learnt = [token for token in row["labels"] if token != -100]
        prompt = heads.tokenizer(example.prompt).input_ids
        assert row["input_ids"] == prompt + learnt and row["labels"][: len(prompt)] == [-100] * len(prompt)
        words = heads.tokenizer.convert_ids_to_tokens(learnt)
        assert [heads.tokenizer.convert_tokens_to_string([word]) for word in words][-len(end) :] == end


def test_a_list_s_prompt_has_a_loss_where_that_is_asked_for(cities: Task) -> None:
    for row in training_rows.open_rows(sft_rows(cities, 0), tiny_tokenizer(), whole=True):
        assert row["labels"] == row["input_ids"]


def test_rows_that_are_too_long_for_the_model_are_refused(cities: Task) -> None:
    tokenizer, rows = tiny_tokenizer(), sft_rows(cities, 0)
    lengths = [len(tokenizer(row["prompt"] + row["completion"]).input_ids) for row in rows]
    longest = max(lengths)
    training_rows.check_row_length("x", rows, tokenizer, longest + 1)  # with the text's end
    training_rows.check_row_length("x", training_rows.open_rows(rows, tokenizer), tokenizer, longest)
    training_rows.check_row_length("x", rows, tokenizer, None)
    for made, positions in ((rows, longest), (training_rows.open_rows(rows, tokenizer), longest - 1)):
        with pytest.raises(InputError, match=f"'x': .* training rows are longer than the {positions} tokens"):
            training_rows.check_row_length("x", made, tokenizer, positions)


def test_the_collator_pads_on_the_left() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [], "remaining": [9], "previous": [3, 4]},
        {"input_ids": [5, 6], "labels": [], "remaining": [9, 10, 11], "previous": []},
    ]
    batch = AnswerSetCollator(pad_token_id=0)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8], [0, 0, 5, 6]],
        "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1]],
        "position_ids": [[0, 1, 2, 3], [0, 0, 0, 1]],
        "remaining": [[-1, -1, 9], [9, 10, 11]],
        "previous": [[3, 4], [-1, -1]],
    }
    alone = AnswerSetCollator(0)([rows[1]])
    assert alone["previous"].tolist() == [[-1]], "no previous answers in the whole batch is one column of padding"
    # A pad token inside a text is text.
    assert AnswerSetCollator(5)([rows[0]])["attention_mask"].tolist() == [[1, 1, 1, 1]]


# --- the loss ---------------------------------------------------------------------------------------------------------

LONG = Example("and then Some cities in Japan and then:\n- Tokyo\n-", "Japan", ("Tokyo", "Osaka", "Kyoto"), ("Tokyo",))
NONE_GIVEN = Example("Some cities in Spain:\n-", "Spain", ("Madrid", "Sevilla"))
EXAMPLES = (ITALY, LONG, NONE_GIVEN)


def trainer_of(tmp_path: Path, family: str = "llama", block: AnswerSetConfig | None = None, **arguments: Any) -> Any:
    """An AnswerSetTrainer over a tiny model whose adapter is not zero."""
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {"per_device_train_batch_size": 3, "max_steps": 1, "learning_rate": 0.1}
    options |= {"lr_scheduler_type": "constant", "remove_unused_columns": False, "max_length": None}
    options |= {"save_strategy": "no", "logging_steps": 1, "seed": 42}
    trainer = AnswerSetTrainer(
        tiny_model(family),
        train_dataset=answer_set_rows(encode(Task("t", EXAMPLES), tokenizer)),
        data_collator=AnswerSetCollator(tokenizer.pad_token_id),
        peft_config=HeadTuningConfig(heads=[[0, 1], [1, 0], [1, 3]], task_type="CAUSAL_LM"),
        block=block or AnswerSetConfig(unlikelihood=2.0, retention=0.0),
        processing_class=tokenizer,
        args=config_of(tmp_path, **(options | arguments)),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(trainer.model):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    trainer.model.eval()
    return trainer


def trainable(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def slow_loss(model: Any, rows: Any, unlikelihood: float) -> Tensor:
    """The objective row by row, without any padding."""
    losses = []
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[:, -1]
        previous = torch.tensor([row["previous"] or [-1]])
        losses.append(answer_set(logits, torch.tensor([row["remaining"]]), previous, unlikelihood)["loss"])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "phi"])
def test_the_loss_in_a_batch_is_the_objective_row_by_row(family: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, family)
    rows = list(trainer.train_dataset)
    assert len({len(row["input_ids"]) for row in rows}) == 3, "rows of different lengths"
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    found = torch.autograd.grad(loss, trainable(trainer.model))
    expected_loss = slow_loss(trainer.model, rows, 2.0)
    expected = torch.autograd.grad(expected_loss, trainable(trainer.model))
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    for gradient, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() > 1e-5
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


def test_more_padding_changes_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    short = list(trainer.train_dataset)[2:]
    wide = trainer.data_collator(list(trainer.train_dataset))
    alone = trainer.compute_loss(trainer.model, trainer.data_collator(short))
    padded = trainer.compute_loss(trainer.model, {name: tensor[2:] for name, tensor in wide.items()})
    assert padded.item() == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_retention_is_measured_where_there_is_text(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divergence from the base model at the drawn columns of the first rows, padded positions left out."""
    trainer = trainer_of(tmp_path, family, AnswerSetConfig(unlikelihood=2.0, retention=3.0))
    short = list(trainer.train_dataset)[2]
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    rows = [short, *(row for row in trainer.train_dataset if len(row["input_ids"]) == longest)]
    batch = trainer.data_collator(rows)
    padding = longest - len(short["input_ids"])
    kept = [padding - 2, padding - 1, padding + 1, longest - 3]  # two on the padding of the first row, two on its text
    monkeypatch.setattr(trainer, "_columns_for_kl", lambda _width: kept)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    gradients = torch.autograd.grad(loss, trainable(trainer.model))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)

    model, tokens = trainer.model, torch.tensor([short["input_ids"]])
    positions = [column - padding for column in kept[2:]]
    with torch.no_grad():
        adapted = model(tokens, use_cache=False).logits[0, positions]
        with model.disable_adapter():
            base = model(tokens, use_cache=False).logits[0, positions]
        expected = kl_to_base(adapted, base)
    assert expected > 1e-3
    total = slow_loss(model, rows, 2.0) + 3.0 * expected
    assert loss.item() == pytest.approx(total.item(), abs=2e-5)
    assert trainer._metrics["eval"]["retention"][-1] == pytest.approx(expected.item(), rel=1e-4)


def test_columns_for_kl_lie_before_the_end_and_change(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, block=AnswerSetConfig(retention=1.0, retention_positions=4))
    torch.manual_seed(0)
    drawn = [trainer._columns_for_kl(10) for _ in range(200)]
    assert all(len(set(columns)) == 4 and columns == sorted(columns) for columns in drawn)
    assert {column for columns in drawn for column in columns} == set(range(1, 9)), "any column but the first and END"
    assert trainer._columns_for_kl(2) == []
    assert trainer._columns_for_kl(3) == [1]
    assert trainer_of(tmp_path, block=AnswerSetConfig(retention=0.0))._columns_for_kl(10) == []


@pytest.mark.parametrize(("batch_size", "accumulated"), [(3, 1), (1, 3)])
def test_a_step_is_one_step_down_the_mean_over_rows(batch_size: int, accumulated: int, tmp_path: Path) -> None:
    """SGD through the whole trainer: what is learnt is exactly learning rate times the slow gradient."""
    trainer = trainer_of(
        tmp_path,
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulated,
    )
    before = [parameter.detach().clone() for parameter in trainable(trainer.model)]
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    loss = slow_loss(trainer.model, list(trainer.train_dataset), 2.0)
    gradients = torch.autograd.grad(loss, trainable(trainer.model))
    trainer.train()
    for parameter, old, gradient in zip(trainable(trainer.model), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert logged["recall"] + 2.0 * logged["suppression"] == pytest.approx(loss.item(), abs=1e-4)
