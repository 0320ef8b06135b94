"""The routes that speed_analysis.py compares, each side of them in a process of its own.

    python benchmarks/speed_routes.py SIDE FOLDER     answer requests: one JSON line in, one JSON line out

SIDE is headtune, transformers or TransformerLens; FOLDER holds the model. A side has named routes, functions of a
prompt and heads; every side has the route "logits". A request is `{"route", "prompt", "heads", "memory"}`, its reply
`{"seconds", "values"}` and, with `memory`, `mib`: the growth of the process's peak resident size. Only the side that
needs a package imports it, so a side may run in another environment.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH_TOKENS = 16384  # tokens a pass of "one batch": 271 rows of up to 60 tokens go in one pass
QUANTITIES = ("target", "previous")
PACKAGES = {"headtune": "headtune", "TransformerLens": "transformer-lens"}

Prompt = dict[str, Any]  # an Encoded as JSON
Heads = Sequence[tuple[int, int]]
Values = dict[str, Tensor]  # for each of QUANTITIES, `[n_heads]`
Route = Callable[[Prompt, Heads], Values]


def headtune_side(folder: str) -> dict[str, Route]:
    from headtune.analysis.methods.logit_attribution import attribute
    from headtune.analysis.methods.patching import ablation_effects, answer_probabilities, silenced_logits
    from headtune.analysis.models.loading import load_model

    model = load_model(folder, device="cpu")

    def flat(scores: dict[str, Any], method: str) -> Values:
        return {name: torch.from_numpy(scores[f"{method}.{name}"]).flatten() for name in QUANTITIES}

    def ablation(prompt: Prompt, heads: Heads) -> Values:
        encoded = decode(prompt)
        if len(heads) == model.n_layers * model.n_heads:
            return flat(ablation_effects(model, encoded), "ablation")
        logits = silenced_logits(model, encoded.tokens, [[], *([head] for head in heads)])
        means = answer_probabilities(logits, encoded).logits
        return {name: mean[0] - mean[1:] for name, mean in means.items()}

    return {
        "headtune": ablation,
        "headtune attribution": lambda prompt, _heads: flat(attribute(model, decode(prompt)), "dla"),
        "logits": lambda prompt, _heads: {"logits": last_logits(model.hf, prompt)},
    }


def transformers_side(folder: str) -> dict[str, Route]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    n_heads = model.config.num_attention_heads

    def silenced(tokens: Tensor, rows: Sequence[tuple[int, int] | None]) -> Tensor:
        """Last logits of `rows` copies of the prompt, each with its head (None: no head) silenced there."""

        def silence(layer: int) -> Any:
            index = [row for row, head in enumerate(rows) if head is not None and head[0] == layer]
            chosen = [head[1] for head in rows if head is not None and head[0] == layer]

            def hook(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
                z = args[0].unflatten(-1, (n_heads, -1)).clone()
                z[index, -1, chosen] = 0
                return (z.flatten(-2),)

            return hook

        layers = {head[0] for head in rows if head is not None}
        handles = [projections[layer].register_forward_pre_hook(silence(layer)) for layer in layers]
        try:
            return model(tokens.expand(len(rows), -1), use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()

    def ablation(prompt: Prompt, heads: Heads, rows_a_pass: int) -> Values:
        tokens = torch.tensor([prompt["tokens"]])
        rows = [None, *heads]
        parts = [
            answer_means(silenced(tokens, rows[start : start + rows_a_pass]), prompt)
            for start in range(0, len(rows), rows_a_pass)
        ]
        means = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: mean[0] - mean[1:] for name, mean in means.items()}

    return {
        "one batch": lambda prompt, heads: ablation(prompt, heads, max(1, BATCH_TOKENS // len(prompt["tokens"]))),
        "head by head": lambda prompt, heads: ablation(prompt, heads, 1),
        "logits": lambda prompt, _heads: {"logits": last_logits(model, prompt)},
    }


def transformer_lens_side(folder: str) -> dict[str, Route]:
    import pandas
    from transformer_lens import TransformerBridge, patching
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = TransformerBridge.boot_transformers(
        folder, hf_model=original, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu", dtype=torch.float32
    )
    # Its attribution needs the final norm folded into the unembedding; centring would change the logits compared here.
    model.enable_compatibility_mode(
        disable_warnings=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    original.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, kwargs | {"logits_to_keep": 1}), with_kwargs=True
    )

    def loop(prompt: Prompt, heads: Heads) -> Values:
        tokens = torch.tensor([prompt["tokens"]])
        zeros = torch.zeros(1, tokens.shape[1], model.cfg.n_heads, model.cfg.d_head)
        result = patching.generic_activation_patch(
            model,
            tokens,
            {f"blocks.{layer}.attn.hook_z": zeros for layer in range(model.cfg.n_layers)},
            {name: lambda logits, name=name: answer_means(logits[:, -1], prompt)[name][0] for name in QUANTITIES},
            patching.layer_pos_head_vector_patch_setter,
            "z",
            index_df=pandas.DataFrame(
                [(layer, tokens.shape[1] - 1, head) for layer, head in heads], columns=["layer", "pos", "head"]
            ),
            baseline=True,
        )
        return {name: -result[name].effect() for name in QUANTITIES}

    def cached(prompt: Prompt, **options: Any) -> Values:
        _, cache = model.run_with_cache(torch.tensor([prompt["tokens"]]), **options)
        slices = {} if "pos_slice" in options else {"pos_slice": -1}  # of what is cached; the last token alone may be
        answers = torch.tensor([*prompt["target_tokens"], *prompt["previous_tokens"]])
        by_token = cache.logit_attrs(cache.stack_head_results(**slices), tokens=answers, **slices).flatten(1)
        n = len(prompt["target_tokens"])
        return {"target": by_token[:, :n].mean(-1), "previous": by_token[:, n:].mean(-1)}

    def needed(name: str) -> bool:
        return name.endswith("attn.hook_z") or name == "ln_final.hook_scale"

    return {
        "TransformerLens loop": loop,
        "TransformerLens cache": lambda prompt, _heads: cached(prompt),
        "TransformerLens, lean": lambda prompt, _heads: cached(prompt, names_filter=needed, pos_slice=-1),
        "logits": lambda prompt, _heads: {"logits": model(torch.tensor([prompt["tokens"]]))[0, -1]},
    }


SIDES: dict[str, Callable[[str], dict[str, Route]]] = {
    "headtune": headtune_side,
    "transformers": transformers_side,
    "TransformerLens": transformer_lens_side,
}


def answer_means(logits: Tensor, prompt: Prompt) -> Values:
    """`[rows]` mean logit of the remaining and of the previous answers' first tokens."""
    return {name: logits[:, sorted(set(prompt[f"{name}_tokens"]))].mean(-1) for name in QUANTITIES}


def last_logits(model: Any, prompt: Prompt) -> Tensor:
    logits: Tensor = model(torch.tensor([prompt["tokens"]]), use_cache=False, logits_to_keep=1).logits
    return logits[0, -1]


def encode_json(encoded: Any) -> Prompt:
    """An `Encoded` that has previous answers, as JSON."""
    return asdict(replace(encoded, tokens=torch.empty(0))) | {"tokens": encoded.tokens.tolist()}


def decode(prompt: Prompt) -> Any:
    """The `Encoded` behind a prompt."""
    from headtune.analysis.tasks.task import Example
    from headtune.analysis.tasks.tokenized import Encoded

    def fixed(value: Any) -> Any:
        return tuple(fixed(item) for item in value) if isinstance(value, list | tuple) else value

    example = Example(**{name: fixed(value) for name, value in prompt["example"].items()})
    fields = {name: fixed(value) for name, value in prompt.items() if name not in ("example", "tokens")}
    return Encoded(example=example, tokens=torch.tensor(prompt["tokens"]), **fields)


# --- a side's process -------------------------------------------------------------------------------------------------


@torch.no_grad()
def serve(side: str, folder: str) -> None:
    """Say the packages' versions in a first line, then answer requests until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    routes = SIDES[side](folder)
    packages = ["torch", "transformers", *([PACKAGES[side]] if side in PACKAGES else [])]
    ready: dict[str, Any] = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps(ready | {"python": platform.python_version()}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        route, heads = routes[request["route"]], [(layer, head) for layer, head in request["heads"]]
        before = resident() if request["memory"] else 0.0
        start = time.perf_counter()
        values = route(request["prompt"], heads)
        seconds = time.perf_counter() - start
        reply = {"seconds": seconds, "values": {name: value.tolist() for name, value in values.items()}}
        if request["memory"]:
            reply["mib"] = status("VmHWM") - before
        print(json.dumps(reply), file=replies, flush=True)


def resident() -> float:
    """Resident MiB, after handing freed memory back and setting the peak to the present size."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


class Side:
    """A running process of one side, seen from the benchmark."""

    def __init__(self, name: str, folder: str, threads: int, python: str = sys.executable) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [python, "-W", "ignore", __file__, name, folder]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._versions: dict[str, str] | None = None

    @property
    def versions(self) -> dict[str, str]:
        """Of its packages; waits until the side is ready."""
        if self._versions is None:
            self._versions = self._read()
        return self._versions

    def ask(self, route: str, prompt: Prompt, heads: Heads = (), memory: bool = False) -> dict[str, Any]:
        assert self.versions and self.process.stdin
        request = {"route": route, "prompt": prompt, "heads": list(heads), "memory": memory}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the {self.name} side ended with {self.process.wait()}; its error stands above")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    serve(*sys.argv[1:])
