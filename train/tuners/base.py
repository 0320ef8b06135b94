"""What the PEFT tuners of heads have in common."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from peft import PeftConfig

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.utils.errors import InputError

if TYPE_CHECKING:
    from headtune.analysis.identify.pipeline import IdentifyResult
    from headtune.analysis.models.head_model import HeadModel

log = logging.getLogger(__name__)


@dataclass
class HeadTunerConfig(PeftConfig):
    """A PEFT configuration that names heads.

    Attributes:
        heads: `[[layer, head], ...]`.
        n_heads: query heads per layer; read from the model when left out.
    """

    heads: list[list[int]] = field(default_factory=list)
    n_heads: int | None = None
    modules_to_save: list[str] | None = None  # read by TRL, as is the next
    trainable_token_indices: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads = sorted([int(layer), int(head)] for layer, head in self.heads)
        if len({tuple(head) for head in self.heads}) < len(self.heads):
            raise InputError(f"heads {self.heads} name a head twice; remove the repeats")

    @classmethod
    def from_head_set(
        cls,
        heads: HeadSet | IdentifyResult | Path | str,
        role: str = "both",
        top: int = 8,
        model: HeadModel | None = None,
        **options: Any,
    ) -> Self:
        """The configuration for the heads that a recipe's `heads: {from: ..., role: ..., top: ...}` would choose.

            config = HeadTuningConfig.from_head_set(identify(model, task), role="recall", top=8)
            peft_model = get_peft_model(model.hf, config)       # or SFTTrainer(model.hf, ..., peft_config=config)

        Args:
            heads: a head set, what `identify` returned, or the path of a heads.json or of the folder that holds it.
            role: `recall`, `suppression`, `both`, or another role of the set.
            top: how many heads per role.
            model: where it is given, a head set of another model is refused here; otherwise what does not fit is
                refused when the adapter is put on the model.
            options: of the configuration; `task_type` is CAUSAL_LM where it is left out.

        Raises:
            InputError: no such file or role, no heads in it, more heads than the set could hold, or another model's.
        """
        if isinstance(heads, str | Path):
            path = Path(heads)
            chosen_from, source = HeadSet.load(path), str(path)
        else:
            chosen_from = heads if isinstance(heads, HeadSet) else heads.heads
            source = "the head set"
        if model is not None:
            for warning in chosen_from.check_model(model.identity()):
                log.warning(warning)
        pairs = chosen_from.top_heads(role, top, source, notify=log.info)
        defaults = {"task_type": "CAUSAL_LM", "n_heads": chosen_from.model["n_heads"]}
        return cls(heads=[list(pair) for pair in pairs], **{**defaults, **options})
