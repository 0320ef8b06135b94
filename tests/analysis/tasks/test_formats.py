"""Published data sets become the prompts that their papers ask, answers included; nothing is dropped on the way."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headtune.analysis.tasks import formats
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.utils.errors import InputError
from helpers.paths import ROOT

DATA = ROOT.parent / "shared" / "data"
Rows = list[dict[str, Any]]

# --- small files of every format --------------------------------------------------------------------------------------

TRUTHFULQA: Rows = [
    {
        "Type": "Adversarial",
        "Question": "What falls up?",
        "Best Answer": "Nothing falls up",
        "Correct Answers": "There is no such thing; Nothing falls up; Nothing",
        "Incorrect Answers": "Rain; Smoke, in a way; Rain",
        "Source": "",
    },
    {
        "Type": "Adversarial",
        "Question": " Who owns the sea? ",
        "Best Answer": "No one",
        "Correct Answers": "No one; Everyone;",
        "Incorrect Answers": "Neptune",
        "Source": "",
    },
]

MQUAKE: Rows = [
    {
        "requested_rewrite": [{"prompt": "{} is a citizen of", "subject": "Ann", "target_new": {"str": "Chad"}}],
        "questions": ["Where is Bob's wife a citizen?", "Bob's wife is a citizen of where?"],
        "new_answer": "Chad",
        "new_answer_alias": ["Tchad", "Chad", "Republic of Chad"],
    },
    {
        "requested_rewrite": [
            {"prompt": "The capital of {} is", "subject": "Chad", "target_new": {"str": "Rome"}},
            {"prompt": "{} lives in", "subject": "Ann", "target_new": {"str": "Chad"}},
        ],
        "questions": ["What is the capital of Ann's country?"],
        "new_answer": "Rome",
    },
]

CAPITALS: dict[str, Any] = {
    "name": "capital",
    "prompt_templates": ["{}'s capital is"],
    "prompt_templates_zs": ["What is the capital of {}?", "The capital of {} is the city of"],
    "samples": [
        {"subject": "Italy", "object": "Rome"},
        {"subject": "Bolivia", "object": "Sucre"},
        {"subject": "Chile", "object": "Santiago"},
        {"subject": "Bolivia", "object": "La Paz"},
        {"subject": "Bolivia", "object": "Sucre"},
    ],
}
LANGUAGES: dict[str, Any] = {
    "name": "language",
    "prompt_templates": ["{}? Its people speak"],
    "samples": [{"subject": "Italy", "object": "Italian"}, {"subject": "Chile", "object": "Spanish"}],
}

CLUTRR: Rows = [
    {
        "story": "noise",
        "clean_story": "[Roy] took his son [Tim] out. [Tim]'s grandfather [Al] waved.",
        "query": "('Roy', 'Al')",
        "target_text": "father",
    },
    {"story": "[Ann] met her aunt [Bea].", "clean_story": "", "query": "('Ann', 'Bea')", "target_text": "aunt"},
]
PAIRS: Rows = [
    {"input": "iPod {0}", "output": "Apple"},
    {"output": "Sony ", "input": "Dino"},
    {"input": "Dino ", "output": "HP", "id": 3},
    {"input": "Dino", "output": "Sony"},
]

TRACE: Rows = [
    {"prompt": "Is it hawkish?\nA. dove  B. hawk\nAnswer: ", "answer": " B"},
    {"prompt": "def f():\n", "answer": "return 1\nend"},
]

SUPERNI: dict[str, Any] = {
    "Contributors": ["x"],
    "Definition": ["Turn the word round. "],
    "Positive Examples": [{"input": "ab", "output": "ba", "explanation": ""}],
    "Instances": [
        {"id": "task1-1", "input": " abc", "output": ["cba ", "c b a", "cba"]},
        {"id": "task1-2", "input": "no", "output": "on"},
    ],
}


def as_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_json(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def as_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {".csv": as_csv, ".json": as_json, ".jsonl": as_jsonl}


@pytest.mark.parametrize("suffix", WRITERS)
def test_truthfulqa(tmp_path: Path, suffix: str) -> None:
    path = WRITERS[suffix](tmp_path / f"q{suffix}", TRUTHFULQA)
    task = load_task(f"truthfulqa:{path}")
    assert (task.name, task.kind) == ("truthfulqa:q", "multiple_choice")
    assert task.examples == (
        Example(
            "Q: What falls up?\nA:",
            "What falls up?",
            ("Nothing falls up", "There is no such thing", "Nothing"),
            incorrect=("Rain", "Smoke, in a way"),
        ),
        Example("Q: Who owns the sea?\nA:", "Who owns the sea?", ("No one", "Everyone"), incorrect=("Neptune",)),
    )


def test_spaces_around_answers_of_published_data_are_left_out(tmp_path: Path) -> None:
    samples = [{"subject": "Chile", "object": " Santiago "}]
    (example,) = load_task(f"relation:{as_json(tmp_path / 'r.json', CAPITALS | {'samples': samples})}").examples
    assert example.answers == ("Santiago",)
    case = MQUAKE[0] | {"new_answer": " Chad", "new_answer_alias": ["Chad ", "Tchad"]}
    (example,) = load_task(f"mquake:{as_json(tmp_path / 'm.json', [case])}").examples
    assert example.answers == ("Chad", "Tchad")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_mquake(tmp_path: Path, suffix: str) -> None:
    task = load_task(f"mquake:{WRITERS[suffix](tmp_path / f'm{suffix}', MQUAKE)}")
    assert (task.name, task.kind) == ("mquake:m", "exact_match")
    assert task.examples == (
        Example(
            "Q: Imagine that Ann is a citizen of Chad. Where is Bob's wife a citizen? A:",
            "Ann",
            ("Chad", "Tchad", "Republic of Chad"),
        ),
        Example(
            "Q: Imagine that The capital of Chad is Rome and Ann lives in Chad. "
            "What is the capital of Ann's country? A:",
            "Chad",
            ("Rome",),
        ),
    )


def test_relation(tmp_path: Path) -> None:
    task = load_task(f"relation:{as_json(tmp_path / 'capital.json', CAPITALS)}")
    assert (task.name, task.kind) == ("relation:capital", "exact_match")
    assert task.examples == (
        Example("The capital of Italy is the city of", "Italy", ("Rome",)),
        Example("The capital of Bolivia is the city of", "Bolivia", ("Sucre", "La Paz")),
        Example("The capital of Chile is the city of", "Chile", ("Santiago",)),
    )


def test_a_folder_of_relations_is_one_task_split_by_subject(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    as_json(tmp_path / "a.json", CAPITALS)
    as_json(tmp_path / "more" / "b.json", LANGUAGES)
    (tmp_path / "LICENSE").write_text("not a relation")
    task = load_task(f"relation:{tmp_path}")
    assert task.name == f"relation:{tmp_path.stem}" and len(task.examples) == 5
    assert [e.prompt for e in task.examples][-2:] == ["Italy? Its people speak", "Chile? Its people speak"]
    train = load_task(f"relation:{tmp_path}:train")
    rest = load_task(f"relation:{tmp_path}:test")
    assert train.name == f"{task.name}:train" and train.kind == "exact_match"
    assert not set(train.subjects) & set(rest.subjects)
    for subject in task.subjects:
        whole = [e for e in task.examples if e.subject == subject]
        assert [e for e in train.examples if e.subject == subject] in ([], whole)


@pytest.mark.parametrize("suffix", WRITERS)
def test_clutrr(tmp_path: Path, suffix: str) -> None:
    task = load_task(f"clutrr:{WRITERS[suffix](tmp_path / f'c{suffix}', CLUTRR)}")
    assert (task.name, task.kind) == ("clutrr:c", "exact_match")
    first, second = task.examples
    assert '"Roy took his son Tim out. Tim\'s grandfather Al waved."' in first.prompt and "noise" not in first.prompt
    assert first.prompt.endswith("how is Al related to Roy?\nAnswer: Al is Roy's")
    assert (first.subject, first.answers) == ("Al", ("father",))
    assert '"Ann met her aunt Bea."' in second.prompt and second.prompt.endswith("Bea is Ann's")


@pytest.mark.parametrize("suffix", WRITERS)
def test_pairs(tmp_path: Path, suffix: str) -> None:
    rows = [{key: row[key] for key in ("input", "output")} for row in PAIRS] if suffix == ".csv" else PAIRS
    task = load_task(f"pairs:{WRITERS[suffix](tmp_path / f'p{suffix}', rows)}")
    assert (task.name, task.kind) == ("pairs:p", "exact_match")
    assert task.examples == (
        Example("Q: iPod {0}\nA:", "iPod {0}", ("Apple",)),
        Example("Q: Dino\nA:", "Dino", ("Sony", "HP")),
    )


def test_pairs_bring_their_own_template(tmp_path: Path) -> None:
    content = {"template": "{input} is made by", "pairs": PAIRS}
    task = load_task(f"pairs:{as_json(tmp_path / 'p.json', content)}")
    assert [example.prompt for example in task.examples] == ["iPod {0} is made by", "Dino is made by"]
    assert [example.subject for example in task.examples] == ["iPod {0}", "Dino"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_trace(tmp_path: Path, suffix: str) -> None:
    task = load_task(f"trace:{WRITERS[suffix](tmp_path / f't{suffix}', TRACE)}")
    assert (task.name, task.kind) == ("trace:t", "exact_match")
    first, second = task.examples
    assert first == Example(first.prompt, first.prompt, ("B",))
    assert first.prompt == "Is it hawkish?\nA. dove  B. hawk\nAnswer:"
    assert (second.prompt, second.answers) == ("def f():\n", ("return 1\nend",))


def test_superni(tmp_path: Path) -> None:
    task = load_task(f"superni:{as_json(tmp_path / 'task1.json', SUPERNI)}")
    assert (task.name, task.kind) == ("superni:task1", "exact_match")
    assert task.examples == (
        Example("Turn the word round.\n\nInput: abc\nOutput:", "abc", ("cba", "c b a")),
        Example("Turn the word round.\n\nInput: no\nOutput:", "no", ("on",)),
    )
    for definition, begin in (("One.", "One."), (["One.", "Two."], "One.\nTwo.")):
        path = as_json(tmp_path / "two.json", SUPERNI | {"Definition": definition})
        assert load_task(f"superni:{path}").examples[0].prompt == f"{begin}\n\nInput: abc\nOutput:"


@pytest.mark.parametrize("validation", ["eval", "dev"])
@pytest.mark.parametrize("name", formats.FOLDERS)
def test_a_folder_has_its_splits_as_files(name: str, validation: str, tmp_path: Path) -> None:
    folder = tmp_path / "v1.0"
    folder.mkdir()
    for stem, word in (("train", "one"), (validation, "two"), ("test", "three")):
        row = {"input": word, "output": [word], "prompt": word, "answer": word}
        as_json(folder / f"{stem}.json", [row] if name == "trace" else SUPERNI | {"Instances": [row]})
    as_json(folder / "labels.json", ["neither"])
    whole = load_task(f"{name}:{folder}")
    assert (whole.name, whole.split, whole.kind) == (f"{name}:v1.0", None, "exact_match")
    assert whole.subjects == ["one", "three", "two"]
    for split, word in (("train", "one"), ("validation", "two"), ("test", "three")):
        part = formats.read(name, str(folder), split)
        assert (part.name, part.split, part.subjects) == (f"{name}:v1.0:{split}", split, [word])
    assert load_task(f"{name}:{folder / 'test.json'}").name == f"{name}:v1.0/test"
    assert formats.has_files(name, str(folder)) and not formats.has_files(name, str(folder / "test.json"))
    assert not formats.has_files("relation", str(folder))
    with pytest.raises(InputError, match=r"split 'tran' of .* is unknown; did you mean 'train'"):
        formats.read(name, str(folder), "tran")
    (folder / "test.json").unlink()
    with pytest.raises(InputError, match=r"holds no test\.json; check the path and the split"):
        formats.read(name, str(folder), "test")
    with pytest.raises(InputError, match=r"holds no train\.json or eval\.json or dev\.json or test\.json"):
        load_task(f"{name}:{tmp_path}")


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], Rows]:
    """What the hub is made to hold: (data set, configuration, split) -> rows."""
    import datasets

    held: dict[tuple[str, str | None, str], Rows] = {}

    def load_dataset(name: str, config: str | None = None, split: str = "") -> Rows:
        if (name, config, split) not in held:
            raise FileNotFoundError(f"{name} is not on the hub\nsecond line")
        return held[name, config, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


def test_truthfulqa_from_the_hub(hub: dict[Any, Rows], tmp_path: Path) -> None:
    lists = {"Correct Answers", "Incorrect Answers"}
    hub["truthfulqa/truthful_qa", "generation", "validation"] = [
        {
            key.lower().replace(" ", "_"): value.strip(";").split("; ") if key in lists else value
            for key, value in row.items()
        }
        for row in TRUTHFULQA
    ]
    task = load_task("truthfulqa:truthfulqa/truthful_qa")
    assert task.name == "truthfulqa:truthfulqa/truthful_qa"
    assert task.examples == load_task(f"truthfulqa:{as_csv(tmp_path / 'q.csv', TRUTHFULQA)}").examples


def test_clutrr_and_mquake_from_the_hub(hub: dict[Any, Rows], tmp_path: Path) -> None:
    hub["CLUTRR/v1", "gen_train23_test2to10", "train"] = CLUTRR
    hub["someone/MQuAKE", None, "train"] = MQUAKE
    assert load_task("clutrr:CLUTRR/v1").examples == load_task(f"clutrr:{as_csv(tmp_path / 'c.csv', CLUTRR)}").examples
    assert load_task("mquake:someone/MQuAKE").kind == "exact_match"
    assert load_task("mquake:someone/MQuAKE:test").name == "mquake:someone/MQuAKE:test"


# --- refusals ---------------------------------------------------------------------------------------------------------

without = {key: value for key, value in TRUTHFULQA[0].items() if key != "Incorrect Answers"}
BAD: dict[str, tuple[str, Any, str]] = {
    "no column": ("truthfulqa", [TRUTHFULQA[0], without], "row 2: no 'incorrect_answers'; a row of truthfulqa needs"),
    "no incorrect": ("truthfulqa", [TRUTHFULQA[0] | {"Incorrect Answers": " ; "}], "row 1: no incorrect answers"),
    "answers are numbers": ("truthfulqa", [TRUTHFULQA[0] | {"Correct Answers": [3]}], "'correct_answers' must be answ"),
    "blank question": ("truthfulqa", [TRUTHFULQA[0] | {"Question": " "}], "row 1: 'question' must be text, found ' '"),
    "not rows": ("truthfulqa", [["x"]], "row 1: expected a row of truthfulqa, found list"),
    "nothing": ("truthfulqa", [], "holds no rows; check the file"),
    "not a list": ("mquake", {"rows": MQUAKE}, "holds an object; expected a list"),
    "no edit": ("mquake", [MQUAKE[0] | {"requested_rewrite": []}], "row 1: not a case of MQuAKE (IndexError"),
    "half an edit": ("mquake", [MQUAKE[0] | {"requested_rewrite": [{"prompt": "{} is"}]}], "(KeyError: 'subject')"),
    "no question": ("mquake", [MQUAKE[0] | {"questions": []}], "row 1: not a case of MQuAKE"),
    "blank answer": ("mquake", [MQUAKE[0] | {"new_answer": " "}], "row 1: 'answers' must hold non-empty strings"),
    "one name": ("clutrr", [CLUTRR[0] | {"query": "('Roy',)"}], "row 1: query \"('Roy',)\" is not a pair of names"),
    "no pair": ("clutrr", [CLUTRR[0] | {"query": "Roy and Al"}], "is not a pair of names"),
    "no relative": ("clutrr", [CLUTRR[0] | {"target_text": ""}], "row 1: 'target_text' must be text"),
    "no samples key": ("relation", {"prompt_templates": ["{} is"]}, "must hold a list of"),
    "no samples": ("relation", CAPITALS | {"samples": []}, "holds no samples"),
    "no template": ("relation", {"samples": CAPITALS["samples"]}, "has no usable template among []"),
    "only questions": ("relation", CAPITALS | {"prompt_templates": ["Is it {}?"], "prompt_templates_zs": []}, "usable"),
    "an input without output": ("pairs", [*PAIRS, {"input": "x"}], "row 5: no 'output'; a row of pairs needs input, o"),
    "a list of outputs": ("pairs", [{"input": "x", "output": ["y"]}], "row 1: 'output' must be text, found ['y']"),
    "blank input": ("pairs", [{"input": " ", "output": "y"}], "row 1: 'input' must be text, found ' '"),
    "no pairs": ("pairs", [], "holds no rows; check the file"),
    "no list of pairs": ("pairs", {"template": "{input}"}, "must hold a JSON list, or a list under 'pairs'"),
    "no slot": (
        "pairs",
        {"template": "Q: {}", "pairs": PAIRS},
        "template 'Q: {}' must be text that holds {input} once",
    ),
    "a space at the end": ("pairs", {"template": "{input}: ", "pairs": PAIRS}, "and does not end in a space"),
    "a pair that is none": ("pairs", {"pairs": ["x"]}, "row 1: expected a row of pairs, found str"),
    "no prompt": ("trace", [{"answer": "B"}], "row 1: no 'prompt'; a row of trace needs prompt, answer"),
    "blank prompt": ("trace", [{"prompt": "\n ", "answer": "B"}], "row 1: 'prompt' must be text"),
    "prompt is a list": ("trace", [{"prompt": ["a"], "answer": "B"}], "row 1: 'prompt' must be text, found ['a']"),
    "empty reply": ("trace", [*TRACE, {"prompt": "a", "answer": ""}], "row 3: 'answer' must be text, found ''"),
    "no definition": ("superni", {"Instances": []}, "'Definition' must be text or a list of texts, found None"),
    "blank definition": ("superni", SUPERNI | {"Definition": [""]}, "'Definition' must be text or a list of texts"),
    "no instances": ("superni", {"Definition": "Do."}, "'Instances' must be a list, found None"),
    "empty instances": ("superni", SUPERNI | {"Instances": []}, "holds no rows; check the file"),
    "no outputs": (
        "superni",
        SUPERNI | {"Instances": [{"input": "a", "output": []}]},
        "instance 1: 'output' must be tex",
    ),
    "blank output": (
        "superni",
        SUPERNI | {"Instances": [{"input": "a", "output": ["b", " "]}]},
        "instance 1: 'output'",
    ),
    "no output": (
        "superni",
        SUPERNI | {"Instances": [{"input": "a"}]},
        "instance 1: no 'output'; a row of superni need",
    ),
    "instance is text": ("superni", SUPERNI | {"Instances": ["a"]}, "instance 1: expected a row of superni, found str"),
    "a list of rows": ("superni", TRACE, "holds a list; expected an object"),
    "two slots": ("relation", CAPITALS | {"prompt_templates": [], "prompt_templates_zs": ["{} {} is"]}, "{} once"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_by_its_place(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    with pytest.raises(InputError) as refusal:
        load_task(f"{name}:{as_json(tmp_path / 'bad.json', content)}")
    assert message in str(refusal.value) and "bad.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "truthfulqa:nowhere.csv",
            "truthfulqa file 'nowhere.csv' does not exist; check the path, or give a task of your",
        ),
        ("truthfulqa:a/nowhere.csv", "truthfulqa file 'a/nowhere.csv' does not exist"),
        ("relation:nowhere", "relation file 'nowhere' does not exist; check the path, or give a task of your own"),
        ("pairs:a/nowhere", "pairs file 'a/nowhere' does not exist"),
        ("superni:a/nowhere", "superni task 'a/nowhere' is no .json file and no folder with one for each split"),
        ("trace:nobody/nothing", "task 'nobody/nothing' is not a file and cannot be loaded from the hub"),
        ("trace:empty", "trace folder 'empty' holds no train.json or eval.json or dev.json or test.json"),
        (
            "clutrr:nobody/nothing",
            "task 'nobody/nothing' is not a file and cannot be loaded from the hub: nobody/nothing",
        ),
        ("mquake:notes.txt", "mquake file 'notes.txt' ends in '.txt'; expected .csv, .json or .jsonl"),
        ("truthfulqa:latin.csv", "truthfulqa file 'latin.csv' is not a CSV file in UTF-8"),
        ("relation:empty", "relation folder 'empty' holds no .json file"),
        (
            "truthfulqq:data/q.csv",
            "task format 'truthfulqq' of 'truthfulqq:data/q.csv' is unknown; did you mean 'truth",
        ),
        (
            "relatoin:data/q.json",
            "task format 'relatoin' of 'relatoin:data/q.json' is unknown; did you mean 'relation'",
        ),
        ("truthfulqq:q", "did you mean 'truthfulqa'?"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: dict[Any, Rows]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("x")
    Path("latin.csv").write_bytes("Question\né\n".encode("latin-1"))
    Path("empty").mkdir()
    with pytest.raises(InputError) as refusal:
        load_task(name)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


# --- the real data ----------------------------------------------------------------------------------------------------


def real(name: str) -> Task:
    if not (DATA / name.partition(":")[2]).exists():
        pytest.skip(f"{name} needs the data sets beside the project, at {DATA}")
    shape, _, path = name.partition(":")
    return load_task(f"{shape}:{DATA / path}")


@pytest.mark.parametrize(("split", "n"), [("train", 326), ("val", 82), ("test", 409)])
def test_the_real_truthfulqa(split: str, n: int) -> None:
    task = real(f"truthfulqa:truthfulqa/fold_0_{split}.csv")
    with (DATA / f"truthfulqa/fold_0_{split}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(task.examples) == len(task.subjects) == len(rows) == n
    for example, row in zip(task.examples, rows, strict=True):
        assert example.answers[0] == row["Best Answer"].strip() and example.incorrect
        assert {*example.answers} == {a.strip() for a in row["Correct Answers"].split(";")} - {""} | {
            row["Best Answer"]
        }
        assert not any(";" in choice for choice in (*example.answers, *example.incorrect))


@pytest.mark.parametrize(("split", "n"), [("train", 134), ("val", 95), ("test", 864)])
def test_the_real_mquake(split: str, n: int) -> None:
    task = real(f"mquake:mquake/{split}.jsonl")
    assert len(task.examples) == n
    assert all(e.prompt.startswith("Q: Imagine that ") and e.prompt.endswith("? A:") for e in task.examples)
    if split == "test":
        first = task.examples[0]
        assert first.prompt == (
            "Q: Imagine that John Krasinski is a citizen of Sweden. "
            "Which country is the spouse of Emily Blunt a citizen of? A:"
        )
        assert first.answers[0] == "Sweden" and "Kingdom of Sweden" in first.answers


def test_the_real_relations() -> None:
    task = real("relation:relations")
    assert (len(task.examples), len(task.subjects)) == (9646, 8523)
    assert not [e.prompt for e in task.examples if e.prompt[-1] in "?.! " or "{}" in e.prompt]
    several = {e.subject: e.answers for e in task.examples if len(e.answers) > 1}
    assert several["Heilmann & Littmann"] == ("Berlin", "Munich") and len(several) == 24
    nixon = [e.answers for e in task.examples if e.subject == "Richard Nixon" and "born" in e.prompt]
    assert nixon == [("1913",)]


@pytest.mark.parametrize(
    ("name", "n", "several"),
    [
        ("country-capital", 197, 0),
        ("landmark-country", 835, 1),
        ("person-instrument", 505, 5),
        ("present-past", 293, 0),
        ("product-company", 494, 26),
        ("singular-plural", 205, 0),
    ],
)
def test_the_real_pairs(name: str, n: int, several: int) -> None:
    task = real(f"pairs:function_vectors/{name}.json")
    rows = json.loads((DATA / f"function_vectors/{name}.json").read_text())
    assert len(task.examples) == len(task.subjects) == n
    accepted = {(example.subject, answer) for example in task.examples for answer in example.answers}
    assert accepted == {(row["input"], row["output"]) for row in rows}
    assert all(example.prompt == f"Q: {example.subject}\nA:" for example in task.examples)
    assert sum(len([row for row in rows if row["input"] == subject]) > 1 for subject in task.subjects) == several
