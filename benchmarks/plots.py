"""Pictures of the results: times against N, memory and errors on a GPU, and the ratios of `bars.py`
on a CPU.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "treg",
    "svg.fonttype": "none",
}  # the same results give the same bytes
import end_to_end_table  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
from loss_head_cases import HEADS, MODES  # noqa: E402

BARE = {"trainable": "gemm_3", "frozen": "gemm_2", "forward": "gemm_1"}
MOST = 4.0  # times the bare products
GREYS = ("0.25", "0.45", "0.6", "tan", "slategrey", "rosybrown", "darkseagreen")
Cells = dict[tuple[str, int, str, str], dict]  # (head, nominal N, mask, mode) -> methods


def gpu(cells: Cells, folder: Path) -> None:
    """time.svg, memory.svg, errors.svg: what the cells in which all rows are scored hold."""
    title = f"time / bare products, hot; above {MOST:g} left out"
    _grid(cells, folder / "time.svg", title, _over_bare, most=MOST)
    _grid(
        cells,
        folder / "memory.svg",
        "extra memory, GiB",
        lambda methods, name, mode: _gib(methods[name]),
    )
    _grid(
        cells,
        folder / "errors.svg",
        "dhidden: relative error; forward: log-probs, rms, nats",
        _error,
        base=10,
    )


def cpu(found: dict, floor: str, path: Path) -> None:
    """Times over the bare products of each dtype, and peak memory."""
    panels = {
        f"{dtype}: time / {floor}": {
            k: x / times["median_seconds"][floor]
            for k, x in times["median_seconds"].items()
            if k != floor
        }
        for dtype, times in found["time"].items()
    }
    panels["float32: extra peak memory, MiB"] = {
        k: x / 2**20 for k, x in found["memory"]["peak_extra_bytes"].items()
    }
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(7, 2.2 * len(panels)), layout="constrained"
    )
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        bars = ax.barh(
            list(values),
            list(values.values()),
            color=["C0" if k.startswith("treg") else "C7" for k in values],
        )
        ax.bar_label(bars, fmt=f"{{:.{0 if 'MiB' in title else 2}f}}", padding=2, fontsize=8)
        ax.margins(x=0.12)
        if "MiB" not in title:
            ax.axvline(1, color="black", lw=0.8, ls=":")
        ax.set_title(title, fontsize=9)
        ax.invert_yaxis()
    _save(figure, path)


def end_to_end(record: dict, path: Path) -> None:
    """Tokens a second of every method, and peak memory: a row a cell of a model and part."""

    def methods_of(found: dict, part: dict) -> dict:
        alone = found["environment"]["threads"] == 1
        return (end_to_end_table.by_cpu(part) if alone else part)["methods"]

    rows = [
        (f"{model.partition(',')[0]}, {cell}: {part}", methods_of(found, result[part]))
        for model, found in record["models"].items()
        for cell, result in found["cells"].items()
        for part in ("step", "annotate")
        if part in result
    ]
    size = (11, 2.2 * len(rows))
    figure, axes = plt.subplots(len(rows), 2, figsize=size, layout="constrained", squeeze=False)
    for (title, methods), (left, right) in zip(rows, axes, strict=True):
        measured = {name: x for name, x in methods.items() if "seconds" in x}
        speed = {name: x["counted_per_second"] for name, x in measured.items()}
        held = {
            name: x["peak_extra_bytes"] / 2**20
            for name, x in measured.items()
            if x.get("peak_extra_bytes") is not None
        }
        _bars(left, f"{title}: tokens a second", speed)
        _bars(right, "extra peak memory, MiB", held)
    _save(figure, path)


def _bars(ax, title: str, values: dict[str, float]) -> None:
    colors = ["C0" if name.startswith("treg") else "C7" for name in values]
    bars = ax.barh(list(values), list(values.values()), color=colors)
    ax.bar_label(bars, fmt="{:.0f}", padding=2, fontsize=8)
    ax.margins(x=0.12)
    ax.tick_params(labelsize=8)
    ax.set_title(title, fontsize=9)
    ax.invert_yaxis()


def _over_bare(methods: dict, name: str, mode: str) -> float | None:
    floor = methods.get(BARE[mode], {}).get("hot")
    return (
        methods[name]["hot"]["median"] / floor["median"]
        if floor and "hot" in methods[name]
        else None
    )


def _gib(method: dict) -> float | None:
    held = method.get("extra_bytes")
    return None if held is None else held / 2**30


def _error(methods: dict, name: str, mode: str) -> float | None:
    return (
        methods[name].get("errors", {}).get("logprobs_rms_nats" if mode == "forward" else "dhidden")
    )


def _grid(
    cells: Cells, path: Path, title: str, value, *, most: float | None = None, base: int = 2
) -> None:
    """A row a head, a column a mode, a line a method over N, both axes logarithmic; what is above
    `most` is not drawn.
    """
    heads = [head for head in HEADS if any(key[0] == head for key in cells)]
    names = sorted({name for methods in cells.values() for name in methods})
    size = (13, 3 * len(heads))
    figure, axes = plt.subplots(
        len(heads), len(MODES), figsize=size, layout="constrained", squeeze=False
    )
    for row, head in zip(axes, heads, strict=True):
        for ax, mode in zip(row, MODES, strict=True):
            here = sorted(
                (key[1], m) for key, m in cells.items() if (key[0], *key[2:]) == (head, "all", mode)
            )
            for i, name in enumerate(names):
                points = [
                    (N, y)
                    for N, m in here
                    if name in m
                    and (y := value(m, name, mode)) is not None
                    and (most is None or y <= most)
                ]
                if points:
                    ax.plot(*zip(*points, strict=True), label=name, **_style(name, i))
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=base)
            if most is not None:
                ax.set_ylim(top=most)
            ax.xaxis.set_major_formatter("{x:g}")
            if base == 2:
                ax.yaxis.set_major_formatter("{x:g}")
            ax.set_title(f"{head}, {mode}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("rows N", fontsize=9)
    handles = {
        label: line
        for ax in axes.flat
        for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(title)
    _save(figure, path)


def _style(name: str, number: int) -> dict:
    """This project's thick and solid; of others no two alike."""
    if name.startswith("treg"):
        return {"marker": "o", "ls": "-", "lw": 2, "ms": 4, "color": f"C{number % 10}"}
    marker = "sv^<>DPX*hd"[number % 11]
    return {"marker": marker, "ls": "--", "lw": 0.8, "ms": 4, "color": GREYS[number % len(GREYS)]}


def _save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
