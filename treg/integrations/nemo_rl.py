"""NeMo-RL's DPO with T-REG: a loss function in the place of DPOLossFn.

    import nemo_rl.algorithms.dpo as dpo
    from treg.integrations.nemo_rl import TRegLossFn

    dpo.DPOLossFn = TRegLossFn          # before dpo.setup(), which makes the loss

and in the section `dpo` of the config, from which the loss is made, beside NeMo-RL's own keys:

    treg_token_rewards: annotated.parquet
    treg_alpha: 0.25

Written against NeMo-RL's main branch of August 2026.
"""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treg.integrations.common import looked_up
from treg.losses.regularizer import token_regularizer
from treg.rewards.lookup import TokenRewards

# NeMo-RL cuts the newline after the last turn, and may end it with the end-of-sequence token
TAIL = 1


class TRegLossFn:
    """NeMo-RL's DPOLossFn plus `treg.losses.regularizer.token_regularizer`.

        L = DPOLossFn + R       R = -alpha * sum_t c_t rhat_t lp_t,   c_t = | d L_pref / d lp_t |

    L_pref is DPOLossFn without its sft loss, weighted and normalised (by global_valid_seqs / 2) as
    there. Everything else (loss_type, input_type, metric_normalizations, ...) is the attribute of
    the DPOLossFn inside.

    Args:
        cfg: as of DPOLossFn, a mapping or an object; read here are treg_alpha (0.25),
            treg_token_rewards (an annotated file; None: the batch has a column `token_rewards`, [B,
            S], rhat of the token at each place) and treg_tail (1; see
            `treg.rewards.lookup.TokenRewards`).
        args, kwargs: the other arguments of DPOLossFn.
    Raises:
        ImportError: NeMo-RL is not installed. ValueError: an alpha < 0; when called: sequences
            without rewards.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any):
        option = cfg.get if isinstance(cfg, Mapping) else functools.partial(getattr, cfg)
        self.alpha, path = option("treg_alpha", 0.25), option("treg_token_rewards", None)
        if not self.alpha >= 0:
            raise ValueError(f"treg_alpha: expected a number >= 0, got {self.alpha!r}")
        # Workers have other working directories. The file is read by each of them, not sent with
        # every step.
        self.file: tuple[str, int] | None = None
        if path is not None:
            self.file = str(Path(path).resolve()), option("treg_tail", TAIL)
            _token_rewards(*self.file)
        self.base = _dpo_loss_fn()(cfg, *args, **kwargs)
        self.preference = copy.copy(self.base)
        self.preference.sft_loss_weight = 0.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "base":  # not there yet while an object is unpickled
            raise AttributeError(name)
        return getattr(self.base, name)

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss and DPOLossFn's metrics with `treg_loss`, R; without gradients (validation)
        DPOLossFn's own.

        Args: next_token_logprobs [B, S-1]; of data [B, S] input_ids, token_mask,
            reference_policy_logprobs, and [B] sample_mask, input_lengths; chosen and rejected in
            turn. A sequence that sample_mask leaves out needs no rewards.
        """
        inputs = {
            "data": data,
            "global_valid_seqs": global_valid_seqs,
            "global_valid_toks": global_valid_toks,
        } | kwargs
        loss, metrics = self.base(next_token_logprobs, **inputs)
        if not loss.requires_grad or not self.alpha:
            return loss, metrics
        objective = (
            self.preference(next_token_logprobs, **inputs)[0] if self.base.sft_loss_weight else loss
        )
        rewards = self._rewards(data)[:, 1:].to(next_token_logprobs.device)
        scored = (data["token_mask"] * data["sample_mask"].unsqueeze(-1))[:, 1:] > 0
        scored = scored.to(next_token_logprobs.device)
        term = token_regularizer(objective, next_token_logprobs, rewards, self.alpha, mask=scored)
        loss = loss + term
        return loss, metrics | {"loss": loss.item(), "treg_loss": term.item()}

    def _rewards(self, data: Mapping[str, Tensor]) -> Tensor:
        """rhat of the token at each place, [B, S]."""
        ids = data["input_ids"]
        if "token_rewards" in data:
            rewards = data["token_rewards"]
            if rewards.shape != ids.shape:
                raise ValueError(
                    f"token_rewards: expected the shape of input_ids {list(ids.shape)}, "
                    f"got {list(rewards.shape)}"
                )
            return rewards
        if self.file is None:
            raise ValueError(
                "token_rewards: expected rewards of the batch's tokens, got none; set "
                "dpo.treg_token_rewards to an annotated file, or add the column token_rewards "
                "[B, S]"
            )
        # NeMo-RL cuts examples that are too long to a few tokens, and masks them.
        valid = data["sample_mask"] > 0
        rewards = torch.zeros(ids.shape, device=ids.device)
        if bool(valid.any()):
            place = torch.arange(ids.shape[1], device=ids.device)
            mask = place < data["input_lengths"][valid, None]
            rewards[valid] = _token_rewards(*self.file)(ids[valid], mask)
        return rewards


@functools.lru_cache(maxsize=1)
def _token_rewards(path: str, tail: int) -> TokenRewards:
    return looked_up(path, tail)


def _dpo_loss_fn() -> type:
    try:
        from nemo_rl.algorithms.loss.loss_functions import DPOLossFn
    except ImportError as error:
        raise ImportError(
            f"nemo_rl: expected NeMo-RL, with nemo_rl.algorithms.loss: {error}"
        ) from error
    return DPOLossFn
