"""ms-swift's DPO with T-REG: its own numbers without the regularizer, dense ones with it; padded
and packed.

Where ms-swift is not installed, stubs stand for what is used of it: the signatures and the order of
calls of `DPOTrainer`, its mixins and `TrainerFactory` in ms-swift 4.6.0
(swift/rlhf_trainers/dpo_trainer.py and rlhf_mixin.py, swift/trainers/mixin.py, seq2seq_trainer.py
and trainer_factory.py).
"""

import copy
import importlib
import importlib.metadata
import importlib.util
import runpy
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_dpo import (
    ALPHA,
    BETA,
    F32,
    VOCAB,
    Gradients,
    assert_same,
    collate,
    dense_logps,
    make_pairs,
    oracle,
    padded_left,
    perturbed,
    rewards_of,
    rows_of,
    shorter_weights,
    step,
    watch_dtypes,
    with_end,
    with_lora,
)
from tiny import tiny_llama, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from treg.data.annotated import write_annotated
from treg.integrations import swift
from treg.rewards.lookup import TokenRewards

EXAMPLE = Path(__file__).parents[2] / "examples" / "swift_treg.py"

# -- ms-swift


@dataclass
class StubConfig(TrainingArguments):
    """Of swift.rlhf_trainers.DPOConfig."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    loss_type: Any = field(default_factory=lambda: ["sigmoid"])
    loss_weights: Any = None
    ld_alpha: float | None = None
    rpo_alpha: float | None = None
    use_logits_to_keep: bool | None = None
    router_aux_loss_coef: float = 0.0


def packed_sum(values, lengths):
    return torch.stack([x.sum() for x in values.split(lengths.tolist())])


class StubDPO(Trainer):
    """Of swift.rlhf_trainers.DPOTrainer."""

    def __init__(self, model=None, ref_model=None, *_args, **kwargs):
        args, self.template = kwargs["args"], kwargs.pop("template")
        self.beta, self.label_smoothing = args.beta, args.label_smoothing
        self.loss_type = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
        self.loss_weights, self.label_pad_token_id, self.ref_model = (
            args.loss_weights,
            -100,
            ref_model,
        )
        self.is_encoder_decoder = self.template.is_encoder_decoder
        self._stored_metrics = defaultdict(lambda: defaultdict(list))
        super().__init__(model, *_args, data_collator=self.template.data_collator, **kwargs)
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        self.aux_loss_enabled = model.model_info.is_moe_model and args.router_aux_loss_coef > 0

    def get_use_logits_to_keep(self, default_value=True):
        given = self.args.use_logits_to_keep
        return default_value if given is None else given

    def prepare_logits_to_keep(self, inputs):
        labels = inputs["labels"]
        if labels.shape[0] == 1:
            scored = (labels != -100)[0]
            inputs["labels"] = F.pad(labels[:, scored], (1, 0), value=-100)
            inputs["logits_to_keep"] = F.pad(scored[1:], (0, 1), value=True)
        else:
            keep = labels.shape[-1] - (labels != -100).int().argmax(-1).min().item() + 1
            inputs["labels"], inputs["logits_to_keep"] = labels[:, -keep:], keep

    def get_cu_seqlens(self, position_ids, logits_to_keep):
        starts = torch.nonzero(position_ids.flatten() == 0)[:, 0]
        ends = torch.cat([starts, torch.tensor([position_ids.numel()])])
        if logits_to_keep is None:
            return ends
        return F.pad(logits_to_keep.long().cumsum(0), (1, 0))[ends]

    def get_per_token_logps(self, logits, labels, label_pad_token_id=-100, reduction="mean"):
        assert logits.shape[:-1] == labels.shape
        scored = labels != label_pad_token_id
        logps = (
            logits.log_softmax(-1).gather(-1, labels.masked_fill(~scored, 0)[..., None])[..., 0]
            * scored
        )
        return logps, logits.mean(-1) * scored, scored

    def concatenated_forward(self, model, batch, is_ref_model=False):
        batch = batch.copy()
        if self.get_use_logits_to_keep(self.template.sequence_parallel_size == 1):
            self.prepare_logits_to_keep(batch)
        labels = batch.pop("labels", None)
        position_ids = batch.pop("text_position_ids", None)
        position_ids = batch.get("position_ids") if position_ids is None else position_ids
        logits = model(**batch, use_cache=False).logits
        if logits.shape[1] != labels.shape[1]:
            logits = logits[:, -labels.shape[1] :]
        labels = torch.roll(labels, shifts=-1, dims=1)
        logps, means, scored = self.get_per_token_logps(
            logits, labels, label_pad_token_id=self.label_pad_token_id
        )
        desensitise = self.args.ld_alpha is not None and not is_ref_model
        output = {}
        if self.template.padding_free:
            ends = self.get_cu_seqlens(position_ids, batch.get("logits_to_keep"))
            n, lengths = (len(ends) - 1) // 2, ends[1:] - ends[:-1]
            counts = packed_sum(scored.flatten().long(), lengths)
            public = torch.cat([torch.min(counts[:n], counts[n:])] * 2)
            sums = packed_sum(logps.flatten(), lengths)
            if desensitise:
                parts = packed_sum(
                    logps[scored], torch.stack((public, counts - public), -1).flatten()
                ).view(-1, 2)
                sums = parts[:, 0] + self.args.ld_alpha * parts[:, 1]
            chosen, rejected = (
                (slice(None), slice(None, ends[n])),
                (slice(None), slice(ends[n], None)),
            )
        else:
            n, counts = labels.shape[0] // 2, scored.sum(dim=1)
            public = torch.cat([torch.min(counts[:n], counts[n:])] * 2)
            front = (scored.cumsum(dim=1) - 1) * scored < public[:, None]
            sums = logps.sum(-1)
            if desensitise:
                sums = (logps * (front & scored)).sum(1) + self.args.ld_alpha * (
                    logps * (~front & scored)
                ).sum(1)
            chosen, rejected = slice(None, n), slice(n, None)
        if not is_ref_model:
            output["nll_loss"] = -logps[chosen][scored[chosen]].mean()
        return output | {
            "chosen_logps": sums[:n],
            "rejected_logps": sums[n:],
            "mean_chosen_logits": means[chosen][scored[chosen]].mean(),
            "mean_rejected_logits": means[rejected][scored[rejected]].mean(),
            "chosen_completion_token_counts": counts[:n],
            "rejected_completion_token_counts": counts[n:],
        }

    def compute_ref_log_probs(self, batch):
        adapters = hasattr(self.model, "disable_adapter") and self.ref_model is None
        with torch.no_grad(), self.model.disable_adapter() if adapters else nullcontext():
            model = self.model if self.ref_model is None else self.ref_model
            output = self.concatenated_forward(model, batch, is_ref_model=True)
        return output["chosen_logps"], output["rejected_logps"]

    def dpo_loss(
        self,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        loss_type="sigmoid",
        model_output=None,
    ):
        m, eps = (
            chosen_logps - rejected_logps - (ref_chosen_logps - ref_rejected_logps),
            self.label_smoothing,
        )
        losses = {
            "sigmoid": lambda: (
                -(1 - eps) * F.logsigmoid(self.beta * m) - eps * F.logsigmoid(-self.beta * m)
            ),
            "hinge": lambda: torch.relu(1 - self.beta * m),
            "ipo": lambda: (m - 1 / (2 * self.beta)) ** 2,
            "sft": lambda: model_output["nll_loss"].expand(len(m)),
        }[loss_type]()
        rewards = (
            (self.beta * (x - y)).detach()
            for x, y in ((chosen_logps, ref_chosen_logps), (rejected_logps, ref_rejected_logps))
        )
        return losses, *rewards

    def get_batch_loss_metrics(self, model, batch, train_eval="train", pair_loss_scale=None):
        output = self.concatenated_forward(model, batch)
        policy = output["chosen_logps"], output["rejected_logps"]
        ref = self.compute_ref_log_probs(batch)
        losses, chosen, rejected = 0, 0, 0
        for i, loss_type in enumerate(self.loss_type):
            given = (*policy, *ref)
            if loss_type == "ipo":
                counts = (
                    output["chosen_completion_token_counts"],
                    output["rejected_completion_token_counts"],
                )
                given = [x / n for x, n in zip(given, counts * 2, strict=True)]
            found, rho_w, rho_l = self.dpo_loss(*given, loss_type, output)
            if pair_loss_scale is not None and loss_type != "sft":
                found = found * (found.numel() * pair_loss_scale)
            weight = self.loss_weights[i] if self.loss_weights else 1.0
            losses, chosen, rejected = (
                losses + found * weight,
                chosen + rho_w * weight,
                rejected + rho_l * weight,
            )
        if self.args.rpo_alpha is not None:
            losses = losses + self.args.rpo_alpha * output["nll_loss"]
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": policy[0],
            "logps/rejected": policy[1],
            "logits/chosen": output["mean_chosen_logits"],
            "logits/rejected": output["mean_rejected_logits"],
        }
        prefix = "eval_" if train_eval == "eval" else ""
        return losses.mean(), {
            prefix + k: self.accelerator.gather_for_metrics(x.float()).mean().item()
            for k, x in metrics.items()
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, metrics = self.get_batch_loss_metrics(
            model, inputs, train_eval="train", pair_loss_scale=None
        )
        for name, value in metrics.items():
            self._stored_metrics["train"][name].append(value)
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            loss = loss / self.args.gradient_accumulation_steps
        return (loss, metrics) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only=False, *args, **kwargs):
        with torch.no_grad():
            loss, _ = self.get_batch_loss_metrics(model, inputs, train_eval="eval")
        return loss.detach(), None, None

    def log(self, logs, start_time=None):
        for name, values in self._stored_metrics.pop(
            "train" if "loss" in logs else "eval", {}
        ).items():
            logs[name] = sum(values) / len(values)
        return Trainer.log(self, logs, start_time)


class StubFactory:
    """Of swift.trainers.trainer_factory.TrainerFactory."""

    TRAINER_MAPPING: dict = {}  # noqa: RUF012

    @classmethod
    def get_trainer_cls(cls, args):
        module, name = cls.TRAINER_MAPPING[args.rlhf_type].rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def stub_package(monkeypatch, version="4.6.0"):
    names = ("swift", "swift.rlhf_trainers", "swift.trainers", "swift.trainers.trainer_factory")
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    StubFactory.TRAINER_MAPPING = {
        "dpo": "swift.rlhf_trainers.DPOTrainer",
        "kto": "swift.rlhf_trainers.KTOTrainer",
    }
    modules["swift.rlhf_trainers"].DPOTrainer = StubDPO
    modules["swift.trainers.trainer_factory"].TrainerFactory = StubFactory
    original = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: version if name == "ms-swift" else original(name),
    )
    return StubFactory


@pytest.fixture
def factory(monkeypatch):
    """ms-swift's TrainerFactory, as it was before and after."""
    try:
        from swift.trainers.trainer_factory import TrainerFactory as found
    except ImportError:
        found = stub_package(monkeypatch)
    yield found
    swift.unpatch()


def trainer_cls(factory):
    return factory.get_trainer_cls(SimpleNamespace(rlhf_type="dpo"))


# -- batches and trainers
# -


def collate_packed(pairs):
    """One row of all sequences; attention starts anew where position_ids is 0."""
    ids = [np.concatenate(row) for row in rows_of(pairs)]
    labels = [
        np.concatenate([np.full(len(prompt), -100), completion])
        for prompt, completion in rows_of(pairs)
    ]
    columns = {"input_ids": ids, "labels": labels, "position_ids": [np.arange(len(x)) for x in ids]}
    return {name: torch.from_numpy(np.concatenate(x))[None] for name, x in columns.items()}


def batch_of(pairs, packed):
    return (collate_packed if packed else collate)(pairs)


def bare(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def make_trainer(
    tmp_path, kind, model, ref_model, pairs, *, packed=False, template=None, **options
):
    """options: of DPOConfig."""
    try:
        from swift.rlhf_trainers import DPOConfig
    except ImportError:
        DPOConfig = StubConfig
    defaults = {
        "beta": BETA,
        "loss_type": ["sigmoid"],
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": len(pairs),
        "per_device_eval_batch_size": len(pairs),
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "gradient_checkpointing": False,
    }
    template = {
        "padding_free": packed,
        "packing": False,
        "sequence_parallel_size": 1,
        "is_encoder_decoder": False,
        "tokenizer": tiny_tokenizer(),
        "data_collator": lambda x, padding_to=None: batch_of(x, packed),
        "task_type": "causal_lm",
        "padding_side": "right",
        "template_meta": SimpleNamespace(stop_words=[], suffix=[]),
        "get_base_model": bare,
    } | (template or {})
    for x in (model, ref_model):
        if x is not None:
            bare(x).model_info = SimpleNamespace(is_moe_model=False)
            if not hasattr(x, "model_meta"):
                bare(x).model_meta = SimpleNamespace(is_multimodal=False)
    return kind(
        model=model,
        ref_model=ref_model,
        args=DPOConfig(str(tmp_path), **defaults | options),
        template=SimpleNamespace(**template),
        train_dataset=pairs,
        eval_dataset=pairs,
    )


# options of ms-swift, and of the oracle
CASES = {
    "dpo": ({}, {}),
    "smoothed": ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "hinge": ({"loss_type": ["hinge"]}, {"loss_type": "hinge"}),
    "ipo": ({"loss_type": ["ipo"]}, {"loss_type": "ipo"}),
    "ld_alpha": ({"ld_alpha": 0.4}, {"weights": lambda x: shorter_weights(x, 0.4)}),
    "rpo": ({"rpo_alpha": 0.7}, {"likelihood": lambda lp, x: -0.7 * lp.sum() / x.sum()}),
    "sft": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "rpo_alpha": 0.2},
        {"likelihood": lambda lp, x: -0.5 * lp.sum() / x.sum()},
    ),
}
STUBS = pytest.mark.skipif(
    importlib.util.find_spec("swift") is not None,
    reason="ms-swift patches transformers.Trainer where it is installed",
)
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@pytest.fixture
def models():
    """A reference, and a policy that has moved away from it."""
    model = tiny_llama(VOCAB)
    return perturbed(model), model


# -- one step


@LAYOUTS
@pytest.mark.parametrize("case", CASES)
def test_without_the_regularizer_it_is_swift(factory, models, tmp_path, case, packed):
    pairs, (policy, ref), options = make_pairs(), models, CASES[case][0]
    own = make_trainer(
        tmp_path, trainer_cls(factory), *map(copy.deepcopy, models), pairs, packed=packed, **options
    )
    expected = step(own, batch_of(pairs, packed))
    swift.patch(None, alpha=0)
    ours = make_trainer(
        tmp_path, trainer_cls(factory), policy, ref, pairs, packed=packed, **options
    )
    found = step(ours, batch_of(pairs, packed))
    assert found[0] == pytest.approx(expected[0], rel=F32)
    assert_same(found[2], expected[2])
    assert found[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-5)


@LAYOUTS
@pytest.mark.parametrize("case", CASES)
def test_with_the_regularizer_it_is_treg(factory, models, tmp_path, case, packed):
    pairs, (policy, ref), (options, exact) = make_pairs(), models, CASES[case]
    loss, _, grads = oracle(policy, ref, pairs, ALPHA, **exact)
    _, reg, _ = oracle(policy, ref, pairs, ALPHA)
    swift.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(
        tmp_path, trainer_cls(factory), policy, ref, pairs, packed=packed, **options
    )
    found, metrics, found_grads = step(trainer, batch_of(pairs, packed))
    assert found == pytest.approx(loss, rel=F32)
    assert metrics["treg/reg_loss"] == pytest.approx(reg, rel=F32)
    assert_same(found_grads, grads)
    assert oracle(policy, ref, pairs, 0, **exact)[0] != pytest.approx(loss, rel=1e-3)


def test_padding_on_the_left(factory, models, tmp_path):
    pairs, (policy, ref) = make_pairs(), models
    loss, _, grads = oracle(policy, ref, pairs, ALPHA)
    swift.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, ref, pairs)
    found, _, found_grads = step(trainer, padded_left(collate(pairs)))
    assert found == pytest.approx(loss, rel=F32)
    assert_same(found_grads, grads)


@pytest.mark.parametrize("alpha", [0, ALPHA])
def test_adapters_without_a_reference_model(factory, tmp_path, alpha):
    pairs, policy = make_pairs(), with_lora(tiny_llama(VOCAB))
    loss, _, grads = oracle(policy, None, pairs, alpha)
    swift.patch(TokenRewards(pairs), alpha=alpha)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, None, pairs)
    found, _, found_grads = step(trainer, collate(pairs))
    assert found == pytest.approx(loss, rel=F32)
    assert_same(found_grads, grads)


@LAYOUTS
def test_no_logits_are_made(factory, models, tmp_path, monkeypatch, packed):
    pairs, (policy, ref) = make_pairs(), models
    swift.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, ref, pairs, packed=packed)
    rows = []
    linear = F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, w, b=None: rows.append(w.shape[0]) or linear(x, w, b)
    )
    step(trainer, batch_of(pairs, packed))
    assert rows and VOCAB not in rows


def test_pair_loss_scale(factory, models, tmp_path):
    """What ms-swift multiplies the pairs of packs of different sizes by scales the regularizer
    too.
    """
    pairs, (policy, ref) = make_pairs(), models
    loss, _, grads = oracle(policy, ref, pairs, ALPHA)
    swift.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, ref, pairs, packed=True)
    found, _ = trainer.get_batch_loss_metrics(
        policy, collate_packed(pairs), pair_loss_scale=torch.tensor(0.5)
    )
    found.backward()
    scale = 0.5 * len(pairs)
    assert found.item() == pytest.approx(scale * loss, rel=F32)
    assert_same(
        {n: p.grad for n, p in policy.named_parameters()}, {n: scale * x for n, x in grads.items()}
    )


# -- loss_scale


@LAYOUTS
def test_loss_scale_as_token_weights(factory, models, tmp_path, packed):
    """In the margin, of policy and reference."""
    pairs, (policy, ref) = make_pairs(), models
    place = collate(pairs)["labels"] != -100
    scale = torch.zeros(place.shape).masked_scatter(place, torch.rand(int(place.sum())) + 0.5)
    loss, _, grads = oracle(
        policy,
        ref,
        pairs,
        ALPHA,
        weights=lambda x: scale[:, 1:].double() + ~x,
        ref_weights=lambda x: scale[:, 1:].double() + ~x,
    )
    batch = batch_of(pairs, packed)
    batch["loss_scale"] = torch.zeros(batch["labels"].shape).masked_scatter(
        batch["labels"] != -100, scale[place]
    )
    swift.patch(TokenRewards(pairs), alpha=ALPHA, loss_scale=True)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, ref, pairs, packed=packed)
    found, _, found_grads = step(trainer, batch)
    assert found == pytest.approx(loss, rel=F32)
    assert_same(found_grads, grads)
    del batch["loss_scale"]  # of a binary one the template makes labels
    assert step(trainer, batch)[0] == pytest.approx(oracle(policy, ref, pairs, ALPHA)[0], rel=F32)


def test_loss_scale_is_not_passed_over(factory, models, tmp_path):
    pairs, (policy, ref) = make_pairs(), models
    swift.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, ref, pairs)
    batch = collate(pairs)
    with pytest.raises(ValueError, match="loss_scale: expected none"):
        step(trainer, batch | {"loss_scale": torch.ones(batch["labels"].shape)})


def swift_sft_loss(logits, labels, loss_scale):
    """Of Seq2SeqTrainer.compute_loss and per_token_loss_func in ms-swift 4.6.0."""
    rolled = torch.roll(labels, shifts=-1, dims=-1).view(-1)
    losses = F.cross_entropy(
        logits.view(-1, logits.shape[-1]), rolled, ignore_index=-100, reduction="none"
    )
    losses = losses * torch.roll(loss_scale, shifts=-1, dims=-1).view(-1)
    return losses.sum() / (labels != -100).sum()


def test_loss_scale_of_rewards_weighs_their_tokens():
    pairs, model = make_pairs(), tiny_llama(VOCAB).double()
    batch = collate(pairs)
    rewards = rewards_of(pairs, batch["labels"])
    scale = swift.loss_scale_of_rewards(rewards, batch["labels"], ALPHA)
    assert scale.dtype == torch.float32 and not scale[batch["labels"] == -100].any()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = swift_sft_loss(logits, batch["labels"], scale)
    expected = (
        -((1 + ALPHA * rewards[:, 1:]) * dense_logps(model, batch)).sum()
        / (batch["labels"] != -100).sum()
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    back = swift.token_weights_of_loss_scale(scale)
    scored = batch["labels"][:, 1:] != -100
    assert (
        torch.allclose(back[scored].double(), 1 + ALPHA * rewards[:, 1:][scored])
        and not back[~scored].any()
    )


def test_loss_scale_of_bad_rewards():
    labels = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"token_rewards: expected the shape of labels \[2, 3\], got \[2, 4\]"
    ):
        swift.loss_scale_of_rewards(torch.zeros(2, 4), labels, 0.5)
    for rewards in (torch.full((2, 3), -0.5), torch.full((2, 3), float("nan"))):
        with pytest.raises(ValueError, match=r"expected 1 \+ alpha \* rhat >= 0"):
            swift.loss_scale_of_rewards(rewards, labels, 2.1)


# -- a training


@pytest.fixture
def annotated(tmp_path):
    path, pairs = tmp_path / "annotated.parquet", make_pairs()
    write_annotated(path, pairs, {})
    return path, pairs


@STUBS
@LAYOUTS
def test_training_from_an_annotated_file(monkeypatch, models, annotated, tmp_path, packed):
    factory, (path, pairs), (policy, ref), gradients = (
        stub_package(monkeypatch),
        annotated,
        models,
        Gradients(),
    )
    loss, reg, grads = oracle(policy, ref, pairs, ALPHA)
    plain, _, _ = oracle(policy, ref, pairs, 0)
    swift.patch(path, alpha=ALPHA)
    trainer = make_trainer(
        tmp_path,
        trainer_cls(factory),
        policy,
        ref,
        pairs,
        packed=packed,
        max_steps=2,
        max_grad_norm=0.0,
        optim="sgd",
    )
    trainer.add_callback(gradients)
    evaluated, *_ = trainer.prediction_step(policy, batch_of(pairs, packed), True)
    assert evaluated.item() == pytest.approx(plain, rel=F32)  # no gradients: the trainer's own loss
    trainer.train()
    first, second = [line for line in trainer.state.log_history if "loss" in line]
    assert first["loss"] == pytest.approx(loss, abs=1e-4)  # as transformers rounds it
    assert first["treg/reg_loss"] == pytest.approx(reg, rel=1e-3)
    assert_same(gradients.steps[0], grads)
    assert second["loss"] < first["loss"]


@STUBS
def test_mixed_precision(monkeypatch, models, tmp_path):
    """Policy and reference run as accelerate would have them: float32 weights under bfloat16."""
    monkeypatch.setenv(
        "ACCELERATE_MIXED_PRECISION", "no"
    )  # what transformers before 5 sets is undone afterwards
    factory, pairs, (policy, ref) = stub_package(monkeypatch), make_pairs(), models
    loss, _, _ = oracle(policy, ref, pairs, ALPHA)
    swift.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, ref, pairs, bf16=True)
    seen = watch_dtypes(policy, ref)
    trainer.train()
    assert seen == {"policy": {torch.bfloat16}, "reference": {torch.bfloat16}}
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=0.1)


@LAYOUTS
def test_another_end_of_a_response(factory, models, annotated, tmp_path, packed):
    (path, pairs), (policy, ref) = annotated, models
    longer = with_end(pairs, 7)
    loss, _, grads = oracle(policy, ref, longer, ALPHA)
    swift.patch(path, alpha=ALPHA, tail=1)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, ref, longer, packed=packed)
    found, _, found_grads = step(trainer, batch_of(longer, packed))
    assert found == pytest.approx(loss, rel=F32)
    assert_same(found_grads, grads)


@LAYOUTS
def test_unknown_sequences(factory, models, tmp_path, packed):
    pairs, (policy, ref) = make_pairs(), models
    swift.patch(TokenRewards(make_pairs(seed=1)), alpha=ALPHA)
    trainer = make_trainer(tmp_path, trainer_cls(factory), policy, ref, pairs, packed=packed)
    with pytest.raises(ValueError, match="chat template and truncation"):
        step(trainer, batch_of(pairs, packed))


# -- patching


def test_patch_twice_and_undo(factory, annotated, monkeypatch):
    before = dict(factory.TRAINER_MAPPING)
    original = trainer_cls(factory)
    swift.unpatch()
    assert before == factory.TRAINER_MAPPING
    for alpha in (0.1, 0.2):
        swift.patch(annotated[0], alpha=alpha)
        assert trainer_cls(factory).__mro__[1] is original
    swift.unpatch()
    assert before == factory.TRAINER_MAPPING and trainer_cls(factory) is original
    monkeypatch.setitem(factory.TRAINER_MAPPING, "dpo", "someone.else.Trainer")
    swift.unpatch()
    assert factory.TRAINER_MAPPING["dpo"] == "someone.else.Trainer"


def test_example(monkeypatch, annotated):
    """The example as ms-swift imports a plugin, in the folder of annotated.parquet."""
    factory = stub_package(monkeypatch)
    monkeypatch.chdir(annotated[0].parent)
    runpy.run_path(str(EXAMPLE), run_name="_swift_external")
    assert trainer_cls(factory)._treg_base is StubDPO
    assert factory.TRAINER_MAPPING["kto"] == "swift.rlhf_trainers.KTOTrainer"


def test_without_swift(monkeypatch):
    monkeypatch.setitem(sys.modules, "swift.trainers.trainer_factory", None)
    with pytest.raises(ImportError, match="expected ms-swift to be installed"):
        swift.patch(None, alpha=0)


@pytest.mark.parametrize("version", ["3.12.6", "5.0.0"])
def test_other_versions(monkeypatch, version):
    factory = stub_package(monkeypatch, version)
    with pytest.raises(RuntimeError, match=rf"expected ms-swift >= 4\.0 and < 5, got {version}"):
        swift.patch(None, alpha=0)
    assert trainer_cls(factory) is StubDPO


def test_bad_input(factory, annotated):
    base, (path, _) = trainer_cls(factory), annotated
    with pytest.raises(ValueError, match="alpha: expected a number >= 0, got -1"):
        swift.make_trainer(base, path, alpha=-1)
    with pytest.raises(
        ValueError, match=r"token_rewards: expected an annotated file for alpha=0\.25"
    ):
        swift.make_trainer(base, None)
    with pytest.raises(FileNotFoundError, match="no such file"):
        swift.make_trainer(base, path.parent / "absent.parquet")

    class Other(base):
        def get_per_token_logps(self, logits):
            raise NotImplementedError

    for other in (Other, Trainer):
        with pytest.raises(TypeError, match="base: expected ms-swift's DPOTrainer with"):
            swift.make_trainer(other, path)


@pytest.mark.parametrize(
    "what", ["multimodal", "encoder-decoder", "sequence_parallel_size", "router_aux_loss_coef"]
)
def test_what_cannot_be_served(monkeypatch, tmp_path, models, what):
    factory, (policy, ref) = stub_package(monkeypatch), models
    policy.model_meta = SimpleNamespace(is_multimodal=what == "multimodal")
    template = {"sequence_parallel_size": 2} if what == "sequence_parallel_size" else {}
    template |= {"is_encoder_decoder": True} if what == "encoder-decoder" else {}
    swift.patch(None, alpha=0)

    class Routed(trainer_cls(factory)._treg_base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.aux_loss_enabled = what == "router_aux_loss_coef"

    kind = swift.make_trainer(Routed, None, alpha=0)
    with pytest.raises(ValueError, match=f"expected a text model on its own, got .*{what}"):
        make_trainer(tmp_path, kind, policy, ref, make_pairs(), template=template)
