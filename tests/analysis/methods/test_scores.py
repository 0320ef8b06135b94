"""Means, intervals and tests: around the mean, over subjects rather than examples, and honest about NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headtune.analysis.methods.scores import Scores, load_means, stack
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import mean_interval, one_sided_p, subject_weights, t_interval

SHAPE = (3, 4)


def noise(n_examples: int, seed: int = 0) -> Scores:
    values = np.random.default_rng(seed).normal(1.0, 1.0, (n_examples, *SHAPE)).astype(np.float32)
    return Scores({"dla.target": values}, [f"s{i}" for i in range(n_examples)])


def correlated(n_subjects: int = 10, each: int = 20) -> tuple[list[float], list[str]]:
    """Examples of one subject differ little, subjects differ much."""
    generator = np.random.default_rng(0)
    values = np.repeat(generator.normal(0, 1, n_subjects), each) + generator.normal(0, 0.1, n_subjects * each)
    return values.tolist(), [f"s{i}" for i in range(n_subjects) for _ in range(each)]


def test_mean_and_stack() -> None:
    rows = [{"a": np.full(SHAPE, 1.0, np.float32), "b": np.full(SHAPE, 5.0, np.float32)}, {"a": np.full(SHAPE, 2.0)}]
    scores = stack(rows, ["x", "y"])
    assert scores.mean("a") == pytest.approx(1.5)
    assert scores.mean("b") == pytest.approx(5.0)  # the example without the quantity does not count as 0
    assert np.isnan(scores.by_example["b"][1]).all()
    assert set(scores.means()) == {"a", "b"} and scores.mean("a").dtype == np.float32


def test_bootstrap_is_reproducible() -> None:
    scores = noise(20)
    assert np.array_equal(scores.bootstrap("dla.target", 50, 1), scores.bootstrap("dla.target", 50, 1))
    assert not np.array_equal(scores.bootstrap("dla.target", 50, 1), scores.bootstrap("dla.target", 50, 2))


def test_bootstrap_is_the_mean_over_the_drawn_subjects() -> None:
    """Against a loop: draw subjects, gather all their examples, take the mean."""
    values = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)
    subjects = ["b", "a", "b", "c", "a", "b"]
    drawn = Scores({"x": values}, subjects).bootstrap("x", 5, 7)
    for weights, found in zip(subject_weights(subjects, 5, 7), drawn, strict=True):
        for name in "abc":  # all the examples of a subject come together
            assert len({w for w, s in zip(weights, subjects, strict=True) if s == name}) == 1
        rows = [values[i] for i, weight in enumerate(weights) for _ in range(int(weight))]
        assert found == pytest.approx(np.mean(rows, axis=0), abs=1e-6)
        assert sum(weights[subjects.index(name)] for name in "abc") == 3


def test_intervals_cover_the_mean() -> None:
    scores = noise(20)
    low, high = scores.interval("dla.target")
    assert low.shape == high.shape == SHAPE
    assert np.all(low < scores.mean("dla.target")) and np.all(scores.mean("dla.target") < high)
    narrow_low, narrow_high = scores.interval("dla.target", level=0.5)
    assert np.all(low < narrow_low) and np.all(narrow_high < high)
    values, subjects = correlated()
    found = mean_interval(values, subjects)
    assert found["ci"][0] < found["mean"] < found["ci"][1]
    assert found["mean"] == pytest.approx(np.mean(values))


def test_intervals_have_about_their_level() -> None:
    """The true mean 1 lies in 95 of 100 intervals, and in half of those of level 0.5, of many subjects or few."""
    for n in (4, 40):
        for level in (0.95, 0.5):
            bounds = [noise(n, seed).interval("dla.target", level) for seed in range(100)]  # 12 heads each
            low, high = np.array(bounds).swapaxes(0, 1)
            assert np.mean((low < 1) & (high > 1)) == pytest.approx(level, abs=4 * (level * (1 - level) / 1200) ** 0.5)


def test_an_interval_is_student_s_over_subjects() -> None:
    """Every head of it as if it were alone, and without any draw."""
    scores = Scores({"x": noise(9).by_example["dla.target"]}, list("abcabcaab"))
    scores.by_example["x"][2:5] = np.nan
    low, high = scores.interval("x", level=0.9)
    for head in np.ndindex(SHAPE):
        expected = t_interval(scores.by_example["x"][(..., *head)], scores.subjects, 0.9)
        assert (low[head], high[head]) == (pytest.approx(expected[0], abs=1e-5), pytest.approx(expected[1], abs=1e-5))
    assert all(np.array_equal(*pair) for pair in zip(scores.interval("x"), scores.interval("x"), strict=True))


def test_p_values_are_of_the_sign_that_is_asked_for() -> None:
    values = np.random.default_rng(0).normal(0, 0.1, (12, *SHAPE)).astype(np.float32)
    values[:, 0, 0] += 1
    values[:, 1, 2] -= 1
    scores = Scores({"x": values}, [f"s{i // 2}" for i in range(12)])
    up, down = scores.p_values("x", 1.0), scores.p_values("x", -1.0)
    assert up.shape == SHAPE and up[0, 0] < 1e-4 and down[1, 2] < 1e-4 and up[1, 2] > 0.999
    np.testing.assert_allclose(up + down, 1)
    assert up[2, 3] == pytest.approx(float(one_sided_p(values[:, 2, 3], scores.subjects, 1.0)))
    # 95% intervals leave 2.5% on either side.
    low, high = scores.interval("x")
    assert ((low > 0) == (up < 0.025)).all() and ((high < 0) == (down < 0.025)).all()


def test_resampling_subjects_is_wider_than_resampling_examples() -> None:
    values, subjects = correlated()
    as_examples = [f"e{i}" for i in range(len(values))]

    def width(of: list[str]) -> float:
        low, high = mean_interval(values, of)["ci"]
        return float(high - low)

    assert width(subjects) > 3 * width(as_examples)
    array = np.asarray(values, np.float32)[:, None, None]
    wide, narrow = (np.subtract(*reversed(Scores({"x": array}, of).interval("x"))) for of in (subjects, as_examples))
    assert wide.item() > 3 * narrow.item()
    assert wide.item() == pytest.approx(width(subjects), rel=1e-5)


def test_nan_examples_do_not_count() -> None:
    full, part = noise(10), noise(14)
    part.by_example["dla.target"][:10] = full.by_example["dla.target"]
    part.by_example["dla.target"][10:] = np.nan
    assert part.mean("dla.target") == pytest.approx(full.mean("dla.target"))
    draws = part.bootstrap("dla.target", 400)
    assert np.isfinite(draws).all()
    assert draws.mean(0) == pytest.approx(full.mean("dla.target"), abs=0.1)


def test_a_quantity_that_one_subject_has() -> None:
    """One of three has previous answers: 30% of the draws do not hold it, and a mean of nothing is not 0. It bounds and
    proves nothing."""
    values = np.full((3, 1, 1), np.nan, np.float32)
    values[0] = 5.0
    scores = Scores({"x": values}, ["a", "b", "c"])
    draws = scores.bootstrap("x", 200)
    assert 0 < np.isnan(draws).mean() < 0.5 and set(draws[~np.isnan(draws)].tolist()) == {5.0}
    assert [bound.item() for bound in scores.interval("x")] == [-np.inf, np.inf]
    assert scores.p_values("x", 1.0).item() == 1


def test_save_and_load(tmp_path: Path) -> None:
    scores = noise(5)
    scores.by_example["lens.subject.target"] = scores.by_example["dla.target"][:, :, ::-1]
    scores.save(tmp_path / "scores.safetensors")
    loaded = load_means(tmp_path / "scores.safetensors")
    assert set(loaded) == {"dla.target", "lens.subject.target"}
    for name, value in loaded.items():
        assert value.dtype == np.float32 and np.array_equal(value, scores.mean(name))
    assert [file.name for file in tmp_path.iterdir()] == ["scores.safetensors"]


def test_scores_of_a_model_of_another_shape_are_refused(tmp_path: Path) -> None:
    path, scores = tmp_path / "scores.safetensors", noise(5)
    scores.save(path)
    layers, heads = scores.mean("dla.target").shape
    assert load_means(path, (layers, heads)).keys() == load_means(path).keys()
    for shape in ((layers + 1, heads), (heads * layers, 1)):
        with pytest.raises(InputError, match=rf"dla.target of shape \[{layers}, {heads}\], and the head set beside it"):
            load_means(path, shape)


def test_scores_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; headtune identify writes it"):
        load_means(tmp_path / "scores.safetensors")
    (tmp_path / "scores.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match="cannot be read"):
        load_means(tmp_path / "scores.safetensors")


# --- subsets, and quantities of the task as a whole -------------------------------------------------------------------


def with_whole(n_examples: int = 4) -> Scores:
    scores = noise(n_examples)
    return Scores(scores.by_example, scores.subjects, {"gates.target": np.full(SHAPE, 0.25, np.float32)})


def test_a_subset_holds_the_scores_of_its_examples() -> None:
    scores = noise(6)
    some = scores.subset([4, 1])
    assert np.array_equal(some.by_example["dla.target"], scores.by_example["dla.target"][[4, 1]])
    assert some.subjects == ["s4", "s1"]
    assert some.mean("dla.target") == pytest.approx(scores.by_example["dla.target"][[1, 4]].mean(0), abs=1e-6)


def test_a_subset_has_nothing_of_the_whole_task() -> None:
    """The gates saw the examples that are left out: as scores of a held-out half they would be cheating."""
    assert with_whole().subset([0]).whole == {} and "gates.target" not in with_whole().subset([0])


def test_whole_quantities_are_means_without_intervals() -> None:
    scores = with_whole()
    assert "gates.target" in scores and "dla.target" in scores and "mean.target" not in scores
    assert set(scores.means()) == {"dla.target", "gates.target"}
    assert np.array_equal(scores.mean("gates.target"), scores.whole["gates.target"])
    for refused in (scores.bootstrap, scores.interval, lambda name: scores.p_values(name, 1.0)):
        with pytest.raises(InputError, match=r"score 'gates\.target' has one value for the whole task, so no interval"):
            refused("gates.target")


def test_whole_quantities_are_saved_and_loaded(tmp_path: Path) -> None:
    with_whole().save(tmp_path / "scores.safetensors")
    loaded = load_means(tmp_path / "scores.safetensors")
    assert set(loaded) == {"dla.target", "gates.target"} and (loaded["gates.target"] == 0.25).all()


def test_stack_of_whole_quantities_alone_and_of_examples_without_any() -> None:
    whole = {"gates.target": np.ones(SHAPE, np.float32)}
    alone = stack([], ["a", "b"], whole)
    assert alone.by_example == {} and set(alone.means()) == {"gates.target"} and alone.subjects == ["a", "b"]
    some = stack([{}, {"x": np.ones(SHAPE, np.float32)}], ["a", "b"], whole)
    assert np.isnan(some.by_example["x"][0]).all() and some.mean("x") == pytest.approx(1)
    assert stack([{}, {}], ["a", "b"]).means() == {}


def test_counts_say_how_many_examples_a_method_scored() -> None:
    values = np.ones((3, *SHAPE), np.float32)
    part = values.copy()
    part[1:] = np.nan
    scores = Scores({"dla.target": values, "dla.previous": part, "corrupt_all.target": part}, list("abc"))
    assert scores.counts() == {"dla": 3, "corrupt_all": 1}
