"""What so many minutes of a GPU should hold: the real plan followed with an imagined clock, which
every job moves by what it should cost. A model, not a measurement.

    process       START: Python, torch, CUDA's context, this project; the first is gpu_run.py's own
    compile       START + kernels * COMPILE / processes + the slowest; kernels are counted by
                  launching what the steps launch on a stand-in for a GPU (`gpu_worker.py --list`)
    truth         TRUTH, and products of float64 at FLOAT64: 3 forward and backward, N D V each
    rates, tiles  products at TRITON, so many rounds of them
    host          rounds of three methods at three products each, the profiler
    a cell        its batch and oracle, then the times of benchmarks/results/predicted-h200.json:
                  once for errors, twice for memory, a round to warm up, the hot rounds; the cool
                  ones with their pauses; what a peer compiles or imports at its first call
    tests         2 * START + their kernels * COMPILE / processes + RUN
"""

import json
import math
import subprocess
import sys
from collections import Counter

import tune_tiles
from gpu_plan import Event, Job, Step, follow
from gpu_process import HERE, surroundings
from gpu_rates import ROUNDS, ROWS
from gpu_record import Record
from gpu_steps import ready
from loss_head_cases import HEADS, Case, gpu_cases
from loss_head_cell import COOL_ROUNDS, PAUSE

START = 10.0  # seconds; on a warm disk 4
COMPILE, SLOWEST = 2.1, 4.4  # CPU-seconds of a kernel: mean and most, Triton 3.6.0, this tile size
LAUNCHING = 12.0  # seconds that a compiling process spends on all launches and their inputs
PEERS_COMPILE = 35.0  # of the slowest peer, under torch.compile
TRUTH, FLOAT64, FLOAT32, TRITON = 1.5, 40e12, 45e12, 600e12  # seconds; FLOP/s
HOT = (7, 50, 2.0)  # rounds at the least, at most, seconds: those of a GPU
FIRST_CALL = {"liger_dpo": 12.0, "verl": 10.0, "cce_exact": 6.0, "liger_scaled_ce": 4.0}
IMPORTS = 8.0  # of the first cell of a worker: trl, transformers
TESTS, RUN = {"gpu, tiles": 100, "log-probs, fused, objective": 350, "others": 200}, 15.0
SANITIZER = 60.0
END_TO_END = 120.0  # what it is given, `--minutes`
PREDICTED = HERE / "results" / "predicted-h200.json"
UNPREDICTED = "trl_chunked"  # stands for methods without a prediction


class Clock:
    """Seconds that are only added up."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Memory(Record):
    """A record that starts from another and writes nothing."""

    def __init__(self, record: Record):
        self.path, self.commit = record.path, record.commit
        self.data = json.loads(json.dumps(record.data))

    def save(self) -> None:
        pass


class Costs:
    """Seconds of each job, on a machine of so many cores."""

    def __init__(self, kernels: int):
        self.kernels = kernels
        self.predicted = json.loads(PREDICTED.read_text())
        self.cases = {case.name: case for case in gpu_cases()}
        self.warm = False  # whether a worker runs
        self.before = ""  # what the last job did
        self.called: set[str] = set()  # peers of that worker

    def of(self, job: Job) -> float:
        work = job.work
        if job.command:
            self.warm = False
            return self._command(job)
        if work["do"] == "compile":
            self.warm = False
            return self._compile(work["processes"])
        return getattr(self, f"_{work['do']}")(work)

    def start(self, job: Job) -> float:
        """Of the worker, where a job needs a new one."""
        before, self.before = self.before, job.work.get("do", "")
        fresh = job.alone or (before == "host" and self.before != "host")  # see `Runner.prepare`
        if job.command or job.work["do"] == "compile" or (self.warm and not fresh):
            return 0.0
        self.warm, self.called = True, set()
        return START

    def _command(self, job: Job) -> float:
        if job.name.startswith("sanitizer"):
            return START + SANITIZER
        if job.name == "end-to-end":
            return 2 * START + END_TO_END
        at = job.command.index("-n") if "-n" in job.command else None
        processes = 1 if at is None else int(job.command[at + 1])
        kernels = TESTS[job.name.removeprefix("tests: ")]
        return 2 * START + kernels * COMPILE / processes + RUN

    def _compile(self, processes: int) -> float:
        kernels = self.kernels * COMPILE / processes + SLOWEST
        return START + max(kernels, PEERS_COMPILE, LAUNCHING)

    def _environment(self, work: dict) -> float:
        return 5.0

    def _truth(self, work: dict) -> float:
        D, V, _ = HEADS["llama-3-8b"]
        rows = 2048 if "2048" in work["name"] else 600
        return TRUTH + 3 * 2 * rows * D * V / FLOAT64

    def _rates(self, work: dict) -> float:
        D, V, _ = HEADS[work["name"]]
        calls = 2 * 3  # a kernel in three forms, each beside a product
        return 1.0 + 3 * (ROUNDS + 2) * calls * 2 * ROWS * D * V / TRITON

    def _tiles(self, work: dict) -> float:
        D, V, _ = HEADS[work["name"]]
        rows = tune_tiles.ROWS[work["kind"]]
        tiles = 13
        once = sum(2 * N * D * V for N in rows) / TRITON
        return 0.7 * len(rows) + tiles * (ROUNDS + 3) * once

    def _host(self, work: dict) -> float:
        D, V, _ = HEADS["llama-3-8b"]
        step = 4 * 2 * work["rows"] * D * V / TRITON + 2e-3
        return 2.0 + 3 * 65 * step

    def _cell(self, work: dict) -> float:
        case, hot_seconds = self.cases[work["name"]], 0.0
        imports = 0.0 if self.called else IMPORTS
        self.called.add("imports")
        total = imports + self._oracle(case)
        for name in work["methods"]:
            if name not in self.called:
                total += FIRST_CALL.get(name, 0.2)
                self.called.add(name)
            total += 3 * self._once(case, name, "hot")
            hot_seconds += self._once(case, name, "hot")
        least, most, seconds = HOT
        total += hot_seconds * (1 + max(least, min(most, int(seconds / hot_seconds))))
        cool = sum(PAUSE + self._once(case, name, "cool") for name in work["cool"])
        return total + COOL_ROUNDS * cool

    def _once(self, case: Case, name: str, kind: str) -> float:
        """Seconds of a call, by the predictions; those of `UNPREDICTED` where there is none."""
        methods = self.predicted[case.name]
        return methods.get(name, methods[UNPREDICTED])[kind] / 1e3

    def _oracle(self, case: Case) -> float:
        product = case.flops_per_product
        sampled = min(1.0, 1024 / case.rows) * 3 + min(1.0, 2048 / case.vocab) * 2
        return 1.0 + product / FLOAT32 + sampled * product / FLOAT64


def count_kernels(works: list[dict]) -> int:
    """Of the launches of these jobs, in a process without the interpreter."""
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu_worker.py"), "--list"],
        input=json.dumps(works),
        env={**surroundings(interpreted=False), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"gpu_worker.py --list: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["kernels"]


def imagine(
    steps: list[Step], memory: Memory, costs: Costs, seconds: float, renew: bool = False
) -> list[Event]:
    """A call of `gpu_run.py`: what it would do when."""
    clock = Clock()
    clock.now = START

    def prepare(job: Job, until: float) -> None:
        clock.now = min(until, clock.now + costs.start(job))

    def do(job: Job, deadline: float) -> None:
        needed, left = costs.of(job), deadline - clock.now
        clock.now += min(needed, left)
        if needed <= left:
            memory.put(job.kind, job.name, {"imagined": True})
        else:
            costs.warm = False  # it is killed
            memory.put_part(job.kind, job.name, {}, "late")

    return list(follow(steps, memory, do, clock, seconds - START, renew, prepare))


def by_minute(events: list[Event]) -> str:
    """A line a minute: the steps in it, and how many jobs of each began."""
    lines = ["| minute | what begins in it |", "|---|---|"]
    for minute in range(math.ceil(max((event.ended for event in events), default=0) / 60)):
        begun = Counter(e.step for e in events if minute <= e.began / 60 < minute + 1)
        what = ", ".join(f"{step} ({n})" if n > 1 else step for step, n in begun.items())
        lines.append(f"| {minute} - {minute + 1} | {what or 'the same'} |")
    return "\n".join(lines)


def by_step(events: list[Event], steps: list[Step], memory: Memory) -> str:
    lines = ["| step | from | to | done | late | left |", "|---|---|---|---|---|---|"]
    for step in steps:
        mine = [event for event in events if event.step == step.name]
        left = step.left(memory, False)
        late = [job for job in left if job.name in memory.data[job.kind]]
        first, last = (f"{x:.0f} s" for x in (mine[0].began, mine[-1].ended)) if mine else ("", "")
        done = len(step.jobs) - len(left)
        lines.append(
            f"| {step.name} | {first} | {last} | {done} of {len(step.jobs)} | {len(late)} | "
            f"{len(left)} |"
        )
    return "\n".join(lines)


def told(steps: list[Step], record: Record, seconds: float, renew: bool) -> str:
    """Two calls of so many seconds, each on a machine that holds nothing but the record."""
    memory = Memory(record)
    parts = ["A dry run: no figure here is measured."]
    for call in (1, 2):
        mine = ready(steps, memory, renew and call == 1)
        works = [work for step in mine for job in step.jobs for work in job.work.get("works", [])]
        kernels = count_kernels(works) if works else 0
        events = imagine(mine, memory, Costs(kernels), seconds, renew and call == 1)
        parts += [
            f"call {call}, {seconds / 60:g} minutes, {kernels} kernels to compile",
            by_minute(events),
            by_step(events, mine, memory),
        ]
    return "\n\n".join(parts)
