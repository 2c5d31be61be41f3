"""The benchmarks themselves, on a CPU and tiny cells: gates, cells, the runner's slices, bars,
report, prediction.
"""

import json
import os
import sys
import time
from dataclasses import replace

import bars_kl
import bench_loss_head
import gpu_bars
import gpu_plan
import gpu_process
import gpu_run
import gpu_runner
import gpu_steps
import loss_head_cell
import loss_head_measure
import pytest
import report
import roofline
import torch
from loss_head_cases import (
    HEADS,
    IGNORE,
    MODES,
    Case,
    batch_of,
    gpu_case,
    gpu_cases,
    real_pairs,
    scored_mask,
    tiny,
)
from loss_head_methods import Method, loss_of
from loss_head_peers import FOUR_PRODUCTS, METHODS

from treg.ops import reference

CASE = Case("tiny", 3, 8, 32, 97, torch.float32)
REAL = replace(CASE, mask="realistic", pairs=2, length=480)


# -- cells


def test_matrix_holds_every_cell_once_and_the_bars_first():
    cases = gpu_cases()
    cells = {(c.head, c.nominal_rows, c.mask, c.mode) for c in cases}
    sizes = (128, 512, 2048, 4096, 16384, 65536)
    wanted = {(h, N, "all", m) for h in HEADS for N in sizes for m in MODES}
    wanted |= {(h, N, "realistic", m) for h in HEADS for N in sizes if N >= 2048 for m in MODES}
    assert cells == wanted and len(cases) == len(cells)
    assert all(c.rows == c.nominal_rows for c in cases if c.mask == "all")
    assert all(abs(c.rows / c.nominal_rows - 1) < 0.15 for c in cases if c.mask == "realistic")
    barred = {bar.cell for bar in gpu_bars.BARS}
    assert {c.name for c in cases[: len(barred)]} == barred


def test_real_masks_score_the_responses_and_pad_to_the_longest():
    case = gpu_case("qwen3", 4096, "realistic", "frozen")
    mask, pairs = scored_mask(case), real_pairs()[: case.pairs]
    assert mask.sum(1).tolist() == [c for _, c, _ in pairs] + [r for _, _, r in pairs]
    assert (
        mask.int().argmax(1).tolist() == [p - 1 for p, _, _ in pairs] * 2
    )  # the row before a token predicts it
    assert case.length == max(p + max(c, r) for p, c, r in pairs)
    b = batch_of(tiny(case))
    lengths = (b.target != IGNORE).sum(1)
    assert b.cu_seqlens.diff().tolist() == lengths.tolist()
    assert torch.equal(b.target.flatten()[b.scored], b.target[b.target != IGNORE])


NO_SOFTCAP = {"liger_dpo", "liger_scaled_ce", "quack_mean_ce", "torch_linear_cross_entropy", "verl"}
GRADIENTS_ONLY = {"treg_fused", "treg_packed", "liger_dpo", "liger_mean_ce", "quack_mean_ce"}
TRAINABLE_ONLY = {"treg_smallest", "gemm_4"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["all", "realistic"])
@pytest.mark.parametrize("head", ["llama-3-8b", "gemma-2-9b"])
def test_methods_apply_to_the_cells_they_should(head, mask, mode):
    case = gpu_case(head, 16384, mask, mode)
    wanted = METHODS.keys() - {"treg_fused_exact_logits", "gemm_1", "gemm_2", "gemm_3"}
    wanted |= {"trainable": {"gemm_3"}, "frozen": {"gemm_2", "gemm_3"}, "forward": {"gemm_1"}}[mode]
    wanted -= set() if mode == "trainable" else TRAINABLE_ONLY
    wanted -= GRADIENTS_ONLY if mode == "forward" else set()
    wanted -= NO_SOFTCAP if head == "gemma-2-9b" else set()
    wanted -= set() if mask == "realistic" else {"treg_packed"}
    assert {name for name, method in METHODS.items() if method.applies_to(case, "cuda")} == wanted


def test_methods_that_the_bars_name_run_in_their_cells():
    cases = {case.name: case for case in gpu_cases()}
    for bar in gpu_bars.BARS:
        for name in (bar.ours, *(bar.against if bar.against != FOUR_PRODUCTS else ())):
            assert METHODS[name].applies_to(cases[bar.cell], "cuda"), (bar.what, name)


def test_missing_package_is_named():
    reason = Method(lambda b: None, "products", "no_such_package").missing()
    assert "no_such_package does not import: ModuleNotFoundError" in reason


# -- gates


def exact(case: Case, loss: str) -> dict[str, torch.Tensor]:
    """Autograd through the dense specification in float64, all rows at once."""
    b = batch_of(case)
    hidden, weight = (x.detach().double().requires_grad_() for x in (b.hidden, b.weight))
    logps = reference.linear_logprobs(
        hidden, weight, b.target, softcap=case.softcap, ignore_index=IGNORE
    ).logprobs
    dhidden, dweight = torch.autograd.grad(loss_of(loss, b, logps), (hidden, weight))
    return {
        "logprobs": logps.detach().flatten(),
        "dhidden": dhidden.flatten(0, 1),
        "dweight": dweight,
    }


@pytest.mark.parametrize("loss", ["treg", "dpo", "ce"])
@pytest.mark.parametrize(
    "case", [CASE, replace(CASE, softcap=5.0, ignored=0.5), REAL], ids=["all", "softcap", "real"]
)
@pytest.mark.parametrize("gated", [10**6, 10], ids=["all rows", "a sample"])
def test_oracle_is_the_dense_gradient(monkeypatch, case, loss, gated):
    monkeypatch.setattr(loss_head_measure, "GATED_ROWS", gated)
    monkeypatch.setattr(loss_head_measure, "SAMPLED_ROWS", 20)
    monkeypatch.setattr(loss_head_measure, "SAMPLED_TOKENS", 30)
    case = replace(case, vocab=101 if gated == 10 else 97)  # the oracle is cached by case
    found, wanted = loss_head_measure.oracle(case, loss), exact(case, loss)
    rows, tokens = loss_head_measure.sample(case)
    assert len(rows) == (20 if gated == 10 else case.rows)
    for name, where in (("logprobs", rows), ("dhidden", rows), ("dweight", tokens)):
        torch.testing.assert_close(
            found[name], wanted[name][where], rtol=1e-4, atol=1e-7
        )  # float32 in other rows' sums


def test_losses_of_the_peers_are_what_they_say():
    b = batch_of(replace(CASE, ignored=0.5))
    scored, logps = b.target != IGNORE, b.logprobs
    chosen, rejected = (0.1 * logps.sum(1)).chunk(2)
    torch.testing.assert_close(
        loss_of("dpo", b, logps), -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    )
    torch.testing.assert_close(loss_of("ce", b, logps), -logps[scored].mean())
    assert not torch.isclose(loss_of("treg", b, logps), loss_of("dpo", b, logps))


PEERS = [
    name
    for name, method in METHODS.items()
    if "cpu" in method.devices and not name.startswith("treg")
]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("mode", MODES)
def test_peers_that_run_on_a_cpu_compute_what_they_are_timed_for(name, mode):
    method, dtype = METHODS[name], METHODS[name].dtypes[0]
    case = replace(
        CASE, mode=mode, dtype=dtype, ignored=0.5, softcap=5.0 if method.softcap else None
    )
    if method.missing():
        pytest.skip(method.missing())
    if not method.applies_to(case):
        assert mode == "forward"
        return
    found = loss_head_measure.errors(name, case)
    assert (
        found.keys()
        >= {"trainable": {"dhidden", "dweight"}, "frozen": {"dhidden"}, "forward": {"logprobs"}}[
            mode
        ]
    )
    assert max(found.get(x, 0.0) for x in ("logprobs", "dhidden", "dweight")) < (
        1e-5 if dtype == torch.float32 else 2e-2
    )


@pytest.mark.parametrize(
    ("gradient", "shift", "wrong"), [(0, 0, None), (4e-6, 0, "dhidden"), (0, 2e-5, "logprobs")]
)
def test_wrong_result_has_failed_and_keeps_its_figures(monkeypatch, gradient, shift, wrong):
    """A method of this project that is a little off fails; the same one without the fault
    passes. Errors and times are recorded either way.
    """

    def off(b):
        loss, logps = METHODS["treg_fused"].fn(b)
        return loss * (1 + gradient), logps + shift

    name = f"treg_off_{gradient}_{shift}"  # errors are cached by name
    monkeypatch.setitem(METHODS, name, Method(off, "loss"))
    case = replace(CASE, mode="frozen")
    found = loss_head_cell.measure_cell(case, {n: "left out" for n in METHODS if n != name})[
        "methods"
    ]
    assert found["treg_fused"] == {"reason": "left out"}
    if wrong:
        assert f"{wrong} has a relative error" in found[name]["failed"]
    else:
        assert "failed" not in found[name]
    assert len(found[name]["hot"]) == loss_head_cell.HOT_ROUNDS
    assert found[name]["errors"]["rows"] == case.rows


def test_peer_that_raises_is_named_and_the_others_are_timed(monkeypatch):
    def raises(b):
        raise RuntimeError("no such  kernel")

    monkeypatch.setitem(METHODS, "peer", Method(raises, "logprobs"))
    keep = ("peer", "dense_log_softmax")
    found = loss_head_cell.measure_cell(CASE, {n: "left out" for n in METHODS if n not in keep})[
        "methods"
    ]
    assert found["peer"] == {"reason": "RuntimeError: no such kernel"}
    assert found["dense_log_softmax"]["hot"]


def test_playback_shows_what_was_measured():
    clock = bench_loss_head.Playback()
    clock.load([0.25, 0.5])
    assert [-clock() + clock() for _ in range(2)] == [0.25, 0.5]


# -- the runner


class Scripted:
    """A worker whose answers are given: a cell's result, or what it was at and why it died."""

    def __init__(self, *answers):
        self.answers, self.jobs = list(answers), []

    def ask(self, job, deadline, keep):
        self.jobs.append(json.loads(json.dumps(job)))
        answer = self.answers.pop(0)
        return (answer, "hot", "") if isinstance(answer, dict) else (None, *answer)


@pytest.fixture
def three():
    return [case.name for case in gpu_cases()[:3]]


READY = "print('{\"ready\": true}', flush=True); "


def run(record, worker, seconds=100.0):
    jobs = tuple(
        gpu_plan.Job(case.name, 90, 1, "cells", {"name": case.name}) for case in gpu_cases()[:3]
    )
    do = gpu_runner.Runner(record, worker, METHODS.keys() - {"treg_fused"}).do
    step = gpu_plan.Step("cells", 0, 90, jobs)
    list(gpu_plan.follow([step], record, do, time.monotonic, seconds))


def test_runner_goes_on_where_it_was_stopped(tmp_path, three):
    """A cell that was late is done again, by the next call; the others are not."""
    path = tmp_path / "gpu" / "loss_head.json"
    done = {"methods": {}}
    run(gpu_run.Record(path, "a"), first := Scripted(done, ("treg_fused", "late"), done))
    found = json.loads(path.read_text())["cells"]
    assert [name for name in three if "unfinished" in found[name]] == three[1:2]
    run(gpu_run.Record(path, "a"), second := Scripted(done))
    assert [job["name"] for job in first.jobs] == three
    assert [job["name"] for job in second.jobs] == three[1:2]
    run(gpu_run.Record(path, "b"), nothing := Scripted())
    assert not nothing.jobs
    assert gpu_run.Record(path, "b").has("cells", three[0], renew=False)
    assert not gpu_run.Record(path, "b").has("cells", three[0], renew=True)


def test_runner_begins_nothing_without_time(tmp_path, three):
    run(gpu_run.Record(tmp_path / "r.json", None), worker := Scripted(), seconds=0.0)
    assert not worker.jobs


def test_peer_that_kills_its_process_is_left_out_and_the_cell_done_again(tmp_path, three):
    record = gpu_run.Record(tmp_path / "r.json", None)
    run(record, worker := Scripted(("cce", "hangs"), *[{"methods": {}}] * 3))
    assert [job["excluded"] for job in worker.jobs[:2]] == [{}, {"cce": f"hangs in {three[0]}"}]
    assert list(gpu_run.Record(record.path, None).data["cells"]) == three


@pytest.mark.parametrize("at", ["treg_fused", "hot"])
def test_own_crash_is_recorded_and_the_next_cell_begun(tmp_path, three, at):
    record = gpu_run.Record(tmp_path / "r.json", None)
    run(record, Scripted((at, "died"), *[{"methods": {}}] * 2))
    assert record.data["cells"][three[0]]["failed"] == f"{at}: died" and not record.data["excluded"]
    assert "methods" in record.data["cells"][three[1]]


def test_record_is_whole_whatever_interrupts_it(tmp_path, monkeypatch):
    record = gpu_run.Record(tmp_path / "r.json", None)
    record.put("cells", "first", {"methods": {}})
    with record.path.open("rb") as old:
        before = record.path.read_bytes()
        record.put("cells", "first", {"methods": {"x": {}}})
        assert old.read() == before != record.path.read_bytes()  # replaced, not written over
    before = record.path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)  # after the new text was written
    with pytest.raises(ZeroDivisionError):
        record.put("cells", "second", {"methods": {}})
    assert record.path.read_bytes() == before


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            READY + 'import time; print(\'{"at": "cce"}\', flush=True); time.sleep(60)',
            "no sign of life for 1 s",
        ),
        (
            READY + 'print(\'{"at": "cce"}\', flush=True); raise SystemExit(9)',
            "brought its process down (exit code 9)",
        ),
    ],
)
def test_worker_that_hangs_or_dies(monkeypatch, script, why):
    monkeypatch.setattr(gpu_process, "SILENCE", 1.0)
    worker = gpu_run.Worker(dict(os.environ))
    worker.command = [sys.executable, "-c", script]
    assert worker.ask({"do": "cell"}, time.monotonic() + 30) == (None, "cce", why)
    assert worker.process is None


def test_slices_of_the_whole_script(tmp_path, monkeypatch, three, capsys):
    work = {"do": "cell", "name": three[2], "methods": ["treg_logprobs"]}
    job = gpu_plan.Job(three[2], 90.0, kind="cells", work=work)
    wrong = gpu_plan.Job("wrong", 90.0, work={"do": "rates", "name": "no such head"})
    step = gpu_plan.Step("cells", 0, 90.0, (wrong, job))  # one worker does both
    monkeypatch.setattr(gpu_steps, "steps", lambda setting: [step])
    arguments = ["--tiny", "--only", "cells", "--out", str(tmp_path), "--commit", "here"]
    assert gpu_run.main([*arguments, "--minutes", "0"]) == 3
    assert "left: cells: 2 of 2" in capsys.readouterr().out
    assert gpu_run.main([*arguments, "--minutes", "2"]) == 0
    record = json.loads((tmp_path / "loss_head.json").read_text())
    assert record["stages"]["wrong"]["failed"] == "KeyError: 'no such head'"
    [cell] = record["cells"].values()
    assert cell["commit"] == "here" and cell["methods"]["treg_logprobs"]["hot"]["median"] > 0
    assert "nothing is left" in capsys.readouterr().out


# -- bars, report, prediction

BAR = gpu_bars.Bar("x", "cell", "treg_fused", ("a", "b"), 0.8)


def cell(ours, **peers):
    """Cells in which methods have these (cool, hot) milliseconds."""
    both = {name: {"cool": {"median": c}, "hot": {"median": h}} for name, (c, h) in peers.items()}
    return {
        "cell": {
            "methods": {
                "treg_fused": {"cool": {"median": ours[0]}, "hot": {"median": ours[1]}},
                **both,
            }
        }
    }


def test_bar_without_data_is_not_measured():
    assert "| not measured |" in gpu_bars.table({})
    assert all(line.endswith("| not measured |") for line in gpu_bars.table({}).splitlines()[2:])
    missing = {
        "cell": {"methods": {"treg_fused": {"hot": {"median": 1.0}}, "a": {"reason": "no wheel"}}}
    }
    assert gpu_bars.judge(BAR, missing).text == "not measured: a (no wheel), b did not run"
    assert (
        gpu_bars.judge(BAR, {"cell": {"methods": {"treg_fused": {"failed": "off"}}}}).text
        == "failed: off"
    )


def test_bar_is_judged_by_the_worse_ratio_to_the_fastest_peer():
    assert gpu_bars.judge(BAR, cell((7.9, 8.0), a=(10, 10), b=(20, 20))).text == "met"
    assert gpu_bars.judge(BAR, cell((7.0, 8.8), a=(10, 10), b=(20, 20))).text == "missed by 10.0 %"
    assert gpu_bars.judge(BAR, cell((8.8, 7.0), a=(10, 10), b=(20, 20))).text == "missed by 10.0 %"
    assert gpu_bars.judge(BAR, cell((7.0, 7.0), a=(10, 10), b=(20, 8))).text.startswith(
        "missed by 9.4"
    )


def test_bars_of_memory_and_errors():
    method = {"extra_bytes": 3 * 2**29, "errors": {"dhidden": 2e-3}}
    cells = {"cell": {"methods": {"treg_fused": method, "a": {"extra_bytes": 2**31}}}}
    memory = replace(BAR, against=(), quantity="extra_bytes", limit=1.0)
    assert gpu_bars.judge(memory, cells).text == "missed by 50.0 %"
    assert gpu_bars.judge(replace(memory, limit=1.5), cells).text == "met"
    assert gpu_bars.judge(replace(memory, against=("a",), limit=0.75), cells).text == "met"
    assert (
        gpu_bars.judge(replace(memory, quantity="dhidden", limit=1e-3), cells).text
        == "missed by 100.0 %"
    )


def test_the_page_is_what_the_records_give():
    text = report.PAGE.read_text()
    assert report.with_region(text, report.region()) == text, "run python benchmarks/report.py"


def test_region_follows_its_record():
    found = json.loads((report.RESULTS / "cpu" / "bars.json").read_text())
    found["time"]["bf16"]["median_seconds"]["liger_dpo"] = 7.0
    assert "| Liger DPO |" in report.cpu_part(found) and "| 7.00 |" in report.cpu_part(found)
    with pytest.raises(ValueError, match="expected the lines"):
        report.with_region("no markers", "new")


def test_ratios_of_linear_kl():
    """All methods run and agree with float64; every ratio is that of its two times."""
    run = bars_kl.alternation(bars_kl.Sizes(16, 8, 97))
    run.round()
    found = bars_kl.times(run)
    assert found["ratios"].keys() == {f"{a} / {b}" for a, b in bars_kl.RATIOS}
    seconds = found["median_seconds"]
    for a, b in bars_kl.RATIOS:
        assert found["ratios"][f"{a} / {b}"]["ratio"] == seconds[a] / seconds[b]


def test_the_divergence_that_liger_gives_is_the_same():
    pytest.importorskip("liger_kernel")
    x = bars_kl.Operands.of(bars_kl.Sizes(16, 8, 97))
    steps = (bars_kl.step(bars_kl.liger, x), bars_kl.step(bars_kl.ours, x, False))
    for a, b in zip(*steps, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_report_of_a_gpu(tmp_path):
    case = gpu_case("llama-3-8b", 16384, "all", "trainable")
    record = {
        "stages": {},
        "excluded": {},
        "cells": {case.name: cell((8.0, 9.0), gemm_3=(8.0, 10.0))["cell"]},
    }
    record["cells"][case.name]["methods"]["cce"] = {"reason": "no wheel"}
    text = report.full_report(record, {case.name: {"treg_fused": {"hot": 7.5, "cool": 7.0}}})
    [row] = [line for line in text.splitlines() if line.startswith("| treg_fused | 8")]
    teraflops = 3 * case.flops_per_product / 9e-3 / 1e12
    assert row.startswith(
        f"| treg_fused | 8 | 7 | 1 | 9 | 7.5 | 0.9 | {teraflops:.0f} | {teraflops:.0f} |"
    )
    assert "| cce | no wheel |" in text
    assert "missed" not in report.gpu_part({"gpu": record}) and "| met |" in report.gpu_part(
        {"gpu": record}
    )
    plots = pytest.importorskip("plots")
    plots.gpu(
        {(case.head, 16384, "all", "trainable"): record["cells"][case.name]["methods"]}, tmp_path
    )
    assert {path.name for path in tmp_path.iterdir()} == {"time.svg", "memory.svg", "errors.svg"}


def test_predictions_are_those_of_the_model():
    kept = json.loads((report.RESULTS / "predicted-h200.json").read_text())
    assert kept == {case.name: roofline.predict(case) for case in gpu_cases()}
