"""One recipe from start to end: heads, before, train, adapter, after, report.

A run is a folder: `recipe.yaml`, `heads.json`, `metrics.jsonl`, `evaluation.json`, `adapter/`, `checkpoint-N/`,
`report.html`, `run.json`. Several processes (accelerate) run the same code; only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..analysis import cards, headset, identify, report
from ..analysis.encoding import encode
from ..analysis.errors import CheckError, InputError
from ..analysis.files import require_new_folder, write_json, write_text
from ..analysis.model import HeadModel, load, load_plain
from ..analysis.scores import load_means
from ..analysis.tasks import Task, load_task, take_split
from . import adapter
from . import recipe as recipes
from .evaluate import ScoredList, evaluate
from .recipe import HeadsBlock, LofitMethod, LoraMethod, Recipe, SteerMethod, TaskBlock
from .tracking import Tracker, trainer_callback

log = logging.getLogger(__name__)
Say = Callable[[str], None]


def tasks_of(block: TaskBlock) -> tuple[Task, Task]:
    """The training and the evaluation task of a recipe; one task is split by subject.

    Raises:
        InputError: no such task, or subjects shared by the two.
    """
    train, evaluation = load_task(block.train, block.split.seed), load_task(block.eval or block.train, block.split.seed)
    if (block.eval or block.train) == block.train and ":" not in block.train:
        train, evaluation = (take_split(train, part, block.split.seed) for part in ("train", "test"))
    shared = sorted(set(train.subjects) & set(evaluation.subjects))
    if shared:
        raise InputError(
            f"tasks {train.name!r} and {evaluation.name!r} share {len(shared)} subjects (such as {shared[0]!r}); "
            "name one task to have it split by subject, or give a task.eval with other subjects"
        )
    # One seed for every run: the same examples are compared, whatever the recipe's own seed.
    return train, evaluation.limited(block.max_eval_examples, seed=0)


@dataclass(frozen=True)
class Chosen:
    """The heads of a run.

    Attributes:
        pairs: (layer, head), sorted.
        found: the head set they come from, if any.
        means: its scores, if any, `name -> [n_layers, n_heads]`.
    """

    pairs: list[tuple[int, int]]
    found: headset.HeadSet | None = None
    means: Mapping[str, Any] | None = None


def choose_heads(
    block: HeadsBlock,
    model: HeadModel,
    task: Task,
    folder: Path | None = None,
    progress: identify.Progress = identify.silent,
    say: Say = log.info,
) -> Chosen:
    """Resolve a recipe's `heads` block on a model.

    Args:
        folder: where `identify` may write heads.json and scores.safetensors; None writes nothing.

    Raises:
        InputError: heads that do not exist on this model, a head set of another model, fewer heads than asked for.
    """
    from ..analysis.hooks import require_heads

    if block.every:
        return Chosen([(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)])
    if block.pairs:
        require_heads(model, block.pairs)
        if len(set(block.pairs)) < len(block.pairs):
            raise InputError(
                f"heads.list {[list(pair) for pair in block.pairs]} names a head twice; remove the repeats"
            )
        return Chosen(sorted(block.pairs))
    if block.identify is not None:
        part = task.limited(block.identify.max_examples)
        found = identify.identify(model, part, block.identify.method, top=block.top, progress=progress)
        if folder is not None:
            found.scores.save(folder / "scores.safetensors")
            found.heads.write(folder / "heads.json")
        return Chosen(_top(found.heads, block, say), found.heads, found.scores.means())
    path = Path(block.source or (block.random.like if block.random else ""))
    heads = headset.read(path / "heads.json" if path.is_dir() else path)
    for warning in heads.require_fit(model.identity()):
        log.warning(warning)
    pairs = _top(heads, block, say)
    if block.random is not None:
        like = set(pairs)
        pairs = sorted(headset.random_like(pairs, model.n_heads, block.random.seed, overlap=True))
        if shared := [f"L{layer}H{head}" for layer, head in pairs if (layer, head) in like]:
            say(f"{len(shared)} of {len(pairs)} random heads are chosen ones, for want of others: {', '.join(shared)}")
    scores = path.parent / "scores.safetensors" if path.is_file() else path / "scores.safetensors"
    if folder is not None:
        heads.write(folder / "heads.json")
        if (seen := scores.with_name("portraits.json")).is_file():
            cards.write(cards.read(seen), folder / "portraits.json")
    return Chosen(pairs, heads, load_means(scores) if scores.is_file() else None)


def _top(heads: headset.HeadSet, block: HeadsBlock, say: Say) -> list[tuple[int, int]]:
    roles = headset.ROLES if block.role == "both" else (block.role,)
    pairs = {pair for role in roles for pair in heads.top(role, min(block.top, len(heads.roles.get(role, ()))))}
    for role in roles:
        if len(heads.roles.get(role, ())) < block.top:
            say(f"only {len(heads.roles.get(role, ()))} {role} heads are confirmed, fewer than top={block.top}")
    if not pairs:
        raise InputError(f"the head set holds no {' or '.join(roles)} heads; run identify on more examples")
    return sorted(pairs)


def peft_config(method: LofitMethod | LoraMethod | SteerMethod, pairs: Sequence[tuple[int, int]]) -> PeftConfig:
    """The PEFT configuration of a recipe's method."""
    heads = [list(pair) for pair in pairs]
    if isinstance(method, LoraMethod):
        return LoraConfig(
            r=method.r, lora_alpha=method.alpha, target_modules=method.target_modules, task_type="CAUSAL_LM"
        )
    if isinstance(method, SteerMethod):
        return adapter.HeadTuningConfig(heads=heads, scale="head", offset=False, task_type="CAUSAL_LM")
    return adapter.HeadTuningConfig(
        heads=heads, scale=method.scale, offset=method.offset, init_std=method.init_std, task_type="CAUSAL_LM"
    )


def _training_arguments(recipe: Recipe) -> Any:
    from trl import SFTConfig

    on_gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu", False)
    defaults: dict[str, Any] = {
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": False,
        "gradient_checkpointing": False,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "per_device_train_batch_size": 16,
        "logging_steps": 5,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,  # told through `say`
    }
    own: dict[str, Any] = {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "run_name": recipe.name,
        "report_to": "none",  # our tracker sends the logs
        "remove_unused_columns": False,
        "max_length": None,  # never a silent truncation
    }
    try:
        return SFTConfig(**(defaults | recipe.training | own))
    except ValueError as error:
        raise InputError(f"training: {str(error).splitlines()[0]}") from error


def _require_launch(accelerator: Any) -> None:
    """Refuse the launcher's silent traps: processes that each train alone, an engine that was asked for and dropped.

    Raises:
        InputError: what runs is not what was launched.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise InputError(
            f"{wanted} processes were launched but the trainer sees {accelerator.num_processes}; on a CPU launch with "
            "ACCELERATE_USE_CPU=true and accelerate_configs/ddp_cpu_2.yaml"
        )
    for engine in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine}") == "true" and accelerator.distributed_type.value != engine:
            raise InputError(
                f"{engine} was launched but {accelerator.distributed_type.value} is what runs; see the head of the "
                "file in accelerate_configs/ for its launch line"
            )


@contextmanager
def _state_file(folder: Path, content: dict[str, Any], main: bool) -> Iterator[dict[str, Any]]:
    """run.json: `running` from the start, `done` or `failed` at the end."""

    def write(state: str) -> None:
        if main:
            write_json(folder / "run.json", content | {"state": state})

    write("running")
    try:
        yield content
    except BaseException:
        write("failed")
        raise
    write("done")


def run(
    recipe: Recipe,
    resume: bool = False,
    progress: identify.Progress = identify.silent,
    say: Say = log.info,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        resume: continue the run in `recipe.output_dir` from its newest checkpoint.
        progress: wraps lists of examples that take long.
        say: told what happens, a line at a time.

    Returns:
        The content of evaluation.json.

    Raises:
        InputError: before anything is written, where the recipe does not fit the model, the task or the folder.
    """
    folder = recipe.folder
    main = int(os.environ.get("RANK", "0")) == 0
    if resume:
        _require_same(recipe, folder)
    elif main:
        require_new_folder(folder, "choose another output_dir or name, or continue it with --resume")
    train, held_out = tasks_of(recipe.task)
    block = recipe.model
    heads = load(block.name, block.dtype, None, block.revision, block.trust_remote_code)
    encode(train, heads.tokenizer)  # a task that this tokenizer cannot use stops here, before anything is written
    if recipe.heads is not None and recipe.heads.identify is None:
        choose_heads(recipe.heads, heads, train, say=lambda _line: None)
    _require_trainable(recipe)
    if recipe.evaluation.before is not None:
        read_before(Path(recipe.evaluation.before), _evaluation_identity(recipe, heads, held_out))
    say(f"run {folder} on {block.name}")  # not earlier: what is refused is refused in one line
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
    state = {"name": recipe.name, "recipe": recipe.recipe, "seed": recipe.seed, **headset.provenance()}
    tracker = Tracker(
        folder,
        recipe.name,
        recipe.dump(),
        project=recipe.tracking.project,
        group=recipe.tracking.group,
        job_type="train",
        tags=[recipe.recipe, *recipe.tracking.tags],
        wandb_mode=recipe.tracking.wandb,
        resume_id=_saved(folder).get("wandb_id") if resume else None,
    )
    with tracker, _state_file(folder, state, main) as state:
        state["wandb_id"] = tracker.wandb_id
        return _carry_out(recipe, heads, train, held_out, tracker, state, resume, progress, say)


def _carry_out(
    recipe: Recipe,
    heads: HeadModel,
    train: Task,
    held_out: Task,
    tracker: Tracker,
    state: dict[str, Any],
    resume: bool,
    progress: identify.Progress,
    say: Say,
) -> dict[str, Any]:
    folder = recipe.folder
    main = int(os.environ.get("RANK", "0")) == 0
    chosen = _resumed_heads(folder) if resume else None
    if chosen is None:
        chosen = Chosen([])
        if recipe.heads is not None:
            say("choosing heads")
            chosen = choose_heads(recipe.heads, heads, train, folder if main else None, progress, say)
    state["heads"] = [list(pair) for pair in chosen.pairs]
    if main:
        write_json(folder / "run.json", state | {"state": "running"})
    if chosen.found is not None and main:
        say(report.verdict(chosen.found))
        _track_heads(chosen, folder, tracker)
    heads.model.set_attn_implementation("sdpa")  # rows are not needed any more

    settings = recipe.evaluation
    identity = _evaluation_identity(recipe, heads, held_out)
    before: dict[str, Any] | None = None
    lists_before: list[dict[str, Any]] = []
    if resume and (folder / "evaluation.json").is_file():
        before, lists_before = read_before(folder / "evaluation.json", identity)
    if before is None and settings.before is not None:
        before, lists_before = read_before(Path(settings.before), identity)
    if main:
        if before is None:
            say(f"evaluating the base model on {len(held_out.examples)} held-out prompts")
            before, scored = evaluate(heads.model, heads.tokenizer, held_out, settings.n_items, settings.batch_size)
            lists_before = [_plain(item) for item in scored]
        _write_evaluation(folder, identity, before, None, lists_before, [])
        tracker.log(_flat("before", before), step=0)

    torch.manual_seed(recipe.seed)
    model = _train(recipe, heads, chosen, train, tracker, state, resume, say)
    trained = sum(p.numel() for name, p in model.named_parameters() if _is_adapter(name))
    total = sum(p.numel() for name, p in model.named_parameters() if not _is_adapter(name))
    state |= {"parameters": trained, "model_parameters": total, "parameters_share": trained / total}
    if not main:
        PartialState().wait_for_everyone()
        return {}
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    say(f"evaluating the adapted model ({trained} parameters, {100 * trained / total:.4f}% of the model)")
    after, scored = evaluate(model, heads.tokenizer, held_out, settings.n_items, settings.batch_size)
    evaluation = _write_evaluation(folder, identity, before, after, lists_before, [_plain(item) for item in scored])
    tracker.log(_flat("after", after))
    tracker.summary({"parameters": trained, "parameters_share": trained / total} | _flat("after", after))
    tracker.table(
        "generations",
        ["prompt", "before", "after"],
        [[e["prompt"], e["before"], e["after"]] for e in evaluation["examples"]],
    )
    tracker.artifact(folder / "adapter", f"{recipe.name}-adapter", "adapter")
    if chosen.found is not None:
        seen = folder / "portraits.json"
        portraits = cards.read(seen) if seen.is_file() else []
        report.write_report(
            folder / "report.html", chosen.found, chosen.means or {}, evaluation, portraits, title=recipe.name
        )
    PartialState().wait_for_everyone()
    return evaluation


def _is_adapter(name: str) -> bool:
    return "head_tuning_" in name or "lora_" in name


def _train(
    recipe: Recipe,
    heads: HeadModel,
    chosen: Chosen,
    train: Task,
    tracker: Tracker,
    state: dict[str, Any],
    resume: bool,
    say: Say,
) -> Any:
    """The PeftModel with its trained (or, for `steer`, given) adapter."""
    method = recipe.method
    config = peft_config(method, chosen.pairs)
    if isinstance(method, SteerMethod):
        model: Any = get_peft_model(heads.model, config)
        for name, parameter in model.named_parameters():
            if "head_tuning_scale" in name:
                parameter.data.fill_(method.factor - 1.0)
        return model.eval()
    from . import trainers

    arguments = _training_arguments(recipe)
    tokenizer = heads.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    callbacks = [trainer_callback(tracker), _told(say)]
    common = {"args": arguments, "processing_class": tokenizer, "callbacks": callbacks}
    if method.objective == "answer_set":
        limit = recipe.task.max_train_examples or len(train.examples)
        say("writing the model's own lists" if method.answer_set.own_lists else "preparing prompts")
        task = trainers.answer_set_task(
            heads.model,
            tokenizer,
            train,
            method.answer_set,
            limit,
            recipe.seed,
            recipe.evaluation.batch_size,
            heads.weights_sha256,
        )
        encoded = encode(task, tokenizer)
        state["training_data"] = encoded.summary()
        rows = trainers.answer_set_rows(encoded)
        set_seed(recipe.seed)  # writing lists drew nothing, but the adapter's start must not depend on that
        kind: Any = trainers.AnswerSetTrainer
        common |= {
            "data_collator": trainers.AnswerSetCollator(tokenizer.pad_token_id),
            "block": method.answer_set,
        }
    else:
        rows = trainers.sft_rows(train.limited(recipe.task.max_train_examples, recipe.seed), recipe.seed)
        state["training_data"] = {"name": train.name, "n_examples": len(rows)}
        kind = trainers.SFTTrainer
    try:
        trainer = kind(heads.model, train_dataset=rows, peft_config=config, **common)
    except InputError:
        raise
    except ValueError as error:  # keys that contradict each other or the data, such as packing with answer_set
        raise InputError(f"training: {str(error).splitlines()[0]}") from error
    _require_launch(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    say(f"training on {len(rows)} prompts")
    checkpoint = get_last_checkpoint(recipe.output_dir) if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    tracker.log({"train/steps": trainer.state.global_step})
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.eval()


def _told(say: Say) -> TrainerCallback:
    """Tells how the training goes, at every logging step, and stops it where the loss is no number any more."""

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                if not math.isfinite(float(logs["loss"])):
                    raise CheckError(
                        f"the loss is {logs['loss']} at step {state.global_step}; lower training.learning_rate "
                        f"(it was {logs.get('learning_rate')})"
                    )
                parts = [f"{name} {float(value):.4g}" for name, value in logs.items() if name not in _UNTOLD]
                say(f"step {state.global_step}/{state.max_steps}: " + ", ".join(parts))

    return Told()


_UNTOLD = {"epoch", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy"}


def _require_trainable(recipe: Recipe) -> None:
    """Catch what only transformers can judge (a schedule, a precision) before anything is written."""
    if not isinstance(recipe.method, SteerMethod):
        _training_arguments(recipe)


def _require_same(recipe: Recipe, folder: Path) -> None:
    """A run is resumed with its own recipe, or not at all."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"nothing to resume in {str(folder)!r}: it holds no recipe.yaml; start it without --resume")
    old, new = recipes.load(str(path)).dump(), recipe.dump()
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        raise InputError(
            f"the run in {str(folder)!r} was started with another {', '.join(changed)}; resume it with its own recipe "
            f"({path}) or choose another output_dir"
        )


def _saved(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _resumed_heads(folder: Path) -> Chosen | None:
    """The heads a broken run had already chosen, or None where it did not get that far."""
    pairs = _saved(folder).get("heads")
    if pairs is None:
        return None
    path, scores = folder / "heads.json", folder / "scores.safetensors"
    return Chosen(
        [(layer, head) for layer, head in pairs],
        headset.read(path) if path.is_file() else None,
        load_means(scores) if scores.is_file() else None,
    )


def _evaluation_identity(recipe: Recipe, heads: HeadModel, task: Task) -> dict[str, Any]:
    """What two measurements of the base model must share to be the same measurement."""
    return {
        "task": task.name,
        "task_sha256": task.sha256,
        "weights_sha256": heads.weights_sha256,
        "n_items": recipe.evaluation.n_items,
    }


def read_before(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The base model's metrics and lists from an evaluation.json.

    Raises:
        InputError: the file is missing or measured another model, task or number of items.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        lists = [
            {"subject": e["subject"], "prompt": e["prompt"], "text": e["before"], "kinds": e["before_kinds"]}
            for e in data["examples"]
        ]
        before = data["before"]
    except FileNotFoundError:
        raise InputError(f"evaluation.before {str(path)!r} does not exist; name a run's evaluation.json") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f"evaluation.before {str(path)!r} is not a run's evaluation.json") from None
    for key, value in identity.items():
        if data.get(key) != value:
            raise InputError(
                f"evaluation.before {str(path)!r} measured another {key} ({data.get(key)!r}, not {value!r}); "
                "remove the key"
            )
    return before, lists


def _plain(scored: ScoredList) -> dict[str, Any]:
    example = scored.example
    return {"subject": example.subject, "prompt": example.prompt, "text": scored.text, "kinds": list(scored.kinds)}


def _write_evaluation(
    folder: Path,
    identity: Mapping[str, Any],
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    lists_before: Sequence[dict[str, Any]],
    lists_after: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    later = lists_after or [{"text": "", "kinds": []}] * len(lists_before)
    content = {
        **identity,
        "before": before,
        "after": after,
        "examples": [
            {
                "subject": first["subject"],
                "prompt": first["prompt"],
                "before": first["text"],
                "after": second["text"],
                "before_kinds": first["kinds"],
                "after_kinds": second["kinds"],
            }
            for first, second in zip(lists_before, later, strict=True)
        ],
    }
    write_json(folder / "evaluation.json", content)
    return content


def _flat(prefix: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers for the tracker: means of the metrics, `prefix/name`."""
    return {
        f"{prefix}/{name}": value["mean"] if isinstance(value, dict) else value
        for name, value in metrics.items()
        if name != "n"
    }


def _track_heads(chosen: Chosen, folder: Path, tracker: Tracker) -> None:
    assert chosen.found is not None
    if chosen.means:
        for name, path in report.heat_maps(dict(chosen.means), chosen.found, folder).items():
            tracker.image(f"heads/{name}", path)
    rows = [
        [role, entry.name, entry.layer, entry.head, entry.score, *(entry.ci or (None, None))]
        for role, entries in chosen.found.roles.items()
        for entry in entries
    ]
    tracker.table("heads/ranked", ["role", "name", "layer", "head", "score", "low", "high"], rows)
    tracker.artifact(folder / "heads.json", f"{folder.name}-heads", "heads")


def load_run(folder: Path) -> tuple[Any, Any, Recipe]:
    """The adapted model (a PeftModel in float32), its tokenizer and the recipe of a finished run.

    Raises:
        InputError: the folder is not a run, or has no adapter yet.
    """
    if not (folder / "recipe.yaml").is_file():
        raise InputError(
            f"{str(folder)!r} is not a run: it holds no recipe.yaml; give a folder that headtune train wrote"
        )
    if not (folder / "adapter" / "adapter_config.json").is_file():
        raise InputError(f"run {str(folder)!r} has no adapter yet; finish it with: headtune train RECIPE --resume")
    recipe = recipes.load(str(folder / "recipe.yaml"))
    block = recipe.model
    model, tokenizer = load_plain(block.name, "float32", block.revision, block.trust_remote_code)
    return PeftModel.from_pretrained(model, str(folder / "adapter")).eval(), tokenizer, recipe
