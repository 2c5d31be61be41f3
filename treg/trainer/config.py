"""TrainingArguments and what the loss needs."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from treg.data import EncodeOptions
from treg.data.reading import json_object
from treg.losses import OBJECTIVES, LossOptions


@dataclass
class TRegConfig(TrainingArguments):
    """TrainingArguments and what the loss needs.

    beta, alpha, gamma, label_smoothing, loss_type, weighting: as in `treg.ops.fused_treg_loss`.
    loss_scalars: the objective's other options, its `scalars`; a dict, or the same as JSON.
    max_length: tokens of prompt and completion, where the trainer tokenizes.
    packing: sequences one after the other without padding instead of padded rows; the loss is the
        same.
    token_budget: with packing, each of the per_device_train_batch_size items of a batch is a pack
        of whole pairs of at most so many tokens, instead of one pair; set
        per_device_train_batch_size=1 for one pack a forward.
    memory_budget: bytes of temporaries of the loss; None: see `treg.ops.linear_logprobs`.
    disable_dropout: of policy and reference.
    ignore_fingerprint: train also where the annotated data were made with another model or
        tokenizer.
    """

    beta: float = field(default=0.1, metadata={"help": "Scale of the implicit reward, > 0."})
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the T-REG regularizer; 0 is the plain objective. Default: 0.25, or "
            "0 for loss types that are another method of token credit."
        },
    )
    gamma: float = field(default=0.0, metadata={"help": "Margin of simpo, sepo and confpo."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels taken as wrong, in [0, 0.5)."}
    )
    loss_type: str = field(
        default="dpo",
        metadata={
            "help": f"Objective: {', '.join(OBJECTIVES)}, or package.module:NAME for your own."
        },
    )
    loss_scalars: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Other options of the objective as JSON, e.g. '{\"tau\": 0.05}'."},
    )
    weighting: str = field(
        default="gradient", metadata={"help": "'gradient', or 'static' (w = 1)."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens of prompt and completion."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Lay sequences out one after the other, without padding."}
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "With packing: tokens of a pack of pairs."}
    )
    memory_budget: int | None = field(
        default=None, metadata={"help": "Bytes of temporaries of the loss."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Turn dropout off in policy and reference."}
    )
    ignore_fingerprint: bool = field(
        default=False, metadata={"help": "Accept data annotated by another model."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: the collator needs all."}
    )

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
