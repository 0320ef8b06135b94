"""The report shows what the head set and the profiles hold, says where the proof fails, and needs nothing outside."""

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from headtune.analysis.heads.head_set import ROLES, HeadSet, RankedHead
from headtune.analysis.identify import verdict
from headtune.analysis.reports import (
    dissociation,
    evaluation_view,
    head_dashboard,
    head_profiles,
    head_report,
    heat_maps,
)
from headtune.analysis.reports.head_profiles import HeadProfile, read_profiles, write_profiles
from headtune.analysis.reports.html import number, with_interval
from headtune.analysis.utils.errors import InputError
from headtune.cli.tables import dissociation_table, metrics_table

N_LAYERS, N_HEADS = 5, 4


def probability(mean: float, lowest: float | None = None, highest: float | None = None) -> dict[str, Any]:
    sets = {} if lowest is None else {"lowest_set": lowest, "highest_set": highest}
    return {"mean": mean, "ci": [mean * 0.9, mean * 1.1], **sets}


def verification(
    suppressed: float = 0.09,
    recalled: float = 0.1,
    previous: bool = True,
    roles: tuple[str, ...] = ("suppression", "recall"),
    subjects: int = 20,
    sets: int = 20,
    scatter: float = 0.0,
    largest: float = 1.0,
) -> dict[str, Any]:
    """A verification block. Baselines are p(remaining) 0.2 and p(previous) 0.04; random sets stay within 10% of them.

    Args:
        suppressed, recalled: the tested quantity without suppression heads, p(remaining) without recall heads.
        subjects: of one prompt each.
        scatter: the change is so many times larger, or smaller, in one subject than in the next.
        largest: what the largest other heads are silenced to, as a factor of the baseline.
    """
    spread, turns = np.linspace(0.9, 1.1, subjects), np.resize([1 + scatter, 1 - scatter], subjects)
    base = np.stack([0.2 * spread, 0.04 * spread])  # [2, subjects], as verification runs them
    changed = {
        "suppression": (0.01, suppressed - 0.04) if previous else (suppressed - 0.2, 0.0),
        "recall": (recalled - 0.2, -0.01),
    }
    by_name = {"baseline": base}
    rows_of = {name: list(range(subjects)) for name in ("p_remaining", "p_previous")[: 2 if previous else 1]}

    def numbers(values: np.ndarray, extremes: np.ndarray | None = None) -> dict[str, Any]:
        ends = [() if extremes is None else (extremes[:, i].min(), extremes[:, i].max()) for i in range(2)]
        return {name: probability(float(values[i].mean()), *map(float, ends[i])) for i, name in enumerate(rows_of)}

    block: dict[str, Any] = {"halves": 2, "subjects": [subjects // 2] * 2, "baseline": numbers(base)}
    for role in roles:
        of_sets = np.stack([base * factor for factor in np.linspace(0.9, 1.1, sets)])
        by_name |= {f"random_{role}_{index}": values for index, values in enumerate(of_sets)}
        by_name[f"ablate_{role}"] = base + np.array(changed[role])[:, None] * turns
        pairs = {"suppression": [[3, 1], [4, 2]], "recall": [[2, 0]]}[role]
        block[f"ablate_{role}"] = {"heads": pairs, "folds": [pairs, pairs]} | numbers(by_name[f"ablate_{role}"])
        block[f"ablate_largest_like_{role}"] = {"heads": pairs} | numbers(base * largest)
        block[f"ablate_random_like_{role}"] = {"sets": sets} | numbers(of_sets.mean(0), of_sets.mean(2))
    heads = head_set({}, roles={role: head_set({}).roles[role] if role in roles else () for role in ROLES})
    names = [f"s{index:02}" for index in range(subjects)]
    n_sets = dict.fromkeys(roles, sets)
    results = {
        role: verdict.dissociation(role, heads, block, by_name, rows_of, names, n_sets.get(role, 0)) for role in ROLES
    }
    return block | {"dissociation": results}


def as_0_1_0_wrote_it(block: dict[str, Any]) -> dict[str, Any]:
    """What version 0.1.0 wrote of a verification: one half, no verdict, no test, no largest heads."""
    old = {name: entry for name, entry in block.items() if name not in ("halves", "subjects")}
    old = {name: entry for name, entry in old.items() if not name.startswith("ablate_largest")}
    keys = ("quantity", "baseline", "ablated", "ratio", "most_extreme_random_set", "held")
    old["dissociation"] = {
        role: {key: result[key] for key in (keys if "quantity" in result else ("held", "reason"))}
        for role, result in block["dissociation"].items()
    }
    return old


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


def profile(layer: int = 2, head: int = 0, previous: bool = True, **changes: Any) -> HeadProfile:
    tokens = ("List", " cities", " in", " <Italy>", ".", "\n", "1", ".", " Rome", "\n", "2", ".")
    attention = np.full(len(tokens), 0.01)
    attention[8] = 1 - 0.01 * (len(tokens) - 1)
    sources = ["first", *["rest"] * 2, "subject", *["rest"] * 4, "previous_1", *["rest"] * 2, "end"]
    values: dict[str, Any] = {
        "examples": 7,
        "attention": {"subject": 0.1, "previous": 0.6, "first": 0.2, "end": 0.04, "rest": 0.06},
        "reads": (head_profiles.Read(" Rome", 0.8, 3), head_profiles.Read("\n", 0.3, 7)),
        "raises": (head_profiles.Written(" <b>up", 1.25),),
        "lowers": (head_profiles.Written("\u202edown", -2.5),),
        "copying": {
            "subject": head_profiles.Copying(14, 0.25, None, 0.4),
            "previous": head_profiles.Copying(21, -3.25, -0.125, 0.9995),
        },
        "prompt": head_profiles.Prompt(
            tokens,
            tuple(sources),
            tuple(attention.tolist()),
            tuple(np.linspace(-0.25, 0.5, len(tokens)).tolist()),
            tuple(np.linspace(-2, 0, len(tokens)).tolist()),
            tuple(f" T{index}" for index in range(9)),
            (" Rome",),
            (head_profiles.Written(" Milan", 0.5),),
            (),
        ),
    }
    if not previous:
        values["attention"] = {"subject": 0.7, "first": 0.2, "end": 0.04, "rest": 0.06}
        del values["copying"]["previous"]
        values["prompt"] = replace(values["prompt"], previous=None, given=())
    return HeadProfile(layer, head, **(values | changes))


class Page(HTMLParser):
    """Tags with their attributes, the text without styles, and whether every tag is closed in order."""

    VOID = ("meta", "img", "br", "link", "wbr")

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
    head_report.write_report(tmp_path / "report.html", heads, means(), **options)
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
    assert number(value) == text


def test_a_probability_comes_with_its_interval() -> None:
    assert with_interval(0.041, (0.031, 0.052)) == "0.041 [0.031, 0.052]"


# --- heat maps --------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.usefixtures("pictures")
def test_a_heat_map_shows_the_numbers_and_the_marked_heads(tmp_path: Path) -> None:
    matrix = np.zeros((N_LAYERS, N_HEADS))
    matrix[1, 2] = 3.0

    def drawn(name: str, values: np.ndarray, marked: dict[str, list[tuple[int, int]]]) -> np.ndarray:
        heat_maps.heat_map(values, "title", tmp_path / name, marked)
        return pixels(tmp_path / name)

    marked = {"recall": [(1, 2)], "suppression": [(3, 1)]}
    first = drawn("a.png", matrix, marked)
    assert min(first.shape[:2]) > 200
    assert np.array_equal(first, drawn("b.png", matrix, marked))
    assert not np.array_equal(first, drawn("c.png", matrix, {"recall": [(1, 2)], "suppression": [(3, 0)]}))
    assert not np.array_equal(first, drawn("d.png", matrix, {"recall": [(3, 1)], "suppression": [(1, 2)]}))
    assert not np.array_equal(first, drawn("e.png", -matrix, marked))
    for role in heat_maps.COLOURS:
        colour = [int(heat_maps.COLOURS[role][i : i + 2], 16) for i in (1, 3, 5)]
        assert (first == colour).all(-1).sum() > 50, f"no outline in the colour of {role}"


@pytest.mark.usefixtures("pictures")
def test_the_colour_scale_is_symmetric_around_a_white_zero(tmp_path: Path) -> None:
    # The strongest red and the strongest blue mean the same size, even where the numbers lean to one side.
    heat_maps.heat_map([[4.0, -1.0], [0.0, 0.0]], "t", tmp_path / "a.png", {})
    image = pixels(tmp_path / "a.png")
    body = image[:, : image.shape[1] // 2]  # without the colour bar

    def share(colour: tuple[int, int, int]) -> float:
        return float((body == colour).all(-1).mean())

    assert share((103, 0, 31)) > 0.05, "4 is not drawn in the strongest red"
    assert share((5, 48, 97)) == 0, "-1 is drawn as strongly as -4 would be"
    assert share((247, 246, 246)) > 0.1, "0 is not the middle of the scale"


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("matrix", [np.zeros((1, 1)), np.full((3, 2), np.nan), np.ones((80, 64)) * 1e-9])
def test_odd_matrices_are_drawn(matrix: np.ndarray, tmp_path: Path) -> None:
    heat_maps.heat_map(matrix, "t", tmp_path / "a.png", {"recall": [(0, 0)], "suppression": []})
    assert pixels(tmp_path / "a.png").size


def test_the_maps_a_person_wants_are_written_where_they_exist(tmp_path: Path) -> None:
    paths = heat_maps.heat_maps(means(), head_set(), tmp_path)
    assert list(paths) == ["dla.target", "dla.previous", "ablation.target"]
    assert sorted(tmp_path.rglob("*.png")) == sorted(paths.values())
    assert all(path == tmp_path / "heatmaps" / f"{name}.png" and pixels(path).size for name, path in paths.items())


def test_drawing_leaves_matplotlib_s_global_state_alone_and_importing_does_not_load_it() -> None:
    code = (
        "import sys, pathlib, tempfile\n"
        "import headtune.analysis.reports.heat_maps as r\n"
        "assert not {'matplotlib', 'rich', 'torch'} & set(sys.modules)\n"
        "r.heat_map([[1.0]], 't', pathlib.Path(tempfile.mkdtemp()) / 'a.png', {})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


# --- the dissociation -------------------------------------------------------------------------------------------------


def test_the_table_has_every_condition_with_ratios_and_the_most_extreme_sets() -> None:
    rows = dissociation.dissociation_table(head_set())
    assert [row.name for row in rows] == [
        "nothing silenced",
        "top 2 suppression heads silenced",
        "2 random heads of the same layers silenced (20 sets)",
        "2 other heads of the same layers of largest output silenced",
        "top 1 recall heads silenced",
        "1 random head of the same layers silenced (20 sets)",
        "1 other head of the same layers of largest output silenced",
    ]
    baseline, suppression, like_suppression, largest, recall, like_recall, _ = (row.cells for row in rows)
    assert baseline["p_previous"].ratio is None and baseline["p_previous"].interval == pytest.approx((0.036, 0.044))
    assert suppression["p_previous"].ratio == pytest.approx(0.09 / 0.04) and suppression["p_previous"].extreme is None
    assert recall["p_remaining"].ratio == pytest.approx(0.5) and largest["p_previous"].ratio == pytest.approx(1)
    # The set that comes closest to what the role should do.
    assert like_suppression["p_previous"].extreme == pytest.approx(0.044)
    assert like_recall["p_remaining"].extreme == pytest.approx(0.18)


def test_the_terminal_table_shows_the_same() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(dissociation_table(head_set()))
    text = console.export_text()
    for row in dissociation.dissociation_table(head_set()):
        assert row.name in text
        assert all(str(cell) in text for cell in row.cells.values())
    assert "0.04 [0.036, 0.044]" in text and "p(previous)" in text


def test_the_verdict_when_it_holds() -> None:
    (first, suppression), (second, recall) = dissociation.verdicts(head_set())
    assert first == second == "holds"
    assert suppression == (
        "Suppression holds: silencing the 2 suppression heads takes p(previous) from 0.04 to 0.09 (×2.25), on subjects "
        "that they were not chosen on (change 0.05 [0.05, 0.05], the most extreme of 20 random sets reaches 0.044, the "
        "largest other heads 0.04, p = 0.0476)."
    )
    assert recall.startswith(
        "Recall holds: silencing the one recall head takes p(remaining) from 0.2 to 0.1 (×0.5), on"
    )
    assert "20 random sets reaches 0.18" in recall
    assert dissociation.verdict(head_set()) == f"{suppression} {recall}"
    assert dissociation.next_step(head_set()) == ""


@pytest.mark.parametrize(
    ("options", "failed", "why"),
    [
        (
            {"suppressed": 0.03},
            ["suppression"],
            [
                "from 0.04 to 0.03",
                "hold: the change goes the other way and 20 of 20 random sets go as far (p = 1) and the larg",
            ],
        ),
        (
            {"suppressed": 0.0435},
            ["suppression"],
            ["the change is smaller than the smallest that counts (x1.1, 0.1%) and 2 of 20 random sets go as far"],
        ),
        (
            {"suppressed": 0.045, "largest": 1.2},
            ["suppression"],
            ["hold: the largest other heads of the same layers go as far."],
        ),
        ({"recalled": 0.3}, ["recall"], ["from 0.2 to 0.3", "the change goes the other way", "p = 1"]),
        ({"scatter": 5.0}, ["suppression", "recall"], ["hold: the change is not distinguishable from none."]),
        ({"suppressed": 0.04, "recalled": 0.2}, ["suppression", "recall"], ["not distinguishable", "random sets go"]),
    ],
)
def test_the_verdict_names_the_role_that_failed_and_why(
    options: dict[str, Any], failed: list[str], why: list[str]
) -> None:
    heads = head_set(verification(**options))
    stated = dict(zip(("suppression", "recall"), dissociation.verdicts(heads), strict=True))
    for role, (outcome, sentence) in stated.items():
        assert outcome == ("does not hold" if role in failed else "holds")
        opening = " silencing the " if outcome == "holds" else " the "
        assert sentence.startswith(f"{role.capitalize()} {outcome}:{opening}") and "ilencing the " in sentence
    text = " ".join(stated[role][1] for role in failed)
    assert all(reason in text for reason in why), text
    # What to do, for each of them, and to train on the other where it holds.
    advice = dissociation.next_step(heads)
    first = "see how far the controls beside them go; give more subjects or prompts; "
    assert [part for part in re.findall(r"For (\w+): see", advice)] == failed
    assert advice.startswith(f"For {failed[0]}: {first}") and advice.endswith("or take the heads as a hypothesis.")
    held = [role for role in stated if role not in failed]
    assert re.findall(r"train the (\w+) heads alone \(heads\.role: \1\)", advice) == held


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"subjects": 3},
            "told: 3 subjects are few to choose heads on one half and test them on the other; give more. S",
        ),
        (
            {"subjects": 8, "scatter": 5.0},
            "told: the change is not distinguishable from none, and 8 subjects are few to choose heads on one half",
        ),
        ({"sets": 10}, "told: 10 random sets of heads are all there is to compare with, and 19 are needed to tell. S"),
    ],
)
def test_a_verdict_that_cannot_be_told(options: dict[str, Any], why: str) -> None:
    heads = head_set(verification(**options))
    for role, (outcome, sentence) in zip(("Suppression", "Recall"), dissociation.verdicts(heads), strict=True):
        assert outcome == "cannot be told" and sentence.startswith(f"{role} cannot be told: ")
        assert why in sentence
    more = "give more subjects or prompts, or another model that knows the answers"
    if "sets" in options:
        more = "choose fewer heads or verify fewer (--verify-top), so that more random sets exist, or a larger model"
    assert dissociation.next_step(heads) == (
        f"For suppression: {more}; or take the heads as a hypothesis. "
        f"For recall: {more}; or take the heads as a hypothesis."
    )


@pytest.mark.parametrize(("subjects", "outcome"), [(20, "does not hold"), (6, "cannot be told")])
def test_a_role_without_heads_has_no_rows_and_a_verdict(subjects: int, outcome: str) -> None:
    """Of few subjects, that no head is confirmed says nothing."""
    heads = head_set(verification(roles=("recall",), subjects=subjects))
    (stated, sentence), (held, _) = dissociation.verdicts(heads)
    assert (stated, held) == (outcome, "holds")
    assert sentence.startswith(f"Suppression {outcome}: no confirmed heads")
    steps = "give more subjects or prompts"
    steps += ", or another model that knows the answers" if outcome == "cannot be told" else ""
    assert dissociation.next_step(heads) == (
        f"For suppression: {steps}; train the recall heads alone (heads.role: recall)."
    )
    assert not [row for row in dissociation.dissociation_table(heads) if "suppression" in row.name]


def test_single_facts_have_no_previous_answers() -> None:
    heads = head_set(verification(0.3, previous=False))
    assert all(set(row.cells) == {"p_remaining"} for row in dissociation.dissociation_table(heads))
    assert "takes p(remaining) from 0.2 to 0.3" in dissociation.verdict(heads)
    failing = dissociation.verdict(head_set(verification(0.1, previous=False)))
    assert failing.startswith("Suppression does not hold: ") and "p(previous)" not in failing


def test_heads_of_the_task_as_a_whole_were_chosen_on_the_same_subjects() -> None:
    text = dissociation.verdict(head_set(verification() | {"halves": 1}))
    assert "Suppression holds: silencing the 2" in text and "not chosen on" not in text


@pytest.mark.parametrize(
    ("options", "outcome"),
    [({}, "holds"), ({"suppressed": 0.03}, "does not hold"), ({"roles": ("recall",)}, "does not hold")],
)
def test_what_0_1_0_wrote_is_shown(options: dict[str, Any], outcome: str, tmp_path: Path) -> None:
    """No `verdict`, no p-value, `confirm` one name: every sentence and the page go by what there is."""
    rules = {"suppression": {"rank": "dla.previous", "sign": -1.0, "confirm": "ablation.previous"}}
    heads = head_set(as_0_1_0_wrote_it(verification(**options)), method={"name": "all", "parameters": {"rules": rules}})
    (stated, sentence), (held, recall) = dissociation.verdicts(heads)
    assert (stated, held) == (outcome, "holds") and sentence.startswith(f"Suppression {outcome}: ")
    assert recall == (
        "Recall holds: silencing the one recall head takes p(remaining) from 0.2 to 0.1 (×0.5) (the most extreme of 20 "
        "random sets reaches 0.18)."
    )
    source, page = written(tmp_path, heads)
    assert sentence in page.text and recall in page.text
    assert "Ranked by dla.previous, confirmed by ablation.previous. " in page.text
    assert source.count("verdict good") == 1 + (outcome == "holds") and "verdict unknown" not in source


def test_a_head_set_that_was_not_verified_says_so() -> None:
    heads = head_set({})
    assert "was not tested" in dissociation.verdict(heads)
    assert dissociation.dissociation_table(heads) == []


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_the_head_set_says(tmp_path: Path) -> None:
    heads = head_set()
    source, page = written(tmp_path, heads, title="A <title>")
    assert "A <title>" in page.text
    for ranked in heads.roles.values():
        for head in ranked:
            assert f"{head.name} {with_interval(head.score, head.ci)} +0.0123 -0.568" in page.text
    for expected in (
        "tiny & small (llama, 5 layers × 4 heads, float32)",
        "120 used, 7 left out: 7 target shares a first token",
        "1234",
        "2026-01-02T03:04:05+00:00",
        "torch 2.13.0",
        "headtune identify tiny --task cities",
        "recall 0.875, suppression 0.654",
        dissociation.verdict(heads),
    ):
        assert expected in page.text, expected
    assert all(str(cell) in page.text for row in dissociation.dissociation_table(heads) for cell in row.cells.values())
    assert source.count('class="verdict good"') == 2


def test_every_verdict_has_its_colour_and_its_sentence(tmp_path: Path) -> None:
    """One block a role, with the sentence that the terminal shows, and a colour that the style knows."""
    for options, classes in (
        ({}, ["good", "good"]),
        ({"suppressed": 0.03}, ["bad", "good"]),
        ({"recalled": 0.3}, ["good", "bad"]),
        ({"subjects": 3}, ["unknown", "unknown"]),
        ({"roles": ("suppression",), "subjects": 6}, ["good", "unknown"]),
    ):
        heads = head_set(verification(**options))
        source, page = written(tmp_path, heads)
        blocks = [str(tag["class"]) for name, tag in page.tags if name == "p" and "verdict" in str(tag.get("class"))]
        assert blocks == [f"verdict {one}" for one in classes]
        sentences = [sentence for _, sentence in dissociation.verdicts(heads)]
        assert all(sentence in page.text for sentence in sentences) and dissociation.next_step(heads) in page.text
        assert all(f".verdict.{one} {{ border-color" in source for one in classes)


def test_a_head_set_that_was_not_verified_is_shown_as_untold(tmp_path: Path) -> None:
    source, page = written(tmp_path, head_set({}))
    assert "The dissociation was not tested" in page.text
    assert source.count('class="verdict unknown"') == 1 and 'class="verdict good"' not in source


def test_heads_show_what_confirmed_them(tmp_path: Path) -> None:
    effect = {"dla.previous_contrast": -2.5, "ablation.previous": -3.25, "ablation.previous_logp": -0.75, "q": 2e-4}
    rule = {"rank": "dla.previous_contrast", "sign": -1.0}
    rule |= {"confirm": ["ablation.previous_contrast", "ablation.previous_logp"]}
    heads = head_set(
        roles={"recall": (), "suppression": (RankedHead(3, 1, -2.5, (-3.0, -2.0), effect),)},
        method={"name": "all", "parameters": {"rules": {"suppression": rule, "recall": rule}}},
    )
    _, page = written(tmp_path, heads)
    assert "confirmed by ablation.previous_contrast and ablation.previous_logp. " in page.text
    assert "effect on given answers effect on given answers (log-probability) q" in page.text
    assert "L3H1 -2.5 [-3, -2] -3.25 -0.75 0.0002" in page.text, "a rate of false discoveries has no sign"
    assert "q: the least false discovery rate at which a head counts as confirmed." in page.text


def test_the_page_needs_nothing_outside_itself(tmp_path: Path) -> None:
    source, page = written(tmp_path, head_set(), evaluation=evaluation(), profiles=[profile()])
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base"}
    links = [
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} == anchors != set()
    assert "url(" not in source and "@import" not in source and "http" not in source
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme" in source


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


def paired(*changes: float) -> dict[str, Any]:
    """`repeat_rate` falls by these numbers, one a subject; `wrong_rate` goes up and down and does not change."""
    examples = [
        {
            **evaluation()["examples"][0],
            "subject": f"subject {index}",
            "before_values": {"repeat_rate": 0.9, "wrong_rate": 0.5},
            "after_values": {"repeat_rate": 0.9 - change, "wrong_rate": 0.5 + 0.1 * (-1) ** index},
        }
        for index, change in enumerate(changes)
    ]
    sides = {
        side: {
            name: {"mean": float(np.mean([e[f"{side}_values"][name] for e in examples])), "ci": [0.0, 1.0]}
            for name in ("repeat_rate", "wrong_rate")
        }
        for side in ("before", "after")
    }
    return evaluation() | sides | {"examples": examples}


def test_the_change_has_an_interval_and_says_where_it_may_be_none(tmp_path: Path) -> None:
    """Paired over subjects: t of 3 degrees of freedom is 3.182446."""
    falls = (0.1, 0.2, 0.3, 0.2)
    width = 3.182446 * np.std(falls, ddof=1) / 2
    found = evaluation_view.changes(paired(*falls))
    assert found["repeat_rate"]["mean"] == pytest.approx(-0.2)
    assert found["repeat_rate"]["ci"] == pytest.approx([-0.2 - width, -0.2 + width])
    _, page = written(tmp_path, head_set(), evaluation=paired(*falls))
    bounds = ", ".join(f"{value:.3g}" for value in (-0.2 - width, -0.2 + width))
    assert f"-0.2 [{bounds}] wrong rate" in page.text, "a change that is there has no note"
    assert page.text.count("not distinguishable from no change") == 1
    # In the terminal the same.
    numbers = paired(*falls)
    table = metrics_table(
        {"before": numbers["before"], "after": numbers["after"]}, "", evaluation_view.changes(numbers)
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    lines = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if "│" in line}
    assert f"-0.2 [{bounds}]" in lines["repeat rate"] and "distinguishable" not in lines["repeat rate"]
    assert "not distinguishable from none" in lines["wrong rate"]


def test_one_subject_or_one_side_alone_has_no_interval_of_a_change() -> None:
    assert evaluation_view.changes(paired(0.3)) == {}
    assert evaluation_view.changes(evaluation() | {"after": None}) == {}


def test_examples_that_are_left_out_are_counted(tmp_path: Path) -> None:
    many = evaluation()
    many["examples"] *= evaluation_view.SHOWN_EXAMPLES + 3
    _, page = written(tmp_path, head_set(), evaluation=many)
    shown = sum(name == "article" for name, _ in page.tags)
    assert shown == evaluation_view.SHOWN_EXAMPLES and f"{shown} of {shown + 3} examples" in page.text


def test_a_run_without_ranked_heads_has_a_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    head_report.write_run_report(path, evaluation(), "recipe: lora\nname: '<b>'\n", "lora on a model.", "sounds")
    page = Page(path.read_text(encoding="utf-8"))
    assert "repeat rate 0.4 [0.35, 0.45] 0.1 [0.05, 0.15] -0.3" in page.text and "1 of 1 examples" in page.text
    assert "recipe: lora name: '<b>'" in page.text and "<title>sounds</title>" in path.read_text(encoding="utf-8")
    assert "The heads" not in page.text


def test_a_page_is_named_after_its_folder(tmp_path: Path) -> None:
    (tmp_path / "cities-heads").mkdir()
    head_report.write_report(tmp_path / "cities-heads" / "report.html", head_set(), {})
    assert "<title>cities-heads: " in (tmp_path / "cities-heads" / "report.html").read_text(encoding="utf-8")


def test_a_bare_head_set_makes_a_page(tmp_path: Path) -> None:
    heads = head_set({}, roles={"recall": (), "suppression": ()}, stability={}, versions={}, command="", created="")
    head_report.write_report(tmp_path / "report.html", heads, {})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("No head was confirmed") == 2
    assert not [name for name, _ in page.tags if name == "img"]


# --- the maps ---------------------------------------------------------------------------------------------------------


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """From the definition, for values without ties: `1 - 6 sum d^2 / (n (n^2 - 1))`."""
    ranks = [np.argsort(np.argsort(values.ravel())) for values in (a, b)]
    n = a.size
    return 1 - 6 * float(((ranks[0] - ranks[1]) ** 2).sum()) / (n * (n**2 - 1))


def many_means() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    names = [
        f"{method}.{quantity}" for method in ("resample", "dla", "ablation") for quantity in ("target", "previous")
    ]
    names += [
        "lens.subject.target",
        "lens.previous.previous",
        "lens.first.target",
        "attention.previous",
        "gates.target",
    ]
    names += ["gates.facilitating", "ablation.target_p"]
    return {name: generator.normal(size=(N_LAYERS, N_HEADS)).astype(np.float32) for name in names}


def test_every_method_s_maps_are_drawn_on_one_scale_for_each_unit() -> None:
    means = many_means()
    means["resample.target"][1, 2] = 50.0
    means["gates.target"] *= 0.01
    sheets = {(sheet.quantity, sheet.unit): sheet for sheet in heat_maps.sheets(means)}
    assert {key: list(sheet.maps) for key, sheet in sheets.items()} == {
        ("target", "logits"): ["dla.target", "lens.subject.target", "ablation.target", "resample.target"],
        ("target", "gate openings"): ["gates.target"],
        ("previous", "logits"): ["dla.previous", "lens.previous.previous", "ablation.previous", "resample.previous"],
    }
    logits = [means[name] for key, sheet in sheets.items() if key[1] == "logits" for name in sheet.maps]
    limit = np.quantile(np.abs(np.stack(logits)), heat_maps.QUANTILE)
    assert sheets["target", "logits"].limit == sheets["previous", "logits"].limit == pytest.approx(limit)
    assert sheets["target", "gate openings"].limit < 0.1
    assert 1 < limit < 50, "one number must not whiten all the others"
    beyond = sum(int((np.abs(matrix) > limit).sum()) for matrix in logits)
    for quantity in ("target", "previous"):
        note = heat_maps.scale_note(sheets[quantity, "logits"])
        assert f"±{number(limit)}" in note and "maps in logits" in note
        assert f"{beyond} numbers lie beyond, the farthest 50 (L1H2, resample.target)" in note


@pytest.mark.usefixtures("pictures")
def test_a_scale_of_equal_or_missing_numbers() -> None:
    for matrix, limit in ((np.zeros((2, 2)), 1.0), (np.full((2, 2), np.nan), 1.0), (np.full((2, 2), -3.0), 3.0)):
        (sheet,) = heat_maps.sheets({"dla.target": matrix})
        assert sheet.limit == limit and sheet.beyond is None and "beyond" not in heat_maps.scale_note(sheet)
        assert heat_maps.sheet_png(sheet, {"recall": [(0, 0)]})[0].startswith(b"\x89PNG")
    # One head that does anything at all, among many that do nothing.
    sparse = np.zeros((30, 30))
    sparse[3, 4] = -0.5
    assert heat_maps.sheets({"dla.target": sparse})[0].limit == 0.5


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(("layers", "heads", "methods"), [(2, 1, 1), (5, 4, 7), (80, 64, 2), (6, 6, 9)])
def test_maps_stand_side_by_side_in_one_picture(layers: int, heads: int, methods: int) -> None:
    generator = np.random.default_rng(0)
    means = {f"method_{index}.target": generator.normal(size=(layers, heads)) for index in range(methods)}
    (sheet,) = heat_maps.sheets(means)
    png, width = heat_maps.sheet_png(sheet, {"recall": [(0, 0)], "suppression": [(1, 0)]})
    with Image.open(io.BytesIO(png)) as image:
        assert image.width >= width, "blurred on an ordinary screen"
        assert width <= 1200 and len(png) < 500_000
    other = {"recall": [(1, 0)], "suppression": [(1, 0)]}
    assert heat_maps.sheet_png(sheet, other)[0] != png


def test_agreement_is_spearman_s_correlation() -> None:
    means = many_means()
    names, table = heat_maps.agreement(means, "target")
    assert names == ["dla", "ablation", "resample", "gates"]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            assert table[i, j] == pytest.approx(spearman(means[f"{a}.target"], means[f"{b}.target"]))
    assert heat_maps.agreement({}, "target")[1].shape == (0, 0)


def test_agreement_with_ties_and_missing_numbers() -> None:
    steps = np.array([[1.0, 1.0, 2.0], [3.0, np.nan, 3.0]])
    means = {
        "a.target": steps,
        "b.target": -(steps**3),
        "c.target": np.ones((2, 3)),
        "d.target": np.full((2, 3), np.nan),
    }
    _, table = heat_maps.agreement(means, "target")
    assert table[0, 0] == pytest.approx(1) and table[0, 1] == pytest.approx(-1)
    assert np.isnan(table[0, 2]) and np.isnan(table[0, 3])
    # Ranks of ties are shared: (1.5, 1.5, 3) against (1, 2, 3).
    _, table = heat_maps.agreement({"a.target": [[0, 0, 1]], "b.target": [[1, 2, 3]]}, "target")
    assert table[0, 1] == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])


@pytest.mark.usefixtures("pictures")
@pytest.mark.slow
def test_the_page_shows_the_sheets_their_scale_and_the_agreement(tmp_path: Path) -> None:
    head_report.write_report(tmp_path / "report.html", head_set(), many_means())
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    drawn = heat_maps.sheets(many_means())
    inlined = [attributes for name, attributes in page.tags if name == "img"]
    assert len(inlined) == len(drawn) == 3
    for attributes, sheet in zip(inlined, drawn, strict=True):
        png, width = heat_maps.sheet_png(sheet, heat_maps.marked_heads(head_set()))
        assert base64.b64decode((attributes["src"] or "").split(",", 1)[1]) == png
        assert attributes["width"] == str(width) and ", ".join(sheet.maps) in (attributes["alt"] or "")
        assert heat_maps.scale_note(sheet) in page.text
    correlation = heat_maps.agreement(many_means(), "previous")[1][0, 1]
    assert f"dla 1 {number(correlation)}" in page.text
    assert "Maps" not in written_without_means(tmp_path)


def written_without_means(tmp_path: Path) -> str:
    head_report.write_report(tmp_path / "bare.html", head_set(), {})
    return Page((tmp_path / "bare.html").read_text(encoding="utf-8")).text


# --- the cards --------------------------------------------------------------------------------------------------------


def test_a_card_says_what_the_head_reads_and_writes(tmp_path: Path) -> None:
    _, page = written(tmp_path, head_set(), profiles=[profile(3, 1)])
    assert (
        "60% given answers, 20% first token, 10% subject, 6% everything else; suppresses the given answers" in page.text
    )
    assert "over 7 prompts" in page.text and "␣Rome 80%" in page.text and "⏎ 30%" in page.text
    assert "raises ␣<b>up +1.25" in page.text and "lowers \\u202edown -2.5" in page.text
    assert "subject neither +0.25 top 40% –" in page.text
    assert "given answer suppresses -3.25 bottom 0.05% -0.125" in page.text
    assert "start with ␣T0 , ␣T1 , ␣T2 , ␣T3 , ␣T4 , ␣T5 and 3 more; the given ones with ␣Rome" in page.text
    moved = np.linspace(-2, 0, 12).sum()
    assert f"moves the given answers by {number(moved)}" in page.text
    assert "␣Milan +0.5" in page.text
    assert [attributes.get("id") for name, attributes in page.tags if name == "details"] == ["suppression-L3H1"]


def test_every_token_of_the_prompt_is_shaded_by_its_share(tmp_path: Path) -> None:
    source, page = written(tmp_path, head_set(), profiles=[profile()])
    spans = [attributes for name, attributes in page.tags if name == "span" and "title" in attributes]
    tokens = [attributes for attributes in spans if (attributes["class"] or "").startswith("tk")]
    n = len(profile().prompt.tokens)
    assert len(tokens) == 3 * n
    attention, target, previous = tokens[:n], tokens[n : 2 * n], tokens[2 * n :]
    assert attention[8]["style"] == "--w:1.00" and attention[8]["title"] == "89%"
    assert attention[0]["style"] == "--w:0.01"
    # The two in logits share a scale, whose strongest is -2.
    assert (
        target[-1]["style"] == "--w:0.25" and target[-1]["title"] == "+0.5" and "tk end p" in str(target[-1]["class"])
    )
    assert previous[0]["style"] == "--w:1.00" and "tk first n" in str(previous[0]["class"])
    assert attention[8]["class"] == "tk previous a" and attention[3]["class"] == "tk subject a"
    assert "␣&lt;Italy&gt;" in source and "<Italy>" not in source and "\u202e" not in source


def test_a_head_of_two_roles_and_heads_without_profiles(tmp_path: Path) -> None:
    twice = RankedHead(3, 1, 0.5, None, {})
    heads = head_set(roles=head_set().roles | {"recall": (RankedHead(1, 3, 0.7, (0.1, 0.9)), twice)})
    _, page = written(tmp_path, heads, profiles=[profile(3, 1), profile(0, 0)])
    assert [attributes["id"] for name, attributes in page.tags if name == "details"] == [
        "recall-L3H1",
        "suppression-L3H1",
    ]
    assert "1 L1H3 0.7 [0.1, 0.9]" in page.text and "2 L3H1 0.5 60% given" in page.text
    _, plain = written(tmp_path, heads)
    assert "details" not in {name for name, _ in plain.tags} and "2 L3H1 0.5" in plain.text


def test_only_the_first_cards_are_open(tmp_path: Path) -> None:
    ranked = tuple(RankedHead(layer, 0, 1.0, (0.5, 1.5)) for layer in range(5))
    heads = head_set(roles={"recall": ranked, "suppression": ()})
    _, page = written(tmp_path, heads, profiles=[profile(layer) for layer in range(5)])
    opened = ["open" in attributes for name, attributes in page.tags if name == "details"]
    assert opened == [True] * head_dashboard.OPEN_CARDS + [False] * (5 - head_dashboard.OPEN_CARDS)


def test_a_card_without_previous_answers(tmp_path: Path) -> None:
    _, page = written(tmp_path, head_set(verification(0.3, previous=False)), profiles=[profile(previous=False)])
    assert "70% subject" in page.text and "moves the remaining answers" in page.text
    assert "moves the given answers" not in page.text and "given ones" not in page.text


def test_a_head_that_writes_nothing_makes_a_card(tmp_path: Path) -> None:
    n = len(profile().prompt.tokens)
    silent = replace(profile().prompt, target=(0.0,) * n, previous=(0.0,) * n, raises=(), lowers=())
    _, page = written(tmp_path, head_set(), profiles=[profile(raises=(), lowers=(), prompt=silent)])
    assert "its output is zero" in page.text and "Writes here" not in page.text


def test_the_quiet_middle_of_a_long_prompt_is_counted_not_drawn(tmp_path: Path) -> None:
    n = 500
    attention, parts = np.full(n, 1e-4), np.zeros(n)
    attention[[0, 100]], parts[300] = [0.4, 0.55], 2.0
    prompt = head_profiles.Prompt(
        tuple(f"w{t}" for t in range(n)),
        ("first", *["rest"] * (n - 2), "end"),
        tuple(attention.tolist()),
        tuple(parts.tolist()),
        None,
        ("a",),
        (),
        (),
        (),
    )
    _, page = written(tmp_path, head_set(), profiles=[profile(prompt=prompt, previous=False)])
    near = head_dashboard.CONTEXT
    assert f"w{near} ⋯ {95 - 2 * near + 4} tokens, " in page.text.replace("  ", " ")
    for kept in ("w0", "w100", "w300", "w499"):
        assert page.text.count(f"{kept} ") >= 2
    assert "w200 " not in page.text
    # Nothing is lost: what is drawn and what is counted are all tokens, in each of the two pictures.
    counted = sum(int(count) for count in re.findall(r"⋯ (\d+) tokens", page.text))
    drawn = sum("title" in attributes and "tk" in str(attributes.get("class")) for _, attributes in page.tags)
    assert counted + drawn == 2 * n


@pytest.mark.parametrize(
    ("above", "verdict"),
    [(0.0, "copies"), (0.05, "copies"), (0.3, "neither"), (0.95, "suppresses"), (1.0, "suppresses")],
)
def test_copying_is_judged_by_the_rank_of_the_own_token(above: float, verdict: str) -> None:
    assert head_profiles.Copying(3, 1.0, None, above).verdict == verdict


def test_portraits_come_back_from_their_file(tmp_path: Path) -> None:
    drawn = [profile(), profile(1, 1, previous=False)]
    write_profiles(drawn, tmp_path / "portraits.json")
    assert read_profiles(tmp_path / "portraits.json") == drawn


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "schema"),
        ('{"schema": 7}', "schema"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 1, "portraits": [{"layer": 1}]}', "damaged"),
        ('{"schema": 1, "portraits": [3]}', "damaged"),
    ],
)
def test_a_damaged_portraits_file_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "portraits.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as raised:
        read_profiles(tmp_path / "portraits.json")
    assert "\n" not in str(raised.value)


# --- controls ---------------------------------------------------------------------------------------------------------


def test_the_controls_have_rows_too() -> None:
    block = verification()
    baseline = {quantity: block["baseline"][quantity] for quantity in dissociation.QUANTITIES}
    block["ablate_lowest_like_recall"] = {"heads": [[2, 1]]} | baseline
    block["ablate_control_books_suppression"] = block["ablate_suppression"]
    names = [row.name for row in dissociation.dissociation_table(head_set(block))]
    assert "1 other head of the same layers with scores nearest to zero silenced" in names
    assert names[4] == "top 2 suppression heads of books silenced"


def test_a_role_that_cannot_be_resampled_has_no_stability(tmp_path: Path) -> None:
    _, page = written(tmp_path, head_set(stability={"recall": None, "suppression": 0.5, "bootstrap": 200}))
    assert "suppression 0.5" in page.text and "recall –" not in page.text
