"""heads.json: which heads recall and which suppress, for which model, by which method, and how surely.

The format is `schema` 1; `HeadSet.load` checks the file, `HeadSet.check_model` the model it is used on.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.files import write_json
from headtune.analysis.utils.progress import Notify
from headtune.analysis.utils.secrets import redact

from .roles import DEFAULT_ROLES, ROLES_BY_NAME, Role, role_of

log = logging.getLogger(__name__)

SCHEMA = 1
FILE_NAME = "heads.json"
ROLES = tuple(role.name for role in DEFAULT_ROLES)


@dataclass(frozen=True)
class RankedHead:
    """One head of a role, with what speaks for it.

    Attributes:
        layer, head: zero-based.
        score: the ranking score (positive = the head raises the quantity).
        ci: its 95% interval over subjects; None where the method has one value for the whole task.
        effect: further named numbers, such as the ablation effects.
    """

    layer: int
    head: int
    score: float
    ci: tuple[float, float] | None
    effect: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True)
class HeadSet:
    """The content of heads.json; the README lists what each block holds."""

    model: dict[str, Any]
    task: dict[str, Any]
    method: dict[str, Any]
    roles: dict[str, tuple[RankedHead, ...]]
    verification: dict[str, Any] = field(default_factory=dict)
    stability: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    schema: int = SCHEMA

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads per layer of the model."""
        return self.model["n_layers"], self.model["n_heads"]

    def role(self, name: str) -> Role | None:
        """What a role is ranked by and what silencing its heads must do; None for heads chosen by other means."""
        parameters = self.method.get("parameters") or {}
        text = (parameters.get("roles") or {}).get(name)
        return ROLES_BY_NAME.get(name) if text is None else role_of(f"{name}={text}")

    def top(self, role: str, k: int | None = None) -> list[tuple[int, int]]:
        """The best `k` heads of a role (all, when `k` is None), best first.

        Raises:
            InputError: no such role, or fewer heads than asked for.
        """
        if role not in self.roles:
            raise InputError(f"head role {role!r} is not in this head set; {nearest(role, self.roles, listed=True)}")
        ranked = self.roles[role]
        if k is not None and k > len(ranked):
            raise InputError(f"asked for the top {k} {role} heads, the head set holds {len(ranked)}; lower top")
        return [(entry.layer, entry.head) for entry in ranked[:k]]

    def top_heads(
        self, role: str, top: int, source: str = "the head set", notify: Notify = log.info
    ) -> list[tuple[int, int]]:
        """The best heads of a role, (layer, head), sorted: what a recipe's `heads` block chooses with `role` and `top`.

        Args:
            role: a role of this set, or `both`: the top recall and the top suppression heads.
            source: what messages call this set, such as its path.
            notify: is told where fewer than `top` heads were confirmed.

        Raises:
            InputError: no such role, no heads, or more heads asked for than identify was told to keep.
        """
        if top < 1:
            raise InputError(f"top {top} must be at least 1")
        roles = ROLES if role == "both" else (role,)
        if role == "both" and set(self.roles) == {"selected"}:
            roles = ("selected",)  # there is no other role in such a set
        elif role == "both" and not set(ROLES) <= set(self.roles):
            raise InputError(
                f"role 'both' takes recall and suppression heads, and {source} holds the roles "
                f"{', '.join(self.roles) or 'none'}; name one of them (heads.role)"
            )
        pairs = {pair for name in roles for pair in self.top(name, min(top, len(self.roles.get(name, ()))))}
        limit = self.method.get("parameters", {}).get("top")  # not of every set: heads may be chosen by other means
        for name in roles:
            count = len(self.roles[name])
            if isinstance(limit, int) and top > limit:
                raise InputError(
                    f"only {count} {name} heads in {source}, top={top} asked: identify kept at most {limit} a role; "
                    f"lower top, or run identify with --top {top}"
                )
            if count < top:
                notify(f"{name} heads confirmed in {source}: {count}, fewer than top={top}")
        if not pairs:
            raise InputError(f"the head set holds no {' or '.join(roles)} heads; run identify on more examples")
        return sorted(pairs)

    def save(self, path: Path | str) -> None:
        """Write heads.json into a folder, or a file of another name that ends in .json."""
        path = Path(path)
        write_json(path if path.suffix == ".json" else path / FILE_NAME, asdict(self))

    @classmethod
    def load(cls, path: Path | str) -> HeadSet:
        """Read and check the heads.json of a folder, or a file of another name.

        Raises:
            InputError: not there, not JSON, unknown schema, missing blocks, heads out of range, twice, or not finite.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        return cls(**_checked(_json(path), f"head set {str(path)!r}"))

    def check_model(self, model: dict[str, Any]) -> list[str]:
        """Refuse a head set of another model; return warnings (other weights of the same shape).

        Args:
            model: the `identity()` of the model the heads are to be used on.

        Raises:
            InputError: another number of layers, heads or head dimensions.
        """
        for key in ("n_layers", "n_heads", "head_dim"):
            if self.model.get(key) != model[key]:
                raise InputError(
                    f"head set of {self.model.get('name')!r} has {key} {self.model.get(key)}, but {model['name']!r} "
                    f"has {model[key]}; run headtune identify on this model"
                )
        if self.model.get("weights_sha256") != model["weights_sha256"]:
            return [f"the heads were identified on other weights ({self.model.get('name')!r}) than {model['name']!r}'s"]
        return []


def provenance() -> dict[str, Any]:
    """`created`, `versions`, `command` of a file written now; secrets in the command are struck out."""
    packages = ("headtune", "torch", "transformers", "peft", "trl")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    command = redact(" ".join(["headtune", *sys.argv[1:]]))
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions, "command": command}


def _json(path: Path) -> Any:
    name = f"head set {str(path)!r}"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; headtune identify writes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if path.suffix != ".json":
            raise InputError(f"{name} is not JSON; give the folder that holds it, or its heads.json") from None
        raise InputError(f"{name} is not JSON: {error}; run headtune identify again") from None


def _checked(data: Any, source: str) -> dict[str, Any]:
    """The fields of a HeadSet from the file's content; `source` names the file in errors."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(
            f"{source} has schema {schema!r}, this version reads schema {SCHEMA}; run headtune identify again"
        )
    fields = set(HeadSet.__dataclass_fields__)
    for key in data:
        if key not in fields:
            raise InputError(f"{source}: unknown key {key!r}; {nearest(key, fields)}")
    for key in ("model", "task", "method", "roles"):
        if not isinstance(data.get(key), dict):
            raise InputError(f"{source}: block {key!r} is missing; run headtune identify again")
    for key in ("stability", "versions", "verification"):
        if not isinstance(data.get(key, {}), dict):
            raise InputError(f"{source}: block {key!r} must be an object, found {data[key]!r}"[:300])
    if not isinstance(data["task"].get("dropped", {}), dict):
        raise InputError(f"{source}: task.dropped must be an object, found {data['task']['dropped']!r}"[:300])
    _require_verified(data.get("verification", {}), source)
    for role, value in data.get("stability", {}).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{source}: stability.{role} must be a number or null, found {value!r}"[:300])
    for key in ("n_layers", "n_heads", "head_dim"):
        if not isinstance(data["model"].get(key), int):
            raise InputError(f"{source}: model.{key} must be a whole number, found {data['model'].get(key)!r}")
    roles = {role: _ranked(entries, role, data["model"], source) for role, entries in data["roles"].items()}
    return {**data, "roles": roles}


def _require_verified(block: dict[str, Any], source: str) -> None:
    try:
        for name, entry in block.items():
            if name in ("halves", "subjects"):
                continue
            if name == "dissociation":
                for result in entry.values():
                    keys = ("baseline", "ablated", "most_extreme_random_set", "ratio")
                    _ = [result[key] for key in ("held", *(keys if "quantity" in result else ("reason",)))]
            elif name != "baseline" and "sets" not in entry:
                _ = len(entry["heads"])
            for numbers in (entry[key] for key in ("p_remaining", "p_previous") if key in entry):
                _, (_, _) = float(numbers["mean"]), numbers["ci"]
    except (AttributeError, KeyError, TypeError, ValueError):
        what = "block 'verification' is not what identify writes"
        raise InputError(f"{source}: {what}; run headtune identify again") from None


def _ranked(entries: Any, role: str, model: dict[str, Any], source: str) -> tuple[RankedHead, ...]:
    if not isinstance(entries, list):
        raise InputError(f"{source}: role {role!r} must be a list of heads, found {entries!r}"[:300])
    ranked: list[RankedHead] = []
    for entry in entries:
        try:
            low, high = (None, None) if entry["ci"] is None else (float(bound) for bound in entry["ci"])
            effect = {name: float(value) for name, value in entry.get("effect", {}).items()}
            interval = None if low is None or high is None else (low, high)
            head = RankedHead(entry["layer"], entry["head"], float(entry["score"]), interval, effect)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{source}: {role} entry {entry!r} needs layer, head, score and ci"[:300]) from None
        for value, limit, what in ((head.layer, model["n_layers"], "layers"), (head.head, model["n_heads"], "heads")):
            if type(value) is not int or not 0 <= value < limit:
                raise InputError(f"{source}: {role} head {head.name} is out of range; the model has {limit} {what}")
        if not all(math.isfinite(x) for x in (head.score, *(head.ci or ()), *head.effect.values())):
            raise InputError(f"{source}: {role} head {head.name} has a score that is not finite")
        if any((other.layer, other.head) == (head.layer, head.head) for other in ranked):
            raise InputError(f"{source}: {role} names {head.name} twice; remove one")
        ranked.append(head)
    return tuple(ranked)
