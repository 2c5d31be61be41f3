"""The examples run, on real rows where they are present."""

import importlib.util
import json
import math
import random
import re
import runpy
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import tiny
import torch
from tiny import environment, shared_data

from treg.data import RowProblem
from treg.data.annotated import read_annotated
from treg.demo import run as demo
from treg.demo import world
from treg.rewards.scorer import Scorer
from treg.rewards.server import ServedModel, ServerOptions

EXAMPLES = Path(__file__).parents[1] / "examples"
# the forms of rows are those of tests/data and of tests/rewards/test_annotate.py
CASES = {
    "UltraFeedback": ("prefs/ultrafeedback_train.jsonl", ["--tokenizer", "tok/qwen2.5"]),
    "a pretrained model": ("prefs/ultrafeedback_train.jsonl", ["--model", "lm/tinystories-656k"]),
}


@pytest.mark.parametrize("case", CASES)
def test_preference_file(case, tmp_path):
    data, (kind, path) = CASES[case]
    options = ["--limit", "10", "--max_length", "160", "--steps", "2"]
    given = (kind, shared_data(path), "--output", tmp_path)
    processes.run(EXAMPLES / "preference_file.py", shared_data(data), *given, *options)
    examples, meta = read_annotated(tmp_path / "annotated.parquet")
    kept, dropped = meta["report"]["kept"], meta["report"]["dropped"]
    assert len(examples) == kept > 0 and kept + sum(dropped.values()) == 10
    page = (tmp_path / "page.html").read_text()
    assert all(x["where"].rpartition("/")[2] in page for x in examples)
    model = tmp_path / "model.safetensors"
    before = model.read_bytes()
    if case != "a pretrained model":
        return
    model.unlink()  # as a kill after the last step leaves it: no other step is made
    processes.run(EXAMPLES / "preference_file.py", shared_data(data), *given, *options)
    assert model.read_bytes() == before


def run(command, folder):
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(output):
    return [float(x) for x in re.findall(r"loss'?:? '?([0-9.]+)", output)]


def test_fsdp2_loop(tmp_path):
    """Two processes print the losses of one."""
    script = EXAMPLES / "fsdp2_loop.py"
    found = [losses(processes.run(script, ranks=size, cwd=tmp_path)) for size in (1, 2)]
    assert len(found[0]) == 5 and found[0][-1] < found[0][0]
    assert found[1] == pytest.approx(found[0], abs=2e-6)


def test_trl_dpo(tmp_path):
    """Under accelerate's launcher two processes of 4 pairs log what one of 8 does."""
    pytest.importorskip("trl")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    options = ["--max_steps", "3", "--disable_tqdm", "True", "--per_device_train_batch_size"]
    found = []
    for command, batch in (([sys.executable], "8"), (launch, "4")):
        command = [
            *command,
            EXAMPLES / "trl_dpo.py",
            *options,
            batch,
            "--output_dir",
            tmp_path / batch,
        ]
        found.append(losses(run(command, tmp_path)))
    assert len(found[0]) == 4 and len(set(found[0])) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert (tmp_path / "4" / "model.safetensors").exists()


def test_trl_grpo(tmp_path):
    """Tokens of an answer are told apart."""
    pytest.importorskip("trl")
    options = ["--max_steps", "1", "--disable_tqdm", "True", "--num_generations", "4"]
    more = ["--per_device_train_batch_size", "4", "--max_completion_length", "16"]
    output = run(
        [
            sys.executable,
            EXAMPLES / "trl_grpo.py",
            *options,
            *more,
            "--output_dir",
            tmp_path / "out",
        ],
        tmp_path,
    )
    (within,) = re.findall(r"'credit/within': '([0-9.e-]+)'", output)
    assert 0.05 < float(within) <= 1
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "hide", ["", "import sys; sys.modules['liger_kernel'] = None; "], ids=["present", "absent"]
)
def test_liger_swap(hide, tmp_path):
    """With and without Liger; its loss is treg's without the regularizer."""
    script = str(EXAMPLES / "liger_swap.py")
    code = f"{hide}import runpy; runpy.run_path({script!r}, run_name='__main__')"
    lines = [
        line
        for line in run([sys.executable, "-c", code], tmp_path).splitlines()
        if " loss " in line
    ]
    found = {line[:20].strip(): float(line.split(" loss ")[1].split()[0]) for line in lines}
    assert abs(found["treg, T-REG"] - found["treg, DPO"]) > 1e-3
    assert abs(found.get("Liger, DPO", found["treg, DPO"]) - found["treg, DPO"]) < 1e-4


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """compare_methods.py as a module, on a small held-out world."""
    monkeypatch.setattr(world, "HELD_OUT_PAIRS", 4)
    monkeypatch.setattr(world, "SAMPLES", 1)
    asked = world.prompts
    monkeypatch.setattr(world, "prompts", lambda split: asked(split)[:16])
    spec = importlib.util.spec_from_file_location(
        "compare_methods", EXAMPLES / "compare_methods.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_methods", module)
    spec.loader.exec_module(module)
    return module


def compared(compare, file, monkeypatch, *methods):
    """The record of a run on 20 pairs in two steps."""
    command = ["compare_methods.py", "--pairs", "20", "--steps", "2", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(file), "--methods", *methods])
    compare.main()
    return json.loads(file.read_text())


def test_compare_methods(compare, tmp_path, monkeypatch, capsys):
    """The rows of the demo's methods are the demo's; a second run trains what is missing."""
    names, file = ["before", "dpo", "treg-contrastive"], tmp_path / "methods.json"
    first = compared(compare, file, monkeypatch, *names[1:])
    assert [row["method"] for row in first["rows"]] == names
    capsys.readouterr()
    second = compared(compare, file, monkeypatch, *names[1:], "tdpo1")
    output = capsys.readouterr().out
    assert second["rows"][:3] == first["rows"] and "1/1 tdpo1, seed 0" in output
    for row in second["rows"]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        shares = [row[name] for name in ("wrong facts", "malformed", "ranked right") if name in row]
        assert len(shares) == (2 if row["method"] == "before" else 3)
        assert all(0 <= share <= 1 for share in shares)
        assert f"| {row['method']} |" in output
    expected = demo.run(str(tmp_path / "demo"), seeds=1, pairs=20, world="plain")
    theirs = [expected["before"], *expected["runs"][:2]]
    for row, other in zip(first["rows"], theirs, strict=True):
        for name in ("wrong facts", "malformed", "facts an answer"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)  # kept in five digits
        assert row.get("ranked right") == other.get("accuracy")


@pytest.mark.parametrize("change", ["pairs", "methods"])
def test_compare_methods_refuses_another_record(change, compare, tmp_path):
    file = tmp_path / "methods.json"
    settings = compare.settings_of(compare.arguments(["--methods", "dpo"]))
    compare.Record(file, settings).write()
    more = compare.settings_of(compare.arguments(["--methods", "dpo", "ipo"]))
    assert compare.Record(file, more).content["settings"] == json.loads(json.dumps(more))
    other = {"pairs": 20} if change == "pairs" else {"methods": {"dpo": {"loss_type": "ipo"}}}
    named = "pairs" if change == "pairs" else "methods"
    with pytest.raises(ValueError, match=f"expected a record with {named} "):
        compare.Record(file, settings | other)


def test_compare_methods_refuses_other_files(compare, tmp_path):
    file = tmp_path / "methods.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="output: expected a record of this script"):
        compare.Record(file, {"methods": {}})


@pytest.mark.parametrize("given", ["--steps 0", "--pairs -1", "--learning_rate 0", "--methods ppo"])
def test_compare_methods_refuses_numbers(given, compare, capsys):
    with pytest.raises(SystemExit):
        compare.arguments(given.split())
    assert given.split()[0].strip("-") in capsys.readouterr().err


def test_compare_methods_table(compare):
    """Means, standard deviations and differences by hand."""
    rows = []
    for method, rate, wrong in (("dpo", 3e-4, (0.1, 0.2)), ("treg-true", 3e-4, (0.05, 0.05))):
        for seed, share in enumerate(wrong):
            row = {"method": method, "seed": seed, "learning rate": rate, "wrong facts": share}
            rows.append(row | {"malformed": 0.5, "ranked right": 1.0, "seconds": 2.0})
    lines = compare.table(rows).splitlines()
    rest = "50.0% (0.0%) | 1.00 (0.00) | 2.00 (0.00)"
    assert lines[3] == f"| dpo | 0.0003 | 15.0% (7.1%) | {rest} | +0.0% (0.0%) |"
    assert lines[5] == f"| treg-true | 0.0003 | 5.0% (0.0%) | {rest} | -10.0% (7.1%) |"


def test_compare_methods_swaps_answers():
    example = {"index": 3, "prompt_ids": [1], "chosen_ids": [2], "ref_chosen_token_logps": [0.1]}
    example |= {"rejected_ids": [4], "ref_rejected_token_logps": [0.2]}
    found = demo.swapped(example)
    assert found["chosen_ids"] == [4] and found["ref_rejected_token_logps"] == [0.1]
    assert demo.swapped(found) == example


class FakeLlama:
    """What examples/serve_gguf.py needs of llama-cpp-python's class, with a tiny model."""

    def __init__(self, path, n_ctx, **more):
        assert path.endswith("served.gguf") and more["logits_all"]
        self.model = tiny.tiny_llama(len(tiny.tiny_tokenizer()))
        self.scores = np.zeros((n_ctx, self.n_vocab()), np.float32)

    def n_vocab(self):
        return self.model.config.vocab_size

    def tokenize(self, text, add_bos, special):
        assert not add_bos and special
        return tiny.tiny_tokenizer()(text.decode(), add_special_tokens=False)["input_ids"]

    def reset(self):
        self.scores[:] = np.nan

    def eval(self, ids):
        with torch.inference_mode():
            self.scores[: len(ids)] = self.model(torch.tensor([ids])).logits[0].numpy()


def test_serve_gguf(monkeypatch):
    fake = SimpleNamespace(Llama=FakeLlama, __version__="0")
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    example = runpy.run_path(str(EXAMPLES / "serve_gguf.py"))
    example["Handler"].engine = example["Engine"](Path("served.gguf"), 100, None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), example["Handler"])
    threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True).start()
    tokenizer = tiny.tiny_tokenizer()
    options = ServerOptions([f"http://127.0.0.1:{server.server_address[1]}"], "served")
    model = ServedModel(options, tokenizer)
    assert model.length == 100 and model.version == "llama-cpp-python 0"
    rows = [([5, 6, 7], [8, 9]), ([3], [4, 5, 6, 7])]
    scorer = Scorer(
        tiny.tiny_llama(len(tokenizer)), tokenizer, tokens_per_batch=99, share_prefix=False
    )
    with torch.inference_mode():
        here = scorer.score(rows)
    for a, b in zip(model.scorer(lambda tokens: None).score(rows), here, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for row, said in (([1] * 99, "the context has 100"), ([9999, 1], "expected ids from 0")):
        with pytest.raises(RowProblem, match=said):
            model.scorer(lambda tokens: None).score([(row, [1])])
    model.close()
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(monkeypatch):
    """The modules of examples/online, by name."""
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(EXAMPLES / "online"))
    names = ("online_truth", "online_task", "online_train", "run")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    yield found
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_online(online, tmp_path):
    """Two methods for two steps each; a second run of the same command trains nothing."""
    file = tmp_path / "online.json"
    command = [sys.executable, EXAMPLES / "online" / "run.py", "--quick", "--output", file]
    output = run(command, tmp_path)
    record = json.loads(file.read_text())
    assert {(x["method"], x["seed"]) for x in record["rows"]} == {("sequence", 0), ("RED", 0)}
    for row in record["rows"]:
        assert [x["step"] for x in row["curve"]] == [0, 1, 2]
        assert len(row["rewards"]) == 2 and all(map(math.isfinite, row["rewards"]))
        assert row["worth"] == row["curve"][-1]["worth"]
        for x in row["curve"]:
            assert 0 <= x["wrong facts"] <= 1 and 0 <= x["malformed"] <= 1
        assert f"| {row['method']} |" in output
    first, second = (x["curve"][0] for x in record["rows"])
    assert first == second  # nothing is trained yet
    assert "0/2" not in run(command, tmp_path)
    assert json.loads(file.read_text()) == record


def test_online_truth(online):
    """What an answer's tokens are worth adds up to what the table says of it."""
    tokenizer = online.online_task.load_tokenizer()
    source = online.online_truth.TruthSource(online.online_truth.TruthOptions(), None)
    for row in world.preference_rows(3, 20, "train"):
        asked, text = row["prompt"][0]["content"], row["chosen"][0]["content"]
        check = world.check(asked, text)
        for said, expected in (
            (text, check.right - check.wrong),
            (f"{text} Hm.", check.right - check.wrong - 1),
            (f"{text} {text}", -2 * check.wrong),  # each fact is said again
            ("", -1),
        ):
            ids = tokenizer(said + tokenizer.eos_token)["input_ids"]
            response = online.online_truth.Response(
                prompt=row["prompt"],
                completion=said,
                text=said,
                prompt_ids=np.array([0], np.int32),
                ids=np.array(ids, np.int32),
                content=len(ids) - 1,
                tokenizer=tokenizer,
            )
            assert source.check(response) is None
            rewards = source.score([response])[0]["token_rewards"]
            assert rewards.sum().item() == pytest.approx(expected, abs=1e-5)
            assert online.online_truth.worth(asked, said) == expected
        wrong = [text[start:end] for start, end in row["wrong_chosen"]]
        marked = online.online_truth.marks(asked, text)
        assert [text[start:end] for start, end, number in marked if number < 0] == wrong


@pytest.mark.parametrize("alike", [True, False])
def test_online_beginnings(alike, online):
    """What has been said at each token, by decoding the beginning that ends there."""
    task, rng = online.online_task, random.Random(0)
    tokenizer = task.load_tokenizer()
    rows = [task.reward_pair(rng, 6, alike) for _ in range(4)]
    model = task.load_reward_model(str(world.MODEL))
    found, said = task.scores(model, tokenizer, rows)
    answers = [(row, side) for side in ("chosen", "rejected") for row in rows]
    for i, (row, side) in enumerate(answers):
        text = row[side][0]["content"]
        ids = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
        assert int(said.last[i]) == len(ids) - 1
        one = model(torch.tensor([ids])).logits[0, 0]
        assert found[i, len(ids) - 1].item() == pytest.approx(one.item(), abs=1e-4)
        for j in range(len(ids)):
            read = tokenizer.decode(ids[: j + 1]).partition("assistant\n")[2]
            wrong = sum(end <= len(read) for _, end in row[f"wrong_{side}"])
            assert said.wrong[i, j] == wrong
            assert said.ended[i, j] == (read.endswith(".") and text.startswith(read))


def test_online_table(online):
    """Means and intervals by hand: of two numbers, 12.706 times half of their difference."""
    rows = []
    for method, wrong in (("sequence", (0.10, 0.12)), ("RED", (0.05, 0.07))):
        for seed, share in enumerate(wrong):
            measured = {"malformed": 0.5, "facts an answer": 5.0, "tokens": 30.0, "worth": 2.0}
            row = {"method": method, "seed": seed, "wrong facts": share, "seconds": 20.0}
            start = {"step": 0, "wrong facts": 0.3, **measured}
            rows.append(row | measured | {"curve": [start]})
    lines = online.run.table(rows).splitlines()
    rest = "50.0 % (0.0) | 5.00 (0.00) | 30.0 (0.0) | 2.00 (0.00) | "
    assert lines[2] == f"| before | 30.0 % (0.0) | {rest} |  |"
    assert lines[3] == f"| sequence | 11.0 % (12.7) | {rest}20.0 (0.0) |  |"
    assert lines[4] == f"| RED | 6.0 % (12.7) | {rest}20.0 (0.0) | -5.0 % (0.0) |"


def test_online_refuses_another_record(online, tmp_path):
    """More methods go into a record; other settings do not."""
    file = tmp_path / "online.json"
    settings = online.run.settings_of(online.run.arguments(["--methods", "sequence"]))
    online.run.Record(file, settings).write()
    more = online.run.settings_of(online.run.arguments(["--methods", "RED"]))
    assert list(online.run.Record(file, more).content["settings"]["methods"]) == ["sequence", "RED"]
    other = online.run.settings_of(online.run.arguments(["--methods", "RED", "--steps", "3"]))
    with pytest.raises(ValueError, match="expected a record with training "):
        online.run.Record(file, other)
    changed = json.loads(json.dumps(settings))
    changed["methods"]["sequence"]["faster"] = 3.0
    with pytest.raises(ValueError, match="expected a record with methods "):
        online.run.Record(file, changed)
    file.write_text("{}")
    with pytest.raises(ValueError, match="output: expected a record of this script"):
        online.run.Record(file, settings)


def test_online_picture(online, tmp_path, monkeypatch):
    """The same rows give the same bytes, with the name of every line that is there."""
    monkeypatch.delitem(sys.modules, "picture", raising=False)
    picture = importlib.import_module("picture")
    rows = []
    for method in ("sequence", "RED"):
        for seed in (0, 1):
            curve = [{"step": x, "wrong facts": 0.3 - 0.01 * x - 0.02 * seed} for x in (0, 5)]
            rows.append({"method": method, "seed": seed, "curve": curve})
    drawn = []
    for name in ("a.svg", "b.svg"):
        picture.draw(rows, tmp_path / name)
        drawn.append((tmp_path / name).read_text())
    assert drawn[0] == drawn[1]
    for method, (label, _, _) in picture.LINES.items():
        assert (label in drawn[0]) == (method in ("sequence", "RED"))
    ends = picture.apart([(1.0, "a", ""), (1.2, "b", ""), (9.0, "c", "")], 0.5)
    assert [height for height, _, _ in ends] == [1.0, 1.5, 9.0]
