"""The command line: what it refuses, what the commands leave behind, and that a stopped run goes
on.
"""

import json
import re
import sys
import time
from pathlib import Path

import processes
import pyarrow as pa
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import treg.rewards.annotate
import treg.trainer
from treg.cli import main
from treg.cli.loading import load_model
from treg.cli.options import RewardsOptions, RowOptions, parse
from treg.data.annotated import read_annotated, write_annotated
from treg.files import locked
from treg.losses import OBJECTIVES
from treg.trainer import TRegConfig

ROWS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, preferences of which two cannot be used, and held-out ones."""
    path = tmp_path_factory.mktemp("cli")
    tokenizer = tiny.tiny_tokenizer()
    tiny.tiny_llama(len(tokenizer)).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    rows = [
        {
            "prompt": f"what is {i} + {i}?",
            "chosen": f"the answer is {2 * i}.",
            "rejected": f"the sun said {i}",
        }
        for i in range(ROWS)
    ]
    lines = [json.dumps(row) for row in rows]
    (path / "prefs.jsonl").write_text(
        "\n".join([*lines, "{broken", json.dumps(rows[0] | {"chosen": ""})]) + "\n"
    )
    (path / "held-out.jsonl").write_text("\n".join(lines[:5]) + "\n")
    return path


def train_options(folder: Path, out: Path, **more) -> list[str]:
    options = {
        "model": folder / "model",
        "data": folder / "prefs.jsonl",
        "output_dir": out,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | more
    return ["train", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "treg annotate" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"treg {treg.__version__}\n"
    assert main(["anotate"]) == 2
    assert "did you mean 'annotate'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["annotate", "train", "inspect", "doctor", "demo"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(f"usage: treg {command}") and "--config" in text
    if command == "train":
        assert "--beta" in text and "--fsdp" not in text and "--help_all" in text
        assert "--disable_dropout" in text
        assert all(name in text for name in OBJECTIVES)


def test_help_all(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help_all"])
    assert "--fsdp" in capsys.readouterr().out


REFUSED = {
    "unknown option": ("annotate --modle x", "unknown option --modle; did you mean '--model'?"),
    "no such data": (
        "annotate --model {model} --data no.jsonl --output a.parquet",
        "data: no such file: no.jsonl",
    ),
    "not parquet": (
        "annotate --model {model} --data {data} --output a.json",
        "output: expected a path that ends in",
    ),
    "dtype": (
        "annotate --model {model} --data {data} --output a.parquet --dtype int8",
        "dtype: expected auto",
    ),
    "max_length": (
        "annotate --model {model} --data {data} --output a.parquet --max_length 1",
        "max_length: expected",
    ),
    "prompts": (
        "annotate --model {model} --data {data} --output a.parquet --prompts {yaml}",
        "expected the keys",
    ),
    "strict": (
        "annotate --model {model} --data {data} --output a.parquet --strict",
        ":25: broken JSON",
    ),
    "loss": (
        "train --model {model} --data {data} --output_dir o --loss_type dop",
        "did you mean 'dpo'?",
    ),
    "beta": ("train --model {model} --data {data} --output_dir o --beta -1", "beta: expected"),
    "budget": (
        "train --model {model} --data {data} --output_dir o --token_budget 9",
        "token_budget: expected None",
    ),
    "no yaml key": (
        "train --config {yaml}",
        "unknown option 'lerning_rate'; did you mean 'learning_rate'?",
    ),
    "yaml value": ("train --config {bad}", "learning_rate: could not convert"),
    "no such model": (
        "annotate --model ./nope --data {data} --output a.parquet",
        "model: no such folder: ./nope",
    ),
    "limit": (
        "annotate --model {model} --data {data} --output a.parquet --limit 0",
        "limit: expected a positive",
    ),
    "yaml switch": ("annotate --config {switch}", "limit: expected a number, got True"),
    "yaml list": ("train --config {list}", "model: expected one value, got ['x']"),
    "eval_data": (
        "train --model {model} --data {data} --output_dir o --eval_data {data}",
        "expected --eval_strategy",
    ),
    "liger": (
        "train --model {model} --data {data} --output_dir o --use_liger_kernel",
        "use_liger_kernel: expected a GPU",
    ),
    "no such source": (
        "annotate --model {model} --data {data} --output a.parquet --rewards contrastiv",
        "did you mean 'contrastive'?",
    ),
    "source's option": (
        "annotate --model {model} --data {data} --output a.parquet --rewards.promts x",
        "unknown option --rewards.promts; did you mean '--rewards.prompts'?",
    ),
    "source's prompts": (
        "annotate --model {model} --data {data} --output a.parquet --rewards.prompts {yaml}",
        "expected the keys",
    ),
    "prompts twice": (
        "annotate --model {model} --data {data} --output a.parquet --prompts a --rewards.prompts b",
        "prompts: expected --prompts or --rewards.prompts, got both",
    ),
    "nested option": (
        "annotate --config {nested}",
        "unknown option 'rewards.promts'; did you mean 'rewards.prompts'?",
    ),
    "shape": (
        "annotate --model {model} --data {data} --output a.parquet --shape clip=1 center",
        "shape: expected one of scale, clip, centre",
    ),
    "shape of nothing": (
        "annotate --model {model} --data {data} --output a.parquet --rewards several "
        "--rewards.sources token_weights=constant --shape centre",
        "shape: expected no steps for 'several', which gives token_weights alone, got centre",
    ),
    "keep_columns": (
        "annotate --model {model} --data {data} --output a.parquet --keep_columns chosen",
        "keep_columns: expected columns beside the prompt and the answers",
    ),
    "no such columns": (
        "train --model {model} --data {data} --output_dir o --loss_type bfpo --use_cpu",
        "data: expected for the loss the columns chosen_safe, rejected_safe, found none",
    ),
    "like two": (
        "train --model {model} --data {data} --output_dir o --loss_type tdpo",
        "did you mean 'tgdpo' or 'tdpo1' or 'tdpo2'?",
    ),
    "scalars": (
        "train --model {model} --data {data} --output_dir o --loss_type sepo --loss_scalars keep=1",
        """loss_scalars: expected a JSON object, {"KEY": VALUE}, got 'keep=1'""",
    ),
    "a scalar": (
        "train --model {model} --data {data} --output_dir o --loss_type sepo "
        """--loss_scalars {{"kep":0.5}}""",
        "got 'kep'; they are loss_scalars of a trainer",
    ),
    "a source's model": (
        "annotate --model {model} --data {data} --output a.parquet --rewards redistribution",
        "needs (Folder or hub name of the reward model, a sequence classifier), got none",
    ),
    "nothing kept": (
        "annotate --model {model} --data {data} --output a.parquet --no_reference --per_token",
        "per_token: expected False",
    ),
    "raw to inspect": (
        "inspect --data {data} --model {model}",
        "expected a parquet file written by `treg annotate`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, folder, tmp_path, monkeypatch, capsys):
    command, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    Path("keys.yaml").write_text("lerning_rate: 1e-4\n")
    Path("value.yaml").write_text("learning_rate: fast\n")
    Path("list.yaml").write_text("model: [x]\n")
    Path("switch.yaml").write_text("limit: true\n")
    Path("nested.yaml").write_text("rewards: {name: contrastive, promts: x}\n")
    files = {
        "model": folder / "model",
        "data": folder / "prefs.jsonl",
        "yaml": "keys.yaml",
        "bad": "value.yaml",
        "list": "list.yaml",
        "switch": "switch.yaml",
        "nested": "nested.yaml",
    }
    assert main(command.format(**files).split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.parquet"))


@pytest.fixture(scope="module")
def short_model(folder):
    """The model's checkpoint in bfloat16."""
    path = folder / "bf16"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


SAID = {
    None: ("float32", "in float32, which is faster on a CPU"),
    "auto": ("bfloat16", "--dtype auto: bfloat16 takes several times"),
    "bfloat16": ("bfloat16", "--dtype bfloat16: bfloat16 takes several times"),
    "float32": ("float32", ""),
}


@pytest.mark.parametrize("asked", SAID)
def test_models_are_float32_unless_asked_otherwise(asked, short_model, capsys):
    dtype, said = SAID[asked]
    model = load_model(str(short_model), asked, "cpu")
    assert str(model.dtype) == f"torch.{dtype}"
    text = capsys.readouterr().out
    assert said in text and bool(said) == bool(text)


def test_a_float32_checkpoint_needs_no_word(folder, capsys):
    assert load_model(str(folder / "model"), None, "cpu").dtype == torch.float32
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("more", [[], ["--bf16"]], ids=["float32", "bf16"])
def test_annotation_and_training_have_one_precision(more, folder, short_model, tmp_path, caplog):
    """Of a checkpoint in 16 bits: before the first step the policy is the reference."""
    annotated, out = tmp_path / "a.parquet", tmp_path / "out"
    model = ["--model", str(short_model), "--tokenizer", str(folder / "model")]
    paths = ["--data", str(folder / "prefs.jsonl"), "--output", str(annotated)]
    assert main(["annotate", *model, *more, *paths]) == 0
    options = train_options(folder, out, max_steps=1, model=short_model, data=annotated)
    assert main([*options, *model[2:], *more]) == 0
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    margin = abs(next(x["rewards/margins"] for x in log if "loss" in x))
    assert margin < (0.02 if more else 1e-5) and "roundings" not in caplog.text


@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_a_fault_beneath_shows_where_it_is(kind, folder, tmp_path, monkeypatch, capsys):
    """Of an error that another library raises, the message alone would not tell a user what went
    wrong.
    """

    def tokenizer(*_, **__):
        return json.loads("{") if kind is ValueError else len(3)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", tokenizer)
    options = ["--data", str(folder / "prefs.jsonl"), "--output", str(tmp_path / "a.parquet")]
    assert main(["annotate", "--model", str(folder / "model"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "in run" in error
    assert error.splitlines()[-1].startswith(
        f"treg annotate: error: {'Expecting' if kind is ValueError else 'object'}"
    )


def test_an_argument_that_transformers_refuses(folder, tmp_path, capsys):
    assert main(train_options(folder, tmp_path / "o", warmup_steps=-1)) == 2
    error = capsys.readouterr().err
    assert error.startswith("treg train: error: ") and "warmup_steps" in error


def test_code_that_comes_with_a_checkpoint_is_not_run(folder, tmp_path, monkeypatch, capsys):
    """Nor does anybody ask for leave on the terminal, where "y" would run it."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    kinds = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (theirs / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": kinds}))
    (theirs / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["theirs.Slow", None]}})
    )
    (theirs / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    for model, tokenizer in ((theirs, folder / "model"), (folder / "model", theirs)):
        command = ["annotate", "--model", model, "--tokenizer", tokenizer]
        command += ["--data", folder / "prefs.jsonl", "--output", tmp_path / "a.parquet"]
        assert main(list(map(str, command))) == 2
        assert f"{theirs}: expected a model whose code is a part of" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_row_with_a_broken_name_is_dropped_and_the_others_train(folder, tmp_path):
    """A lone surrogate in the name of a column, which no report could print."""
    lines = (folder / "held-out.jsonl").read_text().splitlines()
    broken = json.dumps(json.loads(lines[0]) | {"a\ud800": "a text"})
    (tmp_path / "rows.jsonl").write_text("\n".join([broken, *lines]))
    out = tmp_path / "out"
    assert main(train_options(folder, out, data=tmp_path / "rows.jsonl", max_steps=1)) == 0
    _, meta = read_annotated(out / "annotated.parquet")
    assert meta["report"]["kept"] == len(lines)
    assert meta["report"]["dropped"] == {"unknown column 'a\\ud800'": 1}


def test_what_argparse_refuses(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["annotate", "--model", "x"])
    assert stop.value.code == 2 and "--data, --output" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in text and "self-test      ok" in text


def test_doctor_sees_wrong_numbers(monkeypatch, capsys):
    from treg.cli import doctor

    right = doctor.fused_treg_loss
    monkeypatch.setattr(
        doctor, "fused_treg_loss", lambda *a, **k: right(*a, **k | {"beta": 0.1001})
    )
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_from_a_file_to_a_page(folder, tmp_path, capsys):
    """Raw rows in; annotated pairs, a trained model, its card and curves, and a page out."""
    out, page = tmp_path / "out", tmp_path / "page.html"
    config = tmp_path / "run.yaml"
    config.write_text(
        "learning_rate: 1e-3\nlogging_steps: 1\npacking: true\nmax_steps: 99\n"
        "eval_strategy: steps\n"
        "eval_steps: 2\nreport_to: none\nuse_cpu: true\ndisable_tqdm: true\n"
    )
    command = [
        "train",
        "--config",
        config,
        "--model",
        folder / "model",
        "--data",
        folder / "prefs.jsonl",
        "--eval_data",
        folder / "held-out.jsonl",
        "--output_dir",
        out,
        "--max_steps",
        4,
    ]
    assert main([str(x) for x in command]) == 0
    text = capsys.readouterr().out
    assert f"{ROWS} of {ROWS + 2} rows kept" in text and "dropped 1: broken JSON" in text
    examples, meta = read_annotated(out / "annotated.parquet")
    assert len(examples) == ROWS and meta["report"]["dropped"] == {
        "broken JSON": 1,
        "empty completion": 1,
    }
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 4  # the command line wins
    assert any("eval_rewards/margins" in x for x in state["log_history"])
    card = (out / "README.md").read_text()
    # a path of this machine is nobody's business, and the hub would refuse it
    assert "2412.02685" in card and "of `model`, trained on `prefs.jsonl`" in card
    assert str(folder) not in card
    assert (out / "curves.png").exists()
    before = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(before[k], v) for k, v in weights(out).items())

    command = [
        "inspect",
        "--data",
        out / "annotated.parquet",
        "--model",
        out,
        "--output",
        page,
        "--limit",
        3,
        "--curves",
        tmp_path / "c.png",
        "--terminal",
    ]
    assert main([str(x) for x in command]) == 0
    html = page.read_text()
    assert "prefs.jsonl:3" in html and "prefs.jsonl:4" not in html
    assert "loss over the optimizer steps" in html
    assert "the answer is 0." in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "c.png").exists()


def test_plain_objective_needs_no_annotation(folder, tmp_path, drawn):
    out = tmp_path / "out"
    assert main(train_options(folder, out, alpha=0.0, max_steps=2)) == 0
    assert not list(out.glob("*.parquet")) and weights(out)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_plain_objective_reads_the_rows_that_were_asked_for(folder, tmp_path, capsys):
    options = train_options(folder, tmp_path / "out", alpha=0.0, max_steps=1, limit=3)
    old = tmp_path / "out" / "_rows" / "old.rows"  # of another version of the code
    old.parent.mkdir(parents=True)
    schema = pa.schema([]).with_metadata({"key": json.dumps({"code": "before"})})
    pa.ipc.new_stream(str(old), schema).close()
    assert main(options) == 0
    assert not old.exists() and len(list(old.parent.glob("*.rows"))) == 1
    assert "3 of 3 rows kept" in capsys.readouterr().out
    assert (
        main(train_options(folder, tmp_path / "strict", alpha=0.0, max_steps=1, strict=True)) == 2
    )
    assert ":25: broken JSON" in capsys.readouterr().err


def test_limit_is_for_raw_rows(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(train_options(folder, out, max_steps=1, limit=4, logging_steps=10)) == 0
    )  # nothing logged, no curves
    assert (
        not (out / "curves.png").exists() and len(read_annotated(out / "annotated.parquet")[0]) == 4
    )
    page = tmp_path / "page.html"
    command = ["inspect", "--data", out / "annotated.parquet", "--model", out, "--output", page]
    assert main([str(x) for x in command]) == 0 and page.exists()
    again = train_options(folder, tmp_path / "again", data=out / "annotated.parquet", max_steps=1)
    no_source = "expected none with annotated data"
    for option, value, message in (
        ("limit", "2", f"limit: {no_source}, got 2"),
        ("rewards", "contrastive", f"rewards: {no_source}, got 'contrastive'"),
        ("rewards.prompts", "p.yaml", f"rewards.prompts: {no_source}, got 'p.yaml'"),
        ("prompts", "p.yaml", f"prompts: {no_source}, got 'p.yaml'"),
        ("shape", "centre", f"shape: {no_source}, got ['centre']"),
    ):
        assert main([*again, f"--{option}", value]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "again").exists()  # refused before the run has its folder
    assert main(again) == 0


def test_the_three_commands(folder, tmp_path, capsys):
    """annotate, train, inspect, with the options that they need alone; a file is refused where it
    does not fit.
    """
    annotated, out, page = tmp_path / "a.parquet", tmp_path / "out", tmp_path / "page.html"
    data, model = str(folder / "prefs.jsonl"), str(folder / "model")
    assert main(["annotate", "--model", model, "--data", data, "--output", str(annotated)]) == 0
    train = train_options(folder, out, data=annotated, max_steps=2)
    assert main(train) == 0
    inspect = ["inspect", "--data", str(annotated), "--model", str(out), "--output", str(page)]
    assert main(inspect) == 0 and "implicit" in page.read_text()
    assert '<dt>source</dt><dd dir="auto">contrastive</dd>' in page.read_text()
    capsys.readouterr()
    assert main(train_options(folder, tmp_path / "b", data=annotated, max_length=12)) == 2
    assert "max_length: expected at least" in capsys.readouterr().err
    assert (
        main(
            [
                "annotate",
                "--model",
                model,
                "--data",
                str(annotated),
                "--output",
                str(tmp_path / "c.parquet"),
            ]
        )
        == 2
    )
    assert "which is annotated already" in capsys.readouterr().err
    tiny.tiny_tokenizer(crossing=True).save_pretrained(tmp_path / "other")
    assert main([*inspect, "--tokenizer", str(tmp_path / "other")]) == 2
    assert "was annotated with another tokenizer" in capsys.readouterr().err


def test_a_page_of_a_file_without_fingerprints(folder, tmp_path, capsys):
    """The tokenizer that is given is taken."""
    row = {"index": 0, "where": "f:0", "prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    row |= {"chosen_token_rewards": [0.1], "rejected_token_rewards": [0.2]}
    write_annotated(tmp_path / "a.parquet", [row], {}, reference=False)
    inspect = ["inspect", "--data", tmp_path / "a.parquet", "--tokenizer", folder / "model"]
    assert main([str(x) for x in inspect]) == 0 and (tmp_path / "a.html").exists()
    assert "\n1 pair\n" in "\n" + capsys.readouterr().out
    assert main([str(x) for x in (*inspect, "--stream", "token_reward")]) == 2
    assert "expected one of token_rewards, which the file has, got" in capsys.readouterr().err
    assert main([str(x) for x in (*inspect, "--stream", "token_rewards")]) == 0
    assert (tmp_path / "a.token_rewards.html").exists()  # each stream has its page


SOURCE = """
from dataclasses import dataclass, field
import torch

@dataclass(frozen=True)
class Options:
    short_word: float = field(default=0.5, metadata={"help": "Number of a token of a short word."})
    skip_first: bool = field(default=False, metadata={"help": "Whether the first token gets 0."})

class Lengths:
    Options = Options
    streams = ("STREAM",)

    def __init__(self, options, context):
        self.options, self.tokenizer = options, context.tokenizer

    def settings(self):
        return vars(self.options)

    def check(self, response):
        return None

    def score(self, responses):
        return [{"STREAM": self.of(response.ids.tolist())} for response in responses]

    def of(self, ids):
        lengths = torch.tensor([len(self.tokenizer.decode([i]).strip()) for i in ids])
        found = torch.where(lengths > 2, 1.0, self.options.short_word)
        found[: self.options.skip_first] = 0.0
        return found
"""


@pytest.fixture
def own_sources(tmp_path, monkeypatch):
    """Two modules as users write them: one gives token_weights, the other token_rewards."""
    for stream in ("token_weights", "token_rewards"):
        (tmp_path / f"own_{stream}.py").write_text(SOURCE.replace("STREAM", stream))
        monkeypatch.delitem(sys.modules, f"own_{stream}", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


def annotate_command(folder, output, *more) -> list[str]:
    paths = ["--model", folder / "model", "--data", folder / "prefs.jsonl", "--output", output]
    return ["annotate", *map(str, [*paths, *more])]


def lengths_of(ids, short_word):
    tokenizer = tiny.tiny_tokenizer()
    return [1.0 if len(tokenizer.decode([i]).strip()) > 2 else short_word for i in ids.tolist()]


def test_weights_of_ones_own_source_train_simpo(folder, tmp_path, own_sources, capsys):
    """Weights alone, without a reference: annotated by module:Class, trained, shown."""
    annotated, out, page = tmp_path / "a.parquet", tmp_path / "out", tmp_path / "page.html"
    source = ["--rewards", "own_token_weights:Lengths", "--rewards.short-word", "0.25"]
    assert main(annotate_command(folder, annotated, *source, "--no_reference")) == 0
    examples, _ = read_annotated(annotated)
    assert not any(name.startswith("ref_") or "rewards" in name for name in examples[0])
    for x in examples:
        assert x["chosen_token_weights"].tolist() == lengths_of(x["chosen_ids"], 0.25)
    simpo = {"data": annotated, "loss_type": "simpo", "max_steps": 2}
    assert main(train_options(folder, out, alpha=0.0, **simpo)) == 0
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    plain = tmp_path / "plain"
    assert (
        main(train_options(folder, plain, **simpo | {"data": folder / "prefs.jsonl"}, alpha=0.0))
        == 0
    )
    other = json.loads((plain / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] != other[0]["loss"]
    inspect = ["inspect", "--data", annotated, "--tokenizer", folder / "model", "--output", page]
    assert main([str(x) for x in inspect]) == 0
    html = page.read_text()
    assert '<h1 dir="auto">Token weights: a.parquet' in html
    for fact, value in (("stream", "token_weights"), ("source", "own_token_weights:Lengths")):
        assert f'<dt>{fact}</dt><dd dir="auto">{value}</dd>' in html
    capsys.readouterr()
    # without a regularizer nothing is annotated unless a source is named
    plain = train_options(folder, tmp_path / "d", alpha=0.0)
    for option in ("prompts", "rewards.prompts"):
        assert main([*plain, f"--{option}", "p.yaml"]) == 2
        assert f"{option}: expected none with alpha=0" in capsys.readouterr().err
    # what the data lack is named
    assert main(train_options(folder, tmp_path / "b", data=annotated)) == 2
    assert "expected the columns chosen_token_rewards" in capsys.readouterr().err
    assert main(train_options(folder, tmp_path / "c", data=annotated, alpha=0.0)) == 2
    assert "expected the columns ref_chosen_token_logps" in capsys.readouterr().err


def test_rewards_of_ones_own_source_train_dpo(folder, tmp_path, own_sources, capsys):
    """Raw rows and the source's options nested in YAML: the same file as annotate's."""
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(
        "rewards:\n  name: own_token_rewards:Lengths\n  short_word: -0.5\n  skip_first: true\n"
    )
    assert main([*train_options(folder, out, max_steps=2), "--config", str(config)]) == 0
    annotated = tmp_path / "a.parquet"
    more = ["--config", config, "--per_token", "--dtype", "float32"]
    assert main(annotate_command(folder, annotated, *more)) == 0
    assert annotated.read_bytes() == (out / "annotated.parquet").read_bytes()
    (example, *_), meta = read_annotated(annotated)
    found = example["rejected_token_rewards"].tolist()
    assert found == [0.0, *lengths_of(example["rejected_ids"], -0.5)[1:]]
    assert meta["streams"]["token_rewards"] == {
        "source": "own_token_rewards:Lengths",
        "settings": {"short_word": -0.5, "skip_first": True},
        "shaping": [],
    }
    assert main(train_options(folder, tmp_path / "again", data=annotated, max_steps=1)) == 0
    # a source that gives no token rewards cannot serve alpha > 0; refused before it has annotated
    capsys.readouterr()
    refused = train_options(folder, tmp_path / "no", rewards="own_token_weights:Lengths")
    assert main(refused) == 2
    assert "which gives token_weights and no token_rewards" in capsys.readouterr().err
    assert not list((tmp_path / "no").glob("*.parquet"))


OBJECTIVE = """
from torch.nn.functional import logsigmoid
from torch import sigmoid
from treg.losses import Credit, Objective
from treg.losses.base import base_of_margin

def focal(rho_w, rho_l, scalars):
    m = rho_w - rho_l
    hard = sigmoid(-m)
    value = -hard * logsigmoid(m)
    return base_of_margin(value, hard * sigmoid(m) * logsigmoid(m) - hard**2)

def positive(tokens, scalars):
    return Credit((tokens.rewards > scalars["least"]).double())

FOCAL = Objective(
    focal,
    "nowhere",
    options={"least": 0.0},
    credit=positive,
    needs=("token_rewards",),
    pair_columns=("difficulty",),
    alpha=0.0,
)
"""


def test_an_objective_of_ones_own_trains_on_a_source_of_ones_own(
    folder, tmp_path, own_sources, capsys, monkeypatch
):
    """Each one file, by module:name alone; raw rows bring the numbers that it needs."""
    (tmp_path / "own_objective.py").write_text(OBJECTIVE)
    assert max(text.count("\n") for text in (OBJECTIVE, SOURCE)) < 60
    monkeypatch.delitem(sys.modules, "own_objective", raising=False)
    name = "own_objective:FOCAL"
    monkeypatch.setitem(OBJECTIVES, name, None)  # which the test gives back
    del OBJECTIVES[name]
    rows = [json.loads(x) for x in (folder / "held-out.jsonl").read_text().splitlines()]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    lines = [json.dumps(row | {"difficulty": i / 2}) for i, row in enumerate(rows)]
    data.write_text("\n".join(lines))
    command = train_options(
        folder,
        out,
        data=data,
        max_steps=2,
        loss_type=name,
        loss_scalars='{"least": 0.75}',
        rewards="own_token_rewards:Lengths",
    )
    assert main([*command, "--rewards.short_word", "0.5"]) == 0
    examples, meta = read_annotated(out / "annotated.parquet")
    assert [x["difficulty"] for x in examples] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert meta["streams"]["token_rewards"]["source"] == "own_token_rewards:Lengths"
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] == pytest.approx(0.5 * 0.6931, rel=1e-3)  # m = 0 at the first step
    share = [x["chosen_token_rewards"] > 0.75 for x in examples]
    assert 0 < log[0]["treg/kept"] < 1 and all(0 < x.mean() < 1 for x in share)
    assert name in (out / "README.md").read_text()
    capsys.readouterr()
    for wrong, message in (
        ("own_objective:NONE", "expected an objective that Python can import as 'own_objective:"),
        ("own_objective:focal", "expected a treg.losses.Objective at 'own_objective:focal', got f"),
    ):
        assert main(train_options(folder, tmp_path / "no", loss_type=wrong)) == 2
        assert message in capsys.readouterr().err


METHODS = {
    "sepo": ("--loss_scalars", '{"keep": 0.5}', "--gamma", "0.1"),
    "d2po": (),
    "figa": ("--rewards", "edits"),
    "tdpo2": (),
    "sparsepo": ("--rewards", "messagewise", "--rewards.of", "surprise"),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_from_raw_rows(folder, tmp_path, name):
    """One command: annotated where the method needs it, and trained."""
    out = tmp_path / "out"
    command = train_options(folder, out, max_steps=1, loss_type=name, limit=6)
    assert main([*command, *METHODS[name]]) == 0
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] > 0 and log[0]["grad_norm"] > 0
    assert (out / "annotated.parquet").exists() == bool(
        [x for x in OBJECTIVES[name].needs if x != "kl"]
    )


def test_bfpo_from_raw_rows(folder, tmp_path, capsys):
    rows = [json.loads(x) for x in (folder / "held-out.jsonl").read_text().splitlines()]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    safe = [row | {"chosen_safe": True, "rejected_safe": i % 2} for i, row in enumerate(rows)]
    data.write_text("\n".join(json.dumps(row) for row in safe))
    assert main(train_options(folder, out, data=data, max_steps=1, loss_type="bfpo")) == 0
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    # h = 0: (1.5 - 0.5 - 0.5)^2 and (1.5 - 0.5)^2 over 0.01^2, of which a batch of two has each
    assert log[0]["loss"] == pytest.approx((0.5**2 + 1.0**2) / 2 / 0.01**2, rel=0.61)
    capsys.readouterr()
    other = train_options(folder, tmp_path / "no", max_steps=1, loss_type="bfpo")
    assert main(other) == 2
    assert (
        "data: expected for the loss the columns chosen_safe, rejected_safe, found none"
        in capsys.readouterr().err
    )


def test_a_source_that_cannot_serve_an_objective(folder, tmp_path, capsys):
    command = train_options(folder, tmp_path / "no", loss_type="sparsepo", rewards="surprise")
    assert main(command) == 2
    assert "'sparsepo', which needs token_weights" in capsys.readouterr().err


def test_options_that_a_source_refuses(folder, tmp_path, own_sources, capsys):
    """Named before a model is loaded and before the run has its folder."""
    raises = ("raise ValueError('short_word: too much')", "len(3)")
    for number, (fault, message) in enumerate(zip(raises, ("too much", "no len()"), strict=True)):
        text = SOURCE.replace("STREAM", "token_rewards").replace(
            "class Lengths", f"    def __post_init__(self):\n        {fault}\n\nclass Lengths"
        )
        (tmp_path / f"strict{number}.py").write_text(text)
        source = f"strict{number}:Lengths"
        assert main([*train_options(folder, tmp_path / "out", rewards=source, model="./no")]) == 2
        error = capsys.readouterr().err
        assert f"rewards.*: the source {source!r} refuses its options" in error
        assert message in error and not (tmp_path / "out").exists()


LISTS = """
from dataclasses import dataclass
from typing import Literal
from own_token_rewards import Lengths

@dataclass(frozen=True)
class Options:
    scales: list[float] | None = None
    words: tuple[str, ...] = ()
    flags: list[bool] | None = None
    kinds: list[Literal["a", "b"]] | None = None

class Lists(Lengths):
    Options = Options
"""
LIST_VALUES = {
    "scales": (["1e-5", "2"], "[1e-5, 2]", [1e-5, 2.0]),
    "one number": (["1e-5"], "1e-5", [1e-5]),
    "words": (["a b", "1"], "[a b, 1]", ["a b", "1"]),
    "one word": (["a b"], "a b", ["a b"]),
    "flags": (["false", "yes"], "[false, yes]", [False, True]),
    "kinds": (["b", "a"], "[b, a]", ["b", "a"]),
}


def source_options(*argv) -> dict:
    argv = ["--data", "x", "--rewards", "own_lists:Lists", *argv]
    _, options = parse("annotate", argv, (RowOptions, RewardsOptions))
    return options.rewards_options


@pytest.fixture
def own_lists(own_sources, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "own_lists", raising=False)
    (tmp_path / "own_lists.py").write_text(LISTS)


@pytest.mark.parametrize("case", LIST_VALUES)
def test_lists_in_yaml_are_those_of_the_command_line(case, own_lists, tmp_path):
    words, text, expected = LIST_VALUES[case]
    name = {"one number": "scales", "one word": "words"}.get(case, case)
    config = tmp_path / "run.yaml"
    config.write_text(f"rewards:\n  name: own_lists:Lists\n  {name}: {text}\n")
    for argv in ([f"--rewards.{name}", *words], ["--config", str(config)]):
        assert source_options(*argv) == {name: expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scales: [fast]", "rewards.scales: could not convert"),
        ("scales: [true]", "rewards.scales: expected a number, got True"),
        ("scales: [[1]]", "rewards.scales: expected one value, got [1]"),
        ("kinds: [a, c]", "rewards.kinds: expected one of a, b, got 'c'"),
    ],
)
def test_lists_in_yaml_that_are_refused(text, message, own_lists, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"rewards:\n  name: own_lists:Lists\n  {text}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        source_options("--config", str(config))


def test_options_by_name_in_yaml(tmp_path):
    """A mapping where the command line takes JSON."""
    config = tmp_path / "run.yaml"
    config.write_text("loss_type: discopop\nloss_scalars: {tau: 0.1}\n")
    argv = ["--output_dir", str(tmp_path)]
    (found,) = parse("train", [*argv, "--config", str(config)], (TRegConfig,))
    scalars = ["--loss_type", "discopop", "--loss_scalars", '{"tau": 0.1}']
    (expected,) = parse("train", [*argv, *scalars], (TRegConfig,))
    assert found.loss_scalars == expected.loss_scalars
    assert found.loss_options == expected.loss_options


def test_help_of_a_source(own_sources, capsys):
    for options, shown in (
        ([], "treg annotate --rewards NAME --help shows those of NAME"),
        (["--rewards", "contrastive"], "--rewards.prompts TEXT"),
        (["--rewards", "own_token_weights:Lengths"], "--rewards.short_word X"),
    ):
        with pytest.raises(SystemExit):
            main(["annotate", *options, "--help"])
        text = capsys.readouterr().out
        assert "contrastive" in text and shown in text


def test_prompts_are_the_options_of_the_default_source(folder, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text('instruction: "{{ messages[-1].content }} {{ better }}"\nprefill: "<a>"\n')
    files = []
    for i, option in enumerate(("--prompts", "--rewards.prompts")):
        files.append(tmp_path / f"{i}.parquet")
        assert main(annotate_command(folder, files[-1], option, prompts, "--limit", 3)) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_annotated(files[0])[1]["settings"]["prompts"]["prefill"] == "<a>"


def test_an_interrupted_annotation_keeps_what_is_finished(folder, tmp_path, monkeypatch, capsys):
    """It says how much that is, and the next run does the rest alone."""
    whole, stopped = tmp_path / "whole.parquet", tmp_path / "stopped.parquet"
    assert main(annotate_command(folder, whole)) == 0
    work, parts = treg.rewards.annotate._annotate_part, []

    def part(*args):
        if len(parts) == 5:
            raise KeyboardInterrupt
        parts.append(args)
        work(*args)

    monkeypatch.setattr("treg.rewards.annotate._annotate_part", part)
    assert main(annotate_command(folder, stopped)) == 130
    error = capsys.readouterr().err
    assert f"15 of {ROWS} pairs are finished and kept in {stopped}.parts; the same" in error
    monkeypatch.setattr("treg.rewards.annotate._annotate_part", lambda *a: parts.append(work(*a)))
    assert main(annotate_command(folder, stopped)) == 0
    assert len(parts) == 8 and stopped.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [(None, "at step 3; no checkpoint is there yet (--save_steps)"), (2, "checkpoint-2 is whole")],
)
def test_an_interrupted_training_says_where_it_goes_on(
    checkpoint, said, folder, tmp_path, monkeypatch, capsys
):
    folder_of = None if checkpoint is None else tmp_path / f"checkpoint-{checkpoint}"
    monkeypatch.setattr("treg.cli.train.last_checkpoint", lambda out: folder_of)

    def train(self, **_):
        self.state.global_step = 3
        raise KeyboardInterrupt

    monkeypatch.setattr(treg.trainer.TRegTrainer, "train", train)
    options = train_options(folder, tmp_path / "o", alpha=0, data=folder / "held-out.jsonl")
    assert main(options) == 130
    assert said in capsys.readouterr().err


def test_a_finished_run_is_left_alone(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(train_options(folder, out, max_steps=2)) == 0
    before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert main(train_options(folder, out, max_steps=2)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_two_runs_in_one_folder(folder, tmp_path, capsys):
    with locked(tmp_path / "out"):
        assert main(train_options(folder, tmp_path / "out", max_steps=2)) == 2
    assert "another run is at work on it" in capsys.readouterr().err
    assert main(train_options(folder, tmp_path / "out", max_steps=2)) == 0


def test_adapters_are_no_start(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(train_options(folder, out, use_peft=True, lora_target_modules="q_proj", max_steps=1))
        == 0
    )
    assert main(train_options(folder, tmp_path / "more", model=out, max_steps=1)) == 2
    assert "holds adapters; merge them" in capsys.readouterr().err


def test_another_reference(folder, tmp_path):
    """It annotates, and is not needed after that."""
    tokenizer = tiny.tiny_tokenizer()
    tiny.tiny_llama(len(tokenizer), initializer_range=0.2).save_pretrained(tmp_path / "reference")
    out = tmp_path / "out"
    assert main(train_options(folder, out, max_steps=1, ref_model=tmp_path / "reference")) == 0
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert abs(next(x["rewards/chosen"] for x in log if "loss" in x)) > 0.01


def test_mixed_precision_sees_the_same_reference(folder, tmp_path):
    out = tmp_path / "out"
    assert main(train_options(folder, out, max_steps=1, bf16=True)) == 0
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    # batches are cut differently, so bfloat16 rounds a little differently
    assert abs(next(x["rewards/margins"] for x in log if "loss" in x)) < 0.02


def test_lora(folder, tmp_path):
    out = tmp_path / "out"
    assert (
        main(train_options(folder, out, use_peft=True, lora_target_modules="q_proj", max_steps=2))
        == 0
    )
    adapters = load_file(out / "adapter_model.safetensors")
    assert adapters and all("q_proj.lora" in name for name in adapters)
    card = ModelCard.load(out / "README.md").data
    assert card.library_name == "peft" and {"treg", "dpo"} <= set(card.tags)


def test_killed_training_goes_on(folder, tmp_path):
    """SIGKILL after the first checkpoint, the same command again: the weights of a run that was
    never stopped.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(train_options(folder, whole, max_steps=16)) == 0
    process = processes.start("-m", "treg", *train_options(folder, stopped, max_steps=16))
    deadline = time.monotonic() + 300
    while (
        not (stopped / "checkpoint-2" / "trainer_state.json").exists()
        and time.monotonic() < deadline
    ):
        assert not process.ended(), process.said()
        time.sleep(0.01)
    process.kill()
    assert not (stopped / "model.safetensors").exists(), "it ended before it was killed"

    assert (
        main(train_options(folder, stopped, max_steps=16, learning_rate=2e-3)) == 2
    )  # not the same run
    text = processes.run("-m", "treg", *train_options(folder, stopped, max_steps=16))
    assert "going on from" in text
    assert (stopped / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    logs = [
        json.loads((x / "trainer_state.json").read_text())["log_history"] for x in (whole, stopped)
    ]
    assert [x["num_tokens"] for x in logs[0] if "loss" in x] == [
        x["num_tokens"] for x in logs[1] if "loss" in x
    ]
