"""The study of examples/study: its own parts against numbers by hand, and a small run of it."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from treg.demo import rumours as world
from treg.demo import run as demo
from treg.demo.records import Record, cell, half_width
from treg.losses import LossOptions, treg_loss

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "study"
MODULES = ("study", "study_judge", "study_methods", "study_picture", "study_sft", "study_train")


@pytest.fixture(scope="module")
def study():
    """The modules of the study by name."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def task(study, tmp_path_factory):
    settings = study["study_train"].Settings(pairs=10, held_out=6, watched=2, samples=1)
    return study["study_train"].Task(settings, tmp_path_factory.mktemp("study"), 0)


def test_half_width_and_cell():
    # of 1, 2, 3: standard deviation 1, times t = 4.303 over the root of 3
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(half_width([1.0])) and cell([]) == ""
    assert cell([0.1, 0.12], percent=True) == "11.0 % (12.7)"
    assert cell([0.5], sign="+") == "+0.50"


def test_record_goes_on_and_refuses_others(tmp_path):
    file, settings = tmp_path / "r.json", {"training": {"pairs": 3}, "methods": {"a": {"x": 1}}}
    record = Record(file, settings)
    record.take({"method": "a", "seed": 0, "x": 1 / 3})
    more = Record(file, settings | {"methods": {"b": {}}})
    assert more.rows == [{"method": "a", "seed": 0, "x": 0.33333}]
    assert more.has(method="a", seed=0) and not more.has(method="b", seed=0)
    more.write()
    assert Record(file, settings).content["settings"]["methods"].keys() == {"a", "b"}
    for other in ({"training": {"pairs": 4}}, {"methods": {"a": {"x": 2}}}):
        with pytest.raises(ValueError, match=f"expected a record with {next(iter(other))} "):
            Record(file, settings | other)
    for broken in ("{}", "[]", '{"settings": {'):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"output: expected a record .*r\.json: .*give"):
            Record(file, settings)
    with pytest.raises(ValueError, match="output: expected a record of this script"):
        Record(tmp_path, settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--output", "study-run"], "output: expected a file that ends in .json, got study-run"),
        (["--output", "no.json", "--table"], "expected a record for --table, found none: no.json"),
    ],
)
def test_outputs_that_are_refused(study, given, message, capsys):
    with pytest.raises(SystemExit):
        study["study"].arguments(given)
    assert message in capsys.readouterr().err


def test_a_broken_record_is_an_error_without_code(study, tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["study.py", "--table", "--output", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit, match=r"study\.py: error: output: expected a record"):
        study["study"].main()


def test_log_probs_are_those_of_the_chat(task):
    """Against a forward of each conversation alone."""
    for row, found in zip(
        [(r, s) for r in task.held_out for s in ("chosen", "rejected")],
        task.token_logps(task.start, task.held_out),
        strict=True,
    ):
        (row, side), prompt = row, row[0]["prompt"]
        text = task.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        before = task.tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = row[side][0]["content"] + task.tokenizer.eos_token
        ids = torch.tensor(before + task.tokenizer(answer, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = task.start(ids[None]).logits[0, len(before) - 1 : -1]
        expected = -cross_entropy(logits, ids[len(before) :], reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_kinds_are_the_values_of_the_answers(task):
    kinds = iter(task.kinds(task.held_out))
    for row in task.held_out:
        for side in ("chosen", "rejected"):
            kind, text = next(kinds), row[side][0]["content"]
            ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(kind) == len(ids) + 1 and kind[-1] == 0
            for sign in (1, -1):
                said = task.tokenizer.decode(
                    [i for i, k in zip(ids, kind[:-1], strict=True) if k == sign]
                )
                marks = [x for x in row[f"{side}_marks"] if x["value"] * sign > 0]
                assert said.split() == [text[x["start"] : x["end"]] for x in marks]


def test_shift_is_the_mean_over_each_kind(task):
    """A policy whose log-probs are moved by known amounts."""
    rows = task.held_out[:2]
    before = task.token_logps(task.start, rows)
    amounts = {1: 0.5, -1: -2.0, 0: 0.125}
    moved = []
    for logps, kind in zip(before, task.kinds(rows), strict=True):
        moved.append(logps - torch.tensor([amounts[int(k)] for k in kind]))
    # before minus after: the other way round
    found = task.shift(task.start, rows, moved)
    assert found == pytest.approx({"good": 0.5, "bad": -2.0, "other": 0.125}, abs=1e-5)


def test_wrong_labels_are_the_same_for_all_methods(study, task):
    for name in ("none", "oracle"):
        task.make_signal(name)
    methods = study["study_methods"]
    clean = task.examples(methods.Method())
    swapped = []
    for noise in (0.1, 0.3):
        for signal in ("none", "oracle"):
            noisy = task.examples(methods.Method(signal=signal, noise=noise))
            pairs = zip(clean, noisy, strict=True)
            swapped.append(
                {
                    i
                    for i, (a, b) in enumerate(pairs)
                    if len(a["chosen_ids"]) != len(b["chosen_ids"])
                    or (a["chosen_ids"] != b["chosen_ids"]).any()
                }
            )
    assert [len(x) for x in swapped] == [1, 1, 3, 3]
    assert swapped[0] == swapped[1] < swapped[2] == swapped[3]
    example = next(iter(clean))
    assert demo.swapped(demo.swapped(example)).keys() == (example.keys())


def test_sft_and_likelihood_are_those_of_chosen_answers(study):
    """Gradients against autograd on the log-likelihood of the chosen answer."""
    logps = torch.randn(9, dtype=torch.float64).requires_grad_()  # 4 tokens, then 5
    lengths = {"cu_seqlens": torch.tensor([0, 4, 9])}
    options = LossOptions(beta=0.1, alpha=0.0, loss_type=study["study_methods"].SFT)
    out = treg_loss(logps, None, None, options, **lengths)
    (found,) = torch.autograd.grad(out.loss.sum(), logps)
    (expected,) = torch.autograd.grad(-0.1 * logps[:4].mean(), logps)
    torch.testing.assert_close(found, expected)

    sft, beta, alpha = study["study_sft"], 0.1, 0.5
    source = sft.LikelihoodSource(sft.LikelihoodOptions(beta), None)
    sides = [SimpleNamespace(side=x, ids=range(n)) for x, n in (("chosen", 4), ("rejected", 5))]
    rewards = torch.cat([x["token_rewards"] for x in source.score(sides)]).double()
    ref = torch.zeros(2, dtype=torch.float64)
    gradients = []
    for weight in (alpha, 0.0):
        options = LossOptions(beta=beta, alpha=weight, weighting="static")
        out = treg_loss(logps, rewards, ref, options, **lengths)
        gradients += torch.autograd.grad(out.loss.sum(), logps)
    (expected,) = torch.autograd.grad(-alpha * logps[:4].mean(), logps)
    torch.testing.assert_close(gradients[0] - gradients[1], expected)


def test_baselines_and_table(study):
    base = study["study"].baseline_of
    assert base("SimPO-REG") == "SimPO" and base("oracle, noise 20 %") == "DPO, noise 20 %"
    assert base("DPO-REG, alpha 2") == base("message-wise") == "DPO"
    rows = []
    for method, wrong in (("DPO", (0.2, 0.3)), ("DPO-REG", (0.1, 0.2))):
        for seed, share in enumerate(wrong):
            measured = dict.fromkeys(study["study"].MEASURES, 0.5)
            rows.append({"method": method, "seed": seed} | measured | {"wrong facts": share})
    lines = study["study"].table(rows, ["DPO", "DPO-REG"]).splitlines()
    assert lines[2].startswith("| DPO | 25.0 % (63.5) |") and lines[2].endswith("|  |")
    assert lines[3].startswith("| DPO-REG | 15.0 % (63.5) |")
    assert lines[3].endswith("| -10.0 % (0.0) |")


def test_every_method_names_a_signal_and_a_rate(study):
    methods, settings = study["study_methods"], study["study_train"].Settings()
    assert len(methods.METHODS) == sum(map(len, methods.SLICES.values()))
    for method in methods.METHODS.values():
        assert method.signal in methods.SIGNALS and method.rate in settings.rates


@pytest.mark.slow
def test_judge_counts_wrong_facts_by_sentence(study, task):
    """Places and counts of the reward model's training, by decoding what ends there."""
    judge = study["study_judge"]
    import random

    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        world.MODEL, num_labels=1, dtype=torch.float32
    ).eval()
    answers = [x for _ in range(3) for x in judge._pair(random.Random(4), 6)]
    with torch.no_grad():
        found, ends, wrong = judge.scores(model, task.tokenizer, answers)
    for i, (asked, text, _) in enumerate(answers):
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        ids = task.tokenizer.apply_chat_template(messages, return_dict=False)
        for place, count in zip(ends[i].tolist(), wrong[i].tolist(), strict=True):
            said = task.tokenizer.decode(ids[: place + 1]).partition("assistant\n")[2]
            assert text.startswith(said) and said.endswith(".")
            assert world.check(asked, said).wrong == count
            with torch.no_grad():
                alone = model(torch.tensor([ids[: place + 1]])).logits[0, 0]
            assert found[i, place].item() == pytest.approx(alone.item(), abs=1e-4)


@pytest.mark.slow
def test_study(tmp_path):
    """Three methods, small; a second run of the same command trains nothing."""
    file = tmp_path / "quick.json"
    command = [sys.executable, FOLDER / "study.py", "--quick", "--output", file]
    methods = ["SFT", "DPO", "DPO + SFT", "DPO's own reward", "RED", "message-wise"]
    command += ["--methods", *methods]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    record = json.loads(file.read_text())
    assert {x["method"] for x in record["rows"]} == {"before", *methods}
    for row in record["rows"]:
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))
        assert f"| {row['method']} |" in output
        steps = [x["step"] for x in row["curve"]]
        assert steps == ([] if row["method"] == "before" else [0, 2])
        if steps:
            assert row["curve"][0] == {"step": 0, "good": 0.0, "bad": 0.0, "other": 0.0}
    assert (tmp_path / "quick.svg").exists() and (tmp_path / "quick-shift.svg").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "0 runs" not in again and json.loads(file.read_text()) == record
