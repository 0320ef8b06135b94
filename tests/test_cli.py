"""The command line: what is wrong is said in one line, with exit code 2, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import head_set, train, write_recipe, write_task

from headtune.analysis import model as models
from headtune.analysis.tasks import load_task
from headtune.train import recipe as recipes
from headtune.train.cli import main


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
    assert "'bert' is not supported; supported: llama" in refused("train", recipe, f"model.name={tmp_path / 'bert'}")


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
    head_set(models.load(str(tiny_llama)).identity(), n_heads=12).write(tmp_path / "heads.json")
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
    assert "line 2" in refused("train", "bad.yaml")
    assert "line 2" in refused("recipes", "validate", "bad.yaml")


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
    assert "needs the name" in refused("recipes", "show")
    assert "accelerate_configs" in refused("train", recipe, "--config_file", "nowhere.yaml")


@pytest.mark.parametrize("words", [[], ["tran"], ["train"], ["train", "x", "--reusme"], ["evaluate", "x", "--unknown"]])
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
    assert main(["task", "show", "mine.jsonl"]) == 0
    assert capsys.readouterr().out == (tmp_path / "mine.jsonl").read_text()

    assert "exists" in refused(*words, "--out", "mine.jsonl")
    assert "--out" in refused(*words)
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
    assert json.loads(output("schema"))["properties"]["recipe"]["enum"] == ["lofit", "lora", "steer"]


def test_identify_writes_what_a_recipe_reads(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny import save_tiny

    model = save_tiny(tmp_path / "model", "llama", seed=7)  # chance gives this one heads of both roles
    options: list[Any] = ["--method", "dla", "--top", "2", "--max-examples", "8", "--wandb", "disabled", "--json"]
    assert main(["identify", str(model), "--task", f"{task}:train", "--out", "heads", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "heads" / "heads.json").read_text())
    assert {"scores.safetensors", "report.html", "heads.json"} <= {path.name for path in (tmp_path / "heads").iterdir()}
    recipe = write_recipe(tmp_path, model, recipe="steer", method={"factor": 2.0}, training=None)
    assert train(recipe, "heads={from: heads, top: 1}") == 0
    used = json.loads((tmp_path / "run" / "run.json").read_text())["heads"]
    assert used == sorted([entry["layer"], entry["head"]] for role in printed["roles"].values() for entry in role[:1])
    capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out.strip() == "run/report.html"


# --- other processes --------------------------------------------------------------------------------------------------


def test_help_is_cheap() -> None:
    script = (
        "import sys\n"
        "from headtune.train.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'wandb', 'datasets', 'matplotlib', 'rich', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "identify" in done.stdout and "export" in done.stdout


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("identify", "train", "evaluate", "export", "compare", "report", "recipes", "task", "demo"):
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
