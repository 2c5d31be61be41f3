"""Sequences of many lengths as lists of numbers, and what a function of `treg.rl` makes of them as
padded tensors with holes and as packed ones.
"""

import itertools

import torch

LENGTHS = (5, 0, 1, 9, 3, 1, 7, 4)  # in scored tokens


def numbers(lengths=LENGTHS, seed=0, scale=1.0):
    """A list of random numbers for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(n, generator=generator)).double().tolist() for n in lengths]


def unit_numbers(lengths=LENGTHS, seed=0):
    """Runs of up to three tokens; some numbers are left out."""
    generator = torch.Generator().manual_seed(seed)
    units = []
    for n in lengths:
        grows = torch.randint(0, 2, (n,), generator=generator)
        grows[grows == 1] += torch.randint(0, 2, (int(grows.sum()),), generator=generator)
        units.append(grows.cumsum(0).tolist())
    return units


def make_mask(lengths=LENGTHS, seed=0, spare=6):
    """[B, T] bool with holes, before, between and behind the scored tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths, default=0) + spare
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, torch.randperm(width, generator=generator)[:n]] = True
    return mask


def padded(rows, mask, dtype=torch.float64):
    """Lists -> [B, T]; garbage where no token is scored."""
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], dtype=torch.float64)
    if not dtype.is_floating_point:
        garbage = torch.tensor([-(2**62), 2**62, -1, 7], dtype=torch.int64)
    out = garbage.repeat(mask.numel() // 4 + 1)[: mask.numel()].view(mask.shape).to(dtype)
    out[mask] = packed(rows, dtype)
    return out


def packed(rows, dtype=torch.float64):
    return torch.tensor(list(itertools.chain(*rows)), dtype=dtype)


def ends_of(rows):
    return torch.tensor([0, *itertools.accumulate(map(len, rows))], dtype=torch.int32)


def lists(flat, rows):
    """Packed numbers -> a list for each sequence, as long as that of rows."""
    return [x.tolist() for x in flat.split([len(row) for row in rows])]


def both(function, *streams, like=None, dtype=torch.float64, result=None, units=None, **arguments):
    """function(*streams, units=, mask= or cu_seqlens=, **arguments) of padded and of packed
    tensors, which must agree to the last bit.

    Args:
        streams: lists of numbers of each token, as `numbers` makes them. like: such lists, where
            there is no stream.
        dtype: of the streams. result: of what comes; None: the same.
    Returns:
        A list of numbers for each sequence; of a function with several results a tuple of these.
    """
    like = like or streams[0]
    mask = make_mask([len(row) for row in like])
    ends = ends_of(like)
    of_mask, of_ends = {"mask": mask}, {"cu_seqlens": ends}
    if units is not None:
        of_mask["units"] = padded(units, mask, torch.int64)
        of_ends["units"] = packed(units, torch.int64)
    on_rows = function(*(padded(x, mask, dtype) for x in streams), **arguments, **of_mask)
    on_flat = function(*(packed(x, dtype) for x in streams), **arguments, **of_ends)
    single = isinstance(on_rows, torch.Tensor)
    pairs = [(on_rows, on_flat)] if single else list(zip(on_rows, on_flat, strict=True))
    for wide, flat in pairs:
        assert wide.dtype == flat.dtype == (result or dtype)
        assert torch.equal(wide[mask], flat)
        assert not wide[~mask].any()  # not NaN either
    found = tuple(lists(flat, like) for _, flat in pairs)
    return found[0] if single else found


def runs(units):
    """The places of the tokens of each unit of a sequence."""
    return [list(x) for _, x in itertools.groupby(range(len(units)), key=units.__getitem__)]


def assert_near(found, expected, budget=1e-12):
    """Lists of lists of numbers; the budget is relative to the largest number expected, or 1."""
    assert [len(x) for x in found] == [len(x) for x in expected]
    largest = max([1.0, *map(abs, itertools.chain(*expected))])
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert abs(a - b) <= budget * largest, (a, b)
