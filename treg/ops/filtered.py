"""The backward of a head without the tiles of the logits' gradient that are below filter_eps: 1 + 3
rho products.

The forward leaves, beside the norm, the largest z of each block of columns and row (`block_tops`).
With the coefficients coef_t = d L / d lp_t known, tile (i, j) of 128 rows by 128 columns is
inactive if

    max_{t in i, scored} |coef_t| * exp(top_t[j] - lse_t) < filter_eps * max_t |coef_t|

and no row of i with a coefficient has its target in j. Inactive tiles add nothing to any gradient;
the others are computed as ever. rho is the share of active tiles: the coefficients enter, so pairs
that a loss is done with cost nothing. filter_eps = 0 keeps every tile. What is left out has one
sign, so this is approximate and never the default.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from treg.ops.gemm import add_transposed
from treg.ops.head import Head, chunks, local_target, on_device, part_of, without_autocast
from treg.ops.triton_tiles import TritonTiles

TILE = 128  # rows, and columns: the tiles of treg_kernels.active
PIECE = 2048  # columns that the torch path takes at once, at most


class Gradients(NamedTuple):
    """Of the tensors that need one."""

    dhidden: Tensor | None  # [N, D], hidden's dtype; 0 in rows that are not listed
    dweight: Tensor | None  # [V, D], float32 (the weight's dtype where one slab made it)
    dbias: Tensor | None  # [V], float32


def block_tops(z: Tensor, target: Tensor, width: int) -> Tensor:
    """Largest z of each block of `width` columns without the target's column, [n, ceil(V / width)].

    Args: z [n, V], changed meanwhile; target [n, 1] int64 in [0, V). A block of a target alone has
    -inf.
    """
    held = z.gather(1, target)
    z.scatter_(1, target, -math.inf)
    even = z.shape[1] - z.shape[1] % width
    tops = z[:, :even].unflatten(1, (-1, width)).amax(2)
    if even < z.shape[1]:
        tops = torch.cat([tops, z[:, even:].amax(1, keepdim=True)], 1)
    z.scatter_(1, target, held)
    return tops


def check_filter(tiles, eps: float, budget: int) -> None:
    """ValueError for an eps that is no share, and where the budget does not hold one row of
    tiles.
    """
    if not 0.0 <= eps < 1.0:
        raise ValueError(f"filter_eps: expected a number in [0, 1), got {eps}")
    if isinstance(tiles, TritonTiles) and budget < (least := TILE * _slab_row_bytes(tiles)):
        V = tiles.head.weight.shape[0]
        raise ValueError(
            f"memory_budget: filter_eps needs at least {least} bytes ({TILE} rows at V={V}), got {budget}"
        )


def filtered_rows(
    tiles,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor | None,
    norm: Tensor,
    coef: Tensor,
    tops: Tensor,
    width: int,
    eps: float,
    budget: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Gradients, Tensor]:
    """Gradients of sum_t coef_t lp_t over the rows listed from their active tiles, and rho, a 0-dim
    float32 tensor.

    Args:
        norm: [N], as `tiles.forward` gives it; tops: [N, ceil(V / width)] float32, in the same
            unit, as `block_tops`; width: a multiple of 128. coef: [N]. Rows make tiles in the order
            in which they are listed.
        eps, budget: what `check_filter` accepts. needs: of hidden, weight, bias.
    """
    scored = target != tiles.head.ignore_index
    coef = torch.where(scored, coef, 0.0).to(
        norm.dtype
    )  # whatever a loss leaves at the others, NaN even
    work = _by_triton if isinstance(tiles, TritonTiles) else _by_torch
    with without_autocast(hidden):
        grads, active = work(
            tiles, hidden, target, rows, norm, coef, tops, width, eps, budget, needs
        )
    share = (
        torch.cat([a.flatten() for a in active]).float().mean()
        if active
        else torch.zeros((), device=hidden.device)
    )
    return grads, share


def _slab_row_bytes(tiles) -> int:
    """Of a row of the slab, and where rows are listed of copies of its hidden state and dhidden."""
    V, D = tiles.head.weight.shape
    return (-(-V // TILE) * TILE + 2 * D) * tiles.stash_dtype.itemsize + 64


def _by_triton(tiles, hidden, target, rows, norm, coef, tops, width, eps, budget, needs):
    """Slabs of rows, whole tiles each, without looking at a value."""
    from treg_kernels.active import active_tiles
    from treg_kernels.filtered import filtered_gradients, slab_shape
    from treg_kernels.tiles import Scalars

    head: Head = tiles.head
    weight, bias = head.weight, None if head.bias is None else head.bias.contiguous()
    scalars = Scalars.of(head.logit_scale, head.softcap, head.temperature)
    N, V = hidden.shape[0], weight.shape[0]
    count = N if rows is None else rows.shape[0]
    step = budget // _slab_row_bytes(tiles) // TILE * TILE
    grads = _empty(
        hidden, head, needs, weight.dtype if 0 < count <= step else tiles.compute, tiles.compute
    )
    if count == 0:
        return _zeroed(grads), []
    dhidden, dweight, dbias = grads
    threshold = eps * coef.abs().amax()
    slab = hidden.new_empty(slab_shape(min(count, step), V))
    found = []
    with on_device(weight):
        for r in chunks(rows, N, step):
            h, y, n, c = hidden[r], target[r], norm[r], coef[r]
            found.append(active_tiles(tops[r], width, n, c, y, threshold, V))
            out = None if dhidden is None else dhidden[r] if rows is None else torch.empty_like(h)
            filtered_gradients(
                h,
                weight,
                y,
                bias,
                scalars,
                n,
                c,
                found[-1],
                slab,
                out,
                dweight,
                dbias,
                add=len(found) > 1,
            )
            if rows is not None and out is not None:
                dhidden[r] = out
    return grads, found


def _by_torch(tiles, hidden, target, rows, norm, coef, tops, width, eps, budget, needs):
    """Row tile by row tile: each run of its active columns is a head of its own, and so are rows
    with a coefficient.

    Their numbers are looked at: a GPU would be waited for. Temporaries are those of `PIECE`
    columns, whatever the budget: less than a forward takes.
    """
    head: Head = tiles.head
    N, V = hidden.shape[0], head.weight.shape[0]
    grads = _zeroed(_empty(hidden, head, needs, tiles.compute, tiles.compute))
    threshold = eps * coef.abs().amax() if N else coef.sum()
    numbers = torch.arange(N, device=hidden.device) if rows is None else rows
    found = []
    for r in numbers.split(TILE) if len(numbers) else ():
        r = r[coef[r] != 0.0]
        h, y, n, c = hidden[r], target[r], norm[r], coef[r]
        found.append(_active(tops[r], width, n, c, y, threshold, V))
        dhidden = h.new_zeros(h.shape, dtype=tiles.compute)
        for columns in _runs(found[-1].tolist(), V) if len(r) else ():
            words = columns.stop - columns.start
            tile = h.new_empty(h.shape[0], words)
            part_of(tiles, columns).gradient(
                h, local_target(y, columns.start, words, head.ignore_index), n, c, tile
            )
            if grads.dhidden is not None:
                add_transposed(dhidden, tile.T, head.weight[columns], first=False)
            if grads.dweight is not None:
                add_transposed(grads.dweight[columns], tile, h, first=False)
            if grads.dbias is not None:
                grads.dbias[columns] += tile.sum(0, dtype=tiles.compute)
        if grads.dhidden is not None:
            grads.dhidden[r] = dhidden.to(hidden.dtype)
    return grads, found


def _empty(
    hidden: Tensor,
    head: Head,
    needs: tuple[bool, bool, bool],
    dweight: torch.dtype,
    dbias: torch.dtype,
):
    """Gradients not yet written, of these dtypes."""
    return Gradients(
        hidden.new_zeros(hidden.shape) if needs[0] else None,
        hidden.new_empty(head.weight.shape, dtype=dweight) if needs[1] else None,
        hidden.new_empty(head.bias.shape, dtype=dbias) if needs[2] else None,
    )


def _zeroed(grads: "Gradients") -> "Gradients":
    for total in (grads.dweight, grads.dbias):
        if total is not None:
            total.zero_()
    return grads


def _active(
    tops: Tensor, width: int, norm: Tensor, coef: Tensor, target: Tensor, threshold: Tensor, V: int
) -> Tensor:
    """The active column tiles of rows with a coefficient, [ceil(V / TILE)] bool. NaN anywhere keeps
    a tile.
    """
    small = coef.abs().unsqueeze(1) * torch.exp(tops - norm.unsqueeze(1)) < threshold
    active = ~(small.all(0) & (threshold > 0.0)).repeat_interleave(width // TILE)[: -(-V // TILE)]
    active[target[(target >= 0) & (target < V)] // TILE] = True
    return active


def _runs(active: list[bool], V: int):
    """The columns of successive active tiles, at most PIECE at once."""
    start = None
    for j, on in enumerate((*active, False)):
        if start is not None and (not on or (j - start) * TILE >= PIECE):
            yield slice(start * TILE, min(j * TILE, V))
            start = None
        if on and start is None:
            start = j
