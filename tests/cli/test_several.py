"""Several data files with weights, on the command line: what is trained on, kept and refused."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from treg.cli import main
from treg.cli.options import ModelOptions, RewardsOptions, RowOptions, TrainOptions, parse
from treg.data import EncodeOptions, Mixture
from treg.data.annotated import read_annotated, read_meta
from treg.data.mixture import check_made_alike, taken_rows
from treg.files import SEAL
from treg.rewards.annotate import AnnotateOptions
from treg.rewards.annotate import annotate as annotate_file
from treg.rewards.made_with import planned

SEED = 42  # of training, and so of the sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rows in two files, and the same annotated: a has 4 pairs, b has 6."""
    path = tmp_path_factory.mktemp("several")
    tokenizer = tiny.tiny_tokenizer()
    tiny.tiny_llama(len(tokenizer)).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for name, numbers in (("a", range(4)), ("b", range(50, 56))):
        rows = [
            {"prompt": f"{i} + {i}?", "chosen": f"the {2 * i}", "rejected": f"the sun {i}"}
            for i in numbers
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert annotate(path, path / f"{name}.parquet", path / f"{name}.jsonl") == 0
    return path


def words(options: dict) -> list[str]:
    """Options as a command line has them."""
    found = []
    for name, value in options.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return found


def annotate(folder: Path, output: Path, *data: Path | str, **more) -> int:
    options = {"model": folder / "model", "data": data, "output": output} | more
    return main(["annotate", *words(options)])


def train(folder: Path, out: Path, *data: Path | str, **more) -> int:
    options = {
        "model": folder / "model",
        "data": data,
        "output_dir": out,
        "max_steps": 3,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    } | more
    return main(["train", *words(options)])


def model(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def annotated(folder):
    return [folder / "a.parquet", folder / "b.parquet"]


@pytest.fixture(scope="module")
def whole(folder, annotated, tmp_path_factory):
    """A finished run on a twice and half of b."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train(folder, out, *annotated, data_weights=[2, 0.5]) == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "out"))


def test_a_mixture_is_a_file_with_these_rows(folder, annotated, whole, tmp_path):
    """The same run, to the byte, on one file that was put together by hand."""
    a, b = map(pq.read_table, annotated)
    half = taken_rows(read_annotated(annotated[1])[0], 0.5, SEED)
    assert len(half) == 3
    tables = [x.replace_schema_metadata(None) for x in (a, a, b.take(half))]
    by_hand = tmp_path / "by-hand.parquet"
    pq.write_table(pa.concat_tables(tables), by_hand)
    assert train(folder, tmp_path / "out", by_hand) == 0
    assert model(tmp_path / "out") == model(whole)
    log = [json.loads((x / "trainer_state.json").read_text()) for x in (whole, tmp_path / "out")]
    assert log[0]["epoch"] == log[1]["epoch"] == 3 / 6  # 11 pairs in steps of 2


def test_one_file_of_weight_1_is_that_file(folder, annotated, tmp_path, capsys):
    """The settings of the two runs too, in the form that runs of earlier versions have."""
    alone, weighed, (a, _) = tmp_path / "alone", tmp_path / "weighed", annotated
    assert train(folder, alone, a) == 0
    assert train(folder, weighed, a, data_weights=[1]) == 0
    assert "an epoch" not in capsys.readouterr().out
    assert model(weighed) == model(alone)
    settings, others = (
        json.loads((x / "treg_run.json").read_text()) | {"checksum": None} for x in (alone, weighed)
    )
    assert settings == others
    assert settings["data"] == str(a) and isinstance(settings["content"]["data"], str)

    # a run that an earlier version began
    del settings["data_weights"], settings["checksum"]
    before = json.dumps(settings)
    (alone / "treg_run.json").write_text(before)
    for data, more, said in (
        ([a], {"data_weights": [2]}, f"data_weights: {alone} holds a run with [1.0], now it is [2"),
        ([a], {"data_weights": [0.5]}, "now it is [0.5]"),
        (annotated, {}, f"data: {alone} holds a run with '{a}', now it is ['{a}', "),
    ):
        assert train(folder, alone, *data, **more) == 2
        assert said in capsys.readouterr().err
    assert (alone / "treg_run.json").read_text() == before
    assert train(folder, alone, a) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_stopped_run_goes_on_to_the_same_bytes(folder, annotated, whole, out, capsys):
    for name in (SEAL, "model.safetensors", "trainer_state.json", "checkpoint-3"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(folder, out, *annotated, data_weights=[2, 0.5]) == 0
    said = capsys.readouterr().out
    assert "going on from" in said and "checkpoint-2" in said
    for line in (
        "11 pairs an epoch:",
        f"{annotated[0]}: 4 rows, weight 2: 8 an epoch",
        f"{annotated[1]}: 6 rows, weight 0.5: 3 an epoch",
    ):
        assert line in said
    assert model(out) == model(whole)


def test_another_run_is_refused_by_name(folder, annotated, out, tmp_path, capsys):
    a, b = annotated
    moved = tmp_path / "moved.parquet"
    shutil.copy(b, moved)
    given = [2, 0.5]
    assert train(folder, out, a, moved, data_weights=given) == 0
    assert "nothing to do" in capsys.readouterr().out
    for data, weights, said in (
        ([b, a], given, "data: .*in another order"),
        ([b, a], [0.5, 2], "data: .*in another order"),
        ([a, b], [2, 0.25], r"data_weights: .* \[2.0, 0.5\], now it is \[2.0, 0.25\]"),
        ([a, b], [0.5, 2], "data_weights: "),
        ([a], [2], "data: "),
    ):
        assert train(folder, out, *data, data_weights=weights) == 2
        assert re.search(said, capsys.readouterr().err)
    shutil.copy(annotate_more(folder, tmp_path), moved)
    assert train(folder, out, a, moved, data_weights=given) == 2
    assert f"({moved}: SHA-256 " in capsys.readouterr().err
    assert (out / SEAL).exists()


def annotate_more(folder: Path, tmp_path: Path) -> Path:
    """b annotated with other token rewards."""
    output = tmp_path / "shaped.parquet"
    assert annotate(folder, output, folder / "b.jsonl", shape=["centre"]) == 0
    return output


def test_files_that_do_not_go_together_are_named(folder, annotated, tmp_path, capsys):
    a, raw = annotated[0], folder / "b.jsonl"
    shaped = annotate_more(folder, tmp_path)
    assert train(folder, tmp_path / "o1", a, shaped) == 2
    error = capsys.readouterr().err
    assert f"{shaped}: expected pairs that were annotated as those of {a}" in error
    assert "streams.token_rewards.shaping [], got ['centre']" in error
    for more, code in (({"ignore_fingerprint": True}, 2), ({"mixed_annotations": True}, 0)):
        assert train(folder, tmp_path / "o1", a, shaped, max_steps=1, **more) == code
    assert train(folder, tmp_path / "o2", a, raw) == 2
    error = capsys.readouterr().err
    assert f"expected {a} with the reference's log-prob of each token, as {raw}" in error
    assert not (tmp_path / "o2" / "annotated-2.parquet").exists()
    assert train(folder, tmp_path / "o3", a, raw, alpha=0) == 2
    assert f"annotated data alone or raw ones, got {a} and {raw}" in capsys.readouterr().err
    assert annotate(folder, tmp_path / "o4.parquet", raw, a) == 2
    assert f"got {a}, which is annotated already" in capsys.readouterr().err


def test_a_file_of_another_model_is_named(folder, annotated, tmp_path, capsys):
    other = shutil.copytree(folder / "model", tmp_path / "model")
    tiny.tiny_llama(400, initializer_range=0.2).save_pretrained(other)
    made = tmp_path / "other.parquet"
    assert annotate(tmp_path, made, folder / "b.jsonl") == 0
    assert train(folder, tmp_path / "out", annotated[0], made) == 2
    assert f"{made}: expected data annotated with this model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def beside(folder, annotated, tmp_path_factory):
    """Files that raw ones can stand beside, and others, by what is the matter with them."""
    path = tmp_path_factory.mktemp("beside")
    other = shutil.copytree(folder / "model", path / "model")
    tiny.tiny_llama(400, initializer_range=0.2).save_pretrained(other)
    made = {
        "good": (folder, {"per_token": True}),
        "other": (path, {"per_token": True}),
        "shaped": (folder, {"per_token": True, "shape": ["centre"]}),
        "turns": (folder, {"per_token": True, "turns": "all"}),
        "bare": (folder, {"no_reference": True}),
    }
    for name, (where, more) in made.items():
        assert annotate(where, path / f"{name}.parquet", folder / "b.jsonl", **more) == 0
    shutil.copy(annotated[1], path / "sums.parquet")
    return path


@pytest.mark.parametrize(
    ("data", "eval_data", "message"),
    [
        ("RAW", "other", "other.parquet: expected data annotated with this model"),
        ("other", "RAW", "other.parquet: expected data annotated with this model"),
        ("RAW other", "", "other.parquet: expected data annotated with this model"),
        ("RAW", "bare", "eval_dataset: expected the columns ref_chosen_logps"),
        ("RAW shaped", "", r"shaped.parquet: .* those of .*a.jsonl, with .*shaping \[\], got"),
        ("good", "RAW shaped", r"shaped.parquet: .* those of .*a.jsonl, with .*shaping \[\], got"),
        ("RAW turns", "", "encode.turns 'assistant', got 'all'; annotate both with the same --tu"),
        ("good", "RAW sums", "eval_data: expected .*sums.parquet with the reference's log-prob"),
        ("RAW good", "other", "other.parquet: expected data annotated with this model"),
    ],
)
def test_files_are_refused_before_others_are_annotated(
    folder, beside, data, eval_data, message, tmp_path, monkeypatch, capsys
):
    def never(*_, **__):
        raise AssertionError("annotated")

    monkeypatch.setattr("treg.cli.train.annotate", never)

    def paths(names):
        found = (folder / "a.jsonl" if x == "RAW" else beside / f"{x}.parquet" for x in names)
        return list(found)

    more = {"eval_strategy": "steps", "eval_data": paths(eval_data.split())} if eval_data else {}
    assert train(folder, tmp_path / "out", *paths(data.split()), **more) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("more", [{}, {"shape": ["centre"], "mixed_annotations": True}])
def test_raw_files_beside_annotated_ones(folder, beside, tmp_path, monkeypatch, more):
    monkeypatch.setattr("treg.cli.train.plot_curves", lambda *_: None)  # long to import
    out, held_out = (
        tmp_path / "out",
        {"eval_strategy": "steps", "eval_data": beside / "sums.parquet"},
    )
    given = folder / "a.jsonl", beside / "good.parquet"
    assert train(folder, out, *given, max_steps=1, **held_out, **more) == 0
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["epoch"] == 1 / 5 and "eval_loss" in state["log_history"][0]


def test_raw_files_beside_one_of_another_day(folder, tmp_path, monkeypatch, capsys):
    """Where the template asks for the day."""
    monkeypatch.setattr("treg.cli.train.plot_curves", lambda *_: None)  # long to import
    shutil.copytree(folder / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} " + template.read_text())
    made, given = tmp_path / "b.parquet", (folder / "a.jsonl", tmp_path / "b.parquet")
    date = {"date": "2020-02-01"}
    assert annotate(tmp_path, made, folder / "b.jsonl", per_token=True, **date) == 0
    assert train(tmp_path, tmp_path / "o", *given, max_steps=1) == 2
    error = capsys.readouterr().err
    expected = r"encode\.date '\d{4}-\d\d-\d\d', got '2020-02-01'; .* --date"
    assert re.search(rf"b\.parquet: .* {expected}", error)
    assert not [*(tmp_path / "o").glob("annotated*")]
    assert train(tmp_path, tmp_path / "o", *given, max_steps=1, **date) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shaping": ("centre",)},
        {"rewards": "entropy", "encode": EncodeOptions(turns="all", date="2026-11-30")},
        {
            "rewards": "several",
            "shaping": ("clip=1",),
            "rewards_options": {
                "sources": [{"stream": "s", "name": "surprise", "shape": ["centre"]}, "entropy"],
                "mix": {"s": 1.0},
            },
        },
    ],
)
def test_what_is_planned_is_what_is_made(folder, options, tmp_path):
    tokenizer, output = tiny.tiny_tokenizer(), tmp_path / "o.parquet"
    given, model = AnnotateOptions(**options), tiny.tiny_llama(len(tokenizer))
    annotate_file(model, tokenizer, folder / "a.jsonl", output, given, progress=False)
    check_made_alike("a", planned(given), "b", read_meta(output), settings=False)
    streams = read_meta(output).get("streams", {})
    kept = {x: {k: y[k] for k in ("source", "shaping")} for x, y in streams.items()}
    assert kept == (planned(given)["streams"] if streams else {})
    assert streams or options == {}


def test_raw_files_are_annotated_each(folder, tmp_path, capsys):
    raw, out = [folder / "a.jsonl", folder / "b.jsonl"], tmp_path / "out"
    assert train(folder, out, *raw, data_weights=[1, 0.5], max_steps=1) == 0
    assert "7 pairs an epoch" in capsys.readouterr().out
    for i, path in enumerate(raw, 1):
        made, meta = read_annotated(out / f"annotated-{i}.parquet")
        expected, _ = read_annotated(path.with_suffix(".parquet"))
        assert len(made) == len(expected) == meta["report"]["kept"]
        assert [x["where"] for x in made] == [x["where"] for x in expected]
        for x, y in zip(made, expected, strict=True):
            assert (x["chosen_token_rewards"] == y["chosen_token_rewards"]).all()
    card = (out / "README.md").read_text()
    assert "trained on `a.jsonl`, `b.jsonl` (weight 0.5) with treg" in card
    assert "Token rewards: contrastive" in card


def test_raw_files_of_a_plain_objective(folder, tmp_path, monkeypatch):
    """Held-out pairs of two files have the loss of one file with their rows."""
    monkeypatch.setattr("treg.cli.train.plot_curves", lambda *_: None)  # long to import
    raw, both = [folder / "a.jsonl", folder / "b.jsonl"], tmp_path / "both.jsonl"
    both.write_text("".join(x.read_text() for x in raw))
    more = {"alpha": 0, "max_steps": 1, "eval_strategy": "steps", "save_strategy": "no"}
    losses = []
    for name, data in (("o1", raw), ("o2", both)):
        out = tmp_path / name
        assert train(folder, out, *raw, data_weights=[2, 0.5], eval_data=data, **more) == 0
        state = json.loads((out / "trainer_state.json").read_text())
        assert state["epoch"] == 1 / 6
        losses += [x["eval_loss"] for x in state["log_history"] if "eval_loss" in x]
    assert losses[0] == losses[1] and len(losses) == 2


def test_several_files_are_annotated_into_one(folder, annotated, tmp_path, capsys):
    output, raw = tmp_path / "both.parquet", [folder / "a.jsonl", folder / "b.jsonl"]
    assert annotate(folder, output, *raw) == 0
    said = capsys.readouterr().out
    assert "10 of 10 rows kept" in said and f"{raw[1]}: 6 of 6" in said
    examples, meta = read_annotated(output)
    apart = [x for file in annotated for x in read_annotated(file)[0]]
    assert [x["where"] for x in examples] == [x["where"] for x in apart]
    assert [x["index"] for x in examples] == [*range(10)]
    assert meta["report"]["sources"] == {str(raw[0]): [4, 4], str(raw[1]): [6, 6]}
    for x, y in zip(examples, apart, strict=True):
        assert (x["chosen_ids"] == y["chosen_ids"]).all()
        assert abs(x["chosen_token_rewards"] - y["chosen_token_rewards"]).max() < 1e-5
    before = output.read_bytes()
    assert annotate(folder, output, *raw) == 0
    assert output.read_bytes() == before
    assert annotate(folder, output, *reversed(raw)) == 2
    assert f"{output}: made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--data a ''", "data: expected a file, a folder or a hub name, got ''"),
        ("--data a ./a", "data: expected each source once, got ./a twice"),
        ("--data a --data b", "data: expected --data once, with all of them behind it"),
        ("--data a b --data_weights 1", "data_weights: expected 2, one for each of a, b, got 1"),
        ("--data a b --data_weights 1 0", "above 0 and at most 1000 for b, got 0.0"),
        ("--data a b --data_weights -1 1", "above 0 and at most 1000 for a, got -1.0"),
        ("--data a b --data_weights 1 nan", "for b, got nan"),
        ("--data a b --data_weights 1 inf", "for b, got inf"),
        ("--data a pipe.jsonl", "data: expected a file or a folder, got pipe.jsonl, which is neit"),
        ("--data a none.jsonl", "data: no such file: none.jsonl"),
        ("--data a --eval_data b b --eval_strategy epoch", "eval_data: expected each source once"),
        ("--data a b --interleave_probs 0.5", "--data_weights says how many times"),
        ("--config no.yaml", "no.yaml: data: expected a value in each place of the list"),
        ("--config empty.yaml", "data: expected a file, a folder or a hub name, got none"),
        ("--config words.yaml", "data_weights: could not convert string to float: 'x'"),
    ],
)
def test_refused(argv, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    for name in "ab":
        shutil.copytree(folder / "model", name)
    Path("no.yaml").write_text("data: [a, null]\n")
    Path("empty.yaml").write_text("data: []\n")
    Path("words.yaml").write_text("data: [a, b]\ndata_weights: [1, x]\n")
    given = ["" if x == "''" else x for x in argv.split()]
    command = ["train", "--model", str(folder / "model"), "--output_dir", "out", "--use_cpu"]
    assert main([*command, *given]) == 2
    assert message in capsys.readouterr().err


def test_yaml_and_the_command_line_say_the_same(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text('model: m\ndata: ["a,b.jsonl", c]\ndata_weights: [1, 0.5]\neval_data: d\n')
    kinds = (ModelOptions, RowOptions, TrainOptions, RewardsOptions)
    line = ["--model", "m", "--data", "a,b.jsonl", "c", "--data_weights", "1", "0.5"]
    line += ["--eval_data", "d"]
    expected = parse("train", line, kinds)
    assert parse("train", ["--config", str(file)], kinds) == expected
    assert expected[1].data == ["a,b.jsonl", "c"] and expected[2].eval_data == ["d"]
    assert expected[2].data_weights == [1.0, 0.5]


def test_the_trainer_takes_a_mixture(folder, annotated, whole, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from treg.trainer import TRegConfig, TRegTrainer

    config = TRegConfig(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = TRegTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=config,
        train_dataset=Mixture(tuple(annotated), (2, 0.5), SEED),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    trainer.save_model()
    assert model(tmp_path) == model(whole)
    assert [x.taken for x in trainer.data_shares["train_dataset"]] == [8, 3]


@pytest.mark.parametrize("raw", [False, True])
def test_packs_of_weighed_rows(folder, annotated, tmp_path, raw):
    """No pack has a row twice, and all packs together have each as often as its weight says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from treg.trainer import TRegConfig, TRegTrainer

    config = TRegConfig(
        str(tmp_path),
        packing=True,
        token_budget=1000,
        use_cpu=True,
        **({"alpha": 0, "loss_type": "simpo", "beta": 2.0} if raw else {}),
    )
    paths = [x.with_suffix(".jsonl") for x in annotated] if raw else annotated
    trainer = TRegTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=config,
        train_dataset=Mixture(tuple(paths), (3, 1)),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    packs = [[tuple(x["prompt_ids"]) for x in pack] for pack in trainer.train_dataset]
    rows = [[tuple(x["prompt_ids"]) for x in read_annotated(path)[0]] for path in annotated]
    assert sorted(x for pack in packs for x in pack) == sorted(3 * rows[0] + rows[1])
    assert all(len(set(pack)) == len(pack) for pack in packs)
