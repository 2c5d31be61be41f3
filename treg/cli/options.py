"""The options of the commands: dataclasses, read from the command line and from YAML.

The options of a source of token rewards are not known before the source is: `--rewards NAME` names
it, and `--rewards.OPTION` are the fields of its own dataclass. In YAML they may be nested:

    rewards:
      name: contrastive
      prompts: prompts.yaml

So it is with the formats of marked answers, `--format NAME` and `--format.OPTION`.
"""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from treg.cli import texts
from treg.cli.help_page import CONFIG, HELP, HELP_ALL, TRAINING, lines_of, page
from treg.cli.kinds import (
    AnnotateOnlyOptions,
    ConfigOptions,
    DemoOptions,
    EvaluateOptions,
    InspectOptions,
    MarkedOptions,
    MergeOptions,
    ModelOptions,
    RewardsOptions,
    RowOptions,
    ServingOptions,
    TrainOptions,
)
from treg.cli.other_names import hint, own_name
from treg.cli.yaml_options import (
    OWN_OPTIONS,
    flat_yaml,
    options_by_name,
    options_of_several,
    set_defaults,
)
from treg.rewards.names import DEFAULT_SOURCE
from treg.trainer.arguments import LossArguments

PAGES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "annotate": (
        texts.ANNOTATE,
        (ModelOptions, ServingOptions, RowOptions, AnnotateOnlyOptions, RewardsOptions),
    ),
    "train": (texts.TRAIN, (ModelOptions, RowOptions, TrainOptions, RewardsOptions, LossArguments)),
    "inspect": (texts.INSPECT, (InspectOptions,)),
    "evaluate-credit": (texts.EVALUATE, (MarkedOptions, EvaluateOptions, RewardsOptions)),
    "demo": (texts.DEMO, (DemoOptions,)),
    "doctor": (texts.DOCTOR, ()),
    "merge": (texts.MERGE, (MergeOptions,)),
    "config": (texts.CONFIG, (ConfigOptions,)),
}
# a trainer has them with defaults of its own, in the table of the page
NOT_SHOWN = ("learning_rate", "logging_steps", "remove_unused_columns")
# argparse's own takes -1e-3 for an option
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)


def words(text: str) -> tuple[str, ...]:
    """Names that are separated by blanks and ends of lines."""
    return tuple(text.split())


def parse(name: str, argv: Sequence[str], kinds: Sequence[Any]) -> list[Any]:
    """The options of a command, one object of each kind.

    Raises:
        ValueError: an unknown option, or a bad value in the file. SystemExit: --help, or what
            argparse refuses.
    """
    early, _ = _early_parser(name).parse_known_args(argv)
    if early.help or early.help_all:
        print(help_text(name, argv), end="")
        raise SystemExit(0)
    from transformers.hf_argparser import string_to_bool

    values = flat_yaml(early.config) if early.config else {}
    parser = _parser(name, kinds)
    own_fields: dict[str, list[str]] = {}
    by_name, several = options_by_name(kinds), options_of_several(kinds)
    for option in _naming(kinds):
        own = _options_of(option, _named(option, early, values))
        if own is not None:
            own_fields[option] = _add_own_options(parser, own, f"{option}.")
            by_name |= {f"{option}.{x}" for x in options_by_name([own])}
    for action in parser._actions:
        if action.dest in several and action.nargs is None:
            action.nargs = "+"
        if action.type is string_to_bool and action.nargs is None:  # `bool | None`
            action.nargs, action.const = "?", True
    if early.config:
        set_defaults(parser, early.config, values, by_name, several)
    known = parser._option_string_actions
    argv = _with_own_names(name, argv, known)
    _check_counts(argv, known)
    namespace = vars(parser.parse_args(argv))
    for option in several & namespace.keys():
        value = namespace[option]
        if isinstance(value, list) and len(value) == 1:
            namespace[option] = value[0]
    try:
        found = [_of_kind(kind, namespace) for kind in kinds]
    except (ValueError, TypeError) as error:  # of transformers' own arguments
        raise ValueError(str(error)) from error
    for options in found:
        _set_own_options(options, own_fields, namespace)
    return found


def _set_own_options(options: Any, fields: dict[str, list[str]], namespace: dict[str, Any]) -> None:
    """What was given of the options of a source or a format, on the options that name it."""
    option = getattr(options, "OWN", None)
    if option is not None:
        given = {x: f"{option}.{x}" for x in fields.get(option, ())}
        values = {x: namespace[dest] for x, dest in given.items() if dest in namespace}
        setattr(options, f"{option}_options", values)


def help_text(name: str, argv: Sequence[str]) -> str:
    """The page of a command; with --help_all, every argument of training too, and with --rewards
    the options of that source.
    """
    early, _ = _early_parser(name).parse_known_args(argv)
    values = flat_yaml(early.config) if early.config else {}
    text, kinds = PAGES[name]
    trains = LossArguments in kinds
    lines = [line for kind in kinds for line in lines_of(kind, "loss")]
    if trains:
        lines = [x for x in lines if x.name not in NOT_SHOWN] + list(TRAINING)
    if trains and early.help_all:
        from treg.trainer import TRegConfig

        shown = {x.name for x in lines}
        every = lines_of(TRegConfig, "other arguments of transformers")
        lines += [x for x in every if x.name not in shown]
    more = []
    for option in _naming(kinds):
        named = _named(option, early, values)
        word = OWN_OPTIONS[option]
        if named is None:
            title = f"options of a {word}:\n  --{option}.OPTION VALUE"
            more.append(f"{title:<46}treg {name} --{option} NAME --help shows those of NAME")
        else:
            lines += [
                line._replace(name=f"{option}.{line.name}")
                for line in lines_of(_options_of(option, named), f"options of the {word} {named!r}")
            ]
    lines += [HELP, *([HELP_ALL] if trains else []), CONFIG]
    return page(name, text, lines, more="\n".join(more))


def _naming(kinds: Sequence[Any]) -> list[str]:
    """The options of these kinds that name something with options of its own."""
    return [kind.OWN for kind in kinds if hasattr(kind, "OWN")]


def _named(option: str, early: argparse.Namespace, values: dict[str, Any]) -> str | None:
    """What is named by such an option."""
    found = getattr(early, option) or values.get(option)
    return None if found is None else str(found)


def _options_of(option: str, named: str | None) -> Any:
    """The dataclass of the options of what is named; None where nothing is, and nothing need be."""
    if option == "rewards":
        from treg.rewards.registry import source_class

        return source_class(named or DEFAULT_SOURCE).Options
    if named is None:
        return None  # argparse says that it is required
    from treg.evaluate.readers import reader_options

    return type(reader_options(named))


def _with_own_names(name: str, argv: Sequence[str], known: Any) -> list[str]:
    """The arguments with names of other programs replaced by ours.

    Raises:
        ValueError: an option that is not known.
    """
    names = [x.removeprefix("--") for x in known]
    given = [x.partition("=")[0].removeprefix("--") for x in argv if x.startswith("--")]
    found = []
    for argument in argv:
        if argument.startswith("--"):
            option, equals, value = argument.removeprefix("--").partition("=")
            own = own_name(option, names, given)
            if own not in names:
                raise ValueError(
                    f"unknown option --{option}{hint(option, names, '--')}; see treg {name} --help"
                )
            argument = f"--{own}{equals}{value}"
        found.append(argument)
    return found


def _check_counts(argv: Sequence[str], known: Any) -> None:
    """ValueError for data that are given twice, of which argparse would take the last alone, and
    for several values of an option that takes one, which it would not name.
    """
    given: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            given.append((option, [value] if equals else []))
        elif given:
            given[-1][1].append(word)
    options = [option for option, _ in given]
    for option, values in given:
        name, one = option.removeprefix("--"), known[option].nargs in (None, "?")
        if one and len(values) > 1:
            raise ValueError(f"{name}: expected one value, got {values}")
        if name in ("data", "data_weights", "eval_data") and options.count(option) > 1:
            where = "" if one else ", with all of them behind it"
            raise ValueError(
                f"{name}: expected {option} once{where}, got it {options.count(option)} times"
            )


def _of_kind(kind: Any, namespace: dict[str, Any]) -> Any:
    names = [x.name for x in dataclasses.fields(kind) if x.init]
    return kind(**{name: namespace[name] for name in names})


def _early_parser(name: str) -> argparse.ArgumentParser:
    """What must be known before the other options are."""
    parser = argparse.ArgumentParser(prog=f"treg {name}", add_help=False, allow_abbrev=False)
    for option in OWN_OPTIONS:
        parser.add_argument(f"--{option}")
    _add_common(parser)
    return parser


def _parser(name: str, kinds: Sequence[Any]) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        tuple(kinds),
        prog=f"treg {name}",
        usage=f"treg {name} [--config FILE] [options]",
        add_help=False,
        allow_abbrev=False,
    )
    _add_common(parser)
    parser._negative_number_matcher = NEGATIVE_NUMBER
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="Show this and exit.")
    add("--help_all", action="store_true", help="Show every training argument and exit.")
    add("--config", metavar="FILE", help="YAML file of these options; the command line wins.")


def _add_own_options(parser: argparse.ArgumentParser, kind: Any, prefix: str) -> list[str]:
    """Options for the fields of the Options of a source or a format; their names without the
    prefix.
    """
    annotations = typing.get_type_hints(kind)
    names = []
    for option in dataclasses.fields(kind):
        if not option.init:
            continue
        names.append(option.name)
        words = [option.name]
        if "_" in option.name:
            words.append(option.name.replace("_", "-"))  # as HfArgumentParser has them
        parser.add_argument(
            *(f"--{prefix}{word}" for word in words),
            dest=f"{prefix}{option.name}",
            default=argparse.SUPPRESS,  # what is not given is left to the dataclass
            **_reading(option.name, annotations[option.name]),
        )
    return names


def _reading(what: str, annotation: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    from transformers.hf_argparser import string_to_bool

    members = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = list(typing.get_args(annotation))
    for member in members:
        if member is bool:
            return {"type": string_to_bool, "nargs": "?", "const": True}
        if member in (str, int, float):
            return {"type": member}
        if typing.get_origin(member) is typing.Literal:
            choices = typing.get_args(member)
            return {"type": type(choices[0]), "choices": choices}
        if typing.get_origin(member) in (list, tuple):
            one = _reading(what, typing.get_args(member)[0])
            one.pop("const", None)  # what a switch means without a value
            return one | {"nargs": "+"}
    raise ValueError(
        f"{what}: expected a type that the command line can read (str, int, float, bool, Literal, "
        f"or a list of one of them), got {annotation}"
    )
