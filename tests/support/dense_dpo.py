"""Annotated pairs of random tokens, batches of them as trainers of others have them, and T-REG's
step in float64.
"""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from treg.ops import reference

VOCAB, BETA, ALPHA = 400, 0.3, 0.5
SIDES = ("chosen", "rejected")
F32 = 2e-5  # relative


def make_pairs(count=3, seed=0):
    """Completions of different lengths; rows of an annotated file, except for the reference's
    sums.
    """
    random = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        pair = {
            "index": i,
            "where": str(i),
            "prompt_ids": random.integers(3, VOCAB, random.integers(2, 6)),
            "ref_chosen_logps": 0.0,
            "ref_rejected_logps": 0.0,
        }
        for side in SIDES:
            n = random.integers(1, 8)
            pair[f"{side}_ids"] = random.integers(3, VOCAB, n)
            pair[f"{side}_token_rewards"] = random.uniform(-0.5, 0.5, n).astype(np.float32)
        pairs.append(pair)
    return pairs


def with_end(pairs, token):
    """Each completion with another token at its end, whose reward is 0."""
    ends = {"ids": token, "token_rewards": np.float32(0)}
    return [
        pair
        | {
            f"{side}_{name}": np.append(pair[f"{side}_{name}"], end)
            for side in SIDES
            for name, end in ends.items()
        }
        for pair in pairs
    ]


def rows_of(pairs):
    """(prompt, completion) of each sequence, the chosen ones first."""
    return [(pair["prompt_ids"], pair[f"{side}_ids"]) for side in SIDES for pair in pairs]


def collate(pairs):
    """Rows padded on the right to a multiple of 8; labels are not shifted."""
    rows = rows_of(pairs)
    width = max(len(a) + len(b) for a, b in rows)
    width += -width % 8
    batch = {
        name: torch.full((len(rows), width), x)
        for name, x in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    for i, (prompt, completion) in enumerate(rows):
        n, end = len(prompt), len(prompt) + len(completion)
        batch["input_ids"][i, :end] = torch.from_numpy(np.concatenate([prompt, completion]))
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, n:end] = torch.from_numpy(completion)
    return batch


def padded_left(batch):
    """A batch of `collate` with its padding in front."""
    lengths = batch["attention_mask"].sum(-1)
    return {
        name: torch.stack([row.roll(len(row) - int(n)) for row, n in zip(x, lengths, strict=True)])
        for name, x in batch.items()
    }


def rewards_of(pairs, labels):
    """rhat of the token at each place, float64, in the shape of labels."""
    flat = np.concatenate(
        [pair[f"{side}_token_rewards"] for side in SIDES for pair in pairs]
    ).astype(np.float64)
    return torch.zeros(labels.shape, dtype=torch.float64).masked_scatter(
        labels != -100, torch.from_numpy(flat)
    )


def perturbed(model, scale=0.05):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def with_lora(model):
    """Adapters that change the output already."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return model


def shorter_weights(scored, tail):
    """[2B, T-1] float64: 1, and tail at the scored tokens of a sequence beyond the number that its
    pair's other has.
    """
    weights = torch.ones(scored.shape, dtype=torch.float64)
    for w, l, u_w, u_l in zip(*scored.chunk(2), *weights.chunk(2), strict=True):
        shorter = min(int(w.sum()), int(l.sum()))
        for places, u in ((w, u_w), (l, u_l)):
            u[torch.nonzero(places)[shorter:, 0]] = tail
    return weights


def dense_logps(model, batch):
    """[2B, T-1], 0 where not scored."""
    target = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ]
    logps = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.where(target != -100, logps, 0.0)


def oracle(
    model,
    ref_model,
    pairs,
    alpha,
    *,
    weights=None,
    ref_weights=None,
    likelihood=None,
    reference_free=False,
    **options,
):
    """Loss, mean L_reg and gradients of the dense reference in float64.

    ref_model: None: model without its adapters. weights, ref_weights: functions of the mask of
    scored tokens [2B, T-1] that give each token's weight in the margin; likelihood: a function of
    log-probs and mask of the chosen sequences that gives what is added to the loss. options: of
    `treg.ops.reference.fused_treg_loss`.
    """
    model, batch = copy.deepcopy(model).double(), collate(pairs)
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    target, rewards = batch["labels"][:, 1:], rewards_of(pairs, batch["labels"])[:, 1:]
    scored, ref = target != -100, None
    ones = torch.ones(target.shape, dtype=torch.float64)
    u = ones if weights is None else weights(scored)
    if not reference_free:
        with torch.no_grad(), model.disable_adapter() if ref_model is None else nullcontext():
            ref = dense_logps(
                model if ref_model is None else copy.deepcopy(ref_model).double(), batch
            )
        ref = ref * (ones if ref_weights is None else ref_weights(scored)) / u
        options["token_weights"] = u
    found = reference.fused_treg_loss(
        bare.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state[:, :-1],
        bare.lm_head.weight,
        target,
        rewards * u,
        ref,
        beta=BETA,
        alpha=alpha,
        **options,
    )
    loss, half = found.loss, len(pairs)
    if likelihood is not None:
        loss = loss + likelihood(dense_logps(bare, batch)[:half], scored[:half])
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    return loss.item(), found.reg_loss.mean().item(), dict(zip(named, grads, strict=True))


def step(trainer, batch):
    """Loss, metrics and gradients of get_batch_loss_metrics, which must leave the batch as it
    is.
    """
    before = {name: x.clone() for name, x in batch.items()}
    trainer.model.zero_grad()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, dict(batch))
    loss.backward()
    assert all(before[name].equal(x) for name, x in batch.items())
    grads = {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    return loss.item(), metrics, grads


def watch_dtypes(policy, reference):
    """Dtypes that a layer of each gives from now on."""
    seen = {"policy": set(), "reference": set()}
    for name, model in zip(seen, (policy, reference), strict=True):
        layer = model.model.layers[0].mlp
        layer.register_forward_hook(
            lambda module, args, output, to=seen[name]: to.add(output.dtype)
        )
    return seen


class Gradients(TrainerCallback):
    """Of each optimizer step, by parameter."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


def assert_same(found, expected, rel=F32):
    """Of each parameter, and none is left out."""
    assert found.keys() == expected.keys()
    assert sum(bool(x.abs().max() > 1e-4) for x in expected.values()) > len(expected) // 2
    total = torch.cat([x.flatten().double() for x in expected.values()]).norm()
    for name, x in expected.items():
        assert (found[name] - x).norm() <= rel * max(x.norm(), 1e-2 * total), name
