"""Several sources of pairs as one: what of each goes into an epoch, by weights.

The weight w > 0 of a source of n usable rows says how many times they go into an epoch:

    T = floor(w n + 1/2)

rows of it in all. Each of the n is there T // n times, and T mod n of them, a sample without
replacement, once more. So 1 is every row once, 2 each twice, 0.5 half of the rows, 2.5 each twice
and half of them a third time. w counts as the decimal number that it is written as.

The sample depends on the seed, the weight and the token ids of the rows of that source alone: it is
the same in every epoch, process and start, whatever other sources there are. A row's place in it
is the SHA-256 of the seed, of its ids, and of how many rows with these ids come before it; the
lowest are taken. So a lower weight takes a part of what a higher one takes, and a row that is added
to a source or taken out changes the choice among the others by one row at most.

Rows are in the order of the sources: of each source every row once, as it has them, as many times
as all are there, and then those of the sample. Trainers shuffle them.

Differs: interleaving by probabilities (`datasets.interleave_datasets`) draws rows from all sources
until the first or the last of them is exhausted, so that the length of an epoch, and how often a
row is seen, follow from all sources together; here a source has T of the rows of an epoch, whatever
the others are. TRL's `fraction` is a share of the mixture, and takes the first rows of a source.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from treg.data.annotated import first_difference
from treg.data.batches import BATCH_STREAMS, LOSS_STREAMS
from treg.data.columns import (
    ID_COLUMNS,
    REF_COLUMNS,
    REF_TOKEN_COLUMNS,
    stream_columns,
)
from treg.data.encode import load_pairs
from treg.data.pair import EncodeOptions, Pair
from treg.data.reading import check_path
from treg.data.report import Report, RowProblem
from treg.data.tables import are_paths, source_name

MOST = 1000  # times that a row is taken: more is a slip of the pen that fills the memory
ENCODED = {"turns": "--turns", "chat": "--plain_text", "date": "--date"}  # of which option
PLANNED = ("source", "shaping")  # of a stream, known before it is made
UNNAMED = "contrastive"  # the source of files that name none
# settings of a file that say nothing of how its token rewards were made
OF_THE_FILE = (
    *("encode", "tokens_per_batch", "per_token", "share_prefix", "reference", "dtype", "autocast"),
    "keep_columns",
)
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Share:
    """What of a source goes into an epoch: taken, counting copies, of rows usable ones."""

    name: str
    rows: int
    weight: float
    taken: int

    def __str__(self) -> str:
        return f"{self.name}: {self.rows} rows, weight {self.weight:g}: {self.taken} an epoch"


@dataclass(frozen=True)
class Mixture:
    """Several sources of pairs with weights, as one data set of a trainer.

    Args:
        sources: each as a trainer takes one alone: the path of an annotated file, examples, rows.
        weights: a number in (0, 1000] for each; (): 1 for each.
        seed: of the rows that are taken of a source whose weight is no whole number.
        names: what messages call the sources; (): their paths.
        mixed_annotations: whether annotated files may have been made in different ways: from other
            sources of token rewards, with other settings, shaping, turns or dates.
    Raises:
        ValueError: no source, a path twice or within another, another number of weights or names
            than of sources, a weight that is no number in (0, 1000], a seed that is no integer.
    """

    sources: tuple[Any, ...]
    weights: tuple[float, ...] = ()
    seed: int = 0
    names: tuple[str, ...] = ()
    mixed_annotations: bool = False

    def __post_init__(self):
        for name in ("sources", "weights", "names"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"{name}: expected a list or a tuple, got {getattr(self, name)!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        sources = tuple(self.sources)
        check_sources("data", [x for x in sources if isinstance(x, (str, Path))], some=False)
        if not sources:
            raise ValueError("data: expected a source, got none")
        names = tuple(self.names or map(source_name, sources))
        if len(names) != len(sources):
            raise ValueError(f"names: expected one for each of {len(sources)} sources, got {names}")
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "names", names)
        weights = checked_weights(tuple(self.weights) or None, names)
        object.__setattr__(self, "weights", weights)

    def mixed(self, sets: Sequence[Rows]) -> tuple[list[Mapping[str, Any]], list[Share]]:
        """The rows of an epoch, of each source's own rows; and how many they are of each.

        Raises:
            ValueError: a weight at which no row of its source is taken.
        """
        found, shares = [], []
        for name, weight, rows in zip(self.names, self.weights, sets, strict=True):
            if not rows:
                raise ValueError(f"data: expected at least one pair in {name}, found none")
            taken = taken_rows(rows, weight, self.seed)
            if not taken:
                raise ValueError(
                    f"data_weights: expected one that takes a row of the {len(rows)} of {name}, "
                    f"got {weight:g}, which takes none; {1 / len(rows):.4g} takes one"
                )
            found += [rows[i] for i in taken]
            shares.append(Share(name, len(rows), weight, len(taken)))
        return found, shares


def mixture_of(source: Any) -> Mixture | None:
    """A source as a mixture: that itself, or paths in a list, each with the weight 1; None: it is
    one source.
    """
    if isinstance(source, Mixture):
        return source
    return Mixture(tuple(source)) if are_paths(source) else None


def sources_of(given: Any) -> list[Any]:
    """The sources of a mixture, or the paths in a list; anything else as a list of one."""
    mixture = mixture_of(given)
    return [given] if mixture is None else list(mixture.sources)


def check_sources(name: str, paths: Sequence[str | Path], *, some: bool = True) -> None:
    """ValueError for paths that are empty, and for one that is there twice.

    some: whether there must be one.
    """
    if some and not paths:
        raise ValueError(f"{name}: expected a file, a folder or a hub name, got none")
    known: dict[Path, str | Path] = {}
    for path in paths:
        if not isinstance(path, (str, Path)) or not str(path).strip():
            raise ValueError(f"{name}: expected a file, a folder or a hub name, got {path!r}")
        resolved = Path(path).resolve()
        if resolved in known:
            raise ValueError(
                f"{name}: expected each source once, got {path} twice; data_weights says how many "
                "times its rows are taken"
            )
        known[resolved] = path
    for resolved, path in known.items():
        for folder in resolved.parents:
            if folder in known:
                raise ValueError(
                    f"{name}: expected each source once, got {path} and {known[folder]}, in which "
                    "it lies"
                )


def check_there(paths: Iterable[str | Path]) -> None:
    """ValueError or FileNotFoundError for a path that cannot be read, before another one is."""
    for path in paths:
        check_path(path)


def checked_weights(given: Sequence[Any] | None, names: Sequence[str]) -> tuple[float, ...]:
    """The weights of sources with these names; 1 for each if none are given.

    Raises:
        ValueError: another number of them; one that is no number in (0, MOST].
    """
    if given is None:
        return (1.0,) * len(names)
    if len(given) != len(names):
        raise ValueError(
            f"data_weights: expected {len(names)}, one for each of {', '.join(names)}, got "
            f"{len(given)}: {' '.join(map(str, given))}"
        )
    for name, weight in zip(names, given, strict=True):
        number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
        if not number or not 0 < weight <= MOST:
            raise ValueError(
                f"data_weights: expected a number above 0 and at most {MOST} for {name}, got "
                f"{weight!r}; leave out what is not to be trained on"
            )
    return tuple(map(float, given))


def taken_rows(rows: Rows, weight: float, seed: int) -> list[int]:
    """The places of the rows that a weight takes into an epoch, each as often as it is there (see
    the head of this file).
    """
    count = len(rows)
    total = math.floor(Fraction(repr(float(weight))) * count + Fraction(1, 2))
    whole, more = divmod(total, count)
    return [*range(count)] * whole + (_sample(rows, more, seed) if more else [])


def _sample(rows: Rows, count: int, seed: int) -> list[int]:
    """So many places of rows, in their order."""
    before: Counter[bytes] = Counter()
    keys = []
    for place, row in enumerate(rows):
        digest = hashlib.sha256()
        for name in ID_COLUMNS:
            ids = np.asarray(row[name], dtype="<i8")
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        content = digest.digest()
        key = hashlib.sha256(f"{seed} {before[content]} {content.hex()}".encode()).digest()
        keys.append((key, place))
        before[content] += 1
    return sorted(place for _, place in sorted(keys)[:count])


def check_alike(
    names: Sequence[str],
    sets: Sequence[Rows],
    metas: Sequence[Mapping[str, Any]],
    *,
    made: bool = True,
) -> None:
    """ValueError unless all sources have the columns that a batch takes of the first, and were
    annotated as it was (see `check_made_alike`).

    Masks of scored tokens may be missing: where they are, every token is scored.

    metas: what each file says of itself; {} where it is no annotated file. made: whether it counts
        how they were annotated.
    """
    streams = [stream_columns(stream) for stream in BATCH_STREAMS]
    for group in (*streams, REF_COLUMNS, REF_TOKEN_COLUMNS):
        for name, rows in zip(names, sets, strict=True):
            wanted, got = ([x for x in group if x in of[0]] for of in (sets[0], rows))
            if got != wanted:
                raise ValueError(
                    f"{name}: expected {', '.join(wanted) or 'no ' + group[0]}, as in {names[0]}, "
                    f"got {', '.join(got) or 'none'}; `treg annotate` all of them with the same "
                    "options"
                )
    described = [x for x in zip(names, metas, strict=True) if x[1]]
    for name, meta in described[1:] if made else ():
        check_made_alike(*described[0], name, meta)


def check_made_alike(
    first: str,
    wanted: Mapping[str, Any],
    name: str,
    meta: Mapping[str, Any],
    *,
    settings: bool = True,
) -> None:
    """ValueError unless the rows of two files became ids in one way (turns, chat, date), and the
    streams that a loss takes were made in one way (source, settings, shaping).

    wanted, meta: what the files first and name say of themselves. settings: whether those of the
        sources count, which a file that is not made yet does not say.
    """
    found = first_difference(_made(wanted, settings), _made(meta, settings))
    if found is None:
        return
    key, a, b = found
    option = ENCODED.get(key.removeprefix("encode."))
    fix = "annotate both alike" if option is None else f"annotate both with the same {option}"
    raise ValueError(
        f"{name}: expected pairs that were annotated as those of {first}, with {key} {a!r}, got "
        f"{b!r}; {fix}, or set mixed_annotations where they are meant to differ"
    )


def _made(meta: Mapping[str, Any], with_settings: bool) -> dict[str, Any]:
    """How a file was made: what of its description counts beside another one's."""
    settings = meta.get("settings", {})
    # what a file does not say is the default
    default = asdict(EncodeOptions())
    encode = {x: settings.get("encode", {}).get(x, default[x]) for x in ENCODED}
    # of the default source, whose settings are among the file's
    own = {k: x for k, x in settings.items() if k not in OF_THE_FILE}
    unnamed = {"token_rewards": {"source": UNNAMED, "settings": own, "shaping": []}}
    given = meta.get("streams", unnamed)
    streams = {x: {"shaping": []} | _of_the_mix(given[x]) for x in LOSS_STREAMS if x in given}
    if not with_settings:
        streams = {x: {k: y[k] for k in PLANNED if k in y} for x, y in streams.items()}
    return {"encode": encode, "streams": streams}


def _of_the_mix(stream: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a stream; of a weighted sum of others only the sources that are in it,
    not those whose streams stand beside it, as marks do.
    """
    settings = stream.get("settings")
    if not isinstance(settings, Mapping) or not isinstance(settings.get("mix"), Mapping):
        return dict(stream)
    summed = {k: x for k, x in settings.get("sources", {}).items() if k in settings["mix"]}
    return {**stream, "settings": {**settings, "sources": summed}}


def load_sources(
    source: Any,
    tokenizer: Any,
    options: EncodeOptions,
    *,
    on_rows: Callable[[int], Any] = lambda rows: None,
    **more: Any,
) -> tuple[list[Pair], Report]:
    """What `load_pairs` gives of a source; of several paths in a list, the pairs of one after the
    other.

    Of several, a pair's index counts the rows of all, and its `where` begins with its path.
    limit: of each.

    Args:
        on_rows, more: of `load_pairs`.
    Raises:
        ValueError: as `load_pairs`, for each of them; a path twice.
    """
    if not are_paths(source) or len(source) == 1:
        (one,) = sources_of(source)
        return load_pairs(one, tokenizer, options, on_rows=on_rows, **more)
    check_sources("data", source)
    check_there(source)
    report = Report(bool(more.get("strict")))
    pairs = []
    for path in (str(Path(x)) for x in source):
        try:
            found, said = load_pairs(path, tokenizer, options, on_rows=on_rows, **more)
        except RowProblem as problem:
            where = _where(problem.where, path)
            raise RowProblem(problem.reason, problem.detail, where) from None
        except ValueError as error:
            said = str(error)
            raise ValueError(said if path in said else f"{path}: {said}") from None
        for pair in found:
            row = replace(pair.row, where=_where(pair.row.where, path))
            pairs.append(replace(pair, row=row, index=pair.index + report.seen))
        said.sources = {path: [said.seen, said.kept]}
        for examples in (*said.examples.values(), *said.noted_examples.values()):
            examples[:] = [_where(x, path) for x in examples]
        report.add(said)
    return pairs, report


def _where(text: str, path: str) -> str:
    """Where a row is, with the path of its source, which saved data sets do not name."""
    return text if text.startswith((f"{path}:", f"{path}/", f"{path}[")) else f"{path}:{text}"


def mixed_lines(shares: Sequence[Share]) -> list[str]:
    """How many rows of each source go into an epoch, a line each; [] for all of a single one."""
    if len(shares) == 1 and shares[0].weight == 1:
        return []
    total = sum(x.taken for x in shares)
    return [f"{total} pairs an epoch:", *(f"  {x}" for x in shares)]
