"""Annotated rows as an Arrow table: of files, folders, `datasets`, pandas and lists."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SAVED = ("state.json", "dataset_dict.json")  # what `datasets` leaves in a folder


def source_name(source: Any) -> str:
    """What errors call a source."""
    if isinstance(source, (str, Path)):
        return str(source)
    if are_paths(source):
        return ", ".join(map(str, source))
    return f"the annotated {type(source).__name__}"


def is_described(source: Any, column: str) -> bool:
    """Whether rows have a column, or the metadata of their file the key of that name."""
    import pyarrow as pa

    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _is_described_folder(path, column)
        if not str(source).endswith(".parquet") or not path.is_file():
            return False
        try:
            schema = pyarrow_file(path).schema_arrow
        except (OSError, pa.ArrowException):
            return False
        return column in schema.names or column.encode() in (schema.metadata or {})
    if are_paths(source):
        return all(is_described(x, column) for x in source)
    return column in _columns_of(source)


def _is_described_folder(path: Path, column: str) -> bool:
    if any((path / name).exists() for name in SAVED):
        try:
            return column in _columns_of(_saved(path))
        except ValueError:
            return False
    files = _parquet_files(path)
    return bool(files) and all(is_described(x, column) for x in files)


def _columns_of(source: Any) -> Sequence[str]:
    """The names of a dataset's, a frame's or a list's columns; () of anything else."""
    names = getattr(source, "column_names", None)
    if isinstance(names, (list, tuple)):
        return names
    if hasattr(source, "columns") and hasattr(source, "iloc"):  # pandas
        return list(source.columns)
    if isinstance(source, Sequence) and source and isinstance(source[0], Mapping):
        return list(source[0])
    return ()


def table_of(source: Any, *, columns: Sequence[str] | None = None) -> "pa.Table":
    """The rows of a source (see `treg.data.annotated.read_annotated`).

    columns: those that are read, of which some may be missing; None: all.
    Raises:
        FileNotFoundError, ValueError: no such file, or none that can be read, by name; files with
            other columns than the first.
    """
    import pyarrow as pa

    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_dir():
            return read_parquet(path, columns)
        if not any((path / name).exists() for name in SAVED):
            return table_of(_parquet_files(path), columns=columns)
        source = _saved(path)
    if are_paths(source):
        tables = [table_of(x, columns=columns) for x in source]
        return _together(tables, list(map(str, source)))
    if hasattr(source, "iloc"):
        table = pa.Table.from_pandas(source, preserve_index=False)
        table = table.replace_schema_metadata(None)
    elif hasattr(source, "with_format") and not isinstance(source, pa.Table):
        source = source.with_format("arrow")
        table = source[:] if hasattr(source, "num_rows") else pa.concat_tables(source.iter(1000))
        table = table.replace_schema_metadata(None)
    elif isinstance(source, Sequence) and source and isinstance(source[0], Mapping):
        table = pa.Table.from_pylist([dict(x) for x in source])
    else:
        raise TypeError(
            "data: expected an annotated file, a datasets.Dataset, a pandas frame or a list of "
            f"rows, got {type(source).__name__}"
        )
    if columns is not None:
        table = table.select([x for x in columns if x in table.column_names])
    return table


def pyarrow_file(path: str | Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> "pa.Table":
    """The table of a parquet file, whose pages keep their checksums if they have some.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that cannot be read.
    """
    import pyarrow as pa

    if not Path(path).is_file():
        raise FileNotFoundError(f"data: no such file: {path}")
    try:
        with pyarrow_file(path) as file:
            names = file.schema_arrow.names
            present = None if columns is None else [x for x in columns if x in names]
            table = file.read(present)
            table.validate(full=True)
        return table
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a parquet file written by `treg annotate`, got: {error}"
        ) from error


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(x for x in folder.iterdir() if x.suffix == ".parquet" and x.is_file())


def are_paths(source: Any) -> bool:
    return (
        isinstance(source, (list, tuple))
        and bool(source)
        and all(isinstance(x, (str, Path)) for x in source)
    )


def _saved(path: Path) -> Any:
    """A dataset that `datasets` saved in a folder."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever of its files is damaged
        raise ValueError(f"{path}: expected a saved dataset, got: {error}") from error
    if isinstance(found, Mapping):
        splits = list(map(str, found))
        raise ValueError(
            f"{path}: expected a saved dataset, got one with the splits {', '.join(splits)}; give "
            f"the folder of one, as {path / splits[0]}"
        )
    return found


def _together(tables: "list[pa.Table]", names: list[str]) -> "pa.Table":
    """The rows of tables that have the same columns, under the types of the first."""
    import pyarrow as pa

    if not tables:
        raise ValueError("data: expected an annotated file, got none")
    first, *others = tables
    for table, name in zip(others, names[1:], strict=True):
        differ = set(first.column_names) ^ set(table.column_names)
        if differ:
            raise ValueError(
                f"{name}: expected the columns of {names[0]}, got others: "
                f"{', '.join(sorted(differ))} in one of them alone"
            )
    tables = [x.replace_schema_metadata(None) for x in tables] if others else tables
    return pa.concat_tables(tables, promote_options="permissive")


def values_of(column: Any) -> list:
    """A column as Python numbers and strings, or, where it holds lists of numbers, as arrays that
    share one buffer.
    """
    import pyarrow as pa

    if not pa.types.is_list(column.type) or not pa.types.is_primitive(column.type.value_type):
        return column.to_pylist()
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]
