"""Advantages of tokens under verl's registry: against verl's own where limits coincide, and numbers
by hand.

Runs against verl itself where it can be imported, see tests/support/verl_stub.py.
"""

import numpy as np
import pytest
import torch
from verl_stub import Config, objects, proto

from treg.integrations import verl as integration
from treg.integrations.verl.advantages import ESTIMATORS

UIDS = ["a3", "b1", "a3", "b1", "a3", "c0", "c0", "c0"]
LENGTHS = [4, 7, 1, 6, 3, 7, 2, 5]
WIDTH = 7


def batch(*, at_end=False, holes=False, seed=0):
    """Rewards, mask [8, 7] int64, values; NaN stands in none of them: verl reads what is masked."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(UIDS), WIDTH, generator=generator)
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    if holes:
        mask[1, 2:4] = mask[5, 3] = 0
    if at_end:
        last = torch.arange(WIDTH) == torch.tensor(LENGTHS)[:, None] - 1
        rewards = rewards * last
    return rewards * mask, mask, values


def config(**given):
    return Config({"gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": True} | given)


def advantages(verl_modules, name, rewards, mask, *, uids=UIDS, more=(), **given):
    """As verl's trainers call it."""
    integration.install_advantages()
    data = proto(
        {"token_level_rewards": rewards, "response_mask": mask} | dict(more), {"uid": uids}
    )
    options = config(**given)
    found = verl_modules.trainer.compute_advantage(
        data,
        adv_estimator=name,
        gamma=options["gamma"],
        lam=options["lam"],
        num_repeat=2,
        norm_adv_by_std_in_grpo=options["norm_adv_by_std_in_grpo"],
        config=options,
    )
    return found.batch["advantages"], found.batch["returns"]


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_of_a_reward_at_the_end_is_verls(by_std, verl_modules):
    rewards, mask, _ = batch(at_end=True)
    found, returns = advantages(
        verl_modules, "treg_grpo", rewards, mask, norm_adv_by_std_in_grpo=by_std
    )
    wanted, _ = advantages(verl_modules, "grpo", rewards, mask, norm_adv_by_std_in_grpo=by_std)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, rewards.sum(1, keepdim=True) * mask)
    assert found.dtype == torch.float32


def test_rloo_of_a_reward_at_the_end_is_verls(verl_modules):
    rewards, mask, _ = batch(at_end=True)
    uids = [*UIDS[:-1], "alone"]
    found, _ = advantages(verl_modules, "treg_rloo", rewards, mask, uids=uids)
    wanted, _ = advantages(verl_modules, "rloo", rewards, mask, uids=uids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_are_verls_reinforce_plus_plus(gamma, verl_modules):
    rewards, mask, _ = batch()
    found = advantages(verl_modules, "treg_returns", rewards, mask, gamma=gamma)
    wanted = advantages(verl_modules, "reinforce_plus_plus", rewards, mask, gamma=gamma)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0)])
@pytest.mark.parametrize("name", ["treg_gae", "one token"])
def test_gae_is_verls(name, gamma, lam, holes, verl_modules):
    rewards, mask, values = batch(holes=holes)
    given: dict = {"gamma": gamma, "lam": lam}
    if name == "one token":
        name, given["treg"] = "treg_macro", {"macro_length": 1}
    found = advantages(verl_modules, name, rewards, mask, more={"values": values}, **given)
    wanted = verl_modules.core.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b * mask, rtol=1e-4, atol=1e-5)


def test_macro_actions_by_hand(verl_modules):
    """Units {0, 1} and {2}: R = (3, 3), V = (1, 4), lam = 0.5.

    A_1 = 3 - 4 = -1, A_0 = 3 + 4 - 1 - 0.5 = 5.5; the other response has one unit: A = 2 - 1 = 1.
    """
    rewards = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 0.0]])
    values = torch.tensor([[0.0, 2.0, 4.0], [1.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found, returns = advantages(
        verl_modules,
        "treg_macro",
        rewards,
        mask,
        uids=["a", "b"],
        more={"values": values},
        lam=0.5,
        treg={"macro_length": 2},
    )
    raw = torch.tensor([5.5, 5.5, -1.0, 1.0])
    white = (raw - raw.mean()) / raw.std()
    torch.testing.assert_close(found[mask.bool()], white, rtol=1e-5, atol=1e-5)
    assert returns.tolist() == [[6.5, 6.5, 3.0], [2.0, 0.0, 0.0]]


def test_tokens_of_a_response_are_told_apart(verl_modules):
    """Returns less the others' sum: sums are 6 and 2, so 6 - 2, 5 - 2, 3 - 2, and 2 - 6."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found, _ = advantages(verl_modules, "treg_rloo", rewards, mask, uids=["a", "a"])
    assert found.tolist() == [[4.0, 3.0, 1.0], [-4.0, 0.0, 0.0]]
    own, _ = advantages(
        verl_modules, "treg_rloo", rewards, mask, uids=["a", "a"], treg={"baseline": "none"}
    )
    assert own.tolist() == [[6.0, 5.0, 3.0], [2.0, 0.0, 0.0]]


@pytest.mark.parametrize("by_std", [True, False])
def test_process_supervision_by_hand(by_std, verl_modules):
    """Rewards less their mean 2 over both responses, by their deviation, summed from each token on:
    raw sums (-1 + 0 + 1, 0 + 1, 1) and 0.
    """
    rewards = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found, returns = advantages(
        verl_modules, "treg_process", rewards, mask, uids=["a", "a"], norm_adv_by_std_in_grpo=by_std
    )
    spread = torch.tensor([1.0, 2.0, 3.0, 2.0]).std() if by_std else 1.0
    wanted = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]) / spread
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert returns.tolist() == [[6.0, 5.0, 3.0], [2.0, 0.0, 0.0]]


def test_steps_by_perplexity_take_the_log_probs_of_the_batch(verl_modules):
    """A step begins where a token is less likely than the one before."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
    mask = torch.ones(2, 4, dtype=torch.int64)
    more = {"old_log_probs": torch.tensor([[-2.0, -1.0, -3.0, -1.0]] * 2)}
    given = {"uids": ["a", "b"], "treg": {"macro": "perplexity", "scale": "none"}}
    found = advantages(verl_modules, "treg_returns", rewards, mask, more=more, **given)
    assert found[1][0].tolist() == [10.0, 10.0, 7.0, 7.0]
    more["ref_log_prob"] = torch.tensor([[-1.0, -1.0, -1.0, -2.0]] * 2)
    found = advantages(verl_modules, "treg_returns", rewards, mask, more=more, **given)
    assert found[1][0].tolist() == [10.0, 10.0, 10.0, 4.0]


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_response_without_a_token_and_equal_rewards(name, verl_modules):
    rewards, mask, values = batch()
    mask[2] = 0
    found, returns = advantages(
        verl_modules, name, torch.zeros_like(rewards), mask, more={"values": 0 * values}
    )
    assert not found.any() and not returns.any()
    found, returns = advantages(verl_modules, name, rewards, mask, more={"values": values})
    assert found.isfinite().all() and found.any()
    assert not found[mask == 0].any() and not returns[mask == 0].any()


def test_what_stands_outside_the_mask_is_not_read(verl_modules):
    rewards, mask, _ = batch()
    wanted, _ = advantages(verl_modules, "treg_grpo", rewards, mask)
    rewards = torch.where(mask.bool(), rewards, torch.nan)
    found, _ = advantages(verl_modules, "treg_grpo", rewards, mask)
    torch.testing.assert_close(found, wanted)


def test_the_registry_keeps_verls_own_and_is_filled_once(verl_modules):
    before = dict(verl_modules.core.ADV_ESTIMATOR_REGISTRY)
    integration.install_advantages()
    once = verl_modules.trainer.compute_advantage
    integration.install_advantages()
    registry = verl_modules.core.ADV_ESTIMATOR_REGISTRY
    assert verl_modules.trainer.compute_advantage is once
    assert before.items() <= registry.items() and set(registry) - set(before) <= set(ESTIMATORS)
    # by hand, as what was registered is
    found = registry["treg_rloo"](
        token_level_rewards=torch.tensor([[1.0]]),
        response_mask=torch.tensor([[1]]),
        config=config(),
        index=objects(["a"]),
        reward_baselines=None,
    )
    assert found[0].tolist() == [[1.0]]


def test_configurations_of_verl_itself(verl_modules):
    omegaconf = pytest.importorskip("omegaconf")
    rewards, mask, _ = batch()
    wanted, _ = advantages(verl_modules, "treg_grpo", rewards, mask, treg={"scale": "batch"})
    data = proto({"token_level_rewards": rewards, "response_mask": mask}, {"uid": UIDS})
    given = {"gamma": 1.0, "lam": 1.0, "treg": {"scale": "batch"}}
    found = verl_modules.trainer.compute_advantage(
        data, adv_estimator="treg_grpo", config=omegaconf.OmegaConf.create(given)
    )
    torch.testing.assert_close(found.batch["advantages"], wanted)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("treg_gae", {}, r"values: expected those of a critic for treg_gae, got none; .*enable"),
        (
            "treg_macro",
            {"treg": {"baseline": "group"}},
            "expected no baseline and no scale with treg_macro",
        ),
        ("treg_grpo", {"treg": {"macros": "ngram"}}, r"algorithm\.treg: expected keys among"),
        ("treg_grpo", {"treg": {"macro": "bigram"}}, "macro: expected one of ngram, random"),
        ("treg_grpo", {"treg": {"baseline": "mean"}}, "baseline: expected one of group, rloo"),
        ("treg_grpo", {"treg": {"macro_length": 0}}, "macro_length: expected a whole number"),
        ("treg_grpo", {"treg": {"eps": -1.0}}, "eps: expected a number >= 0"),
        ("treg_grpo", {"treg": {"macro": "perplexity"}}, "expected log-probs in the batch"),
        ("treg_grpo", {"gamma": 1.5}, r"gamma: expected a number in \[0, 1\]"),
    ],
)
def test_refused(name, given, message, verl_modules):
    rewards, mask, _ = batch()
    with pytest.raises(ValueError, match=message):
        advantages(verl_modules, name, rewards, mask, **given)


def test_refused_rewards_and_uids(verl_modules):
    rewards, mask, _ = batch()
    integration.install_advantages()
    own = verl_modules.core.ADV_ESTIMATOR_REGISTRY["treg_grpo"]
    with pytest.raises(ValueError, match="index: expected the uid of each of the 8 responses"):
        own(token_level_rewards=rewards, response_mask=mask, config=config())
    rewards[0, 0] = np.nan
    with pytest.raises(ValueError, match="rewards: expected finite"):
        advantages(verl_modules, "treg_grpo", rewards, mask)


def test_another_version_of_verl(verl_modules, monkeypatch):
    monkeypatch.delattr(verl_modules.trainer, "compute_advantage")
    with pytest.raises(RuntimeError, match=r"compute_advantage, as of verl 0\.9, got version"):
        integration.install_advantages()
