"""Speed and memory of the analysis stage, side by side with TransformerLens and with plain transformers.

    python benchmarks/speed_analysis.py                      SmolLM2-135M, about 14 minutes on two quiet cores
    python benchmarks/speed_analysis.py --prompts 4          the same in about 12 minutes
    python benchmarks/speed_analysis.py --quick              a tiny model: does it run, are the numbers equal
    python benchmarks/speed_analysis.py --peer-python PATH   TransformerLens from another environment

TransformerLens is an optional extra: pip install -e ".[benchmarks]". Without it the rest is measured.

Measured: exact ablation of every head at the last token (`z[l, h, -1] := 0`), direct logit attribution of every head
there, the memory that each takes, and how cost grows with heads, prompt length and examples. The routes:

    headtune                ablation_effects, silenced_logits (some heads), attribute (with its split by source tokens,
                            which the others do not calculate)
    one batch               transformers: one row a head, full prompts, `BATCH_TOKENS` a pass, last position's logits
    head by head            transformers: one full forward pass a head, last position's logits
    TransformerLens loop    its own patching.generic_activation_patch on hook_z, one (layer, last token, head) at a
                            time, zeros in the place of the clean cache
    TransformerLens cache   run_with_cache, stack_head_results, logit_attrs: the idiom of its documentation
    TransformerLens, lean   the same, with only hook_z and the final norm's scale kept, and of those only the last token

TransformerLens gets what it can use: no gradients, no progress bar, and a hook that makes its model calculate the last
position's logits only, which its own loop has no argument for.

Each side (headtune, transformers, TransformerLens) is a process of its own, with the same weights, prompts, dtype and
number of threads. Within a round the routes take turns prompt by prompt, so that all see the same machine; a ratio is
that of a round's sums over prompts, and the median and range over rounds are kept. A route whose numbers differ from
headtune's by more than 1e-4 ends the benchmark. Memory is the growth of a fresh process's peak resident size over its
state with the model loaded and one forward pass done.

Writes benchmarks/results/speed_analysis.json and .png. An interrupted run goes on where it stopped, section by section,
unless the code or the settings have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from speed_routes import BATCH_TOKENS, SIDES, Heads, Prompt, Side, encode_json

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "speed_analysis.json"
TASK = "country_cities:train"
TOLERANCE = 1e-4  # of an effect, in logits; of the logits themselves, relative to their scale
LOOP_HEADS = 3  # memory of one-head-at-a-time routes does not depend on how many heads they go through

Numbers = dict[str, list[float]]

ABLATION = {
    "headtune": "headtune",
    "one batch": "transformers",
    "head by head": "transformers",
    "TransformerLens loop": "TransformerLens",
}
ATTRIBUTION = {
    "headtune attribution": "headtune",
    "TransformerLens cache": "TransformerLens",
    "TransformerLens, lean": "TransformerLens",
}


# --- the sections -----------------------------------------------------------------------------------------------------


def difference(reference: Numbers, other: Numbers, what: str, scale: float = 1.0) -> float:
    """The largest difference of any number, in units of `scale`; ends the benchmark where it is above `TOLERANCE`."""
    if reference.keys() != other.keys() or any(len(reference[name]) != len(other[name]) for name in reference):
        sys.exit(f"{what}: other quantities than headtune's: {sorted(other)}, expected {sorted(reference)}")
    gaps = [abs(a - b) / scale for name in reference for a, b in zip(reference[name], other[name], strict=True)]
    if not all(gap <= TOLERANCE for gap in gaps):  # also where one is NaN
        sys.exit(f"{what}: differs from headtune by {max(gaps):.2g}, more than {TOLERANCE:g}; nothing is compared")
    return max(gaps)


def parity(sides: dict[str, Side], prompt: Prompt) -> dict[str, Any]:
    """Last-position logits of every side against plain transformers', relative to their scale."""
    expected = sides["transformers"].ask("logits", prompt)["values"]
    scale = max(abs(value) for value in expected["logits"])
    gaps = {
        name: difference(expected, side.ask("logits", prompt)["values"], f"{name} logits", scale)
        for name, side in sides.items()
        if name != "transformers"
    }
    return {"logit_scale": scale, "relative_difference": gaps}


def alternate(
    sides: dict[str, Side], routes: dict[str, str], prompts: list[Prompt], heads: Heads, rounds: int
) -> dict[str, Any]:
    """Time routes in turn. The first is the reference; "head by head" takes its turn on the first prompt only."""
    present = {route: sides[side] for route, side in routes.items() if side in sides}
    reference = next(iter(present))
    seconds: dict[str, list[list[float]]] = {route: [[] for _ in range(rounds)] for route in present}
    gaps = dict.fromkeys(present, 0.0)
    for route, side in present.items():
        # What only a first call does is not timed.
        side.ask(route, prompts[0], heads if route == reference else heads[:LOOP_HEADS])
    for round_ in range(rounds):
        for index, prompt in enumerate(prompts):
            expected: Numbers = {}
            for route, side in present.items():
                if route == "head by head" and index:
                    continue
                reply = side.ask(route, prompt, heads)
                expected = expected or reply["values"]
                gaps[route] = max(gaps[route], difference(expected, reply["values"], f"{route}, prompt {index}"))
                seconds[route][round_].append(reply["seconds"])
        print(f"  round {round_ + 1}/{rounds}", flush=True)
    result: dict[str, Any] = {}
    for route, times in seconds.items():
        a_prompt = [time for round_times in times for time in round_times]
        result[route] = {"seconds": spread(a_prompt), "seconds_by_round": times, "largest_difference": gaps[route]}
        if route != reference:
            ours = seconds[reference]
            by_round = [sum(theirs) / sum(mine[: len(theirs)]) for mine, theirs in zip(ours, times, strict=True)]
            result[route]["times_slower"] = spread(by_round) | {"by_round": by_round}
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def memory(
    start: Callable[[str], Side], routes: dict[str, str], prompt: Prompt, long_prompt: Prompt, heads: Heads
) -> dict[str, Any]:
    """Peak growth by route, always in a fresh process: ablation on a prompt, attribution on it and on a long one."""
    result: dict[str, Any] = {}
    for route, side in routes.items():
        chosen = heads[:LOOP_HEADS] if route in ("head by head", "TransformerLens loop") else heads
        for measured in [prompt] if route in ABLATION else [prompt, long_prompt]:
            process = start(side)
            try:
                process.ask("logits", measured)
                mib = process.ask(route, measured, chosen, memory=True)["mib"]
            finally:
                process.close()
            result.setdefault(route, []).append({"tokens": len(measured["tokens"]), "extra_mib": mib})
        print(f"  {route}: {[round(row['extra_mib'], 1) for row in result[route]]} MiB", flush=True)
    return result


def growth(
    sides: dict[str, Side],
    prompts: list[Prompt],
    by_length: list[Prompt],
    heads: Heads,
    counts: Sequence[int],
    examples: Sequence[int],
    rounds: int,
) -> dict[str, Any]:
    """Seconds against heads, prompt length and examples: headtune's are medians of `rounds`, the slow ones taken once.

    Length and examples are measured on one head a layer, by the same heads for every route, and on all heads for
    headtune alone.
    """
    few = list({layer: (layer, head) for layer, head in heads}.values())

    def cost(route: str, prompt: Prompt, chosen: Heads) -> float:
        repeats = rounds if route.startswith(("headtune", "TransformerLens")) else 1
        side = sides[(ABLATION | ATTRIBUTION)[route]]
        return statistics.median(side.ask(route, prompt, chosen)["seconds"] for _ in range(repeats))

    def costs(prompt: Prompt, chosen: Heads) -> dict[str, float]:
        return {route: cost(route, prompt, chosen) for route in ("headtune", "one batch", "head by head")}

    def progress(axis: str, rows: list[dict[str, float]]) -> list[dict[str, float]]:
        print(f"  {axis}: {[row[axis] for row in rows]}", flush=True)
        return rows

    attribution = [route for route, side in ATTRIBUTION.items() if side in sides]
    all_heads = f"headtune, all {len(heads)} heads"
    by_heads = [{"heads": n, **costs(prompts[0], heads[:: len(heads) // n][:n])} for n in counts]
    tokens = [
        {
            "tokens": len(prompt["tokens"]),
            **costs(prompt, few),
            all_heads: cost("headtune", prompt, heads),
            **{route: cost(route, prompt, ()) for route in attribution},
        }
        for prompt in by_length
    ]
    single = [{**costs(prompt, few), all_heads: cost("headtune", prompt, heads)} for prompt in prompts[: max(examples)]]
    several = [
        {"examples": n, **{route: sum(one[route] for one in single[:n]) for route in single[0]}} for n in examples
    ]
    return {
        "heads": progress("heads", by_heads),
        "tokens": progress("tokens", tokens),
        "examples": progress("examples", several),
        "few_heads": len(few),
    }


# --- prompts ----------------------------------------------------------------------------------------------------------


def make_prompts(folder: str, task: Any, n: int, lengths: Sequence[int]) -> tuple[list[Prompt], list[Prompt]]:
    """`n` prompts of the task, and one prompt of each length: its shortest one, after other list prompts' text.

    A length just below the shortest prompt's cuts off its first words, up to the subject.
    """
    from transformers import AutoTokenizer

    from headtune.analysis.tasks.tokenized import encode

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pool = [encoded for encoded in encode(task, tokenizer).examples if encoded.previous_tokens]
    if len(pool) < n:
        sys.exit(f"{n} prompts asked for, but task {task.name!r} has {len(pool)} that fit; ask for fewer")
    shortest = min(pool, key=lambda encoded: len(encoded.tokens))
    text = "\n\n".join(encoded.example.prompt for encoded in pool) + "\n\n"
    tokens = torch.cat([torch.tensor(tokenizer(text).input_ids), shortest.tokens])
    least = len(shortest.tokens) - shortest.subject[0]
    if not least <= min(lengths) <= max(lengths) <= len(tokens):
        sys.exit(f"lengths {list(lengths)} do not lie between {least} and {len(tokens)} tokens")
    by_length = []
    for length in lengths:
        shift = length - len(shortest.tokens)
        by_length.append(
            replace(
                shortest,
                tokens=tokens[-length:],
                subject=tuple(position + shift for position in shortest.subject),
                previous=tuple(tuple(position + shift for position in span) for span in shortest.previous),
            )
        )
    return [encode_json(encoded) for encoded in pool[:n]], [encode_json(encoded) for encoded in by_length]


@contextmanager
def model_and_task(quick: bool) -> Iterator[tuple[str, str, Any]]:
    """Model name, folder and task."""
    from headtune.analysis.models.loading import EMBEDDED, resolve
    from headtune.analysis.tasks.loading import load_task

    if not quick:
        yield EMBEDDED, resolve(EMBEDDED), load_task(TASK).limited(64)
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import tiny

    with tempfile.TemporaryDirectory() as folder:
        yield "tiny llama", str(tiny.save_tiny(Path(folder), "llama", num_key_value_heads=2)), tiny.tiny_task()


# --- the result -------------------------------------------------------------------------------------------------------


def asked_for(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What the analysis stage set out to reach, and what was measured."""
    rows = [
        ("ablation, times faster than TransformerLens's loop", 30.0, "ablation", "TransformerLens loop"),
        ("ablation, times faster than one batch", 5.0, "ablation", "one batch"),
        ("attribution, times faster than TransformerLens's cache", 5.0, "attribution", "TransformerLens cache"),
    ]
    result = [
        {"what": what, "at_least": bound, "measured": sections[section][route]["times_slower"]["median"]}
        for what, bound, section, route in rows
        if route in sections.get(section, {})
    ]
    extra = sections.get("memory", {})
    if "TransformerLens cache" in extra:
        pairs = zip(extra["headtune attribution"], extra["TransformerLens cache"], strict=True)
        result += [
            {
                "what": f"attribution, share of the cache's extra memory, {ours['tokens']} tokens",
                "at_most": 0.2,
                "measured": ours["extra_mib"] / theirs["extra_mib"],
            }
            for ours, theirs in pairs
        ]
    for row in result:
        row["reached"] = row["measured"] >= row["at_least"] if "at_least" in row else row["measured"] <= row["at_most"]
    return result


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "| route | seconds a prompt | times slower | largest difference | extra memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for section in ("ablation", "attribution"):
        for route, row in content[section].items():
            slower = row.get("times_slower")
            ratio = f"{slower['median']:.1f} [{slower['min']:.1f}, {slower['max']:.1f}]" if slower else ""
            extra = [
                f"{one['extra_mib']:.1f} ({one['tokens']} tokens)" for one in content.get("memory", {}).get(route, [])
            ]
            seconds = f"{row['seconds']['median']:.3f} [{row['seconds']['min']:.3f}, {row['seconds']['max']:.3f}]"
            lines.append(f"| {route} | {seconds} | {ratio} | {row['largest_difference']:.1g} | {', '.join(extra)} |")
    for row in content["asked"]:
        bound = f"at least {row['at_least']:g}" if "at_least" in row else f"at most {row['at_most']:g}"
        reached = "reached" if row["reached"] else "NOT reached"
        lines.append(f"\n{row['what']}: {row['measured']:.2f}, asked for {bound}: {reached}")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Cost against heads, prompt length and examples; attribution against prompt length."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    attribution = [route for route in ATTRIBUTION if route in results["tokens"][0]]
    few = f"{results['few_heads']} heads (one a layer)"
    panels = [
        ("heads", "heads silenced, one prompt", lambda route: True),
        ("tokens", f"prompt tokens, {few}", lambda route: route not in attribution),
        ("examples", f"examples, {few}", lambda route: True),
        ("tokens", "prompt tokens, attribution of all heads", lambda route: route in attribution),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axis, (section, label, shown) in zip(axes.flat, panels, strict=True):
        rows = results[section]
        for route in rows[0]:
            if route != section and shown(route):
                style = "--" if "all" in route else "-"
                axis.plot([row[section] for row in rows], [row[route] for row in rows], style, marker="o", label=route)
        axis.set(xlabel=label, ylabel="seconds", xscale="log", yscale="log")
        ticks = [row[section] for row in rows]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def has_transformer_lens(python: str) -> bool:
    find = "import importlib.util as u, sys; sys.exit(u.find_spec('transformer_lens') is None)"
    return subprocess.run([python, "-c", find], check=False).returncode == 0


def code_sha256() -> str:
    """Of everything whose change makes a finished section worthless."""
    digest = hashlib.sha256()
    for path in [*sorted((ROOT / "analysis").glob("*.py")), *sorted((ROOT / "benchmarks").glob("speed_*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main(arguments: argparse.Namespace) -> None:
    counts = (3, 12) if arguments.quick else (9, 30, 90, 270)
    lengths = (24, 40) if arguments.quick else (16, 32, 64, 128, 256)
    examples = (1, 2) if arguments.quick else (1, 2, 4, 8)
    threads, rounds = arguments.threads, arguments.rounds
    selected = list(SIDES)
    if not has_transformer_lens(arguments.peer_python):
        selected.remove("TransformerLens")
        print('TransformerLens is not installed (pip install -e ".[benchmarks]"): measuring the rest', flush=True)
    with ExitStack() as stack:
        name, folder, task = stack.enter_context(model_and_task(arguments.quick))
        prompts, by_length = make_prompts(folder, task, max(arguments.prompts, *examples), lengths)
        measured = prompts[: arguments.prompts]

        def start(side: str) -> Side:
            peer = side == "TransformerLens"
            return Side(side, folder, threads, arguments.peer_python if peer else sys.executable)

        sides = {side: start(side) for side in selected}
        for side in sides.values():
            stack.callback(side.close)
        settings = {
            "model": name,
            "dtype": "float32",
            "task": task.name,
            "task_sha256": task.sha256,
            "prompts": [{"text": p["example"]["prompt"], "tokens": len(p["tokens"])} for p in measured],
            "seeds": {"task split": 0, "prompts": 0},
            "rounds": rounds,
            "threads": threads,
            "batch_tokens": BATCH_TOKENS,
            "loop_heads_for_memory": LOOP_HEADS,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {side: process.versions for side, process in sides.items()},
        }
        config = json.loads((Path(folder) / "config.json").read_text())
        heads = [(i, j) for i in range(config["num_hidden_layers"]) for j in range(config["num_attention_heads"])]
        weighed = ATTRIBUTION if arguments.quick else ABLATION | ATTRIBUTION
        weighed = {route: side for route, side in weighed.items() if side in sides}
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "parity": lambda: parity(sides, measured[0]),
            "ablation": lambda: alternate(sides, ABLATION, measured, heads, rounds),
            "attribution": lambda: alternate(sides, ATTRIBUTION, measured, heads, 3 * rounds),
            "growth": lambda: growth(sides, prompts, by_length, heads, counts, examples, rounds),
            "memory": lambda: memory(start, weighed, measured[0], by_length[-1], heads),
        }
        if not Path("/proc/self/clear_refs").exists():
            del steps["memory"]
            print("memory is read from /proc, which this system does not have: not measured", flush=True)
        key = hashlib.sha256((json.dumps(settings, sort_keys=True) + code_sha256()).encode()).hexdigest()[:12]
        finished = arguments.unfinished / key
        sections = {}
        for section, step in steps.items():
            path = finished / f"{section}.json"
            if not path.is_file():
                print(section, flush=True)
                content = step()
                finished.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content))
            sections[section] = json.loads(path.read_text())
    content = {
        "command": "python benchmarks/speed_analysis.py" + (" --quick" if arguments.quick else ""),
        "date": datetime.now(UTC).date().isoformat(),
        **settings,
        "n_heads": len(heads),
        "tolerance": TOLERANCE,
        "asked": [] if arguments.quick else asked_for(sections),  # a tiny model is all overhead
        **sections,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    draw(sections["growth"], arguments.out.with_suffix(".png"))
    shutil.rmtree(finished)
    print(markdown(content))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--unfinished", type=Path, default=ROOT / "runs" / "benchmark-speed_analysis")
    main(parser.parse_args())
