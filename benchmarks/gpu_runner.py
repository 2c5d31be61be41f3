"""How `gpu_run.py` does a job and keeps what came of it."""

import json
import re
import shutil
import sys
import time
from collections.abc import Container
from contextlib import suppress

from gpu_plan import Job
from gpu_process import HERE, START, UNUSABLE, Command, Worker, surroundings
from gpu_record import Record

SPARE = 3.0  # seconds before its deadline by which a job should have ended by itself


class Runner:
    """Does the jobs of a plan, and puts what it finds into the record."""

    def __init__(self, record: Record, worker: Worker, peers: Container[str], gpu: bool = True):
        """peers: the names of other projects' methods, which are left out if a worker dies of them
        or hangs.
        """
        self.record, self.worker, self.peers, self.gpu = record, worker, peers, gpu
        self.log = record.path.with_name("log.txt")  # what all commands say
        self._before = ""  # what the last job did

    def prepare(self, job: Job, until: float) -> None:
        """Start the worker, whose imports take no time of the job's; fresh where the job wants it
        alone, and after the host's times, whose profiler may stay in its process.
        """
        before, self._before = self._before, job.work.get("do", "")
        if job.alone or (before == "host" and self._before != "host"):
            self.worker.stop()
        if not self._by_command(job):
            self.worker.start(until)

    @staticmethod
    def _by_command(job: Job) -> bool:
        return bool(job.command) or job.work.get("do") == "compile"

    def do(self, job: Job, deadline: float) -> None:
        if job.work.get("do") == "compile":
            self._put(job, self._compile(job.work, deadline))
        elif job.command:
            self._put(job, self._command(job, deadline))
        else:
            self._work(job, deadline)

    def _put(self, job: Job, value: dict) -> None:
        if value.get("code") == "late" or "late" in value:
            self.record.put_part(job.kind, job.name, value, "late")
        else:
            self.record.put(job.kind, job.name, value)

    def _work(self, job: Job, deadline: float) -> None:
        """By the worker; again without a method of another project that ended it.

        A job after which the GPU is unusable is unfinished once, for it may not be its fault; where
        it is so again it has failed.
        """
        known: dict = {}
        again = "broken" in self.record.data[job.kind].get(job.name, {})

        def keep(part: dict) -> None:
            known.clear()
            known.update(part)
            self.record.put_part(job.kind, job.name, known)

        while True:
            left = deadline - time.monotonic()
            asked = {**job.work, "seconds": left - min(SPARE, 0.2 * left)}
            asked |= {"excluded": self.record.data["excluded"], "commit": self.record.commit}
            found, at, why = self.worker.ask(asked, deadline, keep)
            if found is not None:
                self._put(job, {**known, **found} if "failed" in found else found)
            elif why == "late" or at == START:  # of a worker that cannot start nothing is known
                self.record.put_part(job.kind, job.name, known, f"{why} at {at}")
            elif at in self.peers:
                self.record.data["excluded"][at] = f"{why} in {job.name}"
                self.record.save()
                if deadline - time.monotonic() > job.least:
                    continue
            elif why.startswith(UNUSABLE) and not again:
                known["broken"] = at
                self.record.put_part(job.kind, job.name, known, f"{at}: {why}")
            else:
                self._put(job, {**known, "failed": f"{at}: {why}"})
            return

    def _command(self, job: Job, deadline: float) -> dict:
        """Exit code, seconds, the end of what it printed, and how many tests came out how."""
        if shutil.which(job.command[0]) is None:
            return {"skipped": f"{job.command[0]} is not on the PATH"}
        self.worker.stop()  # its memory is needed
        began = time.monotonic()
        env = surroundings(not self.gpu) | job.environment
        running = Command(list(job.command), env, log=self.log)
        try:
            code = running.wait(deadline - 1.0)
        finally:
            running.stop()
        return {
            "code": code,
            "seconds": round(time.monotonic() - began, 1),
            **counts(running.lines),
            "end": "".join(running.lines)[-1500:],
        }

    def _compile(self, work: dict, deadline: float) -> dict:
        """Kernels by several processes at once, into Triton's cache on the disk."""
        if not self.gpu:
            return {"skipped": "nothing is compiled for a CPU"}
        self.worker.stop()
        n, began = work["processes"], time.monotonic()
        script = [sys.executable, str(HERE / "gpu_worker.py"), "--compile"]
        given = json.dumps(work["works"])
        env = surroundings(False) | {"OMP_NUM_THREADS": "1"}
        running = [Command([*script, str(k), str(n)], env, given, self.log) for k in range(n)]
        try:
            codes = [one.wait(deadline - 1.0) for one in running]
        finally:
            for one in running:
                one.stop()
        found = [told(one.lines) for one in running]
        wrong: dict[str, str] = {}
        for one in found:
            wrong |= one.get("wrong", {})
        late = {"late": [k for k, code in enumerate(codes) if code == "late"]}
        died = [k for k, code in enumerate(codes) if code not in (0, "late")]
        return {
            "kernels": max(one.get("kernels", 0) for one in found),
            "compiled": sum(one.get("compiled", 0) for one in found),
            "processes": n,
            "seconds": round(time.monotonic() - began, 1),
            "died": died,
            **({"end": "".join(running[died[0]].lines)[-800:]} if died else {}),
            "wrong": wrong,
            **(late if late["late"] else {}),
        }


def told(lines: list[str]) -> dict:
    """The result among the lines of a process that also says other things."""
    for line in reversed(lines):
        with suppress(ValueError, TypeError, KeyError):
            return json.loads(line)["result"]
    return {}


OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def counts(lines: list[str]) -> dict:
    """Tests by outcome, and the names of those that failed, of pytest -v."""
    found: dict[str, int] = {}
    failed = []
    for line in lines:
        outcome, name = OUTCOME.search(line), re.search(r"tests/\S+::.*", line)
        if outcome and name:
            key = outcome[1].lower()
            found[key] = found.get(key, 0) + 1
            if key in ("failed", "error"):
                failed.append(name[0].replace(outcome[1], "").strip()[:160])
    return {"counts": found, "failed_tests": failed[:60]} if found else {}
