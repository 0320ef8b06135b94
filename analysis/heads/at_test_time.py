"""What can be switched on while a model is measured, as the command line names it.

sink:tau=0.5,gamma=0.5                                     see `last_layer.scale_sink_heads`
intercept:beta=0.5,fit=one_to_many:train                   see `last_layer.subtract_mlp_intercept`
silence:from=runs/heads,role=recall,top=4,how=zero         see `silencing.silence`
silence:from=runs/heads,role=recall,top=4,random=0         its control: random heads of the same layers

with applied(model, parse(["silence:from=runs/heads,role=recall,top=4"])) as notes:
    ...
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from headtune.analysis.interventions.intervention import Head
from headtune.analysis.interventions.last_layer import Intercept, Sink, scale_sink_heads, subtract_mlp_intercept
from headtune.analysis.interventions.mlp_regression import decompose
from headtune.analysis.interventions.silencing import HOWS, silence
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.chat import with_chat
from headtune.analysis.tasks.messages import ChatTemplate
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.progress import Progress, silent

from .controls import random_sets
from .head_set import HeadSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Silence:
    """`silence:from=RUN_OR_HEADSET,role=R,top=K,how=zero`: the top heads of a role silenced at every position.

    Attributes:
        source: `from`: a folder with a heads.json (of `identify` or of a run), or the file.
        role: a role of it, or `both`.
        top: how many heads of the role.
        how: one of `silencing.HOWS`.
        random: a seed: as many random heads of each of the same layers instead, none of the chosen ones and none of the
            top heads of any role.
    """

    source: str = field(default="", metadata={"key": "from"})
    role: str = "both"
    top: int = 8
    how: str = "zero"
    random: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("knob silence: from=FOLDER is missing; write silence:from=runs/heads,role=recall,top=4")
        if self.how not in HOWS:
            raise InputError(f"knob silence: how={self.how!r} is unknown; {nearest(self.how, HOWS, listed=True)}")
        self.heads()

    def heads(self) -> list[Head]:
        """The heads that are silenced; InputError where the head set has no such role, or its layers too few heads."""
        head_set = HeadSet.load(self.source)
        chosen = head_set.top_heads(self.role, self.top, self.source)
        if self.random is None:
            return chosen
        best = [(entry.layer, entry.head) for ranked in head_set.roles.values() for entry in ranked[: self.top]]
        barred = {*chosen, *best}
        for layer in {layer for layer, _ in chosen}:
            count = sum(each == layer for each, _ in chosen)
            free = head_set.shape[1] - sum(each == layer for each, _ in barred)
            if free < count:
                raise InputError(
                    f"knob silence: random={self.random} needs {count} heads of layer {layer} at the top of no role, "
                    f"and there are {free}; lower top={self.top}"
                )
        return list(random_sets(chosen, head_set.shape, 1, self.random, best)[0])

    def check_model(self, model: HeadModel) -> None:
        """Refuse a head set of a model of another shape (InputError); other weights are a warning."""
        for warning in HeadSet.load(self.source).check_model(model.identity()):
            log.warning("knob silence: %s", warning)


TestTimeIntervention = Sink | Intercept | Silence
INTERVENTIONS: dict[str, type[TestTimeIntervention]] = {"sink": Sink, "intercept": Intercept, "silence": Silence}
_READ = {"float": float, "int": int, "int | None": int, "str": str}  # by the field's annotation


def parse(texts: Sequence[str]) -> list[TestTimeIntervention]:
    """Knobs as the command line gives them: `NAME` or `NAME:key=value,key=value`, each name once.

    Raises:
        InputError: an unknown name, key, task, head set or role, a value that is no number or out of range, a name
            given twice.
    """
    knobs: dict[str, TestTimeIntervention] = {}
    for text in texts:
        name, _, settings = text.partition(":")
        if name not in INTERVENTIONS:
            raise InputError(f"knob {name!r} is unknown; {nearest(name, INTERVENTIONS)}")
        if name in knobs:
            raise InputError(f"knob {name!r} is given twice; give it once, with all of its settings")
        knobs[name] = _parse_one(name, settings)
    return list(knobs.values())


def _parse_one(name: str, settings: str) -> TestTimeIntervention:
    allowed = {each.metadata.get("key", each.name): each for each in fields(INTERVENTIONS[name])}
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if key not in allowed:
            raise InputError(f"knob {name}: unknown setting {key!r}; {nearest(key, allowed)}")
        if allowed[key].name in values or not (equals and value):
            raise InputError(f"knob {name}: setting {setting!r} must be {key}=VALUE, once")
        kind = str(allowed[key].type)
        try:
            values[allowed[key].name] = _READ[kind](value)
        except ValueError:
            number, example = ("a number", "0.5") if kind == "float" else ("a whole number", "4")
            raise InputError(
                f"knob {name}: {key}={value!r} is not {number}; write for example {key}={example}"
            ) from None
    return INTERVENTIONS[name](**values)


@contextlib.contextmanager
def applied(
    model: HeadModel,
    knobs: Sequence[TestTimeIntervention],
    progress: Progress = silent,
    chat: bool | ChatTemplate = False,
) -> Iterator[list[dict[str, Any]]]:
    """Turn knobs on, all together; what they need of the model is computed first, with every knob off.

    Args:
        chat: give the prompts that an intercept is fitted on as chats.

    Yields:
        What was set, JSON-able, one dictionary a knob; an intercept's says what it was fitted on and how well, that of
        silenced heads which they are.

    Raises:
        InputError: a head set of another model.
    """
    notes: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        blocks: list[contextlib.AbstractContextManager[None]] = []
        for knob in knobs:
            note: dict[str, Any] = {"layer": model.n_layers - 1}
            if isinstance(knob, Sink):
                blocks.append(scale_sink_heads(model, knob.tau, knob.gamma))
                note = {"knob": "sink", "tau": knob.tau, "gamma": knob.gamma, **note}
            elif isinstance(knob, Silence):
                knob.check_model(model)
                heads = knob.heads()
                blocks.append(silence(model, heads, knob.how))
                note = {"knob": "silence", "from": knob.source, "role": knob.role, "top": knob.top, "how": knob.how}
                note |= {"mean_over": "the neutral text"} if knob.how == "mean" else {}
                note |= {} if knob.random is None else {"random": knob.random}
                note |= {"heads": [list(head) for head in heads]}
            else:
                fit = with_chat(knob.task(), chat or None)
                decomposition, r2 = decompose(
                    model,
                    encode(fit, model.tokenizer, model.positions, model.vocabulary).examples,
                    progress=progress,
                )
                blocks.append(subtract_mlp_intercept(model, decomposition.intercept[-1], knob.beta))
                note = {"knob": "intercept", "beta": knob.beta, "fit": knob.fit, **note}
                note |= {"fit_examples": decomposition.n, "held_out_r2": r2[-1]}
            notes.append(note)
        for block in blocks:
            stack.enter_context(block)
        yield notes
