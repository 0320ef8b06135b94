"""TRL's trainers with our objectives and penalties, and the rows they train on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer, SFTTrainer

from headtune.analysis.models.loading import cache_folder
from headtune.analysis.tasks.task import Example, Task, to_jsonl
from headtune.analysis.tasks.tokenized import EncodedTask, continuation
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_text
from headtune.train.config.methods import AnswerSetConfig
from headtune.train.evaluation.evaluate import generate_lists
from headtune.train.losses.answer_set import answer_set, retention
from headtune.train.types import Penalty

log = logging.getLogger(__name__)


def own_list_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, n_items: int, batch_size: int = 16
) -> list[Example]:
    """Prompts that end inside lists which the model itself wrote, greedily, right or wrong.

    A prompt of the task is continued for `n_items` items; each item border inside the continuation gives one example,
    whose previous answers are the given ones and everything the model wrote before it. Training on these shows the
    objective the mistakes the model makes, above all its repeats, instead of flawless prefixes only.
    """
    examples = []
    for scored in generate_lists(model, tokenizer, task, n_items, batch_size):
        lines = scored.text.split("\n")
        for index in range(1, min(len(lines), len(scored.items) + 1)):
            marker = re.match(r"\s*(\d+[.)]|[-*•])", lines[index])
            if marker is None:
                break  # no longer a list
            prompt = scored.example.prompt + "\n".join(lines[:index]) + "\n" + marker.group(0)
            previous = (*scored.example.previous, *scored.items[:index])
            example = Example(prompt, scored.example.subject, scored.example.answers, previous)
            if example.remaining:
                examples.append(example)
    return examples


def _cached(path: Path, compute: Callable[[], list[Example]]) -> list[Example]:
    """`compute()`, kept in a file: greedy lists of the same model on the same prompts are always the same."""
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [Example(row["prompt"], row["subject"], tuple(row["answers"]), tuple(row["previous"])) for row in rows]
    examples = compute()
    try:
        write_text(path, to_jsonl(examples))
    except OSError as error:
        log.warning("the model's own lists are not kept for other runs: cannot write %s (%s)", path, error.strerror)
    return examples


def answer_set_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    block: AnswerSetConfig,
    n_rows: int,
    seed: int,
    batch_size: int = 16,
    weights_sha256: str | None = None,
) -> Task:
    """The training prompts of the answer-set objective: a share from the task, the rest from the model's own lists.

    Args:
        n_rows: prompts wanted in all; fewer where the task is smaller.
        weights_sha256: the model's; given, its lists are kept in the cache folder, so that other seeds' and methods'
            runs need not write them again.

    Raises:
        InputError: the model's own lists give no usable prompt though some were asked for.
    """
    n_own = round(block.own_lists * n_rows)
    given = list(task.limited(n_rows - n_own, seed).examples) if n_rows > n_own else []
    own: list[Example] = []
    if n_own:
        # About `own_items` examples come from one list; the seed is moved on so that other prompts are continued.
        prompts = task.limited(-(-n_own // block.own_items) * 5 // 4, seed + 1)

        def write_lists() -> list[Example]:
            return own_list_examples(model, tokenizer, prompts, block.own_items + 1, batch_size)

        if weights_sha256 is None:
            own = write_lists()
        else:
            version = importlib.metadata.version("headtune")
            key = f"{version}/{weights_sha256}/{prompts.sha256}/{block.own_items}/{batch_size}/{model.device.type}"
            name = hashlib.sha256(key.encode()).hexdigest()[:24] + ".jsonl"
            own = _cached(cache_folder() / "own-lists" / name, write_lists)
        if not own:
            raise InputError(
                f"the model continues no prompt of {task.name!r} as a list; set method.answer_set.own_lists=0"
            )
        random.Random(seed).shuffle(own)
        own = own[:n_own]
    return Task(f"{task.name}+own", tuple(given + own))


def answer_set_rows(encoded: EncodedTask) -> datasets.Dataset:
    """Columns `input_ids`, `labels`, `remaining`, `previous`: one prompt a row, its END the only place with a loss.

    `labels` mask everything; TRL asks for the column, the objective reads `remaining` and `previous`.
    """
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": example.tokens.tolist(),
                "labels": [-100] * (len(example.tokens) - 1) + [example.target_tokens[0]],
                "remaining": list(example.target_tokens),
                "previous": sorted(set(example.previous_tokens)),
            }
            for example in encoded.examples
        ]
    )


def sft_rows(task: Task, seed: int) -> datasets.Dataset:
    """Columns `prompt`, `completion`: the best answer; of a list, one drawn, seeded, from those not given yet."""
    generator = random.Random(seed)
    rows = []
    for example in task.examples:
        answer = generator.choice(example.remaining) if task.kind == "lists" else example.remaining[0]
        rows.append({"prompt": example.prompt, "completion": continuation(example.prompt, answer) + "\n"})
    return datasets.Dataset.from_list(rows)


def dpo_rows(task: Task, pairs: Literal["one", "all"]) -> datasets.Dataset:
    """Columns `prompt`, `chosen`, `rejected`: right and wrong answers to the same question.

    Args:
        pairs: `one` a question, its best answer and its first wrong one (Yin et al. 2024), or `all` combinations.

    Raises:
        InputError: an example without wrong answers.
    """
    rows = []
    for example in task.examples:
        if not example.incorrect:
            raise InputError(
                f"task {task.name!r} has no 'incorrect' answers for {example.prompt[:60]!r}; the dpo objective needs "
                "them, or choose method.objective=sft"
            )
        right, wrong = example.remaining, example.incorrect
        for chosen, rejected in itertools.product(*((right[:1], wrong[:1]) if pairs == "one" else (right, wrong))):
            continued = [continuation(example.prompt, answer) for answer in (chosen, rejected)]
            rows.append({"prompt": example.prompt, "chosen": continued[0], "rejected": continued[1]})
    return datasets.Dataset.from_list(rows)


def open_rows(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, whole: bool = False) -> datasets.Dataset:
    """Rows of `sft_rows` as tokens, columns `input_ids` and `labels`, which TRL takes as they are.

    To a text it adds the end-of-text token; trained on that, a model ends its list after one item.

    Args:
        whole: the loss is on the prompt, too.
    """
    made = []
    for row in rows:
        before = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids
        same = next((n for n, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        n_ignored = 0 if whole else same
        made.append({"input_ids": ids, "labels": [-100] * n_ignored + ids[n_ignored:]})
    return datasets.Dataset.from_list(made)


def check_row_length(
    name: str, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> None:
    """Refuse rows of `sft_rows`, `open_rows` or `dpo_rows` that are too long for the model (InputError)."""
    if "input_ids" in rows.column_names:
        check_lengths(name, [len(ids) for ids in rows["input_ids"]], positions)
        return
    answers = [column for column in ("completion", "chosen", "rejected") if column in rows.column_names]
    for column in answers if positions is not None else ():
        texts = [prompt + answer for prompt, answer in zip(rows["prompt"], rows[column], strict=True)]
        check_lengths(name, [len(ids) + 1 for ids in tokenizer(texts).input_ids], positions)  # TRL adds the end


def check_lengths(name: str, lengths: Sequence[int], positions: int | None) -> None:
    """Refuse training rows with more tokens than the model takes (InputError)."""
    if positions is not None and (longest := max(lengths, default=0)) > positions:
        too_long = sum(length > positions for length in lengths)
        raise InputError(
            f"task {name!r}: {too_long} of {len(lengths)} training rows are longer than the {positions} tokens that "
            f"the model takes, the longest has {longest}; shorten them or leave them out"
        )


class AnswerSetCollator:
    """Pad on the left, so that END is the last position of every row; pad token sets with -1."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        def padded(name: str, value: int) -> Tensor:
            width = max(1, *(len(row[name]) for row in rows))
            return torch.tensor([[value] * (width - len(row[name])) + list(row[name]) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        tokens = padded("input_ids", self.pad_token_id)
        mask = (torch.arange(tokens.shape[1]) >= (tokens.shape[1] - lengths)[:, None]).long()
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "remaining": padded("remaining", -1),
            "previous": padded("previous", -1),
        }


class Penalised:
    """A trainer whose loss has further terms; each is logged by name, before its weight.

    Attributes:
        penalty: the terms.
        rates: learning rates of parameters whose name holds a word, `{word: rate}`; the others have the run's.
    """

    penalty: Penalty | None = None
    rates: Mapping[str, float] = {}

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No card of TRL's, which knows neither recipe nor data: see `card` for ours, written on export."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows in the trainer's own order, and as many of the next as fill the last step of an epoch.

        With several processes accelerate fills it up itself, with other rows, and not at all with one: the same
        recipe would train on other batches.
        """
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        args: Any = self.args  # type: ignore[attr-defined]
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if type(sampler) is not RandomSampler or args.dataloader_drop_last or len(sampler) % step == 0:
            return sampler
        return RandomSampler(sampler.data_source, num_samples=-(-len(sampler) // step) * step)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        this: Any = self
        for word, rate in self.rates.items():
            apart = {parameter for name, parameter in this.model.named_parameters() if word in name}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in apart]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in apart]
                    # Without decay: pulled to 0, log alpha would half close a gate.
                    optimizer.add_param_group({**group, "params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        this: Any = self
        look = getattr(self.penalty, "see", None)
        if look is not None:  # some terms need to know which tokens are right
            look(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if self.penalty is None or not model.training:
            return result
        progress = this.state.global_step / max(1, this.state.max_steps)
        terms = self.penalty(this.accelerator.unwrap_model(model), progress)
        if not terms:
            return result
        for name, (term, _) in terms.items():
            mean = this.accelerator.gather(term.detach().float().reshape(1)).mean().item()
            this._metrics["train"][name].append(mean)
        added = torch.stack([weight * term.float() for term, weight in terms.values()]).sum()
        if this.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Such a loss is a share of the whole step's; the trainer adds it up over accumulated batches, undivided.
            added = added / this.current_gradient_accumulation_steps
        return (result[0] + added, result[1]) if return_outputs else result + added


class SFT(Penalised, SFTTrainer):
    """Cross-entropy on completions."""


class DPO(Penalised, DPOTrainer):
    """Direct preference optimisation (Rafailov et al. 2023); the reference is the model with its adapter off."""


class _AnswerSet(SFTTrainer):
    """SFTTrainer whose loss is `objectives.answer_set` at END; its parts are logged by name."""

    def __init__(self, *args: Any, block: AnswerSetConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block = block
        # The loss is a mean over rows, so accumulated steps are averaged by the trainer, not by token counts.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        remaining, previous = inputs.pop("remaining"), inputs.pop("previous")
        width = inputs["input_ids"].shape[1]
        kept = self._retained_columns(width)
        columns = torch.tensor([*kept, width - 1], device=inputs["input_ids"].device)
        outputs = model(**inputs, use_cache=False, logits_to_keep=columns)
        terms = answer_set(outputs.logits[:, -1], remaining, previous, self.block.unlikelihood)
        loss = terms["loss"]
        if kept:
            rows = max(1, len(inputs["input_ids"]) // 4)  # a second forward pass of every row would cost too much
            base = self.accelerator.unwrap_model(model)
            some = {name: value[:rows] for name, value in inputs.items()}
            with torch.no_grad(), base.disable_adapter():
                reference = base(**some, use_cache=False, logits_to_keep=columns[:-1]).logits
            present = some["attention_mask"][:, columns[:-1]].bool()
            terms["retention"] = retention(outputs.logits[:rows, :-1][present], reference[present])
            loss = loss + self.block.retention * terms["retention"]
        mode = "train" if model.training else "eval"
        for name, term in terms.items():
            if name != "loss":
                value = self.accelerator.gather_for_metrics(term.detach()[None]).mean().item()
                self._metrics[mode][name].append(value)
        return (loss, outputs) if return_outputs else loss

    def _retained_columns(self, width: int) -> list[int]:
        """Columns before END, drawn anew at every step (the trainer saves and restores the random state)."""
        if not self.block.retention or width < 3:
            return []
        n = min(self.block.retention_positions, width - 2)
        return sorted((1 + torch.randperm(width - 2)[:n]).tolist())


class AnswerSetTrainer(Penalised, _AnswerSet):
    """Any answer not given yet, none of those given: `objectives.answer_set` at END."""
