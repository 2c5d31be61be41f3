"""Which cases of a test with several parametrizations run.

In Triton's interpreter, where a case takes a second, those run in which any two values of two
parametrizations meet once; the PyTorch implementation takes milliseconds, and runs all. Of a test
marked `pairwise` the same is chosen of all its cases, and the implementation is a parametrization
like the others. A GPU runs every case; so does TREG_EVERY_CASE=1 without one.
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest


def left_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases that show no new pair of values."""
    if os.environ.get("TREG_EVERY_CASE"):
        return []
    tests = defaultdict(list)
    for item in items:
        chosen = any(item.get_closest_marker(x) is not None for x in ("pairwise", "interp"))
        if chosen and hasattr(item, "callspec"):
            tests[item.path, item.cls, item.originalname].append(item)
    found = []
    for cases in tests.values():
        run = covering([values_of(item) for item in cases])
        found += [item for i, item in enumerate(cases) if i not in run]
    return found


def values_of(item: pytest.Item) -> dict[str, str]:
    """As text, since values may be dictionaries or tensors."""
    return {name: repr(value) for name, value in item.callspec.params.items()}


def covering(cases: Sequence[Mapping[str, str]]) -> set[int]:
    """Indices of cases that hold every pair (value of a, value of b) which any case holds. Each
    next one holds the most that are missing, the first of them where several do.
    """
    missing = set().union(*map(pairs, cases))
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(pairs(cases[i]) & missing), -i))
        chosen.add(best)
        missing -= pairs(cases[best])
    return chosen


def pairs(case: Mapping[str, str]) -> set[tuple]:
    """A case of one parameter holds that parameter's value."""
    values = sorted(case.items())
    return set(itertools.combinations(values, 2)) or set(values)
