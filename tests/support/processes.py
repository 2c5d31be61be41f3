"""Python processes of tests, without the seconds that each would import for.

One server imports what is long to import, when the first process is asked for; every process is a
fork of it. It has no threads of PyTorch and no random state that anybody has drawn from.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

from surroundings import environment

LONG_TO_IMPORT = [
    "accelerate",
    "datasets",
    "matplotlib.figure",
    "peft",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.llama.modeling_llama",
    "treg.cli.annotate",
    "treg.cli.inspect",
    "treg.cli.train",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LONG_TO_IMPORT)


class Started:
    """A process. Its output, stdout and stderr together, goes to a file."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: str | os.PathLike | None):
        handle, self.output = tempfile.mkstemp(prefix="treg-test-")
        os.close(handle)
        where = os.getcwd() if cwd is None else os.fspath(cwd)
        self.process = CONTEXT.Process(target=_work, args=(argv, env, where, self.output))
        self.process.start()

    def said(self) -> str:
        return Path(self.output).read_text(errors="replace")

    def ended(self) -> bool:
        return not self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 300.0) -> int:
        """The exit code; -9 of a process that SIGKILL ended. It is killed if it is late."""
        self.process.join(timeout)
        late = self.process.is_alive()
        if late:
            self.kill()
        assert not late, f"not at its end after {timeout} s:\n{self.said()}"
        assert self.process.exitcode is not None
        return self.process.exitcode


def start(*argv: object, env: dict[str, str] | None = None, cwd=None) -> Started:
    """`python SCRIPT.py ARGUMENTS` or `python -m MODULE ARGUMENTS`, by what argv begins with.

    env: what differs from `environment()`.
    """
    _ensure_server()
    return Started(list(map(str, argv)), environment() | (env or {}), cwd)


def run(*argv: object, ranks: int | None = None, timeout: float = 300.0, **more) -> str:
    """The output of a process that must succeed, or of as many as ranks, as torchrun would start
    them on this machine.
    """
    if ranks is None:
        processes = [start(*argv, **more)]
    else:
        env, processes = more.pop("env", None) or {}, []
        for rank_env in ranks_env(ranks):
            processes.append(start(*argv, env=env | rank_env, **more))
    wait_for_all(processes, timeout)
    said = "".join(process.said() for process in processes)
    assert all(process.wait() == 0 for process in processes), said
    return said


def ranks_env(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


def wait_for_all(processes: list[Started], timeout: float) -> None:
    """Until all have ended, or one has failed: the others would wait for it, and are killed."""
    deadline = time.monotonic() + timeout
    while not all(process.ended() for process in processes):
        failed = [x for x in processes if x.ended() and x.wait()]
        if failed or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            return
        time.sleep(0.02)


def _ensure_server() -> None:
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(argv: list[str], env: dict[str, str], cwd: str, output: str) -> None:
    gc.freeze()  # what the server holds
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    handle = os.open(output, os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
