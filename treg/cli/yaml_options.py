"""Options from a YAML file: the values that the command line does not give."""

import argparse
import json
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from treg.cli.other_names import hint, own_name
from treg.files import read_yaml

# options that name something with options of its own, which stand nested under them: what it is
OWN_OPTIONS = {"rewards": "source", "format": "format"}
NOT_IN_FILES = ("help", "help_all", "config")


def flat_yaml(path: str) -> dict[str, Any]:
    """The options in a YAML file, those nested under one of OWN_OPTIONS by their names on the
    command line.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected option names and values, got {type(values).__name__}")
    flat = {}
    for name, value in values.items():
        if name in OWN_OPTIONS and isinstance(value, dict):
            own = dict(value)
            flat[name] = own.pop("name", None)
            flat |= {f"{name}.{option}": x for option, x in own.items()}
        else:
            flat[name] = value
    return flat


def set_defaults(
    parser: argparse.ArgumentParser,
    path: str,
    values: dict[str, Any],
    by_name: set[str],
    several: set[str],
) -> None:
    """Let the values of a YAML file stand in for options that the command line does not give.

    by_name: options that hold values by name; the command line takes them as JSON.
    several: options that hold one text or several.
    """
    actions = {action.dest: action for action in parser._actions}
    for given, value in values.items():
        name = own_name(str(given), actions, values)
        if name not in actions or name in NOT_IN_FILES:
            raise ValueError(f"{path}: unknown option {given!r}{hint(str(given), actions)}")
        action = actions[name]
        if name in by_name:
            value = _json_of_names(value)
        if isinstance(value, _JSON):
            value = [value] if action.nargs == "+" else value
        elif name in several and isinstance(value, list):
            value = [str(x) for x in value]
        elif value is not None or action.choices is not None:
            value = _converted(action, value, f"{path}: {name}")
        action.required = False
        parser.set_defaults(**{name: value})


class _JSON(str):
    """A mapping as JSON."""


def _json_of_names(value: Any) -> Any:
    """A value of YAML with its mappings, or those of its list, as JSON."""
    if isinstance(value, dict):
        return _JSON(json.dumps(value, default=str))
    if isinstance(value, list):
        return [_json_of_names(x) if isinstance(x, dict) else x for x in value]
    return value


def options_by_name(kinds: Sequence[Any]) -> set[str]:
    """The fields that take a dict, or a list of dicts, or the same as JSON."""
    names = set()
    for kind in kinds:
        for name, annotation in typing.get_type_hints(kind).items():
            members = _members(annotation)
            if str in members and dict in members:
                names.add(name)
    return names


def options_of_several(kinds: Sequence[Any]) -> set[str]:
    """The fields that take one text or a list of them, such as report_to."""
    names = set()
    for kind in kinds:
        for name, annotation in typing.get_type_hints(kind).items():
            members = typing.get_args(annotation)
            lists = any(typing.get_origin(member) is list for member in members)
            if str in members and lists and dict not in _members(annotation):
                names.add(name)
    return names


def _members(annotation: Any) -> set[Any]:
    """The types that a value may have, or the elements of its list."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        return set().union(*map(_members, typing.get_args(annotation)))
    return {typing.get_origin(annotation) or annotation}


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    """A value of a YAML file as the command line would give it: 1e-5 is a string in YAML."""
    if action.nargs in ("+", "*"):
        given = value if isinstance(value, list) else [value]
        return [_converted_one(action, x, where) for x in given]
    return _converted_one(action, value, where)


def _converted_one(action: argparse.Action, value: Any, where: str) -> Any:
    nested = isinstance(value, (list, dict))
    if value is None and action.nargs == "+":
        raise ValueError(f"{where}: expected a value in each place of the list, got nothing in one")
    if nested and action.type in (str, int, float):
        raise ValueError(f"{where}: expected one value, got {value!r}")
    if isinstance(value, bool) and action.type in (int, float):
        raise ValueError(f"{where}: expected a number, got {value!r}")
    if action.type is not None and not nested and not isinstance(value, bool):
        convert: Callable[[str], Any] = action.type  # type: ignore[assignment]
        try:
            value = convert(str(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    if action.choices is not None and value not in action.choices:
        raise ValueError(
            f"{where}: expected one of {', '.join(map(str, action.choices))}, got {value!r}"
        )
    return value
