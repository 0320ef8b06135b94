"""Every way of scoring heads against models whose heads are known, and by what its heads carry on a real model.

    python benchmarks/identification.py                    planted models (minutes), then SmolLM2 (tens of minutes)
    python benchmarks/identification.py --part planted     one part
    python benchmarks/identification.py --quick            one seed, two kinds, no real model: to see it work

Planted models (`headtune.analysis.synthetic.planted`): recall heads are judged by `<method>.target`, suppression heads
by `<method>.previous`. Head AUROC, average precision, precision at k (k = how many there are), sign accuracy, and the
bootstrap Jaccard of the best k. Besides the methods: `composite` (direct attribution where exact ablation agrees in
sign: what identify ranks by), `attention` (mass on the subject, on the previous answers: where a head looks, not what
it does) and `random`.

SmolLM2: the best k heads by each method are kept at the last token and all others set to their means over other
subjects; f is the share of the behaviour left (mean logit of the remaining answers less that of the vocabulary). CMD =
area of |1 - f| over the proportion of heads kept, ranked by absolute score (0 is best); CPR = area under f, ranked by
signed score. Heads are scored on one half of the subjects and judged on the other.

Resumable: writes benchmarks/results/identification.json after every model and method; a part starts anew when its
settings or the code have changed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_analysis import code_sha256

from headtune.analysis.heads import ranking
from headtune.analysis.heads.head_set import provenance
from headtune.analysis.interventions.counterfactuals import Counterfactuals
from headtune.analysis.methods.patching import every_head
from headtune.analysis.methods.registry import METHODS, score_examples
from headtune.analysis.methods.scores import Scores
from headtune.analysis.models import loading
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.studies import faithfulness
from headtune.analysis.studies.ranked_heads import order
from headtune.analysis.synthetic import planted
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.files import write_json
from headtune.cli.console import progress

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


def graded(model: planted.PlantedModel, examples: int) -> list[dict[str, Any]]:
    """One record per role and name of ROWS."""
    view = model.view()
    encoded = encode(model.task.limited(examples), view.tokenizer).examples
    records = []
    scores: dict[str, Scores] = {}
    seconds: dict[str, float] = {}
    for name in METHODS:
        start = time.monotonic()
        scores[name] = score_examples(view, encoded, name, model.planting.seed)
        seconds[name] = (time.monotonic() - start) / len(encoded)
    both = Scores(scores["dla"].by_example | scores["ablation"].by_example, scores["dla"].subjects)
    for role, quantity in QUANTITY.items():
        k = len(model.truth(role)[0])
        maps = {name: score.mean(f"{name}.{quantity}") for name, score in scores.items()}
        maps["composite"] = composite(both, role)
        maps["attention"] = planted.SIGNS[role] * both.mean(SEEN[role])
        for name, values in maps.items():
            record = {
                "kind": model.planting.name,
                "group": group_of(model.planting),
                "seed": model.planting.seed,
                "role": role,
                "method": name,
                **model.grade(role, values),
                "auroc_helpers_negative": model.grade(role, values, "negative")["auroc"],
                "jaccard": stability(name, scores, both, role, k),
            }
            records.append(record | ({"seconds_per_example": seconds[name]} if name in seconds else {}))
    return records + drawn(model)


def drawn(model: planted.PlantedModel, draws: int = 100) -> list[dict[str, Any]]:
    """The `random` records: means over random maps."""
    config = model.model.config
    generator = np.random.default_rng([model.planting.seed, *model.planting.name.encode()])
    maps = generator.standard_normal((draws, config.num_hidden_layers, config.num_attention_heads))
    records = []
    for role in QUANTITY:
        grades = [model.grade(role, values) for values in maps]
        mean = {measure: float(np.mean([grade[measure] for grade in grades])) for measure in grades[0]}
        about = {"kind": model.planting.name, "group": group_of(model.planting), "seed": model.planting.seed}
        records.append(about | {"role": role, "method": "random", **mean, "jaccard": None})
    return records


def group_of(planting: planted.Planting) -> str:
    return "noisy" if "noisy" in planting.name else "redundant" if planting.n_pairs else "independent"


def stability(name: str, scores: dict[str, Scores], both: Scores, role: str, k: int) -> float | None:
    """Bootstrap Jaccard of the best k; None where a method has one value for the task, or none to resample."""
    if name == "composite":
        return ranking.stability(both, role, k)
    return None if name in ("attention", "random") else ranking.stability(scores[name], role, k)


def composite(scores: Scores, role: str) -> Any:
    """The ranking as one number per head: the attribution where ablation has the same sign, 0 elsewhere.

    `[n_layers, n_heads]`, in the attribution's unit and sign (a suppression head is negative).
    """
    rule = ranking.rule_for(role, scores)
    direct, confirming = scores.mean(rule.rank), scores.mean(rule.confirm[0])
    return np.where(direct * confirming > 0, direct, np.float32(0))


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
    heads = loading.load_model("smollm2-135m")
    encoded = encode(load_task("country_cities").limited(2 * prompts, seed), heads.tokenizer)
    scored, judged = halves(encoded.examples)
    block = part(results, "real", {"prompts": prompts, "seed": seed})
    block |= {"model": heads.identity(), "task": encoded.summary(), "scored_on": len(scored), "judged_on": len(judged)}
    block.setdefault("methods", {})
    references = Counterfactuals(heads, judged, seed)
    pairs = every_head(heads)
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
            rankings = {"signed": order(values), "absolute": order(np.abs(values))}
        seconds = time.monotonic() - start
        curves = faithfulness.faithfulness_curves(heads, references, rankings, progress)
        f = {key: faithfulness.faithfulness_of(value) for key, value in curves.items()}
        if name == "random":
            cmd = [faithfulness.area(faithfulness.PROPORTIONS, np.abs(1 - value)) for value in f.values()]
            cpr = [faithfulness.area(faithfulness.PROPORTIONS, value) for value in f.values()]
            entry = {"CMD": float(np.mean(cmd)), "CPR": float(np.mean(cpr)), "CMD_draws": cmd, "CPR_draws": cpr}
        else:
            entry = {
                "CMD": faithfulness.area(faithfulness.PROPORTIONS, np.abs(1 - f["absolute"])),
                "CPR": faithfulness.area(faithfulness.PROPORTIONS, f["signed"]),
                "seconds_per_example": seconds / len(scored),
                "f_absolute": f["absolute"].tolist(),
                "f_signed": f["signed"].tolist(),
            }
        block["methods"][name] = entry
        save(results, out)
        print(f"{name}: CMD {entry['CMD']:.3f}, CPR {entry['CPR']:.3f}", flush=True)


def estimate(name: str, model: HeadModel, examples: Sequence[Encoded], seed: int) -> Any:
    """`[n_layers, n_heads]`: the method's estimate of how far a head raises the remaining answers."""
    if name == "composite":
        return composite(score_examples(model, examples, "dla,ablation", seed, progress), "recall")
    if name == "attention":
        return score_examples(model, examples, "dla", seed, progress).mean(SEEN["recall"])
    return score_examples(model, examples, name, seed, progress).mean(f"{name}.target")


# --- results ----------------------------------------------------------------------------------------------------------


def part(results: dict[str, Any], name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The part's block of results, emptied if it was made with other settings or other code."""
    settings |= {"code_sha256": code_sha256()}
    if results.get(name, {}).get("settings") != settings:
        results[name] = {"settings": settings}
    block: dict[str, Any] = results[name]
    return block


def save(results: dict[str, Any], out: Path) -> None:
    about = {
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": provenance()["versions"],
    }
    write_json(out, results | about)


def tables(results: dict[str, Any]) -> str:
    """The tables that analysis/README.md shows: planted models, then SmolLM2."""
    lines = []
    if summary := results.get("planted", {}).get("summary"):
        lines += [
            "| method | AUROC | AUROC, redundant pair | AUROC, noisy | precision at k | sign | Jaccard |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in ROWS:
            of_method = {group: summary[group].get(name, {}) for group in GROUPS}
            cells = [_pair(roles, "auroc", lowest=True) for roles in of_method.values()]
            cells += [_pair(of_method["noisy"], measure) for measure in MEASURES[2:]]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    if "real" in results:
        lines += ["", "| method | CMD | CPR | seconds a prompt |", "|---|---|---|---|"]
        for name, entry in sorted(results["real"]["methods"].items(), key=lambda item: item[1]["CMD"]):
            seconds = entry.get("seconds_per_example")
            cells = [f"{entry['CMD']:.3f}", f"{entry['CPR']:.2f}", "" if seconds is None else f"{seconds:.2g}"]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(roles: dict[str, dict[str, float | None]], measure: str, lowest: bool = False) -> str:
    """`recall / suppression`, with the lowest of the models in brackets where it differs."""
    cells = []
    for entry in roles.values():
        value = entry[measure]
        cell = "–" if value is None else f"{value:.2f}"
        least = f"{entry['lowest_auroc']:.2f}"
        cells.append(f"{cell} ({least})" if lowest and least != cell else cell)
    return " / ".join(cells) or "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("planted", "real"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=40, help="prompts of each planted model (default: 40)")
    parser.add_argument("--prompts", type=int, default=16, help="of SmolLM2, in each half (default: 16)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/identification.json; none with --quick")
    arguments = parser.parse_args()
    out: Path = arguments.out or (Path(tempfile.mkdtemp()) / "quick.json" if arguments.quick else RESULT)
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    if arguments.part != "real":
        kinds = planted.KINDS[:1] + planted.KINDS[-1:] if arguments.quick else planted.KINDS + NOISY
        examples = 8 if arguments.quick else arguments.examples
        block = part(results, "planted", {"examples": examples})
        records = block.setdefault("records", [])
        seeds = range(1 if arguments.quick else arguments.seeds)
        for model in (planted.plant(replace(kind, seed=seed)) for seed in seeds for kind in kinds):
            name = (model.planting.name, model.planting.seed)
            if any((record["kind"], record["seed"]) == name for record in records):
                continue
            print(*name, flush=True)
            records += graded(model, examples)
            block["summary"] = {group: summary(records, group) for group in GROUPS}
            save(results, out)
    if arguments.part != "planted" and not arguments.quick:
        real(results, out, arguments.prompts, seed=0)
    print(tables(results))


if __name__ == "__main__":
    main()
