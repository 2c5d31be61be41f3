"""Triton kernels of the loss head: torch tensors in and out, no autograd, no objective.

tiles.py     device helpers: tile order, one logits tile, the logit transform
configs.py   the tile shapes that are tried
forward.py   log-prob, lse and statistics; optionally the stash, the unscaled
             gradient of the logits
backward.py  the gradient of the logits for a known coefficient per token
"""

from treg_kernels.backward import logits_gradient
from treg_kernels.forward import logprob_forward

__all__ = ["logits_gradient", "logprob_forward"]
