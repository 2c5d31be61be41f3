"""Objectives that TRL's DPOTrainer does not have, on its batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treg.data.annotated import REF_TOKEN_COLUMNS, stream_columns
from treg.data.batches import LOSS_STREAMS
from treg.data.reading import json_object
from treg.heads.install import run_head
from treg.heads.logprobs import scored_rows
from treg.losses import OBJECTIVES, LossOptions, treg_loss
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
    known = [name for name in given if name in OBJECTIVES or ":" in name]
    mine = [name for name in known if name not in TRL_LOSSES]
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
    unused = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}
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
    def with_kl(self) -> bool:
        return "kl" in self.options.objective.needs

    @property
    def needs_rewards(self) -> bool:
        return self.options.alpha > 0 or "token_rewards" in self.options.objective.needs

    def streams_of(self, columns: set[str], name: str) -> tuple[str, ...]:
        """The streams that a dataset with these columns brings to the loss.

        Raises:
            ValueError: it lacks a stream, or a column of numbers, that the objective needs.
        """
        objective = self.options.objective
        needed = [x for x in objective.needs if x != "kl"]
        if self.options.alpha > 0 and "token_rewards" not in needed:
            needed.append("token_rewards")
        missing = [x for stream in needed for x in stream_columns(stream) if x not in columns]
        missing += [x for x in objective.pair_columns if x not in columns]
        if missing:
            raise ValueError(
                f"{name}: expected the columns {', '.join(missing)} for "
                f"loss_type={self.options.loss_type!r}, found none; run `treg annotate` on the data"
            )
        found = [x for x in LOSS_STREAMS if set(stream_columns(x)) <= columns]
        if self.brings_reference(columns):
            found.append(REF_STREAM)
        return tuple(found)

    def brings_reference(self, columns: set[str]) -> bool:
        """Whether a dataset has the reference's log-prob of each token, and that is enough."""
        free = self.options.objective.reference_free
        return not free and not self.with_kl and set(REF_TOKEN_COLUMNS) <= columns

    def columns(self) -> list[str]:
        """Every column that the loss may read."""
        streams = [x for stream in LOSS_STREAMS for x in stream_columns(stream)]
        return [*streams, *REF_TOKEN_COLUMNS, *self.options.objective.pair_columns]

    def reference_states(self, model: Any, labels: Tensor, inputs: Mapping[str, Any]) -> dict:
        """Hidden states of the scored tokens and the head of the reference, for `score_with_kl`."""

        def head_fn(hidden: Tensor, operands: dict) -> dict[str, Any]:
            rows, _ = scored_rows(hidden, labels)
            return {"ref_hidden": rows} | {f"ref_{name}": x for name, x in operands.items()}

        return run_head(model, head_fn, **inputs)

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


def numbers_of(examples: list[dict[str, Any]], columns: tuple[str, ...]) -> Tensor:
    """[columns, B] float64: numbers of pairs.

    Raises:
        ValueError: a value that is no finite number.
    """
    for column in columns:
        for example in examples:
            value = example.get(column)
            if not isinstance(value, (bool, int, float)) or not np.isfinite(value):
                raise ValueError(f"{column}: expected a number in every pair, got {value!r}")
    return torch.tensor([[float(x[c]) for x in examples] for c in columns], dtype=torch.float64)
