"""Lists are read and scored as a person would; generation in batches and every number equal slow references."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from headtune.analysis.tasks.task import Example, Kind, Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.train.evaluation import evaluate as evaluation
from headtune.train.evaluation.evaluate import (
    KINDS,
    answer_mass,
    evaluate,
    generate_answers,
    generate_lists,
    neutral_text,
    parse_items,
    perplexity,
    read_answer,
    score_choices,
    score_items,
    score_task,
)
from headtune.train.evaluation.multiple_choice import choice_log_likelihoods, choices, multiple_choice
from helpers.tiny import tiny_model, tiny_task, tiny_tokenizer

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


# --- one answer -------------------------------------------------------------------------------------------------------

CITY = Example("The city of the arch is", "arch", ("St. Louis", "Saint-Louis, Missouri", "The Gateway City"))


@pytest.mark.parametrize(
    ("text", "answer", "exact", "prefix"),
    [
        (" St. Louis", "St. Louis", 1, 1),
        (" st louis.\nQ: next", "st louis.", 1, 1),
        (" Saint Louis! It is big", "Saint Louis", 1, 1),
        (" St. Louis. It is big", "St. Louis", 1, 1),  # the longest part that is an answer, not "St"
        (" Saint-Louis, Missouri", "Saint-Louis, Missouri", 1, 1),
        (" the gateway city; also", "the gateway city", 1, 1),
        ("\n\n  St. Louis\n", "St. Louis", 1, 1),  # the first line that is not blank
        (' "St. Louis".', '"St. Louis".', 1, 1),
        (" St. Louis, Missouri", "St", 0, 1),
        (" St. Louis and Rome", "St", 0, 1),
        (" St. Louisville", "St", 0, 0),  # no word ends there
        (" Rome. St. Louis", "Rome", 0, 0),
        (" It is St. Louis", "It is St", 0, 0),
        (" Rome\nSt. Louis", "Rome", 0, 0),
        ("", "", 0, 0),
        ("  \n \n", "", 0, 0),
        ("...", "...", 0, 0),
    ],
)
def test_read_answer(text: str, answer: str, exact: int, prefix: int) -> None:
    assert read_answer(text, CITY) == (answer, exact, prefix)


def test_the_longest_answer_is_read() -> None:
    example = Example("X is", "X", ("St", "St. Louis"))
    assert read_answer(" St. Louis. Big", example) == ("St. Louis", 1, 1)
    assert read_answer(" St. Paul", example) == ("St", 1, 1)


def test_an_alias_without_letters_accepts_nothing() -> None:
    example = Example("X is", "X", ("Rome", "..."))
    assert read_answer(" ...", example) == ("...", 0, 0) and read_answer("", example) == ("", 0, 0)
    assert read_answer(" Rome", example) == ("Rome", 1, 1)


def facts() -> Task:
    rows = (("Italy", ("Rome", "New York and then Rome")), ("Japan", ("Tokyo",)), ("Some cities in France", ("Paris",)))
    return Task("f", tuple(Example(f"cities in {s}:", s, a) for s, a in rows), kind="exact_match")


def test_answers_in_batches_are_those_alone(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    task = replace(ragged(tiny_task()), kind="exact_match")
    alone = generate_answers(model, tokenizer, task, batch_size=1)
    assert alone == generate_answers(model, tokenizer, task, batch_size=5)
    assert [scored.example for scored in alone] == list(task.examples)
    longest = max(len(tokenizer(f" {a}").input_ids) for e in task.examples for a in e.answers)
    for scored in alone[:4]:
        tokens = tokenizer(scored.example.prompt, return_tensors="pt").input_ids
        length = tokens.shape[1]
        while tokens.shape[1] < length + longest + 8 and "\n" not in tokenizer.decode(tokens[0, length:]).lstrip():
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            if tokens[0, -1] == tokenizer.eos_token_id:
                break
        assert scored.text == tokenizer.decode(tokens[0, length:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "exact", "prefix", "kinds"),
    [
        (" Rome\nTokyo\n", 1 / 3, 1 / 3, ["correct", "wrong", "wrong"]),
        (" Tokyo. Rome\n", 1 / 3, 1 / 3, ["wrong", "correct", "wrong"]),
        (" Tokyo and Rome\n", 0, 1 / 3, ["wrong"] * 3),
        ("", 0, 0, ["missing"] * 3),
    ],
)
def test_evaluate_of_one_answer(
    text: str, exact: float, prefix: float, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "neutral_text", lambda: "List five cities in Italy and then Japan.")
    metrics, scored = evaluate(scripted(text), tiny_tokenizer(), facts(), batch_size=2)
    assert set(metrics) == {"exact_match", "prefix_match", "neutral_perplexity", "n"}
    assert metrics["exact_match"]["mean"] == pytest.approx(exact)
    assert metrics["prefix_match"]["mean"] == pytest.approx(prefix)
    low, high = metrics["exact_match"]["ci"]
    assert low <= exact <= high and low < high, "three answers, right or wrong, leave room for doubt"
    assert [list(one.kinds) for one in scored] == [[kind] for kind in kinds]
    assert all(one.text.count("\n") <= 1 and "Tokyo\n" not in one.text for one in scored), "one line is written"
    assert metrics["n"] == {"examples": 3, "subjects": 3}
    assert all(set(one.values) == {"exact_match", "prefix_match"} for one in scored)


# --- multiple choice --------------------------------------------------------------------------------------------------


def test_evaluate_of_multiple_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "neutral_text", lambda: "List five cities in Italy and then Japan.")
    examples = [
        Example(f"Q: {s}\nA:", s, ("Rome", "Milan and then Naples"), incorrect=("Tokyo", "Kobe", wrong))
        for s, wrong in (("Italy", "Paris"), ("Spain", "Lyon"), ("Some cities", "Nice"))
    ]
    task, model, tokenizer = Task("q", tuple(examples), kind="multiple_choice"), tiny_model("llama"), tiny_tokenizer()
    metrics, scored = evaluate(model, tokenizer, task, batch_size=2, preamble="Q: Japan\nA: Tokyo")
    assert set(metrics) == {"mc1", "mc2", "mc1_norm", "neutral_perplexity", "n"}
    assert metrics["n"] == {"examples": 3, "subjects": 3, "choices": 15}
    rows = choice_log_likelihoods(model, tokenizer, task, 16, "Q: Japan\nA: Tokyo")
    assert rows != choice_log_likelihoods(model, tokenizer, task)
    for one, example, row in zip(scored, examples, rows, strict=True):
        assert one.example is example
        assert one.values == pytest.approx(multiple_choice(example, row), abs=1e-4)
        top = row.index(max(row))
        assert one.items == (one.text,) == (choices(example)[top],)
        assert one.kinds == (("best", "correct", *["incorrect"] * 3)[top],)
    for name in ("mc1", "mc2", "mc1_norm"):
        assert metrics[name]["mean"] == pytest.approx(sum(one.values[name] for one in scored) / 3)


@pytest.mark.parametrize(
    ("likeliest", "kind"), [(0, "best"), (1, "correct"), (2, "correct"), (3, "incorrect"), (4, "incorrect")]
)
def test_the_kind_of_the_likeliest_choice(likeliest: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example("Q: ?\nA:", "?", ("a", "b", "c"), incorrect=("d", "e"))
    row = [-1.0 if index == likeliest else -2.0 for index in range(5)]
    monkeypatch.setattr(evaluation, "choice_log_likelihoods", lambda *_: [row])
    (one,) = score_choices(tiny_model("llama"), tiny_tokenizer(), Task("q", (example,), kind="multiple_choice"))
    assert (one.text, one.items, one.kinds) == ("abcde"[likeliest], ("abcde"[likeliest],), (kind,))


def test_a_preamble_is_for_multiple_choice() -> None:
    with pytest.raises(InputError, match="task 'f' is no multiple choice but exact_match; leave the preamble out"):
        evaluate(tiny_model("llama"), tiny_tokenizer(), facts(), preamble="Q: ?")


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


def slow_perplexity_behind(model: Any, prefix: list[int], tokens: list[int], window: int) -> float:
    """Token by token, each predicted from the prefix and those before it in its window, which starts anew behind it.

    The first window has the prefix among its `window` tokens.
    """
    total = 0.0
    for position in range(len(tokens)):
        start = max(0, (position + len(prefix) - 1) // window * window - len(prefix))
        with torch.no_grad():
            row = model(torch.tensor([prefix + tokens[start:position]]), use_cache=False).logits[0, -1].double()
        total -= math.log(row.softmax(-1)[tokens[position]].item())
    return math.exp(total / len(tokens))


@pytest.mark.parametrize("window", [3, 5, 8, 100])
def test_every_window_begins_with_what_the_tokenizer_puts_in_front(window: int) -> None:
    model, text = tiny_model("gpt2", n_positions=9), "List five cities in Italy.\n1. Rome\n2. Milan"
    plain = tiny_tokenizer()(text).input_ids
    expected = slow_perplexity_behind(model, [1], plain, min(window, 8))
    assert perplexity(model, tiny_tokenizer(bos=True), text, window) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tiny_tokenizer(bos=True, eos=True), text, window) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tiny_tokenizer(), text, window) != pytest.approx(expected, rel=1e-3)


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


@pytest.mark.parametrize("kind", ["lists", "exact_match"])
def test_what_is_written_must_fit_into_the_model(kind: Kind) -> None:
    task, tokenizer = replace(tiny_task(subjects=2), kind=kind), tiny_tokenizer()
    longest = max(len(ids) for ids in tokenizer([example.prompt for example in task.examples]).input_ids)
    names = {answer for example in task.examples for answer in example.answers}
    more = 12 * 2 if kind == "lists" else 8 + max(len(tokenizer(" " + name).input_ids) for name in names)
    score_task(tiny_model("gpt2", n_positions=longest + more), tokenizer, task, n_items=2)
    with pytest.raises(InputError, match=f"{longest} tokens and what comes after it up to {more}, and the model takes"):
        score_task(tiny_model("gpt2", n_positions=longest + more - 1), tokenizer, task, n_items=2)


def test_answer_mass_counts_a_first_token_once() -> None:
    """Two given answers with the same first token are one entry of the distribution."""
    example = Example(
        "Cities in America:\n1. New York\n2. New Boston\n3.", "America", ("Denver",), ("New York", "New Boston")
    )
    encoded = encode(Task("x", (example,)), tiny_tokenizer())
    assert len(encoded.examples[0].previous) == 2 and len(encoded.examples[0].previous_tokens) == 1
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
        assert [one.values[f"{kind}_rate"] for one in lists] == [one.kinds.count(kind) / 4 for one in lists]
    assert metrics["n"] == {
        "examples": 8,
        "items": 32,
        "subjects": 4,
        "first_token_examples": len(encode(task, tokenizer).examples),
        "dropped": {},
    }
    assert metrics["neutral_perplexity"] > 1


def test_numbers_are_items_and_no_markers() -> None:
    assert parse_items(" 3.14\n2.72", 3) == ["3.14", "2.72"]
    assert parse_items(" -5\n-6", 3) == ["-5", "-6"]
    assert parse_items(" Rome\n2. Milan\n- Turin", 3) == ["Rome", "Milan", "Turin"]
