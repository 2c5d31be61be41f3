"""How the head of a Hugging Face causal LM is read, so that a fused op can take the place of its logits.

Tables say which modules stand before the projection and what scales, caps and cuts the logits; a check on a few
tokens then holds the model's own log-probs against that reading. A head that the tables misread is refused by name.

V vocabulary, D hidden size.
"""

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

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

# what stands between backbone and projection, modules by name: the first row of which a model has every one
Steps = tuple[str | Callable[[Tensor], Tensor], ...]
BEFORE: tuple[Steps, ...] = (
    ("cls.predictions.transform",),  # bert and its kin
    ("cls.predictions.dense", "cls.predictions.activation", "cls.predictions.LayerNorm"),  # rembert
    ("lm_head.dense", F.gelu, "lm_head.layer_norm"),  # roberta and its kin
    ("generator_predictions",),  # electra
    ("lm_head.dense", "lm_head.act", "lm_head.norm"),  # modernbert-decoder
)

TOKENS = 8
ROWS = 8192  # of the weight that are widened to float32 at a time
INSTEAD = "compute this model's loss from dense logits, and please open an issue"


@dataclass(frozen=True)
class HeadSpec:
    """A causal LM as backbone, modules, projection, and z = softcap * tanh(logit_scale * (h W^T + b) / softcap)."""

    model: PreTrainedModel  # the causal LM, below PEFT
    backbone: nn.Module  # its first output is the hidden states, after the final norm
    projection: nn.Module  # has weight [V, D], and bias [V] perhaps
    before: Steps  # what is between the two, in order; names are looked up at each call, for PEFT replaces modules
    logit_scale: float
    softcap: float | None
    vocab: int | None  # rows of weight that are used; None: all

    def hidden(self, **inputs) -> Tensor:
        """What the projection sees, [..., D]. inputs: as for the model's forward; None is left out.

        Float32 rows are rounded to the weight's dtype, as models with a float32 residual stream do. The cache is off,
        and transformers' attention masks then take position_ids that start over for packed sequences.
        """
        given = {name: x for name, x in inputs.items() if x is not None}
        hidden = self.backbone(**given | _without_cache(self.backbone))[0]
        for step in self.before:
            hidden = (self.model.get_submodule(step) if isinstance(step, str) else step)(hidden)
        return hidden.to(self.projection.weight.dtype) if hidden.dtype == torch.float32 else hidden

    def operands(self) -> dict[str, Any]:
        """weight, bias, logit_scale and softcap: keyword arguments of the ops, as they are now.

        ValueError: the projection is not the one that was checked, or has an adapter.
        """
        if self.model.get_output_embeddings() is not self.projection:
            fix = "call install_head or resolve_head again"
            raise ValueError(f"{_name(self.model)}: its output embeddings were replaced after they were read; {fix}")
        _refuse_adapter(self.model, self.projection)
        weight, bias = self.projection.weight, getattr(self.projection, "bias", None)
        if state := _unreadable(weight):  # gathering it here would leave its gradient unreduced
            fix = "shard them with the root or the final norm, not as a unit of their own"
            raise ValueError(f"{_name(self.model)}: the output embeddings are {state} in the model's forward; {fix}")
        if self.vocab is not None:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return {"weight": weight, "bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def resolve_head(model: nn.Module) -> HeadSpec:
    """The head of a PreTrainedModel or PeftModel, checked against the model's own log-probs on 8 tokens.

    Raises:
        TypeError: model is neither. ValueError: the head is not of this form, or cannot be checked; names the class.
    """
    model = _below_peft(model)
    for name, p in model.named_parameters():
        if state := _unreadable(p):
            fix = "call this after the weights are loaded and before they are sharded"
            raise ValueError(f"{_name(model)}: {name} is {state}, so that the head cannot be checked; {fix}")
    projection: Any = model.get_output_embeddings()
    weight: Any = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        got = f"expected a module with a floating weight [V, D], got {type(projection).__name__}"
        raise ValueError(f"{_name(model)}: output embeddings: {got}; {INSTEAD}")
    _refuse_adapter(model, projection)
    backbone = model.base_model if model.base_model is not model else model.model
    spec = HeadSpec(model, backbone, projection, _before(model), *_numbers(model))
    _check(spec)
    return spec


def install_head(model: nn.Module) -> HeadSpec:
    """resolve_head, and from then on `model(..., head_fn=fn)` returns fn(hidden, operands) in place of logits.

    hidden is spec.hidden(**inputs) and operands is spec.operands(). All of it runs inside the causal LM's forward, so
    that the hooks of DDP, FSDP, PEFT and accelerate fire. Without head_fn the original forward runs. A second call
    changes nothing, unless the output embeddings were replaced in between.
    """
    model = _below_peft(model)
    installed = getattr(model, "_treg_head", None)
    # a pickled model comes back with the forward of its class
    patched = installed is not None and getattr(model.forward, "__func__", None) is not type(model).forward
    if patched and installed.projection is model.get_output_embeddings():
        return installed
    spec = resolve_head(model)
    if not patched:
        model._treg_forward = model.forward
        model.forward = MethodType(_forward_with_head(model.forward), model)
    model._treg_head = spec
    return spec


def _forward_with_head(original: Callable) -> Callable:
    """A function of self, not of one model: a deep copy's forward is then the copy's own. Keeps the signature."""
    signature = inspect.signature(original)

    def forward(self, *args, head_fn=None, **kwargs):
        if head_fn is None:
            return self._treg_forward(*args, **kwargs)
        keep = kwargs.pop("logits_to_keep", None)
        if isinstance(keep, Tensor) or keep:
            raise ValueError("logits_to_keep: expected none together with head_fn; select rows of hidden in head_fn")
        named = dict(zip(signature.parameters, args, strict=False))
        return head_fn(self._treg_head.hidden(**named, **kwargs), self._treg_head.operands())

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])
    return forward


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def _below_peft(model: nn.Module) -> PreTrainedModel:
    base = model if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", lambda: None)()
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model: expected an unwrapped PreTrainedModel or PeftModel, got {type(model).__name__}")
    return base


def _unreadable(p: Tensor) -> str | None:
    """Why a weight's values are not here."""
    if type(p).__name__ == "DTensor" or (hasattr(p, "ds_shape") and not p.numel()):  # ds_shape: DeepSpeed ZeRO-3
        return "sharded"
    return "on the meta device" if p.is_meta else None


def _refuse_adapter(model: PreTrainedModel, projection: nn.Module) -> None:
    peft = sys.modules.get("peft")  # whoever made one of its layers has imported it
    if peft is not None and isinstance(projection, peft.tuners.tuners_utils.BaseTunerLayer):
        raise ValueError(
            f"{_name(model)}: the output embeddings have an adapter ({type(projection).__module__}), and their weight"
            " alone does not make the logits; remove them from target_modules, or train them with modules_to_save"
        )


def _before(model: PreTrainedModel) -> Steps:
    names = {name for name, _ in model.named_modules()} | {F.gelu}  # a function is always there
    return next((row for row in BEFORE if names.issuperset(row)), ())


def _numbers(model: PreTrainedModel) -> tuple[float, float | None, int | None]:
    """logit_scale, softcap and vocab, by the tables."""
    config, power = model.config.get_text_config(), SCALES | EXCEPTIONS.get(model.config.model_type, {})
    values = {name: getattr(config, name, None) for name in (*SCALES, *SOFTCAPS, *VOCABS) if power.get(name, 1)}
    values: dict[str, Any] = {name: x for name, x in values.items() if isinstance(x, int | float)}
    scale = math.prod((values[name] ** power[name] for name in SCALES if name in values), start=1.0)
    softcap, vocab = (next((values[name] for name in names if name in values), None) for names in (SOFTCAPS, VOCABS))
    return scale, softcap, vocab


def _without_cache(module: nn.Module) -> dict[str, bool]:
    """use_cache=False, where the module's forward takes it."""
    accepted = inspect.signature(module.forward).parameters
    takes = "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return {"use_cache": False} if takes else {}


@contextlib.contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Plain inference: eval mode, no gradients, no autocast. Each module's training flag is put back.

    Flash attention takes 16-bit inputs on a GPU only, which the model may have later: sdpa stands in for it.
    """
    flags = [(module, module.training) for module in model.modules()]
    config = model.config
    parts = {"": config} | {k: x for k in config.sub_configs if (x := getattr(config, k, None)) is not None}
    attention = {k: x._attn_implementation for k, x in parts.items()}
    flash = any("flash" in str(x) for x in attention.values())
    try:
        model.eval()
        if flash:
            config._attn_implementation = "sdpa"
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        if flash:
            config._attn_implementation = attention


def _check(spec: HeadSpec) -> None:
    """ValueError unless the model's own log-probs of a few tokens are those of spec."""
    model, operands = spec.model, spec.operands()
    weight, bias, softcap = operands["weight"], operands["bias"], spec.softcap
    vocab = min(weight.shape[0], model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    on_cpu, device = model.device.type == "cpu", model.device
    fork = {"devices": [], "device_type": "cuda"} if on_cpu else {"devices": [device], "device_type": device.type}
    with _undisturbed(model):
        try:  # each call from the random state that is found and left: reformer hashes at random
            with torch.random.fork_rng(**fork):
                logits = model(input_ids=ids, return_dict=True, **_without_cache(model)).logits.float()
            with torch.random.fork_rng(**fork):
                hidden = spec.hidden(input_ids=ids)
            z = torch.cat([F.linear(hidden.float(), rows.float()) for rows in weight.split(ROWS)], dim=-1)
        except Exception as error:
            raise ValueError(f"{_name(model)}: its head could not be checked: {error!r}; {INSTEAD}") from error
        z = spec.logit_scale * (z if bias is None else z + bias.float())
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        if z.shape != logits.shape:
            shapes = f"expected logits {list(logits.shape)}, got {list(z.shape)}"
            raise ValueError(f"{_name(model)}: its head was misread: {shapes}; {INSTEAD}")
        # the product and the pointwise steps after it are each rounded to the model's dtype; float32 may mean TF32
        eps = max(torch.finfo(hidden.dtype).eps, torch.finfo(weight.dtype).eps)
        found = (logits.log_softmax(-1) - z.log_softmax(-1)).abs().max().item()
        allowed = max(4 * eps, 1e-4) * logits.abs().max().item() + 1e-5
    if not found <= allowed:
        difference = f"log-probs differ by {found:.2e}, expected at most {allowed:.2e}"
        raise ValueError(f"{_name(model)}: its head was misread: {difference}; {INSTEAD}")


def check_sequences(spec: HeadSpec, *, packing: bool = False) -> None:
    """ValueError unless a hidden state depends on the tokens before it alone and, with packing, on its own sequence's.

    Packed sequences lie one after the other in one row, and position_ids that start anew tell them apart; models
    without positions, and recurrent layers, do not heed that.
    """
    model, generator = spec.model, torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(1, vocab, (1, 2 * TOKENS), generator=generator).to(model.device)
    other = ids.clone()
    other[:, TOKENS:] = (ids[:, TOKENS:] + 1) % vocab
    where = torch.arange(TOKENS, device=model.device).repeat(2)[None] if packing else None
    with _undisturbed(model):
        whole = spec.hidden(input_ids=ids, position_ids=where)
        found = [("later tokens change the hidden states before them", whole[:, :TOKENS],
                  spec.hidden(input_ids=other, position_ids=where)[:, :TOKENS])]  # fmt: skip
        if packing:
            found.append(("packed sequences see one another", whole[:, TOKENS:],
                          spec.hidden(input_ids=ids[:, TOKENS:])))  # fmt: skip
    for what, a, b in found:
        # what leaks changes states by a good part of their size; float32 may mean TF32
        allowed = max(8 * torch.finfo(a.dtype).eps, 3e-4) * b.abs().max().item()
        difference = (a - b).abs().max().item()
        if not difference <= allowed:
            fix = "use packing=False" if what.startswith("packed") else "use a causal model (is_decoder=True)"
            raise ValueError(f"{_name(model)}: {what} (by {difference:.2e}, expected at most {allowed:.2e}); {fix}")
