"""A training step with Liger's DPO loss, the same step with treg's, and T-REG in the place of DPO:
one import changed.

    python examples/liger_swap.py

Random hidden states stand in for a model's, random numbers for the token rewards of contrastive
prompts. Needs torch; without liger-kernel, only treg's losses are shown.
"""

import torch

from treg.integrations.liger import FusedLinearTRegLoss

try:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
except ImportError:
    LigerFusedLinearDPOLoss = None

PAIRS, LENGTH, HIDDEN, VOCAB = 2, 32, 64, 1000


def make_batch() -> dict[str, torch.Tensor]:
    """[2B, T] rows, chosen first, a quarter of each prompt; the reference model is the policy
    before it moved.
    """
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5
    hidden = torch.randn(2 * PAIRS, LENGTH, HIDDEN)
    # aligned: target[:, t] is predicted from _input[:, t]
    target = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH))
    target[:, : LENGTH // 4] = -100
    return {
        "lin_weight": weight,
        "_input": hidden + 0.1 * torch.randn_like(hidden),
        "target": target,
        "ref_input": hidden,
        "ref_weight": weight,
    }


def step(name: str, loss_fn: torch.nn.Module, **batch: torch.Tensor) -> None:
    """Forward, backward, one step of gradient descent on the head."""
    head = torch.nn.Parameter(batch.pop("lin_weight").clone())
    loss, (chosen_logps, rejected_logps, *_) = loss_fn(head, **batch)
    loss.backward()
    torch.optim.SGD([head], lr=0.1).step()
    after, _ = loss_fn(head, **batch)
    margin = (chosen_logps - rejected_logps).mean()
    print(
        f"{name:20} loss {loss:.5f}   margin {margin:+.3f}   "
        f"gradient of the head {head.grad.norm():.5f}   loss after the step {after:.5f}"
    )


def main() -> None:
    batch = make_batch()
    if LigerFusedLinearDPOLoss is None:
        print("liger-kernel is not installed")
    else:
        step("Liger, DPO", LigerFusedLinearDPOLoss(beta=0.1, compiled=False), **batch)
    step("treg, DPO", FusedLinearTRegLoss(beta=0.1), **batch)
    rewards = torch.rand(batch["target"].shape) - 0.5
    step(
        "treg, T-REG",
        FusedLinearTRegLoss(beta=0.1, treg_alpha=0.25),
        **batch,
        token_rewards=rewards,
    )


if __name__ == "__main__":
    main()
