"""Online RL with credit for tokens, where it is known which tokens are wrong: a quarter of an hour
at most on two cores.

    python examples/online/run.py [--methods sequence RED] [--seeds 0 1 2 3 4] [--steps 40]
        [--learning_rate 1e-4] [--output online-run/online.json] [--processes 2] [--quick]

The policy is the demo's chat model, which knows invented towns, and errs (`treg.demo.world`). A
reward model of the same size is trained on pairs of answers about the training towns. Then GRPO
trains the policy on questions about these towns, by every method of `online_train.METHODS`, with
the same seeds, samples and steps; answers to questions about other towns are checked against the
table.

Every finished run is in the output at once. The same command again trains what is missing. Needs
the extras `train` and `trl`. What was expected, and what came out: examples/online/README.md.
"""

import argparse
import math
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import online_task as task
import online_train as online

from treg.demo.records import Record, cell, environment

MEASURES = ("wrong facts", "malformed", "facts an answer", "tokens", "worth", "seconds")
SHARES = ("wrong facts", "malformed")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
QUICK = {"steps": 2, "prompts": 2, "generations": 2, "every": 1, "samples": 1}
QUICK_REWARD = {"steps": 4, "pairs": 4, "single": 2}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """All that changes a row but its method and its seed."""
    training = online.Settings(steps=args.steps, learning_rate=args.learning_rate)
    judges = online.JUDGES
    if args.quick:
        training = replace(training, **QUICK)
        judges = {name: replace(x, **QUICK_REWARD) for name, x in judges.items()}
    return {
        "training": asdict(training),
        "reward models": {name: asdict(x) for name, x in judges.items()},
        "methods": {name: asdict(online.METHODS[name]) for name in args.methods},
    }


class Study:
    """What the record does not have, trained by processes side by side."""

    def __init__(self, args: argparse.Namespace, record: Record, scratch: Path):
        self.args, self.record, self.scratch = args, record, scratch
        settings = record.content["settings"]
        self.training = online.Settings(**settings["training"])
        self.folders = {
            name: str(args.output.parent / f"{args.output.stem}-{name.replace(' ', '-')}")
            for name in online.JUDGES
        }
        self.todo = [
            (name, seed)
            for seed in dict.fromkeys(args.seeds)
            for name in dict.fromkeys(args.methods)
            if not record.has(method=name, seed=seed)
        ]

    def run(self) -> None:
        say(f"{len(self.todo)} runs of {self.training.steps} steps")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.start, self.done = time.perf_counter(), 0
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.args.processes, context, online.quiet) as pool:
            ready, waiting = self._by_judge()
            # runs that need no reward model fill the time of its training
            judging = {self._submit_judge(pool, name): name for name in waiting}
            pending = {*judging, *(self._submit(pool, *x) for x in ready)}
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    if future in judging:
                        name = judging[future]
                        self._judged(name, future.result())
                        pending |= {self._submit(pool, *x) for x in waiting[name]}
                    else:
                        self._trained(future.result())

    def _by_judge(self) -> tuple[list[tuple[str, int]], dict[str, list[tuple[str, int]]]]:
        """Runs that can start, and those that wait for a reward model."""
        ready: list[tuple[str, int]] = []
        waiting: dict[str, list[tuple[str, int]]] = {}
        for run in self.todo:
            needed = online.judges_of(asdict(online.METHODS[run[0]]))
            missing = [x for x in needed if x not in self._judges()]
            missing += [x for x in needed if not Path(self.folders[x]).exists()]
            if missing:
                waiting.setdefault(missing[0], []).append(run)
            else:
                ready.append(run)
        return ready, waiting

    def _judges(self) -> dict[str, Any]:
        """What is known of each reward model that is trained."""
        return self.record.content.setdefault("reward models", {})

    def _submit(self, pool: ProcessPoolExecutor, name: str, seed: int) -> Any:
        folder = self.scratch / f"{list(online.METHODS).index(name)}-{seed}"
        return pool.submit(online.train, name, seed, self.training, folder, self.folders)

    def _submit_judge(self, pool: ProcessPoolExecutor, name: str) -> Any:
        settings = self.record.content["settings"]["reward models"][name]
        return pool.submit(
            task.train_reward_model, Path(self.folders[name]), task.RewardSettings(**settings)
        )

    def _judged(self, name: str, measured: dict[str, float]) -> None:
        self._judges()[name] = measured
        self.record.write()
        say(f"{name}: {', '.join(f'{what} {x:.3g}' for what, x in measured.items())}")

    def _trained(self, row: dict[str, Any]) -> None:
        self.done += 1
        self.record.take(row)
        shown = ", ".join(f"{x} {row[x]:.3f}" for x in MEASURES)
        say(
            f"{self.done}/{len(self.todo)} {row['method']}, seed {row['seed']}: {shown}; "
            f"{time.perf_counter() - self.start:.0f} s so far"
        )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each method, the mean over its seeds and half the width of its 95 %
    interval. The last column is the difference of wrong facts from "sequence", seed by seed.
    """
    before = {x["seed"]: x["curve"][0] for x in rows}
    sequence = {x["seed"]: x["wrong facts"] for x in rows if x["method"] == "sequence"}
    lines = [f"| | {' | '.join(MEASURES)} | wrong facts - sequence's |"]
    lines.append("|---" * (len(MEASURES) + 2) + "|")
    methods: dict[str, list[Mapping[str, Any]]] = {"before": list(before.values())}
    for name in online.METHODS:
        methods[name] = [x for x in rows if x["method"] == name]
    for name, found in methods.items():
        if not found:
            continue
        cells = [name]
        for measure in MEASURES:
            values = [x[measure] for x in found if measure in x]
            cells.append(cell(values, percent=measure in SHARES))
        apart = [x["wrong facts"] - sequence[x["seed"]] for x in found if x.get("seed") in sequence]
        cells.append("" if name == "sequence" else cell(apart, percent=True, sign="+"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = online.Settings()
    parser.add_argument("--methods", nargs="+", choices=online.METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4")
    parser.add_argument("--steps", type=int, default=known.steps)
    parser.add_argument("--learning_rate", type=float, default=known.learning_rate)
    parser.add_argument("--output", type=Path, help="default: online-run/online.json")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument(
        "--quick", action="store_true", help="two steps of two methods: whether it runs at all"
    )
    args = parser.parse_args(given)
    name = "quick.json" if args.quick else "online.json"
    args.output = args.output or Path("online-run", name)
    planned = [x for x in online.METHODS if x not in online.FOLLOW_UPS]
    args.methods = args.methods or (["sequence", "RED"] if args.quick else planned)
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2, 3, 4])
    for name in ("steps", "processes", "learning_rate"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            parser.error(f"{name}: expected a positive number, got {value}")
    return args


def main() -> None:
    args = arguments()
    online.quiet()
    start = time.perf_counter()
    record = Record(args.output, settings_of(args))
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(args, record, Path(scratch))
        if study.todo:
            record.began(shlex.join(["python", *sys.argv]), environment(args.processes, PACKAGES))
            study.run()
            record.content["seconds"] = record.content.get("seconds", 0.0) + (
                time.perf_counter() - start
            )
            record.write()
    say(f"\n{table(record.rows)}\n\nrecord: {args.output}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
