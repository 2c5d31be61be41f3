"""Pairs in the terminal, coloured by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from treg.viz.tokens import (
    PairView,
    agreement_of,
    arrays_of,
    limit_of,
    numbers_of,
    pair_data,
    visible,
)

if TYPE_CHECKING:
    from rich.text import Text

# black on colours that begin well away from white and from black: no patch where a number is near 0
BLUES = ("#cfe5f9", "#9ccaf2", "#62a9e8")  # of positive numbers, the smallest first
ORANGES = ("#fbe0c4", "#f6bf8a", "#f2953f")  # of negative numbers
# a terminal of 16 colours would show both as grey and white
BLUES_OF_16 = ("cyan", "bright_cyan", "bright_blue")
ORANGES_OF_16 = ("yellow", "bright_yellow", "bright_red")

Colours = tuple[tuple[str, ...], tuple[str, ...]]  # of positive and of negative numbers


def print_pairs(pairs: Sequence[PairView], console: Any = None, limit: int | None = 5) -> None:
    """Print pairs and their agreement to a rich Console; tokens coloured by rhat, or by i_t where
    there is no rhat.

    At most `limit` pairs are printed, all with None; the agreement is of all, and so is the scale
    of the colours (see `limit_of`), which is printed. Raises ValueError as `agreement`.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = console or Console()
    few = console.color_system in ("standard", "windows")
    colours = (BLUES_OF_16, ORANGES_OF_16) if few else (BLUES, ORANGES)
    numbers = numbers_of(pairs)
    ends = {kind: limit_of(arrays_of(numbers, kind)) for kind in ("rewards", "implicit")}
    printed = list(zip(pairs, numbers, strict=True))[:limit]
    for pair, pair_numbers in printed:
        data = pair_data(pair, pair_numbers)
        console.rule(Text(visible(pair.where)))
        grid = Table.grid(Column(ratio=1), Column(ratio=1), padding=(0, 2), expand=True)
        grid.add_row(
            *(_response(side, data[side], ends, colours) for side in ("chosen", "rejected"))
        )
        console.print(Text(visible(pair.prompt) + "\n", "dim"), grid)
    number = f"{len(pairs)} pair{'s' * (len(pairs) != 1)}"
    console.rule(Text(f"agreement over {number}, {len(printed)} above"))
    for kind, name in (("rewards", pairs[0].stream.replace("_", " ")), ("implicit", "implicit")):
        if arrays_of(numbers, kind):
            scale = [share * ends[kind] for share in (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)]
            labels = [f" {value:+.3g} " for value in scale]
            console.print(_coloured(labels, scale, ends[kind], colours), name)
    for name, value in agreement_of(numbers).items():
        console.print(f"{name.replace('_', ' '):22}{round(value, 3):>9}", highlight=False)


def _response(name: str, data: dict[str, Any], ends: dict[str, float], colours: Colours) -> Text:
    """A line of sums, and the coloured tokens of a response. data: of `pair_data`."""
    from rich.text import Text

    facts = [name]
    for key in ("sum_rewards", "sum_implicit", "mean_product"):
        if key in data:
            facts.append(f"{key.replace('_', ' ')} {data[key]:+.3f}")
    if "rewards" in data:
        values, limit = data["rewards"], ends["rewards"]
    elif "implicit" in data:
        values, limit = data["implicit"], ends["implicit"]
    else:
        values, limit = [0.0] * len(data["pieces"]), 1.0
    others = data.get("others", {})
    head = (", ".join(facts) + "\n", "bold")
    return Text.assemble(head, _coloured(data["pieces"], values, limit, colours, others))


def _coloured(
    pieces: Sequence[str],
    values: Sequence[float],
    limit: float,
    colours: Colours,
    others: Mapping[int, str] | None = None,
) -> Text:
    """others: texts without a number, before the piece of a position."""
    from rich.text import Text

    parts, between = [], others or {}
    for t, (piece, value) in enumerate(zip(pieces, values, strict=True)):
        parts.append((visible(between.get(t, "")), "dim italic"))
        parts.append((visible(piece), _style(value, limit, colours)))
    parts.append((visible(between.get(len(pieces), "")), "dim italic"))
    return Text.assemble(*parts)


def _style(value: float, limit: float, colours: Colours) -> str:
    """The colour of a number on a scale that ends at limit."""
    level = min(int(4 * abs(value) / limit + 0.5), 3)
    if level == 0:
        return ""
    return f"black on {colours[0 if value > 0 else 1][level - 1]}"
