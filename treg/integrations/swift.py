"""ms-swift's DPO with T-REG, without logits: log-probs come from treg's head.

A plugin file, say treg_plugin.py:

    from treg.integrations.swift import patch

    patch("annotated.parquet", alpha=0.25)

and then `swift rlhf --rlhf_type dpo --external_plugins treg_plugin.py ...`, which imports it in
every process; padded, `--padding_free` or `--packing`. In Python:
`make_trainer(swift.rlhf_trainers.DPOTrainer, "annotated.parquet")`.

For token rewards and ms-swift's `loss_scale` see `loss_scale_of_rewards` and
`token_weights_of_loss_scale`. ms-swift has no place for rewards in a plugged-in SFT loss
(`loss_map`), which sees no prompt to find them by, nor in a LossScale plugin, which sees text and
not tokens. Read against ms-swift 4.0.4, 4.4.2, 4.5.3 and 4.6.0, and run against 4.6.0.

B pairs; S sequences of padded length T, or S = 1 row of all sequences one after the other.
"""

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from treg.heads import install_head
from treg.heads.logprobs import token_logprobs
from treg.integrations.common import parameters_of, rewards_source
from treg.losses.regularizer import token_regularizer
from treg.rewards.lookup import TokenRewards

FIRST, BEFORE = Version("4.0"), Version("5")
OWN = "swift.rlhf_trainers.DPOTrainer"
# first parameters of the methods that are built upon
INTERFACE = {
    "concatenated_forward": ["self", "model", "batch", "is_ref_model"],
    "get_per_token_logps": ["self", "logits", "labels", "label_pad_token_id"],
    "get_batch_loss_metrics": ["self", "model", "batch", "train_eval"],
    "get_use_logits_to_keep": ["self", "default_value"],
}

TRegDPOTrainer: type | None = None  # what `patch` made, and ms-swift looks up here


def patch(
    token_rewards: str | Path | TokenRewards | None,
    *,
    alpha: float = 0.25,
    tail: int = 0,
    loss_scale: bool = False,
) -> None:
    """From now on ms-swift's TrainerFactory names T-REG's trainer for `--rlhf_type dpo`.

    Args: as of `make_trainer`. A second call takes the place of the first; `unpatch` undoes it.
    Raises:
        ImportError: ms-swift is not installed. RuntimeError: a version of it that has not been
            read.
    """
    global TRegDPOTrainer
    factory = _factory()
    from swift.rlhf_trainers import DPOTrainer

    TRegDPOTrainer = make_trainer(
        DPOTrainer, token_rewards, alpha=alpha, tail=tail, loss_scale=loss_scale
    )
    factory.TRAINER_MAPPING["dpo"] = f"{__name__}.{TRegDPOTrainer.__name__}"


def unpatch() -> None:
    """ms-swift's own trainer is back. Does nothing without a `patch` before."""
    factory = _factory()
    if factory.TRAINER_MAPPING["dpo"].startswith(f"{__name__}."):
        factory.TRAINER_MAPPING["dpo"] = OWN


def make_trainer(
    base: type,
    token_rewards: str | Path | TokenRewards | None,
    *,
    alpha: float = 0.25,
    tail: int = 0,
    loss_scale: bool = False,
) -> type:
    """A subclass of ms-swift's DPOTrainer: its own loss plus R, without its logits.

        R = - alpha * sum_t c_t rhat_t lp_t          c_t = | d L / d lp_t |

    R is `treg.losses.regularizer.token_regularizer`. L is the preference loss: loss_type (one or
    several), label_smoothing, ld_alpha and f_divergence_type as they are set. The likelihood terms
    (rpo_alpha, loss_type sft) have no part in c_t. Evaluation, which has no gradients, reports
    DPOTrainer's own loss. treg/reg_loss is logged: -beta sum_t rhat_t lp_t, a mean over pairs,
    before alpha and the weight.

    Where concatenated_forward calls the model it gets, in the place of logits, the log-prob and the
    mean logit of each place, made inside the model's forward; get_per_token_logps, which would take
    them from logits, hands them on. All else is DPOTrainer's. use_logits_to_keep has no effect:
    only scored tokens go through the head anyway.

    Args:
        base: swift.rlhf_trainers.DPOTrainer, or a subclass.
        token_rewards: an annotated file; rewards are found by the token ids of a sequence. None:
            alpha must be 0.
        alpha: >= 0; 0 is the trainer's own loss. tail: tokens at the end of a sequence that may
            differ from the annotated ones, see `treg.rewards.lookup.TokenRewards`.
        loss_scale: weigh each token's log-prob, of policy and reference, by the template's
            loss_scale (u_t in the margin, see `treg.losses.treg_loss`). DPOTrainer itself takes no
            notice of it; so a batch that has one is refused otherwise.
    Raises:
        TypeError: a class without DPOTrainer's methods. ValueError: a bad alpha; what cannot be
        served: multimodal and encoder-decoder models, sequence parallelism, router_aux_loss_coef >
        0; in training: a sequence that was not annotated.
    """
    _check_interface(base)
    source = rewards_source(token_rewards, alpha, tail)

    class TRegDPOTrainer(base):
        _treg_base = base

        def __init__(self, model: Any = None, ref_model: Any = None, *args: Any, **kwargs: Any):
            for x in (model, ref_model):  # before anything shards or wraps them
                if x is not None:
                    install_head(x)
            super().__init__(model, ref_model, *args, **kwargs)
            _check_served(self)
            self._treg_seen: Any = None  # of the policy's last forward

        def get_use_logits_to_keep(self, *args, **kwargs):
            return False

        def concatenated_forward(self, model, batch, is_ref_model=False):
            labels, weights = batch["labels"], _weights(batch, wanted=loss_scale)
            seen = []

            def scores(*, use_cache, loss_scale=None, **inputs):
                found = token_logprobs(model, labels, outputs=("mean_logit",), **inputs)
                seen.append(found.logprobs)
                # log-probs are 0 where none is scored
                logps = found.logprobs if weights is None else found.logprobs * weights
                # at place t what predicts token t + 1, as labels rolled by -1 have it
                both = torch.stack([logps, found.mean_logit], -1)
                return SimpleNamespace(logits=F.pad(both, (0, 0, 0, 1)))

            output = super().concatenated_forward(scores, batch, is_ref_model)
            if not is_ref_model:
                self._treg_seen = seen[0], labels[:, 1:] != -100, output
            return output

        def get_per_token_logps(self, logits, labels, label_pad_token_id=-100, **kwargs):
            logps, mean_logits = logits.unbind(-1)
            return logps, mean_logits, labels != label_pad_token_id

        def get_batch_loss_metrics(self, model, batch, train_eval="train", **kwargs):
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval, **kwargs)
            (logps, scored, output), self._treg_seen = self._treg_seen, None
            if source is None or not loss.requires_grad:
                return loss, metrics
            likelihood = (self.args.rpo_alpha or 0.0) + self._treg_sft_weight()
            preference = loss - likelihood * output["nll_loss"] if likelihood else loss
            rhat = _rewards(source, batch, packed=self.template.padding_free)[:, 1:]
            term = token_regularizer(preference, logps, rhat, alpha, mask=scored)
            reg = -self.beta * (rhat * logps.detach()).sum() / len(output["chosen_logps"])
            reg = self.accelerator.gather_for_metrics(reg).mean().item()
            return loss + term, metrics | {"treg/reg_loss": reg}

        def _treg_sft_weight(self) -> float:
            types = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
            weights = getattr(self, "loss_weights", None) or [1.0] * len(types)
            return sum(w for name, w in zip(types, weights, strict=True) if name == "sft")

    return TRegDPOTrainer


def _check_interface(base: type) -> None:
    for name, expected in INTERFACE.items():
        found = parameters_of(base, name)
        if found[: len(expected)] != expected:
            raise TypeError(
                f"base: expected ms-swift's DPOTrainer with {name}({', '.join(expected)}, ...), "
                f"got {base.__name__} with {found}"
            )


def _check_served(trainer: Any) -> None:
    """ValueError for what the trainer's loss cannot be made of."""
    refused = {
        "a multimodal model": trainer.model.model_meta.is_multimodal,
        "an encoder-decoder model": trainer.is_encoder_decoder,
        "sequence_parallel_size > 1": trainer.template.sequence_parallel_size > 1,
        "router_aux_loss_coef > 0": getattr(trainer, "aux_loss_enabled", False),
    }
    for what, found in refused.items():
        if found:
            raise ValueError(
                f"expected a text model on its own, got {what}, which T-REG cannot serve here"
            )


def loss_scale_of_rewards(token_rewards: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """The `loss_scale` of a batch for ms-swift's SFT loss.

        sum_t u_t (-lp_t)          u_t = 1 + alpha * rhat_t

    Like labels, it is not shifted: ms-swift's trainer rolls it by -1 itself, beside the labels.

    Args:
        token_rewards: [S, T], rhat of the token at each place, as
            `treg.rewards.lookup.TokenRewards` gives it.
        labels: [S, T] int64, -100 where not scored. alpha: >= 0.
    Returns:
        [S, T] float32, 0 where not scored.
    Raises:
        ValueError: shapes that differ, a weight below 0.
    """
    if token_rewards.shape != labels.shape:
        raise ValueError(
            f"token_rewards: expected the shape of labels {list(labels.shape)}, got "
            f"{list(token_rewards.shape)}"
        )
    scale = torch.where(labels == -100, 0.0, 1 + alpha * token_rewards.float())
    if not bool((scale >= 0).all()):
        raise ValueError(
            f"alpha: expected 1 + alpha * rhat >= 0 at every token, got {scale.min()} for "
            f"alpha={alpha}"
        )
    return scale


def token_weights_of_loss_scale(loss_scale: Tensor) -> Tensor:
    """u_t of `treg.losses.treg_loss`: [S, T] as in a batch -> [S, T-1].

    The result is aligned with `treg.heads.logprobs.token_logprobs`.
    """
    return loss_scale[:, 1:]


def _weights(batch: dict, *, wanted: bool) -> Tensor | None:
    scale = batch.get("loss_scale")
    if scale is not None and not wanted:
        raise ValueError(
            "loss_scale: expected none, as ms-swift's DPO does not use it, got a tensor; give "
            "patch loss_scale=True to weigh log-probs by it, or train with "
            "--is_binary_loss_scale true"
        )
    return None if scale is None else token_weights_of_loss_scale(scale)


def _rewards(token_rewards: TokenRewards, batch: dict, *, packed: bool) -> Tensor:
    """rhat of the token at each place, [S, T].

    packed: one row, in which sequences start where position_ids is 0.
    """
    ids = batch["input_ids"]
    if not packed:
        return token_rewards(ids, batch.get("attention_mask"))
    position = batch.get("text_position_ids")
    position = batch["position_ids"] if position is None else position
    starts = torch.nonzero(position[0] == 0)[:, 0].tolist()
    pieces = [token_rewards.of(x) for x in np.split(ids[0].cpu().numpy(), starts[1:])]
    return torch.from_numpy(np.concatenate(pieces))[None].to(ids.device)


def _factory() -> Any:
    try:
        version = importlib.metadata.version("ms-swift")
        from swift.trainers.trainer_factory import TrainerFactory
    except ImportError as error:
        raise ImportError(
            f"swift: expected ms-swift to be installed (pip install ms-swift): {error}"
        ) from error
    if not FIRST <= Version(version) < BEFORE:
        raise RuntimeError(
            f"swift: expected ms-swift >= {FIRST} and < {BEFORE}, got {version}; install one of "
            "these, or make the class with make_trainer, which checks its methods only"
        )
    return TrainerFactory
