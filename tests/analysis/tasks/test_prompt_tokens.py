"""Prompts in tokens are what the model was made for, whatever a tokenizer appends or puts in front."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from headtune.analysis.heads.self_contrast import self_contrast
from headtune.analysis.interventions.logit_lens import answer_tokens
from headtune.analysis.methods import behaviour
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks import prompt_tokens
from headtune.analysis.tasks.generators.base import Draw
from headtune.analysis.tasks.prompt_tokens import prefix_ids, require_embeddings, token_ids
from headtune.analysis.tasks.task import Example, Task, to_jsonl
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.evaluation.evaluate import evaluate
from headtune.train.evaluation.multiple_choice import choice_tokens
from headtune.train.export.checkpoint import export_prompts
from headtune.train.trainer.rows import rows_of
from headtune.train.trainer.training_rows import dpo_rows, dpo_tokens, open_rows, sft_rows
from headtune.train.tuners.iti_probes import tokenised
from helpers.tiny import FACTS, save_tiny, shorten_neutral_text, tiny_model, tiny_task, tiny_tokenizer

TEXTS = ["Some cities in Italy:\n- Rome", "a", ""]


def choosing(begin: str = "") -> Task:
    examples = (
        Example(f"{begin}The largest city in {s} is", s, tuple(a[:1]), incorrect=("Oxford", "Bonn"))
        for s, a in list(FACTS.items())[:3]
    )
    return Task("choosing", tuple(examples), kind="multiple_choice")


@pytest.mark.parametrize("bos", [False, True])
def test_what_is_appended_is_left_out(bos: bool) -> None:
    plain = tiny_tokenizer()
    for eos in (False, True):
        tokenizer = tiny_tokenizer(bos=bos, eos=eos)
        assert prefix_ids(tokenizer) == [1] * bos and prefix_ids(tokenizer, special=False) == []
        assert token_ids(tokenizer, TEXTS) == [[1] * bos + plain(text).input_ids for text in TEXTS]
        assert token_ids(tokenizer, TEXTS, special=False) == [plain(text).input_ids for text in TEXTS]
        assert token_ids(tokenizer, []) == []


def test_a_tokenizer_with_another_text_inside_its_special_tokens_is_refused() -> None:
    class Odd:
        name_or_path = "odd"

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return type("Batch", (), {"input_ids": [1, 7] if add_special_tokens else [8]})

    odd: Any = Odd()
    with pytest.raises(InputError, match=r"tokenizer 'odd' makes .* what it puts in front cannot be told"):
        prefix_ids(odd)


@pytest.mark.parametrize("bos", [False, True])
def test_everything_is_as_with_a_tokenizer_that_appends_nothing(bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_neutral_text(monkeypatch.setattr)
    good, bad = tiny_tokenizer(bos=bos), tiny_tokenizer(bos=bos, eos=True)
    assert bad("a").input_ids[-1] == 2
    lists, choice = tiny_task(subjects=3), choosing()
    single = Task("single", choice.examples, kind="exact_match")
    models = [wrap_model(tiny_model("llama"), tokenizer, "tiny") for tokenizer in (good, bad)]

    def both(name: str, what: Any) -> None:
        first, second = (what(model, model.tokenizer) for model in models)
        assert first == second, name

    def encoded(_model: Any, tokenizer: Any) -> Any:
        corrupt = Example("In Italy is", "Italy", ("Rome",), corrupt="In Japan is")
        examples = encode(Task("all", (*lists.examples, corrupt)), tokenizer).examples
        return [(e.tokens.tolist(), e.target_tokens, e.previous_tokens, e.subject, e.previous) for e in examples], (
            examples[-1].corrupt.tolist()  # type: ignore[union-attr]
        )

    both("identify", encoded)
    for task in (lists, choice, single):
        both(f"evaluate {task.name}", lambda model, tokenizer, task=task: evaluate(model.hf, tokenizer, task))
    both("choices", lambda _, tokenizer: choice_tokens(tokenizer, "The largest city in Italy is", " Rome"))
    both("rows", lambda _, tokenizer: rows_of(lists, tokenizer, 0, 0))
    for end in ("", "<eos>"):
        both("sft", lambda _, t, end=end: open_rows(sft_rows(single, 0), t, end=end).to_dict())
        both("dpo", lambda _, t, end=end: dpo_tokens(dpo_rows(choice, "all"), t, end=end).to_dict())
    both("probes", lambda model, _: tokenised(model, TEXTS[:2], lists))
    both("export", lambda model, tokenizer: export_prompts(model.hf, tokenizer, lists))
    both("generators", lambda _, tokenizer: Draw(tokenizer, 1, 0).first_tokens("Some", ["Rome", "Milan"]))
    both("pairs", lambda model, _: self_contrast(model, single, [(0, 1), (1, 2)], 4).examples)
    of_one = [encode(single, model.tokenizer).examples[0] for model in models]
    assert answer_tokens(good, of_one[0], "Rome") == answer_tokens(bad, of_one[1], "Rome") is not None
    assert torch.equal(behaviour.answer_tokens(models[0], of_one[0]), behaviour.answer_tokens(models[1], of_one[1]))


def test_trainings_rows_end_once() -> None:
    tokenizer = tiny_tokenizer(bos=True, eos=True)
    (row, *_) = open_rows(sft_rows(choosing(), 0), tokenizer, end="<eos>")
    n = len(tokenizer("The largest city in Italy is").input_ids) - 1
    assert row["input_ids"][-1] == 2 and row["input_ids"].count(2) == 1 and row["labels"][:n] == [-100] * n
    assert row["labels"][n:] == row["input_ids"][n:] == token_ids(tokenizer, [" Rome\n<eos>"], special=False)[0]
    (pair, *_) = dpo_tokens(dpo_rows(choosing(), "one"), tokenizer, end="<eos>")
    assert len(pair["prompt_ids"]) == n and pair["chosen_ids"].count(2) == pair["rejected_ids"].count(2) == 1


# --- BOS written out --------------------------------------------------------------------------------------------------


def test_a_prompt_written_out_with_bos_gets_no_second(caplog: pytest.LogCaptureFixture) -> None:
    prompt_tokens._warn_once.cache_clear()
    tokenizer = tiny_tokenizer(bos=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert token_ids(tokenizer, ["<bos>In Italy"]) == token_ids(tokenizer, ["In Italy"])
    assert [record.message for record in caplog.records] == [
        "prompts begin with '<bos>', and the tokenizer adds another: they get one of the two"
    ]
    written = [encode(choosing(begin), tokenizer).examples for begin in ("", "<bos>")]
    for plain, doubled in zip(*written, strict=True):
        assert doubled.tokens.tolist() == plain.tokens.tolist() and doubled.tokens.tolist().count(1) == 1
        assert (doubled.subject, doubled.target_tokens) == (plain.subject, plain.target_tokens)
    caplog.clear()
    # Where the tokenizer puts nothing in front, the written one is the only one.
    assert token_ids(tiny_tokenizer(), ["<bos>In Italy"])[0].count(1) == 1 and not caplog.records


def test_scores_are_those_of_one_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_neutral_text(monkeypatch.setattr)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
    for kind in ("multiple_choice", "exact_match"):
        results: list[Any] = []
        for begin in ("", "<bos>"):
            task = Task("t", choosing(begin).examples, kind=kind)  # type: ignore[arg-type]
            metrics, scored = evaluate(model, tokenizer, task)
            results.append((metrics, [(one.text, one.values) for one in scored]))
        assert results[0] == results[1]


# --- tokens that the model lacks --------------------------------------------------------------------------------------


def with_token(text: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([text])
    return tokenizer


def test_a_token_without_embedding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    with_token("<new1>").save_pretrained(folder)
    size = len(tiny_tokenizer())
    line = f"token '<new1>' is number {size}, and the model has embeddings for {size}"
    identify = ["identify", str(folder), "--out", str(tmp_path / "heads"), "--task"]
    show, measure = ["task", "show", "--model", str(folder)], ["evaluate", str(folder), "--task"]
    cases = [
        (Example("In Italy <new1>", "Italy", ("Rome",)), [identify, show, measure]),
        (Example("In Italy", "Italy", ("<new1>",)), [identify, show, measure]),
        (
            Example("In Italy", "Italy", ("Rome",), incorrect=("<new1>",)),
            [[*measure[:-1], "--kind", "multiple_choice", "--task"]],
        ),
    ]
    for index, (example, commands) in enumerate(cases):
        path = tmp_path / f"{index}.jsonl"
        path.write_text(to_jsonl([example, Example("In Japan", "Japan", ("Tokyo",), incorrect=("Bonn",))]))
        for command in commands:
            assert main([*command, str(path)]) == 2, command
            assert line in capsys.readouterr().err, command
    assert not (tmp_path / "heads").exists()


def test_the_check_looks_at_every_row() -> None:
    tokenizer = with_token("<new1>")
    size = len(tokenizer)
    require_embeddings(tokenizer, [[0, size - 1]], size, "x")
    require_embeddings(tokenizer, [[0, size]], None, "x")
    with pytest.raises(InputError, match="x: token '<new1>'"):
        require_embeddings(tokenizer, [[0], [1, size - 1]], size - 1, "x")


def test_task_show_knows_how_long_a_prompt_may_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    path = tmp_path / "long.jsonl"
    path.write_text(to_jsonl([Example("a " * 300 + "Italy is", "Italy", ("Rome",))]))
    for command in (
        ["task", "show", str(path), "--model", str(folder)],
        ["identify", str(folder), "--task", str(path)],
    ):
        assert main([*command, *(["--out", str(tmp_path / "h")] if command[0] == "identify" else [])]) == 2
        assert "tokens, and the model takes 256; shorten it or leave it out" in capsys.readouterr().err
