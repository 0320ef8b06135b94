"""How often identify says "holds" where nothing is, and where something is.

    python benchmarks/identification_noise.py                 all three, about 25 minutes on two cores; resumable
    python benchmarks/identification_noise.py --only random   random weights alone; shuffled, planted
    python benchmarks/identification_noise.py --table         write the table of analysis/README.md

random      40 freshly initialised models (ten of each of four families, 6 layers of 8 heads), country_cities
shuffled    SmolLM2-135M on country_cities, prompts as they are, the answers that are scored permuted among subjects;
            40 permutations
planted     the planted models of `headtune.analysis.synthetic`, all kinds, three seeds

Roles are counted: each model or permutation has two. Written to benchmarks/results/identification_noise.json.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from readme import put, rows
from transformers import AutoConfig, AutoModelForCausalLM

from headtune import HeadModel, identify, load_model, load_task
from headtune.analysis.heads.head_set import ROLES
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.synthetic.planted import KINDS, plant
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import EncodedTask, encode

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "identification_noise.json"
DOCUMENT = "analysis/README.md"
MODEL = "smollm2-135m"
FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox")
N, SUBJECTS, PLANTED_SEEDS = 40, 24, 3
VERDICTS = ("holds", "does not hold", "cannot be told")


def one_prompt_a_subject() -> Task:
    """country_cities with two cities given, one prompt for each of `SUBJECTS` countries."""
    task = load_task("country_cities:train")
    chosen = {example.subject: example for example in task.examples if len(example.previous) == 2}
    return replace(task, examples=tuple(list(chosen.values())[:SUBJECTS]))


def random_model(family: str, seed: int, tokenizer: Any) -> HeadModel:
    """As the library initialises it, 6 layers of 8 heads of 16."""
    sizes = {
        "gpt2": {"n_layer": 6, "n_head": 8, "n_embd": 128, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0},
        "gpt_neox": {"num_hidden_layers": 6, "num_attention_heads": 8, "hidden_size": 128, "intermediate_size": 512},
    }.get(
        family,
        {
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "hidden_size": 128,
            "intermediate_size": 256,
            "head_dim": 16,
        },
    )
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes)
    return wrap_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer)


def shuffled(encoded: EncodedTask, seed: int) -> EncodedTask:
    """The answers' first tokens of each subject from another one, for scoring; prompts stay as they are."""
    examples = encoded.examples
    order = list(range(len(examples)))
    generator = random.Random(seed)
    while any(examples[i].example.subject == examples[j].example.subject for i, j in enumerate(order)):
        generator.shuffle(order)
    moved = []
    for one, index in zip(examples, order, strict=True):
        other = examples[index]
        answers = {*other.target_tokens, *other.previous_tokens, *other.ambiguous}
        kept = [(token, weight) for token, weight in one.others if token not in answers]
        kept += [(token, 1 / SUBJECTS / 5) for token in {*one.target_tokens, *one.previous_tokens} - answers]
        total = sum(weight for _, weight in kept)
        others = tuple((token, weight / total) for token, weight in sorted(kept))
        tokens = {"target_tokens": other.target_tokens, "previous_tokens": other.previous_tokens}
        moved.append(replace(one, **tokens, others=others))
    return replace(encoded, examples=moved)


def verdicts_of(model: HeadModel, task: Task | EncodedTask, **options: Any) -> dict[str, Any]:
    result = identify(model, task, **options)
    tests = result.heads.verification["dissociation"]
    return {
        "verdicts": {role: tests[role]["verdict"] for role in ROLES},
        "confirmed": {role: len(result.heads.roles[role]) for role in ROLES},
        "ratio": {role: tests[role].get("ratio") for role in ROLES},
        "p": {role: tests[role].get("p_value") for role in ROLES},
    }


def random_weights() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    tokenizer = load_model(MODEL).tokenizer
    task = one_prompt_a_subject()
    for index in range(N):
        family, seed = FAMILIES[index % len(FAMILIES)], index // len(FAMILIES)
        yield f"{family}-{seed}", lambda f=family, s=seed: verdicts_of(random_model(f, s, tokenizer), task)  # type: ignore[misc]


def shuffled_answers() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    model = load_model(MODEL)
    encoded = encode(one_prompt_a_subject(), model.tokenizer)
    for seed in range(N):
        yield f"permutation-{seed}", lambda s=seed: verdicts_of(model, shuffled(encoded, s))  # type: ignore[misc]


def planted_models() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for kind in KINDS:
        for seed in range(PLANTED_SEEDS):
            yield f"{kind.name}-{seed}", lambda k=kind, s=seed: planted(k, s)  # type: ignore[misc]


def planted(kind: Any, seed: int) -> dict[str, Any]:
    """With, beside the verdicts, whether the planted heads come first."""
    model = plant(replace(kind, seed=seed))
    truth = {role: set(model.truth(role)[0]) for role in ROLES}
    top = max(map(len, truth.values()))
    result = identify(model.view(), model.task.limited(24), top=top, verify_top=3)
    tests = result.heads.verification["dissociation"]
    first = {role: set(result.heads.top(role)[: len(truth[role])]) == truth[role] for role in ROLES}
    return {
        "verdicts": {role: tests[role]["verdict"] for role in ROLES},
        "confirmed": {role: len(result.heads.roles[role]) for role in ROLES},
        "ratio": {role: tests[role].get("ratio") for role in ROLES},
        "p": {role: tests[role].get("p_value") for role in ROLES},
        "planted_first": first,
    }


PARTS = {"random": random_weights, "shuffled": shuffled_answers, "planted": planted_models}


def main(only: list[str] | None) -> None:
    content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"parts": {}}
    for part in only or PARTS:
        done = content["parts"].setdefault(part, {})
        for name, run in PARTS[part]():
            if name not in done:
                done[name] = run() | {"date": datetime.now(UTC).date().isoformat()}
                content |= {
                    "command": "python benchmarks/identification_noise.py",
                    "model": MODEL,
                    "subjects": SUBJECTS,
                    "versions": {"torch": torch.__version__},
                }
                RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                print(part, name, done[name]["verdicts"], flush=True)
    print(table())


def table() -> str:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    names = {
        "random": "random weights, four families",
        "shuffled": f"{MODEL}, answers permuted among subjects",
        "planted": "planted models",
    }
    lines = []
    for part, results in content["parts"].items():
        counts = Counter(verdict for result in results.values() for verdict in result["verdicts"].values())
        confirmed = sum(count > 0 for result in results.values() for count in result["confirmed"].values())
        lines.append(
            [
                names[part],
                str(len(results)),
                str(sum(counts.values())),
                str(confirmed),
                *(str(counts[v]) for v in VERDICTS),
            ]
        )
    return rows(["", "models or tasks", "roles", "with a confirmed head", *VERDICTS], lines)


def fill(check: bool = False) -> list[str]:
    """Write the document's table, or (`check`) only say whether it is not what it should be."""
    return [] if put(DOCUMENT, "noise", table(), check) else ["noise"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="this part; may be given again")
    parser.add_argument("--table", action="store_true", help=f"write the table of {DOCUMENT} from the result file")
    arguments = parser.parse_args()
    if arguments.table:
        fill()
    else:
        main(arguments.only)
