"""Runs on chats: the recipe's key reaches training, measuring, the dry run, comparing and the proof of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.models import loading
from headtune.analysis.tasks.messages import ChatTemplate
from headtune.analysis.tasks.task import Task, parse_example
from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.config.recipe import load_recipe
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.evaluation import evaluate
from headtune.train.evaluation.compare import compare_runs
from headtune.train.export.checkpoint import export_prompts, held_out_task
from headtune.train.export.model_card import origin_of
from headtune.train.runs.dry_run import dry_run
from headtune.train.runs.evaluate_target import evaluate_target, target_of
from headtune.train.runs.prepare import prepare
from helpers.small_runs import head_set, train, write_recipe, write_task
from helpers.tiny import FACTS, save_tiny, tiny_tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HOW = {"system": "Be short."}
SETTINGS = {"system": "Be short.", "enable_thinking": False}
START = "<bos><|system|>\nBe short.<eos>\n<|user|>\n"


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder whose tokenizer puts <bos> in front and has a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("chatty") / "model", "llama")
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, model: Path, chat: Any, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    task = {"train": str(write_task(folder)), "max_eval_examples": 2}
    task |= {} if chat is None else {"chat_template": chat}
    return write_recipe(folder, model, **({"task": task, "output_dir": str(folder / "run")} | changes))


def write_talks(folder: Path) -> str:
    path = folder / "talks.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"A city in {s}?"}], "subject": s, "answers": cities[:1]}
        for s, cities in FACTS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, chatty: Path) -> Path:
    """A folder of two finished runs, `chat` and `plain`, which differ in the key alone. Read-only."""
    folder = tmp_path_factory.mktemp("runs")
    for name, chat in (("chat", HOW), ("plain", None)):
        recipe = write(tmp_path_factory.mktemp(name), chatty, chat, output_dir=str(folder / name))
        assert train(recipe) == 0
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_keeps_how_it_asked(runs: Path) -> None:
    chat, plain = (read(runs / name / "evaluation.json") for name in ("chat", "plain"))
    assert chat["chat_template"] == SETTINGS and plain["chat_template"] is False
    assert chat["task"] == plain["task"] and chat["task_sha256"] != plain["task_sha256"]
    assert chat["before"]["p_remaining"] != plain["before"]["p_remaining"]
    record = read(runs / "chat" / "run.json")
    assert record["training_data"]["chat_template"] == SETTINGS
    assert "chat_template" not in read(runs / "plain" / "run.json")["training_data"]
    assert load_recipe(str(runs / "chat" / "recipe.yaml")).task.chat_template is not None


def test_a_plain_run_and_one_of_chats_are_not_set_side_by_side(runs: Path) -> None:
    comparison = compare_runs(runs)
    by_name = {group.runs[0].name: group for group in comparison.groups if group.runs}
    assert len(by_name) == 2 and len({group.measured for group in by_name.values()}) == 2
    titles = {group.task for group in comparison.groups}
    assert titles == {"cities:test", "cities:test, as chats (system 'Be short.')"}


def test_a_measurement_of_plain_prompts_is_not_that_of_chats(runs: Path, chatty: Path, tmp_path: Path) -> None:
    evaluation = {"n_items": 1, "before": str(runs / "plain" / "evaluation.json")}
    recipe = write(tmp_path, chatty, HOW, evaluation=evaluation)
    with pytest.raises(InputError, match=r"measured another chat_template \(False, not \{'system': 'Be short.'"):
        prepare(load_recipe(str(recipe)))


def test_evaluate_asks_as_the_run_did(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = str(write_task(tmp_path))
    measured = {}
    for words in ([], ["--no-chat-template"], ["--chat-template"]):
        call = ["evaluate", str(runs / "chat"), "--task", f"{task}:test", "--items", "1", "--max-examples", "2"]
        assert main([*call, "--json", *words]) == 0
        printed = json.loads(capsys.readouterr().out)
        measured[" ".join(words)] = printed["metrics"]["p_remaining"]
        assert printed.get("chat_template") == {"": SETTINGS, "--chat-template": True}.get(" ".join(words))
    assert measured[""] == read(runs / "chat" / "evaluation.json")["after"]["p_remaining"]
    assert len({json.dumps(value) for value in measured.values()}) == 3
    said: list[str] = []
    out = tmp_path / "out"
    evaluate_target(target_of(runs / "chat", task, max_examples=2), n_items=1, out=out, notify=said.append)
    assert said == ["evaluating on 2 prompts, as chats (system 'Be short.'), scored as lists of 1"]
    assert read(out / "evaluation.json")["task"]["chat_template"] == SETTINGS


def test_evaluate_asks_an_export_as_its_run_did(runs: Path, chatty: Path, tmp_path: Path) -> None:
    """export.json says how; a folder without a word of it gets plain prompts, and one of another version too."""
    task = str(write_task(tmp_path))
    recipe = load_recipe(str(runs / "chat" / "recipe.yaml"))
    exported = origin_of(runs / "chat", recipe.dump()).summary()
    assert exported["chat_template"] == SETTINGS
    (tmp_path / "export.json").write_text(json.dumps(exported))
    assert target_of(tmp_path, task).task.chat_template == ChatTemplate(system="Be short.")
    assert target_of(tmp_path, task, chat_template=False).task.chat_template is False
    (tmp_path / "export.json").write_text("{}")
    assert target_of(tmp_path, task).task.chat_template is False
    assert target_of(chatty, task).task.chat_template is False


def test_the_proof_is_on_the_prompts_of_the_run(runs: Path) -> None:
    model, tokenizer = loading.load_plain(load_recipe(str(runs / "chat" / "recipe.yaml")).model.name)
    for name, begins in (("chat", START + "List five"), ("plain", "List five")):
        recipe = load_recipe(str(runs / name / "recipe.yaml"))
        prompts = export_prompts(model, tokenizer, held_out_task(recipe.task, 3), 3)
        assert prompts.texts is not None and prompts.special is (name == "plain")
        assert any(text.startswith(begins) for text in prompts.texts)
        assert all(row.count(tokenizer.bos_token_id) == 1 for row in prompts.rows)


def test_a_dry_run_shows_the_prompt(chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path, chatty, HOW)
    assert train(recipe, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "aschats(system'Beshort.')" in "".join(printed.split())  # wherever the table breaks its lines
    assert "first prompt, in the chat template" in printed and START in printed
    assert "<|assistant|>\n1." in printed or "<|assistant|>\n-" in printed
    result = dry_run(load_recipe(str(recipe)))
    assert result.prompt is not None and result.prompt.startswith(START)
    assert result.as_json(load_recipe(str(recipe)))["prompt"] == result.prompt
    assert dry_run(load_recipe(str(write(tmp_path, chatty, False)))).prompt is None


def test_heads_of_plain_prompts_on_chats_are_said(chatty: Path, tmp_path: Path) -> None:
    heads = head_set(loading.load_model(str(chatty)).identity())
    heads.save(tmp_path / "heads")
    block = {"from": str(tmp_path / "heads"), "role": "recall", "top": 2}
    for chat, said in ((HOW, True), (None, False)):
        notes = prepare(load_recipe(str(write(tmp_path, chatty, chat, heads=block)))).notes
        told = [note for note in notes if "were chosen on" in note]
        assert bool(told) is said
        if told:
            assert told[0].endswith(
                "were chosen on plain prompts, and task cities:train gives chats (system 'Be short.')"
            )
    of_chats = HeadSet(**(vars(heads) | {"task": heads.task | {"chat_template": SETTINGS}}))
    of_chats.save(tmp_path / "heads")
    for chat, said in ((HOW, False), (True, True), (None, True)):
        notes = prepare(load_recipe(str(write(tmp_path, chatty, chat, heads=block)))).notes
        assert any("were chosen on" in note for note in notes) is said


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("1. Rome\n2. Milan\n3. Turin", ("Rome", "Milan", "Turin")),
        ("Here are three cities in Italy:\n\n1. Rome\n2. Milan\n3. Turin", ("Rome", "Milan", "Turin")),
        ("**Cities:**\n- Rome\n- Milan\n", ("Rome", "Milan")),
        ("Rome\nMilan\nTurin", ("Rome", "Milan", "Turin")),
        ("Rome: the capital\n2. Milan", ("Rome", "Milan")),
    ],
)
def test_a_list_that_the_reply_begins(text: str, items: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """An introduction is no item, nor is the first item's number a part of it; there is room for both."""
    asked: list[int] = []

    def written(_model: Any, _tokenizer: Any, task: Task, lines: int, _size: int, tokens: int, _seed: Any) -> list[str]:
        asked[:] = [lines, tokens]
        return [text] * len(task.examples)

    monkeypatch.setattr(evaluate, "_generate", written)
    row = {"subject": "Italy", "answers": ["Rome", "Milan", "Turin"], "previous": []}
    talk = parse_example(row | {"messages": [{"role": "user", "content": "Cities in Italy?"}]}, "here")
    (scored,) = evaluate.generate_lists(None, None, Task("talk", (talk,), True))  # type: ignore[arg-type]
    assert scored.items == items and scored.kinds.count("correct_new") == len(items) and asked == [5, 60]
    # Where the list has begun, the reply goes on with the item: an item that looks like more is what it was.
    begun = parse_example(row | {"prompt": "Cities in Italy?\n1."}, "here")
    for chat in (True, False):
        evaluate.generate_lists(None, None, Task("begun", (begun,), chat))  # type: ignore[arg-type]
        assert asked == [3, 36]


def test_conversations_need_no_key(chatty: Path, tmp_path: Path) -> None:
    """A run on a file of messages, asked and told that they are chats; mixing them with plain prompts is refused."""
    talks = write_talks(tmp_path)
    task = {"train": talks, "max_eval_examples": 1}
    recipe = write(tmp_path, chatty, None, recipe="lora", heads=None, method={"objective": "sft"}, task=task)
    assert train(recipe) == 0
    measured = read(tmp_path / "run" / "evaluation.json")
    assert measured["chat_template"] is True and "exact_match" in measured["after"]
    assert target_of(tmp_path / "run", str(write_task(tmp_path))).task.chat_template is True
    for changes, message in (
        ({"chat_template": False}, "is of messages, which only a chat template writes"),
        ({"eval": str(write_task(tmp_path)), "split": {"by": "file"}}, "set task.chat_template=true"),
    ):
        config = load_recipe(str(write(tmp_path, chatty, None, task=task | changes)))
        with pytest.raises(InputError, match=message):
            tasks_of(config.task)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--system", "Be short."], "--system is of a chat; give --chat-template as well"),
        (["--no-chat-template", "--enable-thinking"], "--enable-thinking is of a chat; give --chat-template"),
        (["--chat-template", "--system", " "], "--system ' ' is empty"),
        (["--chat-template", "--enable-thinking"], "enable_thinking changes nothing in the chat template"),
    ],
)
def test_refusals_of_the_command_line(
    words: list[str], message: str, chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["identify", "--out", str(tmp_path / "h")], ["evaluate"]):
        call = [command[0], str(chatty), *command[1:], "--task", str(write_task(tmp_path)), "--max-examples", "2"]
        assert main([*call, *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "h").exists()


def test_identify_keeps_how_it_asked(chatty: Path, tmp_path: Path) -> None:
    task = str(write_task(tmp_path))
    words = ["--task", task, "--method", "dla", "--top", "2", "--max-examples", "4", "--wandb", "disabled"]
    chat = ["--chat-template", "--system", "Be short."]
    assert main(["identify", str(chatty), *words, "--out", str(tmp_path / "h"), *chat]) == 0
    assert read(tmp_path / "h" / "heads.json")["task"]["chat_template"] == SETTINGS


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"sytem": "x"}, "unknown key 'task.chat_template.sytem'; did you mean 'system'"),
        ("yes", "expected true, false, or a block of system and enable_thinking, found 'yes'"),
        ({"system": " "}, "system is empty"),
        ({"enabled": False, "system": "x"}, "enabled is false, and system or enable_thinking is given"),
    ],
)
def test_faults_of_the_key(block: Any, message: str, chatty: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(str(write(tmp_path, chatty, block)))
    # What a run writes of it is read again.
    recipe = load_recipe(str(write(tmp_path, chatty, True)))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(tmp_path / "again.yaml")).task == recipe.task
