"""Pairs in parts that take about a minute each at most, whatever the machine does meanwhile."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from treg.data import Pair, pair_tokens
from treg.rewards.engines import Engine

LEAST_PARTS = 8  # as far as there are so many pairs: processes share the parts among them
# floating-point operations of about a minute, by the kind of device
MINUTE = {"cpu": 2e12, "other": 6e15}
# tokens that are run for a token of a pair: the reference, and the requests about it
RUN_PER_TOKEN = 4


def cut_parts(order: Sequence[Pair], most_pairs: int, most_tokens: int) -> list[Sequence[Pair]]:
    """The pairs in order, cut where a part has most_pairs, or would have more than most_tokens (see
    `pair_tokens`); a pair that is longer is a part of its own.

    Few pairs are cut into LEAST_PARTS all the same. Neither time nor the number of processes plays
    a part: a run that goes on after a stop finds the same parts.
    """
    most_pairs = min(most_pairs, max(1, math.ceil(len(order) / LEAST_PARTS)))
    parts, start, tokens = [], 0, 0
    for i, pair in enumerate(order):
        own = pair_tokens(vars(pair))
        if i > start and (i - start >= most_pairs or tokens + own > most_tokens):
            parts.append(order[start:i])
            start, tokens = i, 0
        tokens += own
    return [*parts, order[start:]] if order else []


def part_tokens(model: Any) -> int:
    """Tokens of pairs that a model judges in about a minute, by its parameters and its device.

        tokens = MINUTE / (2 * parameters * RUN_PER_TOKEN)

    where a token takes two operations a parameter; an `Engine` says it itself.
    """
    if isinstance(model, Engine):
        return model.part_tokens
    parameters = sum(x.numel() for x in model.parameters())
    work = MINUTE["cpu" if model.device.type == "cpu" else "other"]
    return max(1, int(work / (2 * parameters * RUN_PER_TOKEN)))


@contextlib.contextmanager
def kept_on_interrupt(files: Sequence[Path], parts: Sequence[Sequence[Pair]]) -> Iterator[None]:
    """Let an interruption say what is finished."""
    try:
        yield
    except KeyboardInterrupt:
        there = [len(part) for file, part in zip(files, parts, strict=True) if file.exists()]
        pairs = sum(map(len, parts))
        raise KeyboardInterrupt(
            f"{sum(there)} of {pairs} pairs are finished and kept in {files[0].parent}"
        ) from None
