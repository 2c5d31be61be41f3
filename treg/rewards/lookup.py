"""Token rewards of an annotated file, found again by token ids: for trainers that have a data
pipeline of their own.
"""

import bisect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treg.data.annotated import read_annotated
from treg.data.batches import SIDES

DIFFERENT = 1e-2  # what batches of other shapes change in 16 bits is less


class TokenRewards:
    """Rewards of whole sequences (prompt and completion), looked up by their ids.

    Args:
        source: the path of an annotated file, or its examples (see `treg.data.read_annotated`).
        tail: so many tokens at the end of a sequence may differ from the annotated ones, as where a
            trainer ends a response otherwise; their reward is 0.
    """

    def __init__(self, source: str | Path | Iterable[Mapping[str, Any]], *, tail: int = 0):
        if isinstance(tail, bool) or not isinstance(tail, int) or tail < 0:
            raise ValueError(f"tail: expected a number of tokens >= 0, got {tail!r}")
        self.source = str(source) if isinstance(source, (str, Path)) else "the annotated examples"
        examples = read_annotated(source)[0] if isinstance(source, (str, Path)) else list(source)
        self.tail = tail
        found: dict[bytes, tuple[np.ndarray, int]] = {}
        for example in examples:
            for side in SIDES:
                ids = np.concatenate([example["prompt_ids"], example[f"{side}_ids"]])
                start, given = (
                    len(example["prompt_ids"]),
                    np.asarray(example[f"{side}_token_rewards"], np.float32),
                )
                if given.shape != (len(ids) - start,) or not np.isfinite(given).all():
                    raise ValueError(
                        f"{side}_token_rewards: expected {len(ids) - start} finite numbers, one a token of {side}_ids, "
                        f"got {given.shape[0] if given.ndim == 1 else list(given.shape)} in {self.source}"
                    )
                rewards = np.concatenate([np.zeros(start, dtype=np.float32), given])
                before, _ = found.setdefault(_key(ids), (rewards, start))
                if np.abs(before - rewards).max() > DIFFERENT:
                    raise ValueError(
                        f"{self.source}: expected the same rewards where a sequence is there twice"
                    )
        self._keys = sorted(found)  # big-endian: bytes in the order of the ids
        self._rewards, self._starts = (
            zip(*(found[key] for key in self._keys), strict=True) if found else ((), ())
        )

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
        kept = (
            np.ones(ids.shape, dtype=bool)
            if attention_mask is None
            else attention_mask.cpu().numpy().astype(bool)
        )
        rewards = np.zeros(ids.shape, dtype=np.float32)
        for row, (sequence, mask) in enumerate(zip(ids, kept, strict=True)):
            rewards[row, mask] = self.of(sequence[mask])
        return torch.from_numpy(rewards).to(input_ids.device)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Rewards [n] of one sequence of n ids, without padding."""
        key = _key(ids)
        at = bisect.bisect_left(self._keys, key)
        # the longest common beginning is that of a neighbour in order
        length = max(
            (_agree(key, self._keys[i]) for i in (at, at - 1) if 0 <= i < len(self._keys)),
            default=0,
        )
        first = bisect.bisect_left(self._keys, key[: 4 * length])
        # of an answer at least one token must agree, whatever the tail
        least = self._starts[first] + 1 if length and len(ids) > self._starts[first] else 1
        if length < max(least, len(ids) - self.tail):
            raise ValueError(
                f"input_ids: expected sequences of {self.source}, got one of {len(ids)} tokens that agrees with none "
                f"beyond its first {length}; annotate with the trainer's tokenizer, chat template and truncation"
                + (
                    ", or allow a differing end with tail=..."
                    if length and length >= len(ids) - 8
                    else ""
                )
            )
        beginning = key[: 4 * length]
        rewards = self._rewards[first][:length]
        if self._keys[first] != beginning:  # cut short
            for i in range(first + 1, len(self._keys)):
                if not self._keys[i].startswith(beginning):
                    break
                if np.abs(self._rewards[i][:length] - rewards).max() > DIFFERENT:
                    raise ValueError(
                        f"input_ids: expected sequences that {self.source} tells apart, got one of {len(ids)} tokens "
                        "with which several begin, each with other rewards; raise the trainer's max_length"
                    )
        return np.concatenate([rewards, np.zeros(len(ids) - length, dtype=np.float32)])


def _key(ids: Any) -> bytes:
    return np.asarray(ids).astype(">u4").tobytes()


def _agree(a: bytes, b: bytes) -> int:
    """How many ids at the beginning are the same."""
    n = min(len(a), len(b)) // 4
    x, y = (np.frombuffer(key, dtype=">u4", count=n) for key in (a, b))
    return int(np.argmax(x != y)) if bool((x != y).any()) else n
