"""What the options of a source may hold, by the annotations of its Options."""

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from treg.data.reading import json_object

NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    type(None): "None",
    dict: "values by name",
}


def check_types(kind: type, given: Mapping[str, Any], prefix: str = "rewards") -> None:
    """ValueError for a value of another type than the annotation of its field.

    An integer passes as a float, True and False are no numbers, and a tuple passes as a list. Types
    that are not named here are left to Options itself.

    Args:
        kind: a dataclass. given: values of fields by name. prefix: of their names in errors.
    """
    annotations = typing.get_type_hints(kind)
    for name, value in given.items():
        if not _fits(value, annotations[name]):
            got = repr(value)
            # such as that of a model: its layers would fill a page
            if "\n" in got or len(got) > 200:
                got = f"an object of the type {type(value).__name__}"
            raise ValueError(f"{prefix}.{name}: expected {_said(annotations[name])}, got {got}")


def _fits(value: Any, annotation: Any) -> bool:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in members)
    if origin is typing.Literal:
        return any(type(value) is type(member) and value == member for member in members)
    if (origin or annotation) in (list, tuple):
        one = members[0] if members else Any
        return isinstance(value, (list, tuple)) and all(_fits(x, one) for x in value)
    if (origin or annotation) is dict:
        one = members[1] if members else Any
        return isinstance(value, Mapping) and all(_fits(x, one) for x in value.values())
    if annotation in (int, float):
        numbers = int if annotation is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, annotation) if isinstance(annotation, type) else True


def _said(annotation: Any) -> str:
    """A type in the words of an error."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_said, members))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin in (list, tuple):
        one = _said(members[0])
        return f"a list of ({one})" if " or " in one else f"a list of {one}"
    return NAMES.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def numbers_by_name(
    option: str, given: Mapping[str, Any] | Sequence[str] | str | None, form: str
) -> dict[str, float]:
    """Finite numbers by name, from a mapping, the same as JSON, NAME=NUMBER, or a list of the last
    two; empty for None.

    Args:
        option, form: for errors: the option's name, and what is expected, such as "LABEL=NUMBER".
    Raises:
        ValueError: anything else, or a name that is given twice.
    """
    found: dict[str, float] = {}
    for item in [given] if isinstance(given, (str, Mapping)) else given or []:
        for name, number in _named(option, item):
            try:
                value = float(number)
            except (TypeError, ValueError):
                value = float("nan")
            finite = value - value == 0 and not isinstance(number, bool)
            if not name or not finite:
                raise ValueError(f"{option}: expected {form}, got {item!r}")
            if name in found:
                raise ValueError(f"{option}: expected each name once, got {name!r} twice")
            found[name] = value
    return found


def _named(option: str, item: Mapping[str, Any] | str) -> list[tuple[str, Any]]:
    """Names and what stands for their numbers."""
    if isinstance(item, Mapping) or str(item).lstrip().startswith("{"):
        return list(json_object(option, item).items())
    name, _, number = str(item).rpartition("=")
    return [(name, number)]
