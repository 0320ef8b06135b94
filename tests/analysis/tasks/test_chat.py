"""Prompts as chats: the template's own words, thoughts, conversations, and what templates do wrong."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from headtune.analysis.tasks.chat import as_chat, continued, turn_end, turns_of, with_chat
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.messages import ChatTemplate, chat_as_json, chat_from_json, chat_in_words
from headtune.analysis.tasks.task import Task, parse_example, task_lines, to_jsonl
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import tiny_task, tiny_tokenizer

# As most templates are: a beginning of text, roles by special tokens, an end for each turn, a generation prompt.
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ROW = {"prompt": "The largest city in Italy is", "subject": "Italy", "answers": ["Rome"]}
LIST = {
    "prompt": "List five cities in Italy.\n1. Rome\n2.",
    "subject": "Italy",
    "answers": ["Rome", "Milan"],
    "previous": ["Rome"],
}


def asked(*contents: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant, by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


TALK = {
    "messages": asked("What is in Italy?", "Many cities.", "Which is largest?"),
    "subject": "Italy",
    "answers": ["Rome"],
}
BEGUN = {
    "messages": asked("List cities in Italy.", "1. Rome\n2."),
    "subject": "Italy",
    "answers": ["Rome", "Milan"],
    "previous": ["Rome"],
}


def speaker(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <bos> in front, with a chat template."""
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = template
    return tokenizer


def beginning(start: str) -> PreTrainedTokenizerFast:
    """One whose template begins the assistant's turn with `start`."""
    return speaker(CHATML.replace("<|assistant|>\n{% endif", f"{start}{{% endif"))


def chat(*rows: dict[str, Any], how: bool | ChatTemplate = True) -> Task:
    return Task("chat", tuple(parse_example(row, "here") for row in rows), how)


def written(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], how: bool | ChatTemplate = True) -> str:
    return as_chat(chat(row, how=how), tokenizer).examples[0].prompt


# --- thoughts ---------------------------------------------------------------------------------------------------------

USER = "<bos><|user|>\nThe largest city in Italy is<eos>\n"


@pytest.mark.parametrize(
    ("start", "closed"),
    [
        ("<|assistant|><think>\n", "<|assistant|><think>\n\n</think>\n\n"),
        ("<|assistant|><think>", "<|assistant|><think>\n\n</think>\n\n"),
        ("<|assistant|>\n<thinking>\n", "<|assistant|>\n<thinking>\n\n</thinking>\n\n"),
        ("[THINK]", "[THINK]\n\n[/THINK]\n\n"),
        ("◁think▷", "◁think▷\n\n◁/think▷\n\n"),
        ("<seed:think>\n", "<seed:think>\n\n</seed:think>\n\n"),
        ("<|START_THINKING|>", "<|START_THINKING|>\n\n<|END_THINKING|>\n\n"),
        ("<|begin_of_thought|>\n", "<|begin_of_thought|>\n\n<|end_of_thought|>\n\n"),
        ("<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>"),
        # What is closed, or opens none, stays.
        ("<|assistant|>\n<think>\n\n</think>\n\n", "<|assistant|>\n<think>\n\n</think>\n\n"),
        ("<|Assistant|></think>", "<|Assistant|></think>"),
        ("<|assistant|>\n", "<|assistant|>\n"),
        ("<reserved_107>", "<reserved_107>"),
    ],
)
def test_a_thought_that_the_template_opens_is_closed(start: str, closed: str) -> None:
    tokenizer = beginning(start)
    assert written(tokenizer, ROW) == USER + closed
    # A list goes on in the assistant's turn, behind the thought, and the answer comes at its end.
    (encoded,) = encode(chat(LIST), tokenizer).examples
    assert encoded.example.prompt == "<bos><|user|>\nList five cities in Italy.<eos>\n" + closed + "1. Rome\n2."
    assert encoded.target_tokens == (tokenizer(" Milan", add_special_tokens=False).input_ids[0],)


def test_a_thought_whose_end_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"begins a reply with '<\|thinking_start\|>', a thought whose end") as error:
        written(beginning("<|thinking_start|>"), ROW)
    assert "\n" not in str(error.value)


def test_a_users_own_words_on_thoughts_open_none() -> None:
    row = ROW | {"prompt": "In Italy say <think> or"}
    assert written(speaker(), row) == "<bos><|user|>\nIn Italy say <think> or<eos>\n<|assistant|>\n"
    # Nor where the template always begins a reply, whatever it is asked for.
    always = CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
    assert written(speaker(always), row).endswith("<eos>\n<|assistant|>")
    assert written(speaker(always + "<think>"), row).endswith("<|assistant|>\n<think>\n\n</think>\n\n")


SWITCHED = CHATML.replace(
    "<|assistant|>\n{% endif",
    "<|assistant|>\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif",
)


def test_the_template_is_told_not_to_think(caplog: pytest.LogCaptureFixture) -> None:
    assert written(speaker(SWITCHED), ROW).endswith("<|assistant|>\n<think>\n\n</think>\n\n")
    assert not caplog.records
    # Told to think it opens no thought itself; that the model may is said where an answer is the first word.
    with caplog.at_level(logging.WARNING):
        assert written(speaker(SWITCHED), ROW, ChatTemplate(enable_thinking=True)).endswith("<|assistant|>\n")
    assert "the model may begin its reply with a thought" in caplog.text
    caplog.clear()
    assert written(speaker(SWITCHED), LIST, ChatTemplate(enable_thinking=True)).endswith("1. Rome\n2.")
    assert not caplog.records
    opening = SWITCHED.replace("{% if enable_thinking is false %}", "{% if enable_thinking %}<think>\n{% else %}")
    assert written(speaker(opening), ROW, ChatTemplate(enable_thinking=True)).endswith("<think>\n\n</think>\n\n")
    assert not caplog.records
    named_otherwise = SWITCHED.replace("enable_thinking", "thinking")
    assert written(speaker(named_otherwise), ROW).endswith("</think>\n\n")


def test_thinking_that_the_template_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match=r"enable_thinking changes nothing in the chat template"):
        written(speaker(), ROW, ChatTemplate(enable_thinking=True))


# Generation prompts and ends of turns of published templates, which TRL carries.
PUBLISHED = {
    "deepseek_r1_distill": ("<｜Assistant｜><think>\n\n</think>\n\n", "<｜end▁of▁sentence｜>"),
    "qwen3": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen3_5_think": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen2_5": ("<|im_start|>assistant\n", "<|im_end|>"),
    "glm4moe": ("/nothink<|assistant|>\n<think></think>", "<eos>"),
    "nemotron_3_nano": ("<|im_start|>assistant\n<think></think>", "<|im_end|>"),
    "gemma4_v5": ("<|turn>model\n", "<turn|>"),
    "gptoss": ("<|start|>assistant<|channel|>final<|message|>", "<|return|>"),
    "cohere2": ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "gemma3": ("<start_of_turn>model\n", "<end_of_turn>"),
    "llama3_1": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "phi3": ("<|assistant|>\n", "<|end|>"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(name: str) -> None:
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of TRL does not carry {name}")
    tokenizer, (start, end) = speaker(path.read_text(encoding="utf-8")), PUBLISHED[name]
    for row, reply in ((ROW, ""), (LIST, "1. Rome\n2."), (TALK, ""), (BEGUN, "1. Rome\n2.")):
        assert written(tokenizer, row).endswith(start + reply)
        assert turn_end(chat(row), tokenizer) == end
        (encoded,) = encode(chat(row), tokenizer).examples
        assert tokenizer.decode(encoded.tokens[list(encoded.subject)]).strip() == "Italy"
        assert encoded.tokens.tolist().count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", ["qwen3_5_think", "gemma4_v5", "nemotron_3_nano", "qwen3"])
def test_published_templates_told_to_think(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A thought that is opened is closed; of one that the model may begin itself there is a warning."""
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of TRL does not carry {name}")
    with caplog.at_level(logging.WARNING):
        text = written(speaker(path.read_text(encoding="utf-8")), ROW, ChatTemplate(enable_thinking=True))
    closed = text.endswith("<think>\n\n</think>\n\n")
    assert closed is (name in ("qwen3_5_think", "nemotron_3_nano"))
    assert ("may begin its reply with a thought" in caplog.text) is not closed


# --- what templates do wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System message is required') }}", r"refuses a user turn \(System message is required\)"),
        ("{% for m in messages %}{{ m['content']", r"refuses a user turn \(unexpected end of template"),
        ("{{ messages[0].content + 1 }}", r"refuses a user turn \(can only concatenate str"),
        ("{{ messages[0].date.year }}", r"refuses a user turn \('dict object' has no attribute 'date'\)"),
        ("{{ 1 / 0 }}", r"refuses a user turn \(division by zero\)"),
        ("{{ messages[0].content | upper }}", "does not keep the user's text 'The largest city in Italy is' as it is"),
        ("{{ messages[0].content[:8] }}", "does not keep the user's text 'The largest city in Italy is' as it is"),
        ("always the same", "does not keep the user's text"),
    ],
)
def test_what_a_template_does_wrong_is_one_line(template: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        encode(chat(ROW), speaker(template))
    assert "\n" not in str(error.value) and str(error.value).endswith("mend the template")


def test_a_template_that_asks_for_a_system_turn_says_how_to_give_one() -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('System turn needed') }}{% endif %}" + CHATML
    with pytest.raises(InputError, match=r"give the text of a system turn \(chat_template.system\), leave"):
        written(speaker(template), ROW)
    assert "<|system|>\nBe short.<eos>" in written(speaker(template), ROW, ChatTemplate("Be short."))


def test_several_templates_without_a_default() -> None:
    tokenizer = speaker()
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(InputError, match="no default specified"):
        written(tokenizer, ROW)
    tokenizer.chat_template = {"tool_use": "x", "default": CHATML}
    assert written(tokenizer, ROW) == USER + "<|assistant|>\n"


# --- a system text ----------------------------------------------------------------------------------------------------


def test_a_system_text() -> None:
    how = ChatTemplate(system="Name Italy at once.")
    assert written(speaker(), ROW, how) == "<bos><|system|>\nName Italy at once.<eos>\n" + USER[5:] + "<|assistant|>\n"
    # The subject is the user's, not the system text's.
    (encoded,) = encode(chat(ROW, how=how), speaker()).examples
    before = speaker().decode(encoded.tokens[: encoded.subject[0]])
    assert before.endswith("The largest city in")
    assert chat(ROW, how=how).sha256 != chat(ROW).sha256 != chat(ROW, how=False).sha256
    assert chat(ROW, how=ChatTemplate()).sha256 == chat(ROW).sha256


def test_a_system_text_before_the_last_question() -> None:
    """Where Mistral's templates put it."""
    late = (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last %}{{ s }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    text = written(speaker(late), TALK, ChatTemplate("Be short."))
    assert text == (
        "<bos>[INST] What is in Italy?[/INST] Many cities.<eos>[INST] Be short.\n\nWhich is largest?[/INST]"
    )
    (encoded,) = encode(chat(TALK, how=ChatTemplate("Be short.")), speaker(late)).examples
    assert speaker().decode(encoded.tokens[list(encoded.subject)]) == " Italy"
    assert encoded.target_tokens == (speaker()(" Rome", add_special_tokens=False).input_ids[0],)


def test_a_system_text_that_cannot_be_written() -> None:
    how = ChatTemplate(system="Be short.")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(InputError, match=r"refuses turns of system, user \(no system role\); leave chat_template.sys"):
        written(speaker(refusing), ROW, how)
    dropping = CHATML.replace("for m in messages %}", "for m in messages if m.role != 'system' %}")
    with pytest.raises(InputError, match=r"does not keep the system's text 'Be short.' as it is"):
        written(speaker(dropping), ROW, how)
    row = ROW | {"prompt": None, "messages": [{"role": "system", "content": "Be long."}, *asked("Where is Italy?")]}
    with pytest.raises(InputError, match=r"system turn of its own \('Be long.'\), and chat_template.system is another"):
        written(speaker(), row, how)


def test_settings_as_files_keep_them() -> None:
    how = ChatTemplate("Be short.", enable_thinking=True)
    for chat, stored in ((False, False), (True, True), (how, {"system": "Be short.", "enable_thinking": True})):
        assert chat_as_json(chat) == stored and chat_from_json(stored) == chat
    assert chat_as_json(ChatTemplate()) is True and chat_from_json(None) is False
    words = [chat_in_words(chat) for chat in (False, True, ChatTemplate(), how)]
    assert words == ["plain prompts", "chats", "chats", "chats (system 'Be short.', enable_thinking)"]


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_conversation_in_the_template() -> None:
    tokenizer = speaker()
    text = written(tokenizer, TALK)
    assert text == tokenizer.apply_chat_template(TALK["messages"], tokenize=False, add_generation_prompt=True)
    # A begun turn goes on, as transformers has it.
    begun = written(tokenizer, BEGUN)
    assert begun == tokenizer.apply_chat_template(BEGUN["messages"], tokenize=False, continue_final_message=True)
    (encoded,) = encode(chat(BEGUN), tokenizer).examples
    ids = encoded.tokens.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(ids) == begun
    assert tokenizer.decode([ids[i] for i in encoded.previous[0]]) == " Rome"
    assert encoded.target_tokens == (tokenizer(" Milan", add_special_tokens=False).input_ids[0],)
    # Without a begun turn the answer is the first word of the reply.
    (encoded,) = encode(chat(TALK), tokenizer).examples
    assert encoded.target_tokens == (tokenizer("Rome", add_special_tokens=False).input_ids[0],)


def test_conversations_need_a_template() -> None:
    with pytest.raises(InputError, match="has no chat template; task 'chat' is of messages: use a chat model, or give"):
        encode(chat(TALK), tiny_tokenizer())


def test_a_list_and_the_same_as_a_conversation() -> None:
    row = BEGUN | {"messages": asked("List five cities in Italy.", "1. Rome\n2.")}
    assert written(speaker(), row) == written(speaker(), LIST)


def test_thoughts_of_earlier_turns_may_be_left_out() -> None:
    """As the templates of models that think do; other words of the assistant may not."""
    strips = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] | trim }}")
    row = TALK | {"messages": asked("What is in Italy?", "<think>hm</think>\nMany cities.", "Which is largest?")}
    assert "<|assistant|>\nMany cities.<eos>" in written(speaker(strips), row)
    cut = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else 'x' }}")
    with pytest.raises(InputError, match=r"does not keep the assistant's text 'Many cities.' as it is"):
        written(speaker(cut), TALK)


def test_spans_of_a_conversation() -> None:
    tokenizer = speaker(CHATML.replace("m.content", "m.content | trim"))
    row = BEGUN | {"spans": {"given": ["Rome"], "what": ["cities"]}}
    row["messages"] = [{"role": "system", "content": "In Italy?"}, *asked(" List cities in Italy.", "1. Rome\n2.")]
    (encoded,) = encode(chat(row), tokenizer).examples
    texts = {name: tokenizer.decode(encoded.tokens[list(at)]) for name, at in encoded.spans.items()}
    assert texts == {"given": " Rome", "what": " cities"}
    assert tokenizer.decode(encoded.tokens[list(encoded.subject)]) == " Italy"  # the first, in the system's turn
    assert encoded.subject[0] < encoded.spans["what"][0]
    across = row | {"spans": {"both": ["Italy.\n\n1."]}}
    with pytest.raises(InputError, match=r"span 'both': the chat template does not keep 'Italy.\\n\\n1.' as it is"):
        encode(chat(across), tokenizer)


def test_a_subject_that_the_template_changes() -> None:
    """White space around it is trimmed away."""
    row = {"messages": asked("Italy \nis where?"), "subject": "Italy \nis", "answers": ["Rome"]}
    assert encode(chat(row), speaker()).examples
    row = {"prompt": "Italy is\n", "subject": "Italy is\n", "answers": ["Rome"]}
    assert encode(chat(row), speaker()).examples
    with pytest.raises(InputError, match=r"about 'Italy is.n': the chat template does not keep its subject as it is"):
        encode(chat(row), speaker(CHATML.replace("m.content", "m.content | trim")))


def test_conversations_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"

    def load(*rows: dict[str, Any]) -> Task:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_task(str(path))

    task = load(TALK)
    assert task.chat_template is True and task.kind == "exact_match"
    assert task.examples[0].prompt == "What is in Italy?\n\nMany cities.\n\nWhich is largest?"
    assert load(BEGUN).kind == "lists" and load(BEGUN).chat_template is True
    # Written and read again it is the same, whoever writes it.
    again = load(*map(json.loads, task_lines(task)))
    assert again.examples == task.examples and again.sha256 == task.sha256
    stored = json.loads(to_jsonl(task.examples))
    assert stored["messages"] == TALK["messages"] and "prompt" not in stored
    # A table of the hub has both columns, one of them empty.
    assert parse_example(TALK | {"prompt": None, "corrupt": None}, "here") == task.examples[0]
    assert parse_example(ROW | {"messages": None}, "here").messages == ()
    with pytest.raises(InputError, match=r"jsonl:2: lines with 'messages' and with 'prompt' in one task"):
        load(TALK, ROW)
    with pytest.raises(InputError, match="only a chat template writes; leave chat_template on"):
        with_chat(task, False)
    assert with_chat(task, None) is task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "'messages' must be a list of at least one turn"),
        ({"messages": "Hi"}, "'messages' must be a list of at least one turn"),
        ({"messages": [{"role": "user", "content": "Italy", "name": "A"}]}, "turn 1 of 'messages' must be"),
        ({"messages": [{"role": "usr", "content": "Italy"}]}, "role 'usr' is unknown; did you mean 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'content' must be text"),
        ({"messages": [{"role": "user", "content": " "}]}, "'content' must be text"),
        ({"messages": [*asked("Italy"), {"role": "system", "content": "x"}]}, "turn 2 .* is the system's, which comes"),
        ({"messages": [{"role": "assistant", "content": "Italy"}]}, "no turn of the user"),
        ({"messages": asked("France")}, "does not contain its subject 'Italy'"),
        ({"messages": asked("Italy", "1. ")}, "ends in a space"),
        ({"prompt": "Italy"}, "takes no 'prompt'"),
        ({"corrupt": "France"}, "takes no 'corrupt'"),
        ({"message": []}, "unknown key 'message'; did you mean 'messages'"),
    ],
)
def test_faults_of_conversations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_example(TALK | change, "talk.jsonl line 1")
    assert str(error.value).startswith("talk.jsonl line 1") and "\n" not in str(error.value)


# --- replies that go on -----------------------------------------------------------------------------------------------


def test_a_reply_that_the_model_goes_on_with() -> None:
    """The user's turn stays the user's, whether the list had begun or not."""
    tokenizer = speaker()
    begun = continued(parse_example(LIST, "here"), " Milan\n3.", ["Rome", "Milan"], True)
    new = continued(parse_example(ROW, "here"), "1. Rome\n2.", ["Rome"], True)
    talk = continued(parse_example(TALK, "here"), "1. Rome\n2.", ["Rome"], True)
    for example, before, reply in (
        (begun, LIST, "1. Rome\n2. Milan\n3."),
        (new, ROW, "1. Rome\n2."),
        (talk, TALK, "1. Rome\n2."),
    ):
        turns, _ = turns_of(parse_example(before, "here"))
        assert turns_of(example) == (turns, reply)
        (shown,) = as_chat(Task("more", (example,), True), tokenizer).examples
        start = written(tokenizer, before)
        assert shown.prompt == start[: len(start) - len(turns_of(parse_example(before, "here"))[1])] + reply
        assert parse_example(json.loads(to_jsonl([replace(example, answers=("Rome", "Bonn"), previous=())])), "here")
    plain = continued(parse_example(LIST, "here"), " Milan\n3.", ["Rome", "Milan"], False)
    assert plain.prompt == LIST["prompt"] + " Milan\n3." and not plain.messages


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<eos>"),
        (CHATML.replace("<eos>\n", "\n"), "<eos>"),  # none of its own: the end of the text
        ("{% for m in messages %}[INST]{{ m.content }}[/END] </s>\n{% endfor %}", "[/END] </s>"),
    ],
)
def test_the_end_of_a_turn(template: str, end: str) -> None:
    assert turn_end(chat(ROW), speaker(template)) == end
    assert turn_end(chat(ROW, how=False), speaker(template)) == ""


def test_a_template_without_an_assistants_turn() -> None:
    with pytest.raises(InputError, match="does not write an assistant's turn"):
        turn_end(chat(ROW), speaker("{{ messages[0].content }}"))


def test_all_subjects_keep_their_places() -> None:
    """Each prompt is the template around the same words, in whatever form the list is."""
    task = replace(tiny_task(previous=(0, 2)), chat_template=ChatTemplate(system="Give cities in Italy."))
    tokenizer = speaker()
    found = encode(task, tokenizer)
    assert not found.dropped and len(found.examples) == len(task.examples)
    for plain, encoded in zip(task.examples, found.examples, strict=True):
        assert encoded.example.prompt.startswith("<bos><|system|>\nGive cities in Italy.<eos>\n<|user|>\n")
        assert tokenizer.decode(encoded.tokens[list(encoded.subject)]).strip() == plain.subject
        ids = tokenizer("<|user|>", add_special_tokens=False).input_ids
        row = encoded.tokens.tolist()
        user = next(i for i in range(len(row)) if row[i : i + len(ids)] == ids)
        assert encoded.subject[0] > user
