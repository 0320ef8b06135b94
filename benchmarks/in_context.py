"""Does a few-shot prompt, compiled into offsets on a few heads, do without the examples? SmolLM2-135M, word pairs.

    nice -n 10 python benchmarks/in_context.py --data DATA     what is missing; resumable, one entry a pair set and form
    python benchmarks/in_context.py --data DATA --only country-capital
    python benchmarks/in_context.py --table                    the tables of recipes/steer/README.md

DATA/function_vectors holds the pair sets of Todd et al. (2024). Each set is split by subject: few-shot prompts are made
of training pairs, factor and layer are chosen on validation pairs, and the figures are of held-out ones. A question is
right where the most probable next token begins the answer. Per pair set and prompt form:

    zero-shot, five-shot, shuffled five-shot     the model as it is
    in_context                                   z += factor * (few - zero) on the 10 heads of highest AIE, at all
                                                 positions, folded into biases; factor 0.5 or 1
    last token                                   the same at the last token only
    top 1, 2, 4                                  fewer heads, all positions
    random                                       as many other heads of the same layers, three draws, all positions
    function vector                              the sum of the 10 heads' mean outputs, added to the residual stream
                                                 after one layer, at the last token (as published) and at all positions

Perplexity is that of the first 256 tokens of the neutral text. Writes benchmarks/results/in_context.json; starts anew
when the settings have changed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import readme
import torch
from torch import Tensor

from headtune.analysis.heads.controls import random_sets
from headtune.analysis.heads.head_set import provenance
from headtune.analysis.methods import in_context
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Task, take_split
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_json
from headtune.analysis.utils.stats import rate_interval
from headtune.train.evaluation.evaluate import neutral_text, perplexity
from headtune.train.tuners import steering
from headtune.train.tuners.convert import fold

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "in_context.json"
README = "recipes/steer/README.md"
SETS = (
    "country-capital",
    "present-past",
    "singular-plural",
    "person-instrument",
    "landmark-country",
    "product-company",
)
FORMS = {"Q: A:": ("Q: {input}\nA:", "\n\n"), "->": ("{input} ->", "\n")}
SETTINGS: dict[str, Any] = {
    "model": "smollm2-135m",
    "shots": 5,
    "prompts": 25,  # of which the means are
    "scored": 8,  # of these for the AIE
    "validation": 16,
    "held_out": 40,
    "top": [10, 4, 2, 1],
    "factors": [0.5, 1.0],
    "layers": [10, 14, 18],  # of 30, and of others in proportion
    "random": 3,
    "perplexity_tokens": 256,
    "seed": 0,
}
Edit = Callable[[Tensor], AbstractContextManager[Any]]  # the rows' last positions -> a block that changes the model


# --- measuring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def right(model: Any, rows: Sequence[Encoded], edit: Edit | None = None) -> list[bool]:
    """Whether each prompt's most probable next token begins a right answer, in batches padded on the right."""
    result: list[bool] = []
    for start in range(0, len(rows), 20):
        batch = rows[start : start + 20]
        ends = torch.tensor([row.end for row in batch])
        ids = torch.nn.utils.rnn.pad_sequence([row.tokens for row in batch], batch_first=True)
        mask = (torch.arange(ids.shape[1]) <= ends[:, None]).long()
        with nullcontext() if edit is None else edit(ends):
            hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        predicted = model.lm_head(hidden[torch.arange(len(batch)), ends]).argmax(-1).tolist()
        result += [token in row.target_tokens for token, row in zip(predicted, batch, strict=True)]
    return result


def rate(answers: Sequence[bool]) -> dict[str, Any]:
    """Right answers with Wilson's interval; a held-out pair is a subject of its own."""
    low, high = rate_interval([float(answer) for answer in answers], [str(index) for index in range(len(answers))])
    return {"right": sum(answers), "n": len(answers), "ci": [float(low), float(high)]}


def offsets_edit(model: HeadModel, offsets: Mapping[tuple[int, int], Tensor], last_only: bool = False) -> Edit:
    def change(layer: int, ends: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(z: Tensor) -> Tensor:
            z = z.clone()
            for (at, head), value in offsets.items():
                if at == layer and last_only:
                    z[torch.arange(len(z)), ends, head] += value
                elif at == layer:
                    z[:, :, head] += value
            return z

        return edit

    return lambda ends: hooks.at_projections(model, {layer: change(layer, ends) for layer, _ in offsets})


def residual_edit(model: HeadModel, vector: Tensor, layer: int, last_only: bool) -> Edit:
    @contextmanager
    def edit(ends: Tensor) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            if last_only:
                hidden[torch.arange(len(hidden)), ends] += vector
            else:
                hidden += vector
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.layers[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return edit


def text_perplexity(model: Any, tokenizer: Any, edit: Edit | None = None) -> float:
    text = neutral_text()
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    text = text[: offsets[SETTINGS["perplexity_tokens"]][1]]
    with nullcontext() if edit is None else edit(torch.tensor([0])):
        return perplexity(model, tokenizer, text)


def measure(model: HeadModel, task: Task, separator: str) -> dict[str, Any]:
    """One pair set in one prompt form."""
    seed, shots = SETTINGS["seed"], SETTINGS["shots"]
    train, validation, test = (take_split(task, part, seed) for part in ("train", "validation", "test"))
    prompts = in_context.few_shot_prompts(model, train, shots, SETTINGS["prompts"], separator, seed)
    tried = in_context.few_shot_prompts(model, validation, shots, SETTINGS["validation"], separator, seed, train)
    asked = in_context.few_shot_prompts(model, test, shots, SETTINGS["held_out"], separator, seed, train)
    zero_tried, zero_asked = ([prompt.zero for prompt in part] for part in (tried, asked))
    rows: dict[str, Any] = {
        "zero-shot": rate(right(model.hf, zero_asked)),
        "five-shot": rate(right(model.hf, [prompt.clean for prompt in asked])),
        "shuffled five-shot": rate(right(model.hf, [prompt.shuffled for prompt in asked])),
    }
    try:
        means = in_context.in_context_means(model, prompts, train.name)
    except InputError as error:
        return {"rows": rows, "refused": str(error)}
    scores = in_context.indirect_effects(model, means, SETTINGS["scored"])
    effects = scores.mean(in_context.CIE)
    order = [divmod(int(index), model.n_heads) for index in (-effects).argsort(axis=None, kind="stable")]
    top = order[: max(SETTINGS["top"])]

    # What is chosen on validation pairs: the factor, the smaller one of two as good; the function vector's layer.
    def tried_with(edit: Edit) -> int:
        return sum(right(model.hf, zero_tried, edit))

    factors = {f: tried_with(offsets_edit(model, means.offsets(top, f))) for f in SETTINGS["factors"]}
    factor = max(factors, key=lambda f: (factors[f], -f))
    vector = sum(means.few[layer, head] @ model.output_weight(layer)[head] for layer, head in top)
    layers = {
        at: tried_with(residual_edit(model, vector, at, last_only=True))
        for at in (each * model.n_layers // 30 for each in SETTINGS["layers"])
    }
    layer = max(layers, key=lambda at: layers[at])

    # What is measured on held-out pairs.
    def held_out(edit: Edit, everywhere: bool = True) -> dict[str, Any]:
        row = rate(right(model.hf, zero_asked, edit))
        return row | ({"perplexity": text_perplexity(model.hf, model.tokenizer, edit)} if everywhere else {})

    for f in SETTINGS["factors"]:
        rows[f"in_context, factor {f:g}"] = held_out(offsets_edit(model, means.offsets(top, f)))
    rows["last token"] = held_out(offsets_edit(model, means.offsets(top, factor), last_only=True), everywhere=False)
    for k in SETTINGS["top"][1:]:
        rows[f"top {k}"] = held_out(offsets_edit(model, means.offsets(order[:k], factor)))
    drawn = random_sets(top, effects.shape, SETTINGS["random"], seed)
    rows["random"] = [held_out(offsets_edit(model, means.offsets(heads, factor))) for heads in drawn]
    rows["function vector, last token"] = held_out(residual_edit(model, vector, layer, True), everywhere=False)
    rows["function vector"] = held_out(residual_edit(model, vector, layer, False))
    folded, difference = folded_model(model, means, top, factor, zero_asked[0])
    rows["folded"] = rate(right(folded, zero_asked))
    low, high = scores.interval(in_context.CIE)
    return {
        "rows": rows,
        "factor": factor,
        "layer": layer,
        "validation": {"factors": factors, "layers": layers, "n": len(zero_tried)},
        "means": means.note,
        "heads": [
            {"layer": at, "head": head, "aie": float(effects[at, head])}
            | {"ci": [float(low[at, head]), float(high[at, head])]}
            for at, head in top
        ],
        "random_heads": [[list(pair) for pair in heads] for heads in drawn],
        "largest_logit_difference_of_the_fold": difference,
    }


def folded_model(
    model: HeadModel, means: in_context.InContextMeans, top: Sequence[tuple[int, int]], factor: float, row: Encoded
) -> tuple[Any, float]:
    """The stock model that an export would write, and its largest logit difference from the hooks on one prompt."""
    offsets = means.offsets(sorted(top), factor)
    adapted = steering.apply(copy.deepcopy(model.hf), steering.moved(model, offsets, {}))
    folded = fold(adapted)
    with torch.no_grad(), offsets_edit(model, offsets)(torch.tensor([row.end])):
        expected = model.hf(row.tokens[None]).logits
    with torch.no_grad():
        return folded, float((folded(row.tokens[None]).logits - expected).abs().max())


def task_of(data: Path, name: str, template: str) -> Task:
    pairs = json.loads((data / "function_vectors" / f"{name}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        write_json(path, {"template": template, "pairs": pairs})
        return load_task(f"pairs:{path}")


# --- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = ("zero-shot", "five-shot", "shuffled", "offsets", "last token", "top 4", "top 2", "top 1", "random")
VECTORS = ("vector, last token", "vector")


def table(results: Mapping[str, Any], base: float) -> str:
    """Right answers by pair set and form; perplexity behind them where the change is at all positions."""
    names = {"shuffled": "shuffled five-shot"} | {name: f"function {name}" for name in VECTORS}
    lines = []
    for name, result in results.items():
        rows = dict(result["rows"])
        if "refused" not in result:
            rows["offsets"] = rows[f"in_context, factor {result['factor']:g}"]
        cells = [name, f"{result['factor']:g}" if "factor" in result else "refused"]
        for key in (*COLUMNS, *VECTORS):
            row = rows.get(names.get(key, key))
            several = row if isinstance(row, list) else [row] if row else []
            shown = ", ".join(str(each["right"]) for each in several)
            if several and "perplexity" in several[0]:
                shown += f" ({sum(each['perplexity'] for each in several) / len(several):.0f})"
            cells.append(f"**{shown}**" if key == "offsets" and shown else shown)
        lines.append(cells)
    lines += [mean_row(form, results) for form in FORMS if sum(name.endswith(f"`{form}`") for name in results) > 1]
    return readme.rows([f"of {SETTINGS['held_out']} ({base:.0f})", "factor", *COLUMNS, *VECTORS], lines)


def mean_row(form: str, results: Mapping[str, Any]) -> list[str]:
    """Right answers by the mean over pair sets of a form; a set that is refused is left as it is, at zero-shot's."""
    cells = []
    sets = [result["rows"] for name, result in results.items() if name.endswith(f"`{form}`")]
    factors = [result.get("factor") for name, result in results.items() if name.endswith(f"`{form}`")]
    for key in (*COLUMNS, *VECTORS):
        names = {"shuffled": "shuffled five-shot"} | {name: f"function {name}" for name in VECTORS}
        right = []
        for rows, factor in zip(sets, factors, strict=True):
            name = f"in_context, factor {factor:g}" if key == "offsets" and factor is not None else names.get(key, key)
            row = rows.get(name) or rows["zero-shot"]
            several = row if isinstance(row, list) else [row]
            right.append(sum(each["right"] for each in several) / len(several))
        cells.append(f"{sum(right) / len(right):.1f}")
    return [f"**mean of {len(sets)}**, `{form}`", "", *cells]


def fill(check: bool = False) -> list[str]:
    """Write the table; what was another one."""
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    same = readme.put(README, "in_context", table(stored["results"], stored["base_perplexity"]), check)
    return [] if same else ["in_context"]


def code_sha256() -> str:
    """Of what computes the figures."""
    digest = hashlib.sha256()
    for path in ("analysis/methods/in_context.py", "analysis/methods/patching.py", "benchmarks/in_context.py"):
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with function_vectors/")
    parser.add_argument("--only", nargs="+", choices=SETS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=SETTINGS["model"], help="another one is written beside, without a table")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--table", action="store_true", help="write the table into the README, measure nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.data is None:
            parser.error("give --data")
        torch.set_num_threads(arguments.threads)
        settings = SETTINGS | {"model": arguments.model}
        result = RESULT if settings == SETTINGS else RESULT.with_name(f"in_context_{arguments.model}.json")
        stored = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        stored = stored if stored.get("settings") == settings else {}
        model = load_model(arguments.model)
        results: dict[str, Any] = stored.get("results", {})
        code = code_sha256()
        base = stored.get("base_perplexity") or text_perplexity(model.hf, model.tokenizer)
        for form, (template, separator) in FORMS.items():
            for name in SETS:
                key = f"{name}, `{form}`"
                if key in results or form not in arguments.forms or (arguments.only and name not in arguments.only):
                    continue
                results[key] = measure(model, task_of(arguments.data, name, template), separator)
                results[key]["code_sha256"] = code
                about = {
                    "settings": settings,
                    "model": model.identity(),
                    "threads": arguments.threads,
                    "machine": platform.machine(),
                    "date": datetime.now(UTC).date().isoformat(),
                    "versions": provenance()["versions"],
                    "base_perplexity": base,
                }
                write_json(result, about | {"results": results})
                print(key, {k: v["right"] for k, v in results[key]["rows"].items() if k != "random"}, flush=True)
    fill()


if __name__ == "__main__":
    main()
