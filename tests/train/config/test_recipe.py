"""Recipes: those that ship are valid, and whatever is wrong is refused in one line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headtune.analysis.utils.errors import InputError
from headtune.train.config.methods import SeekrConfig
from headtune.train.config.recipe import load_recipe, parse, recipe_names
from headtune.train.config.schema import Recipe
from helpers.paths import ROOT

PUBLISHED = [
    f"lofit/{model}_{task}"
    for model in ("llama2_7b", "llama2_13b", "gemma_7b")
    for task in ("truthfulqa", "mquake", "clutrr")
] + ["seekr/llama2_7b_trace_1pct", "seekr/llama2_7b_trace_10pct"]
SHIPPED = [
    *PUBLISHED,
    *("gain/one_to_many", "gain/needle"),
    *("lofit/one_to_many", "lofit/truthfulqa", "lofit/mquake", "lofit/relations"),
    *("jola/relations", "masked/relations", "masked/rank", "lora/one_to_many", "lora/relations"),
    *("full/relations", "ln/relations"),
    *("steer/one_to_many", "steer/iti", "steer/in_context", "steer/sink", "steer/intercept", "steer/conflict"),
    *("regularise/protect_recall", "regularise/reduce_suppression", "regularise/prune"),
    *("full/retmask", "masked/retmask"),
    *("seekr/function_vectors", "seekr/relations", "seekr/trace", "seekr/superni", "seekr/own_tasks"),
]


def lofit(**changes: Any) -> dict[str, Any]:
    """A small valid recipe, with changes."""
    return {"recipe": "lofit", "heads": {"all": True}} | changes


def refusal(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- what ships -------------------------------------------------------------------------------------------------------


def test_every_shipped_recipe_is_valid() -> None:
    on_disk = sorted(str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in ROOT.glob("recipes/*/*.yaml"))
    assert recipe_names() == on_disk
    assert set(SHIPPED) <= set(on_disk) and len(on_disk) == len(SHIPPED), "a new recipe belongs into SHIPPED"
    for name in on_disk:
        loaded = load_recipe(name)
        folder = name.split("/")[0]  # gain: lofit with nothing but factors
        assert loaded.recipe == {"gain": "lofit"}.get(folder, folder), "a recipe lies in the folder of its family"
        assert loaded.output_dir == f"runs/{loaded.name}"
        assert (loaded.model.name == "smollm2-135m") == (name not in PUBLISHED)


def test_a_recipe_is_found_by_path_too() -> None:
    for name in SHIPPED:
        assert load_recipe(str(ROOT / "recipes" / f"{name}.yaml")) == load_recipe(name)


@pytest.mark.parametrize(
    ("name", "top", "select", "l1", "tune"),
    [
        ("llama2_7b_truthfulqa", 32, 5e-3, 5e-4, 1e-2),
        ("llama2_7b_mquake", 32, 5e-3, 1e-3, 1e-2),
        ("llama2_7b_clutrr", 32, 5e-4, 5e-3, 1e-2),
        ("llama2_13b_truthfulqa", 48, 1e-3, 1e-3, 2e-2),
        ("llama2_13b_mquake", 48, 1e-3, 1e-3, 8e-3),
        ("llama2_13b_clutrr", 48, 1e-3, 1e-3, 1e-2),
        ("gemma_7b_truthfulqa", 16, 5e-3, 5e-4, 2e-2),
        ("gemma_7b_mquake", 16, 5e-3, 5e-4, 8e-3),
        ("gemma_7b_clutrr", 16, 5e-4, 5e-3, 1e-2),
    ],
)
def test_published_hyperparameters(name: str, top: int, select: float, l1: float, tune: float) -> None:
    """Yin et al. 2024, appendix: K, learning rate and lambda of A, learning rate of v; batch 8, 5 epochs, seed 42.

    Rows and dtype are those of the authors' scripts (github.com/fc2869/lo-fit).
    """
    recipe = load_recipe(f"lofit/{name}")
    assert recipe.heads is not None and recipe.heads.lofit is not None
    assert (recipe.heads.top, recipe.heads.lofit.learning_rate, recipe.heads.lofit.l1) == (top, select, l1)
    assert recipe.training["learning_rate"] == tune and recipe.seed == 42
    assert (recipe.training["num_train_epochs"], recipe.training["per_device_train_batch_size"]) == (5, 8)
    assert recipe.method.objective == ("dpo" if "truthfulqa" in name else "sft")  # type: ignore[union-attr]
    assert recipe.training.get("beta") == (0.5 if "truthfulqa" in name else None)
    assert recipe.evaluation.scoring == ("iti" if "truthfulqa" in name else "harness")
    assert recipe.task.max_train_examples == (300 if "clutrr" in name else None)
    assert recipe.model.dtype == ("float32" if "llama2_7b" in name else "bfloat16")


@pytest.mark.parametrize(("name", "ratio", "weight"), [("1pct", 0.01, 1e3), ("10pct", 0.1, 1e2)])
def test_published_hyperparameters_of_seekr(name: str, ratio: float, weight: float) -> None:
    """He et al. 2024: l1, l2 by the ratio, budgets of layers, heads and query rows, learning rate, 128 rows a step."""
    recipe = load_recipe(f"seekr/llama2_7b_trace_{name}")
    method, training = recipe.method, recipe.training
    assert isinstance(method, SeekrConfig) and method.tune == "full" and method.replay.ratio == ratio
    distil = method.distil
    assert (distil.replay_weight, distil.attention_weight) == (0.5, weight)
    assert (distil.layers, distil.heads, distil.queries) == (24, 128, 100)
    assert (distil.choice, distil.selection, distil.teacher) == ("importance", "global", "own")
    assert distil.reduction == "layers" and training["adam_beta2"] == 0.95  # of the authors' code
    assert training["learning_rate"] == 1e-5
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * 8 == 128


# --- round trip and name ----------------------------------------------------------------------------------------------

VARIANTS = {
    "defaults": lofit(),
    "from": lofit(heads={"from": "runs/x", "role": "suppression", "top": 3}),
    "from a role of the set's own": lofit(heads={"from": "runs/x", "role": "mine"}),
    "identify": lofit(heads={"identify": {"method": "dla", "max_examples": 7}}),
    "random": lofit(heads={"random": {"like": "runs/x", "seed": 4}}),
    "list": lofit(heads={"list": [[0, 1], [2, 3]]}),
    "training": lofit(training={"max_steps": 3, "learning_rate": 1, "save_strategy": "steps", "eval_steps": None}),
    "lora": {"recipe": "lora", "method": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "steer": {"recipe": "steer", "heads": {"all": True}, "method": {"factor": 0.5}},
    "seekr": {"recipe": "seekr", "task": {"sequence": ["a", "b"]}, "method": {"distil": {"layers": "all"}}},
    "ewc": {"recipe": "seekr", "task": {"sequence": ["a", "b"]}, "method": {"strategy": "ewc", "ewc_rows": "all"}},
    "words": lofit(name="é-Ünï", task={"train": "a.jsonl", "eval": "b.jsonl"}, tracking={"tags": ["a", "b"]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    """The resolved recipe that a run writes is, read again, the same recipe: `--resume` and `export` rest on it."""
    first = parse(VARIANTS[variant])
    path = tmp_path / "recipe.yaml"
    path.write_text(first.to_yaml(), encoding="utf-8")
    again = load_recipe(str(path))
    assert again == first
    assert type(again.method) is type(first.method)
    assert again.to_yaml() == first.to_yaml()


def test_the_resolved_recipe_spells_out_every_default() -> None:
    dumped = yaml.safe_load(parse(lofit()).to_yaml())
    assert dumped["method"]["answer_set"]["unlikelihood"] == 1.0
    assert dumped["heads"] == {"all": True, "role": "both", "top": 8}
    assert dumped["name"] and dumped["output_dir"]


def test_the_name_tells_content_apart() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"training": {"max_steps": 3}},
        {"training": {"max_steps": 4}},
        {"method": {"scale": "head"}},
        {"method": {"answer_set": {"retention": 0.5}}},
        {"task": {"train": "country_cities"}},
        {"model": {"dtype": "bfloat16"}},
        {"heads": {"list": [[0, 1]]}},
        {"heads": {"list": [[0, 2]]}},
    ]
    names = [parse(lofit(**change)).name for change in changes]
    assert len(set(names)) == len(names)
    assert names == [parse(lofit(**change)).name for change in changes]
    assert names[0].startswith("lofit-all-s0-") and names[1].startswith("lofit-all-s1-")
    assert parse(lofit(name="mine")).name == "mine"
    assert parse(lofit(name="mine", output_dir="elsewhere/x")).output_dir == "elsewhere/x"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        # unknown keys, at every level, with the nearest known one
        (lofit(trainin={}), ["'trainin'", "'training'"]),
        (lofit(model={"nam": "x"}), ["'model.nam'", "'name'"]),
        (lofit(heads={"lst": [[0, 1]]}), ["'heads.lst'", "'list'"]),
        (lofit(heads={"identify": {"max_example": 3}}), ["'heads.identify.max_example'", "'max_examples'"]),
        (lofit(heads={"random": {"like": "x", "sed": 3}}), ["'heads.random.sed'", "'seed'"]),
        (lofit(heads={"random": {"lik": "x"}}), ["'heads.random.lik'", "'like'"]),  # not: like is missing
        (lofit(task={"trian": "x"}), ["'task.trian'", "'train'"]),
        (lofit(task={"split": {"bye": "subject"}}), ["'task.split.bye'", "'by'"]),
        (lofit(method={"scal": "head"}), ["'method.scal'", "'scale'"]),
        (lofit(method={"answer_set": {"unlikelyhood": 1.0}}), ["'method.answer_set.unlikelyhood'", "'unlikelihood'"]),
        (lofit(training={"max_step": 3}), ["'training.max_step'", "'training.max_steps'"]),
        (lofit(evaluation={"n_item": 3}), ["'evaluation.n_item'", "'n_items'"]),
        (lofit(tracking={"projct": "x"}), ["'tracking.projct'", "'project'"]),
        # keys of another family, or set by the run
        (lofit(method={"factor": 2.0}), ["'method.factor'"]),
        (lofit(method={"r": 8}), ["'method.r'"]),
        ({"recipe": "steer", "heads": {"all": True}, "method": {"offset": True}}, ["'method.offset'"]),
        ({"recipe": "lora", "method": {"scale": "head"}}, ["'method.scale'"]),
        (lofit(training={"output_dir": "x"}), ["training.output_dir", "use output_dir"]),
        (lofit(training={"seed": 3}), ["training.seed", "use seed"]),
        (lofit(training={"run_name": "x"}), ["training.run_name", "use name"]),
        (lofit(training={"push_to_hub": True}), ["training.push_to_hub", "headtune export"]),
        (lofit(training={"hub_model_id": "me/mine"}), ["training.hub_model_id", "headtune export"]),
        (lofit(training={"report_to": "wandb"}), ["training.report_to", "use tracking"]),
        (lofit(training={"eval_on_start": True}), ["training.eval_on_start", "use evaluation"]),
        (lofit(training={"resume_from_checkpoint": "x"}), ["training.resume_from_checkpoint", "use --resume"]),
        (lofit(training={"max_length": 5}), ["training.max_length", "remove it"]),
        # wrong types, at every level
        (lofit(seed="a"), ["seed", "'a'"]),
        (lofit(seed=True), ["seed", "True"]),
        (lofit(seed=-1), ["seed", "-1"]),
        (lofit(name=3), ["name", "3"]),
        (lofit(model="smollm2-135m"), ["model", "'smollm2-135m'"]),
        (lofit(model={"dtype": "float8"}), ["model.dtype", "'float8'"]),
        (lofit(heads={"all": "yes"}), ["heads.all", "'yes'"]),
        (lofit(heads={"all": False}), ["heads.all", "False"]),
        (lofit(heads={"all": True, "top": 0}), ["heads.top", "0"]),
        (lofit(heads={"all": True, "top": "8"}), ["heads.top", "'8'"]),
        (lofit(heads={"all": True, "role": "recal"}), ["heads.role", "'recal'", "did you mean 'recall'", "memory"]),
        (lofit(heads={"from": "runs/x", "role": "../x"}), ["heads.role", "'../x'", "letters, digits"]),
        (lofit(heads={"identify": {}, "role": "mine"}), ["heads.role", "'mine'", "known: both, context"]),
        (lofit(heads={"list": []}), ["heads.list"]),
        (lofit(heads={"list": [[0]]}), ["heads.list.0"]),
        (lofit(heads={"list": [[0, "1"]]}), ["heads.list.0.1", "'1'"]),
        (lofit(heads={"list": [[0, 1, 2]]}), ["heads.list.0"]),
        (lofit(task={"max_train_examples": 0}), ["task.max_train_examples", "0"]),
        (lofit(method={"offset": "yes"}), ["method.offset", "'yes'"]),
        (lofit(method={"scale": "Vector"}), ["method.scale", "'Vector'"]),
        (lofit(method={"answer_set": {"own_lists": 1.5}}), ["method.answer_set.own_lists", "1.5"]),
        (lofit(method={"answer_set": {"unlikelihood": float("inf")}}), ["method.answer_set.unlikelihood", "inf"]),
        (lofit(method=7), ["method", "7"]),
        (lofit(method=[]), ["method", "[]"]),
        (lofit(training={"max_steps": "x"}), ["training.max_steps", "'x'", "int"]),
        (lofit(training={"max_steps": 3.5}), ["training.max_steps", "3.5"]),
        (lofit(training={"packing": 7}), ["training.packing", "7", "bool"]),
        (lofit(training={"packing": True}), ["training.packing does not go with a run", "remove it"]),
        (lofit(training={"padding_free": True}), ["training.padding_free does not go with a run", "remove it"]),
        (lofit(training={"assistant_only_loss": True}), ["assistant_only_loss does not go with a run", "remove it"]),
        (lofit(training={"chat_template_path": "x"}), ["training.chat_template_path does not go", "remove it"]),
        # numbers of training out of range
        (
            lofit(training={"per_device_train_batch_size": 0}),
            ["training.per_device_train_batch_size", "at least 1", "0"],
        ),
        (lofit(training={"per_device_eval_batch_size": -2}), ["training.per_device_eval_batch_size", "-2"]),
        (lofit(training={"gradient_accumulation_steps": 0}), ["training.gradient_accumulation_steps", "0"]),
        (lofit(training={"max_steps": 0}), ["training.max_steps must be at least 1, or -1", "found 0"]),
        (lofit(training={"max_steps": -5}), ["training.max_steps", "found -5"]),
        (lofit(training={"learning_rate": 0}), ["training.learning_rate must be above 0", "found 0"]),
        (lofit(training={"learning_rate": float("nan")}), ["training.learning_rate", "finite", "nan"]),
        (lofit(training={"max_grad_norm": float("inf")}), ["training.max_grad_norm", "finite", "inf"]),
        (lofit(training={"num_train_epochs": 0}), ["training.num_train_epochs", "above 0"]),
        (lofit(training={"logging_steps": 0}), ["training.logging_steps", "found 0"]),
        (lofit(training={"save_steps": 2.5}), ["training.save_steps", "whole number", "found 2.5"]),
        (lofit(training={"eval_steps": -1}), ["training.eval_steps", "found -1"]),
        (lofit(training={"warmup_steps": -1}), ["training.warmup_steps", "at least 0", "found -1"]),
        (lofit(training={"weight_decay": -0.1}), ["training.weight_decay", "at least 0", "found -0.1"]),
        (lofit(training={"adam_beta2": 1.0}), ["training.adam_beta2", "below 1"]),
        (lofit(training={"learning_rate": "fast"}), ["training.learning_rate", "'fast'"]),
        (lofit(training={"lr_scheduler_type": "linaer"}), ["training.lr_scheduler_type", "'linaer'", "'linear'"]),
        (lofit(training={"save_strategy": "step"}), ["training.save_strategy", "'step'", "'steps'"]),
        (lofit(training={"save_strategy": 3}), ["training.save_strategy", "3"]),
        (lofit(training=[1]), ["training"]),
        (lofit(training={3: 4}), ["training", "3"]),
        (lofit(evaluation={"n_items": 0}), ["evaluation.n_items", "0"]),
        (lofit(tracking={"tags": "one"}), ["tracking.tags", "'one'"]),
        (lofit(tracking={"wandb": "on"}), ["tracking.wandb", "'on'"]),
        # heads: none, two
        ({"recipe": "lofit"}, ["heads is missing"]),
        (lofit(heads={}), ["exactly one of", "none"]),
        (lofit(heads={"role": "recall"}), ["exactly one of", "none"]),
        (lofit(heads={"all": True, "list": [[0, 1]]}), ["exactly one of", "all, list"]),
        (lofit(heads={"from": "x", "random": {"like": "x"}}), ["exactly one of", "from, random"]),
        # the family
        ({"recipe": "lofti"}, ["'lofti'", "'lofit'"]),
        ({"recipe": ["lofit"]}, ["recipe", "lofit"]),
        ({"heads": {"all": True}}, ["recipe", "lofit, jola"]),
        ([1, 2], ["mapping", "list"]),
        (None, ["mapping"]),
        # names that are no folder names
        (lofit(name="a/b"), ["'a/b'", "slash"]),
        (lofit(name=".."), ["'..'"]),
    ],
    ids=str,
)
def test_refused_in_one_line(data: Any, words: list[str]) -> None:
    message = refusal(lambda: parse(data, "my.yaml"))
    assert message.startswith("my.yaml: ")
    for word in words:
        assert word in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "training",
    [
        {"lr_scheduler_type": "linear"},
        {"save_strategy": "steps", "save_steps": 3},
        {"optim": "adamw_torch"},
        {"learning_rate": 1},
        {"learning_rate": 0.5, "warmup_steps": 0.1},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"max_grad_norm": 1.0, "logging_steps": 1},
        {"max_steps": -1, "num_train_epochs": 0.5, "logging_steps": 0.1, "save_steps": 0.5, "eval_steps": None},
        {"max_grad_norm": 0, "weight_decay": 0.0, "warmup_steps": 0, "adam_beta1": 0.0, "logging_steps": 5.0},
    ],
    ids=str,
)
def test_training_keys_that_are_right(training: dict[str, Any]) -> None:
    assert parse(lofit(training=training)).training == training


def test_a_yaml_error_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("recipe: lofit\nheads: {all: true\nseed: 0\n", encoding="utf-8")
    message = refusal(lambda: load_recipe(str(path)))
    assert "bad.yaml:3:5: not YAML: " in message


def test_no_such_recipe_and_no_text() -> None:
    assert "did you mean 'lofit/one_to_many'" in refusal(lambda: load_recipe("lofit/one_to_mny"))
    assert "/relations'" in refusal(lambda: load_recipe("relation.yaml"))
    unlike = refusal(lambda: load_recipe("zzz.yaml"))
    assert unlike.endswith("is neither a file nor built in; headtune recipes lists those built in")


def test_a_file_with_a_name_close_to_that_of_another(tmp_path: Path) -> None:
    (tmp_path / "my_recipe.yaml").write_text("recipe: full\n", encoding="utf-8")
    assert "my_recipe.yaml'" in refusal(lambda: load_recipe(str(tmp_path / "my_recpe.yaml")))


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"recipe: \xff\xfe")
    assert "not UTF-8" in refusal(lambda: load_recipe(str(path)))


# --- overrides --------------------------------------------------------------------------------------------------------


def overridden(*overrides: str) -> Recipe:
    return load_recipe("lofit/one_to_many", overrides)


def test_overrides() -> None:
    found = overridden("training.max_steps=3", "seed=5", "model.name=/a=b", "method.offset=false", "tracking.group=x")
    assert (found.training["max_steps"], found.seed, found.model.name) == (3, 5, "/a=b")
    base = load_recipe("lofit/one_to_many")
    assert found.training["learning_rate"] == base.training["learning_rate"], "other keys of the block stay"
    assert found.tracking.group == "x" and getattr(found.method, "offset") is False  # noqa: B009
    assert overridden("evaluation.batch_size=4").evaluation.n_items == base.evaluation.n_items


def test_an_override_with_a_block_replaces_the_block() -> None:
    found = overridden("heads={list: [[23, 3]]}")
    assert found.heads is not None and found.heads.pairs == [(23, 3)] and found.heads.identify is None
    assert overridden("training={max_steps: 1}").training == {"max_steps": 1}
    # A key inside the block does not replace it: two sources, refused.
    assert "exactly one of" in refusal(lambda: overridden("heads.list=[[23, 3]]"))


def test_later_overrides_win() -> None:
    assert overridden("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_steps", ["'training.max_steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("training..max_steps=3", ["key=value"]),
        ("seed.x=3", ["seed.x=...", "seed is a value, not a block"]),
        ("heads={list: [[1}", ["not YAML"]),
        ("training.max_steps=x", ["training.max_steps", "'x'"]),
        ("trainig.max_steps=3", ["'trainig'", "'training'"]),
        ("seed=", ["seed"]),
    ],
)
def test_overrides_refused(override: str, words: list[str]) -> None:
    message = refusal(lambda: overridden(override))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=1", "training.max_steps", "20"], "did you mean training.max_steps=20?"),
        (["training.max_steps", "S3cret"], "did you mean training.max_steps=VALUE?"),
        (
            ["heads={from:", "runs/heads,", "top:", "4}", "seed=1"],
            "where it holds spaces: heads=",
        ),
        (["name=my", "run"], "override name=... ends at a space"),
    ],
)
def test_overrides_that_the_shell_took_apart(words: list[str], expected: str) -> None:
    message = refusal(lambda: overridden(*words))
    assert expected in message and "S3cret" not in message


def test_a_value_that_is_no_yaml_is_not_shown() -> None:
    message = refusal(lambda: overridden("training.hub_token=@S3cretPassw0rd"))
    assert "training.hub_token=..." in message and "S3cret" not in message


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "3"])
def test_an_override_of_what_is_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text, encoding="utf-8")
    assert "mapping" in refusal(lambda: load_recipe(str(path), ["seed=1"]))


def test_the_schema_names_every_block() -> None:
    schema = Recipe.model_json_schema()
    assert {"recipe", "model", "heads", "task", "method", "training", "evaluation", "tracking"} <= set(
        schema["properties"]
    )
    assert "from" in schema["$defs"]["HeadsConfig"]["properties"]


@pytest.mark.parametrize("text", ["1e-3", "1.e-3", "1.0e-3", "+1E-3", "0.001"])
def test_every_way_to_write_a_learning_rate_is_a_number(text: str) -> None:
    assert load_recipe("lofit/one_to_many", [f"training.learning_rate={text}"]).training["learning_rate"] == 0.001


def test_names_that_only_look_like_numbers_stay_text() -> None:
    assert load_recipe("lofit/one_to_many", ["name=1e-3x"]).name == "1e-3x"
