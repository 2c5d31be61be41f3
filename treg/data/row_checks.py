"""What a row of an annotated file must be: what an annotation can give, and unchanged since.

* ids >= 0, and at least one each of prompt, chosen and rejected;
* a finite number a token in each stream, of size at most LARGEST, token rewards by contrastive
  prompts at most 1/2, weights at least 0;
* a mask that is True somewhere;
* log-probs of the reference at most 0 and at least -LARGEST a token, and sums that are those of the
  tokens that are scored, where a file has both;
* the checksum that the row carries, if it carries one.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from treg.data.batches import MASK_COLUMNS, SIDES, WEIGHT_STREAMS, scored_tokens
from treg.data.columns import CHECKSUM, ID_COLUMNS, REF_COLUMNS

LARGEST = 1e4
CONTRASTIVE = 0.5  # |sigmoid(x) - 1/2|
ROUNDING = 1e-3  # nats by which a log-prob may be above 0
SUMS = (1e-3, 1e-5)  # absolute and relative, by which a sum may differ from that of its tokens
Groups = Mapping[str, tuple[str, ...]]


def checksum_of(row: Mapping[str, Any], groups: Groups) -> str:
    """Of each group of columns eight letters, together with the ids: "ids=01234567 ...". A group
    that another program leaves out takes its own with it.
    """
    ids = _bytes_of(row, groups["ids"])
    found = []
    for name, columns in groups.items():
        own = b"" if name == "ids" else _bytes_of(row, columns)
        found.append(f"{name}={hashlib.sha256(ids + own).hexdigest()[:8]}")
    return " ".join(found)


def _bytes_of(row: Mapping[str, Any], columns: tuple[str, ...]) -> bytes:
    parts = []
    for name in columns:
        kind = np.int32 if name in ID_COLUMNS else np.float32
        kind = np.float64 if name in REF_COLUMNS else kind
        kind = np.bool_ if name in MASK_COLUMNS else kind
        values = np.asarray(row.get(name), kind)
        parts.append(name.encode() + values.size.to_bytes(4, "little") + values.tobytes())
    return b"".join(parts)


def check_example(
    example: Mapping[str, Any], groups: Groups, source: str, *, contrastive: bool
) -> None:
    """ValueError for a row that is not what the top of this file says.

    source: for errors. contrastive: whether the token rewards are by contrastive prompts.
    """
    where = f"{source}: row {example['index']}"
    others = ("ids", "reference", "reference_tokens", "masks")
    streams = [name for name in groups if name not in others]
    for name in ID_COLUMNS:
        ids = example[name]
        if ids.dtype.kind == "f" and np.isnan(ids).any():
            raise ValueError(f"{where}: expected token ids in {name}, got nothing in a place")
        if len(ids) and ids.min() < 0:
            raise ValueError(f"{where}: expected token ids >= 0 in {name}, got {ids.min()}")
    for side in SIDES:
        length = len(example[f"{side}_ids"])
        if not length or not len(example["prompt_ids"]):
            raise ValueError(f"{where}: expected tokens in prompt_ids and {side}_ids, got none")
        for stream in streams:
            bound = CONTRASTIVE if contrastive and stream == "token_rewards" else LARGEST
            _check_stream(where, f"{side}_{stream}", example, side, bound)
        scored_tokens(example, side, where)
        _check_reference(where, example, side)
    _check_checksum(where, example, groups)


def _check_stream(
    where: str, name: str, example: Mapping[str, Any], side: str, bound: float
) -> None:
    values = example[name]
    _check_numbers(where, name, values, len(example[f"{side}_ids"]), f"{side}_ids")
    if name.removeprefix(f"{side}_") in WEIGHT_STREAMS and values.min() < 0:
        raise ValueError(f"{where}: expected {name} >= 0, got {values.min().item()}")
    largest = np.abs(values).max().item()
    if largest > bound * (1 + 1e-6):
        raise ValueError(f"{where}: expected {name} within +-{bound:g}, got {largest:g}")


def _check_reference(where: str, example: Mapping[str, Any], side: str) -> None:
    """ValueError for log-probs of the reference that are none, or do not add up."""
    length = len(example[f"{side}_ids"])
    name, total = f"ref_{side}_token_logps", example.get(f"ref_{side}_logps", 0.0)
    if total is None or not np.isfinite(total):
        raise ValueError(f"{where}: expected a finite ref_{side}_logps, got {total}")
    if not -LARGEST * length <= total <= ROUNDING * length:
        raise ValueError(
            f"{where}: expected ref_{side}_logps from {-LARGEST * length:g} to 0, the sum of "
            f"{length} log-probs in nats, got {total:g}"
        )
    tokens = example.get(name)
    if tokens is None:
        return
    _check_numbers(where, name, tokens, length, f"{side}_ids")
    if tokens.max() > ROUNDING or tokens.min() < -LARGEST:
        worst = tokens.max() if tokens.max() > ROUNDING else tokens.min()
        raise ValueError(f"{where}: expected {name} from {-LARGEST:g} to 0 nats, got {worst:g}")
    summed = float(tokens[scored_tokens(example, side, where)].sum(dtype=np.float64))
    absolute, relative = SUMS
    if f"ref_{side}_logps" in example and abs(summed - total) > absolute + relative * abs(total):
        raise ValueError(
            f"{where}: expected ref_{side}_logps to be the sum of {name}, {summed:g}, got {total:g}"
        )


def _check_numbers(where: str, name: str, values: np.ndarray, length: int, ids: str) -> None:
    finite = bool(np.isfinite(values).all())
    if len(values) != length or not finite:
        raise ValueError(
            f"{where}: expected {length} finite numbers in {name}, one a token of {ids}, got "
            f"{len(values)}{'' if finite else ', some not finite'}"
        )


def _check_checksum(where: str, example: Mapping[str, Any], groups: Groups) -> None:
    """ValueError for a row that was changed since it was annotated. A file without checksums, and
    groups of columns that came later, pass.
    """
    if CHECKSUM not in example:
        return
    kept, found = (
        {name: digest for name, _, digest in (x.partition("=") for x in text.split())}
        for text in (str(example[CHECKSUM]), checksum_of(example, groups))
    )
    changed = [name for name, x in found.items() if kept.get(name, x) != x]
    if changed or "ids" not in kept:
        raise ValueError(
            f"{where}: expected what was annotated, got other {', '.join(changed) or CHECKSUM}: "
            "the row is damaged or was edited; annotate again, or, where the change is meant, "
            f"remove the column {CHECKSUM}"
        )
