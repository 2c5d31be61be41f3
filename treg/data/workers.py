"""Rows that several processes encode, in order."""

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
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
    before = multiprocessing.active_children()
    pool = _pool(encode, num_proc)
    waiting: collections.deque[tuple[Any, Any]] = collections.deque()
    try:
        for beside, rows in parts:
            waiting.append((beside, pool.submit(_call, rows) if rows else None))
            if len(waiting) > AHEAD * num_proc:
                beside, future = waiting.popleft()
                yield beside, _result(future, num_proc)
        while waiting:
            beside, future = waiting.popleft()
            yield beside, _result(future, num_proc)
        pool.shutdown()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in before:  # after Ctrl-C or an error nobody waits for their rows
                process.terminate()


def _result(future: Any, num_proc: int) -> list:
    try:
        return [] if future is None else future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ChildProcessError(
            f"num_proc: one of {num_proc} processes that encode rows ended, as where memory runs "
            "out; take fewer of them"
        ) from error


def _pool(encode: Callable, num_proc: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that are no forks of this one, whose threads and CUDA a fork would not survive."""
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        # what takes long to import, once for all
        context.set_forkserver_preload(["treg.data.encode", "transformers"])
    return concurrent.futures.ProcessPoolExecutor(
        num_proc, mp_context=context, initializer=_begin, initargs=(encode,)
    )


def _begin(encode: Callable) -> None:
    """In each process, before its first rows."""
    global _encode
    _encode = encode
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
