"""What the compiler makes of every kernel, for each architecture, without a device: writes
results/aot.

    python benchmarks/aot_report.py [sm90 ...]

`<arch>.json`: a row for each kernel that a case of tests/support/aot_worker.py compiles
first, of one Triton version. `README.md`: the same as tables. Nothing here is a time: what is
compiled has run nowhere.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import triton

ARCHS = ("sm90", "sm100", "sm80", "sm120", "gfx942")
HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "aot"
COLUMNS = {
    "case": "case",
    "kernel": "kernel",
    "block": "block",
    "warps": "warps",
    "registers": "regs",
    "spill_bytes": "spilled",
    "shared": "shared",
    "blocks_per_sm": "blocks/SM",
    "matrix": "matrix",
    "tma_loads": "TMA in",
    "tma_stores": "TMA out",
    "async_copies": "async",
}
EPILOGUES = {"every_epilogue": "every tile", "plain_epilogue": "plain", "full_epilogue": "full"}

HEAD = """# What the compiler makes of the kernels

Written by `python benchmarks/aot_report.py` with Triton {version};
`tests/kernels/test_aot.py` holds it to what is compiled.
Head: N = 4096, D = 4096, V = 128256, and the stash's rows as `treg.ops.head.memory.stash_rows`
makes them; "unaligned": rows of 4097 elements, V = 50257. "Gemma-2": D = 3584, V = 256000.
All options: bias, softcap and temperature.
A kernel that an earlier case has compiled is not listed again.

- block: BLOCK_N x BLOCK_V x BLOCK_D of the tile kernels, in the order of their declaration
  elsewhere.
- regs, spilled: registers and bytes of local memory of a thread. shared: bytes of a block.
- blocks/SM: what registers, shared memory and warps let a multiprocessor hold at once.
- matrix: HGMMA (sm90), tcgen05 (sm100), mma.sync (sm80, sm120), MFMA (gfx942) instructions;
  TMA: copies by descriptor (UTMALDG, UTMASTG); async: copies by pointer into shared memory
  (LDGSTS).

Not known without a GPU: any time, and so whether a spill outside the loop over D, a barrier or a
tile's shape costs anything; how much of the copies the products hide; clock and power; what the
caches keep.
"""

CHANGED = """## What changed

The wide tile of sm90, 128x256x64, since these changes: rows of the stash begin at 128 bytes;
hidden states are copied where they do not begin at 16; tanh takes 12 instructions a logit, and its
slope is computed where it is used; the scale and the offset of a logit are one instruction; what a
tile reads of its rows is read before its product. Before was measured once, with Triton 3.7.1;
after is in the tables.
Instructions of a thread: of one step over D, and of a plain tile's epilogue in all.
"""
# spilled bytes, instructions of a step and of a plain epilogue, before
BEFORE = {
    "stash, bfloat16, V = 128257": (320, 93, 2344),
    "stash, bfloat16, hidden at an odd offset": (136, 277, 881),
    "gradient, bfloat16, V = 128257": (184, 92, 630),
    "gradient, bfloat16, hidden at an odd offset": (128, 274, 479),
    "forward, bfloat16, softcap, Gemma-2": (0, 75, 3169),
    "stash, bfloat16, softcap, Gemma-2": (376, 79, 3641),
    "gradient, bfloat16, softcap, Gemma-2": (96, 78, 3201),
}

LOOPS = """One step of the loop over D, in instructions of a thread. Then what follows it, in all
and for each element of the thread's share of a tile: what every tile goes through, a softcap's tanh
among it; then plain, where all rows are scored and have their target elsewhere, or full, in other
tiles. So a plain tile costs the first and the second number, another one the first and the third.
"""


def said_of(arch: str, worker: str):
    """What a script of tests/support prints of an architecture, in a process without Triton's
    interpreter and without a GPU.
    """
    script = HERE.parent / "tests" / "support" / worker
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(
        [*(p for p in sys.path if p), str(HERE.parent / "kernels"), str(HERE.parent)]
    )
    env["CUDA_VISIBLE_DEVICES"] = ""  # tiles measured on a device here are not what is asked for
    done = subprocess.run([sys.executable, script, arch], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"{arch}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)


def compiled(arch: str) -> dict:
    """The report of an architecture."""
    return {"arch": arch, "triton": triton.__version__, **said_of(arch, "aot_worker.py")}


def recorded(arch: str) -> dict:
    return json.loads((OUT / f"{arch}.json").read_text())


def to_text(report: dict) -> str:
    """A row a line."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in report["rows"])
    names = ("arch", "triton", "again")
    head = "".join(f' "{name}": {json.dumps(report[name])},\n' for name in names)
    return "{\n" + head + ' "rows": [\n' + rows + "\n ]\n}\n"


def elements(row: dict) -> float:
    """Of a tile [BLOCK_N, BLOCK_V], for each thread."""
    n, v, _ = map(int, row["block"].split("x"))
    return n * v / (32 * row["warps"])


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def resources_table(rows: list[dict]) -> str:
    columns = [
        key for key in COLUMNS if key in ("case", "kernel") or any(row.get(key) for row in rows)
    ]
    cells = [[str(row[key]).strip("_") for key in columns] for row in rows]
    return table([COLUMNS[key] for key in columns], cells)


def loops_table(rows: list[dict]) -> str:
    """sm90's machine code: one step of the loop over D, and both epilogues for each element of a
    tile.
    """
    header = [
        "case",
        "kernel",
        "block",
        "instructions",
        "HGMMA",
        "TMA in",
        "async",
        "barriers",
        "spilled",
    ]
    cells = []
    for row in rows:
        loop = row["loop"]
        cells.append(
            [
                row["case"],
                row["kernel"].strip("_"),
                row["block"],
                loop["instructions"],
                loop["matrix"],
                loop["tma_loads"],
                loop["async_copies"],
                loop["barriers"],
                loop["local"],
                *(
                    f"{row[key]} ({row[key] / elements(row):.1f})" if key in row else ""
                    for key in EPILOGUES
                ),
            ]
        )
    return table([*header, *EPILOGUES.values()], cells)


def changed_table(report: dict) -> str:
    cells = []
    for case, before in BEFORE.items():
        same = report["again"].get(case, case)
        row = next(row for row in report["rows"] if row["case"] == same and "source" in row)
        epilogue = row["every_epilogue"] + row["plain_epilogue"]
        after = row["spill_bytes"], row["loop"]["instructions"], epilogue
        cells.append([case, *(f"{a} -> {b}" for a, b in zip(before, after, strict=True))])
    return table(["case", "spilled", "step over D", "plain epilogue"], cells)


def remarks(report: dict) -> list[str]:
    """What stands out: spills, long loops, kernels compiled more than once, full register files."""
    rows, found = report["rows"], []
    spills = [row for row in rows if row["spill_bytes"]]
    for row in spills:
        inside = row.get("loop", {}).get("local")
        where = {None: "", 0: ", none of it in the loop over D"}.get(
            inside, f", {inside} accesses in each step over D"
        )
        kernel = row["kernel"].strip("_")
        found.append(
            f"{row['case']}: `{kernel}` spills {row['spill_bytes']} bytes a thread{where}."
        )
    if not spills:
        found.append("Nothing spills.")
    loops = [row for row in rows if row.get("loop", {}).get("local") == 0]
    shortest = min((row["loop"]["instructions"] for row in loops), default=0)
    for row in loops:
        if (length := row["loop"]["instructions"]) > 2 * shortest:
            kernel = row["kernel"].strip("_")
            found.append(
                f"{row['case']}: `{kernel}` {row['block']} has {length} instructions in each step "
                f"of its loop, against {shortest} where descriptors make the addresses."
            )
    twice = Counter((row["case"], row["kernel"]) for row in rows if "source" in row)
    for (case, kernel), times in twice.items():
        if times > 1:
            found.append(
                f"{case}: `{kernel.strip('_')}` is compiled {times} times, "
                "by how its pointers are aligned."
            )
    if again := report["again"]:
        same = ", ".join(f"{case} (`{first}`)" for case, first in again.items())
        found.append(f"Cases that take the tile kernel of another: {same}.")
    full = sum(row["registers"] >= 255 for row in rows)
    found.append(f"Kernels with 255 registers or more: {full} of {len(rows)}.")
    return found


def readme(reports: list[dict]) -> str:
    parts = [HEAD.format(version=reports[0]["triton"])]
    parts += [CHANGED, changed_table(next(x for x in reports if x["arch"] == "sm90")) + "\n"]
    for report in reports:
        parts += [f"## {report['arch']}\n", "\n".join(f"- {x}" for x in remarks(report)) + "\n"]
        parts.append(resources_table(report["rows"]) + "\n")
        if report["arch"] == "sm90":
            parts.append(LOOPS)
            parts.append(loops_table([row for row in report["rows"] if "loop" in row]) + "\n")
    return "\n".join(parts)


def main(archs: list[str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for arch in archs:
        (OUT / f"{arch}.json").write_text(to_text(compiled(arch)))
        print(f"{arch}.json")
    (OUT / "README.md").write_text(readme([recorded(arch) for arch in ARCHS]))


if __name__ == "__main__":
    main(sys.argv[1:] or list(ARCHS))
