"""The head of a Hugging Face causal LM: found by the tables, checked, and put in place of the
logits.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_enabled

from treg.heads.checks import (
    INSTEAD,
    check_branches_of,
    check_head,
    check_sequences_of,
)
from treg.heads.spec import HeadFunction, HeadSpec, Operands, name_of, shape_of, why_unreadable
from treg.heads.tables import logit_scale_of, softcap_of, steps_before, used_vocab

BRANCHES = "branches"  # the check of rows of branches, see `HeadSpec.passed`


def resolve_head(model: nn.Module) -> HeadSpec:
    """The head of a PreTrainedModel or PeftModel, checked against the model's own log-probs on 8
    tokens.

    Weights that are not here yet (sharded, on the meta device, left to the first process by FSDP)
    are waited for: the check then runs in the first forward that `install_head` sees, in every
    process at once.

    Raises:
        TypeError: model is neither.
        ValueError: the head is not of this form, or cannot be checked, or the model's own forward
            fails on the tokens; names the class.
    """
    model = _below_peft(model)
    projection: Any = model.get_output_embeddings()
    if not _has_floating_matrix(projection):
        raise ValueError(
            f"{name_of(model)}: output embeddings: expected a module with a floating weight "
            f"[V, D], got {type(projection).__name__}; {INSTEAD}"
        )
    spec = HeadSpec(
        model=model,
        backbone=_backbone(model),
        projection=projection,
        before=steps_before(model),
        logit_scale=logit_scale_of(model),
        softcap=softcap_of(model),
        vocab=used_vocab(model),
    )
    _check_now_or_later(spec, check_head)
    return spec


def install_head(model: nn.Module) -> HeadSpec:
    """resolve_head, and from then on `model(..., head_fn=fn)` returns fn(hidden, operands) in place
    of logits.

    See `HeadSpec.hidden` and `HeadSpec.through`. All of it runs inside the causal LM's forward, so
    that the hooks of DDP, FSDP, PEFT and accelerate fire. Without head_fn the original forward
    runs. A second call changes nothing, unless the output embeddings were replaced in between.

    Raises:
        TypeError, ValueError: as `resolve_head`.
    """
    causal_lm: Any = _below_peft(model)
    # a pickled model comes back with its spec, and with the forward of its class
    has_forward_of_class = getattr(causal_lm.forward, "__func__", None) is type(causal_lm).forward
    patched = hasattr(causal_lm, "_treg_head") and not has_forward_of_class
    if patched and causal_lm._treg_head.projection is causal_lm.get_output_embeddings():
        return causal_lm._treg_head
    spec = resolve_head(causal_lm)
    if not patched:
        causal_lm._treg_forward = causal_lm.forward
        causal_lm.forward = MethodType(_forward_with_head(causal_lm.forward), causal_lm)
    causal_lm._treg_head = spec
    return spec


def run_head(model: nn.Module, head_fn: HeadFunction, **inputs: Any) -> Any:
    """model(**inputs, head_fn=head_fn) of a model that may be wrapped, with the results in their
    own dtypes.

    FSDP2's output_dtype, which accelerate sets to bfloat16 beside bfloat16 parameters, would round
    log-probs and losses on their way out. What it rounded from carries the same hooks, and is
    returned instead.

    Raises:
        ValueError: a model whose head is not installed.
    """
    results = []

    def keep(hidden: Tensor, operands: Operands) -> Any:
        results[:] = [head_fn(hidden, operands)]
        return results[0]

    returned = model(**inputs, head_fn=keep)
    if not results:
        raise ValueError(
            f"model: expected one whose head is installed, got {type(model).__name__} that is not; "
            "call install_head on it, after loading and before wrapping"
        )
    return returned if _dtypes(returned) == _dtypes(results[0]) else results[0]


def check_sequences(spec: HeadSpec, *, packing: bool = False) -> None:
    """ValueError unless a hidden state depends on the tokens before it alone and, with packing, on
    its own sequence's.

    Packed sequences lie one after the other in one row, and position_ids that start anew tell them
    apart; models without positions, and recurrent layers, do not heed that. Where weights cannot be
    read yet, the check waits for them, as that of `resolve_head` does.
    """
    _check_now_or_later(spec, functools.partial(check_sequences_of, packing=packing))


def check_branches(spec: HeadSpec) -> None:
    """ValueError unless hidden states of sequences that share their beginning (`treg.data.tree`)
    are the same in one row and alone; says why. The first forward of such rows checks it in any
    case; so nothing is done here where weights cannot be read yet.
    """
    if BRANCHES not in spec.passed and not _must_wait(spec):
        check_branches_of(spec)
        spec.passed.add(BRANCHES)


def _has_floating_matrix(projection: Any) -> bool:
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return len(shape_of(weight)) == 2 and weight.is_floating_point()


def _dtypes(results: Any) -> list:
    return [x.dtype for x in tree_leaves(results) if isinstance(x, Tensor)]


def _forward_with_head(original: Callable) -> Callable:
    """A forward that takes head_fn, with the signature of the original one.

    It is a function of self, not of one model: a deep copy's forward is then the copy's own.
    """
    signature = inspect.signature(original)

    def forward(self, *args, head_fn=None, **kwargs):
        if head_fn is None:
            return self._treg_forward(*args, **kwargs)
        keep = kwargs.pop("logits_to_keep", None)
        if isinstance(keep, Tensor) or keep:
            raise ValueError(
                "logits_to_keep: expected none together with head_fn, got one; select rows of "
                "hidden in head_fn"
            )
        named = dict(zip(signature.parameters, args, strict=False))
        spec = self._treg_head
        while spec.pending:
            check = spec.pending[0]
            check(spec)
            spec.pending.pop(0)  # a check that fails is left for the next forward
        if kwargs.get("branches") is not None and BRANCHES not in spec.passed:
            check_branches_of(spec)
            spec.passed.add(BRANCHES)
        return spec.through(head_fn, spec.hidden(**named, **kwargs))

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])
    return forward


def _below_peft(model: nn.Module) -> PreTrainedModel:
    below: Any = model
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        below = below.get_base_model()
    if not isinstance(below, PreTrainedModel):
        raise TypeError(
            f"model: expected an unwrapped PreTrainedModel or PeftModel, got {type(model).__name__}"
        )
    return below


def _backbone(model: PreTrainedModel) -> nn.Module:
    """What is below the head. Some models do not have it under the name that their class says."""
    if model.base_model is not model:
        return model.base_model
    return model.get_submodule("model")


def _check_now_or_later(spec: HeadSpec, check: Callable[[HeadSpec], None]) -> None:
    """Run a check, or leave it to the first forward where some weight cannot be read before
    that.
    """
    if _must_wait(spec):
        spec.pending.append(check)
    else:
        check(spec)


def _must_wait(spec: HeadSpec) -> bool:
    """Whether some weight cannot be read before the first forward."""
    unreadable = any(why_unreadable(weight) for weight in spec.model.parameters())
    # FSDP may have loaded the weights into the first process only
    return unreadable or is_fsdp_enabled()
