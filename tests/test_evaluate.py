"""Lists are read and scored as a person would; generation in batches and every number equal slow references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_task, tiny_tokenizer

from headtune.analysis.encoding import encode
from headtune.analysis.tasks import Example, Task
from headtune.train import evaluate as evaluation
from headtune.train.evaluate import (
    KINDS,
    answer_mass,
    evaluate,
    generate_lists,
    neutral_text,
    parse_items,
    perplexity,
    score_items,
)

# --- reading a list ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (" Rome\n4. Milan\n5. Naples", ["Rome", "Milan", "Naples"]),
        (" Rome\n4) Milan\n5) Naples", ["Rome", "Milan", "Naples"]),
        (" Rome\n- Milan\n- Naples", ["Rome", "Milan", "Naples"]),
        (" Rome\n* Milan\n• Naples", ["Rome", "Milan", "Naples"]),
        (" Rome\n  10. Milan\n\t11. Naples", ["Rome", "Milan", "Naples"]),
        # explanations
        (" Rome - the capital\n4. Milan – fashion\n5. Naples — pizza", ["Rome", "Milan", "Naples"]),
        (" Rome: the capital\n4. Milan (fashion)\n5. Naples, pizza", ["Rome", "Milan", "Naples"]),
        (" Rome; the capital\n4. Milan", ["Rome", "Milan"]),
        # dashes and points inside a name are no explanation
        (" Aix-en-Provence\n4. St. Louis\n5. Washington D.C.", ["Aix-en-Provence", "St. Louis", "Washington D.C."]),
        # titles that begin with or are numbers
        (" 1984\n2. 1984\n3. 2001 A Space Odyssey", ["1984", "1984", "2001 A Space Odyssey"]),
        ("4. 1984", ["4. 1984"]),  # the prompt gave the number already: the first line is taken as it is
        # an empty line, or an item left empty, ends the list
        (" Rome\n\nThese are cities.\n5. Naples", ["Rome"]),
        (" Rome\n4. Milan\n5.\n6. Naples", ["Rome", "Milan"]),
        # before any item it does not
        ("\n\n4. Milan\n5. Naples", ["Milan", "Naples"]),
        ("", []),
        ("   ", []),
        ("\n\n", []),
        # only so many
        (" a\n4. b\n5. c\n6. d\n7. e", ["a", "b", "c"]),
    ],
)
def test_parse_items(text: str, items: list[str]) -> None:
    assert parse_items(text, 3) == items


MEXICO = Example(
    "List five cities in Mexico.\n1. Monterrey\n2.",
    "Mexico",
    ("Mexico City", "Monterrey", "Mérida", "León", "Quebec City"),
    ("Monterrey",),
)


@pytest.mark.parametrize(
    ("items", "kinds"),
    [
        (["León", "Mérida", "Mexico City"], ["correct_new"] * 3),
        (["leon", "MERIDA", "mexico city."], ["correct_new"] * 3),
        (["Monterrey", "monterrey", "León"], ["repeat", "repeat", "correct_new"]),
        (["León", "León", "Leon"], ["correct_new", "repeat", "repeat"]),
        # the country is not its capital; other cities may do without their "City"
        (["Mexico", "Mexico City", "Quebec"], ["wrong", "correct_new", "correct_new"]),
        (["Quebec City", "Quebec", "The Quebec"], ["correct_new", "repeat", "repeat"]),
        # a wrong item is wrong once and a repeat from then on
        (["Tokyo", "Tokyo", "tokyo"], ["wrong", "repeat", "repeat"]),
        (["León"], ["correct_new", "missing", "missing"]),
        ([], ["missing"] * 3),
        (["**León**", '"Mérida"', "`Tokyo`"], ["correct_new", "correct_new", "wrong"]),
    ],
)
def test_score_items(items: list[str], kinds: list[str]) -> None:
    assert score_items(MEXICO, items, 3) == kinds


def test_score_items_of_titles_that_are_numbers() -> None:
    orwell = Example("Books by Orwell:\n1. 1984\n2.", "Orwell", ("1984", "Animal Farm"), ("1984",))
    assert score_items(orwell, parse_items(" Animal Farm\n3. 1984\n4. 1985", 3), 3) == [
        "correct_new",
        "repeat",
        "wrong",
    ]


def test_an_answer_that_holds_a_comma_is_that_answer() -> None:
    asimov = Example("Books by Asimov:\n1. Nemesis\n2.", "Asimov", ("I, Robot", "Foundation", "Nemesis"), ("Nemesis",))
    assert score_items(asimov, parse_items(" I, Robot\n3. I, Robot, 1950", 2, asimov), 2) == ["correct_new", "repeat"]
    assert parse_items(" Foundation, a novel", 1, asimov) == ["Foundation"]
    assert parse_items(" I, Claudius", 1, asimov) == ["I"]


# --- generating -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2", "opt"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def ragged(task: Task) -> Task:
    """The same prompts with different lengths in one batch."""
    from dataclasses import replace

    return Task(
        task.name,
        tuple(replace(e, prompt="and then " * (i % 4) + e.prompt) for i, e in enumerate(task.examples)),
    )


def test_batches_change_nothing(model: Any, cities: Task) -> None:
    tokenizer = tiny_tokenizer()
    task = ragged(cities.limited(6))
    alone = generate_lists(model, tokenizer, task, n_items=2, batch_size=1)
    together = generate_lists(model, tokenizer, task, n_items=2, batch_size=4)
    assert together == alone
    assert [scored.example for scored in alone] == list(task.examples), "results come in the task's order"
    assert len({scored.text for scored in alone}) > 3, "the texts must differ for this test to say anything"
    # And each is what the model writes on that prompt with no tokenizer tricks at all.
    for scored in alone[:3]:
        tokens = tokenizer(scored.example.prompt, return_tensors="pt").input_ids
        for _ in range(5):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        written = tokenizer.decode(tokens[0], skip_special_tokens=True)[len(scored.example.prompt) :]
        assert scored.text.startswith(written) or written.startswith(scored.text)


def scripted(text: str) -> Any:
    """A model that, in `generate`, writes `text` and ends, whatever the prompt."""
    tokenizer = tiny_tokenizer()
    script = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    model = tiny_model("gpt2")
    position = 0

    def write(_module: Any, _args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal position
        if output.past_key_values is not None:  # without a cache it is not generating
            first = output.past_key_values.get_seq_length() == kwargs["input_ids"].shape[1]
            position = 0 if first else position + 1
            output.logits.fill_(-100.0)
            output.logits[..., script[min(position, len(script) - 1)]] = 100.0
        return output

    model.register_forward_hook(write, with_kwargs=True)
    return model


def test_generation_stops_after_the_items_asked_for(cities: Task) -> None:
    model = scripted(" Rome\n4. Tokyo\n5. Paris\n6. Lyon\n7. Kobe\n")
    for n_items, expected in ((1, " Rome\n"), (2, " Rome\n4. Tokyo\n"), (3, " Rome\n4. Tokyo\n5. Paris\n")):
        (scored, *_) = generate_lists(model, tiny_tokenizer(), cities.limited(3), n_items, max_new_tokens=40)
        assert scored.text == expected
        assert scored.items == ("Rome", "Tokyo", "Paris")[:n_items]


def test_the_end_of_text_ends_a_list(cities: Task) -> None:
    model = scripted(" Rome\n4. Tokyo")
    (scored,) = generate_lists(model, tiny_tokenizer(), cities.limited(1), 3, max_new_tokens=40)
    assert scored.text == " Rome\n4. Tokyo"
    assert scored.kinds[2] == "missing" and len(scored.kinds) == 3


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_the_tokenizer_is_put_back(pad: str | None, cities: Task) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = pad, "right"
    generate_lists(tiny_model("llama"), tokenizer, cities.limited(3), 1, 2)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (pad, "right")


def test_the_tokenizer_is_put_back_after_an_error(cities: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    tokenizer.pad_token, tokenizer.padding_side = None, "right"

    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_lists(model, tokenizer, cities, 1, 2)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")


def test_sampling_follows_its_seed(cities: Task) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first, again, other = (
        [s.text for s in generate_lists(model, tokenizer, cities.limited(3), 1, 8, sample_seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


# --- numbers ----------------------------------------------------------------------------------------------------------


def slow_perplexity(model: Any, tokens: list[int], window: int) -> float:
    """Token by token: each is predicted from those before it in its window."""
    total = 0.0
    for position in range(1, len(tokens)):
        start = (position - 1) // window * window
        with torch.no_grad():
            row = model(torch.tensor([tokens[start:position]]), use_cache=False).logits[0, -1].double()
        total -= math.log(row.softmax(-1)[tokens[position]].item())
    return math.exp(total / (len(tokens) - 1))


@pytest.mark.parametrize("window", [1, 5, 8, 100])
def test_perplexity_is_the_slow_one(window: int) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    text = "List five cities in Italy.\n1. Rome\n2. Milan"
    tokens = tokenizer(text).input_ids
    assert len(tokens) > 12
    assert perplexity(model, tokenizer, text, window) == pytest.approx(slow_perplexity(model, tokens, window), rel=1e-5)


def test_the_neutral_text_is_long_enough_to_mean_something() -> None:
    assert len(neutral_text().split()) > 500


def test_answer_mass_is_the_direct_sum(model: Any, cities: Task) -> None:
    encoded = encode(cities, tiny_tokenizer())
    remaining, previous = answer_mass(model, encoded)
    assert len(remaining) == len(previous) == len(encoded.examples)
    for index, example in enumerate(encoded.examples[:6]):
        with torch.no_grad():
            p = model(example.tokens[None], use_cache=False).logits[0, -1].double().softmax(-1)
        assert remaining[index] == pytest.approx(sum(p[t].item() for t in set(example.target_tokens)), rel=1e-4)
        assert previous[index] == pytest.approx(sum(p[t].item() for t in set(example.previous_tokens)), rel=1e-4)


def test_answer_mass_counts_a_first_token_once() -> None:
    """Two given answers with the same first token are one entry of the distribution."""
    example = Example(
        "Cities in America:\n1. New York\n2. New Boston\n3.", "America", ("Denver",), ("New York", "New Boston")
    )
    encoded = encode(Task("x", (example,)), tiny_tokenizer())
    assert len(encoded.examples[0].previous_tokens) == 2 and len(set(encoded.examples[0].previous_tokens)) == 1
    model = tiny_model("llama")
    with torch.no_grad():
        p = model(encoded.examples[0].tokens[None], use_cache=False).logits[0, -1].softmax(-1)
    assert answer_mass(model, encoded)[1][0] == pytest.approx(
        p[encoded.examples[0].previous_tokens[0]].item(), rel=1e-4
    )


def test_evaluate_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "neutral_text", lambda: "List five cities in Italy and then Japan.")
    task = tiny_task(subjects=4)
    model, tokenizer = scripted(" Rome\n4. Rome\n5. Tokyo\n"), tiny_tokenizer()
    metrics, lists = evaluate(model, tokenizer, task, n_items=4, batch_size=3)
    assert sum(metrics[f"{kind}_rate"]["mean"] for kind in KINDS) == pytest.approx(1.0)
    assert metrics["missing_rate"]["mean"] == pytest.approx(1 / 4)  # three written, four asked for
    for kind in KINDS:
        counted = sum(scored.kinds.count(kind) for scored in lists) / (4 * len(lists))
        assert metrics[f"{kind}_rate"]["mean"] == pytest.approx(counted)
        low, high = metrics[f"{kind}_rate"]["ci"]
        assert low <= counted <= high
    assert metrics["n"] == {
        "examples": 8,
        "items": 32,
        "subjects": 4,
        "first_token_examples": len(encode(task, tokenizer).examples),
        "dropped": {},
    }
    assert metrics["neutral_perplexity"] > 1
