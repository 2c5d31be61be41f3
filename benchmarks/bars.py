"""The ratios that this project is held to on a CPU: time against dense PyTorch and Liger, memory
against dense.

    python benchmarks/bars.py [--rounds 7] [--out benchmarks/results/cpu/bars.json]

Time: N = 4096 rows (two pairs of 2 x 1024), D = 512, V = 32000, trainable head, forward and
backward; all methods of a dtype take turns in one process. Memory: what one forward and backward
holds beyond its inputs, gradients included, each in a fresh process, cold. Other work on the
machine shows in the spread of a ratio and in the load average beside it. What bfloat16 costs hangs
on the CPU's instructions, which the record names: without those for it, it is emulated.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loss_head_cases import Case, batch_of
from loss_head_measure import Alternation, checked_errors, environment, peak_bytes
from loss_head_peers import METHODS, step

from treg.ops.head.memory import DEFAULT_BUDGET

TIMED = Case("bars", 2, 1024, 512, 32000, torch.float32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = ("dense_log_softmax", "dense_logsumexp", "liger_dpo")
# of /proc/cpuinfo, on x86 and on ARM, that decide how fast a matrix product is
INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("asimd", "sve", "bf16", "i8mm"),
)
OURS = {"fp32": ("treg_fused",), "bf16": ("treg_fused", "treg_fused_exact_logits")}
HALF = "treg_fused, half ignored"
FLOOR = "three bare products"

_HELD = Case("bars-memory", 2, 512, 256, 64000, torch.float32)
HELD = {
    "dense_log_softmax": ("dense_log_softmax", _HELD),
    "dense_logsumexp": ("dense_logsumexp", _HELD),
    "treg_fused": ("treg_fused", _HELD),
    "treg_fused, 2 N": ("treg_fused", replace(_HELD, length=2 * _HELD.length)),
    "treg_fused, 4 N": ("treg_fused", replace(_HELD, length=4 * _HELD.length)),
}


def alternation(dtype: str, timed: Case = TIMED) -> Alternation:
    """The calls to time in a dtype, warm; this project's own are first checked against float64."""
    check = replace(timed, dtype=DTYPES[dtype])
    for name in OURS[dtype]:
        checked_errors(name, check)
    names = (*OURS[dtype], *(name for name in PEERS if METHODS[name].missing() is None))
    small = batch_of(replace(check, length=32))
    for name in names:
        step(METHODS[name], small)
    case = replace(timed, dtype=DTYPES[dtype])
    calls = {name: functools.partial(step, METHODS[name], batch_of(case)) for name in names}
    calls[FLOOR] = bare_products(case)
    calls[HALF] = functools.partial(
        step, METHODS["treg_fused"], batch_of(replace(case, ignored=0.5))
    )
    return Alternation(calls)


def instructions(info: Path = Path("/proc/cpuinfo")) -> dict[str, object]:
    """torch: what its own kernels were chosen for; cpu: those of INSTRUCTIONS, None where the
    system does not say.
    """
    found = None
    if info.exists():
        lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.M)
        names = set(lines[0].split()) if lines else set()
        found = [name for name in INSTRUCTIONS if name in names]
    return {"torch": torch.backends.cpu.get_cpu_capability(), "cpu": found}


def bare_products(case: Case) -> Callable[[], None]:
    """The matrix products of a head and nothing else, three where it is trainable, into buffers
    that are there: the floor.
    """
    batch = batch_of(case)
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    step = min(2048, case.rows)
    tile = torch.zeros(step, case.vocab, dtype=case.dtype)
    dhidden, dweight = torch.zeros_like(hidden[:step]), torch.zeros_like(weight)

    def run() -> None:
        for rows in hidden.split(step):
            torch.mm(rows, weight.T, out=tile[: len(rows)])
            if case.mode != "forward":
                torch.mm(tile[: len(rows)], weight, out=dhidden[: len(rows)])
            if case.mode == "trainable":
                torch.mm(tile[: len(rows)].T, rows, out=dweight)

    return run


def times(run: Alternation) -> dict[str, object]:
    """Median and best seconds of each call, and this project's over each peer's."""
    pairs = [
        (ours, peer) for ours in run.calls if ours not in (HALF, FLOOR, *PEERS) for peer in PEERS
    ]
    pairs += [(FLOOR, peer) for peer in ("treg_fused", "dense_log_softmax")] + [
        (HALF, "treg_fused")
    ]
    pairs = [(a, b) for a, b in pairs if b in run.calls]
    return {
        "rounds": len(run.seconds["treg_fused"]),
        "median_seconds": {name: run.median(name) for name in run.calls},
        "best_seconds": {name: min(run.seconds[name]) for name in run.calls},
        "ratios": {f"{a} / {b}": run.ratio(a, b) for a, b in pairs},
    }


def peaks(labels: Iterable[str] = HELD, over: int = 1) -> dict[str, int | None]:
    """Peak extra bytes of entries of HELD with N / over rows, each in a process of its own; None
    where the system cannot tell.
    """
    command = [sys.executable, __file__, "--over", str(over), "--peak"]
    return {
        label: json.loads(
            subprocess.run([*command, label], stdout=subprocess.PIPE, text=True, check=True).stdout
        )
        for label in labels
    }


def held_case(label: str, over: int = 1) -> Case:
    case = HELD[label][1]
    return replace(case, length=case.length // over)


def _peak(label: str, over: int) -> int | None:
    """Of this process, in which nothing has been computed yet: what a first call loads counts."""
    batch = batch_of(held_case(label, over))
    return peak_bytes(functools.partial(step, METHODS[HELD[label][0]], batch))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "bars.json"
    )
    parser.add_argument(
        "--peak", choices=HELD, help="print the peak extra bytes of one entry and end"
    )
    parser.add_argument("--over", type=int, default=1, help="of --peak: so many times fewer rows")
    parser.add_argument(
        "--memory", action="store_true", help="measure memory again and leave the times of --out"
    )
    args = parser.parse_args()
    if args.peak is not None:
        print(json.dumps(_peak(args.peak, args.over)))
        return
    found = json.loads(args.out.read_text()) if args.memory else timed(args.rounds)
    found["memory"] = {
        "environment": environment(),
        "instructions": instructions(),
        "budget_bytes": DEFAULT_BUDGET["cpu"],
        "peak_extra_bytes": peaks(),
    }
    show(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


def timed(rounds: int) -> dict:
    """The part of the record that is not memory."""
    load = [os.getloadavg()[0]]
    found: dict = {"environment": environment(), "instructions": instructions(), "time": {}}
    for dtype in DTYPES:
        run = alternation(dtype)
        for _ in range(rounds):
            run.round()
        found["time"][dtype] = times(run)
        load.append(os.getloadavg()[0])
    found["load_average"] = load  # over a minute: before, after each dtype
    return found


def instructions_text(found: dict[str, Any]) -> str:
    """Of what `instructions` says."""
    of_cpu = "not known" if found["cpu"] is None else ", ".join(found["cpu"]) or "none of these"
    return f"the CPU has {of_cpu}; torch runs its kernels for {found['torch']}"


def show(found: dict) -> None:
    if "instructions" in found:  # not in records from before they were looked for
        print(instructions_text(found["instructions"]))
    for dtype, result in found["time"].items():
        print(f"\n{dtype}, median of {result['rounds']}")
        for name, seconds in result["median_seconds"].items():
            print(f"  {name:<45} {seconds:6.2f} s (best {result['best_seconds'][name]:.2f})")
        for name, x in result["ratios"].items():
            spread = f"(a round: {x['least']:.2f} to {x['greatest']:.2f})"
            print(f"  {name:<45} {x['ratio']:6.2f}   {spread}")
    print("\npeak extra memory, fp32")
    for name, held in found["memory"]["peak_extra_bytes"].items():
        print(f"  {name:<45} " + ("not known" if held is None else f"{held / 2**20:6.0f} MiB"))
    load = ", ".join(f"{x:.1f}" for x in found["load_average"])
    print(f"\nload average before and after each dtype: {load}")


if __name__ == "__main__":
    main()
