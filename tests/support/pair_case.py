"""Preference pairs for the tests of the loss."""

import torch
from helpers import Case

from treg.losses import OBJECTIVES

LENGTHS = [9, 4, 30, 7, 11, 26]  # three pairs: 16, 15 and 56 tokens


def make_case(
    lengths=LENGTHS,
    D=40,
    V=301,
    *,
    padded=False,
    loss_type="dpo",
    bias=False,
    sums=True,
    token_weights=False,
    spread=0.3,
    **more,
) -> Case:
    """Pairs with a prompt of ignored tokens; what lies at ignored positions is garbage that must
    not count.
    """
    S, objective = len(lengths), OBJECTIVES[loss_type]
    sums = sums and not objective.reference_per_token
    prompt = 3
    total = [n + prompt for n in lengths]
    target = [torch.cat([torch.full((prompt,), -100), torch.randint(0, V, (n,))]) for n in lengths]
    rest = {"loss_type": loss_type}
    if padded:
        T = max(total) + 1
        target = torch.stack([torch.cat([t, torch.full((T - len(t),), -100)]) for t in target])
        hidden = torch.randn(S, T, D)
    else:
        target = torch.cat(target)
        hidden = torch.randn(len(target), D)
        rest["cu_seqlens"] = torch.tensor([0, *total]).cumsum(0).int()
    ignored = target == -100

    def per_token(x):
        return torch.where(ignored, torch.tensor(float("nan")), x)

    rest |= {"target": target, "token_rewards": per_token(torch.rand(target.shape) - 0.5)}
    if not objective.reference_free:
        ref = -torch.rand(target.shape) * 3 - 4
        rest["ref_logps"] = ref[:, 0].clone() * 10 if padded and sums else per_token(ref)
        if sums and not padded:
            rest["ref_logps"] = -torch.rand(S) * 3 * torch.tensor(lengths)
    if token_weights:
        rest["token_weights"] = per_token(torch.rand(target.shape) + 0.5)
    if objective.pair_columns:
        values = {name: (torch.rand(S // 2) < 0.5).float() for name in objective.pair_columns}
        rest["pair_values"] = values
    rest |= {
        "exo_pair": {"label_smoothing": 0.1},
        "simpo": {"gamma": 0.3},
        # a target within reach: at 50 nothing else is seen
        "bfpo": {"scalars": {"tau": 0.5}},
        # untrained heads are sure of nothing
        "figa": {"scalars": {"gate": 5.0}},
    }.get(loss_type, {}) | more
    return Case(hidden, torch.randn(V, D) * spread, torch.randn(V) if bias else None, rest)


def upstream(out):
    """A loss scaled by what follows it; of several losses, each differently."""
    return (
        out.loss
        * torch.linspace(1.7, -0.4, max(1, out.loss.numel()), device=out.loss.device).squeeze()
    ).sum()
