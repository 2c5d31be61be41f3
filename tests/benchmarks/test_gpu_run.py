"""The plan for a GPU: how minutes are shared out, what survives an interruption, how values and
bars are judged, and what eight minutes should hold.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cpu_look
import gpu_bars
import gpu_dry
import gpu_process
import gpu_rates
import gpu_run
import gpu_runner
import gpu_steps
import gpu_summary
import gpu_truth
import gpu_worker
import loss_head_cell
import pytest
import report
import torch
import tune_tiles
from gpu_plan import Job, Step, follow
from gpu_record import Record
from loss_head_cases import IGNORE, Case, batch_of, blank_batch, gpu_case, tiny
from loss_head_methods import OWN, Method
from loss_head_peers import METHODS

CASE = Case("tiny", 2, 8, 32, 97, torch.float32)

# -- shares and deadlines


class Told:
    """A clock, a record and somebody who does jobs, each of which takes the seconds told."""

    def __init__(self, **seconds):
        self.now, self.seconds, self.done, self.deadlines = 0.0, seconds, set(), {}

    def clock(self):
        return self.now

    def has(self, kind, name, renew):
        return name in self.done

    def do(self, job, deadline):
        self.deadlines[job.name] = deadline
        ends = self.now + self.seconds[job.name]
        if ends <= deadline:
            self.done.add(job.name)
        self.now = min(ends, deadline)

    def follow(self, steps, seconds):
        return list(follow(steps, self, self.do, self.clock, seconds))


def step(name, least, most, *jobs):
    return Step(name, least, most, tuple(Job(f"{name}{i}", most=m) for i, m in enumerate(jobs)))


def test_late_step_takes_nothing_of_what_later_ones_need():
    """100 s, of which 30 and 20 are kept: the first step has 50, not the 80 that it may take."""
    steps = [step("a", 10, 80, 80), step("b", 30, 60, 60), step("c", 20, 20, 20)]
    told = Told(a0=1000, b0=1000, c0=19)
    told.follow(steps, 100)
    assert told.deadlines == {"a0": 50, "b0": 80, "c0": 100} and told.done == {"c0"}


def test_what_a_step_leaves_is_free_for_the_next():
    steps = [step("a", 10, 80, 80), step("b", 30, 90, 90), step("c", 20, 20, 20)]
    told = Told(a0=5, b0=70, c0=20)
    told.follow(steps, 100)
    assert told.deadlines == {"a0": 50, "b0": 80, "c0": 95} and told.done == {"a0", "b0", "c0"}


def test_step_that_is_done_keeps_nothing():
    steps = [step("a", 10, 90, 90), step("b", 30, 60, 60)]
    told = Told(a0=5)
    told.done.add("b0")
    told.follow(steps, 100)
    assert told.deadlines == {"a0": 90}


def test_worth_more_comes_first_where_time_is_short():
    """20 s, and 30 wanted by the second step: the first still gets its least."""
    told = Told(a0=10, b0=1000)
    told.follow([step("a", 10, 80, 80), step("b", 30, 60, 60)], 20)
    assert told.done == {"a0"} and told.deadlines == {"a0": 10, "b0": 20}


def test_job_ends_by_itself_and_none_is_begun_without_time():
    jobs = (Job("a0", 4), Job("long", 9, least=8), Job("short", 9, least=2))
    told = Told(a0=1000, long=8, short=2)
    events = told.follow([Step("a", 0, 10, jobs)], 100)
    assert told.deadlines == {"a0": 4, "short": 10}
    assert [(e.job, e.began, e.ended) for e in events] == [("a0", 0, 4), ("short", 4, 6)]


def test_no_job_is_begun_twice_in_a_call():
    told = Told(a0=1000, a1=1)
    assert [e.job for e in told.follow([step("a", 0, 60, 10, 10)], 60)] == ["a0", "a1"]


def test_what_a_job_needs_first_takes_the_time_of_the_step():
    """A process that starts for 6 s leaves the job its own 10; the step's 20 s end both."""
    told = Told(a0=9, a1=9)

    def prepare(job, until):
        assert until == 20
        told.now += 6

    events = list(
        follow([step("a", 0, 20, 10, 10)], told, told.do, told.clock, 60, prepare=prepare)
    )
    assert told.deadlines == {"a0": 16, "a1": 20} and told.done == {"a0"}
    assert [(e.began, e.ended) for e in events] == [(0, 15), (15, 20)]


# -- what the plan holds

SETTING = gpu_steps.Setting(Path("somewhere"))
PLAN = {step.name: step for step in gpu_steps.steps(SETTING)}


def test_steps_come_in_the_order_of_their_worth():
    assert tuple(PLAN) == gpu_steps.NAMES
    cells = [job.name for job in PLAN["bars"].jobs]
    barred = list(dict.fromkeys(bar.cell for bar in gpu_bars.BARS))
    [real] = [cell for cell in barred if "realistic" in cell]
    assert cells == [cell for cell in barred if cell != real] + [real] and len(cells) == 8
    others = [job.name for job in PLAN["cells"].jobs]
    assert not set(cells) & set(others) and len(others) == 142


def test_time_that_is_kept_for_a_step_is_enough_to_begin_one_of_its_jobs():
    for step in PLAN.values():
        assert step.least == 0 or step.least >= min(job.least for job in step.jobs), step.name


def test_tests_of_the_plan_are_there():
    found = [arg for job in PLAN["tests"].jobs for arg in job.command if arg.startswith("tests/")]
    assert len(found) == 11 and all((gpu_process.ROOT / path).is_file() for path in found)


def test_cells_of_bars_run_what_their_bars_name():
    """And cool where a bar on a time names one other method."""
    for job in PLAN["bars"].jobs:
        mine = [bar for bar in gpu_bars.BARS if bar.cell == job.name]
        wanted = {bar.ours for bar in mine} | {b.against[0] for b in mine if len(b.against) == 1}
        assert wanted <= set(job.work["methods"]) <= METHODS.keys()
    cool = {job.name: job.work["cool"] for job in PLAN["bars"].jobs}
    assert cool["llama-3-8b-N16384-all-trainable"] == ["treg_fused", "gemm_3", "trl_chunked"]
    assert cool["llama-3-8b-N16384-realistic-trainable"] == ["treg_packed", "liger_dpo"]


def test_compiles_for_what_is_left(tmp_path):
    """Again in every call, for the machine may be new; not where nothing wants it."""
    steps, record = gpu_steps.steps(SETTING), Record(tmp_path / "r.json", "a")
    record.data["stages"]["compile"] = {"kernels": 5}
    for name in gpu_steps.COMPILED:
        for job in PLAN[name].jobs:
            if job.name != "truth: N = 5":
                record.data[job.kind][job.name] = {}
    [compiling] = [s for s in gpu_steps.ready(steps, record, False) if s.name == "compile"]
    assert compiling.jobs[0].work["works"] == [{"do": "truth", "name": "N = 5"}]
    assert not record.has("stages", "compile", False)
    record.data["stages"]["truth: N = 5"] = {}
    assert "compile" not in [s.name for s in gpu_steps.ready(steps, record, False)]


# -- the dry run


@pytest.mark.parametrize(
    ("kernels", "start"),
    [(125, 10.0), (500, 10.0), (125, 22.0)],
    ids=["as expected", "more kernels", "slow disk"],
)
def test_eight_minutes_hold_truth_rates_and_the_bars(tmp_path, monkeypatch, kernels, start):
    """Also with four times as many kernels, or where a process takes twice as long to start."""
    monkeypatch.setattr(gpu_dry, "START", start)
    memory = gpu_dry.Memory(Record(tmp_path / "r.json", None))
    steps = gpu_steps.ready(gpu_steps.steps(SETTING), memory, False)
    events = gpu_dry.imagine(steps, memory, gpu_dry.Costs(kernels), 480.0)
    left = {step.name: len(step.left(memory, False)) for step in steps}
    assert left["truth"] == left["rates"] == left["bars"] == 0
    assert events[-1].ended <= 480.0 and not list(tmp_path.iterdir())
    table = gpu_dry.by_step(events, steps, memory)
    assert "| 8 of 8 | 0 | 0 |" in table and "| 19 of 19 | 0 | 0 |" in table
    minutes = gpu_dry.by_minute(events).splitlines()[2:]
    assert len(minutes) == 8 and minutes[0].startswith("| 0 - 1 | environment, compile")


def test_imagined_cell_costs_what_its_calls_and_pauses_cost():
    name = "llama-3-8b-N16384-all-forward"
    costs, [job] = gpu_dry.Costs(0), [job for job in PLAN["bars"].jobs if job.name == name]
    job = replace(job, work={**job.work, "methods": ["gemm_1"], "cool": ["gemm_1"]})
    costs.called = {"gemm_1"}
    hot, cool = (costs.predicted[name]["gemm_1"][kind] / 1e3 for kind in ("hot", "cool"))
    rounds = int(gpu_dry.HOT[2] / hot)  # as many as two seconds hold, 50 at the most
    case = gpu_case("llama-3-8b", 16384, "all", "forward")
    wanted = costs._oracle(case) + (3 + 1 + min(50, max(7, rounds))) * hot + 3 * (2.0 + cool)
    assert costs.of(job) == pytest.approx(wanted)


@pytest.mark.slow
def test_launches_of_the_plan_are_listed_without_a_gpu():
    """Every job that is compiled beforehand launches something that a stand-in for a GPU takes."""
    kept = ("N = 5", "several groups", "softcap")
    names = [f"truth: {name}" for name in kept] + ["rates: gemma-2-9b"]
    works = [job.work for step in PLAN.values() for job in step.jobs if job.name in names]
    works += [job.work for job in PLAN["bars"].jobs[:1]] + [PLAN["host"].jobs[0].work]
    done = subprocess.run(
        [sys.executable, gpu_process.HERE / "gpu_worker.py", "--list"],
        input=json.dumps(works),
        env=gpu_process.surroundings(False),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == {} and found["kernels"] == sum(found["new"].values())
    assert found["new"]["truth N = 5"] >= 3 and found["new"]["rates gemma-2-9b"] >= 3


# -- a share of the kernels


def test_kernel_that_does_not_compile_is_tried_once(monkeypatch):
    from triton.runtime.jit import JITFunction

    tried = []

    def fails(kernel, key):
        tried.append(key)
        raise RuntimeError("out of registers")

    def kernel():
        pass

    kernel.__module__, kernel.fn = "treg_kernels.x", kernel
    monkeypatch.setattr(JITFunction, "_do_compile", fails)
    share = gpu_worker.Share(0, 1)
    with share.installed():
        assert [JITFunction._do_compile(kernel, key) for key in "aab"] == [None] * 3
    assert tried == ["a", "b"] and list(share.wrong.values()) == ["RuntimeError: out of registers"]


def test_each_kernel_is_one_process_s():
    shares = [gpu_worker.Share(k, 3) for k in range(3)]
    keys = [f"key{i % 7}" for i in range(20)]
    owners = [[share.ours("treg_kernels.x", "f", key) for share in shares] for key in keys]
    assert all(sum(owner) == 1 for owner in owners)
    assert owners[:7] == owners[7:14]  # met again, the same
    assert [sum(share.met.values()) for share in shares] == [3, 2, 2]
    assert all(share.ours("other.module", "f", "key") for share in shares)
    assert [[share.mine() for share in shares] for _ in range(2)] == [
        [True, False, False],
        [False, True, False],
    ]


COMPILER = """
import json, sys, time
works, k = json.load(sys.stdin), int(sys.argv[2])
print("a library says something", file=sys.stderr)
if k == 1:
    raise SystemExit("no room on the disk")
print(json.dumps({"result": {"kernels": 5, "compiled": 1, "wrong": {}}}), flush=True)
if k == 2:
    time.sleep(60)
print(json.dumps({"result": {"kernels": 9, "compiled": len(works), "wrong": {str(k): "off"}}}))
print("and at its end")
"""


def test_compiling_goes_on_without_a_process_that_dies_or_is_late(tmp_path, monkeypatch):
    (tmp_path / "gpu_worker.py").write_text(COMPILER)
    monkeypatch.setattr(gpu_runner, "HERE", tmp_path)
    record = Record(tmp_path / "r.json", "a")
    work = {"do": "compile", "works": [{"do": "rates"}] * 4, "processes": 4}
    runner = gpu_runner.Runner(record, Scripted(), [])
    runner.do(Job("compile", 60, work=work), time.monotonic() + 5)
    found = record.data["stages"]["compile"]
    assert (found["kernels"], found["compiled"], found["processes"]) == (9, 9, 4)
    assert found["died"] == [1] and found["late"] == [2] and found["unfinished"] == "late"
    assert found["wrong"] == {"0": "off", "3": "off"}
    assert found["end"] == "a library says something\nno room on the disk\n"
    log = (tmp_path / "log.txt").read_text()
    assert log.count("a library says something") == 4 and log.count("no room on the disk") == 1
    page = gpu_summary.page(record.data, [], None)
    assert "died: [1]" in page and "late: [2]" in page and "no room on the disk" in page


# -- interruptions

# A plan whose worker is a few lines of Python: parts, a death, a hang, results. No PyTorch is
# imported, so that a plain process is the quicker one.
SCRIPT = """
import sys, time
sys.path.insert(0, {benchmarks!r})
import gpu_plan, gpu_process, gpu_record, gpu_runner
WORKER = '''
import json, sys, time
print(json.dumps({{"ready": True}}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps({{"at": "peer" if job["name"] == "cell" else "x"}}), flush=True)
    for i in range(2):
        print(json.dumps({{"part": {{"i": i}}}}), flush=True)
        time.sleep(0.08)
    if job["name"] == "cell" and not job["excluded"]:
        raise SystemExit(9)
    print(json.dumps({{"result": {{"name": job["name"], "i": 2}}}}), flush=True)
'''
jobs = [gpu_plan.Job(n, 9.0, 0.0, k, {{"name": n}})
        for n, k in (("a", "stages"), ("cell", "cells"), ("b", "stages"))]
record = gpu_record.Record(gpu_record.Path(sys.argv[1]), "c")
worker = gpu_process.Worker(gpu_process.surroundings(False))
worker.command = [sys.executable, "-S", "-c", WORKER]
runner = gpu_runner.Runner(record, worker, ["peer"])
for event in gpu_plan.follow([gpu_plan.Step("s", 0, 60, tuple(jobs))], record, runner.do,
                             time.monotonic, 60.0, prepare=runner.prepare):
    print(event.job, flush=True)
worker.stop()
"""


def start(path):
    script = SCRIPT.format(benchmarks=str(gpu_process.HERE))
    return subprocess.Popen(
        [sys.executable, "-S", "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )


def test_killed_at_any_point_the_next_call_finishes(tmp_path):
    """Before anything, in the middle of each job, and at once after one."""
    path, seen = tmp_path / "r.json", []
    for delay in (0.05, 0.3, 0.45, 0.6):
        process = start(path)
        time.sleep(delay)
        process.kill()
        process.wait()
        before = Record(path, "c")
        seen.append({k for kind in ("stages", "cells") for k in before.data[kind]})
    process = start(path)
    output, _ = process.communicate(timeout=30)
    done = [k for kind in ("stages", "cells") for k in ("a", "b", "cell") if before.has(kind, k, 0)]
    assert process.returncode == 0 and not set(output.split()) & set(done)
    assert all(earlier <= later for earlier, later in itertools.pairwise(seen))
    found = json.loads(path.read_text())
    assert {k: v["i"] for k, v in found["stages"].items()} == {"a": 2, "b": 2}
    assert found["cells"]["cell"] == {"commit": "c", "name": "cell", "i": 2}
    assert found["excluded"] == {"peer": "brought its process down (exit code 9) in cell"}


ORPHAN = """
import sys, threading, time
sys.path.insert(0, {benchmarks!r})
import gpu_process
worker = gpu_process.Worker(gpu_process.surroundings(False))
worker.command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
threading.Thread(target=worker.ask, args=({{}}, time.monotonic() + 60), daemon=True).start()
while worker.process is None:
    time.sleep(0.01)
print(worker.process.pid, flush=True)
time.sleep(60)
"""


def test_worker_dies_with_its_parent():
    """Also one that is still importing: the next call must not find it on the GPU."""
    script = ORPHAN.format(benchmarks=str(gpu_process.HERE))
    parent = subprocess.Popen(
        [sys.executable, "-S", "-c", script], stdout=subprocess.PIPE, text=True
    )
    worker = Path("/proc", parent.stdout.readline().strip())
    assert worker.exists()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while worker.exists() and " Z " not in (worker / "stat").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_worker_s_errors_are_in_the_log(tmp_path):
    answer = "import sys; print('oh', file=sys.stderr); print('{\"ready\": 1}', flush=True)"
    worker = gpu_process.Worker(dict(os.environ), log=tmp_path / "new" / "log.txt")
    for _ in range(2):
        worker.command = [sys.executable, "-S", "-c", answer]
        assert worker.start(time.monotonic() + 20) == ""
        worker.process.wait()
    worker.stop()
    assert worker.log.read_text() == "oh\noh\n"


def test_process_that_no_signal_ends_is_not_waited_for():
    class Stuck:
        kill = pid = None

        def wait(self, seconds):
            raise subprocess.TimeoutExpired("x", seconds)

    assert gpu_process.ended(Stuck()) is None


class Scripted:
    """A worker that tells a part and then gives an answer: a result, or what it was at and why it
    gave none.
    """

    def __init__(self, *answers):
        self.answers, self.jobs = list(answers), []

    def ask(self, job, deadline, keep):
        self.jobs.append(job)
        keep({"methods": {"treg_fused": {"errors": {}}}})
        answer = self.answers.pop(0)
        return (answer, "hot", "") if isinstance(answer, dict) else (None, *answer)

    def stop(self):
        pass


def do(record, worker, kind="cells"):
    gpu_runner.Runner(record, worker, ["cce"]).do(Job("x", 30.0, kind=kind), time.monotonic() + 30)
    return record.data[kind]["x"]


@pytest.mark.parametrize("answer", [("hot", "late"), ("start", "died"), {"late": "rounds"}])
def test_late_job_keeps_its_part_and_is_not_done(tmp_path, answer):
    record = Record(tmp_path / "r.json", "a")
    found = do(record, Scripted(answer))
    assert "unfinished" in found and not Record(record.path, "a").has("cells", "x", False)
    if not isinstance(answer, dict):
        assert found["methods"] == {"treg_fused": {"errors": {}}}


def test_failed_job_keeps_its_part_and_is_done(tmp_path):
    for answer, why in ((("treg_fused", "died"), "treg_fused: died"), ({"failed": "off"}, "off")):
        record = Record(tmp_path / why[:3], "a")
        found = do(record, Scripted(answer))
        assert found["failed"] == why and "treg_fused" in found["methods"]
        assert record.has("cells", "x", False) and "unfinished" not in found


def answering(*messages):
    """A worker that says these after any job."""
    said = "; ".join(f"print({json.dumps(x)!r}, flush=True)" for x in messages)
    script = f"import sys; print('{{\"ready\": 1}}', flush=True); sys.stdin.readline(); {said}"
    worker = gpu_process.Worker(dict(os.environ))
    worker.command = [sys.executable, "-S", "-c", script]
    return worker


BROKEN = {"result": {"failed": "off"}, "bye": True, "broken": "illegal access"}


def test_job_after_which_the_gpu_is_unusable_is_unfinished_once(tmp_path):
    record = Record(tmp_path / "r.json", "a")
    worker = answering({"at": "treg_fused"}, {"part": {"methods": {}}}, BROKEN)
    found = do(record, worker)
    assert found["unfinished"] == "treg_fused: left the GPU unusable: illegal access"
    assert found["methods"] == {} and worker.process is None
    found = do(record, worker)
    assert found["failed"] == "treg_fused: left the GPU unusable: illegal access"
    assert record.has("cells", "x", False)


def test_peer_that_leaves_the_gpu_unusable_is_left_out(tmp_path):
    record = Record(tmp_path / "r.json", "a")
    worker = answering({"at": "cce"}, BROKEN)
    gpu_runner.Runner(record, worker, ["cce"]).do(
        Job("x", 30.0, 29.9, kind="cells"), time.monotonic() + 30
    )
    assert record.data["excluded"] == {"cce": "left the GPU unusable: illegal access in x"}


def test_worker_ends_after_the_host_s_times(tmp_path):
    """Its profiler may stay in the process."""
    stops = []
    worker = Scripted()
    worker.stop, worker.start = lambda: stops.append(1), lambda until: ""
    runner = gpu_runner.Runner(Record(tmp_path / "r.json", None), worker, [])
    for name, wanted in (("rates", 0), ("host", 0), ("host", 0), ("cell", 1), ("cell", 1)):
        runner.prepare(Job("x", 1.0, work={"do": name}), 0.0)
        assert len(stops) == wanted


def test_job_has_less_time_than_its_deadline(tmp_path):
    worker = Scripted({})
    do(Record(tmp_path / "r.json", None), worker)
    assert 26 < worker.jobs[0]["seconds"] < 27.1  # the worker ends by itself 3 s before


def test_worker_that_ended_between_two_jobs_is_started_again():
    answer = "import sys; print('{\"ready\": 1}', flush=True); sys.stdin.readline(); "
    answer += "print('{\"result\": {}}', flush=True)"
    worker = gpu_process.Worker(dict(os.environ))
    worker.command = [sys.executable, "-S", "-c", answer]
    for _ in range(2):
        assert worker.ask({}, time.monotonic() + 20) == ({}, "start", "")
        worker.process.wait()
    worker.stop()


ELSEWHERE = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise SystemExit(0 if {wanted!r} == sys.path[:2] else 1)
sys.meta_path.insert(0, Missing)
sys.path.insert(0, {benchmarks!r})
import gpu_run
"""


def test_plan_needs_no_installed_package(tmp_path):
    """By the time torch, the first import that is no module of the plan, is asked for, this tree is
    where treg is looked for first.
    """
    root = gpu_process.ROOT
    wanted = [str(root), str(root / "kernels")]
    script = ELSEWHERE.format(benchmarks=str(gpu_process.HERE), wanted=wanted)
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", script]
    assert subprocess.run(command, env=env, cwd=tmp_path, check=False).returncode == 0


def test_commit_must_be_known_on_a_gpu(monkeypatch, capsys):
    """A record without one could not be gone on with. The dry run measures nothing."""
    monkeypatch.setattr(gpu_run, "DEVICE", "cuda")
    monkeypatch.setattr(gpu_run, "environment", lambda: {"commit": None, "device": "H200"})
    with pytest.raises(SystemExit) as stopped:
        gpu_run.parsed(["--minutes", "8"])
    assert stopped.value.code == 2 and "give --commit NAME" in capsys.readouterr().err
    assert gpu_run.parsed(["--dry-run"]).commit is None
    assert gpu_run.parsed(["--commit", "a"]).commit == "a"


@pytest.mark.parametrize(("cores", "most"), [(1, 1), (2, 1), (6, 4), (64, 14)])
def test_two_of_the_cores_that_may_be_used_are_left_free(monkeypatch, cores, most):
    monkeypatch.setattr(gpu_run.os, "sched_getaffinity", lambda pid: range(cores))
    assert gpu_run.processes() == most


def test_summary_is_printed_at_a_signal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_run.Runner, "do", lambda self, job, deadline: os.kill(os.getpid(), signal.SIGTERM)
    )
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as stopped:
            gpu_run.main(["--tiny", "--out", str(tmp_path), "--only", "truth", "--minutes", "1"])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "truth: 19 of 19" in capsys.readouterr().out


# -- tests as a job


LINES = [
    "tests/ops/test_a.py::test_one[x] PASSED [ 10%]\n",
    "[gw1] [ 20%] PASSED tests/ops/test_a.py::test_one[y] \n",
    "[gw0] [ 30%] FAILED tests/ops/test_a.py::test_two \n",
    "tests/ops/test_b.py::test_three SKIPPED (needs a GPU) [ 40%]\n",
    "E       RuntimeError: FAILED without a name\n",
]


def test_tests_are_counted_line_by_line():
    found = gpu_runner.counts(LINES)
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert found["failed_tests"] == ["tests/ops/test_a.py::test_two"]


def test_late_command_keeps_its_counts_and_leaves_nothing_running(tmp_path):
    record = Record(tmp_path / "r.json", None)
    script = "import time; print('tests/a.py::b PASSED', flush=True); time.sleep(60)"
    job = Job("tests: x", 60, command=(sys.executable, "-S", "-u", "-c", script))
    gpu_runner.Runner(record, Scripted(), []).do(job, time.monotonic() + 1.6)
    found = record.data["stages"]["tests: x"]
    assert found["counts"] == {"passed": 1} and found["unfinished"] == "late"
    assert found["seconds"] < 10


# -- values


SMALL = gpu_truth.Sizes(tiny=True)


def test_case_passes_and_its_rows_are_those_of_the_reference():
    found = gpu_truth.run("N = 5", SMALL)
    assert found["passed"] and found["errors"].keys() == {"logprobs", "dhidden", "dweight"}
    assert "skipped" in gpu_truth.run("two threads", SMALL)


@pytest.mark.parametrize("wrong", ["shifted", "NaN", "raises"])
def test_case_fails_where_the_op_is_wrong(monkeypatch, wrong):
    true = gpu_truth.linear_logprobs

    def off(*args, **options):
        if wrong == "raises":
            raise RuntimeError("no  kernel")
        found = true(*args, **options)
        shift = float("nan") if wrong == "NaN" else 1e-3
        return found._replace(logprobs=found.logprobs + shift)

    monkeypatch.setattr(gpu_truth, "linear_logprobs", off)
    found = gpu_truth.run("N = 1", SMALL)
    assert found["passed"] is False
    if wrong == "raises":
        assert found["error"] == "RuntimeError: no kernel"
    page = gpu_summary.page({"stages": {"truth: N = 1": found}, "cells": {}, "excluded": {}}, [], 0)
    assert "truth: 0 of 1 pass" in page and "| N = 1 | FAIL |" in page


def test_error_names_all_that_led_to_it(monkeypatch):
    def breaks(s):
        try:
            raise ValueError("no  room")
        except ValueError:
            raise RuntimeError("capture failed")  # noqa: B904

    for name in (gpu_truth.ALONE, "N = 1"):
        monkeypatch.setitem(gpu_truth.CASES, name, breaks)
        found = gpu_worker.do_truth({"name": name}, gpu_worker.Desk(True, print, lambda: 1.0))
        assert found["error"] == "RuntimeError: capture failed <- ValueError: no room"
        assert found["ends"] == (name == gpu_truth.ALONE)


def test_errors_are_those_of_the_gap():
    found = gpu_truth.errors({"x": torch.tensor([3.0, 4.0])}, {"x": torch.tensor([3.0, 1.0])})
    assert found["x"]["max"] == 3.0 and found["x"]["rms"] == pytest.approx(3 / 2**0.5)
    assert found["x"]["relative"] == pytest.approx(3 / 10**0.5)


# -- a cell


@pytest.mark.parametrize("mode", ["trainable", "frozen", "forward"])
def test_blank_batch_is_laid_out_like_the_true_one(mode):
    case = tiny(gpu_case("gemma-2-9b", 4096, "realistic", mode))
    blank, true = blank_batch(case), batch_of(case)
    for name in ("hidden", "weight", "target", "token_rewards", "ref_logps", "logprobs"):
        a, b = getattr(blank, name), getattr(true, name)
        assert (a.shape, a.dtype, a.stride(), a.requires_grad) == (
            *(b.shape, b.dtype, b.stride()),
            b.requires_grad,
        )
    assert torch.equal(blank.target == IGNORE, true.target == IGNORE)
    assert torch.equal(blank.scored, true.scored)
    assert torch.equal(blank.cu_seqlens, true.cu_seqlens) and blank.softcap == true.softcap


def test_peer_without_memory_never_ends_a_cell(monkeypatch):
    """It runs while it is prepared, and finds no memory in the first round."""
    calls = []

    def hungry(b):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("too large")
        return METHODS["dense_log_softmax"].fn(b)

    monkeypatch.setitem(METHODS, "peer", Method(hungry, "logprobs"))
    timing = loss_head_cell.Timing(methods=("peer", "dense_log_softmax"))
    parts = []
    found = loss_head_cell.measure_cell(CASE, {}, timing=timing, keep=lambda x: parts.append(x))
    assert found["methods"]["peer"] == {"reason": "OutOfMemoryError: too large"}
    assert len(found["methods"]["dense_log_softmax"]["hot"]) == loss_head_cell.HOT_ROUNDS
    assert len(parts) == 3  # after each method, and after the rounds
    told = loss_head_cell.summarised(found)["methods"]
    assert told["dense_log_softmax"]["hot"]["rounds"] == loss_head_cell.HOT_ROUNDS


def test_cell_without_time_says_what_it_left_out():
    times = iter([10.0, 0.0])
    timing = loss_head_cell.Timing(
        methods=("dense_log_softmax", "treg_logprobs"), left=lambda: next(times, 0.0)
    )
    found = loss_head_cell.measure_cell(CASE, {}, timing=timing)
    assert found["late"] == "methods" and "hot" not in found["methods"]["treg_logprobs"]
    assert found["methods"]["dense_log_softmax"] == {"reason": "no time was left"}
    assert found["methods"]["treg_logprobs"]["errors"]


def test_cell_with_fewer_cool_rounds_is_late(monkeypatch):
    """There is time for one, of three."""
    monkeypatch.setattr(loss_head_cell, "DEVICE", "cuda")
    monkeypatch.setattr(loss_head_cell, "_free", lambda: None)
    left = iter([100.0, 100.0])  # for the method, and for its hot rounds
    timing = loss_head_cell.Timing(
        methods=("treg_logprobs",),
        cool=("treg_logprobs",),
        pause=1e-3,
        left=lambda: next(left, 1.5e-3),
    )
    said = []
    found = loss_head_cell.measure_cell(CASE, {}, said.append, timing)
    assert len(found["methods"]["treg_logprobs"]["cool"]) == 1
    assert found["late"] == "cool rounds"
    assert said == ["treg_logprobs", "treg_logprobs", "hot", "cool", "cool"]  # after the oracle too


def test_launching_a_cell_runs_ours_and_a_share_of_the_peers(monkeypatch):
    ran = []
    for name in ("treg_fused", "dense_log_softmax"):
        true = METHODS[name].fn
        noted = lambda b, true=true, name=name: (ran.append(name), true(b))[1]  # noqa: E731
        monkeypatch.setitem(METHODS, name, replace(OWN[name], fn=noted))
    timing = loss_head_cell.Timing(methods=("treg_fused", "dense_log_softmax"))
    assert loss_head_cell.launch_cell(CASE, timing, lambda: False) == {}
    assert ran == ["treg_fused"]
    loss_head_cell.launch_cell(CASE, timing, lambda: True)
    assert ran == ["treg_fused", "treg_fused", "dense_log_softmax"]


# -- bars

ONE = gpu_bars.Bar("x", "cell", "treg_fused", ("quack",), 0.8)
FASTEST = replace(ONE, against=("a", "b", "c"))


def cells(**methods):
    """Cells in which methods have these (cool, hot) milliseconds; None: not measured."""
    return {
        "cell": {
            "methods": {
                name: x
                if isinstance(x, dict)
                else {
                    kind: {"median": t}
                    for kind, t in zip(("cool", "hot"), x, strict=True)
                    if t is not None
                }
                for name, x in methods.items()
            }
        }
    }


def test_bar_whose_peer_did_not_run_is_not_judged_by_another():
    verdict = gpu_bars.judge(ONE, cells(treg_fused=(1, 1), trl_chunked=(10, 10)))
    assert verdict.text == "not measured: quack did not run" and not verdict.values
    missing = cells(treg_fused=(1, 1), quack={"reason": "no wheel"})
    assert gpu_bars.judge(ONE, missing).text == "not measured: quack (no wheel) did not run"


def test_bar_against_the_fastest_says_of_which():
    """2 of 3 ran: the ratio is to the faster of the two, and the text names the third."""
    verdict = gpu_bars.judge(
        FASTEST, cells(treg_fused=(7, 7), a=(10, 10), b=(20, 20), c={"reason": "no wheel"})
    )
    assert verdict.values == {"cool": 0.7, "hot": 0.7}
    assert verdict.text == "met, of a, b; partial: c (no wheel) did not run"
    whole = gpu_bars.judge(FASTEST, cells(treg_fused=(9, 9), a=(10, 10), b=(10, 10), c=(12, 12)))
    assert whole.text == "missed by 12.5 %"
    nobody = gpu_bars.judge(FASTEST, cells(treg_fused=(9, 9)))
    assert nobody.text == "not measured: a, b, c did not run"


def test_cool_times_of_some_do_not_hide_a_fast_other():
    """Cool, only the slow peer was timed: the hot ratio to the fast one counts alone."""
    verdict = gpu_bars.judge(
        FASTEST, cells(treg_fused=(7, 7), a=(20, 20), b=(None, 7), c=(None, 30))
    )
    assert verdict.values == {"hot": 1.0} and verdict.text == "missed by 25.0 %, hot alone"


def test_bar_of_a_cell_that_did_not_end():
    for cell, text in (
        ({"unfinished": "late"}, "not measured: unfinished"),
        ({"failed": "hot: died"}, "failed: hot: died"),
        ({"unfinished": "late", "methods": {}}, "not measured: quack did not run, unfinished"),
        (
            {"unfinished": "late", **cells(treg_fused=(7, 7), quack=(10, 10))["cell"]},
            "met, unfinished",
        ),
    ):
        assert gpu_bars.judge(ONE, {"cell": cell}).text == text


def test_report_of_cells_that_hold_less():
    """A peer timed hot alone has an empty place; a cell of which nothing is known has none."""
    names = [bar.cell for bar in gpu_bars.BARS[::5]]
    held = cells(gemm_3=(8, 10), verl=(None, 20))["cell"]
    record = {"cells": {names[0]: held, names[1]: {"unfinished": "late at start"}}}
    text = report.full_report(record, {})
    assert "| gemm_3 | 8 |  | 1 | 10 |  | 1 |" in text and "| verl |  |  |  | 20 |  | 2 |" in text
    assert f"## {names[0]}" in text and f"## {names[1]}" not in text


def test_bar_without_its_own_method_is_not_measured():
    assert gpu_bars.judge(ONE, cells(quack=(1, 1))).text == "not measured: treg_fused did not run"


# -- tiles


def test_measured_tiles_go_into_the_folder_and_are_not_timed_again(tmp_path, monkeypatch):
    """Never over the file that the kernels read; the tile that is faster by more than 2 %."""
    shipped = tune_tiles.SHIPPED.read_bytes()
    name, kind = "llama-3-8b", "gradient"
    tiles = list(tune_tiles.tiles_of(kind, 40))
    times = {tiles[0]: 3.0, tiles[1]: 2.0}
    timed = []

    def cell(*shape):
        timed.append(shape)
        return [
            {"tile": tile._asdict(), "table": tile == tiles[0], "ms": ms}
            for tile, ms in times.items()
        ]

    monkeypatch.setattr(tune_tiles, "cell", cell)
    [line] = tune_tiles.tune(tmp_path, name, kind, True, lambda: 1.0)
    assert line.startswith("llama-3-8b gradient N=40") and "2.000 ms" in line
    assert tune_tiles.tune(tmp_path, name, kind, True, lambda: 1.0) == []
    assert timed == [(kind, 40, *tune_tiles.heads(True)[name])]
    [row] = json.loads((tmp_path / "measured.json").read_text())
    assert row["tile"] == tiles[1]._asdict() and (row["kind"], row["rows"]) == (kind, 40)
    assert {path.name for path in tmp_path.iterdir()} == {"tiles.json", "measured.json"}
    assert tune_tiles.SHIPPED.read_bytes() == shipped


def fake_call(kind, tile, x, scalars):
    """Results of ones; a tile of 100 registers raises, one of 50 gives another second result."""

    def run():
        if tile.registers == 100:
            raise RuntimeError("no such form")
        x["out"].fill_(2.0 if tile.registers == 50 else 1.0)
        if kind == "gradient":
            return {"gradient": x["out"]}
        found = {"logprobs": torch.ones(4), "norm": torch.ones(4, 2)}
        return found | ({"factor": torch.ones(4), "stash": x["out"]} if kind == "stash" else {})

    return run


@pytest.fixture
def three_tiles(monkeypatch):
    """The launch's own, and forms that raise, that are off and that are right."""
    first = gpu_rates.configs.tile_for("stash", tune_tiles.DTYPE, 40, 264, 64)
    others = tuple(first._replace(registers=n) for n in (100, 50, 25))
    wider = first._replace(v=2 * first.v)
    candidates = {gpu_rates.configs.architecture(): (wider, *others, first)}
    monkeypatch.setattr(gpu_rates.configs, "CANDIDATES", candidates)
    x = {"out": torch.zeros(4, 6), "hidden": torch.zeros(4, 2), "weight": torch.zeros(6, 2)}
    monkeypatch.setattr(tune_tiles, "inputs", lambda *shape: (x, None))
    monkeypatch.setattr(tune_tiles, "call", fake_call)
    return first


def test_every_form_of_a_tile_is_timed_beside_the_first(three_tiles, monkeypatch):
    """A candidate that differs in a field other than its shape is another form of the kernel. One
    that raises or whose stash or gradient is off hides no other's times.
    """
    forms = gpu_rates.forms("stash", 40, 264, 64)
    assert list(forms) == ["", "registers=100", "registers=50", "registers=25"]
    monkeypatch.setattr(gpu_rates, "seconds", lambda calls, *rounds: {"run": 4.0, "mm": 3.0})
    parts = []
    keep = lambda found: parts.append(json.loads(json.dumps(found)))  # noqa: E731
    found = gpu_rates.kernel_rates("llama-3-8b", True, lambda name: None, keep)["kinds"]
    assert parts[0]["kinds"].keys() == {"forward"} and parts[0]["kinds"]["forward"]["forms"] == {}
    assert found.keys() == {"forward", "stash", "gradient"}
    flops = 2 * 40 * 264 * 64
    for kind, rate in found.items():
        assert rate["tflops"] == pytest.approx(flops / 4 / 1e12, rel=1e-3)
        assert rate["mm_tflops"] == pytest.approx(flops / 3 / 1e12, rel=1e-3)
        assert (rate["ms"], rate["ratio"], rate["tile"]) == (4000.0, 0.75, three_tiles._asdict())
        raised, off, right = rate["forms"].values()
        assert raised == {"failed": "RuntimeError: no such form"}
        assert off.get("off") == (
            None if kind == "forward" else f"{kind}: relative difference 1.0e+00"
        )
        assert right["ratio"] == 0.75 and "off" not in right
    record = {"stages": {"rates: x": {"kinds": found}}, "cells": {}, "excluded": {}}
    assert "registers=100 failed (RuntimeError" in gpu_summary.page(record, [], None)
    wrong = gpu_rates.launch("llama-3-8b", True)
    assert list(wrong) == [f"{kind} registers=100" for kind in found]


def test_tile_whose_stash_is_off_is_left_out(three_tiles):
    """Its log-probs alone are right."""
    rows = {row["tile"]["registers"]: row for row in tune_tiles.cell("stash", 40, 64, 264, None)}
    assert rows[100]["out"] == "RuntimeError: no such form"
    assert rows[50]["out"] == "stash: relative difference 1.0e+00"
    assert "ms" in rows[25] and "ms" in rows[None]


def test_results_left_by_another_tile_are_none_of_a_tile_that_writes_nothing():
    x = {"out": torch.ones(3)}
    found = tune_tiles.results(lambda: {"gradient": x["out"]}, x)
    assert tune_tiles.off(found, {"gradient": torch.ones(3)}) == (
        "gradient: relative difference nan"
    )


@pytest.mark.parametrize("job", [tune_tiles.cell, tune_tiles.launch])
def test_unusable_gpu_is_no_property_of_a_tile(three_tiles, monkeypatch, job):
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tune_tiles, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        job("stash", 40, 64, 264, None)


def test_tiles_of_another_commit_are_timed_again(tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(tune_tiles, "cell", lambda *shape: timed.append(shape) or [])
    for commit in ("a", "a", "b"):
        tune_tiles.tune(tmp_path, "llama-3-8b", "gradient", True, lambda: 1.0, commit)
    assert len(timed) == 2


def test_events_of_a_tile_begin_while_the_gpu_is_at_work(monkeypatch):
    """Otherwise the time in which the host queues a launch is between them."""
    said = []

    class Event:
        def record(self):
            said.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 2.5

    monkeypatch.setattr(tune_tiles, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(tune_tiles, "_square", lambda: torch.zeros(2, 2))
    monkeypatch.setattr(torch, "mm", lambda a, b: said.append("product"))
    assert tune_tiles.milliseconds(lambda: said.append("run")) == 2.5
    assert said == ["product"] * 8 + ["event", "run", "event"]


@pytest.mark.parametrize(("clock", "age"), [(1e12, 120.0), (-1e12, 0.0)])
def test_a_clock_that_is_off_takes_no_more_than_two_minutes(monkeypatch, clock, age):
    monkeypatch.setattr(time, "clock_gettime", lambda which: clock)
    assert gpu_run.process_age() == cpu_look.process_age() == age
