"""The command line: what is wrong is said in one line, with exit code 2, and nothing is written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from headtune.analysis.methods.scores import load_means
from headtune.analysis.models import loading
from headtune.analysis.synthetic.planted import KINDS, plant
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import to_jsonl
from headtune.cli import console
from headtune.cli.arguments import memory
from headtune.cli.main import main
from headtune.plugins import TUNING_METHODS
from headtune.train.config import recipe as recipes
from helpers.paths import ROOT
from helpers.small_runs import head_set, train, write_recipe, write_task


@pytest.fixture(autouse=True)
def quiet_place(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of the user's, and a current folder of our own."""
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


class Refusals:
    """Runs commands that must be refused: exit code 2, one line on stderr, nothing on stdout, nothing written."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, *words: object) -> str:
        before = tree(self.folder)
        self.capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        captured = self.capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("headtune: ") and captured.out == ""
        assert tree(self.folder) == before
        return lines[0]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusals:
    return Refusals(tmp_path, capsys)


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    return write_recipe(tmp_path, tiny_llama)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-model", "./no/folder/here", "no/such-model"])
def test_an_unknown_model(name: str, refused: Refusals, recipe: Path, task: Path) -> None:
    for words in (
        ["train", recipe, f"model.name={name}"],
        ["identify", name, "--task", task, "--out", "heads"],
        ["evaluate", name, "--task", task],
    ):
        assert repr(name) in refused(*words)


def test_a_folder_that_is_no_model(refused: Refusals, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("train", recipe, "model.name=./empty")
    assert "is not a run" in refused("export", tmp_path / "empty", tmp_path / "out")


def test_a_model_of_an_unknown_family(refused: Refusals, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "is an encoder (a bert whose is_decoder is false)" in refused(
        "train", recipe, f"model.name={tmp_path / 'bert'}"
    )


def test_a_missing_task_file(refused: Refusals, recipe: Path, tiny_llama: Path) -> None:
    for words in (
        ["train", recipe, "task.train=nowhere.jsonl"],
        ["identify", tiny_llama, "--task", "nowhere.jsonl", "--out", "heads"],
        ["evaluate", tiny_llama, "--task", "nowhere.jsonl"],
        ["task", "show", "nowhere.jsonl"],
    ):
        assert "'nowhere.jsonl'" in refused(*words)


GOOD = {"prompt": "Cities in Italy:\n- Rome\n-", "subject": "Italy", "answers": ["Rome", "Milan"], "previous": ["Rome"]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "Cities in Italy:', ["not a JSON object"]),
        ("[1]", ["list"]),
        (json.dumps(GOOD | {"subject": "Spain"}), ["'Spain'", "does not contain its subject"]),
        (json.dumps(GOOD | {"answer": ["Rome"]}), ["'answer'", "'answers'"]),
        (json.dumps(GOOD | {"answers": "Rome"}), ["'answers'", "list"]),
        (json.dumps(GOOD | {"previous": ["Oslo"]}), ["'Oslo'"]),
        (json.dumps({k: v for k, v in GOOD.items() if k != "prompt"}), ["'prompt'", "missing"]),
    ],
)
def test_a_bad_line_of_a_task(line: str, words: list[str], refused: Refusals, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    message = refused("train", recipe, "task.train=bad.jsonl")
    assert "bad.jsonl:3" in message
    assert all(word in message for word in words)


def test_heads_that_do_not_fit(refused: Refusals, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert "L0H9" in refused("train", recipe, "heads={list: [[0, 9]]}")
    head_set(loading.load_model(str(tiny_llama)).identity(), n_heads=12).save(tmp_path / "heads.json")
    message = refused("train", recipe, "heads={from: heads.json}")
    assert "n_heads 12" in message and "has 4" in message
    assert "does not exist" in refused("train", recipe, "heads={from: none.json}")


def test_a_bad_recipe(refused: Refusals, recipe: Path, tmp_path: Path) -> None:
    assert "did you mean 'training.max_steps'" in refused("train", recipe, "training.max_stpes=3")
    assert "did you mean 'method'" in refused("train", recipe, "metod.scale=head")
    assert "training.max_steps must be int, found 'x'" in refused("train", recipe, "training.max_steps=x")
    assert "training.packing must be bool, found 7" in refused("train", recipe, "training.packing=7")
    assert "found 'a'" in refused("train", recipe, "seed=a")
    assert "key=value" in refused("train", recipe, "seed")
    assert "'lofit/one_to_mony'" in refused("train", "lofit/one_to_mony")
    (tmp_path / "bad.yaml").write_text("recipe: [lofit\nseed: 1\n")
    assert "bad.yaml:2:5: not YAML" in refused("train", "bad.yaml")


@pytest.mark.parametrize("place", ["/proc/headtune", "/proc/a/b", "cities.jsonl/run"])
def test_a_path_that_cannot_be_written(
    place: str, refused: Refusals, recipe: Path, task: Path, tiny_llama: Path
) -> None:
    assert place.split("/")[1] in refused("train", recipe, f"output_dir={place}")
    assert place.split("/")[1] in refused("identify", tiny_llama, "--task", task, "--out", place)


def test_a_task_file_that_cannot_be_written(refused: Refusals, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps({"Italy": list("abcdef")}))
    for place in ("/proc/task.jsonl", "facts.json/task.jsonl"):
        refused("task", "build", "facts.json", "--out", place)


def test_task_make_refused(refused: Refusals, tiny_llama: Path, tmp_path: Path) -> None:
    make = ["task", "make", "needle", "--tokenizer", tiny_llama, "--n", "2", "--out", "made.jsonl"]
    assert "cannot hold needle and question" in refused(*make, "--lengths", "20")
    assert "takes no 'shots'; it takes lengths, depths, words, filler" in refused(*make, "--shots", "3")
    assert "--chat-template is for task kind 'pairs', found 'needle'" in refused(*make, "--chat-template")
    conflict = [*make[:2], "conflict", *make[3:]]
    assert "task kind 'conflict' needs 'facts'" in refused(*conflict)
    pairs = [*make[:2], "pairs", *make[3:]]
    assert "takes no 'shots'; it takes task, silence, tokens" in refused(*pairs, "--shots", "3")
    assert "needs --model" in refused(*pairs, "--task", "x.jsonl", "--silence", "runs/heads:recall:4")
    pairs[3:5] = ["--model", tiny_llama]
    assert "needs --silence" in refused(*pairs, "--task", "x.jsonl")
    for silence in ("runs/heads:recall", "runs/heads:recall:0", "recall:4"):
        assert repr(silence) in refused(*pairs, "--task", "x.jsonl", "--silence", silence)
    assert "nowhere" in refused(*pairs, "--task", "x.jsonl", "--silence", "nowhere:recall:4")
    assert "'nowhere.json' does not exist" in refused(*conflict, "--facts", "nowhere.json", "--relation", "capital")
    assert not (tmp_path / "made.jsonl").exists()
    (tmp_path / "made.jsonl").write_text("mine")
    assert "exists; choose another --out" in refused(*make)


def test_task_make(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needle = [
        "task",
        "make",
        "needle",
        "--tokenizer",
        str(tiny_llama),
        "--n",
        "4",
        "--words",
        "2",
        "--lengths",
        "150,160",
    ]
    assert main([*needle, "--out", "needle.jsonl"]) == 0
    assert capsys.readouterr().out == "needle.jsonl: 4 examples, 4 subjects\n"
    assert main(["task", "show", "needle.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "scored by exact match of one answer" in shown and "spans: needle in 4 prompts" in shown
    assert 'made by: generator "needle", seed 0, n 4, options {"lengths": [150, 160]' in shown
    assert main(["task", "show", "needle.jsonl", "--all"]) == 0
    assert capsys.readouterr().out == (tmp_path / "needle.jsonl").read_text()
    # With a model, conflicts are made of what it knows; a random one knows nothing.
    (tmp_path / "facts.json").write_text(json.dumps({"Italy": ["Rome"], "Japan": ["Tokyo"]}))
    conflict = ["task", "make", "conflict", "--facts", "facts.json", "--relation", "capital", "--n", "2", "--json"]
    assert main([*conflict, "--tokenizer", str(tiny_llama), "--out", "conflict.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["relation"] == "capital"
    assert main([*conflict, "--model", str(tiny_llama), "--out", "known.jsonl"]) == 2
    assert "the model does not know it (2)" in capsys.readouterr().err


def test_an_output_folder_that_exists(
    refused: Refusals, recipe: Path, task: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    assert "exists and is not empty" in refused("train", recipe)
    assert "exists and is not empty" in refused("identify", tiny_llama, "--task", task, "--out", "run")
    assert "exists and is not empty" in refused("export", "anything", "run")


def test_other_refusals(refused: Refusals, recipe: Path, task: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert "'al'" in refused("identify", tiny_llama, "--task", task, "--out", "heads", "--method", "al")
    assert "'float31'" in refused("identify", tiny_llama, "--task", task, "--out", "heads", "--dtype", "float31")
    assert "'float31'" in refused("export", "anything", "out", "--dtype", "float31")
    assert "'tset'" in refused("evaluate", tiny_llama, "--task", f"{task}:tset")
    assert "'nowhere'" in refused("compare", "nowhere")
    assert "no finished run" in refused("compare", tmp_path)
    assert "nowhere" in refused("report", "nowhere")
    assert "accelerate_configs" in refused("train", recipe, "--config_file", "nowhere.yaml")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["tran"],
        ["train"],
        ["train", "x", "--reusme"],
        ["evaluate", "x", "--unknown"],
        ["recipes", "show"],
        ["task", "build", "x"],
    ],
)
def test_bad_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_options_and_overrides_may_be_mixed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--resume` between overrides; what is refused then is the run that is not there, not the words."""
    assert main(["train", str(recipe), "seed=1", "--resume", "training.max_steps=3"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


# --- what works -------------------------------------------------------------------------------------------------------


def test_what_is_in_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", "show", "country_cities"]) == 0
    lines = capsys.readouterr().out.splitlines()
    task = load_task("country_cities")
    assert lines[0] == (
        f"country_cities: {len(task.subjects)} subjects, {len(task.examples)} prompts, scored as lists of 3"
    )
    sizes = [len(load_task(f"country_cities:{part}").subjects) for part in ("train", "validation", "test")]
    assert [int(word) for word in re.findall(r"(\d+) \(", lines[1])] == sizes
    assert len([line for line in lines if line.startswith("{")]) == 3

    single = {"prompt": "A dog says", "subject": "dog", "answers": ["woof"]}
    (tmp_path / "sounds.jsonl").write_text(json.dumps(single) + "\n")
    assert main(["task", "show", "sounds.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "scored by exact match of one answer" in shown and shown.endswith(json.dumps(single) + "\n")


def test_what_identify_would_leave_out_of_a_task(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"prompt": "1. Rome\n2.", "subject": "1.", "previous": ["Rome"]}
    lines = [{**given, "answers": ["Rome", other]} for other in ("Milan", "Rome by night")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["task", "show", "mine.jsonl", "--model", str(tiny_llama)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{tiny_llama}: ")]
    why = "remaining and previous answers share first tokens (1)"
    assert said == [f"{tiny_llama}: 1 of 2 prompts can be scored on first tokens; left out: {why}"]
    assert main(["task", "show", "mine.jsonl", "--model", "nowhere"]) == 2
    assert "model 'nowhere'" in capsys.readouterr().err


def test_lists_that_are_too_short_for_what_is_scored_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "facts.json").write_text(json.dumps({"Italy": ["Rome", "Milan", "Turin", "Genoa", "Pisa", "Bari"]}))
    assert main(["task", "build", "facts.json", "--out", "long.jsonl"]) == 0
    assert capsys.readouterr().err.strip() == (
        "3 items are scored and only 2 answers remain for prompts with 4 given (such as 'Italy'): "
        "give more answers, or --previous 1,2,3"
    )
    assert main(["task", "build", "facts.json", "--previous", "1,2,3", "--out", "short.jsonl"]) == 0
    assert capsys.readouterr().err == ""


def test_building_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refusals) -> None:
    facts = {"Italy": ["Rome", "Milan", "Turin"], "Spain": ["Madrid", "Vigo", "Toledo"]}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    (tmp_path / "templates.json").write_text(json.dumps([{"header": "Cities in {subject}:", "item": "\n* {answer}"}]))
    words = ["task", "build", "facts.json", "--templates", "templates.json", "--previous", "0,2"]
    assert main([*words, "--out", "mine.jsonl"]) == 0
    assert capsys.readouterr().out == "mine.jsonl: 4 examples, 2 subjects\n"
    built = load_task("mine.jsonl")
    assert {len(example.previous) for example in built.examples} == {0, 2}
    for example in built.examples:
        given = "".join(f"\n* {answer}" for answer in example.previous)
        assert example.prompt == f"Cities in {example.subject}:{given}\n*"
        assert list(example.answers) == facts[example.subject]
    for words_of_all in (["--all"], ["--json"]):
        capsys.readouterr()
        assert main(["task", "show", "mine.jsonl", *words_of_all]) == 0
        (tmp_path / "again.jsonl").write_text(capsys.readouterr().out)
        assert load_task("again.jsonl") == dataclasses.replace(built, name="again")
        assert "null" not in (tmp_path / "again.jsonl").read_text()

    assert "exists" in refused(*words, "--out", "mine.jsonl")
    assert "'1,x'" in refused("task", "build", "facts.json", "--previous", "1,x", "--out", "other.jsonl")
    assert "'-1'" in refused("task", "build", "facts.json", "--previous=-1", "--out", "other.jsonl")
    assert "'Italy' have 3 answers" in refused("task", "build", "facts.json", "--previous", "3", "--out", "other.jsonl")
    (tmp_path / "facts.json").write_text("{")
    assert "not JSON" in refused("task", "build", "facts.json", "--out", "other.jsonl")


def test_recipes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def output(*words: str) -> str:
        assert main(["recipes", *words]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    assert output().split() == output("list").split() == recipes.recipe_names()
    assert json.loads(output("list", "--json")) == recipes.recipe_names()
    shown = output("show", "lofit/one_to_many")
    assert yaml.safe_load(shown)["recipe"] == "lofit" and shown.startswith("#")
    assert output("validate", str(recipe)).startswith(f"{recipe}: valid (lofit, lofit-list3-s0-")
    assert json.loads(output("schema"))["properties"]["recipe"]["enum"] == list(TUNING_METHODS)


@pytest.fixture(scope="module")
def planted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads are known, as `model`, and 24 of its prompts, about 8 subjects, as `planted.jsonl`."""
    folder = tmp_path_factory.mktemp("planted")
    planted = plant(next(kind for kind in KINDS if kind.name == "gqa"))
    planted.model.save_pretrained(folder / "model")
    planted.tokenizer.save_pretrained(folder / "model")
    (folder / "planted.jsonl").write_text(to_jsonl(planted.task.limited(24).examples), encoding="utf-8")
    return folder


def identify_planted(folder: Path, *more: str) -> list[str]:
    words = ["identify", str(folder / "model"), "--task", str(folder / "planted.jsonl"), "--out", "heads"]
    return [*words, "--top", "2", "--verify-top", "2", "--wandb", "disabled", *more]


def test_identify_writes_what_a_recipe_reads(
    planted_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(identify_planted(planted_folder, "--method", "dla", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "heads" / "heads.json").read_text())
    assert {"scores.safetensors", "report.html", "heads.json"} <= {path.name for path in (tmp_path / "heads").iterdir()}
    recipe = write_recipe(
        tmp_path, planted_folder / "model", recipe="steer", method={"factor": 2.0}, training=None, task=None
    )
    task = f"task={{train: {planted_folder / 'planted.jsonl'}}}"
    assert train(recipe, "heads={from: heads, top: 1}", task) == 0
    used = json.loads((tmp_path / "run" / "run.json").read_text())["heads"]
    assert used == sorted([entry["layer"], entry["head"]] for role in printed["roles"].values() for entry in role[:1])
    capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out.strip() == "run/report.html"


def test_identify_prints_what_holds(
    planted_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted heads hold in both roles: every head with its q, a sentence for each role with p, change and interval."""
    monkeypatch.setattr(console.console, "width", 300)  # whatever the terminal is that tests run in
    assert main(identify_planted(planted_folder)) == 0
    out = capsys.readouterr().out
    stored = json.loads((tmp_path / "heads" / "heads.json").read_text())
    assert "dla.target_contrast [95%]" in out and "ablation.previous_logp" in out
    for ranked in stored["roles"].values():
        assert len(ranked) == 2 and all(entry["effect"]["q"] < 0.001 for entry in ranked)
        assert all(f" {entry['effect']['q']:.3g} " in out for entry in ranked), "a rate has no sign"
    for role, test in stored["verification"]["dissociation"].items():
        assert test["verdict"] == "holds" and test["held"]
        assert sum(line.startswith(f"{role.capitalize()} holds: silencing the 2") for line in out.splitlines()) == 1
        low, high = test["change_ci"]
        part = (
            f"on subjects that they were not chosen on (change {test['change']:.3g} [{low:.3g}, {high:.3g}], the most"
        )
        assert part in " ".join(out.split()) and f"p = {test['p_value']:.3g})." in " ".join(out.split())
    assert "give more subjects" not in out
    # What the file holds is written down.
    formats = (ROOT / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")
    block = stored["verification"]
    keys = {*stored, *stored["method"]["parameters"], *stored["method"]["parameters"]["rules"]["recall"]}
    keys |= {re.sub("_(recall|suppression)$", "_<role>", key) for key in block}
    keys |= {
        *block["dissociation"]["recall"],
        *block["ablate_recall"],
        *block["ablate_random_like_recall"]["p_remaining"],
    }
    assert {key for key in keys - {"schema"} if not re.search(rf"\W{key}\W", formats)} == set()


def test_ranking_by_raw_logits(planted_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(identify_planted(planted_folder, "--method", "dla", "--rank-by", "raw", "--json")) == 0
    parameters = json.loads(capsys.readouterr().out)["method"]["parameters"]
    assert parameters["rank_by"] == "raw"
    assert parameters["rules"]["recall"] == {"rank": "dla.target", "sign": 1.0, "confirm": ["dla.target"]}


# --- the analysis stage -----------------------------------------------------------------------------------------------


def identify_words(model: Path, task: Path, out: str, *more: str) -> list[str]:
    words = ["identify", str(model), "--task", str(task), "--out", out, "--top", "2", "--max-examples", "6"]
    return [*words, "--wandb", "disabled", *more]


def test_methods_are_listed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    from headtune.analysis.methods.registry import METHODS

    with pytest.raises(SystemExit) as caught:
        main(["identify", "--list-methods"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(METHODS[line.split()[0]].summary in line for line in lines)


def test_refusals_of_identify(refused: Refusals, task: Path, tiny_llama: Path, tmp_path: Path) -> None:
    def message(*more: str) -> str:
        return refused(*identify_words(tiny_llama, task, "heads", *more))

    assert "'nonsense' is unknown" in message("--method", "nonsense")
    assert "'ablaton' is unknown; did you mean 'ablation'?" in message("--method", "dla,ablaton")
    assert "'' is unknown" in message("--method", "dla,")
    for bad in ("bad", "=x", "two words=heads.json", "a/b=heads.json"):
        assert f"--control {bad!r} must look like" in message("--control", bad)
    assert "'none.json' does not exist" in message("--control", "mine=none.json")
    head_set(loading.load_model(str(tiny_llama)).identity()).save(tmp_path / "heads.json")
    assert "a second time" in message("--control", "mine=heads.json", "--control", "mine=heads.json")
    head_set(loading.load_model(str(tiny_llama)).identity(), n_heads=12).save(tmp_path / "heads.json")
    assert "n_heads 12" in message("--control", "mine=heads.json")
    for threshold in ("-1", "nan", "inf"):
        assert "threshold" in message(f"--threshold={threshold}")
    assert "has no chat template" in message("--chat-template")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--top", "0"], "argument --top: '0' must be a whole number, at least 1, or 'elbow'"),
        (["--top", "2.5"], "argument --top: '2.5' must be a whole number, at least 1, or 'elbow'"),
        (["--top", "elbows"], "argument --top: 'elbows' must be a whole number, at least 1, or 'elbow'"),
        (["--verify-top", "0"], "argument --verify-top: '0' must be a whole number, at least 1"),
        (["--max-examples", "-3"], "argument --max-examples: '-3' must be a whole number, at least 1"),
        (["--max-examples", "few"], "argument --max-examples: 'few' must be a whole number, at least 1"),
        (["--max-memory", "12parsecs"], "argument --max-memory: '12parsecs' is not a size; write for example 2GiB"),
        (["--max-memory", "0"], "argument --max-memory: '0' is not a size"),
        (["--threshold", "high"], "argument --threshold: invalid float value: 'high'"),
        (["--wandb", "maybe"], "argument --wandb: invalid choice: 'maybe'"),
        (["--rank-by", "size"], "argument --rank-by: invalid choice: 'size'"),
    ],
)
def test_bad_usage_of_identify(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["identify", "no-model", "--task", "no-task", "--out", "heads", *words])
    assert caught.value.code == 2
    assert f"error: {expected}" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("2GiB", 2 << 30),
        ("500MB", 500 << 20),
        ("1g", 1 << 30),
        ("1.5 kib", 1536),
        (" 3T ", 3 << 40),
        ("10b", 10),
        ("0.5k", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "0.2", "1gg", "1 g b", "1,5g", "0GiB", "12parsecs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size; write for example 2GiB or 500MB"):
        memory(text)


@pytest.mark.slow
def test_little_memory_gives_the_same_numbers(task: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One counterfactual run at a time instead of all together."""
    import numpy as np

    from headtune.analysis.interventions import last_token

    sizes = []
    right = last_token.rows_in_memory

    def spy(*arguments: Any, **options: Any) -> int:
        sizes.append(right(*arguments, **options))
        return sizes[-1]

    monkeypatch.setattr(last_token, "rows_in_memory", spy)
    scores, batches = [], []
    for out, more in (("much", ["--max-memory", "1GiB"]), ("little", ["--max-memory", "1kB"])):
        sizes.clear()
        words = identify_words(tiny_llama, task, out, "--method", "ablation,path,ablation_all", *more)
        assert main([*words, "--max-examples", "3"]) == 0
        scores.append(load_means(Path(out) / "scores.safetensors"))
        batches.append(max(sizes))
    assert batches[0] > 100 and batches[1] == 1
    assert scores[0].keys() == scores[1].keys()
    for name, value in scores[0].items():
        assert np.allclose(scores[1][name], value, atol=1e-5), name


@pytest.mark.slow
def test_gates_from_start_to_report(
    task: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No intervals and no stability: what prints, tracks and draws must not ask for them."""
    assert main(identify_words(tiny_llama, task, "heads", "--method", "gates")) == 0
    assert "no stability: one fit for the whole task" in capsys.readouterr().out
    stored = json.loads((tmp_path / "heads" / "heads.json").read_text())
    assert stored["roles"]["recall"] or stored["roles"]["suppression"]
    assert stored["stability"]["recall"] is None
    before = (tmp_path / "heads" / "report.html").read_text()
    assert main(["report", "heads"]) == 0
    assert (tmp_path / "heads" / "report.html").read_text() == before


@pytest.mark.slow
def test_the_elbow_and_a_control_on_the_command_line(
    task: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head_set(loading.load_model(str(tiny_llama)).identity()).save(tmp_path / "other" / "heads.json")
    words = ["elbow" if word == "2" else word for word in identify_words(tiny_llama, task, "heads")]
    assert main([*words, "--control", "mine=other", "--control", "file=other/heads.json", "--threshold", "0.01"]) == 0
    capsys.readouterr()
    stored = json.loads((tmp_path / "heads" / "heads.json").read_text())
    parameters = stored["method"]["parameters"]
    assert parameters["top"] == "elbow" and parameters["threshold"] == 0.01
    assert parameters["controls"] == {"mine": "cities", "file": "cities"}
    for role, ranked in stored["roles"].items():
        assert all(abs(entry["score"]) >= 0.01 for entry in ranked)
        if ranked:
            assert stored["verification"][f"ablate_control_mine_{role}"]["heads"]


def test_a_chat_model(task: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """`--chat-template` wraps the prompts of identify and of a study, and another task is what it then is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}<eos>{{ m.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chatty")
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "chatty")
    shas = []
    for out, more in (("plain", []), ("chat", ["--chat-template"])):
        assert main(identify_words(tmp_path / "chatty", task, out, "--method", "dla", *more)) == 0
        shas.append(json.loads((tmp_path / out / "heads.json").read_text())["task"]["sha256"])
        study = ["analyse", "elbow", str(tmp_path / "chatty"), "--task", str(task), "--out", f"study-{out}", *more]
        assert main([*study, "--max-examples", "4", "-o", "top=2"]) == 0
        assert json.loads((tmp_path / f"study-{out}" / "analysis.json").read_text())["task"]["n_examples"] == 4
    means = [load_means(tmp_path / out / "scores.safetensors")["dla.target"] for out in ("plain", "chat")]
    assert shas[0] != shas[1] and abs(means[0] - means[1]).max() > 1e-3


def test_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from headtune.analysis.studies.base import STUDIES, options_of

    assert main(["analyse", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [f"{name}: {study.summary}" for name, study in STUDIES.items()]
    assert lines[1 + 2 * list(STUDIES).index("path_patching")] == "    options: receivers='', top=8, seed=0"
    assert main(["analyse", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == {name: {key: p.default for key, p in options_of(name).items()} for name in STUDIES}


def test_a_study_on_the_command_line(
    task: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["analyse", "path_patching", str(tiny_llama), "--task", str(task), "--max-examples", "2", "--seed", "5"]
    assert main([*words, "-o", "top=3", "--option", "receivers=L2H1:query", "--out", "runs/study"]) == 0
    printed = capsys.readouterr().out
    assert "To L2H1's query: remaining answers" in printed and "runs/study: analysis.json, report.html" in printed
    stored = json.loads((tmp_path / "runs" / "study" / "analysis.json").read_text())
    assert stored["options"] == {"receivers": "L2H1:query", "top": 3, "seed": 5}
    assert stored["task"]["n_examples"] == 2 and stored["data"]["receivers"] == [[2, 1, "query"]]

    assert main([*words, "-o", "seed=6", "--out", "runs/other", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "runs" / "other" / "analysis.json").read_text())
    assert data == stored["data"] and stored["options"]["seed"] == 6 and stored["options"]["top"] == 8


def test_refusals_of_a_study(
    refused: Refusals, task: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [str(tiny_llama), "--task", str(task), "--out", "study"]
    assert "'elbo' is unknown; did you mean 'elbow'?" in refused("analyse", "elbo", *whole)
    assert "needs a model" in refused("analyse", "elbow", "--task", task, "--out", "study")
    assert "needs --task" in refused("analyse", "elbow", tiny_llama, "--out", "study")
    assert "needs --out" in refused("analyse", "elbow", tiny_llama, "--task", task)
    assert "no option 'tpo'; did you mean 'top'?" in refused("analyse", "elbow", *whole, "-o", "tpo=3")
    assert "option 'top' of 'elbow' is 'three'; expected int" in refused("analyse", "elbow", *whole, "-o", "top=three")
    assert "expected int" in refused("analyse", "elbow", *whole, "-o", "top=true")
    assert "expected int" in refused("analyse", "elbow", *whole, "-o", "top=")
    assert "'top' must look like key=value" in refused("analyse", "elbow", *whole, "-o", "top")
    assert "the value is not YAML" in refused("analyse", "elbow", *whole, "-o", "top=[3")
    assert "option 'top' is 0" in refused("analyse", "elbow", *whole, "-o", "top=0")
    assert "must look like L23H3:query" in refused("analyse", "path_patching", *whole, "-o", "receivers=L1H1")
    assert "'no-such-model'" in refused("analyse", "elbow", "no-such-model", "--task", task, "--out", "study")
    assert "'nowhere.jsonl'" in refused("analyse", "elbow", tiny_llama, "--task", "nowhere.jsonl", "--out", "study")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert "exists and is not empty" in refused("analyse", "elbow", tiny_llama, "--task", task, "--out", "full")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refused("analyse", "elbow", *whole)


def test_building_a_task_from_a_relation(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refusals) -> None:
    pairs = [("Colosseum", "Italy"), ("Uffizi", "Italy"), ("Louvre", "France"), ("Orsay", "France"), ("Prado", "Spain")]
    rows = [{"subject": subject, "object": thing} for subject, thing in pairs]
    (tmp_path / "landmarks.json").write_text(json.dumps({"samples": rows}))
    words = ["task", "build", "landmarks.json", "--previous", "1"]
    assert main([*words, "--invert", "--out", "mine.jsonl"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "mine.jsonl: 2 examples, 2 subjects\n"
    assert {example.subject: example.answers for example in load_task("mine.jsonl").examples} == {
        "Italy": ("Colosseum", "Uffizi"),
        "France": ("Louvre", "Orsay"),
    }
    assert "must map to a list" in refused(*words, "--out", "other.jsonl")
    (tmp_path / "facts.json").write_text(json.dumps({"Italy": ["Rome", "Milan"]}))
    assert "must hold a list of" in refused("task", "build", "facts.json", "--invert", "--out", "other.jsonl")


# --- other processes --------------------------------------------------------------------------------------------------


def test_help_is_cheap() -> None:
    script = (
        "import sys\n"
        "from headtune.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'wandb', 'datasets', 'matplotlib', 'rich', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "identify" in done.stdout and "export" in done.stdout


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "identify",
        "analyse",
        "train",
        "plan",
        "evaluate",
        "export",
        "compare",
        "report",
        "recipes",
        "task",
        "demo",
    ):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"headtune {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_module_is_the_command(tmp_path: Path) -> None:
    """`python -m headtune.train R ...`, `headtune train R ...` and the console script end alike."""
    folder = Path(sys.executable).parent
    results = []
    for command in ([sys.executable, "-m", "headtune.train"], [str(folder / "headtune"), "train"]):
        done = subprocess.run([*command, "lofit/nothing", "seed=1"], capture_output=True, text=True, cwd=tmp_path)
        results.append((done.returncode, done.stdout, done.stderr))
    assert results[0] == results[1]
    code, out, err = results[0]
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "'lofit/nothing'" in err
