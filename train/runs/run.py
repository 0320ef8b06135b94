"""One recipe from start to end: heads, before, train, adapter, after, report.

A run is a folder: `recipe.yaml`, `heads.json`, `metrics.jsonl`, `evaluation.json`, `adapter/`, `checkpoint-N/`,
`report.html`, `run.json`. Several processes (accelerate) run the same code; only rank 0 writes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from headtune.analysis.heads.head_set import ROLES, HeadSet, provenance
from headtune.analysis.identify import pipeline
from headtune.analysis.methods.scores import load_means
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.reports import head_report
from headtune.analysis.reports.dissociation import next_step, verdict
from headtune.analysis.reports.head_profiles import read_profiles
from headtune.analysis.tasks.task import Task, scored
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import leftovers, require_new_folder, write_json, write_text
from headtune.analysis.utils.processes import is_main
from headtune.analysis.utils.progress import Notify
from headtune.analysis.utils.state_files import mend_lines, read_state
from headtune.analysis.utils.verbosity import silence_libraries
from headtune.train.config import recipe as recipes
from headtune.train.config.resolve_heads import ResolvedHeads, keep_heads, resolve_heads
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.config.schema import Recipe
from headtune.train.continual import sequence
from headtune.train.evaluation.evaluate import check_generation_length
from headtune.train.evaluation.evaluation_file import (
    evaluation_identity,
    flatten_metrics,
    measure,
    peak_memory,
    read_before,
    write_evaluation,
)
from headtune.train.evaluation.multiple_choice import require_choices
from headtune.train.methods.base import method_of
from headtune.train.tracking import lineage, media
from headtune.train.tracking.tracker import METRICS, Tracker
from headtune.train.trainer import attach_regularisers, failures, signals, training, training_rows

from . import first_stage
from .load_run import _saved, _warn_of_code

log = logging.getLogger(__name__)
FIRST = "recipe.yaml"  # without it nothing of a run is there


@contextmanager
def _state_file(folder: Path, content: dict[str, Any], main: bool) -> Iterator[dict[str, Any]]:
    """run.json: `running` from the start, `done`, `interrupted` or `failed` at the end."""

    def write(state: str) -> None:
        if main:
            write_json(folder / "run.json", content | {"state": state})

    write("running")
    try:
        yield content
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk is what may have failed it
            write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    write("done")


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
    folder = recipe.folder
    main = is_main()
    saved = _saved(folder) if resume else {}  # before anybody writes run.json anew
    if resume:
        _require_same(recipe, folder)
        if saved.get("state") == "done":
            notify(f"run {folder} is finished")
            if method_of(recipe).learns_sequence and main:
                sequence.clear(recipe)
            done = folder / "evaluation.json"
            return read_state(done) if done.is_file() else {}
    elif main:
        fix = "choose another output_dir or name, or continue it with --resume (resume=True in Python)"
        require_new_folder(folder, fix, FIRST)
    in_order = method_of(recipe).learns_sequence
    ready = prepared(recipe)
    heads, train, held_out, steps = ready.heads, ready.train, ready.held_out, ready.steps
    block = recipe.model
    data = None if in_order else _data(heads, train, held_out)  # a sequence keeps its own account
    if data is not None and "data" in saved:
        _require_same_data(data, saved["data"], folder)
    notify(f"run {folder} on {block.name}")  # not earlier: what is refused is refused in one line
    notify(f"task {held_out.name}: {scored(held_out.kind, recipe.evaluation.n_items)}")
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FIRST, recipe.to_yaml())
        for left in leftovers(folder / FIRST):
            left.unlink(missing_ok=True)
    state = {"name": recipe.name, "recipe": recipe.recipe, "seed": recipe.seed, **provenance()}
    state |= {key: saved[key] for key in ("heads", "wandb_id", "training_data", "inputs") if key in saved}
    if data is not None:
        state["data"] = data
    if main:
        mend_lines(folder / METRICS)
    tracker = Tracker(
        folder,
        recipe.name,
        lineage.config_of(recipe),
        resume_id=saved.get("wandb_id"),
        **lineage.wandb_run_args(recipe, "train"),
    )
    state["wandb_id"] = tracker.wandb_id or saved.get("wandb_id")
    state.setdefault("inputs", lineage.inputs_of(recipe))
    with tracker, _state_file(folder, state, main) as state:
        source = lineage.head_set_of(recipe)
        tracker.uses(state["inputs"], {"heads": source} if source else {})
        if not in_order:
            return _carry_out(recipe, heads, train, held_out, tracker, state, resume, progress, notify)
        evaluation = sequence.learn_sequence(recipe, heads, steps, tracker, state, resume, progress, notify)
        if main:
            _show_products(recipe, state, evaluation, tracker)
    if main:
        sequence.clear(recipe)  # not earlier: a run that is not done can be taken up
    return evaluation


@dataclass(frozen=True)
class Ready:
    """A recipe's model and data, checked against each other.

    Attributes:
        steps: of a sequence, whose first task is `train` and `held_out`; empty otherwise.
    """

    heads: HeadModel
    train: Task
    held_out: Task
    steps: list[sequence.Step]


def prepared(recipe: Recipe) -> Ready:
    """Load what a recipe names, and refuse what does not fit together; nothing is written.

    Raises:
        InputError: the task, the model, the tokenizer, the heads or the training arguments do not go together.
    """
    in_order = method_of(recipe).learns_sequence
    steps = sequence.steps_of(recipe.task) if in_order else []
    train, held_out = (steps[0].train, steps[0].held_out) if in_order else tasks_of(recipe.task)
    block = recipe.model
    _warn_of_code(block)
    heads = load_model(block.name, block.dtype, None, block.revision, block.trust_remote_code)
    if in_order:
        sequence.require_usable(recipe, heads, steps)
    else:
        _require_usable(recipe, heads, train, held_out)
        if recipe.evaluation.before is not None:
            read_before(Path(recipe.evaluation.before), evaluation_identity(recipe, heads, held_out))
    attach_regularisers.require_usable(recipe, heads, train)
    return Ready(heads, train, held_out, steps)


def _carry_out(
    recipe: Recipe,
    model: HeadModel,
    train: Task,
    held_out: Task,
    tracker: Tracker,
    state: dict[str, Any],
    resume: bool,
    progress: pipeline.Progress,
    notify: Notify,
) -> dict[str, Any]:
    folder = recipe.folder
    main = is_main()
    chosen = _resumed_heads(folder, state) if resume else None
    if chosen is None:
        chosen = ResolvedHeads([])
        if recipe.heads is not None:
            notify("choosing heads")
            chosen = _choose(recipe, model, train, tracker, main, progress, notify)
    state["heads"] = [list(pair) for pair in chosen.pairs]
    tracker.config(lineage.config_keys(recipe.recipe, chosen.pairs, lineage.role_of(recipe.heads), None))
    if main:
        write_json(folder / "run.json", state | {"state": "running"})
    if chosen.found is not None and main:
        if set(ROLES) & set(chosen.found.roles):
            notify(verdict(chosen.found))
            if advice := next_step(chosen.found):
                notify(advice)
        media.show_heads(tracker, chosen.found, chosen.means or {}, folder, f"{folder.name}-heads")
    family = method_of(recipe)
    if family.stops_after_heads(recipe.method):
        PartialState().wait_for_everyone()
        return {}
    model.record_attention(False)  # rows are not needed any more
    settings = recipe.evaluation
    identity = evaluation_identity(recipe, model, held_out)
    measured = functools.partial(measure, model.tokenizer, held_out, settings)
    before: dict[str, Any] | None = None
    rows_before: list[dict[str, Any]] = []
    if resume and (folder / "evaluation.json").is_file():
        try:
            before, rows_before = read_before(folder / "evaluation.json", identity)
        except InputError:  # another recipe or other data would have been refused before
            notify(f"{folder / 'evaluation.json'} is damaged; the base model is measured once more")
    if before is None and settings.before is not None:
        before, rows_before = read_before(Path(settings.before), identity)
    if main:
        if before is None:
            notify(f"evaluating the base model on {len(held_out.examples)} held-out prompts")
            before, rows_before = measured(model.hf)
        write_evaluation(folder, identity, before, None, rows_before, [])
        tracker.log(flatten_metrics("before", before), step=0)

    total = sum(p.numel() for p in model.hf.parameters())
    torch.manual_seed(recipe.seed)
    adapted = _adapted(recipe, model, chosen, train, tracker, state, resume, progress, notify)
    trained = state.get("parameters", sum(p.numel() for p in adapted.parameters() if p.requires_grad))
    state |= {"parameters": trained, "model_parameters": total, "parameters_share": trained / total}
    state["peak_memory_gib"] = peak_memory()
    if not main:
        PartialState().wait_for_everyone()
        return {}
    family.save(recipe.method, adapted, model.tokenizer, folder)
    tuned = family.heads_after(recipe, model, adapted, chosen, state.get("training_data", {}))
    if tuned is not None:
        chosen = tuned
        keep_heads(chosen, folder)
        assert chosen.found is not None
        media.show_heads(tracker, chosen.found, chosen.means or {}, folder, f"{folder.name}-heads")
    notify(f"evaluating the adapted model ({trained} parameters, {100 * trained / total:.4f}% of the model)")
    after, rows_after = measured(adapted)
    evaluation = write_evaluation(folder, identity, before, after, rows_before, rows_after)
    tracker.log(flatten_metrics("after", after))
    tracker.summary({"parameters": trained, "parameters_share": trained / total} | flatten_metrics("after", after))
    _show_products(recipe, state, evaluation, tracker)
    if chosen.found is not None:
        seen = folder / "portraits.json"
        profiles = read_profiles(seen) if seen.is_file() else []
        head_report.write_report(
            folder / "report.html", chosen.found, chosen.means or {}, evaluation, profiles, title=recipe.name
        )
    else:
        media.write_run_page(recipe, folder, evaluation)
    PartialState().wait_for_everyone()
    return evaluation


def _require_usable(recipe: Recipe, model: HeadModel, train: Task, held_out: Task) -> None:
    """Refuse, before anything is written, what does not fit the tokenizer, the task, the model or transformers."""
    block, method = recipe.heads, recipe.method
    objective = method.objective if method_of(recipe).trains else None
    if objective == "answer_set" or (block is not None and block.identify is not None):
        if train.kind == "multiple_choice":
            raise InputError(
                f"task {train.name!r} is multiple choice, whose answers are no first tokens; set method.objective "
                "to sft or dpo, and choose heads on another task (heads.from)"
            )
        encode(train, model.tokenizer, model.positions)
    if objective in ("sft", "dpo"):
        rows = training.text_rows(recipe, model.tokenizer, train)
        training_rows.check_row_length(train.name, rows, model.tokenizer, model.positions)
    require_choices(held_out)
    check_generation_length(model.hf, model.tokenizer, held_out, recipe.evaluation.n_items)
    if block is not None and block.identify is None and not block.learnt:
        resolve_heads(block, model, train, notify=lambda _line: None)
    if objective is not None:
        training.training_arguments(recipe)


def _choose(
    recipe: Recipe,
    model: HeadModel,
    train: Task,
    tracker: Tracker,
    main: bool,
    progress: pipeline.Progress,
    notify: Notify,
) -> ResolvedHeads:
    block, folder = recipe.heads, recipe.folder if main else None
    assert block is not None
    if not block.learnt:
        return resolve_heads(block, model, train, folder, progress, notify)
    if block.lofit is not None:
        chosen = first_stage.lofit_heads(recipe, model, train, tracker, notify)
    else:
        chosen = first_stage.probed_heads(recipe, model, train, progress)
    if main:
        keep_heads(chosen, recipe.folder)
    return chosen


def _adapted(
    recipe: Recipe,
    model: HeadModel,
    chosen: ResolvedHeads,
    train: Task,
    tracker: Tracker,
    state: dict[str, Any],
    resume: bool,
    progress: pipeline.Progress,
    notify: Notify,
) -> Any:
    """The model with its trained, or for `steer` its computed, adapter; in eval mode."""
    if method_of(recipe).trains:
        if model.tokenizer.pad_token is None:
            model.tokenizer.pad_token = model.tokenizer.eos_token
        return training.fit(recipe, model, chosen.pairs, train, tracker, state, resume, notify)
    return first_stage.steered(recipe, model, chosen, train, state, progress, notify)


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


def _data(model: HeadModel, train: Task, held_out: Task) -> dict[str, Any]:
    """What a run that is taken up again must find as it was: the task's examples, the model's weights."""
    return {
        "train_sha256": train.sha256,
        "eval_sha256": held_out.sha256,
        "weights_sha256": model.weights_sha256,
    }


def _require_same_data(now: Mapping[str, Any], then: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other data than a run began with."""
    names = {"train_sha256": "examples to train on", "eval_sha256": "held-out examples", "weights_sha256": "weights"}
    changed = [name for key, name in names.items() if then.get(key) != now[key]]
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
        HeadSet.load(path) if path.is_file() else None,
        load_means(scores) if scores.is_file() else None,
    )


def _show_products(recipe: Recipe, state: Mapping[str, Any], evaluation: Mapping[str, Any], tracker: Tracker) -> None:
    """File what a run ended with: the heads and parameters of its adapter, before against after, its weights."""
    folder, heads, parameters = recipe.folder, state.get("heads"), state.get("parameters")
    tracker.config(lineage.config_keys(recipe.recipe, heads, lineage.role_of(recipe.heads), parameters))
    media.show_chosen(tracker, heads or [])
    media.show_evaluation(tracker, evaluation)
    if (folder / "adapter").is_dir():
        tracker.artifact(folder / "adapter", f"{recipe.name}-adapter", "adapter")
    elif (folder / "model").is_dir():  # as large as the base model: known by its digest, not uploaded
        tracker.summary({"outputs/model/sha256": lineage.tree_sha256(folder / "model")})
