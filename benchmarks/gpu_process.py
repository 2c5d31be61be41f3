"""The processes that `gpu_run.py` starts, and how they end. Nothing here imports PyTorch."""

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SILENCE = 40.0  # seconds without a word after which a worker hangs
STARTING = 90.0  # seconds in which one must have started
START = "start"  # what a worker is at that has said nothing
UNUSABLE = "left the GPU unusable"  # what is said of a job after which it answers no more
Keep = Callable[[dict], object]


class Worker:
    """A `gpu_worker.py`, started when first asked."""

    def __init__(self, env: dict[str, str], *options: str, log: Path | None = None):
        """log: a file to which its standard error is appended; None: it goes where this one's
        does.
        """
        self.env, self.log = env, log
        self.command = [sys.executable, str(HERE / "gpu_worker.py"), *options]
        self.process: subprocess.Popen | None = None

    def start(self, deadline: float) -> str:
        """Start it, if it does not run, and wait until it has imported what it needs. Returns why
        it does not run, or "".
        """
        if self.process is not None and self.process.poll() is None:
            return ""
        self.stop()  # it may have ended between two jobs
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(log := None if self.log is None else opened(self.log)),
            text=True,
            cwd=ROOT,
            env=self.env,
            preexec_fn=die_with_parent,  # at once: its imports take seconds
        )
        if log is not None:
            log.close()  # the process has its own
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(
            target=self._listen, args=(self.process.stdout, self.lines), daemon=True
        ).start()
        line, why = self._line(deadline, STARTING)
        return why if "ready" in line else why or f"expected it to be ready, got {line!r}"

    def ask(
        self, job: dict, deadline: float, keep: Keep = lambda part: None
    ) -> tuple[dict | None, str, str]:
        """The result, or None, what the worker was at and why nothing came ("late": the
        deadline). keep is given what is known before the result is; a result after which the GPU is
        unusable is such a part, and none.
        """
        if why := self.start(deadline):
            return None, START, why
        with suppress(BrokenPipeError):  # it has ended: the queue says so
            print(json.dumps(job), file=self.process.stdin, flush=True)
        at, known = START, {}
        while True:
            line, why = self._line(deadline, SILENCE)
            if why:
                return None, at, why
            message = json.loads(line)
            if "result" in message:
                if message.get("bye"):
                    self.stop()
                if message.get("broken"):
                    keep({**known, **message["result"]})
                    return None, at, f"{UNUSABLE}: {message['broken']}"
                return message["result"], at, ""
            if "part" in message:
                keep(known := message["part"])
            at = message.get("at", at)

    def _line(self, deadline: float, silence: float) -> tuple[str, str]:
        """What it says next, or why it says nothing and was ended."""
        left = deadline - time.monotonic()
        try:
            line = self.lines.get(timeout=max(0.0, min(silence, left)))
        except queue.Empty:
            self.stop()
            return "", "late" if left < silence else f"no sign of life for {silence:.0f} s"
        if line:
            return line, ""
        code = ended(self.process)
        self.stop()
        return "", f"brought its process down (exit code {code})"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            ended(self.process)
            self.process = None

    @staticmethod
    def _listen(stream, lines: queue.Queue) -> None:
        for line in stream:
            lines.put(line)
        lines.put("")


def ended(process: subprocess.Popen, seconds: float = 5.0) -> int | None:
    """The exit code; None of a process that waits for a driver, which no signal ends."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def opened(log: Path):
    """To append lines to, of several processes at a time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("a", buffering=1, errors="replace")


def surroundings(interpreted: bool) -> dict[str, str]:
    """The environment of every process that is started. interpreted: by Triton's interpreter."""
    path = os.pathsep.join(
        filter(None, (os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "kernels")))
    )
    found = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    found |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    found.pop("TRITON_INTERPRET", None)
    return found | ({"TRITON_INTERPRET": "1"} if interpreted else {})


class Command:
    """A process with all that it starts, whose output is read line by line, and appended to a log
    where one is given.
    """

    def __init__(
        self, command: list[str], env: dict[str, str], given: str = "", log: Path | None = None
    ):
        self.log = None if log is None else opened(log)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._talk, args=(given,), daemon=True).start()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _talk(self, given: str) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.write(given)
            self.process.stdin.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if self.log is not None:
                self.log.write(line)

    def wait(self, deadline: float) -> int | str:
        """The exit code, or "late"."""
        try:
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
            self._reader.join(2.0)
            return code
        except subprocess.TimeoutExpired:
            return "late"
        finally:
            self.stop()

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        ended(self.process)


try:
    LIBC = ctypes.CDLL("libc.so.6")  # loaded here: between fork and exec no lock may be waited for
except OSError:
    LIBC = None


def die_with_parent() -> None:
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
