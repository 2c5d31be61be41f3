"""Every way of cutting [N, V] into tiles gives the same numbers: shapes, copy engine or not, the
vendor's product.
"""

import functools
import json
import types

import pytest
import torch
import triton
from helpers import DEVICE, GPU, error

from treg.ops import reference
from treg.ops.head import Head, make_tiles
from treg.ops.head.gemm import logits_into, split_product, sum_of_parts, vocabulary_parts
from treg.ops.head.memory import ROW_MULTIPLE, held_bytes, row_width, stash_rows
from treg.ops.plans.columns import WORDS, Columns
from treg_kernels import configs, logits_gradient, logprob_forward
from treg_kernels.configs import FLOAT32, ROWS, TILES, Tile
from treg_kernels.launch import (
    addressable,
    at_16_byte_rows,
    slabs,
    target_matrix,
    tile_of_launch,
)
from treg_kernels.tiles import Scalars

pytestmark = pytest.mark.gpu if GPU else pytest.mark.interp

# on a GPU those that tuning may choose, in the interpreter one of each kind
CANDIDATES = (
    (*configs.CANDIDATES[configs.architecture()], ROWS)
    if GPU
    else (
        *TILES["interpreter"],
        Tile(32, 64, 16, 4, 1, programs=2),
        Tile(64, 256, 64, 4, 1, descriptors=True),
        Tile(64, 128, 32, 4, 1, descriptors=True, programs=1, flat=True),
        Tile(16, 128, 32, 4, 1),
        Tile(8, 128, 64, 4, 1, vendor=True),
        ROWS,
    )
)
STATISTICS = ("lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs", "tops")


def dense(hidden, weight, target, bias, softcap):
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    names = STATISTICS[:-1]
    out = reference.linear_logprobs(h, w, target, bias=bias, softcap=softcap, outputs=names)
    return h, w, out


@pytest.mark.parametrize(
    ("softcap", "strided"), [(None, False), (20.0, True)], ids=["plain", "softcap, strided"]
)
@pytest.mark.parametrize("rows", [1, 150])
@pytest.mark.parametrize("tile", CANDIDATES, ids=str)
def test_every_tile(tile, rows, softcap, strided, monkeypatch):
    """All three kernels against float64; the vendor's product in several slabs."""
    monkeypatch.setattr(configs, "SLAB_BYTES", 4 * rows * 2 * tile.v)
    V, D = 517, 48
    bias = torch.randn(V, device=DEVICE) if softcap else None
    weight = torch.randn(V, D + strided, device=DEVICE).mul_(0.3).bfloat16()[:, :D]
    target = torch.randint(0, V, (rows,), device=DEVICE)
    hidden = (torch.randn(rows, D, device=DEVICE) + weight[target]).bfloat16()
    if strided:
        hidden = hidden.T.contiguous().T
    target[1::5] = -100
    scalars, coef = Scalars.of(1.0, softcap, 1.0), torch.randn(rows, device=DEVICE)
    coef[::7] = 0.0
    h, w, exact = dense(hidden, weight, target, bias, softcap)
    gradients = torch.autograd.grad((exact.logprobs * coef).sum(), (h, w))

    head = (hidden, weight, target, bias, scalars, -100)
    stash = torch.full((rows, V), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    out = torch.full_like(stash, float("nan"))
    plain = logprob_forward(*head, STATISTICS, None, logits_into, tile)
    found = logprob_forward(*head, (), stash, logits_into, tile)
    logits_gradient(*head, found["norm"], coef, out, logits_into, tile)

    for values in (plain, found):
        assert error(values["logprobs"], exact.logprobs) < 3e-6
    for name in STATISTICS[:-1]:
        got, want = plain[name], getattr(exact, name)
        assert torch.equal(got, want) if got.dtype == torch.bool else error(got, want) < 2e-5, name
    scale = (found["factor"] * coef).unsqueeze(1).double()
    for dhidden, dweight in (
        (scale * (stash.double() @ weight.double()), stash.double().T @ (scale * hidden.double())),
        (out.double() @ weight.double(), out.double().T @ hidden.double()),
    ):
        assert error(dhidden, gradients[0]) < 3e-3 and error(dweight, gradients[1]) < 3e-3

    z2 = (hidden.double() @ weight.double().T + (0.0 if bias is None else bias)) * scalars.scale2
    if softcap:
        z2 = scalars.cap2 * torch.tanh(z2 / scalars.cap2)
    kept = (target != -100).nonzero().squeeze(1)
    z2[kept, target[kept]] = -torch.inf
    tops = torch.stack([part.amax(1) for part in z2.split(tile.v, dim=1)], 1)
    assert error(plain["tops"][kept], tops[kept]) < 1e-5


def test_one_loop_over_all_tiles_gives_the_same_bits():
    """Products are added in the same order; tiles without a scored row come out the same too."""
    N, V, D = 150, 300, 48
    hidden, weight = torch.randn(N, D).bfloat16(), torch.randn(V, D).bfloat16()
    target, coef = torch.randint(0, V, (N,)), torch.randn(N)
    target[60:130] = -100  # all rows of the second row tile
    target[::7], coef[::5] = -100, 0.0
    hidden[0] = float("nan")
    head = [x.to(DEVICE) for x in (hidden, weight, target, torch.randn(V))]
    found = []
    for flat in (False, True):
        tile = Tile(64, 128, 32, 4, 1, descriptors=True, programs=1, flat=flat)
        stash, out = (torch.empty(N, V, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        common = (*head, Scalars.of(1.0, 20.0, 0.7), -100)
        scores = logprob_forward(*common, STATISTICS[:-1], stash, logits_into, tile)
        logits_gradient(*common, scores["norm"], coef.to(DEVICE), out, logits_into, tile)
        found.append([*scores.values(), stash, out])
    for looped, flat in zip(*found, strict=True):
        assert looped.isfinite().all() and torch.equal(looped, flat)


@pytest.mark.parametrize("scale", [-0.8, 0.8, 0.0])
def test_logits_that_fall_as_products_rise(scale):
    """Where the scale is negative the largest logit is that of the least product."""
    N, V, D = 20, 400, 32
    hidden, weight = torch.randn(N, D, device=DEVICE) * 3, torch.randn(V, D, device=DEVICE)
    target = torch.randint(0, V, (N,), device=DEVICE)
    exact = reference.linear_logprobs(
        hidden.double(), weight.double(), target, logit_scale=scale, outputs=("is_top1", "lse")
    )
    scalars = Scalars.of(scale, None, 1.0)
    found = logprob_forward(hidden, weight, target, None, scalars, -100, ("is_top1", "lse"))
    assert error(found["logprobs"], exact.logprobs) < 3e-6 and error(found["lse"], exact.lse) < 3e-6
    assert torch.equal(found["is_top1"], exact.is_top1)


def test_a_measured_tile_is_taken(monkeypatch, tmp_path):
    """For its device, kernel, dtype and head, up to its number of rows and above the last."""
    rows = [
        {
            "device": "a",
            "kind": "stash",
            "dtype": "bfloat16",
            "vocab": 500,
            "hidden": 64,
            "rows": n,
            "tile": Tile(n, 256, 64, 8, 3)._asdict(),
        }
        for n in (512, 64)
    ]
    monkeypatch.setattr(configs, "_device_name", lambda: "a")
    monkeypatch.setattr(configs.resources, "files", lambda package: tmp_path)
    (tmp_path / configs.MEASURED).write_text(json.dumps(rows))
    configs._measured.cache_clear()
    try:
        found = [
            configs.tile_for("stash", torch.bfloat16, n, 500, 64).n for n in (1, 64, 65, 512, 4000)
        ]
        assert found == [64, 64, 512, 512, 512]
        default = configs.tile_for("forward", torch.bfloat16, 4000, 500, 64)
        assert default == TILES[configs.architecture()][1]
        assert configs.tile_for("stash", torch.bfloat16, 4000, 501, 64) == default
        assert configs.tile_for("stash", torch.float32, 4000, 500, 64) == FLOAT32
    finally:
        configs._measured.cache_clear()


def test_every_tile_that_may_be_chosen_is_a_multiple_of_128_wide():
    """filter_eps counts in blocks of 128 columns."""
    measured = [tile for tiles in configs._measured().values() for _, tile in tiles]
    tables = [
        tile for table in (TILES, configs.CANDIDATES) for tiles in table.values() for tile in tiles
    ]
    assert len(tables) > 20
    assert [tile for tile in (*tables, *measured, FLOAT32, ROWS) if tile.v % 128] == []


def test_rows_that_no_descriptor_can_address(monkeypatch):
    """A transposed or odd weight takes the tiles of pointers."""
    monkeypatch.setattr(configs, "architecture", lambda: "sm90")
    weight = torch.zeros(512, 64, dtype=torch.bfloat16)
    for w, expected in (
        (weight, "sm90"),
        (weight.T.contiguous().T, "sm80"),
        (weight[:, :63], "sm90"),
        (weight[:, 1:], "sm80"),
        (weight[:, ::2], "sm80"),
        (weight[:, :60].contiguous(), "sm80"),
    ):
        found = configs.tile_for("stash", w.dtype, 4000, *w.shape, addressable(w))
        assert found == TILES[expected][1]


def layouts(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """bfloat16 matrices [rows, columns] of the layouts that callers have."""
    count, zeros = rows * columns, functools.partial(torch.zeros, dtype=torch.bfloat16)
    room = bytearray(2 * count + 32)
    begin = 2 - torch.frombuffer(room, dtype=torch.uint8).data_ptr() % 16 + 16
    return {
        "contiguous": zeros(rows, columns),
        "padded": zeros(rows, columns + 64 - columns % 64)[:, :columns],
        "odd rows": zeros(rows, columns + 1)[:, :columns],
        "odd offset": zeros(count + 1)[1:].view(rows, columns),
        "a later row": zeros(rows + 1, columns)[1:],
        "transposed": zeros(columns, rows).T,
        "every other": zeros(rows, 2 * columns)[:, ::2],
        "expanded": zeros(1, columns).expand(rows, columns),
        "one row of stride 1": zeros(columns).as_strided((1, columns), (1, 1)),
        "storage at 2 bytes": torch.frombuffer(
            room, dtype=torch.bfloat16, count=count, offset=begin
        ).view(rows, columns),
    }


@pytest.mark.skipif(GPU, reason="tables of layouts, whatever runs")
@pytest.mark.parametrize("arch", ["sm90", "sm100"])
@pytest.mark.parametrize("V, D", [(512, 64), (517, 64), (512, 63)])
def test_wide_tiles_are_fed_and_emptied_by_the_copy_engine(V, D, arch, monkeypatch):
    """Whatever the layouts of hidden, weight and stash: never pointers in a tile of descriptors.
    The wide tile is taken where the weight and what is written allow it.
    """
    monkeypatch.setattr(configs, "architecture", lambda: arch)
    wide = 0
    stashes = layouts(200, V)
    stashes["stash_rows"] = stash_rows(
        torch.zeros(1), 200, V, dtype=torch.bfloat16, multiple=ROW_MULTIPLE
    )
    for hidden in layouts(200, D).values():
        for name, weight in layouts(V, D).items():
            for place, out in (("nowhere", None), *stashes.items()):
                if out is not None and len(out) != len(hidden):
                    continue
                tile = tile_of_launch("forward" if out is None else "stash", hidden, weight, out)
                (slab,) = slabs(tile, at_16_byte_rows(hidden), weight, None)
                store = "descriptors" if out is None else target_matrix(tile, slab, out)[1]
                assert tile.descriptors == (slab.constants["SOURCE"] == store == "descriptors")
                if name == "padded" and place in ("nowhere", "stash_rows"):
                    assert tile in TILES[arch]
                wide += tile.descriptors
    assert wide > 50


def test_rows_are_copied_only_where_they_must_be():
    """The copy has the same numbers, and rows that begin at 16 bytes."""
    for name, x in layouts(40, 62).items():
        (x[:1] if name == "expanded" else x).normal_()
        found = at_16_byte_rows(x)
        assert torch.equal(found, x) and found.data_ptr() % 16 == 0 == found.stride(0) * 2 % 16
        assert (found is x) == (name == "padded")


@pytest.mark.parametrize(
    "tile, V", [(TILES["interpreter"][0], 333), (FLOAT32, 333), (ROWS, 1133)], ids=str
)
def test_rows_of_a_stash_may_be_apart(tile, V, monkeypatch):
    """The bits of contiguous rows; and nothing is written or read between the rows."""
    monkeypatch.setattr(configs, "SLAB_BYTES", 4 * 5 * ROWS.v)
    D, N = 24, 5
    hidden, weight = torch.randn(N, D, device=DEVICE), torch.randn(V, D, device=DEVICE)
    # the last row's tiles differ by more than 2^48: its stash is gone over again
    weight[300], hidden[-1] = 60.0, 1.0
    target = torch.tensor([3, V - 1, -100, 7, 8], device=DEVICE)
    head = (hidden.bfloat16(), weight.bfloat16(), target, None, Scalars.of(1.0, None, 1.0), -100)
    coef = torch.randn(N, device=DEVICE)
    found = []
    for multiple in (1, ROW_MULTIPLE):
        stash, out = (
            stash_rows(coef, N, V, dtype=torch.bfloat16, multiple=multiple) for _ in range(2)
        )
        got = logprob_forward(*head, (), stash, logits_into, tile)
        logits_gradient(*head, got["norm"], coef, out, logits_into, tile)
        for x in (stash, out):
            assert held_bytes(x) == 2 * N * row_width(V, multiple)
            between = x.as_strided((N - 1, x.stride(0) - V), (x.stride(0), 1), V)
            assert between.isnan().all()  # as memory was poisoned
        found.append((stash, out, got["logprobs"], got["factor"]))
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize(
    "arch, key",
    [
        (80, "sm80"),
        (86, "sm80"),
        (89, "sm80"),
        (90, "sm90"),
        (100, "sm100"),
        (103, "sm100"),
        (120, "sm80"),
    ],
)
def test_architectures(arch, key, monkeypatch):
    monkeypatch.setattr(configs, "INTERPRET", False)
    assert configs.architecture(triton.backends.compiler.GPUTarget("cuda", arch, 32)) == key
    assert configs.architecture(triton.backends.compiler.GPUTarget("hip", "gfx942", 64)) == "amd"


def test_the_vendors_slab_is_in_the_budget(monkeypatch):
    """A tile that reads finished logits takes a slab of them, and so many rows that it holds one
    column of tiles.
    """
    head = Head(torch.empty(5000, 64, dtype=torch.bfloat16, device=DEVICE))
    without = make_tiles("triton", head, None)
    monkeypatch.setattr(configs, "tiles_for", lambda kind, *rest: [(1 << 20, ROWS)])
    tiles = make_tiles("triton", head, None)
    assert tiles.fixed_bytes == without.fixed_bytes + configs.SLAB_BYTES
    assert tiles.max_rows * ROWS.v * 4 == configs.SLAB_BYTES
    assert (
        ROWS.slab_columns(tiles.max_rows) == ROWS.v
        and ROWS.slab_columns(1) == configs.SLAB_BYTES // 4
    )


def test_products_over_parts_of_the_vocabulary_add_up():
    tile, weight = (
        torch.randn(5, 60, device=DEVICE).bfloat16(),
        torch.randn(60, 7, device=DEVICE).bfloat16(),
    )
    parts = split_product(tile, weight, 4)
    assert parts.dtype == torch.float32 and parts.shape == (4, 5, 7)
    assert error(parts[1], tile[:, 15:30].double() @ weight[15:30].double()) < 1e-6
    assert error(parts.sum(0), tile.double() @ weight.double()) < 1e-6


@pytest.mark.parametrize("V", [1133, 1136])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_odd_vocabulary_is_split_too(dtype, V):
    """Into equal parts and a rest, of rows that are apart; a bfloat16 sum is float32 too."""
    tile = stash_rows(
        torch.empty(1, device=DEVICE), 5, V, dtype=dtype, multiple=ROW_MULTIPLE
    ).copy_(torch.randn(5, V))
    weight = torch.randn(V, 7, device=DEVICE).to(dtype)
    for parts in (1, 4):
        found = sum_of_parts(tile, weight, parts)
        assert found.dtype == torch.float32
        assert error(found, tile.double() @ weight.double()) < 1e-6


@pytest.mark.parametrize("V", [128256, 128257])
def test_few_rows_fill_a_gpu_by_parts(V, monkeypatch):
    """So many parts that 132 multiprocessors have a tile of 128 x 256 each. float32 products have
    no 16-bit sums to keep away from.
    """
    device = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    weight = torch.empty(1, 4096).expand(V, 4096)
    for dtype, expected in (
        (torch.bfloat16, [8, 8, 4, 2, 1, 0]),
        (torch.float32, [8, 8, 4, 2, 0, 0]),
    ):
        found = [
            vocabulary_parts(torch.empty(1, 1, dtype=dtype).expand(n, V), weight)
            for n in (1, 128, 256, 512, 1024, 1152)
        ]
        assert found == expected


def test_parts_of_the_vocabulary_end_in_more_than_one_word():
    """V = 128257 is 1002 * 128 + 1: a part of 128 k words leaves one where k divides 1002."""
    head = types.SimpleNamespace(weight=torch.empty(1, 1).expand(128257, 1))
    tiles = types.SimpleNamespace(fixed_bytes=0, column_bytes=lambda rows: 2 * rows)
    for words in (128, 256, 384, 768, 501 * 128, 1002 * 128, 700 * 128, 128257):
        call = types.SimpleNamespace(budget=2 * 100 * words)
        batch = types.SimpleNamespace(head=head, tiles=tiles, call=call)
        step = Columns()._words(batch, 100)
        assert step % WORDS == 0 and WORDS <= step <= words
        assert 128257 % step != 1 or step == WORDS
        assert step >= words // 2 // WORDS * WORDS
