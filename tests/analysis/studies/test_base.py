"""What is common to all studies: their options, how they are run, and the files they leave."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.reports.html import png_of
from headtune.analysis.studies import base
from headtune.analysis.studies.base import Analysis, Figure, Study, Table
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress
from helpers.tiny import tiny_model, tiny_task, tiny_tokenizer

TASK = tiny_task(subjects=3)


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", 1), tiny_tokenizer(), "tiny")


def dummy(
    model: HeadModel,
    examples: Sequence[Encoded],
    progress: Progress,
    *,
    count: int = 3,
    share: float = 0.5,
    word: str = "",
    flag: bool = False,
    maybe: int | None = None,
) -> Analysis:
    seen = [encoded.example.subject for encoded in progress(examples, "counting")]
    return Analysis("dummy", {"subjects": seen, "count": count, "maybe": maybe}, ["A paragraph."])


def plain(model: HeadModel, examples: Sequence[Encoded], progress: Progress) -> Analysis:
    return Analysis("plain", {}, [])


class Local(Study):
    """A study of this file."""

    def load(self) -> Any:
        return {"dummy": dummy, "plain": plain}[self.function]


@pytest.fixture(autouse=True)
def studies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dummy", "plain"):
        monkeypatch.setitem(base.STUDIES, name, Local("", name, "for these tests"))


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in base.STUDIES])
def test_every_study_can_be_loaded_and_checked(name: str) -> None:
    """Positional (model, examples, progress), options by keyword with a default of their own type, and a seed."""
    function = base.STUDIES[name].load()
    positional = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["model", "examples", "progress"]
    defaults = {key: parameter.default for key, parameter in base.options_of(name).items()}
    assert "seed" in defaults and inspect.Parameter.empty not in defaults.values()
    assert base.check_options(name, defaults) == defaults
    assert base.STUDIES[name].summary and "\n" not in base.STUDIES[name].summary


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 5},
        {"count": 0, "share": 0.25, "word": "x", "flag": True, "maybe": 3},
        {"share": 1},  # a whole number is a number
        {"maybe": None},
    ],
)
def test_options_of_the_right_type(options: dict[str, Any]) -> None:
    assert base.check_options("dummy", options) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuont": 5}, "analysis 'dummy' has no option 'cuont'; did you mean 'count'?"),
        ({"zzz": 5}, "analysis 'dummy' has no option 'zzz'; known: count, flag, maybe, share, word"),
        ({"count": "five"}, "option 'count' of 'dummy' is 'five'; expected int"),
        ({"count": 5.0}, "option 'count' of 'dummy' is 5.0; expected int"),
        ({"count": True}, "option 'count' of 'dummy' is True; expected int"),
        ({"count": None}, "option 'count' of 'dummy' is None; expected int"),
        ({"share": "half"}, "option 'share' of 'dummy' is 'half'; expected float"),
        ({"share": True}, "option 'share' of 'dummy' is True; expected float"),
        ({"share": math.nan}, "option 'share' of 'dummy' is nan; expected float"),
        ({"share": math.inf}, "option 'share' of 'dummy' is inf; expected float"),
        ({"word": 3}, "option 'word' of 'dummy' is 3; expected str"),
        ({"word": ["x"]}, "option 'word' of 'dummy' is ['x']; expected str"),
        ({"flag": 1}, "option 'flag' of 'dummy' is 1; expected bool"),
        ({"maybe": False}, "option 'maybe' of 'dummy' is False; expected int or null"),
        ({"maybe": "x"}, "option 'maybe' of 'dummy' is 'x'; expected int or null"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        base.check_options("dummy", options)
    assert str(refusal.value) == message


def test_a_study_without_options() -> None:
    assert base.check_options("plain", {}) == {}
    with pytest.raises(InputError, match="analysis 'plain' has no option 'count'; it has none"):
        base.check_options("plain", {"count": 1})


def test_an_unknown_study(model: HeadModel) -> None:
    for call in (base.options_of, lambda name: base.run(name, model, TASK)):
        with pytest.raises(InputError, match="analysis 'elbows' is unknown; did you mean 'elbow'"):
            call("elbows")


# --- running ----------------------------------------------------------------------------------------------------------


def test_run_says_what_it_was_run_on(model: HeadModel) -> None:
    seen: list[str] = []

    def progress(items: Sequence[Any], what: str) -> Iterator[Any]:
        seen.append(what)
        return iter(items)

    found = base.run("dummy", model, TASK, progress, count=7)
    encoded = encode(TASK, model.tokenizer)
    assert found.data == {"subjects": [e.example.subject for e in encoded.examples], "count": 7, "maybe": None}
    assert found.about["model"] == model.identity() and found.about["task"] == encoded.summary()
    assert found.about["options"] == {"count": 7, "share": 0.5, "word": "", "flag": False, "maybe": None}
    assert seen == ["counting"]
    assert base.run("dummy", model, encoded).data == base.run("dummy", model, TASK).data
    with pytest.raises(InputError, match="expected int"):
        base.run("dummy", model, TASK, count="x")


# --- files ------------------------------------------------------------------------------------------------------------


class References(HTMLParser):
    """Everything a page asks a browser to fetch, and the tags it opens and closes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.found.append(tag)
        if tag not in ("img", "meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def require_self_contained(page: str) -> References:
    """A page that loads nothing but what it carries, closes what it opens, and shows no NaN."""
    read = References()
    read.feed(page)
    assert read.open == []
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in read.found)
    style = page.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"@import|url\(", style)
    assert not re.search(r"\b(nan|NaN|inf)\b", " ".join(read.text))
    return read


def a_picture() -> bytes:
    from matplotlib.figure import Figure as Plot

    figure = Plot(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    return png_of(figure)


def an_analysis() -> Analysis:
    parts = [
        "A paragraph with <b>signs</b> & more.",
        Table(
            "Heads <of> note",
            ["head", "effect", "p"],
            [["L1H2", 0.123456, None], ["<i>", math.nan, 12345.6]],
            "A <note>.",
        ),
        Table("Nobody", ["head"], []),
        Figure("some_curve", "What <to> see.", a_picture()),
    ]
    about = {
        "model": {"name": "a<model>"},
        "task": {"name": "cities", "n_examples": 5, "n_dropped": 1},
        "options": {"top": 3, "word": "<x>"},
    }
    return Analysis("some_study", {"value": 0.5, "none": None, "name": "Łódź"}, parts, about)


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    base.write(an_analysis(), folder)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == ["analysis.json", "figures/some_curve.png", "report.html"]
    assert (folder / "figures" / "some_curve.png").read_bytes() == an_analysis().parts[-1].png  # type: ignore[union-attr]
    text = (folder / "analysis.json").read_text()
    stored = json.loads(text)
    assert stored["data"] == {"value": 0.5, "none": None, "name": "Łódź"} and "Łódź" in text
    assert stored["name"] == "some_study" and stored["options"] == {"top": 3, "word": "<x>"}
    assert {"model", "task", "created", "versions", "command"} <= set(stored)

    read = require_self_contained((folder / "report.html").read_text())
    shown = " ".join(" ".join(read.text).split())
    for words in (
        "some study",
        "A paragraph with <b>signs</b> & more.",
        "Heads <of> note",
        "L1H2 0.123 –",
        "<i> – 12346",
        "A <note>.",
        "What <to> see.",
        "a<model>",
        "cities, 5 examples (1 left out)",
        "top 3, word <x>",
    ):
        assert words in shown, words


def test_a_study_without_figures_leaves_no_folder_for_them(model: HeadModel, tmp_path: Path) -> None:
    base.write(base.run("plain", model, TASK), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["analysis.json", "report.html"]
    assert "Options none" in " ".join(
        " ".join(require_self_contained((tmp_path / "out/report.html").read_text()).text).split()
    )


def test_a_number_that_is_none_is_never_stored(tmp_path: Path) -> None:
    """A study that forgets to write NaN as null is a bug that must not reach a file."""
    with pytest.raises(ValueError, match="JSON compliant"):
        base.write(Analysis("x", {"value": math.nan}, []), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for refused in (lambda: base.require_free(tmp_path), lambda: base.write(an_analysis(), tmp_path)):
        with pytest.raises(InputError, match="exists and is not empty; choose another --out"):
            refused()
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("name", ["path_patching", "faithfulness", "elbow"])
def test_the_files_of_a_real_study(model: HeadModel, tmp_path: Path, name: str) -> None:
    found = base.run(name, model, TASK)
    base.write(found, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert stored["data"] == json.loads(json.dumps(found.data))
    pictures = {file.stem for file in tmp_path.rglob("*.png")}
    assert pictures == {part.name for part in found.parts if isinstance(part, Figure)}
    read = require_self_contained((tmp_path / "out" / "report.html").read_text())
    assert len([reference for reference in read.found if reference.startswith("data:")]) == len(pictures)
