"""Small llama models whose heads are known because they were put there: ground truth for the methods that find heads.

    planted = plant(Planting("gqa", seed=1))
    scores = score(planted.view(), planted.task, "ablation")
    planted.grade("recall", scores.mean("ablation.target"))  # AUROC, average precision, precision at k, signs

A planted model answers list prompts ("List Land03: 1. town07 2. town01 3.") by promoting all of a subject's answers and
then suppressing those already given (Yan & Jia 2025). Its weights are written down, not trained, and it is an ordinary
`LlamaForCausalLM` that saves, loads and is viewed like any other. The roles:

    recall         reads the subject at END, writes +g W_U[a] for *all* its answers, those already given too
    suppression    reads the previous answers at END, writes -g W_U[a] of what it reads
    helper         writes, at END, the query feature that recall (the first) or suppression heads (the second) look
                   with: nothing to the logits directly, much to them indirectly
    redundant      pairs (primary, backup), flat. The primary is a recall head that also says that it has written; the
                   backup, in a later layer, reads the subject fully only where nothing has been said
    decoy_attends  looks at the subject (the first) or the previous answers (the second), and writes nothing
    decoy_writes   has a recall head's (the first) or suppression head's (the second) OV circuit, several times as
                   strong, and uses it wherever no answer comes next; at END it looks at <bos>, whose value it ignores
    background     everything else: random queries, small random outputs

How the weights make them do so is in `weights`. A `Planting` with more `background` and `noise` is harder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.build import Template, build
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.utils.errors import InputError

from .metrics import Head, auroc, average_precision, precision_at_k, sign_accuracy
from .planting import MARKERS, PREVIOUS, ROPE_THETA, Planting, check_planting
from .weights import Matrix, assign_roles, state_dict

TEMPLATES = (Template("List {subject}:"), Template("Some {subject}:", "\n- {answer}"))
SIGNS = {"recall": 1.0, "suppression": -1.0}  # of the effect on the remaining, and on the previous answers
_WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "List", "Some", ":", *MARKERS, *"123456789")

KINDS = (
    Planting("mha", n_kv_heads=8),
    Planting("gqa"),
    Planting("mqa", n_kv_heads=1),
    Planting("narrow", d_model=64),  # head_dim is three times d_model / n_heads
    Planting("amplified", amplification=0.5),
    Planting("redundant", n_pairs=1),
)


@dataclass(frozen=True)
class PlantedModel:
    """A model with known heads.

    Attributes:
        planting: what was asked for.
        model: the model, float32, in eval mode.
        tokenizer: one token a word; gives offsets; puts `<bos>` in front.
        task: list prompts with previous answers; each has a counterpart of the same length about another subject, with
            that subject's answers as the previous ones.
        roles: role -> heads (see the module's docstring); every head has one role.
    """

    planting: Planting
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    task: Task
    roles: dict[str, tuple[Head, ...]]

    def view(self) -> HeadModel:
        """The checked view of the model's heads."""
        return wrap_model(self.model, self.tokenizer, f"planted-{self.planting.name}-{self.planting.seed}")

    def truth(
        self, role: str, helper: Literal["excluded", "positive", "negative"] = "excluded"
    ) -> tuple[list[Head], list[Head]]:
        """The heads that recall (or suppress) and those that do not.

        Redundant pairs recall. A role's own helper is neither by default: it writes nothing toward the answers, which
        makes it a false alarm to direct methods, yet without it they fall, which makes it a true hit to causal ones.

        Returns:
            positives and negatives.

        Raises:
            InputError: a role without truth.
        """
        if role not in SIGNS:
            raise InputError(f"role {role!r} has no truth; choose one of {', '.join(SIGNS)}")
        own_helper = self.roles["helper"][list(SIGNS).index(role)]
        positives = [*self.roles[role], *(self.roles["redundant"] if role == "recall" else ())]
        everyone = [head for heads in self.roles.values() for head in heads]
        negatives = sorted(set(everyone) - {*positives, own_helper})
        if helper != "excluded":
            (positives if helper == "positive" else negatives).append(own_helper)
        return positives, negatives

    def grade(
        self, role: str, scores: ArrayLike, helper: Literal["excluded", "positive", "negative"] = "excluded"
    ) -> dict[str, float]:
        """How well `scores` find the heads of a role.

        Args:
            scores: `[n_layers, n_heads]`, positive = the head raises the remaining answers (for recall) or the
                previous answers (for suppression): a suppression head is one with a strongly *negative* score.
            helper: how the role's helper counts (see `truth`).

        Returns:
            auroc, average_precision, precision_at_k (k = number of positives), sign_accuracy (over the positives).
        """
        positives, negatives = self.truth(role, helper)
        signed = SIGNS[role] * np.asarray(scores, dtype=np.float64)
        return {
            "auroc": auroc(signed, positives, negatives),
            "average_precision": average_precision(signed, positives, negatives),
            "precision_at_k": precision_at_k(signed, positives, negatives),
            "sign_accuracy": sign_accuracy(signed, positives, 1.0),
        }


def plant(planting: Planting) -> PlantedModel:
    """Build the model, its tokenizer, its task and the truth about its heads.

    Raises:
        InputError: sizes that cannot hold what is to be planted.
    """
    check_planting(planting)
    generator = np.random.default_rng(planting.seed)
    facts = {
        subject: [
            planting.answers[i] for i in generator.permutation(planting.n_answers)[: planting.answers_per_subject]
        ]
        for subject in planting.subjects
    }
    roles = assign_roles(planting, generator)
    tokenizer = _tokenizer(planting)
    weights = state_dict(planting, roles, facts, tokenizer.get_vocab(), generator)
    return PlantedModel(planting, _model(planting, len(tokenizer), weights), tokenizer, _task(planting, facts), roles)


def _model(planting: Planting, vocabulary: int, weights: Mapping[str, Matrix]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=planting.d_model,
        intermediate_size=len(weights["model.layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=planting.n_layers,
        num_attention_heads=planting.n_heads,
        num_key_value_heads=planting.n_kv_heads,
        head_dim=planting.head_dim,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        pad_token_id=_WORDS.index("<pad>"),
        bos_token_id=_WORDS.index("<bos>"),
        eos_token_id=_WORDS.index("<eos>"),
    )
    with torch.random.fork_rng(devices=[]):  # the weights it starts with are overwritten; nobody's randomness is used
        model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()})
    return model.eval()


# --- words ------------------------------------------------------------------------------------------------------------


def _tokenizer(planting: Planting) -> PreTrainedTokenizerFast:
    """Words and punctuation marks are tokens; white space only separates; `<bos>` comes first."""
    words = [*_WORDS, *planting.subjects, *planting.answers]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", _WORDS.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def _task(planting: Planting, facts: Mapping[str, list[str]]) -> Task:
    examples = build(facts, TEMPLATES, PREVIOUS, planting.seed)
    name = f"planted-{planting.name}-{planting.seed}"
    return Task(name, tuple(_with_counterpart(example, facts) for example in examples))


def _with_counterpart(example: Example, facts: Mapping[str, list[str]]) -> Example:
    """Add the same prompt about the subject that shares fewest answers, with its own answers as the previous ones."""
    other = min(
        (subject for subject in facts if subject != example.subject),
        key=lambda subject: (len(set(facts[subject]) & set(example.answers)), subject),
    )
    own_first = sorted(facts[other], key=lambda answer: answer in example.answers)
    swap = {example.subject: other, **dict(zip(example.previous, own_first, strict=False))}
    return replace(example, corrupt=re.sub(r"\w+", lambda word: swap.get(word[0], word[0]), example.prompt))
