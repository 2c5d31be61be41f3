"""Runs that are killed anywhere, and files that are damaged anywhere.

python tests/support/stress.py kills --count 60 --folder FOLDER
python tests/support/stress.py damages --count 200 --folder FOLDER

`kills`: `treg annotate` and `treg train` on the demo's model die of SIGKILL, at a random time or at
a random one of the moments at which they open, rename or remove a file, and are started again, up
to four times; then the same command ends, and what it leaves must have the bytes of a run that was
never killed, after exactly the steps that were asked for.

`damages`: a bit flips, or a file is cut, emptied, deleted or another run's, among the parts of an
annotation, annotated files, checkpoints and finished runs. What is run on it must refuse the file
by name, or give the same bytes as without the damage.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import undrawn

import treg.cli.annotate  # once, for all processes
import treg.cli.train
import treg.rewards.annotate
from treg.cli import main
from treg.data.annotated import read_annotated
from treg.demo import world
from treg.demo.world import MODEL

PAIRS, OTHER_SEED = 20, 5
PART_PAIRS = 8  # so that there are three
ROUNDS = 4  # kills of one run


@dataclass(frozen=True)
class Job:
    """command: of an output folder. made: what it leaves; steps: those of training."""

    command: Callable[[Path], list]
    made: tuple[str, ...]
    steps: int | None = None


def prepare(folder: Path) -> None:
    """Rows, the same of another seed, and annotated ones."""
    treg.rewards.annotate.PART_PAIRS = PART_PAIRS
    treg.cli.train.plot_curves = undrawn.plot_curves
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in (("prefs", 0), ("others", OTHER_SEED)):
        rows = world.preference_rows(seed, PAIRS, "train")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    forked(lambda: quietly(annotate(folder, "prefs")(folder / "whole")))


def forked(function: Callable[[], tuple[int, str]]) -> None:
    """function() in a process of its own, so that this one has no threads of PyTorch, which a
    process that is forked from it could not use.
    """
    process = os.fork()
    if process == 0:
        code = 70
        try:
            code, said = function()
            print(said if code else "", end="")
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    assert status == 0


def annotate(folder: Path, data: str) -> Callable[[Path], list]:
    return lambda out: [
        *("annotate", "--model", MODEL, "--data", folder / f"{data}.jsonl"),
        *("--output", out / "a.parquet", "--dtype", "float32", "--max_length", 256),
    ]


def train(data: Path | list[Path], *more: str) -> Callable[[Path], list]:
    several = data if isinstance(data, list) else [data]
    return lambda out: [
        *("train", "--model", MODEL, "--data", *several, "--output_dir", out, "--use_cpu", "True"),
        *("--per_device_train_batch_size", 2, "--learning_rate", 1e-4, "--report_to", "none"),
        *("--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", 2),
        *("--disable_tqdm", "True", "--logging_steps", 1, "--max_length", 256, *more),
    ]


def jobs(folder: Path) -> dict[str, Job]:
    whole = folder / "whole" / "a.parquet"
    few = [folder / "few.jsonl", folder / "fewer.jsonl"]  # half of 4 and twice 2: 6 pairs
    for file, name, rows in zip(few, ("prefs", "others"), (4, 2), strict=True):
        lines = (folder / f"{name}.jsonl").read_text().splitlines(True)
        file.write_text("".join(lines[:rows]))
    weighted = ("--num_train_epochs", "1.5", "--data_weights", "0.5", "2")
    model = ("model.safetensors",)
    annotated = ("annotated-1.parquet", "annotated-2.parquet")
    return {
        "annotate": Job(annotate(folder, "prefs"), ("a.parquet",)),
        "max_steps": Job(train(whole, "--max_steps", "5"), model, 5),
        "epochs": Job(train(few, *weighted), (*model, *annotated), 5),
        "one checkpoint": Job(
            train(whole, "--max_steps", "3", "--save_total_limit", "1"), model, 3
        ),
    }


def quietly(command: list) -> tuple[int, str]:
    """The exit code of a command in this process, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(list(map(str, command)))
    return code, said.getvalue()


# -- kills
# -


def child(command: list, out: Path, at: int | None, delay: float | None) -> int:
    """The exit code of a command in a process of its own; negative: killed.

    at: killed before the at-th time that it opens, renames or removes a file in out. delay: after
    so many seconds.
    """
    process = os.fork()
    if process == 0:
        os.setsid()
        if at is not None:
            kill_at(at, out)
        code = 70
        try:
            code, said = quietly(command)
            (out.parent / "said.txt").write_text(said)
        finally:
            os._exit(code)
    if delay is not None:
        timer = threading.Timer(delay, os.kill, (process, signal.SIGKILL))
        timer.start()
    _, status = os.waitpid(process, 0)
    if delay is not None:
        timer.cancel()
    return os.waitstatus_to_exitcode(status)


def kill_at(at: int, out: Path) -> None:
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if str(args[0]).startswith(str(out)):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def events_of(command: list, out: Path) -> tuple[int, float]:
    """How often a whole run opens, renames or removes a file in out, and its seconds."""
    count = out.parent / "count"
    process = os.fork()
    if process == 0:
        number = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal number
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                number += str(args[0]).startswith(str(out))

        sys.addaudithook(hook)
        code, said = quietly(command)
        count.write_text(str(number))
        (out.parent / "said.txt").write_text(said)
        os._exit(code)
    start = time.monotonic()
    _, status = os.waitpid(process, 0)
    assert status == 0, (out.parent / "said.txt").read_text()
    return int(count.read_text()), time.monotonic() - start


def wrong_after(job: Job, out: Path, whole: Path) -> list[str]:
    """What differs from the run that was never killed."""
    found = [x for x in job.made if (out / x).read_bytes() != (whole / x).read_bytes()]
    if job.steps is not None:
        steps = json.loads((out / "trainer_state.json").read_text())["global_step"]
        if steps != job.steps:
            found.append(f"{steps} steps of {job.steps}")
    found += [x.name for x in out.glob("*.tmp")]
    return found


def kills(folder: Path, count: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many processes were killed, and what was wrong in the end."""
    prepare(folder)
    generator, wrong, killed = random.Random(seed), [], 0
    sizes = {}
    for name, job in jobs(folder).items():
        whole = folder / "kills" / name / "whole"
        whole.mkdir(parents=True)
        sizes[name] = events_of(job.command(whole), whole)
    number = 0
    while killed < count:
        name, job = list(jobs(folder).items())[number % len(sizes)]
        out = folder / "kills" / name / f"run-{number}"
        out.mkdir()
        for _ in range(min(ROUNDS, count - killed)):
            events, seconds = sizes[name]
            by_time = generator.random() < 0.4
            at = None if by_time else 1 + int(generator.random() * events)
            delay = generator.random() * seconds if by_time else None
            code = child(job.command(out), out, at, delay)
            killed += code < 0
            if code >= 0:  # it ended before
                break
        code = child(job.command(out), out, None, None)
        said = (out.parent / "said.txt").read_text()
        whole = out.parent / "whole"
        problems = wrong_after(job, out, whole) if code == 0 else [f"exit {code}: {said}"]
        wrong += [f"{name} {number}: {x}" for x in problems]
        print(f"{killed} kills, {name}: {problems or 'the same bytes'}", flush=True)
        number += 1
    return killed, wrong


# -- damages
# -


def flip(file: Path, generator: random.Random, _: Path) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(data)


def cut(file: Path, generator: random.Random, _: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: generator.randrange(max(1, len(data)))])


def replace(file: Path, _: random.Random, other: Path) -> None:
    if other.is_file():
        shutil.copy(other, file)


DAMAGES = {
    "flipped": flip,
    "cut": cut,
    "emptied": lambda file, *_: file.write_bytes(b""),
    "deleted": lambda file, *_: file.unlink(),
    "another run's": replace,
}
WEIGHTS_OF_DAMAGES = (5, 2, 1, 1, 2)


@dataclass(frozen=True)
class State:
    """A folder that something goes on from. other: the same of another run. run: what is done with
    a copy of it, giving the exit code, what was said, and what was made.
    """

    folder: Path
    other: Path
    files: tuple[str, ...]
    run: Callable[[Path], tuple[int, str, object]]


def states(folder: Path) -> dict[str, State]:
    """Parts of an annotation, annotated files, runs before their end and after it."""
    made = folder / "states"
    whole = folder / "whole" / "a.parquet"
    for name, data in (("one", "prefs"), ("two", "others")):
        stop_before_merge(annotate(folder, data)(made / name / "parts"))
    forked(lambda: quietly(annotate(folder, "others")(made / "two")))
    for name, source in (("one", whole), ("two", made / "two" / "a.parquet")):
        command = train(source, "--max_steps", "5")(made / name / "run")
        forked(lambda command=command: quietly(command))
        shutil.copytree(made / name / "run", made / name / "stopped")
        for file in ("treg_files.json", "model.safetensors", "trainer_state.json"):
            (made / name / "stopped" / file).unlink()
    (made / "one" / "data").mkdir()
    shutil.copy(whole, made / "one" / "data")
    (made / "two" / "data").mkdir()
    shutil.copy(made / "two" / "a.parquet", made / "two" / "data")

    def annotated(out: Path) -> tuple[int, str, object]:
        code, said = quietly(annotate(folder, "prefs")(out))
        return code, said, code or (out / "a.parquet").read_bytes()

    def read(out: Path) -> tuple[int, str, object]:
        try:
            examples, meta = read_annotated(out / "a.parquet")
        except (OSError, ValueError) as error:
            return 2, str(error), None
        numbers = [[getattr(v, "tolist", lambda v=v: v)() for v in x.values()] for x in examples]
        return 0, "", (numbers, meta)

    def trained(out: Path) -> tuple[int, str, object]:
        code, said = quietly(train(whole, "--max_steps", "5")(out))
        return code, said, code or (out / "model.safetensors").read_bytes()

    checkpoints = ("checkpoint-4/*", "checkpoint-5/*", "treg_run.json")
    found = {
        "parts": ("parts", ("a.parquet.parts/*",), annotated),
        "data": ("data", ("a.parquet",), read),
        "checkpoints": ("stopped", checkpoints, trained),
        "finished": ("run", ("*.safetensors", "*.json"), trained),
    }
    return {
        name: State(made / "one" / part, made / "two" / part, files, run)
        for name, (part, files, run) in found.items()
    }


def stop_before_merge(command: list) -> None:
    """An annotation whose parts are all there, and no output."""
    out = Path(command[command.index("--output") + 1])
    out.parent.mkdir(parents=True)
    process = os.fork()
    if process == 0:
        treg.rewards.annotate.merge_annotated = lambda *_: os._exit(9)
        quietly(command)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def damages(folder: Path, count: int, seed: int = 0) -> tuple[collections.Counter, list[str]]:
    """How each ended, and what nobody was told of."""
    prepare(folder)
    generator, ends, silent = random.Random(seed), collections.Counter(), []
    known = states(folder)
    expected = {}
    for name, state in known.items():
        copied = shutil.copytree(state.folder, folder / "copy")
        code, said, expected[name] = state.run(copied)
        assert code == 0, said
        shutil.rmtree(copied)
    for number in range(count):
        name = list(known)[number % len(known)]
        state = known[name]
        copied = Path(shutil.copytree(state.folder, folder / "copy"))
        files = sorted(x for pattern in state.files for x in copied.glob(pattern) if x.is_file())
        file = generator.choice(files)
        (how,) = generator.choices(list(DAMAGES), WEIGHTS_OF_DAMAGES)
        if how == "another run's" and name == "data":
            how = "flipped"  # it would be an annotated file like any other
        before = file.read_bytes()
        DAMAGES[how](file, generator, state.other / file.relative_to(copied))
        untouched = file.exists() and file.read_bytes() == before
        what = f"{name}: {file.relative_to(copied)} {how}"
        try:
            code, said, made = state.run(copied)
        except Exception as error:  # what a user would see as a traceback
            code, said, made = 1, f"{type(error).__name__}: {error}", None
        named = re.sub(r"\.sha256$", "", file.name) in said or file.parent.name in said
        if code == 0 and made == expected[name]:
            ends["untouched" if untouched else "named, same" if named else "no effect"] += 1
        elif code == 2 and named and "Traceback" not in said:
            ends["refused by name"] += 1
        else:
            silent.append(f"{what}: exit {code}, {said[-600:]}")
            print(silent[-1], flush=True)
        shutil.rmtree(copied)
        if number % 20 == 19:
            print(f"{number + 1} damages: {dict(ends)}, {len(silent)} silent", flush=True)
    return ends, silent


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kills", "damages"])
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    done, wrong = {"kills": kills, "damages": damages}[given.what](
        given.folder, given.count, given.seed
    )
    print(f"{given.what}: {done}; {len(wrong)} wrong", *wrong, sep="\n")
    sys.exit(bool(wrong))
