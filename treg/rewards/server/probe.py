"""What is asked of a server before it is relied on.

A short text, in token ids, finds out which dialect the server speaks. The answer must have one
log-prob for each token. Then the token that the server finds likeliest to follow is sent at the end
of the text: its log-prob must be the one that the server gave when it made it. So a server whose
log-probs are shifted by a token is not taken for one whose are not.

The log-probs of the text are kept in the file. A run that goes on compares them, within what
roundings change: the same name may stand for another model by then.
"""

from typing import Any

from treg.data.fingerprints import PROBE
from treg.rewards.server.dialects import (
    BY_NAME,
    Dialect,
    NeverComes,
    WrongAnswer,
    logprobs_of,
)
from treg.rewards.server.http import Connection, Refused, ServerError

# nats between a token's log-prob when it is made and when it is a part of the prompt: roundings are
# below, a shift by one token gives several nats
SAME_TOKEN = 0.25
TRIES = 12  # made tokens that are looked at until one is known
DIGITS = 4  # of the log-probs that are kept


def probe_ids(tokenizer: Any) -> list[int]:
    """The text of the probe, without what a tokenizer puts around a text."""
    ids = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return [int(i) for i in ids]


def find_dialect(
    connection: Connection, server: int, model: str, ids: list[int], forced: str | None
) -> tuple[Dialect, list[float]]:
    """The dialect of a server, and its log-probs of ids[1:].

    Raises:
        ValueError: it speaks none, or not the one that is forced.
    """
    reasons = []
    for dialect in [BY_NAME[forced]] if forced else BY_NAME.values():
        try:
            answer = _asked(connection, server, dialect, model, ids[:1], ids[1:])
            found = logprobs_of(dialect, answer, ids[:1], ids[1:])
        except (Refused, ServerError, WrongAnswer, NeverComes) as error:
            said = error.said if isinstance(error, Refused) else str(error)
            reasons.append(f"{dialect.name}: {said}")
            continue
        return dialect, [round(x, DIGITS) for x in found.tolist()]
    raise ValueError(
        f"{connection.options.shown[server]}: expected a server that gives log-probs of the token "
        f"ids of a prompt, as vLLM and SGLang do, got, asked as {'; '.join(reasons)}"
    )


def check_places(
    connection: Connection,
    server: int,
    dialect: Dialect,
    model: str,
    ids: list[int],
    tokenizer: Any,
) -> None:
    """ValueError where the log-probs of a prompt are not those of its tokens, but of others.

    A token that the server makes is known by its id, or by a text that one token alone has. Where
    it is not known, what follows a shorter beginning of the probe is looked at.
    """
    where = connection.options.shown[server]
    by_text: dict[str, list[int]] = {}
    for length in range(len(ids), max(1, len(ids) - TRIES), -1):
        part = ids[:length]
        answer = _asked(connection, server, dialect, model, part[:-1], part[-1:])
        made = dialect.next(answer, part)
        if made.id is None and not by_text:
            for i in range(len(tokenizer)):
                by_text.setdefault(tokenizer.decode([i]), []).append(i)
        # a text that several tokens have names none of them
        named = by_text.get(made.text or "", []) if made.id is None else [made.id]
        token = named[0] if len(named) == 1 else None
        if token is None or made.logprob is None:
            continue
        again = _asked(connection, server, dialect, model, part, [token])
        found = logprobs_of(dialect, again, part, [token]).item()
        if abs(found - made.logprob) > SAME_TOKEN:
            raise ValueError(
                f"{where}: expected the log-prob {made.logprob:.3f} of token {token}, as when the "
                f"server made it, got {found:.3f} when it is the last of a prompt: the log-probs "
                "of a prompt are shifted, or not those of the model"
            )
        return
    raise ValueError(
        f"{where}: expected a server that says which token it makes, and its log-prob, got none: "
        "whether its log-probs are in their places cannot be checked"
    )


def _asked(
    connection: Connection,
    server: int,
    dialect: Dialect,
    model: str,
    context: list[int],
    completion: list[int],
) -> Any:
    path, body = dialect.request(model, context, completion)
    # a server that does not know the request may fail at it, each time
    return connection.post(server, path, body, retries=1)


def check_tokenizer(connection: Connection, server: int, model: str, tokenizer: Any) -> bool:
    """Whether the server has said how it tokenizes, which is then the same as here.

    Raises:
        ValueError: it gives other ids.
    """
    own = probe_ids(tokenizer)
    # the names that vLLM and SGLang, and llama.cpp, have for the same
    body = {
        **{"model": model, "prompt": PROBE, "add_special_tokens": False},
        **{"content": PROBE, "add_special": False},
    }
    try:
        answer = connection.post(server, "/tokenize", body, retries=1)
    except (Refused, ServerError):
        return False
    found = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(found, list) or not all(isinstance(x, int) for x in found):
        return False
    if found != own:
        raise ValueError(
            f"tokenizer: expected the one of the server {connection.options.shown[server]}, whose "
            f"ids of a text are {found[:8]}, got one whose are {own[:8]}; give its own as "
            "--tokenizer"
        )
    return True
