"""Times the tiles that a GPU may take, for each head, kernel and number of rows, and keeps the
fastest.

    python benchmarks/tune_tiles.py [--out FOLDER] [--seconds 540] [--tiny]

A tile whose results are off is left out: log-probs, the stash and its factors, or gradients, beside
those of the first tile that runs. All tiles of a cell take turns, every other round in reverse.
FOLDER, benchmarks/results/<gpu> by default, gets two files: tiles.json has every time;
measured.json the tile of each cell that beats the table of `treg_kernels.configs` by 2 %. Copied
over kernels/treg_kernels/measured.json, it is what the kernels read. Both are replaced as a whole
after every cell; what tiles.json holds of the same commit is not timed again.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# this tree, whether or not one is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from loss_head_cases import DEVICE, HEADS
from loss_head_measure import environment, synchronize

from treg.ops.head.gemm import logits_into
from treg.ops.head.memory import ROW_MULTIPLE, stash_rows
from treg_kernels import configs, logits_gradient, logprob_forward
from treg_kernels.configs import Tile
from treg_kernels.tiles import Scalars

ROWS = {"forward": (64, 512, 2048, 8192), "stash": (64, 512, 2048, 4096), "gradient": (512, 4096)}
ROUNDS, GAIN = (7 if DEVICE == "cuda" else 2), 0.98
SHIPPED = Path(configs.__file__).with_name(configs.MEASURED)
DTYPE = torch.bfloat16 if not configs.INTERPRET else torch.float32  # it cannot add up 16 bits
# relative 2-norms of the difference of two tiles' results, beyond which one of them is wrong: they
# add up in another order, and the last two are rounded to DTYPE
LIMITS = {"logprobs": 1e-5, "factor": 1e-4, "stash": 1e-2, "gradient": 1e-2}
Results = dict[str, torch.Tensor]


def call(
    kind: str, tile: Tile, x: dict[str, torch.Tensor], scalars: Scalars
) -> Callable[[], Results]:
    """One launch of a kernel, and all that it gives: keys of LIMITS, and "norm"."""
    head = (x["hidden"], x["weight"], x["target"], None, scalars, -100)
    if kind == "gradient":
        return lambda: (
            logits_gradient(*head, x["norm"], x["coef"], x["out"], logits_into, tile),
            {"gradient": x["out"]},
        )[1]
    if kind == "forward":
        return lambda: logprob_forward(*head, (), None, logits_into, tile)
    return lambda: logprob_forward(*head, (), x["out"], logits_into, tile) | {"stash": x["out"]}


def results(run: Callable[[], Results], x: dict[str, torch.Tensor]) -> Results:
    """What a call gives that finds nothing of the one before."""
    x["out"].fill_(float("nan"))
    found = run()
    return {name: found[name].clone() for name in LIMITS if name in found}


def off(found: Results, exact: Results) -> str:
    """Which results are apart by more than their limit, and by how much; "" where none is."""
    apart = {
        name: ((x - exact[name]).float().norm() / exact[name].float().norm()).item()
        for name, x in found.items()
    }
    wrong = [name for name, gap in apart.items() if not gap <= LIMITS[name]]  # also of NaN
    return ", ".join(f"{name}: relative difference {apart[name]:.1e}" for name in wrong)


def inputs(
    N: int, D: int, V: int, softcap: float | None
) -> tuple[dict[str, torch.Tensor], Scalars]:
    g = torch.Generator(DEVICE).manual_seed(0)
    weight = (torch.randn(V, D, generator=g, device=DEVICE) * (3 / D**0.5)).to(DTYPE)
    target = torch.randint(V, (N,), generator=g, device=DEVICE)
    x = {
        "hidden": (torch.randn(N, D, generator=g, device=DEVICE) + weight[target]).to(DTYPE),
        "weight": weight,
        "target": target,
        "coef": torch.randn(N, generator=g, device=DEVICE),
        "out": stash_rows(weight, N, V, dtype=DTYPE, multiple=ROW_MULTIPLE),  # as the plans do
    }
    scalars = Scalars.of(1.0, softcap, 1.0)
    x["norm"] = logprob_forward(x["hidden"], weight, target, None, scalars, -100)["norm"]
    return x, scalars


def tiles_of(kind: str, N: int) -> dict[Tile, bool]:
    """The tiles to time on N rows, and whether the table would take them; its own first."""
    table = configs.TILES[configs.architecture()]
    default = table[table[0].n < N]
    others = (*configs.CANDIDATES[configs.architecture()], configs.ROWS)
    return dict.fromkeys((default, *others), False) | {default: True}


def unfit(tile: Tile, N: int, own: bool) -> bool:
    """Whether so many rows are not for this tile."""
    return tile.max_rows < N or (tile.n > 4 * N and not own)


def launch(kind: str, N: int, D: int, V: int, softcap: float | None) -> dict[str, str]:
    """One launch of every tile, and what did not compile or run. Raises where the GPU is unusable
    after one of them.
    """
    x, scalars = inputs(N, D, V, softcap)
    wrong = {}
    for tile, own in tiles_of(kind, N).items():
        if not unfit(tile, N, own):
            try:
                call(kind, tile, x, scalars)()
            except Exception as e:
                wrong[str(tile)] = f"{type(e).__name__}: {e}"[:200]
                synchronize()
    return wrong


def cell(kind: str, N: int, D: int, V: int, softcap: float | None) -> list[dict]:
    """Every tile, its median milliseconds or why it is out; the table's own tile first.

    Raises where the GPU is unusable after a tile: of those that follow nothing would be known.
    """
    x, scalars = inputs(N, D, V, softcap)
    rows, runs, exact = [], {}, None
    for tile, own in tiles_of(kind, N).items():
        row = {"tile": tile._asdict(), "table": own}
        rows.append(row)
        if unfit(tile, N, own):
            row["out"] = "rows"
            continue
        try:
            run = call(kind, tile, x, scalars)
            found = results(run, x)
            exact = found if exact is None else exact  # of the table's tile, if it runs
            if why := off(found, exact):
                row["out"] = why
                continue
            runs[tile] = (run, row)
        except Exception as e:  # one that does not compile or fit here is out, whatever the reason
            row["out"] = f"{type(e).__name__}: {e}"[:200]
            synchronize()
    times: dict[Tile, list[float]] = {tile: [] for tile in runs}
    order = list(runs)
    for _ in range(ROUNDS):
        for tile in order:
            times[tile].append(milliseconds(runs[tile][0]))
        order.reverse()
    for tile, (_, row) in runs.items():
        row["ms"] = statistics.median(times[tile])
    return rows


def milliseconds(run: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    keep_busy()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _square() -> torch.Tensor:
    return torch.zeros(4096, 4096, dtype=torch.bfloat16, device=DEVICE)


def keep_busy(products: int = 8) -> None:
    """Queue work for about a millisecond: 8 * 2 * 4096**3 = 1.1 TFLOP. The host then queues what
    is timed while the GPU is at work, and the events hold no time of the host.
    """
    for _ in range(products):
        torch.mm(_square(), _square())


def chosen(cells: dict[str, dict], device: str) -> list[dict]:
    """Rows of measured.json: of a head and kernel whose table loses anywhere, the best tile for
    each number of rows.
    """
    found = []
    for c in cells.values():
        timed = [r for r in c["tiles"] if "ms" in r]
        if not timed:
            continue
        best, table = (
            min(timed, key=lambda r: r["ms"]),
            next((r for r in timed if r["table"]), None),
        )
        gains = table is None or best["ms"] < GAIN * table["ms"]
        tile = best["tile"] if gains else table["tile"]
        key = {k: c[k] for k in ("kind", "vocab", "hidden", "rows")}
        found.append({"device": device, "dtype": "bfloat16", **key, "tile": tile, "gains": gains})
    heads = {(r["kind"], r["vocab"], r["hidden"]) for r in found if r["gains"]}
    rows = [r for r in found if (r["kind"], r["vocab"], r["hidden"]) in heads]
    return [{k: v for k, v in r.items() if k != "gains"} for r in rows]


def write(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    with beside.open("w") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def heads(tiny: bool) -> dict[str, tuple[int, int, float | None]]:
    """D, V, softcap by name."""
    return {name: (64, 264, cap) if tiny else (D, V, cap) for name, (D, V, cap) in HEADS.items()}


def todo(name: str, kind: str, tiny: bool) -> list[tuple[str, int]]:
    """Labels and numbers of rows of a head's kernel."""
    rows = (40,) if tiny else ROWS[kind]
    return [(f"{name} {kind} N={N}", N) for N in rows]


def tune(
    folder: Path,
    name: str,
    kind: str,
    tiny: bool,
    left: Callable[[], float],
    commit: str | None = None,
) -> list[str]:
    """Time a head's kernel at all numbers of rows that the folder does not hold of this commit, and
    say what won.

    Returns a line each; those for which no time is left are not begun.
    """
    path, device = folder / "tiles.json", environment()["device"]
    data = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    data |= {"environment": environment(), "triton": triton.__version__}
    D, V, softcap = heads(tiny)[name]
    lines = []
    for label, N in todo(name, kind, tiny):
        held = data["cells"].get(label)
        if (held is not None and held.get("commit") == commit) or left() <= 0:
            continue
        data["cells"][label] = {
            "commit": commit,
            "kind": kind,
            "rows": N,
            "hidden": D,
            "vocab": V,
            "tiles": cell(kind, N, D, V, softcap),
        }
        write(path, data)
        others = [r for r in json.loads(SHIPPED.read_text()) if r["device"] != device]
        write(folder / configs.MEASURED, others + chosen(data["cells"], device))
        timed = [r for r in data["cells"][label]["tiles"] if "ms" in r]
        best = min(timed, key=lambda r: r["ms"], default=None)
        found = f"{best['ms']:9.3f} ms  {Tile(**best['tile'])}" if best else "no tile runs"
        lines.append(f"{label:<36} {found}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no cell after so many")
    parser.add_argument("--tiny", action="store_true", help="small heads")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    slug = environment()["device"].lower().replace(" ", "-")
    out = args.out or Path(__file__).parent / "results" / slug
    commit = environment()["commit"]
    for name in heads(args.tiny):
        for kind in ROWS:
            for line in tune(out, name, kind, args.tiny, lambda: end - time.monotonic(), commit):
                print(line, flush=True)


if __name__ == "__main__":
    main()
