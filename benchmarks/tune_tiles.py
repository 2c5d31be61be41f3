"""Times the tiles that a GPU may take, for each head, kernel and number of rows, and keeps the
fastest.

    python benchmarks/tune_tiles.py [--out FILE] [--seconds 540] [--tiny]

A tile whose log-probs (or gradients) are off is left out. All tiles of a cell take turns, every
other round in reverse. FILE, benchmarks/results/<gpu>/tiles.json by default, has every time;
kernels/treg_kernels/measured.json, which the kernels read, the tile of each cell that beats the
table of `treg_kernels.configs` by 2 %. Both are replaced as a whole after every cell; what FILE
holds is not timed again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from loss_head_cases import DEVICE, HEADS
from loss_head_measure import environment

from treg.ops.head.gemm import logits_into
from treg_kernels import configs, logits_gradient, logprob_forward
from treg_kernels.configs import Tile
from treg_kernels.tiles import Scalars

ROWS = {"forward": (64, 512, 2048, 8192), "stash": (64, 512, 2048, 4096), "gradient": (512, 4096)}
ROUNDS, GAIN = 7, 0.98
MEASURED = Path(configs.__file__).with_name(configs.MEASURED)


def call(
    kind: str, tile: Tile, x: dict[str, torch.Tensor], scalars: Scalars
) -> Callable[[], torch.Tensor]:
    """One launch of a kernel, and what is compared: log-probs, or the gradient."""
    head = (x["hidden"], x["weight"], x["target"], None, scalars, -100)
    if kind == "gradient":
        return lambda: (
            logits_gradient(*head, x["norm"], x["coef"], x["out"], logits_into, tile),
            x["out"],
        )[1]
    stash = x["out"] if kind == "stash" else None
    return lambda: logprob_forward(*head, (), stash, logits_into, tile)["logprobs"]


def inputs(
    N: int, D: int, V: int, softcap: float | None
) -> tuple[dict[str, torch.Tensor], Scalars]:
    g = torch.Generator(DEVICE).manual_seed(0)
    weight = (torch.randn(V, D, generator=g, device=DEVICE) * (3 / D**0.5)).bfloat16()
    target = torch.randint(V, (N,), generator=g, device=DEVICE)
    x = {
        "hidden": (torch.randn(N, D, generator=g, device=DEVICE) + weight[target]).bfloat16(),
        "weight": weight,
        "target": target,
        "coef": torch.randn(N, generator=g, device=DEVICE),
        "out": torch.empty(N, V, dtype=torch.bfloat16, device=DEVICE),
    }
    scalars = Scalars.of(1.0, softcap, 1.0)
    x["norm"] = logprob_forward(x["hidden"], weight, target, None, scalars, -100)["norm"]
    return x, scalars


def cell(kind: str, N: int, D: int, V: int, softcap: float | None) -> list[dict]:
    """Every tile, its median milliseconds or why it is out; the table's own tile first."""
    x, scalars = inputs(N, D, V, softcap)
    table = configs.TILES[configs.architecture()]
    default = table[table[0].n < N]
    rows, runs, exact = [], {}, None
    for tile in dict.fromkeys((default, *configs.CANDIDATES[configs.architecture()], configs.ROWS)):
        row = {"tile": tile._asdict(), "table": tile == default}
        rows.append(row)
        if tile.max_rows < N or (tile.n > 4 * N and tile != default):
            row["out"] = "rows"
            continue
        try:
            run = call(kind, tile, x, scalars)
            exact = (
                run().clone() if exact is None else exact
            )  # of the first tile that runs: the table's, if it does
            apart = (run() - exact).float().norm() / exact.float().norm()
            if not apart < (1e-2 if kind == "gradient" else 1e-5):
                row["out"] = f"relative difference {apart:.1e}"
                continue
            runs[tile] = (run, row)
        except Exception as e:  # one that does not compile or fit here is out, whatever the reason
            row["out"] = f"{type(e).__name__}: {e}"[:200]
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
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no cell after so many")
    parser.add_argument(
        "--tiny", action="store_true", help="one small head; measured.json stays as it is"
    )
    args = parser.parse_args()
    begin, device = time.monotonic(), environment()["device"]
    out = (
        args.out
        or Path(__file__).parent / "results" / device.lower().replace(" ", "-") / "tiles.json"
    )
    data = json.loads(out.read_text()) if out.exists() else {"cells": {}}
    data |= {"environment": environment(), "triton": triton.__version__}
    heads = {"tiny": (64, 500, None)} if args.tiny else HEADS
    todo = [
        (kind, name, N)
        for name in heads
        for kind in ROWS
        for N in ((40, 200) if args.tiny else ROWS[kind])
    ]
    for kind, name, N in todo:
        label = f"{name} {kind} N={N}"
        if label in data["cells"] or time.monotonic() - begin > args.seconds:
            continue
        D, V, softcap = heads[name]
        data["cells"][label] = {
            "kind": kind,
            "rows": N,
            "hidden": D,
            "vocab": V,
            "tiles": cell(kind, N, D, V, softcap),
        }
        write(out, data)
        if not args.tiny:
            others = [r for r in json.loads(MEASURED.read_text()) if r["device"] != device]
            write(MEASURED, others + chosen(data["cells"], device))
        timed = [r for r in data["cells"][label]["tiles"] if "ms" in r]
        best = min(timed, key=lambda r: r["ms"], default=None)
        found = f"{best['ms']:9.3f} ms  {Tile(**best['tile'])}" if best else "no tile runs"
        print(f"{label:<36} {found}", flush=True)
    left = sum(f"{name} {kind} N={N}" not in data["cells"] for kind, name, N in todo)
    print(f"{left} of {len(todo)} cells left" if left else "all cells timed")


if __name__ == "__main__":
    main()
