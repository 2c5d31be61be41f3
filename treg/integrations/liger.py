"""T-REG where Liger's DPO loss stands: the same constructor and call, one import changed. Liger is
not needed here.
"""

import torch
from torch import Tensor, nn

from treg.checks import check_floating, check_number, check_shape, check_tensor
from treg.losses import LossOptions, treg_loss
from treg.losses.pairwise import DISCOPOP_TAU
from treg.ops import fused_treg_loss, linear_logprobs

# of liger_kernel 0.8.5; each is the objective of that name in treg.losses
LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
BLOCK_ROWS = 8192


class FusedLinearTRegLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearDPOLoss` (0.8.5) with T-REG's regularizer as an
    option.

        L = mean over pairs of  base(rho_w, rho_l) + treg_alpha * ( w_w L_reg(y_w) + w_l L_reg(y_l)
        )
            + alpha * nll,      nll = - sum of lp_t over all chosen tokens / their number      (compute_nll_loss)
        rho_s = beta * sum_t (lp_t - ref_t)         L_reg(y) = - sum_t beta * rhat_t * lp_t
        w_s   = | d base / d rho_s |, detached

    With average_log_prob both sums are means over the scored tokens. With treg_alpha=0, loss,
    outputs and gradients are Liger's up to rounding; the memory does not grow with the longest
    pair, and the weight's gradient is summed in float32. Three matrix products a row for the policy
    (up to four with compute_nll_loss), one for the reference.

    Paper: T-REG, arXiv 2412.02685, Eq. 1-3; L_reg as a mean: see `treg.losses.treg_loss`.
    Differs from Liger: what Liger takes and does not use is refused (alpha without
    compute_nll_loss, label_smoothing under a loss type other than exo_pair and robust), as are a
    discopop_tau other than 0.05, label_smoothing >= 0.5, beta <= 0, an odd number of sequences and
    a sequence without a scored token. What stands in ignored rows has no part in the loss, not even
    NaN. For heads with a softcap or a scale use `treg.ops.fused_treg_loss`.

    Args:
        ignore_index: targets that are not scored. beta: > 0, reward scale.
        alpha: weight of the likelihood of the chosen answers, as in Liger; T-REG's own weight is
            treg_alpha.
        compute_nll_loss: add that likelihood. use_ref_model: False: ref_t = 0, and ref_* are not
            read.
        average_log_prob: rewards, log-probs and L_reg are means over tokens instead of sums.
        loss_type: one of LOSS_TYPES. label_smoothing: in [0, 0.5), for robust and exo_pair.
        compiled, chunk_size: no effect; memory is bounded by bytes, not by pairs.
        treg_alpha: >= 0, weight of the regularizer; > 0 needs token_rewards in each call.
    Raises:
        ValueError: an option that cannot be honoured, by name.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = DISCOPOP_TAU,
        *,
        treg_alpha: float = 0.0,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        self.treg_alpha = treg_alpha
        self._options()

    def _options(self) -> LossOptions:
        """The attributes, checked; they may have been set since the last call."""
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type: expected one of {list(LOSS_TYPES)}, as in Liger, got {self.loss_type!r}; "
                "treg.ops.fused_treg_loss has more"
            )
        if self.label_smoothing and self.loss_type not in ("robust", "exo_pair"):
            raise ValueError(
                f"label_smoothing: expected 0 for loss_type={self.loss_type!r} (Liger would ignore it), "
                f"got {self.label_smoothing}"
            )
        if self.discopop_tau != DISCOPOP_TAU:
            raise ValueError(f"discopop_tau: expected {DISCOPOP_TAU}, got {self.discopop_tau}")
        check_number("alpha", self.alpha)
        if self.alpha != 1 and not self.compute_nll_loss:
            raise ValueError(
                f"alpha: expected 1.0 without compute_nll_loss=True (it weighs the likelihood term), got {self.alpha}; "
                "T-REG's weight is treg_alpha"
            )
        check_number("treg_alpha", self.treg_alpha)
        if self.treg_alpha < 0:
            raise ValueError(
                f"treg_alpha: expected a number >= 0, got {self.treg_alpha}; 0 turns the regularizer off"
            )
        return LossOptions(
            self.loss_type, self.beta, self.treg_alpha, label_smoothing=self.label_smoothing
        )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        token_rewards: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what Liger returns beside it.

        Args:
            lin_weight: [V, H]. _input: [2B, T, H] of the same dtype, chosen sequences first. bias:
                [V] or None.
            target: [2B, T] int64, already shifted: target[:, t] is predicted from _input[:, t].
            ref_input, ref_weight, ref_bias: those of the reference model, whose H may be another;
                no gradient.
            token_rewards: [2B, T] floating, rhat_t; needed where treg_alpha > 0, else None.
        Returns:
            loss, which alone carries a gradient, and a tuple of
            chosen_logps, rejected_logps [B]: sums (means with average_log_prob), nats;
            chosen_logits_mean, rejected_logits_mean: scalars, over the vocabulary and every
                position, ignored or not;
            nll_loss: scalar, without alpha, 0 unless compute_nll_loss;
            chosen_rewards, rejected_rewards [B]: rho.
        Raises:
            TypeError: an argument that must be a tensor is none. ValueError: any other bad input,
            by name (hidden and weight are those of the model at fault).
        """
        options = self._options()
        for name, x in (("lin_weight", lin_weight), ("_input", _input), ("target", target)):
            check_tensor(name, x)
        token_rewards = self._checked_rewards(token_rewards, target)
        ref_logps = self._reference(target, ref_input, ref_weight, ref_bias)
        scored = target != self.ignore_index
        lengths = scored.sum(-1)
        token_weights = None
        if self.average_log_prob:
            # a mean is a sum with these weights, in the margin by token_weights, in L_reg by the
            # rewards themselves
            token_weights = scored / lengths.double().unsqueeze(-1)
            token_rewards = None if token_rewards is None else token_rewards * token_weights

        if self.compute_nll_loss:
            logps = linear_logprobs(
                _input, lin_weight, target, bias=bias, ignore_index=self.ignore_index
            ).logprobs
            out = treg_loss(
                logps, token_rewards, ref_logps, options, mask=scored, token_weights=token_weights
            )
            nll = -logps.chunk(2)[0].sum() / lengths.chunk(2)[0].sum()
            loss = out.loss.mean() + self.alpha * nll
        else:
            out = fused_treg_loss(
                _input,
                lin_weight,
                target,
                token_rewards,
                ref_logps,
                beta=self.beta,
                alpha=self.treg_alpha,
                loss_type=self.loss_type,
                bias=bias,
                label_smoothing=self.label_smoothing,
                token_weights=token_weights,
                ignore_index=self.ignore_index,
            )
            loss = out.loss
            nll = torch.zeros_like(loss)
        logps = (out.chosen_logps, out.rejected_logps)
        if self.average_log_prob:
            logps = [x / n for x, n in zip(logps, lengths.chunk(2), strict=True)]
        means = _mean_logits(_input, lin_weight, bias)
        return loss, (*logps, *means, nll.detach(), out.chosen_rewards, out.rejected_rewards)

    def _checked_rewards(self, token_rewards: Tensor | None, target: Tensor) -> Tensor | None:
        if token_rewards is None and self.treg_alpha:
            raise ValueError(
                f"token_rewards: expected a tensor for treg_alpha={self.treg_alpha}, got None"
            )
        if token_rewards is not None and not self.treg_alpha:
            raise ValueError(
                "token_rewards: expected None for treg_alpha=0, which leaves them without effect; "
                "got a tensor: set treg_alpha"
            )
        check_tensor("token_rewards", token_rewards, optional=True)
        if token_rewards is None:
            return None
        check_shape("token_rewards", token_rewards, target.shape, "one per token, like target")
        check_floating("token_rewards", token_rewards)
        return token_rewards.detach()

    @torch.no_grad()
    def _reference(self, target: Tensor, ref_input, ref_weight, ref_bias) -> Tensor:
        """Log-probs of the reference model per token, [2B, T]; 0 without one."""
        if not self.use_ref_model:
            return torch.zeros(target.shape, device=target.device)
        for name, x in (("ref_input", ref_input), ("ref_weight", ref_weight)):
            if x is None:
                raise ValueError(
                    f"{name}: expected a tensor, got None; pass it, or set use_ref_model=False"
                )
            check_tensor(name, x)
        check_shape("ref_input", ref_input, (*target.shape, ref_input.shape[-1]), "target's and H")
        return linear_logprobs(
            ref_input, ref_weight, target, bias=ref_bias, ignore_index=self.ignore_index
        ).logprobs


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """mean_tv (h_t W^T + b)_v = mean_t h_t . mean_v W_v + mean_v b_v, over chosen and over rejected
    sequences.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    column = _mean_row(weight, dtype)
    offset = 0.0 if bias is None else bias.mean(dtype=dtype)
    return tuple((_mean_row(half, dtype) * column).sum() + offset for half in hidden.chunk(2))


def _mean_row(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] -> [D]. Block by block: on a CPU the sum of 16-bit numbers goes by way of a copy in
    dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    return sum(block.sum(0, dtype=dtype) for block in rows.split(BLOCK_ROWS)) / rows.shape[0]
