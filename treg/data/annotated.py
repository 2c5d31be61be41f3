"""The annotated file: token ids, per-token signals and reference log-probs of each pair, and what
they were made with.

A parquet file with a row for each pair:

    index, where                              int64, string: the row of the source
    prompt_ids, chosen_ids, rejected_ids      list<int32>
    chosen_STREAM, rejected_STREAM            list<float32>: one number a token of the completion
    ref_chosen_logps, ref_rejected_logps      double, nats: sums over the completion
    ref_chosen_token_logps, ref_rejected_...  list<float32>, nats; only on request
    chosen_scored, rejected_scored                list<bool>: the tokens that are scored, where some
                                              are not, as another person's turn in a completion
    prompt_text, chosen_text, rejected_text   string: the ids decoded, special tokens and all
    treg_checksum                             string: of the ids, of each stream, of the reference
    treg                                      string, the same in every row: the description

and, under the key "treg" of its metadata, a JSON object: `fingerprint`, `config`, `settings`,
`report`, `streams`. The description is the same without the report and what belongs to the rows
together; it is in a column because `datasets` and pandas keep columns alone. So rows may be
filtered, shuffled and put together with those of other files that are described alike, by any
program that keeps the two last columns.

A stream is a named per-token signal, such as token_rewards (what a source gives) or token_weights
(u_t in a margin). The stream marks enters no loss: a number above 0 says that a token is truly
good, one below 0 that it is truly bad, and `TRegTrainer` logs how far such tokens move.

`streams` says of each its source, its settings and the shaping; without `streams` the file has one,
token_rewards by contrastive prompts, whose settings are among the file's. The reference columns may
be missing, as in files for objectives without a reference. Other columns are passed on to the
examples. Files of earlier versions have neither text nor checksums.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treg.data.batches import BATCH_STREAMS, MASK_COLUMNS
from treg.data.columns import (
    CHECKSUM,
    DESCRIPTION,
    ID_COLUMNS,
    REF_COLUMNS,
    REF_TOKEN_COLUMNS,
    TEXT_COLUMNS,
    groups_of,
    stream_columns,
)
from treg.data.columns import REWARD_COLUMNS as REWARD_COLUMNS
from treg.data.fingerprints import PROBE as PROBE
from treg.data.fingerprints import model_fingerprint as model_fingerprint
from treg.data.fingerprints import tokenizer_fingerprint as tokenizer_fingerprint
from treg.data.row_checks import check_example, checksum_of
from treg.data.tables import is_described, read_parquet, source_name, table_of, values_of
from treg.files import digest_of, replacing

if TYPE_CHECKING:
    import pyarrow as pa


DEFAULT_STREAMS = ("token_rewards",)  # of a file whose metadata name none
NO_STREAMS = ("ids", "logps", "token_logps", "text", "scored")  # names that other columns have
# what belongs to all rows of one file together, and what changes roundings only
OF_THE_WHOLE = (
    *("report", "problems", "fingerprint.pairs", "fingerprint.columns"),
    # of a server all but the name of its model: where it was, and what it may change by
    *("server.url", "server.dialect", "server.version", "server.length", "server.probe"),
)
CUTTING = ("settings.tokens_per_batch", "settings.share_prefix")


def streams_of(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the streams of a file with this metadata."""
    return tuple(meta.get("streams", DEFAULT_STREAMS))


def write_annotated(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    *,
    streams: Sequence[str] = DEFAULT_STREAMS,
    reference: bool = True,
    per_token: bool = False,
    masks: bool = False,
    kept: Mapping[str, "pa.DataType"] | None = None,
) -> None:
    """Write rows (the columns above, by name) and meta; a reader sees the whole file or none.

    Args:
        streams: names of the per-token signals. Where they are not token_rewards alone, `streams`
            of meta must name them, or a reader does not find them.
        reference: whether rows have the reference's sums; per_token: its log-prob of each token.
        masks: whether they have masks of the tokens that are scored.
        kept: columns of the source that rows have as well, and their types (see `kept_types`).
    """
    import pyarrow as pa

    for stream in streams:
        if not stream.isidentifier() or stream in NO_STREAMS:
            raise ValueError(
                f"streams: expected names that can be parts of a column's name and none of "
                f"{', '.join(NO_STREAMS)}, got {stream!r}"
            )
    columns: dict[str, Any] = {"index": pa.int64(), "where": pa.string()}
    columns |= dict.fromkeys(ID_COLUMNS, pa.list_(pa.int32()))
    for stream in streams:
        columns |= dict.fromkeys(stream_columns(stream), pa.list_(pa.float32()))
    if reference:
        columns |= dict.fromkeys(REF_COLUMNS, pa.float64())
    if per_token:
        columns |= dict.fromkeys(REF_TOKEN_COLUMNS, pa.list_(pa.float32()))
    if masks:
        columns |= dict.fromkeys(MASK_COLUMNS, pa.list_(pa.bool_()))
    columns |= kept or {}
    columns |= {x: pa.string() for x in TEXT_COLUMNS if rows and x in rows[0]}
    columns[CHECKSUM] = pa.string()
    groups = groups_of(columns, streams)
    rows = [{**row, CHECKSUM: checksum_of(row, groups)} for row in rows]
    schema = pa.schema(list(columns.items()))
    arrays = [pa.array([row[name] for row in rows], kind) for name, kind in columns.items()]
    _write(path, pa.table(arrays, schema=schema), meta)


def kept_types(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> dict[str, "pa.DataType"]:
    """The types of columns of the source, by what all rows have in them.

    Raises:
        ValueError: a column that is neither numbers nor strings nor lists of one of them.
    """
    import pyarrow as pa

    values: dict[str, list] = {name: [] for name in names}
    for row in rows:
        for name in names:
            values[name].append(row.get(name))
    found = {}
    for name, held in values.items():
        try:
            kind = pa.array(held).type
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(
                f"keep_columns: expected values of one type in {name!r}, got: {error}"
            ) from error
        one = kind.value_type if pa.types.is_list(kind) else kind
        if not pa.types.is_null(kind) and not _is_plain(one):
            raise ValueError(
                f"keep_columns: expected numbers, strings or lists of them in {name!r}, got {kind}"
            )
        found[name] = kind
    return found


def _is_plain(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    return any(test(kind) for test in (*tests, pa.types.is_null))


def merge_annotated(parts: Sequence[Path], path: Path, meta: Mapping[str, Any]) -> None:
    """The rows of all parts as one file, in the order of the source."""
    import pyarrow as pa

    tables = [read_parquet(part).replace_schema_metadata(None) for part in parts]
    # a part without rows has no text
    table = pa.concat_tables([x for x in tables if x.num_rows] or tables)
    _write(path, table.sort_by("index"), meta)


def without_weight(path: str | Path) -> tuple[int, int]:
    """How many responses of a file have token_weights of 0 alone, of how many; (0, 0) for a file
    without weights.
    """
    names = stream_columns("token_weights")
    table = table_of(path, columns=names)
    names = [name for name in names if name in table.column_names]
    weights = [x for name in names for x in values_of(table.column(name))]
    return sum(not x.any() for x in weights), len(weights)


def read_meta(source: Any) -> dict[str, Any]:
    """What `write_annotated` was given as meta; of what has been through other programs, the
    description.
    """
    return _meta_of(table_of(source, columns=[DESCRIPTION]), source)


def _write(path: str | Path, table: "pa.Table", meta: Mapping[str, Any]) -> None:
    """The table with its description, as a whole file."""
    import pyarrow as pa
    import pyarrow.parquet

    if DESCRIPTION in table.column_names:
        table = table.drop_columns([DESCRIPTION])
    said = pa.repeat(pa.scalar(json.dumps(description_of(meta)), pa.string()), table.num_rows)
    table = table.append_column(DESCRIPTION, said)
    metadata = {"treg": json.dumps(meta), "treg_sha256": digest_of(meta)}
    table = table.replace_schema_metadata(metadata)
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def description_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file's meta holds of each of its rows alone."""
    found = {}
    for name, value in json.loads(json.dumps(meta)).items():
        if name in OF_THE_WHOLE:
            continue
        if isinstance(value, dict):
            value = {k: x for k, x in value.items() if f"{name}.{k}" not in OF_THE_WHOLE}
        found[name] = value
    return found


def is_annotated(source: Any) -> bool:
    """Whether source is a file that `write_annotated` wrote, or that was made from such ones; a
    folder of them, or one that `datasets` saved; or a dataset, a pandas frame or a list with their
    columns.
    """
    return is_described(source, DESCRIPTION)


def _meta_of(table: "pa.Table", source: Any) -> dict[str, Any]:
    """The meta of a table: its description by the column, if there is one, and what the metadata
    add to it.

    Raises:
        ValueError: rows that were annotated otherwise than others; a damaged description.
    """
    metadata = table.schema.metadata or {}
    texts = []
    if DESCRIPTION in table.column_names and table.num_rows:
        texts = table.column(DESCRIPTION).unique().to_pylist()
    try:
        said = [json.loads(text) for text in texts]
        meta = json.loads(metadata.get(b"treg", b"{}"))
        digest = metadata.get(b"treg_sha256", digest_of(meta).encode())
        damaged = digest != digest_of(meta).encode()
        damaged |= not all(isinstance(x, dict) for x in (*said, meta))
    except (TypeError, ValueError):
        damaged = True
    if damaged:
        raise ValueError(
            f"{source_name(source)}: expected a description by `treg annotate` in {DESCRIPTION}, "
            "got a damaged one; annotate again"
        )
    if not said or said == [description_of(meta)]:
        return meta
    for other in said[1:]:
        _check_alike(said[0], other, source)
    return said[0]


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any], source: Any) -> None:
    """ValueError where two descriptions differ in more than roundings."""
    found = first_difference(first, other, CUTTING)
    if found is not None:
        name, a, b = found
        raise ValueError(
            f"{source_name(source)}: expected rows that were annotated alike, got some with "
            f"{name} {a!r} and some with {b!r}; annotate them with the same model and options"
        )


def first_difference(
    first: Mapping[str, Any], other: Mapping[str, Any], but: Sequence[str] = ()
) -> tuple[str, Any, Any] | None:
    """A value that two descriptions do not have in common: its name, as settings.encode.turns, and
    what each has there; None: there is none. but: names that do not count.
    """
    flat = [dict(_flat(x)) for x in (first, other)]
    for name in sorted(flat[0].keys() | flat[1].keys(), key=lambda x: (x.count("."), x)):
        a, b = (x.get(name) for x in flat)
        if a != b and name not in but:
            return name, a, b
    return None


def _flat(description: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in description.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def read_annotated(source: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Examples for `PairCollator`, in the order of the source, and its meta.

    Args:
        source: the path of an annotated file, or several in a list; of a folder of them, or one
            that `datasets` saved; a `datasets.Dataset`, a pandas frame or a list with the columns
            of one.
    Raises:
        ValueError: nothing annotated; a row whose columns do not agree, or that was changed since
            it was annotated; numbers that no annotation gives (see `treg.data.row_checks`); rows
            that were not annotated alike.
    """
    name = source_name(source)
    table = table_of(source)
    described = DESCRIPTION in table.column_names or b"treg" in (table.schema.metadata or {})
    meta = _meta_of(table, source) if described else {}
    # a batch carries what is there, whether the metadata name it or not
    taken = [x for x in BATCH_STREAMS if set(stream_columns(x)) & set(table.column_names)]
    streams = tuple(dict.fromkeys((*streams_of(meta), *taken)))
    groups = groups_of(table.column_names, streams)
    columns = [column for group in groups.values() for column in group]
    missing = [column for column in columns if column not in table.column_names]
    if not described or missing:
        lack = f"the columns {', '.join(missing)}" if described else "its metadata"
        raise ValueError(
            f"{name}: expected what `treg annotate` wrote, got one without {lack}; run `treg "
            "annotate` on it"
        )
    if not table.num_rows:
        raise ValueError(f"{name}: expected at least one pair, found none")
    table = _with_types(name, table, groups)
    names = [column for column in table.column_names if column != DESCRIPTION]
    columns = {column: values_of(table.column(column)) for column in names}
    rows = zip(*columns.values(), strict=True)
    examples = [dict(zip(columns, values, strict=True)) for values in rows]
    bounded = "streams" not in meta and "prompts" in meta.get("settings", {})
    for i, example in enumerate(examples):
        example.setdefault("index", i)
        example.setdefault("where", f"row {i}")
        check_example(example, groups, name, contrastive=bounded)
        example.pop(CHECKSUM, None)
    return examples, meta


def _with_types(name: str, table: "pa.Table", groups: Mapping[str, Any]) -> "pa.Table":
    """The table with the types of the format: another program may have written it with wider ones.

    Raises:
        ValueError: a column that holds something else.
    """
    import pyarrow as pa

    for column_name in (x for group in groups.values() for x in group):
        kind = pa.list_(pa.int32() if column_name in ID_COLUMNS else pa.float32())
        kind = pa.float64() if column_name in REF_COLUMNS else kind
        kind = pa.list_(pa.bool_()) if column_name in MASK_COLUMNS else kind
        column = table.column(column_name)
        try:
            column = column.cast(kind)
        except pa.ArrowException as error:
            raise ValueError(
                f"{name}: {column_name}: expected {kind}, got {column.type}: {error}"
            ) from error
        table = table.set_column(table.column_names.index(column_name), column_name, column)
    return table
