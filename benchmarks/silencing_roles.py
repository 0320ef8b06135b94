"""What silencing the heads of a role does, on two real models: the cross-fitted verdicts of `headtune identify`.

    python benchmarks/silencing_roles.py --data DATA      every task on SmolLM2; resumable
    python benchmarks/silencing_roles.py --data DATA --model gemma3-270m
    python benchmarks/silencing_roles.py --table                            write the table of docs/heads-that-pay.md

lists       country_cities (built in): recall and suppression
conflict    "The capital city of X is WRONG. The capital city of X is", of countries whose capital the model knows by
            itself (LRE's country_capital_city.json in DATA/relations; Gemma: "The capital of X is the city of"): memory
            and context
needle      a code of six words in 256 tokens: retrieval

Heads chosen on one half of the subjects are silenced at the last token on the other, both ways; 50 random sets of heads
of the same layers (or the nearest), which share none with any role. Written to benchmarks/results/silencing_roles.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from readme import put, rows

from headtune import identify, load_model, load_task, make_task
from headtune.analysis.heads.head_set import provenance
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.files import write_json
from headtune.cli.console import progress

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "silencing_roles.json"
DOCUMENT = "docs/heads-that-pay.md"
VERIFY_TOP = {"lists": 4, "conflict": 3, "needle": 4}
ROLES = {"lists": ("recall", "suppression"), "conflict": ("memory", "context"), "needle": ("retrieval",)}


# How each model is asked for a capital that it knows: the first form is one that Gemma answers for one country of 24.
FORMS = {
    "smollm2-135m": {"relation": "capital city"},
    "gemma3-270m": {"relation": "capital", "template": "The capital of {subject} is the city of"},
}


def conflict(model: HeadModel, data: Path) -> Task:
    facts = data / "relations" / "country_capital_city.json"
    return make_task("conflict", model, n=48, facts=facts, **FORMS[model.name])


TASKS: dict[str, Callable[[HeadModel, Path], Task]] = {
    "lists": lambda _model, _data: load_task("country_cities:train").limited(48, 0),
    "conflict": conflict,
    "needle": lambda model, _data: make_task("needle", model, n=16, lengths=[256]),
}


def measure(model: HeadModel, name: str, data: Path) -> dict[str, Any]:
    method = "retrieval" if name == "needle" else "dla,ablation"
    task = TASKS[name](model, data)
    result = identify(model, task, method, 8, VERIFY_TOP[name], roles=ROLES[name], progress=progress)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": provenance()["versions"],
        "prompts": len(result.examples),
        "subjects": len(set(task.subjects)),
        "heads": {role: [f"L{h.layer}H{h.head}" for h in result.heads.roles[role]] for role in ROLES[name]},
        "dissociation": result.heads.verification["dissociation"],
    }


def table(results: dict[str, Any]) -> str:
    columns = [
        "model",
        "task",
        "role",
        "heads",
        "quantity",
        "nothing silenced",
        "silenced",
        "most extreme of 50 random sets",
    ]
    columns += ["largest others", "p", "verdict"]
    lines = []
    for model, tasks in results.items():
        for task, result in tasks.items():
            for role, tested in result["dissociation"].items():
                heads = ", ".join(result["heads"][role][: VERIFY_TOP[task]])
                cells = [model, f"{task}, {result['prompts']} prompts", role, heads]
                if "ratio" in tested:
                    low, high = tested["change_ci"]
                    cells += [tested["quantity"].replace("_", "(") + ")", f"{tested['baseline']:.3f}"]
                    cells.append(f"**{tested['ablated']:.3f}** ({tested['change']:+.3f} [{low:+.3f}, {high:+.3f}])")
                    for key in ("most_extreme_random_set", "largest_other", "p_value"):
                        cells.append("" if tested[key] is None else f"{tested[key]:.3f}")
                else:
                    cells += [""] * 6
                lines.append([*cells, tested["verdict"]])
    return rows(columns, lines)


def fill(check: bool = False) -> list[str]:
    """Write the document's table, or (`check`) only say whether it is not what it should be."""
    results = json.loads(RESULT.read_text(encoding="utf-8"))
    return [] if put(DOCUMENT, "silencing roles", table(results), check) else ["silencing roles"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with relations/")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        fill()
        return
    if arguments.data is None:
        parser.error("give --data")
    model = load_model(arguments.model)
    for name in arguments.only:
        stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
        if name in stored.get(arguments.model, {}):
            continue
        measured = measure(model, name, arguments.data)
        stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}  # of another process
        stored.setdefault(arguments.model, {})[name] = measured
        write_json(RESULT, stored)
        print(name, {role: each["verdict"] for role, each in measured["dissociation"].items()}, flush=True)


if __name__ == "__main__":
    main()
