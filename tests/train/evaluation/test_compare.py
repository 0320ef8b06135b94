"""Runs side by side: grouped over seeds, compared on the same resamplings, shown as table, CSV, JSON and page."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.cli.tables import comparison_tables
from headtune.train.evaluation import compare, compare_report
from headtune.train.evaluation.evaluation_file import read_before
from headtune.train.evaluation.run_reader import flatten_config, read_runs

SUBJECTS = [f"subject {index // 2}" for index in range(12)]
BEFORE = [0.0, 1.0, 1.0] * 4  # its mean changes with the subjects drawn


def write_run(
    folder: Path, name: str, seed: int, values: list[float], sha: str = "a" * 64, **changes: Any
) -> dict[str, Any]:
    """A run folder as `headtune train` leaves it; `changes` go into the recipe."""
    own = folder / name
    own.mkdir(parents=True)
    recipe = {"recipe": "lofit", "seed": seed, "name": name, "output_dir": str(own), "method": {"top": 4}}
    recipe |= {"tracking": {"group": "study", "tags": ["quick"]}} | changes
    before = BEFORE
    rows = [
        {
            "subject": subject,
            "prompt": f"{subject} & <b>",
            "before": "one",
            "after": f"{name}</pre>",
            "before_kinds": ["wrong"],
            "after_kinds": ["correct"],
            "before_values": {"exact_match": first, "repeat_rate": 0.5},
            "after_values": {"exact_match": value, "repeat_rate": value / 2},
        }
        for subject, first, value in zip(SUBJECTS, before, values, strict=True)
    ]

    def metrics(exact: list[float], repeats: float, perplexity: float) -> dict[str, Any]:
        mean = float(np.mean(exact))
        return {
            "exact_match": {"mean": mean, "ci": [mean - 0.1, mean + 0.1]},
            "repeat_rate": {"mean": repeats, "ci": [repeats, repeats]},
            "neutral_perplexity": perplexity,
        }

    evaluation = {
        "task": "facts:test",
        "task_sha256": sha,
        "before": metrics(before, 0.5, 30.0),
        "after": metrics(values, float(np.mean(values)) / 2, 31.0 + seed),
        "examples": rows,
    }
    heads = [[0, seed % 2], [1, 1]]
    state = {"name": name, "recipe": recipe["recipe"], "seed": seed, "state": "done", "parameters": 10, "heads": heads}
    (own / "evaluation.json").write_text(json.dumps(evaluation))
    (own / "run.json").write_text(json.dumps(state))
    (own / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    logged = [(5, 2.0), (10, 1.5), (10, 1.0), (None, 7.0)]
    (own / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "train/loss": v}) + "\n" for s, v in logged))
    return evaluation


GOOD, BETTER = [1.0, 0.0, 1.0] * 4, [1.0, 1.0, 1.0, 0.0] * 3


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    write_run(folder, "chosen-s0-abcdef", 0, GOOD)
    write_run(folder, "chosen-s1-fedcba", 1, BETTER)
    write_run(folder, "random-s0", 0, [0.0] * 12, method={"top": 8}, tracking={"group": "other", "tags": []})
    write_run(folder, "elsewhere", 0, GOOD, sha="b" * 64, recipe="lora")
    return folder


def test_seeds_are_one_group_and_other_recipes_or_prompts_another(runs: Path) -> None:
    found = compare.compare(read_runs(runs))
    names = [(group.name, len(group.runs)) for group in found.groups]
    assert sorted(names) == [("base", 0), ("base", 0), ("chosen", 2), ("elsewhere", 1), ("random", 1)]
    chosen = next(group for group in found.groups if group.name == "chosen")
    metric = chosen.metrics["exact_match"]
    assert metric.by_seed == (np.mean(GOOD), np.mean(BETTER)) and metric.mean == pytest.approx(np.mean(GOOD + BETTER))
    assert chosen.metrics["neutral_perplexity"].interval is None
    assert chosen.changed == {"method.top": 4, "recipe": "lofit"}
    assert found.best[chosen.measured, "repeat_rate"] == {"random"}  # less is better
    assert found.best[chosen.measured, "exact_match"] == {"chosen"}


def test_another_base_model_is_another_table(runs: Path) -> None:
    path = runs / "random-s0" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": "c" * 64}))
    found = compare.compare(read_runs(runs), "chosen")
    random = next(group for group in found.groups if group.name == "random")
    assert random.metrics["exact_match"].minus is None
    assert found.best[random.measured, "exact_match"] == {"base"}
    assert sum(group.name == "base" for group in found.groups) == 3


def test_another_scoring_is_another_table_and_none_is_the_harness(runs: Path) -> None:
    path = runs / "random-s0" / "evaluation.json"
    content = json.loads(path.read_text())
    for scoring, same in (("harness", True), ("iti", False)):
        path.write_text(json.dumps(content | {"scoring": scoring}))  # the other runs do not say
        groups = {group.name: group.measured for group in compare.compare(read_runs(runs)).groups}
        assert (groups["random"] == groups["chosen"]) is same
        before = read_before(path, {"scoring": scoring})[0]
        assert before == content["before"]
    with pytest.raises(InputError, match=r"measured another scoring \('iti', not 'harness'\)"):
        read_before(path, {"scoring": "harness"})
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"measured another scoring \('harness', not 'iti'\)"):
        read_before(path, {"scoring": "iti"})


def test_a_damaged_run_is_left_out_and_named(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    (runs / "random-s0" / "evaluation.json").write_text('{"task": ')
    assert len(read_runs(runs)) == 3 and "random-s0 (damaged: JSONDecodeError)" in caplog.text


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_finished_run_that_measured_nothing_is_left_out(
    when: str, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = runs / "random-s0" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {when: None}))
    found = compare.compare(read_runs(runs))
    assert "random" not in [group.name for group in found.groups]
    assert "random-s0 (damaged: TypeError)" in caplog.text


def test_a_run_that_changed_nothing_may_be_the_reference(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0, BEFORE)
    found = compare.compare(read_runs(tmp_path), "a")
    assert found.groups[1].metrics["exact_match"].minus is None


def test_one_subject_gives_no_interval_of_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SUBJECTS", ["Italy"] * 12)
    write_run(tmp_path, "a", 0, GOOD)
    minus = compare.compare(read_runs(tmp_path)).groups[1].metrics["exact_match"].minus
    assert minus is not None and minus[1] is None


def test_differences_are_paired_over_resampled_subjects_and_runs(runs: Path) -> None:
    """Against a loop over the very same draws."""
    found = compare.compare(read_runs(runs, group="study"))
    chosen = next(group for group in found.groups if group.name == "chosen")
    each = np.array([GOOD, BETTER], dtype=float)
    names = sorted(set(SUBJECTS))
    counts = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=compare.DRAWS)
    seeds = np.random.default_rng(1).multinomial(2, [0.5, 0.5], size=compare.DRAWS)
    means, differences = [], []
    for draw, of_runs in zip(counts, seeds, strict=True):
        mixed = of_runs @ each / 2
        rows = [i for subject, n in zip(names, draw, strict=True) for _ in range(n) for i in range(12)
                if SUBJECTS[i] == subject]  # fmt: skip
        means.append(mixed[rows].mean())
        differences.append((mixed - np.array(BEFORE))[rows].mean())
    metric = chosen.metrics["exact_match"]
    assert metric.interval == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert metric.minus is not None
    gap, interval, p = metric.minus
    assert gap == pytest.approx((each.mean(0) - np.array(BEFORE)).mean())
    assert interval == pytest.approx(np.percentile(differences, [2.5, 97.5]))
    below, above = np.mean(np.round(differences, 12) <= 0), np.mean(np.round(differences, 12) >= 0)
    assert below + above > 1.05  # draws without a difference count on both sides
    assert p == pytest.approx(min(1, 2 * min(below, above)), abs=0.001)
    assert metric.differs == (not interval[0] <= 0 <= interval[1])


def test_seeds_that_differ_widen_the_interval(tmp_path: Path) -> None:
    """Two runs of which one always succeeds and one always fails: with other seeds it could be anything."""
    for name, values in (("alike", (GOOD, GOOD)), ("unlike", ([1.0] * 12, [0.0] * 12))):
        for seed, right in enumerate(values):
            write_run(tmp_path, f"{name}-s{seed}", seed, right, method={"top": len(name)})
    groups = {group.name: group.metrics["exact_match"] for group in compare.compare(read_runs(tmp_path)).groups}
    assert groups["unlike"].interval == (0.0, 1.0) and groups["unlike"].mean == 0.5
    assert groups["alike"].interval[0] > 0.1


def test_the_reference_may_be_a_group_or_one_of_its_runs(runs: Path) -> None:
    for name in ("random", "random-s0"):
        found = compare.compare(read_runs(runs), name)
        by_name = {group.name: group for group in found.groups if group.task == "facts:test"}
        assert by_name["random"].metrics["exact_match"].minus is None
        minus = by_name["chosen"].metrics["exact_match"].minus
        assert minus is not None and minus[0] == pytest.approx(np.mean(GOOD + BETTER))
    elsewhere = compare.compare(read_runs(runs, recipe="lora"), "elsewhere").groups[-1]
    assert elsewhere.metrics["exact_match"].minus is None
    assert all(g.metrics["exact_match"].minus is None for g in found.groups if g.name == "elsewhere")  # other prompts


def test_runs_are_chosen_by_group_tag_and_recipe(runs: Path) -> None:
    assert [run.name for run in read_runs(runs, recipe="lora")] == ["elsewhere"]
    assert [run.name for run in read_runs(runs, group="other")] == ["random-s0"]
    assert len(read_runs(runs, tags=["quick"])) == 3
    with pytest.raises(InputError, match=r"group 'none' and tag 'x'; groups there: other, study; recipes: lofit, lora"):
        read_runs(runs, group="none", tags=["x"])
    with pytest.raises(InputError, match="no run or group is named 'nobody'; there are base, chosen, elsewhere"):
        compare.compare(read_runs(runs), "nobody")


def test_unfinished_runs_are_left_out_and_named(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = json.loads((runs / "random-s0" / "run.json").read_text())
    (runs / "random-s0" / "run.json").write_text(json.dumps(state | {"state": "failed"}))
    assert len(read_runs(runs)) == 3 and "random-s0 (failed)" in caplog.text


def test_a_step_that_was_logged_twice_counts_once(runs: Path) -> None:
    assert read_runs(runs)[0].curve() == [(5, 2.0), (10, 1.0)]
    assert flatten_config({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}
    assert compare.jaccard(frozenset({(0, 1), (1, 1)}), frozenset({(1, 1)})) == 0.5


def test_a_line_that_was_cut_short_is_passed_over_and_counted(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a process leaves it that is killed while it writes."""
    path = runs / "chosen-s0-abcdef" / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in (b'{"step": 15, "train/lo', '{"step": 15, "said": "\u00e9'.encode()[:-1]):
        path.write_bytes(whole + cut)
        assert read_runs(runs)[0].curve() == [(5, 2.0), (10, 1.0)]
        assert f"{path}: 1 line that cannot be read is left out" in caplog.text
        caplog.clear()
    assert read_runs(runs)[1].curve() and not caplog.text


class Page(HTMLParser):
    """What a page refers to, and its headings and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.references += [str(value) for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_command_writes_table_csv_json_and_a_page_of_its_own(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, lines = tmp_path / "page.html", tmp_path / "lines.csv"
    assert main(["compare", str(runs), "--against", "random", "--html", str(page), "--csv", str(lines)]) == 0
    assert "chosen" in capsys.readouterr().out
    parser = Page()
    parser.feed(page.read_text())
    assert parser.references and all(value.startswith("data:image/png;base64,") for value in parser.references)
    assert not re.search(r"url\((?!data:)", page.read_text())
    for words in (
        "facts:test, 12 prompts, ",
        "Jaccard",
        "method.top",
        "chosen-s0-abcdef</pre>",
        "subject 0 & <b>",
        "by seed 0.667, 0.75",
    ):
        assert words in parser.text
    rows = list(csv.DictReader(lines.open()))
    (row,) = [r for r in rows if r["group"] == "chosen" and r["metric"] == "exact_match"]
    assert float(row["mean"]) == pytest.approx(np.mean(GOOD + BETTER)) and float(row["minus"]) > 0
    assert main(["compare", str(runs), "--json"]) == 0
    found = {(group["name"], group["task"]): group for group in json.loads(capsys.readouterr().out)["groups"]}
    chosen = found["chosen", "facts:test"]
    assert [run["seed"] for run in chosen["runs"]] == [0, 1] and chosen["metrics"]["exact_match"]["best"]


def test_a_table_fits_its_terminal(runs: Path) -> None:
    """A table for each set of prompts; where it has no room its columns go on in another one, unbroken."""
    found = compare.compare(read_runs(runs))
    assert [str(table.title) for table in comparison_tables(found, 200)] == ["facts:test, 12 prompts"] * 2
    assert "a task in several tables" in str(comparison_tables(found, 200)[-1].caption)
    narrow = comparison_tables(found, 72)
    assert [str(table.title) for table in narrow] == ["facts:test, 12 prompts", "facts:test, 12 prompts, continued"] * 2
    assert all(str(table.columns[0].header) == "run" for table in narrow)
    console = Console(width=72, file=io.StringIO())
    console.print(*narrow)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in (
        str(cell) for table in comparison_tables(found, 200) for column in table.columns for cell in column.cells
    ):
        assert f" {cell} " in text


def test_heads_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    """Layer 0, head 1 of one model is nothing to layer 0, head 1 of another: each has a map of its own."""
    for name, model in (("a", "first"), ("b", "first"), ("c", "second")):
        write_run(tmp_path, f"{name}-s0", 0, GOOD, method={"top": ord(name)}, model={"name": model})
    found = compare.compare(read_runs(tmp_path))
    trained = [group for group in found.groups if group.runs]
    assert [[len(group.runs) for group in groups] for groups in compare_report._by_model(trained)] == [[1, 1], [1]]
    compare_report.write(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Chosen heads of first" in page and "Chosen heads of second" in page
    assert page.count("how many groups chose each head") == 2


def test_hundreds_of_runs_are_read(tmp_path: Path) -> None:
    for index in range(200):
        write_run(tmp_path, f"run{index // 4}-s{index % 4}", index % 4, GOOD, method={"top": index // 4})
    found = compare.compare(read_runs(tmp_path))
    assert len(found.groups) == 51 and all(len(group.runs) == 4 for group in found.groups if group.runs)
    compare_report.write(found, tmp_path / "page.html")
    assert "26 groups have no curve or are not drawn" in (tmp_path / "page.html").read_text()
