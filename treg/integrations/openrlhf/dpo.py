"""OpenRLHF's DPO with T-REG, without float32 logits: log-probs come from treg's head.

    from treg.integrations import openrlhf

    openrlhf.install("annotated.parquet", alpha=0.25)     # before openrlhf.cli.train_dpo runs

or, in a script of your own:

    actor = openrlhf.patch_actor(Actor(...))     # and the reference, before strategy.prepare
    trainer = openrlhf.make_trainer(DPOTrainer, "annotated.parquet", alpha=0.25)(model=actor, ...)

The two are independent: the trainer takes log-probs from any Actor, and a patched Actor serves any
trainer that asks it for log-probs. Written against OpenRLHF 0.11.2.
"""

import inspect
from pathlib import Path
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from treg.heads import install_head
from treg.heads.logprobs import token_logprobs
from treg.integrations.common import looked_up
from treg.losses.regularizer import token_regularizer
from treg.rewards.lookup import TokenRewards

# RewardDataset ends a response with " " and the end-of-sequence token. Where a response is cut
# that token takes its last place.
TAIL = 2


def install(
    token_rewards: str | Path | TokenRewards, *, alpha: float = 0.25, tail: int = TAIL
) -> None:
    """From now on OpenRLHF's Actor is patched, and its DPOTrainer is T-REG's.

    They are `openrlhf.models.Actor` and `openrlhf.trainer.dpo_trainer.DPOTrainer`.

    Args: as of `make_trainer`. A second call takes the place of the first.
    Raises:
        ImportError: OpenRLHF is not installed.
    """
    try:
        import openrlhf.models as models
        import openrlhf.trainer.dpo_trainer as dpo_trainer
    except ImportError as error:
        raise ImportError(
            f"openrlhf: expected OpenRLHF to be installed (pip install openrlhf): {error}"
        ) from error
    trainer = getattr(dpo_trainer.DPOTrainer, "_treg_base", dpo_trainer.DPOTrainer)

    class TRegActor(models.Actor):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            patch_actor(self)

    dpo_trainer.DPOTrainer = make_trainer(trainer, token_rewards, alpha=alpha, tail=tail)
    models.Actor = TRegActor


def patch_actor(actor: nn.Module) -> nn.Module:
    """An Actor whose forward(..., return_logprobs=True) makes no logits.

    The log-probs are the same; those of padding are 0. Packed samples are served too. With
    return_output=True the output is empty: no logits, and no aux_loss. Calls that want logits,
    entropies, action log-probs or images run the original forward.

    Args:
        actor: openrlhf.models.Actor with its weights loaded; changed in place, and returned.
    Raises:
        TypeError: another class, or another version of it. ValueError: a temperature, or a head
            that treg cannot read;
        in the forward: ring attention.
    """
    if hasattr(actor, "_treg_forward"):
        return actor
    original = actor.forward
    signature = inspect.signature(original)
    needed = {"sequences", "attention_mask", "return_output", "return_logprobs", "ring_attn_group"}
    if not needed <= signature.parameters.keys() or not isinstance(
        getattr(actor, "model", None), nn.Module
    ):
        got = f"{type(actor).__name__}.forward{signature}"
        raise TypeError(f"actor: expected openrlhf.models.Actor, as of OpenRLHF 0.11, got {got}")
    if getattr(actor, "temperature", 1.0) != 1.0:
        raise ValueError(f"actor.temperature: expected 1.0, as DPO has it, got {actor.temperature}")
    install_head(actor.model)

    def forward(self, *args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        more_than_log_probs = (
            call.get("action_mask") is not None
            or call.get("return_entropy")
            or call.get("allgather_logits")
            or call.get("mm_inputs")
        )
        if not call.get("return_logprobs") or more_than_log_probs:
            return self._treg_forward(*args, **kwargs)
        if call.get("ring_attn_group") is not None:
            fix = "use --ds.ring_attn_size 1, or leave the Actor as it is"
            raise ValueError(
                f"ring_attn_group: expected None with treg's log-probs, got a group; {fix}"
            )
        # strategy.prepare puts an engine in the place of self.model
        log_probs = _log_probs(
            self.model,
            call["sequences"],
            call["attention_mask"],
            packed=getattr(self, "packing_samples", False),
        )
        return (log_probs, {}) if call.get("return_output") else log_probs

    actor._treg_forward, actor.forward = original, MethodType(forward, actor)
    return actor


def _log_probs(
    model: nn.Module, sequences: Tensor, attention_mask: Tensor, *, packed: bool
) -> Tensor:
    """Log-probs of the tokens at t+1, [S, T-1], 0 at padding.

    sequences and attention_mask are [S, T].
    """
    kept = attention_mask.bool()
    position = kept.long().cumsum(-1) - 1
    labels = sequences.masked_fill(~kept | (position == 0), -100)
    if not packed:
        position = position.masked_fill(~kept, 1)
        return token_logprobs(
            model, labels, input_ids=sequences, attention_mask=attention_mask, position_ids=position
        ).logprobs
    ids, position, labels = (x[kept][None] for x in (sequences, position, labels))
    found = token_logprobs(model, labels, input_ids=ids, position_ids=position).logprobs
    rows = found.new_zeros(sequences.shape).masked_scatter(kept, F.pad(found[0], (1, 0)))
    return rows[:, 1:]


def make_trainer(
    base: type, token_rewards: str | Path | TokenRewards, *, alpha: float = 0.25, tail: int = TAIL
) -> type:
    """A subclass of OpenRLHF's DPOTrainer with T-REG's regularizer.

    Its loss is DPOTrainer's own plus `treg.losses.regularizer.token_regularizer`. DPO, cDPO and IPO
    keep their options, and the likelihood term (--model.nll_loss_coef) has no part in the weights.
    The logged loss is the sum; evaluation, which has no gradients, reports DPOTrainer's loss.

    Args:
        base: openrlhf.trainer.dpo_trainer.DPOTrainer, or a subclass.
        token_rewards: an annotated file; rewards are found by the token ids of a sequence. alpha:
            >= 0.
        tail: tokens at the end of a sequence that may differ from the annotated ones, see
            `treg.rewards.lookup.TokenRewards`.
    Raises:
        TypeError: a class without DPOTrainer's methods. ValueError: an alpha < 0; in training: a
        sequence that was not annotated.
    """
    missing = [
        name for name in ("concatenated_inputs", "_get_batch_logps") if not hasattr(base, name)
    ]
    if missing:
        raise TypeError(
            f"base: expected OpenRLHF's DPOTrainer (as of 0.11), got {base.__name__} without "
            f"{missing}"
        )
    if not alpha >= 0:
        raise ValueError(f"alpha: expected a number >= 0, got {alpha!r}")
    rewards_of = looked_up(token_rewards, tail)

    class TRegDPOTrainer(base):
        _treg_base = base

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.aux_loss and hasattr(self.model, "_treg_forward"):
                fix = "set --model.aux_loss_coef 0, or leave the Actor as it is"
                raise ValueError(
                    f"aux_loss_coef: expected 0 with a patched Actor, got a coefficient > 0; {fix}"
                )
            self._treg_dpo_loss, self.loss_fn = self.loss_fn, self._treg_loss
            self._treg_inputs: Any = None
            self._treg_seen: Any = None

        # concatenated_forward calls the next two methods: first for the policy and then, without
        # gradients, for the reference.

        def concatenated_inputs(self, *args, **kwargs):
            found = super().concatenated_inputs(*args, **kwargs)
            self._treg_inputs = found[:2]
            return found

        def _get_batch_logps(self, per_token_logps, *args, **kwargs):
            if per_token_logps.requires_grad:
                self._treg_seen = (per_token_logps, *self._treg_inputs)
            return super()._get_batch_logps(per_token_logps, *args, **kwargs)

        def _treg_loss(self, *logps):
            loss, *rewards = self._treg_dpo_loss(*logps)
            seen, self._treg_seen = self._treg_seen, None
            if loss.requires_grad and alpha:
                if seen is None:
                    raise TypeError(
                        "base: expected a DPOTrainer that calls _get_batch_logps before its loss"
                    )
                log_probs, ids, mask = seen
                rewards_of_tokens = rewards_of(ids, mask)[:, 1:]
                # An Actor that is not patched has log-probs of padding too, whatever they are.
                kept = mask.bool()
                inside = kept[:, 1:] & kept[:, :-1]
                loss = loss + token_regularizer(
                    loss, log_probs, rewards_of_tokens, alpha, mask=inside
                )
            return loss, *rewards

    return TRegDPOTrainer
