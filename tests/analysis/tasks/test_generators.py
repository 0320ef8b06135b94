"""Tasks made by programs: the same for the same seed, of the length asked for, with spans and counterparts that fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from headtune.analysis.tasks.generators.make import GENERATORS, make_task, write_task
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from headtune.cli.commands.tasks import KINDS
from helpers.planted_needle import needle_tokenizer
from helpers.tiny import tiny_tokenizer

CAPITALS = {"Italy": ["Rome"], "Japan": ["Tokyo"], "France": ["Paris"], "Spain": ["Madrid"], "England": ["London"]}
PAIRS = [{"input": word, "output": capital[0]} for word, capital in CAPITALS.items()]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(CAPITALS))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS))
    return path


@dataclass
class Knows:
    """A model that says the right token about some subjects."""

    tokenizer: PreTrainedTokenizerBase
    subjects: tuple[str, ...]

    def next_tokens(self, rows: Sequence[Sequence[int]]) -> list[int]:
        prompts = [self.tokenizer.decode(list(row)) for row in rows]
        answers = [
            next((a[0] for s, a in CAPITALS.items() if s in prompt and s in self.subjects), "York")
            for prompt in prompts
        ]
        return [self.tokenizer(f" {answer}").input_ids[0] for answer in answers]


def encoded(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    result = encode(task, tokenizer)
    assert not result.dropped
    return result.examples


def text(tokenizer: PreTrainedTokenizerBase, example: Encoded, span: str) -> str:
    return str(tokenizer.decode(example.tokens[list(example.spans[span])])).strip()


def test_the_command_names_all_kinds() -> None:
    assert tuple(GENERATORS) == KINDS


# --- needles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_needles_have_the_length_asked_for(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    task = make_task("needle", tokenizer, n=6, lengths=(500, 530), depths=2, words=3)
    examples = encoded(task, tokenizer)
    assert [len(example.tokens) for example in examples] == [500, 500, 530, 530, 500, 500]
    for example in examples:
        (code,) = example.example.answers
        assert len(example.spans["needle"]) == 3 and text(tokenizer, example, "needle") == code
        # Its tokens are the answer's, one by one.
        answer = tokenizer(example.example.prompt + " " + code).input_ids[len(example.tokens) :]
        assert [int(example.tokens[i]) for i in example.spans["needle"]] == answer
        assert example.example.prompt.count(f"The secret code of {example.example.subject} is") == 2
    depths = [example.spans["needle"][0] / len(example.tokens) for example in examples]
    assert all(first < second for first, second in zip(depths[::2], depths[1::2], strict=True))
    assert len(task.subjects) == 6


def test_the_first_prompts_stay_when_more_are_made(tokenizer: PreTrainedTokenizerBase) -> None:
    few, more = (make_task("needle", tokenizer, n=n, seed=1, lengths=(150,), words=3) for n in (2, 4))
    assert more.examples[:2] == few.examples
    assert make_task("needle", tokenizer, n=2, seed=2, lengths=(150,), words=3).examples != few.examples


def test_passkeys_are_asked_for_in_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task("passkey", tokenizer, n=3, lengths=(400,), needles=3, words=2)
    for index, example in enumerate(encoded(task, tokenizer)):
        ordinal = ("first", "second", "third")[index]
        assert len(example.tokens) == 400 and len(example.spans["needle"]) == 2 and len(example.spans["others"]) == 4
        assert f"what is the {ordinal} passkey" in example.example.prompt
        assert f"the {ordinal} passkey to the vault: {text(tokenizer, example, 'needle')}." in example.example.prompt


def test_a_filler_of_the_users(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "filler.txt"
    path.write_text("List five cities in Italy. " * 3 + "Some cities in Japan and then Rome. " * 3)
    (example,) = make_task("needle", tokenizer, n=1, lengths=(90,), words=3, filler=path).examples
    assert "cities in Japan" in example.prompt
    assert "Rome" not in example.answers[0]  # a word of the filler is no word of a code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (20,)}, r"a prompt of 20 tokens cannot hold needle and question"),
        ({"words": 500}, r"1 codes of 500 words need 500 words of a single token"),
        ({"filler": "nowhere.txt"}, "filler 'nowhere.txt' cannot be read"),
        ({"depth": 3}, "takes no 'depth'; it takes lengths, depths, words, filler"),
        ({"depths": 0}, "depths=0; expected at least 1"),
        ({"n": 5000}, "a needle for each of 5000 names was asked for"),
        ({"n": 0}, "n=0; expected at least 1"),
    ],
)
def test_needles_refused(options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=message) as error:
        make_task("needle", tokenizer, **{"n": 1, **options})
    assert "\n" not in str(error.value)


def test_unusable_input(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task kind 'neddle' is unknown; did you mean 'needle'"):
        make_task("neddle", tokenizer)
    with pytest.raises(InputError, match="passkey with needles=11; expected 2 to 10"):
        make_task("passkey", tokenizer, needles=11)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(InputError, match="must be running text of at least 20 words"):
        make_task("needle", tokenizer, filler=tmp_path / "short.txt")
    with pytest.raises(InputError, match="this tokenizer has 0"):  # all words are unknown to it
        make_task("needle", needle_tokenizer(), n=1)


# --- conflicts --------------------------------------------------------------------------------------------------------


def test_conflicts(facts: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task("conflict", tokenizer, n=20, facts=facts, relation="capital")
    assert task.kind == "lists" and len({example.prompt for example in task.examples}) == 20
    for example in encoded(task, tokenizer):
        subject, (right, wrong) = example.example.subject, example.example.answers
        assert example.example.prompt == f"The capital of {subject} is {wrong}. The capital of {subject} is"
        assert [right] == CAPITALS[subject] and wrong != right and example.example.previous == (wrong,)
        assert text(tokenizer, example, "context") == wrong and example.spans["context"] == example.previous[0]
        assert not {*example.target_tokens} & {*example.previous_tokens}


def test_only_what_the_model_knows_is_contradicted(facts: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task("conflict", Knows(tokenizer, ("Italy", "Japan")), n=4, facts=facts, relation="capital")
    assert task.subjects == ["Italy", "Japan"]
    assert task.about["asked"] == {"subjects": 5, "right": 2}
    assert task.about["dropped"] == {"the model does not know it": 3}
    with pytest.raises(InputError, match=r"makes 0 prompts of the 4 asked for: the model does not know it \(5\)"):
        make_task("conflict", Knows(tokenizer, ()), n=4, facts=facts, relation="capital")


def test_conflicts_of_a_relation_file_and_refusals(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "relation.json"
    samples = [{"subject": subject, "object": capital} for subject, (capital,) in CAPITALS.items()]
    path.write_text(json.dumps({"samples": samples}))
    task = make_task("conflict", tokenizer, n=2, facts=path, relation="seat", template="{subject} has the {relation}")
    assert task.examples[0].prompt.endswith(". Italy has the seat")
    with pytest.raises(InputError, match="makes 20 prompts of the 21 asked for; give more data or a lower n"):
        make_task("conflict", tokenizer, n=21, facts=path, relation="capital")
    with pytest.raises(InputError, match="task kind 'conflict' needs 'relation'"):
        make_task("conflict", tokenizer, facts=path)
    with pytest.raises(InputError, match=r"does not hold \{subject\}"):
        make_task("conflict", tokenizer, facts=path, relation="capital", template="The capital is")
    path.write_text('{"Italy": "Rome"}')
    with pytest.raises(InputError, match="subject 'Italy' must map to a list"):
        make_task("conflict", tokenizer, facts=path, relation="capital")


# --- few-shot prompts -------------------------------------------------------------------------------------------------


def test_few_shot_prompts_clean_and_shuffled(pairs: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    clean, shuffled = (
        make_task("fewshot", tokenizer, n=5, pairs=pairs, shots=3, labels=labels) for labels in ("clean", "shuffled")
    )
    assert sorted(clean.subjects) == sorted(CAPITALS)
    right = {row["input"]: row["output"] for row in PAIRS}
    for one, other in zip(encoded(clean, tokenizer), shuffled.examples, strict=True):
        blocks = [block.removeprefix("Q: ").split("\nA: ") for block in one.example.prompt.split("\n\n")[:-1]]
        mixed = [block.removeprefix("Q: ").split("\nA: ") for block in other.prompt.split("\n\n")[:-1]]
        assert len(blocks) == 3 and all(right[word] == label for word, label in blocks)
        assert all(right[word] != label for word, label in mixed)
        assert sorted(label for _, label in mixed) == sorted(label for _, label in blocks)
        assert one.example.prompt.endswith(f"Q: {one.example.subject}\nA:")
        assert one.example.answers[0] not in one.example.prompt and one.example.subject not in str(blocks)
        assert one.example.corrupt == other.prompt and other.corrupt == one.example.prompt
        assert text(tokenizer, one, "labels") == " ".join(label for _, label in blocks)


def test_few_shots_refused(pairs: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="shots=1; expected at least 2"):
        make_task("fewshot", tokenizer, pairs=pairs, shots=1)
    with pytest.raises(InputError, match=r"makes 0 prompts of the 2 asked for: too few pairs without its words \(2\)"):
        make_task("fewshot", tokenizer, n=2, pairs=pairs, shots=5)
    with pytest.raises(InputError, match="labels 'mixed' are unknown"):
        make_task("fewshot", tokenizer, pairs=pairs, labels="mixed")


def test_no_shot_stays_with_its_label_where_labels_recur(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"input": f"i{k}", "output": f"o{k % 3}"} for k in range(9)]
    (tmp_path / "three.json").write_text(json.dumps(rows))
    made = make_task("fewshot", tokenizer, n=6, pairs=tmp_path / "three.json", shots=4)
    for example in made.examples:
        assert example.corrupt is not None
        clean, shuffled = (prompt.split("\n\n")[:-1] for prompt in (example.prompt, example.corrupt))
        assert not set(clean) & set(shuffled)
    few = [{"input": f"i{k}", "output": "x" if k else "y"} for k in range(9)]
    (tmp_path / "one.json").write_text(json.dumps(few))
    with pytest.raises(InputError, match="too many shots with one label to shuffle them"):
        make_task("fewshot", tokenizer, n=9, pairs=tmp_path / "one.json", shots=3)


def test_antonyms(tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task("antonyms", tokenizer, n=60)
    assert len(task.examples) == 60 and len(task.subjects) > 45
    assert all(example.answers[0].lower() not in example.prompt.split() for example in task.examples)


# --- indirect objects -------------------------------------------------------------------------------------------------


def test_indirect_objects(tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task("ioi", tokenizer, n=16)
    orders = []
    for example in encoded(task, tokenizer):
        indirect, subject = example.example.answers
        spans = {name: text(tokenizer, example, name) for name in example.spans}
        assert spans == {"io": indirect, "s1": subject, "s2": subject}
        assert example.spans["s1"][0] < example.spans["s2"][0] and example.example.remaining == (indirect,)
        assert example.corrupt is not None and len(example.corrupt) == len(example.tokens)
        changed = (example.corrupt != example.tokens).nonzero().flatten().tolist()
        mention = example.spans["s2"]  # its space is a token by itself before some names
        assert changed and mention[0] - 1 <= min(changed) and max(changed) <= mention[-1]
        orders.append(example.spans["io"][0] < example.spans["s1"][0])
    assert orders == [True, False] * 8


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_read_back(
    kind: str, facts: Path, pairs: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    options: dict[str, dict[str, Any]] = {
        "needle": {"lengths": (150,), "words": 3},
        "passkey": {"lengths": (300,), "needles": 2, "words": 2},
        "conflict": {"facts": facts, "relation": "capital"},
        "fewshot": {"pairs": pairs, "shots": 2},
    }
    task = make_task(kind, tokenizer, n=3, seed=5, **options.get(kind, {}))
    assert task == make_task(kind, tokenizer, n=3, seed=5, **options.get(kind, {}))
    path = tmp_path / "made.jsonl"
    write_task(task, path)
    read = load_task(str(path))
    assert read.examples == task.examples and read.kind == task.kind and read.sha256 == task.sha256
    assert read.about == json.loads(json.dumps(task.about))
    assert read.about["generator"] == kind and read.about["seed"] == 5
    assert load_task(f"{path}:test").about == read.about
    with pytest.raises(InputError, match="exists; choose another --out"):
        write_task(task, path)
