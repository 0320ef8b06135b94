"""Conversations in a task file, and how they are put to a model: `{"messages": [{"role", "content"}, ...], ...}`.

    {"messages": [{"role": "user", "content": "Name a city in Italy."}], "subject": "Italy", "answers": ["Rome"]}
    {"messages": [{"role": "user", "content": "List cities in Italy."},
                  {"role": "assistant", "content": "1. Rome\\n2."}],
     "subject": "Italy", "answers": ["Rome", "Milan"], "previous": ["Rome"]}

The answer comes next: as the beginning of a reply where the last turn is the user's, and where it is the assistant's,
that turn has begun and goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headtune.analysis.utils.errors import InputError, nearest

Turns = tuple[tuple[str, str], ...]  # (role, content)

ROLES = ("system", "user", "assistant")
BETWEEN = "\n\n"  # turns, in the text that stands for a conversation where no template writes it


@dataclass(frozen=True)
class ChatTemplate:
    """How prompts are written as chats in a tokenizer's own template.

    Attributes:
        system: text of a system turn before each conversation; None: what the template does without one.
        enable_thinking: what the template is told, by this name. Answers are read right after the prompt, so a thought
            that the template opens is closed in either case.
    """

    system: str | None = None
    enable_thinking: bool = False

    def as_json(self) -> bool | dict[str, Any]:
        """True for the defaults, else `{"system", "enable_thinking"}`."""
        return True if self == ChatTemplate() else {"system": self.system, "enable_thinking": self.enable_thinking}


def chat_as_json(chat: bool | ChatTemplate) -> bool | dict[str, Any]:
    """`Task.chat_template` as files keep it: false, true, or the settings."""
    return chat.as_json() if isinstance(chat, ChatTemplate) else chat


def chat_entry(chat: bool | ChatTemplate) -> dict[str, Any]:
    """What a file's block on a task says of it: nothing of plain prompts."""
    return {"chat_template": chat_as_json(chat)} if chat else {}


def chat_from_json(value: Any) -> bool | ChatTemplate:
    """The reverse of `chat_as_json`; None, as in files from before there was a choice, is false."""
    return ChatTemplate(**value) if isinstance(value, dict) else bool(value)


def chat_in_words(chat: bool | ChatTemplate) -> str:
    """`plain prompts`, or `chats` with what is set."""
    if not chat:
        return "plain prompts"
    if not isinstance(chat, ChatTemplate):
        return "chats"
    settings = [f"system {chat.system!r}"] * (chat.system is not None) + ["enable_thinking"] * chat.enable_thinking
    return f"chats ({', '.join(settings)})" if settings else "chats"


def parse_messages(value: Any, place: str) -> Turns:
    """The `messages` of a line, checked.

    Raises:
        InputError: no list of turns, a turn with other keys, an unknown role, content that is no text, a system turn
            after the first, no turn of the user before the last, or a last turn that is the system's.
    """
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{place}: 'messages' must be a list of at least one turn, found {value!r}"[:300])
    turns = []
    for number, turn in enumerate(value, start=1):
        what = f"{place}: turn {number} of 'messages'"
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise InputError(f'{what} must be {{"role": ..., "content": ...}} and nothing else, found {turn!r}'[:300])
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            raise InputError(f"{what}: role {role!r} is unknown; {nearest(str(role), ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"{what}: 'content' must be text, found {content!r}"[:300])
        if role == "system" and number > 1:
            raise InputError(f"{what} is the system's, which comes first; move it there")
        turns.append((role, content))
    if not any(role == "user" for role, _ in turns):
        raise InputError(f"{place}: 'messages' has no turn of the user; add the question")
    return tuple(turns)


def joined(turns: Turns) -> str:
    """A conversation as one text. It ends where the assistant's turn stands, if that has begun."""
    text = BETWEEN.join(content for _, content in turns)
    return text if turns[-1][0] == "assistant" else text.rstrip()


def as_rows(turns: Turns) -> list[dict[str, str]]:
    """Turns as files and templates have them."""
    return [{"role": role, "content": content} for role, content in turns]
