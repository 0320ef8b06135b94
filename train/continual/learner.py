"""Learning tasks one after the other: SEEKR and its baselines.

For each task k of a sequence:

    train on it            with what the strategy holds earlier tasks by (see `seekr`)
    keep the model         tasks/k-name/model or adapter
    buffer                 a random sample R_k of its rows joins the replay buffer
    importance             S_k and F_k of every head on R_k are added up; heads are chosen (see `importance`)
    teachers               logits and chosen heads' attention rows of R_k under the model as it is now

Each part is written whole before the next begins, and one that is there is not done again. What is drawn at random
follows from the recipe's seed and the place in the sequence, so on one machine a broken run ends as an unbroken one.
"""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, set_seed

from headtune.analysis.heads.controls import random_like
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_json
from headtune.analysis.utils.state_files import read_state
from headtune.train import distributed
from headtune.train.config.methods import SeekrConfig
from headtune.train.config.resolve_heads import ResolvedHeads, resolve_heads, write_head_set
from headtune.train.losses.activation_capture import warn_of_dropout
from headtune.train.losses.attention_distillation import query_positions
from headtune.train.losses.weight_penalties import WeightAnchor, fisher_diagonal
from headtune.train.methods.base import method_named
from headtune.train.tracking.tracker import trainer_callback
from headtune.train.trainer import attach_regularisers, checkpoints, training
from headtune.train.trainer.callbacks import Timer, progress_logger
from headtune.train.trainer.rows import TrainingRow
from headtune.train.trainer.run_context import RunContext
from headtune.train.tuners import weights_io

from . import replay
from .compute_teacher import compute_teacher
from .forgetting import AttentionSnapshot, measure_forgetting, snapshot_attention
from .importance import Importance, top_heads
from .sensitivity import measure_sensitivity
from .teacher_store import TeacherStore
from .teachers import by_layer
from .trainer import ContinualInputs, SequenceTrainer, collate

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Stage:
    """What is learnt at once: a task's name, the task, its training rows."""

    name: str
    task: Task
    rows: Sequence[TrainingRow]


class Learner:
    """A model on its way through a sequence of tasks.

    Attributes:
        context: the run; its recipe's method is a SeekrConfig.
        model: what is trained: the head view's `hf`, or the PeftModel around it.
        stages: what is learnt, one after the other; one of all tasks' rows for `multitask`.
        buffer: each one's share of rows that is seen again later.
        fisher: each one's rows that Fisher information is taken from.
        chosen: after each task, the heads that are distilled from then on.
        resolved: the heads that the recipe names; None where it names none, or they are identified at the start.
    """

    def __init__(self, context: RunContext, stages: Sequence[Stage], resolved: ResolvedHeads | None = None) -> None:
        self.context, self.recipe, self.head_model = context, context.recipe, context.model
        self.tracker, self.progress, self.notify = context.tracker, context.progress, context.notify
        self.method: SeekrConfig = context.recipe.method
        recipe, model = self.recipe, self.head_model
        self.resolved = resolved
        self.stages = list(stages)
        self.model: Any = model.hf
        self.buffer = [
            replay.sample(stage.rows, self.method.replay, f"{recipe.seed}/{index}") if self.method.replays else []
            for index, stage in enumerate(stages)
        ]
        self.fisher = [
            replay.drawn(stage.rows, self.method.ewc_rows, f"{recipe.seed}/{index}")
            if self.method.strategy == "ewc"
            else []
            for index, stage in enumerate(stages)
        ]
        self.importance = Importance.none(model.n_layers, model.n_heads)
        self.chosen: list[Pairs] = []
        self.fixed: Pairs | None = None
        self.timing: list[dict[str, float]] = []
        self.n_steps = 0
        self.anchor = WeightAnchor.empty()

    # --- places -------------------------------------------------------------------------------------------------------

    def place(self, index: int) -> Path:
        """The folder of a task."""
        return self.recipe.folder / "tasks" / f"{index + 1:02d}-{safe(self.stages[index].name)}"

    def weights(self, index: int) -> Path:
        return self.place(index) / ("adapter" if isinstance(self.model, PeftModel) else "model")

    def teachers(self, index: int) -> Path:
        """Where the teachers of earlier rows are while task `index` is learnt."""
        folder = self.recipe.folder / "teachers"
        return folder / f"{index:02d}" if self.method.distil.teacher == "latest" else folder / "own"

    # --- one task -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the model trainable."""
        set_seed(self.recipe.seed)
        self.head_model.record_attention(True)
        config = method_named(self.recipe.recipe).peft_config(self.method, [], self.head_model.hf)
        if config is None:
            self.model.requires_grad_(True)
        else:
            self.model = get_peft_model(self.head_model.hf, config)
        if self.recipe.heads is not None:
            self.notify("choosing heads")
            if self.resolved is None:
                first = self.stages[0].task
                self.resolved = resolve_heads(self.recipe.heads, self.head_model, first, self.progress, self.notify)
            if self.tracker.is_main:
                write_head_set(self.resolved, self.recipe.folder)
            self.fixed = self.resolved.pairs

    def learn(self, index: int) -> None:
        """Learn stage `index`; the model is the one after the stage before. Rank 0 writes, all read what it wrote."""
        self.model.eval()
        place, last = self.place(index), index + 1 == len(self.stages)
        scored = self.method.strategy == "seekr" and self.fixed is None
        if scored:
            self._on_main(lambda: self._snapshot_attention(index))
        held = self._continual_inputs(index)
        note = place / "training.json"
        if not self.weights(index).is_dir():
            trained = self._train(index, held)
            self._on_main(lambda: self._keep(index, trained))
        else:  # broken off after the training
            weights_io.restore(self.model, self.weights(index))
        noted = read_state(note)
        self.n_steps += noted["steps"]
        self.timing.append(noted["timing"])
        self.model.eval()
        if scored:
            self._on_main(lambda: self._score(index))
            self.importance = Importance.load(place / "importance.safetensors")
        if self.method.strategy == "seekr":
            self.chosen.append(self._choose())
        if self.method.strategy in ("seekr", "der") and not last:
            self._on_main(lambda: self._teach(index))
        if self.method.strategy == "ewc" and not last:
            self._on_main(lambda: self._measure_fisher(index))
            self.anchor = WeightAnchor.load(place / "anchor.safetensors")

    def cleanup(self, index: int) -> None:
        """Remove what nothing needs any more once stage `index` has been measured."""
        self._on_main(lambda: self._remove(index))

    def _remove(self, index: int) -> None:
        for folder in (self.place(index) / "remembered", self.place(index) / "teachers"):
            shutil.rmtree(folder, ignore_errors=True)
        if self.method.distil.teacher == "latest":
            shutil.rmtree(self.teachers(index), ignore_errors=True)
        if index:
            (self.place(index - 1) / "anchor.safetensors").unlink(missing_ok=True)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Rank 0 works, the others wait. It alone looks whether there is work: others may see what it just wrote."""
        if self.tracker.is_main:
            work()
        PartialState().wait_for_everyone()

    def _snapshot_attention(self, index: int) -> None:
        """The attention of the model as it is now, unless a broken run has kept it already."""
        folder = self.place(index) / "remembered"
        if not folder.is_dir():
            rows = [row.plain for row in self.buffer[index]]
            snapshot_attention(self.head_model, rows, folder, progress=self.progress)

    def _keep(self, index: int, trained: dict[str, Any]) -> None:
        write_json(self.place(index) / "training.json", trained)
        weights_io.save(self.model, self.weights(index))
        shutil.rmtree(self.place(index) / "checkpoints", ignore_errors=True)

    def _score(self, index: int) -> None:
        """Importance of heads with stage `index`."""
        rows = [row.plain for row in self.buffer[index]]
        self.notify(f"importance of heads on {len(rows)} rows of {self.stages[index].name}")
        before = AttentionSnapshot(folder=self.place(index) / "remembered")
        sensitivity = measure_sensitivity(self.head_model, rows, progress=self.progress)
        moved = measure_forgetting(self.head_model, rows, before, progress=self.progress)
        self.importance.add(sensitivity, moved).save(self.place(index) / "importance.safetensors")

    def _measure_fisher(self, index: int) -> None:
        """Fisher information of stage `index`."""
        rows = self.fisher[index]
        self.notify(f"Fisher information of {self.stages[index].name} on {len(rows)} rows")
        fisher = fisher_diagonal(self.model, [row.plain for row in rows])
        self.anchor.with_task(self.model, fisher).save(self.place(index) / "anchor.safetensors")

    def resume_from(self, done: int, chosen: Sequence[Pairs], timing: Sequence[dict[str, float]], n_steps: int) -> None:
        """Take up a broken run whose first `done` tasks are learnt."""
        self.chosen, self.timing, self.n_steps = list(chosen), list(timing), n_steps
        last = self.place(done - 1)
        weights_io.restore(self.model, self.weights(done - 1))
        if (saved := last / "importance.safetensors").is_file():
            self.importance = Importance.load(saved)
        if (saved := last / "anchor.safetensors").is_file():
            self.anchor = WeightAnchor.load(saved)

    def _continual_inputs(self, index: int) -> ContinualInputs:
        """What task `index` takes from earlier ones: replayed rows and their teachers, or the previous model's."""
        method = self.method
        if index == 0:
            return ContinualInputs()
        if method.strategy == "lwf":
            folder = self.place(index) / "teachers"
            self._on_main(lambda: self._note(self._store(folder), self.stages[index].rows, []))
            return ContinualInputs(teachers=self._store(folder))
        if not method.replays:
            return ContinualInputs()
        earlier = [row for share in self.buffer[:index] for row in share]
        seed = f"{self.recipe.seed}/{index}"
        if method.strategy == "replay":
            return ContinualInputs(earlier, seed)
        heads = None
        if method.strategy == "seekr" and method.distil.selection == "global":
            heads = dict.fromkeys((row.key for row in earlier), by_layer(self.chosen[index - 1]))
        return ContinualInputs(earlier, seed, self._store(self.teachers(index)), heads)

    def arguments(self, index: int) -> Any:
        """TRL's configuration of one task's training."""
        # A seed of its own: the trainer would draw every task in the same order.
        changes: dict[str, Any] = {
            "output_dir": str(self.place(index) / "checkpoints"),
            "save_total_limit": 2,
            "seed": zlib.crc32(f"{self.recipe.seed}/{index}".encode()),
        }
        steps = self.recipe.training.get("max_steps", -1)
        if steps > 0 and self.method.strategy == "multitask":
            changes["max_steps"] = steps * len(self.recipe.task.sequence or [])
        return training.training_arguments(self.recipe, **changes)

    def _train(self, index: int, continual: ContinualInputs) -> dict[str, Any]:
        rows, name = self.stages[index].rows, self.stages[index].name
        self.notify(f"task {index + 1} of {len(self.stages)}, {name}: {len(rows)} rows")
        if continual.teachers is not None:
            warn_of_dropout(self.head_model.hf, "distillation", self.notify)
        arguments = self.arguments(index)
        timer, marking = Timer(), checkpoints.Mark(arguments)
        table = [{"row": at, **row.plain} for at, row in enumerate(rows)]
        try:
            trainer = SequenceTrainer(
                self.model,
                args=arguments,
                processing_class=self.head_model.tokenizer,
                callbacks=[trainer_callback(self.tracker, self.n_steps), progress_logger(self.notify), timer, marking],
                train_dataset=datasets.Dataset.from_list(table),
                data_collator=collate,
                rows=rows,
                method=self.method,
                continual=continual,
            )
        except ValueError as error:
            raise InputError(f"training: {str(error).splitlines()[0]}") from error
        distributed.require_launch(trainer.accelerator)
        distributed.require_full_state(trainer.accelerator)
        empty = distributed.meta_copy(self.model) if distributed.partitioned(trainer.accelerator) else None
        trainer.remove_callback(PrinterCallback)
        if self.anchor.tasks:
            trainer.penalty = self._elastic
        checkpoint = checkpoints.newest(Path(arguments.output_dir), self.notify) if self.context.resume else None
        pairs = self.fixed or (self.chosen[-1] if self.chosen else [])
        with attach_regularisers.with_regularisers(
            self.recipe, self.head_model, pairs, self.stages[index].task, trainer, self.notify
        ):
            training.run_trainer(trainer, checkpoint)
        if empty is not None:  # every process needs the model whole: to measure it, and to train it again
            self.model = distributed.gather_full_model(trainer, empty, everywhere=True)
            self.head_model.hf = distributed.base_of(self.model)
            self.head_model.__dict__.pop("layers", None)  # of the model that was split
        training.unwrapped(trainer)
        self.head_model.record_attention(True)
        return {"steps": trainer.state.max_steps, "timing": timer.summary()}

    def _elastic(self, model: Any, _progress: float) -> dict[str, tuple[Tensor, float]]:
        with distributed.gathered_parameters(distributed.trainable_modules(model)):
            return {"ewc": (self.anchor.penalty(model), self.method.ewc_weight)}

    # --- heads and teachers -------------------------------------------------------------------------------------------

    def _choose(self) -> Pairs:
        """The heads to distil from now on."""
        if self.fixed is not None:
            return self.fixed
        block, importance = self.method.distil, self.importance
        values = {"sensitivity": importance.sensitivity, "forgetting": importance.forgetting}.get(
            block.choice, importance.value()
        )
        n_layers, n_heads = self.head_model.n_layers, self.head_model.n_heads
        if block.choice == "random":
            drawn = random.Random(f"{self.recipe.seed}/heads").sample(range(n_layers * n_heads), block.heads)
            return sorted(divmod(index, n_heads) for index in drawn)
        pairs = top_heads(values, n_layers if block.layers == "all" else block.layers, block.heads)
        if block.choice == "random_matched":
            return sorted(random_like(pairs, n_heads, self.recipe.seed))
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
            needed = set(self.chosen[index])
            if any(needed - set(store.heads(row.key)) for row in self.buffer[earlier]):
                # Their teacher is the model after their own task.
                weights_io.restore(self.model, self.weights(earlier))
                moved = True
                self._note(store, self.buffer[earlier], self.chosen[index])
        if moved:
            weights_io.restore(self.model, self.weights(index))

    def _note(self, store: TeacherStore, rows: Sequence[TrainingRow], pairs: Pairs) -> None:
        """The teachers of rows under the model as it is."""
        positions = {row.key: self._queries(row) for row in rows} if pairs else {}
        compute_teacher(self.head_model, rows, by_layer(pairs), positions, store, self.recipe.evaluation.batch_size)

    def _queries(self, row: TrainingRow) -> list[int]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.recipe.seed}/{row.key}".encode()))
        return query_positions(row.length, self.method.distil.queries, generator)


def safe(name: str) -> str:
    """A task's name as a folder's."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
