"""LLaMA-Factory's DPO with T-REG: its own numbers without the regularizer, dense ones with it.

Where LLaMA-Factory is not installed, stubs stand for what is used of it: the signatures and the
order of calls of `CustomDPOTrainer` in LLaMA-Factory 0.9.5 (src/llamafactory/train/dpo/trainer.py),
of the methods of trl.DPOTrainer 0.24.0 that it builds on, and of `PairwiseDataCollatorWithPadding`
(src/llamafactory/data/collator.py). `run_dpo` looks the class up in its module when it is called
(src/llamafactory/train/dpo/workflow.py).
"""

import copy
import importlib.metadata
import runpy
import sys
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dense_dpo import (
    ALPHA,
    BETA,
    F32,
    SIDES,
    VOCAB,
    Gradients,
    assert_same,
    collate,
    make_pairs,
    oracle,
    padded_left,
    perturbed,
    shorter_weights,
    step,
    watch_dtypes,
    with_end,
    with_lora,
)
from helpers import error
from tiny import file_with_weights, tiny_llama, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from treg.data.annotated import write_annotated
from treg.integrations import llamafactory
from treg.rewards.lookup import TokenRewards

GAMMA = 0.2
EXAMPLE = Path(__file__).parents[2] / "examples" / "llamafactory_treg.py"

# -- LLaMA-Factory


class StubDPO(Trainer):
    """Of trl.DPOTrainer 0.24.0."""

    def dpo_loss(
        self,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        loss_type="sigmoid",
        model_output=None,
    ):
        assert loss_type == "sigmoid"  # LLaMA-Factory passes no other
        m = self.beta * (chosen_logps - ref_chosen_logps - (rejected_logps - ref_rejected_logps))
        losses = -(1 - self.label_smoothing) * F.logsigmoid(
            m
        ) - self.label_smoothing * F.logsigmoid(-m)
        rewards = (
            self.beta * (x - y).detach()
            for x, y in ((chosen_logps, ref_chosen_logps), (rejected_logps, ref_rejected_logps))
        )
        return losses, *rewards

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="train")
        self.store_metrics(metrics, train_eval="train")
        return (loss, metrics) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="eval")
        self.store_metrics(metrics, train_eval="eval")
        return loss.detach(), None, None

    def store_metrics(self, metrics, train_eval="train"):
        for name, value in metrics.items():
            self._stored_metrics[train_eval][name].append(value)


class StubCustomDPO(StubDPO):
    """Of llamafactory.train.dpo.trainer.CustomDPOTrainer 0.9.5."""

    def __init__(
        self, model, ref_model, finetuning_args, processor, disable_dropout=True, **kwargs
    ):
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        self.finetuning_args, self.ref_model = finetuning_args, ref_model
        self._stored_metrics = defaultdict(lambda: defaultdict(list))
        self.beta, self.loss_type = finetuning_args.pref_beta, finetuning_args.pref_loss
        self.ftx_gamma, self.simpo_gamma = finetuning_args.pref_ftx, finetuning_args.simpo_gamma
        self.label_smoothing, self.ld_alpha = (
            finetuning_args.dpo_label_smoothing,
            finetuning_args.ld_alpha,
        )
        Trainer.__init__(self, model=model, **kwargs)
        self.model_accepts_loss_kwargs = False
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
            self.ref_model.eval()

    def compute_preference_loss(
        self,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    ):
        w, l = policy_chosen_logps, policy_rejected_logps
        if self.finetuning_args.use_ref_model:
            return self.dpo_loss(w, l, reference_chosen_logps, reference_rejected_logps)
        if self.loss_type == "orpo":
            odds = (w - l) - (torch.log1p(-torch.exp(w)) - torch.log1p(-torch.exp(l)))
            losses = -w + self.beta * -F.logsigmoid(odds)
        else:
            losses = -F.logsigmoid(self.beta * (w - l - self.simpo_gamma / self.beta))
        return losses, self.beta * w.detach(), self.beta * l.detach()

    def concatenated_forward(self, model, batch, is_ref_model=False):
        if self.finetuning_args.use_ref_model:
            batch = {name: x.detach().clone() for name, x in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch, return_dict=True, use_cache=False).logits.to(torch.float32)
        target = labels[:, 1:]
        scored = target != -100
        logps = (
            logits[:, :-1].log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
            * scored
        )
        length = scored.sum(-1)
        if self.ld_alpha is not None and not is_ref_model:
            shorter = torch.cat([torch.min(*length.chunk(2))] * 2)
            public = (
                torch.arange(target.shape[1])
                < (torch.argmax(scored.int(), dim=1) + shorter)[:, None]
            )
            logps = logps * public + self.ld_alpha * (logps * ~public)
        sums = logps.sum(-1)
        averaged = self.loss_type in ["ipo", "orpo", "simpo"]
        sums = sums / length if averaged else sums
        (w, l), (logits_w, logits_l) = sums.chunk(2), logits.chunk(2)
        average = w if averaged else w / length.chunk(2)[0]
        return {
            "chosen_logps": w,
            "rejected_logps": l,
            "chosen_logits": logits_w,
            "rejected_logits": logits_l,
            "chosen_logps_avg": average,
        }

    def compute_reference_log_probs(self, model, batch):
        if not self.finetuning_args.use_ref_model:
            return None, None
        bare = self.ref_model is None
        context = self.accelerator.unwrap_model(model).disable_adapter() if bare else nullcontext()
        with torch.no_grad(), context:
            found = self.concatenated_forward(
                model if bare else self.ref_model, batch, is_ref_model=True
            )
        return found["chosen_logps"], found["rejected_logps"]

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        found = self.concatenated_forward(model, batch)
        w, l, logits_w, logits_l, average = found.values()
        losses, rho_w, rho_l = self.compute_preference_loss(
            w, l, *self.compute_reference_log_probs(model, batch)
        )
        if self.ftx_gamma > 1e-6:
            losses += self.ftx_gamma * -average
        metrics = {
            "rewards/chosen": rho_w,
            "rewards/rejected": rho_l,
            "rewards/accuracies": (rho_w > rho_l).float(),
            "rewards/margins": rho_w - rho_l,
            "logps/chosen": w,
            "logps/rejected": l,
            "logits/chosen": logits_w,
            "logits/rejected": logits_l,
        }
        if self.loss_type == "orpo":
            metrics |= {"sft_loss": -average, "odds_ratio_loss": (losses + average) / self.beta}
        prefix = "eval_" if train_eval == "eval" else ""
        return losses.mean(), {prefix + name: x.mean().item() for name, x in metrics.items()}

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)

    def log(self, logs, *args, **kwargs):
        for name, values in self._stored_metrics.pop(
            "train" if "loss" in logs else "eval", {}
        ).items():
            logs[name] = sum(values) / len(values)
        return Trainer.log(self, logs, *args, **kwargs)


def finetuning_args(pref_loss="sigmoid", **given):
    given = {"pref_beta": BETA, "simpo_gamma": GAMMA} | given
    try:
        from llamafactory.hparams import FinetuningArguments

        return FinetuningArguments(stage="dpo", pref_loss=pref_loss, **given)
    except ImportError:
        defaults = {
            "pref_ftx": 0.0,
            "dpo_label_smoothing": 0.0,
            "ld_alpha": None,
            "pref_loss": pref_loss,
        }
        return SimpleNamespace(**defaults | given, use_ref_model=pref_loss not in ("orpo", "simpo"))


def stub_package(monkeypatch, version="0.9.5"):
    """llamafactory.train.dpo.trainer and llamafactory.train.tuner.run_exp; what run_exp trains with
    is appended.
    """
    names = (
        "llamafactory",
        "llamafactory.train",
        "llamafactory.train.dpo",
        "llamafactory.train.dpo.trainer",
        "llamafactory.train.tuner",
    )
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    trainer, used = modules["llamafactory.train.dpo.trainer"], []
    trainer.CustomDPOTrainer = StubCustomDPO
    modules["llamafactory.train.tuner"].run_exp = lambda args=None, callbacks=None: used.append(
        trainer.CustomDPOTrainer
    )
    original = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: version if name == "llamafactory" else original(name),
    )
    return trainer, used


@pytest.fixture
def module(monkeypatch):
    """llamafactory.train.dpo.trainer, as it was before and after."""
    try:
        import llamafactory.train.dpo.trainer as found
    except ImportError:
        found, _ = stub_package(monkeypatch)
    yield found
    llamafactory.unpatch()


# -- trainers and the dense step
# -


def make_trainer(tmp_path, kind, model, ref_model, pairs, callbacks=(), training=None, **options):
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=len(pairs),
        per_device_eval_batch_size=len(pairs),
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        learning_rate=1e-2,
        dataloader_pin_memory=False,
        **training or {},
    )
    return kind(
        model=model,
        ref_model=ref_model,
        args=args,
        finetuning_args=finetuning_args(**options),
        data_collator=collate,
        callbacks=list(callbacks),
        train_dataset=pairs,
        eval_dataset=pairs,
        tokenizer=tiny_tokenizer(),
        processor=None,
    )


def average(scored):
    return scored / scored.sum(-1, keepdim=True).double()


# options of LLaMA-Factory, and of the oracle
CASES = {
    "dpo": ({}, {}),
    "smoothed": ({"dpo_label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    # of ipo it averages log-probs, and trl.DPOTrainer.dpo_loss then takes it for sigmoid
    "ipo": (
        {"pref_loss": "ipo"},
        {"weights": lambda x: average(x) + ~x, "ref_weights": lambda x: average(x) + ~x},
    ),
    "simpo": (
        {"pref_loss": "simpo"},
        {"loss_type": "simpo", "gamma": GAMMA, "reference_free": True},
    ),
    "orpo": ({"pref_loss": "orpo"}, {"loss_type": "orpo", "reference_free": True}),
    "ld_alpha": ({"ld_alpha": 0.4}, {"weights": lambda x: shorter_weights(x, 0.4)}),
    "ftx": (
        {"pref_ftx": 0.7},
        {"likelihood": lambda lp, x: -0.7 * (lp.sum(-1) / x.sum(-1)).mean()},
    ),
}


@pytest.fixture
def models():
    """A reference, and a policy that has moved away from it."""
    model = tiny_llama(VOCAB)
    return perturbed(model), model


# -- one step


@pytest.mark.parametrize("case", CASES)
def test_without_the_regularizer_it_is_llamafactory(module, models, tmp_path, case):
    pairs, (policy, ref) = make_pairs(), models
    own = make_trainer(
        tmp_path,
        module.CustomDPOTrainer,
        copy.deepcopy(policy),
        copy.deepcopy(ref),
        pairs,
        **CASES[case][0],
    )
    expected = step(own, collate(pairs))
    llamafactory.patch(None, alpha=0)
    ours = make_trainer(tmp_path, module.CustomDPOTrainer, policy, ref, pairs, **CASES[case][0])
    found = step(ours, collate(pairs))
    assert found[0] == pytest.approx(expected[0], rel=F32)
    assert_same(found[2], expected[2])
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        if not name.startswith("logits/"):
            assert found[1][name] == pytest.approx(value, rel=F32, abs=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_with_the_regularizer_it_is_treg(module, models, tmp_path, case):
    pairs, (policy, ref) = make_pairs(), models
    loss, reg, grads = oracle(policy, ref, pairs, ALPHA, **CASES[case][1])
    llamafactory.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(tmp_path, module.CustomDPOTrainer, policy, ref, pairs, **CASES[case][0])
    found, metrics, found_grads = step(trainer, collate(pairs))
    assert found == pytest.approx(loss, rel=F32)
    assert metrics["treg/reg_loss"] == pytest.approx(reg, rel=F32)
    assert_same(found_grads, grads)
    assert oracle(policy, ref, pairs, 0, **CASES[case][1])[0] != pytest.approx(loss, rel=1e-3)


def test_padding_on_the_left(module, models, tmp_path):
    pairs, (policy, ref) = make_pairs(), models
    loss, _, grads = oracle(policy, ref, pairs, ALPHA)
    llamafactory.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(tmp_path, module.CustomDPOTrainer, policy, ref, pairs)
    found, _, found_grads = step(trainer, padded_left(collate(pairs)))
    assert found == pytest.approx(loss, rel=F32)
    assert_same(found_grads, grads)


@pytest.mark.parametrize("alpha", [0, ALPHA])
def test_adapters_without_a_reference_model(module, tmp_path, alpha):
    pairs, policy = make_pairs(), with_lora(tiny_llama(VOCAB))
    loss, _, grads = oracle(policy, None, pairs, alpha)
    llamafactory.patch(TokenRewards(pairs), alpha=alpha)
    found, _, found_grads = step(
        make_trainer(tmp_path, module.CustomDPOTrainer, policy, None, pairs), collate(pairs)
    )
    assert found == pytest.approx(loss, rel=F32)
    assert_same(found_grads, grads)


def test_no_logits_are_made(module, models, tmp_path, monkeypatch):
    pairs, (policy, ref) = make_pairs(), models
    llamafactory.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(tmp_path, module.CustomDPOTrainer, policy, ref, pairs)
    rows = []
    linear = F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, w, b=None: rows.append(w.shape[0]) or linear(x, w, b)
    )
    step(trainer, collate(pairs))
    assert rows and VOCAB not in rows


def test_mean_logits_are_those_of_scored_tokens(module, models, tmp_path):
    pairs, (policy, ref) = make_pairs(), models
    llamafactory.patch(None, alpha=0)
    batch = collate(pairs)
    with torch.no_grad():
        logits = policy(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, :-1]
    _, metrics, _ = step(make_trainer(tmp_path, module.CustomDPOTrainer, policy, ref, pairs), batch)
    scored = batch["labels"][:, 1:] != -100
    for side, z, mask in zip(SIDES, logits.chunk(2), scored.chunk(2), strict=True):
        assert error(torch.tensor(metrics[f"logits/{side}"]), z[mask].mean()) < 1e-4


# -- a training


@pytest.fixture
def annotated(tmp_path):
    path, pairs = tmp_path / "annotated.parquet", make_pairs()
    write_annotated(path, pairs, {})
    return path, pairs


def test_training_from_an_annotated_file(module, models, annotated, tmp_path):
    (path, pairs), (policy, ref), gradients = annotated, models, Gradients()
    loss, reg, grads = oracle(policy, ref, pairs, ALPHA)
    plain, _, _ = oracle(policy, ref, pairs, 0)
    llamafactory.patch(path, alpha=ALPHA)
    trainer = make_trainer(
        tmp_path,
        module.CustomDPOTrainer,
        policy,
        ref,
        pairs,
        [gradients],
        {"max_grad_norm": 0.0, "optim": "sgd"},
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        plain, rel=F32
    )  # no gradients: the trainer's own loss
    trainer.args.max_steps = 2
    trainer.train()
    first, second = [line for line in trainer.state.log_history if "loss" in line]
    assert first["loss"] == pytest.approx(loss, abs=1e-4)  # as transformers rounds it
    assert first["treg/reg_loss"] == pytest.approx(reg, rel=1e-3)
    assert_same(gradients.steps[0], grads)
    assert second["loss"] < first["loss"]


def test_mixed_precision(module, models, tmp_path, monkeypatch):
    """Policy and reference run as accelerate would have them: float32 weights under bfloat16."""
    monkeypatch.setenv(
        "ACCELERATE_MIXED_PRECISION", "no"
    )  # what transformers before 5 sets is undone afterwards
    pairs, (policy, ref) = make_pairs(), models
    loss, _, _ = oracle(policy, ref, pairs, ALPHA)
    llamafactory.patch(TokenRewards(pairs), alpha=ALPHA)
    trainer = make_trainer(
        tmp_path, module.CustomDPOTrainer, policy, ref, pairs, training={"bf16": True}
    )
    seen = watch_dtypes(policy, ref)
    trainer.train()
    assert seen == {"policy": {torch.bfloat16}, "reference": {torch.bfloat16}}
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=0.1)


def test_another_end_of_a_response(module, models, annotated, tmp_path):
    (path, pairs), (policy, ref) = annotated, models
    longer = with_end(pairs, 7)
    loss, _, grads = oracle(policy, ref, longer, ALPHA)
    llamafactory.patch(path, alpha=ALPHA, tail=1)
    found, _, found_grads = step(
        make_trainer(tmp_path, module.CustomDPOTrainer, policy, ref, longer), collate(longer)
    )
    assert found == pytest.approx(loss, rel=F32)
    assert_same(found_grads, grads)


def test_unknown_sequences(module, models, tmp_path):
    pairs, (policy, ref) = make_pairs(), models
    llamafactory.patch(TokenRewards(make_pairs(seed=1)), alpha=ALPHA)
    trainer = make_trainer(tmp_path, module.CustomDPOTrainer, policy, ref, pairs)
    with pytest.raises(ValueError, match="chat template and truncation"):
        trainer.get_batch_loss_metrics(trainer.model, collate(pairs))


# -- patching


def test_patch_twice_and_undo(module, annotated):
    original = module.CustomDPOTrainer
    llamafactory.unpatch()
    assert module.CustomDPOTrainer is original
    for alpha in (0.1, 0.2):
        llamafactory.patch(annotated[0], alpha=alpha)
        assert module.CustomDPOTrainer.__mro__[1] is original
    llamafactory.unpatch()
    assert module.CustomDPOTrainer is original


def test_example(monkeypatch, annotated):
    """The example as it is, in the folder of annotated.parquet."""
    trainer, used = stub_package(monkeypatch)
    monkeypatch.chdir(annotated[0].parent)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert len(used) == 1 and used[0]._treg_base is StubCustomDPO is not trainer.CustomDPOTrainer


def test_without_llamafactory(monkeypatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(ImportError, match="expected LLaMA-Factory to be installed"):
        llamafactory.patch(None, alpha=0)


@pytest.mark.parametrize("version", ["0.9.3", "0.10.0", "1.0"])
def test_other_versions(monkeypatch, version):
    trainer, _ = stub_package(monkeypatch, version)
    with pytest.raises(
        RuntimeError, match=rf"expected a version >= 0\.9\.4 and < 0\.10, got {version}"
    ):
        llamafactory.patch(None, alpha=0)
    assert trainer.CustomDPOTrainer is StubCustomDPO


@pytest.mark.parametrize("version", ["0.9.4", "0.9.6.dev0"])
def test_versions_that_are_served(monkeypatch, version):
    trainer, _ = stub_package(monkeypatch, version)
    llamafactory.patch(None, alpha=0)
    assert trainer.CustomDPOTrainer._treg_base is StubCustomDPO


def test_files_with_token_weights_are_refused(module, tmp_path):
    """The margin would be trained without them."""
    file = file_with_weights(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="token_rewards: expected a file without token_weights"):
        llamafactory.make_trainer(module.CustomDPOTrainer, file)


def test_bad_input(module, annotated):
    base, (path, _) = module.CustomDPOTrainer, annotated
    with pytest.raises(ValueError, match="alpha: expected a number >= 0, got -1"):
        llamafactory.make_trainer(base, path, alpha=-1)
    with pytest.raises(
        ValueError, match=r"token_rewards: expected an annotated file for alpha=0\.25"
    ):
        llamafactory.make_trainer(base, None)
    with pytest.raises(FileNotFoundError, match="no such file"):
        llamafactory.make_trainer(base, path.parent / "absent.parquet")

    class Other(base):
        def concatenated_forward(self, model, batch):
            raise NotImplementedError

    for other in (Other, Trainer):
        with pytest.raises(
            TypeError, match=r"base: expected LLaMA-Factory's CustomDPOTrainer with concatenated_f"
        ):
            llamafactory.make_trainer(other, path)
