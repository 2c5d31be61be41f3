"""Where a serving engine is, and how it is asked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

DIALECTS = ("vllm", "sglang", "echo")


@dataclass(frozen=True)
class ServerOptions:
    """A model that one or several servers have.

    urls: of the servers, with or without /v1 or /v1/completions; several are replicas of one model,
        and share the requests.
    model: its name there.
    concurrency: requests that are under way at a time, of this process.
    retries: how often a request is sent again after a fault that may pass.
    timeout: seconds that the server may take for one request.
    length: tokens that fit into the model's context; None: what the server says.
    dialect: one of DIALECTS; None: found by asking.
    key: sent as a bearer token; it is kept nowhere.
    """

    urls: Sequence[str]
    model: str
    concurrency: int = 16
    retries: int = 8
    timeout: float = 600.0
    length: int | None = None
    dialect: str | None = None
    key: str = ""

    def __post_init__(self):
        if isinstance(self.urls, str) or not self.urls:
            raise ValueError(f"urls: expected a list of URLs, got {self.urls!r}")
        roots = [root_of(url) for url in self.urls]
        if len(set(roots)) < len(roots):
            raise ValueError(f"urls: expected different servers, got {', '.join(self.shown)}")
        check_whole("concurrency", self.concurrency, 1)
        check_whole("retries", self.retries, 0)
        if self.length is not None:
            check_whole("length", self.length, 3)
        if not math.isfinite(self.timeout) or self.timeout <= 0:
            raise ValueError(f"timeout: expected seconds > 0, got {self.timeout!r}")
        if self.dialect is not None and self.dialect not in DIALECTS:
            raise ValueError(
                f"dialect: expected one of {', '.join(DIALECTS)}, got {self.dialect!r}"
            )

    @property
    def roots(self) -> list[str]:
        """The URLs without /v1."""
        return [root_of(url) for url in self.urls]

    @property
    def shown(self) -> list[str]:
        """The same without user, password and query."""
        return [shown(root) for root in self.roots]


def root_of(url: str) -> str:
    """The address of a server without /v1, /v1/completions and a last slash.

    Raises:
        ValueError: what is no http or https URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"server: expected a URL such as http://HOST:8000/v1, got {shown(url)!r}")
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def shown(url: str) -> str:
    """A URL as messages and files may have it: without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_whole(name: str, value: int, least: int) -> None:
    """ValueError unless an option is a whole number that is not below least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
