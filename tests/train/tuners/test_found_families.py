"""Adapters on families that no row names, and on a text model beside a vision tower: put in, merged, stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config, Mistral3Config

from headtune import HeadSlicesConfig, HeadTuningConfig
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.models.structure import architecture_of_config
from headtune.analysis.utils.errors import InputError
from headtune.train.tuners.convert import fold
from helpers.close import close
from helpers.tiny import FOUND_KINDS, tiny_model, tiny_tokenizer

HEADS = [[0, 1], [2, 3]]


def tokens_of(model: Any) -> torch.Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def move(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", FOUND_KINDS)
@torch.no_grad()
def test_scales_and_slices_do_what_they_say_and_fold(name: str) -> None:
    """At their start they change nothing; moved, the stock model that they are folded into gives the same logits."""
    kind = FOUND_KINDS[name]
    base = tiny_model(kind.family, **kind.config)
    tokens = tokens_of(base)
    plain = base(tokens).logits
    model = get_peft_model(base, HeadTuningConfig(heads=HEADS, scale="head", offset=False))
    close(model(tokens).logits, plain, 1e-6)
    move(model)
    tuned = model(tokens).logits
    assert (tuned - plain).abs().max() > 1e-3
    stock = fold(model)
    close(stock(tokens).logits, tuned, 1e-5)
    assert stock.config.model_type == kind.family and type(stock).__module__.startswith("transformers.")
    model = get_peft_model(tiny_model(kind.family, **kind.config), HeadSlicesConfig(heads=HEADS, parts=["o"]))
    move(model)
    tuned = model(tokens).logits
    assert (tuned - plain).abs().max() > 1e-3
    close(fold(model)(tokens).logits, tuned, 1e-5)


def test_slices_that_the_structure_does_not_tell_are_refused() -> None:
    kind = FOUND_KINDS["deepseek_v3"]
    with pytest.raises(InputError, match=r"are not three of plain heads; give parts: \[o\]"):
        get_peft_model(tiny_model(kind.family, **kind.config), HeadSlicesConfig(heads=HEADS, parts=["q", "o"]))


@pytest.mark.parametrize("name", ["olmo2", "qwen3_moe", "starcoder2"])
def test_a_configuration_alone_tells_where_heads_are(name: str) -> None:
    """What PEFT and exports ask for is the same without weights."""
    kind = FOUND_KINDS[name]
    model = tiny_model(kind.family, **kind.config)
    view = wrap_model(model, tiny_tokenizer()).architecture
    alone = architecture_of_config(model.config)
    for field in ("layers", "attention", "output_projection", "final_norm", "qkv", "bias_flags"):
        assert getattr(alone, field) == getattr(view, field), field


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
@torch.no_grad()
def test_the_text_part_of_a_model_of_images(family: str) -> None:
    """Gemma 3 and Mistral 3 as they are published: heads are those of the text model, exports keep the layout."""
    sizes = TEXT | {"vocab_size": len(tiny_tokenizer())}
    torch.manual_seed(0)
    if family == "gemma3":
        text, vision = sizes | {"model_type": "gemma3_text"}, VISION | {"model_type": "siglip_vision_model"}
        base: Any = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    else:
        text, vision = sizes | {"model_type": "mistral"}, VISION | {"model_type": "pixtral"}
        base = AutoModelForImageTextToText.from_config(Mistral3Config(text_config=text, vision_config=vision))
    base = base.float().eval()
    view = wrap_model(base, tiny_tokenizer())
    assert view.architecture.layers == "model.language_model.layers" and (view.n_layers, view.n_heads) == (3, 4)
    view.record_attention(False)
    tokens = tokens_of(base)
    model = get_peft_model(base, HeadTuningConfig(heads=HEADS, scale="head", offset=family == "gemma3"))
    assert not [name for name, each in model.named_parameters() if each.requires_grad and "vision" in name]
    move(model)
    tuned = model(tokens).logits
    stock = fold(model)
    assert stock.config.model_type == family
    close(stock(tokens).logits, tuned, 1e-5)
