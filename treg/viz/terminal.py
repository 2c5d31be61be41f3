"""Pairs in the terminal, coloured by token."""

from collections.abc import Sequence
from typing import Any

from treg.viz.tokens import (
    IMPLICIT_LIMIT,
    REWARD_LIMIT,
    PairView,
    agreement_of,
    numbers_of,
    pair_data,
    visible,
)


def print_pairs(pairs: Sequence[PairView], console: Any = None, limit: int | None = 5) -> None:
    """Print pairs and their agreement to a rich Console; tokens coloured by rhat, or by i_t where
    there is no rhat.

    At most `limit` pairs are printed, all with None; the agreement is of all. Raises ValueError as
    `agreement`.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # black on colours that begin well away from white and from black: no patch where a number is
    # near 0
    ramps = {True: ("#cfe5f9", "#9ccaf2", "#62a9e8"), False: ("#fbe0c4", "#f6bf8a", "#f2953f")}

    def coloured(pieces: Sequence[str], values: Sequence[float], end: float) -> Text:
        levels = [min(int(4 * abs(value) / end + 0.5), 3) for value in values]
        styles = [
            f"black on {ramps[v > 0][k - 1]}" if k else ""
            for v, k in zip(values, levels, strict=True)
        ]
        return Text.assemble(*zip(map(visible, pieces), styles, strict=True))

    def response(name: str, data: dict[str, Any]) -> Text:
        facts = [
            f"{k.replace('_', ' ')} {v:+.3f}"
            for k, v in data.items()
            if k.startswith(("sum_", "mean_p"))
        ]
        head = (", ".join([name, *facts]) + "\n", "bold")
        values = data.get("rewards", data.get("implicit", [0.0] * len(data["pieces"])))
        end = REWARD_LIMIT if "rewards" in data else IMPLICIT_LIMIT
        return Text.assemble(head, coloured(data["pieces"], values, end))

    console, numbers = console or Console(), numbers_of(pairs)
    for pair, x in list(zip(pairs, numbers, strict=True))[:limit]:
        data = pair_data(pair, x)
        console.rule(Text(visible(pair.where)))
        grid = Table.grid(Column(ratio=1), Column(ratio=1), padding=(0, 2), expand=True)
        grid.add_row(*(response(name, data[name]) for name in ("chosen", "rejected")))
        console.print(Text(visible(pair.prompt) + "\n", "dim"), grid)
    console.rule(Text(f"agreement over {len(pairs)} pairs, {len(pairs[:limit])} of them above"))
    scale = [-0.5, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5]
    console.print(coloured([f" {v:+.3f} " for v in scale], scale, REWARD_LIMIT), "token reward")
    for name, value in agreement_of(numbers).items():
        console.print(f"{name.replace('_', ' '):22}{round(value, 3):>9}", highlight=False)
