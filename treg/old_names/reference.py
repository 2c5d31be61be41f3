"""Now `treg.ops.reference`."""

from treg.ops.reference import fused_treg_loss, linear_logprobs

__all__ = ["fused_treg_loss", "linear_logprobs"]
