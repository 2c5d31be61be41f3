"""Sources by name: which there are, how one is loaded, and what it gives."""

import importlib
from collections import UserDict
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from treg.data import SIDES
from treg.rewards.base import Context, TokenRewardSource
from treg.rewards.names import SOURCE_PATHS, nearest
from treg.rewards.options import check_types


class _Sources(UserDict):
    """Classes by name; one of the package's own is imported when it is asked for."""

    def __getitem__(self, name: str) -> type[TokenRewardSource]:
        found = self.data[name]
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = self.data[name] = getattr(importlib.import_module(module), attribute)
        return found


SOURCES = _Sources(SOURCE_PATHS)


def load_source(name: str, options: Mapping[str, Any], context: Context) -> TokenRewardSource:
    """A source, ready to score. One that the context has with equal options is given again.

    Args:
        name: a key of SOURCES, or "package.module:Class" for a class of one's own.
        options: values of the fields of the class's Options.
        context: the reference model, its tokenizer, and what else a source may use.
    Raises:
        ValueError: no such source; an option that it does not have; whatever it refuses itself.
    """
    kind, made_with = source_class(name), make_options(name, options)
    for known, equal, source in context.loaded:
        if known == name and equal == made_with:
            return source
    source = kind(made_with, context)
    context.loaded.append((name, made_with, source))
    return source


def source_class(name: str) -> type[TokenRewardSource]:
    """The class of a source, by its name in SOURCES or by "package.module:Class"."""
    if name in SOURCES:
        return SOURCES[name]
    module, colon, attribute = str(name).partition(":")
    if not colon:
        raise ValueError(
            f"rewards: expected one of {', '.join(SOURCES)}, or package.module:Class, got {name!r}"
            f"{nearest(name, SOURCES)}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"rewards: expected a class that Python can import as {name!r}, got: {error}; its "
            "folder must be in PYTHONPATH"
        ) from error
    _check_source(name, found)
    return found


def streams_given(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The streams of a source with these options, known before it is loaded.

    They are those of its class, unless its Options say otherwise by a property of that name.
    """
    found: Any = make_options(name, options)
    kind: Any = source_class(name)
    return found.streams if hasattr(found, "streams") else kind.streams


def columns_read(name: str, options: Mapping[str, Any]) -> frozenset[str]:
    """The columns of the data that a source with these options reads: those that an option whose
    name ends in "column" names; of a source of sources, those of all.
    """
    made = make_options(name, options)
    found: set[str] = set()
    for entry in getattr(made, "entries", ()):
        found |= columns_read(entry.name, entry.options)

    def look(option: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                look(str(key), item)
        elif isinstance(value, str) and option.endswith("column"):
            found.update(value.replace("{side}", side) for side in SIDES)

    for x in fields(made):
        look(x.name, getattr(made, x.name))
    return frozenset(found)


def options_say(fact: str, name: str, options: Mapping[str, Any]) -> bool:
    """Whether the Options of a source, or of one that it takes numbers of, say a fact of
    `treg.rewards.base.FACTS`.
    """
    made = make_options(name, options)
    inner = [(entry.name, entry.options) for entry in getattr(made, "entries", ())]
    if hasattr(made, "inner_options"):
        inner.append((made.of, made.inner_options))
    return getattr(made, fact, False) or any(options_say(fact, *given) for given in inner)


def _check_source(name: str, found: Any) -> None:
    """ValueError unless found has what `TokenRewardSource` says."""
    kind = getattr(found, "Options", None)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(f"{name}: expected Options, a frozen dataclass, got {kind!r}")
    streams = getattr(found, "streams", None)
    named = isinstance(streams, tuple) and all(isinstance(x, str) for x in streams)
    if not named or not streams:
        raise ValueError(
            f"{name}: expected streams, a tuple of names such as ('token_rewards',), got "
            f"{streams!r}"
        )
    for method in ("settings", "check", "score"):
        if not callable(getattr(found, method, None)):
            raise ValueError(f"{name}: expected the method {method}, found none")


def make_options(name: str, given: Mapping[str, Any]) -> Any:
    """The Options of a source, from values by name.

    Raises:
        ValueError: a name that is no option of it, with the nearest one; an option that is missing;
            a value of another type (see `check_types`); what Options itself refuses.
    """
    kind = source_class(name).Options
    known = {x.name: x for x in fields(kind) if x.init}
    for option in given:
        if option not in known:
            raise ValueError(
                f"rewards.{option}: the source {name!r} has no such option"
                f"{nearest(option, known)}; it has {', '.join(known) or 'none'}"
            )
    for option, x in known.items():
        required = x.default is MISSING and x.default_factory is MISSING
        if required and given.get(option) is None:
            what = x.metadata.get("help", "").rstrip(".")
            raise ValueError(
                f"rewards.{option}: expected a value, which the source {name!r} needs"
                f"{what and f' ({what})'}, got none"
            )
    check_types(kind, given)
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"rewards.*: the source {name!r} refuses its options: {error}") from error
