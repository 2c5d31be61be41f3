"""Annotated pairs as TRL's datasets and batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset

from treg.data import SIDES, Pair, RowProblem, parse_row
from treg.data.annotated import (
    ID_COLUMNS,
    REF_COLUMNS,
    REF_TOKEN_COLUMNS,
    is_annotated,
    read_annotated,
    stream_columns,
)
from treg.data.batches import pair_numbers, scored_tokens
from treg.data.examples import check_vocabulary
from treg.data.tables import source_name
from treg.integrations.trl.own import REF_STREAM

# the columns of a row that TRL reads
TRL_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


@dataclass
class RewardCollator:
    """TRL's batch, and streams such as token_rewards [2B, T] float32 beside input_ids: of the token
    at each place, 0 in the prompt; and pair_values [columns, B] float64, of columns of numbers.
    These are numpy arrays, because DeepSpeed's trainers round tensors to the model's dtype.

    Raises:
        ValueError: a batch whose ids are not those that the streams belong to.
    """

    inner: Callable[[list[dict]], dict[str, Any]]
    max_length: int | None
    truncation_mode: str
    streams: tuple[str, ...] = ("token_rewards",)
    pair_columns: tuple[str, ...] = ()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inner(examples)
        found = {x: self._gathered(x, examples, batch).numpy() for x in self.streams}
        if self.pair_columns:
            found["pair_values"] = pair_numbers(examples, self.pair_columns)
        return batch | found

    def _gathered(
        self, stream: str, examples: list[dict[str, Any]], batch: dict[str, Any]
    ) -> torch.Tensor:
        rows = [(example, side) for side in SIDES for example in examples]
        cut = cut_of(self.max_length, self.truncation_mode)
        ids = batch["input_ids"]
        gathered = torch.zeros(ids.shape)
        for row, (example, side) in enumerate(rows):
            name = f"ref_{side}_token_logps" if stream == REF_STREAM else f"{side}_{stream}"
            prompt, completion = list(example["prompt_ids"]), list(example[f"{side}_ids"])
            values = [0.0] * len(prompt) + list(example[name])
            expected = torch.tensor((prompt + completion)[cut])
            if len(values) != len(prompt) + len(completion) or not torch.equal(
                ids[row, : len(expected)], expected
            ):
                raise ValueError(
                    f"{name}: expected one a token of {side}_ids and a collator that pads on the "
                    f"right, got {len(values) - len(prompt)} numbers, {len(completion)} ids"
                )
            gathered[row, : len(expected)] = torch.tensor(values[cut])
        return gathered


@dataclass
class ScoredCollator:
    """TRL's batch, whose completion_mask [2B, T] leaves out the tokens that an annotated file does
    not score: turns of others within a completion.
    """

    inner: Callable[[list[dict]], dict[str, Any]]
    max_length: int | None
    truncation_mode: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inner(examples)
        mask = batch["completion_mask"]
        rows = [(example, side) for side in SIDES for example in examples]
        for row, (example, side) in enumerate(rows):
            scored = scored_tokens(example, side, f"row {row}")
            kept = [0] * len(example["prompt_ids"]) + scored.astype(int).tolist()
            kept = kept[cut_of(self.max_length, self.truncation_mode)]
            mask[row, : len(kept)] &= torch.tensor(kept, dtype=mask.dtype)
        return batch


def cut_of(max_length: int | None, truncation_mode: str) -> slice:
    """What TRL keeps of a sequence."""
    if max_length is None:
        return slice(None)
    keep_start = truncation_mode == "keep_start"
    return slice(max_length) if keep_start else slice(-max_length, None)


def tensor_of(x: Any) -> Any:
    """What `RewardCollator` gave, as a tensor."""
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def columns_of(dataset: Any) -> set[str]:
    if isinstance(dataset, IterableDataset) and dataset.column_names is None:
        return set(next(iter(dataset)))
    return set(getattr(dataset, "column_names", None) or ())


def each_of(datasets: Any) -> list:
    return list(datasets.values()) if isinstance(datasets, Mapping) else [datasets]


def mapped(datasets: Any, function: Callable[[Any, str], Any]) -> Any:
    """function(dataset, name) of one evaluation set or of several by name."""
    if isinstance(datasets, Mapping):
        return {k: function(x, f"eval_dataset[{k!r}]") for k, x in datasets.items()}
    return None if datasets is None else function(datasets, "eval_dataset")


def read_dataset(source: Any, name: str, files: dict[str, dict]) -> Any:
    """A dataset as TRL takes it; where it is annotated, its meta is kept in files."""
    if not isinstance(source, (str, Path)) and not is_annotated(source):
        return source
    if not is_annotated(source):
        if not Path(source).exists():
            raise FileNotFoundError(f"{name}: no such file: {source}")
        fix = f"treg annotate --model MODEL --data {source} --output annotated.parquet"
        raise ValueError(
            f"{name}: expected a dataset, or a parquet file by `treg annotate`, got {source}; run "
            f"{fix}"
        )
    examples, meta = read_annotated(source)
    files[name if isinstance(source, Dataset) else source_name(source)] = meta
    return Dataset.from_list(examples)


def prepared(dataset: Any, name: str, args: Any, *, weights_taken: bool = False) -> Any:
    """A dataset with token ids, as TRL's own preparation leaves it. args: the trainer's.

    Reference log-probs that it has are sums over whole completions: dropped where ld_alpha weighs
    tokens within the sums, refused for a sequence that would be cut. Token weights are refused
    unless the loss takes them: TRL's margins take none.
    """
    weights = [x for x in stream_columns("token_weights") if x in columns_of(dataset)]
    if weights and not weights_taken:
        raise ValueError(
            f"dataset: expected {name} without {', '.join(weights)}, which TRL's losses do not "
            "take; remove the columns, or train with treg.trainer.TRegTrainer"
        )
    summed = set(REF_COLUMNS) <= columns_of(dataset)
    # of a cut beginning, what follows would have other log-probs
    shifted = args.truncation_mode != "keep_start" and set(REF_TOKEN_COLUMNS) <= columns_of(dataset)
    if summed and args.ld_alpha is not None:
        dataset, summed = dataset.remove_columns(REF_COLUMNS), False
    limit, keep_start = args.max_length, args.truncation_mode == "keep_start"
    if limit is None or not (summed or shifted or keep_start):
        return dataset

    def fits(example: dict[str, Any]) -> bool:
        length = len(example["prompt_ids"]) + max(len(example[f"{side}_ids"]) for side in SIDES)
        if (summed or shifted) and length > limit:
            raise ValueError(
                f"max_length: expected at least {length}, the length of a sequence of {name} whose "
                f"reference log-probs are of all of it, got {limit}; annotate with a lower "
                "max_length, or raise it here"
            )
        return len(example["prompt_ids"]) < limit or not keep_start

    return dataset.filter(fits)


def check_ids(dataset: Any, name: str, model: Any) -> None:
    """ValueError for token ids that a model has no embedding for. Those of a stream are not known
    before they are trained on, and pass.
    """
    if not isinstance(dataset, Dataset) or not set(ID_COLUMNS) <= columns_of(dataset):
        return
    arrow = dataset.select_columns(list(ID_COLUMNS)).with_format("arrow")
    extremes = [
        {column: _extremes(table[column]) for column in ID_COLUMNS} for table in arrow.iter(1000)
    ]
    try:
        check_vocabulary(name, extremes, model)
    except ValueError:
        check_vocabulary(name, dataset, model)  # which names the pair


def _extremes(ids: Any) -> list[int]:
    """The least and the largest of a column of lists; none of empty lists."""
    found = pyarrow.compute.min_max(pyarrow.compute.list_flatten(ids)).as_py()
    return [x for x in found.values() if x is not None]


def text_pairs(dataset: Dataset) -> tuple[list[Pair], list[RowProblem]]:
    """Rows with text and TRL's ids as pairs, and those that cannot be judged."""
    pairs, problems = [], []
    for index, example in enumerate(dataset):
        ids = [np.array(example[name], dtype=np.int32) for name in ID_COLUMNS]
        # TRL renders these columns and no others
        known = [name for name in example if name not in TRL_COLUMNS]
        given = {name: example[name] for name in TRL_COLUMNS if name in example}
        try:
            row = parse_row(given, f"row {index}", chat=False)
            row.columns.update({name: example[name] for name in known})
            pairs.append(Pair(*ids, row, index))
        except RowProblem as problem:
            problems.append(problem)
    return pairs, problems
