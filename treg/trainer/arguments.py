"""What the loss needs of a trainer's arguments, without what it is made of: a page of help must not
load transformers.
"""

from dataclasses import dataclass, field

ALPHA = 0.25  # of the regularizer, for loss types that have no token credit of their own
LOSS_TYPES = (
    *("dpo", "sigmoid", "simpo", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair"),
    *("apo_zero", "apo_down", "sppo_hard", "discopop", "orpo", "cpo", "tgdpo", "tis_dpo", "sepo"),
    *("d2po", "confpo", "messagewise", "figa", "bfpo", "tdpo1", "tdpo2", "sparsepo"),
)


@dataclass
class LossArguments:
    """Arguments of `TRegConfig` beside those of transformers, and defaults of its own.

    beta, alpha, gamma, label_smoothing, loss_type, weighting: as in `treg.ops.fused_treg_loss`.
    loss_scalars: the objective's other options, its `scalars`; a dict, or the same as JSON.
    max_length: tokens of prompt and completion, where the trainer tokenizes.
    packing: sequences one after the other without padding instead of padded rows; the loss is the
        same.
    token_budget: with packing, each of the per_device_train_batch_size items of a batch is a pack
        of whole pairs of at most so many tokens, instead of one pair; set
        per_device_train_batch_size=1 for one pack a forward.
    share_prompt: whether what the two sequences of a pair begin with is run once, for both; the
        loss and its gradients are the same. None: where the model can, and the first batch shows
        the same log-probs; else a warning is said. True: else it is an error.
    memory_budget: bytes of temporaries of the loss; None: see `treg.ops.linear_logprobs`.
    disable_dropout: of policy and reference.
    ignore_fingerprint: train also where the annotated data were made with another model or
        tokenizer.
    """

    beta: float = field(default=0.1, metadata={"help": "Scale of the implicit reward, > 0."})
    alpha: float | None = field(
        default=None,
        metadata={
            "help": f"Weight of the T-REG regularizer; 0 is the plain objective. Default: {ALPHA}, "
            "or 0 for loss types that are another method of token credit."
        },
    )
    gamma: float = field(default=0.0, metadata={"help": "Margin of simpo, sepo and confpo."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels taken as wrong, in [0, 0.5)."}
    )
    loss_type: str = field(
        default="dpo",
        metadata={
            "help": f"Objective: {', '.join(LOSS_TYPES)}, or package.module:NAME for your own."
        },
    )
    loss_scalars: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Other options of the objective as JSON, e.g. '{\"tau\": 0.05}'."},
    )
    weighting: str = field(
        default="gradient",
        metadata={"help": "Of the regularizer: gradient, the paper's, or static (w = 1)."},
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
    share_prompt: bool | None = field(
        default=None,
        metadata={
            "help": "Run a pair's prompt once. Default: where the model is found to allow it."
        },
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
