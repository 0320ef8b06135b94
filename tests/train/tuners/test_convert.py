"""Whatever was trained becomes a stock model that computes the same, or is refused with the reason.

Every method on every family is folded, saved, and reloaded by plain transformers in a process without headtune.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from headtune.analysis.models.architectures import ARCHITECTURES
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.export.checkpoint import Prompts, compare, model_outputs, reload_in_subprocess, write_stock
from headtune.train.tuners import convert
from headtune.train.tuners.convert import conversion, fold
from headtune.train.tuners.head_slices import HeadSlicesConfig
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.tiny import HARD_KINDS, KINDS, tiny_model, tiny_tokenizer

# PEFT says of every norm it wraps, and of GPT-2's projections, that it does not know them.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:fan_in_fan_out")

HEADS = [[0, 1], [2, 0], [2, 3]]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "phi")


def perturbed(model: Any, pattern: str, seed: int = 3) -> Any:
    """Parameters whose name holds `pattern` moved far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if pattern in name:
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def leaves(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, module in model.named_modules() if wanted(module) and module is not head]


def tuned(model: PreTrainedModel, **settings: Any) -> Any:
    config = HeadTuningConfig(**({"heads": HEADS, "scale": "none", "offset": False} | settings))
    return perturbed(get_peft_model(model, config), "head_tuning_")


def lora(model: PreTrainedModel) -> Any:
    targets = leaves(model, lambda module: type(module).__name__ in ("Linear", "Conv1D"))
    return perturbed(get_peft_model(model, LoraConfig(r=4, target_modules=targets)), "lora_B")


def norms(model: PreTrainedModel) -> Any:
    targets = leaves(model, lambda module: "Norm" in type(module).__name__)
    return perturbed(get_peft_model(model, LNTuningConfig(target_modules=targets)), "ln_tuning_")


METHODS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "scale": lambda model: tuned(model, scale="vector"),
    "steer": lambda model: tuned(model, scale="head"),
    "offset": lambda model: tuned(model, offset=True),
    "jola": lambda model: tuned(model, scale="vector", offset=True, gates=True),
    "mlp": lambda model: tuned(model, heads=[], mlp_layers=[0, 2]),
    "heads-mlp": lambda model: tuned(model, scale="vector", offset=True, mlp_layers=[1]),
    "masked": lambda model: perturbed(get_peft_model(model, HeadSlicesConfig(heads=HEADS)), "head_slices_"),
    "lora": lora,
    "ln": norms,
    "full": lambda model: perturbed(model, ""),
}
WITHOUT_NEW_BIASES = ("scale", "steer", "masked", "lora", "ln", "full")
# Where the biases of an offset on heads, and of one on an MLP, go: (family, flags). None: refused. Not here: the
# family's own, no flag.
BOTH = ["attention_bias", "mlp_bias"]
PLACES: dict[str, tuple[Any, Any]] = {
    "llama": (("llama", ["attention_bias"]), ("llama", ["mlp_bias"])),
    "mistral": (("llama", ["attention_bias"]), ("llama", ["mlp_bias"])),
    "qwen2": (("llama", ["attention_bias"]), ("llama", BOTH)),
    "qwen3": (("qwen3", ["attention_bias"]), None),
    "gemma": (("gemma", ["attention_bias"]), None),
    "gemma2": (("gemma2", ["attention_bias"]), None),
    "gemma3": (("gemma3_text", ["attention_bias"]), None),
    "phi3": (("llama", ["attention_bias"]), ("llama", ["mlp_bias"])),
    "llama-bias": (("llama", []), ("llama", ["mlp_bias"])),
    "qwen3-bias": (("qwen3", []), None),
    "gemma2-bias-mqa": (("gemma2", []), None),
    "gemma3-bias": (("gemma3_text", []), None),
    "mistral-sliding": (None, None),
    "qwen2-sliding": (None, None),
    "phi3-sliding": (None, None),
    "opt-no-bias": (("opt", ["enable_bias"]), ("opt", ["enable_bias"])),
    "gpt_neox-no-bias": (("gpt_neox", ["attention_bias"]), ("gpt_neox", [])),
}


def place(kind: str, method: str) -> tuple[str, list[str]] | None:
    family = KINDS[kind].family
    if method in WITHOUT_NEW_BIASES:
        return family, []
    like = kind if kind in PLACES else "gemma3" if family == "gemma3_text" else family
    heads, mlp = PLACES.get(like, ((family, []), (family, [])))
    if method == "mlp":
        return mlp
    if method == "heads-mlp" and heads is not None:
        return None if mlp is None else (heads[0], sorted({*heads[1], *mlp[1]}))
    return heads


PROMPTS = Prompts(
    [torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 14)], None, 4, 0
)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([PROMPTS.rows[0]]), use_cache=False).logits
    return found


def folded(kind: str, method: str) -> tuple[Any, PreTrainedModel] | None:
    """What a tuned model answers, and the same model folded, where it is to be; None where it is refused."""
    model: Any = tiny_model(KINDS[kind].family, **KINDS[kind].config)
    plain, source, wanted = logits(model), copy.deepcopy(model.config), place(kind, method)
    if wanted is None:
        with pytest.raises(InputError) as caught:
            fold(METHODS[method](model))
        assert "\n" not in str(caught.value)
        return None
    model = METHODS[method](model)
    expected = model_outputs(model, PROMPTS)
    assert (expected.logits[0] - plain[0]).abs().max() > 0.1, "nothing was changed"
    stock = fold(model)
    found = conversion(source, stock.config)
    assert (found["written"], found["flags"]) == wanted
    module = wanted[0].removesuffix("_text")
    assert type(stock).__module__ == f"transformers.models.{module}.modeling_{module}"
    return expected, stock


def equal(expected: Any, found: Any, name: str) -> None:
    result = compare(expected, found, "float32")
    assert result["max_logit_difference"] < 1e-5 * max(1, result["logit_scale"]), (name, result)
    assert result["passed"], (name, result)


def reloaded_elsewhere(pairs: Iterable[tuple[str, str]], folder: Path) -> None:
    """Fold and save every pair of a kind and a method, or see it refused; then compare all that were saved."""
    expected: dict[str, Any] = {}
    for kind, method in pairs:
        name = f"{kind}.{method}"
        if (found := folded(kind, method)) is not None:
            expected[name], stock = found
            write_stock(stock, tiny_tokenizer(), folder / name)
            assert "headtune" not in (folder / name / "config.json").read_text()
    for name, answers in zip(
        expected, reload_in_subprocess([folder / name for name in expected], PROMPTS), strict=True
    ):
        equal(expected[name], answers, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_of_a_family_is_folded_or_refused(family: str) -> None:
    new_biases = [method for method in METHODS if method not in WITHOUT_NEW_BIASES]
    for method in METHODS if family in ("llama", "gpt2") else ["full", *new_biases]:
        if (found := folded(family, method)) is not None:
            expected, scale = found[0].logits[0], found[0].logits[0].abs().max()
            assert (logits(found[1])[0] - expected).abs().max() < 1e-5 * max(1, scale), method


BIASED = {"offset": ["attention"], "jola": ["attention"], "mlp": ["mlp"], "heads-mlp": ["attention", "mlp"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refusal_is_foretold_from_the_configuration(family: str) -> None:
    for kind in (name for name in KINDS if name.partition("-")[0] == family):
        model = tiny_model(KINDS[kind].family, **KINDS[kind].config)
        places = set(model.state_dict())
        for method in METHODS:
            reason = convert.why_not_stock(model, BIASED.get(method, []), range(3))
            gone = method in ("mlp", "heads-mlp") and kind[:6] in (
                "gemma2",
                "gemma3",
            )  # has no projection to carry one, and is refused
            assert (reason is not None) == (place(kind, method) is None and not gone), (kind, method, reason)
            assert reason is None or "headtune export RUN OUT --adapter" in reason
        assert set(model.state_dict()) == places
        model.config.quantization_config = {"quant_method": "gptq"}
        assert "is quantised" in str(convert.why_not_stock(model, [], range(3)))


@pytest.mark.slow
@pytest.mark.usefixtures("new_interpreters")
def test_every_kind_reloads_elsewhere(tmp_path: Path) -> None:
    """Of the hard kinds every new bias and one method more, of the others one method each, in turns."""
    plain = [method for method in METHODS if method in WITHOUT_NEW_BIASES]
    pairs = [(kind, method) for kind in HARD_KINDS for method in ("jola", "mlp", "heads-mlp")]
    pairs += [(kind, plain[index % len(plain)]) for index, kind in enumerate(HARD_KINDS)]
    others = [kind for kind in KINDS if kind not in HARD_KINDS]
    pairs += [(kind, list(METHODS)[index % len(METHODS)]) for index, kind in enumerate(others)]
    reloaded_elsewhere(pairs, tmp_path)


def test_every_family_is_covered() -> None:
    assert {KINDS[kind].family for kind in FAMILIES} == set(ARCHITECTURES)


# --- what is carried over to another family ---------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 5000.0}
SHORT, LONG = [1.0, 1.5, 2.0, 2.5], [4.0, 5.0, 6.0, 7.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 5000.0}
CARRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "theta-eps": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rms_norm_eps": 0.1}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama3": (
        "mistral",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "dynamic": ("mistral", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 50.0}}),
    "head-dim": ("mistral", {"head_dim": 16}),
    "gelu": ("mistral", {"hidden_act": "gelu"}),
    "wide-window": ("mistral", {"sliding_window": 256}),
    "no-window": ("mistral", {"sliding_window": None}),
    "longrope-in-reach": (
        "phi3",
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 256}, "max_position_embeddings": 256},
    ),
    "mqa": ("phi3", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", CARRIED)
def test_settings_reach_the_other_family(name: str) -> None:
    family, settings = CARRIED[name]
    tokens = {"bos_token_id": None, "eos_token_id": [2, 5], "pad_token_id": 7}
    model: Any = tiny_model(family, **({"max_position_embeddings": 256} | settings | tokens))
    changed = (logits(model) - logits(tiny_model(family))).abs().max()
    assert changed > 1e-3 or name in ("wide-window", "no-window", "longrope-in-reach"), "the setting does something"
    model.generation_config.max_length = 77
    model = METHODS["offset"](model)
    expected = logits(model)
    stock: Any = fold(model)
    assert stock.config.model_type == "llama"
    # A model built from the configuration alone: nothing is left in the folded one that a reload would not have.
    fresh = AutoModelForCausalLM.from_config(type(stock.config).from_dict(stock.config.to_diff_dict()))
    fresh.load_state_dict(stock.state_dict())
    torch.testing.assert_close(logits(fresh.eval()), expected, atol=2e-5, rtol=2e-5)
    assert fresh.config.bos_token_id is None
    assert (fresh.config.eos_token_id, fresh.config.pad_token_id) == ([2, 5], 7)
    assert stock.generation_config.max_length == 77
    assert not {"sliding_window", "layer_types", "use_sliding_window", "qkv_bias"} & stock.config.to_dict().keys()


REFUSED = {
    "sliding": ("mistral", {"sliding_window": 255}, "a sliding window of 255, shorter than its 256 positions"),
    "partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "rotates only 0.5 of each head's dimensions",
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 8},
            "original_max_position_embeddings": 8,
        },
        "changes its rotary frequencies after 8 positions",
    ),
    "odd-size": ("mistral", {"hidden_size": 34, "head_dim": 8}, "cannot be written as a llama"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_other_family_does_not_compute_is_refused_with_the_reason(name: str) -> None:
    family, settings, reason = REFUSED[name]
    with pytest.raises(InputError) as caught:
        fold(METHODS["offset"](tiny_model(family, **settings)))
    message = str(caught.value)
    assert "\n" not in message and reason in message and repr(family).strip("'") in message
    assert "method.offset=false" in message and "headtune export RUN OUT --adapter" in message
    assert convert.why_not_stock(tiny_model(family, **settings), ["attention"], range(3)) == message
    model: Any = METHODS["scale"](tiny_model(family, **settings))  # needs no bias, so stays what it is
    expected = logits(model)
    torch.testing.assert_close(logits(fold(model)), expected, atol=1e-5, rtol=1e-5)


# --- embeddings, quantised and foreign models -------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tied_embedding_that_is_trained_is_untied(targets: list[str], tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama", tie_word_embeddings=True), LoraConfig(r=4, target_modules=targets))
    model = perturbed(perturbed(model, "lora_B"), "lora_embedding_A")
    expected = logits(model)
    stock = fold(model)
    assert stock.config.tie_word_embeddings is False
    stock.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=1e-5)


def test_embeddings_that_came_apart_are_not_tied_again(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(2 * model.model.embed_tokens.weight.detach())
    expected = logits(model)
    fold(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False, "what vLLM goes by"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_tied_embeddings_that_are_not_trained_stay_tied() -> None:
    for method in ("offset", "lora", "full"):
        stock: Any = fold(METHODS[method](tiny_model("qwen2", tie_word_embeddings=True)))
        assert stock.config.tie_word_embeddings is True
        assert stock.lm_head.weight is stock.model.embed_tokens.weight


def test_a_quantised_model_is_refused() -> None:
    model: Any = METHODS["scale"](tiny_model("llama"))
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="quantised"):
        fold(model)


def test_a_class_of_the_models_own_is_refused_and_a_leftover_auto_map_removed() -> None:
    model: Any = tiny_model("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    assert not hasattr(fold(METHODS["scale"](model)).config, "auto_map")
    own: Any = tiny_model("llama")
    own.__class__ = type("Own", (type(own),), {"__module__": "transformers_modules.own"})
    with pytest.raises(InputError, match="trust_remote_code"):
        fold(own)


@pytest.mark.parametrize("method", ["scale", "lora"])
def test_weights_that_are_not_finite_are_not_merged(method: str) -> None:
    model = METHODS[method](tiny_model("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head_tuning_" in name or "lora_B" in name:
                parameter.fill_(float("nan"))
    with pytest.raises(CheckError, match="cannot be merged"):
        fold(model)


def test_only_biases_are_filled_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another missing parameter is a mistake of the table, never a zero."""
    model = METHODS["offset"](tiny_model("llama"))
    whole = convert._filled

    def without_a_norm(config: Any, state: Any) -> Any:
        return whole(config, {name: tensor for name, tensor in state.items() if name != "model.norm.weight"})

    monkeypatch.setattr(convert, "_filled", without_a_norm)
    with pytest.raises(CheckError, match=r"model\.norm\.weight"):
        fold(model)
