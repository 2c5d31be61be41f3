"""How far annotating is."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm


class Progress:
    """A bar over pairs, with tokens/s. Quiet where it is not wanted."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.seen = 0
        self.bar: Any = None

    @contextlib.contextmanager
    def over(self, pairs: int) -> Iterator[None]:
        """Show the bar while the block runs."""
        self.bar = tqdm(
            total=pairs, unit="pair", desc="annotate", disable=not self.shown, smoothing=0.1
        )
        with self.bar:
            yield

    def tokens(self, count: int) -> None:
        self.seen += count
        if self.bar is not None and not self.bar.disable:
            elapsed = max(self.bar.format_dict["elapsed"], 1e-9)
            self.bar.set_postfix_str(f"{self.seen / elapsed:,.0f} tokens/s")

    def pairs(self, count: int) -> None:
        self.bar.update(count)
