"""Requests to servers: a bounded number at a time, each sent again where that can help."""

import asyncio
import concurrent.futures
import email.utils
import json
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

try:
    import httpx2 as httpx
except ModuleNotFoundError:  # of Python 3.10
    import httpx  # pyright: ignore[reportMissingImports]

from treg.rewards.server.options import ServerOptions, shown

log = logging.getLogger(__name__)

# what may pass: time-outs, too many requests, faults of the server
PASSING = {408, 425, 429, *range(500, 600)} - {501}
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a request is sent again
LONGEST_TOLD = 600.0  # the same, where the server says how long
SHOWN = 300  # letters of an answer that a message shows
Request = tuple[int, str, dict[str, Any]]  # which of the servers, path, body


class ServerError(OSError):
    """A server that cannot be reached, or that will not serve."""


class Refused(Exception):
    """A server says that a request is not one for it. status: of HTTP. said: its words."""

    def __init__(self, where: str, status: int, said: str):
        super().__init__(f"{where}: {status}: {said}")
        self.status = status
        self.said = said


class Connection:
    """Requests to the servers of some options.

    They run in a thread of their own, so that the caller may be a notebook, and may be interrupted.

    Args:
        sleep, jitter: how to wait, and random numbers in [0, 1): for tests.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ):
        self.options = options
        self._sleep = sleep
        self._jitter = jitter
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()
        self._told: set[int] = set()  # attempts that a word was said of, since all was well

    def get(self, server: int, path: str) -> Any:
        """The JSON that a path of a server gives."""
        return self._submit(self._answer(server, path, None)).result()

    def post(self, server: int, path: str, body: dict[str, Any], retries: int | None = None) -> Any:
        """The JSON that a server answers to a body. retries: fewer than the options have."""
        return self._submit(self._answer(server, path, body, retries)).result()

    def post_all(
        self, requests: Sequence[Request], done: Callable[[int], None] = lambda number: None
    ) -> list[Any]:
        """What the servers answer to each request: JSON, or the `Refused` that it met.

        When one fails for good, or the caller is interrupted, those under way are cancelled.

        Args:
            done: is told the number of each request that is answered.
        Raises:
            ServerError: as in `get`.
        """
        answers: list[Any] = [None] * len(requests)
        numbers: dict[concurrent.futures.Future, int] = {}
        try:
            for i, request in enumerate(requests):
                numbers[self._submit(self._answer(*request))] = i
            for future in concurrent.futures.as_completed(numbers):
                i = numbers[future]
                try:
                    answers[i] = future.result()
                except Refused as refused:
                    answers[i] = refused
                done(i)
        finally:
            # the last first: what waits must not take the place of what is cancelled
            for future in reversed(numbers):
                future.cancel()
        return answers

    def close(self) -> None:
        """Give the connections back. A later request opens new ones."""
        with self._starting:
            if self._loop is None:
                return
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None

    def _submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future:
        with self._starting:
            if self._loop is None:
                self._start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)  # pyright: ignore

    def _start(self) -> None:
        options = self.options
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Semaphore(options.concurrency)
        headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
        limits = httpx.Limits(
            max_connections=options.concurrency, max_keepalive_connections=options.concurrency
        )
        self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=options.timeout)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _answer(
        self, server: int, path: str, body: dict[str, Any] | None, retries: int | None = None
    ) -> Any:
        """The answer to a request, which is sent again after a fault that may pass."""
        url = f"{self.options.roots[server]}{path}"
        where = shown(url)
        most = self.options.retries if retries is None else min(retries, self.options.retries)
        async with self._free:
            for attempt in range(most + 1):
                try:
                    answer = await self._sent(url, body)
                except httpx.TransportError as error:
                    fault, told = f"{type(error).__name__} {error}".strip(), None
                except httpx.HTTPError as error:
                    raise ServerError(f"{where}: {type(error).__name__}: {error}") from error
                else:
                    if answer.status_code not in PASSING:
                        self._told.clear()
                        return _content(where, answer)
                    fault = f"{answer.status_code}: {_said(answer)}"
                    told = _told_to_wait(answer.headers.get("retry-after"))
                if attempt < most:
                    wait = self._wait(attempt, told)
                    self._tell(where, fault, attempt, wait)
                    await self._sleep(wait)
        raise ServerError(
            f"{where}: {fault}; sent {most + 1} times; see the server's log. What is finished is "
            "kept: the same command goes on"
        )

    async def _sent(self, url: str, body: dict[str, Any] | None) -> Any:
        if body is None:
            return await self._client.get(url)
        return await self._client.post(url, json=body)

    def _tell(self, where: str, fault: str, attempt: int, wait: float) -> None:
        """A word for the first of the requests that fail together."""
        if attempt not in self._told:
            self._told.add(attempt)
            log.warning("%s: %s; sent again in %.0f s", where, fault, wait)

    def _wait(self, attempt: int, told: float | None) -> float:
        """Seconds: twice as many each time, of which a random part is left out so that requests
        which failed together do not come back together; at least what the server asks for.
        """
        wait = min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT) * (1 - self._jitter() / 2)
        return wait if told is None else max(wait, min(told, LONGEST_TOLD))


def _content(where: str, answer: Any) -> Any:
    """The JSON of an answer that is not to be asked for again."""
    status = answer.status_code
    if status in (401, 403):
        sent = "another key" if "authorization" in answer.request.headers else "no key"
        raise ServerError(
            f"{where}: {status}: {_said(answer)}; {sent} was sent: set the server's key in the "
            "environment variable TREG_SERVER_KEY, or OPENAI_API_KEY"
        )
    if 300 <= status < 400:
        leads = shown(answer.headers.get("location", "nowhere"))
        raise ServerError(f"{where}: it leads to {leads}; give that address")
    if status >= 400:
        raise Refused(where, status, _said(answer))
    try:
        return answer.json()
    except (ValueError, UnicodeDecodeError) as error:
        raise ServerError(
            f"{where}: expected JSON, got {answer.headers.get('content-type', 'nothing')}: "
            f"{_said(answer)!r}; is that the address of the serving engine itself?"
        ) from error


def _said(answer: Any) -> str:
    """The words of an error, in one line."""
    text = answer.text
    try:
        found = json.loads(text)
        while isinstance(found, dict):
            found = next(found[x] for x in ("error", "message", "detail") if x in found)
        text = str(found)
    except (ValueError, StopIteration):
        pass
    return " ".join(text.split())[:SHOWN] or "no word"


def _told_to_wait(header: str | None) -> float | None:
    """Seconds of a Retry-After, which may be a date; None: there is none that can be read."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
