"""TRL's batches in shared rows: each model of a trainer sees once what the two sequences of a pair
begin with, or a prompt's completions.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from treg.heads import HeadSpec, PromptSharing, SharedRows, share_prompts
from treg.heads.logprobs import BATCH
from treg.trainer.sharing import agreement, computed_in, give_up_by_arguments

log = logging.getLogger(__name__)


class SharedBatches:
    """Whether the batches of a TRegDPOTrainer are run in shared rows, and these rows.

    It is settled for each model at its first batch: TRL may run the reference before training. A
    later batch that cannot be put into such rows runs apart, alone, unless sharing was asked for.

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
        self._warned = False

    def images(self) -> bool:
        """Whether the trainer's data have images."""
        return self.trainer._is_vision_dataset

    def made(self, spec: HeadSpec, inputs: dict[str, Tensor]) -> SharedRows:
        """The shared rows of a batch.

        Raises:
            ValueError: it cannot be put into such rows.
        """
        return share_prompts(**inputs)

    def try_on(self, spec: HeadSpec) -> None:
        """Do without, if that is known of a model before its first batch.

        Raises:
            ValueError: sharing was asked for.
        """
        if not self.sharing.on or _among(spec.model, self._tried):
            return
        self._tried.append(spec.model)
        trainer = self.trainer
        if self.images():
            self.sharing.give_up("expected text, got images")
        give_up_by_arguments(self.sharing, trainer.model, trainer.args)
        if self.sharing.on:
            self.sharing.try_on(spec)

    def rows(self, model: nn.Module, spec: HeadSpec, inputs: Mapping[str, Any]) -> Any:
        """The rows that sequences of a batch share, or False where they are not shared; what
        `treg.heads.logprobs.token_logprobs` takes as share_prompt.

        Args:
            model: that is to see them, wrapped or not.
            inputs: of its forward, [S, T].
        Raises:
            ValueError: something speaks against it, and sharing was asked for.
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
            rows = functools.partial(self.made, spec, given)
            self.sharing.settle(model, given, rows, dtype, agreed)
        if not self.sharing.on:
            return False
        ids = given["input_ids"]
        if self._last is None or self._last[0] is not ids:  # once for policy and reference
            try:
                self._last = (ids, self.made(spec, given))
            except ValueError as error:
                self._apart(error)
                return False
        return self._last[1]

    def _apart(self, error: ValueError) -> None:
        """Let one batch run apart. Not all that follow: other processes would go on to share, and
        wait for this one where they settle it for another model.
        """
        option = self.sharing.option
        if self.sharing.asked:
            raise ValueError(f"{option}: {error}; set {option}=False") from error
        if not self._warned:
            log.warning("%s: a batch runs apart, as others like it will: %s", option, error)
        self._warned = True


class SharedGroups(SharedBatches):
    """The same of a TRegGRPOTrainer, whose batches are some completions of some prompts, in any
    order.
    """

    def images(self) -> bool:
        return self.trainer._is_vlm

    def made(self, spec: HeadSpec, inputs: dict[str, Tensor]) -> SharedRows:
        # eager attention is as large as its rows; the others run each branch by itself
        packed = spec.model.config.get_text_config()._attn_implementation != "eager"
        return share_prompts(**inputs, pairs=False, packed=packed)


def _among(model: nn.Module, models: list[nn.Module]) -> bool:
    return any(x is model for x in models)
