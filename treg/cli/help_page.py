"""The pages of --help: options in groups, with their values, choices and defaults.

A page is made of dataclasses and of the table below alone. Neither torch nor transformers is
loaded for it, but for the options of a source that is named and for --help_all.
"""

import argparse
import dataclasses
import shutil
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

GROUPS = (
    "options",
    "data",
    "model",
    "server",
    "adapters",
    "token rewards",
    "loss",
    "optimisation",
    "precision and memory",
    "evaluation",
    "output and logging",
    "other options",
)
VALUES = {str: "TEXT", int: "N", float: "X", bool: "BOOL", dict: "JSON"}


class Line(NamedTuple):
    """An option of a page. value: what stands for its value, or its choices as {A,B}."""

    name: str
    group: str
    value: str
    default: Any
    help: str


def _optimisation() -> tuple[Line, ...]:
    group = "optimisation"
    return (
        Line("learning_rate", group, "X", 1e-6, "Highest learning rate."),
        Line("lr_scheduler_type", group, "NAME", "linear", "E.g. linear, cosine, constant."),
        Line("warmup_steps", group, "X", 0, "Steps of warm-up; below 1: a share of all steps."),
        Line("num_train_epochs", group, "X", 3.0, "Passes over the data."),
        Line("max_steps", group, "N", -1, "Optimizer steps in all; -1: as the epochs say."),
        Line("per_device_train_batch_size", group, "N", 8, "Pairs of one forward of a device."),
        Line("gradient_accumulation_steps", group, "N", 1, "Forwards of one optimizer step."),
        Line("optim", group, "NAME", "adamw_torch_fused", "The optimizer."),
        Line("weight_decay", group, "X", 0.0, "Weight decay."),
        Line("max_grad_norm", group, "X", 1.0, "Gradients are clipped to this norm; 0: not."),
        Line("seed", group, "N", 42, "Of the order of the pairs and of adapters."),
    )


def _precision() -> tuple[Line, ...]:
    group, off = "precision and memory", False
    return (
        Line("bf16", group, "BOOL", off, "Mixed precision in bfloat16; the weights stay float32."),
        Line("fp16", group, "BOOL", off, "Mixed precision in float16."),
        Line("activation_checkpointing", group, "BOOL", None, "Less memory for a second forward."),
        Line("use_liger_kernel", group, "BOOL", off, "Liger's layers, on a GPU."),
        Line("torch_compile", group, "BOOL", off, "Compile the model."),
        Line("use_cpu", group, "BOOL", off, "Train on the CPU where there is a GPU."),
    )


def _evaluation() -> tuple[Line, ...]:
    group = "evaluation"
    return (
        Line("eval_strategy", group, "{no,steps,epoch}", "no", "When to evaluate."),
        Line("eval_steps", group, "X", None, "Steps between evaluations. Default: logging_steps."),
        Line("per_device_eval_batch_size", group, "N", 8, "Pairs of one forward in evaluation."),
    )


def _output() -> tuple[Line, ...]:
    group = "output and logging"
    return (
        Line("output_dir", group, "FOLDER", "trainer_output", "Where the run is kept."),
        Line("save_strategy", group, "{no,steps,epoch,best}", "steps", "When to keep checkpoints."),
        Line("save_steps", group, "X", 500, "Steps between checkpoints."),
        Line("save_total_limit", group, "N", None, "Checkpoints to keep. Default: all."),
        Line("logging_steps", group, "X", 10, "Steps between two log lines."),
        Line("report_to", group, "NAME", "none", "E.g. tensorboard, wandb, trackio."),
        Line("run_name", group, "TEXT", None, "Name of the run where it is reported."),
        Line("disable_tqdm", group, "BOOL", None, "No bar."),
        Line("push_to_hub", group, "BOOL", False, "Push the model to the hub."),
        Line("hub_model_id", group, "NAME", None, "Its name there. Default: that of output_dir."),
    )


# of transformers' many training arguments, those that --help shows
TRAINING = (*_optimisation(), *_precision(), *_evaluation(), *_output())
# options whose group is not that of their class
PLACES = {
    "data_weights": "data",
    "mixed_annotations": "data",
    "eval_data": "evaluation",
    "eval_split": "evaluation",
    "ref_model": "model",
    "sample_steps": "output and logging",
    "sample_prompts": "output and logging",
    "memory_budget": "precision and memory",
    "packing": "precision and memory",
    "token_budget": "precision and memory",
    "max_length": "data",
    "model": "model",
    "tokenizer": "model",
    "chat_template": "model",
    "dtype": "model",
    "annotated": "token rewards",
    "streams": "token rewards",
    "json": "output and logging",
    "plots": "output and logging",
    "ignore_fingerprint": "data",
    "disable_dropout": "optimisation",
    "remove_unused_columns": "data",
}
HELP = Line("help", "other options", "", None, "Show this and exit.")
HELP_ALL = Line("help_all", "other options", "", None, "Show every training argument and exit.")
CONFIG = Line(
    "config",
    "other options",
    "FILE",
    None,
    "YAML file of these options; the command line wins.",
)


def lines_of(kind: type, group: str) -> Iterator[Line]:
    """The options of a dataclass. A field says in its metadata: help, and metavar where its type
    does not say enough.

    group: where they stand, if neither the class's GROUP nor PLACES says it.
    """
    annotations = typing.get_type_hints(kind)
    group = getattr(kind, "GROUP", group)
    for option in dataclasses.fields(kind):
        if not option.init or "eprecated" in option.metadata.get("help", "")[:20]:
            continue
        place = group if group == "options" else PLACES.get(option.name, group)
        default = option.default
        if default is dataclasses.MISSING:
            default = None
        value = option.metadata.get("metavar") or _value(annotations[option.name])
        text = option.metadata.get("help") or ""
        required = default is None and option.default is dataclasses.MISSING
        if required and option.default_factory is dataclasses.MISSING:
            text = f"{text} Required."
        yield Line(option.name, place, value, default, text)


def page(name: str, text: str, lines: Sequence[Line], *, more: str = "") -> str:
    """The page of a command: its text, and its options by group. more: a last word."""
    parser = argparse.ArgumentParser(
        prog=f"treg {name}",
        usage=f"treg {name} [--config FILE] [options]",
        description=text,
        epilog=more,
        add_help=False,
        allow_abbrev=False,
        formatter_class=_formatter,
    )
    titles = dict.fromkeys((*GROUPS, *(x.group for x in lines)))
    for title in titles:
        own = [line for line in lines if line.group == title]
        group = parser.add_argument_group(title) if own else None
        for line in own:
            _add(group, line)
    return parser.format_help()


def _add(group: Any, line: Line) -> None:
    text = line.help
    told = "efault" in text or "Required" in text
    if line.value == "BOOL" and line.default is True:
        text += f" On by default; --no_{line.name} turns it off."
    elif line.default not in (None, False, "", ()) and not told:
        text += f" Default: {line.default}."
    value = {"action": "store_true"} if line.value in ("", "BOOL") else {"metavar": line.value}
    group.add_argument(f"--{line.name}", help=text.replace("%", "%%"), **value)


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size().columns, 100)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width)


def _value(annotation: Any) -> str:
    """What stands for a value of this type on a page."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        words = [_value(x) for x in members if x is not type(None)]
        return words[-1] if "JSON" not in words else "JSON"
    if origin is typing.Literal:
        return "{" + ",".join(map(str, members)) + "}"
    if origin in (list, tuple):
        return f"{_value(members[0])} [...]"
    found: Any = origin or annotation
    if hasattr(found, "__members__"):
        return "{" + ",".join(str(x.value) for x in found.__members__.values()) + "}"
    return VALUES.get(found, "TEXT")
