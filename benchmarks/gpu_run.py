"""Everything that a GPU can tell, in slices that end in time: run it again until it says that
nothing is left.

    python benchmarks/gpu_run.py [--seconds 540] [--only tests] [--commit NAME] [--renew] [--tiny]

environment    what the GPU is, and its ceilings: a large bfloat16 product, a copy
tests          those marked gpu and all others of the ops, a file at a time
sanitizer      compute-sanitizer's memcheck and racecheck on a small step, if it is there
tiles          benchmarks/tune_tiles.py, if it is there
cells          the matrix of `loss_head_cases`, those of the bars first, by `loss_head_cell`

The record, benchmarks/results/<gpu>/loss_head.json, is replaced as a whole after every step, so
that nothing is lost but the step that was interrupted. What is in it is not run again; with
--renew, unless another commit made it. A peer that brings its process down or hangs is named in
"excluded" and left out from then on.
"""

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gpu_bars
from gpu_worker import cells
from loss_head_cases import FIRST
from loss_head_cell import COOL_ROUNDS, DEVICE, PAUSE
from loss_head_measure import OURS, environment
from loss_head_peers import METHODS

HERE = Path(__file__).parent
ROOT = HERE.parent
STAGES = ("environment", "tests", "sanitizer", "tiles", "cells")
TESTS = (
    "ops/test_gpu.py",
    "ops/test_tiles.py",
    "ops/test_linear_logprobs.py",
    "ops/test_fused.py",
    "ops/test_compile.py",
    "losses/test_objective.py",
    "ops/test_filtered.py",
    "ops/test_bad_input.py",
    "ops/test_vocab_parallel.py",
)
SILENCE = 180.0  # seconds without a word after which a worker hangs
ENOUGH = 60.0  # seconds that a step must have to be begun


class Record:
    """A JSON file that is always whole."""

    def __init__(self, path: Path, commit: str | None):
        self.path, self.commit = path, commit
        self.data = (
            json.loads(path.read_text())
            if path.exists()
            else {"stages": {}, "excluded": {}, "cells": {}}
        )

    def has(self, kind: str, name: str, renew: bool) -> bool:
        found = self.data[kind].get(name)
        return found is not None and not (renew and found.get("commit") != self.commit)

    def put(self, kind: str, name: str, value: dict) -> None:
        self.data[kind][name] = {"commit": self.commit, **value}
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        with beside.open("w") as file:
            file.write(one_a_line(self.data))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def one_a_line(data: dict[str, dict]) -> str:
    """JSON of which every entry of an entry has a line: short, and a change shows where it is."""
    parts = (
        f"{json.dumps(kind)}: {{"
        + ",".join(f"\n {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        + "\n}"
        for kind, entries in data.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


class Worker:
    """A `gpu_worker.py`, started when first asked."""

    def __init__(self, *options: str):
        self.command = [sys.executable, str(HERE / "gpu_worker.py"), *options]
        self.process: subprocess.Popen | None = None

    def ask(self, job: dict, deadline: float) -> tuple[dict | None, str, str]:
        """The result, or None, what the worker was at and why nothing came ("late": the
        deadline).
        """
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=surroundings(),
            )
            self.lines: queue.Queue[str] = queue.Queue()
            threading.Thread(
                target=self._listen, args=(self.process.stdout, self.lines), daemon=True
            ).start()
        print(json.dumps(job), file=self.process.stdin, flush=True)
        at = "start"
        while True:
            left = deadline - time.monotonic()
            try:
                line = self.lines.get(timeout=max(0.0, min(SILENCE, left)))
            except queue.Empty:
                self.stop()
                return (
                    None,
                    at,
                    "late" if left < SILENCE else f"no sign of life for {SILENCE:.0f} s",
                )
            if not line:
                code = self.process.wait()
                self.stop()
                return None, at, f"brought its process down (exit code {code})"
            message = json.loads(line)
            if "result" in message:
                return message["result"], at, ""
            at = message["at"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @staticmethod
    def _listen(stream, lines: queue.Queue) -> None:
        for line in stream:
            lines.put(line)
        lines.put("")


def surroundings() -> dict[str, str]:
    path = os.pathsep.join(
        filter(None, (os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "kernels")))
    )
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "PYTHONPATH": path}


def commands(folder: Path) -> Iterator[tuple[str, str, list[str], dict[str, str]]]:
    """(stage, step, command, environment) of what is a command of its own."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for path in TESTS:
        name = Path(path).stem.removeprefix("test_")
        yield "tests", f"tests: {name}", [*pytest, f"tests/{path}"], {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
        yield (
            "sanitizer",
            f"sanitizer: {tool}",
            [*command, "benchmarks/gpu_worker.py", "--small-step"],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    tune = HERE / "tune_tiles.py"
    if tune.exists():
        yield "tiles", "tiles", [sys.executable, str(tune), "--out", str(folder / "tiles.json")], {}


def run_command(command: list[str], extra: dict[str, str], seconds: float) -> dict:
    """Exit code, seconds and the end of what it printed."""
    if shutil.which(command[0]) is None:
        return {"skipped": f"{command[0]} is not on the PATH"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**surroundings(), **extra},
            timeout=seconds,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as e:
        code, text = "late", (e.stdout or b"").decode(errors="replace")
    return {"code": code, "seconds": round(time.monotonic() - began, 1), "end": text[-1500:]}


def run_cells(record: Record, worker: Worker, args: argparse.Namespace, deadline: float) -> None:
    for case in cells(args.tiny):
        pauses = (
            COOL_ROUNDS
            * PAUSE
            * sum(m.applies_to(case) for m in METHODS.values())
            * (case.name in FIRST)
        )
        if record.has("cells", case.name, args.renew):
            continue
        found = None
        while found is None:
            if deadline - time.monotonic() < (ENOUGH + pauses if DEVICE == "cuda" else 1.0):
                return
            job = {"do": "cell", "name": case.name, "excluded": record.data["excluded"]}
            found, at, why = worker.ask(job, deadline)
            if why == "late":
                return
            if found is None and at in METHODS and not at.startswith(OURS):
                record.data["excluded"][at] = f"{why} in {case.name}"
                record.save()
            elif found is None:
                found = {"failed": f"{at}: {why}"}
        record.put("cells", case.name, found)
        print(
            f"{case.name}: {'failed' if 'failed' in found else len(found['methods'])}", flush=True
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="end by then")
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--commit", default=environment()["commit"], help="where git cannot tell")
    parser.add_argument(
        "--renew", action="store_true", help="do again what another commit's record holds"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="cells with hardly any work, to try this script"
    )
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    slug = re.sub(r"[^a-z0-9]+", "-", str(environment()["device"]).lower()).strip("-")
    folder = args.results / ("tiny" if args.tiny else slug)
    record = Record(folder / "loss_head.json", args.commit)
    worker = Worker(*["--tiny"] * args.tiny)

    if "environment" in args.only and not record.has("stages", "environment", args.renew):
        found, _, why = worker.ask({"do": "environment"}, deadline)
        record.put("stages", "environment", found or {"failed": why})
    for stage, name, command, extra in commands(folder):
        left = deadline - time.monotonic()
        if stage in args.only and left > ENOUGH and not record.has("stages", name, args.renew):
            worker.stop()  # its memory is needed
            done = run_command(command, extra, left - 5)
            if (
                done.get("code") != "late" or left > 0.8 * args.seconds
            ):  # else: again, with more time
                record.put("stages", name, done)
    if "cells" in args.only:
        run_cells(record, worker, args, deadline)
    worker.stop()

    for name, done in record.data["stages"].items():
        print(f"{name}: {done.get('skipped') or done.get('failed') or done.get('code', 'done')}")
    for name, why in record.data["excluded"].items():
        print(f"excluded: {name}: {why}")
    wanted = [case.name for case in cells(args.tiny)]
    have = [name for name in wanted if record.has("cells", name, args.renew)]
    print(f"\n{gpu_bars.table(record.data['cells'])}\n")
    print(f"{len(have)} of {len(wanted)} cells; record: {record.path}")
    return 0 if len(have) == len(wanted) else 3


if __name__ == "__main__":
    sys.exit(main())
