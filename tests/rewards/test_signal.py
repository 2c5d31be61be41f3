"""Statistics of token rewards and weights: numbers by hand, and gradients by autograd."""

import numpy as np
import pytest
import torch

from treg.losses import LossOptions, treg_loss
from treg.rewards.signal import reward_signal, signal_lines, weight_signal


def pair(chosen, rejected, stream="token_rewards", **more):
    return {f"chosen_{stream}": np.float32(chosen), f"rejected_{stream}": np.float32(rejected)} | {
        k: np.float32(x) for k, x in more.items()
    }


BY_HAND = [pair([0.5, 0.0, -0.25, 0.25], [-0.5]), pair([0.005, 0.25], [0.125, -0.125, -0.125])]


def test_statistics_by_hand():
    """Ten tokens: the sizes add up to 2.13; chosen: 4 of 5 above 0; rejected: 3 of 4 below."""
    found = reward_signal(BY_HAND, 0.25)
    assert (found.tokens, found.responses) == (10, 4)
    assert found.mean_abs == pytest.approx(2.13 / 10)
    assert (found.small, found.zero) == (0.2, 0.1)
    assert (found.chosen_positive, found.rejected_negative) == (0.8, 0.75)
    assert found.first_mass == pytest.approx((0.5 + 0.5 + 0.005 + 0.125) / 2.13)
    assert found.first_tokens == 0.4
    assert found.quantiles[2] == pytest.approx(0.0025)  # between 0 and 0.005
    # 0.25 + 2 * 0.0625 + 0.25 + 0.000025 + 0.0625 + 3 * 0.015625 are the squares
    assert found.ratio == pytest.approx(0.25 * (0.734400) ** 0.5 / 10**0.5, rel=1e-5)


def test_the_range_of_factors():
    """A chosen token counts 1 + alpha * rhat, a rejected one 1 - alpha * rhat."""
    rewards = np.linspace(-0.5, 0.5, 101)
    found = reward_signal([pair(rewards, -rewards)], 0.5)
    assert found.weights == pytest.approx((1 - 0.5 * 0.49, 1 + 0.5 * 0.49), abs=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss_type", ["dpo", "ipo"])
def test_the_ratio_of_gradients_is_autograds(loss_type, weighted):
    """Of treg_loss in the log-probs, with and without rewards, where every margin is 0.

    The part of the regularizer is what the gradient gains.
    """
    g = torch.Generator().manual_seed(0)
    lengths = [3, 5, 4, 2]  # the chosen ones first
    rewards = [torch.rand(n, generator=g, dtype=torch.float64) - 0.5 for n in lengths]
    weights = [torch.rand(n, generator=g, dtype=torch.float64) + 0.1 for n in lengths]
    logps = -torch.rand(sum(lengths), generator=g, dtype=torch.float64)

    def gradient(alpha):
        x = logps.clone().requires_grad_()
        out = treg_loss(
            x,
            torch.cat(rewards),
            logps,
            LossOptions(loss_type, beta=0.3, alpha=alpha),
            cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
            token_weights=torch.cat(weights) if weighted else None,
        )
        return torch.autograd.grad(out.loss.mean(), x)[0]

    plain, with_rewards = gradient(0.0), gradient(0.7)
    expected = ((with_rewards - plain).norm() / plain.norm()).item()
    examples = []
    for i in range(2):
        example = {
            "chosen_token_rewards": rewards[i].numpy(),
            "rejected_token_rewards": rewards[i + 2].numpy(),
        }
        if weighted:
            example["chosen_token_weights"] = weights[i].numpy()
            example["rejected_token_weights"] = weights[i + 2].numpy()
        examples.append(example)
    found = reward_signal(examples, 0.7, length_normalised=loss_type == "ipo")
    assert found.ratio == pytest.approx(expected, rel=1e-9)


def test_weights_by_hand():
    found = weight_signal([pair([0, 1], [1, 2], "token_weights")], "token_weights")
    assert (found.mean, found.zero, found.tokens) == (1.0, 0.25, 4)
    assert found.change == pytest.approx(0.5**0.5)


WARNED = {
    "weak": ([pair([0.01] * 9, [-0.01] * 9)], "these rewards change the gradient by 0.25 %"),
    "nothing": ([pair([0.0], [0.0])], "every token reward is 0"),
    "first": ([pair([0.4] + [0.01] * 40, [-0.4] + [-0.01] * 40)], "50 % of the sizes"),
    "against": ([pair([-0.4, 0.3], [0.4, -0.3])], "do not prefer the chosen answers: 50 %"),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_a_person_must_not_overlook(case):
    examples, said = WARNED[case]
    warnings = [
        x for x in signal_lines(examples, ("token_rewards",), 0.25) if x.startswith("WARNING")
    ]
    assert len(warnings) == 1 and said in warnings[0]


def test_good_rewards_get_no_warning():
    examples = [pair([0.2, 0.3, 0.25] * 9, [-0.2, -0.1, 0.1] * 9)]
    lines = signal_lines(examples, ("token_rewards",), 0.25)
    assert not [x for x in lines if x.startswith("WARNING")]
    assert "at alpha=0.25 98 % of the tokens weigh" in lines[4]
    assert len(signal_lines(examples, ("token_rewards",), 0.0)) == 4


@pytest.mark.parametrize(
    ("weights", "said"),
    [([1.0, 1.0], "are alike"), ([0.0, 0.0], "every number of token_weights is 0"), ([0, 1], None)],
)
def test_weights_that_say_nothing(weights, said):
    lines = signal_lines([pair(weights, weights, "token_weights")], ("token_weights",), 0.25)
    warnings = [x for x in lines if x.startswith("WARNING")]
    assert warnings == [] if said is None else said in warnings[0]


def test_tokens_that_are_not_scored_are_no_part():
    """Turns of others in an answer: the same numbers as without them."""
    masked = pair([9.0, 0.5, 9.0, 0.25], [-0.5, 0.125]) | {
        "chosen_scored": np.array([False, True, False, True]),
        "rejected_scored": np.array([True, True]),
    }
    plain = [pair([0.5, 0.25], [-0.5, 0.125])]
    assert reward_signal([masked], 0.25) == reward_signal(plain, 0.25)
    weights = {k.replace("rewards", "weights"): np.abs(x) for k, x in masked.items()}
    plain_weights = [pair([0.5, 0.25], [0.5, 0.125], "token_weights")]
    found = weight_signal([weights], "token_weights")
    assert found == weight_signal(plain_weights, "token_weights")
