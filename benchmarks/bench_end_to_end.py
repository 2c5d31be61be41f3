"""A training step and annotation, end to end: tokens a second and peak memory.

    python benchmarks/bench_end_to_end.py [--model FOLDER] [--cells bar long real] [--rounds 5]
        [--minutes M] [--out benchmarks/results/cpu/end_to_end.json]
    pytest benchmarks/bench_end_to_end.py --benchmark-only

A training step is `trainer.training_step`: forward, DPO loss with the reference's log-probs from
the data, backward to all parameters; no optimizer. All methods compute the same loss, which is
checked before anything is timed, and take turns in one process. Peak memory is of a first step in a
process of its own, gradients included, weights not; on a GPU of this process.

    treg shared, unshared   TRegTrainer, share_prompt=True and False, padded rows
    treg packed ...         the same with packing and token_budget, all pairs in one row
    TRL                     DPOTrainer, padded; padding-free where it does that
    flash-pref              on a GPU, where it is installed
    bare forward + backward P + R_w + R_l tokens a pair in one causal row, without a mask, and the
                            three products of the head: the floor
    treg annotate           `treg.rewards.annotate`, rows to file; apart: share_prefix=False
    bare forwards           of as many tokens as it ran, see `end_to_end_annotate.py`

Cells: bar P 512, long P 1024, both R 128 + 128; real: lengths of UltraFeedback. Without a model a
Llama with random weights. Tokens a second are of 2P + R_w + R_l, whatever a method runs. The record
keeps what it has of other models. --minutes: cells and their two parts get equal parts of it, and
one round each in any case. On a CPU all threads are taken, or one where other work makes them no
faster; then the CPU's own time, beside the clock's, is the one to read. With several threads it
also counts how they wait for each other.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# this tree, whether or not one is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_look
import end_to_end_annotate as annotating
import end_to_end_steps as steps
import end_to_end_table as table
import torch
from cpu_plan import choose_threads
from end_to_end_cases import NAMES, SHAPE, Cell, Shape, cell_of, make_model, make_tokenizer
from loss_head_cases import DEVICE
from loss_head_measure import Alternation, environment, peak_bytes

HERE = Path(__file__).parent
PARTS = ("step", "annotate")
Say = Callable[[str], None]
say_now: Say = functools.partial(print, flush=True)


# -- one cell


def told(name: str, call: Callable[[], Any], say: Say) -> Callable[[], Any]:
    """A call that says how long it took."""

    def run() -> Any:
        began, ran = time.perf_counter(), time.process_time()
        result = call()
        took, of_cpu = time.perf_counter() - began, time.process_time() - ran
        say(f"    {name:<26} {took:8.2f} s {of_cpu:8.2f} s of CPU")
        return result

    return run


def in_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, seconds: float, say: Say
) -> Alternation:
    """So many rounds, or as many as there is time for, but one at least."""
    run = Alternation({name: told(name, call, say) for name, call in calls.items()})
    began = time.monotonic()
    for i in range(rounds):
        if i and (time.monotonic() - began) * (i + 1) / i > seconds:
            break
        say(f"  round {i + 1}")
        run.round()
    return run


def with_peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """What a call gives, and the most memory that it held, on a GPU: on a CPU a process of its own
    tells that.
    """
    if DEVICE == "cpu":
        return call(), None
    results: list[Any] = []
    held = peak_bytes(lambda: results.append(call()))
    return results[0], held


def measure_steps(
    cell: Cell,
    model: Any,
    tokenizer: Any,
    names: Iterable[str] = steps.NAMES,
    rounds: int = 5,
    seconds: float = math.inf,
    say: Say = say_now,
) -> dict[str, Any]:
    """The training steps of a cell: losses compared, then timed; see `end_to_end_table`."""
    began = time.monotonic()
    ready: dict[str, steps.Step] = {}
    first: dict[str, steps.First] = {}
    missing: dict[str, str] = {}
    held: dict[str, int | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                step = steps.step_of(name, cell, model, tokenizer, folder)
                model.zero_grad(set_to_none=True)
                call = told(name, functools.partial(steps.first_call, step), say)
                first[name], held[name] = with_peak(call)
            except steps.Missing as error:
                missing[name] = str(error)
            except (RuntimeError, ImportError) as error:
                if name.startswith("treg"):
                    raise
                missing[name] = f"{type(error).__name__}: {error}"[:200]
            if name in missing:
                say(f"    {name:<26} not measured: {missing[name]}")
                continue
            ready[name] = step
        steps.check_same(first)
        losses = [x.loss for x in first.values() if x.loss is not None]
        say(f"  losses {min(losses):.6f} to {max(losses):.6f}: the same")
        calls = {name: step.run for name, step in ready.items()}
        run = in_turns(calls, rounds, seconds - (time.monotonic() - began), say)
    model.zero_grad(set_to_none=True)
    tokens = {name: x.tokens for name, x in first.items()}
    found = table.methods_of(run, tokens, cell.counted, ("treg unshared", steps.FLOOR))
    for name, x in first.items():
        found[name] |= {"loss": x.loss, "gradient_norm": x.gradient_norm}
        found[name]["peak_extra_bytes"] = held[name]
    found |= {name: {"missing": why} for name, why in missing.items()}
    return {"rounds": len(run.seconds[next(iter(calls))]), "methods": found}


def measure_annotation(
    annotation: annotating.Annotation,
    rounds: int = 5,
    seconds: float = math.inf,
    say: Say = say_now,
) -> dict[str, Any]:
    """Annotation of a cell's rows, in turns with its floor."""
    began = time.monotonic()
    tokens: dict[str, int] = {}
    held: dict[str, int | None] = {}
    for name in annotating.NAMES:
        call = told(name, functools.partial(annotation.first_call, name), say)
        tokens[name], held[name] = with_peak(call)
    calls = {name: annotation.call(name) for name in annotating.NAMES}
    run = in_turns(calls, rounds, seconds - (time.monotonic() - began), say)
    against = (annotating.APART, annotating.FORWARDS)
    found = table.methods_of(run, tokens, annotation.counted, against)
    for name, bytes_held in held.items():
        found[name]["peak_extra_bytes"] = bytes_held
    return {
        "rounds": len(run.seconds[annotating.SHARED]),
        "lengths": annotation.lengths,
        "methods": found,
    }


# -- peak memory, each method in a process of its own


def peak_of(name: str, args: argparse.Namespace) -> dict[str, int | None]:
    """Of each cell, what a method's first call holds beyond the weights, on a CPU."""
    source = source_of(args)
    model, tokenizer = make_model(source), make_tokenizer(source)
    found = {}
    for cell in cells_of(args):
        if name in annotating.NAMES:
            held = annotation_of(cell, model, tokenizer, args)
            found[cell.name] = peak_bytes(held.call(name))
            continue
        with tempfile.TemporaryDirectory() as folder:
            step = steps.step_of(name, cell, model, tokenizer, folder)
            model.zero_grad(set_to_none=True)
            found[cell.name] = peak_bytes(step.run)
    return found


def measure_peaks(found: dict[str, Any], argv: Sequence[str], say: Say = say_now) -> None:
    """Adds to a record the peaks of what it has times of; argv: the options of this run."""
    names = {
        name
        for cell in found["cells"].values()
        for part in PARTS
        for name, method in cell.get(part, {"methods": {}})["methods"].items()
        if "missing" not in method and name != annotating.FORWARDS
    }
    say("peak memory, each method in a process of its own")
    for name in [x for x in (*steps.NAMES, *annotating.NAMES) if x in names]:
        command = [sys.executable, __file__, *argv, "--peak", name]
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            end = done.stderr.strip().rpartition("\n")[2]
            say(f"    {name:<26} failed with exit code {done.returncode}: {end}")
            continue
        for cell, held in json.loads(done.stdout.splitlines()[-1]).items():
            for part in PARTS:
                method = found["cells"][cell].get(part, {"methods": {}})["methods"].get(name)
                if method is not None:
                    method["peak_extra_bytes"] = held
                    what = "not known" if held is None else f"{held / 2**20:8.0f} MiB"
                    say(f"    {name:<26} {what} {cell}")


# -- a look at it

LOOK = ("treg unshared", "treg shared", steps.FLOOR)
LOOK_SHAPE = Shape(hidden=256, layers=4, heads=4, vocab=8000)


def test_step(benchmark, capsys):
    """Of one pair, the prompt run once, and twice."""
    prompt, answer, rounds = 512, 128, 5
    if DEVICE == "cpu":
        prompt, answer = cpu_look.size_or_skip(cpu_look.session(), "end_to_end")
        rounds = 1
    cell = Cell(f"P {prompt}, R {answer} + {answer}", ((prompt, answer, answer),))
    model, tokenizer = make_model(LOOK_SHAPE), make_tokenizer(LOOK_SHAPE)
    with capsys.disabled():
        say_now(f"\ntraining step, end to end: {cell.name}")
        call = functools.partial(measure_steps, cell, model, tokenizer, LOOK, rounds)
        found = benchmark.pedantic(call, rounds=1)["methods"]
    benchmark.extra_info.update(environment(), cell=cell.name, methods=found)
    if DEVICE == "cpu":
        ours, unshared, floor = (found[x] for x in ("treg shared", *LOOK[::2]))
        share = ours["tokens"] / unshared["tokens"]
        over, over_floor = (ours["seconds"] / x["seconds"] for x in (unshared, floor))
        cpu_look.session().notes.append(
            f"training step, {cell.name}, prompt run once: {over:.2f} of the time without, with "
            f"{share:.2f} of its tokens; {over_floor:.2f} of a bare forward + backward; one round"
        )


# -- a run


def source_of(args: argparse.Namespace) -> str | Shape:
    if args.model is not None:
        return args.model
    return Shape(args.hidden, args.layers, args.heads, args.vocab, SHAPE.positions)


def name_of(source: str | Shape) -> str:
    if isinstance(source, str):
        return Path(source).name
    x = source
    return f"Llama, {x.layers} layers, D {x.hidden}, V {x.vocab}, random weights"


def cells_of(args: argparse.Namespace) -> list[Cell]:
    return [cell_of(NAMES[name], args.pairs, args.real_pairs) for name in args.cells]


def annotation_of(
    cell: Cell, model: Any, tokenizer: Any, args: argparse.Namespace
) -> annotating.Annotation:
    count = max(args.annotate_pairs, len(cell.pairs))
    return annotating.Annotation(cell, model, tokenizer, count, args.model is not None)


def measure(args: argparse.Namespace, argv: Sequence[str], keep: Say, say: Say = say_now) -> dict:
    """All cells of a model; keep is called with the record after each part."""
    source = source_of(args)
    model, tokenizer = make_model(source), make_tokenizer(source)
    found: dict[str, Any] = {
        "environment": environment(),
        "dtype": str(model.dtype).partition(".")[2],
        "parameters": sum(x.numel() for x in model.parameters()),
        "load_average": [os.getloadavg()[0]],
        "cells": {},
    }
    seconds = 60 * args.minutes / (len(args.cells) * len(args.parts))
    for cell in cells_of(args):
        found["cells"][cell.name] = now = {
            "lengths": cell.pairs,
            "tokens": {"counted": cell.counted, "needed": cell.needed, "padded": cell.padded},
        }
        say(f"{cell.name}: {len(cell.pairs)} pairs, {now['tokens']}")
        if "step" in args.parts:
            say("  training step, first calls")
            now["step"] = measure_steps(
                *(cell, model, tokenizer, args.methods, args.rounds, seconds, say)
            )
            keep(found)
        if "annotate" in args.parts:
            annotation = annotation_of(cell, model, tokenizer, args)
            say(f"  annotation of {len(annotation.rows)} rows, first calls")
            now["annotate"] = measure_annotation(annotation, args.rounds, seconds, say)
            keep(found)
        found["load_average"].append(os.getloadavg()[0])
        say("\n".join(table.of_cell(cell.name, now)))
    if DEVICE == "cpu" and not args.no_memory:
        measure_peaks(found, argv, say)
        keep(found)
    return found


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    gpu = DEVICE == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder of a model; random weights by default")
    add("--cells", nargs="+", choices=NAMES, default=[*NAMES])
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    add("--methods", nargs="+", choices=steps.NAMES, default=[*steps.NAMES])
    add("--pairs", type=int, default=8 if gpu else 1, help="of cells whose pairs are alike")
    add("--real_pairs", type=int, default=32 if gpu else 4)
    add("--annotate_pairs", type=int, default=64 if gpu else 4, help="rows to annotate, at least")
    for name in ("hidden", "layers", "heads", "vocab"):
        add(f"--{name}", type=int, default=getattr(SHAPE, name), help="of random weights")
    add("--rounds", type=int, default=5)
    add("--minutes", type=float, default=math.inf, help="without memory")
    add("--threads", type=int, help="of a CPU; by default all, or one where that is as fast")
    add("--no_memory", action="store_true", help="leave peak memory out")
    add("--peak", choices=(*steps.NAMES, *annotating.NAMES), help=argparse.SUPPRESS)
    folder = "gpu" if gpu else "cpu"
    add("--out", type=Path, default=HERE / "results" / folder / "end_to_end.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parsed(argv)
    if DEVICE == "cpu":
        choose_threads() if args.threads is None else torch.set_num_threads(args.threads)
    if args.peak is not None:
        print(json.dumps(peak_of(args.peak, args)))
        return
    record = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    name = name_of(source_of(args))
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(found: dict[str, Any]) -> None:
        record["models"][name] = found
        args.out.write_text(json.dumps(record, indent=1) + "\n")

    found = measure(args, argv, keep)
    print("\n".join(table.page(name, found)))
    import plots

    plots.end_to_end(record, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
