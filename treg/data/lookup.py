"""Token rewards of an annotated file, found again by token ids: for trainers that have a data pipeline of their own."""

import bisect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treg.data.annotated import read_annotated
from treg.data.batches import SIDES


class TokenRewards:
    """Rewards of whole sequences (prompt and completion), looked up by their ids.

    Args:
        source: the path of an annotated file, or its examples (see `treg.data.read_annotated`).
        tail: so many tokens at the end of a sequence may differ from the annotated ones, as where a trainer ends a
            response otherwise; their reward is 0.
    """

    def __init__(self, source: str | Path | Iterable[Mapping[str, Any]], *, tail: int = 0):
        if isinstance(tail, bool) or not isinstance(tail, int) or tail < 0:
            raise ValueError(f"tail: expected a number of tokens >= 0, got {tail!r}")
        self.source = str(source) if isinstance(source, (str, Path)) else "the annotated examples"
        examples = read_annotated(source)[0] if isinstance(source, (str, Path)) else list(source)
        self.tail = tail
        found: dict[bytes, np.ndarray] = {}
        for example in examples:
            for side in SIDES:
                ids = np.concatenate([example["prompt_ids"], example[f"{side}_ids"]])
                rewards = np.zeros(len(ids), dtype=np.float32)
                rewards[len(example["prompt_ids"]) :] = example[f"{side}_token_rewards"]
                found[_key(ids)] = rewards
        self._keys = sorted(found)  # big-endian: bytes in the order of the ids
        self._rewards = [found[key] for key in self._keys]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Rewards of the token at each place.

        Args:
            input_ids: [S, T] integer. attention_mask: [S, T], 0 at padding, on either side; None: no padding.
        Returns:
            [S, T] float32 on input_ids' device; 0 in prompts and padding. A sequence that was cut short finds the
            rewards of what is left of it.
        Raises:
            ValueError: a sequence that was not annotated.
        """
        ids = input_ids.detach().cpu().numpy()
        kept = np.ones(ids.shape, dtype=bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
        rewards = np.zeros(ids.shape, dtype=np.float32)
        for row, (sequence, mask) in enumerate(zip(ids, kept, strict=True)):
            rewards[row, mask] = self.of(sequence[mask])
        return torch.from_numpy(rewards).to(input_ids.device)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Rewards [n] of one sequence of n ids, without padding."""
        key = _key(ids)
        at = bisect.bisect_left(self._keys, key)
        # the longest common beginning is that of a neighbour in order
        near = [i for i in (at, at - 1) if 0 <= i < len(self._keys)]
        lengths = [_agree(key, self._keys[i]) for i in near]
        if not near or max(lengths) < max(1, len(ids) - self.tail):
            beginning = max(lengths, default=0)
            raise ValueError(
                f"input_ids: expected sequences of {self.source}, got one of {len(ids)} tokens that agrees with none "
                f"beyond its first {beginning}; annotate with the trainer's tokenizer, chat template and truncation"
                + (", or allow a differing end with tail=..." if beginning and beginning >= len(ids) - 8 else "")
            )
        rewards, length = self._rewards[near[int(np.argmax(lengths))]], max(lengths)
        return np.concatenate([rewards[:length], np.zeros(len(ids) - length, dtype=np.float32)])


def _key(ids: Any) -> bytes:
    return np.asarray(ids).astype(">u4").tobytes()


def _agree(a: bytes, b: bytes) -> int:
    """How many ids at the beginning are the same."""
    n = min(len(a), len(b)) // 4
    x, y = (np.frombuffer(key, dtype=">u4", count=n) for key in (a, b))
    return int(np.argmax(x != y)) if bool((x != y).any()) else n
