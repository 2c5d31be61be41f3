"""Preference files, folders and datasets, read row by row.

Rows come from files (.jsonl, .ndjson, .json, .parquet; .jsonl and .json also as .gz), from a
folder of these or of `datasets.save_to_disk`, from a dataset object, a pandas frame, a list of
dicts, or a name on the hub. What a row is, `treg.data.rows` says.

Arrow, in which parquet files and datasets are kept, gives every object of a column the keys of all:
those that are null are left out. In JSON and in Python's objects a null is what somebody wrote, and
stays.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from treg.data.report import RowProblem

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_BATCH = 256  # rows that are held in memory at once
LONGEST_LINE = 64 * 2**20  # bytes of one row
# names of the splits of a folder's files, as `datasets` has them
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
NOT_DATA = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")
Located = tuple[str, dict | RowProblem]  # where a row is, and the row or why it cannot be read


def read_rows(source: Any, split: str = "train") -> Iterator[Located]:
    """Every row of a source together with where it is: "file:line", "file:row i" or "row i".

    A row that cannot be read comes as the RowProblem that says why.

    Args:
        source: a path, a hub name, a `datasets` dataset (or dict of them), a pandas frame, or an
            iterable of dicts.
        split: of a hub name, a saved dataset dict, a dict of datasets, or a folder whose files are
            named after splits.
    Raises:
        ValueError, FileNotFoundError, TypeError: the source as a whole cannot be read.
    """
    if isinstance(source, (str, Path)):
        return _read_path(source, split)
    if isinstance(source, dict):
        if split not in source:
            raise ValueError(f"split: expected one of {sorted(source)}, got {split!r}")
        source = source[split]
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas frame
        import pyarrow as pa

        batches = pa.Table.from_pandas(source, preserve_index=False).to_batches(PARQUET_BATCH)
        return _located((row for batch in batches for row in _rows_of_batch(batch)), "row ")
    if hasattr(source, "with_format"):  # of `datasets`: rows as Python's objects
        plain = (without_nulls(dict(row)) for row in source.with_format(None))
        return _located(plain, "row ")
    if not isinstance(source, Iterable):
        raise TypeError(
            f"data: expected a path, a dataset or an iterable of rows, got {type(source).__name__}"
        )
    return _located(source, "row ")


def _read_path(source: str | Path, split: str) -> Iterator[Located]:
    """The rows of a folder, of a file, or of a dataset on the hub."""
    path, name = Path(source), str(source)
    check_path(source)
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        return _read_file(path)
    import datasets

    rows = (without_nulls(row) for row in datasets.load_dataset(name, split=split))
    return _located(rows, f"{name}[{split}]:")


def check_path(source: str | Path) -> None:
    """ValueError or FileNotFoundError for what is neither a file nor a folder nor may be a name on
    the hub.
    """
    path, name = Path(source), str(source)
    if not name.strip():
        raise ValueError(f"data: expected a path or a name, got {name!r}")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"data: expected a file or a folder, got {name}, which is neither")
    if not path.exists() and not _may_be_on_the_hub(name):
        raise FileNotFoundError(f"data: no such file: {name}")


def without_nulls(row: Any) -> dict:
    """A row of Arrow without the keys, within its columns, that are null."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _may_be_on_the_hub(name: str) -> bool:
    """Whether a name has the form "owner/dataset" and cannot be meant as a file."""
    is_local = name.endswith(SUFFIXES) or name.startswith((".", "/", "~"))
    return name.count("/") == 1 and not is_local


def _read_folder(path: Path, split: str) -> Iterator[Located]:
    """The rows of a saved dataset, or of the data files of a split in a folder, in the order of
    names.
    """
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets

        yield from read_rows(datasets.load_from_disk(str(path)), split)
        return
    for file in _files_of_split(path, split):
        yield from _read_file(file)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to a split; where no file is named after one, all are
    of the split "train".

    Raises:
        ValueError: there are none, or some are named after a split and others are not.
    """
    hidden = (".", "_")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.name.endswith(SUFFIXES)
        and file.name not in NOT_DATA
        and not file.name.startswith(hidden)
    )
    for file in files:
        if not file.is_file():
            raise ValueError(f"data: expected a regular file, got {file}; move it away")
    if not files:
        raise ValueError(
            f"data: expected files ending in {', '.join(SUFFIXES)} in {folder}, found none"
        )
    exact = [file for file in files if _stem(file) == split]
    if exact:
        return exact
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.name), []).append(file)
    unnamed, named = by_split.pop("", []), bool(by_split)
    if not by_split:
        by_split, unnamed = {"train": unnamed}, []
    wanted = next((x for x, names in SPLITS.items() if split in names), split)
    chosen = by_split.get(wanted, [])
    families = len({_stem(file) for file in chosen}) if named else 1
    if unnamed or not chosen or families > 1:
        there = "; ".join(f"{x}: {', '.join(y.name for y in by_split[x])}" for x in by_split)
        if unnamed:
            there += f"; of no split: {', '.join(x.name for x in unnamed)}"
        raise ValueError(
            f"split: expected one that {folder} has, got {split!r}; there are {there}; give the "
            "name of one, the beginning of its files' names, or the file itself"
        )
    return chosen


def _stem(file: Path) -> str:
    """The name of a file without its ending and the number of a shard."""
    suffix = next(x for x in sorted(SUFFIXES, key=len, reverse=True) if file.name.endswith(x))
    return re.sub(r"[-_.]\d+([-_]of[-_]\d+)?$", "", file.name.removesuffix(suffix))


def _split_of(name: str) -> str:
    """The split after which a file is named: a word of its name, as in "data-train-0001"."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, names in SPLITS.items() if words & set(names)), "")


def _read_file(path: Path) -> Iterator[Located]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if name.endswith(".json"):
        return _read_json(path)
    if name.endswith((".jsonl", ".ndjson")):
        return _read_json_lines(path)
    raise ValueError(f"data: expected a file ending in {', '.join(SUFFIXES)}, got {path}")


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for i, row in enumerate(_rows_of_parquet(file)):
                where = f"{path}:row {i}"
                if isinstance(row, RowProblem):
                    row = RowProblem(row.reason, row.detail, where)
                yield where, row
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise ValueError(f"{path}: expected a parquet file, got: {error}") from error


def _rows_of_parquet(file: Any) -> Iterator[dict | RowProblem]:
    for batch in file.iter_batches(batch_size=PARQUET_BATCH):
        yield from _rows_of_batch(batch)


def _rows_of_batch(batch: Any) -> list[dict | RowProblem]:
    """The rows of an Arrow batch. A row whose text is not UTF-8 is a problem."""
    try:
        return [without_nulls(row) for row in batch.to_pylist()]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowProblem("broken text", str(error))]
    # one row is broken: read them one at a time to find out which
    rows = []
    for i in range(batch.num_rows):
        rows += _rows_of_batch(batch.slice(i, 1))
    return rows


def _read_json(path: Path) -> Iterator[Located]:
    try:
        with _open(path) as file:
            text = file.read().removeprefix(BYTE_ORDER_MARK)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    try:
        rows = parse_json(text)
    except ValueError as error:
        if text.lstrip().startswith(b"["):
            raise ValueError(f"{path}: broken JSON: {error}") from error
        yield from _read_json_lines(path)  # JSON lines under the name .json are common
        return
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    yield from _located(rows, f"{path}:row ")


def _read_json_lines(path: Path) -> Iterator[Located]:
    """A row a line. What is wrong with one line does not stop the others; broken gzip does."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(_lines(file), 1):
                where = f"{path}:{number}"
                if line is None:
                    detail = f"a line of more than {LONGEST_LINE} bytes"
                    yield where, RowProblem("row too long", detail, where)
                    continue
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield where, _row_of_line(line, where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        where = f"{path}:{number + 1}"
        yield where, RowProblem("broken gzip", str(error), where)


def _lines(file: io.BufferedIOBase) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long to be a row, which is passed over."""
    while line := file.readline(LONGEST_LINE):
        if len(line) < LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield None


def _row_of_line(line: bytes, where: str) -> dict | RowProblem:
    try:
        row = parse_json(line)
    except ValueError as error:
        return RowProblem("broken JSON", str(error), where)
    return _row_or_problem(row, where)


def _located(rows: Iterable, prefix: str) -> Iterator[Located]:
    """Rows that are numbered from 0."""
    for i, row in enumerate(rows):
        where = f"{prefix}{i}"
        yield where, _row_or_problem(row, where)


def _row_or_problem(row: Any, where: str) -> dict | RowProblem:
    if isinstance(row, dict):
        return row
    if isinstance(row, RowProblem):
        return RowProblem(row.reason, row.detail, where)
    found = type(row).__name__
    return RowProblem("not an object", f"expected an object with columns, got {found}", where)


def _open(path: Path) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    return open(path, "rb")


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with a ValueError for what is nested too deeply as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(name: str, given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Options by name, or the same as JSON; empty for None and "". ValueError: anything else."""
    if given is None or given == "":
        return {}
    found = given
    if isinstance(given, str):
        try:
            found = parse_json(given)
        except ValueError as error:
            raise ValueError(
                f'{name}: expected a JSON object, {{"KEY": VALUE}}, got {given!r}: {error}'
            ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: expected values by name, got {given!r}")
    return dict(found)
