"""Secrets in text: refused in a user's input, and replaced in what is written to files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import InputError

# Errs on the side of secrets: `pad_token` is one too, `max_new_tokens` and `tokenizer` are not.
_SECRET_NAME = re.compile(
    r"(key|token|passwd|api_?keys|(secret|password|passphrase|credential)s?)([^a-z]|$)", re.IGNORECASE
)
# What stands between `before` and `after` goes. A W&B key of 40 hexadecimal digits is not here: so is a git commit.
_PATTERNS = (
    (
        "a URL with a user name or password",
        re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://)(?!\*\*\*)[^/\s@'\"]+(?P<after>@)"),
    ),
    (
        "a URL with an access token",
        re.compile(
            r"(?P<before>[?&](?:[\w-]*(?:token|signature|password|secret|api_?key)|key|sig)=)(?!\*\*\*)[^&\s'\"]+(?P<after>)",
            re.IGNORECASE,
        ),
    ),
    (
        "an access token",
        re.compile(
            r"(?P<before>)(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
            r"|(?<![\w./-])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"
            r"|wandb_v\d_\w{20,}|AKIA[0-9A-Z]{16})(?P<after>)"
        ),
    ),
)
# Keys of tokenizers, whose tokens are words.
_NO_SECRETS = re.compile(r"(additional_special|bos|cls|eos|image|mask|pad|sep|unk)_tokens?", re.IGNORECASE)
_SHORTEST = 8  # characters of an environment variable's value that is looked for; shorter ones are words


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret: `HF_TOKEN`, `apiKey`, `password`."""
    return _SECRET_NAME.search(re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)) is not None


def secret_in(text: str) -> str | None:
    """What kind of secret a text holds, in words that do not show it; None where none is seen."""
    if what := _known_form(text):
        return what
    named = (name for name, value in _environment() if value in text)
    return next((f"the value of the environment variable {name}" for name in named), None)


def _known_form(text: str) -> str | None:
    return next((what for what, pattern in _PATTERNS if pattern.search(text)), None)


def redact(text: str) -> str:
    """A text with `***` in the place of every secret that is seen.

    Seen are credentials in URLs, access tokens of known forms, and the values of environment variables that are named
    like a secret.
    """
    for name, value in _environment():
        text = text.replace(value, f"***{name}***")
    for _, pattern in _PATTERNS:
        text = pattern.sub(r"\g<before>***\g<after>", text)
    return text


def require_no_secrets(data: Any, source: str, path: str = "") -> None:
    """Refuse data that is going to be written down and holds a secret, in a value or under a key that is for one.

    Args:
        data: what YAML or JSON gives.
        source: names the file in the message.
        path: of `data` within it.

    Raises:
        InputError: with the key and the kind of secret, never with the secret.
    """
    if isinstance(data, Mapping):
        for key, value in data.items():
            below = redact(f"{path}.{key}" if path else str(key))
            named = is_secret_name(str(key)) and not _NO_SECRETS.fullmatch(str(key))
            if named and isinstance(value, str) and value:
                raise _refusal(source, below, "what its name says is a secret")
            if what := _known_form(str(key)):  # a password that is a word may be a key's name as well
                raise _refusal(source, below, what)
            require_no_secrets(value, source, below)
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            require_no_secrets(value, source, f"{path}.{index}")
    elif isinstance(data, str) and (what := secret_in(data)):
        raise _refusal(source, path, what)


def _refusal(source: str, path: str, what: str) -> InputError:
    return InputError(
        f"{source}: {path} holds {what}, and is copied to where others read it; remove it and log in through the "
        "environment (HF_TOKEN, WANDB_API_KEY) instead"
    )


def _environment() -> Iterator[tuple[str, str]]:
    """The secrets in the environment, longest first: one may be a part of another."""
    named = [(name, value.strip()) for name, value in os.environ.items() if is_secret_name(name)]
    # A path, such as SSL_KEY_FILE or PASSWORD_STORE_DIR, says where a secret is.
    secrets = [(name, value) for name, value in named if len(value) >= _SHORTEST and not os.path.exists(value)]
    yield from sorted(secrets, key=lambda pair: -len(pair[1]))
