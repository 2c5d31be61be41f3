"""Training steps of `bench_end_to_end.py`: this project's, TRL's, flash-pref's, and the floor.

All compute the same DPO loss of the same pairs, with log-probs of a reference that come with the
data, and gradients of all parameters; no optimizer runs.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from end_to_end_cases import DTYPE, Cell, Counter, make_examples, twin
from loss_head_cases import DEVICE
from torch import nn

OURS = {
    "treg shared": {"share_prompt": True},
    "treg unshared": {"share_prompt": False},
    "treg packed shared": {"share_prompt": True, "packing": True},
    "treg packed": {"share_prompt": False, "packing": True},
}
TRL = {"TRL padded": {}, "TRL padding-free": {"padding_free": True}}
FLASH = "flash-pref"
FLOOR = "bare forward + backward"
NAMES = (*OURS, *TRL, FLASH, FLOOR)
BETA = 0.1
# how far losses may be apart, in nats: roundings of log-probs of hundreds of tokens, times beta
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


class Missing(Exception):
    """A method cannot run here; says why."""


@dataclass
class Step:
    """run: one step; its loss, None of the floor. model: what its gradients are of. forwards: how
    many a step has.
    """

    model: Any
    run: Callable[[], float | None]
    forwards: int = 1


def step_of(name: str, cell: Cell, model: nn.Module, tokenizer: Any, folder: str) -> Step:
    """A method's step on a cell's pairs. The model's parameters are those of all methods.

    Raises:
        Missing: it cannot run here.
    """
    examples = make_examples(cell, model.config.vocab_size)
    if name == FLOOR:
        batches = batches_of(cell, examples)
        return Step(model, functools.partial(bare, model, batches), len(batches))
    if name == FLASH:
        return _flash(examples, model)
    if name in TRL:
        trainer = _trl_trainer(TRL[name], examples, model, tokenizer, folder)
    else:
        trainer = _own_trainer(OURS[name], cell, examples, model, tokenizer, folder)
    return _trainer_step(trainer)


def _trainer_step(trainer: Any) -> Step:
    trainer.current_gradient_accumulation_steps = 1  # train() sets it
    batches = list(trainer.get_train_dataloader())
    if len(batches) != 1:
        raise ValueError(f"expected one batch, got {len(batches)}")
    policy = trainer.accelerator.prepare_model(trainer.model).train()

    def run() -> float:
        policy.zero_grad(set_to_none=True)
        return trainer.training_step(policy, dict(batches[0])).item()

    return Step(policy, run)


def _arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "beta": BETA,
        "use_cpu": DEVICE == "cpu",
        "bf16": False,  # on a GPU the model itself is in bfloat16
        "gradient_checkpointing": False,
        "report_to": [],
        "dataloader_pin_memory": False,
        "max_length": None,
    }


def _own_trainer(
    options: dict[str, bool],
    cell: Cell,
    examples: list[dict[str, Any]],
    model: nn.Module,
    tokenizer: Any,
    folder: str,
) -> Any:
    from treg.trainer import TRegConfig, TRegTrainer

    if options.get("packing"):
        # all pairs in one pack
        size = {"token_budget": cell.counted, "per_device_train_batch_size": 1}
    else:
        size = {"per_device_train_batch_size": len(examples)}
    config = TRegConfig(alpha=0.0, **_arguments(folder), **options, **size)
    return TRegTrainer(twin(model), args=config, train_dataset=examples, processing_class=tokenizer)


def _trl_trainer(
    options: dict[str, bool],
    examples: list[dict[str, Any]],
    model: nn.Module,
    tokenizer: Any,
    folder: str,
) -> Any:
    if importlib.util.find_spec("trl") is None:
        raise Missing("TRL is not installed")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OfIds(DPOTrainer):
        """Of rows that have their ids and the reference's log-probs already."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset

    config = DPOConfig(
        **_arguments(folder),
        **options,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=len(examples),
    )
    trainer = OfIds(
        twin(model),
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    if options.get("padding_free") and not trainer.padding_free:
        version = importlib.metadata.version("trl")
        raise Missing(f"TRL {version} takes padding_free=True, warns, and pads all the same")
    return trainer


def _flash(examples: list[dict[str, Any]], model: nn.Module) -> Step:
    """flash-pref's shared prefix around a plain DPO step; it patches FlashAttention-2."""
    if importlib.util.find_spec("flash_pref") is None:
        raise Missing("it is not installed (0.1.1 needs transformers < 4.52, and a GPU)")
    if DEVICE != "cuda" or importlib.util.find_spec("flash_attn") is None:
        raise Missing("it needs a GPU and FlashAttention-2")
    from flash_pref import shared_prefix

    from treg.data import PairCollator

    policy = twin(model)
    policy.set_attn_implementation("flash_attention_2")
    batch = PairCollator()(examples)
    inputs = {name: batch[name].to(DEVICE) for name in ("input_ids", "attention_mask")}
    scored, target = (batch[name].to(DEVICE) for name in ("scored", "target"))
    ref = torch.from_numpy(batch["ref_logps"]).to(DEVICE)
    lengths = batch["lengths"].tolist()

    def run() -> float:
        policy.zero_grad(set_to_none=True)
        with shared_prefix(policy, **inputs, interleaved=True):
            hidden = policy.base_model(**inputs, use_cache=False).last_hidden_state
            logits = policy.get_output_embeddings()(hidden.flatten(0, 1)[scored]).float()
            logps = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
            sums = torch.stack([x.sum() for x in logps.split(lengths)])
            chosen, rejected = (BETA * (sums - ref)).chunk(2)
            loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
            loss.backward()
        return loss.item()

    return Step(policy, run)


# -- the floor

ROWS = 2048  # of the head at a time


def batches_of(cell: Cell, examples: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Ids [pairs, P + R_w + R_l] and the rows of them that are scored, of pairs that are alike."""
    groups: dict[tuple[int, int, int], list[list[int]]] = {}
    for lengths, x in zip(cell.pairs, examples, strict=True):
        groups.setdefault(lengths, []).append(x["prompt_ids"] + x["chosen_ids"] + x["rejected_ids"])
    found = []
    for (p, w, l), rows in groups.items():
        n = p + w + l
        scored = torch.arange(p - 1, n - 1)[None] + n * torch.arange(len(rows))[:, None]
        found.append((torch.tensor(rows, device=DEVICE), scored.flatten().to(DEVICE)))
    return found


def bare(model: Any, batches: list[tuple[Any, Any]]) -> None:
    """A forward and backward of the layers, and the three products of the head; no loss, no mask.

    The gradient that goes into the layers is that of the products, without a softmax.
    """
    model.zero_grad(set_to_none=True)
    weight = model.get_output_embeddings().weight
    for ids, scored in batches:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        rows = hidden.flatten(0, 1)[scored]
        with torch.no_grad():
            gradients, dweight = [], torch.zeros_like(weight)
            for part in rows.split(ROWS):
                tile = part @ weight.T
                gradients.append(tile @ weight)
                dweight.addmm_(tile.T, part)
        rows.backward(torch.cat(gradients))
        weight.grad = dweight if weight.grad is None else weight.grad.add_(dweight)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# -- the first call


@dataclass(frozen=True)
class First:
    """What a first call gave: its loss, the norm of all gradients, the tokens that were run."""

    loss: float | None
    gradient_norm: float
    tokens: int


def first_call(step: Step) -> First:
    with Counter(step.model) as counter:
        loss = step.run()
    gradients = [x.grad for x in step.model.parameters() if x.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    # a trainer that shares prompts has run a few pairs of its first batch apart before
    own = counter.calls[-step.forwards :]
    return First(loss, norm, sum(rows * width for rows, width in own))


def check_same(found: dict[str, First]) -> None:
    """AssertionError where losses or gradients are apart by more than rounding."""
    name, *others = (x for x in found if found[x].loss is not None)
    first = found[name]
    for other in others:
        x = found[other]
        where = f"{other} and {name}"
        apart = abs(x.loss - first.loss)
        assert apart <= TOLERANCE[DTYPE], f"{where}: losses {x.loss} and {first.loss}"
        relative = abs(x.gradient_norm / first.gradient_norm - 1)
        norms = f"{x.gradient_norm} and {first.gradient_norm}"
        assert relative <= TOLERANCE[DTYPE], f"{where}: norms of the gradients {norms}"
