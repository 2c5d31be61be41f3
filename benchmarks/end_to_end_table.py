"""What `bench_end_to_end.py` found: the record's form, its tables, and the bars.

models: of each model the environment, dtype, parameters, load averages before and after cells
cells: of each the lengths, the tokens (`end_to_end_cases`), a training step and annotation
methods: of each {"missing": why}, or
    seconds, cpu_seconds    medians of the rounds; those of the CPU are of all threads
    tokens                  that went through the model in a call, padding included
    counted_per_second      tokens as a person counts them
    run_per_second          tokens that went through the model
    over, cpu_over          ratios to other methods: median over median, and a round's extremes
    peak_extra_bytes        that a first call held beyond the weights
    loss, gradient_norm     of a training step
"""

import statistics
from collections.abc import Iterable
from typing import Any

from end_to_end_annotate import APART, FORWARDS, SHARED
from end_to_end_cases import BAR
from end_to_end_steps import FLOOR
from loss_head_measure import Alternation, ratio_of

AGAINST = {"step": ("treg unshared", FLOOR), "annotate": (APART, FORWARDS)}
SHORT = {"step": ("unshared", "floor"), "annotate": ("apart", "floor")}
TITLES = {"step": "training step", "annotate": "annotation"}


def methods_of(
    run: Alternation, tokens: dict[str, int], counted: int, against: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Of each method what the rounds gave. tokens: that each runs; counted: of all pairs."""
    found: dict[str, dict[str, Any]] = {}
    wall, of_cpu = run.seconds, run.cpu_seconds
    for name in run.calls:
        seconds = statistics.median(wall[name])
        found[name] = {
            "seconds": seconds,
            "tokens": tokens[name],
            "counted_per_second": counted / seconds,
            "run_per_second": tokens[name] / seconds,
            "over": {x: ratio_of(wall[name], wall[x]) for x in against if x in run.calls},
        }
        if of_cpu[name]:
            found[name] |= {
                "cpu_seconds": statistics.median(of_cpu[name]),
                "cpu_over": {x: ratio_of(of_cpu[name], of_cpu[x]) for x in against if x in wall},
            }
    return found


def by_cpu(result: dict[str, Any]) -> dict[str, Any]:
    """A training step or annotation by the CPU's own time, where that was taken: of one thread it
    is what the clock would have shown without other work on the machine.
    """
    methods = {}
    for name, x in result["methods"].items():
        if "cpu_seconds" in x:
            faster = x["seconds"] / x["cpu_seconds"]
            speeds = ("counted_per_second", "run_per_second")
            x = x | {"seconds": x["cpu_seconds"], "over": x["cpu_over"]}
            x |= {speed: x[speed] * faster for speed in speeds}
        methods[name] = x
    return result | {"methods": methods}


def page(name: str, found: dict[str, Any]) -> list[str]:
    """Tables of all cells of a model, and the bars."""
    lines = ["", f"{name}, {found['parameters'] / 1e6:.0f} million parameters, {found['dtype']}"]
    for cell, result in found["cells"].items():
        lines += of_cell(cell, result)
    load = ", ".join(f"{x:.1f}" for x in found["load_average"])
    return [*lines, "", *bars(found), "", f"load average before and after cells: {load}"]


def of_cell(name: str, result: dict[str, Any]) -> list[str]:
    """A table for a training step, and one for annotation."""
    lines = []
    for part, title in TITLES.items():
        if part not in result:
            continue
        head = f"{name}: {title}, {result[part]['rounds']} rounds"
        columns = f"{'s':>9}{'CPU s':>9}{'tokens/s':>10}{'run':>8}{'run/s':>8}{'MiB':>8}"
        ratios = "".join(f"{f'/ {x} (CPU)':>18}" for x in SHORT[part])
        lines += ["", head, f"{'':<26}{columns}{ratios}"]
        for method, x in result[part]["methods"].items():
            lines.append(f"{method:<26}{_row(x, AGAINST[part])}".rstrip())
    return lines


def _row(x: dict[str, Any], against: Iterable[str]) -> str:
    if "missing" in x:
        return f"   not measured: {x['missing']}"
    held = x.get("peak_extra_bytes")
    text = f"{x['seconds']:9.3f}{_number(x.get('cpu_seconds'), '9.3f')}"
    text += f"{x['counted_per_second']:10.0f}{x['tokens']:8d}{x['run_per_second']:8.0f}"
    text += _number(None if held is None else held / 2**20, "8.0f")
    for name in against:
        of_cpu = x.get("cpu_over", {}).get(name, {}).get("ratio")
        ratio = _number(x["over"].get(name, {}).get("ratio"), "11.2f")
        text += ratio + (" " * 7 if of_cpu is None else f"{f'({of_cpu:.2f})':>7}")
    return text


def _number(x: float | None, form: str) -> str:
    return f"{x:{form}}" if x is not None else " " * int(form.partition(".")[0] or 0)


# -- what it is held to

MOST_OVER_TOKENS, MOST_OVER_TRL, MOST_OVER_FORWARDS = 1.10, 0.60, 1.15


def bars(found: dict[str, Any]) -> list[str]:
    """A line each: the ratio, the limit, and how it stands."""
    cell = found["cells"].get(BAR, {})
    of_step, of_annotation = (_measured(cell.get(part, {})) for part in TITLES)
    lines = []
    if {"treg shared", "treg unshared"} <= of_step.keys():
        ours, unshared = of_step["treg shared"], of_step["treg unshared"]
        share = ours["tokens"] / unshared["tokens"]
        what = f"step shared / unshared, with {share:.3f} of its tokens"
        lines.append(_bar(what, ours, unshared, MOST_OVER_TOKENS * share))
    # pairs of equal lengths have no padding: where TRL pads, it runs the same tokens
    peers = [x for x in ("TRL padding-free", "TRL padded") if x in of_step]
    if peers and "treg shared" in of_step:
        what = f"step shared / {peers[0]}"
        what += ", which pads nothing here" if peers[0] == "TRL padded" else ""
        lines.append(_bar(what, of_step["treg shared"], of_step[peers[0]], MOST_OVER_TRL))
    if SHARED in of_annotation:
        mine, floor = of_annotation[SHARED], of_annotation[FORWARDS]
        lines.append(_bar(f"{SHARED} / {FORWARDS}", mine, floor, MOST_OVER_FORWARDS))
    return lines


def _measured(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: x for name, x in part.get("methods", {}).items() if "missing" not in x}


def _bar(what: str, a: dict[str, Any], b: dict[str, Any], limit: float) -> str:
    """By the CPU's own time where it is known, which other work on the machine hardly changes."""
    ratio = a["seconds"] / b["seconds"]
    text = f"{ratio:.3f}"
    if "cpu_seconds" in a:
        of_clock, ratio = ratio, a["cpu_seconds"] / b["cpu_seconds"]
        text = f"{ratio:.3f} of the CPU's time ({of_clock:.3f} of the clock's)"
    how = "met" if ratio <= limit else f"missed by {100 * (ratio / limit - 1):.1f} %"
    return f"{what:<50} {text}, at most {limit:.3f}: {how}"


def markdown(cell: dict[str, Any], threads: int) -> str:
    """Tables of a cell for docs/speed.md; threads: that it was measured with."""
    parts = {
        part: by_cpu(cell[part]) if threads == 1 else cell[part] for part in TITLES if part in cell
    }
    found = [_markdown_table(part, result) for part, result in parts.items()]
    return "\n\n".join(found)


def _markdown_table(part: str, result: dict[str, Any]) -> str:
    a, b = AGAINST[part]
    heads = ("seconds", "tokens a second", "tokens run", "peak MiB")
    heads = (TITLES[part], *heads, *(f"/ {x}" for x in SHORT[part]))
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, x in result["methods"].items():
        if "missing" in x:
            lines.append(f"| {name} | not measured: {x['missing']} |" + " |" * 5)
            continue
        held = x.get("peak_extra_bytes")
        ratios = [_number(x["over"].get(y, {}).get("ratio"), ".2f") for y in (a, b)]
        cells = [
            *(f"{x['seconds']:.2f}", f"{x['counted_per_second']:.0f}", f"{x['tokens']}"),
            *("" if held is None else f"{held / 2**20:.0f}", *ratios),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
