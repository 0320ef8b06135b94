"""Retrieval heads of SmolLM2: which, how stable, and what silencing them does to copying.

    python benchmarks/retrieval_heads.py                 32 needles of 6 words in 384 tokens; about 3 minutes on 2 cores
    python benchmarks/retrieval_heads.py --n 64          more of them; resumable, prompt by prompt and set by set

The needles are those of `headtune task make needle` (neutral.txt, 5 depths). Heads are scored by `retrieval.copy`
(Wu et al. 2024), over the prompts that greedy decoding answers in full. Measured are the overlap of the top heads of
two halves of the prompts, and the exact success with the top 5 heads silenced (z = 0), beside random heads of the same
layers, on each half of the prompts with the heads that the other one chose. Writes
benchmarks/results/retrieval_heads.json; starts anew when the settings or the code have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headtune.analysis.heads.controls import random_sets
from headtune.analysis.heads.head_set import provenance
from headtune.analysis.methods.behaviour import answer_success
from headtune.analysis.methods.parallel_map import ParallelMap
from headtune.analysis.methods.registry import score_examples
from headtune.analysis.methods.retrieval import THRESHOLD
from headtune.analysis.methods.scores import Array
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.tasks.generators.make import make_task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.files import write_json
from headtune.cli.console import progress

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "retrieval_heads.json"
TOP, SILENCED, RANDOM_SETS = 10, 5, 3
Head = tuple[int, int]


def code_sha256() -> str:
    """Of the code whose change makes a result worthless."""
    rooms = ("methods/retrieval.py", "methods/behaviour.py", "tasks/generators/needle.py", "models/attention.py")
    return hashlib.sha256(b"".join((ROOT / "analysis" / name).read_bytes() for name in rooms)).hexdigest()


def best(mean: Array, top: int) -> list[Head]:
    order = np.argsort(-mean, axis=None, kind="stable")[:top]
    return [(int(index) // mean.shape[1], int(index) % mean.shape[1]) for index in order]


def overlap(first: Sequence[Head], second: Sequence[Head]) -> float:
    return len({*first} & {*second}) / len({*first} | {*second})


def success(model: HeadModel, examples: Sequence[Encoded], heads: Sequence[Head]) -> float:
    with hooks.ablate(model, heads):
        return answer_success(model, examples).accuracy


def names(heads: Sequence[Head]) -> list[str]:
    return [f"L{layer}H{head}" for layer, head in heads]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32, help="prompts")
    parser.add_argument("--length", type=int, default=384, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=RESULT, help="another one for another model")
    arguments = parser.parse_args()
    settings = {"n": arguments.n, "length": arguments.length, "seed": arguments.seed, "code_sha256": code_sha256()}
    stored = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    result: dict[str, Any] = stored if stored.get("settings") == settings else {"settings": settings, "success": {}}

    # Scores, prompt by prompt.
    model = load_model(arguments.model)
    task = make_task("needle", model, arguments.n, arguments.seed, lengths=(arguments.length,))
    examples = encode(task, model.tokenizer, model.positions, model.vocabulary).examples
    parallel = ParallelMap(arguments.out.with_suffix(".partial"), settings)
    scores = score_examples(model, examples, "retrieval", arguments.seed, progress, parallel)
    mean = scores.mean("retrieval.copy")
    low, high = scores.interval("retrieval.copy")
    halves = [list(range(start, len(examples), 2)) for start in (0, 1)]
    of_halves = [scores.subset(half).mean("retrieval.copy") for half in halves]
    result |= {
        "task": task.about,
        "successes": scores.counts()["retrieval"],
        "top": [
            {"head": f"L{head[0]}H{head[1]}", "score": float(mean[head]), "ci": [float(low[head]), float(high[head])]}
            for head in best(mean, TOP)
        ],
        "share_above_threshold": float((mean >= THRESHOLD).mean()),
        "share_above_zero": float((mean > 0).mean()),
        "jaccard_of_halves": {
            str(top): overlap(best(of_halves[0], top), best(of_halves[1], top)) for top in (5, TOP, 2 * TOP)
        },
    }

    # What silencing does to each half of the prompts, set by set; the other half chose the heads.
    sets: dict[str, tuple[list[int], list[Head]]] = {}
    for number, half in enumerate(halves):
        heads = best(of_halves[1 - number], SILENCED)
        sets[f"half {number + 1}: top {SILENCED}"] = (half, heads)
        shape = (model.n_layers, model.n_heads)
        for seed, drawn in enumerate(random_sets(heads, shape, RANDOM_SETS, seed=0)):
            sets[f"half {number + 1}: random {seed}"] = (half, drawn)
    right = ~np.isnan(scores.by_example["retrieval.copy"][:, 0, 0])
    for number, half in enumerate(halves):
        result["success"][f"half {number + 1}: nothing"] = {
            "heads": [],
            "n": len(half),
            "exact": float(right[half].mean()),
        }
    for name, (rows, heads) in sets.items():
        if name not in result["success"]:
            rate = success(model, [examples[row] for row in rows], heads)
            result["success"][name] = {"heads": names(heads), "n": len(rows), "exact": rate}
            write_json(arguments.out, result)
    result |= {
        "model": model.identity(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": provenance()["versions"],
    }
    write_json(arguments.out, result)
    parallel.finish()

    print(", ".join(f"{entry['head']} {entry['score']:.2f}" for entry in result["top"]))
    print(f"at least {THRESHOLD}: {result['share_above_threshold']:.1%}; Jaccard {result['jaccard_of_halves']}")
    print("| silenced | prompts | exact success |\n|---|---|---|")
    for name, row in result["success"].items():
        print(f"| {name} | {row['n']} | {row['exact']:.3f} |")


if __name__ == "__main__":
    main()
