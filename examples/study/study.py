"""T-REG against DPO and others where it is known which facts are wrong, and surprise does not tell.

    python examples/study/study.py [--slices main alpha noise] [--methods DPO DPO-REG]
        [--seeds 0 1 2] [--output study-run/study.json] [--processes 2] [--quick | --large]

The policy is the demo's chat model, which says what is rumoured of invented towns
(`treg.demo.rumours`). Every method starts from it, sees the same pairs in the same order, and takes
as many steps; a seed changes the pairs, their order and the samples. What is measured is about
towns that no pair was about.

Every finished run is in the output at once, tables and pictures beside it at the end. The same
command again trains what is missing. The slice `main` takes less than 20 minutes on two cores;
--large is meant for a GPU. Needs the extra
`train`. What was expected, and what came out: examples/study/README.md.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import study_train as runs
from study_methods import JUDGE, METHODS, SIGNALS, SLICES
from study_picture import draw_all

from treg.demo.records import Record, cell, environment

# measures of the table, and whether they are shares
MEASURES = {
    "wrong facts": True,
    "rumours": True,
    "malformed": True,
    "ranked right": True,
    "against decoys": True,
    "tokens": False,
    "ornate": True,
    "KL": False,
    "good": False,
    "bad": False,
}
PACKAGES = ("torch", "transformers", "accelerate")


def baseline_of(name: str) -> str:
    """The method that another one is compared with: the same loss and noise without its signal."""
    loss = "SimPO" if name.startswith("SimPO") else "DPO"
    _, comma, noise = name.partition(", noise")
    return f"{loss}{comma}{noise}" if comma else loss


class Study:
    """What the record does not have, trained by processes side by side."""

    def __init__(self, args: argparse.Namespace, record: Record, settings: runs.Settings):
        self.args, self.record, self.settings = args, record, settings
        self.folder = args.output.with_suffix("")
        self.todo = [
            (name, seed)
            for seed in dict.fromkeys(args.seeds)
            for name in ("before", *args.methods)
            if not record.has(method=name, seed=seed)
        ]
        self.done = 0

    def run(self) -> None:
        say(f"{len(self.todo)} runs")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.start = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.args.processes, context) as pool:
            self.pool = pool
            # what a job makes, and who waits for it
            jobs: dict[Future, tuple] = {}
            wants = {self._signal(name) for name, _ in self.todo}
            judging = any(JUDGE in SIGNALS[x].options.values() for x in wants)
            if judging and "judge" not in self.record.content:
                jobs[self._submit(runs.prepare_judge)] = ("judge",)
            for seed in dict.fromkeys(seed for _, seed in self.todo):
                self._prepare(jobs, seed, judge=False)
            waiting = list(dict.fromkeys(seed for _, seed in self.todo))
            ready = "judge" in self.record.content
            if ready:
                for seed in waiting:
                    self._prepare(jobs, seed, judge=True)
            while jobs:
                finished, _ = wait(jobs, return_when=FIRST_COMPLETED)
                for future in finished:
                    kind, *about = jobs.pop(future)
                    if kind == "judge":
                        self._judged(future.result())
                        for seed in waiting:
                            self._prepare(jobs, seed, judge=True)
                    elif kind == "signals":
                        self._annotated(about[0], future.result())
                        for name, seed in self._runs(*about):
                            jobs[self._submit(runs.run_once, name, seed)] = ("run",)
                    else:
                        self._trained(future.result())

    def _submit(self, function: Any, *given: Any) -> Future:
        return self.pool.submit(function, self.settings, self.folder, *given)

    def _signal(self, name: str) -> str:
        return METHODS[name].signal if name in METHODS else "none"

    def _runs(self, seed: int, judge: bool) -> list[tuple[str, int]]:
        """Runs of a seed whose signal needs the judge, or those whose signal does not."""
        found = []
        for name, own in self.todo:
            needs = JUDGE in SIGNALS[self._signal(name)].options.values()
            if own == seed and needs == judge:
                found.append((name, own))
        return found

    def _prepare(self, jobs: dict[Future, tuple], seed: int, *, judge: bool) -> None:
        """The token rewards of a seed, before its runs."""
        signals = list(dict.fromkeys(self._signal(name) for name, _ in self._runs(seed, judge)))
        if "own" in signals and "none" not in signals:
            signals.insert(0, "none")  # its DPO model is trained without
        if signals:
            signals.sort(key=lambda x: x != "none")
            jobs[self._submit(runs.prepare, seed, signals)] = ("signals", seed, judge)

    def _judged(self, measured: dict[str, float]) -> None:
        self.record.content["judge"] = measured
        self.record.write()
        say(f"judge: {', '.join(f'{what} {x:.3g}' for what, x in measured.items())}")

    def _annotated(self, seed: int, found: dict[str, Any]) -> None:
        kept = self.record.content.setdefault("signals", {}).setdefault(str(seed), {})
        for name, aurocs in found.items():
            kept[name] = {what: round(x, 4) for what, x in aurocs.items()}
        self.record.write()

    def _trained(self, row: dict[str, Any]) -> None:
        self.done += 1
        self.record.take(row)
        shown = ", ".join(f"{x} {row[x]:.3f}" for x in ("wrong facts", "tokens", "KL"))
        say(
            f"{self.done}/{len(self.todo)} {row['method']}, seed {row['seed']}: {shown}; "
            f"{time.perf_counter() - self.start:.0f} s so far"
        )


def table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    """Markdown: a row for each method, the mean over its seeds and half the width of its 95 %
    interval. The last column is the difference of wrong facts from `baseline_of`, seed by seed.
    """
    wrong = {(x["method"], x["seed"]): x["wrong facts"] for x in rows}
    lines = [f"| | {' | '.join(MEASURES)} | wrong facts - baseline's |"]
    lines.append("|---" * (len(MEASURES) + 2) + "|")
    for name in ("before", *methods):
        found = [x for x in rows if x["method"] == name]
        if not found:
            continue
        cells = [name]
        for measure, share in MEASURES.items():
            cells.append(cell([x[measure] for x in found if measure in x], percent=share))
        base = baseline_of(name)
        apart = []
        if name not in ("before", base):
            for x in found:
                if (base, x["seed"]) in wrong:
                    apart.append(x["wrong facts"] - wrong[base, x["seed"]])
        cells.append(cell(apart, percent=True, sign="+"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def detectors(content: Mapping[str, Any]) -> str:
    """Markdown: AUROC of each signal as a detector of wrong facts, over the seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for signals in content.get("signals", {}).values():
        for name, aurocs in signals.items():
            for what, x in aurocs.items():
                found.setdefault(name, {}).setdefault(what, []).append(x)
    if not found:
        return ""
    columns = list(next(iter(found.values())))
    lines = [f"| AUROC | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, aurocs in found.items():
        lines.append(f"| {name} | {' | '.join(cell(aurocs[x]) for x in columns)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def settings_of(args: argparse.Namespace) -> runs.Settings:
    settings = runs.Settings()
    if args.rates:
        settings = replace(settings, rates=settings.rates | args.rates)
    if args.quick:
        settings = runs.quick(settings)
    elif args.large:
        settings = runs.large(settings)
    return replace(settings, judge_steps=args.judge_steps or settings.judge_steps)


def _rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in runs.Settings().rates:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text}")
    return name, float(value)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--slices", nargs="+", choices=SLICES, default=["main"])
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help="instead of slices")
    add("--seeds", nargs="+", type=int, help="default: 0 to 4; with --large 0 to 19")
    add("--rates", nargs="+", type=_rate, metavar="NAME=NUMBER", help="learning rates")
    add("--judge_steps", type=int, help="of the reward model's training")
    add("--output", type=Path, help="default: study-run/study.json")
    add("--processes", type=int, default=2, help="of one thread each")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="whether it runs at all")
    size.add_argument("--large", action="store_true", help="more pairs, steps and seeds")
    add("--table", action="store_true", help="print the tables of the output and train nothing")
    args = parser.parse_args(given)
    args.rates = dict(args.rates or ())
    name = "quick" if args.quick else "large" if args.large else "study"
    args.output = args.output or Path("study-run", f"{name}.json")
    if args.methods is None:
        args.methods = [name for part in args.slices for name in SLICES[part]]
        if args.quick:
            args.methods = ["DPO", "DPO-REG", "RED"]
    if args.seeds is None:
        args.seeds = [0] if args.quick else list(range(20 if args.large else 5))
    if args.output.suffix != ".json":  # runs are in a folder of the name without it
        parser.error(f"output: expected a file that ends in .json, got {args.output}")
    if args.table and not args.output.exists():
        parser.error(f"output: expected a record for --table, found none: {args.output}")
    for name in ("processes", "judge_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"{name}: expected a positive integer, got {value}")
    return args


def main() -> None:
    args = arguments()
    runs.quiet()
    start = time.perf_counter()
    settings = settings_of(args)
    methods = {name: asdict(METHODS[name]) for name in args.methods}
    signals = {name: asdict(x) for name, x in SIGNALS.items()}
    made_with = {"training": asdict(settings), "signals": signals, "methods": methods}
    try:
        record = Record(args.output, made_with)
    except ValueError as error:  # what is wrong with the file, without the lines of code
        raise SystemExit(f"study.py: error: {error}") from None
    work = Study(args, record, settings)
    if work.todo and not args.table:
        record.began(shlex.join(["python", *sys.argv]), environment(args.processes, PACKAGES))
        work.run()
        seconds = record.content.get("seconds", 0.0) + time.perf_counter() - start
        record.content["seconds"] = round(seconds, 1)
        record.write()
    tables = f"{table(record.rows, list(METHODS))}\n\n{detectors(record.content)}\n"
    say(f"\n{tables}")
    if record.rows and not args.table:
        args.output.with_suffix(".md").write_text(tables)
        pictures = draw_all(record.rows, args.output.parent, args.output.stem)
        say(f"pictures: {', '.join(map(str, pictures))}")
    say(f"record: {args.output}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
