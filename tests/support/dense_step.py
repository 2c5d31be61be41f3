"""The oracle of a training step: the reference's loss and gradient on float64's dense logits."""

import copy

import numpy as np
import torch

from treg.losses import OBJECTIVES
from treg.ops import reference

SIDES = ("chosen", "rejected")


def of_all(pairs, name) -> torch.Tensor:
    """[N]: a stream of all answers, the chosen ones first."""
    return torch.from_numpy(np.concatenate([p[f"{side}_{name}"] for side in SIDES for p in pairs]))


def dense_rows(model, pairs) -> torch.Tensor:
    """Logits [N, V] float64 of the completions' tokens, the chosen ones first."""
    found = []
    for side in SIDES:
        for pair in pairs:
            ids = torch.from_numpy(np.concatenate([pair["prompt_ids"], pair[f"{side}_ids"]])).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
            found.append(logits[-len(pair[f"{side}_ids"]) - 1 : -1])
    return torch.cat(found)


@torch.no_grad()
def reference_logits(model, pairs) -> torch.Tensor:
    """Those of a model that stays as it is."""
    return dense_rows(copy.deepcopy(model).double(), pairs)


def exact_step(model, ref_logits, pairs, loss_type, *, beta, alpha=None, scalars=None):
    """The reference's result, and the gradient of its loss in every parameter that has one.

    ref_logits: [N, V]. scalars: of the objective, gamma among them.
    """
    row, model = OBJECTIVES[loss_type], copy.deepcopy(model).double()
    logits = dense_rows(model, pairs)
    target, more = of_all(pairs, "ids").long(), {}
    for name in ("token_rewards", "token_weights", "kl_weights"):
        if f"chosen_{name}" in pairs[0]:
            more[name] = of_all(pairs, name).double()
    if not row.reference_free:
        log_q = ref_logits.log_softmax(-1)
        more["ref_logps"] = log_q.gather(1, target[:, None])[:, 0]
    if "kl" in row.needs:
        more["kl"] = (log_q.exp() * (log_q - logits.log_softmax(-1))).sum(-1)
    if row.pair_columns:
        numbers = {x: torch.tensor([float(p[x]) for p in pairs]) for x in row.pair_columns}
        more["pair_values"] = numbers
    scalars, lengths = dict(scalars or {}), [len(p[f"{s}_ids"]) for s in SIDES for p in pairs]
    out = reference.fused_treg_loss(
        logits,
        torch.eye(logits.shape[1], dtype=torch.float64),
        target,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        beta=beta,
        alpha=alpha,
        loss_type=loss_type,
        gamma=scalars.pop("gamma", 0.0),
        scalars=scalars,
        **more,
    )
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return out, dict(zip(named, torch.autograd.grad(out.loss, list(named.values())), strict=True))
