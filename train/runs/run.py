"""One recipe from start to end: heads, before, train, adapter, after, report.

A run is a folder: `recipe.yaml`, `heads.json`, `metrics.jsonl`, `evaluation.json`, `adapter/`, `checkpoint-N/`,
`report.html`, `run.json`. Several processes (accelerate) run the same code; only rank 0 writes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState

from headtune.analysis.heads import head_set
from headtune.analysis.identify import pipeline
from headtune.analysis.methods.scores import load_means
from headtune.analysis.reports.dissociation import next_step, verdict
from headtune.analysis.tasks.messages import chat_in_words
from headtune.analysis.tasks.task import scored
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import leftovers, require_new_folder, write_json, write_text
from headtune.analysis.utils.processes import is_main
from headtune.analysis.utils.progress import Notify
from headtune.analysis.utils.state_files import mend_lines, read_state
from headtune.analysis.utils.verbosity import silence_libraries
from headtune.train.config import recipe as recipes
from headtune.train.config import resolve_tasks
from headtune.train.config.resolve_heads import ResolvedHeads, keep_heads, resolve_heads, write_head_set
from headtune.train.config.schema import Recipe
from headtune.train.continual import sequence
from headtune.train.evaluation.evaluation_file import (
    flatten_metrics,
    measure,
    peak_memory,
    read_before,
    write_evaluation,
)
from headtune.train.methods.base import method_named
from headtune.train.tracking import lineage, media, results
from headtune.train.tracking.tracker import METRICS, Tracker
from headtune.train.trainer import failures, signals, training
from headtune.train.trainer.run_context import RunContext

from . import first_stage
from .deep_heads import slowed_by
from .load_run import read_run_file
from .prepare import PreparedRun, prepare

log = logging.getLogger(__name__)
FIRST = "recipe.yaml"  # without it nothing of a run is there


class RunFile:
    """run.json: the one place where what is known of a run is put together and written.

    Its `state` is `running` inside the block, and `done`, `interrupted` or `failed` after it.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], is_main: bool) -> None:
        self.path, self.is_main = folder / "run.json", is_main
        self.record = dict(record)

    def add(self, **record: Any) -> None:
        """Write what has become known."""
        self.record |= record
        self._write("running")

    def _write(self, state: str) -> None:
        if self.is_main:
            write_json(self.path, self.record | {"state": state})

    def __enter__(self) -> Self:
        self._write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if error is None:
            self._write("done")
            return
        with contextlib.suppress(OSError):  # a full disk is what may have failed it
            self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")


@silence_libraries()
def run_recipe(
    recipe: Recipe,
    resume: bool = False,
    progress: pipeline.Progress = pipeline.silent,
    notify: Notify = log.info,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        resume: continue the run in `recipe.output_dir` from its newest checkpoint.
        progress: wraps lists of examples that take long.
        notify: told what happens, a line at a time.

    Returns:
        The content of evaluation.json.

    Raises:
        InputError: before anything is written, where the recipe does not fit the model, the task or the folder.
        CheckError: training diverged, the disk is full, memory does not suffice, a file of the run is damaged.
        Interrupted: SIGTERM or SIGINT came (see `interruption`).
    """
    with signals.watched(recipe.folder), failures.explained_failures(recipe.folder):
        return _run(recipe, resume, progress, notify)


def _run(recipe: Recipe, resume: bool, progress: pipeline.Progress, notify: Notify) -> dict[str, Any]:
    folder, main = recipe.folder, is_main()
    in_order = method_named(recipe.recipe).learns_sequence
    # The folder: a new one, or one whose run is taken up.
    saved = read_run_file(folder) if resume else {}  # before anybody writes run.json anew
    if resume:
        _require_same(recipe, folder)
        if saved.get("state") == "done":
            notify(f"run {folder} is finished")
            if in_order and main:
                sequence.clear(folder, recipe.method.keep)
            done = folder / "evaluation.json"
            return read_state(done) if done.is_file() else {}
    elif main:
        require_free_folder(folder)
    # Model and data: what does not fit together is refused in one line, before anything is written.
    prepared = prepare(recipe)
    data = {} if in_order else {"data": _data(prepared)}  # a sequence keeps its own account
    if data and "data" in saved:
        _require_same_data(data["data"], saved["data"], folder)
    if main and not resume and failed_without_checkpoint(folder):
        notify(f"{folder} held a failed run without a checkpoint; it is now {_set_aside(folder)}")
    notify(f"run {folder} on {recipe.model.name}")
    if prepared.not_exported is not None:
        notify(prepared.not_exported)
    if recipe.task.mix is not None:
        notify(resolve_tasks.in_words(recipe.task, prepared.train, prepared.held_out, prepared.validation is not None))
    chats = f"given as {chat_in_words(chat)}, " if (chat := prepared.train.chat_template) else ""
    notify(f"task {prepared.held_out.name}: {chats}{scored(prepared.held_out.kind, recipe.evaluation.n_items)}")
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FIRST, recipe.to_yaml())
        for left in leftovers(folder / FIRST):
            left.unlink(missing_ok=True)
        mend_lines(folder / METRICS)
    # The tracker and run.json are open while the run goes on.
    tracker = Tracker(
        folder,
        recipe.name,
        lineage.config_of(recipe),
        resume_id=saved.get("wandb_id"),
        **lineage.wandb_run_args(recipe, "train"),
    )
    inputs, source = saved.get("inputs", lineage.inputs_of(recipe)), lineage.head_set_of(recipe)
    record = {"name": recipe.name, "recipe": recipe.recipe, "seed": recipe.seed, **head_set.provenance()}
    record |= {key: saved[key] for key in ("heads", "training_data") if key in saved}
    record |= {**data, "wandb_id": tracker.wandb_id or saved.get("wandb_id"), "inputs": inputs}
    with tracker, RunFile(folder, record, main) as run_file:
        tracker.uses(inputs, {"heads": source} if source else {})
        context = RunContext(recipe, prepared.model, tracker, progress, notify, resume)
        evaluation = _carry_out(context, prepared, run_file)
    if in_order and main:
        sequence.clear(folder, recipe.method.keep)  # not earlier: a run that is not done can be taken up
    return evaluation


def _carry_out(context: RunContext, prepared: PreparedRun, run_file: RunFile) -> dict[str, Any]:
    """Measure, train, measure, report; one task or several in order. Returns the content of evaluation.json."""
    recipe = context.recipe
    if prepared.sequence is None:
        evaluation, resolved = _tune(context, prepared, run_file)
    else:
        evaluation, resolved, record = sequence.learn_sequence(context, prepared.sequence)
        run_file.add(**record)
    if evaluation and context.is_main:
        results.finish(recipe, context.tracker, resolved, evaluation, run_file.record)
    PartialState().wait_for_everyone()
    return evaluation


def require_free_folder(folder: Path) -> None:
    """Refuse a folder that holds a run (InputError), but for one that failed before there was anything to continue."""
    if not failed_without_checkpoint(folder):
        fix = "choose another output_dir or name, or continue it with --resume (resume=True in Python)"
        require_new_folder(folder, fix, FIRST)


def failed_without_checkpoint(folder: Path) -> bool:
    """Whether a run failed here before there was a checkpoint, an adapter or a model to continue from."""
    try:
        if read_run_file(folder).get("state") != "failed":
            return False
    except InputError:  # a damaged file: nobody knows what the folder holds
        return False
    return not any(path for pattern in ("checkpoint-*", "adapter", "model") for path in folder.rglob(pattern))


def _set_aside(folder: Path) -> Path:
    """Give a folder the first free name `NAME.failed-1`, `-2`, ...: nothing of it is lost."""
    numbers = itertools.count(1)
    target = next(path for n in numbers if not (path := folder.with_name(f"{folder.name}.failed-{n}")).exists())
    folder.rename(target)
    return target


def _tune(context: RunContext, prepared: PreparedRun, run_file: RunFile) -> tuple[dict[str, Any], ResolvedHeads]:
    """Tune on one task; the content of evaluation.json (empty but on rank 0) and the heads."""
    recipe, model, folder, notify = context.recipe, context.model, context.folder, context.notify
    method = method_named(recipe.recipe)
    # Which heads.
    resolved = _resumed_heads(folder, run_file.record) if context.resume else None
    if resolved is None:
        resolved = _resolve(context, prepared)
    run_file.add(heads=[list(pair) for pair in resolved.pairs])
    pinned = lineage.config_keys(recipe.recipe, resolved.pairs, lineage.role_of(recipe.heads), None)
    context.tracker.config(pinned)
    if context.is_main:
        _show_heads(context, resolved)
    if method.stops_after_heads(recipe.method):
        return {}, resolved
    if (slow := slowed_by(recipe, model, resolved.pairs)) is not None:
        notify(slow)
    model.record_attention(False)  # rows are not needed any more
    # The base model.
    measured = functools.partial(measure, model.tokenizer, prepared.held_out, recipe.evaluation)
    before, rows_before = _measured_before(context, prepared)
    if context.is_main:
        if before is None:
            notify(f"evaluating the base model on {len(prepared.held_out.examples)} held-out prompts")
            before, rows_before = measured(model.hf)
        write_evaluation(folder, prepared.identity, before, None, rows_before, [])
        context.tracker.log(flatten_metrics("before", before), step=0)
    # The tuned model.
    total = sum(p.numel() for p in model.hf.parameters())
    torch.manual_seed(recipe.seed)
    tuned, record = _tuned(context, prepared, resolved)
    trained = record.get("parameters", sum(p.numel() for p in tuned.parameters() if p.requires_grad))
    run_file.add(**record | results.parameter_counts(trained, total), peak_memory_gib=peak_memory())
    if not context.is_main:
        return {}, resolved
    method.save(recipe.method, tuned, model.tokenizer, folder)
    chosen = method.heads_after(recipe, model, tuned, resolved, record.get("training_data", {}))
    if chosen is not None:
        resolved = chosen
        keep_heads(resolved, folder)
        _show_head_set(context, resolved)
    notify(f"evaluating the adapted model ({trained:,} of {total:,} parameters were trained)")
    after, rows_after = measured(tuned)
    return write_evaluation(folder, prepared.identity, before, after, rows_before, rows_after), resolved


def _resolve(context: RunContext, prepared: PreparedRun) -> ResolvedHeads:
    """The heads to tune: known before, identified now, or chosen by the run's own first stage."""
    block = context.recipe.heads
    if block is None:
        return ResolvedHeads([])
    context.notify("choosing heads")
    if block.lofit is not None:
        resolved = first_stage.lofit_heads(context, prepared.train, prepared.rows)
    elif block.probe is not None:
        resolved = first_stage.probed_heads(context, prepared.train)
    elif block.in_context is not None:
        resolved = first_stage.in_context_heads(context, prepared.train)
    else:
        for line in prepared.notes:
            context.notify(line)
        resolved = prepared.heads or resolve_heads(
            block, context.model, prepared.train, context.progress, context.notify
        )
    if context.is_main:
        (keep_heads if block.learnt else write_head_set)(resolved, context.folder)
    return resolved


def _show_heads(context: RunContext, resolved: ResolvedHeads) -> None:
    """Tell whether the heads are what they are called, and show them."""
    if resolved.head_set is None:
        return
    if set(resolved.head_set.roles) - {"selected"}:  # which a training chose, without a quantity to test
        context.notify(verdict(resolved.head_set))
        if advice := next_step(resolved.head_set):
            context.notify(advice)
    _show_head_set(context, resolved)


def _show_head_set(context: RunContext, resolved: ResolvedHeads) -> None:
    assert resolved.head_set is not None
    artifact = f"{context.folder.name}-heads"
    media.show_heads(context.tracker, resolved.head_set, resolved.means or {}, context.folder, artifact)


def _measured_before(context: RunContext, prepared: PreparedRun) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The base model's measurement, where this run was broken off after it or another run has it."""
    path, other = context.folder / "evaluation.json", context.recipe.evaluation.before
    if context.resume and path.is_file():
        try:
            before, rows = read_before(path, prepared.identity)
        except InputError:  # another recipe or other data would have been refused before
            context.notify(f"{path} is damaged; the base model is measured once more")
        else:
            if before is not None:
                return before, rows
    return (None, []) if other is None else read_before(Path(other), prepared.identity)


def _tuned(context: RunContext, prepared: PreparedRun, resolved: ResolvedHeads) -> tuple[Any, dict[str, Any]]:
    """The model with its trained or computed adapter, in eval mode; and what run.json says of it."""
    recipe, method = context.recipe, method_named(context.recipe.recipe)
    if method.trains:
        result = training.train(context, resolved.pairs, prepared.train, prepared.rows, prepared.validation)
        return result.model, result.record
    context.notify(f"steering: {getattr(recipe.method, 'kind', recipe.recipe)}")
    part = prepared.train.limited(recipe.task.max_train_examples, recipe.seed)
    computed = method.compute(recipe.method, context.model, resolved, part, recipe.seed, context.progress)
    return computed.model, {"steering": computed.note, "heads": [list(pair) for pair in computed.pairs]}


def _require_same(recipe: Recipe, folder: Path) -> None:
    """A run is resumed with its own recipe, or not at all."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"nothing to resume in {str(folder)!r}: it holds no recipe.yaml; start it without --resume")
    old, new = recipes.load_recipe(str(path)).dump(), recipe.dump()
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        raise InputError(
            f"the run in {str(folder)!r} was started with another {', '.join(changed)}; resume it with its own recipe "
            f"({path}) or choose another output_dir"
        )


def _data(prepared: PreparedRun) -> dict[str, Any]:
    """What a run that is taken up again must find as it was: the task's examples, the model's weights."""
    aside = {} if prepared.validation is None else {"validation_sha256": prepared.validation.sha256}
    return {
        "train_sha256": prepared.train.sha256,
        "eval_sha256": prepared.held_out.sha256,
        "weights_sha256": prepared.model.weights_sha256,
        **aside,
    }


def _require_same_data(now: Mapping[str, Any], then: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other data than a run began with."""
    names = {"train_sha256": "examples to train on", "eval_sha256": "held-out examples", "weights_sha256": "weights"}
    names |= {"validation_sha256": "validation examples"}
    changed = [name for key, name in names.items() if then.get(key) != now.get(key)]
    if changed:
        raise InputError(
            f"the run in {str(folder)!r} was started with other {' and '.join(changed)}; put the files back as they "
            "were, or choose another output_dir"
        )


def _resumed_heads(folder: Path, state: Mapping[str, Any]) -> ResolvedHeads | None:
    """The heads a broken run had already chosen, or None where it did not get that far."""
    pairs = state.get("heads")
    if pairs is None:
        return None
    path, scores = folder / "heads.json", folder / "scores.safetensors"
    return ResolvedHeads(
        [(layer, head) for layer, head in pairs],
        head_set.HeadSet.load(path) if path.is_file() else None,
        load_means(scores) if scores.is_file() else None,
    )
