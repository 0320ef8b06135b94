"""A head set becomes the configuration of an adapter: the heads that a recipe would choose, refused as a recipe is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

from headtune import HeadSet, HeadSlicesConfig, HeadTuningConfig, InputError, identify
from headtune.analysis.heads.head_set import RankedHead
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.synthetic.planted import plant
from headtune.analysis.synthetic.planting import Planting
from headtune.train.config.methods import HeadsConfig
from headtune.train.config.resolve_heads import resolve_heads
from helpers.tiny import tiny_model, tiny_task, tiny_tokenizer

CONFIGS = [HeadTuningConfig, HeadSlicesConfig]
TWO_ROLES = {"recall": [(2, 3), (0, 0), (1, 2)], "suppression": [(1, 1), (0, 0)]}


def head_set(roles: dict[str, list[tuple[int, int]]], model: Any, limit: int | None = 8) -> HeadSet:
    ranked = {role: tuple(RankedHead(*pair, 1.0, (0.5, 1.5)) for pair in pairs) for role, pairs in roles.items()}
    method = {"name": "all", "parameters": {} if limit is None else {"top": limit}}
    return HeadSet(model.identity(), {"name": "cities"}, method, ranked)


@pytest.fixture(scope="module")
def model() -> Any:
    return wrap_model(tiny_model("llama", num_key_value_heads=2), tiny_tokenizer())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("role", "top", "expected"),
    [
        ("recall", 2, [[0, 0], [2, 3]]),
        ("suppression", 1, [[1, 1]]),
        ("both", 1, [[1, 1], [2, 3]]),
        ("both", 8, [[0, 0], [1, 1], [1, 2], [2, 3]]),
    ],
)
def test_the_heads_a_recipe_chooses(
    config: Any, role: str, top: int, expected: list[list[int]], model: Any, tmp_path: Path
) -> None:
    heads = head_set(TWO_ROLES, model)
    heads.save(tmp_path / "heads.json")
    block = HeadsConfig.model_validate({"from": str(tmp_path), "role": role, "top": top})
    assert [list(pair) for pair in resolve_heads(block, model, tiny_task()).pairs] == expected
    for source in (heads, tmp_path, tmp_path / "heads.json", str(tmp_path)):
        made = config.from_head_set(source, role, top)
        assert made.heads == expected
        assert (made.n_heads, made.task_type) == (4, "CAUSAL_LM")


@pytest.mark.parametrize("config", CONFIGS)
def test_on_a_model_and_from_identify(config: Any) -> None:
    planted = plant(Planting("gqa"))
    model, role = planted.view(), "recall"
    result = identify(model, planted.task.limited(24), "dla", top=12)
    made = config.from_head_set(result, role, 3, model=model)
    assert made.heads == sorted(list(pair) for pair in result.heads.top(role)[:3])
    adapted = get_peft_model(model.hf, made)
    assert isinstance(adapted, PeftModel)
    assert adapted.peft_config["default"].heads == made.heads
    assert 0 < adapted.get_nb_trainable_parameters()[0] < 0.2 * sum(p.numel() for p in model.hf.parameters())


def test_any_role_and_options(model: Any) -> None:
    heads = head_set({"selected": [(0, 1), (2, 0)]}, model, limit=None)
    assert HeadTuningConfig.from_head_set(heads, top=2).heads == [[0, 1], [2, 0]]  # 'both', of a set of one role
    made = HeadTuningConfig.from_head_set(heads, "selected", 1, scale="none", init_std=1e-3, task_type="SEQ_CLS")
    assert (made.heads, made.scale, made.init_std, made.task_type) == ([[0, 1]], "none", 1e-3, "SEQ_CLS")
    assert HeadSlicesConfig.from_head_set(heads, "selected", 1, parts=["o"]).parts == ["o"]


def test_a_recipe_takes_any_role_that_the_head_set_has(model: Any, tmp_path: Path) -> None:
    heads = head_set({"memory": [(2, 3)], "context": [(0, 0), (1, 2)], "mine": [(0, 3)]}, model)
    heads.save(tmp_path)

    def pairs(**block: Any) -> list[tuple[int, int]]:
        return resolve_heads(HeadsConfig.model_validate({"from": str(tmp_path)} | block), model, tiny_task()).pairs

    assert (pairs(role="context"), pairs(role="mine")) == ([(0, 0), (1, 2)], [(0, 3)])
    like = HeadsConfig.model_validate({"random": {"like": str(tmp_path)}, "role": "context", "top": 1})
    ((layer, head),) = resolve_heads(like, model, tiny_task()).pairs
    assert layer == 0 and head != 0
    refused = {
        "contex": r"head role 'contex' is not in this head set; did you mean 'context'\? \(known: context, mem",
        "both": "'both' takes recall and suppression heads, and .* holds the roles memory, context, mine; name one",
    }
    for role, words in refused.items():
        with pytest.raises(InputError, match=words) as caught:
            pairs(role=role)
        assert "\n" not in str(caught.value)


def test_fewer_heads_than_asked_for_are_told(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        HeadTuningConfig.from_head_set(head_set(TWO_ROLES, model), "suppression", 4)
    assert "suppression heads confirmed in the head set: 2, fewer than top=4" in caplog.text


@pytest.mark.parametrize("config", CONFIGS)
def test_refused_in_one_line(config: Any, model: Any, tmp_path: Path) -> None:
    heads = head_set(TWO_ROLES, model, limit=3)
    other = wrap_model(tiny_model("llama", num_attention_heads=8, num_key_value_heads=8), tiny_tokenizer())
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (heads, {"role": "recal"}, "head role 'recal' is not in this head set; did you mean 'recall'?"),
        (heads, {"role": "recall", "top": 9}, "top=9 asked: identify kept at most 3 a role; lower top"),
        (heads, {"top": 0}, "top 0 must be at least 1"),
        (head_set({"recall": [], "suppression": []}, model), {}, "holds no recall or suppression heads"),
        (tmp_path / "none", {}, "none' does not exist; headtune identify writes one"),
        (heads, {"model": other}, "n_heads 4, but"),
    ]
    for source, options, words in cases:
        with pytest.raises(InputError) as caught:
            config.from_head_set(source, **options)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="n_heads 4 but the model 8"):
        get_peft_model(other.hf, config.from_head_set(heads, top=1))


@pytest.mark.parametrize("config", CONFIGS)
def test_an_sft_trainer_takes_it(config: Any, model: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"List five cities in {name}.\n1.", "completion": " Rome\n"} for name in ("Italy", "Japan")]
    trainer = SFTTrainer(
        tiny_model("llama", num_key_value_heads=2),
        train_dataset=Dataset.from_list(rows),
        peft_config=config.from_head_set(head_set(TWO_ROLES, model), "recall", 2),
        processing_class=tiny_tokenizer(),
        args=SFTConfig(str(tmp_path), max_steps=1, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True),
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert start and trainer.train().global_step == 1
    moved = [name for name, p in trainer.model.named_parameters() if name in start and not p.equal(start[name])]
    assert any("layers.2" in name for name in moved) and any("layers.0" in name for name in moved)
