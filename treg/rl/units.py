"""Units: which tokens of an answer earn one advantage together.

Units are int64, one number a token: the number of the macro action, or of the segment, that it is
in, from 0 in every sequence. Tokens that are not scored have 0, which nobody reads. Where all of an
answer is one unit, `torch.zeros_like(mask, dtype=torch.int64)` says so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from treg.checks import check_count
from treg.rl.layout import Layout
from treg.rl.steps import one_to_the_right


@torch.no_grad()
def units_from_starts(
    starts: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Units that begin where starts is True.

        unit_t = the number of starts among the scored tokens up to t, but the first of them

    Segments by entropy (arXiv 2501.02790, where a token closes a segment if the entropy of what
    comes next is high) are `units_from_starts(entropy > 1.75)`, entropy_t being that of the
    distribution that token t was drawn from.
    Differs: there the last token of an answer is in no segment.

    Args:
        starts: [B, T], or [N] with cu_seqlens, bool. The first scored token of a sequence begins a
            unit in any case.
        mask: [B, T] bool, True where a token is scored; holes are skipped. None: every token is.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        Like starts, int64.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: starts that are not bool;
            shapes, dtypes or devices that do not fit; both mask and cu_seqlens.
    """
    layout = Layout.of("starts", starts, mask, cu_seqlens)
    if starts.dtype != torch.bool:
        raise ValueError(f"starts: expected torch.bool, got {starts.dtype}")
    return _numbered(layout, layout.rows(starts))


@torch.no_grad()
def perplexity_units(
    logprobs: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Units that end before a token which is less expected than the one before it.

        token t begins a unit where lp_t < lp_{t-1}, so that exp(-lp_t), its perplexity, rises

    Paper: MA-RLHF, arXiv 2410.02743, termination by perplexity.
    Differs: in the released code the token before the rise begins the unit.

    Args:
        logprobs: [B, T], or [N] with cu_seqlens, floating, nats; in the paper of the reference
            model.
        mask: [B, T] bool, True where a token is scored; holes are skipped. None: every token is.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end; not with mask.
    Returns:
        Like logprobs, int64.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: shapes, dtypes or devices
            that do not fit; both mask and cu_seqlens; a log-prob of a scored token that is not
            finite (values are checked on a CPU, or under `treg.set_debug(True)`).
    """
    layout = Layout.of("logprobs", logprobs, mask, cu_seqlens)
    rows = layout.take("logprobs", logprobs)
    return _numbered(layout, rows < one_to_the_right(rows))


@torch.no_grad()
def ngram_units(n: int, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Units of n tokens; the last one of a sequence has what remains.

        unit_j = floor(j / n) of the j-th scored token, from 0

    Paper: MA-RLHF, arXiv 2410.02743, fixed n-grams, with n = 5.
    Differs: in the released code the last token is always a unit of its own.

    Args:
        n: >= 1.
        mask: [B, T] bool, True where a token is scored; holes are skipped.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end. One of both must
            be given.
    Returns:
        [B, T] or [N], int64, on the device of the mask or of cu_seqlens.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: n that is no whole number
            >= 1; a mask that is not [B, T] bool; both mask and cu_seqlens, or none.
    """
    check_count("n", n)
    layout = Layout.where(mask, cu_seqlens)
    return layout.back(_columns(layout) // n, torch.int64)


@torch.no_grad()
def random_ngram_units(
    lengths: Sequence[int] = (2, 3, 5, 10),
    *,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Units of random lengths, each drawn from some with equal chances.

    Paper: MA-RLHF, arXiv 2410.02743, randomised n-grams.
    Differs: the released code draws from 1, 2, 3, 5 and 10, each a limited number of times for all
    sequences of a batch alike; what then remains of a sequence is one unit.

    Args:
        lengths: whole numbers >= 1, in tokens.
        generator: who draws; None: torch's own of the device. Padded and packed forms of the same
            sequences get the same units.
        mask: [B, T] bool, True where a token is scored; holes are skipped.
        cu_seqlens: [B + 1] int32 or int64, where packed sequences begin and end. One of both must
            be given.
    Returns:
        [B, T] or [N], int64, on the device of the mask or of cu_seqlens.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: no lengths, or one that is
            no whole number >= 1; a mask that is not [B, T] bool; both mask and cu_seqlens, or none.
    """
    if not len(lengths):
        raise ValueError("lengths: expected whole numbers >= 1, got none")
    for length in lengths:
        check_count("lengths", length)
    layout = Layout.where(mask, cu_seqlens)
    device = layout.lengths.device
    drawing = device if generator is None else generator.device
    # by columns, so that what is drawn for a sequence does not depend on the width
    size = (layout.width, len(layout.lengths))
    drawn = torch.randint(len(lengths), size, generator=generator, device=drawing)
    ends = torch.tensor(lengths, device=drawing)[drawn].T.cumsum(1).to(device)
    return layout.back(torch.searchsorted(ends, _columns(layout), right=True), torch.int64)


def _numbered(layout: Layout, starts: Tensor) -> Tensor:
    """Units from rows [B, W] bool; what they say of the first token does not matter."""
    return layout.back(starts.cumsum(1) - starts[:, :1].long(), torch.int64)


def _columns(layout: Layout) -> Tensor:
    """[B, W] int64: j at the j-th scored token."""
    count = len(layout.lengths)
    return torch.arange(layout.width, device=layout.lengths.device).repeat(count, 1)
