"""How far marked tokens move, as it is logged: against dense logits in float64, and that marks
change nothing else.
"""

import copy
import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_llama, tiny_tokenizer
from trainer_worker import (
    SIDES,
    Gradients,
    dense_logps,
    first_step,
    make_config,
    make_model,
    make_pairs,
    make_trainer,
    perturb,
    with_lora,
    with_marks,
    with_reference,
)

from treg.data import PairCollator, first_pairs
from treg.data.annotated import read_annotated
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.trainer import TRegTrainer
from treg.trainer.metrics import PairMetrics

# the first word is good and the last one bad; of the rejected answer the last one is
ROWS = [
    {
        "prompt": f"{n}?",
        "chosen": f"the owl {n} fox",
        "rejected": f"an old {n} moon",
        "chosen_marks": [[0, 3, 1.0], [10, 13, -1.0]],
        "rejected_marks": [[9, 13, -1.0]],
    }
    for n in range(1, 5)
]
SOURCES_OF_A_FILE = {
    "sources": [
        {"stream": "contrastive", "name": "contrastive"},
        {"stream": "marks", "name": "spans", "column": "{side}_marks"},
    ],
    "mix": {"contrastive": 1.0},
}
KINDS = {"good": np.greater, "bad": np.less, "unmarked": np.equal}


def marked_pairs(n=6, seed=0):
    """Of two answers some tokens are not scored; those have marks all the same."""
    pairs = with_marks(make_pairs(n, seed), seed)
    for pair in pairs:
        for side in SIDES:
            pair[f"{side}_scored"] = np.ones(len(pair[f"{side}_ids"]), dtype=bool)
    for side in SIDES:
        longest = max(pairs, key=lambda x: len(x[f"{side}_ids"]))
        longest[f"{side}_scored"][1::3] = False
    return pairs


@torch.no_grad()
def moved(model, ref_model, pairs, prefix=""):
    """The means by hand, in float64; ref_model: "adapters" for the model without them."""
    model, found = copy.deepcopy(model).double(), {}
    for pair in pairs:
        for side in SIDES:
            lp = dense_logps(model, pair, side)
            if ref_model == "adapters":
                with model.disable_adapter():
                    ref = dense_logps(model, pair, side)
            else:
                ref = dense_logps(copy.deepcopy(ref_model).double(), pair, side)
            scored = pair.get(f"{side}_scored", np.ones(len(lp), dtype=bool))
            for kind, compare in KINDS.items():
                kept = compare(pair[f"{side}_marks"], 0) & scored
                values = (lp - ref).numpy()[kept].tolist()
                for name in (kind, f"{kind}_{side}"):
                    found.setdefault(f"{prefix}shift/{name}", []).extend(values)
    found = {k: np.mean(x) for k, x in found.items() if len(x)}
    return {k: x for k, x in found.items() if "unmarked_" not in k}


def shifts(line):
    return {k: x for k, x in line.items() if "shift/" in k}


LAYOUTS = {
    "padded": {},
    "padded, prompts apart": {"share_prompt": False},
    "packed": {"packing": True},
    "packed, prompts apart": {"packing": True, "share_prompt": False},
    "packs": {"packing": True, "token_budget": 48, "per_device_train_batch_size": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shifts_are_those_by_hand(tmp_path, layout):
    """A step of several batches, and an evaluation whose last batch is smaller."""
    base, model = make_model(), perturb(make_model(), 0.1)
    train, held_out = (
        with_reference(x, base, per_token=True) for x in (marked_pairs(), marked_pairs(5, 1))
    )
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = make_trainer(
        *(tmp_path, model, train, None, held_out),
        learning_rate=0.0,
        per_device_eval_batch_size=2,
        **options | LAYOUTS[layout],
    )
    trainer.train()
    lines = [x for x in trainer.state.log_history if "loss" in x]
    assert len(lines) == 1 and trainer.shares_prompts == ("apart" not in layout)
    expected = moved(model, base, train)
    assert len(expected) == 7
    assert shifts(lines[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    found = shifts(trainer.evaluate())
    assert found == pytest.approx(moved(model, base, held_out, "eval_"), rel=1e-4, abs=1e-6)


SOURCES = {
    "a model": ({}, False, True),
    "adapters": ({}, True, False),
    "the data of a loss without a reference": ({"loss_type": "simpo"}, False, False),
    "the data of a loss that runs it": ({"loss_type": "tdpo2", "alpha": 0.0}, False, True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_where_the_reference_comes_from(tmp_path, name):
    options, lora, runs = SOURCES[name]
    base, pairs = make_model(), marked_pairs()
    model = with_lora(make_model()) if lora else perturb(make_model(), 0.1)
    expected = moved(model, "adapters" if lora else base, pairs)
    if options:
        pairs = with_reference(pairs, base, per_token=True)
    _, line = first_step(tmp_path, model, pairs, base if runs else None, **options)
    assert shifts(line) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", [{}, {"alpha": 0.0}, {"loss_type": "tgdpo"}])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_marks_change_no_loss_and_no_gradient(tmp_path, loss, packing):
    """Bit for bit, over three steps and an evaluation."""
    pairs, found = with_reference(marked_pairs(), make_model(), per_token=True), []
    for given in (pairs, [{k: x for k, x in p.items() if "marks" not in k} for p in pairs]):
        gradients, model = Gradients(), perturb(make_model())
        trainer = make_trainer(
            *(tmp_path, model, given, None, given),
            callbacks=[gradients],
            per_device_train_batch_size=2,
            packing=packing,
            **loss,
        )
        trainer.train()
        lines = [x for x in trainer.state.log_history if "loss" in x]
        lines.append(trainer.evaluate())
        assert len(lines) == 4 and len(gradients.steps) == 3
        assert [bool(shifts(x)) for x in lines] == [given is pairs] * 4
        own = [{k: x for k, x in line.items() if "runtime" not in k} for line in lines]
        own = [{k: x for k, x in line.items() if "per_second" not in k} for line in own]
        own = [{k: x for k, x in line.items() if "shift/" not in k} for line in own]
        found.append((own, gradients.steps))
    (lines, steps), (plain_lines, plain_steps) = found
    assert lines == plain_lines
    for a, b in zip(steps, plain_steps, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_from_rows_to_the_log(tmp_path):
    """Two files, whose marks no step of shaping changes, and which are trained on together."""
    tokenizer = tiny_tokenizer()
    model, examples = tiny_llama(len(tokenizer)), []
    files = [tmp_path / name for name in ("a.parquet", "b.parquet")]
    options = AnnotateOptions(
        rewards="several",
        rewards_options=SOURCES_OF_A_FILE,
        per_token=True,
        shaping=("centre",),
    )
    for file, rows in zip(files, (ROWS[:2], ROWS[2:]), strict=True):
        annotate(model, tokenizer, rows, file, options, progress=False)
        found, meta = read_annotated(file)
        assert meta["streams"]["marks"]["shaping"] == []
        examples += found
    for example, row in zip(examples, ROWS, strict=True):
        for side in SIDES:
            ids, marks = example[f"{side}_ids"], example[f"{side}_marks"]
            for sign in (1, -1):
                said = tokenizer.decode(ids[np.sign(marks) == sign])
                spans = [(a, b) for a, b, value in row[f"{side}_marks"] if value == sign]
                assert said.strip() == "".join(row[side][a:b] for a, b in spans)
    config = make_config(tmp_path, per_device_train_batch_size=2, alpha=0.25)
    trainer = TRegTrainer(model, None, config, files, processing_class=tokenizer)
    trainer.train()
    first, second = (shifts(x) for x in trainer.state.log_history if "loss" in x)
    # the model begins as the reference; none of the rejected tokens is good
    assert first == pytest.approx(dict.fromkeys(first, 0.0), abs=1e-5) and len(first) == 6
    assert all(abs(x) > 1e-4 for x in second.values())


def test_what_is_missing_is_said_once(tmp_path, caplog):
    base, pairs = make_model(), marked_pairs(3)
    sums, tokens = with_reference(pairs, base), with_reference(pairs, base, per_token=True)
    said = "train_dataset, eval_dataset: there are marks, but no ref_chosen_token_logps, "
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, perturb(make_model()), sums, eval_dataset=sums)
    assert [x.getMessage().startswith(said) for x in caplog.records].count(True) == 1
    assert "shift/*" in caplog.text and "--per_token" in caplog.text
    trainer.train()
    assert not any(map(shifts, trainer.state.log_history))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, make_model(), tokens)
        make_trainer(tmp_path, make_model(), pairs, make_model())
    assert "marks" not in caplog.text


def test_marks_in_some_pairs_only(tmp_path):
    pairs = with_reference(marked_pairs(2), make_model(), per_token=True)
    del pairs[1]["chosen_marks"]
    with pytest.raises(ValueError, match=r"expected chosen_marks, rejected_marks in every pair"):
        make_trainer(tmp_path, make_model(), pairs)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_batch_has_the_marks_of_its_scored_tokens(packing):
    pairs = marked_pairs(4)
    batch = PairCollator(packing=packing)(pairs)
    expected = [p[f"{side}_marks"][p[f"{side}_scored"]] for side in SIDES for p in pairs]
    assert np.array_equal(batch["marks"], np.concatenate(expected))
    assert batch["marks"].dtype == np.float32 and len(batch["marks"]) == len(batch["target"])
    few = PairCollator(packing=packing)(pairs[:2])
    assert np.array_equal(first_pairs(batch, 2)["marks"], few["marks"])


def test_processes_have_the_same_names_whatever_their_batches_hold():
    """Sums of answers of one token each look like log-probs of tokens; a log-prob of minus infinity
    counts at its own token alone.
    """
    logps = torch.tensor([-1.0, -2.0, -torch.inf, -4.0])
    marks, metrics = torch.tensor([1.0, -1.0, -1.0, 0.0]), []
    for lengths, ref_logps in (([1] * 4, -3.0), ([2, 2], -3.0), ([1] * 4, None)):
        metrics.append(PairMetrics())
        ref = None if ref_logps is None else torch.full((len(lengths),), ref_logps)
        metrics[-1].record_shift(logps, ref, marks, np.array(lengths))
    names = [list(x.sums) for x in metrics]
    assert names[0] == names[1] == names[2] and len(names[0]) == 7
    found, *others = (x.means(Accelerator(cpu=True)) for x in metrics)
    assert others == [{}, {}]
    # of a mean over no token there is no number
    assert found == {
        "shift/good": 2.0,
        "shift/good_chosen": 2.0,
        "shift/bad": -torch.inf,
        "shift/bad_chosen": 1.0,
        "shift/bad_rejected": -torch.inf,
        "shift/unmarked": -1.0,
    }
