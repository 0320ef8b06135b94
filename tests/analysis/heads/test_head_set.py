"""heads.json comes back as it was written, and whatever does not fit is refused in one line."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from headtune.analysis.heads.controls import random_like
from headtune.analysis.heads.head_set import HeadSet, RankedHead, provenance
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.utils.errors import InputError
from helpers.tiny import tiny_model, tiny_tokenizer

MODEL: dict[str, Any] = {
    "name": "some-model",
    "weights_sha256": "aa",
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
}


def a_head_set(**changes: Any) -> HeadSet:
    roles = {
        "recall": (RankedHead(2, 3, 1.5, (1.0, 2.0), {"dla.target": 1.5}), RankedHead(0, 0, 0.5, (0.1, 0.9))),
        "suppression": (RankedHead(1, 1, -2.0, (-2.5, -1.5)),),
    }
    blocks: dict[str, Any] = {
        "model": MODEL,
        "task": {"name": "cities", "dropped": {"a reason": 1}},
        "method": {"name": "all", "parameters": {"top": 8}, "seed": 0},
        "roles": roles,
        "verification": {"baseline": {"p_remaining": {"mean": 0.5, "ci": [0.4, 0.6]}}},
        "stability": {"recall": 0.9, "suppression": 1.0, "bootstrap": 200},
        **provenance(),
    }
    return HeadSet(**(blocks | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "heads.json"


def test_round_trip(path: Path) -> None:
    heads = a_head_set()
    heads.save(path)
    assert HeadSet.load(path) == HeadSet.load(path.parent) == heads
    heads.save(path.parent / "folder")
    assert HeadSet.load(path.parent / "folder" / "heads.json") == heads
    assert json.loads(path.read_text())["schema"] == 1


def test_provenance_names_versions_time_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/headtune", "identify", "m"])
    found = provenance()
    assert found["command"] == "headtune identify m"
    assert set(found["versions"]) == {"headtune", "torch", "transformers", "peft", "trl"}
    assert found["created"].endswith("+00:00")


def test_top() -> None:
    heads = a_head_set()
    assert heads.top("recall") == [(2, 3), (0, 0)]
    assert heads.top("recall", 1) == [(2, 3)]
    with pytest.raises(InputError, match="asked for the top 3 recall heads, the head set holds 2; lower top"):
        heads.top("recall", 3)
    with pytest.raises(InputError, match="head role 'supression' is not in this head set; did you mean 'suppression'"):
        heads.top("supression")


def test_names() -> None:
    assert RankedHead(23, 3, 0.0, (0.0, 0.0)).name == "L23H3"


def entry(**changes: Any) -> dict[str, Any]:
    return {"layer": 1, "head": 1, "score": 1.0, "ci": [0.5, 1.5], "effect": {}} | changes


def with_entries(*entries: Any) -> dict[str, Any]:
    return {"roles": {"recall": list(entries)}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "schema 2": ({"schema": 2}, "has schema 2, this version reads schema 1; run headtune identify again"),
    "no schema": ({"schema": None}, "has schema None"),
    "unknown key": ({"verificaton": {}}, "unknown key 'verificaton'; did you mean 'verification'?"),
    "no model": ({"model": None}, "block 'model' is missing"),
    "no task": ({"task": None}, "block 'task' is missing"),
    "no method": ({"method": []}, "block 'method' is missing"),
    "no roles": ({"roles": None}, "block 'roles' is missing"),
    "no layers": ({"model": MODEL | {"n_layers": "3"}}, "model.n_layers must be a whole number, found '3'"),
    "no head_dim": ({"model": {k: v for k, v in MODEL.items() if k != "head_dim"}}, "model.head_dim must be"),
    "layer too large": (with_entries(entry(layer=3)), "recall head L3H1 is out of range; the model has 3 layers"),
    "head too large": (with_entries(entry(head=4)), "recall head L1H4 is out of range; the model has 4 heads"),
    "negative": (with_entries(entry(layer=-1)), "recall head L-1H1 is out of range"),
    "fraction": (with_entries(entry(layer=1.5)), "recall head L1.5H1 is out of range"),
    "true": (with_entries(entry(layer=True)), "out of range"),
    "twice": (with_entries(entry(), entry(score=2.0)), "recall names L1H1 twice; remove one"),
    "NaN score": (with_entries(entry(score=math.nan)), "recall head L1H1 has a score that is not finite"),
    "infinite score": (with_entries(entry(score=math.inf)), "not finite"),
    "NaN interval": (with_entries(entry(ci=[math.nan, 1.0])), "not finite"),
    "NaN effect": (with_entries(entry(effect={"x": math.nan})), "not finite"),
    "no score": (with_entries({"layer": 1, "head": 1}), "needs layer, head, score and ci"),
    "score not a number": (with_entries(entry(score="high")), "needs layer, head, score and ci"),
    "interval not a pair": (with_entries(entry(ci=[1.0])), "needs layer, head, score and ci"),
    "interval of words": (with_entries(entry(ci="ab")), "needs layer, head, score and ci"),
    "effect of words": (with_entries(entry(effect={"x": "high"})), "needs layer, head, score and ci"),
    "a pair": (with_entries([1, 1]), "needs layer, head, score and ci"),
    "role not a list": ({"roles": {"recall": None}}, "role 'recall' must be a list of heads"),
    "stability null": ({"stability": None}, "block 'stability' must be an object, found None"),
    "stability of words": ({"stability": {"recall": "x"}}, "stability.recall must be a number or null, found 'x'"),
    "versions null": ({"versions": None}, "block 'versions' must be an object, found None"),
    "dropped of words": ({"task": {"dropped": "x"}}, "task.dropped must be an object, found 'x'"),
    "verification null": ({"verification": None}, "block 'verification' must be an object, found None"),
    "baseline a number": ({"verification": {"baseline": 5}}, "'verification' is not what identify writes"),
    "no interval": ({"verification": {"baseline": {"p_remaining": {"mean": 0.5}}}}, "is not what identify writes"),
    "no reason": ({"verification": {"dissociation": {"recall": {}}}}, "is not what identify writes"),
    "role a number": ({"roles": {"recall": 3}}, "role 'recall' must be a list of heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, path: Path) -> None:
    changes, message = REFUSED[case]
    a_head_set().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))  # json writes NaN and Infinity as literals
    with pytest.raises(InputError) as refusal:
        HeadSet.load(path)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_same_head_may_have_two_roles(path: Path) -> None:
    same = (RankedHead(1, 1, 1.0, (0.5, 1.5)),)
    a_head_set(roles={"recall": same, "suppression": same}).save(path)
    assert HeadSet.load(path).top("recall") == HeadSet.load(path).top("suppression")


def test_files_that_are_not_head_sets(path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; headtune identify writes one"):
        HeadSet.load(path)
    with pytest.raises(InputError, match=r"heads\.json' does not exist; headtune identify writes one"):
        HeadSet.load(path.parent)
    page = path.with_name("report.html")
    page.write_text("<html>")
    with pytest.raises(InputError, match=r"is not JSON; give the folder that holds it, or its heads\.json"):
        HeadSet.load(page)
    for text, message in (("{", "is not JSON"), ("[]", "has schema 'list'"), ("\xff", "is not JSON")):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=message):
            HeadSet.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_set_with_nan_is_not_written(path: Path, value: float) -> None:
    heads = a_head_set(roles={"recall": (RankedHead(0, 0, value, (0.0, 0.0)),)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        heads.save(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("key", ["n_layers", "n_heads", "head_dim"])
def test_a_model_of_another_shape_is_refused(key: str) -> None:
    expected = rf"head set of 'some-model' has {key} {MODEL[key]}, but 'other' has 7; run headtune identify"
    with pytest.raises(InputError, match=expected):
        a_head_set().check_model(MODEL | {"name": "other", key: 7})


def test_other_weights_are_a_warning() -> None:
    heads = a_head_set()
    assert heads.check_model(MODEL) == []
    (warning,) = heads.check_model(MODEL | {"name": "other", "weights_sha256": "bb"})
    assert "other weights ('some-model') than 'other'" in warning


def test_fit_of_real_identities() -> None:
    one, other, wide = (
        wrap_model(tiny_model("llama", seed, **config), tiny_tokenizer(), "tiny").identity()
        for seed, config in ((0, {}), (1, {}), (0, {"head_dim": 16}))
    )
    heads = a_head_set(model=one)
    assert heads.check_model(one) == []
    assert len(heads.check_model(other)) == 1
    with pytest.raises(InputError, match="has head_dim 8, but 'tiny' has 16"):
        heads.check_model(wide)


# --- matched random heads ---------------------------------------------------------------------------------------------

CHOSEN = [(0, 1), (2, 0), (2, 3), (5, 8)]


def test_random_like_matches_layers_and_never_picks_the_chosen() -> None:
    for seed in range(50):
        drawn = random_like(CHOSEN, 9, seed)
        assert Counter(layer for layer, _ in drawn) == Counter(layer for layer, _ in CHOSEN)
        assert len(set(drawn)) == len(drawn)
        assert not set(drawn) & {*CHOSEN}
        assert all(0 <= head < 9 for _, head in drawn)


def test_random_like_is_seeded_and_uses_all_that_is_free() -> None:
    assert random_like(CHOSEN, 9, 3) == random_like(list(reversed(CHOSEN)), 9, 3)
    drawn = {pair for seed in range(200) for pair in random_like(CHOSEN, 9, seed)}
    assert drawn == {(layer, head) for layer in (0, 2, 5) for head in range(9)} - set(CHOSEN)


def test_random_like_of_a_crowded_layer_is_all_that_is_free_and_some_of_the_chosen() -> None:
    for seed in range(20):
        drawn = random_like([(0, 0), (2, 0), (2, 1), (2, 2)], 4, seed)
        assert len(set(drawn)) == 4 and (2, 3) in drawn and (0, 0) not in drawn
        assert sum(head in [(2, 0), (2, 1), (2, 2)] for head in drawn) == 2
    assert sorted(random_like([(2, 0), (2, 1)], 4, 0)) == [(2, 2), (2, 3)]
