"""Published data sets as tasks: `load_task("truthfulqa:fold_0_test.csv")`.

- `truthfulqa`, multiple choice: CSV, JSON, JSONL or hub id; "Q: {question}", and "A:" on the next line.
- `mquake`, exact match: JSONL, JSON or hub id; "Q: Imagine that {edited fact}. {question} A:".
- `relation`, exact match: the JSON file of a relation, or a folder of them; "{subject} is part of the country of".
- `clutrr`, exact match: CSV, JSON, JSONL or hub id; a story, the question, and "Answer: {B} is {A}'s".
- `pairs`, exact match: rows of `input` and `output`, in CSV, JSON or JSONL; "Q: {input}", and "A:" on the next line.
- `trace`, exact match: rows of `prompt` and `answer`, in CSV, JSON, JSONL or hub id; the prompt as it is.
- `superni`, exact match: the JSON file of a task; its definition, "Input: {input}", and "Output:" on the next line.

A task of the last two may be a folder of `train.json`, `eval.json` or `dev.json`, and `test.json`: it is all of them,
and its splits are those files. Exact match suits their tasks of short answers; summaries and code want other measures.

Prompts end right before the answer. No row is left out: one that cannot be a prompt is refused, by its place.

Sources: TruthfulQA (Lin et al. 2022), MQuAKE (Zhong et al. 2023) and CLUTRR (Sinha et al. 2019) as LoFiT (Yin et al.
2024) sets them up, the relations of LRE (Hernandez et al. 2024), the pairs of function vectors (Todd et al. 2024),
TRACE (Wang et al. 2023), Super-NaturalInstructions (Wang et al. 2022).
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError, nearest

from .readers import hub_rows, json_lines, read_json, read_relation
from .task import Example, Kind, Task, parse_example

Row = Mapping[str, Any]

PAIRS_TEMPLATE = "Q: {input}\nA:"
FOLDERS = ("trace", "superni")  # formats whose task may be a folder with a file for each split
_FILES = {"train": ("train.json",), "validation": ("eval.json", "dev.json"), "test": ("test.json",)}


@dataclass(frozen=True)
class Format:
    """How the rows of a data set become examples.

    Attributes:
        kind: of the task.
        columns: that a row must have.
        example: a row's example, as JSON that `parse_example` checks.
        hub: configuration and split to ask the hub for; None where the data set is no table there.
        rows: of a file, with their places.
    """

    kind: Kind
    columns: tuple[str, ...]
    example: Callable[[Row, str], dict[str, Any]]
    hub: tuple[str | None, str] | None
    rows: Callable[[Path, str], Iterator[tuple[str, Any]]]


def has_files(name: str, path: str) -> bool:
    """Whether the task in `path` is a folder that has its splits as files, for `read` to choose from."""
    return name in FOLDERS and Path(path).is_dir()


def read(name: str, path: str, split: str | None = None) -> Task:
    """The task in `path`, which is laid out as `name`, one of `FORMATS`, says.

    Args:
        split: of a folder (see `has_files`), the file to read: `train`, `validation` or `test`; None reads all.

    Raises:
        InputError: no such file or data set, a row without the columns that the format needs, or an empty answer.
    """
    file = Path(path)
    if name == "relation":
        return Task(f"{name}:{file.stem}", tuple(_relations(file)), kind="exact_match")
    shape = _TABLES[name]
    here = file.exists() or bool(file.suffix) or path.count("/") != 1 or path.startswith(("/", "."))
    if shape.hub is not None and not here:
        config, part = shape.hub
        rows, title = hub_rows(path, part, config), path
    elif has_files(name, path):
        rows = (row for one in _files(file, name, split) for row in shape.rows(one, name))
        title = file.resolve().name
    else:
        # The files of one folder are named alike in all folders.
        in_folder = name in FOLDERS and any(file.name in names for names in _FILES.values())
        rows, title = shape.rows(file, name), f"{file.resolve().parent.name}/{file.stem}" if in_folder else file.stem
    examples = [parse_example(shape.example(_row(row, name, place), place), place, True) for place, row in rows]
    if not examples:
        raise InputError(f"{name} data {path!r} holds no rows; check the file")
    title = title if split is None else f"{title}:{split}"
    return Task(f"{name}:{title}", tuple(examples), kind=shape.kind, split=split)


def _row(row: Any, name: str, place: str) -> dict[str, Any]:
    """A row with all the columns that its format needs; "Best Answer" in a CSV file is best_answer on the hub."""
    columns = _TABLES[name].columns
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a row of {name}, found {type(row).__name__}")
    row = {str(key).lower().replace(" ", "_"): value for key, value in row.items()}
    for column in columns:
        if row.get(column) is None:
            raise InputError(f"{place}: no {column!r}; a row of {name} needs {', '.join(columns)}")
    return row


def _files(folder: Path, name: str, split: str | None) -> list[Path]:
    """The files of a task's folder that are of a split, or all."""
    if split not in (None, *_FILES):
        raise InputError(f"split {split!r} of {name} folder {str(folder)!r} is unknown; {nearest(str(split), _FILES)}")
    names = [file for part, files in _FILES.items() if split in (None, part) for file in files]
    paths = [folder / file for file in names if (folder / file).is_file()]
    if not paths:
        raise InputError(f"{name} folder {str(folder)!r} holds no {' or '.join(names)}; check the path and the split")
    return paths


def _rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file with their places: lines of JSONL, elements of a JSON list, records of a CSV file."""
    if not path.is_file():
        raise _missing(path, name)
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


def _missing(path: Path, name: str) -> InputError:
    """The recipes of published data name a place where it may not be."""
    return InputError(
        f"{name} file {str(path)!r} does not exist; check the path, or give a task of your own (in a recipe: "
        "task.train=YOUR.jsonl)"
    )


def _distinct(answers: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(answers))


# --- TruthfulQA -------------------------------------------------------------------------------------------------------


def _truthfulqa(row: Row, place: str) -> dict[str, Any]:
    """A question; the best answer, then the other correct ones. Files join answers with ";", the hub lists them."""
    question = _text(row, "question", place)
    best = _text(row, "best_answer", place)
    correct, incorrect = (_answers(row[key], f"{place}: {key!r}") for key in ("correct_answers", "incorrect_answers"))
    if not incorrect:
        raise InputError(f"{place}: no incorrect answers; a choice needs at least one")
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


def _text(row: Row, key: str, place: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise InputError(f"{place}: {key!r} must be text, found {row[key]!r}"[:300])
    return str(row[key]).strip()


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pair_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The pairs of a file, those with the same input as one row at the place of the first.

    A JSON file is the list, or `{"template": "... {input} ...", "pairs": [...]}`.
    """
    rows, template = _rows(path, name), PAIRS_TEMPLATE
    if path.suffix == ".json" and isinstance(data := read_json(path, name, object), dict):
        template, listed = data.get("template", template), data.get("pairs")
        if not isinstance(listed, list):
            raise InputError(f"{name} file {str(path)!r} must hold a JSON list, or a list under 'pairs'")
        if not isinstance(template, str) or template.count("{input}") != 1 or template != template.rstrip(" "):
            raise InputError(
                f"{path}: template {template!r} must be text that holds {{input}} once and does not end in a space"
            )
        rows = ((f"{path} row {number}", row) for number, row in enumerate(listed, start=1))
    merged: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, raw in rows:
        row = _row(raw, name, place)
        input_text, output = (_text(row, key, place) for key in ("input", "output"))
        _, first = merged.setdefault(input_text, (place, {"input": input_text, "output": [], "template": template}))
        first["output"].append(output)
    yield from merged.values()


def _pair(row: Row, _place: str) -> dict[str, Any]:
    """All outputs of an input are accepted, in the file's order. The subject is the input."""
    prompt = row["template"].replace("{input}", row["input"])
    return {"prompt": prompt, "subject": row["input"], "answers": _distinct(row["output"])}


# --- TRACE ------------------------------------------------------------------------------------------------------------


def _trace(row: Row, place: str) -> dict[str, Any]:
    """The prompt without the spaces at its end: the space before the answer is the answer's. It is the subject too."""
    prompt = row["prompt"].rstrip(" ") if isinstance(row["prompt"], str) else ""
    if not prompt.strip():
        raise InputError(f"{place}: 'prompt' must be text, found {row['prompt']!r}"[:300])
    return {"prompt": prompt, "subject": prompt, "answers": [_text(row, "answer", place)]}


# --- Super-NaturalInstructions ----------------------------------------------------------------------------------------


def _instances(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The instances of a task, each with the task's definition, which files keep as a list of one or more texts."""
    if not path.is_file() or path.suffix != ".json":
        raise InputError(f"{name} task {str(path)!r} is no .json file and no folder with one for each split; check it")
    data = read_json(path, name, dict)
    definition, instances = data.get("Definition"), data.get("Instances")
    texts = [definition] if isinstance(definition, str) else definition
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{path}: 'Definition' must be text or a list of texts, found {definition!r}"[:300])
    if not isinstance(instances, list):
        raise InputError(f"{path}: 'Instances' must be a list, found {instances!r}"[:300])
    written = "\n".join(text.strip() for text in texts)
    for number, row in enumerate(instances, start=1):
        place = f"{path} instance {number}"
        yield place, row | {"definition": written} if isinstance(row, dict) else row


def _superni(row: Row, place: str) -> dict[str, Any]:
    """The definition and the input, without the demonstrations; all outputs are accepted. The subject is the input."""
    input_text, outputs = _text(row, "input", place), row["output"]
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(outputs, list) or not outputs or not all(isinstance(o, str) and o.strip() for o in outputs):
        raise InputError(f"{place}: 'output' must be text or a list of texts, found {row['output']!r}"[:300])
    return {
        "prompt": f"{row['definition']}\n\nInput: {input_text}\nOutput:",
        "subject": input_text,
        "answers": _distinct(output.strip() for output in outputs),
    }


# --- MQuAKE -----------------------------------------------------------------------------------------------------------


def _mquake(row: Row, place: str) -> dict[str, Any]:
    """The edited facts, and a question over several hops that they change.

    As in LoFiT: of the paraphrases, only the first question; the new answer and its aliases count. The subject is that
    of the first edited fact, so that a split keeps the edits of one subject together.
    """
    try:
        edits = [(e["prompt"].replace("{}", e["subject"]), e["target_new"]["str"]) for e in row["requested_rewrite"]]
        subject, question = row["requested_rewrite"][0]["subject"], row["questions"][0].strip()
        answers = _distinct(name.strip() for name in (row["new_answer"], *(row.get("new_answer_alias") or ())))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"{place}: not a case of MQuAKE ({type(error).__name__}: {error}); it needs requested_rewrite with prompt, "
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
    if not path.exists():
        raise _missing(path, "relation")
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"relation folder {str(path)!r} holds no .json file; check the path")
    for file in files:
        samples = read_relation(file)
        template = _template(read_json(file, "relation", object), file)
        objects: dict[str, list[str]] = {}
        for subject, thing in samples:
            objects.setdefault(subject, []).append(thing.strip())
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


def _clutrr(row: Row, place: str) -> dict[str, Any]:
    """A story, and who B is to A: `query` is `('A', 'B')` and `target_text` names B, as in "B is A's father".

    The set-up is LoFiT's, the wording is not. The subject is B.
    """
    story = str(row.get("clean_story") or _text(row, "story", place)).replace("[", "").replace("]", "").strip()
    try:
        query = ast.literal_eval(row["query"]) if isinstance(row["query"], str) else row["query"]
        relative, who = (str(name) for name in query)
    except (SyntaxError, TypeError, ValueError):
        raise InputError(f"{place}: query {row['query']!r} is not a pair of names ('A', 'B')") from None
    prompt = (
        f'Here is a story about a family.\n"{story}"\n'
        f"Taking all that it says as true, how is {who} related to {relative}?\n"
        f"Answer: {who} is {relative}'s"
    )
    return {"prompt": prompt, "subject": who, "answers": [_text(row, "target_text", place)]}


_TABLES = {
    "truthfulqa": Format(
        "multiple_choice",
        ("question", "best_answer", "correct_answers", "incorrect_answers"),
        _truthfulqa,
        ("generation", "validation"),
        _rows,
    ),
    "mquake": Format("exact_match", ("requested_rewrite", "questions", "new_answer"), _mquake, (None, "train"), _rows),
    "clutrr": Format(
        "exact_match", ("story", "query", "target_text"), _clutrr, ("gen_train23_test2to10", "train"), _rows
    ),
    "pairs": Format("exact_match", ("input", "output"), _pair, None, _pair_rows),
    "trace": Format("exact_match", ("prompt", "answer"), _trace, (None, "train"), _rows),
    "superni": Format("exact_match", ("input", "output"), _superni, None, _instances),
}
FORMATS = (*_TABLES, "relation")
