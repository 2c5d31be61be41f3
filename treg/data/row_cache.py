"""Rows that were encoded before, kept in a file.

A file belongs to one way of encoding: the tokenizer with its template, the options, this code and
the libraries under it. In it a row is found by the SHA-256 of what it says, so that rows that were
changed, moved or added since are told apart without a word about the file they come from. Rows that
could not be used are not kept: they are looked at again.

The file is an Arrow stream with its SHA-256 at the end. It takes its name when it is whole; what is
damaged or another's is named and made again.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treg.data.annotated import ID_COLUMNS
from treg.data.batches import SIDES
from treg.data.messages import text_of
from treg.data.pair import AnswerTokens, EncodeOptions, EncodeWork, Pair
from treg.data.rows import Preference
from treg.files import digest_of, file_digest, plain, remove_leftovers, replacing

log = logging.getLogger(__name__)

FORM = "1"
BATCH = 256  # rows that are written together
ENDING = ".rows"
LOCK = ".lock"
DIGEST = 64  # characters of a SHA-256
LIBRARIES = ("tokenizers", "transformers", "jinja2")
MASKS = tuple(f"{side}_{name}" for side in SIDES for name in ("scored", "content"))
SAID = tuple(f"{side}_said" for side in SIDES)


Encoded = tuple[Pair, list[str]]  # a pair, and the notes on it


class RowCache:
    """The encoded rows of a source.

    Used as a context: from reading the file until it is written, it is one process's, for which
    those of other runs wait; the others of its own run wait until it is written, and read. What was
    encoded is kept after an error as well. Without a file it finds and keeps nothing.

    A process waits for other runs only where none of its own wait for it in `EncodeWork.wait`, as
    collectives time out: it says that it has the turn in its run (`EncodeWork.run`), meets the
    others, and waits for other runs then; the others wait for the turn. Who has the turn takes one
    lock after it and waits for nobody of its own, so that no two wait for each other. Readers need
    no lock: the file takes its name when it is whole.

    Args:
        file: None: nothing is kept. key: what the rows in it were encoded with.
        work: whose turn it is to write. date: of the pairs.
    """

    def __init__(
        self,
        file: Path | None,
        key: Mapping[str, Any],
        work: EncodeWork,
        date: datetime.date | None = None,
    ):
        self.file = file
        self.date = date
        self.key = plain(key)
        self.work = work
        self.batches: list[Any] = []  # of the file that is there
        self.rows: dict[bytes, tuple[int, int]] = {}  # batch and place in it, by digest
        self.new: list[tuple[bytes, Encoded]] = []
        self.used: dict[int, set[int]] = {}  # places by batch
        self.read_to_end = False  # the source: rows that were not used are in it no more
        self.lock = contextlib.ExitStack()  # held
        self.writing = contextlib.ExitStack()
        self.temporary: Path | None = None
        self.sink: Any = None
        self.stream: Any = None

    def __enter__(self) -> "RowCache":
        if self.file is None:
            return self
        with contextlib.ExitStack() as stack:
            if self.work.first:
                stack.enter_context(self._turn())
                self.work.wait()
                stack.enter_context(_lock(self.file.with_suffix(LOCK), logging.WARNING))
                self._read()
                self.lock = stack.pop_all()  # until it is written
            else:
                self.work.wait()  # the first has the turn
                with self._turn():
                    pass
                self._read()
        return self

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One process of a run alone."""
        if self.work.run is None:
            yield
            return
        file = Path(str(self.file)).with_suffix(f".{self.work.run}{LOCK}")
        with _lock(file, logging.DEBUG):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # another of the run removed it
                    file.unlink()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self.lock, self._or_without():
            self._finish()
        # tracebacks of rows' problems may hold this, and would keep the file mapped
        self.batches, self.rows = [], {}

    def find(self, row: Preference, index: int) -> Encoded | None:
        """A row as it was encoded before."""
        place = self.rows.get(row_digest(row) or b"") if self.rows else None
        if place is None:
            return None
        number, i = place
        if self.work.first:
            self.used.setdefault(number, set()).add(i)
        batch = self.batches[number]
        found = {name: _copied(batch.column(name)[i]) for name in (*ID_COLUMNS, *MASKS)}
        answers = {}
        for side in SIDES:
            said = batch.column(f"{side}_said")[i].as_py()
            said = text_of(getattr(row, side)) if said is None else _decoded(said)
            answers[side] = AnswerTokens(found[f"{side}_scored"], found[f"{side}_content"], said)
        cut, notes = (batch.column(name)[i].as_py() for name in ("cut", "notes"))
        ids = (found[name] for name in ID_COLUMNS)
        pair = Pair(*ids, row=row, index=index, cut=tuple(cut), answers=answers, date=self.date)
        return pair, notes

    def add(self, found: Encoded) -> None:
        """Keep a row that was encoded now."""
        if self.file is None or not self.work.first:
            return
        digest = row_digest(found[0].row)
        if digest is not None:
            self.new.append((digest, found))
        if len(self.new) >= BATCH:
            with self._or_without():
                self._write_new()

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        """What cannot be written is not kept, and the work goes on."""
        try:
            yield
        except OSError as error:
            log.warning("%s: encoded rows are not kept: %s", self.file, error)
            with contextlib.suppress(OSError):
                self.writing.__exit__(type(error), error, None)
            self.file = self.stream = None

    def _write(self, batch: Any) -> None:
        import pyarrow as pa

        if self.stream is None:
            remove_leftovers(str(self.file))  # of processes that were killed
            self.temporary = self.writing.enter_context(replacing(str(self.file)))
            schema = batch.schema.with_metadata({"key": json.dumps(self.key)})
            self.sink = self.writing.enter_context(pa.OSFile(str(self.temporary), "wb"))
            self.stream = pa.ipc.new_stream(self.sink, schema)
        self.stream.write_batch(batch)

    def _write_new(self) -> None:
        if self.new:
            batch, self.new = _batch(self.new), []
            self._write(batch)

    def _finish(self) -> None:
        """The last rows, those of the file before that may be wanted again, and the checksum."""
        with self.writing:
            self._write_new()
            if self.stream is None:
                return
            for number, batch in enumerate(self.batches):
                if not self.read_to_end:
                    self._write(batch)
                elif places := self.used.get(number):
                    self._write(batch.take(sorted(places)))
            self.stream.close()
            self.sink.close()
            with open(str(self.temporary), "ab") as file:
                file.write(file_digest(str(self.temporary)).encode())

    def _read(self) -> None:
        file = Path(str(self.file))
        if not file.exists():
            return
        try:
            self.batches = _whole(file, self.key)
        except (OSError, ValueError) as error:
            log.warning("%s: the rows are encoded again: %s", file, error)
            return
        for number, batch in enumerate(self.batches):
            for i, digest in enumerate(batch.column("digest").to_pylist()):
                self.rows[digest] = (number, i)


def row_cache(
    work: EncodeWork, source: Any, split: str, tokenizer: Any, options: EncodeOptions
) -> RowCache:
    """The cache of a source, of which only a path or a name on the hub says what it is; a tokenizer
    that is not fast does not say all that it does.
    """
    named = isinstance(source, (str, Path))
    if work.cache is None or not named or not getattr(tokenizer, "is_fast", False):
        return RowCache(None, {}, work)
    said = dataclasses.asdict(options)
    del said["columns"]  # a row is found by what it says, whatever its columns are called
    path = Path(source)
    key = {
        "form": FORM,
        "code": _code_digest(),
        "tokenizer": _state_digest(tokenizer),
        "options": said,
        "source": [str(path.resolve() if path.exists() else source), split],
    }
    key = plain(key)
    folder = Path(work.cache)
    return RowCache(folder / f"{digest_of(key)[:16]}{ENDING}", key, work, options.day)


def row_digest(row: Preference) -> bytes | None:
    """SHA-256 of what is encoded of a row; None for what JSON cannot hold."""
    said = [row.prompt, row.chosen, row.rejected, row.tools, row.template_kwargs]
    try:
        return hashlib.sha256(json.dumps(said).encode()).digest()
    except (TypeError, ValueError, RecursionError):
        return None


@functools.cache
def _code_digest() -> str:
    """Of what encodes: the code of this folder, and the libraries that it calls."""
    code = {x.name: file_digest(x) for x in Path(__file__).parent.glob("*.py")}
    return digest_of([code, {x: importlib.metadata.version(x) for x in LIBRARIES}])


def _state_digest(tokenizer: Any) -> str:
    """Of all that a fast tokenizer is but its truncation and padding, which say how it was called
    last and come before its added tokens.
    """
    state = tokenizer.backend_tokenizer.to_str().split('"added_tokens"', 1)[-1]
    state = hashlib.sha256(state.encode()).hexdigest()
    special = plain(dict(tokenizer.special_tokens_map))
    split = tokenizer.split_special_tokens  # which the state does not say
    return digest_of([type(tokenizer).__name__, state, special, tokenizer.chat_template, split])


def _batch(kept: Sequence[tuple[bytes, Encoded]]) -> Any:
    """Rows of the file. What an answer says is null where that is its text."""
    import pyarrow as pa

    pairs = [pair for _, (pair, _) in kept]
    columns = {"digest": pa.array([digest for digest, _ in kept], pa.binary(32))}
    for name in ID_COLUMNS:
        columns[name] = _lists([getattr(x, name) for x in pairs], pa.int32())
    for side in SIDES:
        answers = [x.answers[side] for x in pairs]
        columns[f"{side}_scored"] = _lists([x.scored for x in answers], pa.bool_())
        columns[f"{side}_content"] = _lists([x.content for x in answers], pa.bool_())
        texts = [text_of(getattr(x.row, side)) for x in pairs]
        both = zip(answers, texts, strict=True)
        said = [None if x.said == text else _encoded(x.said) for x, text in both]
        columns[f"{side}_said"] = pa.array(said, pa.binary())
    names = pa.list_(pa.string())
    columns["cut"] = pa.array([list(x.cut) for x in pairs], names)
    columns["notes"] = pa.array([notes for _, (_, notes) in kept], names)
    return pa.RecordBatch.from_pydict(columns)


def _encoded(text: str) -> bytes:
    """A text that may hold halves of characters."""
    return text.encode("utf-8", "surrogatepass")


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")


def _lists(values: Sequence[np.ndarray], kind: Any) -> Any:
    import pyarrow as pa

    offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), kind))


def _copied(row: Any) -> np.ndarray:
    """A row's list of a column, which does not keep the file mapped."""
    return row.values.to_numpy(zero_copy_only=False, writable=True)


def _whole(file: Path, key: Mapping[str, Any]) -> Any:
    """The batches in a file, which is mapped into memory while they live. ValueError: it is
    damaged, or of another key.
    """
    import pyarrow as pa

    with pa.memory_map(str(file)) as opened:
        content = memoryview(opened.read_buffer())
    content, said = content[:-DIGEST], bytes(content[-DIGEST:])
    if hashlib.sha256(content).hexdigest().encode() != said:
        raise ValueError("expected the content that was written, got another; it is damaged")
    try:
        stream = pa.ipc.open_stream(pa.py_buffer(content))
        found = _key_of(stream)
        batches = list(stream)
    except pa.ArrowException as error:
        raise ValueError(f"expected an Arrow stream, got: {error}") from error
    if found != key:
        raise ValueError("expected rows that were encoded as they are now, got others")
    return batches


def _key_of(stream: Any) -> Any:
    return json.loads((stream.schema.metadata or {}).get(b"key", b"null"))


@contextlib.contextmanager
def _lock(file: Path, level: int) -> Iterator[None]:
    """A lock for this process alone, once others are done with it; freed with the process, however
    it ends. Where files cannot be locked, each process works for itself.

    level: of the word that it waits.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = stack.enter_context(open(file, "w"))
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.log(level, "%s: waiting for another process that encodes these rows", file)
                fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s: expected to lock it, got: %s", file, error)
        yield


def remove_row_cache(folder: Path) -> None:
    """Remove the files of caches in a folder, and the folder if it holds nothing else."""
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        if file.suffix in (ENDING, LOCK):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # files of somebody else
        folder.rmdir()


def remove_old_rows(folder: Path) -> None:
    """Remove the files of a folder that other versions of this code and its libraries wrote, which
    this one never reads.
    """
    import pyarrow as pa

    for file in folder.glob(f"*{ENDING}"):
        # one that is damaged is made again by who reads it
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            with pa.memory_map(str(file)) as opened:
                key = _key_of(pa.ipc.open_stream(opened))
            if isinstance(key, dict) and key.get("code") not in (None, _code_digest()):
                file.unlink()
                file.with_suffix(LOCK).unlink(missing_ok=True)
