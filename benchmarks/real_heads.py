"""Do the heads found on SmolLM2 hold up: on four tasks, in and out of sample, and how stable is the choice?

    python benchmarks/real_heads.py --data DATA            every task; resumable, one result a task
    python benchmarks/real_heads.py --only country_cities  the built-in one needs no data

Per task: the built-in one, and three from public data: the country -> cities prompts of Yan & Jia (their repository, in
DATA/one_to_many) and two many-to-one relations of LRE (Hernandez et al. 2024, in DATA/relations), turned round. Heads
are ranked by contrast and confirmed on all prompts; the top 4 of each role, chosen on half of the subjects, are
silenced together on the other half, both ways, next to the controls of `headtune identify`. Writes
benchmarks/results/real_heads_contrast.json; starts anew when the settings or the code have changed. What the ranking by
raw logits gave until 2026-11-30 is in real_heads.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from readme import put, rows
from speed_analysis import code_sha256

from headtune.analysis.heads.head_set import ROLES, provenance
from headtune.analysis.identify import pipeline
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.tasks.build import Template, build, invert
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.readers import read_relation
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.utils.files import write_json
from headtune.cli.console import progress

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "real_heads_contrast.json"
PROMPTS, TOP, VERIFY_TOP = 120, 8, 4


def printed_cities(data: Path) -> Task:
    """The paper's prompts with the previous answers as printed there; the third answer is the one still to be given."""
    rows = (data / "one_to_many" / "country_cities.Meta-Llama-3-8B-Instruct.jsonl").read_text().splitlines()
    examples = []
    for row in map(json.loads, rows):
        prompt = row["query"].removeprefix("<|begin_of_text|>")
        answers = tuple(name.strip() for name in row["three_answers_label_list"])
        example = Example(prompt, row["subject"], answers, answers[:2])
        if example.remaining and row["subject"] in prompt and all(answer in prompt for answer in answers[:2]):
            examples.append(example)
    return Task("yan_jia country_cities", tuple(examples))


def inverted(data: Path, relation: str, *headers: str) -> Task:
    facts = invert(read_relation(data / "relations" / f"{relation}.json"), at_least=3)
    return Task(f"inverted {relation}", tuple(build(facts, [Template(header) for header in headers], (1, 2), 0)))


TASKS: dict[str, Callable[[Path], Task]] = {
    "country_cities": lambda _data: load_task("country_cities"),
    "yan_jia country_cities": printed_cities,
    "inverted landmark_in_country": lambda data: inverted(
        data, "landmark_in_country", "List of landmarks in {subject}:", "Places to see in {subject}."
    ),
    "inverted company_hq": lambda data: inverted(
        data, "company_hq", "List of companies with headquarters in {subject}:", "Organisations based in {subject}."
    ),
}


def measure(model: HeadModel, task: Task, seed: int) -> dict[str, Any]:
    task = task.limited(PROMPTS, seed)
    heads = pipeline.identify(model, task, top=TOP, verify_top=VERIFY_TOP, seed=seed, progress=progress).heads
    return {
        "task": heads.task,
        "heads": {role: [asdict(entry) for entry in heads.roles[role]] for role in ROLES},
        "stability": heads.stability,
        "verification": heads.verification,
    }


def table(tasks: dict[str, Any]) -> str:
    """One line a task and role: the heads, what silencing the top ones does on other subjects, and the controls."""
    columns = ["task", "prompts", "role", "confirmed, best first", "nothing silenced", "silenced (other subjects)"]
    columns += ["most extreme of 50 random sets", "largest others", "p", "verdict"]
    lines = []
    for name, result in tasks.items():
        for each in ROLES:
            tested = result["verification"]["dissociation"][each]
            found = [f"L{head['layer']}H{head['head']}" for head in result["heads"][each]]
            named = ", ".join(found[:VERIFY_TOP]) + (
                f" and {len(found) - VERIFY_TOP} more" if found[VERIFY_TOP:] else ""
            )
            cells = [name, str(result["task"]["n_examples"]), each, named]
            if "ratio" in tested:
                low, high = tested["change_ci"]
                change = f"{tested['change']:+.3f} [{low:+.3f}, {high:+.3f}]"
                cells += [f"{tested['baseline']:.3f}", f"{tested['ablated']:.3f} (×{tested['ratio']:.2f}; {change})"]
                cells += [f"{tested[key]:.3f}" for key in ("most_extreme_random_set", "largest_other", "p_value")]
            else:
                cells += [""] * 5
            lines.append([*cells, tested["verdict"]])
    return rows(columns, lines)


def fill(check: bool = False) -> list[str]:
    """Write the table of docs/concepts.md, or (`check`) only say whether it is not what it should be."""
    tasks = json.loads(RESULT.read_text(encoding="utf-8"))["tasks"]
    return [] if put("docs/concepts.md", "real heads", table(tasks), check) else ["real heads"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one_to_many/ and relations/")
    parser.add_argument("--only", nargs="+", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="write the table of docs/concepts.md, measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        fill()
        return
    settings = {"seed": arguments.seed, "prompts": PROMPTS, "code_sha256": code_sha256()}
    stored = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    results: dict[str, Any] = stored["tasks"] if stored.get("settings") == settings else {}
    model = load_model("smollm2-135m")
    for name, make in TASKS.items():
        if name in results or (arguments.only and name not in arguments.only):
            continue
        if name != "country_cities" and arguments.data is None:
            print(f"{name}: skipped, give --data")
            continue
        results[name] = measure(model, make(arguments.data), arguments.seed)
        about = {
            "settings": settings,
            "model": model.identity(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": provenance()["versions"],
        }
        write_json(arguments.out, about | {"tasks": results})
    print(table(results))


if __name__ == "__main__":
    main()
