"""The loss of a policy against the loss of TRL's own trainers, called as they are."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from treg.rl import PolicyOptions, policy_loss

B, T = 5, 9
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # float32
TRL = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
DEFAULTS = {name: x.default for name, x in GRPOConfig.__dataclass_fields__.items()}


class Alone:
    """accelerate's Accelerator, of one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, dim, pad_index):
        return x


def trainer_of(found, options, kind=GRPOTrainer, steps=1):
    """As much of TRL's trainer as its loss looks at; the log-probs and entropies are found."""
    args = SimpleNamespace(**{**DEFAULTS, **options, "steps_per_generation": steps})
    given = {
        **vars(args),
        "_get_per_token_logps_and_entropies": lambda *a, **k: (*found, None),
        "_entropy_bonus_enabled": args.entropy_coef != 0.0,
        "_metrics": {"train": defaultdict(list)},
        "accelerator": Alone(),
        "args": args,
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": steps,
        "epsilon_low": args.epsilon,
        "epsilon_high": args.epsilon if args.epsilon_high is None else args.epsilon_high,
        "max_completion_length": 16,
        "model": SimpleNamespace(training=True),
    }
    trainer = kind.__new__(kind)
    for name, x in given.items():
        object.__setattr__(trainer, name, x)
    return trainer


def batch(per_token=False):
    """Log-probs of a policy that has moved; the last sequence is short, the third has holes."""
    logprobs = -3.0 * torch.rand(B, T)
    mask = torch.rand(B, T) < 0.75
    mask[0], mask[-1, 2:] = True, False
    mask[-1, 0] = True
    advantages = torch.randn(B, T) if per_token else torch.randn(B)
    return {
        "logprobs": logprobs.requires_grad_(),
        "advantages": advantages,
        "old_logprobs": logprobs.detach() + 0.4 * torch.randn(B, T),
        "ref_logprobs": logprobs.detach() + 0.6 * torch.randn(B, T),
        "entropy": (2.0 * torch.rand(B, T)).requires_grad_(),
        "mask": mask,
    }


def ours(case, options, **more):
    known = PolicyOptions.__dataclass_fields__
    given = {name: x for name, x in options.items() if name in known}
    given["epsilon_low"] = options.get("epsilon", 0.2)
    if given["loss_type"] == "dr_grpo":
        given["max_length"] = 16
    found = PolicyOptions(**given)
    if found.over_step:
        more.setdefault("num_items", 23.0)
    return policy_loss(**case, options=found, **more)


def trls(case, options, steps=1, **more):
    trainer = trainer_of((case["logprobs"], case["entropy"]), options, steps=steps)
    empty = torch.zeros(B, 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros(B, T, dtype=torch.int64),
        "completion_mask": torch.ones(B, T, dtype=torch.int64),
        "tool_mask": case["mask"].long(),
        "advantages": case["advantages"],
        "old_per_token_logps": case["old_logprobs"],
        "ref_per_token_logps": case["ref_logprobs"],
        "num_items_in_batch": torch.tensor(23.0),
        **more,
    }
    return trainer._compute_loss(None, inputs), trainer._metrics["train"]


def assert_the_same(case, ours_loss, trls_loss):
    torch.testing.assert_close(ours_loss, trls_loss, **CLOSE)
    leaves = [case["logprobs"], case["entropy"]]
    mine, theirs = (
        torch.autograd.grad(x, leaves, allow_unused=True) for x in (ours_loss, trls_loss)
    )
    torch.testing.assert_close(mine[0], theirs[0], **CLOSE)
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, **CLOSE)


VARIANTS = {
    "plain": {},
    "asymmetric": {"epsilon": 0.1, "epsilon_high": 0.28},
    "cispo's bound": {"epsilon_high": 1.2},
    "two-sided": {"delta": 1.3},
    "reference": {"beta": 0.07},
    "reference without the ratio": {"beta": 0.07, "use_bias_correction_kl": False},
    "entropy": {"entropy_coef": 0.3},
    "high entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.3, "beta": 0.1},
    "off-policy": {"off_policy_mask_threshold": 0.05, "beta": 0.1},
    "all": {
        "delta": 1.3,
        "beta": 0.1,
        "entropy_coef": 0.2,
        "top_entropy_quantile": 0.7,
        "off_policy_mask_threshold": 0.1,
        "sapo_temperature_neg": 1.4,
        "vespo_k_pos": 1.5,
    },
}


@pytest.mark.parametrize("per_token", [False, True], ids=["", "by token"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", TRL)
def test_it_is_trls(loss_type, variant, level, per_token):
    case = batch(per_token)
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "use_adaptive_entropy": False,
        "use_vllm": False,
        **VARIANTS[variant],
    }
    found, (expected, metrics) = ours(case, options), trls(case, options)
    assert_the_same(case, found.loss, expected)
    assert found.entropy.item() == pytest.approx(metrics["entropy"][0], rel=1e-5)
    for name, x in (
        ("clip_ratio/low_mean", found.clip_low),
        ("clip_ratio/high_mean", found.clip_high),
        ("cispo_clip_ratio", found.clip_high),
        ("kl", found.kl),
        ("policy_loss", found.policy_loss),
    ):
        if name in metrics:
            assert x.item() == pytest.approx(metrics[name][0], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("shape", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL)
def test_corrected_for_the_engine_that_sampled(loss_type, shape):
    """A log-prob that the engine could not give is no evidence of drift."""
    if (loss_type, shape) == ("vespo", "sequence"):
        pytest.skip("TRL refuses it")
    case = batch()
    weights = torch.rand(B, T if shape == "token" else 1) + 0.5
    if shape == "token":
        weights = weights.masked_fill(~case["mask"], 1.0)
    sampling = case["old_logprobs"] + 0.3 * torch.randn(B, T)
    sampling[0, 3] = float("nan")
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": "token",
        "use_adaptive_entropy": False,
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "off_policy_mask_threshold": 0.05,
        "beta": 0.1,
    }
    found = ours(
        case,
        options,
        ratio_weights=weights if shape == "token" else weights[:, 0],
        sampling_logprobs=sampling,
    )
    expected, _ = trls(
        case, options, importance_sampling_ratio=weights, sampling_per_token_logps=sampling
    )
    assert_the_same(case, found.loss, expected)


@pytest.mark.parametrize("loss_type", TRL)
def test_one_of_several_micro_batches_without_an_old_policy(loss_type):
    case = batch()
    case["old_logprobs"] = None
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": "token",
        "use_adaptive_entropy": False,
        "use_vllm": False,
        "entropy_coef": 0.3,
        "beta": 0.1,
    }
    found = ours(case, options, accumulation_steps=4)
    expected, _ = trls(case, options, steps=4)
    assert_the_same(case, found.loss, expected)


def test_rloo():
    case = batch()
    scored = case["mask"]
    trainer = trainer_of((case["logprobs"], case["entropy"]), {}, RLOOTrainer)
    empty = torch.zeros(B, 1, dtype=torch.int64)
    expected = trainer._compute_loss(
        None,
        {
            "prompt_ids": empty,
            "prompt_mask": empty,
            "completion_ids": torch.zeros(B, T, dtype=torch.int64),
            "completion_mask": scored.long(),
            "advantages": case["advantages"],
            "old_logps": (case["old_logprobs"] * scored).sum(1),
        },
    )
    found = policy_loss(**case, options=PolicyOptions("rloo"))
    assert_the_same(case, found.loss, expected)
    metrics = trainer._metrics["train"]
    assert found.clip_low.item() == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert found.clip_high.item() == pytest.approx(metrics["clip_ratio/high_mean"][0])
