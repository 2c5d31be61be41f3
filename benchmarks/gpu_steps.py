"""The plan itself: what each step of `gpu_run.py` holds and how long it may take, the most telling
first. Nothing here touches a GPU.
"""

import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gpu_bars
import tune_tiles
from gpu_plan import Done, Job, Step
from gpu_rates import HOST_ROWS, ODD
from gpu_truth import ALONE
from gpu_truth import CASES as TRUTH
from loss_head_cases import FIRST, HEADS, Case, gpu_cases
from loss_head_peers import METHODS

NAMES = (
    *("environment", "compile", "truth", "rates", "tiles", "host", "bars", "tests", "end-to-end"),
    *("cells", "sanitizer"),
)
COMPILED = ("truth", "rates", "host", "bars", "tiles")  # in this order
TUNED = ("llama-3-8b", "gemma-2-9b")
TESTS = {
    "gpu, tiles": ("ops/test_gpu.py", "ops/test_tiles.py", "heads/test_gpu_branches.py"),
    "log-probs, fused, objective": (
        "ops/test_linear_logprobs.py",
        "ops/test_fused.py",
        "losses/test_objective.py",
    ),
    "others": (
        "rl/test_fused.py",
        "ops/test_compile.py",
        "ops/test_filtered.py",
        "ops/test_bad_input.py",
        "ops/test_vocab_parallel.py",
    ),
}
# a graph is compiled for every shape, or nobody asks for it
NOT_WORTH_A_GPU = ("dense_compiled", "liger_mean_ce", "trl_selective")


@dataclass(frozen=True)
class Setting:
    """What a plan hangs on."""

    folder: Path
    tiny: bool = False
    compiling: int = 12  # processes at a time
    testing: int = 14


def steps(setting: Setting) -> list[Step]:
    """All steps, in order. Seconds: for a machine of 16 cores and one H200."""
    measured = [
        Step("truth", 45, 80, _truth(setting)),
        Step("rates", 12, 30, _rates(setting)),
        Step("tiles", 6, 45, _tiles(setting)),
        Step("host", 6, 25, _host()),
        Step("bars", 215, 260, _bars(setting)),
    ]
    compiling = {"do": "compile", "works": [], "processes": setting.compiling}  # see `ready`
    found = [
        Step("environment", 15, 40, (Job("environment", 40, work={"do": "environment"}),)),
        Step("compile", 35, 75, (Job("compile", 75, 10, work=compiling),)),
        *measured,
        Step("tests", 0, 150, _tests(setting)),
        Step("end-to-end", 0, 200, _end_to_end(setting)),
        Step("cells", 0, 3600, _rest(setting)),
        Step("sanitizer", 0, 120, _sanitizer()),
    ]
    return [_slower(step, 4.0) for step in found] if setting.tiny else found


def _slower(step: Step, times: float) -> Step:
    """A CPU takes its time even for small sizes; nothing is kept from the steps before."""
    jobs = tuple(replace(job, most=times * job.most) for job in step.jobs)
    return replace(step, least=0.0, most=times * step.most, jobs=jobs)


def ready(steps: list[Step], record: Done, renew: bool) -> list[Step]:
    """The steps of a call that goes on from a record.

    Triton's cache may be gone with the machine: what is left is compiled for again, and nothing is
    where nothing is left that wants it.
    """
    wanted = [
        job.work
        for name in COMPILED
        for s in steps
        if s.name == name
        for job in s.left(record, renew)
    ]
    found = []
    for step in steps:
        if step.name == "compile":
            if not wanted:
                continue
            [job] = step.jobs
            record.data["stages"].pop(job.name, None)
            step = replace(step, jobs=(replace(job, work={**job.work, "works": wanted}),))
        found.append(step)
    return found


def _truth(setting: Setting) -> tuple[Job, ...]:
    return tuple(
        Job(
            f"truth: {name}",
            25.0 if name == ALONE else 15.0,
            work={"do": "truth", "name": name},
            alone=name == ALONE and not setting.tiny,
        )
        for name in TRUTH
    )


def _rates(setting: Setting) -> tuple[Job, ...]:
    heads = list(HEADS)[:2] if setting.tiny else HEADS
    return tuple(Job(f"rates: {x}", 12.0, work={"do": "rates", "name": x}) for x in heads)


def _tiles(setting: Setting) -> tuple[Job, ...]:
    return tuple(
        Job(
            f"tiles: {name} {kind}",
            20.0,
            work={"do": "tiles", "name": name, "kind": kind, "folder": str(setting.folder)},
        )
        for name in (TUNED[:1] if setting.tiny else TUNED)
        for kind in tune_tiles.ROWS
    )


def _host() -> tuple[Job, ...]:
    V, odd = next(iter(ODD.items()))
    shapes = [*((N, V) for N in HOST_ROWS), *((N, odd) for N in (HOST_ROWS[0], HOST_ROWS[-1]))]
    return tuple(
        Job(f"host: N={N} V={V}", 10.0, work={"do": "host", "rows": N, "vocab": V})
        for N, V in shapes
    )


def _bars(setting: Setting) -> tuple[Job, ...]:
    """In the order of the bars; real masks last, for they are compared with one peer alone, which
    may be missing.
    """
    names = dict.fromkeys(bar.cell for bar in gpu_bars.BARS)
    names = sorted(names, key=lambda name: "-realistic-" in name)
    return tuple(
        _cell(setting, name, gpu_bars.methods_of(name), gpu_bars.cool_methods_of(name), 75.0)
        for name in names
    )


def _cell(setting: Setting, name: str, methods, cool, most: float) -> Job:
    if setting.tiny:  # to import the packages of others takes longer than all the rest
        methods = [name for name in methods if METHODS[name].package is None]
    work = {"do": "cell", "name": name, "methods": list(methods), "cool": list(cool)}
    return Job(name, most, 1.0 if setting.tiny else 12.0, kind="cells", work=work)


def _rest(setting: Setting) -> tuple[Job, ...]:
    barred = {bar.cell for bar in gpu_bars.BARS}
    rest = [case for case in gpu_cases() if case.name not in barred]
    return tuple(
        _cell(setting, case.name, _worth(case), (), 90.0)
        for case in (rest[:1] if setting.tiny else rest)
    )


def _worth(case: Case) -> list[str]:
    return [
        name
        for name, method in METHODS.items()
        if name not in NOT_WORTH_A_GPU and method.applies_to(case, "cuda")
    ]


def _tests(setting: Setting) -> tuple[Job, ...]:
    groups = {"gpu": TESTS["gpu, tiles"][:1]} if setting.tiny else TESTS
    return tuple(
        Job(
            f"tests: {name}",
            140,
            20,
            command=_pytest(files, setting.testing),
            environment={"OMP_NUM_THREADS": "1"},
        )
        for name, files in groups.items()
    )


def _pytest(files: tuple[str, ...], processes: int) -> tuple[str, ...]:
    """A line for every test, so that they are counted whatever ends the run."""
    several = processes > 1 and importlib.util.find_spec("xdist") is not None
    at_a_time = ("-n", str(processes)) if several else ()
    options = ("-v", "-rN", "--tb=line", "-p", "no:cacheprovider")
    return (
        *(sys.executable, "-m", "pytest", *options, *at_a_time),
        *(f"tests/{file}" for file in files),
    )


def _end_to_end(setting: Setting) -> tuple[Job, ...]:
    """In a process of its own; its record is a file beside the others'."""
    script = "benchmarks/bench_end_to_end.py"
    command = (sys.executable, script, "--out", str(setting.folder / "end_to_end.json"))
    if setting.tiny:
        sizes = {"hidden": 32, "layers": 1, "heads": 2, "vocab": 97, "pairs": 1, "rounds": 1}
        options = [x for name, size in sizes.items() for x in (f"--{name}", str(size))]
        options += ["--cells", "bar", "--parts", "step", "--methods", "treg shared"]
    else:
        options = ["--minutes", "2"]
    return (Job("end-to-end", 190, 60, command=(*command, "--no_memory", *options)),)


def _sanitizer() -> tuple[Job, ...]:
    command = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable)
    return (
        Job(
            "sanitizer: memcheck",
            110,
            30,
            command=(*command, "benchmarks/gpu_worker.py", "--small-step"),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
    )


assert {bar.cell for bar in gpu_bars.BARS} == set(FIRST)
