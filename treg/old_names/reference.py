"""Now `treg.ops.reference`."""

from treg.old_names import moved
from treg.ops.reference import fused_treg_loss, linear_logprobs

__all__ = ["fused_treg_loss", "linear_logprobs"]
moved(__name__, "treg.ops.reference")
