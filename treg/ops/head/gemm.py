"""The two products that follow a tile of logit gradients G [n, V]: dhidden = G W, dweight += G^T h.

Plain matrix products of the vendor's library. What differs is where they round: dweight is added up
in float32.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of [V, D] that a CPU widens or adds at a time: 4 MiB in float32 stay in its cache.
SLAB = 1 << 20
PART_MULTIPLE = 8  # words: 16 bytes of a 16-bit row


def slab_rows(columns: int) -> int:
    return max(1, SLAB // columns)


def widened(dtype: torch.dtype, device: torch.device) -> bool:
    """float16 GEMMs of a CPU are 10-100 times slower than float32 ones: compute in float32."""
    return device.type == "cpu" and dtype == torch.float16


def slab_bytes(D: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Temporaries of the products below: bytes in all, and more per row of a tile."""
    if device.type != "cpu" or dtype.itemsize > 2:
        return 0, 0
    rows = slab_rows(D)
    each = rows * 8 if widened(dtype, device) else 0
    return rows * D * 12, each


def logits_into(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, V] = hidden [n, D] weight [V, D]^T with float32 sums.

    out has the dtype of hidden, or a wider one.
    """
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda and out.dtype == torch.float32:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    else:
        wide = hidden.to(out.dtype)
        step = slab_rows(weight.shape[1])
        for a in range(0, weight.shape[0], step):
            torch.mm(wide, weight[a : a + step].to(out.dtype).T, out=out[:, a : a + step])


def times_weight(tile: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, D] = tile [n, V] weight [V, D], in tile's dtype, float32 sums.

    Few rows leave most of a GPU idle, for [n, D] has few tiles. There the vendor's library may
    split the vocabulary among multiprocessors and add the parts up in out's 16 bits: PyTorch allows
    it unless `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` is False. That
    setting is one of the whole process, which other threads read at any time, so it is left alone.
    The parts are made and added up here in float32, or the library's product is float32 and is
    rounded once: 8 n D bytes more to move, beside 2 n D V operations about 2 % of the time for V =
    32000 and less for more words, and temporaries of some 200 KiB for each multiprocessor. More
    rows than that go straight into out: then no multiprocessor is idle that the library would split
    for.
    """
    if widened(tile.dtype, tile.device):
        total = torch.zeros(out.shape)
        step = slab_rows(weight.shape[1])
        for a in range(0, weight.shape[0], step):
            total.addmm_(tile[:, a : a + step].float(), weight[a : a + step].float())
        out.copy_(total)
    elif tile.is_cuda and (parts := vocabulary_parts(tile, weight)):
        out.copy_(sum_of_parts(tile, weight, parts))
    else:
        torch.mm(tile, weight, out=out)


def vocabulary_parts(tile: Tensor, weight: Tensor) -> int:
    """Parts of the vocabulary that give each multiprocessor a tile of [n, D] to compute; 0 where
    the tiles are enough for all.
    """
    rows, V = tile.shape
    D = weight.shape[1]
    processors = torch.cuda.get_device_properties(tile.device).multi_processor_count
    tiles = -(-rows // 128) * -(-D // 256)
    free = processors // tiles
    for parts in (16, 8, 4, 2):
        if parts <= free and parts * PART_MULTIPLE <= V:
            return parts
    return 1 if free and tile.dtype.itemsize == 2 else 0


def sum_of_parts(tile: Tensor, weight: Tensor, parts: int) -> Tensor:
    """tile [n, V] weight [V, D] as equal parts of the vocabulary and what is left, added up in
    float32 (float64 of float64): [n, D].

    Each part is a multiple of PART_MULTIPLE words, so that all begin at 16 bytes of a row. Fewer
    than parts * PART_MULTIPLE words are left, whose product takes a launch and little else.
    """
    if parts == 1:
        return _wide_product(tile, weight)
    V = tile.shape[1]
    even = V - V % (parts * PART_MULTIPLE)
    total = split_product(tile[:, :even], weight[:even], parts).sum(0)
    if even < V:
        total += _wide_product(tile[:, even:], weight[even:])
    return total


def split_product(tile: Tensor, weight: Tensor, parts: int) -> Tensor:
    """[parts, n, D] float32 (float64 for float64): the product over each part, in the vendor's
    library.
    """
    a = tile.unflatten(1, (parts, -1)).transpose(0, 1)
    return _wide_product(a, weight.unflatten(0, (parts, -1)))


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 (float64 of float64), of two matrices or two batches of them."""
    if a.dtype.itemsize > 2:
        return a @ b
    if a.is_cuda:
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_transposed(acc: Tensor, tile: Tensor, rows: Tensor, *, first: bool) -> None:
    """acc [V, D] += tile [n, V]^T @ rows [n, D], or = where `first`.

    acc is float32 (float64 for float64 inputs), or tile's dtype where one tile makes all of it.
    On a GPU the product is added in float32. On a CPU a bfloat16 product is rounded once before it
    is added.
    """
    beta = 0.0 if first else 1.0  # 0 does not read acc, which may be uninitialised
    if tile.dtype == acc.dtype and not widened(tile.dtype, tile.device):
        torch.addmm(acc, tile.T, rows, beta=beta, out=acc)
    elif tile.is_cuda:
        torch.addmm(acc, tile.T, rows, out_dtype=acc.dtype, beta=beta, out=acc)
    elif widened(tile.dtype, tile.device):
        _add_transposed_widened(acc, tile, rows, beta)
    else:
        step = slab_rows(rows.shape[1])
        for a in range(0, acc.shape[0], step):
            product = tile[:, a : a + step].T @ rows
            if first:
                acc[a : a + step] = product
            else:
                acc[a : a + step].add_(product.to(acc.dtype))
            del product  # before its successor


def _add_transposed_widened(acc: Tensor, tile: Tensor, rows: Tensor, beta: float) -> None:
    """The same in float32, of slabs of both operands: neither is widened as a whole."""
    step = slab_rows(rows.shape[1])
    for b in range(0, tile.shape[0], step):
        wide = rows[b : b + step].float()
        for a in range(0, acc.shape[0], step):
            part = tile[b : b + step, a : a + step].float()
            total = acc[a : a + step]
            torch.addmm(total, part.T, wide, beta=1.0 if b else beta, out=total)


def product_of(factors: Sequence[Tensor], *, clean: bool) -> Tensor:
    """Of one factor or more, each [n], or [1] for a number of all rows. clean: 0 where the last one
    is 0, whatever the others are.
    """
    found = functools.reduce(torch.mul, factors)
    if clean and len(factors) > 1:
        found = torch.where(factors[-1] == 0.0, 0.0, found)
    return found


def scaled_to(x: Tensor, factor: Tensor, dtype: torch.dtype, *, in_place: bool = False) -> Tensor:
    """x * factor (a scalar or one number a row), rounded once to dtype; x is [n] or [n, D].

    in_place: x itself becomes the result, if it has that dtype.
    """
    same = in_place and x.dtype == dtype
    out = x if same else torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.device.type != "cpu" or {x.dtype, torch.result_type(x, factor)} == {dtype}:
        return torch.mul(x, factor, out=out)
    step = slab_rows(max(1, x[:1].numel()))  # a CPU would make wide copies of all of it
    for a in range(0, x.shape[0], step):
        out[a : a + step] = x[a : a + step] * (factor if factor.ndim == 0 else factor[a : a + step])
    return out
