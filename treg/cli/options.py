"""The options of the commands: dataclasses, read from the command line and from YAML."""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from treg.files import read_yaml


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
class JudgeOptions:
    prompts: str | None = _option(
        None, "YAML file with `instruction` and `prefill`: your own contrastive prompts."
    )
    tokens_per_batch: int = _option(16384, "Tokens of one forward of the annotating model.")
    no_share_prefix: bool = _option(
        False, "Do not share the common beginning of the two contrastive prompts."
    )


@dataclass
class AnnotateOnlyOptions:
    output: str = field(
        metadata={"help": "The parquet file to write. Run again after a stop: it goes on."}
    )
    max_length: int = _option(1024, "Tokens of prompt and completion.")
    per_token: bool = _option(False, "Keep the reference's log-prob of every token as well.")


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
SHOWN = (
    *(
        "output_dir",
        "beta",
        "alpha",
        "gamma",
        "loss_type",
        "weighting",
        "label_smoothing",
        "max_length",
        "packing",
    ),
    *(
        "token_budget",
        "learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
    ),
    *(
        "num_train_epochs",
        "lr_scheduler_type",
        "warmup_steps",
        "bf16",
        "gradient_checkpointing",
        "use_liger_kernel",
    ),
    *(
        "eval_strategy",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "report_to",
        "seed",
        "use_cpu",
    ),
    *("ignore_fingerprint", "disable_dropout"),
)


def parse(name: str, argv: Sequence[str], kinds: Sequence[type], text: str) -> list[Any]:
    """The options of a command, one object of each kind.

    Raises:
        ValueError: an unknown option, or a bad value in the file. SystemExit: --help, or what
            argparse refuses.
    """
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(
        tuple(kinds),
        prog=f"treg {name}",
        usage=f"treg {name} [--config FILE] [options]",
        description=text,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    first = argparse.ArgumentParser(
        prog=f"treg {name}", usage=parser.usage, add_help=False, allow_abbrev=False
    )
    for p in (parser, first):
        p.add_argument("-h", "--help", action="store_true", help="Show this and exit.")
        p.add_argument(
            "--help_all", action="store_true", help="Show every training argument and exit."
        )
        p.add_argument(
            "--config", metavar="FILE", help="YAML file of these options; the command line wins."
        )
    early, _ = first.parse_known_args(argv)
    if early.help or early.help_all:
        hidden = {
            f.name
            for kind in kinds
            if issubclass(kind, TrainingArguments)
            for f in dataclasses.fields(kind)
        }
        for action in parser._actions:
            unwanted = action.dest in hidden - set(SHOWN) and not early.help_all
            if unwanted or (action.dest == "help_all" and not hidden):
                action.help = argparse.SUPPRESS
            action.option_strings = (
                action.option_strings[-1:] if action.dest == "help" else action.option_strings[:1]
            )
            if action.nargs != 0 and action.metavar is None:
                flag = action.nargs == "?"
                action.metavar = (
                    "NAME" if action.choices else "BOOL" if flag else action.type.__name__.upper()
                )
        parser.print_help()
        raise SystemExit(0)
    if early.config:
        _set_defaults(parser, early.config)
    known = parser._option_string_actions
    for given in (x.partition("=")[0] for x in argv if x.startswith("--")):
        if given not in known:
            raise ValueError(
                f"unknown option {given}{nearest(given, known)}; see treg {name} --help"
            )
    values = parser.parse_args(argv)
    try:
        return [
            kind(**{f.name: getattr(values, f.name) for f in dataclasses.fields(kind) if f.init})
            for kind in kinds
        ]
    except (ValueError, TypeError) as error:  # of transformers' own arguments
        raise ValueError(str(error)) from error


def _set_defaults(parser: argparse.ArgumentParser, path: str) -> None:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected option names and values, got {type(values).__name__}")
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name not in actions or name in ("help", "help_all", "config"):
            raise ValueError(f"{path}: unknown option {name!r}{nearest(str(name), actions)}")
        action = actions[name]
        if action.type is str and action.nargs is None and isinstance(value, (list, dict)):
            raise ValueError(f"{path}: {name}: expected one value, got {value!r}")
        action.required = False
        if (
            action.type is not None
            and value is not None
            and not isinstance(value, (list, dict, bool))
        ):
            try:
                value = action.type(str(value))  # 1e-5 is a string in YAML
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"{path}: {name}: {error}") from error
        if action.choices is not None and value not in action.choices:
            raise ValueError(
                f"{path}: {name}: expected one of {', '.join(map(str, action.choices))}, got {value!r}"
            )
        parser.set_defaults(**{name: value})


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
