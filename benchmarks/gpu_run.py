"""Everything that a GPU can tell, by a plan that shares out the minutes: run it again until it says
that nothing is left.

    python benchmarks/gpu_run.py --minutes 8 --out FOLDER [--only STEP ...] [--renew]
    python benchmarks/gpu_run.py --minutes 8 --dry-run
    python benchmarks/gpu_run.py --tiny --out FOLDER

The second says what the minutes should hold, without a GPU; the third does all of it on small
sizes, also on a CPU. --commit NAME, where git cannot tell: on a GPU nothing is measured without.

environment    what the GPU is, its clocks and its ceilings: products at real shapes, a copy
compile        the kernels of the steps up to the bars, in as many processes as there are cores
truth          values against float64 where the interpreter cannot tell (`gpu_truth.py`)
rates          each kernel beside the bare product of its shape, five heads (`gpu_rates.py`)
tiles          candidate tiles for two heads (`tune_tiles.py`), which writes measured.json
host           wall time of steps of few rows beside the GPU's own
bars           the cells that bars are set on, with the methods that the bars name
tests          those of the ops, several files at a time
end-to-end     a training step and annotation (`bench_end_to_end.py`), in a record of its own
cells          the rest of the matrix of `loss_head_cases`, by `loss_head_cell`
sanitizer      compute-sanitizer's memcheck on a small step, if it is there

`gpu_plan.py` says how a step gets its share, `gpu_steps.py` what each holds. The record,
FOLDER/loss_head.json, is replaced as a whole after every job and every method of a cell, so that
nothing is lost but what was interrupted; that is marked "unfinished" and done again. What is in the
record is not; with --renew, unless another commit made it. A peer that brings its process down or
hangs is named in "excluded" and left out from then on. However it ends, a summary is printed. What
commands print and what workers say of errors is appended to FOLDER/log.txt.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# this tree, whether or not one is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_plan
import gpu_steps
import gpu_summary
from gpu_process import HERE, Worker, surroundings
from gpu_record import Record
from gpu_runner import Runner
from loss_head_cases import DEVICE
from loss_head_measure import OURS, environment
from loss_head_peers import METHODS
from process_age import process_age

MOST_COMPILING = 12  # each has a head and its gradients in the GPU's memory: 9 GB
MOST_TESTING = 14


def stop_at_signals() -> None:
    """End as at an exception, so that the summary is printed and nothing is left running."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def processes() -> int:
    """How many to run at a time: of the cores that this process may use, two are left free."""
    return min(MOST_TESTING, max(1, len(os.sched_getaffinity(0)) - 2))


def announce(events: Iterator[gpu_plan.Event], began: float) -> None:
    for event in events:
        at = event.ended - began
        print(
            f"{int(at) // 60}:{int(at) % 60:02} {event.job} ({event.ended - event.began:.1f} s)",
            flush=True,
        )


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="end by then")
    parser.add_argument("--only", choices=gpu_steps.NAMES, nargs="+", default=gpu_steps.NAMES)
    parser.add_argument(
        "--out", type=Path, help="folder of the record; benchmarks/results/<gpu> by default"
    )
    parser.add_argument("--commit", default=environment()["commit"], help="where git cannot tell")
    parser.add_argument(
        "--renew", action="store_true", help="do again what another commit's record holds"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, to try this script, also on a CPU"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the minutes should hold, and do nothing"
    )
    args = parser.parse_args(argv)
    if args.out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", str(environment()["device"]).lower()).strip("-")
        args.out = HERE / "results" / ("tiny" if args.tiny else slug)
    if DEVICE == "cuda" and not (args.commit or args.dry_run):
        parser.error(
            "--commit: expected the name of the commit that is measured, got none, and git knows "
            "none here; give --commit NAME"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    before = process_age() if argv is None else 0.0
    began = time.monotonic() - before
    most = MOST_TESTING if args.dry_run else processes()
    setting = gpu_steps.Setting(args.out.resolve(), args.tiny, min(MOST_COMPILING, most), most)
    only = {*args.only, "compile"} if {*args.only} & {*gpu_steps.COMPILED} else args.only
    steps = [step for step in gpu_steps.steps(setting) if step.name in only]
    record = Record(args.out / "loss_head.json", args.commit)
    if args.dry_run:
        import gpu_dry

        print(gpu_dry.told(steps, record, 60 * args.minutes, args.renew))
        return 0
    stop_at_signals()
    steps = gpu_steps.ready(steps, record, args.renew)
    gpu = DEVICE == "cuda"
    log = record.path.with_name("log.txt")
    worker = Worker(surroundings(not gpu), *["--tiny"] * args.tiny, log=log)
    seconds = 60 * args.minutes - before
    peers = [name for name in METHODS if not name.startswith(OURS)]
    runner = Runner(record, worker, peers, gpu)
    try:
        events = gpu_plan.follow(
            *(steps, record, runner.do, time.monotonic, seconds, args.renew, runner.prepare)
        )
        announce(events, began)
    finally:
        worker.stop()
        print(gpu_summary.page(record.data, steps, lambda step: step.left(record, args.renew)))
        print(f"record: {record.path}; what the processes said: {log}", flush=True)
    return 3 if any(step.left(record, args.renew) for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
