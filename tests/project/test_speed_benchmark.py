"""The speed benchmark compares routes that give the same numbers, and refuses to compare others. Nothing is timed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import speed_analysis
import speed_routes
from speed_routes import Prompt, Route, Values

SCRIPT = Path(speed_analysis.__file__)
HEADS = [(layer, head) for layer in range(tiny.N_LAYERS) for head in range(tiny.N_HEADS)]


@pytest.fixture(scope="module")
def prompts(tiny_llama: Path) -> tuple[list[Prompt], list[Prompt]]:
    made = speed_analysis.make_prompts(str(tiny_llama), tiny.tiny_task(), 2, (24, 40))
    some, by_length = json.loads(json.dumps(made))  # as a side reads them
    return some, by_length


@pytest.fixture(scope="module")
def routes(tiny_llama: Path) -> dict[str, Route]:
    """Of headtune's and transformers' sides, in this process."""
    sides = [side(str(tiny_llama)) for side in (speed_routes.transformers_side, speed_routes.headtune_side)]
    return sides[0] | sides[1]


def listed(values: Values) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in values.items()}


@torch.no_grad()
@pytest.mark.parametrize("heads", [HEADS, HEADS[1::5]], ids=["all heads", "some heads"])
def test_routes_give_the_same_numbers(
    heads: list[tuple[int, int]],
    prompts: tuple[list[Prompt], list[Prompt]],
    routes: dict[str, Route],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed_routes, "BATCH_TOKENS", 100)  # several passes a batch
    for prompt in [*prompts[0], *prompts[1]]:
        ours = listed(routes["headtune"](prompt, heads))
        assert len(ours["target"]) == len(heads) and min(map(abs, ours["previous"])) > 1e-3
        for route in ("one batch", "head by head"):
            speed_analysis.difference(ours, listed(routes[route](prompt, heads)), route)


@torch.no_grad()
def test_attribution_is_that_of_head_outputs_written_out(
    prompts: tuple[list[Prompt], list[Prompt]], routes: dict[str, Route]
) -> None:
    """`W_U norm(W_O[l, h] z[l, h])` with the final norm's own scale, head by head."""
    model: Any = tiny.tiny_model("llama")
    inputs: dict[Any, torch.Tensor] = {}
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    for module in (*projections, model.model.norm):
        module.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0][0, -1]))
    width = tiny.D_MODEL // tiny.N_HEADS
    for prompt in prompts[0]:
        model(torch.tensor([prompt["tokens"]]))
        scale = (inputs[model.model.norm].pow(2).mean() + model.config.rms_norm_eps).rsqrt()
        expected = []
        for layer, head in HEADS:
            part = slice(head * width, (head + 1) * width)
            written = projections[layer].weight[:, part] @ inputs[projections[layer]][part]
            logits = model.lm_head.weight @ (written * scale * model.model.norm.weight)
            expected.append(logits[prompt["target_tokens"]].mean().item())
        ours = routes["headtune attribution"](prompt, ())["target"].tolist()
        speed_analysis.difference({"target": expected}, {"target": ours}, "attribution")


@pytest.mark.parametrize("wrong", [{"target": [1.0, 2.001]}, {"target": [1.0, float("nan")]}, {"target": [1.0]}, {}])
def test_other_numbers_are_not_compared(wrong: dict[str, list[float]]) -> None:
    with pytest.raises(SystemExit, match="a route"):
        speed_analysis.difference({"target": [1.0, 2.0]}, wrong, "a route")


def test_longer_prompts_end_the_same_and_keep_their_spans(prompts: tuple[list[Prompt], list[Prompt]]) -> None:
    short, long = prompts[1]
    assert [len(short["tokens"]), len(long["tokens"])] == [24, 40]
    assert long["tokens"][-24:] == short["tokens"] and long["target_tokens"] == short["target_tokens"]

    def at(prompt: Prompt, positions: Any) -> list[int]:
        return [prompt["tokens"][position] for position in positions]

    decoded = tiny.tiny_tokenizer().decode(at(long, long["subject"]))
    assert decoded.strip() == long["example"]["subject"]
    assert at(short, short["subject"]) == at(long, long["subject"])
    assert [at(short, span) for span in short["previous"]] == [at(long, span) for span in long["previous"]]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_seen_after_it_is_freed() -> None:
    before = speed_routes.resident()
    torch.ones(16, 2**20)  # 64 MiB
    assert 60 < speed_routes.status("VmHWM") - before < 80


def test_an_environment_without_the_peer_is_noticed() -> None:
    assert not speed_analysis.has_transformer_lens(shutil.which("false") or "false")


@pytest.mark.slow
def test_the_whole_benchmark_on_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out)]
    command += ["--prompts", "2", "--rounds", "2", "--threads", "1", "--unfinished", str(tmp_path / "unfinished")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with_peer = importlib.util.find_spec("transformer_lens") is not None
    assert ("TransformerLens is not installed" in done.stdout) != with_peer
    found = json.loads(out.read_text())
    assert set(found["parity"]["relative_difference"]) == {"headtune"} | ({"TransformerLens"} if with_peer else set())
    for section in ("ablation", "attribution"):
        assert all(row["largest_difference"] <= found["tolerance"] for row in found[section].values())
        assert any("TransformerLens" in route for route in found[section]) == with_peer
    assert [row["heads"] for row in found["growth"]["heads"]] == [3, 12]
    assert out.with_suffix(".png").stat().st_size < 150_000
    assert not list((tmp_path / "unfinished").iterdir())
