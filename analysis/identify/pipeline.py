"""The identify stage: scores of every head on a task, ranking into roles, causal verification, files."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from headtune.analysis.heads.head_set import HeadSet, RankedHead, provenance
from headtune.analysis.heads.ranking import FDR, RANKINGS, elbow, rank, rule_for, stability, with_differences
from headtune.analysis.heads.roles import DEFAULT_ROLES, Role, roles_of
from headtune.analysis.methods.parallel_map import ParallelMap
from headtune.analysis.methods.registry import parse_method_names, score_examples
from headtune.analysis.methods.scores import Scores
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.self_check import probe_logits, require_finite_logits
from headtune.analysis.reports import head_report
from headtune.analysis.reports.head_profiles import write_profiles
from headtune.analysis.reports.profile_heads import profile_heads
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, EncodedTask, encode
from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.files import require_new_folder
from headtune.analysis.utils.progress import Progress, silent
from headtune.analysis.utils.stats import ENOUGH_SUBJECTS, FEW_SUBJECTS

from .verification import N_RANDOM, probabilities, verify

log = logging.getLogger(__name__)

PROFILED = 64  # heads with a profile in the report, best of the roles first: about 10 kB each
ELBOW_UP_TO = 16  # heads considered when the elbow says how many


@dataclass(frozen=True)
class IdentifyResult:
    """What `identify` returns.

    Attributes:
        model: the model whose heads they are.
        heads: the ranked and verified heads.
        scores: of every head, by example.
        examples: those that could be scored.
        parallel: what is stored of finished examples, until `save`.
    """

    model: HeadModel
    heads: HeadSet
    scores: Scores
    examples: list[Encoded]
    parallel: ParallelMap = field(default_factory=ParallelMap)

    def ranked(self) -> list[tuple[int, int]]:
        """The heads of all roles, best first within a role, each once."""
        return list(dict.fromkeys(head for role in self.heads.roles for head in self.heads.top(role)))

    def save(self, folder: Path | str) -> None:
        """Write heads.json, scores.safetensors, portraits.json and report.html into a new folder, all or none.

        Of the processes that shared the examples only the first writes. The partial results are removed after it.

        Raises:
            InputError: the folder exists with contents or cannot be written.
        """
        if self.parallel.rank:
            return
        folder = Path(folder)
        require_new_folder(folder, "choose another --out")
        profiled = self.ranked()[:PROFILED]
        profiles = profile_heads(self.model, self.examples, profiled) if profiled else []
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / name for name in ("scores.safetensors", "portraits.json", "report.html", "heads.json")]
        scores, portraits, report, heads = files
        try:
            self.scores.save(scores)
            write_profiles(profiles, portraits)
            head_report.write_report(report, self.heads, self.scores.means(), profiles=profiles)
            self.heads.save(heads)
        except BaseException:
            for file in files:
                file.unlink(missing_ok=True)
            raise
        self.parallel.finish()


def partial_folder(out: Path) -> Path:
    """Where an unfinished `identify` stores its finished examples: beside `out`, so that `out` is whole or absent."""
    whole = out.resolve()
    return whole.parent / f".{whole.name}.partial"


def identify(
    model: HeadModel,
    task: Task | EncodedTask,
    method: str = "all",
    top: int | Literal["elbow"] = 8,
    verify_top: int = 4,
    n_random: int = N_RANDOM,
    seed: int = 0,
    progress: Progress = silent,
    threshold: float | None = None,
    controls: Mapping[str, HeadSet] | None = None,
    partial: Path | None = None,
    share: bool = False,
    rank_by: str = "contrast",
    roles: Sequence[Role | str] | None = None,
) -> IdentifyResult:
    """Score every head, rank the heads of each role, verify them on other subjects against controls.

    The heads are those of all subjects; the verdict is of heads chosen on one half and silenced on the other, both
    ways.

    Args:
        method: names of `registry.METHODS` with commas, or `all`: direct attribution ranks, exact ablation confirms.
            With others see `ranking.rule_for`.
        top: heads kept per role; `elbow` silences the best 1, 2, ... together and stops where the effect bends.
        verify_top: heads silenced together in the verification.
        n_random: matched random sets drawn for the verification.
        progress: wraps the list of examples while it is worked through.
        threshold: keep only heads whose score is at least this far from zero, in the ranking score's unit.
        controls: name -> another task's head set of the same model, silenced too: its heads of the same role.
        partial: where finished examples are kept until `save` has written the result; a second call with the same
            arguments goes on there.
        share: divide the examples among the processes of `accelerate launch`.
        rank_by: `contrast` (less the other subjects' answers), `centred` (less the vocabulary's mean) or `raw`.
        roles: names in `roles.ROLES_BY_NAME`, such as `memory`, or `NAME=QUANTITY:+|-`; default: recall and
            suppression.

    Raises:
        InputError: an unknown method or role, a `top` beyond the model's heads, a control of another model, a task that
            cannot be scored on this model, one of a single subject, or logits that are not finite in float16.
    """
    names = [each.name for each in parse_method_names(method)]
    asked = roles_of(roles)
    # What can be refused before the model runs.
    for role in asked:
        needed = role.quantity.partition(".")[0] if "." in role.quantity else None
        if needed is not None and needed not in [each.partition("@")[0] for each in names]:
            raise InputError(
                f"role {role.name!r} is {role}, and the method {method!r} does not measure it; give --method {needed} "
                "(in Python: method=...)"
            )
    if top != "elbow" and (isinstance(top, str) or top < 1):
        raise InputError(f"top {top!r} must be at least 1, or 'elbow'")
    if top != "elbow" and top > (total := model.n_layers * model.n_heads):
        raise InputError(f"top {top} is more than the {total} heads of {model.name}; give at most {total}")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise InputError(f"threshold {threshold!r} must be a number of at least 0: a distance from zero")
    if rank_by not in RANKINGS:
        raise InputError(f"rank_by {rank_by!r} is unknown; {nearest(rank_by, RANKINGS)}")
    for name, control in (controls or {}).items():
        for warning in control.check_model(model.identity()):
            log.warning("control %s: %s", name, warning)
    encoded = (
        task if isinstance(task, EncodedTask) else encode(task, model.tokenizer, model.positions, model.vocabulary)
    )
    if encoded.n_subjects < 2:
        raise InputError(
            f"task {encoded.task.name!r} has prompts about one subject alone, "
            f"{encoded.examples[0].example.subject!r}, and heads are confirmed by intervals over subjects; "
            "add examples of others"
        )
    if encoded.n_subjects < FEW_SUBJECTS:
        log.warning(
            "task %s has prompts about %d subjects alone: intervals over so few say little; give %d or more",
            encoded.task.name,
            encoded.n_subjects,
            ENOUGH_SUBJECTS,
        )
    _require_previous(asked, encoded)
    if model.dtype == torch.float16:  # 65504 is its largest number, which long prompts of some models exceed
        longest = max(encoded.examples, key=lambda example: len(example.tokens)).tokens.to(model.device)
        require_finite_logits(probe_logits(model.hf, longest[None]), model.dtype, model.name)
    silenced = {name: control.roles for name, control in (controls or {}).items()}
    alone = {example.example.subject for example in encoded.examples if not example.others}
    if rank_by == "contrast" and alone:
        log.warning(
            "task %s: %s, so heads are ranked against the vocabulary%s",
            encoded.task.name,
            "all subjects have the same answers"
            if (everywhere := len(alone) == encoded.n_subjects)
            else f"the answers of {len(alone)} of {encoded.n_subjects} subjects hold all others'",
            "" if everywhere else " there",
        )
    in_words = {} if asked == DEFAULT_ROLES else {role.name: str(role) for role in asked}
    options = (names, verify_top, n_random, seed, top, threshold, silenced, rank_by, *([in_words] if in_words else []))
    parallel = ParallelMap(partial, _key(model, encoded, *options), share)
    # Score every head, rank each role, cut at the elbow where it is asked for.
    scores = with_differences(score_examples(model, encoded.examples, method, seed, progress, parallel), asked)
    rules = {role.name: rule_for(role, scores, rank_by) for role in asked}
    formed = [rules[role.name].rank for role in asked if role.less is None and "." not in role.quantity]
    if rank_by != "raw" and (raw := {name for name in formed if not name.endswith(f"_{rank_by}")}):
        log.warning(
            "%s: the method has no %s scores; heads are ranked by raw ones, which a softmax may not feel",
            ", ".join(sorted(raw)),
            rank_by,
        )
    at_most = ELBOW_UP_TO if top == "elbow" else top
    ranked = {role.name: rank(scores, role, at_most, threshold, rank_by, roles=asked) for role in asked}
    if top == "elbow":
        ranked = {
            role.name: _to_elbow(model, encoded.examples, ranked[role.name], role, parallel, progress) for role in asked
        }
    # The head set, and its causal proof.
    heads = HeadSet(
        model=model.identity(),
        task=encoded.summary(),
        method={
            "name": method,
            "parameters": {
                "top": top,
                "threshold": threshold,
                "verify_top": verify_top,
                "n_random": n_random,
                "controls": {name: control.task.get("name") for name, control in (controls or {}).items()},
                "examples_scored": scores.counts(),
                "rank_by": rank_by,
                "false_discovery_rate": FDR,
                "rules": {role: rule.to_json() for role, rule in rules.items()},
                **({"roles": in_words} if in_words else {}),
            },
            "seed": seed,
        },
        roles={role: tuple(entries) for role, entries in ranked.items()},
        stability={
            role.name: stability(
                scores, role, max(1, len(ranked[role.name])) if top == "elbow" else top, seed=seed, by=rank_by
            )
            for role in asked
        }
        | {"bootstrap": 200},
        **provenance(),
    )
    verified = verify(
        model, heads, encoded.examples, scores, verify_top, n_random, seed, progress, controls, parallel, rank_by, asked
    )
    return IdentifyResult(model, verified, scores, encoded.examples, parallel)


def _require_previous(roles: Sequence[Role], encoded: EncodedTask) -> None:
    """Refuse roles of previous answers on a task without any (InputError)."""
    if any(example.previous_tokens for example in encoded.examples):
        return
    for role in roles:
        of_previous = "previous" in (name.rpartition(".")[2].split("_")[0] for name in (role.quantity, role.less or ""))
        if of_previous and role.without_previous is None:
            raise InputError(
                f"role {role.name}={role} is about previous answers, and no prompt of task {encoded.task.name!r} has "
                "one; give a task with `previous`, or another role"
            )


def _key(model: HeadModel, task: EncodedTask, *options: Any) -> dict[str, Any]:
    # Tokens too: they depend on the tokenizer and its chat template, which may be changed between two calls.
    tokens = [example.tokens.tolist() for example in task.examples]
    versions = provenance()["versions"]
    return {
        "model": model.identity(),
        "task": task.summary(),
        "tokens": tokens,
        "options": options,
        "versions": versions,
    }


def _to_elbow(
    model: HeadModel,
    examples: Sequence[Encoded],
    ranked: list[RankedHead],
    role: Role,
    parallel: ParallelMap,
    progress: Progress,
) -> list[RankedHead]:
    """The best heads up to the bend of their cumulative effect on the role's quantity."""
    if not ranked:
        return ranked
    sets = {str(k): [(entry.layer, entry.head) for entry in ranked[:k]] for k in range(len(ranked) + 1)}
    values = probabilities(model, examples, sets, parallel, progress, f"elbow {role.name}")
    listing = [index for index, encoded in enumerate(examples) if encoded.previous_tokens]
    curve = values[:, 1, listing] if role.probability == "p_previous" and listing else values[:, 0]
    return ranked[: elbow(curve.mean(-1).tolist())]
