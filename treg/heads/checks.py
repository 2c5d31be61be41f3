"""The checks of `treg.heads`: a few tokens, the model's own log-probs and hidden states against
what was read.

spec: a `treg.heads.HeadSpec`.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

TOKENS = 8
ROWS = 8192  # of the weight that are widened to float32 at a time
INSTEAD = "compute this model's loss from dense logits, and please open an issue"


def name_of(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def shape_of(weight: Tensor) -> torch.Size:
    """Of the whole weight: DeepSpeed ZeRO-3 leaves an empty tensor outside of its module."""
    return getattr(weight, "ds_shape", weight.shape)


def without_cache(module: nn.Module) -> dict[str, bool]:
    """use_cache=False, where the module's forward takes it."""
    accepted = inspect.signature(module.forward).parameters
    takes = "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return {"use_cache": False} if takes else {}


@contextlib.contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Plain inference: eval mode, no gradients, no autocast. Each module's training flag is put
    back.

    Flash attention takes 16-bit inputs on a GPU only, which the model may have later: sdpa stands
    in for it.
    """
    flags = [(module, module.training) for module in model.modules()]
    config = model.config
    parts = {"": config} | {
        k: x for k in config.sub_configs if (x := getattr(config, k, None)) is not None
    }
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


def check_head(spec: Any) -> None:
    """ValueError unless the model's own log-probs of a few tokens are those of spec."""
    model = spec.model
    vocab = min(filter(None, (spec.vocab, shape_of(model.get_input_embeddings().weight)[0])))
    ids = torch.randint(vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    on_cpu, device = model.device.type == "cpu", model.device
    fork = (
        {"devices": [], "device_type": "cuda"}
        if on_cpu
        else {"devices": [device], "device_type": device.type}
    )
    with _undisturbed(model):
        try:  # each call from the random state that is found and left: reformer hashes at random
            # forward: this may run within a forward of what wraps the model; the original one:
            # accelerate puts autocast around the other, which would switch it on again
            forward = getattr(model, "_original_forward", model.forward)
            with torch.random.fork_rng(**fork):
                logits = forward(
                    input_ids=ids, return_dict=True, **without_cache(model)
                ).logits.float()
            with torch.random.fork_rng(**fork):
                z, eps = spec.through(_dense, spec.hidden(input_ids=ids))
        except Exception as error:
            raise ValueError(
                f"{name_of(model)}: its head could not be checked: {error!r}; {INSTEAD}"
            ) from error
        if z.shape != logits.shape:
            shapes = f"expected logits {list(logits.shape)}, got {list(z.shape)}"
            raise ValueError(f"{name_of(model)}: its head was misread: {shapes}; {INSTEAD}")
        # the product and the pointwise steps after it are each rounded to the model's dtype;
        # float32 may mean TF32
        found = (logits.log_softmax(-1) - z.log_softmax(-1)).abs().max().item()
        allowed = max(4 * eps, 1e-4) * logits.abs().max().item() + 1e-5
    if not found <= allowed:
        difference = f"log-probs differ by {found:.2e}, expected at most {allowed:.2e}"
        raise ValueError(f"{name_of(model)}: its head was misread: {difference}; {INSTEAD}")


def _dense(hidden: Tensor, operands: dict[str, Any]) -> tuple[Tensor, float]:
    """Logits by the operands in float32, and the rounding of the dtypes that the model computes
    them in.
    """
    weight, bias, softcap = operands["weight"], operands["bias"], operands["softcap"]
    z = torch.cat([F.linear(hidden.float(), rows.float()) for rows in weight.split(ROWS)], dim=-1)
    z = operands["logit_scale"] * (z if bias is None else z + bias.float())
    eps = max(torch.finfo(hidden.dtype).eps, torch.finfo(weight.dtype).eps)
    return z if softcap is None else softcap * torch.tanh(z / softcap), eps


def check_sequences_of(spec: Any, *, packing: bool) -> None:
    model, generator = spec.model, torch.Generator().manual_seed(0)
    vocab = shape_of(model.get_input_embeddings().weight)[0]
    ids = torch.randint(1, vocab, (1, 2 * TOKENS), generator=generator).to(model.device)
    other = ids.clone()
    other[:, TOKENS:] = (ids[:, TOKENS:] + 1) % vocab
    where = torch.arange(TOKENS, device=model.device).repeat(2)[None] if packing else None
    with _undisturbed(model):
        whole = spec.hidden(input_ids=ids, position_ids=where)
        found = [
            (
                "later tokens change the hidden states before them",
                whole[:, :TOKENS],
                spec.hidden(input_ids=other, position_ids=where)[:, :TOKENS],
            )
        ]
        if packing:
            found.append(
                (
                    "packed sequences see one another",
                    whole[:, TOKENS:],
                    spec.hidden(input_ids=ids[:, TOKENS:]),
                )
            )
    for what, a, b in found:
        # what leaks changes states by a good part of their size; float32 may mean TF32
        allowed = max(8 * torch.finfo(a.dtype).eps, 3e-4) * b.abs().max().item()
        difference = (a - b).abs().max().item()
        if not difference <= allowed:
            fix = (
                "use packing=False"
                if what.startswith("packed")
                else "use a causal model (is_decoder=True)"
            )
            raise ValueError(
                f"{name_of(model)}: {what} (by {difference:.2e}, expected at most {allowed:.2e}); {fix}"
            )
