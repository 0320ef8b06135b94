"""TruthfulQA by headtune and by the Language Model Evaluation Harness: the same model, questions and choices.

    python benchmarks/multiple_choice.py                     40 questions, SmolLM2-135M, about four minutes of one core
    python benchmarks/multiple_choice.py --data FILE.csv     another file of TruthfulQA
    python benchmarks/multiple_choice.py --n 409             all questions of the fold

The harness is an optional extra: pip install -e ".[benchmarks]".

Its own tasks `truthfulqa_mc1` and `truthfulqa_mc2` run through its own evaluator, with its prompt (six questions and
answers before each), its tokenisation, its forward passes (one sequence a choice) and its metrics; only the data set is
exchanged for the same rows from a local file, and acc_norm is asked for beside acc. headtune runs a prompt once for all
of its choices. Compared, question by question: the log-likelihood of every choice, mc1, mc2, mc1_norm. A log-likelihood
that differs by more than 1e-3, or any mc1 or mc1_norm that differs, ends the benchmark.

Writes benchmarks/results/multiple_choice.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Example, Task
from headtune.train.evaluation.multiple_choice import (
    choice_log_likelihoods,
    choices,
    multiple_choice,
    truthfulqa_preamble,
)

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "multiple_choice.json"
DATA = ROOT.parent / "shared" / "data" / "truthfulqa" / "fold_0_test.csv"
TOLERANCE = 1e-3  # of a log-likelihood, in nats; sums of dozens of float32 terms that were batched differently
METRICS = ("mc1", "mc2", "mc1_norm")


def harness_rows(task: Task) -> list[dict[str, Any]]:
    """The rows as the harness's data set has them."""

    def targets(right: tuple[str, ...], example: Example) -> dict[str, Any]:
        labels = [1] * len(right) + [0] * len(example.incorrect)
        return {"choices": [*right, *example.incorrect], "labels": labels}

    return [
        {
            "question": example.subject,
            "mc1_targets": targets(example.answers[:1], example),
            "mc2_targets": targets(example.answers, example),
        }
        for example in task.examples
    ]


def by_harness(model: HeadModel, task: Task, batch_size: int) -> tuple[list[list[float]], list[dict[str, float]]]:
    """What the harness makes of it: log-likelihoods of the choices of mc2 and the metrics, a question each."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in harness_rows(task)), encoding="utf-8")
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": str(file)}}
        one, two = ({"task": f"truthfulqa_mc{i}", "validation_split": "train"} | data for i in (1, 2))
        metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
        output = simple_evaluate(
            model=HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size),
            tasks=[{"group": "local", "task": [one | {"metric_list": metrics}, two]}],
            log_samples=True,
            bootstrap_iters=0,
        )
    assert output is not None
    first, second = (
        sorted(output["samples"][config["task"]], key=lambda sample: sample["doc_id"]) for config in (one, two)
    )
    scores = [[float(ll) for ll, _ in sample["filtered_resps"]] for sample in second]
    values = [
        {"mc1": float(of_one["acc"]), "mc2": float(of_two["acc"]), "mc1_norm": float(of_one["acc_norm"])}
        for of_one, of_two in zip(first, second, strict=True)
    ]
    return scores, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=DATA, help="a CSV file of TruthfulQA")
    parser.add_argument("--n", type=int, default=40, help="questions, drawn with a fixed seed")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit('the Language Model Evaluation Harness is not installed; pip install -e ".[benchmarks]"')

    torch.set_num_threads(1)
    task = load_task(f"truthfulqa:{arguments.data}").limited(arguments.n)
    heads = load_model(arguments.model, device="cpu")
    began = time.process_time()
    ours = choice_log_likelihoods(heads.hf, heads.tokenizer, task, arguments.batch_size, truthfulqa_preamble())
    seconds = time.process_time() - began
    values = [multiple_choice(example, row) for example, row in zip(task.examples, ours, strict=True)]
    began = time.process_time()
    theirs, their_values = by_harness(heads, task, arguments.batch_size)
    their_seconds = time.process_time() - began

    n_choices = [len(choices(example)) for example in task.examples]
    assert [len(row) for row in ours] == [len(row) for row in theirs] == n_choices
    largest = max(abs(a - b) for rows in zip(ours, theirs, strict=True) for a, b in zip(*rows, strict=True))
    differences = {
        name: max(abs(a[name] - b[name]) for a, b in zip(values, their_values, strict=True)) for name in METRICS
    }
    result = {
        "command": " ".join(["python benchmarks/multiple_choice.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("headtune", "lm_eval", "torch", "transformers")
        },
        "model": arguments.model,
        "dtype": "float32",
        "data": f"TruthfulQA, {arguments.data.name}",
        "task_sha256": task.sha256,
        "questions": len(task.examples),
        "choices": sum(n_choices),
        "batch_size": arguments.batch_size,
        "threads": 1,
        "largest_difference": {"log_likelihood": largest} | differences,
        "headtune": {name: sum(row[name] for row in values) / len(values) for name in METRICS},
        "harness": {name: sum(row[name] for row in their_values) / len(values) for name in METRICS},
        "cpu_seconds": {"headtune": seconds, "harness, choices of mc1 and of mc2": their_seconds},
    }
    if largest > TOLERANCE or differences["mc1"] or differences["mc1_norm"]:
        sys.exit(f"headtune and the harness differ: {result['largest_difference']}")
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
