"""How long `headtune compare` takes on many run folders: as many as a large study has, with all their files.

    python benchmarks/speed_compare.py             200 runs: 40 groups, 5 seeds, 200 held-out prompts each
    python benchmarks/speed_compare.py --runs 1000

The folders are written here, in the format of `headtune train`, with random numbers in them: seconds are of interest,
not results. Each command is a process of its own, started `--rounds` times; writes
benchmarks/results/speed_compare.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml
from grid import RESULTS

SEEDS = 5
PROMPTS = 200


def write_runs(folder: Path, n: int) -> None:
    """`n` finished runs, the recipes of which differ in their heads and, five at a time, in their seed alone."""
    rng = np.random.default_rng(0)
    base = rng.random((2, PROMPTS)).round()
    text = "\n1. Rome\n2. Milan\n3. Naples\n4. Turin\n"
    for index in range(n):
        group, seed = divmod(index, SEEDS)
        run = folder / f"lofit-top{group}-s{seed}"
        run.mkdir(parents=True)
        values = rng.random((2, PROMPTS)).round()
        examples = [
            {
                "subject": f"subject {row // 2}",
                "prompt": f"List five cities in country {row}.",
                "before": text,
                "after": text,
                "before_kinds": ["correct", "repeat", "wrong"],
                "after_kinds": ["correct", "correct", "wrong"],
                "before_values": {"repeat_rate": base[0, row], "correct_new_rate": base[1, row]},
                "after_values": {"repeat_rate": values[0, row], "correct_new_rate": values[1, row]},
            }
            for row in range(PROMPTS)
        ]

        def metrics(values: np.ndarray) -> dict[str, object]:
            pairs = zip(("repeat_rate", "correct_new_rate"), values.mean(1), strict=True)
            return {name: {"mean": mean, "ci": [mean - 0.05, mean + 0.05]} for name, mean in pairs}

        evaluation = {"task": "cities:test", "task_sha256": "0" * 64, "examples": examples}
        evaluation |= {"before": metrics(base), "after": metrics(values) | {"neutral_perplexity": 29.0}}
        heads = sorted({(int(layer), int(head)) for layer, head in rng.integers([0, 0], [30, 9], (16, 2))})
        state = {"name": run.name, "recipe": "lofit", "seed": seed, "state": "done", "parameters": 1000 + group}
        recipe = {"recipe": "lofit", "name": run.name, "seed": seed, "method": {"objective": "sft"}}
        recipe |= {"heads": {"top": group}, "tracking": {"group": "study"}, "output_dir": str(run)}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        (run / "run.json").write_text(json.dumps(state | {"heads": heads}))
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        curve = [{"step": step, "train/loss": 3.0 / step} for step in range(1, 101)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))


def measure(command: list[str], rounds: int) -> list[float]:
    """Seconds of each round, imports and all."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "runs"
        write_runs(folder, arguments.runs)
        compare = [sys.executable, "-m", "headtune", "compare", str(folder)]
        result = {
            "table": measure(compare, arguments.rounds),
            "table and page": measure([*compare, "--html", f"{scratch}/page.html"], arguments.rounds),
        }
        page = (Path(scratch) / "page.html").stat().st_size
    content = {
        "command": f"python benchmarks/speed_compare.py --runs {arguments.runs}",
        "runs": arguments.runs,
        "groups": -(-arguments.runs // SEEDS),
        "prompts": PROMPTS,
        "seconds": result,
        "page_bytes": page,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    (RESULTS / "speed_compare.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
