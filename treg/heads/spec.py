"""How the head of a Hugging Face causal LM is read, so that a fused op can take the place of its
logits.

Tables say which modules stand before the projection and what scales, caps and cuts the logits; a
check on a few tokens then holds the model's own log-probs against that reading. A head that the
tables misread is refused by name.

V vocabulary, D hidden size.
"""

import functools
import inspect
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from treg.heads.adapters import has_adapter, read_adapted
from treg.heads.checks import (
    INSTEAD,
    check_head,
    check_sequences_of,
    name_of,
    shape_of,
    without_cache,
)

# attributes of the text config, and the power to which their value enters logit_scale
SCALES = {
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_scaling": -1,  # minicpm3 divides the hidden states: the same, its head has no bias
    "logits_mup_width_multiplier": -1,
}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
VOCABS = ("unpadded_vocab_size",)

# model types where an attribute misleads; 0: it is there and not used
EXCEPTIONS = {
    "gemma3": {"final_logit_softcapping": 0},
    "hyperclovax": {"logits_scaling": 1},
    "mpt": {"logit_scale": 0},
}

_SWAPPING: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # module -> lock, held while its forward is another

# what stands between backbone and projection, modules by name: the first row of which a model has
# every one
Steps = tuple[str | Callable[[Tensor], Tensor], ...]
BEFORE: tuple[Steps, ...] = (
    ("cls.predictions.transform",),  # bert and its kin
    ("cls.predictions.dense", "cls.predictions.activation", "cls.predictions.LayerNorm"),  # rembert
    ("lm_head.dense", F.gelu, "lm_head.layer_norm"),  # roberta and its kin
    ("generator_predictions",),  # electra
    ("lm_head.dense", "lm_head.act", "lm_head.norm"),  # modernbert-decoder
)


@dataclass(frozen=True)
class HeadSpec:
    """A causal LM as backbone, modules, projection, and z = softcap * tanh(logit_scale * (h W^T +
    b) / softcap).
    """

    model: PreTrainedModel  # the causal LM, below PEFT
    backbone: nn.Module  # its first output is the hidden states, after the final norm
    projection: nn.Module  # has weight [V, D], and bias [V] perhaps
    # what is between the two, in order; names are looked up at each call, for PEFT replaces modules
    before: Steps
    logit_scale: float
    softcap: float | None
    vocab: int | None  # rows of weight that are used; None: all
    pending: list[Callable[["HeadSpec"], None]] = field(
        default_factory=list
    )  # checks that wait for their weights

    def hidden(self, **inputs) -> Tensor:
        """What the projection sees, [..., D]. inputs: as for the model's forward; None is left out.

        The cache is off, and transformers' attention masks then take position_ids that start over
        for packed sequences.
        """
        given = {name: x for name, x in inputs.items() if x is not None}
        hidden = self.backbone(**given | without_cache(self.backbone))[0]
        for step in self.before:
            hidden = (self.model.get_submodule(step) if isinstance(step, str) else step)(hidden)
        return hidden

    def through(self, fn: Callable[[Tensor, dict[str, Any]], Any], hidden: Tensor) -> Any:
        """fn(hidden, operands): operands are weight, bias, logit_scale and softcap, keyword
        arguments of the ops.

        It runs inside a call of the projection (and of what is below it and has weights: PEFT's
        layers), in place of its forward, so that whatever shards the projection by itself (FSDP2,
        DeepSpeed ZeRO-3) gathers the weight for it, again in the backward, and reduces its
        gradient. With LoRA on the projection hidden has more columns than the model's (see
        `treg.heads.adapters`).

        ValueError: the projection is not the one that was checked, its weight is sharded otherwise,
        or its adapter is not LoRA.
        """
        if self.model.get_output_embeddings() is not self.projection:
            fix = "call install_head or resolve_head again"
            raise ValueError(
                f"{name_of(self.model)}: its output embeddings were replaced after they were read; {fix}"
            )

        def inside(hidden: Tensor) -> Any:
            return fn(*self._read(hidden))

        for module in reversed(list(self.projection.modules())):
            has_weights = next(module.parameters(recurse=False), None) is not None
            # a ParameterDict is no module to be called: what holds it gathers it
            if module is self.projection or (
                has_weights and type(module).__call__ is nn.Module.__call__
            ):
                inside = functools.partial(_call_as, module, inside)
        return inside(hidden)

    def _read(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """hidden and the operands as they are now."""
        projection = self.projection
        if state := _unreadable(projection.weight):
            fix = "shard them with FSDP2 or ZeRO-3; for a vocabulary-parallel head see treg.ops.linear_logprobs"
            raise ValueError(
                f"{name_of(self.model)}: the output embeddings are {state} in the model's forward; {fix}"
            )
        if has_adapter(projection):
            try:
                hidden, weight, bias = read_adapted(projection, hidden)
            except ValueError as error:
                fix = "train the head with modules_to_save, or leave it out of target_modules"
                raise ValueError(
                    f"{name_of(self.model)}: its output embeddings have {error}; {fix}"
                ) from error
        else:
            weight, bias = projection.weight, getattr(projection, "bias", None)
        if self.vocab is not None:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        # models with a float32 residual stream round its rows here
        hidden = hidden.to(weight.dtype) if hidden.dtype == torch.float32 else hidden
        return hidden, {
            "weight": weight,
            "bias": bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }


def _call_as(module: nn.Module, forward: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """module(hidden), with its hooks, if its forward were another in this thread."""
    me = threading.get_ident()
    with _SWAPPING.setdefault(module, threading.RLock()):
        replaced = module.__dict__.get("forward")  # accelerate's, perhaps
        own = module.forward
        module.forward = lambda *args, **kwargs: (
            forward(*args) if threading.get_ident() == me else own(*args, **kwargs)
        )
        try:
            return module(hidden)
        finally:
            if replaced is None:
                del module.forward
            else:
                module.forward = replaced


def resolve_head(model: nn.Module) -> HeadSpec:
    """The head of a PreTrainedModel or PeftModel, checked against the model's own log-probs on 8
    tokens.

    Weights that are not here yet (sharded, on the meta device, left to the first process by FSDP)
    are waited for: the check then runs in the first forward that `install_head` sees, in every
    process at once.

    Raises:
        TypeError: model is neither. ValueError: the head is not of this form, or cannot be checked;
            names the class.
    """
    model = _below_peft(model)
    projection: Any = model.get_output_embeddings()
    weight: Any = getattr(projection, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or len(shape_of(weight)) != 2
        or not weight.is_floating_point()
    ):
        got = f"expected a module with a floating weight [V, D], got {type(projection).__name__}"
        raise ValueError(f"{name_of(model)}: output embeddings: {got}; {INSTEAD}")
    backbone = model.base_model if model.base_model is not model else model.model
    spec = HeadSpec(model, backbone, projection, _before(model), *_numbers(model))
    _now_or_later(spec, check_head)
    return spec


def install_head(model: nn.Module) -> HeadSpec:
    """resolve_head, and from then on `model(..., head_fn=fn)` returns fn(hidden, operands) in place
    of logits.

    See `HeadSpec.hidden` and `HeadSpec.through`. All of it runs inside the causal LM's forward, so
    that the hooks of DDP, FSDP, PEFT and accelerate fire. Without head_fn the original forward
    runs. A second call changes nothing, unless the output embeddings were replaced in between.
    """
    model = _below_peft(model)
    installed = getattr(model, "_treg_head", None)
    # a pickled model comes back with the forward of its class
    patched = (
        installed is not None
        and getattr(model.forward, "__func__", None) is not type(model).forward
    )
    if patched and installed.projection is model.get_output_embeddings():
        return installed
    spec = resolve_head(model)
    if not patched:
        model._treg_forward = model.forward
        model.forward = MethodType(_forward_with_head(model.forward), model)
    model._treg_head = spec
    return spec


def run_head(
    model: nn.Module, head_fn: Callable[[Tensor, dict[str, Any]], Any], **inputs: Any
) -> Any:
    """model(**inputs, head_fn=head_fn) of a model that may be wrapped, with the results in their
    own dtypes.

    FSDP2's output_dtype, which accelerate sets to bfloat16 beside bfloat16 parameters, would round
    log-probs and losses on their way out. What it rounded from carries the same hooks, and is
    returned instead.
    """
    kept = []

    def keep(hidden: Tensor, operands: dict[str, Any]) -> Any:
        kept[:] = [head_fn(hidden, operands)]
        return kept[0]

    found = model(**inputs, head_fn=keep)
    if not kept:
        fix = "call install_head on it, after loading and before wrapping"
        raise ValueError(
            f"model: expected one whose head is installed, got {type(model).__name__} that is not; {fix}"
        )
    dtypes = [
        [x.dtype for x in tree_leaves(result) if isinstance(x, Tensor)]
        for result in (found, kept[0])
    ]
    return found if dtypes[0] == dtypes[1] else kept[0]


def _forward_with_head(original: Callable) -> Callable:
    """A function of self, not of one model: a deep copy's forward is then the copy's own. Keeps the
    signature.
    """
    signature = inspect.signature(original)

    def forward(self, *args, head_fn=None, **kwargs):
        if head_fn is None:
            return self._treg_forward(*args, **kwargs)
        keep = kwargs.pop("logits_to_keep", None)
        if isinstance(keep, Tensor) or keep:
            raise ValueError(
                "logits_to_keep: expected none together with head_fn; select rows of hidden in head_fn"
            )
        named = dict(zip(signature.parameters, args, strict=False))
        spec = self._treg_head
        while spec.pending:
            spec.pending[0](spec)
            spec.pending.pop(0)
        return spec.through(head_fn, spec.hidden(**named, **kwargs))

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])
    return forward


def _below_peft(model: nn.Module) -> PreTrainedModel:
    base = (
        model
        if isinstance(model, PreTrainedModel)
        else getattr(model, "get_base_model", lambda: None)()
    )
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model: expected an unwrapped PreTrainedModel or PeftModel, got {type(model).__name__}"
        )
    return base


def _unreadable(p: Tensor) -> str | None:
    """Why a weight's values are not here."""
    if type(p).__name__ == "DTensor" or (
        hasattr(p, "ds_shape") and not p.numel()
    ):  # ds_shape: DeepSpeed ZeRO-3
        return "sharded"
    return "on the meta device" if p.is_meta else None


def _now_or_later(spec: HeadSpec, check: Callable[[HeadSpec], None]) -> None:
    """Run a check, or leave it to the first forward where some weight cannot be read before
    that.
    """
    # FSDP may have loaded the weights into the first process only
    if is_fsdp_enabled() or any(map(_unreadable, spec.model.parameters())):
        spec.pending.append(check)
    else:
        check(spec)


def _before(model: PreTrainedModel) -> Steps:
    names = {name for name, _ in model.named_modules()} | {F.gelu}  # a function is always there
    return next((row for row in BEFORE if names.issuperset(row)), ())


def _numbers(model: PreTrainedModel) -> tuple[float, float | None, int | None]:
    """logit_scale, softcap and vocab, by the tables."""
    config, power = (
        model.config.get_text_config(),
        SCALES | EXCEPTIONS.get(model.config.model_type, {}),
    )
    values = {
        name: getattr(config, name, None)
        for name in (*SCALES, *SOFTCAPS, *VOCABS)
        if power.get(name, 1)
    }
    values: dict[str, Any] = {name: x for name, x in values.items() if isinstance(x, int | float)}
    scale = math.prod((values[name] ** power[name] for name in SCALES if name in values), start=1.0)
    softcap, vocab = (
        next((values[name] for name in names if name in values), None)
        for names in (SOFTCAPS, VOCABS)
    )
    return scale, softcap, vocab


def check_sequences(spec: HeadSpec, *, packing: bool = False) -> None:
    """ValueError unless a hidden state depends on the tokens before it alone and, with packing, on
    its own sequence's.

    Packed sequences lie one after the other in one row, and position_ids that start anew tell them
    apart; models without positions, and recurrent layers, do not heed that. Where weights cannot be
    read yet, the check waits for them, as that of `resolve_head` does.
    """
    _now_or_later(spec, functools.partial(check_sequences_of, packing=packing))
