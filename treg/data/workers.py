"""Rows that several processes encode, in order."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

# rows before other processes are started: their start takes as long as some 4,000 rows
START_ROWS = 4000
AHEAD = 2  # parts a process that wait for it or are done before they are wanted

# what a process encodes with
_encode: Callable[[Any], Any] | None = None


def in_order(
    encode: Callable[[list], list], parts: Iterable[tuple[Any, list]], num_proc: int
) -> Iterator[tuple[Any, list]]:
    """(what a part comes with, its rows) -> (the same, what encode makes of the rows), in order.

    Args:
        encode: called here with the first START_ROWS rows, after them in num_proc processes, which
            get a copy of it.
    Raises:
        ChildProcessError: one of them ended by itself. And what encode raises.
    """
    if num_proc == 1:
        yield from ((beside, encode(rows)) for beside, rows in parts)
        return
    parts, done = iter(parts), 0
    for beside, rows in parts:
        yield beside, encode(rows)
        done += len(rows)
        if done >= START_ROWS:
            break
    else:
        return
    waiting: collections.deque[Any] = collections.deque()
    with _pool(encode, num_proc) as pool:
        for beside, rows in parts:
            with _all_alive(num_proc):
                waiting.append((beside, pool.submit(_call, rows) if rows else None))
            if len(waiting) > AHEAD * num_proc:
                yield _next(waiting, num_proc)
        while waiting:
            yield _next(waiting, num_proc)


def _next(waiting: collections.deque[Any], num_proc: int) -> tuple[Any, list]:
    beside, future = waiting.popleft()
    with _all_alive(num_proc):
        return beside, [] if future is None else future.result()


@contextlib.contextmanager
def _all_alive(num_proc: int) -> Iterator[None]:
    """ChildProcessError where a process ended, as it began (ConnectionError) or later."""
    try:
        yield
    except (BrokenProcessPool, ConnectionError, EOFError) as error:
        raise ChildProcessError(
            f"num_proc: expected {num_proc} processes that encode rows, one of them ended: take "
            "fewer of them if memory ran out; a script that asks for several needs "
            '`if __name__ == "__main__":` around what it does, and must be a file, not stdin'
        ) from error


@contextlib.contextmanager
def _pool(encode: Callable, num_proc: int) -> Iterator[concurrent.futures.Executor]:
    """Processes that are no forks of this one, whose threads and CUDA a fork would not survive."""
    with _server() as context:
        stopped = context.Event()
        pool = concurrent.futures.ProcessPoolExecutor(
            num_proc, mp_context=context, initializer=_begin, initargs=(encode, stopped)
        )
        try:
            yield pool
        finally:
            # after Ctrl-C or an error each ends after its part, in seconds: where one is killed
            # while it hands rows over, this process may wait for the rest of them for ever
            stopped.set()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _server() -> Iterator[Any]:
    """The context of processes that are forked from one which has imported what takes long. It ends
    with them, as it holds some 230 MB; one that is there already is somebody else's and stays.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield multiprocessing.get_context("spawn")
        return
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    server: Any = vars(forkserver)["_forkserver"]
    if server._forkserver_pid is not None:
        yield context
        return
    before = list(server._preload_modules)
    forkserver.set_forkserver_preload(["treg.data.encode", "transformers"])
    try:
        yield context
    finally:
        forkserver.set_forkserver_preload(before)
        with contextlib.suppress(OSError):  # it ended by itself
            if server._forkserver_pid is not None:
                # not by the end of its pipe to here, which forks of this process hold open
                os.kill(server._forkserver_pid, signal.SIGTERM)
                server._stop()


def _begin(encode: Callable, stopped: Any) -> None:
    """In each process, before its first rows."""
    global _encode
    _encode = lambda rows: [] if stopped.is_set() else encode(rows)  # noqa: E731
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it
    # one thread a process: the processes are as many as there is work for
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _call(rows: list) -> list:
    if _encode is None:
        raise RuntimeError("expected a process that was told what it encodes with")
    return _encode(rows)
