"""TRL's batches in rows that pairs share: each model of a trainer sees what the two sequences of a
pair begin with once.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from treg.heads import HeadSpec, PromptSharing, SharedRows, share_prompts
from treg.heads.logprobs import BATCH
from treg.trainer.sharing import agreement, computed_in, give_up_by_arguments


class SharedBatches:
    """Whether the batches of a TRegDPOTrainer are run in shared rows, and these rows.

    It is settled for each model at its first batch: TRL may run the reference before training.

    Args:
        trainer: whose treg_share_prompt is asked; it may be under construction.
    """

    def __init__(self, trainer: Any, args: Any):
        asked = args.treg_share_prompt
        self.trainer = trainer
        self.sharing = PromptSharing(asked, asked is not False, option="treg_share_prompt")
        self._tried: list[nn.Module] = []
        self._settled: list[nn.Module] = []
        self._last: tuple[Tensor, SharedRows] | None = None

    def try_on(self, spec: HeadSpec) -> None:
        """Do without, if that is known of a model before its first batch.

        Raises:
            ValueError: sharing was asked for.
        """
        if not self.sharing.on or _among(spec.model, self._tried):
            return
        self._tried.append(spec.model)
        trainer = self.trainer
        if trainer._is_vision_dataset:
            self.sharing.give_up("expected text, got images")
        give_up_by_arguments(self.sharing, trainer.model, trainer.args)
        if self.sharing.on:
            self.sharing.try_on(spec)

    def rows(self, model: nn.Module, spec: HeadSpec, inputs: Mapping[str, Any]) -> Any:
        """The rows that pairs of a batch share, or False where they are not shared; what
        `treg.heads.logprobs.token_logprobs` takes as share_prompt.

        Args:
            model: that is to see them, wrapped or not.
            inputs: of its forward, [2B, T].
        """
        self.try_on(spec)
        given = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        others = sorted(given.keys() - BATCH)
        if self.sharing.on and others:
            self.sharing.give_up(f"expected {', '.join(BATCH)}, got {', '.join(others)}")
        if self.sharing.on and not _among(spec.model, self._settled):
            self._settled.append(spec.model)
            dtype = computed_in(self.trainer.args, spec.projection.weight)
            agreed = agreement(self.trainer.accelerator)
            self.sharing.settle(model, given, None, dtype, agreed)
        if not self.sharing.on:
            return False
        ids = given["input_ids"]
        if self._last is None or self._last[0] is not ids:  # once for policy and reference
            self._last = (ids, share_prompts(**given))
        return self._last[1]


def _among(model: nn.Module, models: list[nn.Module]) -> bool:
    return any(x is model for x in models)
