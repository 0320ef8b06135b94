"""Both knobs are what they say at every position: whole prompts, padded batches, decoding with a cache."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from headtune.analysis.heads import at_test_time
from headtune.analysis.interventions import mlp_regression
from headtune.analysis.interventions.intervention import CLEAN
from headtune.analysis.interventions.last_layer import Intercept, Sink, scale_sink_heads, subtract_mlp_intercept
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks import task as task_module
from headtune.analysis.tasks import tokenized
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.cli.main import main
from helpers.small_runs import train, write_recipe
from helpers.tiny import N_HEADS, N_LAYERS, save_tiny, tiny_model, tiny_task, tiny_tokenizer

LAST = N_LAYERS - 1
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "mistral-sliding": ("mistral", {"sliding_window": 5}),
    "qwen2-sliding-last": ("qwen2", SLIDING),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "gpt_neox": ("gpt_neox", {}),
    "phi": ("phi", {}),
    "gemma2": (
        "gemma2",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "sliding_window": 6,
            "query_pre_attn_scalar": 1,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "attn_implementation": "eager",
        },
    ),
}
TAU, GAMMA = 0.15, 0.3


@pytest.fixture(scope="module", params=FAMILIES)
def heads(request: pytest.FixtureRequest) -> HeadModel:
    family, config = FAMILIES[request.param]
    return wrap_model(tiny_model(family, **config), tiny_tokenizer(), request.param)


def _eager(model: HeadModel) -> PreTrainedModel:
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    return hf


@torch.no_grad()
def _slow(model: HeadModel, hf: PreTrainedModel, tokens: Tensor, layer: int = LAST) -> tuple[Tensor, Tensor]:
    """Logits `[seq, vocabulary]` of one prompt, its whole attention matrix looked at; and factors `[seq, n_heads]`."""
    attention = hf(tokens[None], use_cache=False, output_attentions=True).attentions[layer][0]  # [heads, seq, seq]
    factors = torch.ones(len(tokens), model.n_heads)
    for head in range(model.n_heads):
        for query in range(len(tokens)):
            if attention[head, query, 0] > TAU:
                factors[query, head] = GAMMA
    path = f"{model.architecture.layers}.{layer}.{model.architecture.attention}.{model.architecture.output_projection}"
    handle = hf.get_submodule(path).register_forward_pre_hook(
        lambda _module, args: (args[0] * factors.repeat_interleave(model.head_dim, 1)[None],)
    )
    try:
        return hf(tokens[None], use_cache=False).logits[0], factors
    finally:
        handle.remove()


def _prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [0, LAST])
def test_the_sink_knob_is_the_definition_at_every_position(heads: HeadModel, layer: int) -> None:
    tokens = _prompt(12)
    expected, factors = _slow(heads, _eager(heads), tokens, layer)
    assert 3 <= (factors[1:] != 1).sum() <= 40  # beyond the first position's own query, some and some not
    with torch.no_grad(), scale_sink_heads(heads, TAU, GAMMA, layer):
        found = heads.hf(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(heads.hf(tokens[None], use_cache=False).logits[0], expected, atol=1e-3)


@torch.no_grad()
def test_the_sink_knob_in_a_left_padded_batch_with_a_cache(heads: HeadModel) -> None:
    """Prompts of different lengths generated together are those generated one by one, each step a whole slow run."""
    prompts = [_prompt(9, seed=1), _prompt(4, seed=2)]
    padded = torch.stack([torch.cat([torch.zeros(9 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(9) >= 9 - len(p) for p in prompts]).long()
    generate: Any = heads.hf.generate
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    with scale_sink_heads(heads, TAU, GAMMA):
        found = generate(
            input_ids=padded, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
        )
    model, n_scaled = _eager(heads), 0
    for row, tokens in enumerate(prompts):
        for step in range(7):
            expected, factors = _slow(heads, model, tokens)
            n_scaled += int((factors[-1] != 1).sum())
            torch.testing.assert_close(found.logits[step][row], expected[-1], atol=1e-4, rtol=1e-4)
            tokens = torch.cat([tokens, found.sequences[row, 9 + step][None]])
    assert n_scaled > 0


def test_a_block_leaves_nothing_behind(heads: HeadModel) -> None:
    tokens = _prompt(8)[None]
    with torch.no_grad():
        before = heads.hf(tokens, use_cache=False).logits
        with pytest.raises(RuntimeError), scale_sink_heads(heads), subtract_mlp_intercept(heads, torch.ones(32)):
            raise RuntimeError
        assert torch.equal(heads.hf(tokens, use_cache=False).logits, before)


@pytest.mark.parametrize("knob", [(1.0, 0.0), (0.0, 1.0)])  # no head is above 1; a factor of 1 changes nothing
def test_settings_that_change_nothing(heads: HeadModel, knob: tuple[float, float]) -> None:
    tokens = _prompt(8)[None]
    with torch.no_grad():
        before = heads.hf(tokens, use_cache=False).logits
        with scale_sink_heads(heads, *knob):
            assert torch.equal(heads.hf(tokens, use_cache=False).logits, before)


@torch.no_grad()
def test_the_intercept_knob_is_the_definition(heads: HeadModel) -> None:
    """A bias-like change at the last MLP: the final norm's input moves by exactly -beta b, at every position."""
    b, tokens = torch.randn(heads.d_model, generator=torch.Generator().manual_seed(0)), _prompt(8)[None]
    taken: list[Tensor] = []
    handle = heads.final_norm.register_forward_pre_hook(lambda _module, args: taken.append(args[0]))
    try:
        heads.hf(tokens, use_cache=False)
        with subtract_mlp_intercept(heads, b, 0.5):
            heads.hf(tokens, use_cache=False)
    finally:
        handle.remove()
    torch.testing.assert_close(taken[1], taken[0] - 0.5 * b, atol=1e-5, rtol=1e-5)


# --- what cannot be right is refused ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> HeadModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer(), "llama")


@torch.no_grad()
def test_it_refuses_what_it_cannot_see(llama: HeadModel) -> None:
    tokens = _prompt(5)[None]
    with scale_sink_heads(llama):
        with pytest.raises(InputError, match="DynamicCache"):
            llama.hf(tokens, past_key_values=StaticCache(config=llama.hf.config, max_cache_len=10))
        with pytest.raises(InputError, match="attention mask"):
            llama.hf(tokens, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
        with pytest.raises(CheckError, match="replaced"):
            LastTokenRunner(llama, tokens[0]).run([CLEAN])
    for wrong in (-1, N_LAYERS):
        with pytest.raises(InputError, match="out of range"), scale_sink_heads(llama, layer=wrong):
            pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sinc:tau=1", ["'sinc'", "'sink'"]),
        ("sink:tua=0.5", ["'tua'", "'tau'"]),
        ("sink:tau=high", ["tau='high'", "number"]),
        ("sink:tau=1.5", ["tau=1.5", "0 to 1"]),
        ("sink:tau=nan", ["tau=nan"]),
        ("sink:gamma=-1", ["gamma=-1", "0 or more"]),
        ("sink:gamma=inf", ["gamma=inf"]),
        ("sink:gamma", ["gamma=VALUE"]),
        ("sink:gamma=", ["gamma=VALUE"]),
        ("sink:gamma=1,gamma=2", ["once"]),
        ("intercept:beta=nan", ["beta=nan"]),
        ("intercept:fit=nowhere", ["'nowhere'", "built in"]),
        ("intercept:fit=one_to_many:trian", ["'trian'", "train"]),
        ("intercept:fit=missing.jsonl", ["missing.jsonl", "does not exist"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        at_test_time.parse([text])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_settings_are_read() -> None:
    assert at_test_time.parse([]) == []
    assert at_test_time.parse(["sink"]) == [Sink()]
    found = at_test_time.parse(["sink:tau=0.6,gamma=0", "intercept:beta=0.5,fit=country_cities:train"])
    assert found == [Sink(0.6, 0.0), Intercept(0.5, "country_cities:train")]
    with pytest.raises(InputError, match="twice"):
        at_test_time.parse(["sink", "sink:tau=1"])


def test_knobs_turned_together_are_the_blocks_opened_together(llama: HeadModel, tmp_path: Path) -> None:
    path = tmp_path / "cities.jsonl"
    path.write_text(task_module.to_jsonl(tiny_task().examples), encoding="utf-8")
    tokens = _prompt(9)[None]
    found, r2 = mlp_regression.decompose(llama, tokenized.encode(tiny_task(), llama.tokenizer).examples)
    with torch.no_grad(), scale_sink_heads(llama, TAU, GAMMA), subtract_mlp_intercept(llama, found.intercept[-1], 0.7):
        expected = llama.hf(tokens, use_cache=False).logits
    with at_test_time.applied(llama, [Sink(TAU, GAMMA), Intercept(0.7, str(path))]) as notes, torch.no_grad():
        torch.testing.assert_close(llama.hf(tokens, use_cache=False).logits, expected)
    assert notes == [
        {"knob": "sink", "tau": TAU, "gamma": GAMMA, "layer": LAST},
        {
            "knob": "intercept",
            "beta": 0.7,
            "fit": str(path),
            "layer": LAST,
            "fit_examples": found.n,
            "held_out_r2": pytest.approx(r2[-1]),
        },
    ]


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("knobs") / "model", "llama", num_key_value_heads=2)


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("knobs-task") / "cities.jsonl"
    path.write_text(task_module.to_jsonl(tiny_task().examples), encoding="utf-8")
    return path


def _evaluate(folder: Path, task: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["evaluate", str(folder), "--task", str(task), "--json", *options]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_evaluate_with_knobs(folder: Path, task_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = _evaluate(folder, task_file, capsys)
    assert plain["knobs"] == []
    nothing = _evaluate(
        folder, task_file, capsys, "--knob", "sink:gamma=1", "--knob", f"intercept:beta=0,fit={task_file}"
    )
    assert [note["knob"] for note in nothing["knobs"]] == ["sink", "intercept"]
    assert nothing["generations"] == plain["generations"]
    mean = plain["metrics"]["p_remaining"]["mean"]
    assert nothing["metrics"]["p_remaining"]["mean"] == pytest.approx(mean, rel=1e-4)
    turned = _evaluate(folder, task_file, capsys, "--knob", f"intercept:beta=1,fit={task_file}")
    assert turned["metrics"]["p_remaining"]["mean"] != pytest.approx(mean, rel=1e-3)
    assert turned["metrics"]["neutral_perplexity"] != pytest.approx(plain["metrics"]["neutral_perplexity"], rel=1e-5)


def test_bad_knobs_are_one_line_before_anything_is_loaded(task_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "no-such-model", "--task", str(task_file), "--knob", "sink:tau=2"]) == 2
    error = capsys.readouterr().err
    assert "tau=2" in error and error.count("\n") == 1


def test_knobs_on_a_run_see_its_adapter(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, folder)
    assert train(recipe) == 0
    capsys.readouterr()
    run, task = tmp_path / "run", tmp_path / "cities.jsonl"
    plain = _evaluate(run, task, capsys)
    nothing = _evaluate(run, task, capsys, "--knob", "sink:gamma=1")
    mean = plain["metrics"]["p_remaining"]["mean"]
    assert nothing["metrics"]["p_remaining"]["mean"] == pytest.approx(mean, rel=1e-4)
    assert nothing["generations"] == plain["generations"]
    base = _evaluate(folder, task, capsys)["metrics"]["p_remaining"]["mean"]
    assert mean != pytest.approx(base, rel=1e-3)
    silent = _evaluate(run, task, capsys, "--knob", "sink:tau=0,gamma=0")
    assert silent["metrics"]["p_remaining"]["mean"] != pytest.approx(mean, rel=1e-3)
