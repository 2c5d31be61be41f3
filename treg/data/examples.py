"""Datasets as the trainer takes them: examples that have what the objective needs, made by the
model that trains.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from treg.data.annotated import (
    ID_COLUMNS,
    REF_COLUMNS,
    REF_TOKEN_COLUMNS,
    is_annotated,
    read_annotated,
    stream_columns,
)
from treg.data.batches import BATCH_STREAMS, MASK_COLUMNS, pair_numbers
from treg.data.encode import EncodeOptions, Pair, load_pairs
from treg.data.fingerprints import (
    FORM,
    config_of,
    model_fingerprint,
    other_config,
    sampled_fingerprint,
    tokenizer_fingerprint,
)
from treg.data.mixture import Mixture, Share, check_alike, mixture_of
from treg.data.report import Report
from treg.data.served import check_served
from treg.data.tables import source_name
from treg.files import digest_of

log = logging.getLogger(__name__)


class ExampleLoader:
    """Calls: (source, name of the argument) -> examples for `PairCollator`.

    A source is anything that `read_annotated` reads, examples, or, where no stream is needed,
    anything `load_pairs` reads; or several of these, as paths in a list or as a `Mixture` with
    weights. Each of several is read and checked alone, and all must have the same columns.

    `reports` and `shares` keep what became of raw rows, and how many rows of each source of a
    mixture there are, by the names of the arguments.

    Args:
        reference: the model that must have made the annotations; only its fingerprint is looked at.
        max_length: of pairs that are tokenized here; annotated ones are refused if they are longer.
        streams: the per-token signals that examples must have, by name, and who needs them.
        refused: signals that the loss would not take, by name.
        pair_columns: columns that examples must have, one number each.
        adapters: whether the reference is meant with the adapters that are on it.
        autocast: the dtype that training's reference is cast to where PyTorch's autocast casts.
    """

    def __init__(
        self,
        tokenizer: Any,
        reference: Any,
        *,
        max_length: int | None,
        streams: Mapping[str, str],
        refused: Sequence[str] = (),
        pair_columns: Sequence[str] = (),
        adapters: bool = True,
        check_fingerprint: bool = True,
        autocast: torch.dtype | None = None,
    ):
        self.tokenizer = tokenizer
        self.reference = reference
        self.max_length = max_length
        self.streams = streams
        self.refused = refused
        self.pair_columns = pair_columns
        self.adapters = adapters
        self.check_fingerprint = check_fingerprint
        self.autocast = autocast
        self.reports: dict[str, Report] = {}
        self.shares: dict[str, list[Share]] = {}
        self._made: set[str] = set()  # what made the files that were checked

    def __call__(self, source: Any, name: str) -> Sequence[Mapping[str, Any]]:
        mixture = mixture_of(source)
        return self._one(source, name)[0] if mixture is None else self._mixed(mixture, name)

    def _mixed(self, mixture: Mixture, name: str) -> Sequence[Mapping[str, Any]]:
        """The examples of an epoch of several sources."""
        sets, metas = [], []
        for source, said in zip(mixture.sources, mixture.names, strict=True):
            own = name if len(mixture.sources) == 1 else f"{name}: {said}"
            examples, meta = self._one(source, own)
            sets.append(examples)
            metas.append(meta)
        check_alike(mixture.names, sets, metas, made=not mixture.mixed_annotations)
        rows, self.shares[name] = mixture.mixed(sets)
        return rows

    def _one(self, source: Any, name: str) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
        """The examples of one source, and what it says of itself if it is annotated."""
        meta: Mapping[str, Any] = {}
        if is_annotated(source):
            examples, meta = self._annotated(source)
        elif _are_examples(source):
            examples = [dict(x) for x in source]
        elif self.streams:
            stream, who = next(iter(self.streams.items()))
            raise ValueError(
                f"{name}: expected annotated pairs with {stream.replace('_', ' ')}, got raw ones; "
                f"run `treg annotate` on them first, or set {who}"
            )
        else:
            options = EncodeOptions(self.max_length)
            pairs, self.reports[name] = load_pairs(source, self.tokenizer, options)
            examples = examples_of(pairs, self.pair_columns, name)
        for stream, who in self.streams.items():
            columns = stream_columns(stream)
            if columns[0] not in examples[0]:
                raise ValueError(
                    f"{name}: expected the columns {', '.join(columns)}, found none; run `treg "
                    f"annotate` with a source of {stream}, or set {who}"
                )
        for stream in self.refused:
            present = [x for x in stream_columns(stream) if x in examples[0]]
            if present:
                raise ValueError(
                    f"{name}: expected no {', '.join(present)}, which the loss does not take; "
                    "remove the columns, or choose a loss_type with a KL term"
                )
        try:
            pair_numbers(examples, self.pair_columns)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        streams = [stream_columns(stream) for stream in BATCH_STREAMS]
        for group in (ID_COLUMNS, *streams, REF_COLUMNS, REF_TOKEN_COLUMNS, MASK_COLUMNS):
            _check_same_columns(examples, group, name)
        check_vocabulary(name, examples, self.reference)
        return examples, meta

    def _annotated(self, source: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The examples and meta of an annotated file that this model and tokenizer have made."""
        examples, meta = read_annotated(source)
        made_with = meta.get("fingerprint", {})
        made = digest_of([made_with.get("model"), made_with.get("tokenizer"), meta.get("config")])
        # a sum over all weights, once for files that say the same
        if self.check_fingerprint and made not in self._made:
            check_made_with(
                source_name(source),
                meta,
                self.tokenizer,
                self.reference,
                adapters=self.adapters,
                fix="set ignore_fingerprint",
            )
            if str(made_with.get("model")).startswith(f"{FORM}-"):  # others are warned of each
                self._made.add(made)
        if any(name in examples[0] for name in (*REF_COLUMNS, *REF_TOKEN_COLUMNS)):
            tell_of_precision(source_name(source), meta, self.reference, self.autocast)
        longest = max(
            len(x["prompt_ids"]) + max(len(x["chosen_ids"]), len(x["rejected_ids"]))
            for x in examples
        )
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"max_length: expected at least {longest}, the longest sequence of "
                f"{source_name(source)}, got "
                f"{self.max_length}; annotate with a lower max_length, or raise it here"
            )
        return examples, meta


def examples_of(
    pairs: Sequence[Pair], columns: Sequence[str] = (), name: str = "data"
) -> list[dict[str, Any]]:
    """What `PairCollator` needs of pairs, with these columns of their rows where they have them.

    Raises:
        ValueError: columns that no row has; name is that of the data.
    """
    check_columns(columns, pairs, f"{name}: expected for the loss")
    found = []
    masked = any(pair.masked for pair in pairs)
    for pair in pairs:
        row = pair.row.columns
        example = pair.example | (pair.masks if masked else {})
        found.append(example | {column: row[column] for column in columns if column in row})
    return found


def check_columns(names: Sequence[str], pairs: Sequence[Pair], expected: str) -> None:
    """ValueError for columns that no row of these pairs has; expected: how its message begins."""
    there = dict.fromkeys(column for pair in pairs for column in pair.row.columns)
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(
            f"{expected} the column{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}, "
            f"found {', '.join(map(str, there)) or 'none'} beside the prompt and the answers"
        )


def _check_same_columns(
    examples: Sequence[Mapping[str, Any]], group: Sequence[str], name: str
) -> None:
    """ValueError unless every example has all columns of a group, or none as the first one."""
    wanted = group if group == ID_COLUMNS or group[0] in examples[0] else ()
    for i, example in enumerate(examples):
        present = tuple(column for column in group if column in example)
        if present != tuple(wanted):
            raise ValueError(
                f"{name}: expected {', '.join(wanted) or 'no ' + group[0]} in every pair, as in "
                f"the first, got {', '.join(present) or 'none'} in pair {i}"
            )


def check_made_with(
    path: str,
    meta: Mapping[str, Any],
    tokenizer: Any,
    reference: Any,
    *,
    adapters: bool,
    fix: str,
) -> None:
    """ValueError unless a file with this meta was annotated with this tokenizer and this model.

    fix: how to train all the same.
    """
    made_with = meta.get("fingerprint", {})
    form = str(made_with.get("model", "none"))
    found = tokenizer_fingerprint(tokenizer)
    if made_with.get("tokenizer") != found:
        _refuse(path, "tokenizer", found, str(made_with.get("tokenizer", "none")), fix)
    if "server" in meta:
        check_served(path, meta["server"], reference, adapters=adapters, fix=fix)
        return
    if not form.startswith(f"{FORM}-"):
        found = sampled_fingerprint(reference, adapters=adapters)
        if form != found:
            _refuse(path, "model", found, f"{form} (by an earlier version)", fix)
        log.warning(
            "%s was annotated by an earlier version, which kept 64 values of each weight and "
            "nothing of the model's configuration, so that no more is compared; annotate it again",
            path,
        )
        return
    found = model_fingerprint(reference, adapters=adapters)
    if form.rpartition("-")[0] != found.rpartition("-")[0]:
        _refuse(path, "model", found, form, fix)
    if form != found:
        other = other_config(meta.get("config", {}), config_of(reference))
        if other is not None or "config" not in meta:
            _refuse(path, "model", found, f"the same weights with {other or 'another config'}", fix)


def _refuse(path: str, what: str, value: str, made: str, fix: str) -> None:
    raise ValueError(
        f"{path}: expected data annotated with this {what} ({value}), got {made}; annotate "
        f"with the model that training starts from, give that one as ref_model, or {fix}"
    )


def check_vocabulary(name: str, examples: Sequence[Mapping[str, Any]], model: Any) -> None:
    """ValueError for token ids that a model has no embedding for."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    size = getattr(text_config, "vocab_size", None)
    if size is None:
        return
    for i, example in enumerate(examples):
        for column in ID_COLUMNS:
            ids = np.asarray(example[column])
            if ids.size and not 0 <= ids.min() <= ids.max() < size:
                worst = ids.max() if ids.min() >= 0 else ids.min()
                raise ValueError(
                    f"{name}: expected token ids from 0 to {size - 1}, the model's vocabulary, got "
                    f"{worst} in {column} of pair {i}; annotate with the model's tokenizer"
                )


def tell_of_precision(
    path: str, meta: Mapping[str, Any], reference: Any, autocast: torch.dtype | None
) -> None:
    """A warning where reference log-probs were made in another precision than training's own are:
    the first margins are then not 0 but what the roundings differ by.
    """
    settings = meta.get("settings", {})
    now = {"dtype": str(getattr(reference, "dtype", None)), "autocast": autocast and str(autocast)}
    made = {name: settings.get(name) for name in now}
    if "dtype" not in settings or made == now:
        return
    log.warning(
        "%s: the reference's log-probs were made in %s, and training runs in %s: the first margins "
        "are what the roundings differ by, not 0; annotate with %s, or train with %s",
        path,
        _precision(made),
        _precision(now),
        _options_for(now),
        _options_for(made),
    )


def _precision(of: Mapping[str, Any]) -> str:
    cast = f" under autocast to {of['autocast']}" if of["autocast"] else ""
    return f"{of['dtype']}{cast}".replace("torch.", "")


def _options_for(of: Mapping[str, Any]) -> str:
    """The options of the command line that make a model run in a precision."""
    flags = {"torch.bfloat16": " --bf16", "torch.float16": " --fp16"}
    return f"--dtype {of['dtype']}{flags.get(of['autocast'], '')}".replace("torch.", "")


def _are_examples(source: Any) -> bool:
    """A list of examples, or a `datasets` dataset of them."""
    columns = getattr(source, "column_names", None)
    if isinstance(columns, list):
        return "chosen_ids" in columns
    return (
        isinstance(source, Sequence)
        and bool(source)
        and isinstance(source[0], Mapping)
        and "chosen_ids" in source[0]
    )
