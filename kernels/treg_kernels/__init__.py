"""Triton kernels of the loss head: torch tensors in and out, no autograd.

tiles.py      device helpers: tile order, the products of one tile, the logit transform
configs.py    the tile shape of each GPU, dtype and size, from measured.json
launch.py     a weight in slabs, pointers or descriptors: what a launch needs
forward.py    log-prob, norm and statistics; optionally the stash, the unscaled gradient of the
              logits
combine.py    the tiles of the forward added up
backward.py   the gradient of the logits for a known coefficient per token
rows.py       hidden states times a number for each row
active.py     which tiles a filtered backward computes
filtered.py   the gradients from those tiles
kl.py         KL divergence of two heads from finished products, and its gradient
bases.py      each objective's value and slopes
objective.py  the loss of pairs, and the coefficient of each token
"""

from treg_kernels.backward import logits_gradient
from treg_kernels.forward import logprob_forward

__all__ = ["logits_gradient", "logprob_forward"]
