"""Values of options by their annotations, before a source sees them."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from treg.cli.options import RewardsOptions, RowOptions, parse
from treg.rewards import SOURCES, make_options, nearest
from treg.rewards.annotate import AnnotateOptions
from treg.rewards.options import numbers_by_name


@dataclass(frozen=True)
class Given:
    text: str = ""
    whole: int = 0
    number: float = 0.0
    flag: bool = False
    choice: Literal["a", "b", 3] = "a"
    maybe: float | None = None
    words: list[str] = field(default_factory=list)
    either: list[str | dict[str, Any]] | str | None = None
    named: dict[str, float] | None = None
    anything: Any = None
    other: set | None = None


class Own:
    Options = Given
    streams = ("token_rewards",)


@pytest.fixture(autouse=True)
def own_source(monkeypatch):
    monkeypatch.setitem(SOURCES, "own", Own)


FIT = {
    "text": ["", "x"],
    "whole": [0, -3],
    "number": [0, 1.5, -2],
    "flag": [True, False],
    "choice": ["a", "b", 3],
    "maybe": [None, 1, 0.5],
    "words": [[], ["a"], ("a", "b")],
    "either": [None, "a", ["a", {"b": 1}]],
    "named": [{}, {"a": 1, "b": 0.5}],
    "anything": [None, 3, object()],
    "other": [None, {1}],
}


@pytest.mark.parametrize("name", FIT)
def test_what_fits_is_taken_as_it_is(name):
    for value in FIT[name]:
        assert getattr(make_options("own", {name: value}), name) is value


REFUSED = {
    "text": ([1, None, True, ["a"], b"a"], "text"),
    "whole": ([1.0, True, "1", None], "an integer"),
    "number": (["1", True, None, [1.0]], "a number"),
    "flag": ([1, 0, "false", None], "True or False"),
    "choice": (["c", None, True, 3.0], "one of a, b, 3"),
    "maybe": (["1", False], "a number or None"),
    "words": (["a", [1], {"a": 1}, None], "a list of text"),
    "either": ([3, [3]], "a list of (text or values by name) or text or None"),
    "named": (["a=1", {"a": "1"}], "values by name or None"),
    "other": ([[1]], "set or None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_types_are_refused_by_name(name):
    values, said = REFUSED[name]
    for value in values:
        message = f"rewards.{name}: expected {said}, got {value!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make_options("own", {name: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("contrastive", {"show_response": "false"}),
        ("edits", {"end": "false"}),
        ("redistribution", {"model": "x", "beta_c": True}),
        ("implicit", {"model": 3}),
        ("spans", {"values": 3}),
    ],
)
def test_values_that_sources_took_for_others(name, options):
    with pytest.raises(ValueError, match=rf"^rewards\.{list(options)[-1]}: expected "):
        make_options(name, options)


@pytest.mark.parametrize("name", ["redistribution", "implicit"])
def test_none_is_no_value_where_one_is_needed(name):
    with pytest.raises(ValueError, match=r"rewards\.model: expected a value, .* got none"):
        make_options(name, {"model": None})


# -- numbers by name


@pytest.mark.parametrize(
    "given",
    [
        {"a": 1, "b=c": -0.5},
        ["a=1", "b=c=-0.5"],
        '{"a": 1, "b=c": -0.5}',
        ["a=1", '{"b=c": -0.5}'],
    ],
    ids=str,
)
def test_every_form_of_numbers_by_name(given):
    assert numbers_by_name("x", given, "NAME=NUMBER") == {"a": 1.0, "b=c": -0.5}


def test_one_number_and_none():
    assert numbers_by_name("x", "minor=-1", "NAME=NUMBER") == {"minor": -1.0}
    for nothing in (None, [], {}, "{}"):
        assert numbers_by_name("x", nothing, "NAME=NUMBER") == {}
    assert make_options("spans", {"values": "minor=-1"}).by_label == {"minor": -1.0}
    assert make_options("spans", {"values": {"minor": -1}}).by_label == {"minor": -1.0}
    assert make_options("several", {"mix": "surprise=2"}).weights == {"surprise": 2.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a=1", "a=2"], "x: expected each name once, got 'a' twice"),
        (["a=1", '{"a": 1}'], "x: expected each name once, got 'a' twice"),
        (["a"], "x: expected NAME=NUMBER, got 'a'"),
        (["=1"], "x: expected NAME=NUMBER, got '=1'"),
        (["a=nan"], "x: expected NAME=NUMBER, got 'a=nan'"),
        (["a=-inf"], "x: expected NAME=NUMBER, got 'a=-inf'"),
        ({"a": True}, "x: expected NAME=NUMBER, got {'a': True}"),
        ({"a": None}, "x: expected NAME=NUMBER, got {'a': None}"),
        ("{", """x: expected a JSON object, {"KEY": VALUE}, got '{'"""),
    ],
)
def test_what_is_no_number_by_name(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        numbers_by_name("x", given, "NAME=NUMBER")


# -- on the command line


@pytest.mark.parametrize("text", ["-1e-3", "-1E+2", "-.5e1", "-5", "-0.25", "-2."])
def test_negative_numbers_on_the_command_line(text):
    argv = ["--data", "x", "--rewards", "spans", "--rewards.inside", text]
    _, found = parse("annotate", argv, (RowOptions, RewardsOptions))
    assert found.rewards_options == {"inside": float(text)}


def test_numbers_by_label_in_yaml(tmp_path):
    config = tmp_path / "run.yaml"
    for values in ("{minor: -1, major: -5e-1}", "[minor=-1, major=-0.5]"):
        config.write_text(f"rewards:\n  name: spans\n  values: {values}\n")
        argv = ["--data", "x", "--config", str(config)]
        _, found = parse("annotate", argv, (RowOptions, RewardsOptions))
        made = make_options("spans", found.rewards_options)
        assert made.by_label == {"minor": -1.0, "major": -0.5}


def test_names_that_are_not_known():
    assert nearest("tdpo", ["dpo", "tdpo1", "tdpo2"]) == "; did you mean 'tdpo1' or 'tdpo2'?"
    assert nearest("dpoo", ["tgdpo", "dpo", "d2po"]) == "; did you mean 'dpo'?"
    assert nearest("x", ["dpo"]) == nearest(5, []) == ""
    with pytest.raises(ValueError, match=r"rewards: expected one of .*, got 5"):
        AnnotateOptions(rewards=5)
