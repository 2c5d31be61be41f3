"""The head of a Hugging Face causal LM, as a fused op needs it in place of the logits.

V vocabulary, D hidden size.
"""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from treg.heads.adapters import has_adapter, read_adapted
from treg.heads.attention import run_branching
from treg.heads.tables import Steps

# weight, bias, logit_scale and softcap: keyword arguments of the ops
Operands = dict[str, Any]
# (hidden, operands) -> what takes the place of the logits
HeadFunction = Callable[[Tensor, Operands], Any]

# a lock for each module, held while its forward is replaced
_FORWARD_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class UnreadableHead(ValueError):
    """A head that treg does not read, with what to do about it."""


@dataclass(frozen=True)
class HeadSpec:
    """A causal LM as a backbone, the steps after it, and a projection.

    Its logits are softcap * tanh(logit_scale * (h W^T + b) / softcap), where h [..., D] is what the
    backbone and the steps give; without a softcap they are logit_scale * (h W^T + b).
    """

    model: PreTrainedModel  # the causal LM, below PEFT
    backbone: nn.Module  # its first output is the hidden states, after the final norm
    projection: nn.Module  # has weight [V, D], and bias [V] perhaps
    # What is between the two, in order. Names are looked up at each call: PEFT replaces modules.
    before: Steps
    logit_scale: float
    softcap: float | None
    vocab: int | None  # rows of weight that are used; None: all
    # checks that wait until the weights can be read
    pending: list[Callable[["HeadSpec"], None]] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)  # names of checks that need not run again

    def hidden(self, **inputs) -> Tensor:
        """What the projection sees, [..., D].

        The cache is off. transformers' attention masks then see from position_ids that start over
        where one packed sequence ends and the next begins.

        Args:
            inputs: as for the model's forward; those that are None are left out. And branches
                [n, 5] int64, where sequences that begin alike share rows (`treg.data.tree`): then
                input_ids and position_ids are those of the rows, and there is no attention_mask.
        """
        given = {name: x for name, x in inputs.items() if x is not None}
        branches = given.pop("branches", None)
        given |= self._without_cache
        if branches is None:
            hidden = self.backbone(**given)[0]
        else:
            hidden = run_branching(self.model, self.backbone, branches, given)[0]
        for step in self.before:
            function = self.model.get_submodule(step) if isinstance(step, str) else step
            hidden = function(hidden)
        return hidden

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the model's forward takes position_ids."""
        return "position_ids" in inspect.signature(self.model.forward).parameters

    @cached_property
    def _without_cache(self) -> dict[str, bool]:
        return without_cache(self.backbone)  # reading a signature takes 0.4 ms

    def through(self, fn: HeadFunction, hidden: Tensor) -> Any:
        """fn(hidden, operands), where operands are weight, bias, logit_scale and softcap.

        It runs inside a call of the projection (and of what is below it and has weights: PEFT's
        layers), in place of its forward. Whatever shards the projection by itself (FSDP2, DeepSpeed
        ZeRO-3) then gathers the weight for it, again in the backward, and reduces its gradient.

        Args:
            fn: given hidden [..., D] in the weight's dtype, and the operands as keyword arguments
                of the ops. With LoRA on the projection hidden has more columns than the model's
                (see `treg.heads.adapters`).
            hidden: [..., D], from `hidden`.
        Raises:
            ValueError: the projection is not the one that was checked, its weight is sharded
                otherwise, or its adapter is not LoRA.
        """
        if self.model.get_output_embeddings() is not self.projection:
            raise UnreadableHead(
                f"{name_of(self.model)}: its output embeddings were replaced after they were read; "
                "call install_head or resolve_head again"
            )

        def innermost(hidden: Tensor) -> Any:
            hidden, operands = self._operands(hidden)
            return fn(hidden, operands)

        call = innermost
        for module in self._modules_with_weights():
            call = functools.partial(_call_as, module, call)
        return call(hidden)

    def _modules_with_weights(self) -> list[nn.Module]:
        """The projection and the modules below it that hold weights, the projection last."""
        found = []
        for module in self.projection.modules():
            has_weights = next(module.parameters(recurse=False), None) is not None
            # a ParameterDict cannot be called: the module that holds it gathers its weights
            can_be_called = type(module).__call__ is nn.Module.__call__
            if module is self.projection or (has_weights and can_be_called):
                found.append(module)
        found.reverse()
        return found

    def _operands(self, hidden: Tensor) -> tuple[Tensor, Operands]:
        """hidden as the ops take it, and the operands as they are now."""
        hidden, weight, bias = self._weight_and_bias(hidden)
        if self.vocab is not None:
            weight = weight[: self.vocab]
            bias = None if bias is None else bias[: self.vocab]
        # models with a float32 residual stream round its rows here
        if hidden.dtype == torch.float32:
            hidden = hidden.to(weight.dtype)
        operands = {
            "weight": weight,
            "bias": bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }
        return hidden, operands

    def _weight_and_bias(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias; with the columns of LoRA where the projection has it."""
        projection: Any = self.projection
        state = why_unreadable(projection.weight)
        if state is not None:
            raise UnreadableHead(
                f"{name_of(self.model)}: the output embeddings are {state} in the model's forward; "
                "shard them with FSDP2 or ZeRO-3; for a vocabulary-parallel head see "
                "treg.ops.linear_logprobs"
            )
        if not has_adapter(projection):
            return hidden, projection.weight, getattr(projection, "bias", None)
        try:
            return read_adapted(projection, hidden)
        except ValueError as error:
            raise UnreadableHead(
                f"{name_of(self.model)}: its output embeddings have {error}; "
                "train the head with modules_to_save, or leave it out of target_modules"
            ) from error


def _call_as(module: nn.Module, forward: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """module(hidden) with its hooks, as if its forward were another one. Other threads that call
    the module meanwhile get its own forward.
    """
    thread = threading.get_ident()
    with _FORWARD_LOCKS.setdefault(module, threading.RLock()):
        replaced = module.__dict__.get("forward")  # accelerate's, perhaps
        own = module.forward

        def forward_of_this_thread(*args, **kwargs):
            if threading.get_ident() == thread:
                return forward(*args)
            return own(*args, **kwargs)

        module.forward = forward_of_this_thread
        try:
            return module(hidden)
        finally:
            if replaced is None:
                del module.forward
            else:
                module.forward = replaced


def name_of(model: PreTrainedModel) -> str:
    """The model's class and type, for errors."""
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def shape_of(weight: Tensor) -> torch.Size:
    """Of the whole weight: DeepSpeed ZeRO-3 leaves an empty tensor outside of its module."""
    return getattr(weight, "ds_shape", weight.shape)


def why_unreadable(weight: Tensor) -> str | None:
    """Why a weight's values are not here, None where they are."""
    left_empty_by_zero3 = hasattr(weight, "ds_shape") and not weight.numel()
    if type(weight).__name__ == "DTensor" or left_empty_by_zero3:
        return "sharded"
    return "on the meta device" if weight.is_meta else None


def without_cache(module: nn.Module) -> dict[str, bool]:
    """use_cache=False, where the module's forward takes it."""
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if takes_any or "use_cache" in parameters else {}
