"""Sequences of tasks: what is seen again and when, every part of the loss, resuming wherever a run was broken."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Example, Task, to_jsonl
from headtune.analysis.utils.files import write_text
from headtune.cli.main import main
from headtune.train.config.methods import ReplayConfig, SeekrConfig
from headtune.train.config.recipe import load_recipe
from headtune.train.continual import learner as continual
from headtune.train.continual import measurements, sequence
from headtune.train.continual.replay import Replay, drawn, sample
from headtune.train.losses.weight_penalties import WeightAnchor, fisher_diagonal
from headtune.train.runs.load_run import load_run
from headtune.train.tracking.tracker import Tracker
from headtune.train.trainer.rows import TrainingRow, padded, rows_of
from headtune.train.trainer.run_context import RunContext
from headtune.train.tuners import weights_io
from helpers.tiny import FACTS, quick_among, tiny_model, tiny_tokenizer

TEMPLATES = ("Some city in {}:", "List cities in {}. 1.", "Here is a city I know in {}:")
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "learning_rate": 0.003,
    "logging_steps": 1,
    "save_steps": 2,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    for index, template in enumerate(TEMPLATES):
        examples = [Example(template.format(name), name, (FACTS[name][index],)) for name in FACTS]
        write_text(folder / f"task{index}.jsonl", to_jsonl(examples))
    return [str(folder / f"task{index}.jsonl") for index in range(len(TEMPLATES))]


def recipe(folder: Path, model: Path, tasks: list[str], method: dict[str, Any], **changes: Any) -> Path:
    content = {
        "recipe": "seekr",
        "model": {"name": str(model)},
        "task": {"sequence": tasks, "kind": "exact_match"},
        "method": {"replay": {"count": 2}, "distil": {"layers": 2, "heads": 3, "queries": 4}, **method},
        "training": TRAINING,
        "tracking": {"wandb": "disabled"},
        "output_dir": str(folder / "run"),
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def train(path: Path, *words: str) -> int:
    return main(["train", str(path), *words])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- the buffer -------------------------------------------------------------------------------------------------------


def rows(n: int, index: int = 0) -> list[TrainingRow]:
    return [TrainingRow(f"{index}-{place}", (1, 2, 3), (-100, -100, 3)) for place in range(n)]


def test_a_sample_is_random_and_at_least_one_row() -> None:
    everything = rows(100)
    chosen = sample(everything, ReplayConfig(ratio=0.1), seed="0")
    assert len(chosen) == 10 and len(set(chosen)) == 10
    assert chosen == sample(everything, ReplayConfig(ratio=0.1), seed="0")
    assert chosen != sample(everything, ReplayConfig(ratio=0.1), seed="1")
    assert chosen != everything[:10]  # not the first ones of the file
    assert len(sample(everything, ReplayConfig(ratio=0.001), seed="0")) == 1
    assert len(sample(everything, ReplayConfig(count=500), seed="0")) == 100


@pytest.mark.parametrize("per_batch", [0.08, 0.5, 1.0, 2.3])
def test_rows_are_due_evenly_and_each_equally_often(per_batch: float) -> None:
    replay = Replay(rows(7), per_batch, seed="3")
    due = [replay.due(batch) for batch in range(350)]
    counts = [len(some) for some in due]
    assert max(counts) - min(counts) <= 1
    for batch in range(350):  # never more than one row early or late
        assert abs(sum(counts[:batch]) - batch * per_batch) <= 1
    seen = Counter(row.key for some in due for row in some)
    assert max(seen.values()) - min(seen.values()) <= 1


def test_processes_share_a_round_and_get_as_many_rows_each() -> None:
    replay = Replay(rows(6), 0.5, seed="0")
    one = [[row.key for batch in range(24) for row in replay.due(batch, process, 2)] for process in (0, 1)]
    assert len(one[0]) == len(one[1]) == 12
    assert set(Counter(one[0] + one[1]).values()) == {4}


def test_the_loss_of_a_row_is_on_its_answer() -> None:
    tokenizer = tiny_tokenizer()
    task = Task("t", (Example("Some city in Japan:", "Japan", ("Tokyo",)),), kind="exact_match")
    (row,) = rows_of(task, tokenizer, 2, seed=0)
    assert row.key == "2-0" and tokenizer.decode([t for t in row.labels if t >= 0]) == " Tokyo\n"
    assert tokenizer.decode(row.input_ids) == "Some city in Japan: Tokyo\n"


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 ties its unembedding
def test_weights_come_back_to_the_bit(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    weights_io.save(model, tmp_path / "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    weights_io.restore(model, tmp_path / "weights")
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", num_key_value_heads=2), tiny_tokenizer())


def eager(model: Any, row: TrainingRow) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits at label positions and every layer's attention, of one row without padding."""
    output = model(torch.tensor([row.input_ids]), output_attentions=True, use_cache=False)
    labelled = [at for at in range(row.length - 1) if row.labels[at + 1] != -100]
    return output.logits[0, labelled], [layer[0] for layer in output.attentions]


@pytest.mark.parametrize("strategy", ["seekr", "replay", "der", "lwf"])
def test_the_loss_and_its_gradient_equal_their_definition(
    strategy: str, llama: Path, tasks: list[str], tmp_path: Path
) -> None:
    """Every term, recomputed row by row with eager attention, float32: 1e-5 relative on the loss and the gradient."""
    caught: dict[str, Any] = {}

    class Caught(continual.SequenceTrainer):
        def _terms(self, model: Any, own: Any, again: Any) -> Any:
            self.last_again = again
            return super()._terms(model, own, again)

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            loss = super().compute_loss(model, inputs, *rest, **more)
            moved = self.state.global_step >= 2  # before, the model is its own teacher, and the distances are 0
            if self.continual.teachers is not None and moved and "loss" not in caught:
                again = self.last_again
                if again or strategy == "lwf":
                    caught.update(loss=loss, trainer=self, rows=[self.rows[i] for i in inputs["row"]], again=again)
                    model.zero_grad()
                    loss.backward(retain_graph=True)
                    caught["gradient"] = {n: p.grad.clone() for n, p in model.named_parameters()}
                    if strategy == "seekr":
                        caught["attention"] = {kind: self._attention(model, kind) for kind in ("mean", "layers")}
                    self._reference(model)
                    model.zero_grad()
            return loss

        def _attention(self, model: Any, reduction: str) -> float:
            method = self.method
            distil = method.distil.model_copy(update={"reduction": reduction})
            self.method = method.model_copy(update={"distil": distil})
            term, _ = self._terms(model, caught["rows"], caught["again"])["attention"]
            self.method = method
            return term.item()

        def _reference(self, model: Any) -> None:
            model.set_attn_implementation("eager")
            model.zero_grad()
            method, continual = self.method, self.continual
            own = [eager(model, row)[0] for row in caught["rows"]]
            wanted = [torch.tensor([t for t in row.labels if t != -100]) for row in caught["rows"]]
            loss = torch.nn.functional.cross_entropy(torch.cat(own), torch.cat(wanted))
            if strategy == "lwf":
                stored = torch.cat([continual.teachers.logits(row.key) for row in caught["rows"]])
                p = stored.softmax(-1)
                kl = (p * (stored.log_softmax(-1) - torch.cat(own).log_softmax(-1))).sum(-1).mean()
                loss = loss + method.lwf_weight * kl
            if caught["again"]:
                passes = [eager(model, row) for row in caught["again"]]
                share = len(passes) / 3  # rows of a full batch
                logits = torch.cat([logits for logits, _ in passes])
                wanted = torch.cat([torch.tensor([t for t in row.labels if t != -100]) for row in caught["again"]])
                again = torch.nn.functional.cross_entropy(logits, wanted)
                stored = torch.cat([continual.teachers.logits(row.key) for row in caught["again"]])
                l1 = method.distil.replay_weight if strategy == "seekr" else 1.0
                loss = loss + share * l1 * again
                if strategy == "der":
                    loss = loss + share * method.der_weight * (logits - stored).square().mean()
                if strategy == "seekr":
                    p = stored.softmax(-1)
                    kl = (p * (stored.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
                    distances = []
                    by_layer: dict[int, list[torch.Tensor]] = {}
                    for row, (_, attention) in zip(caught["again"], passes, strict=True):
                        teacher = continual.teachers.get(row.key, continual.heads[row.key])
                        for layer, chosen in teacher.heads.items():
                            before = len(distances)
                            for at, head in enumerate(chosen):
                                for t, query in enumerate(teacher.positions):
                                    q = teacher.attention[layer][at, t, : query + 1]
                                    mine = attention[layer][head, query, : query + 1]
                                    distances.append((q * (q.log() - mine.log())).sum())
                            by_layer.setdefault(layer, []).append(torch.stack(distances[before:]).mean())
                    means = [torch.stack(of_rows).mean() for of_rows in by_layer.values()]
                    caught["by_layers"] = torch.stack(means).mean().item()
                    attention_loss = torch.stack(distances).mean()
                    caught["by_rows"] = attention_loss.item()
                    loss = loss + share * ((1 - l1) * kl + method.distil.attention_weight * attention_loss)
            loss.backward()
            caught["reference"] = loss.detach()
            caught["reference_gradient"] = {n: p.grad.clone() for n, p in model.named_parameters()}
            model.set_attn_implementation("headtune_rows")

    distil = {
        "layers": 2,
        "heads": 5,
        "queries": 4,
        "attention_weight": 10.0,
    }  # 4 in a layer at most: in both, not as many
    path = recipe(tmp_path, llama, tasks, {"strategy": strategy, "distil": distil})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "SequenceTrainer", Caught)
        assert train(path) == 0
    if strategy == "replay":
        assert "loss" not in caught  # nothing is stored; the terms are those that `der` shares
        return
    assert caught["loss"].item() == pytest.approx(caught["reference"].item(), rel=1e-5)
    if strategy == "seekr":
        assert caught["attention"] == pytest.approx(
            {"mean": caught["by_rows"], "layers": caught["by_layers"]}, rel=1e-4
        )
        assert caught["by_rows"] != pytest.approx(caught["by_layers"], rel=1e-2)
    for name, gradient in caught["reference_gradient"].items():
        scale = max(1e-3, gradient.abs().max().item())
        assert (caught["gradient"][name] - gradient).abs().max().item() <= 1e-5 * scale + 1e-6, name


def test_padding_changes_no_row(model: HeadModel) -> None:
    long = TrainingRow("0-0", (5, 6, 7, 8, 9), (-100, -100, -100, 8, 9))
    short = TrainingRow("0-1", (5, 6), (-100, 6))
    batch = padded([long, short], pad=0)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [-100, 6, -100, -100, -100]


# --- whole runs -------------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "seekr": {},
    "seekr, lora": {"tune": "lora", "lora": {"r": 2, "alpha": 4}},
    "seekr, per task, latest, half": {
        "distil": {
            "selection": "per_task",
            "teacher": "latest",
            "dtype": "float16",
            "logits_top": 5,
            "layers": "all",
            "heads": 12,
        }
    },
    "seekr, random": {"distil": {"choice": "random", "layers": 2, "heads": 3}},
    "seekr, random among the others": {"distil": {"choice": "random_matched", "layers": 2, "heads": 3}},
    "sequential": {"strategy": "sequential"},
    "der, lora": {"strategy": "der", "tune": "lora"},
    "ewc": {"strategy": "ewc", "ewc_rows": 3},
    "multitask": {"strategy": "multitask", "keep": "all"},
}


@pytest.mark.parametrize("name", quick_among(METHODS, ["seekr, lora"]))
def test_a_strategy_learns_a_sequence(name: str, llama: Path, tasks: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(Path(tasks[0]).read_bytes())
    evaluation = {"general": [str(other)]} if name == "seekr" else None
    path = recipe(tmp_path, llama, tasks, METHODS[name], evaluation=evaluation)
    assert train(path) == 0
    run = tmp_path / "run"
    state, measured, sequence = read(run / "run.json"), read(run / "evaluation.json"), read(run / "sequence.json")
    together = name == "multitask"
    assert state["state"] == "done" and state["training"]["steps"] == 12
    assert [len(column) for column in sequence["after"]] == ([3] if together else [1, 2, 3])
    after = measured["after"]
    assert after["op"]["mean"] == pytest.approx(
        sum(sum(one["values"]) / len(one["values"]) for one in sequence["after"][-1]) / 3
    )
    assert ("bwt" in after) != together and "task1/exact_match" in after
    assert any("repeat_rate" in key for key in after) == (name == "seekr")  # the general task is made of lists
    model, _, kept_recipe = load_run(run)
    assert kept_recipe.dump() == load_recipe(str(path)).dump()
    assert train(path, "--resume") == 0  # it is the same run, and done
    assert state.get("fisher_rows") == ({"task0": 3, "task1": 3} if name == "ewc" else None)
    weights = "adapter/adapter_model.safetensors" if "lora" in name else "model/model.safetensors"
    assert model is not None and load_file(run / weights)
    n_chosen = 0 if not name.startswith("seekr") else 12 if "half" in name else 3
    assert [len(pairs) for pairs in sequence["heads"]] == ([n_chosen] * 3 if n_chosen else [])
    assert (run / "heads.json").is_file() == name.startswith("seekr")
    assert not (run / "teachers").exists()
    kept = sorted(path.name for path in (run / "tasks").glob("*/model"))
    assert bool(kept) == together  # keep: all


def test_fisher_information_is_of_the_rows_drawn(model: HeadModel, tasks: list[str], tmp_path: Path) -> None:
    """Three rows of a task, the same whenever it is asked; `all` takes all."""
    found: dict[Any, dict[str, torch.Tensor]] = {}
    for n in (3, "all"):
        method = {"strategy": "ewc", "ewc_rows": n}
        made = load_recipe(str(recipe(tmp_path, tmp_path, tasks, method)), [f"output_dir={tmp_path}/{n}"])
        task = load_task(tasks[0])
        own = rows_of(task, model.tokenizer, 0, made.seed)
        stages = [continual.Stage(name, task, own) for name in ("first", "second")]
        with Tracker(made.folder, "x", {}, wandb_mode="disabled") as tracker:
            learner = continual.Learner(RunContext(made, model, tracker), stages)
            model.hf.requires_grad_(True)
            learner._measure_fisher(0)
        kept = drawn(own, n, "0/0")  # type: ignore[arg-type]
        assert learner.fisher[0] == kept and len(kept) == (len(own) if n == "all" else n)
        assert learner.fisher[1] == drawn(own, n, "0/1")  # type: ignore[arg-type]
        found[n] = WeightAnchor.load(learner.place(0) / "anchor.safetensors").fisher
        for row in kept:
            one = fisher_diagonal(model.hf, [row.plain])
            found[n] = {name: value - one[name] / len(kept) for name, value in found[n].items()}
        assert max(rest.abs().max().item() for rest in found[n].values()) < 1e-6  # the mean over these rows


def test_a_run_that_is_done_keeps_no_anchor(llama: Path, tasks: list[str], tmp_path: Path) -> None:
    """Killed after the last task was measured, when its predecessor's anchor was still there; then taken up."""
    path = recipe(tmp_path, llama, tasks, {"strategy": "ewc", "ewc_rows": 2}, training=TRAINING | {"max_steps": 1})
    real = continual.Learner.cleanup

    def broken(learner: continual.Learner, index: int) -> None:
        if index == 2:
            raise Broken
        real(learner, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual.Learner, "cleanup", broken)
        with pytest.raises(Broken):
            train(path)
    run = tmp_path / "run"
    assert [found.parent.name for found in run.glob("tasks/*/anchor.safetensors")] == ["02-task1"]
    assert train(path, "--resume") == 0
    assert read(run / "run.json")["state"] == "done" and not list(run.glob("tasks/*/anchor.safetensors"))


def test_only_what_is_seen_again_is_kept_of_tasks_done(llama: Path, tasks: list[str], tmp_path: Path) -> None:
    """Replay sees the rows of the buffer and no others of earlier tasks."""
    seen: list[str] = []

    class Seen(continual.SequenceTrainer):
        def _terms(self, model: Any, own: Any, again: Any) -> Any:
            seen.extend(row.key for row in again)
            place = int(Path(self.args.output_dir).parent.name.split("-")[0])
            assert {row.key.split("-")[0] for row in own} == {str(place - 1)}
            return super()._terms(model, own, again)

    path = recipe(tmp_path, llama, tasks, {"strategy": "replay"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "SequenceTrainer", Seen)
        assert train(path) == 0
    assert {key.split("-")[0] for key in seen} == {"0", "1"}
    assert len(set(seen)) == 4 and read(tmp_path / "run" / "run.json")["buffer"] == {f"task{i}": 2 for i in range(3)}


class Broken(BaseException):
    """The process dies."""


BREAKS = ["train", "save", "sensitivity", "teach", "measure", "end"]


def test_accumulated_and_short_batches_go_once_through_the_buffer_an_epoch(
    llama: Path, tasks: list[str], tmp_path: Path
) -> None:
    """5 rows in batches of 2, two of which are accumulated: 3 batches an epoch, the last one short, 2 steps."""
    seen: list[tuple[int, list[str]]] = []

    class Seen(continual.SequenceTrainer):
        def _terms(self, model: Any, own: Any, again: Any) -> Any:
            seen.append((len(own), [row.key for row in again]))
            return super()._terms(model, own, again)

    training = TRAINING | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    path = recipe(tmp_path, llama, tasks[:2], {"strategy": "replay", "replay": {"count": 4}}, training=training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "SequenceTrainer", Seen)
        assert train(path) == 0
    second = seen[len(seen) // 2 :]
    assert [n for n, _ in second] == [2, 2, 1] * 3
    for epoch in range(3):
        rows = [key for _, again in second[3 * epoch : 3 * epoch + 3] for key in again]
        assert len(rows) == len(set(rows)) == 4


def test_tasks_are_drawn_in_orders_of_their_own(llama: Path, tasks: list[str], tmp_path: Path) -> None:
    orders: list[list[str]] = []

    class Seen(continual.SequenceTrainer):
        def _terms(self, model: Any, own: Any, again: Any) -> Any:
            orders.append([row.key.split("-")[1] for row in own])
            return super()._terms(model, own, again)

    path = recipe(tmp_path, llama, tasks, {"strategy": "sequential"}, training=TRAINING | {"max_steps": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "SequenceTrainer", Seen)
        assert train(path) == 0
    assert orders[:8] != orders[8:16] != orders[16:]


def test_changed_data_is_not_taken_up(llama: Path, tasks: list[str], tmp_path: Path, capsys: Any) -> None:
    copies = [str(tmp_path / Path(task).name) for task in tasks]
    for task, copy in zip(tasks, copies, strict=True):
        Path(copy).write_bytes(Path(task).read_bytes())
    path = recipe(tmp_path, llama, copies, {"strategy": "sequential"})
    with pytest.MonkeyPatch.context() as patch:

        def broken(*_: Any) -> None:
            raise Broken

        patch.setattr(sequence, "evaluation_of", broken)
        with pytest.raises(Broken):
            train(path)
    Path(copies[0]).write_bytes(Path(tasks[1]).read_bytes())
    assert train(path, "--resume") == 2
    assert "started with another" in capsys.readouterr().err


def test_mixed_precision_ends_with_the_training(llama: Path, tasks: list[str], tmp_path: Path) -> None:
    """In bfloat16 the model is measured, and teaches, as the base was: without what accelerate wraps around it."""
    forwards: list[bool] = []
    real = continual.compute_teacher

    def noted(model: HeadModel, *rest: Any) -> int:
        forwards.append("forward" in vars(model.hf))
        return real(model, *rest)

    path = recipe(tmp_path, llama, tasks, {}, training=TRAINING | {"bf16": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "compute_teacher", noted)
        assert train(path) == 0
    assert forwards and not any(forwards)


UNBROKEN = {"lora": {"r": 2, "alpha": 4}}


@pytest.fixture(scope="module")
def unbroken(llama: Path, tasks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By what is tuned, a run that was left alone. Read-only."""
    made: dict[str, Path] = {}

    def run(tune: str) -> Path:
        if tune not in made:
            folder = tmp_path_factory.mktemp(f"unbroken_{tune}")
            assert train(recipe(folder, llama, tasks, UNBROKEN | {"tune": tune})) == 0
            made[tune] = folder / "run"
        return made[tune]

    return run


# LoRA saves, measures and ends by the same code.
BROKEN = [("full", where) for where in BREAKS] + [("lora", where) for where in ("train", "sensitivity", "teach")]


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "where"), BROKEN)
def test_a_broken_run_ends_as_the_unbroken_one(
    tune: str,
    where: str,
    unbroken: Callable[[str], Path],
    llama: Path,
    tasks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken in the second task, at every kind of place; then resumed: the same numbers and the same weights."""
    path = recipe(tmp_path, llama, tasks, UNBROKEN | {"tune": tune})
    count = Counter[str]()

    def breaking(name: str, times: int, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            if count[name] == times:
                raise Broken
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        places: dict[str, tuple[Any, str, int]] = {
            "train": (
                continual.SequenceTrainer,
                "training_step",
                8,
            ),  # step 4 of task 2: after its checkpoint of step 2
            "save": (continual.weights_io, "save", 2),
            "sensitivity": (continual, "measure_sensitivity", 2),
            "teach": (continual, "compute_teacher", 2),
            "measure": (measurements, "score_task", 3 + 2),
            "end": (sequence, "evaluation_of", 1),
        }
        owner, attribute, times = places[where]
        patch.setattr(owner, attribute, breaking(where, times, getattr(owner, attribute)))
        with pytest.raises(Broken):
            train(path)
    whole, again = unbroken(tune), tmp_path / "run"
    assert read(again / "run.json")["state"] == "failed"
    assert train(path, "--resume") == 0
    ours, theirs = read(again / "sequence.json"), read(whole / "sequence.json")
    for key in ("before", "after", "heads", "n_steps"):
        assert ours[key] == theirs[key], key
    assert read(again / "evaluation.json") == read(whole / "evaluation.json")
    file = Path("model/model.safetensors" if tune == "full" else "adapter/adapter_model.safetensors")
    first, second = load_file(whole / file), load_file(again / file)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_the_base_measurement_of_another_run_is_taken_over(llama: Path, tasks: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert train(recipe(tmp_path / "one", llama, tasks, {"strategy": "sequential"})) == 0
    before = {"before": str(tmp_path / "one" / "run" / "evaluation.json")}
    assert train(recipe(tmp_path / "two", llama, tasks, {"strategy": "sequential"}, evaluation=before)) == 0
    one, two = (read(tmp_path / name / "run" / "evaluation.json") for name in ("one", "two"))
    assert one == two


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no sequence": ({"task": {"train": "one_to_many"}}, "task.sequence is missing"),
    "one task": ({"task": {"sequence": ["one_to_many"]}}, "at least 2"),
    "both": ({"task": {"train": "x", "sequence": ["a", "b"]}}, "not both"),
    "useless heads": ({"method": {"strategy": "replay"}, "heads": {"all": True}}, "heads are of no use"),
    "learnt heads": ({"heads": {"lofit": {}}}, "choose on one task"),
    "two ratios": ({"method": {"replay": {"ratio": 0.1, "count": 3}}}, "one of ratio and count"),
    "too many heads": ({"method": {"distil": {"layers": 2, "heads": 9}}}, "2 layers have 8"),
    "too many layers": ({"method": {"distil": {"layers": 9, "heads": 1}}}, "the model has 3"),
    "too many heads in all layers": ({"method": {"distil": {"layers": "all", "heads": 13}}}, "the model has 12"),
    "no layers": ({"method": {"distil": {"layers": None}}}, "from 1 up, or 'all', found None"),
    "a word for layers": ({"method": {"distil": {"layers": "every"}}}, "method.distil.layers: expected a whole number"),
    "no rows for EWC": ({"method": {"strategy": "ewc", "ewc_rows": 0}}, "method.ewc_rows: expected a whole number"),
    "latest of der": ({"method": {"strategy": "der", "distil": {"teacher": "latest"}}}, "teacher=latest is for"),
    "half precision": ({"dtype": "bfloat16"}, "round most steps"),
    "packing": ({"training": {"packing": True}}, "training.packing does not go with a run"),
    "few logits": ({"method": {"strategy": "der", "distil": {"logits_top": 5}}}, "logits_top keeps too little"),
    "a regulariser without heads": ({"method": {"regularisers": [{"kind": "attention_kl"}]}}, "has no heads"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_are_refused_in_one_line(
    name: str, llama: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = BAD[name]
    changes = dict(changes)
    words = [f"model.dtype={changes.pop('dtype')}"] if "dtype" in changes else []
    assert train(recipe(tmp_path, llama, tasks, **{"method": {}, **changes}), *words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_task_that_comes_twice_needs_another_name(
    llama: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe(tmp_path, llama, [tasks[0], tasks[0]], {})) == 2
    assert "names 'task0' twice" in capsys.readouterr().err
    block = SeekrConfig.model_validate({"strategy": "seekr"})
    assert block.replays
