"""Options: what --help shows and how soon, names of other programs, lists of YAML."""

import argparse
import dataclasses
import importlib.util
import subprocess
import sys
import typing

import pytest
from transformers import TrainingArguments

from treg.cli import COMMANDS, help_page, main
from treg.cli.kinds import (
    SHAPES,
    AnnotateOnlyOptions,
    ModelOptions,
    RewardsOptions,
    RowOptions,
    TrainOptions,
)
from treg.cli.loading import encode_options, load_model, signal_of
from treg.cli.options import NOT_SHOWN, parse
from treg.cli.other_names import ALIASES, INSTEAD
from treg.data import EncodeOptions
from treg.demo.world import MODEL
from treg.losses import OBJECTIVES
from treg.rewards import SOURCES
from treg.rewards.shaping import STEPS
from treg.trainer import TRegConfig
from treg.trainer.arguments import ALPHA, LOSS_TYPES

FIELDS = {x.name: x for x in dataclasses.fields(TRegConfig)}
ANNOTATE = (ModelOptions, RowOptions, AnnotateOnlyOptions, RewardsOptions)
NEEDED = ["--model", "m", "--data", "d"]


def shown(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("line", help_page.TRAINING, ids=lambda line: line.name)
def test_the_table_of_training_arguments_tells_the_truth(line):
    """Names, defaults and choices are those of transformers."""
    option = FIELDS[line.name]
    default = getattr(option.default, "value", option.default)
    assert (default or None) == (line.default or None) or line.name == "output_dir"
    if line.value.startswith("{"):
        enum = typing.get_args(typing.get_type_hints(TRegConfig)[line.name])[0]
        assert set(line.value.strip("{}").split(",")) == {x.value for x in enum}
    deprecated = option.metadata["help"].startswith("Deprecated")
    assert not deprecated


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inspect --tokenizer b --data a b", "data: expected one value, got ['a', 'b']"),
        ("inspect --data=a b", "data: expected one value, got ['a', 'b']"),
        ("inspect --data a --data b", "data: expected --data once, got it 2 times"),
        ("train --data a b --model m n", "model: expected one value, got ['m', 'n']"),
        ("train --data a --data b", "data: expected --data once, with all of them behind it, got"),
        ("merge --adapter a b --output o", "adapter: expected one value, got ['a', 'b']"),
    ],
)
def test_a_value_too_many_is_refused_by_name(command, message, capsys):
    assert main(command.split()) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_default_output_folder_is_that_of_transformers():
    (line,) = (x for x in help_page.TRAINING if x.name == "output_dir")
    assert TrainingArguments(use_cpu=True).output_dir == line.default


def test_names_that_are_listed_without_their_modules():
    assert tuple(OBJECTIVES) == LOSS_TYPES
    assert OBJECTIVES["dpo"].alpha == ALPHA
    assert ", ".join(kind.form for kind in STEPS.values()) == SHAPES
    assert all(SOURCES[name].__name__.lower().startswith(name) for name in SOURCES)


def test_a_page_has_groups_defaults_and_choices(capsys):
    text = shown(capsys, "train", "--help")
    groups = [x.rstrip(":") for x in text.splitlines() if x.endswith(":") and x[:1] != " "]
    expected = ["data", "model", "adapters", "token rewards", "loss", "optimisation"]
    assert [x for x in groups if x in expected] == expected
    words = " ".join(text.split())
    assert "--beta X Scale of the implicit reward, > 0. Default: 0.1." in words
    assert "--lora_r N Rank of the adapters. Default: 16." in words
    assert "--eval_strategy {no,steps,epoch}" in words
    assert "--dtype {auto,float32,bfloat16,float16}" in words
    assert "Turn dropout off in policy and reference. On by default; --no_disable_dropout" in words
    assert "gradient_checkpointing" not in words and "--activation_checkpointing" in words
    assert [text.count(f"\n  --{name} ") for name in NOT_SHOWN] == [1, 1, 0]


def test_every_training_argument_is_on_the_long_page(capsys):
    text = shown(capsys, "train", "--help_all")
    for name, option in FIELDS.items():
        told = "eprecated" in option.metadata.get("help", "")[:20]
        assert (f"--{name} " in text or f"--{name}\n" in text) != told, name


def test_a_page_loads_nothing_that_is_long_to_load():
    """Importing torch takes two CPU seconds, and the other packages six more."""
    code = """
import sys
import treg
from treg.cli import COMMANDS, main

before = set(sys.modules)
for command in COMMANDS:
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
print(*sorted({x.partition(".")[0] for x in set(sys.modules) - before}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    heavy = {"torch", "transformers", "accelerate", "peft", "datasets", "pyarrow", "jinja2"}
    assert done.stdout.count("usage: treg ") == len(COMMANDS) and not loaded & heavy, loaded & heavy


def test_names_of_trl():
    argv = [
        "--model_name_or_path",
        "m",
        "--dataset-name=d",
        "--output",
        "o",
        "--torch_dtype",
        "bfloat16",
    ]
    model, rows, *_ = parse("annotate", argv, ANNOTATE)
    assert (model.model, rows.data, model.dtype) == ("m", ["d"], "bfloat16")


def test_names_of_trl_in_yaml(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model_name_or_path: m\ndataset_name: d\noutput: o\n")
    model, rows, *_ = parse("annotate", ["--config", str(config)], ANNOTATE)
    assert (model.model, rows.data) == ("m", ["d"])


def test_both_names_of_an_option_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model: expected --model or --model_name_or_path, got b"):
        parse("annotate", [*NEEDED, "--output", "o", "--model_name_or_path", "x"], ANNOTATE)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--max_prompt_length", "unknown option --max_prompt_length: --max_length counts prompt"),
        ("--modle", "unknown option --modle; did you mean '--model'?; see treg annotate --help"),
    ],
)
def test_an_unknown_option_says_what_to_do(option, said):
    with pytest.raises(ValueError, match="unknown option") as refused:
        parse("annotate", [*NEEDED, "--output", "o", option, "1"], ANNOTATE)
    assert said in str(refused.value)


def test_every_name_that_stands_for_another_is_there():
    """An alias leads to an option of some command, and no option has a word against it."""
    kinds = (*ANNOTATE, TrainOptions, TRegConfig)
    known = {x.name for kind in kinds for x in dataclasses.fields(kind)}
    assert set(ALIASES.values()) <= known
    assert not known & INSTEAD.keys()


CASES = {
    "a list": ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
    "a list of one": ("report_to: [tensorboard]", "tensorboard"),
    "one": ("report_to: tensorboard", "tensorboard"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_or_several_in_yaml(case, tmp_path, monkeypatch):
    """As the command line gives it, which takes one name or several."""
    text, expected = CASES[case]
    config = tmp_path / "run.yaml"
    config.write_text(f"{text}\noutput_dir: o\n")
    seen = []
    monkeypatch.setattr(TRegConfig, "__post_init__", lambda self: seen.append(self.report_to))
    parse("train", ["--config", str(config)], (TRegConfig,))
    names = [expected] if isinstance(expected, str) else expected
    parse("train", ["--output_dir", "o", "--report_to", *names], (TRegConfig,))
    assert seen == [expected, expected]


@pytest.mark.parametrize("argv", [["--disable_tqdm"], ["--disable_tqdm", "true"]])
def test_a_switch_that_may_be_left_to_transformers(argv):
    """`bool | None` is a switch too, as its page says."""
    (found,) = parse("train", ["--output_dir", "o", "--use_cpu", *argv], (TRegConfig,))
    assert found.disable_tqdm is True


def test_a_source_is_loaded_when_it_is_asked_for(capsys):
    text = shown(capsys, "annotate", "--rewards", "redistribution", "--help")
    assert "options of the source 'redistribution'" in text
    assert "--rewards.prefixes {together,separate}" in text
    assert "Default: together." in " ".join(text.split())


def test_a_percent_sign_in_a_help_text_stays():
    line = help_page.Line("x", "data", "N", None, "20 % of it")
    parser = argparse.ArgumentParser()
    help_page._add(parser.add_argument_group("g"), line)
    assert "20 % of it" in parser.format_help()


def test_options_of_rows_become_those_of_encoding():
    given = ["--columns", "prompt=question", "system=", "--plain_text", "--turns", "all"]
    given += ["--date", "2024-07-26", "--output", "o"]
    _, rows, own, _ = parse("annotate", [*NEEDED, *given], ANNOTATE)
    assert encode_options(rows, own.max_length) == EncodeOptions(
        1024,
        chat=False,
        columns={"prompt": "question", "system": ""},
        turns="all",
        date="2024-07-26",
    )
    _, rows, own, _ = parse("annotate", [*NEEDED, "--output", "o"], ANNOTATE)
    assert encode_options(rows, own.max_length) == EncodeOptions(1024)


def test_signals_that_no_loss_takes_are_not_described_as_weights():
    example = {"chosen_ids": [1, 2], "rejected_ids": [3]}
    for stream in ("token_rewards", "surprise"):
        example |= {f"chosen_{stream}": [-0.1, 0.2], f"rejected_{stream}": [-0.3]}
    lines = signal_of([example], ALPHA)
    assert lines[0].startswith("token_rewards: 3 tokens") and "surprise" not in "".join(lines)


def test_an_attention_that_is_not_installed_is_an_error_of_one_line():
    pytest.importorskip("transformers")
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("it is installed")
    with pytest.raises(
        ValueError, match="attn_implementation: expected one that is installed"
    ) as x:
        load_model(str(MODEL), None, attn_implementation="flash_attention_2")
    assert "\n" not in str(x.value)
