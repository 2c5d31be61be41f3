"""A model that runs elsewhere, in the place of one that runs here."""

from collections.abc import Callable
from typing import Any

import torch

FORM = "served"  # what the fingerprint of such a model begins with


class Engine:
    """What gives log-probs of token ids and nothing else: `treg.rewards.server` has one.

    name: of the model, where it runs. device: where models of a source go that run here beside it.
    part_tokens: tokens of pairs that it judges in about a minute.
    """

    name: str
    device: torch.device
    part_tokens: int

    def scorer(self, on_tokens: Callable[[int], None]) -> Any:
        """What has the methods `score` and `statistics` and the number `longest` of
        `treg.rewards.scorer.Scorer`. on_tokens: is told how many tokens each request had.
        """
        raise NotImplementedError

    def said(self) -> dict[str, Any]:
        """What a file keeps of it, as JSON: its `model`, a `probe` by which to know it again (`ids`
        and their `logprobs`), and what may change without it being another model.
        """
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Of its weights nothing is known: its name."""
        return f"{FORM} {self.name}"
