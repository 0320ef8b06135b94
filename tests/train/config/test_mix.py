"""Several tasks learnt together: shares by weight, no row twice, nothing held out that is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headtune.analysis.tasks.task import Example, to_jsonl
from headtune.analysis.utils.errors import InputError
from headtune.train.config.recipe import load_recipe, parse
from headtune.train.config.resolve_tasks import in_words, tasks_of, validation_of
from helpers.small_runs import train, write_recipe
from helpers.tiny import tiny_task


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """40 facts about things, of which 20 are in a second file of 20, in other words."""
    for name, count in (("large", 40), ("small", 20)):
        rows = [Example(f"{name}: thing{n} is in", f"thing{n}", ("Rome",)) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text(to_jsonl(rows).replace('"previous": [], ', ""))
    return str(tmp_path / "large.jsonl"), str(tmp_path / "small.jsonl")


def mixed(parts: list[Any], **task: Any) -> Any:
    return parse({"recipe": "lora", "task": {"mix": parts, **task}, "training": {"eval_strategy": "epoch"}}).task


def counts(task: Any) -> dict[str, int]:
    names = [example.prompt.split(":")[0] for example in task.examples]
    return {name: names.count(name) for name in sorted(set(names))}


def test_a_mixture_is_split_by_subject_over_all_its_tasks(files: tuple[str, str]) -> None:
    block = mixed(list(files))
    learnt, held_out = tasks_of(block)
    aside = validation_of(block, learnt, held_out)
    assert learnt.name == "large+small:train"
    subjects = [set(task.subjects) for task in (learnt, held_out, aside)]
    assert sum(map(len, subjects)) == 40 == len(set.union(*subjects)), "no subject in two parts"
    assert counts(learnt)["large"] == 24 and sum(map(len, (learnt.examples, held_out.examples, aside.examples))) == 60
    large, small = (learnt.about["mix"][name] for name in ("large", "small"))
    assert large == [24, 24] and small[0] == small[1] == counts(learnt)["small"]
    assert f"({large[0]} of 24 rows of large, {small[0]} of {small[1]} rows of small)" in in_words(
        block, learnt, held_out
    )


@pytest.mark.parametrize(
    "weights, most", [((1, 1), None), ((3, 1), None), ((1, 3), None), ((3, 1), 12), ((None, 2), 9)]
)
def test_shares_are_those_of_the_weights(files: tuple[str, str], weights: tuple[Any, Any], most: int | None) -> None:
    parts = [{"name": name, "weight": weight} for name, weight in zip(files, weights, strict=True)]
    block = mixed([{k: v for k, v in part.items() if v is not None} for part in parts], max_train_examples=most)
    learnt, _ = tasks_of(block)
    there = counts(learnt)
    share = (weights[0] or 1) / sum(weight or 1 for weight in weights)
    total = len(learnt.examples)
    assert abs(there["large"] - share * total) < 1 and len({example.prompt for example in learnt.examples}) == total
    sizes = [learnt.about["mix"][name][1] for name in ("large", "small")]
    largest = int(min(sizes[0] / share, sizes[1] / (1 - share)) + 1e-9)
    assert total == (largest if most is None else most)
    assert learnt.limited(most, 3) is learnt, "a limit later takes nothing more away"


def test_a_mixture_without_weights_keeps_its_proportions_under_a_limit(files: tuple[str, str]) -> None:
    learnt, _ = tasks_of(mixed(list(files), max_train_examples=10))
    sizes = [learnt.about["mix"][name][1] for name in ("large", "small")]
    assert len(learnt.examples) == 10
    assert counts(learnt)["large"] == pytest.approx(10 * sizes[0] / sum(sizes), abs=1)


def test_a_run_on_a_mixture(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    for index in range(2):
        rows = tiny_task(subjects=8).examples[index::2]
        (tmp_path / f"part{index}.jsonl").write_text(to_jsonl(rows))
        names.append(str(tmp_path / f"part{index}.jsonl"))
    recipe = write_recipe(tmp_path, llama, task={"mix": [{"name": names[0], "weight": 2.0}, {"name": names[1]}]})
    assert train(recipe) == 0
    captured = capsys.readouterr()
    assert "rows of part0, " in " ".join((captured.out + captured.err).split())
    written = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert written == load_recipe(str(recipe)) and "train:" not in (tmp_path / "run" / "recipe.yaml").read_text()


def test_mixtures_that_are_refused(files: tuple[str, str], tmp_path: Path) -> None:
    def refusal(parts: list[Any], **task: Any) -> str:
        with pytest.raises(InputError) as refused:
            tasks_of(mixed(parts, **task))
        return str(refused.value)

    large, small = files
    assert "give one of train, mix and sequence" in refusal([large, small], train="one_to_many")
    assert "at least 2" in refusal([large])
    assert "greater than 0" in refusal([{"name": large, "weight": 0.0}, small])
    assert "did you mean 'weight'" in refusal([{"name": large, "wieght": 1.0}, small])
    assert "a part of a task; name the whole" in refusal([f"{large}:train", small])
    assert "names a task twice" in refusal([large, large])
    assert "scored as exact_match and 'country_cities' as lists; set task.kind" in refusal([large, "country_cities"])
    uneven = [{"name": large, "weight": 1000.0}, {"name": small, "weight": 1.0}]
    assert "the share of 'small' is less than one of 24 rows" in refusal(uneven)
    assert "'none.jsonl'" in refusal([large, "none.jsonl"])
