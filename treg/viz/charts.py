"""Charts as SVG: a histogram, a scatter plot, and lines. They take their colours from the page's
style, so that one picture serves light and dark, and scale with the page.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from treg.viz.curves import Panel
from treg.viz.tokens import visible

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 38  # of the axes, in the units of the picture
BINS = 41  # odd: zero is in the middle of one
MOST_POINTS = 2000  # of a scatter plot
Range = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """The axes: their ranges, and where a number lies in the picture."""

    x: Range
    y: Range

    def at_x(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def at_y(self, y: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def drawn(self, name: str, x_label: str, y_label: str, ticks: "Ticks", inside: str) -> str:
        """The whole picture. name: what a reader without eyes is told."""
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(name)}">',
        ]
        for value, label in ticks.y:
            y = f"{self.at_y(value):.1f}"
            parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="y" x="{LEFT - 6}" y="{y}" dy=".35em">{_text(label)}</text>')
        foot = HEIGHT - BOTTOM
        for value, label in ticks.x:
            x = f"{self.at_x(value):.1f}"
            # labels at the ends stay inside the picture
            end = {self.x[0]: " first", self.x[1]: " last"}.get(value, "")
            parts.append(f'<path class="grid" d="M{x} {foot}v4"/>')
            parts.append(f'<text class="x{end}" x="{x}" y="{foot + 16}">{_text(label)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="x label" x="{middle}" y="{HEIGHT - 5}">{_text(x_label)}</text>')
        parts.append(f'<text class="label" x="{LEFT}" y="{TOP + 2}">{_text(y_label)}</text>')
        return "".join([*parts, inside, "</svg>"])


@dataclass(frozen=True)
class Ticks:
    """Numbers and labels along each axis."""

    x: Sequence[tuple[float, str]]
    y: Sequence[tuple[float, str]]


def short(x: float) -> str:
    """A number for a label: three digits, with the sign of typography."""
    return re.sub(r"e([+-])0", r"e\1", f"{x:.3g}").replace("-", "−").replace("e+", "e")


def _text(text: str) -> str:
    return escape(visible(text))


def nice_ticks(low: float, high: float, about: int = 4) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about so many."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
    values = [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), 10**6)]
    found = []
    for value in values:
        if value > high + step * 1e-9:
            break
        found.append((value, short(value)))
    return found


def histogram(groups: Mapping[str, np.ndarray], limit: float, label: str) -> str:
    """The share of each group's numbers in BINS bins of [-limit, limit], on a logarithmic axis. The
    bins at the ends hold what lies beyond as well.

    groups: numbers by the name of their colour in the style.
    """
    edges = np.linspace(-limit, limit, BINS + 1)
    shares = {}
    for name, values in groups.items():
        counts, _ = np.histogram(np.clip(values, -limit, limit), edges)
        shares[name] = counts / max(len(values), 1)
    smallest = min((x[x > 0].min() for x in shares.values() if x.any()), default=0.1)
    lowest = math.floor(math.log10(smallest) - 1e-9)
    frame = Frame((-limit, limit), (lowest, 0.12))
    parts = []
    for name, share in shares.items():
        path = [f"M{LEFT} {HEIGHT - BOTTOM}"]
        for edge, value in zip(edges, share.tolist(), strict=False):
            y = frame.at_y(max(math.log10(value), lowest)) if value else HEIGHT - BOTTOM
            path.append(f"H{frame.at_x(edge):.1f}V{y:.1f}")
        path.append(f"H{WIDTH - RIGHT}V{HEIGHT - BOTTOM}")
        parts.append(f'<path class="area {name}" d="{"".join(path)}"/>')
    beyond = any((np.abs(x) > limit).any() for x in groups.values())
    ends = ("≤ −", "≥ ") if beyond else ("−", "")
    half = limit / 2
    x_ticks = [(-limit, ends[0] + short(limit)), (-half, short(-half)), (0.0, "0")]
    x_ticks += [(half, short(half)), (limit, ends[1] + short(limit))]
    y_ticks = []
    for power in range(lowest, 1):
        if -power % max(1, -lowest // 4) == 0:
            y_ticks.append((float(power), f"{100 * 10.0**power:.4g} %"))
    name = f"Histogram of {label}, {', '.join(groups)}"
    return frame.drawn(name, label, "", Ticks(x_ticks, y_ticks), "".join(parts))


def scatter(
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]],
    limits: tuple[float, float],
    labels: tuple[str, str],
) -> str:
    """Points of each group, at most MOST_POINTS in all, drawn at random where there are more, and
    always the same ones. Points beyond the limits lie on the edge.

    groups: (x, y) by the name of their colour in the style. limits: of |x| and |y|.
    """
    (x_limit, y_limit), (x_label, y_label) = limits, labels
    frame = Frame((-x_limit, x_limit), (-y_limit, y_limit))
    total = sum(len(x) for x, _ in groups.values())
    rng = np.random.default_rng(0)
    left, top = frame.at_x(0), frame.at_y(0)
    width, height = WIDTH - RIGHT - left, top - TOP
    parts = [
        f'<path class="agree" d="M{left:.1f} {TOP}h{width:.1f}v{height:.1f}h-{width:.1f}z'
        f'M{LEFT} {top:.1f}h{left - LEFT:.1f}v{height:.1f}h-{left - LEFT:.1f}z"/>'
        f'<path class="axis" d="M{left:.1f} {TOP}V{HEIGHT - BOTTOM}'
        f'M{LEFT} {top:.1f}H{WIDTH - RIGHT}"/>'
    ]
    for name, (x, y) in groups.items():
        kept = np.arange(len(x))
        if total > MOST_POINTS:
            kept = rng.choice(len(x), len(x) * MOST_POINTS // total, replace=False)
        dots = []
        for a, b in zip(x[kept].tolist(), y[kept].tolist(), strict=True):
            a, b = max(-x_limit, min(a, x_limit)), max(-y_limit, min(b, y_limit))
            dots.append(f"M{frame.at_x(a):.1f} {frame.at_y(b):.1f}h0")
        parts.append(f'<path class="dots {name}" d="{"".join(dots)}"/>')
    ticks = Ticks(nice_ticks(-x_limit, x_limit), nice_ticks(-y_limit, y_limit))
    name = f"Scatter plot of {y_label} over {x_label}"
    return frame.drawn(name, x_label, "", ticks, "".join(parts))


def line_chart(name: str, panel: Panel, looks: Mapping[str, int]) -> str:
    """A panel over the optimizer steps, a line a run, or two where it has bad tokens: these are
    dashed, those of good tokens solid, and a line marks 0. Numbers that are not finite are gaps.

    looks: the number of each run's colour in the style.
    """
    both, marked = (panel.lines, panel.bad or {}), panel.bad is not None
    every = [line for lines in both for line in lines.values()]
    points = [point for line in every for point in line if math.isfinite(point[1])]
    heights = [y for _, y in points] + [0.0] * marked
    frame = Frame(_range([x for x, _ in points]), _range(heights))
    parts = []
    if marked:
        parts.append(f'<path class="axis" d="M{LEFT} {frame.at_y(0):.1f}H{WIDTH - RIGHT}"/>')
    for lines, style in zip(both, ("dash0" if marked else "", "bad"), strict=True):
        for run, line in lines.items():
            look = looks[run]
            named = f"line run{look % 7} {style or f'dash{look // 7 % 3}'}"
            parts.append(f'<path class="{named}" d="{_path(frame, line)}"/>')
    ticks = Ticks(nice_ticks(*frame.x), nice_ticks(*frame.y))
    name = f"{name} over the optimizer steps"
    return frame.drawn(name, "optimizer step", "", ticks, "".join(parts))


def _path(frame: Frame, line: Sequence[tuple[float, float]]) -> str:
    """A line of a chart; a point alone is a dot."""
    path, pen = [], "M"
    for step, value in line:
        if math.isfinite(value):
            path.append(f"{pen}{frame.at_x(step):.1f} {frame.at_y(value):.1f}")
            path.append("h0" if pen == "M" else "")
        pen = "L" if math.isfinite(value) else "M"
    return "".join(path)


def _range(values: Sequence[float]) -> Range:
    """From the smallest to the largest number, wider where they are the same."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    apart = abs(low) * 0.1 or 1.0
    return low - apart, high + apart
