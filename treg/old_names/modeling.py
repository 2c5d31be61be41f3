"""Now `treg.heads.logprobs`."""

from treg.heads.logprobs import token_logprobs

__all__ = ["token_logprobs"]
