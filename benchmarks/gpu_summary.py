"""What a record of `gpu_run.py` says, on a page."""

from collections.abc import Callable

import gpu_bars
from gpu_plan import Job, Step


def page(data: dict, steps: list[Step], left: Callable[[Step], list[Job]]) -> str:
    stages = data["stages"]
    parts = [
        _about(stages),
        _truth(_of(stages, "truth: ")),
        _rates(_of(stages, "rates: ")),
        _host(_of(stages, "host: ")),
        gpu_bars.table(data["cells"]),
        _tests(_of(stages, "tests: ")),
        _trouble(data),
        _left(steps, left),
    ]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def _of(stages: dict, prefix: str) -> dict[str, dict]:
    return {
        name.removeprefix(prefix): found
        for name, found in stages.items()
        if name.startswith(prefix)
    }


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(x) for x in line)} |" for line in lines)


def _about(stages: dict) -> str:
    found, compiled = stages.get("environment", {}), stages.get("compile", {})
    about, ceilings = found.get("environment", {}), found.get("ceilings") or {}
    lines = [
        f"{about.get('device', 'no device yet')}, {about.get('versions', {})}, commit "
        f"{about.get('commit')}"
    ]
    if found.get("clocks"):
        lines.append(f"clocks: {found['clocks']}; after: {found.get('clocks_after')}")
    if "matmul_tflops" in ceilings:
        lines.append(
            f"a product of 8192^3: {ceilings['matmul_tflops']:.0f} TFLOP/s; a copy: "
            f"{ceilings['copy_gb_per_s']:.0f} GB/s"
        )
    if found.get("products"):
        lines.append(f"products of 4096 rows, TFLOP/s: {found['products']}")
    if "compiled" in compiled:
        lines.append(
            f"compiled {compiled['compiled']} of {compiled['kernels']} kernels in "
            f"{compiled['seconds']} s; wrong: {compiled['wrong'] or 'none'}; processes that died: "
            f"{compiled.get('died') or 'none'}; late: {compiled.get('late') or 'none'}"
        )
    if compiled.get("end"):
        lines.append(f"the end of the first that died: {compiled['end']}")
    return "\n".join(lines)


def _truth(found: dict[str, dict]) -> str:
    if not found:
        return ""
    verdicts = [_verdict(case) for case in found.values()]
    passed, ran = verdicts.count("pass"), len(verdicts) - verdicts.count("not run")
    rows = []
    for name, case in found.items():
        errors = case.get("errors", {})
        told = ("skipped", "error", "failed", "unfinished")
        why = next((str(case[key]) for key in told if key in case), "")
        rows.append(
            (
                name,
                _verdict(case),
                errors.get("logprobs", {}).get("rms", ""),
                *(errors.get(key, {}).get("relative", "") for key in ("dhidden", "dweight")),
                (why or _over(case))[:200].replace("|", "/"),
            )
        )
    header = ("truth", "", "log-probs rms, nats", "dhidden", "dweight", "")
    return f"truth: {passed} of {ran} pass\n\n{_table(header, rows)}"


def _verdict(case: dict) -> str:
    if "skipped" in case or ("unfinished" in case and "broken" not in case):
        return "not run"
    return "pass" if case.get("passed") else "FAIL"


def _over(case: dict) -> str:
    """What is over its limit."""
    errors = case.get("errors", {})
    return ", ".join(
        f"{name} {kind} {errors[name][kind]:g} > {limit:g}"
        for name, kinds in case.get("limits", {}).items()
        for kind, limit in kinds.items()
        if not errors[name][kind] <= limit
    )


def _rates(found: dict[str, dict]) -> str:
    rows = []
    for head, rates in found.items():
        for kind, rate in rates.get("kinds", {}).items():
            forms = ", ".join(f"{name} {_form(x)}" for name, x in rate["forms"].items())
            rows.append(
                (head, kind, rate["ms"], rate["tflops"], rate["mm_tflops"], rate["ratio"], forms)
            )
        if "failed" in rates:
            rows.append((head, rates["failed"], "", "", "", "", ""))
    header = ("head", "kernel", "ms", "TFLOP/s", "torch.mm", "ratio", "other forms' ratios")
    return _table(header, rows) if rows else ""


def _form(rate: dict) -> str:
    if "failed" in rate:
        return f"failed ({rate['failed'][:80].replace('|', '/')})"
    return f"{rate['ratio']:.3f}" + (f" (off: {rate['off']})" if "off" in rate else "")


def _host(found: dict[str, dict]) -> str:
    rows = [
        (shape, method, *(x.get(key) for key in ("wall", "returns", "events", "busy")))
        for shape, methods in found.items()
        for method, x in methods.items()
        if isinstance(x, dict)
    ]
    header = ("step", "method", "wall, ms", "call returns", "events", "GPU busy")
    return _table(header, rows) if rows else ""


def _tests(found: dict[str, dict]) -> str:
    lines = [
        f"tests, {name}: {x.get('counts') or x.get('skipped') or x.get('failed')}, code "
        f"{x.get('code')}, {x.get('seconds')} s {'; '.join(x.get('failed_tests', [])[:8])}"
        for name, x in found.items()
    ]
    return "\n".join(lines)


def _trouble(data: dict) -> str:
    """Jobs that failed or were skipped, those that are unfinished, methods that were left out."""
    lines = []
    for kind in ("stages", "cells"):
        for name, found in data[kind].items():
            why = found.get("failed") or found.get("skipped") or found.get("unfinished")
            if why and not name.startswith(("truth: ", "tests: ")):
                lines.append(f"{name}: {why}")
    lines += [f"left out: {name}: {why}" for name, why in data["excluded"].items()]
    return "\n".join(lines)


def _left(steps: list[Step], left: Callable[[Step], list[Job]]) -> str:
    told = [f"{step.name}: {len(left(step))} of {len(step.jobs)}" for step in steps if left(step)]
    return f"left: {', '.join(told)}" if told else "nothing is left"
