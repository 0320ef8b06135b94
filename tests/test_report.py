"""The report shows what the head set holds, says where the proof fails, and refers to nothing outside itself."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from headtune.analysis import report
from headtune.analysis.headset import HeadSet, RankedHead
from headtune.analysis.identify import dissociation

N_LAYERS, N_HEADS = 5, 4


def probability(mean: float, lowest: float | None = None, highest: float | None = None) -> dict[str, Any]:
    sets = {} if lowest is None else {"lowest_set": lowest, "highest_set": highest}
    return {"mean": mean, "ci": [mean * 0.9, mean * 1.1], **sets}


def verification(
    suppressed: float = 0.09,
    recalled: float = 0.1,
    previous: bool = True,
    roles: tuple[str, ...] = ("suppression", "recall"),
) -> dict[str, Any]:
    """A verification block. Baselines are p(remaining) 0.2 and p(previous) 0.04; random sets stay within 10% of them.

    `suppressed` is the tested quantity without suppression heads, `recalled` p(remaining) without recall heads.
    """

    def numbers(remaining: float, of_previous: float, sets: bool = False) -> dict[str, Any]:
        span = (lambda mean: (mean * 0.9, mean * 1.1)) if sets else lambda mean: ()
        block = {"p_remaining": probability(remaining, *span(remaining))}
        return block | ({"p_previous": probability(of_previous, *span(of_previous))} if previous else {})

    block: dict[str, Any] = {"baseline": numbers(0.2, 0.04)}
    if "suppression" in roles:
        remaining, of_previous = (0.21, suppressed) if previous else (suppressed, 0)
        block["ablate_suppression"] = {"heads": [[3, 1], [4, 2]]} | numbers(remaining, of_previous)
        block["ablate_random_like_suppression"] = {"sets": 10} | numbers(0.2, 0.04, sets=True)
    if "recall" in roles:
        block["ablate_recall"] = {"heads": [[2, 0]]} | numbers(recalled, 0.03)
        block["ablate_random_like_recall"] = {"sets": 10} | numbers(0.2, 0.04, sets=True)
    return block | {"dissociation": dissociation(block)}


def head_set(block: dict[str, Any] | None = None, **changes: Any) -> HeadSet:
    effect = {"dla.target": 0.5, "ablation.target": 0.01234, "ablation.previous": -0.5678}
    values: dict[str, Any] = {
        "model": {
            "name": "tiny & small",
            "revision": "main",
            "weights_sha256": "ab" * 32,
            "model_type": "llama",
            "n_layers": N_LAYERS,
            "n_heads": N_HEADS,
            "head_dim": 8,
            "dtype": "float32",
        },
        "task": {"name": "cities", "n_examples": 120, "n_dropped": 7, "dropped": {"target shares a first token": 7}},
        "method": {"name": "all", "parameters": {"top": 8}, "seed": 1234},
        "roles": {
            "recall": (RankedHead(2, 0, 1.2345, (1.0, 1.5), effect), RankedHead(1, 3, 0.7, (0.1, 0.9), effect)),
            "suppression": (RankedHead(3, 1, -2.5, (-3.0, -2.0), effect), RankedHead(4, 2, -1.0, (-2.0, -0.5), effect)),
        },
        "verification": verification() if block is None else block,
        "stability": {"recall": 0.875, "suppression": 0.6543, "bootstrap": 200},
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0"},
        "command": "headtune identify tiny --task cities",
    }
    return HeadSet(**(values | changes))


def means() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    names = ("dla.target", "dla.previous", "ablation.target", "attention.subject")
    return {name: generator.normal(size=(N_LAYERS, N_HEADS)).astype(np.float32) for name in names}


def evaluation() -> dict[str, Any]:
    def metrics(repeat: float, perplexity: float) -> dict[str, Any]:
        return {
            "repeat_rate": {"mean": repeat, "ci": [repeat - 0.05, repeat + 0.05]},
            "neutral_perplexity": perplexity,
            "n": {"examples": 2, "dropped": {"no target": 1}},
        }

    return {
        "before": metrics(0.4, 25.25),
        "after": metrics(0.1, 26.5),
        "task": "cities:test",
        "examples": [
            {
                "prompt": "Cities in <script>alert('x')</script> & Italy:\n1.",
                "before": " Rome\n2. Rome",
                "after": " Rome\n2. <b>Milan</b>",
                "before_kinds": ["correct_new", "repeat", "missing"],
                "after_kinds": ["correct_new", "correct_new", "wrong"],
            }
        ],
    }


class Page(HTMLParser):
    """Tags with their attributes, the text without styles, and whether every tag is closed in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def written(tmp_path: Path, heads: HeadSet, **options: Any) -> tuple[str, Page]:
    report.write_report(tmp_path / "report.html", heads, means(), **options)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    return source, Page(source)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0412345, "0.0412"),
        (1.2345, "1.23"),
        (-0.5, "-0.5"),
        (0.0, "0"),
        (123.4, "123"),
        (999.7, "1000"),
        (25251.3, "25251"),
        (4.1234e-7, "4.12e-07"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert report.number(value) == text


def test_a_probability_comes_with_its_interval() -> None:
    assert report.with_interval(0.041, (0.031, 0.052)) == "0.041 [0.031, 0.052]"


# --- heat maps --------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_heat_map_shows_the_numbers_and_the_marked_heads(tmp_path: Path) -> None:
    matrix = np.zeros((N_LAYERS, N_HEADS))
    matrix[1, 2] = 3.0

    def drawn(name: str, values: np.ndarray, marked: dict[str, list[tuple[int, int]]]) -> np.ndarray:
        report.heat_map(values, "title", tmp_path / name, marked)
        return pixels(tmp_path / name)

    marked = {"recall": [(1, 2)], "suppression": [(3, 1)]}
    first = drawn("a.png", matrix, marked)
    assert min(first.shape[:2]) > 200
    assert np.array_equal(first, drawn("b.png", matrix, marked))
    assert not np.array_equal(first, drawn("c.png", matrix, {"recall": [(1, 2)], "suppression": [(3, 0)]}))
    assert not np.array_equal(first, drawn("d.png", matrix, {"recall": [(3, 1)], "suppression": [(1, 2)]}))
    assert not np.array_equal(first, drawn("e.png", -matrix, marked))
    for role in report.COLOURS:
        colour = [int(report.COLOURS[role][i : i + 2], 16) for i in (1, 3, 5)]
        assert (first == colour).all(-1).sum() > 50, f"no outline in the colour of {role}"


def test_the_colour_scale_is_symmetric_around_a_white_zero(tmp_path: Path) -> None:
    # The strongest red and the strongest blue mean the same size, even where the numbers lean to one side.
    report.heat_map([[4.0, -1.0], [0.0, 0.0]], "t", tmp_path / "a.png", {})
    image = pixels(tmp_path / "a.png")
    body = image[:, : image.shape[1] // 2]  # without the colour bar

    def share(colour: tuple[int, int, int]) -> float:
        return float((body == colour).all(-1).mean())

    assert share((103, 0, 31)) > 0.05, "4 is not drawn in the strongest red"
    assert share((5, 48, 97)) == 0, "-1 is drawn as strongly as -4 would be"
    assert share((247, 246, 246)) > 0.1, "0 is not the middle of the scale"


@pytest.mark.parametrize("matrix", [np.zeros((1, 1)), np.full((3, 2), np.nan), np.ones((80, 64)) * 1e-9])
def test_odd_matrices_are_drawn(matrix: np.ndarray, tmp_path: Path) -> None:
    report.heat_map(matrix, "t", tmp_path / "a.png", {"recall": [(0, 0)], "suppression": []})
    assert pixels(tmp_path / "a.png").size


def test_the_maps_a_person_wants_are_written_where_they_exist(tmp_path: Path) -> None:
    paths = report.heat_maps(means(), head_set(), tmp_path)
    assert list(paths) == ["dla.target", "dla.previous", "ablation.target"]
    assert sorted(tmp_path.rglob("*.png")) == sorted(paths.values())
    assert all(path == tmp_path / "heatmaps" / f"{name}.png" and pixels(path).size for name, path in paths.items())


def test_drawing_leaves_matplotlib_s_global_state_alone_and_importing_does_not_load_it() -> None:
    code = (
        "import sys, pathlib, tempfile\n"
        "import headtune.analysis.report as r\n"
        "assert not {'matplotlib', 'rich', 'torch'} & set(sys.modules)\n"
        "r.heat_map([[1.0]], 't', pathlib.Path(tempfile.mkdtemp()) / 'a.png', {})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


# --- the dissociation -------------------------------------------------------------------------------------------------


def test_the_table_has_every_condition_with_ratios_and_the_most_extreme_sets() -> None:
    rows = report.dissociation_table(head_set())
    assert [row.name for row in rows] == [
        "nothing silenced",
        "top 2 suppression heads silenced",
        "2 random heads of the same layers silenced (10 sets)",
        "top 1 recall heads silenced",
        "1 random heads of the same layers silenced (10 sets)",
    ]
    baseline, suppression, like_suppression, recall, like_recall = (row.cells for row in rows)
    assert baseline["p_previous"].ratio is None and baseline["p_previous"].interval == pytest.approx((0.036, 0.044))
    assert suppression["p_previous"].ratio == pytest.approx(0.09 / 0.04) and suppression["p_previous"].extreme is None
    assert recall["p_remaining"].ratio == pytest.approx(0.5)
    # The set that comes closest to what the role should do.
    assert like_suppression["p_previous"].extreme == pytest.approx(0.044)
    assert like_recall["p_remaining"].extreme == pytest.approx(0.18)


def test_the_terminal_table_shows_the_same() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.render_dissociation(head_set()))
    text = console.export_text()
    for row in report.dissociation_table(head_set()):
        assert row.name in text
        assert all(str(cell) in text for cell in row.cells.values())
    assert "0.04 [0.036, 0.044]" in text and "p(previous)" in text


def test_the_verdict_when_it_holds() -> None:
    text = report.verdict(head_set())
    assert text.startswith("The dissociation holds")
    assert "raises p(previous) from 0.04 to 0.09 (×2.25), above the highest of 10 random sets (0.044)" in text
    assert "lowers p(remaining) from 0.2 to 0.1 (×0.5), below the lowest of 10 random sets (0.18)" in text
    assert "FAILS" not in text


@pytest.mark.parametrize(
    ("suppressed", "recalled", "failed", "held", "why"),
    [
        (0.03, 0.1, ["suppression"], ["recall"], ["from 0.04 to 0.03", "does not raise it", "0.044"]),
        (0.043, 0.1, ["suppression"], ["recall"], ["does not go above the highest of 10 random sets (0.044)"]),
        (0.09, 0.3, ["recall"], ["suppression"], ["from 0.2 to 0.3", "does not lower it"]),
        (0.09, 0.19, ["recall"], ["suppression"], ["does not go below the lowest of 10 random sets (0.18)"]),
        (0.04, 0.2, ["suppression", "recall"], [], ["does not raise it", "does not lower it"]),
    ],
)
def test_the_verdict_names_the_role_that_failed_and_why(
    suppressed: float, recalled: float, failed: list[str], held: list[str], why: list[str]
) -> None:
    text = report.verdict(head_set(verification(suppressed, recalled)))
    assert text.startswith(f"The dissociation FAILS for {' and '.join(failed)}:")
    assert re.findall(r"It holds for (\w+):", text) == held
    assert all(reason in text for reason in why)
    if suppressed == 0.043:
        assert "does not raise it" not in text, "it was raised, only not beyond chance"


def test_a_role_without_heads_fails_and_has_no_rows() -> None:
    heads = head_set(verification(roles=("recall",)))
    text = report.verdict(heads)
    assert text.startswith("The dissociation FAILS for suppression: there are no confirmed heads for suppression")
    assert "It holds for recall" in text
    assert not [row for row in report.dissociation_table(heads) if "suppression" in row.name]


def test_single_facts_have_no_previous_answers() -> None:
    heads = head_set(verification(0.3, previous=False))
    assert all(set(row.cells) == {"p_remaining"} for row in report.dissociation_table(heads))
    assert "raises p(remaining) from 0.2 to 0.3" in report.verdict(heads)
    failing = report.verdict(head_set(verification(0.1, previous=False)))
    assert failing.startswith("The dissociation FAILS for suppression") and "p(previous)" not in failing


def test_a_head_set_that_was_not_verified_says_so() -> None:
    heads = head_set({})
    assert "was not tested" in report.verdict(heads)
    assert report.dissociation_table(heads) == []


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_the_head_set_says(tmp_path: Path) -> None:
    heads = head_set()
    source, page = written(tmp_path, heads, title="A <title>")
    assert "A <title>" in page.text
    for ranked in heads.roles.values():
        for head in ranked:
            assert f"{head.name} {report.with_interval(head.score, head.ci)} -0.568 0.0123" in page.text
    for expected in (
        "tiny & small (llama, 5 layers × 4 heads, float32)",
        "120 used, 7 left out: 7 target shares a first token",
        "1234",
        "2026-01-02T03:04:05+00:00",
        "torch 2.13.0",
        "headtune identify tiny --task cities",
        "recall 0.875, suppression 0.654",
        report.verdict(heads),
    ):
        assert expected in page.text, expected
    assert all(str(cell) in page.text for row in report.dissociation_table(heads) for cell in row.cells.values())
    assert "verdict good" in source


def test_a_failed_dissociation_is_not_shown_as_a_good_one(tmp_path: Path) -> None:
    source, page = written(tmp_path, head_set(verification(suppressed=0.03)))
    assert "FAILS for suppression" in page.text
    assert "verdict bad" in source and "verdict good" not in source


def test_the_page_needs_nothing_outside_itself(tmp_path: Path) -> None:
    source, page = written(tmp_path, head_set(), evaluation=evaluation())
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base"}
    links = [
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in source and "@import" not in source and "http" not in source
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme" in source


def test_the_page_s_pictures_are_the_heat_maps_each_with_a_caption(tmp_path: Path) -> None:
    _, page = written(tmp_path, head_set())
    files = report.heat_maps(means(), head_set(), tmp_path)
    inlined = [attributes["src"] for name, attributes in page.tags if name == "img"]
    assert len(inlined) == len(files) == 3
    for source, (name, path) in zip(inlined, files.items(), strict=True):
        assert source is not None
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
        assert np.array_equal(np.asarray(image.convert("RGB")), pixels(path))
        assert f"{name} {report.MAPS[name]}" in page.text


def test_what_a_model_or_a_user_wrote_is_escaped(tmp_path: Path) -> None:
    heads = head_set(command="headtune identify '<script>x</script>'")
    source, page = written(tmp_path, heads, evaluation=evaluation())
    assert "<script" not in source and "<b>Milan" not in source
    assert "Cities in <script>alert('x')</script> & Italy: 1." in page.text
    assert "<b>Milan</b>" in page.text and "'<script>x</script>'" in page.text


def test_before_and_after_stand_side_by_side_with_the_kind_of_every_item(tmp_path: Path) -> None:
    _, page = written(tmp_path, head_set(), evaluation=evaluation())
    assert "repeat rate 0.4 [0.35, 0.45] 0.1 [0.05, 0.15] -0.3" in page.text
    assert "neutral perplexity 25.2 26.5 +1.25" in page.text
    assert "cities:test" in page.text and "dropped: no target 1" in page.text
    kinds = [attributes["class"] for name, attributes in page.tags if name == "li"]
    assert kinds == ["correct_new", "repeat", "missing", "correct_new", "correct_new", "wrong"]
    assert "1 correct new 2 repeat 3 missing" in page.text


def test_examples_that_are_left_out_are_counted(tmp_path: Path) -> None:
    many = evaluation()
    many["examples"] *= report.SHOWN_EXAMPLES + 3
    _, page = written(tmp_path, head_set(), evaluation=many)
    shown = sum(name == "article" for name, _ in page.tags)
    assert shown == report.SHOWN_EXAMPLES and f"{shown} of {shown + 3} examples" in page.text


def test_a_bare_head_set_makes_a_page(tmp_path: Path) -> None:
    heads = head_set({}, roles={"recall": (), "suppression": ()}, stability={}, versions={}, command="", created="")
    report.write_report(tmp_path / "report.html", heads, {})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("No head was confirmed") == 2
    assert not [name for name, _ in page.tags if name == "img"]
