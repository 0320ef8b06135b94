"""Published data sets as tasks: `load_task("truthfulqa:fold_0_test.csv")`.

- `truthfulqa`, multiple choice: CSV, JSON, JSONL or hub id; "Q: {question}", and "A:" on the next line.
- `mquake`, exact match: JSONL, JSON or hub id; "Q: Imagine that {edited fact}. {question} A:".
- `relation`, exact match: the JSON file of a relation, or a folder of them; "{subject} is part of the country of".
- `clutrr`, exact match: CSV, JSON, JSONL or hub id; a story, the question, and "Answer: {B} is {A}'s".

Prompts end right before the answer. No row is left out: one that cannot be a prompt is refused, by its place.

Sources: TruthfulQA (Lin et al. 2022), MQuAKE (Zhong et al. 2023) and CLUTRR (Sinha et al. 2019) as LoFiT (Yin et al.
2024) sets them up, the relations of LRE (Hernandez et al. 2024).
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .tasks import Example, Kind, Task, hub_rows, json_lines, parse_example, read_json, read_relation

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How the rows of a data set become examples.

    Attributes:
        kind: of the task.
        columns: that a row must have.
        example: a row's example, as JSON that `parse_example` checks.
        hub: configuration and split to ask the hub for.
    """

    kind: Kind
    columns: tuple[str, ...]
    example: Callable[[Row, str], dict[str, Any]]
    hub: tuple[str | None, str]


def read(name: str, path: str) -> Task:
    """The task in `path`, which is laid out as `name`, one of `FORMATS`, says.

    Raises:
        InputError: no such file or data set, a row without the columns that the format needs, or an empty answer.
    """
    file = Path(path)
    if name == "relation":
        return Task(f"{name}:{file.stem}", tuple(_relations(file)), kind="exact_match")
    shape = _TABLES[name]
    if not file.exists() and not file.suffix and path.count("/") == 1 and not path.startswith(("/", ".")):
        config, split = shape.hub
        rows, title = hub_rows(path, split, config), path
    else:
        rows, title = _rows(file, name), file.stem
    examples = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a row of {name}, found {type(row).__name__}")
        # "Best Answer" in a CSV file is best_answer on the hub
        row = {str(key).lower().replace(" ", "_"): value for key, value in row.items()}
        for column in shape.columns:
            if row.get(column) is None:
                raise InputError(f"{where}: no {column!r}; a row of {name} needs {', '.join(shape.columns)}")
        examples.append(parse_example(shape.example(row, where), where))
    if not examples:
        raise InputError(f"{name} data {path!r} holds no rows; check the file")
    return Task(f"{name}:{title}", tuple(examples), kind=shape.kind)


def _rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file with their places: lines of JSONL, elements of a JSON list, records of a CSV file."""
    if not path.is_file():
        raise InputError(f"{name} file {str(path)!r} does not exist; check the path")
    if path.suffix == ".jsonl":
        yield from json_lines(path)
    elif path.suffix == ".json":
        for number, row in enumerate(read_json(path, name, list), start=1):
            yield f"{path} row {number}", row
    elif path.suffix == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                for number, row in enumerate(csv.DictReader(file), start=1):
                    yield f"{path} row {number}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{name} file {str(path)!r} is not a CSV file in UTF-8: {error}") from None
    else:
        raise InputError(f"{name} file {str(path)!r} ends in {path.suffix!r}; expected .csv, .json or .jsonl")


def _distinct(answers: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(answers))


# --- TruthfulQA -------------------------------------------------------------------------------------------------------


def _truthfulqa(row: Row, where: str) -> dict[str, Any]:
    """A question; the best answer, then the other correct ones. Files join answers with ";", the hub lists them."""
    question = _text(row, "question", where)
    best = _text(row, "best_answer", where)
    correct, incorrect = (_answers(row[key], f"{where}: {key!r}") for key in ("correct_answers", "incorrect_answers"))
    if not incorrect:
        raise InputError(f"{where}: no incorrect answers; a choice needs at least one")
    return {
        "prompt": f"Q: {question}\nA:",
        "subject": question,
        "answers": _distinct([best, *correct]),
        "incorrect": _distinct(incorrect),
    }


def _answers(value: Any, what: str) -> list[str]:
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise InputError(f"{what} must be answers, found {value!r}"[:300])
    return [part.strip() for part in parts if part.strip()]  # lists often end in a semicolon


def _text(row: Row, key: str, where: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise InputError(f"{where}: {key!r} must be text, found {row[key]!r}"[:300])
    return str(row[key]).strip()


# --- MQuAKE -----------------------------------------------------------------------------------------------------------


def _mquake(row: Row, where: str) -> dict[str, Any]:
    """The edited facts, and a question over several hops that they change.

    As in LoFiT: of the paraphrases, only the first question; the new answer and its aliases count. The subject is that
    of the first edited fact, so that a split keeps the edits of one subject together.
    """
    try:
        edits = [(e["prompt"].replace("{}", e["subject"]), e["target_new"]["str"]) for e in row["requested_rewrite"]]
        subject, question = row["requested_rewrite"][0]["subject"], row["questions"][0].strip()
        answers = _distinct([row["new_answer"], *(row.get("new_answer_alias") or ())])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"{where}: not a case of MQuAKE ({type(error).__name__}: {error}); it needs requested_rewrite with prompt, "
            "subject and target_new.str, questions and new_answer"
        ) from None
    facts = " and ".join(f"{fact} {new}" for fact, new in edits)
    return {"prompt": f"Q: Imagine that {facts}. {question} A:", "subject": subject, "answers": answers}


# --- relations --------------------------------------------------------------------------------------------------------


def _relations(path: Path) -> Iterator[Example]:
    """The examples of a relation file, or of all of a folder in the order of their names.

    One example a subject and relation; a subject's several objects are all accepted, in the file's order. A split is by
    subject, over all relations of a folder. `Task.limited` is even over subjects, so over relations it goes by size.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"relation folder {str(path)!r} holds no .json file; check the path")
    for file in files:
        samples = read_relation(file)
        template = _template(read_json(file, "relation", object), file)
        objects: dict[str, list[str]] = {}
        for subject, thing in samples:
            objects.setdefault(subject, []).append(thing)
        if not objects:
            raise InputError(f"relation file {str(file)!r} holds no samples; remove it")
        for subject, things in objects.items():
            prompt = template.replace("{}", subject)
            row = {"prompt": prompt, "subject": subject, "answers": _distinct(things)}
            yield parse_example(row, f"{file}, subject {subject!r}")


def _template(data: Any, file: Path) -> str:
    """The first zero-shot template, or else the first other one, that holds one `{}` and stops amid a sentence."""
    keys = ("prompt_templates_zs", "prompt_templates")
    texts = [text for key in keys if isinstance(data, dict) for text in data.get(key) or ()]
    for text in texts:
        if isinstance(text, str) and text.count("{}") == 1 and text.rstrip()[-1] not in ".!?":
            return text.rstrip()
    raise InputError(
        f"relation file {str(file)!r} has no usable template among {texts!r}; add prompt_templates_zs with one that "
        "holds {} once and ends right before the answer"
    )


# --- CLUTRR -----------------------------------------------------------------------------------------------------------


def _clutrr(row: Row, where: str) -> dict[str, Any]:
    """A story, and who B is to A: `query` is `('A', 'B')` and `target_text` names B, as in "B is A's father".

    The set-up is LoFiT's, the wording is not. The subject is B.
    """
    story = str(row.get("clean_story") or _text(row, "story", where)).replace("[", "").replace("]", "").strip()
    try:
        query = ast.literal_eval(row["query"]) if isinstance(row["query"], str) else row["query"]
        of, who = (str(name) for name in query)
    except (SyntaxError, TypeError, ValueError):
        raise InputError(f"{where}: query {row['query']!r} is not a pair of names ('A', 'B')") from None
    prompt = (
        f'Here is a story about a family.\n"{story}"\nTaking all that it says as true, how is {who} related to {of}?\n'
        f"Answer: {who} is {of}'s"
    )
    return {"prompt": prompt, "subject": who, "answers": [_text(row, "target_text", where)]}


_TABLES = {
    "truthfulqa": Format(
        "multiple_choice",
        ("question", "best_answer", "correct_answers", "incorrect_answers"),
        _truthfulqa,
        ("generation", "validation"),
    ),
    "mquake": Format("exact_match", ("requested_rewrite", "questions", "new_answer"), _mquake, (None, "train")),
    "clutrr": Format("exact_match", ("story", "query", "target_text"), _clutrr, ("gen_train23_test2to10", "train")),
}
FORMATS = (*_TABLES, "relation")
