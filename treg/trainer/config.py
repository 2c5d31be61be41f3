"""TrainingArguments and what the loss needs."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from treg.data import EncodeOptions
from treg.data.reading import json_object
from treg.losses import LossOptions
from treg.trainer.arguments import LossArguments


@dataclass
class TRegConfig(LossArguments, TrainingArguments):
    """TrainingArguments and what the loss needs: `LossArguments`."""

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()
        _ = self.loss_options  # checked here, before any model is loaded
        EncodeOptions(self.max_length)
        if self.token_budget is not None and not self.packing:
            raise ValueError(
                f"token_budget: expected None without packing, got {self.token_budget}; set "
                "packing=True"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}; use "
                "label_smoothing"
            )
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "train_sampling_strategy: expected another than 'group_by_length'; packing avoids "
                "padding"
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns: expected False, got True; the collator needs every column"
            )
        if self.use_liger_kernel:
            # for its layers; with its own loss it would replace the forward that has the head
            own_loss_off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **own_loss_off}

    @property
    def loss_options(self) -> LossOptions:
        return LossOptions(
            self.loss_type,
            self.beta,
            self.alpha,
            self.gamma,
            self.label_smoothing,
            self.weighting,
            json_object("loss_scalars", self.loss_scalars),
        )
