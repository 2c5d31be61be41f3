"""The end-to-end benchmark on a tiny model: the tokens that are counted, the losses of all methods,
and the form of what it says.
"""

import json
import statistics
from dataclasses import replace

import bench_end_to_end as bench
import end_to_end_annotate as annotating
import end_to_end_steps as steps
import end_to_end_table as table
import pytest
import report
import torch
from end_to_end_cases import (
    BAR,
    REAL,
    Cell,
    Counter,
    Shape,
    by_width,
    cell_of,
    make_examples,
    make_model,
    make_tokenizer,
    real_lengths,
)
from loss_head_measure import ratio_of

from treg.data import pair_tokens

SHAPE = Shape(hidden=32, layers=2, heads=2, vocab=97, positions=512)
CELL = Cell(BAR, ((12, 5, 7), (9, 6, 3)))
# what goes through the model, padding included: without the last token of each sequence
OURS = dict(zip(steps.OURS, (2 * 22, 4 * 18, 22 + 16, 34 + 25), strict=True))


@pytest.fixture(scope="module")
def model():
    return make_model(SHAPE)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(SHAPE)


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    """A record of the methods that need no other package, and what was said."""
    said: list[str] = []
    names = (*steps.OURS, steps.FLASH, steps.FLOOR)
    found = bench.measure_steps(CELL, model, tokenizer, names, rounds=2, say=said.append)
    return found, said


# -- tokens


def test_tokens_of_a_pair():
    """12 + 12 + 5 + 7 and 9 + 9 + 6 + 3 as a person counts them."""
    assert (CELL.counted, CELL.needed, CELL.padded) == (36 + 27, 24 + 18, 4 * 19)
    assert CELL.longest == 24
    assert cell_of(BAR, 3, 5) == Cell(BAR, ((512, 128, 128),) * 3)
    assert cell_of(REAL, 3, 5).pairs == tuple(real_lengths()[:5])


@pytest.mark.parametrize("share", [False, True])
def test_tokens_are_those_of_the_trainer_but_the_last_of_each_sequence(share):
    """A trainer leaves out the last token of a sequence, which predicts nothing."""
    examples = make_examples(CELL, 97)
    trained = sum(pair_tokens(x, share_prompt=share) for x in examples)
    assert trained == (CELL.needed if share else CELL.counted) - 2 * len(CELL.pairs)


def test_answers_differ_from_the_first_token_on():
    """Also with so few tokens that they would often be the same."""
    examples = make_examples(Cell("", ((3, 2, 2),) * 50), 9)
    assert all(x["chosen_ids"][0] != x["rejected_ids"][0] for x in examples)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = [i for x in examples for name in names for i in x[name]]
    assert min(ids) >= 6 and max(ids) < 9


def test_tokens_that_were_run_are_counted_at_the_model(model):
    ids = torch.ones(2, 7, dtype=torch.int64)
    with Counter(model) as counter:
        model(input_ids=ids)
        model.base_model(ids[:1], position_ids=torch.arange(3, 10)[None])
    model(input_ids=ids)
    assert (counter.calls, counter.tokens) == ([(2, 7), (1, 7)], 21)
    assert counter.rows == 14 and counter.longest == 10


def test_rows_of_the_floor_are_no_longer_than_a_sequence():
    assert by_width([(2, 7), (1, 25)], 10) == [(2, 7), (2, 10), (1, 5)]
    assert by_width([(1, 20)], 10) == [(2, 10)]


# -- a training step


def test_all_steps_compute_the_same_loss(measured, model):
    """That of dense log-probs in float64, sequence by sequence."""
    examples, exact = make_examples(CELL, 97), []
    double = make_model(SHAPE).double()
    double.load_state_dict(model.state_dict())
    for x in examples:
        rewards = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([x["prompt_ids"] + x[f"{side}_ids"]])
            with torch.no_grad():
                logps = double(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            answer = logps[-len(x[f"{side}_ids"]) :].sum().item()
            rewards.append(steps.BETA * (answer - x[f"ref_{side}_logps"]))
        margin = torch.tensor(rewards[0] - rewards[1], dtype=torch.float64)
        exact.append(-torch.nn.functional.logsigmoid(margin).item())
    found, _ = measured
    for name, tokens in OURS.items():
        assert found["methods"][name]["loss"] == pytest.approx(statistics.mean(exact), abs=1e-5)
        assert found["methods"][name]["tokens"] == tokens, name
    assert found["methods"][steps.FLOOR]["tokens"] == CELL.needed


@pytest.mark.slow
def test_trl_computes_the_same_loss(model, tokenizer):
    pytest.importorskip("trl", exc_type=ImportError)
    names = ("treg shared", *steps.TRL)
    said: list[str] = []
    found = bench.measure_steps(CELL, model, tokenizer, names, rounds=1, say=said.append)
    padded = found["methods"]["TRL padded"]
    assert padded["loss"] == pytest.approx(found["methods"]["treg shared"]["loss"], abs=1e-5)
    assert padded["tokens"] == CELL.padded
    free = found["methods"]["TRL padding-free"]
    assert "seconds" in free or "pads all the same" in free["missing"]


def test_losses_that_are_apart_are_refused():
    first = steps.First(0.7, 1.0, 5)
    floor = steps.First(None, 9.0, 5)
    steps.check_same({"a": first, "b": replace(first, loss=0.7001), steps.FLOOR: floor})
    with pytest.raises(AssertionError, match=r"b and a: losses 0\.8 and 0\.7"):
        steps.check_same({"a": first, "b": replace(first, loss=0.8)})
    with pytest.raises(AssertionError, match="b and a: norms of the gradients"):
        steps.check_same({"a": first, "b": replace(first, gradient_norm=1.1)})


def test_floor_gives_every_parameter_a_gradient(model):
    steps.bare(model, steps.batches_of(CELL, make_examples(CELL, 97)))
    assert all(x.grad is not None and x.grad.any() for x in model.parameters())
    model.zero_grad(set_to_none=True)


# -- annotation


def test_annotation_is_counted_and_its_floor_runs_as_many_tokens(model, tokenizer):
    annotation = annotating.Annotation(CELL, model, tokenizer, 3, real=False)
    assert len(annotation.rows) == 3
    for wanted, came in zip((*CELL.pairs, CELL.pairs[0]), annotation.lengths, strict=True):
        assert all(abs(a - b) <= 2 for a, b in zip(wanted, came, strict=True))
    said: list[str] = []
    found = bench.measure_annotation(annotation, rounds=1, say=said.append)["methods"]
    assert [*found] == [*annotating.NAMES]
    assert found[annotating.FORWARDS]["tokens"] == found[annotating.SHARED]["tokens"]
    counter = annotation.counters[annotating.APART]
    answers = sum(w + l for _, w, l in annotation.lengths)
    assert counter.rows >= 3 * answers  # after the prompt, and after either request
    with Counter(model) as bare:
        annotation.forwards()
    assert bare.tokens == annotation.counters[annotating.SHARED].tokens


def test_rows_are_cut_from_real_text_where_there_is_some(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "prefs").mkdir()
    row = {"prompt": "w6", "chosen": " ".join(f"w{i}" for i in range(20, 60)), "rejected": "w7"}
    (tmp_path / annotating.TEXTS).write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("TREG_TEST_DATA", str(tmp_path))
    [made] = annotating.make_rows(CELL, tokenizer, 1, real=True)
    assert len(made["chosen"].split()) == 5 and made["chosen"] in row["chosen"]
    monkeypatch.setenv("TREG_TEST_DATA", str(tmp_path / "none"))
    assert 6 in annotating.corpus(tokenizer, real=True)


# -- what is said


def test_every_method_is_said_as_soon_as_it_was_measured(measured):
    found, said = measured
    lines = [line.split("  ")[2].strip() for line in said if line.startswith("    ")]
    ran = [name for name in (*steps.OURS, steps.FLOOR)]
    assert lines[:6] == [*steps.OURS, steps.FLASH, steps.FLOOR]
    assert lines[6:] == [*ran, *reversed(ran)]  # every other round in reverse
    assert found["rounds"] == 2


def test_record_and_table(measured, tmp_path):
    found, _ = measured
    cell = {"lengths": CELL.pairs, "tokens": {}, "step": found}
    kept = json.loads(json.dumps({"cells": {BAR: cell}}))["cells"][BAR]
    shared = kept["step"]["methods"]["treg shared"]
    assert shared["counted_per_second"] == pytest.approx(CELL.counted / shared["seconds"])
    assert shared["run_per_second"] == pytest.approx(44 / shared["seconds"])
    assert shared["over"].keys() == {"treg unshared", steps.FLOOR}
    kept["step"]["methods"]["treg shared"]["peak_extra_bytes"] = 5 << 20
    lines = table.of_cell(BAR, kept)
    assert lines[1] == f"{BAR}: training step, 2 rounds"
    [row] = [line for line in lines if line.startswith("treg shared")]
    assert row.split()[5] == "44" and row.split()[7] == "5"
    [missing] = [line for line in lines if line.startswith(steps.FLASH)]
    assert "not measured: it is not installed" in missing or "needs a GPU" in missing
    text = table.markdown(kept, 2)
    assert f"| {steps.FLASH} | not measured" in text and "| treg shared |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    plots = pytest.importorskip("plots")
    tiny = {"environment": {"threads": 2}, "cells": {BAR: kept}}
    plots.end_to_end({"models": {"tiny": tiny}}, tmp_path / "e.svg")
    assert "tokens a second" in (tmp_path / "e.svg").read_text()


def method(seconds, tokens=10):
    return {"seconds": seconds, "cpu_seconds": seconds / 2, "tokens": tokens}


def test_of_one_thread_the_own_time_of_the_cpu_counts():
    ours = method(3.0) | {"counted_per_second": 10.0, "run_per_second": 20.0}
    ours |= {"over": {"x": {"ratio": 0.9}}, "cpu_over": {"x": {"ratio": 0.5}}}
    found = table.by_cpu({"rounds": 3, "methods": {"a": ours, "b": {"missing": "why"}}})
    assert found["rounds"] == 3 and found["methods"]["b"] == {"missing": "why"}
    a = found["methods"]["a"]
    assert (a["seconds"], a["counted_per_second"], a["run_per_second"]) == (1.5, 20.0, 40.0)
    assert a["over"] == {"x": {"ratio": 0.5}} and ours["seconds"] == 3.0


def test_bars():
    """0.65 of the time at 0.6 of the tokens: at most 0.66. TRL pads pairs of one length nothing."""
    of_step = {
        "treg shared": method(6.5, 6),
        "treg unshared": method(10.0, 10),
        "TRL padded": method(10.0),
        "TRL padding-free": {"missing": "it pads"},
    }
    of_annotation = {annotating.SHARED: method(1.2), annotating.FORWARDS: method(1.0)}
    cell = {"step": {"methods": of_step}, "annotate": {"methods": of_annotation}}
    first, second, third = table.bars({"cells": {BAR: cell}})
    assert "with 0.600 of its tokens" in first
    assert first.endswith("0.650 of the CPU's time (0.650 of the clock's), at most 0.660: met")
    assert "TRL padded, which pads nothing here" in second
    assert second.endswith("at most 0.600: missed by 8.3 %")
    assert third.endswith("at most 1.150: missed by 4.3 %")
    of_step["TRL padding-free"] = method(8.0)
    del of_step["treg unshared"]
    [only, _] = table.bars({"cells": {BAR: cell}})
    assert only.startswith("step shared / TRL padding-free ")
    assert table.bars({"cells": {}}) == []


def test_rounds_end_in_time():
    said: list[str] = []
    run = bench.in_turns({"a": lambda: None}, 3, 0.0, said.append)
    assert len(run.seconds["a"]) == len(run.cpu_seconds["a"]) == 1
    assert len(bench.in_turns({"a": lambda: None}, 3, 60.0, said.append).seconds["a"]) == 3


def test_ratio_is_of_medians():
    assert ratio_of([1.0, 2.0, 9.0], [2.0, 4.0, 3.0]) == {
        "ratio": 2 / 3,
        "least": 0.5,
        "greatest": 3.0,
    }


def test_page_without_a_record_says_how_to_measure(tmp_path):
    assert "not measured yet" in report.end_to_end_part(tmp_path)


def test_options_are_those_of_the_process_that_measures_memory():
    args = bench.parsed(["--cells", "bar", "--pairs", "2", "--peak", "treg shared"])
    assert bench.cells_of(args) == [cell_of(BAR, 2, 4)] and args.peak == "treg shared"
    assert bench.name_of(bench.source_of(args)).startswith("Llama, 6 layers, D 384")
