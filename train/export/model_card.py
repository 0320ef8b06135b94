"""The model card (README.md) of what a run exported: where it comes from, what was changed, what was measured.

The front matter is that of the Hugging Face hub. Nothing in it is guessed: a licence or a base model that is not known
is left out, and the text says so. Secrets that are seen in it are struck out: a card is made to be published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from headtune.analysis.models import builtin
from headtune.analysis.tasks.messages import chat_entry, chat_from_json, chat_in_words
from headtune.analysis.utils.paths import check_links_stay_inside
from headtune.analysis.utils.secrets import redact
from headtune.analysis.utils.state_files import read_state
from headtune.train.runs.load_run import OWN
from headtune.train.tracking.lineage import input_artifacts

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """Where an export comes from.

    Attributes:
        run: the run's name.
        method: the recipe's family (lofit, jola, lora, ...).
        base: the base model as the recipe names it: a built-in name, a folder or a hub id.
        revision: of the base model on the hub.
        recipe: the whole recipe, every default spelt out.
        heads: `[[layer, head], ...]` that were changed, or in a sequence of tasks held last; empty where the method has
            none.
        training_data: the run's account of it, with a hash where the run has one.
        evaluation: the content of evaluation.json, or {}.
        inputs: what the export is made from, kind -> `{"name", "sha256"}` (see `lineage.input_artifacts`).
    """

    run: str = ""
    method: str = ""
    base: str = ""
    revision: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    heads: Sequence[Sequence[int]] = ()
    training_data: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The names of a sequence's tasks in the order they were learnt; empty where the run has one task."""
        return list(self.evaluation.get("before", {}).get("n", {}).get("by_task", ()))

    def summary(self) -> dict[str, Any]:
        """What export.json says of it."""
        return {
            "run": self.run,
            "method": self.method,
            "heads": [list(head) for head in self.heads],
            "base": {
                "name": self.base,
                "revision": self.revision,
                "weights_sha256": self.evaluation.get("weights_sha256"),
            },
            "training_data": dict(self.training_data),
            "evaluation_task_sha256": self.evaluation.get("task_sha256"),
            **chat_entry(chat_from_json(self.evaluation.get("chat_template"))),
            "inputs": {kind: dict(entry) for kind, entry in self.inputs.items()},
        }


def origin_of(run: Path, recipe: Mapping[str, Any]) -> Origin:
    """What a run folder says of itself.

    Args:
        recipe: the run's recipe, as `Recipe.dump()` gives it.

    Raises:
        InputError: a file that is damaged, or a link in the run that leads out of it: what is exported is what the run
            wrote.
    """
    check_links_stay_inside(run, "run", OWN)

    def read(name: str) -> dict[str, Any]:
        path = run / name
        return read_state(path) if path.is_file() else {}

    state = read("run.json")
    return Origin(
        run=recipe["name"],
        method=recipe["recipe"],
        base=recipe["model"]["name"],
        revision=recipe["model"].get("revision"),
        recipe=recipe,
        heads=state.get("heads", []),
        training_data=state.get("training_data", {}),
        evaluation=read("evaluation.json"),
        inputs=input_artifacts(run, state),
    )


def licence_of(base: str, revision: str | None = None) -> dict[str, str]:
    """The front matter keys of a base model's licence (`license`, ...), {} where it is not known.

    It is read from the built-in models' table, or from the front matter of the README.md in a model folder or in the
    local hub cache.
    """
    if base in builtin.BUILT_IN:
        name, _, link = builtin.BUILT_IN[base].licence.partition(", see ")
        if not link:
            return {"license": name.lower()}
        return {"license": "other", "license_name": name.lower().replace(" ", "-"), "license_link": f"https://{link}"}
    path = Path(base) / "README.md"
    if not path.is_file() and is_hub_id(base):
        cached = try_to_load_from_cache(base, "README.md", revision=revision)
        path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        return {}
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8"), re.DOTALL)
    try:
        matter = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return {}
    if not isinstance(matter, dict):
        return {}
    return {key: str(matter[key]) for key in _LICENCE_KEYS if matter.get(key)}


def is_hub_id(base: str) -> bool:
    return _HUB_ID.fullmatch(base) is not None and not Path(base).exists()


def checkpoint_card(origin: Origin, result: Mapping[str, Any], caveat: str = "") -> str:
    """The card of an exported checkpoint.

    Args:
        result: the content of export.json.
        caveat: what a reader has to know before serving it elsewhere.
    """
    family = result["conversion"]
    lines = [
        *_front_matter(origin, "transformers", "finetune", family["written"]),
        *_about(origin),
        "A stock checkpoint: it loads in transformers without headtune.",
        "",
        *_code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        ),
        "## Equal to the adapted model",
        "",
        f"Reloaded by plain transformers and compared with the adapted model in float32 on {result['prompts']} "
        f"prompts: weights in {result['dtype']}, largest logit difference {result['max_logit_difference']:.2g} on a "
        f"scale of {result['logit_scale']:.3g} (allowed {result['tolerance']:.2g}), "
        f"{result['identical_generations']} of {result['prompts']} greedy generations identical.",
        "",
        f"Model family: `{family['source']}` -> `{family['written']}`; {family['why']}.",
        "",
        *([f"{caveat}", ""] if caveat else []),
        *_measured(origin),
        *_recipe(origin),
    ]
    return redact("\n".join(lines))


def adapter_card(origin: Origin, registered_by: str | None, result: Mapping[str, Any] | None = None) -> str:
    """The card of an adapter alone.

    Args:
        registered_by: the module that makes the adapter's type known to PEFT; None for PEFT's own types.
        result: the content of export.json of an adapter that was compared with the run's model.
    """
    if origin.base in builtin.BUILT_IN:
        load = [
            "from headtune.analysis.models.loading import load_plain",
            "",
            f'base, tokenizer = load_plain("{origin.base}")',
        ]
    else:
        load = [
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{origin.base}")',
        ]
    needed = (
        f"A PEFT adapter of headtune's own type: `import {registered_by}` is needed before it is loaded, or PEFT does "
        "not know the type."
    )
    lines = [
        *_front_matter(origin, "peft", "adapter"),
        *_about(origin),
        needed if registered_by else "A PEFT adapter of one of PEFT's own types.",
        "",
        *_code(
            *([f"import {registered_by}  # before the adapter is loaded"] if registered_by else []),
            "from peft import PeftModel",
            *load,
            'model = PeftModel.from_pretrained(base, "PATH")',
        ),
        *(_equal_lora(result) if result else []),
        *_measured(origin),
        *_recipe(origin),
    ]
    return redact("\n".join(lines))


def _equal_lora(result: Mapping[str, Any]) -> list[str]:
    return [
        "## Equal to the adapted model",
        "",
        f"A LoRA of rank {result['rank']}, zero outside the heads. Reloaded by plain PEFT and compared with the run's "
        f"model in float32 on {result['prompts']} prompts: largest logit difference "
        f"{result['max_logit_difference']:.2g} on a scale of {result['logit_scale']:.3g} (allowed "
        f"{result['tolerance']:.2g}), {result['identical_generations']} of {result['prompts']} greedy generations "
        "identical.",
        "",
        f"A server takes it beside the base model where it allows rank {result['rank']}; vLLM: `--enable-lora "
        "--max-lora-rank N --lora-modules NAME=PATH`.",
        "",
    ]


def _front_matter(origin: Origin, library: str, relation: str, *tags: str) -> list[str]:
    matter: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    base = builtin.BUILT_IN[origin.base].hub if origin.base in builtin.BUILT_IN else origin.base
    if is_hub_id(base):
        matter |= {"base_model": base, "base_model_relation": relation}
    matter |= licence_of(origin.base, origin.revision)
    matter["tags"] = ["headtune", *([origin.method] if origin.method else []), *tags]
    return ["---", yaml.safe_dump(matter, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _about(origin: Origin) -> list[str]:
    lines = [f"# {origin.run or 'Exported by headtune'}", ""]
    if origin.base:
        sha = origin.evaluation.get("weights_sha256")
        revision = f", revision `{origin.revision}`" if origin.revision else ""
        weights = f" (SHA-256 of its weights as loaded: `{sha}`)" if sha else ""
        lines += [f"Base model: `{origin.base}`{revision}{weights}.", ""]
    licence = licence_of(origin.base, origin.revision)
    licence_name = f"{licence.get('license_name', licence.get('license'))}, that of the base model"
    lines += [f"Licence: {licence_name if licence else 'not known here; that of the base model applies'}.", ""]
    heads = ", ".join(f"L{layer}H{head}" for layer, head in origin.heads)
    if origin.method:
        done = "held" if origin.tasks else "changed"
        changed = f"Heads {done} ({len(origin.heads)}): {heads}." if heads else "Not limited to chosen heads."
        lines += [f"Made by headtune, recipe `{origin.method}`. {changed}", ""]
    elif origin.inputs:
        lines += [f"An adapter of headtune's on heads ({len(origin.heads)}): {heads or 'none'}; no recipe made it.", ""]
    return lines


def _measured(origin: Origin) -> list[str]:
    """Data, before and after."""
    lines = []
    if origin.training_data:
        lines += ["## Data", "", "Trained on:", "", *_code(json.dumps(origin.training_data, indent=1), kind="json")]
    evaluation = origin.evaluation
    if evaluation:
        sha = f" (SHA-256 `{evaluation['task_sha256']}`)" if evaluation.get("task_sha256") else ""
        named = f"Task: `{evaluation['task']}`"
        if origin.tasks:
            named = f"Tasks, in the order they were learnt: {', '.join(f'`{name}`' for name in origin.tasks)}"
        chat = chat_from_json(evaluation.get("chat_template"))
        chats = f", given as {chat_in_words(chat)}: ask it in its chat template" if chat else ""
        lines += ["## Measured", "", f"{named}{sha}{chats}.", ""]
        lines += ["| | before | after |", "|---|---|---|"]
        before, after = evaluation["before"], evaluation.get("after") or {}
        for name, value in after.items():  # what came after alone: backward transfer, forgetting
            if name != "n" and value is not None:
                lines.append(f"| {name} | {_show(before[name]) if name in before else ''} | {_show(value)} |")
        lines.append("")
    return lines


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['mean']:.3g} [{value['ci'][0]:.3g}, {value['ci'][1]:.3g}]"
    return f"{value:.4g}"


def _recipe(origin: Origin) -> list[str]:
    if not origin.recipe:
        return []
    return ["## Recipe", "", *_code(yaml.safe_dump(dict(origin.recipe), sort_keys=False).rstrip(), kind="yaml")]


def _code(*lines: str, kind: str = "python") -> list[str]:
    return [f"```{kind}", *lines, "```", ""]
