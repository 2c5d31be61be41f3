"""SparsePO: masks on the log-ratio and on the KL divergence of each token, given or learned."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from treg.losses.tdpo import TDPO1

# rho_s = beta * sum_t ( u_t (lp_t - ref_t) + v_t kl_t ): TDPO1 with masks u_t and v_t >= 0, the
# token_weights and kl_weights; v_t is u_t where only one mask is given. MaPO takes masks that are
# made of the reference's activations, SparsePO learned ones. All masks 1 are TDPO1.
SPARSEPO = replace(
    TDPO1, paper="SparsePO and MaPO, arXiv 2410.05102", needs=("token_weights", "kl")
)


class TokenMask(nn.Module):
    """A learned mask, one number >= 0 a token, from the reference's hidden states.

        s_lt = relu( w_l . norm_l(h_lt) + b_l )           a score of each layer
        m_t  = relu( sum_l a_l s_lt )

    Give it to a loss as token_weights (and another one as kl_weights, where the two are to differ):
    the loss has a gradient in both. To keep masks sparse add l1 * m.sum() of both answers.

    Paper: SparsePO, arXiv 2410.05102; the layout is that of the authors' code, whose l1 is 0.001.
    Differs: the relu of the last line starts with a_l = 1 / layers, so that no mask starts as 0
    throughout.

    Args:
        hidden_size: D. layers: L, how many hidden states a token has.
        dropout: share of scores that are dropped in training.
    """

    def __init__(self, hidden_size: int, layers: int, dropout: float = 0.0):
        super().__init__()
        for name, x in (("hidden_size", hidden_size), ("layers", layers)):
            if isinstance(x, bool) or not isinstance(x, int) or x < 1:
                raise ValueError(f"{name}: expected a positive integer, got {x!r}")
        self.hidden_size = hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(layers))
        self.scores = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(layers))
        self.mix = nn.Linear(layers, 1, bias=False)
        nn.init.constant_(self.mix.weight, 1 / layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """[...] from L hidden states [..., D], such as the `hidden_states` of a model's output.

        Raises:
            ValueError: another number of states, or another D.
        """
        if len(states) != len(self.scores):
            raise ValueError(
                f"states: expected {len(self.scores)} hidden states, one a layer, got {len(states)}"
            )
        found = []
        for h, norm, score in zip(states, self.norms, self.scores, strict=True):
            if h.shape[-1] != self.hidden_size:
                raise ValueError(
                    f"states: expected hidden states [..., {self.hidden_size}], got {list(h.shape)}"
                )
            found.append(torch.relu(score(norm(h.detach()))))
        scores = self.dropout(torch.cat(found, -1))
        return self.dropout(torch.relu(self.mix(scores))).squeeze(-1)
