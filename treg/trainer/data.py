"""What a trainer needs of its data: how they are read, and where the reference comes from."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from treg.data import ExampleLoader
from treg.data.annotated import REF_COLUMNS, REF_TOKEN_COLUMNS, stream_columns
from treg.data.batches import MARKS
from treg.losses import LossOptions
from treg.trainer.config import TRegConfig
from treg.trainer.metrics import SHIFT

log = logging.getLogger(__name__)

Examples = Sequence[Mapping[str, Any]]


def example_loader(
    args: TRegConfig, tokenizer: Any, reference: Any, adapters: bool
) -> ExampleLoader:
    """What reads and checks the data sets of a trainer with these arguments.

    reference: the model that must have annotated them. adapters: whether with those that are on it.
    """
    options = args.loss_options
    return ExampleLoader(
        tokenizer,
        reference,
        max_length=args.max_length,
        streams=_needed_streams(options),
        refused=() if options.with_kl else ("kl_weights",),
        pair_columns=options.objective.pair_columns,
        adapters=adapters,
        check_fingerprint=not args.ignore_fingerprint,
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
    )


def reference_source(
    options: LossOptions,
    sets: Mapping[str, Examples | None],
    ref_model: nn.Module | None,
    adapters: bool,
) -> str:
    """Where the reference comes from: "none", the "data" where all have its log-probs, the
    "model", the "adapters".

    Raises:
        ValueError: it comes from nowhere; sets are examples by the name of their argument.
    """
    objective = options.objective
    if objective.reference_free:
        return "none"
    if options.with_kl:
        if ref_model is None and not adapters:
            raise ValueError(
                f"ref_model: expected a model for loss_type={options.loss_type!r}, "
                "whose KL divergence runs over the reference's whole vocabulary, got None; "
                "give one, or train adapters"
            )
        return "adapters" if ref_model is None else "model"
    lack, needed = "", REF_COLUMNS
    for name, examples in sets.items():
        if examples is None or lack:
            continue
        weighted = objective.reference_per_token
        weighted |= stream_columns("token_weights")[0] in examples[0]
        usable = {*REF_TOKEN_COLUMNS} if weighted else {*REF_COLUMNS, *REF_TOKEN_COLUMNS}
        if not examples[0].keys() & usable:
            lack, needed = name, REF_TOKEN_COLUMNS if weighted else REF_COLUMNS
    if not lack:
        return "data"
    if ref_model is None and not adapters:
        reason = "" if needed == REF_COLUMNS else " for losses that weigh tokens"
        option = "" if needed == REF_COLUMNS else " --per_token"
        raise ValueError(
            f"{lack}: expected the columns {', '.join(needed)}{reason}, found none; run `treg "
            f"annotate{option}`, give a ref_model, or train adapters"
        )
    return "adapters" if ref_model is None else "model"


def tell_of_marks(options: LossOptions, sets: Mapping[str, Examples | None], source: str) -> None:
    """A warning where data have marks of tokens and nothing has the reference's log-prob of each
    token, without which it is not known how far they move.

    sets: examples by the name of their argument. source: of `reference_source`.
    """
    if source in ("model", "adapters") and not options.with_kl:
        return  # it runs in every step
    lack = []
    for name, examples in sets.items():
        there = examples[0].keys() if examples is not None else ()
        if stream_columns(MARKS)[0] in there and REF_TOKEN_COLUMNS[0] not in there:
            lack.append(name)
    if lack:
        log.warning(
            "%s: there are marks, but no %s, so that %s/* are not logged; run `treg annotate` with "
            "--per_token",
            ", ".join(lack),
            ", ".join(REF_TOKEN_COLUMNS),
            SHIFT,
        )


def _needed_streams(options: LossOptions) -> dict[str, str]:
    """The per-token signals that data must have, and what to set to do without."""
    needed = {}
    for stream in options.needed_streams:
        needed[stream] = f"another loss_type than {options.loss_type!r}"
        if stream not in options.objective.needs:
            needed[stream] = "alpha=0 for the plain objective"
    return needed
