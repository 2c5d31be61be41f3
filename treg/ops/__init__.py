"""The public ops: per-token log-probs of a language-model head, the T-REG loss, and the divergence
of two heads, without [N, V] logits. README.md beside this file says how they work.
"""

from treg.checks import resolve_impl
from treg.ops.linear_kl import linear_kl
from treg.ops.linear_logprobs import linear_logprobs
from treg.ops.plans.vocab_parallel import VocabShard
from treg.ops.treg_loss import fused_treg_loss
from treg.results import LinearKL, LinearLogprobs, TRegLoss

__all__ = [
    "LinearKL",
    "LinearLogprobs",
    "TRegLoss",
    "VocabShard",
    "fused_treg_loss",
    "linear_kl",
    "linear_logprobs",
    "resolve_impl",
]
