"""A task says exactly what it holds: strict input, reproducible building, disjoint splits, spans where the text is."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from headtune.analysis.tasks import task as task_module
from headtune.analysis.tasks.build import Template, build, build_files, invert
from headtune.analysis.tasks.loading import builtin_names, load_task
from headtune.analysis.tasks.readers import read_relation
from headtune.analysis.tasks.spans import subject_start
from headtune.analysis.tasks.task import (
    Example,
    Kind,
    Task,
    canonical,
    normalise,
    parse_example,
    scored,
    split_subjects,
    take_split,
    to_jsonl,
)
from headtune.analysis.tasks.tokenized import Encoded, as_chat, continuation, encode, first_tokens
from headtune.analysis.utils.errors import InputError
from helpers import tiny

ROW: dict[str, Any] = {
    "prompt": "List five cities in Italy.\n1. Rome\n2. Milan\n3.",
    "subject": "Italy",
    "answers": ["Rome", "Milan", "Naples"],
    "previous": ["Rome", "Milan"],
}


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def one(row: dict[str, Any]) -> Task:
    return Task("one", (parse_example(row, "here"),))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_file_round_trips(tmp_path: Path, cities: Task) -> None:
    path = tmp_path / "cities.jsonl"
    path.write_text(to_jsonl(cities.examples), encoding="utf-8")
    assert load_task(str(path)) == cities
    assert load_task(str(path)).sha256 == cities.sha256


def test_optional_keys_and_empty_lines(tmp_path: Path) -> None:
    single = {"prompt": "The capital of Italy is", "subject": "Italy", "answers": ["Rome"]}
    path = write_lines(tmp_path / "facts.jsonl", single, "", single | {"previous": None, "corrupt": "x"}, "   ")
    plain, corrupted = load_task(str(path)).examples
    assert plain == Example("The capital of Italy is", "Italy", ("Rome",), (), None)
    assert corrupted.corrupt == "x" and corrupted.previous == ()


def test_an_answer_that_was_given_may_be_incorrect_now(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", ROW | {"incorrect": ["Rome", "milan"]}, ROW | {"incorrect": ["!", "?"]})
    assert [example.incorrect for example in load_task(str(path)).examples] == [("Rome", "milan"), ("!", "?")]


def test_lines_without_previous_are_single_facts(tmp_path: Path) -> None:
    single = {"prompt": "The capital of Italy is", "subject": "Italy", "answers": ["Rome"]}
    kinds = {
        "none": [single, single | {"previous": None}],
        "one": [single, ROW],
        "empty": [single | {"previous": []}],  # the start of a list, as `task build --previous 0` writes it
    }
    found = {name: load_task(str(write_lines(tmp_path / f"{name}.jsonl", *rows))).kind for name, rows in kinds.items()}
    assert found == {"none": "exact_match", "one": "lists", "empty": "lists"}
    words = [scored(kind, 3) for kind in ("lists", "exact_match")]
    assert words == ["scored as lists of 3", "scored by exact match of one answer"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ({"Italy": ["Rome", "Milan"]}, "looks like a facts file; make a task of it: headtune task build "),
        ([ROW], "is one JSON list; write one JSON object a line"),
        ({"name": "capital", "samples": []}, "looks like a relation; name its format: relation:"),
    ],
)
def test_another_kind_of_file_is_recognised(tmp_path: Path, whole: Any, message: str, indent: int | None) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(whole, indent=indent))
    with pytest.raises(InputError) as refusal:
        load_task(str(path))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_incorrect_answers_are_kept_and_written_only_where_there_are_some(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", ROW, ROW | {"incorrect": ["Lyon", "Nice"]}, ROW | {"incorrect": None})
    task = load_task(str(path))
    assert [example.incorrect for example in task.examples] == [(), ("Lyon", "Nice"), ()]
    first, second, third = (json.loads(line) for line in to_jsonl(task.examples).splitlines())
    assert second == first | {"incorrect": ["Lyon", "Nice"]} and third == first and "incorrect" not in first
    path.write_text(to_jsonl(task.examples), encoding="utf-8")
    assert load_task(str(path)) == task


def test_digests_of_tasks_are_those_from_before_incorrect_answers_and_kinds() -> None:
    assert load_task("country_cities").sha256 == "be200c353284ed47613a20dc2c14dff7039511d4231c7e56ac298ce31a1f62b3"
    assert load_task("one_to_many").sha256 == "81f54e36a850ceca175c967f15e7d0117ebae55009891bcf89cbc55e3a4070dd"


def test_the_digest_says_how_a_task_is_evaluated(cities: Task) -> None:
    kinds: tuple[Kind, ...] = ("lists", "exact_match", "multiple_choice")
    digests = {replace(cities, kind=kind, chat_template=chat).sha256 for kind in kinds for chat in (False, True)}
    assert len(digests) == 6
    assert replace(cities, kind="exact_match").limited(2).kind == "exact_match"
    assert take_split(replace(cities, kind="exact_match"), "train").kind == "exact_match"


BAD_ROWS = {
    "not an object": ([1], "expected a JSON object, found list"),
    "unknown key": (ROW | {"previus": []}, "unknown key 'previus'; did you mean 'previous'?"),
    "no prompt": ({k: v for k, v in ROW.items() if k != "prompt"}, "key 'prompt' is missing"),
    "facts.json holds no subjects": (ROW | {"subject": None}, "key 'subject' is missing"),
    "no answers": ({k: v for k, v in ROW.items() if k != "answers"}, "key 'answers' is missing"),
    "prompt not text": (ROW | {"prompt": 3}, "'prompt' must be a str, found 3"),
    "answers not a list": (ROW | {"answers": "Rome"}, "'answers' must be a list, found 'Rome'"),
    "corrupt not text": (ROW | {"corrupt": 3}, "'corrupt' must be a str"),
    "answer not text": (ROW | {"answers": ["Rome", 3]}, "'answers' must hold non-empty strings"),
    "blank answer": (ROW | {"answers": ["Rome", "  "]}, "'answers' must hold non-empty strings"),
    "blank previous": (ROW | {"previous": [""]}, "'previous' must hold non-empty strings"),
    "empty subject": (ROW | {"subject": ""}, "the prompt does not contain its subject ''"),
    "subject elsewhere": (ROW | {"subject": "Spain"}, "the prompt does not contain its subject 'Spain'"),
    "previous elsewhere": (ROW | {"previous": ["Turin"]}, "does not contain the previous answer 'Turin'"),
    "incorrect not a list": (ROW | {"incorrect": "Lyon"}, "'incorrect' must be a list, found 'Lyon'"),
    "blank incorrect": (ROW | {"incorrect": ["Lyon", ""]}, "'incorrect' must hold non-empty strings"),
    "corrupt ends in a space": (ROW | {"corrupt": ROW["prompt"] + " "}, "the corrupt ends in a space; remove it"),
    "answer with a space": (
        ROW | {"answers": ["Rome", " Turin"]},
        "'answers': ' Turin' has white space around it; write 'Turin'",
    ),
    "incorrect with a space": (
        ROW | {"incorrect": ["Lyon "]},
        "'incorrect': 'Lyon ' has white space around it; write 'Lyon'",
    ),
    "an answer that is incorrect": (
        ROW | {"incorrect": ["Lyon", "Naples"]},
        "incorrect answer 'Naples' is the answer 'Naples' as well",
    ),
    "an answer that is incorrect, written otherwise": (
        ROW | {"incorrect": ["naples."]},
        "incorrect answer 'naples.' is the answer 'Naples' as well (compared without case, accents and outer",
    ),
    "prompt ends in a space": (ROW | {"prompt": ROW["prompt"] + " "}, "the prompt ends in a space; remove it"),
    "nothing remains": (ROW | {"answers": ["rome", "milan"]}, "every accepted answer is already given"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, name: str) -> None:
    row, message = BAD_ROWS[name]
    path = write_lines(tmp_path / "t.jsonl", ROW, "", row)
    with pytest.raises(InputError) as refusal:
        load_task(str(path))
    assert str(refusal.value).startswith(f"{path}:3: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_broken_json_is_named_by_line_and_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", ROW, '{"prompt": }')
    with pytest.raises(InputError, match=r"t\.jsonl:2: not a JSON object \(Expecting value at column 12\)"):
        load_task(str(path))


def test_line_separators_inside_a_string_are_text(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 unescaped in strings; a JSONL line ends at a line feed only."""
    row = ROW | {"answers": ["Rome", "Milan", "Na\u2028ples", "Tu\u0085rin"]}
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(ROW) + "\n", encoding="utf-8")
    loaded = load_task(str(path)).examples
    assert [example.answers for example in loaded] == [tuple(row["answers"]), tuple(ROW["answers"])]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.jsonl", "task file 'nowhere.jsonl' does not exist; check the path"),
        ("county_cities", "is neither a file, a hub id nor built in; did you mean 'country_cities'?"),
        ("one_to_many:tset", "split 'tset' of task 'one_to_many' is unknown; did you mean 'test'?"),
        ("one_to_many:", "split '' of task 'one_to_many' is unknown"),
        ("nobody/no-such-dataset", "task 'nobody/no-such-dataset' is not a file and cannot be loaded from the hub"),
    ],
)
def test_a_task_that_is_not_there(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        load_task(name)
    assert message in str(refusal.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", "", " ")
    with pytest.raises(InputError, match="holds no examples"):
        load_task(str(empty))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"is not UTF-8 text: .* at byte 12; save it as UTF-8"):
        load_task(str(latin))
    with pytest.raises(InputError, match="does not exist"):
        load_task(str(tmp_path))


def test_a_hub_data_set_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        assert (name, config, split) == ("someone/cities", None, "train")
        return [ROW, ROW | {"subject": "Spain"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="someone/cities row 1: the prompt does not contain its subject"):
        load_task("someone/cities")


# --- building ---------------------------------------------------------------------------------------------------------


def test_build_is_deterministic_and_seeded() -> None:
    assert build(tiny.FACTS, tiny.TEMPLATES, (1, 2)) == build(tiny.FACTS, tiny.TEMPLATES, (1, 2))
    assert build(tiny.FACTS, tiny.TEMPLATES, (1, 2), seed=1) != build(tiny.FACTS, tiny.TEMPLATES, (1, 2))


def test_build_gives_the_same_in_every_process_and_version() -> None:
    """What was drawn once is written here: neither string hashing nor a rewrite may change published tasks unseen."""
    assert tiny.tiny_task().examples[0].previous == ("Milan", "Venice")
    assert tiny.tiny_task().examples[-1].previous == ("Denver", "Boston")


def test_another_subject_leaves_the_others_as_they_were() -> None:
    facts = dict(tiny.FACTS)
    italy = facts.pop("Italy")
    without = build(facts, tiny.TEMPLATES)
    first = build({"Italy": italy} | facts, tiny.TEMPLATES)
    last = build(facts | {"Italy": italy}, tiny.TEMPLATES)
    for examples in (first, last):
        assert [e for e in examples if e.subject != "Italy"] == without
    assert [e for e in first if e.subject == "Italy"] == [e for e in last if e.subject == "Italy"]


def test_build_crosses_subjects_templates_and_counts() -> None:
    examples = build(tiny.FACTS, tiny.TEMPLATES, (1, 3))
    assert len(examples) == len(tiny.FACTS) * len(tiny.TEMPLATES) * 2
    assert {(e.subject, len(e.previous)) for e in examples} == {(s, n) for s in tiny.FACTS for n in (1, 3)}
    for example in examples:
        assert set(example.previous) <= set(example.answers) == set(tiny.FACTS[example.subject])
        assert len(set(example.previous)) == len(example.previous)
        assert set(example.remaining) == set(example.answers) - set(example.previous)
        assert parse_example(json.loads(to_jsonl([example])), "here") == example


def test_previous_answers_come_from_the_familiar_ones() -> None:
    facts = {"Italy": [f"City{i}" for i in range(30)]}
    drawn = {a for seed in range(30) for e in build(facts, tiny.TEMPLATES, (2,), seed, familiar=5) for a in e.previous}
    assert drawn == {f"City{i}" for i in range(5)}


def test_templates() -> None:
    numbered = Template("List cities in {subject}.")
    assert numbered.prompt("Italy", ["Rome", "Milan"]) == "List cities in Italy.\n1. Rome\n2. Milan\n3."
    assert numbered.prompt("Italy", []) == "List cities in Italy.\n1."
    assert Template("In {subject}:", " {answer},").prompt("Italy", ["Rome"]) == "In Italy: Rome,"
    assert Template("In {subject}:", "\n- {answer}").prompt("{answer}", ["{i}"]) == "In {answer}:\n- {i}\n-"
    with pytest.raises(InputError, match=r"template 'List cities' does not hold {subject}"):
        Template("List cities")
    with pytest.raises(InputError, match=r"does not hold {answer}"):
        Template("{subject}", "\n{i}.")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["Rome", "Milan", "rome"], "facts of 'Italy' repeat or leave empty the answer 'Rome'"),
        (["Rome", "Milan", "Rome City"], "repeat or leave empty the answer 'Rome'"),
        (["Rome", "Milan", " . "], "repeat or leave empty the answer ' . '"),
        (["Rome", "Milan", " Turin"], "facts of 'Italy': ' Turin' has white space around it; write 'Turin'"),
        (["Rome", "Milan"], "have 2 answers, and a prompt that gives 2 answers needs at least 3: add answers or lower"),
        (["Rome"], "'Italy' have 1 answer, and"),
    ],
)
def test_facts_that_cannot_be_built_from(answers: list[str], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        build({"Italy": answers}, tiny.TEMPLATES, (2,))
    assert message in str(refusal.value)


def test_build_files(tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(tiny.FACTS))
    templates = tmp_path / "templates.json"
    templates.write_text(
        json.dumps([{"header": "Cities of {subject}:"}, {"header": "{subject}:", "item": "\n* {answer}"}])
    )
    task = build_files(facts, templates, tmp_path / "out" / "mine.jsonl", previous=(1, 2))
    assert task.name == "mine" and len(task.examples) == 8 * 2 * 2
    assert load_task(str(tmp_path / "out" / "mine.jsonl")) == task
    assert len(build_files(facts, None, tmp_path / "plain.jsonl", previous=(1,)).examples) == 8


def test_files_of_a_windows_editor(tmp_path: Path) -> None:
    """A byte order mark is passed over; another encoding is refused with what to do."""
    facts, mine = tmp_path / "facts.json", tmp_path / "mine.jsonl"
    facts.write_text(json.dumps(tiny.FACTS), encoding="utf-8-sig")
    task = build_files(facts, None, mine, previous=(1,))
    mine.write_text(mine.read_text(), encoding="utf-8-sig")
    assert load_task(str(mine)) == task
    facts.write_bytes('{"España": ["Málaga", "Cádiz"]}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"facts file .* is not UTF-8 text: .* at byte 6; save it as UTF-8"):
        build_files(facts, None, tmp_path / "none.jsonl")


TASK_LINES = tiny.tiny_task(subjects=2).examples


@pytest.mark.parametrize(
    ("facts", "templates", "message"),
    [
        (None, None, "facts file .* does not exist"),
        ("{", None, "facts file .* is not JSON"),
        ("[]", None, r'facts file .* holds a list; expected an object, \{"subject": \["answer", \.\.\.\]'),
        ('{\n"Italy" 3}', None, "facts file .* is not JSON: Expecting ':' delimiter at line 2, column 9"),
        (to_jsonl(TASK_LINES), None, r"looks like a task \(JSONL\), .*: headtune task show .*facts"),
        ('{"Italy": "Rome"}', None, "subject 'Italy' must map to a list of strings, not 'Rome'"),
        ('{"Italy": ["Rome", 3]}', None, "subject 'Italy' must map to a list of strings"),
        ("{}", '{"header": ""}', r"templates file .* holds an object; expected a list, .*; put it in \[ \]"),
        ("{}", '["x"]', r"template 'x' must be"),
        ("{}", '[{"item": "{answer}"}]', "template .* must be"),
        ("{}", '[{"header": "{subject}", "foot": ""}]', "template .* must be"),
        ("{}", '[{"header": 3}]', "template .* must be"),
        ("{}", None, "facts.json holds no subjects"),
        ("{}", "[]", "templates.json holds no templates"),
    ],
)
def test_build_files_refuses(tmp_path: Path, facts: str | None, templates: str | None, message: str) -> None:
    for name, text in (("facts.json", facts), ("templates.json", templates)):
        if text is not None:
            (tmp_path / name).write_text(text)
    if templates == "[]":
        (tmp_path / "facts.json").write_text(json.dumps(tiny.FACTS))
    where = None if templates is None else tmp_path / "templates.json"
    with pytest.raises(InputError, match=message):
        build_files(tmp_path / "facts.json", where, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# --- comparing answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("São Paulo", "sao paulo"),
        ("Łódź", "Lodz"),
        ("The Hague", "hague"),
        ("Saint Petersburg", "St. Petersburg"),
        ("  **Rome**. ", "Rome"),
        ("O’Fallon", "O'Fallon"),
        ("New  York", "New York"),
        ("Straße", "STRASSE"),
        ("Kraków", "Krako\u0301w"),
    ],
)
def test_spellings_of_one_answer(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_different_answers_stay_different() -> None:
    assert len({normalise(name) for name in ("York", "New York", "Rome", "Romeo", "Theresa", "Resa")}) == 6


def test_city_is_dropped_unless_it_makes_the_subject() -> None:
    assert canonical("Quebec City", "Canada") == canonical("Quebec", "Canada") == "quebec"
    assert canonical("Mexico City", "Mexico") == "mexico city" != canonical("Mexico", "Mexico")


# --- splitting --------------------------------------------------------------------------------------------------------


def test_splits_share_no_subject_and_cover_all() -> None:
    subjects = [f"S{i}" for i in range(40)]
    parts = split_subjects(subjects)
    assert {name: len(part) for name, part in parts.items()} == {"train": 24, "validation": 6, "test": 10}
    assert sorted(s for part in parts.values() for s in part) == sorted(subjects)
    assert split_subjects(reversed(subjects)) == parts
    assert split_subjects(subjects, seed=1) != parts


@pytest.mark.parametrize("name", ["country_cities", "one_to_many"])
def test_split_of_a_built_in_task(name: str) -> None:
    whole = load_task(name)
    parts = {split: take_split(whole, split) for split in task_module.SPLITS}
    assert [part.name for part in parts.values()] == [f"{name}:{split}" for split in task_module.SPLITS]
    examples = [example for part in parts.values() for example in part.examples]
    assert Counter(examples) == Counter(whole.examples)
    of_subject = Counter(subject for part in parts.values() for subject in part.subjects)
    assert set(of_subject) == set(whole.subjects) and set(of_subject.values()) == {1}
    assert load_task(f"{name}:test") == parts["test"]
    assert load_task(f"{name}:test", split_seed=1) != parts["test"]


def test_a_file_can_be_split(tmp_path: Path, cities: Task) -> None:
    path = tmp_path / "cities.jsonl"
    path.write_text(to_jsonl(cities.examples))
    assert load_task(f"{path}:test") == take_split(cities, "test")


def test_too_few_subjects_for_a_split(cities: Task) -> None:
    with pytest.raises(InputError, match="split 'validation' of task 'cities' is empty: 1 subjects are too few"):
        take_split(Task("cities", cities.examples[:2]), "validation")


def test_limited_spreads_over_subjects(cities: Task) -> None:
    some = cities.limited(11)
    assert sorted(Counter(e.subject for e in some.examples).values()) == [1] * 5 + [2] * 3
    assert set(some.examples) <= set(cities.examples) and len(set(some.examples)) == 11
    assert some == cities.limited(11)
    assert some != cities.limited(11, seed=1)
    chosen = [{e.subject for e in cities.limited(3, seed).examples} for seed in range(20)]
    assert set.union(*chosen) == set(cities.subjects)  # not always the subjects that come first in the file
    assert cities.limited(8).examples == some.examples[:8]
    assert cities.limited(None) is cities and cities.limited(16) is cities


# --- built in ---------------------------------------------------------------------------------------------------------


def test_built_in_tasks() -> None:
    assert {"country_cities", "one_to_many"} <= set(builtin_names())
    many = load_task("one_to_many")
    answers = {example.subject: example.answers for example in many.examples}
    assert len(answers) >= 60
    assert min(map(len, answers.values())) >= 8
    assert {len(example.previous) for example in many.examples} == {1, 2, 3, 4}
    layouts = {example.prompt.split(example.subject)[0] for example in many.examples}
    assert len(layouts) >= 4


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_examples_are_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_module, "normalise", functools.cache(normalise))  # thousands of examples, few names
    task = load_task(name)
    assert len(set(task.examples)) == len(task.examples)
    for example in task.examples:
        assert parse_example(json.loads(to_jsonl([example])), "here") == example
        names = [canonical(answer, example.subject) for answer in example.answers]
        assert len(set(names)) == len(names)
        given = {canonical(answer, example.subject) for answer in example.previous}
        assert not given & {canonical(answer, example.subject) for answer in example.remaining}
        assert len(example.remaining) == len(example.answers) - len(example.previous)
        assert example.prompt == example.prompt.rstrip()


# --- spans and tokens -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "trimmed", "bos"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer(bos=request.param == "bos", trim_offsets=request.param == "trimmed")


def text_at(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, span: tuple[int, ...]) -> str:
    return str(tokenizer.decode(encoded.tokens[list(span)])).strip()


def test_spans_hold_the_text_they_are_named_for(any_tokenizer: PreTrainedTokenizerFast) -> None:
    task = tiny.tiny_task(previous=(1, 2, 3))
    found = encode(task, any_tokenizer)
    assert len(found.examples) == len(task.examples) and not found.dropped
    for encoded in found.examples:
        example = encoded.example
        assert encoded.tokens.tolist() == any_tokenizer(example.prompt).input_ids
        assert text_at(encoded, any_tokenizer, encoded.subject) == example.subject
        assert [text_at(encoded, any_tokenizer, span) for span in encoded.previous] == list(example.previous)
        assert encoded.end == len(encoded.tokens) - 1
        assert text_at(encoded, any_tokenizer, (encoded.end,)) in (".", "-")
        firsts = {any_tokenizer(" " + answer, add_special_tokens=False).input_ids[0] for answer in example.remaining}
        assert encoded.target_tokens == tuple(sorted(firsts))
        given = [any_tokenizer(" " + answer, add_special_tokens=False).input_ids[0] for answer in example.previous]
        assert list(encoded.previous_tokens) == given


@pytest.mark.parametrize(
    ("prompt", "subject", "previous", "lines"),
    [
        ("Some cities:\n1. New York\n2. York\n3.", "cities", ["New York", "York"], [1, 2]),
        ("Some cities:\n1. York\n2. New York\n3.", "cities", ["York", "New York"], [1, 2]),
        ("Some cities in York:\n1. York\n2.", "York", ["York"], [1]),
        ("Rome and Milan are in Italy.\n1. Rome\n2. Milan\n3.", "Italy", ["Rome", "Milan"], [1, 2]),
        ("Milan and Rome are in Italy.\n1. Rome\n2. Milan\n3.", "Italy", ["Rome", "Milan"], [1, 2]),
    ],
)
def test_an_answer_that_occurs_twice(
    any_tokenizer: PreTrainedTokenizerFast, prompt: str, subject: str, previous: list[str], lines: list[int]
) -> None:
    row = {"prompt": prompt, "subject": subject, "previous": previous, "answers": [*previous, "Boston", "Leeds"]}
    (encoded,) = encode(one(row), any_tokenizer).examples
    assert text_at(encoded, any_tokenizer, encoded.subject) == subject
    for span, answer, line in zip(encoded.previous, previous, lines, strict=True):
        assert text_at(encoded, any_tokenizer, span) == answer
        before = str(any_tokenizer.decode(encoded.tokens[: span[0]]))
        assert before.count("\n") == line and before.endswith(f"\n{line}.")


def test_spans_end_where_the_text_ends(any_tokenizer: PreTrainedTokenizerFast) -> None:
    """Without spaces around it, a span takes in neither the token before nor the one after."""
    row = {"prompt": "Italy:\nRome\nMilan\n", "subject": "Italy", "answers": ["Rome", "Milan", "Turin"]}
    (encoded,) = encode(one(row | {"previous": ["Rome", "Milan"]}), any_tokenizer).examples
    spans = (encoded.subject, *encoded.previous)
    assert [any_tokenizer.decode(encoded.tokens[list(span)]) for span in spans] == ["Italy", "Rome", "Milan"]


def test_sources_partition_the_positions(any_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        ROW,
        {"prompt": "Italy", "subject": "Italy", "answers": ["Rome"]},
        {"prompt": "Italy.\n1. Rome", "subject": "Italy", "answers": ["Rome", "Milan"], "previous": ["Rome"]},
        {"prompt": "Rome is in Italy", "subject": "Italy", "answers": ["Rome", "Milan"], "previous": ["Rome"]},
    ]
    for row in rows:
        (encoded,) = encode(one(row), any_tokenizer).examples
        positions = sorted(position for span in encoded.sources().values() for position in span)
        assert positions == list(range(len(encoded.tokens)))
        assert encoded.sources()["subject"] == list(encoded.subject)


def test_shared_first_tokens_are_left_out_of_both_sets_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    """ " New York" given and " New Toronto" not given begin alike."""
    row = ROW | {
        "prompt": "Cities in America:\n1. New York\n2. Boston\n3.",
        "subject": "America",
        "previous": ["New York", "Boston"],
        "answers": ["New York", "Boston", "New Toronto", "Denver"],
    }
    found = encode(one(row), tokenizer)
    (encoded,) = found.examples
    new, boston, denver = (tokenizer(text).input_ids[0] for text in (" New", " Boston", " Denver"))
    assert encoded.target_tokens == (denver,)
    assert encoded.previous_tokens == (boston,)
    assert encoded.ambiguous == (new,)
    assert found.summary()["n_ambiguous_first_tokens"] == 1


def test_a_first_token_of_two_previous_answers_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    row = ROW | {
        "prompt": "Cities in America:\n1. New York\n2. New Boston\n3. Boston\n4.",
        "subject": "America",
        "previous": ["New York", "New Boston", "Boston"],
        "answers": ["Denver"],
    }
    (encoded,) = encode(one(row), tokenizer).examples
    assert encoded.previous_tokens == tuple(tokenizer(text).input_ids[0] for text in (" New", " Boston"))


@pytest.mark.parametrize("key", ["prompt", "corrupt"])
def test_a_prompt_that_is_too_long_for_the_model_is_refused(key: str, tokenizer: PreTrainedTokenizerFast) -> None:
    row = ROW | {"corrupt": ROW["prompt"]}
    task = one(row | {key: "so " * 40 + row[key]})
    length = len(tokenizer("so " * 40 + row[key]).input_ids)
    assert len(encode(task, tokenizer, length).examples) == 1
    with pytest.raises(InputError, match=f"'so so .* takes {length} tokens, and the model takes {length - 1}; shorten"):
        encode(task, tokenizer, length - 1)


def test_examples_that_first_tokens_cannot_score_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    new = {"previous": ["New York"], "answers": ["New York", "New Toronto"]}
    shared = ROW | {"prompt": "Italy:\n1. New York\n2."} | new
    unordered = ROW | {"prompt": "Italy:\n1. Milan\n2. Rome\n3."}
    merging = {"prompt": "Italy: Ro", "subject": "Italy", "answers": ["me"]}  # not asked for with a space
    task = Task("mixed", tuple(parse_example(row, "here") for row in (ROW, shared, unordered, shared)))
    found = encode(task, tokenizer)
    assert [encoded.example for encoded in found.examples] == [task.examples[0]]
    assert found.dropped == {
        "remaining and previous answers share first tokens": 2,
        "previous answers not in the prompt's order": 1,
    }
    assert (found.summary()["n_examples"], found.summary()["n_dropped"]) == (1, 3)
    assert len(encode(one(merging), tokenizer).examples) == 1
    with pytest.raises(InputError, match=r"task 'one': no example can be scored on first tokens: .*share first tokens"):
        encode(one(shared), tokenizer)


def test_first_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """The space belongs to the answer; after white space there is none; merging across the border gives no token."""
    assert continuation("1.", "Rome") == " Rome"
    assert continuation("1.\n", "Rome") == continuation("", "Rome") == "Rome"

    def firsts(prompt: str, *answers: str) -> list[int | None]:
        return list(first_tokens(tokenizer, prompt, tokenizer(prompt).input_ids, answers).values())

    rome, york = (tokenizer(word).input_ids[0] for word in (" Rome", " York"))
    assert firsts("1.", "Rome", "York") == [rome, york] and firsts("1.") == []
    assert firsts("1.\n", "Rome") == [tokenizer("Rome").input_ids[0]]
    # "1. " ends in a space that the tokenizer would have joined to " Rome".
    assert firsts("1. ", "Rome", "New York") == [None, None]
    spaced = replace(parse_example(ROW, "here"), prompt=ROW["prompt"] + " ")
    with pytest.raises(InputError, match=r"first tokens: tokens merge across the end of the prompt \(1\)$"):
        encode(Task("one", (spaced,)), tokenizer)


def test_a_tokenizer_without_offsets_is_refused(cities: Task) -> None:
    class Slow:
        is_fast, name_or_path = False, "some/model"

    with pytest.raises(InputError, match="tokenizer 'some/model' gives no character offsets; use its fast version"):
        encode(cities, Slow())  # type: ignore[arg-type]


# --- chat templates ---------------------------------------------------------------------------------------------------

# Says "Italy" and "Rome" before the user does, writes its own <bos>, and marks turns with a special token.
CHAT = (
    "{{ bos_token }}System: of Italy and Rome.\n"
    "{% for m in messages %}{{ eos_token }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}assistant:\n{% endif %}"
)
BEFORE = "<bos>System: of Italy and Rome.\n<eos>user: "
BETWEEN = "\n<eos>assistant:\n"


def chat_tokenizer(template: str = CHAT) -> PreTrainedTokenizerFast:
    """One that puts <bos> in front, as llama's do, unless told otherwise."""
    found = tiny.tiny_tokenizer(bos=True)
    found.chat_template = template
    return found


def chat(*rows: dict[str, Any]) -> Task:
    return Task("chat", tuple(parse_example(row, "here") for row in rows), chat_template=True)


def test_a_task_without_a_chat_is_left_as_it_is(cities: Task) -> None:
    assert as_chat(cities, chat_tokenizer()) is cities
    assert replace(cities, chat_template=True).sha256 != cities.sha256
    assert replace(cities, chat_template=True).limited(3).chat_template
    assert take_split(replace(cities, chat_template=True), "test").chat_template


@pytest.mark.parametrize(
    ("prompt", "previous", "user", "reply"),
    [
        (
            "List cities in Italy.\n1. Rome\n2. Milan\n3.",
            ["Rome", "Milan"],
            "List cities in Italy.",
            "1. Rome\n2. Milan\n3.",
        ),
        ("List cities in Italy.\n\n- Rome\n-", ["Rome"], "List cities in Italy.", "- Rome\n-"),
        ("In Italy.\nWell:\n* Rome, Milan,", ["Rome", "Milan"], "In Italy.\nWell:", "* Rome, Milan,"),
        ("The capital of Italy is", [], "The capital of Italy is", ""),
        # A number or bullet alone begins the list; a line of more is the user's.
        ("List cities in Italy.\n1.", [], "List cities in Italy.", "1."),
        ("Cities in Italy:\n\n -", [], "Cities in Italy:", " -"),
        ("In Italy?\nA:", [], "In Italy?\nA:", ""),
        ("Italy 1.", [], "Italy 1.", ""),
        (
            "Cities in Italy: Rome, Milan,",
            ["Rome", "Milan"],
            "Cities in Italy: Rome, Milan,",
            "",
        ),  # nothing comes before
        ("\n1. Rome (Italy)\n2.", ["Rome"], "\n1. Rome (Italy)\n2.", ""),
        ("Rome is in Italy.\n1. Rome\n2. Milan\n3.", ["Rome", "Milan"], "Rome is in Italy.", "1. Rome\n2. Milan\n3."),
    ],
)
def test_the_user_asks_and_the_reply_has_begun(prompt: str, previous: list[str], user: str, reply: str) -> None:
    row = {"prompt": prompt, "subject": "Italy", "answers": ["Rome", "Milan", "Turin"], "previous": previous}
    (written,) = as_chat(chat(row), chat_tokenizer()).examples
    assert written.prompt == BEFORE + user + BETWEEN + reply
    assert (written.subject, written.answers, written.previous) == (
        "Italy",
        ("Rome", "Milan", "Turin"),
        tuple(previous),
    )


def test_a_chat_in_tokens() -> None:
    """END is where the next answer comes, spans are the user's words, and special tokens are the template's alone."""
    tokenizer = chat_tokenizer()
    task = replace(tiny.tiny_task(previous=(0, 2)), chat_template=True)
    found = encode(task, tokenizer)
    assert not found.dropped and len(found.examples) == len(task.examples)
    user_starts = tokenizer(BEFORE.rstrip(), add_special_tokens=False).input_ids
    for plain, encoded in zip(task.examples, found.examples, strict=True):
        ids = encoded.tokens.tolist()
        assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 2)
        assert ids[: len(user_starts)] == user_starts
        assert (
            min(encoded.subject) >= len(user_starts) and text_at(encoded, tokenizer, encoded.subject) == plain.subject
        )
        assert [text_at(encoded, tokenizer, span) for span in encoded.previous] == list(plain.previous)
        reply = max(index for index, token in enumerate(ids) if token == tokenizer.eos_token_id)
        assert all(min(span) > reply for span in encoded.previous)
        assert tokenizer.decode(ids[-1]) in (".", "-")
        # The answer continues the reply: with a space after "1." as after "3.".
        firsts = {tokenizer(" " + answer, add_special_tokens=False).input_ids[0] for answer in plain.remaining}
        assert encoded.target_tokens == tuple(sorted(firsts))


def test_a_subject_that_the_template_names_first() -> None:
    (encoded,) = encode(chat(ROW), chat_tokenizer()).examples
    assert encoded.example.prompt.index("Italy") < len(BEFORE)
    before = chat_tokenizer().decode(encoded.tokens[: encoded.subject[0]])
    assert before == BEFORE + "List five cities in"
    in_reply = ROW | {"prompt": "List five cities.\n1. Rome (Italy)\n2. Milan\n3."}
    (encoded,) = encode(chat(in_reply), chat_tokenizer()).examples
    assert chat_tokenizer().decode(encoded.tokens[: encoded.subject[0]]).endswith("1. Rome (")


def test_a_template_that_trims_its_turns() -> None:
    row = ROW | {"prompt": "  List five cities in Italy. \n1. Rome\n2. Milan\n3."}
    trimming = CHAT.replace("m.content", "m.content | trim")
    (encoded,) = encode(chat(row), chat_tokenizer(trimming)).examples
    assert encoded.example.prompt == BEFORE + "List five cities in Italy." + BETWEEN + "1. Rome\n2. Milan\n3."
    assert chat_tokenizer().decode(encoded.tokens[: encoded.subject[0]]) == BEFORE + "List five cities in"


def test_a_counterpart_is_a_chat_too() -> None:
    tokenizer = chat_tokenizer()
    row = ROW | {"corrupt": "List five cities in Japan.\n1. Osaka\n2. Kobe\n3."}
    (written,) = as_chat(chat(row), tokenizer).examples
    assert written.corrupt == BEFORE + "List five cities in Japan." + BETWEEN + "1. Osaka\n2. Kobe\n3."
    (encoded,) = encode(chat(row), tokenizer).examples
    assert encoded.corrupt is not None and tokenizer.decode(encoded.corrupt) == written.corrupt
    assert len(encoded.corrupt) == len(encoded.tokens)
    (plain,) = encode(one(row), tokenizer).examples
    assert plain.corrupt is not None and plain.corrupt.tolist() == tokenizer(row["corrupt"]).input_ids
    assert encode(one(ROW), tokenizer).examples[0].corrupt is None

    single = {"prompt": "The capital of Italy is", "subject": "Italy", "answers": ["Rome"], "corrupt": "A\nB"}
    (written,) = as_chat(chat(single), tokenizer).examples
    assert written.corrupt == BEFORE + "A\nB" + BETWEEN

    for corrupt in ("Japan", "1. Osaka\n2. Kobe\n3.", "\n1. Osaka\n2. Kobe\n3."):
        with pytest.raises(InputError, match=r"the corrupt prompt .* must hold a line before its list") as refusal:
            encode(chat(ROW | {"corrupt": corrupt}), tokenizer)
        assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="has no chat template; leave chat_template out"):
        encode(chat(ROW), tokenizer)


# --- relations turned round -------------------------------------------------------------------------------------------

SAMPLES = [
    ("Colosseum", "Italy"),
    ("Louvre", "France"),
    ("Uffizi", "Italy"),
    ("the colosseum", "Italy"),  # again
    ("Pantheon", "Italy"),
    ("Orsay", "France"),
    (" . ", "France"),  # nothing
    ("Prado", "Spain"),
]


def test_invert() -> None:
    assert invert(SAMPLES, 2) == {"Italy": ["Colosseum", "Uffizi", "Pantheon"], "France": ["Louvre", "Orsay"]}
    assert invert(SAMPLES, 3) == {"Italy": ["Colosseum", "Uffizi", "Pantheon"]}
    assert set(invert(SAMPLES, 1)) == {"Italy", "France", "Spain"} and invert([], 1) == {}
    cities = [("Mexico City", "Mexico"), ("Mexico", "Mexico"), ("Quebec City", "Canada"), ("Quebec", "Canada")]
    assert invert(cities, 1) == {"Mexico": ["Mexico City", "Mexico"], "Canada": ["Quebec City"]}


def relation(path: Path, as_list: bool = False) -> Path:
    rows = [{"subject": subject, "object": thing} for subject, thing in SAMPLES]
    path.write_text(json.dumps(rows if as_list else {"name": "landmarks", "samples": rows}))
    return path


@pytest.mark.parametrize("as_list", [True, False])
def test_read_relation(tmp_path: Path, as_list: bool) -> None:
    assert read_relation(relation(tmp_path / "r.json", as_list)) == SAMPLES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "relation file .* is not JSON"),
        ("{}", r'must hold a list of \{"subject": ..., "object": ...\}'),
        ('"x"', "must hold a list"),
        ('{"samples": {}}', "must hold a list"),
        ('[["Colosseum", "Italy"]]', "must hold a list"),
        ('[{"subject": "Colosseum"}]', "must hold a list"),
        ('[{"subject": "Colosseum", "object": 3}]', "must hold a list"),
    ],
)
def test_a_file_that_is_no_relation(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_relation(tmp_path / "r.json")


def test_building_from_a_relation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = relation(tmp_path / "r.json")
    task = build_files(source, None, tmp_path / "out.jsonl", inverted=True, previous=(0, 1))
    assert task.subjects == ["France", "Italy"] and len(task.examples) == 4
    assert {e.subject: e.answers for e in task.examples}["France"] == ("Louvre", "Orsay")
    assert load_task(str(tmp_path / "out.jsonl")) == replace(task, name="out")
    assert caplog.messages == [f"{source}: 1 objects have fewer than 2 subjects each and are left out"]
    caplog.clear()
    build_files(source, None, tmp_path / "all.jsonl", inverted=True, previous=(0,))
    assert caplog.messages == []
    with pytest.raises(InputError, match="holds no subjects"):
        build_files(source, None, tmp_path / "none.jsonl", inverted=True, previous=(5,))
    with pytest.raises(InputError, match=r"facts file .* holds a list; expected an object|must map to a list"):
        build_files(source, None, tmp_path / "none.jsonl", previous=(1,))
    assert not (tmp_path / "none.jsonl").exists()


def test_what_stands_twice_is_refused(tmp_path: Path) -> None:
    """A key of an object, and a subject by another spelling: the same facts would lie in train and test."""
    facts = tmp_path / "facts.json"
    for content, line in (
        ('{"Georgia": ["Tbilisi", "Batumi"], "Georgia": ["Atlanta", "Macon"]}', "key 'Georgia' stands twice"),
        ('{"Italy": ["Rome", "Milan"], "italy ": ["Rome", "Turin"]}', "differ by case or white space alone"),
    ):
        facts.write_text(content)
        with pytest.raises(InputError, match=line):
            build_files(facts, None, tmp_path / "out.jsonl", previous=(1,))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "In Italy", "subject": "Italy", "answers": ["Rome"], "answers": ["Milan"]}\n')
    with pytest.raises(InputError, match=r"lines\.jsonl:1: key 'answers' stands twice"):
        load_task(str(lines))
    assert not (tmp_path / "out.jsonl").exists()


def test_half_a_character_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt": "The emoji \\ud83d is called", "subject": "emoji", "answers": ["grin"]}\n')
    with pytest.raises(InputError, match=r"half\.jsonl:1: holds \\ud83d, half of a character"):
        load_task(str(path))
    path.write_text('{"prompt": "The emoji \\ud83d\\ude00 is called", "subject": "emoji", "answers": ["grin"]}\n')
    assert "\U0001f600" in load_task(str(path)).examples[0].prompt


@pytest.mark.parametrize(
    "item", ["{answer}, ", ", {answer}", "\n{i}. {answer};", '\n- "{answer}"', "\n({i}) {answer}", "\n#{i} {answer}"]
)
def test_items_that_would_not_be_read_back_are_refused(item: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps({"Italy": ["Rome", "Milan", "Turin"]}))
    (tmp_path / "t.json").write_text(json.dumps([{"header": "Cities in {subject}:", "item": item}]))
    with pytest.raises(InputError, match="would not be read back as written"):
        build_files(tmp_path / "facts.json", tmp_path / "t.json", tmp_path / "out.jsonl", previous=(2,))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        (" 东京。", "东京", True),
        (" “Rome”", "Rome", True),
        (" 「東京」", "東京", True),
        (" パリ", "バリ", False),
        (" мой", "мои", False),
        (" é", "e", True),
    ],
)
def test_answers_beyond_english(text: str, answer: str, same: bool) -> None:
    assert (normalise(text) == normalise(answer)) is same


@pytest.mark.parametrize(
    ("prompt", "subject", "begins"),
    [
        ("Common libraries written in the language C include", "C", 41),
        ("Anna met Ann. The town of Ann is", "Ann", 9),
        ("东京大学在", "京", 1),
    ],
)
def test_a_subject_is_a_word_where_it_can_be(prompt: str, subject: str, begins: int) -> None:
    assert subject_start(prompt, subject) == begins
