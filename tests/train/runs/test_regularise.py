"""Recipes with regularisers through the command line: every kind, every way to train, pruning, resuming, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from headtune.analysis.tasks.task import Example, to_jsonl
from headtune.analysis.utils.files import write_text
from headtune.cli.main import main
from headtune.train.losses import regularisers as penalties
from headtune.train.losses.activation_capture import warn_of_dropout
from headtune.train.runs.load_run import load_run
from headtune.train.trainer import attach_regularisers, penalised_trainers
from helpers.small_runs import STEPS, save_planted, train, write_recipe
from helpers.tiny import FACTS, N_HEADS, quick_among, save_tiny, tiny_model

HEADS = {"list": [[1, 1], [2, 0], [2, 3]]}
SFT: dict[str, Any] = {"objective": "sft"}
OPTIONS = {"positive": " Rome", "negative": " Milan"}  # words that are one token of the tiny tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "attention_kl": {"kind": "attention_kl", "rows": 4},
    "output_drift": {"kind": "output_drift"},
    "absolute output_drift": {"kind": "output_drift", "relative": False},
    "weight_drift": {"kind": "weight_drift"},
    "fisher": {"kind": "weight_drift", "fisher": True, "weight": 10.0, "parts": ["q", "o"]},
    "suppression": {"kind": "attribution_hinge", "role": "suppression"},
    "recall": {"kind": "attribution_hinge", "role": "recall"},
    "negative_attention": {"kind": "negative_attention", **OPTIONS},
    "prune": {"kind": "prune", "weight": 0.1},
}
DRIFT = KINDS["output_drift"]
DRIFTS = ("attention_kl", "output_drift", "weight_drift", "recall")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions with wrong answers that name both options."""
    names = list(FACTS)
    examples = [
        Example(f"Some of Rome Milan in {name}:", name, tuple(FACTS[name][:1]), (), None, tuple(FACTS[other][:2]))
        for name, other in zip(names, [*names[1:], names[0]], strict=True)
    ]
    path = tmp_path_factory.mktemp("task") / "asked.jsonl"
    write_text(path, to_jsonl(examples))
    return str(path)


def write(folder: Path, model: Path, asked: str, method: dict[str, Any], **changes: Any) -> Path:
    """A recipe of the family, full fine-tuning unless `method` says otherwise."""
    training = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
    }
    block = {
        "recipe": "regularise",
        "heads": HEADS,
        "task": {"train": asked, "kind": "exact_match"},
        "method": SFT | method,
        "training": training | changes.pop("training", {}),
    }
    return write_recipe(folder, model, **(block | changes))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def logged(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[f"train/{name}"] for row in rows if f"train/{name}" in row]


# --- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tune"), [*zip(KINDS, ["full", "lora"] * len(KINDS), strict=False), ("prune", "lora")]
)
def test_each_kind_is_logged_and_trained_against(name: str, tune: str, llama: Path, asked: str, tmp_path: Path) -> None:
    method = {"tune": tune, "lora": {"r": 2}, "regularisers": [KINDS[name]]}
    assert train(write(tmp_path, llama, asked, method)) == 0
    run = tmp_path / "run"
    term = "l0" if name == "prune" else KINDS[name]["kind"]
    values = logged(run, term)
    assert len(values) == len(logged(run, "loss")) == STEPS and len(set(values)) > 1
    if any(word in name for word in DRIFTS) or name == "fisher":
        assert values[0] == pytest.approx(0.0, abs=1e-7) and max(values) > 1e-6, "the model starts as the base"
    state = read(run / "run.json")
    assert state["state"] == "done" and ("pruned" in state) == (name == "prune")
    whole = tune == "full" or name == "prune"
    assert (run / "model").is_dir() == whole and (run / "adapter").is_dir() != whole
    model, _, recipe = load_run(run)
    assert recipe.recipe == "regularise" and model is not None


def test_a_weight_of_0_is_plain_fine_tuning_to_the_bit(llama: Path, asked: str, tmp_path: Path) -> None:
    trained = {}
    for name, recipe, method in [
        ("plain", "full", {}),
        ("held", "regularise", {"regularisers": [KINDS["output_drift"] | {"weight": 0.0}]}),
        ("hard", "regularise", {"regularisers": [KINDS["output_drift"] | {"weight": 100.0}]}),
    ]:
        (tmp_path / name).mkdir()
        heads = None if recipe == "full" else {"all": True}
        assert train(write(tmp_path / name, llama, asked, method, recipe=recipe, heads=heads)) == 0
        trained[name] = load_file(tmp_path / name / "run" / "model" / "model.safetensors")
    assert all(torch.equal(value, trained["held"][name]) for name, value in trained["plain"].items())
    assert (
        logged(tmp_path / "hard" / "run", "output_drift")[-1]
        < 0.5 * logged(tmp_path / "held" / "run", "output_drift")[-1]
    )


def test_several_terms_with_heads_and_weights_of_their_own(
    llama: Path, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []

    class Seen(penalties.Regularisers):
        def __call__(self, model: Any, progress: float) -> Any:
            terms = super().__call__(model, progress)
            seen.append({name: weight for name, (_, weight) in terms.items()})
            assert self.penalties["attention_kl"].pairs == [(0, 2)]
            assert self.penalties["output_drift"].pairs == [(1, 1), (2, 0), (2, 3)], "the recipe's own"
            return terms

    monkeypatch.setattr(penalties, "Regularisers", Seen)
    terms = [
        {"kind": "attention_kl", "weight": 2.0, "heads": {"list": [[0, 2]]}, "schedule": "linear", "warmup": 0.5},
        {"kind": "attention_kl", "heads": {"all": True}},
        {"kind": "output_drift", "weight": 3.0},
    ]
    assert train(write(tmp_path, llama, asked, {"regularisers": terms})) == 0
    assert [one["attention_kl"] for one in seen] == [0.0, 1.0, 2.0, 2.0]
    assert all(one["attention_kl_2"] == 1.0 and one["output_drift"] == 3.0 for one in seen)
    for name in ("attention_kl", "attention_kl_2", "output_drift"):
        assert len(logged(tmp_path / "run", name)) == STEPS


def test_heads_of_the_terms_are_enough(llama: Path, asked: str, tmp_path: Path) -> None:
    method = {"regularisers": [DRIFT | {"heads": HEADS}]}
    assert train(write(tmp_path, llama, asked, method, heads=None)) == 0
    assert read(tmp_path / "run" / "run.json")["heads"] == []


@pytest.mark.parametrize("source", ["lofit", "identify"])
def test_heads_that_the_run_finds_itself_are_held(source: str, tmp_path: Path) -> None:
    stage = {"lofit": {"learning_rate": 0.05, "max_steps": 2}, "identify": {"method": "dla"}}[source]
    method = SFT | {"regularisers": [DRIFT, KINDS["fisher"]]}
    model, task = save_planted(tmp_path / "model")
    heads = {source: stage, "top": 2}
    recipe = write_recipe(tmp_path, model, recipe="regularise", heads=heads, method=method, task=task)
    assert train(recipe) == 0
    run = tmp_path / "run"
    assert read(run / "run.json")["heads"] and (run / "heads.json").is_file()
    assert len(logged(run, "output_drift")) == len(logged(run, "weight_drift")) == STEPS


def caught_fisher(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], None] = lambda _model: None
) -> list[dict[str, torch.Tensor]]:
    """Of each training from now on its Fisher information; `look` is shown the model that is then trained."""
    caught: list[dict[str, torch.Tensor]] = []

    class Caught(penalties.Regularisers):
        def __init__(self, heads: Any, specs: Any, fisher: Any = None) -> None:
            if fisher:  # the check beforehand has none
                caught.append(dict(fisher))
                look(heads.hf)
            super().__init__(heads, specs, fisher=fisher)

    monkeypatch.setattr(penalties, "Regularisers", Caught)
    return caught


def test_fisher_information_is_of_the_model_below_the_adapter(
    llama: Path, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of the plain model; of the held weights alone; of `task` where it is named."""
    caught = caught_fisher(monkeypatch)
    for name, changes in {"full": {}, "lora": {"tune": "lora"}, "other": {"tune": "lora"}}.items():
        (tmp_path / name).mkdir()
        term = KINDS["fisher"] | ({"task": str(tmp_path / "full" / "cities.jsonl")} if name == "other" else {})
        assert train(write(tmp_path / name, llama, asked, changes | {"regularisers": [term]})) == 0
    full, lora, other = caught
    layers = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (1, 2) for part in "qo"]
    assert sorted(full) == sorted(layers) and full.keys() == lora.keys() == other.keys()
    for name, value in full.items():
        torch.testing.assert_close(lora[name], value)
        assert not torch.allclose(other[name], value)


def test_fisher_information_stays_the_bases_while_an_adapter_learns(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One LoRA through two tasks: that of the same prompts is the same before both; then the LoRA learns on."""

    def learns(model: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert layers and not any(layer.disable_adapters for layer in layers)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert len(trained) == 2 * len(layers) and all("lora_" in name for name in trained)

    caught = caught_fisher(monkeypatch, learns)
    tasks = sequence_of(tmp_path)
    method = {"tune": "lora", "regularisers": [KINDS["fisher"] | {"task": tasks[0]}]}
    assert train(write_sequence(tmp_path, llama, tasks, method)) == 0
    first, second = caught
    assert len(first) == 4 and first.keys() == second.keys()
    for name, value in first.items():
        assert value.any()
        torch.testing.assert_close(second[name], value)
    drift = logged(tmp_path / "run", "weight_drift")
    assert len(drift) == 6 and 0 < drift[3] != drift[5] > 0


# --- other families and objectives ------------------------------------------------------------------------------------

BOTH = [KINDS["attention_kl"], KINDS["output_drift"] | {"heads": {"all": True}}]
ANSWER_SET = {"objective": "answer_set", "answer_set": {"own_lists": 0.0}}
TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "lofit, sft": ("lofit", SFT),
    "lofit, dpo": ("lofit", {"objective": "dpo"}),
    "jola, sft": ("jola", SFT),
    "lora, dpo": ("lora", {"objective": "dpo", "r": 2}),
    "lora, answer_set": ("lora", ANSWER_SET | {"r": 2}),
    "full, answer_set": ("full", {"objective": "answer_set", "answer_set": {"own_lists": 0.0, "retention": 0.0}}),
    "regularise full, dpo": ("regularise", {"objective": "dpo"}),
    "regularise lora, answer_set": ("regularise", ANSWER_SET | {"tune": "lora"}),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_regularisers_go_with_any_family_and_objective(name: str, llama: Path, asked: str, tmp_path: Path) -> None:
    family, method = TOGETHER[name]
    task = {"train": asked, "kind": "multiple_choice"} if "dpo" in name else {"train": asked, "kind": "lists"}
    method = method | {"regularisers": BOTH}
    assert train(write(tmp_path, llama, asked, method, recipe=family, task=task)) == 0
    run = tmp_path / "run"
    for term in ("attention_kl", "output_drift", *(["l0"] if family == "jola" else [])):
        values = logged(run, term)
        assert len(values) == STEPS and max(values) > 0, term
    if family != "jola":  # which starts a little away from the base
        assert logged(run, "output_drift")[0] == pytest.approx(0.0, abs=1e-7)


def sequence_of(folder: Path) -> list[str]:
    """Two tasks."""
    tasks = []
    for index, template in enumerate(("Some city in {}:", "List cities in {}. 1.")):
        path = folder / f"task{index}.jsonl"
        write_text(path, to_jsonl([Example(template.format(n), n, (FACTS[n][index],)) for n in FACTS]))
        tasks.append(str(path))
    return tasks


def write_sequence(folder: Path, model: Path, tasks: list[str], method: dict[str, Any]) -> Path:
    sequence = {
        "recipe": "seekr",
        "task": {"sequence": tasks, "kind": "exact_match"},
        "method": {"replay": {"count": 2}, "distil": {"queries": 4}} | method,
        "training": {"max_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 0.003}
        | {"logging_steps": 1, "use_cpu": True},
    }
    return write_recipe(folder, model, **sequence)


@pytest.mark.parametrize("strategy", ["seekr", "ewc"])
@pytest.mark.parametrize("kind", ["attention_kl", "output_drift"])
def test_regularisers_in_a_sequence_of_tasks(
    strategy: str, kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"strategy": strategy, "regularisers": [KINDS[kind]]}
    assert train(write_sequence(tmp_path, llama, sequence_of(tmp_path), method)) == 0
    run = tmp_path / "run"
    values = logged(run, kind)
    assert len(values) == 6 and values[0] == pytest.approx(0.0, abs=1e-7) and values[2] > 0
    assert values[3] == pytest.approx(0.0, abs=1e-7), "each task is held to the model before it"
    if strategy == "seekr":
        assert len(logged(run, "attention")) == 3, "distillation goes on in the second task"
    else:
        assert len(logged(run, "ewc")) == 3


# --- pruning ----------------------------------------------------------------------------------------------------------

CLOSING: dict[str, Any] = {"kind": "prune", "weight": 100.0, "learning_rate": 2.0, "heads": {"all": True}}


def zeros(folder: Path) -> list[list[int]]:
    """The heads whose columns of W_O are all zero."""
    weights = load_file(folder / "model.safetensors")
    found = []
    for layer in range(3):
        heads = weights[f"model.layers.{layer}.self_attn.o_proj.weight"].unflatten(1, (N_HEADS, -1))
        found += [[layer, head] for head in range(N_HEADS) if not heads[:, head].any()]
    return found


@pytest.mark.parametrize("tune", quick_among(["full", "lora"], ["full"]))
def test_closed_heads_are_zero_in_what_is_saved_and_exported(
    tune: str, llama: Path, asked: str, tmp_path: Path
) -> None:
    term = CLOSING | {"heads": HEADS}
    method = {"tune": tune, "regularisers": [term, KINDS["output_drift"] | {"heads": {"list": [[0, 0]]}}]}
    assert train(write(tmp_path, llama, asked, method, heads=None, training={"max_steps": 8})) == 0
    run = tmp_path / "run"
    pruned = read(run / "run.json")["pruned"]
    assert pruned["closed_heads"] == HEADS["list"] and pruned["gated"] == pruned["closed"] == 3
    assert zeros(run / "model") == HEADS["list"]
    l0 = logged(run, "l0")
    assert l0[0] > 0.9 and l0[-1] < 0.3 and len(logged(run, "output_drift")) == 8
    model, tokenizer, _ = load_run(run)
    assert type(model) is type(tiny_model("llama")) and not (run / "adapter").exists()
    tokens = tokenizer("Some of Rome Milan in Italy:", return_tensors="pt").input_ids
    assert model(tokens).logits.isfinite().all()
    if tune == "lora":
        assert main(["export", str(run), str(tmp_path / "out")]) == 0
        assert zeros(tmp_path / "out") == HEADS["list"]


def test_the_share_of_open_heads_goes_to_its_target(llama: Path, asked: str, tmp_path: Path) -> None:
    term = CLOSING | {"sparsity": 0.5, "learning_rate": 0.5, "schedule": "linear", "warmup": 0.5}
    assert train(write(tmp_path, llama, asked, {"regularisers": [term]}, training={"max_steps": 20})) == 0
    run = tmp_path / "run"
    assert len(logged(run, "l0")) == len(logged(run, "l0_gap")) == 20
    assert logged(run, "l0")[-1] == pytest.approx(0.5, abs=0.15) and logged(run, "l0_gap")[-1] < 0.15


class Broken(BaseException):
    """The process dies."""


@pytest.mark.parametrize("where", ["train", "end"])
@pytest.mark.parametrize("tune", quick_among(["full", "lora"], ["full"]))
def test_a_broken_run_ends_as_the_unbroken_one(
    tune: str, where: str, llama: Path, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = [CLOSING | {"learning_rate": 0.5}, KINDS["attention_kl"], KINDS["fisher"]]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    paths = {
        name: write(tmp_path / name, llama, asked, {"tune": tune, "regularisers": terms})
        for name in ("whole", "broken")
    }
    assert train(paths["whole"]) == 0
    count = 0

    def breaking(real: Any, times: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == times:
                raise Broken
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if where == "train":  # in step 4, after the checkpoint of step 2
            patch.setattr(penalised_trainers.SFT, "training_step", breaking(penalised_trainers.SFT.training_step, 4))
        else:
            patch.setattr(attach_regularisers.head_pruning, "fold", breaking(attach_regularisers.head_pruning.fold, 1))
        with pytest.raises(Broken):
            train(paths["broken"])
    assert train(paths["broken"], "--resume") == 0
    whole, again = (tmp_path / name / "run" for name in ("whole", "broken"))
    assert read(again / "run.json")["pruned"] == read(whole / "run.json")["pruned"]
    assert read(again / "evaluation.json") == read(whole / "evaluation.json")
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, again))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_run_that_keeps_no_model(tune: str, llama: Path, asked: str, tmp_path: Path) -> None:
    method = {"tune": tune, "keep": False, "regularisers": [KINDS["output_drift"]]}
    assert train(write(tmp_path, llama, asked, method)) == 0
    run = tmp_path / "run"
    assert not (run / "model").exists() and (run / "adapter").is_dir() == (tune == "lora")
    if tune == "lora":
        assert load_run(run)[0] is not None


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"method": SFT}, "method.regularisers is empty"),
    "no heads": ({"heads": None, "method": SFT | {"regularisers": [DRIFT]}}, "has no heads"),
    "learnt heads": (
        {"method": SFT | {"regularisers": [DRIFT | {"heads": {"lofit": {}}}]}},
        "heads must be there before",
    ),
    "prune elsewhere": (
        {"recipe": "full", "heads": {"all": True}, "method": SFT | {"regularisers": [KINDS["prune"]]}},
        "kind prune is for recipe regularise",
    ),
    "a warmup without schedule": ({"method": SFT | {"regularisers": [DRIFT | {"warmup": 0.5}]}}, "go together"),
    "a schedule without warmup": (
        {"method": SFT | {"regularisers": [DRIFT | {"schedule": "linear"}]}},
        "go together",
    ),
    "an unknown kind": ({"method": SFT | {"regularisers": [{"kind": "drift"}]}}, "'drift'"),
    "an unknown key": ({"method": SFT | {"regularisers": [DRIFT | {"weigth": 1.0}]}}, "did you mean 'weight'?"),
    "a task for nothing": (
        {"method": SFT | {"regularisers": [KINDS["weight_drift"] | {"task": "one_to_many"}]}},
        "fisher is false",
    ),
    "a task that is not there": (
        {"method": SFT | {"regularisers": [KINDS["fisher"] | {"task": "nowhere.jsonl"}]}},
        "nowhere.jsonl",
    ),
    "two Fisher tasks": (
        {"method": SFT | {"regularisers": [KINDS["fisher"], KINDS["fisher"] | {"max_examples": 3}]}},
        "two tasks or numbers",
    ),
    "an option of two tokens": (
        {"method": SFT | {"regularisers": [{"kind": "negative_attention", "positive": " Rome Milan"}]}},
        "' Rome Milan', which is 2 tokens",
    ),
    "heads of another model": (
        {"method": SFT | {"regularisers": [DRIFT | {"heads": {"list": [[7, 0]]}}]}},
        "L7H0",
    ),
    "gates twice": ({"method": SFT | {"regularisers": [KINDS["prune"], KINDS["prune"]]}}, "prunes twice"),
    "a retention without its base": (
        {"method": {"regularisers": [DRIFT]}},
        "answer_set.retention",
    ),
    "half precision": (
        {"model": {"name": "x", "dtype": "bfloat16"}, "method": SFT | {"regularisers": [DRIFT]}},
        "would round most steps",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_are_refused_in_one_line(
    name: str, llama: Path, asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = BAD[name]
    path = write(tmp_path, llama, asked, {})
    content = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    assert train(path) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "run").exists(), "refused before anything is written"


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config", "told"),
    [
        ("gpt2", {}, "Dropout.p is 0.1"),
        ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, None),
        ("opt", {}, "dropout is 0.1"),
        ("llama", {}, None),
    ],
)
def test_a_model_that_drops_at_random_is_told_of(family: str, config: dict[str, Any], told: str | None) -> None:
    """Not of an adapter's dropout, which the pass of the base has not."""
    said: list[str] = []
    targets = {"llama": ["q_proj"], "opt": ["q_proj"], "gpt2": ["c_attn"]}[family]
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=targets, task_type="CAUSAL_LM")
    warn_of_dropout(get_peft_model(tiny_model(family, **config), lora), "output_drift", said.append)
    assert [told in line and "output_drift would not be 0" in line for line in said] == ([] if told is None else [True])


def test_a_run_tells_of_dropout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model", "gpt2")
    for name, regularisers in (("drifts", [DRIFT]), ("weights", [KINDS["weight_drift"]])):
        method = {**SFT, "tune": "lora", "lora": {"r": 2, "alpha": 4}, "regularisers": regularisers}
        recipe = write_recipe(tmp_path / name, model, recipe="regularise", heads=HEADS, method=method)
        assert train(recipe) == 0
        assert ("drops at random in training" in capsys.readouterr().err) == (name == "drifts")
