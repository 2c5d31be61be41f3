"""Which cases of a test run: tests/support/pairs.py."""

import itertools

import pytest
from pairs import covering, pairs

AXES = {
    "two by two": {"a": "xy", "b": "xy"},
    "three of two": {"a": "xy", "b": "xy", "c": "xy"},
    "uneven": {"impl": "pt", "dtype": "fbh", "head": "12345", "needs": "uvw"},
    "one": {"a": "xyz"},
}


def product(axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@pytest.mark.parametrize("name", AXES)
def test_any_two_values_meet(name):
    cases = product(AXES[name])
    chosen = covering(cases)
    held = set().union(*(pairs(cases[i]) for i in chosen))
    assert held == set().union(*map(pairs, cases))
    sizes = sorted(map(len, AXES[name].values()))
    least = sizes[-1] * (sizes[-2] if len(sizes) > 1 else 1)
    assert least <= len(chosen) <= 2 * least and len(chosen) <= len(cases)


def test_pairs_that_no_case_holds_are_not_asked_for():
    cases = [{"a": "x", "b": "1"}, {"a": "y", "b": "2"}, {"a": "y", "b": "2"}]
    assert covering(cases) == {0, 1}
