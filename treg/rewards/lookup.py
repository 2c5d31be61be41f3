"""A stream of an annotated file, found again by token ids: for trainers that have a data pipeline
of their own.
"""

import bisect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treg.data.annotated import is_annotated, read_annotated
from treg.data.batches import SIDES
from treg.data.tables import source_name

DIFFERENT = 1e-2  # what batches of other shapes change in 16 bits is less


class TokenRewards:
    """Token rewards of whole sequences (prompt and completion), looked up by their ids.

    Args:
        source: an annotated file, or anything else that `treg.data.annotated.read_annotated`
            reads, or its examples.
        tail: so many tokens at the end of a sequence may differ from the annotated ones, as where a
            trainer ends a response otherwise; their reward is 0.
        stream: the per-token signal that is looked up, where it is not the token rewards.
    """

    def __init__(
        self,
        source: Any,
        *,
        tail: int = 0,
        stream: str = "token_rewards",
    ):
        if isinstance(tail, bool) or not isinstance(tail, int) or tail < 0:
            raise ValueError(f"tail: expected a number of tokens >= 0, got {tail!r}")
        self.tail = tail
        self.stream = stream
        examples: Iterable[Mapping[str, Any]] = source
        self.source = "the annotated examples"
        if isinstance(source, (str, Path)) or is_annotated(source):
            self.source = source_name(source)
            examples = read_annotated(source)[0]
        found: dict[bytes, tuple[np.ndarray, int]] = {}
        for example in examples:
            for side in SIDES:
                ids, rewards, start = self._sequence(example, side)
                before, _ = found.setdefault(_key(ids), (rewards, start))
                if np.abs(before - rewards).max() > DIFFERENT:
                    raise ValueError(
                        f"{self.source}: expected the same rewards where a sequence is there twice"
                    )
        self._keys = sorted(found)  # big-endian: bytes in the order of the ids
        self._rewards = [found[key][0] for key in self._keys]
        self._starts = [found[key][1] for key in self._keys]

    def _sequence(
        self, example: Mapping[str, Any], side: str
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids and rewards of prompt and completion, and where the completion starts."""
        name = f"{side}_{self.stream}"
        if name not in example:
            raise ValueError(
                f"{self.source}: expected the column {name}, got {', '.join(example)}; annotate "
                f"with a source of {self.stream}, or give the stream that is there"
            )
        ids = np.concatenate([example["prompt_ids"], example[f"{side}_ids"]])
        start = len(example["prompt_ids"])
        given = np.asarray(example[name], np.float32)
        if given.shape != (len(ids) - start,) or not np.isfinite(given).all():
            raise ValueError(
                f"{name}: expected {len(ids) - start} finite numbers, one a token of {side}_ids, "
                f"got {given.shape[0] if given.ndim == 1 else list(given.shape)} in {self.source}"
            )
        return ids, np.concatenate([np.zeros(start, dtype=np.float32), given]), start

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Rewards of the token at each place.

        Args:
            input_ids: [S, T] integer. attention_mask: [S, T], 0 at padding, on either side; None:
                no padding.
        Returns:
            [S, T] float32 on input_ids' device; 0 in prompts and padding. A sequence that was cut
            short finds the rewards of what is left of it.
        Raises:
            ValueError: a sequence that was not annotated, or was cut where several that were begin
                alike.
        """
        ids = input_ids.detach().cpu().numpy()
        if attention_mask is None:
            kept = np.ones(ids.shape, dtype=bool)
        else:
            kept = attention_mask.cpu().numpy().astype(bool)
        rewards = np.zeros(ids.shape, dtype=np.float32)
        for row, (sequence, mask) in enumerate(zip(ids, kept, strict=True)):
            rewards[row, mask] = self.of(sequence[mask])
        return torch.from_numpy(rewards).to(input_ids.device)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Rewards [n] of one sequence of n ids, without padding."""
        key = _key(ids)
        at = bisect.bisect_left(self._keys, key)
        # the longest common beginning is that of a neighbour in order
        neighbours = [i for i in (at, at - 1) if 0 <= i < len(self._keys)]
        length = max((_agree(key, self._keys[i]) for i in neighbours), default=0)
        beginning = key[: 4 * length]
        first = bisect.bisect_left(self._keys, beginning)
        self._check_found(len(ids), length, first)
        rewards = self._rewards[first][:length]
        if self._keys[first] != beginning:  # cut short
            self._check_alike(len(ids), beginning, first)
        return np.concatenate([rewards, np.zeros(len(ids) - length, dtype=np.float32)])

    def _check_found(self, tokens: int, length: int, first: int) -> None:
        """ValueError unless a sequence of so many tokens, of which length agree with the annotated
        sequence first, is annotated but for its tail.
        """
        least = 1
        if length and tokens > self._starts[first]:
            least = self._starts[first] + 1  # of an answer a token must agree, whatever the tail
        if length >= max(least, tokens - self.tail):
            return
        near = bool(length) and length >= tokens - 8
        hint = ", or allow a differing end with tail=..." if near else ""
        raise ValueError(
            f"input_ids: expected sequences of {self.source}, got one of {tokens} tokens that "
            f"agrees with none beyond its first {length}; annotate with the trainer's tokenizer, "
            f"chat template and truncation{hint}"
        )

    def _check_alike(self, tokens: int, beginning: bytes, first: int) -> None:
        """ValueError unless all annotated sequences with a beginning have the same rewards there.

        first: the first of them in order.
        """
        length = len(beginning) // 4
        rewards = self._rewards[first][:length]
        for i in range(first + 1, len(self._keys)):
            if not self._keys[i].startswith(beginning):
                break
            if np.abs(self._rewards[i][:length] - rewards).max() > DIFFERENT:
                raise ValueError(
                    f"input_ids: expected sequences that {self.source} tells apart, got one of "
                    f"{tokens} tokens with which several begin, each with other rewards; raise "
                    "the trainer's max_length"
                )


def _key(ids: Any) -> bytes:
    return np.asarray(ids).astype(">u4").tobytes()


def _agree(a: bytes, b: bytes) -> int:
    """How many ids at the beginning are the same."""
    n = min(len(a), len(b)) // 4
    x = np.frombuffer(a, dtype=">u4", count=n)
    y = np.frombuffer(b, dtype=">u4", count=n)
    different = x != y
    return int(np.argmax(different)) if bool(different.any()) else n
