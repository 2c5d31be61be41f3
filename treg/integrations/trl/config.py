"""DPOConfig, and what treg's trainer needs beside it."""

import copy
from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from treg.checks import check_number
from treg.data.reading import json_object
from treg.integrations.trl.own import own_options
from treg.rewards import DEFAULT_SOURCE, streams_given


def own_copy(args: Any, kind: type, model: Any, suffix: str) -> Any:
    """A copy of a trainer's args, which the trainer may change; without any, the defaults with an
    output_dir that is named after the model, as TRL names it.

    Raises:
        TypeError: args of another kind.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return kind(f"{name.split('/')[-1] or 'model'}-{suffix}")
    if not isinstance(args, kind):
        raise TypeError(f"args: expected a {kind.__name__}, got {type(args).__name__}")
    return copy.copy(args)


@dataclass
class TRegDPOConfig(DPOConfig):
    """DPOConfig, and

    loss_type: one or several of TRL's, or one of `treg.losses.OBJECTIVES`.
    treg_loss_scalars: options of an objective that TRL lacks, as a dict or as JSON, its gamma
        among them.
    treg_alpha: weight of the regularizer, >= 0; 0 is the plain objective. None: 0.25, or 0 for
        objectives that are another method of token credit.
    treg_rewards: the source of token rewards where the trainer makes them itself, a key of
        `treg.rewards.SOURCES` or "package.module:Class".
    treg_rewards_options: values of the fields of the source's Options, as a dict or as JSON.
    treg_prompts: its option `prompts`, a YAML file with contrastive prompts.
    treg_tokens_per_batch: tokens of one forward then.
    treg_share_prompt: whether what the two sequences of a pair begin with is run once, for both, by
        the policy and by the reference; loss and gradients are the same. None: where the models can
        and the first batch shows the same log-probs; else a warning is said. True: else it is an
        error.
    treg_memory_budget: bytes of temporaries of the head, see `treg.ops.linear_logprobs`.
    treg_ignore_fingerprint: train also where the annotated data were made with another model or
    tokenizer.
    """

    treg_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the T-REG regularizer. Default: see docs/methods.md."},
    )
    treg_loss_scalars: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of an objective that TRL lacks, as JSON."}
    )
    treg_rewards: str = field(
        default=DEFAULT_SOURCE,
        metadata={"help": "Source of token rewards, or package.module:Class for your own."},
    )
    treg_rewards_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the source, as JSON."}
    )
    treg_prompts: str | None = field(
        default=None, metadata={"help": "YAML file with the contrastive prompts."}
    )
    treg_tokens_per_batch: int = field(
        default=16384, metadata={"help": "Tokens of a forward that makes rewards."}
    )
    treg_share_prompt: bool | None = field(
        default=None,
        metadata={"help": "Run a pair's prompt once. Default: where the models allow it."},
    )
    treg_memory_budget: int | None = field(
        default=None, metadata={"help": "Bytes of temporaries of the head."}
    )
    treg_ignore_fingerprint: bool = field(
        default=False, metadata={"help": "Accept data of another model."}
    )

    def __post_init__(self):
        check_number("treg_alpha", self.treg_alpha, optional=True)
        own = own_options(self)
        if self.treg_alpha is None:
            self.treg_alpha = 0.25 if own is None else own.alpha
        if self.treg_alpha < 0:
            raise ValueError(
                f"treg_alpha: expected a number >= 0 (0: no regularizer), got {self.treg_alpha!r}"
            )
        # refused here, before any model loads
        streams = streams_given(self.treg_rewards, self.source_options)
        wanted = self.treg_alpha or (own is not None and "token_rewards" in own.needed_streams)
        if wanted and ("token_rewards" not in streams or "token_weights" in streams):
            raise ValueError(
                "treg_rewards: expected a source of token_rewards and no token_weights, got "
                f"{self.treg_rewards!r}, which gives {', '.join(streams)}; TRegTrainer takes both"
            )
        super().__post_init__()

    @property
    def source_options(self) -> dict[str, Any]:
        """The options of the source of token rewards, by name."""
        options = json_object("treg_rewards_options", self.treg_rewards_options)
        if self.treg_prompts is not None:
            if "prompts" in options:
                raise ValueError(
                    "treg_prompts: expected None beside prompts in treg_rewards_options, got "
                    f"{self.treg_prompts!r}"
                )
            options["prompts"] = self.treg_prompts
        return options
