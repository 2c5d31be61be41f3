"""The options of the commands: dataclasses, read from the command line and from YAML.

The options of a source of token rewards are not known before the source is: `--rewards NAME` names
it, and `--rewards.OPTION` are the fields of its own dataclass. In YAML they may be nested:

    rewards:
      name: contrastive
      prompts: prompts.yaml
"""

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from treg.files import read_yaml
from treg.rewards import DEFAULT_SOURCE, SOURCES, nearest, source_class
from treg.rewards.shaping import STEPS

SOURCE_PREFIX = "rewards."
# argparse's own takes -1e-3 for an option
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)


def words(text: str) -> tuple[str, ...]:
    """Names that are separated by blanks and ends of lines."""
    return tuple(text.split())


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    model: str = field(metadata={"help": "Folder or hub name of a causal LM."})
    tokenizer: str | None = _option(
        None, "Folder or hub name of the tokenizer, if not the model's."
    )
    chat_template: str | None = _option(
        None, "A Jinja file that replaces the tokenizer's chat template."
    )
    dtype: str | None = _option(
        None, "float32, bfloat16, float16 or auto. Default: auto, for training float32."
    )
    attn_implementation: str | None = _option(None, "E.g. sdpa, flash_attention_2.")


@dataclass
class RowOptions:
    data: str = field(
        metadata={"help": "JSONL(.gz), JSON, parquet, a folder, or a hub name: see the README."}
    )
    split: str = _option("train", "Split of a hub dataset.")
    limit: int | None = _option(None, "Look at the first rows only.")
    strict: bool = _option(
        False, "Stop at the first row that cannot be used, instead of counting it."
    )


@dataclass
class RewardsOptions:
    """Where token rewards come from. rewards_options: what was given of the source's own."""

    rewards: str | None = _option(
        None,
        f"Source of token rewards: {', '.join(SOURCES)}, or package.module:Class for your own. "
        f"Default: {DEFAULT_SOURCE}.",
    )
    prompts: str | None = _option(None, "Short for --rewards.prompts.")
    tokens_per_batch: int = _option(16384, "Tokens of one forward of the annotating model.")
    no_share_prefix: bool = _option(
        False, "Do not share the common beginning of two contexts of a response."
    )
    shape: list[str] | None = field(
        default=None,
        metadata={
            "help": "What is done to the rewards of each response, in this order: "
            + " ".join(kind.form for kind in STEPS.values())
        },
    )
    rewards_options: dict[str, Any] = field(default_factory=dict, init=False)


@dataclass
class AnnotateOnlyOptions:
    output: str = field(
        metadata={"help": "The parquet file to write. Run again after a stop: it goes on."}
    )
    max_length: int = _option(1024, "Tokens of prompt and completion.")
    per_token: bool = _option(False, "Keep the reference's log-prob of every token as well.")
    no_reference: bool = _option(
        False, "Keep no log-probs of the reference, for objectives that need none."
    )
    keep_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of the data that the file keeps, such as chosen_safe."},
    )


@dataclass
class TrainOptions:
    eval_data: str | None = _option(None, "Held-out pairs, in any form that --data has.")
    eval_split: str = _option("test", "Split of held-out pairs from a hub dataset.")
    ref_model: str | None = _option(
        None, "The reference. Default: the model itself, as it is before training."
    )
    use_peft: bool = _option(False, "Train LoRA adapters; the model without them is the reference.")
    lora_r: int = _option(16, "Rank of the adapters.")
    lora_alpha: int = _option(32, "Scale of the adapters.")
    lora_dropout: float = _option(0.0, "Dropout of the adapters.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get adapters. Default: all linear ones."}
    )


@dataclass
class InspectOptions:
    data: str = field(metadata={"help": "An annotated parquet file."})
    model: str | None = _option(
        None, "A trained model: its implicit rewards are shown beside the token rewards."
    )
    ref_model: str | None = _option(
        None, "The reference model, if the file keeps no log-probs of each token."
    )
    tokenizer: str | None = _option(
        None, "Folder or hub name of the tokenizer, if not the model's."
    )
    dtype: str | None = _option(
        None,
        "float32, bfloat16, float16 or auto. Default: float32 on a CPU, else what the model was "
        "trained in.",
    )
    stream: str | None = _option(
        None, "The per-token signal to show. Default: token_rewards, else the file's first."
    )
    run: str | None = _option(
        None, "Output folder of a training run, for its curves. Default: the model's."
    )
    output: str | None = _option(None, "The HTML page. Default: beside the data.")
    curves: str | None = _option(None, "Write the training curves to this PNG as well.")
    beta: float | None = _option(
        None, "Scale of the implicit rewards. Default: that of the run, else 0.1."
    )
    limit: int = _option(100, "Show the first pairs only.")
    terminal: bool = _option(False, "Print the pairs to the terminal as well.")


@dataclass
class DemoOptions:
    output: str = _option("treg-demo", "Folder for the annotated pairs, the page and the curves.")
    seeds: int = _option(5, "Training runs of each method.")
    pairs: int | None = _option(None, "Preference pairs to train on.")


# of transformers' many training arguments, those that --help shows; --help_all shows the others
SHOWN = words(
    """
    output_dir beta alpha gamma loss_type weighting loss_scalars label_smoothing max_length packing
    token_budget
    learning_rate per_device_train_batch_size gradient_accumulation_steps max_steps
    num_train_epochs lr_scheduler_type warmup_steps bf16 gradient_checkpointing use_liger_kernel
    eval_strategy eval_steps save_steps save_total_limit logging_steps report_to seed use_cpu
    ignore_fingerprint disable_dropout
    """
)


def parse(name: str, argv: Sequence[str], kinds: Sequence[Any], text: str) -> list[Any]:
    """The options of a command, one object of each kind.

    Raises:
        ValueError: an unknown option, or a bad value in the file. SystemExit: --help, or what
            argparse refuses.
    """
    early, _ = _early_parser(name).parse_known_args(argv)
    values = _flat_yaml(early.config) if early.config else {}
    parser = _parser(name, kinds, text)
    source_fields: list[str] = []
    by_name = _options_by_name(kinds)
    if RewardsOptions in kinds:
        source = early.rewards or values.get("rewards") or DEFAULT_SOURCE
        source_fields = _add_source_options(parser, str(source))
        own = _options_by_name([source_class(str(source)).Options])
        by_name |= {f"{SOURCE_PREFIX}{x}" for x in own}
    if early.help or early.help_all:
        _hide(parser, _training_arguments(kinds), every=early.help_all)
        parser.print_help()
        raise SystemExit(0)
    if early.config:
        _set_defaults(parser, early.config, values, by_name)
    known = parser._option_string_actions
    for given in (x.partition("=")[0] for x in argv if x.startswith("--")):
        if given not in known:
            raise ValueError(
                f"unknown option {given}{nearest(given, known)}; see treg {name} --help"
            )
    namespace = vars(parser.parse_args(argv))
    try:
        found = [_of_kind(kind, namespace) for kind in kinds]
    except (ValueError, TypeError) as error:  # of transformers' own arguments
        raise ValueError(str(error)) from error
    for options in found:
        if isinstance(options, RewardsOptions):
            given = {x: f"{SOURCE_PREFIX}{x}" for x in source_fields}
            options.rewards_options = {
                x: namespace[dest] for x, dest in given.items() if dest in namespace
            }
    return found


def _of_kind(kind: Any, namespace: dict[str, Any]) -> Any:
    names = [x.name for x in dataclasses.fields(kind) if x.init]
    return kind(**{name: namespace[name] for name in names})


def _early_parser(name: str) -> argparse.ArgumentParser:
    """What must be known before the other options are."""
    parser = argparse.ArgumentParser(prog=f"treg {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--rewards")
    _add_common(parser)
    return parser


def _parser(name: str, kinds: Sequence[Any], text: str) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        tuple(kinds),
        prog=f"treg {name}",
        usage=f"treg {name} [--config FILE] [options]",
        description=text,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser)
    parser._negative_number_matcher = NEGATIVE_NUMBER
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="Show this and exit.")
    add("--help_all", action="store_true", help="Show every training argument and exit.")
    add("--config", metavar="FILE", help="YAML file of these options; the command line wins.")


def _training_arguments(kinds: Sequence[Any]) -> set[str]:
    """Names of the options that transformers' training arguments have among these kinds."""
    from transformers import TrainingArguments

    names = set()
    for kind in kinds:
        if issubclass(kind, TrainingArguments):
            names |= {x.name for x in dataclasses.fields(kind)}
    return names


def _hide(parser: argparse.ArgumentParser, training: set[str], *, every: bool) -> None:
    """Make --help short: one spelling of each option, and of training's those that are SHOWN."""
    for action in parser._actions:
        unwanted = action.dest in training.difference(SHOWN) and not every
        # --no_NAME, which transformers adds to a switch that is on, with the text of the switch
        unwanted |= isinstance(action, argparse._StoreFalseAction)
        if unwanted or (action.dest == "help_all" and not training):
            action.help = argparse.SUPPRESS
        spellings = action.option_strings
        action.option_strings = spellings[-1:] if action.dest == "help" else spellings[:1]
        if action.nargs == 0 or action.metavar is not None:
            continue
        if action.choices:
            action.metavar = "NAME"
        elif action.nargs == "?":
            action.metavar = "BOOL"
        else:
            action.metavar = str(getattr(action.type, "__name__", "value")).upper()


def _add_source_options(parser: argparse.ArgumentParser, source: str) -> list[str]:
    """Options for the fields of a source's Options; their names without the prefix."""
    kind = source_class(source).Options
    group = parser.add_argument_group(f"options of the source {source!r}")
    annotations = typing.get_type_hints(kind)
    names = []
    for option in dataclasses.fields(kind):
        if not option.init:
            continue
        names.append(option.name)
        words = [option.name]
        if "_" in option.name:
            words.append(option.name.replace("_", "-"))  # as HfArgumentParser has them
        group.add_argument(
            *(f"--{SOURCE_PREFIX}{word}" for word in words),
            dest=f"{SOURCE_PREFIX}{option.name}",
            default=argparse.SUPPRESS,  # what is not given is left to the dataclass
            help=option.metadata.get("help"),
            **_reading(f"{source}: {option.name}", annotations[option.name]),
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


def _flat_yaml(path: str) -> dict[str, Any]:
    """The options in a YAML file, those nested under `rewards` by their names on the command
    line.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected option names and values, got {type(values).__name__}")
    flat = {}
    for name, value in values.items():
        if name == "rewards" and isinstance(value, dict):
            own = dict(value)
            flat["rewards"] = own.pop("name", None)
            flat |= {f"{SOURCE_PREFIX}{option}": x for option, x in own.items()}
        else:
            flat[name] = value
    return flat


def _set_defaults(
    parser: argparse.ArgumentParser, path: str, values: dict[str, Any], by_name: set[str]
) -> None:
    """Let the values of a YAML file stand in for options that the command line does not give.

    by_name: options that hold values by name; the command line takes them as JSON.
    """
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name not in actions or name in ("help", "help_all", "config"):
            raise ValueError(f"{path}: unknown option {name!r}{nearest(str(name), actions)}")
        action = actions[name]
        if name in by_name:
            value = _json_of_names(value)
        if isinstance(value, _JSON):
            value = [value] if action.nargs == "+" else value
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


def _options_by_name(kinds: Sequence[Any]) -> set[str]:
    """The fields that take a dict, or a list of dicts, or the same as JSON."""
    names = set()
    for kind in kinds:
        for name, annotation in typing.get_type_hints(kind).items():
            members = _members(annotation)
            if str in members and dict in members:
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
