"""Roles: what a group of heads does to a prompt's answers, as a quantity of the scores and a sign.

    role_of("memory=target-previous:+")     # or role_of("memory"), a row of ROLES_BY_NAME

    recall          target:+              raises the answers still to come
    suppression     previous:-            lowers those already given
    memory          target-previous:+     raises what the model knows over what the prompt states (PH3, Jin et al.)
    context         previous-target:+     raises what the prompt states over what the model knows
    retrieval       retrieval.copy:+      copies from the prompt what is asked for, at least .1 of it (Wu et al. 2024)

On a task whose prompts state a wrong answer, the answer that the model knows remains and the stated one is `previous`.
Many heads raise both (Li et al. 2025), so memory and context heads are ranked by the difference, not by one of the two.
PH3: "Cutting off the head ends the conflict", 2024, section 4; its exact normalisation is not public, this one is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from headtune.analysis.utils.errors import InputError, nearest

_NAME = re.compile(r"[A-Za-z_]\w*")
_QUANTITY = re.compile(r"(?:[A-Za-z_]\w*\.)?[A-Za-z_]\w*")
RESERVED = ("both", "selected")  # words that `heads.role` of a recipe has for itself
GRAMMAR = "NAME=QUANTITY:+ or NAME=QUANTITY:-, such as memory=target-previous:+"


@dataclass(frozen=True)
class Role:
    """A group of heads by what they do.

    Attributes:
        name: in heads.json, tables and `heads.role`.
        quantity: `target`, `previous` or another that methods write as `<method>.<quantity>`, of whichever method ran;
            or with its method (`retrieval.copy`), as it is.
        sign: 1 or -1: heads that raise, or that lower, the quantity.
        less: a second quantity that is subtracted from the first, or None.
        threshold: the least distance of a head's score from zero, or None.
        without_previous: the quantity on tasks without previous answers, or None: such a task is refused.
    """

    name: str
    quantity: str
    sign: float
    less: str | None = None
    threshold: float | None = None
    without_previous: str | None = None

    @property
    def probability(self) -> str:
        """What silencing the heads must change: `p_previous` for quantities of previous answers, else `p_remaining`."""
        return "p_previous" if self.quantity.rpartition(".")[2].startswith("previous") else "p_remaining"

    @property
    def raises(self) -> bool:
        """Silencing the heads raises the probability: those that lower a quantity."""
        return self.sign < 0

    @property
    def effect(self) -> str:
        """What silencing the heads must do: `lower p_remaining`."""
        return f"{'raise' if self.raises else 'lower'} {self.probability}"

    def __str__(self) -> str:
        less = "" if self.less is None else f"-{self.less}"
        return f"{self.quantity}{less}:{'+' if self.sign > 0 else '-'}"


DEFAULT_ROLES = (Role("recall", "target", 1.0), Role("suppression", "previous", -1.0, without_previous="target"))
ROLES_BY_NAME = {
    role.name: role
    for role in (
        *DEFAULT_ROLES,
        Role("memory", "target", 1.0, less="previous"),
        Role("context", "previous", 1.0, less="target"),
        Role("retrieval", "retrieval.copy", 1.0, threshold=0.1),
    )
}


def role_of(role: Role | str) -> Role:
    """A role by its name in `ROLES_BY_NAME`, or from `NAME=QUANTITY:+|-`.

    Raises:
        InputError: an unknown name, or a text that is not of this form.
    """
    if isinstance(role, Role):
        return role
    name, equals, text = role.partition("=")
    if not equals:
        if name not in ROLES_BY_NAME:
            raise InputError(
                f"role {name!r} is unknown; {nearest(name, ROLES_BY_NAME, listed=True)}, or write {GRAMMAR}"
            )
        return ROLES_BY_NAME[name]
    quantity, colon, sign = text.rpartition(":")
    terms = quantity.split("-")
    if not (_NAME.fullmatch(name) and colon and sign in ("+", "-") and len(terms) < 3):
        raise InputError(f"role {role!r} is not of the form {GRAMMAR}")
    if wrong := [term for term in terms if not _QUANTITY.fullmatch(term)]:
        raise InputError(f"role {role!r}: {wrong[0]!r} is no quantity; write {GRAMMAR}, or METHOD.QUANTITY")
    if name in (*RESERVED, "bootstrap"):  # a key beside the roles in heads.json
        raise InputError(f"role {role!r}: the name {name!r} is taken by recipes or heads.json; choose another")
    if len({"." in term for term in terms}) > 1 or len(set(terms)) < len(terms):
        raise InputError(f"role {role!r}: write a difference of two quantities, both with their method or both without")
    return Role(name, terms[0], 1.0 if sign == "+" else -1.0, terms[1] if len(terms) == 2 else None)


def roles_of(roles: Iterable[Role | str] | None) -> tuple[Role, ...]:
    """Roles in the order asked for; recall and suppression where none is.

    Raises:
        InputError: see `role_of`; a name given twice.
    """
    chosen = tuple(role_of(role) for role in roles or ()) or DEFAULT_ROLES
    names = [role.name for role in chosen]
    if twice := [name for index, name in enumerate(names) if name in names[:index]]:
        raise InputError(f"role {twice[0]!r} is given twice; give each role its own name")
    return chosen
