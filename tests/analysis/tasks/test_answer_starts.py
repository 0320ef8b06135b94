"""Answers that begin with a token of white space alone are scored by the first token that differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from headtune.analysis.interventions.logit_lens import answer_tokens
from headtune.analysis.methods.behaviour import first_token_accuracy
from headtune.analysis.methods.registry import score_examples
from headtune.analysis.models import hooks
from headtune.analysis.models.loading import EMBEDDED, load_tokenizer, wrap_model
from headtune.analysis.tasks.answer_starts import beginnings, common_start
from headtune.analysis.tasks.generators.base import Draw
from headtune.analysis.tasks.prompt_tokens import BlankTokens
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from headtune.train.evaluation.evaluate import answer_mass
from headtune.train.trainer.training_rows import answer_set_rows
from helpers.real_model import AVAILABLE
from helpers.tiny import save_tiny, tiny_model, tiny_tokenizer

YEARS = {"landing": "1969", "Titanic": "1912", "Bastille": "1789", "war": "1945"}


def single(answers: dict[str, str], name: str = "years") -> Task:
    return Task(name, tuple(Example(f"The {s} happened in", s, (a,)) for s, a in answers.items()))


def texts(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> tuple[str, list[str]]:
    """What stands behind the prompt, and what is scored."""
    start = encoded.tokens[len(encoded.tokens) - encoded.n_start :].tolist()
    return str(tokenizer.decode(start)), [str(tokenizer.decode([token])) for token in encoded.target_tokens]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One that knows no number above 5: " 98" is " ", "9", "8"."""
    return tiny_tokenizer()


@pytest.mark.skipif(not AVAILABLE, reason="the built-in model is not installed")
def test_years_with_a_real_tokenizer() -> None:
    real = load_tokenizer(EMBEDDED)
    result = encode(single(YEARS), real)
    assert [texts(real, each) for each in result.examples] == [(" 1", [digit]) for digit in "9979"]
    # Each example's contrast is the others' tokens, none of them white space.
    assert [real.decode([token]) for token, _ in result.examples[2].others] == ["9"]
    assert result.summary()["n_started"] == 4
    # As many answers in a prompt as there are: those already given as well.
    lists = [Example("Wars ended in 1918, 1945,", "Wars", ("1918", "1945", "1871", "1763"), ("1918", "1945"))]
    (one,) = encode(Task("lists", tuple(lists)), real).examples
    assert (texts(real, one), one.n_start) == ((" 1", ["7", "8"]), 2)
    assert [real.decode([token]) for token in one.previous_tokens] == ["9"]
    # Words are as they were.
    words = encode(single({"landing": "Florida", "Titanic": "Paris"}), real)
    assert [each.n_start for each in words.examples] == [0, 0] and not beginnings(words.summary())


def test_the_space_and_what_all_answers_share_are_written_into_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    def scored(answers: dict[str, str]) -> list[tuple[str, list[str]]]:
        return [texts(tokenizer, each) for each in encode(single(answers), tokenizer).examples]

    assert scored({"landing": "98", "war": "77"}) == [(" ", ["9"]), (" ", ["7"])]
    assert scored({"landing": "998", "war": "977"}) == [(" 9", ["9"]), (" 9", ["7"])]
    assert scored({"landing": "99", "war": "9"}) == [(" ", ["9"]), (" ", ["9"])], "each keeps a token"
    assert scored({"landing": "99"}) == [(" ", ["9"])], "one answer differs from none"
    assert scored({"landing": "99", "war": "Rome"}) == [(" ", ["9"]), ("", [" Rome"])]
    assert scored({"landing": "988", "fall": "987", "war": "Rome"})[:2] == [(" 98", ["8"]), (" 98", ["7"])]
    assert common_start([(1, 2, 3), (1, 2, 4)]) == 2 and common_start([(1,), (1, 2)]) == 0


@pytest.mark.parametrize("bos", [False, True])
def test_numbers_are_those_behind_the_space(bos: bool) -> None:
    """Masses, rows, whole answers and exact ablation are those of a prompt that ends in the space."""
    tokenizer = tiny_tokenizer(bos=bos)
    model = wrap_model(tiny_model("llama"), tokenizer, "tiny")
    examples = []
    for s, p, a in (("landing", "98", ("77", "87")), ("war", "88", ("96",))):
        asked, corrupt = (f"The {name} happened in {p} and" for name in (s, "fall"))
        examples.append(Example(asked, s, (p, *a), (p,), corrupt, ("66",)))
    task = Task("numbers", tuple(examples))
    encoded = encode(task, tokenizer)
    space = tokenizer(" 9", add_special_tokens=False).input_ids[0]
    digit = {d: tokenizer(f" {d}", add_special_tokens=False).input_ids[1] for d in "6789"}
    expected = []
    for each, example in zip(encoded.examples, task.examples, strict=True):
        ids = [*tokenizer(example.prompt).input_ids, space]
        assert each.tokens.tolist() == ids and each.n_start == 1 and each.end == len(ids) - 1
        assert each.corrupt is not None and example.corrupt is not None
        assert each.corrupt.tolist() == [*tokenizer(example.corrupt).input_ids, space]
        assert [position for spans in each.sources().values() for position in spans].count(each.end) == 1
        with torch.no_grad():
            p = model.hf(torch.tensor([ids])).logits[0, -1].softmax(-1)
        first = sorted({answer[0] for answer in example.remaining})
        expected.append((sum(p[digit[d]] for d in first), p[digit[example.previous[0][0]]]))
        assert answer_tokens(tokenizer, each, example.remaining[0]) == tuple(digit[d] for d in example.remaining[0])
    remaining, previous = answer_mass(model.hf, encoded)
    torch.testing.assert_close(torch.tensor([remaining, previous]).T, torch.tensor(expected))
    rows = answer_set_rows(encoded)
    assert all(row["input_ids"][-1] == space for row in rows)
    assert all(space not in (*row["remaining"], *row["previous"], row["labels"][-1]) for row in rows)
    assert first_token_accuracy(model, encoded.examples).right  # compares with "6", not with the space
    # Exact ablation of a head: what the answers' probability loses behind the space.
    scores = score_examples(model, encoded.examples, "ablation")
    for row, (each, (clean, _)) in enumerate(zip(encoded.examples, expected, strict=True)):
        with hooks.ablate(model, [(1, 2)], torch.tensor([each.end])), torch.no_grad():
            p = model.hf(each.tokens[None], use_cache=False).logits[0, -1].softmax(-1)
        change = clean - sum(p[digit[d]] for d in {answer[0] for answer in each.example.remaining})
        assert scores.by_example["ablation.target_p"][row, 1, 2] == pytest.approx(float(change), abs=1e-6)
        assert abs(float(change)) > 1e-5


def test_where_only_some_answers_begin_so_they_count_for_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    both = Example("The war happened in", "war", ("98", "Rome"))
    result = encode(Task("mixed", (both, Example("The fall happened in", "fall", ("Milan",)))), tokenizer)
    assert [texts(tokenizer, each) for each in result.examples] == [("", [" Rome"]), ("", [" Milan"])]
    assert result.summary()["n_blank_first_tokens"] == 1
    assert "1 answers that begin with one, beside others that do not, are not scored" in beginnings(result.summary())
    # None is left: the example is left out, and counted.
    given = Example("The war happened in Rome and", "war", ("98", "Rome"), ("Rome",))
    mirrored = Example("The war happened in 98 and", "war", ("98", "Rome"), ("98",))
    left = encode(Task("mixed", (both, given, mirrored)), tokenizer)
    assert len(left.examples) == 1 and left.dropped == {"answers begin with white space alone": 2}
    with pytest.raises(InputError, match=r"no example can be scored .* answers begin with white space alone \(1\)"):
        encode(Task("mixed", (given,)), tokenizer)


def test_a_start_that_the_model_has_no_position_for_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    task = single({"landing": "98", "war": "77"})
    longest = max(len(each.tokens) for each in encode(task, tokenizer).examples)
    encode(task, tokenizer, longest)
    with pytest.raises(InputError, match=f"with the start of its answers takes {longest} tokens, and the model takes"):
        encode(task, tokenizer, longest - 1)


def test_what_is_white_space_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    blank = BlankTokens(tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert [token for token in ("Ġ", "Ċ", "ĠRome", "9", "<eos>", "Ã") if blank(vocabulary[token])] == ["Ġ", "Ċ"]


def test_sentencepiece_likewise() -> None:
    """Its bare space is a token that decodes to nothing where it stands alone."""
    pieces = [
        "<unk>",
        "\u2581",
        *"98",
        "\u2581The",
        "\u2581war",
        "\u2581fall",
        "\u2581happened",
        "\u2581in",
        "\u2581Rome",
        "a",
    ]
    backend = Tokenizer(models.Unigram([(piece, -1.0 - index / 10) for index, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1]) == ""
    result = encode(single({"war": "98", "fall": "89"}), tokenizer)
    assert [each.tokens.tolist()[-1] for each in result.examples] == [1, 1]
    assert [each.target_tokens for each in result.examples] == [(2,), (3,)]
    assert encode(single({"war": "Rome"}), tokenizer).examples[0].n_start == 0


def test_generators_tell_answers_apart_by_the_same_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = Draw(tokenizer, 1, 0)
    ids = tokenizer.convert_tokens_to_ids
    assert draw.first_tokens("It is", ["98", "77"]) == [(ids("Ġ"), ids("9")), (ids("Ġ"), ids("7"))]
    assert draw.first_tokens("It is", ["98", "Rome"]) == [None, (ids("ĠRome"),)]


def test_task_show_and_identify_say_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    from headtune.analysis.tasks.task import to_jsonl
    from headtune.cli.main import main

    folder = save_tiny(tmp_path / "m", "llama")
    path = tmp_path / "years.jsonl"
    path.write_text(to_jsonl(single({"landing": "98", "war": "77", "fall": "86", "end": "69"}).examples))
    assert main(["task", "show", str(path), "--model", str(folder)]) == 0
    line = "in 4 prompts every answer begins with a token of white space alone: it is written into the prompt"
    assert line in capsys.readouterr().out
    assert main(["identify", str(folder), "--task", str(path), "--out", str(tmp_path / "heads")]) == 0
    assert line in " ".join(capsys.readouterr().out.split())
    assert '"n_started": 4' in (tmp_path / "heads" / "heads.json").read_text()
