"""A model that a server has, in the place of one that runs here."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treg.data import RowProblem, common_prefix
from treg.data.served import SAME_MODEL, distance
from treg.rewards.engines import Engine
from treg.rewards.server.dialects import NeverComes, WrongAnswer, logprobs_of
from treg.rewards.server.http import Connection, Refused, ServerError
from treg.rewards.server.options import ServerOptions
from treg.rewards.server.probe import (
    check_places,
    check_tokenizer,
    find_dialect,
    probe_ids,
)

log = logging.getLogger(__name__)

OF_THE_ROW = (400, 413, 422)  # states of HTTP that are about what was sent
# a sequence counts without its last token, as in a model that runs here; the server needs room for
# that one, and for the token that it makes
NOT_COUNTED = 2
REFUSED = "refused by the server"
UNKNOWN = 2**31  # positions, where the server does not say how many there are
PART_TOKENS = 100_000  # of pairs, in a part: about a minute of a large model on several GPUs


class NotHere(AttributeError, ValueError):
    """What only a model that runs here has."""


class ServedModel(Engine):
    """A model that one server has, or several, asked once what it is.

    Args:
        options: where it is. tokenizer: its own, from here.
        device: where the models of a source that run beside it go.
        connection: how requests are sent; for tests.
    Raises:
        ValueError: no such model there; log-probs that cannot be relied on; another tokenizer;
            servers that have different models.
        ServerError: a server that cannot be reached.
    """

    part_tokens = PART_TOKENS

    def __init__(
        self,
        options: ServerOptions,
        tokenizer: Any,
        *,
        device: torch.device | None = None,
        connection: Connection | None = None,
    ):
        self.options = options
        self.name = options.model
        self.device = device or torch.device("cpu")
        self.connection = connection or Connection(options)
        self.probe = probe_ids(tokenizer)
        try:
            self._ask(tokenizer)
        except BaseException:
            self.close()
            raise

    def _ask(self, tokenizer: Any) -> None:
        """Find out what the servers are."""
        options = self.options
        servers = range(len(options.urls))
        lengths = [self._length(i) for i in servers]
        found = [
            find_dialect(self.connection, i, self.name, self.probe, options.dialect)
            for i in servers
        ]
        self.dialects = [dialect for dialect, _ in found]
        self.probe_logprobs = found[0][1]
        for i, (dialect, logprobs) in enumerate(found):
            apart = distance(self.probe_logprobs, logprobs)
            if apart > SAME_MODEL:
                raise ValueError(
                    f"server: expected replicas of one model, got {options.shown[i]}, whose "
                    f"log-probs of a text differ from those of {options.shown[0]} by {apart:.3g} "
                    "nats a token"
                )
            check_places(self.connection, i, dialect, self.name, self.probe, tokenizer)
        checked = [check_tokenizer(self.connection, i, self.name, tokenizer) for i in servers]
        if not all(checked):
            log.warning(
                "%s does not say how it tokenizes: that the tokenizer here is the model's own "
                "cannot be checked",
                options.shown[checked.index(False)],
            )
        length = options.length or min(lengths)
        self.length = None if length >= UNKNOWN else length
        self.longest = UNKNOWN if self.length is None else self.length - NOT_COUNTED
        self.version = self._version()

    def __getattr__(self, name: str) -> Any:
        raise NotHere(
            f"{name}: expected a model that runs here, got {self.__dict__.get('name')!r}, which a "
            "server has; run without --server, with its folder as --model"
        )

    def scorer(self, on_tokens: Callable[[int], None]) -> "ServedScorer":
        return ServedScorer(self, on_tokens=on_tokens)

    def said(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "url": self.options.shown,
            "dialect": self.dialects[0].name,
            "version": self.version,
            "length": self.length,
            "probe": {"ids": self.probe, "logprobs": self.probe_logprobs},
        }

    def close(self) -> None:
        """Give the connections back."""
        self.connection.close()

    def _length(self, server: int) -> int:
        """Tokens that the context of the model holds, by what the server says of it.

        Raises:
            ValueError: the server has other models.
        """
        entries = (self._asked(server, "/v1/models") or {}).get("data")
        if not isinstance(entries, list):
            return UNKNOWN
        known = {x.get("id"): x for x in entries if isinstance(x, dict)}
        if self.name not in known:
            raise ValueError(
                f"model: expected one that {self.options.shown[server]} has "
                f"({', '.join(map(str, known)) or 'none'}), got {self.name!r}"
            )
        entry = known[self.name]
        props = self._asked(server, "/props") or {}  # of llama.cpp
        said = [
            entry.get("max_model_len"),
            (entry.get("meta") or {}).get("n_ctx_train"),
            (props.get("default_generation_settings") or {}).get("n_ctx"),
        ]
        return min([x for x in said if isinstance(x, int) and x > 0], default=UNKNOWN)

    def _version(self) -> str | None:
        """By what the first server says."""
        for path, name in (("/version", "version"), ("/get_server_info", "version")):
            found = (self._asked(0, path) or {}).get(name)
            if isinstance(found, str):
                return found
        return None

    def _asked(self, server: int, path: str) -> dict[str, Any] | None:
        """What a path gives, where the server has it."""
        try:
            found = self.connection.get(server, path)
        except (Refused, ServerError) as error:
            if isinstance(error, ServerError) and path == "/v1/models":
                raise
            return None
        return found if isinstance(found, dict) else None


class ServedScorer:
    """Log-probs of completions after contexts, by a model that a server has.

    Args:
        on_tokens: is told how many tokens each request had.
    """

    def __init__(self, model: ServedModel, *, on_tokens: Callable[[int], None]):
        self.model = model
        self.longest = model.longest
        self.on_tokens = on_tokens

    def score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Log-probs [tokens of the completion] float32, nats, on the CPU, of each completion after
        its context.

        rows: (ids of the context, at least one; ids of the completion).
        Raises:
            RowProblem: a row that the server does not take; which one, it does not say.
            ValueError: an answer that is not one log-prob for each token of a row.
            ServerError: a server that does not answer.
        """
        rows = list(rows)
        # rows that begin alike follow one another: engines keep what they computed last
        order = sorted(range(len(rows)), key=lambda i: rows[i])
        servers = _shared_out([rows[i] for i in order], len(self.model.options.urls))
        requests = []
        for i, server in zip(order, servers, strict=True):
            path, body = self.model.dialects[server].request(self.model.name, *rows[i])
            requests.append((server, path, body))

        def done(number: int) -> None:
            context, completion = rows[order[number]]
            self.on_tokens(len(context) + len(completion) - 1)

        answers = self.model.connection.post_all(requests, done)
        found: list[Any] = [None] * len(rows)
        for i, server, answer in zip(order, servers, answers, strict=True):
            found[i] = self._read(server, answer, *rows[i])
        return found

    def statistics(
        self, rows: Sequence[tuple[list[int], list[int]]], outputs: Sequence[str] = ()
    ) -> list[dict[str, Tensor]]:
        """The log-probs of `score` by the name "logprobs".

        outputs: must be empty: a server gives nothing else.
        """
        if outputs:
            raise ValueError(
                f"outputs: expected none of a served model, got {', '.join(outputs)}; run without "
                "--server"
            )
        return [{"logprobs": logprobs} for logprobs in self.score(rows)]

    def _read(self, server: int, answer: Any, context: list[int], completion: list[int]) -> Tensor:
        """The log-probs of an answer."""
        where = self.model.options.shown[server]
        size = f"{len(context) + len(completion)} tokens"
        if isinstance(answer, Refused):
            if answer.status in OF_THE_ROW:
                raise RowProblem(REFUSED, f"{size}: {answer.said}", "")
            raise ServerError(str(answer))
        try:
            return logprobs_of(self.model.dialects[server], answer, context, completion)
        except NeverComes as error:
            raise RowProblem(REFUSED, f"{size}: {error}", "") from error
        except WrongAnswer as error:
            raise ValueError(f"{where}: {size} were sent: {error}") from error


def _shared_out(rows: Sequence[tuple[list[int], list[int]]], servers: int) -> list[int]:
    """The server of each row: in turn, but a row goes where the one before it went if half of its
    context at least begins alike.
    """
    found: list[int] = []
    for i, (context, _) in enumerate(rows):
        before = rows[i - 1][0] if i else []
        alike = i > 0 and 2 * common_prefix(before, context) >= len(context)
        turn = 0 if not found else found[-1] + (not alike)
        found.append(turn)
    return [turn % servers for turn in found]
