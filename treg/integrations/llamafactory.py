"""LLaMA-Factory's DPO, SimPO and ORPO with T-REG, without float32 logits.

The log-probs come from treg's head.

    from llamafactory.train.tuner import run_exp
    from treg.integrations.llamafactory import patch

    patch("annotated.parquet", alpha=0.25)
    run_exp()                                   # python this_file.py dpo.yaml

or, in a trainer of your own: `make_trainer(CustomDPOTrainer, "annotated.parquet", alpha=0.25)`.

It serves `stage: dpo` in the process that calls it: with `use_ray` or `use_mca` other trainers
train, without T-REG. Read and run against LLaMA-Factory 0.9.4 and 0.9.5.

B pairs, T padded length.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from treg.heads import install_head
from treg.heads.logprobs import token_logprobs
from treg.integrations.common import parameters_of, rewards_source
from treg.losses.regularizer import token_regularizer
from treg.rewards.lookup import TokenRewards

FIRST, BEFORE = Version("0.9.4"), Version("0.10")
# values of LLaMA-Factory's pref_loss that take mean log-probs in place of sums
AVERAGED = ("ipo", "orpo", "simpo")
INTERFACE = {
    "concatenated_forward": ["self", "model", "batch", "is_ref_model"],
    "compute_preference_loss": [
        "self",
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    ],
    "get_batch_loss_metrics": ["self", "model", "batch", "train_eval"],
}


def patch(
    token_rewards: str | Path | TokenRewards | None, *, alpha: float = 0.25, tail: int = 0
) -> None:
    """From now on LLaMA-Factory's CustomDPOTrainer is T-REG's.

    It is put into `llamafactory.train.dpo.trainer`, where run_dpo looks it up.

    Args: as of `make_trainer`. A second call takes the place of the first; `unpatch` undoes it.
    Raises:
        ImportError: LLaMA-Factory is not installed. RuntimeError: a version of it that has not been
            tried.
    """
    module = _trainer_module()
    original = getattr(module.CustomDPOTrainer, "_treg_base", module.CustomDPOTrainer)
    module.CustomDPOTrainer = make_trainer(original, token_rewards, alpha=alpha, tail=tail)


def unpatch() -> None:
    """LLaMA-Factory's own trainer is back. Does nothing without a `patch` before."""
    module = _trainer_module()
    module.CustomDPOTrainer = getattr(
        module.CustomDPOTrainer, "_treg_base", module.CustomDPOTrainer
    )


def make_trainer(
    base: type,
    token_rewards: str | Path | TokenRewards | None,
    *,
    alpha: float = 0.25,
    tail: int = 0,
) -> type:
    """A subclass of LLaMA-Factory's CustomDPOTrainer: its own loss plus R, without its logits.

        R = - alpha * sum_t c_t rhat_t lp_t          c_t = | d L / d lp_t |

    R is `treg.losses.regularizer.token_regularizer`. L is the preference loss of pref_loss, with
    ld_alpha, dpo_label_smoothing and pref_bco_weight as they are set. The likelihood terms
    (pref_ftx, and the one inside orpo) have no part in c_t. Evaluation, which has no gradients,
    reports CustomDPOTrainer's own loss.

    Differs from CustomDPOTrainer: logits/chosen and logits/rejected are means over scored tokens,
    not over every position. treg/reg_loss is logged: L_reg, a mean over pairs, before alpha and the
    weight.

    Args:
        base: llamafactory.train.dpo.trainer.CustomDPOTrainer, or a subclass.
        token_rewards: an annotated file; rewards are found by the token ids of a sequence. None:
            alpha must be 0.
        alpha: >= 0; 0 is the trainer's own loss. tail: tokens at the end of a sequence that may
            differ from the annotated ones, see `treg.rewards.lookup.TokenRewards`.
    Raises:
        TypeError: a class without CustomDPOTrainer's methods. ValueError: a bad alpha; in training:
        a head that cannot be read, a sequence that was not annotated.
    """
    _check_interface(base)
    source = rewards_source(token_rewards, alpha, tail)

    class TRegDPOTrainer(base):
        _treg_base = base

        def __init__(self, model: Any, ref_model: Any, *args: Any, **kwargs: Any):
            for x in (model, ref_model):  # before anything shards or wraps them
                if x is not None:
                    install_head(x)
            super().__init__(model, ref_model, *args, **kwargs)
            self._treg_seen: Any = None  # of the policy's last forward
            self._treg_term: Any = None

        def concatenated_forward(self, model, batch, is_ref_model=False):
            inputs = {name: x for name, x in batch.items() if name != "labels"}
            found = token_logprobs(model, batch["labels"], outputs=("mean_logit",), **inputs)
            scored = batch["labels"][:, 1:] != -100
            length = scored.sum(-1)
            weights = _pair_weights(scored, None if is_ref_model else self.ld_alpha)
            averaged = self.loss_type in AVERAGED
            if averaged:
                weights = weights / length[:, None]
            # log-probs are 0 where none is scored
            chosen, rejected = (found.logprobs * weights).sum(-1).chunk(2)
            chosen_scored, rejected_scored = scored.chunk(2)
            chosen_logits, rejected_logits = found.mean_logit.chunk(2)
            if not is_ref_model:
                self._treg_seen = found.logprobs, scored, weights, batch
            return {
                "chosen_logps": chosen,
                "rejected_logps": rejected,
                # the mean of the logits is all that is read of them
                "chosen_logits": chosen_logits[chosen_scored],
                "rejected_logits": rejected_logits[rejected_scored],
                "chosen_logps_avg": chosen if averaged else chosen / length.chunk(2)[0],
            }

        def compute_preference_loss(self, policy_chosen_logps, *logps):
            losses, *rewards = super().compute_preference_loss(policy_chosen_logps, *logps)
            if source is not None and losses.requires_grad:
                token_logps, scored, weights, batch = self._treg_seen
                rhat = source(batch["input_ids"], batch["attention_mask"])[:, 1:]
                preference = losses + policy_chosen_logps if self.loss_type == "orpo" else losses
                term = token_regularizer(preference.mean(), token_logps, rhat, alpha, mask=scored)
                reg = -self.beta * (rhat * weights * token_logps.detach()).sum() / len(losses)
                self._treg_term = term, reg.item()
            return losses, *rewards

        def get_batch_loss_metrics(self, model, batch, train_eval="train"):
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
            found, self._treg_seen, self._treg_term = self._treg_term, None, None
            if found is None:
                return loss, metrics
            term, reg = found
            return loss + term, metrics | {"treg/reg_loss": reg}

    return TRegDPOTrainer


def _check_interface(base: type) -> None:
    for name, expected in INTERFACE.items():
        found = parameters_of(base, name)
        if found != expected:
            raise TypeError(
                f"base: expected LLaMA-Factory's CustomDPOTrainer with {name}"
                f"({', '.join(expected)}), got {base.__name__} with {found}"
            )


def _pair_weights(scored: Tensor, ld_alpha: float | None) -> Tensor:
    """Weights of log-probs in a sequence's sum, [2B, T-1] float32; 0 where none is scored.

    They are 1, and ld_alpha at tokens beyond the length of the shorter sequence of the pair.
    Length-desensitised DPO, arXiv 2409.06411. Differs: as in LLaMA-Factory, lengths count places
    from the first scored one, whether those between are scored or not.
    """
    if ld_alpha is None:
        return scored.float()
    shorter = torch.minimum(*scored.sum(-1).chunk(2)).repeat(2)
    end = scored.int().argmax(-1) + shorter
    place = torch.arange(scored.shape[1], device=scored.device)
    return scored.float().where(place < end[:, None], ld_alpha * scored)


def _trainer_module() -> Any:
    try:
        version = importlib.metadata.version("llamafactory")
        import llamafactory.train.dpo.trainer as module
    except ImportError as error:
        raise ImportError(
            "llamafactory: expected LLaMA-Factory to be installed (pip install llamafactory): "
            f"{error}"
        ) from error
    if not FIRST <= Version(version) < BEFORE:
        raise RuntimeError(
            f"llamafactory: expected a version >= {FIRST} and < {BEFORE}, got {version}; install "
            "one of these, or make the class with make_trainer, which checks its methods only"
        )
    return module
