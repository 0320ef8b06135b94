"""A sequence of tasks learnt one after the other: SEEKR and its baselines.

For each task k of `task.sequence`:

    train on it            with what the strategy holds earlier tasks by (see `seekr`)
    keep the model         tasks/k-name/model or adapter
    buffer                 a random sample R_k of its rows joins the replay buffer
    importance             S_k and F_k of every head on R_k are added up; heads are chosen (see `importance`)
    teachers               logits and chosen heads' attention rows of R_k under the model as it is now
    measure                all tasks so far, on held-out subjects

`sequence.json` is written after each task. A run that was broken goes on from its newest complete checkpoint in the
task it was in; everything drawn at random follows from the recipe's seed and the place in the sequence, so on one
machine it ends as the unbroken run does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerState, set_seed

from ..analysis import headset, identify, report
from ..analysis.errors import InputError
from ..analysis.files import write_json
from ..analysis.headset import RankedHead, random_like
from ..analysis.model import HeadModel
from ..analysis.scores import load_means, mean_interval
from ..analysis.tasks import Task, load_task
from . import checkpoints, fit, holding, importance, replay, snapshots
from .blocks import EvaluationBlock, SeekrMethod, TaskBlock
from .choosing import choose_heads
from .distillation import query_positions
from .evaluate import perplexity, score_task
from .multiple_choice import truthfulqa_preamble
from .recipe import Recipe
from .records import flat, new_folder, peak_memory, plain, read_before, write_evaluation
from .replay import Replay, Row
from .seekr import Held, SequenceTrainer, collate
from .selecting import keep_heads, selected
from .sequence_metrics import sequence_metrics
from .splits import tasks_of
from .teacher_store import TeacherStore, by_layer, compute_teacher
from .tracking import Tracker, trainer_callback
from .weight_drift import WeightAnchor, fisher_diagonal

Say = Callable[[str], None]
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Step:
    """One task of the sequence: its name, what is trained on, what is held out."""

    name: str
    train: Task
    held_out: Task


def steps_of(block: TaskBlock) -> list[Step]:
    """The tasks of a sequence, in order.

    Raises:
        InputError: no such task, one without held-out subjects, or two with the same name.
    """
    steps: list[Step] = []
    for part in block.sequence or []:
        own = block.model_copy(update={"train": part.train, "eval": part.eval, "sequence": None})
        train, held_out = tasks_of(own)
        name = part.name or train.name.removesuffix(f":{train.split}").rpartition(":")[2]
        if any(step.name == name for step in steps):
            raise InputError(f"task.sequence names {name!r} twice; give one of them another name")
        steps.append(Step(name, train, held_out))
    return steps


def general_tasks(recipe: Recipe) -> list[Task]:
    """The tasks that are measured before and after, with the sequence's limit on examples."""
    return [
        load_task(name, recipe.task.split.seed).limited(recipe.task.max_eval_examples, seed=0)
        for name in recipe.evaluation.general
    ]


def require_usable(recipe: Recipe, heads: HeadModel, steps: Sequence[Step]) -> None:
    """Refuse, before anything is written, what does not fit the tokenizer, the tasks, the model or transformers."""
    assert isinstance(recipe.method, SeekrMethod)
    general = general_tasks(recipe)
    if recipe.heads is not None and recipe.heads.identify is None:
        choose_heads(recipe.heads, heads, steps[0].train, say=lambda _line: None)
    for index, step in enumerate(steps):
        replay.rows_of(step.train.limited(recipe.task.max_train_examples, recipe.seed), heads.tokenizer, index, 0)
    fit.training_arguments(recipe)
    if recipe.evaluation.before is not None:
        base_of(Path(recipe.evaluation.before), identity_of(recipe, heads, steps, general))


PRIMARY = {"exact_match": "exact_match", "lists": "correct_new_rate", "multiple_choice": "mc1"}


class Learner:
    """A model on its way through a sequence of tasks.

    Attributes:
        recipe: the run's; its method is a SeekrMethod.
        heads: the model's heads. Its `model` carries the LoRA, where there is one, in place.
        model: what is trained: `heads.model`, or the PeftModel around it.
        steps: the tasks; one of all rows for `multitask`.
        rows: each task's training rows.
        buffer: each learnt task's share of them.
        chosen: after each task, the heads that are distilled from then on.
    """

    def __init__(
        self,
        recipe: Recipe,
        heads: HeadModel,
        steps: Sequence[Step],
        tracker: Tracker,
        progress: identify.Progress,
        say: Say,
    ) -> None:
        assert isinstance(recipe.method, SeekrMethod)
        self.recipe, self.heads, self.tracker, self.progress, self.say = recipe, heads, tracker, progress, say
        self.method: SeekrMethod = recipe.method
        self.steps = list(steps)
        self.model: Any = heads.model
        limit = None if self.method.strategy == "multitask" else recipe.task.max_train_examples  # there, of each task
        self.rows = [
            replay.rows_of(step.train.limited(limit, recipe.seed), heads.tokenizer, index, recipe.seed)
            for index, step in enumerate(steps)
        ]
        self.buffer = [
            replay.sample(rows, self.method.replay, recipe.seed) if self.method.replays else [] for rows in self.rows
        ]
        self.importance = importance.Importance.none(heads.n_layers, heads.n_heads)
        self.chosen: list[Pairs] = []
        self.fixed: Pairs | None = None
        self.timing: list[dict[str, float]] = []
        self.n_steps = 0
        self.anchor = WeightAnchor.empty()

    # --- places -------------------------------------------------------------------------------------------------------

    def place(self, index: int) -> Path:
        """The folder of a task."""
        return self.recipe.folder / "tasks" / f"{index + 1:02d}-{safe(self.steps[index].name)}"

    def weights(self, index: int) -> Path:
        return self.place(index) / ("adapter" if isinstance(self.model, PeftModel) else "model")

    def teachers(self, index: int) -> Path:
        """Where the teachers of earlier rows are while task `index` is learnt."""
        folder = self.recipe.folder / "teachers"
        return folder / f"{index:02d}" if self.method.distil.teacher == "latest" else folder / "own"

    # --- one task -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the model trainable."""
        method = self.method
        set_seed(self.recipe.seed)
        self.heads.record_attention(True)
        if method.tune == "lora":
            shape = method.lora
            config = LoraConfig(
                r=shape.r, lora_alpha=shape.alpha, target_modules=shape.target_modules, task_type="CAUSAL_LM"
            )
            self.model = get_peft_model(self.heads.model, config)
        else:
            self.model.requires_grad_(True)
        if self.recipe.heads is not None:
            self.say("choosing heads")
            folder = self.recipe.folder if self.tracker.is_main else None
            first = self.steps[0].train
            self.fixed = choose_heads(self.recipe.heads, self.heads, first, folder, self.progress, self.say).pairs

    def learn(self, index: int, resume: bool) -> None:
        """Learn task `index`; the model is the one after the task before."""
        self.model.eval()
        share = self.buffer[index]
        plain_share = [row.plain for row in share]
        scored = self.method.strategy == "seekr" and self.fixed is None
        before = importance.remember(self.heads, plain_share, progress=self.progress) if scored else None
        held = self._held(index)
        note = self.place(index) / "training.json"
        if not self.weights(index).is_dir():
            write_json(note, self._train(index, held, resume))
            snapshots.save(self.model, self.weights(index))
            shutil.rmtree(self.place(index) / "checkpoints", ignore_errors=True)
        elif resume:  # broken off after the training
            snapshots.restore(self.model, self.weights(index))
        trained = json.loads(note.read_text(encoding="utf-8"))
        self.n_steps += trained["steps"]
        self.timing.append(trained["timing"])
        self.model.eval()
        if before is not None:
            self.say(f"importance of heads on {len(share)} rows of {self.steps[index].name}")
            sensitivity = importance.sensitivity(self.heads, plain_share, progress=self.progress)
            moved = importance.forgetting(self.heads, plain_share, before, progress=self.progress)
            self.importance = self.importance.add(sensitivity, moved)
            self.importance.save(self.place(index) / "importance.safetensors")
        if self.method.strategy == "seekr":
            self.chosen.append(self._choose())
        if self.method.strategy in ("seekr", "der") and index + 1 < len(self.steps):
            self._teach(index)
        if self.method.strategy == "ewc" and index + 1 < len(self.steps):
            self.say(f"Fisher information of {self.steps[index].name}")
            fisher = fisher_diagonal(self.model, [row.plain for row in self.rows[index]])
            self.anchor = self.anchor.with_task(self.model, fisher)
            self.anchor.save(self.place(index) / "anchor.safetensors")

    def recall(self, done: int, chosen: Sequence[Pairs], timing: Sequence[dict[str, float]], n_steps: int) -> None:
        """Take up a broken run whose first `done` tasks are learnt."""
        self.chosen, self.timing, self.n_steps = list(chosen), list(timing), n_steps
        last = self.place(done - 1)
        snapshots.restore(self.model, self.weights(done - 1))
        if (saved := last / "importance.safetensors").is_file():
            self.importance = importance.Importance.load(saved)
        if (saved := last / "anchor.safetensors").is_file():
            self.anchor = WeightAnchor.load(saved)

    def _held(self, index: int) -> Held:
        """What task `index` is held by: replayed rows, their teachers, the previous model's word on the task's rows."""
        method = self.method
        if index == 0:
            return Held()
        if method.strategy == "lwf":
            store = self._store(self.place(index) / "teachers")
            self._note(store, self.rows[index], [])
            return Held(teachers=store)
        if not method.replays:
            return Held()
        known = [row for share in self.buffer[:index] for row in share]
        per_batch = self._batch_size() * len(known) / len(self.rows[index])
        seen_again = Replay(known, per_batch, self.recipe.seed + index)
        if method.strategy == "replay":
            return Held(seen_again)
        heads = None
        if method.strategy == "seekr" and method.distil.selection == "global":
            heads = dict.fromkeys((row.key for row in known), by_layer(self.chosen[index - 1]))
        return Held(seen_again, self._store(self.teachers(index)), heads)

    def _batch_size(self) -> int:
        return int(self.arguments(0).per_device_train_batch_size)

    def arguments(self, index: int) -> Any:
        """TRL's configuration of one task's training."""
        changes: dict[str, Any] = {"output_dir": str(self.place(index) / "checkpoints"), "save_total_limit": 2}
        steps = self.recipe.training.get("max_steps", -1)
        if steps > 0 and self.method.strategy == "multitask":
            changes["max_steps"] = steps * len(self.recipe.task.sequence or [])
        return fit.training_arguments(self.recipe, **changes)

    def _train(self, index: int, held: Held, resume: bool) -> dict[str, Any]:
        rows, name = self.rows[index], self.steps[index].name
        self.say(f"task {index + 1} of {len(self.steps)}, {name}: {len(rows)} rows")
        arguments = self.arguments(index)
        timer = fit.Timer()
        set_seed(self.recipe.seed + index)
        table = [
            {"row": at, "input_ids": list(row.input_ids), "labels": list(row.labels)} for at, row in enumerate(rows)
        ]
        trainer = SequenceTrainer(
            self.model,
            args=arguments,
            processing_class=self.heads.tokenizer,
            callbacks=[trainer_callback(self.tracker, self.n_steps), fit.told(self.say), timer, checkpoints.Mark()],
            train_dataset=datasets.Dataset.from_list(table),
            data_collator=collate,
            rows=rows,
            method=self.method,
            held=held,
        )
        fit.require_launch(trainer.accelerator)
        trainer.remove_callback(PrinterCallback)
        if self.anchor.tasks:
            trainer.penalty = lambda model, _progress: {"ewc": (self.anchor.penalty(model), self.method.ewc_weight)}
        checkpoint = checkpoints.newest(Path(arguments.output_dir)) if resume else None
        if checkpoint is None:
            shutil.rmtree(arguments.output_dir, ignore_errors=True)
        pairs = self.fixed or (self.chosen[-1] if self.chosen else [])
        with holding.held(self.recipe, self.heads, pairs, self.steps[index].train, trainer, self.say):
            if checkpoint is not None and checkpoints.finished(checkpoint):
                trainer._load_from_checkpoint(str(checkpoint))
                trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self.heads.record_attention(True)
        return {"steps": trainer.state.max_steps, "timing": timer.summary()}

    # --- heads and teachers -------------------------------------------------------------------------------------------

    def _choose(self) -> Pairs:
        """The heads to distil from now on."""
        if self.fixed is not None:
            return self.fixed
        block, found = self.method.distil, self.importance
        values = {"sensitivity": found.sensitivity, "forgetting": found.forgetting}.get(block.choice, found.value())
        layers = min(block.layers or self.heads.n_layers, self.heads.n_layers)
        pairs = importance.choose(values, layers, min(block.heads, layers * self.heads.n_heads))
        if block.choice == "random":
            return sorted(random_like(pairs, self.heads.n_heads, self.recipe.seed, overlap=True))
        return sorted(pairs)

    def _store(self, folder: Path) -> TeacherStore:
        return TeacherStore(folder, self.method.distil.dtype, self.method.distil.logits_top)

    def _teach(self, index: int) -> None:
        """Note what is wanted of the buffer's rows while the next task is learnt; what is there already stays."""
        distil, store = self.method.distil, self._store(self.teachers(index + 1))
        if self.method.strategy == "der":
            self._note(store, self.buffer[index], [])
            return
        if distil.teacher == "latest":
            for earlier in range(index + 1):
                pairs = self.chosen[earlier if distil.selection == "per_task" else index]
                self._note(store, self.buffer[earlier], pairs)
            return
        self._note(store, self.buffer[index], self.chosen[index])
        if distil.selection == "per_task":
            return
        moved = False
        for earlier in range(index):
            wanted = set(self.chosen[index])
            if any(wanted - set(store.heads(row.key)) for row in self.buffer[earlier]):
                # Their teacher is the model after their own task.
                snapshots.restore(self.model, self.weights(earlier))
                moved = True
                self._note(store, self.buffer[earlier], self.chosen[index])
        if moved:
            snapshots.restore(self.model, self.weights(index))

    def _note(self, store: TeacherStore, rows: Sequence[Row], pairs: Pairs) -> None:
        """The teachers of rows under the model as it is."""
        positions = {row.key: self._queries(row) for row in rows} if pairs else {}
        compute_teacher(self.heads, rows, by_layer(pairs), positions, store, self.recipe.evaluation.batch_size)

    def _queries(self, row: Row) -> list[int]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.recipe.seed}/{row.key}".encode()))
        return query_positions(row.length, self.method.distil.queries, generator)


def safe(name: str) -> str:
    """A task's name as a folder's."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


# --- the whole run ----------------------------------------------------------------------------------------------------

PROGRESS = "sequence.json"


def learn_sequence(
    recipe: Recipe,
    heads: HeadModel,
    steps: Sequence[Step],
    tracker: Tracker,
    state: dict[str, Any],
    resume: bool,
    progress: identify.Progress,
    say: Say,
) -> dict[str, Any]:
    """Learn all tasks of a recipe; returns the content of evaluation.json.

    Writes `sequence.json` after each task, `evaluation.json` at the end, and into `state` what run.json says.
    """
    folder, method, settings = recipe.folder, recipe.method, recipe.evaluation
    assert isinstance(method, SeekrMethod)
    tokenizer = heads.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    path = folder / PROGRESS
    saved = json.loads(path.read_text(encoding="utf-8")) if resume and path.is_file() else {}
    general = general_tasks(recipe)
    rows = functools.partial(scores_of, tokenizer, settings)
    identity = identity_of(recipe, heads, steps, general)
    if "before" not in saved:
        if settings.before is not None:
            saved = base_of(Path(settings.before), identity)
        else:
            say(f"measuring the base model on {len(steps)} tasks")
            saved = {
                "before": [rows(heads.model, step.held_out) for step in steps],
                "general_before": {task.name: rows(heads.model, task) for task in general},
                "perplexity_before": perplexity(heads.model, tokenizer),
            }
        saved |= {"after": [], "heads": [], "timing": [], "n_steps": 0}
        if tracker.is_main:
            write_json(path, saved)
    together = method.strategy == "multitask"
    learnt = [merged(steps, recipe.task.max_train_examples, recipe.seed)] if together else list(steps)
    learner = Learner(recipe, heads, learnt, tracker, progress, say)
    learner.start()
    done = len(saved["after"])
    if done:
        learner.recall(
            done, [[(a, b) for a, b in pairs] for pairs in saved["heads"]], saved["timing"], saved["n_steps"]
        )
    for index in range(done, len(learnt)):
        learner.learn(index, resume)
        so_far = steps if together else steps[: index + 1]
        say(f"measuring {len(so_far)} tasks")
        measured = [rows(learner.model, step.held_out) for step in so_far]
        saved["after"].append(measured)
        saved |= {"heads": learner.chosen, "timing": learner.timing, "n_steps": learner.n_steps}
        tracker.log(
            {f"sequence/{step.name}": mean(of) for step, of in zip(so_far, measured, strict=True)}
            | {"sequence/task": index + 1},
            step=learner.n_steps,
        )
        if tracker.is_main:
            write_json(path, saved)
    if "general_after" not in saved:
        saved["general_after"] = {task.name: rows(learner.model, task) for task in general}
        saved["perplexity_after"] = perplexity(learner.model, tokenizer)
        if tracker.is_main:
            write_json(path, saved)
    evaluation = evaluation_of(identity, folder, steps, general, saved, together)
    trained = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in learner.model.parameters()) - (trained if method.tune == "lora" else 0)
    state |= {"parameters": trained, "model_parameters": total, "parameters_share": trained / total}
    state |= {"peak_memory_gib": peak_memory(), "heads": saved["heads"][-1] if saved["heads"] else []}
    seconds = [part["seconds"] for part in saved["timing"] if part]
    per_step = [part["seconds_per_step"] for part in saved["timing"] if part]
    state["training"] = {"steps": learner.n_steps, "seconds": sum(seconds)}
    if per_step:
        state["training"]["seconds_per_step"] = sum(per_step) / len(per_step)
    state["buffer"] = {step.name: len(share) for step, share in zip(learnt, learner.buffer, strict=True)}
    state["training_data"] = {
        "tasks": [
            {"name": step.name, "sha256": part.sha256, "n_examples": len(part.examples)}
            for step in steps
            for part in (step.train.limited(recipe.task.max_train_examples, recipe.seed),)
        ]
    }
    if not tracker.is_main:
        PartialState().wait_for_everyone()
        return {}
    if learner.chosen and learner.fixed is None:
        _keep_heads(recipe, heads, learner, state)
    if (folder / "heads.json").is_file():
        kept, scores = headset.read(folder / "heads.json"), folder / "scores.safetensors"
        means = load_means(scores) if scores.is_file() else {}
        report.write_report(folder / "report.html", kept, means, evaluation, title=recipe.name)
    tracker.log(flat("after", evaluation["after"]))
    tracker.summary(flat("after", evaluation["after"]) | {"parameters": trained})
    tracker.table("sequence", ["learnt", *(step.name for step in steps)], _matrix_rows(learnt, saved["after"]))
    if method.keep != "none":
        lora = isinstance(learner.model, PeftModel)
        with new_folder(folder / ("adapter" if lora else "model")) as temporary:
            learner.model.save_pretrained(str(temporary), **({"save_embedding_layers": False} if lora else {}))
            if not lora:
                tokenizer.save_pretrained(str(temporary))
    PartialState().wait_for_everyone()
    return evaluation


def clear(recipe: Recipe) -> None:
    """Remove what only a run that is not done needs: teachers, checkpoints, the models that `keep` does not name.

    And what a killed process left half written (see `atomic_folder`).
    """
    assert isinstance(recipe.method, SeekrMethod)
    names = ["teachers", "checkpoints", ".*", *([] if recipe.method.keep == "all" else ["model", "adapter"])]
    for pattern in ["teachers", ".model.*", ".adapter.*", *(f"tasks/*/{name}" for name in names)]:
        for path in recipe.folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def merged(steps: Sequence[Step], limit: int | None, seed: int) -> Step:
    """All tasks as one, each with at most `limit` training examples."""
    examples = tuple(example for step in steps for example in step.train.limited(limit, seed).examples)
    train = dataclasses.replace(steps[0].train, name="all", examples=examples)
    return Step("all", train, steps[0].held_out)


def scores_of(tokenizer: Any, settings: EvaluationBlock, model: Any, task: Task) -> dict[str, Any]:
    """A task's main metric by example, with what the model wrote."""
    model.eval()
    preamble = truthfulqa_preamble() if settings.preamble == "truthfulqa" and task.kind == "multiple_choice" else ""
    metrics, scored = score_task(model, tokenizer, task, settings.n_items, settings.batch_size, preamble)
    main = PRIMARY[task.kind]
    return {
        "metric": main,
        "metrics": {name: value["mean"] for name, value in metrics.items() if name != "n"},
        "values": [one.values[main] for one in scored],
        "rows": [plain(one) for one in scored],
    }


def mean(of: Mapping[str, Any]) -> float:
    return float(np.mean(of["values"]))


def identity_of(recipe: Recipe, heads: HeadModel, steps: Sequence[Step], general: Sequence[Task]) -> dict[str, Any]:
    """What two measurements of the base model must share to be the same measurement."""
    tasks = [step.held_out for step in steps] + list(general)
    digest = hashlib.sha256(" ".join(task.sha256 for task in tasks).encode()).hexdigest()
    return {
        "task": "sequence",
        "task_sha256": digest,
        "weights_sha256": heads.weights_sha256,
        "n_items": recipe.evaluation.n_items,
        "preamble": recipe.evaluation.preamble,
    }


def base_of(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's measurement in another run of the same sequence, whose evaluation.json is `path`.

    Raises:
        InputError: the file is missing or measured something else.
    """
    read_before(path, identity)
    other = path.with_name(PROGRESS)
    try:
        saved = json.loads(other.read_text(encoding="utf-8"))
        return {key: saved[key] for key in ("before", "general_before", "perplexity_before")}
    except (OSError, ValueError, KeyError):
        raise InputError(f"evaluation.before {str(path)!r} has no {PROGRESS} beside it; remove the key") from None


def evaluation_of(
    identity: Mapping[str, Any],
    folder: Path,
    steps: Sequence[Step],
    general: Sequence[Task],
    saved: Mapping[str, Any],
    together: bool,
) -> dict[str, Any]:
    """Write evaluation.json: averages over tasks before and after, what was forgotten, and each task by itself."""
    names = [step.name for step in steps]
    last = saved["after"][-1]
    before = _averages(names, saved["before"], saved["general_before"], saved["perplexity_before"])
    after = _averages(names, last, saved["general_after"], saved["perplexity_after"])
    if not together:
        columns = saved["after"]
        found = sequence_metrics(
            [[columns[j][i]["values"] if j >= i else None for j in range(len(steps))] for i in range(len(steps))]
        )
        after |= {"bwt": {"mean": found["bwt"], "ci": found["bwt_ci"]}, "forgetting": found["forgetting"]}
    counts = {name: len(of["values"]) for name, of in zip(names, last, strict=True)}
    before["n"] = after["n"] = {"examples": sum(counts.values()), "by_task": counts}
    parts = [(of["rows"], later["rows"]) for of, later in zip(saved["before"], last, strict=True)]
    parts += [(saved["general_before"][t.name]["rows"], saved["general_after"][t.name]["rows"]) for t in general]
    rows_before, rows_after = ([row for part in parts for row in part[side]] for side in (0, 1))
    return write_evaluation(folder, identity, before, after, rows_before, rows_after)


def _averages(
    names: Sequence[str], of: Sequence[Mapping[str, Any]], general: Mapping[str, Any], perplexity: float
) -> dict[str, Any]:
    """`op`, each task's main metric, the general tasks' metrics, all as `{"mean", "ci"}`, and the perplexity."""
    once = [[None] * i + [one["values"]] * (len(of) - i) for i, one in enumerate(of)]  # as if nothing changed
    found = sequence_metrics(once)
    result: dict[str, Any] = {"op": {"mean": found["op"], "ci": found["op_ci"]}}
    result |= {
        f"{name}/{one['metric']}": mean_interval(one["values"], [row["subject"] for row in one["rows"]])
        for name, one in zip(names, of, strict=True)
    }
    for name, one in general.items():
        subjects = [row["subject"] for row in one["rows"]]
        for metric in one["rows"][0]["values"]:
            result[f"{name}/{metric}"] = mean_interval([row["values"][metric] for row in one["rows"]], subjects)
    return result | {"neutral_perplexity": perplexity}


def _keep_heads(recipe: Recipe, heads: HeadModel, learner: Learner, state: dict[str, Any]) -> None:
    """heads.json and its scores: the heads chosen last, by the importance that chose them."""
    found, chosen = learner.importance, learner.chosen[-1]
    values = {"importance": found.value(), "sensitivity": found.sensitivity, "forgetting": found.forgetting}
    scores = {f"seekr.{name}": tensor for name, tensor in values.items()}
    by = recipe.method.distil.choice  # type: ignore[union-attr]
    ranking = scores.get(f"seekr.{by}", found.value())
    ranked = tuple(
        RankedHead(layer, head, float(ranking[layer, head]), None)
        for layer, head in sorted(chosen, key=lambda pair: -float(ranking[pair]))
    )
    task = {
        "name": "+".join(step.name for step in learner.steps),
        "sha256": hashlib.sha256(" ".join(step.train.sha256 for step in learner.steps).encode()).hexdigest(),
        "n_examples": sum(len(rows) for rows in learner.rows),
        "n_dropped": 0,
        "dropped": {},
    }
    method = {"parameters": recipe.method.distil.model_dump()}  # type: ignore[union-attr]
    keep_heads(selected("seekr", scores, ranked, recipe, heads, task, method), recipe.folder)


def _matrix_rows(learnt: Sequence[Step], after: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Any]]:
    width = max(len(row) for row in after)
    return [
        [step.name, *(mean(of) for of in row), *[None] * (width - len(row))]
        for step, row in zip(learnt, after, strict=True)
    ]
