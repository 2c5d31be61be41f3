"""What is logged of the regularizer's size, against autograd."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from treg.losses import LossOptions, treg_loss
from treg.trainer.metrics import RATIO, PairMetrics


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "nca_pair"])
def test_the_ratio_of_gradients_is_autograds(loss_type):
    """Of the gradients in the log-probs, with margins that differ; nca_pair has two weights a
    pair.
    """
    g = torch.Generator().manual_seed(0)
    lengths = np.array([3, 5, 4, 2])
    logps = -3 * torch.rand(14, generator=g, dtype=torch.float64)
    ref = -3 * torch.rand(14, generator=g, dtype=torch.float64)
    rewards = torch.rand(14, generator=g, dtype=torch.float64) - 0.5
    starts = torch.tensor([0, *lengths.cumsum()], dtype=torch.int32)

    def step(alpha):
        x = logps.clone().requires_grad_()
        options = LossOptions(loss_type, beta=0.4, alpha=alpha)
        out = treg_loss(x, rewards, ref, options, cu_seqlens=starts)
        return out, torch.autograd.grad(out.loss.sum(), x)[0]

    (_, plain), (out, with_rewards) = step(0.0), step(0.6)
    expected = ((with_rewards - plain).norm() / plain.norm()).item()
    result = SimpleNamespace(
        chosen_rewards=out.chosen_rewards.detach(),
        rejected_rewards=out.rejected_rewards.detach(),
        chosen_logps=out.chosen_rewards.detach(),
        rejected_logps=out.rejected_rewards.detach(),
        reg_loss=out.reg_loss.detach(),
        weights=out.weights.detach(),
        token_logps=logps,
        kl=None,
        entropy=None,
        is_top1=None,
        mean_logit=None,
    )
    metrics = PairMetrics()
    mean = loss_type == "ipo"
    metrics.record(result, lengths, rewards, None, alpha=0.6, length_normalised=mean)
    assert metrics.means(Accelerator(cpu=True))[RATIO] == pytest.approx(expected, rel=1e-9)
    metrics.record(result, lengths, rewards, None, alpha=0.0)
    assert RATIO not in metrics.means(Accelerator(cpu=True))
