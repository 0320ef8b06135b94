"""`silence:` on the command line: which heads, which controls, what is written down, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headtune.analysis.heads import at_test_time
from headtune.analysis.heads.at_test_time import Silence, applied, parse
from headtune.analysis.heads.head_set import HeadSet, RankedHead
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.tasks.task import to_jsonl
from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.runs.evaluate_target import evaluate_target, target_of
from helpers.tiny import save_tiny, tiny_task, tiny_tokenizer

ROLES = {"memory": [(0, 1), (2, 3), (1, 1)], "context": [(0, 0), (1, 2)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("silence") / "model", "llama", num_key_value_heads=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> HeadModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def heads(model: HeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("silence-heads")
    ranked = {role: tuple(RankedHead(*pair, 1.0, None) for pair in pairs) for role, pairs in ROLES.items()}
    HeadSet(model.identity(), {"name": "cities"}, {"name": "all", "parameters": {"top": 8}}, ranked).save(path)
    return path


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("silence-task") / "cities.jsonl"
    path.write_text(to_jsonl(tiny_task().examples), encoding="utf-8")
    return path


def test_it_silences_the_top_heads_of_a_role(model: HeadModel, heads: Path) -> None:
    tokens = tiny_tokenizer()("List five cities in Italy.", return_tensors="pt").input_ids
    with torch.no_grad():
        with hooks.ablate(model, [(0, 1), (2, 3)]):
            expected = model.hf(tokens).logits
        with applied(model, parse([f"silence:from={heads},role=memory,top=2"])) as notes:
            assert torch.equal(model.hf(tokens).logits, expected)
        assert not torch.allclose(model.hf(tokens).logits, expected, atol=1e-4)
    assert notes == [
        {
            "knob": "silence",
            "from": str(heads),
            "role": "memory",
            "top": 2,
            "how": "zero",
            "heads": [[0, 1], [2, 3]],
        }
    ]
    with applied(model, [Silence(str(heads / "heads.json"), "context", 1, "mean", 3)]) as notes:
        assert (notes[0]["mean_over"], notes[0]["random"]) == ("the neutral text", 3)


def test_random_heads_share_none_with_the_top_of_any_role(heads: Path) -> None:
    chosen = {(0, 1), (2, 3)}
    best = chosen | {(0, 0), (1, 2)}
    draws = [set(Silence(str(heads), "memory", 2, random=seed).heads()) for seed in range(12)]
    assert all(sorted(layer for layer, _ in draw) == [0, 2] and not draw & best for draw in draws)
    assert len({frozenset(draw) for draw in draws}) > 1
    assert draws[3] == set(Silence(str(heads), "memory", 2, random=3).heads())


def test_settings_beside_others(heads: Path) -> None:
    knobs = parse(["sink:tau=0.6", f"silence:from={heads},role=memory,top=1,how=uniform,random=4"])
    assert knobs[1] == Silence(str(heads), "memory", 1, "uniform", 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("role=memory", "from=FOLDER is missing"),
        ("from=HEADS,role=memry", "head role 'memry' is not in this head set; did you mean 'memory'?"),
        ("from=HEADS,role=memory,top=9", "top=9 asked: identify kept at most 8"),
        ("from=HEADS,role=memory,top=0", "top 0 must be at least 1"),
        ("from=HEADS,role=memory,top=two", "top='two' is not a whole number"),
        ("from=HEADS,role=memory,top=1,how=none", "how='none' is unknown; known: mean, streaming, uniform, zero"),
        ("from=HEADS,role=memory,top=1,seed=1", "unknown setting 'seed'"),
        ("from=HEADS,from=HEADS", "must be from=VALUE, once"),
        ("from=nowhere,role=memory", "'nowhere/heads.json' does not exist|'nowhere' does not exist"),
        ("from=HEADS,role=both,top=1", "holds the roles memory, context"),
    ],
)
def test_bad_settings_are_refused_in_one_line(heads: Path, settings: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        parse(["silence:" + settings.replace("HEADS", str(heads))])
    assert "\n" not in str(caught.value)


def test_too_few_heads_for_a_control_and_another_model(model: HeadModel, heads: Path, tmp_path: Path) -> None:
    crowd = HeadSet.load(heads)
    every = tuple(RankedHead(0, head, 1.0, None) for head in range(3))
    HeadSet(crowd.model, crowd.task, crowd.method, {"memory": every}).save(tmp_path)
    with pytest.raises(InputError, match=r"needs 3 heads of layer 0 .* there are 1; lower top=3"):
        Silence(str(tmp_path), "memory", 3, random=0)
    HeadSet(crowd.model | {"n_heads": 8}, crowd.task, crowd.method, {"memory": every}).save(tmp_path)
    with pytest.raises(InputError, match="has n_heads 8"), applied(model, [Silence(str(tmp_path), "memory", 3)]):
        pass


def test_evaluate_from_the_command_line_and_python(
    folder: Path, heads: Path, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"silence:from={heads},role=memory,top=2,how=uniform"

    def evaluate(*options: str) -> dict[str, Any]:
        assert main(["evaluate", str(folder), "--task", str(task_file), "--max-examples", "4", "--json", *options]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    plain, silenced = evaluate(), evaluate("--intervene", text, "--out", str(tmp_path / "out"))
    assert silenced["metrics"]["p_remaining"]["mean"] != pytest.approx(
        plain["metrics"]["p_remaining"]["mean"], rel=1e-4
    )
    assert silenced["knobs"][0]["heads"] == [[0, 1], [2, 3]]
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["knobs"] == [text] and written["interventions"] == silenced["knobs"]
    again = evaluate_target(target_of(folder, str(task_file), max_examples=4, knobs=[text]))
    assert again.metrics["p_remaining"] == silenced["metrics"]["p_remaining"]
    assert main(["evaluate", "no-such-model", "--task", str(task_file), "--intervene", "silence:role=memory"]) == 2
    error = capsys.readouterr().err
    assert "from=FOLDER is missing" in error and error.count("\n") == 1
    assert at_test_time.INTERVENTIONS.keys() == {"sink", "intercept", "silence"}
