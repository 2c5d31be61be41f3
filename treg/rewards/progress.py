"""How far annotating is, and other work that runs answers through a model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from treg.data import Pair, pair_tokens

FIRST_GUESS = 6.0  # tokens through the model for a token of a pair, until a part has shown it
MOST = 0.95  # of a part that is not done: more of it is not claimed


@contextlib.contextmanager
def counted_rows(
    shown: bool, unit: str = "row", what: str = "read", total: int | None = None
) -> Iterator[Callable[..., Any]]:
    """A count of the rows that are read, or of other things, with how many a second; what is
    yielded is told of more of them.
    """
    with tqdm(
        unit=unit, unit_scale=True, desc=what, total=total, disable=not shown, delay=1
    ) as bar:
        yield bar.update


def _tokens_of_pair(pair: Pair) -> int:
    return pair_tokens(vars(pair))


class Progress:
    """A bar over the tokens of pairs, or of other things that are done in parts, that moves with
    every forward, with tokens/s and the time that is left.

    Args:
        shown: False: it is quiet.
        what: what is done, to begin the line with. things: what is counted.
        size: the tokens of one of them.
    """

    def __init__(
        self,
        shown: bool,
        what: str = "annotate",
        things: str = "pairs",
        size: Callable[[Any], int] = _tokens_of_pair,
    ):
        self.shown = shown
        self.what = what
        self.things = things
        self.size = size
        self.bar: Any = None
        self.seen = 0  # tokens through the model, of all
        self.before = 0  # the same, before this part
        self.done = 0  # tokens of pairs, of finished parts
        self.pairs_done = 0
        self.waiting: list[tuple[int, int]] = []  # pairs and tokens of the parts to come

    @contextlib.contextmanager
    def over(self, parts: Sequence[Sequence[Any]]) -> Iterator[None]:
        """Show the bar while the block runs, which finishes the parts one by one."""
        self.waiting = [(len(x), sum(map(self.size, x))) for x in parts]
        self.pairs = sum(pairs for pairs, _ in self.waiting)
        self.seen = self.before = 0  # what a source ran before is no part's
        self.bar = tqdm(
            total=sum(tokens for _, tokens in self.waiting),
            unit="tok",
            unit_scale=True,
            desc=self.what,
            disable=not self.shown,
            smoothing=0.1,
            bar_format="{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]",
        )
        with self.bar:
            self._show()
            yield

    def tokens(self, count: int) -> None:
        """So many tokens have been through the model."""
        self.seen += count
        if self.bar is None or not self.waiting:
            return
        _, size = self.waiting[0]
        ratio = self.before / self.done if self.before else FIRST_GUESS
        share = min((self.seen - self.before) / (ratio * size), MOST)
        self._move(self.done + share * size)

    def part_done(self) -> None:
        pairs, size = self.waiting.pop(0)
        self.pairs_done += pairs
        self.done += size
        self.before = self.seen
        self._move(self.done)

    def _move(self, place: float) -> None:
        # never back: a part may turn out longer than the first ones said
        self.bar.update(max(int(place) - self.bar.n, 0))
        self._show()

    def _show(self) -> None:
        if self.bar.disable:
            return
        elapsed = max(self.bar.format_dict["elapsed"], 1e-9)
        speed = f", {self.seen / elapsed:,.0f} tokens/s" if self.seen else ""
        self.bar.set_postfix_str(f"{self.pairs_done} of {self.pairs} {self.things}{speed}")
