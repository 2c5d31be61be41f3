"""Pairs as batches: which hidden states are scored, what they predict, and the two layouts of a
model's input.

In both layouts the head sees the same rows: the completion tokens of all sequences, one sequence
after the other, the B chosen ones first. Nothing after the collator masks, shifts or pads. Beside
either layout stands, where it is asked for, the one in which a pair's prompt is run once.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from treg.data.tree import model_inputs, places_in, shared_beginning, shared_pairs

SIDES = ("chosen", "rejected")
MASK_COLUMNS = ("chosen_scored", "rejected_scored")
# per-token signals that the losses take
LOSS_STREAMS = ("token_rewards", "token_weights", "kl_weights")
WEIGHT_STREAMS = ("token_weights", "kl_weights")  # those of them that are at least 0
# > 0 on tokens that are truly good, < 0 on truly bad ones, 0 on the others; logs alone read them
MARKS = "marks"
BATCH_STREAMS = (*LOSS_STREAMS, MARKS)  # all per-token signals that a batch carries
PER_TOKEN_OR_SEQUENCE = ("scored", "target", "lengths", "ref_logps", *BATCH_STREAMS)
# of a batch; the others are the model's
LOSS_KEYS = (*PER_TOKEN_OR_SEQUENCE, "num_tokens", "pair_values", "shared")


@dataclass(frozen=True)
class PairCollator:
    """Examples -> one batch of B pairs.

    An example maps prompt_ids, chosen_ids, rejected_ids to integers, and may have streams, such as
    chosen_token_rewards [tokens of the completion], ref_chosen_logps (nats: a sum), chosen_scored
    [tokens of the completion], False where a token is not scored, and the same of rejected. A list
    of examples (see `pack_pairs`) counts as its members.

    packing: False: input_ids and attention_mask [2B, T], padded on the right. True: input_ids and
        position_ids [1, L], one sequence after the other; attention starts anew where position_ids
        is 0.
    share_prompt: whether the batch has, beside these, the rows in which what a pair begins with
        stands once.
    pad_token_id, pad_to_multiple_of: of the padded layout.
    pair_columns: names of numbers that the examples have, one each, and the loss needs.
    Returns a dict: the model's input_ids and attention_mask or position_ids (the last token of a
        sequence, which predicts nothing, is left out); scored [N] int64, the rows of the flattened
        hidden states that are scored; target [N] int64; lengths [2B], numbers of scored tokens;
        where the examples have them, the BATCH_STREAMS, [N] float32, and ref_logps, [2B] float64
        sums or, if all have ref_chosen_token_logps, [N] float32; with pair_columns pair_values,
        [columns, B] float64. Those from lengths on are numpy arrays, because trainers move the
        tensors of a batch, and some round them to the model's dtype.
        With share_prompt also shared, a dict: the model's input_ids, position_ids and branches
        (`treg.data.tree`) of rows of pairs, [B, T] or [1, L]; and places, int64 like the input_ids
        above: where each of those tokens stands in the flattened rows of pairs.
    """

    pad_token_id: int = 0
    packing: bool = False
    pad_to_multiple_of: int | None = None
    pair_columns: tuple[str, ...] = ()
    share_prompt: bool = False

    def __call__(
        self, examples: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        pairs: list[Mapping[str, Any]] = []
        for example in examples:
            pairs += [example] if isinstance(example, Mapping) else example
        sequences = [(p["prompt_ids"], p[f"{side}_ids"]) for side in SIDES for p in pairs]
        inputs = [
            np.concatenate([prompt, completion])[:-1].astype(np.int64)
            for prompt, completion in sequences
        ]
        width = max(map(len, inputs))
        width += -width % (self.pad_to_multiple_of or 1)
        if self.packing:
            starts = np.cumsum([0, *map(len, inputs[:-1])])
        else:
            starts = np.arange(len(inputs)) * width
        masks = [scored_tokens(p, side, f"pair {i}") for side in SIDES for i, p in enumerate(pairs)]

        def kept(values: Sequence[Any]) -> np.ndarray:
            """What tokens that are scored have, of all completions."""
            return np.concatenate([np.asarray(x)[m] for x, m in zip(values, masks, strict=True)])

        scored = [
            np.arange(start + len(prompt) - 1, start + len(prompt) - 1 + len(completion))
            for start, (prompt, completion) in zip(starts, sequences, strict=True)
        ]
        batch = self._packed(inputs) if self.packing else self._padded(inputs, width)
        if self.share_prompt:
            batch["shared"] = self._shared(inputs, starts, batch["input_ids"].shape)
        batch["scored"] = torch.from_numpy(kept(scored))
        target = kept([completion for _, completion in sequences])
        batch["target"] = torch.from_numpy(target.astype(np.int64))
        batch["lengths"] = np.array([int(mask.sum()) for mask in masks])
        batch["num_tokens"] = np.array(sum(map(len, inputs)))
        for stream in BATCH_STREAMS:
            if (values := _gather(pairs, f"{{}}_{stream}")) is not None:
                batch[stream] = kept(values).astype(np.float32)
        if (per_token := _gather(pairs, "ref_{}_token_logps")) is not None:
            batch["ref_logps"] = kept(per_token).astype(np.float32)
        elif (sums := _gather(pairs, "ref_{}_logps")) is not None:
            batch["ref_logps"] = np.array(sums, dtype=np.float64)
        if self.pair_columns:
            batch["pair_values"] = pair_numbers(pairs, self.pair_columns)
        return batch

    def _packed(self, inputs: list[np.ndarray]) -> dict[str, Any]:
        positions = np.concatenate([np.arange(len(x)) for x in inputs])
        return {
            "input_ids": torch.from_numpy(np.concatenate(inputs))[None],
            "position_ids": torch.from_numpy(positions)[None],
        }

    def _padded(self, inputs: list[np.ndarray], width: int) -> dict[str, Any]:
        ids = torch.full((len(inputs), width), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, x in enumerate(inputs):
            ids[i, : len(x)] = torch.from_numpy(x)
            mask[i, : len(x)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _shared(
        self, inputs: list[np.ndarray], starts: np.ndarray, shape: torch.Size
    ) -> dict[str, Any]:
        """What the model takes of pairs that share rows, and where the tokens of inputs, which
        begin at starts of rows of that shape, stand there.
        """
        tree = shared_pairs(
            inputs,
            packed=self.packing,
            pad=self.pad_token_id,
            multiple=self.pad_to_multiple_of or 1,
        )
        sequences = [start + np.arange(len(x)) for start, x in zip(starts, inputs, strict=True)]
        places = places_in(tree, sequences, shape.numel())
        return model_inputs(tree) | {"places": torch.from_numpy(places).reshape(shape)}


def pair_numbers(pairs: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> np.ndarray:
    """[columns, B] float64: numbers of pairs.

    Raises:
        ValueError: a pair without one of them, or with something else there than a finite number.
    """
    found = np.empty((len(columns), len(pairs)))
    for k, column in enumerate(columns):
        for i, pair in enumerate(pairs):
            value = pair.get(column)
            number = isinstance(value, (bool, int, float, np.number, np.bool_))
            if not number or not np.isfinite(value):
                has = "none" if column not in pair else repr(value)
                raise ValueError(
                    f"expected a finite number in the column {column} of every pair, got {has} in "
                    f"pair {i}; `treg annotate --keep_columns {column}` passes it on"
                )
            found[k, i] = value
    return found


def _gather(pairs: Sequence[Mapping[str, Any]], column: str) -> list | None:
    """The values of a column of either side ({} stands for it), all chosen ones first; None if a
    pair lacks it.
    """
    found = []
    for side in SIDES:
        name = column.format(side)
        for pair in pairs:
            if name not in pair:
                return None
            found.append(pair[name])
    return found


def scored_tokens(example: Mapping[str, Any], side: str, where: str) -> np.ndarray:
    """[tokens of the completion] bool: which are scored; where: the example, for errors.

    Raises:
        ValueError: a mask of another length, or of no token.
    """
    n = len(example[f"{side}_ids"])
    mask = np.asarray(example.get(f"{side}_scored", np.ones(n, dtype=bool)))
    if mask.shape != (n,) or not mask.any() or mask.dtype != bool:
        raise ValueError(
            f"{where}: expected {n} of True and False in {side}_scored, one a token of {side}_ids "
            f"and not all False, got {mask.tolist()}"
        )
    return mask


def first_pairs(batch: Mapping[str, Any], n: int) -> dict[str, Any]:
    """A batch of which only the first n pairs are scored; what the model sees stays as it is."""
    count = len(batch["lengths"])
    sequences = np.arange(count) % (count // 2) < n
    tokens = np.repeat(sequences, batch["lengths"])
    kept = {}
    for name, values in batch.items():
        if name in PER_TOKEN_OR_SEQUENCE:
            values = values[tokens if len(values) == len(tokens) else sequences]
        elif name == "pair_values":
            values = values[:, :n]
        kept[name] = values
    return kept


def pair_tokens(example: Mapping[str, Any], *, share_prompt: bool = False) -> int:
    """Tokens that a pair puts through the model: two sequences without their last tokens; with
    share_prompt what they begin with counts once.
    """
    prompt, *completions = (example[f"{part}_ids"] for part in ("prompt", *SIDES))
    tokens = 2 * len(prompt) + sum(map(len, completions)) - 2
    if not share_prompt:
        return tokens
    return tokens - len(prompt) - shared_beginning(*(x[:-1] for x in completions))


def pack_pairs(
    examples: Sequence[Mapping[str, Any]], token_budget: int, *, share_prompt: bool = False
) -> list[list[Mapping[str, Any]]]:
    """Whole pairs in packs of at most token_budget tokens: longest first, each into the fullest
    pack that has room.

    A row that is there several times, as a weight makes it (the same object), is never twice in a
    pack: its copies would be one step with a multiple of its gradient.

    Raises:
        ValueError: a pair is longer than the budget.
    """
    examples = list(examples)  # rows that are read anew have an identity for as long as they live
    sizes = [pair_tokens(x, share_prompt=share_prompt) for x in examples]
    if sizes and max(sizes) > token_budget:
        raise ValueError(
            f"token_budget: expected at least the longest pair's {max(sizes)} tokens, got "
            f"{token_budget}; raise it or lower max_length"
        )
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    taken: dict[int, set[int]] = {}  # the packs that a row lies in, by its identity
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (sizes[i], 0))
        own = taken.setdefault(id(examples[i]), set())
        while at < len(rooms) and rooms[at][1] in own:
            at += 1
        room, pack = rooms.pop(at) if at < len(rooms) else (token_budget, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(i)
        own.add(pack)
        bisect.insort(rooms, (room - sizes[i], pack))
    return [[examples[i] for i in sorted(pack)] for pack in sorted(packs, key=min)]
