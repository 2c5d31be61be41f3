"""Objectives that TRL's DPOTrainer does not have, on its batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treg.data.annotated import REF_TOKEN_COLUMNS, stream_columns
from treg.data.batches import LOSS_STREAMS
from treg.data.reading import json_object
from treg.heads.install import run_head
from treg.heads.logprobs import scored_rows
from treg.losses import LossOptions, treg_loss
from treg.losses.objectives import find_objective
from treg.ops import linear_kl, linear_logprobs
from treg.results import PairLoss

# what TRL's own DPOTrainer computes
TRL_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
# the name of the reference's log-probs among the streams of a batch
REF_STREAM = "ref_token_logps"


def own_options(args: Any) -> LossOptions | None:
    """The options of the objective where TRL lacks it, else None. args: a TRegDPOConfig.

    Raises:
        ValueError: it is to be added to others, or an option of TRL's that it does not have.
    """
    given = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    mine = [name for name in given if name not in TRL_LOSSES]
    for name in mine:
        find_objective(name)
    scalars = json_object("treg_loss_scalars", args.treg_loss_scalars)
    if not mine:
        if scalars:
            raise ValueError(
                "treg_loss_scalars: expected none for a loss of TRL's, which has options of its "
                f"own, got {scalars!r}"
            )
        return None
    name = mine[0]
    if len(given) > 1:
        raise ValueError(f"loss_type: expected {name!r} by itself, got {given!r}")
    unused = {
        "ld_alpha": None,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "loss_weights": None,
    }
    for option, default in unused.items():
        value = getattr(args, option)
        if value != default and getattr(value, "value", value) != default:
            raise ValueError(
                f"{option}: expected {default!r} for loss_type={name!r}, got {value!r}"
            )
    return LossOptions(
        name,
        args.beta,
        args.treg_alpha,
        scalars.pop("gamma", 0.0),
        args.label_smoothing,
        scalars=scalars,
    )


@dataclass(frozen=True)
class OwnLoss:
    """The loss of TRL's batches under an objective of treg."""

    options: LossOptions
    memory_budget: int | None

    @property
    def needs_rewards(self) -> bool:
        return "token_rewards" in self.options.needed_streams

    def check_arguments(self, args: Any) -> None:
        """ValueError where the reference's sums alone would be made beforehand."""
        if args.precompute_ref_log_probs and not self.options.objective.reference_free:
            raise ValueError(
                "precompute_ref_log_probs: expected False for "
                f"loss_type={self.options.loss_type!r}, which needs the reference's log-prob of "
                "each token, got True; run `treg annotate --per_token` on the data"
            )

    def check_weights(self, *, sharded: bool) -> None:
        """ValueError where the reference's head would leave its forward as a shard."""
        if sharded and self.options.with_kl:
            raise ValueError(
                "loss_type: expected one without a KL term under FSDP and DeepSpeed, got "
                f"{self.options.loss_type!r}, whose reference runs in every step"
            )

    def streams_of(self, columns: set[str], name: str) -> tuple[str, ...]:
        """The streams that a dataset with these columns brings to the loss.

        Raises:
            ValueError: it lacks a stream, or a column of numbers, that the objective needs.
        """
        objective = self.options.objective
        needed = [x for stream in self.options.needed_streams for x in stream_columns(stream)]
        missing = [x for x in needed if x not in columns]
        missing += [x for x in objective.pair_columns if x not in columns]
        if missing:
            raise ValueError(
                f"{name}: expected the columns {', '.join(missing)} for "
                f"loss_type={self.options.loss_type!r}, found none; run `treg annotate` on the data"
            )
        unused = [] if self.options.with_kl else stream_columns("kl_weights")
        if any(x in columns for x in unused):
            raise ValueError(
                f"{name}: expected no {', '.join(unused)}, which "
                f"loss_type={self.options.loss_type!r} does not take; remove the columns"
            )
        found = [x for x in LOSS_STREAMS if set(stream_columns(x)) <= columns]
        if self.brings_reference(columns):
            found.append(REF_STREAM)
        return tuple(found)

    def brings_reference(self, columns: set[str]) -> bool:
        """Whether a dataset has the reference's log-prob of each token, and that is enough."""
        free = self.options.objective.reference_free
        return not free and not self.options.with_kl and set(REF_TOKEN_COLUMNS) <= columns

    def columns(self) -> list[str]:
        """Every column that the loss may read."""
        streams = [x for stream in LOSS_STREAMS for x in stream_columns(stream)]
        return [*streams, *REF_TOKEN_COLUMNS, *self.options.objective.pair_columns]

    def reference_states(
        self, model: Any, labels: Tensor, inputs: Mapping[str, Any], shared: Any = False
    ) -> dict:
        """Hidden states of the scored tokens and the head of the reference, for `score_with_kl`.
        shared: the rows that pairs share, or False.
        """

        def head_fn(hidden: Tensor, operands: dict) -> dict[str, Any]:
            rows, _ = scored_rows(hidden, labels, shared or None)
            return {"ref_hidden": rows} | {f"ref_{name}": x for name, x in operands.items()}

        return run_head(model, head_fn, **(shared.inputs if shared else inputs))

    def score_with_kl(self, reference: Mapping[str, Any], outputs: tuple[str, ...]) -> Callable:
        """What scores the rows of a policy: log-probs of both, KL divergence, and statistics."""

        def score(rows: Tensor, target: Tensor, operands: dict) -> dict[str, Tensor]:
            theirs = dict(reference)
            for name in ("ref_hidden", "ref_weight"):
                theirs[name] = theirs[name].to(rows.dtype)
            budget = self.memory_budget
            kl = linear_kl(rows, target=target, memory_budget=budget, **operands, **theirs)
            with torch.no_grad():
                statistics = linear_logprobs(
                    rows, target=target, outputs=outputs, memory_budget=budget, **operands
                )
            found = {name: getattr(statistics, name) for name in outputs}
            return found | kl._asdict()

        return score

    def __call__(
        self,
        logps: Tensor,
        scored: Tensor,
        streams: Mapping[str, Tensor],
        ref_logps: Tensor | None,
        kl: Tensor | None,
    ) -> PairLoss:
        """Of log-probs [2B, T-1]; streams are [2B, T], those of pairs [columns, B]."""
        per_token = {}
        for name in LOSS_STREAMS:
            if name in streams:
                per_token[name] = streams[name][:, 1:].to(logps.device)
        per_token.setdefault("token_rewards", None)
        numbers = None
        columns = self.options.objective.pair_columns
        if columns:
            values = streams["pair_values"].to(logps.device)
            numbers = dict(zip(columns, values, strict=True))
        return treg_loss(
            logps,
            ref_logps=ref_logps,
            kl=kl,
            mask=scored,
            options=self.options,
            pair_values=numbers,
            **per_token,
        )
