"""How [N, V] is cut into tiles, for each architecture.

A tile is a row of TILES, or what `measured.json` holds for this device and head, written by
`benchmarks/tune_tiles.py`. Nothing is timed at run time: the same inputs give the same bits in
every process. The first call of a head compiles its kernels, for few rows and for many; where a
later batch starts and how long it is compiles none.
"""

import functools
import json
from importlib import resources
from typing import NamedTuple

import torch
import triton

# the interpreter has no device to ask
INTERPRET = triton.knobs.runtime.interpret
MEASURED = "measured.json"
KINDS = ("forward", "stash", "gradient")
SLAB_BYTES = (
    32 << 20
)  # of finished logits: they stay in a GPU's second-level cache until they are read
SHARED_ROWS_BYTES = (
    20 << 20
)  # of the rows of hidden that pass by one column of weight tiles, in that cache too


class Tile(NamedTuple):
    """Rows, columns and depth of one step of a program, and how it is compiled and launched."""

    n: int
    v: int
    d: int
    warps: int
    stages: int
    descriptors: bool = (
        False  # operands through the copy engine (sm90 and later), where their layout allows it
    )
    programs: int = 0  # that share all tiles, for each multiprocessor; 0: one for each tile
    registers: int | None = None  # at most so many for each thread
    # the product by the vendor's library, a slab of columns at a time, which the tile reads
    vendor: bool = False
    # one loop over the steps of all tiles, so that copies for the next tile run during an epilogue;
    # with descriptors and programs alone
    flat: bool = False

    @property
    def max_rows(self) -> int:
        """Rows that one launch takes."""
        return SLAB_BYTES // (4 * self.v) if self.vendor else 1 << 20

    def slab_columns(self, N: int) -> int:
        """Columns of finished logits at a time, for N rows."""
        return max(1, SLAB_BYTES // (4 * N * self.v)) * self.v


# N <= n of the first, and above. Widths are multiples of 128, which `treg_kernels.active` counts in
TILES = {
    "sm80": (Tile(64, 128, 32, 4, 3), Tile(128, 128, 32, 8, 3)),
    "sm90": (
        Tile(64, 256, 64, 8, 3, descriptors=True),
        Tile(128, 256, 64, 8, 3, descriptors=True, programs=1),
    ),
    "sm100": (
        Tile(64, 128, 64, 8, 4, descriptors=True),
        Tile(256, 128, 64, 8, 3, descriptors=True, programs=1),
    ),
    "amd": (Tile(64, 128, 32, 4, 2), Tile(128, 128, 32, 8, 2)),
    "interpreter": (
        Tile(64, 128, 32, 4, 1, descriptors=True),
        Tile(128, 128, 32, 4, 1, descriptors=True, programs=1),
    ),
}
FLOAT32 = Tile(32, 128, 32, 4, 2)  # full-precision products run outside the tensor cores
ROWS = Tile(8, 1024, 64, 8, 1, vendor=True)  # over finished logits: few rows, many columns of each
# What `benchmarks/tune_tiles.py` tries besides. Each fits with every kernel, and where rows are
# aligned spills little (32 bytes a thread, on sm120) without options and statistics
CANDIDATES = {
    "sm80": (
        Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 32, 16, 3),
        Tile(128, 256, 32, 8, 3), Tile(256, 128, 32, 8, 3), Tile(64, 256, 32, 8, 3),
        Tile(64, 128, 64, 4, 3),
    ),
    "sm90": tuple(
        Tile(*shape, descriptors=True, programs=programs, registers=registers)
        for *shape, programs, registers in (
            (128, 256, 64, 8, 3, 0, None), (128, 256, 32, 8, 4, 1, None),
            (256, 128, 64, 8, 3, 1, None),
            (128, 128, 64, 8, 4, 1, None), (128, 128, 128, 8, 3, 1, None),
            (128, 128, 64, 4, 3, 2, None),
            # two blocks a multiprocessor, so that one's products hide the other's epilogue
            (128, 128, 64, 8, 3, 2, 128), (128, 128, 64, 8, 2, 2, 128),
            (64, 256, 64, 8, 3, 1, None), (64, 256, 64, 4, 4, 1, None),
            (64, 128, 64, 4, 4, 2, None),
        )
    )
    + tuple(
        Tile(*shape, descriptors=True, programs=1, flat=True)
        for shape in ((128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4))
    ),
    "sm100": tuple(
        Tile(*shape, descriptors=True, programs=programs)
        for *shape, programs in (
            (256, 128, 64, 8, 3, 0), (128, 128, 64, 4, 4, 1), (128, 128, 64, 8, 4, 1),
            (128, 128, 128, 8, 3, 1),
            (64, 256, 64, 8, 3, 1), (64, 128, 64, 4, 4, 2),
        )
    ),
    "amd": (
        Tile(128, 128, 64, 8, 2), Tile(128, 128, 32, 4, 2), Tile(128, 128, 64, 4, 2),
        Tile(256, 128, 32, 8, 2),
        Tile(256, 128, 64, 8, 2), Tile(128, 256, 32, 8, 2), Tile(64, 128, 64, 4, 2),
    ),
    "interpreter": (),
}  # fmt: skip


def architecture(target=None) -> str:
    """Key of TILES for a Triton target; None: the current device."""
    if INTERPRET:
        return "interpreter"
    target = target or triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return "amd"
    return {9: "sm90", 10: "sm100"}.get(
        target.arch // 10, "sm80"
    )  # sm120 has neither wgmma nor tcgen05


def tile_for(
    kind: str, dtype: torch.dtype, N: int, V: int, D: int, addressable: bool = True
) -> Tile:
    """The tile of a launch of one of KINDS on N rows of a [V, D] head, on the current device."""
    found = tiles_for(kind, dtype, V, D, addressable)
    for rows, tile in found:
        if rows >= N:
            return tile
    return found[-1][1]


def tiles_for(
    kind: str, dtype: torch.dtype, V: int, D: int, addressable: bool = True
) -> list[tuple[int, Tile]]:
    """The tiles of any number of rows: each up to so many, the last also above.

    addressable: whether descriptors can address the weight. Pointers to the elements of a wide tile
    do not fit into registers: where not, the tiles are those of the architecture without a copy
    engine.
    """
    found, measured = None, _measured()
    if measured:  # the name of a device takes microseconds
        found = measured.get((_device_name(), kind, str(dtype)[6:], int(V), int(D)))
    if found is not None and addressable:
        return found
    if dtype == torch.float32:
        return [(FLOAT32.n, FLOAT32)]
    found = TILES[architecture()]
    return [
        (tile.n, tile)
        for tile in (found if addressable or not found[0].descriptors else TILES["sm80"])
    ]


@functools.cache
def _measured() -> dict[tuple, list[tuple[int, Tile]]]:
    found: dict[tuple, list[tuple[int, Tile]]] = {}
    for x in json.loads(resources.files("treg_kernels").joinpath(MEASURED).read_text()):
        key = x["device"], x["kind"], x["dtype"], x["vocab"], x["hidden"]
        found.setdefault(key, []).append((x["rows"], Tile(**x["tile"])))
    return {key: sorted(tiles) for key, tiles in found.items()}


def _device_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def programs(tile: Tile, tiles: int) -> int:
    """Programs to launch for so many tiles."""
    if not tile.programs:
        return tiles
    if INTERPRET:
        return min(tiles, 3)
    driver = triton.runtime.driver.active
    return min(tiles, tile.programs * _multiprocessors(driver, driver.get_current_device()))


@functools.cache
def _multiprocessors(driver, device: int) -> int:
    return driver.utils.get_device_properties(device)["multiprocessor_count"]


def options(tile: Tile) -> dict[str, int]:
    """Launch options of a compiled tile."""
    found = {"num_warps": tile.warps, "num_stages": tile.stages}
    return found if tile.registers is None else found | {"maxnreg": tile.registers}


def shared_tiles(tile: Tile, D: int, itemsize: int) -> int:
    """Row tiles that share each weight tile: a power of two, as many as the cache holds beside
    it.
    """
    fit = SHARED_ROWS_BYTES // (tile.n * D * itemsize)
    return max(1, min(64, 1 << fit.bit_length() >> 1))
