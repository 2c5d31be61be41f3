"""The annotated file: token ids, per-token signals and reference log-probs of each pair, and what
they were made with.

A parquet file with a row for each pair:

    index, where                              int64, string: the row of the source
    prompt_ids, chosen_ids, rejected_ids      list<int32>
    chosen_STREAM, rejected_STREAM            list<float32>: one number a token of the completion
    ref_chosen_logps, ref_rejected_logps      double, nats: sums over the completion
    ref_chosen_token_logps, ref_rejected_...  list<float32>, nats; only on request
    chosen_mask, rejected_mask                list<bool>: the tokens that are scored, where some
                                              are not, as another person's turn in a completion

and, under the key "treg" of its metadata, a JSON object: `fingerprint`, `settings`, `report`.

A stream is a named per-token signal, such as token_rewards (what a source gives) or token_weights
(u_t in a margin). `streams` of the metadata says of each its source, its settings and the shaping;
without `streams` the file has one, token_rewards by contrastive prompts, whose settings are among
the file's. The reference columns may be missing, as in files for objectives without a reference.
Other columns are passed on to the examples.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from treg.data.batches import LOSS_STREAMS, MASK_COLUMNS, SIDES, WEIGHT_STREAMS
from treg.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa


def stream_columns(stream: str) -> tuple[str, str]:
    """The two columns of a stream."""
    chosen, rejected = (f"{side}_{stream}" for side in SIDES)
    return chosen, rejected


ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
DEFAULT_STREAMS = ("token_rewards",)  # of a file whose metadata name none
REWARD_COLUMNS = stream_columns("token_rewards")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
REF_TOKEN_COLUMNS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
NO_STREAMS = ("ids", "logps", "token_logps")  # names that other columns have
PROBE = "The quick brown fox, 12345 + 6.78 = ?\n\tdéjà vu — 東京 🙂 def f(x): return x"
SAMPLES = 64


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary, the chat template, the end-of-sequence token, and the ids of a
    probe text.
    """
    vocabulary, probe = sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"]
    state = [vocabulary, tokenizer.chat_template, tokenizer.eos_token_id, probe]
    return hashlib.sha256(json.dumps(state, ensure_ascii=True).encode()).hexdigest()[:16]


def model_fingerprint(model: torch.nn.Module, *, adapters: bool = False) -> str:
    """SHA-256 over the parameters' names and shapes and 64 values of each, rounded to bfloat16.

    So a checkpoint has one fingerprint in float32 and in bfloat16, and one that has been trained
    has another. adapters: whether those on the model count, with the factor that scales each
    (alpha / r of LoRA); without them a PEFT model has the fingerprint of its bare checkpoint.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters() if adapters else _base_parameters(model):
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(
            0, flat.shape[0] - 1, min(SAMPLES, flat.shape[0]), dtype=torch.float64
        ).long()
        sample = flat[at.to(flat.device)].bfloat16().float().cpu()
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    if adapters:
        for name, module in model.named_modules():
            scaling = getattr(module, "scaling", None)
            # of PEFT's layers a dict by adapter; attention has a number of that name
            if isinstance(scaling, dict) and hasattr(module, "active_adapters"):
                digest.update(f"{name}{sorted(scaling.items())}".encode())
    return digest.hexdigest()[:16]


def _base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of the checkpoint itself, by their own names: without adapters, and copies
    that are trained.
    """
    # PEFT methods name their own weights by a prefix: lora_, ia3_, ...
    adapter = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    for name, parameter in model.named_parameters():
        if adapter in name or ".modules_to_save." in name or ".trainable_tokens_" in name:
            continue
        name = name.removeprefix("base_model.model.")
        for wrapper in (".base_layer", ".original_module", ".token_adapter"):
            name = name.replace(wrapper, "")
        yield name, parameter


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
    schema = pa.schema(list(columns.items()), metadata={"treg": json.dumps(meta)})
    arrays = [pa.array([row[name] for row in rows], kind) for name, kind in columns.items()]
    _write(path, pa.table(arrays, schema=schema))


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
    import pyarrow.parquet

    table = pa.concat_tables(
        [pyarrow.parquet.read_table(part).replace_schema_metadata(None) for part in parts]
    )
    _write(path, table.sort_by("index").replace_schema_metadata({"treg": json.dumps(meta)}))


def without_weight(path: str | Path) -> tuple[int, int]:
    """How many responses of a file have token_weights of 0 alone, of how many; (0, 0) for a file
    without weights.
    """
    import pyarrow.parquet

    present = pyarrow.parquet.read_schema(path).names
    names = [name for name in stream_columns("token_weights") if name in present]
    table = pyarrow.parquet.read_table(path, columns=names)
    weights = [x for name in names for x in _values(table.column(name))]
    return sum(not x.any() for x in weights), len(weights)


def read_meta(path: str | Path) -> dict[str, Any]:
    """What `write_annotated` was given as meta."""
    import pyarrow.parquet

    return json.loads(pyarrow.parquet.read_schema(path).metadata[b"treg"])


def _write(path: str | Path, table: Any) -> None:
    import pyarrow.parquet

    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


def is_annotated(path: Any) -> bool:
    """Whether path is a file that `write_annotated` wrote."""
    if (
        not isinstance(path, (str, Path))
        or not str(path).endswith(".parquet")
        or not Path(path).is_file()
    ):
        return False
    import pyarrow.lib
    import pyarrow.parquet

    try:
        return b"treg" in (pyarrow.parquet.read_schema(path).metadata or {})
    except (OSError, pyarrow.lib.ArrowException):
        return False


def read_annotated(path: str | Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Examples for `PairCollator`, in the order of the file, and the file's meta.

    Raises:
        ValueError: no annotated file, or a row whose columns do not agree.
    """
    table = _read_table(path)
    metadata = (table.schema.metadata or {}).get(b"treg")
    meta = json.loads(metadata or b"{}")
    # the loss takes what is there, whether the metadata name it or not
    taken = [x for x in LOSS_STREAMS if set(stream_columns(x)) & set(table.column_names)]
    streams = tuple(dict.fromkeys((*streams_of(meta), *taken)))
    groups = _groups(table.column_names, streams)
    missing = [name for group in groups for name in group if name not in table.column_names]
    if metadata is None or missing:
        lack = "its metadata" if metadata is None else "the columns " + ", ".join(missing)
        raise ValueError(
            f"{path}: expected a parquet file written by `treg annotate`, got one without {lack}; "
            "run `treg annotate` on it"
        )
    if not table.num_rows:
        raise ValueError(f"{path}: expected at least one pair, found none")
    table = _with_types(path, table, groups)
    columns = {name: _values(table.column(name)) for name in table.column_names}
    examples = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    for example in examples:
        _check_example(example, streams, path)
    return examples, meta


def _read_table(path: str | Path) -> "pa.Table":
    import pyarrow.lib
    import pyarrow.parquet

    if not Path(path).is_file():
        raise FileNotFoundError(f"data: no such file: {path}")
    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise ValueError(
            f"{path}: expected a parquet file written by `treg annotate`, got: {error}"
        ) from error


def _groups(present: Sequence[str], streams: Sequence[str]) -> list[tuple[str, ...]]:
    """The columns that a file must have, in groups: ids, those of each stream, and those of the
    reference of which it has one.
    """
    groups: list[tuple[str, ...]] = [ID_COLUMNS, *map(stream_columns, streams)]
    for group in (REF_COLUMNS, REF_TOKEN_COLUMNS, MASK_COLUMNS):
        if any(name in present for name in group):
            groups.append(group)
    return groups


def _with_types(path: str | Path, table: "pa.Table", groups: list[tuple[str, ...]]) -> "pa.Table":
    """The table with the types of the format: another program may have written it with wider ones.

    Raises:
        ValueError: a column that holds something else.
    """
    import pyarrow as pa

    for group in groups:
        kind = pa.list_(pa.int32() if group == ID_COLUMNS else pa.float32())
        kind = pa.float64() if group == REF_COLUMNS else kind
        kind = pa.list_(pa.bool_()) if group == MASK_COLUMNS else kind
        for name in group:
            column = table.column(name)
            try:
                column = column.cast(kind)
            except pa.ArrowException as error:
                raise ValueError(
                    f"{path}: {name}: expected {kind}, got {column.type}: {error}"
                ) from error
            table = table.set_column(table.column_names.index(name), name, column)
    return table


def _values(column: Any) -> list:
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


def _check_example(example: Mapping[str, Any], streams: Sequence[str], path: str | Path) -> None:
    where = f"{path}: row {example.get('index')}"
    for side in SIDES:
        length = len(example[f"{side}_ids"])
        if not length or not len(example["prompt_ids"]):
            raise ValueError(f"{where}: expected tokens in prompt_ids and {side}_ids, got none")
        for name in (*(f"{side}_{stream}" for stream in streams), f"ref_{side}_token_logps"):
            if name in example:
                _check_numbers(where, name, example[name], length, f"{side}_ids")
        for name in (f"{side}_{stream}" for stream in WEIGHT_STREAMS):
            if name in example and example[name].min() < 0:
                raise ValueError(f"{where}: expected {name} >= 0, got {example[name].min().item()}")
        total = example.get(f"ref_{side}_logps", 0.0)
        if total is None or not np.isfinite(total):
            raise ValueError(f"{where}: expected a finite ref_{side}_logps, got {total}")


def _check_numbers(where: str, name: str, values: np.ndarray, length: int, ids: str) -> None:
    finite = bool(np.isfinite(values).all())
    if len(values) != length or not finite:
        raise ValueError(
            f"{where}: expected {length} finite numbers in {name}, one a token of {ids}, got "
            f"{len(values)}{'' if finite else ', some not finite'}"
        )
