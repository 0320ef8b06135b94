"""What a training pass computed in chosen heads, kept with its gradient until the penalties have been added up.

    watcher = PassWatcher(model, captures)
    with watcher.installed():
        loss = ...                        # a pass in training mode, with gradient
        watcher.last.z[3]                 # [batch, seq, n_heads * head_dim], as the output projection got it

Only references to tensors that exist anyway are kept and nothing is computed in the hooks, so that gradient
checkpointing finds the same operations when it runs a layer again. A pass without gradient (a reference's, an
evaluation's) is not looked at; of several with gradient the last counts. Behind a head-tuning adapter, z is the scaled
and shifted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from headtune.analysis.models.attention import AttentionCall, look_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.progress import Notify
from headtune.train.tuners.head_weights import output_slices

from .head_penalties import contributions

FINAL = -1  # stands for a layer where the final norm is meant


@dataclass(frozen=True)
class Captures:
    """What to keep of a pass.

    Attributes:
        z: layers whose output projection's input is kept.
        attention: layers whose queries and keys are kept.
        norms: layers whose post-attention norm's input is kept (where the family has that norm), `FINAL` for the norm
            before the unembedding.
    """

    z: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    norms: frozenset[int] = frozenset()

    @staticmethod
    def union(parts: Iterable[Captures]) -> Captures:
        """All that any of several asks for."""
        several = list(parts)
        z, attention, norms = (
            frozenset[int]().union(*(getattr(part, kind) for part in several)) for kind in ("z", "attention", "norms")
        )
        return Captures(z, attention, norms)


@dataclass(eq=False)
class HeadPass:
    """One pass of the backbone.

    Attributes:
        arguments: what the backbone was called with.
        present: `[batch, seq]` bool, tokens that are not padding.
        z: layer -> `[batch, seq, n_heads * head_dim]`.
        attention: layer -> its attention call.
        norms: layer, or `FINAL` -> `[batch, seq, d_model]`.
    """

    arguments: dict[str, Any]
    present: Tensor
    z: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionCall] = field(default_factory=dict)
    norms: dict[int, Tensor] = field(default_factory=dict)

    def require(self, captures: Captures) -> None:
        """Raise CheckError where something did not come with the pass."""
        for kind in ("z", "attention", "norms"):
            if missing := sorted(getattr(captures, kind) - getattr(self, kind).keys()):
                raise CheckError(
                    f"layer {missing[0]} did not run in this pass, or without gradient; switch off the prefix cache "
                    "(method.prefix_cache=false) and re-entrant gradient checkpointing "
                    "(gradient_checkpointing_kwargs={'use_reentrant': False})"
                )


def bare(module: nn.Module) -> Any:
    """A module without the adapters around it; of a norm that LN tuning replaces, the one that acts."""
    inner: Any = module
    while isinstance(inner, BaseTunerLayer):
        layer: Any = inner
        if isinstance(layer, LNTuningLayer) and not (layer.disable_adapters or layer.merged):
            return layer.ln_tuning_layers[layer.active_adapters[0]]
        inner = layer.base_layer
    return inner


def carries_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def alike(model: HeadModel, hf: PreTrainedModel) -> HeadModel:
    """The same view of another model of the same configuration."""
    return dataclasses.replace(model, hf=hf)


class PassWatcher:
    """Keeps what is wanted of each training pass of a model, and of passes of its reference.

    Args:
        model: the model; it may carry a PEFT adapter by the time `installed` is entered.
        captures: what to keep of training passes.
    """

    def __init__(self, model: HeadModel, captures: Captures) -> None:
        self.model = model
        self.captures = captures
        self.last: HeadPass | None = None
        self._running: HeadPass | None = None
        self._with_gradient = True  # what the running pass must have for its tensors to be kept

    @contextlib.contextmanager
    def installed(self, reference: HeadModel | None = None) -> Iterator[None]:
        """Watch inside the block, and the reference too where it is another model; afterwards nothing is held."""
        models = [self.model] if reference is None else [self.model, reference]
        implementations = [view.hf.config._attn_implementation for view in models]
        with contextlib.ExitStack() as during:
            if self.captures.attention:
                for view, implementation in zip(models, implementations, strict=True):
                    view.record_attention(True)
                    during.callback(view.hf.set_attn_implementation, implementation)
                during.enter_context(look_with(self._look))
            backbone = _backbone(self.model)
            before = backbone.register_forward_pre_hook(self._before, with_kwargs=True)
            during.callback(before.remove)
            during.callback(backbone.register_forward_hook(self._after, always_call=True).remove)
            for view in models:
                self._watch(view, during)
            try:
                yield
            finally:
                self.last = self._running = None

    def _watch(self, model: HeadModel, during: contextlib.ExitStack) -> None:
        def keep(kind: str, layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if self._running is not None and torch.is_grad_enabled() == self._with_gradient:
                    getattr(self._running, kind)[layer] = args[0] if args else kwargs["hidden_states"]

            return hook

        for layer in self.captures.z:
            module = bare(model.projection(layer))
            during.callback(module.register_forward_pre_hook(keep("z", layer), with_kwargs=True).remove)
        for layer in self.captures.norms:
            norm: Any = model.final_norm if layer == FINAL else model.post_attention_norm(layer)
            during.callback(norm.register_forward_pre_hook(keep("norms", layer), with_kwargs=True).remove)

    def _look(self, call: AttentionCall) -> None:
        if (
            self._running is not None
            and call.layer in self.captures.attention
            and torch.is_grad_enabled() == self._with_gradient
        ):
            self._running.attention[call.layer] = call

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        tokens = args[0] if args else kwargs.get("input_ids")
        if not isinstance(tokens, Tensor):
            raise InputError("a penalty on heads needs the tokens of a pass; call the model with input_ids")
        self.last = None
        self._running = HeadPass({"input_ids": tokens, **kwargs}, _present(tokens, kwargs.get("attention_mask")))

    def _after(self, *_: Any) -> None:
        # Not after a pass within the pass, which a prefix cache makes, without gradient, for rows it does not know.
        if self._running is not None and self._with_gradient and torch.is_grad_enabled():
            self.last, self._running = self._running, None

    @torch.no_grad()
    def again(self, model: HeadModel, training_pass: HeadPass, captures: Captures) -> HeadPass:
        """What the reference computes on a pass's inputs: in eval mode, up to the final norm, without gradient.

        Args:
            model: the reference, watched by `installed`: another model, or this one with its adapter switched off.
            training_pass: the pass.
            captures: what has to be there afterwards.
        """
        backbone = _backbone(model)
        training = [module for module in backbone.modules() if module.training]
        self._running, self._with_gradient = HeadPass(training_pass.arguments, training_pass.present), False
        try:
            backbone.eval()
            backbone(**{**training_pass.arguments, "use_cache": False})
            base = self._running
        finally:
            self._running, self._with_gradient = None, True
            for module in training:
                module.training = True
        base.require(captures)
        return base


def _backbone(model: HeadModel) -> nn.Module:
    """The module that holds the layers and the final norm; every pass, fused head or not, goes through it."""
    return model.hf.get_submodule(model.architecture.layers.rpartition(".")[0])


def _present(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.shape != tokens.shape:
        raise InputError(
            f"an attention mask of shape {list(mask.shape)} for tokens {list(tokens.shape)}; give it alike"
        )
    return mask.bool()


def layers_of(pairs: Collection[tuple[int, int]]) -> frozenset[int]:
    return frozenset(layer for layer, _ in pairs)


def of_heads(model: HeadModel, z: Tensor, heads: Sequence[int]) -> Tensor:
    """`[..., len(heads), head_dim]` of `[..., n_heads * head_dim]`."""
    return z.unflatten(-1, (model.n_heads, model.head_dim))[..., list(heads), :]


def rows_read(ends: Tensor, tokens: Tensor) -> Tensor:
    """The rows with a right token."""
    return ((ends >= 0) & (tokens >= 0).any(-1)).nonzero().flatten()


def head_contributions(
    model: HeadModel, head_pass: HeadPass, by_layer: Mapping[int, Sequence[int]], ends: Tensor, tokens: Tensor
) -> dict[int, Tensor]:
    """Layer -> `[rows with a right token, heads, n]`: each head's part of right tokens' logits at END, in logits.

    With gradient through z and W_O; the directions u and the scale of the norms are this pass's, held.
    """
    rows = rows_read(ends, tokens)
    at, targets = ends[rows], tokens[rows].clamp(min=0)

    def at_end(x: Tensor) -> Tensor:
        return x[rows.to(x.device), at.to(x.device)]

    with torch.no_grad():
        unembedding: Any = bare(model.hf.get_output_embeddings()).weight
        norm, residual = bare(model.final_norm), at_end(head_pass.norms[FINAL])
        directions = [
            model.norm_directions(norm, x, unembedding[target.to(unembedding.device)])
            for x, target in zip(residual, targets, strict=True)
        ]
    by_head = {}
    for layer, heads in by_layer.items():
        post = model.post_attention_norm(layer)
        with torch.no_grad():
            inner = directions
            if post is not None:
                seen = zip(at_end(head_pass.norms[layer]), directions, strict=True)
                inner = [model.norm_directions(bare(post), x, u) for x, u in seen]
            stacked = torch.stack(inner) if inner else residual.new_zeros(0, targets.shape[1], model.d_model).float()
        z = of_heads(model, at_end(head_pass.z[layer]), heads)
        by_head[layer] = contributions(z, output_slices(model, layer, heads), stacked)
    return by_head


def dropout_of(module: nn.Module) -> str | None:
    """What of its input a module drops at random in training, as `Dropout.p is 0.1`; its parts are not looked at."""
    rates = {"p": module.p} if isinstance(module, nn.Dropout) else vars(module)
    for name, value in rates.items():
        if (name == "p" or "drop" in name) and isinstance(value, int | float) and value > 0:
            return f"{type(module).__name__}.{name} is {value}"
    return None


def warn_of_dropout(model: nn.Module, compared: str, notify: Notify) -> None:
    """Say so where a model drops at random what is compared with the pass of a model that does not."""
    parts = (module for name, module in model.named_modules() if "lora_dropout" not in name)
    if drops := next(filter(None, map(dropout_of, parts)), None):
        notify(
            f"the model drops at random in training ({drops}), what it is compared with does not: {compared} would not "
            "be 0 in a model that has not changed; to be rid of that, set dropout to 0 in its config.json"
        )


def option_tokens(model: HeadModel, *options: str) -> list[int]:
    """The token of each option that a prompt may name.

    Raises:
        InputError: an option that is not one token, or two that are the same.
    """
    token_ids: list[int] = []
    for option in options:
        tokens = model.tokenizer(option, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1:
            raise InputError(
                f"negative_attention has option {option!r}, which is {len(tokens)} tokens of this model; give one that "
                "is a single token (mind the leading space)"
            )
        if tokens[0] in token_ids:
            raise InputError(f"negative_attention has options {options} of the same token; give two that differ")
        token_ids.append(int(tokens[0]))
    return token_ids
