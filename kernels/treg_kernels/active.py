"""Which tiles of the gradient of the logits are computed, once the coefficients are known; decided
on the device.

Tile (i, j) is TILE_N rows by TILE_V columns. With top_t[j] the largest z2 of row t in the block of
columns that holds tile j, the target left out, it is inactive if for every row t of i

    |coef_t| * 2**(top_t[j] - norm_t) < threshold    and    coef_t = 0 or y_t is not in j

NaN anywhere keeps a tile.
"""

import torch
import triton
import triton.language as tl

TILE_N = 128
TILE_V = 128


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["tops_ptr", "norm_ptr", "coef_ptr", "target_ptr"],
)
def _active_kernel(
    tops_ptr, norm_ptr, coef_ptr, target_ptr, threshold_ptr, active_ptr,
    N, blocks, tiles_v, TILE_N: tl.constexpr, TILE_V: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(0).to(tl.int64)
    offs_n = tile_n * TILE_N + tl.arange(0, TILE_N)
    offs_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    mask_n, mask_j = offs_n < N, offs_j < tiles_v
    coef = tl.load(coef_ptr + offs_n, mask=mask_n, other=0.0)
    counts = coef != 0.0
    norm = tl.load(norm_ptr + 2 * offs_n, mask=counts, other=0.0)
    target = tl.load(target_ptr + offs_n, mask=counts, other=-1)
    at = offs_n[:, None] * blocks + (offs_j * TILE_V // WIDTH)[None, :]
    top = tl.load(tops_ptr + at, mask=counts[:, None] & mask_j[None, :], other=float("-inf"))
    small = tl.abs(coef)[:, None] * tl.exp2(top - norm[:, None]) < tl.load(threshold_ptr)
    past = target[:, None] - (offs_j * TILE_V)[None, :]
    keep = ((past >= 0) & (past < TILE_V)) | (small == 0)
    keep = tl.max((keep & mask_n[:, None]).to(tl.int32), axis=0) > 0
    tl.store(active_ptr + tile_n * tiles_v + offs_j, keep, mask=mask_j)


@triton.jit(do_not_specialize=["length"])
def _list_kernel(
    active_ptr, list_ptr, count_ptr, length, stride_line, stride_item, BLOCK: tl.constexpr
):
    """The active items of one line in their order, and how many they are."""
    line = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, length, BLOCK):
        item = start + tl.arange(0, BLOCK)
        active = tl.load(
            active_ptr + line * stride_line + item * stride_item, mask=item < length, other=0
        )
        active = active.to(tl.int32)
        place = count + tl.cumsum(active, axis=0) - active
        tl.store(list_ptr + line * length + place, item, mask=active > 0)
        count += tl.sum(active, axis=0)
    tl.store(count_ptr + line, count)


def tiles_of(N: int, V: int) -> tuple[int, int]:
    """How many tiles N rows and V columns make."""
    return triton.cdiv(N, TILE_N), triton.cdiv(V, TILE_V)


def active_tiles(
    tops: torch.Tensor,
    width: int,
    norm: torch.Tensor,
    coef: torch.Tensor,
    target: torch.Tensor,
    threshold: torch.Tensor,
    V: int,
) -> torch.Tensor:
    """The tiles to compute, [tiles_n, tiles_v] bool.

    Args:
        tops: [N, ceil(V / width)] float32, contiguous, the largest z2 of each block of `width`
            columns without the target; width: a multiple of TILE_V. norm: [N, 2] float32, from
            `logprob_forward`.
        coef: [N] float32, 0 at rows that are not scored; of these nothing else is read. target: [N]
            int64.
        threshold: 0-dim float32, on the device.
    """
    N, blocks = tops.shape
    tiles_n, tiles_v = tiles_of(N, V)
    assert width % TILE_V == 0 and blocks == triton.cdiv(V, width)
    assert norm.shape == (N, 2) and coef.shape == target.shape == (N,)
    assert all(x.is_contiguous() for x in (tops, norm, coef, target))
    active = torch.empty(tiles_n, tiles_v, dtype=torch.bool, device=tops.device)
    if N > 0:
        _active_kernel[(tiles_n, triton.cdiv(tiles_v, 32))](
            tops, norm, coef, target, threshold, active, N, blocks, tiles_v,
            TILE_N=TILE_N, TILE_V=TILE_V, WIDTH=width, BLOCK_J=32,
        )  # fmt: skip
    return active


def active_lists(active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each line of active [lines, items]: its active items [lines, items] int32, the first
    `count` of a line
    written; their count [lines] int32; and the lines by falling count [lines] int64."""
    lines, items = active.shape
    listed = torch.empty(lines, items, dtype=torch.int32, device=active.device)
    count = torch.empty(lines, dtype=torch.int32, device=active.device)
    _list_kernel[(lines,)](active, listed, count, items, *active.stride(), BLOCK=1024)
    return listed, count, torch.argsort(count, descending=True, stable=True)
