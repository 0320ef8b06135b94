"""What is learnt of chats: the assistant's next words and the end of its turn, as each objective's trainer has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from headtune.analysis.models import loading
from headtune.analysis.tasks.chat import as_chat
from headtune.analysis.tasks.messages import ChatTemplate
from headtune.analysis.tasks.task import Task, parse_example
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.train.config.methods import AnswerSetConfig
from headtune.train.config.recipe import load_recipe
from headtune.train.evaluation.evaluate import Scored
from headtune.train.trainer import on_policy_lists, training, training_rows
from headtune.train.trainer.objectives import objective_of
from headtune.train.trainer.rows import rows_of
from helpers.small_runs import write_recipe
from helpers.tiny import FACTS, save_tiny, tiny_task, tiny_tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder whose tokenizer puts <bos> in front and has a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("chatty") / "model", "llama")
    speaker().save_pretrained(folder)
    return folder


def speaker() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def talks() -> Task:
    """Conversations of three turns with one answer and a wrong one."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Some cities, please."},
                {"role": "assistant", "content": "Where?"},
                {"role": "user", "content": f"In {subject}."},
            ],
            "subject": subject,
            "answers": cities[:1],
            "incorrect": ["Oxford"],
        }
        for subject, cities in FACTS.items()
    ]
    return Task("talks", tuple(parse_example(row, "here") for row in rows), True, kind="exact_match")


def prepared(task: Task, model: Path, folder: Path, objective: str, recipe: str = "lora", **training_keys: Any) -> Any:
    """The dataset that the objective's trainer has made of a task, and the task's prompts in the template."""
    words = {"max_steps": 1, "use_cpu": True} | training_keys
    path = write_recipe(folder, model, recipe=recipe, heads=None, method={"objective": objective}, training=words)
    loaded = load_recipe(str(path))
    heads = loading.load_model(str(model))
    chosen = objective_of(loaded.method)
    data = chosen.data(loaded, heads, task, chosen.prepare(loaded, heads, task), lambda _line: None)
    arguments = training.training_arguments(loaded)
    trainer = data.trainer(heads.hf, args=arguments, processing_class=heads.tokenizer, **data.arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.train_dataset, batch, data.summary


def test_sft_learns_the_assistants_words_alone(chatty: Path, tmp_path: Path) -> None:
    """Of a conversation the answer and the end of its turn: not the user's words, not the assistant's before."""
    task, tokenizer = talks(), speaker()
    rows, _, summary = prepared(task, chatty, tmp_path, "sft")
    assert len(rows) == len(task.examples) and summary["chat_template"] is True
    for row, example, shown in zip(rows, task.examples, as_chat(task, tokenizer).examples, strict=True):
        ids = row["input_ids"]
        assert tokenizer.decode(ids) == shown.prompt + example.answers[0] + "<eos>"
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        learnt = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learnt) == example.answers[0] + "<eos>"
        assert row["labels"][-len(learnt) :] == learnt


def test_a_list_of_a_chat_stays_open(chatty: Path, tmp_path: Path) -> None:
    task, tokenizer = replace(tiny_task(previous=(2,)), chat_template=ChatTemplate(system="Be short.")), speaker()
    rows, _, _ = prepared(task, chatty, tmp_path, "sft")
    for row, shown in zip(rows, as_chat(task, tokenizer).examples, strict=True):
        assert shown.prompt.startswith("<bos><|system|>\nBe short.<eos>\n<|user|>\n")
        learnt = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert learnt[0] == " " and learnt[-1] == "\n" and learnt.strip() in shown.remaining
        assert tokenizer.decode(row["input_ids"]) == shown.prompt + learnt


def test_a_loss_on_the_prompt_where_it_is_asked_for(chatty: Path, tmp_path: Path) -> None:
    rows, _, _ = prepared(talks(), chatty, tmp_path, "sft", completion_only_loss=False)
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_preferences_among_replies(chatty: Path, tmp_path: Path) -> None:
    task, tokenizer = talks(), speaker()
    rows, batch, _ = prepared(task, chatty, tmp_path, "dpo", per_device_train_batch_size=2)
    for row, shown in zip(rows, as_chat(task, tokenizer).examples, strict=True):
        assert tokenizer.decode(row["prompt_ids"]) == shown.prompt
        assert tokenizer.decode(row["chosen_ids"]) == shown.answers[0] + "<eos>"
        assert tokenizer.decode(row["rejected_ids"]) == "Oxford<eos>"
    assert batch["input_ids"].shape[0] == 4
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == 4
    longest = max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows)
    training_rows.check_row_length("talks", rows, tokenizer, longest)
    with pytest.raises(InputError, match="longer than the"):
        training_rows.check_row_length("talks", rows, tokenizer, longest - 1)


def test_rows_of_a_sequence() -> None:
    tokenizer = speaker()
    for task, end in ((talks(), "<eos>"), (replace(tiny_task(), chat_template=True), "\n")):
        for row, shown in zip(rows_of(task, tokenizer, 0, 0), as_chat(task, tokenizer).examples, strict=True):
            learnt = tokenizer.decode([label for label in row.labels if label != -100])
            assert tokenizer.decode(row.input_ids) == shown.prompt + learnt
            assert learnt.endswith(end) and learnt.removesuffix(end).strip() in shown.remaining


BEGUN = " Bonn\n2. Derby\n3. Vigo"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("List cities in Italy.\n1.", BEGUN),
        ("Which cities are in Italy?", "1." + BEGUN),
        ("Which cities are in Italy?", "Here are **cities in Italy**:\n\n1." + BEGUN),
        ("Which cities are in Italy?", "- Bonn\n- Derby\n- Vigo"),
    ],
)
def test_a_models_own_lists_stay_in_its_turn(
    prompt: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On-policy prompts: the user's turn is what it was, and what the model wrote is the assistant's."""
    tokenizer = speaker()
    row = {"prompt": prompt, "subject": "Italy", "answers": FACTS["Italy"], "previous": []}
    task = Task("asked", (parse_example(row, "here"),), True)

    def wrote(_model: Any, _tokenizer: Any, asked: Task, *_: Any) -> list[Scored]:
        return [Scored(example, text, ("Bonn", "Derby", "Vigo"), ("wrong",) * 3, {}) for example in asked.examples]

    monkeypatch.setattr(on_policy_lists, "generate_lists", wrote)
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path))
    block = AnswerSetConfig(own_lists=1.0, own_items=2)
    written, cached = (
        on_policy_lists.answer_set_task(_Model(), tokenizer, task, block, 8, 0, weights_sha256="0")  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert written.examples == cached.examples and written.chat_template is True
    start = as_chat(task, tokenizer).examples[0].prompt
    ends = [text.index(item) - 1 for item in ("Derby", "Vigo")]
    shown = {example.prompt: example.previous for example in as_chat(written, tokenizer).examples}
    assert shown == {start + text[: ends[0]]: ("Bonn",), start + text[: ends[1]]: ("Bonn", "Derby")}
    assert all(tokenizer.decode(each.tokens[-1:]) in ".-" for each in encode(written, tokenizer).examples)


class _Model:
    device = type("Device", (), {"type": "cpu"})()
