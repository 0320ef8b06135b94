"""How the command line behaves: help, completion, validation by line, how much it says."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headtune.analysis.identify.pipeline import identify
from headtune.analysis.models import loading
from headtune.analysis.tasks.loading import builtin_names
from headtune.analysis.utils.stats import ENOUGH_SUBJECTS, FEW_SUBJECTS
from headtune.cli import console
from headtune.cli import main as cli
from headtune.cli.main import main
from headtune.cli.tables import metrics_table
from headtune.train.config.recipe import load_recipe, recipe_names
from helpers.small_runs import write_task
from helpers.tiny import tiny_task

LONG = ("identify", "analyse", "train", "evaluate", "export", "sweep", "demo")


@pytest.fixture(autouse=True)
def own_place(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    logging.getLogger("headtune").setLevel(logging.NOTSET)


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and every action of one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield (*words, name)
                yield from commands(below, (*words, name))


ALL = list(commands(cli._parser()))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_has_examples_that_are_command_lines(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    _, _, examples = capsys.readouterr().out.partition("\nexample")
    lines = [line.strip() for line in examples.splitlines()[1:] if line.strip()]
    assert lines
    for line in lines:
        assert line.startswith("headtune ")
        arguments, rest = cli._parser().parse_known_args(line.partition(" > ")[0].split()[1:])
        assert not [word for word in rest if word.startswith("-")] and arguments.command == words[0]
        if "recipe" in arguments and arguments.command != "compare" and "my_recipe" not in arguments.recipe:
            load_recipe(arguments.recipe, [*arguments.overrides, *rest])


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"headtune {version('headtune')}\n"


@pytest.mark.slow
def test_importing_the_analysis_is_cheap() -> None:
    """Every module of it together brings in what only training, tracking and drawing need at their use."""
    script = (
        "import importlib, pkgutil, sys, headtune.analysis as package\n"
        "assert 'torch' not in sys.modules\n"
        "names = [module.name for module in pkgutil.walk_packages(package.__path__, 'headtune.analysis.')]\n"
        "assert len(names) > 40\n"
        "for name in names:\n"
        "    if not name.endswith('__main__'): importlib.import_module(name)\n"
        "heavy = {'trl', 'peft', 'wandb', 'deepspeed', 'matplotlib', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- validation -------------------------------------------------------------------------------------------------------

BAD = """# a comment
recipe: lofit
model: {name: smollm2-135m, dtpye: float32}
heads:
  top: many
task:
  train: one_to_many
training:
  max_stpes: 40
  learning_rate: fast
seed: 1
seed: -3
"""


def test_all_errors_at_once_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(BAD)
    assert main(["validate", "bad.yaml"]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split(": ")[0] for line in lines] == [
        "bad.yaml:3:29",
        "bad.yaml:5:8",
        "bad.yaml:9:3",
        "bad.yaml:10:18",
        "bad.yaml:12:7",
        "bad.yaml:12:7",
    ]
    assert "did you mean 'dtype'?" in lines[0] and "found 'many'" in lines[1] and "max_steps" in lines[2]
    assert any("'seed' is given twice" in line for line in lines[4:])
    assert main(["recipes", "validate", "bad.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == lines
    assert main(["train", "bad.yaml"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [f"headtune: {lines[0]} (and 5 more: see headtune validate)"]


def test_an_override_is_named_and_not_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "lofit/one_to_many", "evaluation.n_items=0", "method.scael=head"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("lofit/one_to_many: override evaluation.n_items=...: evaluation.n_items: ")
    assert lines[1] == (
        "lofit/one_to_many: override method.scael=...: unknown key 'method.scael'; did you mean 'scale'?"
    )


def test_contradictions_and_malformed_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("steer.yaml").write_text("recipe: steer\nmethod: {kind: sink}\nheads:\n  all: true\n")
    Path("cut.yaml").write_text("recipe: [lofit\nseed: 1\n")
    assert main(["validate", "steer.yaml", "cut.yaml", "nowhere.yaml", "lofit/relations", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["steer.yaml"] == ["steer.yaml:3:1: method.kind 'sink' finds its own heads; remove heads"]
    assert found["cut.yaml"][0].startswith("cut.yaml:2:5: not YAML: ")
    assert "'nowhere.yaml' is neither a file nor built in" in found["nowhere.yaml"][0]
    assert found["lofit/relations"] == []
    assert main(["validate", "seed=1"]) == 2
    assert "needs a recipe" in capsys.readouterr().err


def test_numbers_of_training_are_refused_with_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    Path("zero.yaml").write_text(
        "recipe: lofit\nheads: {all: true}\ntraining:\n  max_steps: 0\n  learning_rate: .nan\nseed: -1\n"
    )
    assert main(["validate", "zero.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["zero.yaml:4:14", "zero.yaml:5:18", "zero.yaml:6:7"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lofit/relations", "training.max_steps", "20"], "did you mean training.max_steps=20?"),
        (["lofit/relations", "heads={from:", "runs/heads,", "top:", "4}"], "heads='...'"),
    ],
)
def test_an_override_taken_apart_is_told_once(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and expected in captured.err


def test_a_mistyped_file_beside_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "lofit/relations", "seed=1", "nofile.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("lofit/relations: valid") and "train --dry-run" in captured.out
    assert "'nofile.yaml' is neither" in captured.err and len(captured.err) < 200


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["trian", "lofit/relations"],
            "headtune: error: argument COMMAND: invalid choice: 'trian': did you mean 'train'?; see: headtune --help",
        ),
        (
            ["recipes", "xyz"],
            "headtune recipes: error: argument ACTION: invalid choice: 'xyz': known: ",
        ),
        (
            ["identify", "m", "--task", "t", "--out", "h", "--max-exmples", "4"],
            "headtune identify: error: unrecognized arguments: --max-exmples 4; did you mean --max-examples?; "
            "see: headtune identify --help",
        ),
        (
            ["identify", "m", "--task", "t", "--out", "h", "--limit", "4"],
            "headtune identify: error: unrecognized arguments: --limit 4; see: headtune identify --help",
        ),
        (
            ["sweep", "lofit/relations", "--seeds", "0"],
            "headtune sweep: error: argument --seeds: ",
        ),
        (["recipes", "show"], "headtune recipes show: error: the following arguments are required: name; "),
    ],
)
def test_bad_usage_is_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith(expected)


def test_valid_recipes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "lofit/relations", "lora/relations"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and [line.split(" (")[0] for line in captured.out.splitlines()] == [
        "lofit/relations: valid",
        "lora/relations: valid",
    ]


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out)
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "mine.txt").write_text("")
    lines = {
        "trai": ["train"],
        "train lofit/m": [name for name in recipe_names() if name.startswith("lofit/m")],
        "train mine": ["mine.yaml"],
        "train x --res": ["--resume"],
        "recipes show seekr/t": ["seekr/trace"],
        "validate lora/": ["lora/one_to_many", "lora/relations"],
        "identify smol": ["smollm2-135m"],
        "identify x --task ": [*builtin_names()],
        "plan x --engine z": ["zero1", "zero2", "zero3"],
    }
    script = "source completion.bash\n"
    for line in lines:
        words = ["headtune", *line.split(" ")]
        script += (
            f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
            f"_shtab_headtune '' {words[-1]!r} ''; echo \"${{COMPREPLY[*]}}\"\n"
        )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    got = dict(zip(lines, (line.split() for line in done.stdout.splitlines()), strict=True))
    assert got == lines


def test_zsh_gets_the_same_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("#compdef headtune") and all(name in written for name in recipe_names())


# --- how much is said -------------------------------------------------------------------------------------------------


def test_long_commands_take_quiet_and_verbose() -> None:
    parsers = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for name in LONG:
        assert {"--quiet", "--verbose"} <= set(parsers[name]._option_string_actions), name


def test_quiet_says_nothing_but_the_result(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(tiny_llama), "--task", str(write_task(tmp_path)), "--max-examples", "2", "--items", "1"]
    said = []
    for more in ([], ["--quiet"]):
        assert main([*words, "--json", *more]) == 0
        captured = capsys.readouterr()
        said.append(captured.err)
        assert json.loads(captured.out)["metrics"]
    assert "evaluating on 2 prompts" in said[0] and said[1] == ""
    assert main(["evaluate", "none", "--task", "none.jsonl", "--quiet"]) == 2
    assert "'none.jsonl'" in capsys.readouterr().err, "an error is always said"


def test_verbose_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "none", "--task", "none.jsonl", "--verbose"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("headtune: ") and "'none.jsonl'" in lines[-1]


def test_no_colour_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    assert not console.console.is_terminal and not Console().is_terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console(force_terminal=True).no_color


@pytest.mark.parametrize("command", ["evaluate", "analyse"])
def test_ctrl_c_ends_in_one_line(
    command: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    importlib.import_module("headtune.train.runs.run")  # which would bind what is replaced here for good
    monkeypatch.setattr(loading, "load_plain", stop)
    monkeypatch.setattr(loading, "load_model", stop)
    task = str(write_task(tmp_path))
    more = {"evaluate": [str(tiny_llama)], "analyse": ["elbow", str(tiny_llama), "--out", "study"]}[command]
    before = sorted(tmp_path.iterdir())
    assert main([command, *more, "--task", task]) == 130
    assert capsys.readouterr().err == "headtune: interrupted; run the same command again\n"
    assert sorted(tmp_path.iterdir()) == before


def test_few_subjects_are_named(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By identify before it works, and below the metrics of an evaluation."""
    for n in (1, FEW_SUBJECTS - 1, FEW_SUBJECTS):
        metrics = {"exact_match": {"mean": 1.0, "ci": [0.5, 1.0]}, "n": {"examples": 9, "subjects": n}}
        caption = metrics_table({"before": metrics, "after": metrics}).caption
        note = f"{n} subject{'s' if n > 1 else ''}: the intervals say little; give {ENOUGH_SUBJECTS} or more"
        assert caption == (note if n < FEW_SUBJECTS else None)
        if n > 1:
            caplog.clear()
            identify(loading.load_model(str(tiny_llama)), tiny_task(subjects=n), "dla", top=1, n_random=1)
            warned = [line for line in caplog.messages if "intervals over so few say little" in line]
            expected = f"task cities has prompts about {n} subjects alone: intervals over so few say little; give "
            assert warned == ([f"{expected}{ENOUGH_SUBJECTS} or more"] if n < FEW_SUBJECTS else [])


def test_a_reader_that_has_gone_is_no_error() -> None:
    command = [sys.executable, "-m", "headtune", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `| head` does, here before the first line
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_broken_pipe_elsewhere_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "_reader_has_gone", lambda: False)
    monkeypatch.setattr(cli.recipes, "_list", broken)
    assert main(["recipes"]) == 2
    assert "Broken pipe" in capsys.readouterr().err
