"""Whether a trainer runs a pair's prompt once, and its batches in such rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from treg.heads import PromptSharing, SharedRows, install_head
from treg.heads.logprobs import BATCH
from treg.trainer.config import TRegConfig


def sharing_of(args: TRegConfig, models: Sequence[nn.Module]) -> PromptSharing:
    """Whether prompts are shared, as far as is known before the first batch.

    models: the policy, and the reference if it runs; their heads are installed.
    Raises:
        ValueError: args.share_prompt is True, and something speaks against it.
    """
    sharing = PromptSharing(args.share_prompt, on=args.share_prompt is not False)
    give_up_by_arguments(sharing, models[0], args)
    for model in models:
        if sharing.on:
            sharing.try_on(install_head(model))
    if args.token_budget is not None:
        # packs are made by what pairs share: without that they would be too long
        sharing.asked = sharing.asked or sharing.on
    return sharing


def give_up_by_arguments(sharing: PromptSharing, policy: Any, args: Any) -> None:
    """Do without, if the policy's adapters or the arguments of the training speak against it.

    Raises:
        ValueError: sharing was asked for.
    """
    adapter = policy.active_peft_config if hasattr(policy, "active_peft_config") else None
    if sharing.on and adapter is not None and adapter.is_prompt_learning:
        sharing.give_up(
            f"expected no {adapter.peft_type} adapters, whose virtual tokens begin a row"
        )
    if sharing.on and args.torch_compile:
        sharing.give_up("expected torch_compile=False, which would compile for each batch anew")
    parallel = getattr(args, "parallelism_config", None)
    cut = {name: getattr(parallel, name, 1) or 1 for name in ("cp_size", "sp_size")}
    if sharing.on and max(cut.values()) > 1:
        sharing.give_up(f"expected sequences that are whole on each rank, got {cut}")


def in_shared_rows(
    batch: dict[str, Any],
    sharing: PromptSharing,
    models: Sequence[nn.Module],
    dtype: Callable[[], torch.dtype],
    accelerator: Accelerator,
) -> None:
    """Let a batch be run in the rows that its pairs share, once the first batch has shown for each
    of the models that it is the same.

    Args:
        batch: as the trainer unpacks it, `model` and `scored` are changed.
        dtype: what the models compute in; asked for the first batch alone.
    Raises:
        ValueError: sharing was asked for, and something speaks against it.
    """
    shared: Mapping[str, Any] | None = batch.get("shared")
    if sharing.on and shared is None:
        sharing.give_up(
            "the data_collator gives no `shared` beside its batches, as treg.data.PairCollator does"
            " with share_prompt=True"
        )
    others = sorted(batch["model"].keys() - BATCH)
    if sharing.on and others:
        sharing.give_up(f"expected {', '.join(BATCH)} of a batch, got {', '.join(others)}")
    if shared is None or not sharing.on:
        return
    inputs = {name: x for name, x in shared.items() if name != "places"}
    rows = SharedRows(inputs, shared["places"])
    if not sharing.settled:
        agreed = agreement(accelerator)
        for model in models:
            if sharing.on:
                sharing.settle(model, batch["model"], rows, dtype(), agreed)
    if sharing.on:
        batch["model"] = rows.inputs
        batch["scored"] = rows.places.reshape(-1)[batch["scored"]]


def computed_in(args: Any, weight: Any) -> torch.dtype:
    """The dtype that a training with these arguments computes in; weight: of the model's head."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return weight.dtype


def agreement(accelerator: Accelerator) -> Callable[[bool], bool]:
    """Whether all processes have found so, from whether this one has."""

    def agreed(found: bool) -> bool:
        if accelerator.num_processes == 1:
            return found
        count: Any = accelerator.reduce(torch.tensor(int(found), device=accelerator.device), "sum")
        return int(count) == accelerator.num_processes

    return agreed
