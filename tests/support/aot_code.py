"""What a compiled kernel needs and what it is made of: registers, shared memory, matrix
instructions, loops.
"""

import functools
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class Limits(NamedTuple):
    """Shared memory in bytes of a block and of a multiprocessor; the warps and blocks that one
    holds.
    """

    block_shared: int
    shared: int
    warps: int
    blocks: int


LIMITS = {
    "sm80": Limits(166912, 167936, 64, 32),
    "sm90": Limits(232448, 233472, 64, 32),
    "sm100": Limits(232448, 233472, 64, 32),
    "sm120": Limits(101376, 102400, 48, 24),
    "gfx942": Limits(65536, 65536, 32, 16),
}
# what the report counts: in PTX, in AMD's assembly, and by mnemonic in NVIDIA's machine code
PTX = {
    "matrix": r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b",
    "tma_loads": r"cp\.async\.bulk\.tensor\.\S*\.shared\S*\.global",
    "tma_stores": r"cp\.async\.bulk\.tensor\.\S*\.global\.shared",
    "async_copies": r"cp\.async\.c[ag]\.",
    "atomics": r"(?:atom|red)\.",
}
AMD = {"matrix": r"v_s?mfma", "async_copies": r"buffer_load.* lds$", "atomics": r"\S*_atomic_"}
SASS = {
    "matrix": r"HGMMA|HMMA|UTC\w*MMA",
    "tma_loads": r"UTMALDG",
    "tma_stores": r"UTMASTG",
    "async_copies": r"LDGSTS",
    "atomics": r"RED[GS]?|ATOM[GS]?",
    "local": r"LDL|STL",
    "barriers": r"BAR",
}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@\S+)?\s*([A-Z][A-Z0-9_]*)(.*?);", re.M)


class Instruction(NamedTuple):
    address: int
    conditional: bool
    name: str
    target: int | None  # address, of a branch


def resources(kernel: CompiledKernel, arch: str) -> dict[str, int | bool]:
    """Registers of a thread, spilled bytes, shared memory, blocks that a multiprocessor holds, what
    PTX counts.
    """
    nvidia, limits = arch.startswith("sm"), LIMITS[arch]
    code = kernel.asm["ptx" if nvidia else "amdgcn"]
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    columns = getattr(kernel.metadata, "tmem_size", None) or 0  # of tensor memory
    if nvidia:
        text = cuobjdump("--dump-resource-usage", kernel.asm["cubin"])
        use = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        registers, spilled = use["REG"], use["STACK"] + use["LOCAL"]
        # a quarter of the multiprocessor has 16384, of which a warp takes a multiple of 256
        resident, reserved = 16384 // (-(-registers * 32 // 256) * 256) * 4, 1024
    else:
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        spilled = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1])
        resident, reserved = int(re.search(r"; Occupancy: (\d+)", code)[1]) * 4, 0
    fitting = [
        limits.blocks,
        min(resident, limits.warps) // warps,
        limits.shared // max(1, shared + reserved),
    ]
    fitting += [512 // columns] if columns else []
    patterns = PTX if nvidia else AMD
    return {
        "registers": registers,
        "spill_bytes": spilled,
        "shared": shared,
        "blocks_per_sm": min(fitting),
        "fits": shared <= limits.block_shared and columns <= 512,
        **{
            name: len(re.findall(rf"^\s*(?:@\S+ )?{pattern}", code, re.M))
            for name, pattern in patterns.items()
        },
    }


def contents(cubin: bytes, *, sides: bool) -> dict:
    return contents_of(instructions(cuobjdump("-sass", cubin)), sides=sides)


def contents_of(code: list[Instruction], *, sides: bool) -> dict:
    """What SASS counts, in all and in one turn of the loop over D; with `sides` also the epilogue:
    what every tile goes through, and then either side. loads_before_epilogue: copies that a step of
    a loop over all tiles issues before it leaps over the epilogue, or enters it.
    """
    found = {"instructions": len(code), **count(code)}
    if (loop := product_loop(code)) is not None:
        turn = shortest_turn(code, *loop)
        body = [code[i] for i in turn]
        found["loop"] = {"instructions": len(body), **count(body)}
        end = end_of_product(code, turn)
        if end != turn[-1]:
            before = [code[i] for i in turn if i < end]
            found["loads_before_epilogue"] = count(before)["tma_loads"]
        if sides and (choice := longest_choice(code, end)) is not None:
            found["every_epilogue"], *lengths = choice
            found["plain_epilogue"], found["full_epilogue"] = sorted(lengths)
    return found


@functools.cache
def cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        env = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }  # where it finds nvdisasm
        command = [BIN / "cuobjdump", option, f.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def instructions(text: str) -> list[Instruction]:
    """Of a disassembly, without the padding at its end."""
    code = []
    for address, predicate, name, rest in INSTRUCTION.findall(text):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name == "BRA" else None
        conditional = predicate != "" or re.search(r"\bU?P\d", rest) is not None
        code.append(
            Instruction(int(address, 16), conditional, name, int(target[1], 16) if target else None)
        )
    while code and code[-1].name == "NOP":
        code.pop()
    return code


def count(code: list[Instruction]) -> dict[str, int]:
    return {
        key: sum(re.fullmatch(pattern, x.name) is not None for x in code)
        for key, pattern in SASS.items()
    }


def branches(code: list[Instruction]) -> list[tuple[int, int, bool]]:
    """Index of each branch, index of where it goes, and whether it is conditional."""
    index = {x.address: i for i, x in enumerate(code)}
    return [(i, index[x.target], x.conditional) for i, x in enumerate(code) if x.target in index]


def product_loop(code: list[Instruction]) -> tuple[int, int] | None:
    """First and last index of the loop over D: the shortest backward branch around a matrix
    instruction.
    """
    loops = [
        (to, i) for i, to, _ in branches(code) if to <= i and count(code[to : i + 1])["matrix"]
    ]
    return min(loops, key=lambda loop: loop[1] - loop[0], default=None)


def shortest_turn(code: list[Instruction], first: int, last: int) -> list[int]:
    """Indices of the fewest instructions from first to last, by branches within.

    Of a loop over the steps of all tiles this is a step that neither begins nor ends a tile.
    """
    jumps = {i: (to, conditional) for i, to, conditional in branches(code) if i < to <= last}
    best: dict[int, tuple[int, int]] = {first: (0, first)}  # instructions before, and from where
    for i in range(first, last):
        if i not in best:
            continue
        to, conditional = jumps.get(i, (i + 1, True))
        for after in (to, i + 1) if conditional else (to,):
            if after not in best or best[i][0] + 1 < best[after][0]:
                best[after] = best[i][0] + 1, i
    path = [last]
    while path[-1] != first:
        path.append(best[path[-1]][1])
    return path[::-1]


def end_of_product(code: list[Instruction], turn: list[int]) -> int:
    """Index after which an epilogue is looked for: the end of the loop, or where the loop itself
    leaps over an epilogue that only a tile's last step goes through.
    """
    last_product = max(i for i in turn if re.fullmatch(SASS["matrix"], code[i].name))
    leaps = [(b - a, a) for a, b in itertools.pairwise(turn) if a > last_product]
    length, start = max(leaps, default=(0, 0))
    return start if length > len(turn) else turn[-1]


def longest_choice(code: list[Instruction], after: int) -> tuple[int, int, int] | None:
    """Instructions between an index and the longest `if ... else ...` after it, and of both its
    sides: one if, one else, each to its end.

    `@P BRA else; if...; BRA end; else: ...; end:`. Blocks of a side that lie elsewhere do not
    count.
    """
    jumps = branches(code)
    ends = {i: to for i, to, conditional in jumps if not conditional and to > i}
    found = [
        (i - after, to - i - 1, ends[to - 1] - to)
        for i, to, _ in jumps
        if after < i < to - 1 and to - 1 in ends
    ]
    return max(found, key=lambda lengths: sum(lengths[1:]), default=None)
