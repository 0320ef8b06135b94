"""Every way of scoring heads against models whose heads are known, and by what its heads carry on a real model.

    python benchmarks/identification.py                    planted models (minutes), then SmolLM2 (tens of minutes)
    python benchmarks/identification.py --part planted     one part
    python benchmarks/identification.py --quick            one seed, two kinds, no real model: to see it work

Planted models (`headtune.analysis.planted`): recall heads are judged by `<method>.target`, suppression heads by
`<method>.previous`. Head AUROC, average precision, precision at k (k = how many there are), sign accuracy, and the
bootstrap Jaccard of the best k. Besides the methods: `composite` (direct attribution where exact ablation agrees in
sign: what identify ranks by), `attention` (mass on the subject, on the previous answers: where a head looks, not what
it does) and `random`.

SmolLM2: the best k heads by each method are kept at END and all others set to their means over other subjects; f is the
share of the behaviour left (mean logit of the remaining answers). CMD = area of |1 - f| over the proportion of
heads kept, ranked by absolute score (0 is best); CPR = area under f, ranked by signed score. Heads are scored on one
half of the prompts and judged on the other.

Resumable: writes benchmarks/results/identification.json after every model and method.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headtune.analysis import model, planted, selection, studies
from headtune.analysis.files import write_json
from headtune.analysis.headset import provenance
from headtune.analysis.methods import METHODS, score_examples
from headtune.analysis.references import References
from headtune.analysis.scores import Scores
from headtune.analysis.tasks import Encoded, encode, load_task
from headtune.train.console import progress

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "identification.json"
QUANTITY = {"recall": "target", "suppression": "previous"}
SEEN = {"recall": "attention.subject", "suppression": "attention.previous"}
MEASURES = ("auroc", "average_precision", "precision_at_k", "sign_accuracy", "jaccard")
# With background and weight noise several times as strong, decoys leak real effects: no method can be perfect.
NOISY = tuple(replace(kind, name=f"{kind.name}, noisy", background=0.1, noise=0.01) for kind in planted.KINDS[:3])
GROUPS = {"independent": "No redundant pairs", "redundant": "With a redundant pair", "noisy": "Noisy"}
ROWS = ("composite", *METHODS, "attention", "random")


# --- planted models ---------------------------------------------------------------------------------------------------


def graded(found: planted.PlantedModel, examples: int, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """One record per role and method of `wanted` (names of ROWS)."""
    view = found.view()
    encoded = encode(found.task.limited(examples), view.tokenizer).examples
    records = []
    scores: dict[str, Scores] = {}
    seconds: dict[str, float] = {}
    for name in METHODS:
        if name not in (*wanted, "dla", "ablation"):  # these two are behind the other rows
            continue
        start = time.monotonic()
        scores[name] = score_examples(view, encoded, name, found.planting.seed)
        seconds[name] = (time.monotonic() - start) / len(encoded)
    both = Scores(scores["dla"].by_example | scores["ablation"].by_example, scores["dla"].subjects)
    for role, quantity in QUANTITY.items():
        k = len(found.truth(role)[0])
        maps = {name: of.mean(f"{name}.{quantity}") for name, of in scores.items()}
        maps["composite"] = selection.composite(both, role)
        maps["attention"] = planted.SIGNS[role] * both.mean(SEEN[role])
        for name in (name for name in wanted if name in maps):
            values = maps[name]
            record = {
                "kind": found.planting.name,
                "group": group_of(found.planting),
                "seed": found.planting.seed,
                "role": role,
                "method": name,
                **found.grade(role, values),
                "auroc_helpers_negative": found.grade(role, values, "negative")["auroc"],
                "jaccard": stability(name, scores, both, role, k),
            }
            records.append(record | ({"seconds_per_example": seconds[name]} if name in seconds else {}))
    return records + (drawn(found) if "random" in wanted else [])


def drawn(found: planted.PlantedModel, draws: int = 100) -> list[dict[str, Any]]:
    """The `random` records: means over random maps."""
    config = found.model.config
    generator = np.random.default_rng([found.planting.seed, *found.planting.name.encode()])
    maps = generator.standard_normal((draws, config.num_hidden_layers, config.num_attention_heads))
    records = []
    for role in QUANTITY:
        grades = [found.grade(role, values) for values in maps]
        mean = {measure: float(np.mean([grade[measure] for grade in grades])) for measure in grades[0]}
        about = {"kind": found.planting.name, "group": group_of(found.planting), "seed": found.planting.seed}
        records.append(about | {"role": role, "method": "random", **mean, "jaccard": None})
    return records


def group_of(planting: planted.Planting) -> str:
    return "noisy" if "noisy" in planting.name else "redundant" if planting.n_pairs else "independent"


def stability(name: str, scores: dict[str, Scores], both: Scores, role: str, k: int) -> float | None:
    """Bootstrap Jaccard of the best k; None where a method has one value for the task, or none to resample."""
    if name == "composite":
        return selection.stability(both, role, k)
    return None if name in ("attention", "random") else selection.stability(scores[name], role, k)


def summary(records: Sequence[dict[str, Any]], group: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """method -> role -> measure -> mean over models, and the smallest AUROC."""
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in ROWS:
        for role in QUANTITY:
            chosen = [r for r in records if (r["method"], r["role"], r["group"]) == (name, role, group)]
            if not chosen:
                continue
            values = {m: [r[m] for r in chosen if r[m] is not None] for m in MEASURES}
            entry: dict[str, float | None] = {m: float(np.mean(v)) if v else None for m, v in values.items()}
            entry["lowest_auroc"] = min(r["auroc"] for r in chosen)
            table.setdefault(name, {})[role] = entry
    return table


# --- the real model ---------------------------------------------------------------------------------------------------


def halves(examples: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Two halves that share no subject."""
    subjects = sorted({example.example.subject for example in examples})
    first = set(subjects[::2])
    return (
        [example for example in examples if example.example.subject in first],
        [example for example in examples if example.example.subject not in first],
    )


def real(results: dict[str, Any], out: Path, prompts: int, seed: int) -> None:
    """Add CMD and CPR of every method that is not there yet; writes after each."""
    heads = model.load("smollm2-135m")
    encoded = encode(load_task("country_cities").limited(2 * prompts, seed), heads.tokenizer)
    scored, judged = halves(encoded.examples)
    block = results.setdefault("real", {"model": heads.identity(), "methods": {}})
    block |= {"task": encoded.summary(), "scored_on": len(scored), "judged_on": len(judged), "seed": seed}
    references = References(heads, judged, seed)
    pairs = studies.every_head(heads)
    for name in ROWS:
        if name in block["methods"]:
            continue
        rankings: dict[str, list[tuple[int, int]]]
        start = time.monotonic()
        if name == "random":
            generator = np.random.default_rng(seed)
            rankings = {f"draw {i}": [pairs[j] for j in generator.permutation(len(pairs))] for i in range(5)}
        else:
            values = estimate(name, heads, scored, seed)
            rankings = {"signed": studies.order(values), "absolute": studies.order(np.abs(values))}
        seconds = time.monotonic() - start
        curves = studies.faithfulness_curves(heads, references, rankings, progress)
        f = {key: studies.faithfulness_of(value) for key, value in curves.items()}
        if name == "random":
            cmd = [studies.area(studies.PROPORTIONS, np.abs(1 - value)) for value in f.values()]
            cpr = [studies.area(studies.PROPORTIONS, value) for value in f.values()]
            entry = {"CMD": float(np.mean(cmd)), "CPR": float(np.mean(cpr)), "CMD_draws": cmd, "CPR_draws": cpr}
        else:
            entry = {
                "CMD": studies.area(studies.PROPORTIONS, np.abs(1 - f["absolute"])),
                "CPR": studies.area(studies.PROPORTIONS, f["signed"]),
                "seconds_per_example": seconds / len(scored),
                "f_absolute": f["absolute"].tolist(),
                "f_signed": f["signed"].tolist(),
            }
        block["methods"][name] = entry
        save(results, out)
        print(f"{name}: CMD {entry['CMD']:.3f}, CPR {entry['CPR']:.3f}", flush=True)


def estimate(name: str, heads: model.HeadModel, examples: Sequence[Encoded], seed: int) -> Any:
    """`[n_layers, n_heads]`: the method's estimate of how far a head raises the remaining answers."""
    if name == "composite":
        return selection.composite(score_examples(heads, examples, "dla,ablation", seed, progress), "recall")
    if name == "attention":
        return score_examples(heads, examples, "dla", seed, progress).mean(SEEN["recall"])
    return score_examples(heads, examples, name, seed, progress).mean(f"{name}.target")


# --- results ----------------------------------------------------------------------------------------------------------


def save(results: dict[str, Any], out: Path) -> None:
    about = {
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": provenance()["versions"],
    }
    write_json(out, results | about)


def tables(results: dict[str, Any]) -> str:
    """The tables that analysis/README.md shows."""
    lines = []
    cell = lambda value: "–" if value is None else f"{value:.2f}"  # noqa: E731
    for key, title in GROUPS.items():
        if not results.get("planted_summary", {}).get(key):
            continue
        lines += [
            f"\n{title}: recall / suppression, mean over models (lowest AUROC in brackets)\n",
            "| method | AUROC | average precision | precision at k | sign | Jaccard |",
            "|---|---|---|---|---|---|",
        ]
        for name, roles in results["planted_summary"][key].items():
            cells = [
                f"{' / '.join(cell(roles[role]['auroc']) for role in roles)} "
                f"({' / '.join(cell(roles[role]['lowest_auroc']) for role in roles)})"
            ]
            cells += [" / ".join(cell(roles[role][m]) for role in roles) for m in MEASURES[1:]]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    if "real" in results:
        lines += ["\nSmolLM2\n", "| method | CMD | CPR | s/prompt |", "|---|---|---|---|"]
        for name, entry in sorted(results["real"]["methods"].items(), key=lambda item: item[1]["CMD"]):
            lines.append(
                f"| `{name}` | {entry['CMD']:.3f} | {entry['CPR']:.2f} | {cell(entry.get('seconds_per_example'))} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("planted", "real"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=40, help="prompts of each planted model (default: 40)")
    parser.add_argument("--prompts", type=int, default=16, help="of SmolLM2, in each half (default: 16)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    if arguments.part != "real":
        kinds = planted.KINDS[:1] + planted.KINDS[-1:] if arguments.quick else planted.KINDS + NOISY
        records = results.setdefault("planted", [])
        for found in planted.suite(range(1 if arguments.quick else arguments.seeds), kinds):
            name = (found.planting.name, found.planting.seed)
            there = {record["method"] for record in records if (record["kind"], record["seed"]) == name}
            wanted = [row for row in ROWS if row not in there]
            if not wanted:
                continue
            print(*name, flush=True)
            records += graded(found, 8 if arguments.quick else arguments.examples, wanted)
            results["planted_summary"] = {group: summary(records, group) for group in GROUPS}
            save(results, arguments.out)
    if arguments.part != "planted" and not arguments.quick:
        real(results, arguments.out, arguments.prompts, seed=0)
    print(tables(results))


if __name__ == "__main__":
    main()
