"""Now `treg.heads.logprobs`."""

from treg.heads.logprobs import token_logprobs
from treg.old_names import moved

__all__ = ["token_logprobs"]
moved(__name__, "treg.heads.logprobs")
