"""A task's prompts in the tokenizer's own chat template, up to where the answer comes.

    task = replace(load_task("country_cities"), chat_template=ChatTemplate(system="Answer in one word."))
    as_chat(task, tokenizer).examples[0].prompt

The generation prompt (what begins the assistant's turn) is followed by the reply so far, if there is one: what
transformers writes with `continue_final_message`, where the template begins every assistant's turn alike. A thought
that the generation prompt opens is closed at once, since no answer is written inside one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headtune.analysis.utils.errors import InputError

from .messages import BETWEEN, ChatTemplate, Turns, as_rows, joined
from .spans import Ranges, ranges
from .task import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# What closes a thought, by what opens it. <NAME>, [NAME] and ◁NAME▷ need no row: their end has a slash.
_THOUGHTS: Mapping[str, str] = {
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
_TAG = re.compile(
    r"[<\[◁]\|?[^<>\[\]◁▷\s]*(?:think|thought|reason|reflect|scratchpad)[^<>\[\]◁▷\s]*\|?[>\]▷]",
    re.IGNORECASE,
)
_IS_END = re.compile(r"^[<\[◁]\|?(/|end)", re.IGNORECASE)
# A generation prompt after which the model first chooses a channel, and what chooses that of answers.
_CHANNELS = {"<|start|>assistant": "<|channel|>final<|message|>"}
_BULLET = r"(?:\d+[.)]|[-*•])"
# Of a whole reply: an introduction, a line that ends in a colon, and the first item's number or bullet.
_BEFORE_ITEMS = re.compile(rf"\s*(?:[^\n]*:[*_ \t]*\n\s*)?(?:{_BULLET}(?=\s))?")
LINES_BEFORE_ITEMS = 2  # an introduction and an empty line
_MARKER = "0answer0"  # stands for an answer where the end of a turn is read


@dataclass(frozen=True)
class _Rendered:
    """A conversation in the template, up to where the reply begins.

    Attributes:
        text: of it.
        places: (start, end) of each turn's text in it.
    """

    text: str
    places: Sequence[tuple[int, int]]


def with_chat(task: Task, chat: bool | ChatTemplate | None) -> Task:
    """The task given as chats, or as plain prompts; None leaves it as it is.

    Raises:
        InputError: conversations without a chat template.
    """
    if chat is None:
        return task
    if not chat and any(example.messages for example in task.examples):
        raise InputError(
            f"task {task.name!r} is of messages, which only a chat template writes; leave chat_template on"
        )
    return replace(task, chat_template=chat)


def settings_of(task: Task) -> ChatTemplate:
    """How a task's chats are written."""
    return task.chat_template if isinstance(task.chat_template, ChatTemplate) else ChatTemplate()


def as_chat(task: Task, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task with its prompts written out in the tokenizer's chat template, if it asks for that; else as it is.

    The user's turn is the text before the line of the first answer given, the assistant's turn has begun with the list:
    so the last token is still where the next answer comes. Where there is no such text, or no answer is given, the
    whole prompt is the user's turn, and the answer is the start of the reply. A `corrupt` prompt is written likewise:
    its reply has as many lines. Of an example with `messages`, these are the turns. Tokenise the result without special
    tokens: the template writes its own.

    Raises:
        InputError: the tokenizer has no chat template; the template raises an error, changes or leaves out a turn's
            text, or opens a thought that is not known how to close; a `corrupt` prompt has fewer lines than its
            prompt's list; a second system turn.
    """
    if not task.chat_template:
        return task
    return replace(task, examples=tuple(example for example, _ in chat_examples(task, tokenizer)))


def chat_examples(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Example, int]]:
    """The examples of `as_chat`, each with the character from where its subject is: the template may name it before the
    user does. -1: the template has changed it (white space around it, say)."""
    if not task.chat_template:
        return [(example, 0) for example in task.examples]
    if not tokenizer.chat_template:
        fix = "leave chat_template out"
        if any(example.messages for example in task.examples):
            fix = f"task {task.name!r} is of messages: use a chat model, or give the tokenizer a template"
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no chat template; {fix}")
    chat = settings_of(task)
    if chat.enable_thinking:
        _check_thinking(task, tokenizer)
    result = []
    for example in task.examples:
        turns, reply = turns_of(example)
        rendered = _rendered(tokenizer, turns, chat)
        written = rendered.text + reply
        pieces = _pieces(example, turns, reply, rendered)
        corrupt = None
        if example.corrupt is not None:
            user, other = _last_lines(example.corrupt, reply)
            corrupt = _rendered(tokenizer, (("user", user),), chat).text + other
        spans = _moved_spans(example, pieces, written)
        begin = _subject_start(example, pieces, written)
        result.append((replace(example, prompt=written, corrupt=corrupt, spans=spans, messages=()), begin))
    return result


def turns_of(example: Example) -> tuple[Turns, str]:
    """The turns before the assistant's last one, and the reply so far: see `as_chat`."""
    if not example.messages:
        user, reply = _turns(example)
        return (("user", user),), reply
    *before, (role, content) = example.messages
    return (tuple(before), content) if role == "assistant" else (example.messages, "")


def begins_reply(task: Task, example: Example) -> bool:
    """Whether the answer is the first that the assistant says: a chat in which no reply has begun."""
    return bool(task.chat_template) and not turns_of(example)[1]


def items_start(text: str) -> int:
    """Where a whole reply's first list item begins: behind an introduction that ends in a colon, and behind its number
    or bullet, which a prompt with a begun list has said."""
    match = _BEFORE_ITEMS.match(text)
    return match.end() if match else 0


def continued(example: Example, text: str, previous: Sequence[str], chat: bool | ChatTemplate) -> Example:
    """An example whose reply goes on with `text`, which gives the answers `previous`."""
    grown = Example(example.prompt + text, example.subject, example.answers, tuple(previous))
    if not chat:
        return grown
    turns, reply = turns_of(example)
    messages = (*turns, ("assistant", reply + text))
    return replace(grown, prompt=joined(messages), messages=messages)


def turn_end(task: Task, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes behind an assistant's turn, such as `<|im_end|>`, up to the end of that line; the
    end-of-text token where the template writes nothing there. Empty for plain prompts.

    Raises:
        InputError: the template does not write the assistant's turn, or there is no such token.
    """
    if not task.chat_template or not task.examples:
        return ""
    turns, _ = turns_of(task.examples[0])
    text = _render(tokenizer, (*turns, ("assistant", _MARKER)), settings_of(task), generation=False)
    start = text.rfind(_MARKER)
    if start < 0:
        raise InputError(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} does not write an assistant's turn; leave "
            "chat_template out or mend the template"
        )
    line = re.match(r"\s*\S[^\n]*", text[start + len(_MARKER) :])
    end = line.group().rstrip() if line else tokenizer.eos_token
    if not end:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r}: neither its chat template nor an end-of-text token ends a turn; "
            "mend the template"
        )
    return str(end)


# --- the template -----------------------------------------------------------------------------------------------------


def _render(tokenizer: PreTrainedTokenizerBase, turns: Turns, chat: ChatTemplate, generation: bool = True) -> str:
    """What the template makes of turns; InputError where it raises an error, of whatever kind."""
    if chat.system is not None and turns[0][0] != "system":
        turns = (("system", chat.system), *turns)
    try:
        thinking: dict[str, Any] = dict.fromkeys(_switches(tokenizer), chat.enable_thinking)
        return str(
            tokenizer.apply_chat_template(as_rows(turns), tokenize=False, add_generation_prompt=generation, **thinking)
        )
    except Exception as error:  # a template is a program of the tokenizer's, and raises what it likes
        roles = [role for role, _ in turns]
        what = f"a {roles[0]} turn" if len(set(roles)) == 1 else f"turns of {', '.join(roles)}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "leave chat_template.system out" if chat.system is not None else "leave chat_template out"
        if "system" in reason.lower() and roles[0] != "system":
            fix = f"give the text of a system turn (chat_template.system), {fix}"
        raise InputError(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} refuses {what} ({reason[:200]}); {fix} or mend "
            "the template"
        ) from None


def _switches(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names by which a template asks whether the model is to think."""
    template = tokenizer.get_chat_template()
    return [name for name in ("enable_thinking", "thinking") if re.search(rf"\b{name}\b", template)]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Turns, chat: ChatTemplate) -> _Rendered:
    """Turns in the template, with what begins the reply; a thought that it opens is closed."""
    if chat.system is not None and turns[0][0] == "system":
        raise InputError(
            f"a conversation begins with a system turn of its own ({turns[0][1][:60]!r}), and chat_template.system is "
            "another; leave one of them out"
        )
    text = _render(tokenizer, turns, chat)
    # Where each turn is, in order; what was added comes first. Some templates put the system's text elsewhere.
    shown: Turns = turns if chat.system is None else (("system", chat.system), *turns)
    places, missing = _places(text, shown)
    if missing is not None and shown[0][0] == "system":
        others, missing = _places(text, shown[1:])
        system, lost = _places(text, shown[:1])
        places, missing = [*system, *others], missing if lost is None else lost
    if missing is not None:
        raise InputError(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} does not keep the {missing[0]}'s text "
            f"{missing[1][:60]!r} as it is; leave chat_template out or mend the template"
        )
    before, cursor = len(text), max(end for _, end in places)
    if _TAG.search(text[cursor:]) or any(text.rstrip().endswith(start) for start in _CHANNELS):
        plain = _render(tokenizer, turns, chat, generation=False)
        before = max(cursor, len(plain)) if plain != text and text.startswith(plain) else cursor
    return _Rendered(text[:before] + _answering(text[before:], tokenizer), places[len(shown) - len(turns) :])


def _places(text: str, turns: Turns) -> tuple[list[tuple[int, int]], tuple[str, str] | None]:
    """(start, end) of each turn's text, one after the other, and the first turn that is not there."""
    places: list[tuple[int, int]] = []
    cursor = 0
    for role, content in turns:
        core = _core(role, content)
        start = text.find(core, cursor)
        if start < 0:
            return places, (role, core)
        cursor = start + len(core)
        places.append((start, cursor))
    return places, None


def _core(role: str, content: str) -> str:
    """What of a turn a template has to keep: all but white space around it, and a thought that the assistant had."""
    tags = list(_TAG.finditer(content)) if role == "assistant" else []
    ends = [tag.end() for tag in tags if _IS_END.match(tag.group())]
    return content[ends[-1] if ends else 0 :].strip()


def _answering(start: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of a reply, so that the answer comes next and no thought: one that is open is closed."""
    for assistant, channel in _CHANNELS.items():
        if start.rstrip().endswith(assistant):
            return start.rstrip() + channel
    tags = list(_TAG.finditer(start))
    if not tags or _IS_END.match(tags[-1].group()):
        return start
    tag = tags[-1].group()
    form = re.fullmatch(r"([<\[◁])([^|]+)([>\]▷])", tag)
    end = _THOUGHTS.get(tag) or (f"{form[1]}/{form[2]}{form[3]}" if form else None)
    if end is None:
        raise InputError(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} begins a reply with {tag!r}, a thought whose "
            "end is not known, and no answer is written inside one; leave chat_template out or mend the template"
        )
    return f"{start.rstrip()}\n\n{end}\n\n"


def _check_thinking(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell where a model that is asked to think may begin with a thought in the place of an answer.

    Raises:
        InputError: the template has no switch for it.
    """
    if not task.examples:
        return
    turns, reply = turns_of(task.examples[0])
    chat = settings_of(task)
    plain, thinking = (_render(tokenizer, turns, replace(chat, enable_thinking=on)) for on in (False, True))
    if plain == thinking:
        raise InputError(
            f"chat_template.enable_thinking changes nothing in the chat template of tokenizer "
            f"{tokenizer.name_or_path!r}; leave it out"
        )
    if not reply and _rendered(tokenizer, turns, chat).text == thinking:
        log.warning(
            "task %s: with enable_thinking the model may begin its reply with a thought, and answers are read as its "
            "first words",
            task.name,
        )


# --- turns and spans of a prompt --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """A stretch of a prompt that stands in the chat as it is: characters from, to, and by how much it moves."""

    start: int
    end: int
    shift: int


def _pieces(example: Example, turns: Turns, reply: str, rendered: _Rendered) -> list[_Piece]:
    """Where the text of each turn, and the reply so far, are in the prompt and in the chat."""
    pieces, offset = [], 0
    for (role, content), (start, end) in zip(turns, rendered.places, strict=True):
        core = offset + content.rfind(_core(role, content))
        pieces.append(_Piece(core, core + end - start, start - core))
        offset += len(content) + len(BETWEEN)
    begin = len(example.prompt) - len(reply)
    return [*pieces, _Piece(begin, len(example.prompt), len(rendered.text) - begin)] if reply else pieces


def _subject_start(example: Example, pieces: Sequence[_Piece], written: str) -> int:
    for piece in pieces:
        start = example.prompt.find(example.subject, piece.start, piece.end)
        if start >= 0:
            return start + piece.shift
    blank = len(example.subject) - len(example.subject.lstrip())
    return written.find(example.subject, max(0, pieces[0].start + pieces[0].shift - blank))


def _moved_spans(example: Example, pieces: Sequence[_Piece], written: str) -> Ranges:
    """An example's spans as characters of its prompt written as a chat.

    Raises:
        InputError: a piece that lies in no turn, or in two.
    """

    def moved(start: int, end: int, span: str) -> tuple[int, int]:
        for piece in pieces:
            if piece.start <= start and end <= piece.end:
                return start + piece.shift, end + piece.shift
        text = example.prompt[start:end]
        raise InputError(f"{place_of(example)}: span {span!r}: the chat template does not keep {text!r} as it is"[:300])

    plain = ranges(example.spans, example.prompt, place_of(example))
    return {name: tuple(moved(*piece, name) for piece in listed) for name, listed in plain.items()}


def place_of(example: Example) -> str:
    """Which example a message is about."""
    return f"prompt {example.prompt[:40]!r}... about {example.subject!r}"


def _turns(example: Example) -> tuple[str, str]:
    """The user's turn of a plain prompt, and the reply so far: from the line of the first answer given, or from a last
    line that is the first item's number or bullet alone."""
    if not example.previous and (begun := re.fullmatch(rf"(.*\S.*?)\n+([ \t]*{_BULLET})", example.prompt, re.DOTALL)):
        return begun[1].rstrip("\n"), begun[2]
    cursor = len(example.prompt)
    for answer in reversed(example.previous):
        start = example.prompt.rfind(answer, 0, cursor)
        cursor = start if start >= 0 else cursor
    cut = example.prompt.rfind("\n", 0, cursor) + 1
    if not example.previous or not example.prompt[:cut].strip():
        return example.prompt, ""
    return example.prompt[:cut].rstrip("\n"), example.prompt[cut:]


def _last_lines(prompt: str, reply: str) -> tuple[str, str]:
    """A counterpart's turns: its reply is its last lines, as many as `reply` has."""
    if not reply:
        return prompt, ""
    user, *lines = prompt.rsplit("\n", reply.count("\n") + 1)
    if len(lines) <= reply.count("\n") or not user.strip():
        raise InputError(
            f"the corrupt prompt {prompt!r} must hold a line before its list, which is as long as {reply!r}"
        )
    return user.rstrip("\n"), "\n".join(lines)
