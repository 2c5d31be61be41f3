"""Checkpoints that are sealed, a resume that makes no step too many, and an end for runs that have
diverged.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from treg.files import seal, unseal, writing


class SealedCheckpoints(Trainer):
    """transformers' Trainer, with this about its checkpoints and its end.

    * Once a checkpoint is on the disk, a list of its files and their SHA-256 is written into it
      (see `treg.files.last_checkpoint`), and only then are older ones removed.
    * A run that is resumed from its last step makes no further one.
    * A loss or weights that are not finite end the run with a ValueError; they are never saved.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._finite: torch.Tensor | None = None  # of the losses since the last check
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        self._check_losses()
        self._check_weights()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        finite = loss.detach().isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._check_losses()
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # the loop of transformers looks only after a step whether it was the last
        if self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_losses()
        self._check_weights()
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            unseal(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes files of its own
        if self.args.should_save:
            with writing(folder):
                seal(folder)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _check_losses(self) -> None:
        """ValueError where a loss since the last check was not finite. In float16 the scaler of
        gradients leaves such steps out, and the weights tell.
        """
        finite, self._finite = self._finite, None
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if finite is not None and not scaled and not finite.item():
            self._diverged("the loss")

    def _check_weights(self) -> None:
        """ValueError where a weight that trains is not finite."""
        assert self.model is not None
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or parameter.is_meta:
                continue
            own_part = getattr(parameter, "to_local", parameter.detach)()  # of a DTensor
            if not bool(own_part.detach().isfinite().all()):
                self._diverged(f"the weight {name}")

    def _diverged(self, what: str) -> None:
        raise ValueError(
            f"learning_rate: expected one with which training stays finite, got "
            f"{self.args.learning_rate}: by step {self.state.global_step} {what} is NaN or "
            "infinite; lower it, or max_grad_norm, or look at the rows that were trained on last"
        )
