"""Every family of recipes through the command line: what is trained, kept, measured, and loaded again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Example, Task, to_jsonl
from headtune.analysis.utils.files import write_text
from headtune.train.config.methods import JolaConfig
from headtune.train.methods.jola import l0_penalty
from headtune.train.methods.ln import norms
from headtune.train.runs.first_stage import l1_penalty, scale_norms
from headtune.train.runs.load_run import load_run
from headtune.train.trainer import answer_set_trainer, penalised_trainers, training_rows
from headtune.train.tuners.head_tuning import HeadTuningConfig, HeadTuningLayer
from helpers.small_runs import train, write_recipe
from helpers.tiny import FACTS, save_tiny, tiny_model, tiny_task, tiny_tokenizer

HEADS = {"list": [[1, 1], [2, 0], [2, 3]]}
SFT = {"objective": "sft"}


def questions(n_wrong: int = 2) -> list[Example]:
    """Which city lies in which country, with cities of the next country as wrong answers."""
    names = list(FACTS)
    return [
        Example(f"Some cities in {name}: 1.", name, tuple(FACTS[name][:2]), (), None, tuple(FACTS[other][:n_wrong]))
        for name, other in zip(names, [*names[1:], names[0]], strict=True)
    ]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "asked.jsonl"
    write_text(path, to_jsonl(questions()))
    return str(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def run_of(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    run = tmp_path / "run"
    return read(run / "run.json"), read(run / "evaluation.json"), run


# --- families ---------------------------------------------------------------------------------------------------------

# family, heads, method, parameters that a tiny llama (d_model 32, 4 heads of 8, 2 KV heads) must train with them
FAMILIES: dict[str, tuple[str, Any, dict[str, Any], int]] = {
    "lofit": ("lofit", HEADS, SFT | {"scale": "none"}, 3 * 8),
    "jola": ("jola", HEADS, SFT, 3 * (8 + 8 + 1 + 1)),
    # q and o: 8 x 32 a head; k and v: 8 x 32 a group, and both heads of layer 2 have a group of their own.
    "masked": ("masked", HEADS, SFT, 3 * 4 * 8 * 32),
    # Of each slice rank x (8 + 32).
    "masked, rank": ("masked", HEADS, SFT | {"rank": 2, "parts": ["q", "o"]}, 3 * 2 * 2 * (8 + 32)),
    "lora": ("lora", None, SFT | {"r": 2}, 0),
    "ln": ("ln", None, SFT, 7 * 32),
    "full": ("full", None, SFT, 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_what_it_says_and_loads_again(name: str, llama: Path, tmp_path: Path) -> None:
    family, heads, method, parameters = FAMILIES[name]
    assert train(write_recipe(tmp_path, llama, recipe=family, heads=heads, method=method)) == 0
    state, evaluation, run = run_of(tmp_path)
    assert state["state"] == "done" and state["training"]["steps"] == 4
    if parameters:
        assert state["parameters"] == parameters
    if name == "full":
        assert state["parameters"] == state["model_parameters"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in steps if "train/loss" in row]
    assert len(losses) == 4 and len(set(losses)) > 1

    model, tokenizer, recipe = load_run(run)
    assert recipe.recipe == family
    untouched = tiny_model("llama", num_key_value_heads=2)
    tokens = tokenizer("List five cities in Italy.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert not torch.equal(model(tokens).logits, untouched(tokens).logits)
    assert evaluation["before"] != evaluation["after"]


def test_only_the_norms_are_norms() -> None:
    for family in ("llama", "gpt2", "gemma2", "qwen3", "opt"):
        model = tiny_model(family)
        found = set(norms(model))
        assert found == {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}


def test_full_fine_tuning_that_keeps_nothing(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_recipe(tmp_path, llama, recipe="full", heads=None, method=SFT | {"keep": False})) == 0
    _, _, run = run_of(tmp_path)
    assert not (run / "model").exists()
    from headtune.cli.main import main

    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "method.keep=true" in capsys.readouterr().err


# --- DPO --------------------------------------------------------------------------------------------------------------


def test_pairs_of_right_and_wrong_answers() -> None:
    task = Task("asked", tuple(questions()), kind="multiple_choice")
    one, every = training_rows.dpo_rows(task, "one"), training_rows.dpo_rows(task, "all")
    assert one[0] == {"prompt": "Some cities in Italy: 1.", "chosen": " Rome", "rejected": " Tokyo"}
    assert len(one) == len(task.examples) and len(every) == 4 * len(one)
    assert len({tuple(row.values()) for row in every}) == len(every)


@pytest.mark.parametrize("family", ["lofit", "masked", "lora", "full", "jola"])
def test_dpo_prefers_what_it_is_shown(family: str, llama: Path, asked: str, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        llama,
        recipe=family,
        heads=HEADS if family in ("lofit", "masked", "jola") else None,
        task={"train": asked, "kind": "multiple_choice"},
        method={"objective": "dpo"} | ({"l0": 0.0} if family == "jola" else {}),
        training={"max_steps": 5, "per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True}
        | {"learning_rate": 1e-3 if family == "full" else 0.02, "save_strategy": "no"},
    )
    assert train(recipe) == 0
    _, evaluation, run = run_of(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    if family != "jola":  # its offsets start away from zero
        assert losses[0] == pytest.approx(0.6931, abs=2e-3), "policy and reference start as one"
    assert losses[-1] < losses[0]
    assert {"mc1", "mc2", "neutral_perplexity"} <= evaluation["after"].keys()


def test_the_reference_of_dpo_is_the_untouched_model(asked: str, tmp_path: Path) -> None:
    from trl import DPOConfig

    tokenizer, base = tiny_tokenizer(), tiny_model("llama")
    rows = training_rows.dpo_rows(Task("asked", tuple(questions()), kind="multiple_choice"), "one")
    config = HeadTuningConfig(heads=[[0, 1], [2, 3]], init_std=0.5, task_type="CAUSAL_LM")
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        max_length=None,
    )
    trainer: Any = penalised_trainers.DPO(
        tiny_model("llama"), args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        found = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch))
        policy = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.zeros(2, 4)
    for i in range(4):
        for j, which in enumerate(("chosen", "rejected")):
            prompt = tokenizer(rows[i]["prompt"]).input_ids
            whole = [*tokenizer(rows[i]["prompt"] + rows[i][which]).input_ids, tokenizer.eos_token_id]
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                log_p = base(torch.tensor([whole])).logits[0].log_softmax(-1)
            expected[j, i] = sum(log_p[t - 1, whole[t]] for t in range(len(prompt), len(whole)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        untouched = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (policy - untouched).abs().max() > 0.1, (
        "the adapter is away from zero, so the reference had to switch it off"
    )


def test_dpo_without_wrong_answers(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_recipe(tmp_path, llama, method={"objective": "dpo"})) == 2
    assert "'incorrect'" in capsys.readouterr().err and not (tmp_path / "run").exists()


# --- choosing heads ---------------------------------------------------------------------------------------------------


def test_lofit_chooses_heads_and_tunes_them(llama: Path, tmp_path: Path) -> None:
    heads = {"lofit": {"learning_rate": 0.05, "l1": 1e-3, "max_steps": 3}, "top": 4}
    method = SFT | {"scale": "none", "init_std": 1e-3}
    assert train(write_recipe(tmp_path, llama, heads=heads, method=method)) == 0
    state, _, run = run_of(tmp_path)
    chosen = HeadSet.load(run)
    assert chosen.method["name"] == "lofit" and list(chosen.roles) == ["selected"]
    assert sorted(chosen.top("selected")) == [tuple(pair) for pair in state["heads"]] and len(state["heads"]) == 4
    scores = load_file(run / "scores.safetensors")["lofit.norm"]
    best = scores.flatten().topk(4).indices.tolist()
    assert [divmod(i, 4) for i in best] == chosen.top("selected")
    assert state["parameters"] == 4 * 8
    page = (run / "report.html").read_text()
    assert "<h3>Selected</h3>" in page and "dissociation" not in page.lower()

    # The head set serves another run, with the role named.
    other = tmp_path / "other"
    other.mkdir()
    again = {"from": str(run), "top": 2}  # a set with the one role `selected` needs no role
    assert train(write_recipe(other, llama, heads=again, method=method)) == 0
    assert read(other / "run" / "run.json")["heads"] == sorted(list(pair) for pair in chosen.top("selected")[:2])


def test_the_first_stage_alone(llama: Path, tmp_path: Path) -> None:
    heads = {"lofit": {"max_steps": 2}, "top": 4}
    assert train(write_recipe(tmp_path, llama, heads=heads, method=SFT | {"select_only": True})) == 0
    run = tmp_path / "run"
    assert (run / "heads.json").is_file() and not (run / "adapter").exists() and not (run / "evaluation.json").exists()
    assert read(run / "run.json")["state"] == "done"


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("objective", ["sft", "answer_set"])
def test_the_l1_term_is_part_of_the_loss_however_batches_are_cut(
    objective: str, accumulated: int, tmp_path: Path
) -> None:
    """One SGD step moves A by lr * (dloss/dA + l1 * sign A); the L1 part is read off as a difference of two runs."""
    from trl import SFTConfig

    from headtune.analysis.tasks.tokenized import encode
    from headtune.train.config.methods import AnswerSetConfig

    tokenizer, rate, l1 = tiny_tokenizer(), 0.5, 0.25
    task = tiny_task(subjects=4)
    after = {}
    for weight in (0.0, l1):
        model = tiny_model("llama")
        config = HeadTuningConfig(heads=[[0, 1], [2, 3]], offset=False, init_std=1.0, task_type="CAUSAL_LM")
        arguments = SFTConfig(
            output_dir=str(tmp_path / str(weight)),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=1,
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            learning_rate=rate,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            save_strategy="no",
            max_length=None,
            seed=0,
        )
        torch.manual_seed(0)
        if objective == "sft":
            more: dict[str, Any] = {"train_dataset": training_rows.sft_rows(task, 0)}
            kind: Any = penalised_trainers.SFT
        else:
            more = {
                "train_dataset": training_rows.answer_set_rows(encode(task, tokenizer)),
                "data_collator": answer_set_trainer.AnswerSetCollator(tokenizer.pad_token_id),
                "block": AnswerSetConfig(retention=0.0),
            }
            kind = answer_set_trainer.AnswerSetTrainer
        trainer = kind(model, args=arguments, processing_class=tokenizer, peft_config=config, **more)
        trainer.penalty = l1_penalty(weight)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        after[weight] = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, value in start.items():
        torch.testing.assert_close(after[0.0][name] - after[l1][name], rate * l1 * value.sign(), atol=1e-5, rtol=1e-5)


def test_scale_norms_and_open_gates() -> None:
    from peft import get_peft_model

    model: Any = get_peft_model(
        tiny_model("llama"), HeadTuningConfig(heads=[[0, 1], [2, 3]], offset=False, init_std=1.0, task_type="CAUSAL_LM")
    )
    found = scale_norms(model, 3, 4)
    for module in model.modules():
        if isinstance(module, HeadTuningLayer):
            for scale in module.head_tuning_scale.values():
                [head] = module.chosen_heads["default"]
                assert found[module.layer, head] == pytest.approx(scale.norm().item())
    assert (found > 0).sum() == 2


def test_the_weight_of_open_gates_grows() -> None:
    from peft import get_peft_model

    model: Any = get_peft_model(
        tiny_model("llama"), HeadTuningConfig(heads=[[0, 1]], gates=True, init_std=0.1, task_type="CAUSAL_LM")
    )
    penalty = l0_penalty(JolaConfig(l0=0.5, l0_warmup=0.2))
    terms = [penalty(model, progress)["l0"] for progress in (0.0, 0.1, 0.2, 0.9)]
    assert [weight for _, weight in terms] == pytest.approx([0, 0.25, 0.5, 0.5])
    assert len({term.item() for term, _ in terms}) == 1 and terms[0][0].item() > 0


def test_jola_says_which_heads_stayed_open(llama: Path, tmp_path: Path) -> None:
    assert train(write_recipe(tmp_path, llama, recipe="jola", heads={"all": True}, method=SFT | {"l0": 0.0})) == 0
    _, _, run = run_of(tmp_path)
    chosen = HeadSet.load(run)
    assert chosen.method["name"] == "jola" and len(chosen.roles["selected"]) == 12
    assert all(entry.score > 0 for entry in chosen.roles["selected"])
    scores = load_file(run / "scores.safetensors")
    assert ((scores["jola.gate"] > 0) & (scores["jola.gate"] <= 1)).all()
    ranked = [divmod(i, 4) for i in scores["jola.norm"].flatten().argsort(descending=True).tolist()]
    assert chosen.top("selected") == ranked


def test_gates_close_under_a_strong_penalty_and_learn_at_their_own_rate(llama: Path, tmp_path: Path) -> None:
    """Adam moves by about its rate a step whatever the gradient: 4.8 from open to closed is 24 steps of 0.2."""
    method = SFT | {"l0": 100.0, "l0_warmup": 0.0, "gate_learning_rate": 0.5}
    recipe = write_recipe(tmp_path, llama, recipe="jola", heads={"all": True}, method=method)
    assert train(recipe, "training.max_steps=20", "training.lr_scheduler_type=constant") == 0
    _, _, run = run_of(tmp_path)
    assert HeadSet.load(run).roles["selected"] == ()
    adapted = load_file(run / "adapter" / "adapter_model.safetensors")
    gates = [value for name, value in adapted.items() if "gate" in name]
    assert gates and all((value < -2.4).all() for value in gates)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_run_that_stops_after_its_last_step_goes_on_without_another_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without choosing its heads again."""
    heads = {"lofit": {"learning_rate": 0.05, "max_steps": 2}, "top": 3}
    folders = []
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
        folders.append(write_recipe(tmp_path / name, llama, heads=heads, method=SFT))
    assert train(folders[0]) == 0
    with monkeypatch.context() as patched:
        calls = []

        def measured_once(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 2:
                raise RuntimeError("the machine went away")
            return evaluate(*arguments)

        from headtune.train.evaluation.evaluate import evaluate

        patched.setattr("headtune.train.evaluation.evaluation_file.evaluate", measured_once)
        with pytest.raises(RuntimeError, match="went away"):
            train(folders[1])
    with monkeypatch.context() as patched:
        patched.setattr(
            "headtune.train.runs.first_stage.lofit_heads", lambda *_: pytest.fail("heads were chosen already")
        )
        assert train(folders[1], "--resume") == 0
        assert train(folders[1], "--resume") == 0, "a finished run is left as it is"
    runs = [tmp_path / name / "run" for name in ("unbroken", "broken")]
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read(runs[0] / "evaluation.json") == read(runs[1] / "evaluation.json")
    assert read(runs[1] / "run.json")["training"]["steps"] == 4 and not (runs[1] / "checkpoint-5").exists()


def test_a_file_named_like_a_split_is_no_split(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "train.jsonl"
    write_text(whole, to_jsonl(tiny_task(subjects=8).examples))
    assert train(write_recipe(tmp_path, llama, task={"train": str(whole)}, method=SFT)) == 0
    shared = write_recipe(tmp_path, llama, task={"train": str(whole), "split": {"by": "file"}}, method=SFT)
    assert train(shared, f"output_dir={tmp_path / 'other'}") == 2
    assert "task.eval is missing" in capsys.readouterr().err


def test_a_run_is_measured_on_its_own_split(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from headtune.analysis.tasks.loading import load_task
    from headtune.cli.main import main

    recipe = write_recipe(tmp_path, llama, method=SFT)
    assert train(recipe, "task.split.seed=5") == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--task", f"{tmp_path / 'cities.jsonl'}:test", "--json"]) == 0
    prompts = [row["prompt"] for row in json.loads(capsys.readouterr().out)["generations"]]
    own = load_task(f"{tmp_path / 'cities.jsonl'}:test", 5)
    assert sorted(prompts) == sorted(example.prompt for example in own.examples)
    assert own.subjects != load_task(f"{tmp_path / 'cities.jsonl'}:test", 0).subjects


@pytest.mark.slow
def test_runs_of_all_kinds_stand_side_by_side(
    llama: Path, asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from headtune.cli.main import main

    (tmp_path / "runs").mkdir()
    for kind in ("multiple_choice", "exact_match", "lists"):
        recipe = write_recipe(tmp_path, llama, task={"train": asked, "kind": kind}, method=SFT)
        assert train(recipe, f"output_dir={tmp_path / 'runs' / kind}") == 0
    chosen = write_recipe(tmp_path, llama, heads={"lofit": {"max_steps": 1}}, method=SFT | {"select_only": True})
    assert train(chosen, f"output_dir={tmp_path / 'runs' / 'chosen'}") == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr()
    tables = re.split(r"asked:test, \d+ prompts?\b(?!, continued)", shown.out)[1:]
    metrics = ("MC1", "exact match", "repeat rate")
    found = [[name for name in metrics if re.search(name.replace(" ", r"\s+"), part)] for part in tables]
    assert sorted(found) == [["MC1"], ["exact match"], ["repeat rate"]]  # none has columns of another's
    assert main(["export", str(tmp_path / "runs" / "chosen"), str(tmp_path / "out")]) == 2
    assert "chose heads and trained nothing" in capsys.readouterr().err


def test_what_a_model_writes_is_no_markup() -> None:
    from rich.console import Console

    from headtune.cli.tables import generations_table

    row = {
        "prompt": "A [red]list[/b]:",
        "before": "[/b] one",
        "after": "two [bold]",
        "before_kinds": [],
        "after_kinds": [],
    }
    console = Console(record=True, width=100)
    console.print(generations_table([row]))
    text = console.export_text()
    assert "[red]list[/b]" in text and "[/b] one" in text and "two [bold]" in text


# --- no training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "method"),
    [
        (HEADS, {"kind": "scale", "factor": 2.0}),
        (HEADS, {"kind": "iti", "alpha": 5.0}),
        ({"probe": {"folds": 2}, "top": 3}, {"kind": "iti", "alpha": 5.0}),
        (None, {"kind": "sink", "tau": 0.0, "gamma": 0.1}),
        (None, {"kind": "intercept", "beta": 1.0, "fit": "{asked}"}),
    ],
    ids=["scale", "iti", "iti-probe", "sink", "intercept"],
)
def test_steering_is_an_adapter_like_any_other(
    heads: Any, method: dict[str, Any], llama: Path, asked: str, tmp_path: Path
) -> None:
    method = {key: asked if value == "{asked}" else value for key, value in method.items()}
    recipe = write_recipe(
        tmp_path,
        llama,
        recipe="steer",
        heads=heads,
        method=method,
        training=None,
        task={"train": asked, "kind": "multiple_choice"},
    )
    assert train(recipe) == 0
    state, evaluation, run = run_of(tmp_path)
    assert state["steering"] and evaluation["before"] != evaluation["after"]
    model, tokenizer, _ = load_run(run)
    tokens = tokenizer("List five cities in Italy.", return_tensors="pt").input_ids
    with torch.no_grad(), model.disable_adapter():
        base = model(tokens).logits
    assert not torch.equal(model(tokens).logits, base)
    if heads and "probe" in heads:
        assert len(HeadSet.load(run).roles["selected"]) == 3


# --- the prefix cache in a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["sft", "dpo", "answer_set"])
def test_the_prefix_cache_changes_no_result(objective: str, llama: Path, asked: str, tmp_path: Path) -> None:
    adapters = []
    for cached in (True, False):
        folder = tmp_path / str(cached)
        folder.mkdir()
        method: dict[str, Any] = {"objective": objective, "prefix_cache": cached}
        changes: dict[str, Any] = {"task": {"train": asked, "kind": "multiple_choice"}} if objective == "dpo" else {}
        if objective == "answer_set":
            method["answer_set"] = {"own_lists": 0.0}
        heads = {"list": [[1, 1], [2, 0]]}
        assert train(write_recipe(folder, llama, heads=heads, method=method, **changes), "training.max_steps=9") == 0
        state = read(folder / "run" / "run.json")
        assert ("prefix_cache" in state["training"]) == cached
        if cached:
            assert state["training"]["prefix_cache"]["layers"] == 1
            assert state["training"]["prefix_cache"]["hits"] > 0
        adapters.append(load_file(folder / "run" / "adapter" / "adapter_model.safetensors"))
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name], atol=1e-4, rtol=1e-4)


def test_the_cache_says_why_it_is_off(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_recipe(tmp_path, llama, heads={"list": [[0, 1]]}, method=SFT)) == 0
    assert "prefix cache off: layer 0 is trained" in capsys.readouterr().err


# --- families without SDPA --------------------------------------------------------------------------------------------


def test_gemma2_trains_with_its_own_attention(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "gemma2")
    assert train(write_recipe(tmp_path, model, heads=HEADS, method=SFT)) == 0


def test_attention_is_put_back() -> None:
    heads: HeadModel = wrap_model(tiny_model("gemma2"), tiny_tokenizer(), "tiny")
    heads.record_attention(False)
    assert heads.hf.config._attn_implementation == "eager"
    heads.record_attention(True)
    assert heads.hf.config._attn_implementation == "headtune_rows"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "steer", "method": {"kind": "itis"}}, ["method.kind 'itis'", "iti"]),
        ({"recipe": "steer", "method": {"kind": "iti", "factor": 2.0}}, ["method.factor"]),
        ({"recipe": "steer", "method": {"kind": "sink"}}, ["finds its own heads"]),
        ({"recipe": "steer", "method": {}, "heads": {"lofit": {}}}, ["heads.lofit", "heads.probe"]),
        ({"recipe": "steer", "method": {}}, ["training.", "steer trains nothing"]),
        ({"recipe": "jola", "heads": None, "method": SFT}, ["heads is missing"]),
        ({"recipe": "masked", "method": SFT | {"parts": ["q", "x"]}}, ["method.parts"]),
        ({"recipe": "masked", "method": SFT | {"parts": []}}, ["method.parts"]),
        ({"recipe": "masked", "method": SFT | {"rank": 0}}, ["method.rank"]),
        ({"recipe": "masked", "method": SFT | {"rank": 2, "alpha": 0}}, ["method.alpha"]),
        ({"recipe": "masked", "method": SFT | {"alpha": 8}}, ["method.alpha", "give method.rank"]),
        ({"recipe": "masked", "method": SFT | {"share": "layer"}}, ["method.share", "give method.rank"]),
        ({"recipe": "masked", "method": SFT | {"rank": 2, "share": "layer"}}, ["share layer", "[q, k, v, o]"]),
        ({"recipe": "full", "heads": None, "method": {}}, ["retention", "set it to 0"]),
        ({"method": SFT | {"select_only": True}}, ["select_only", "heads.lofit"]),
        ({"heads": {"lofit": {"l1": -1.0}}, "method": SFT}, ["heads.lofit.l1"]),
        ({"heads": {"lofit": {}, "all": True}, "method": SFT}, ["exactly one of"]),
        ({"method": {"objective": "dpo"}, "training": {"beta": "x"}}, ["training.beta"]),
        ({"method": SFT, "training": {"beta": 0.1}}, ["unknown key 'training.beta'"]),
        ({"method": SFT | {"prefix_memory_gb": -1.0}}, ["method.prefix_memory_gb"]),
        ({"evaluation": {"preamble": "harness"}, "method": SFT}, ["evaluation.preamble"]),
        ({"task": {"train": "truthfulqa:none.csv"}, "method": SFT}, ["none.csv"]),
    ],
    ids=str,
)
def test_refused_in_one_line(
    changes: dict[str, Any], words: list[str], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write_recipe(tmp_path, llama, **changes)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()


def test_full_fine_tuning_in_half_precision(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_recipe(tmp_path, llama, recipe="full", heads=None, method=SFT), "model.dtype=bfloat16") == 2
    assert "would round most steps" in capsys.readouterr().err


def test_multiple_choice_has_no_first_tokens(
    llama: Path, asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write_recipe(tmp_path, llama, task={"train": asked, "kind": "multiple_choice"})) == 2
    assert "method.objective" in capsys.readouterr().err
