"""T-REG in OpenRLHF's DPOTrainer, and log-probs of its Actor by treg: against dense PyTorch in
float64.

Runs against OpenRLHF itself where it can be imported. Elsewhere a stub stands in, with the
signatures, layouts and order of calls of OpenRLHF 0.11.2: models/actor.py, models/loss.py
(DPOLoss), models/ring_attn_utils.py, trainer/dpo_trainer.py.
"""

import copy
import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error
from tiny import file_with_weights, tiny_llama
from torch import nn

from treg.data.annotated import write_annotated
from treg.integrations import openrlhf as integration
from treg.rewards.lookup import TokenRewards

try:
    import openrlhf.trainer.dpo_trainer

    REAL = True
except ImportError:
    REAL = False

MODELS, TRAINER = "openrlhf.models", "openrlhf.trainer.dpo_trainer"
V, PAD, END = 48, 0, 1


def stub_modules() -> dict[str, ModuleType]:
    class Actor(nn.Module):
        def __init__(self, pretrain_or_model, temperature=1.0, **kwargs):
            super().__init__()
            self.temperature, self.model = temperature, pretrain_or_model

        def forward(
            self,
            sequences,
            action_mask=None,
            attention_mask=None,
            return_output=False,
            allgather_logits=False,
            return_logprobs=False,
            ring_attn_group=None,
            packed_seq_lens=None,
            return_entropy=False,
            **mm_inputs,
        ):
            rolled, mask = torch.roll(sequences, shifts=-1, dims=1), attention_mask
            position = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            kept = attention_mask.bool()
            if self.packing_samples:
                sequences, rolled, position = (x[kept][None] for x in (sequences, rolled, position))
                mask = None
            output = self.model(sequences, attention_mask=mask, position_ids=position, **mm_inputs)
            output["logits"] = output["logits"].to(torch.float32)
            if action_mask is None and not return_logprobs:
                assert return_output
                return output
            log_probs = output["logits"].log_softmax(-1).gather(-1, rolled[..., None])[..., 0]
            if self.packing_samples:
                log_probs = torch.zeros(kept.shape).masked_scatter(kept, log_probs)
            log_probs = log_probs[:, :-1]
            if action_mask is not None:
                log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
            return (log_probs, output) if return_output else log_probs

    class DPOLoss(nn.Module):
        def __init__(self, beta, label_smoothing=0.0, ipo=False):
            super().__init__()
            self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

        def forward(self, chosen, rejected, ref_chosen, ref_rejected):
            margin = (chosen - rejected) - (ref_chosen - ref_rejected)
            if self.ipo:
                losses = (margin - 1 / (2 * self.beta)) ** 2
            else:
                losses = -F.logsigmoid(self.beta * margin) * (1 - self.label_smoothing)
                losses = losses - F.logsigmoid(-self.beta * margin) * self.label_smoothing
            implicit = (
                self.beta * (a - b).detach()
                for a, b in ((chosen, ref_chosen), (rejected, ref_rejected))
            )
            return losses.mean(), *implicit

    class DPOTrainer:
        def __init__(
            self,
            model,
            ref_model,
            strategy,
            tokenizer,
            optim,
            train_dataloader,
            eval_dataloader,
            scheduler,
            max_norm=0.5,
            beta=0.01,
            max_epochs=2,
            save_hf_ckpt=False,
            disable_ds_ckpt=False,
        ):
            self.model, self.ref_model, self.strategy, self.args = (
                model,
                ref_model,
                strategy,
                strategy.args,
            )
            self.tokenizer, self.optimizer, self.scheduler, self.epochs = (
                tokenizer,
                optim,
                scheduler,
                max_epochs,
            )
            self.train_dataloader, self.eval_dataloader, self.beta = (
                train_dataloader,
                eval_dataloader,
                beta,
            )
            options = self.args.model
            self.loss_fn = DPOLoss(beta, options.label_smoothing, options.ipo_enable)
            self.aux_loss, self.nll_loss = (
                options.aux_loss_coef > 1e-8,
                options.nll_loss_coef > 1e-8,
            )

        def _four(self, data):
            *tensors, prompt_id_lens = data
            inputs = (*(x.squeeze(1) for x in tensors), prompt_id_lens)
            found = self.concatenated_forward(self.model, *inputs)
            with torch.no_grad():
                reference = self.concatenated_forward(self.ref_model, *inputs)
            return found, reference

        def fit(self, args, consumed_samples=0, num_update_steps_per_epoch=None):
            self.model.train()
            self.ref_model.eval()
            for _ in range(self.epochs):
                for data in self.train_dataloader:
                    (chosen, rejected, aux_loss, nll_loss), reference = self._four(data)
                    preference_loss, *_ = self.loss_fn(chosen, rejected, *reference[:2])
                    aux_loss, nll_loss = (
                        aux_loss if self.aux_loss else 0,
                        nll_loss if self.nll_loss else 0,
                    )
                    options = self.args.model
                    loss = (
                        preference_loss
                        + aux_loss * options.aux_loss_coef
                        + nll_loss * options.nll_loss_coef
                    )
                    self.strategy.backward(loss, self.model, self.optimizer)
                    self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler)
                    self.strategy.all_reduce({"loss": preference_loss.item()})

        def evaluate(self, eval_dataloader, steps=0):
            self.model.eval()
            losses = []
            with torch.no_grad():
                for data in eval_dataloader:
                    (chosen, rejected, *_), reference = self._four(data)
                    losses.append(self.loss_fn(chosen, rejected, *reference[:2])[0].item())
            self.strategy.all_reduce({"eval_loss": float(np.mean(losses))})
            self.model.train()

        def concatenated_forward(
            self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens
        ):
            inputs = self.concatenated_inputs(
                chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens
            )
            input_ids, att_masks, prompt_id_lens = inputs
            log_probs, output = model(
                input_ids,
                attention_mask=att_masks,
                return_output=True,
                return_logprobs=True,
                ring_attn_group=self.strategy.ring_attn_group,
            )
            sums, means = self._get_batch_logps(log_probs, att_masks, prompt_id_lens)
            aux_loss = output.aux_loss if "aux_loss" in output else []
            B = len(chosen_ids)
            return sums[:B], sums[B:], aux_loss, -means[:B].mean()

        def concatenated_inputs(self, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
            width = max(chosen_ids.shape[1], reject_ids.shape[1])
            ids, masks = (
                torch.cat([F.pad(x, (0, width - x.shape[1]), value=value) for x in pair])
                for pair, value in (
                    ((chosen_ids, reject_ids), self.tokenizer.pad_token_id),
                    ((c_mask, r_mask), 0),
                )
            )
            return ids, masks, prompt_id_lens * 2

        def _get_batch_logps(self, per_token_logps, attention_mask, prompt_id_lens):
            mask = attention_mask.clone().bool()
            for row, length in zip(mask, prompt_id_lens, strict=True):
                row[:length] = False
            mask = mask[:, 1:]
            sums = (per_token_logps * mask).sum(-1)
            return sums, sums / mask.sum(-1)

    found = {name: ModuleType(name) for name in ("openrlhf", MODELS, "openrlhf.trainer", TRAINER)}
    found[MODELS].Actor, found[MODELS].DPOLoss, found[TRAINER].DPOTrainer = (
        Actor,
        DPOLoss,
        DPOTrainer,
    )
    found["openrlhf"].models, found["openrlhf"].trainer = found[MODELS], found["openrlhf.trainer"]
    found["openrlhf.trainer"].dpo_trainer = found[TRAINER]
    return found


@pytest.fixture
def openrlhf(monkeypatch):
    """OpenRLHF's two modules; what is swapped in them is put back."""
    if not REAL:
        for name, module in stub_modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    models, trainer = importlib.import_module(MODELS), importlib.import_module(TRAINER)
    monkeypatch.setattr(models, "Actor", models.Actor)
    monkeypatch.setattr(trainer, "DPOTrainer", trainer.DPOTrainer)
    return SimpleNamespace(models=models, trainer=trainer)


# -- what is trained

ALPHA, BETA = 0.5, 0.3
DPO = {"label_smoothing": 0.0, "ipo_enable": False, "nll_loss_coef": 0.0, "aux_loss_coef": 0.0}


def make_examples(pairs: int = 2) -> list[dict]:
    """Annotated pairs."""
    numbers, examples = np.random.default_rng(0), []
    for i in range(pairs):
        example = {"index": i, "where": f"row {i}", "prompt_ids": numbers.integers(2, V, 3 + i)}
        for side, length in (("chosen", 5 + i), ("rejected", 4 - i)):
            example[f"{side}_ids"] = numbers.integers(2, V, length)
            example[f"{side}_token_rewards"] = (numbers.random(length) - 0.5).astype(np.float32)
            example[f"ref_{side}_logps"] = -1.0
        examples.append(example)
    return examples


def batch_of(examples, ending=()) -> tuple:
    """What RewardDataset's collate_fn gives: ids and masks [B, T] of both sides, right-padded;
    prompts' lengths.
    """
    sides = []
    for side in ("chosen", "rejected"):
        rows = [
            torch.from_numpy(np.concatenate([x["prompt_ids"], x[f"{side}_ids"], ending])).long()
            for x in examples
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        lengths = torch.tensor([len(row) for row in rows])
        sides += [ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()]
    return (*sides, [len(x["prompt_ids"]) for x in examples])


class Loader(list):
    sampler = None


class Strategy:
    """Keeps what a step leaves: loss, gradients, logs."""

    accumulated_gradient, ring_attn_group = 1, None

    def __init__(self, **options):
        model = SimpleNamespace(**(DPO | options))
        off = SimpleNamespace(key=None, org=None, project=None, group=None, run_name=None)
        self.args = SimpleNamespace(
            model=model,
            ds=SimpleNamespace(packing_samples=False),
            train=SimpleNamespace(batch_size=2),
            logger=SimpleNamespace(wandb=off, tensorboard_dir=None, logging_steps=10**9),
            eval=SimpleNamespace(steps=10**9),
            ckpt=SimpleNamespace(save_steps=10**9),
        )
        self.steps, self.logs = [], []

    def is_rank_0(self):
        return False

    def backward(self, loss, model, optimizer):
        model.zero_grad()
        loss.backward()
        self.steps.append(
            (loss.detach(), {name: p.grad.clone() for name, p in model.model.named_parameters()})
        )

    def optimizer_step(self, optimizer, model, scheduler):
        pass

    def get_grad_norm(self, model):
        return 0.0

    def all_reduce(self, logs):
        self.logs.append(logs)
        return logs


def make_actor(openrlhf, *, packed=False, seed=0, dtype=torch.float32):
    model = tiny_llama(V, hidden_size=16, intermediate_size=32).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.01 * seed)
    model.config.use_cache = False  # as Actor leaves it
    actor = openrlhf.models.Actor(model)
    actor.packing_samples = packed
    return actor


def make_trainer(openrlhf, cls, actors, examples, **options):
    return cls(
        model=actors[0],
        ref_model=actors[1],
        strategy=Strategy(**options),
        optim=None,
        train_dataloader=Loader([batch_of(examples)]),
        eval_dataloader=None,
        beta=BETA,
        max_epochs=1,
        tokenizer=SimpleNamespace(pad_token_id=PAD),
        scheduler=SimpleNamespace(get_last_lr=lambda: [0.0]),
    )


def dense_step(actors, examples, alpha, options):
    """Loss and gradients of OpenRLHF's DPO with T-REG, by its formulas, in float64."""
    policy, reference = (copy.deepcopy(actor.model).double().eval() for actor in actors)
    sums, rewarded, nll = {}, {}, 0.0
    for side in ("chosen", "rejected"):
        for i, x in enumerate(examples):
            ids = torch.from_numpy(np.concatenate([x["prompt_ids"], x[f"{side}_ids"]])).long()
            start = len(x["prompt_ids"])
            for name, model in (("policy", policy), ("reference", reference)):
                logps = (
                    model(ids[None])
                    .logits[0, :-1]
                    .log_softmax(-1)
                    .gather(-1, ids[1:, None])[start - 1 :, 0]
                )
                sums[name, side, i] = logps.sum()
                if name == "policy":
                    rewarded[side, i] = (
                        torch.from_numpy(x[f"{side}_token_rewards"]).double() * logps
                    ).sum()
                    nll = nll - logps.mean() / len(examples) * (side == "chosen")
    loss = options["nll_loss_coef"] * nll
    for i in range(len(examples)):
        margin = sums["policy", "chosen", i] - sums["policy", "rejected", i]
        margin = (
            margin - (sums["reference", "chosen", i] - sums["reference", "rejected", i]).detach()
        )
        if options["ipo_enable"]:
            base, slope = (margin - 1 / (2 * BETA)) ** 2, 2 * (margin - 1 / (2 * BETA))
        else:
            z, eps = BETA * margin, options["label_smoothing"]
            base = -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)
            slope = BETA * (eps * z.sigmoid() - (1 - eps) * (-z).sigmoid())
        regularizer = (
            -alpha * slope.detach().abs() * (rewarded["chosen", i] + rewarded["rejected", i])
        )
        loss = loss + (base + regularizer) / len(examples)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in policy.named_parameters()}


def assert_step(step, expected, tolerance):
    assert error(step[0], expected[0]) <= tolerance
    assert step[1].keys() == expected[1].keys()
    for name, grad in step[1].items():
        assert error(grad, expected[1][name]) <= tolerance, name


VARIANTS = {
    "DPO": {},
    "cDPO": {"label_smoothing": 0.2},
    "IPO": {"ipo_enable": True},
    "with a likelihood term": {"nll_loss_coef": 0.7},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("patched", [False, True], ids=["OpenRLHF's log-probs", "treg's log-probs"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_step_is_treg(variant, patched, packed, openrlhf):
    """treg's log-probs keep the model's float64; OpenRLHF's are float32."""
    actors = [
        make_actor(openrlhf, packed=packed, seed=seed, dtype=torch.float64) for seed in range(2)
    ]
    for actor in actors if patched else ():
        integration.patch_actor(actor)
    examples = make_examples()
    cls = integration.make_trainer(openrlhf.trainer.DPOTrainer, TokenRewards(examples), alpha=ALPHA)
    trainer = make_trainer(openrlhf, cls, actors, examples, **VARIANTS[variant])
    trainer.fit(trainer.args, num_update_steps_per_epoch=1)
    (step,) = trainer.strategy.steps
    assert_step(
        step,
        dense_step(actors, examples, ALPHA, DPO | VARIANTS[variant]),
        1e-10 if patched else 1e-5,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_alpha_0_is_dpo(variant, openrlhf):
    """To the bit: the loss is DPOTrainer's own."""
    actors, examples, steps = (
        [make_actor(openrlhf, seed=seed) for seed in range(2)],
        make_examples(),
        [],
    )
    base = openrlhf.trainer.DPOTrainer
    for cls in (base, integration.make_trainer(base, TokenRewards([]), alpha=0.0)):
        trainer = make_trainer(openrlhf, cls, actors, examples, **VARIANTS[variant])
        trainer.fit(trainer.args, num_update_steps_per_epoch=1)
        steps += trainer.strategy.steps
    assert torch.equal(steps[0][0], steps[1][0])
    assert all(torch.equal(steps[0][1][name], grad) for name, grad in steps[1][1].items())


def test_evaluation_is_dpos(openrlhf):
    actors, examples, logs = (
        [make_actor(openrlhf, seed=seed) for seed in range(2)],
        make_examples(),
        [],
    )
    base = openrlhf.trainer.DPOTrainer
    for cls in (base, integration.make_trainer(base, TokenRewards(examples), alpha=ALPHA)):
        trainer = make_trainer(openrlhf, cls, actors, examples)
        trainer.evaluate(Loader([batch_of(examples)]))
        logs += trainer.strategy.logs
    assert logs[0] == logs[1]


@pytest.mark.parametrize("ending", [(), (7, END)], ids=["as annotated", "as RewardDataset ends it"])
def test_the_end_of_a_response_may_differ(ending, openrlhf):
    actors, examples = [make_actor(openrlhf, seed=seed) for seed in range(2)], make_examples()
    cls = integration.make_trainer(
        openrlhf.trainer.DPOTrainer, TokenRewards(examples, tail=integration.TAIL)
    )
    trainer = make_trainer(openrlhf, cls, actors, examples)
    trainer.train_dataloader[0] = batch_of(examples, ending)
    trainer.fit(trainer.args, num_update_steps_per_epoch=1)
    assert len(trainer.strategy.steps) == 1


def test_sequences_that_are_not_annotated(openrlhf):
    actors, examples = [make_actor(openrlhf, seed=seed) for seed in range(2)], make_examples()
    cls = integration.make_trainer(
        openrlhf.trainer.DPOTrainer, TokenRewards(examples[:1]), alpha=ALPHA
    )
    trainer = make_trainer(openrlhf, cls, actors, examples)
    with pytest.raises(ValueError, match="input_ids: expected sequences of the annotated examples"):
        trainer.fit(trainer.args, num_update_steps_per_epoch=1)


# -- the Actor


def padded_inputs(side: str):
    ids = torch.randint(2, V, (3, 9))
    lengths = torch.tensor([[9], [4], [6]])
    mask = torch.arange(9) < lengths if side == "right" else torch.arange(9) >= 9 - lengths
    return ids.masked_fill(~mask, PAD), mask.long()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_patched_actor_gives_the_same_log_probs(side, packed, openrlhf):
    actor = make_actor(openrlhf, packed=packed)
    ids, mask = padded_inputs(side)
    scored = (mask[:, 1:] * mask[:, :-1]).bool()  # the token after left padding has no context
    weights, shapes = torch.randn(scored.shape) * scored, []
    actor.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: shapes.append(inputs[0].shape)
    )
    call = {
        "attention_mask": mask,
        "return_output": True,
        "return_logprobs": True,
        "ring_attn_group": None,
    }
    expected, _ = actor(ids, **call)
    exact = torch.autograd.grad((weights * expected).sum(), list(actor.parameters()))
    assert integration.patch_actor(actor) is actor and integration.patch_actor(actor) is actor
    found, output = actor(ids, **call)
    assert found.shape == (3, 8) and found.dtype == torch.float32 and "aux_loss" not in output
    assert error(found * scored, expected * scored) <= 1e-5
    assert not found[~scored].any()
    assert shapes[-1] == ((1, mask.sum()) if packed else (3, 9))
    for a, b in zip(
        torch.autograd.grad((weights * found).sum(), list(actor.parameters())), exact, strict=True
    ):
        assert error(a, b) <= 1e-5
    only = actor(ids, attention_mask=mask, return_logprobs=True)
    assert torch.equal(only, found)


def test_patched_actor_makes_no_logits_for_log_probs_and_all_it_is_asked_for(openrlhf, monkeypatch):
    actor = integration.patch_actor(make_actor(openrlhf))
    ids, mask = padded_inputs("right")
    logits = actor(ids, attention_mask=mask, return_output=True)["logits"]
    assert logits.shape == (3, 9, V)
    actions = actor(ids, action_mask=mask[:, -4:], attention_mask=mask)
    kept = (
        logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][:, -4:] * mask[:, -4:]
    )
    torch.testing.assert_close(actions, kept)
    both = actor(ids, action_mask=mask[:, -4:], attention_mask=mask, return_logprobs=True)
    torch.testing.assert_close(both, kept)

    def no_logits(*args, **kwargs):
        raise AssertionError("logits were made")

    monkeypatch.setattr(actor.model, "_treg_forward", no_logits)
    actor(ids, attention_mask=mask, return_logprobs=True)


def test_a_copy_of_a_patched_actor_is_its_own(openrlhf):
    actor = integration.patch_actor(make_actor(openrlhf))
    other = copy.deepcopy(actor)
    with torch.no_grad():
        other.model.lm_head.weight.mul_(2)
    ids, mask = padded_inputs("right")
    found = [x(ids, attention_mask=mask, return_logprobs=True) for x in (actor, other)]
    assert not torch.allclose(*found)


def test_patch_refuses(openrlhf):
    with pytest.raises(
        TypeError, match=r"actor: expected openrlhf\.models\.Actor.*got Linear\.forward"
    ):
        integration.patch_actor(nn.Linear(2, 2))
    warm = make_actor(openrlhf)
    warm.temperature = 0.7
    with pytest.raises(ValueError, match=r"actor\.temperature: expected 1\.0"):
        integration.patch_actor(warm)
    actor = integration.patch_actor(make_actor(openrlhf, packed=True))
    ids, mask = padded_inputs("right")
    with pytest.raises(ValueError, match="ring_attn_group: expected None"):
        actor(ids, attention_mask=mask, return_logprobs=True, ring_attn_group=object())


def test_a_file_with_token_weights_is_refused(openrlhf, tmp_path):
    """The margin would be trained without them."""
    file = file_with_weights(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="token_rewards: expected a file without token_weights"):
        integration.make_trainer(openrlhf.trainer.DPOTrainer, file)


def test_trainer_refuses(openrlhf):
    base, rewards = openrlhf.trainer.DPOTrainer, TokenRewards([])
    with pytest.raises(TypeError, match=r"base: expected OpenRLHF's DPOTrainer"):
        integration.make_trainer(object, rewards)
    with pytest.raises(ValueError, match="alpha: expected a number >= 0, got -1"):
        integration.make_trainer(base, rewards, alpha=-1)
    actors = [integration.patch_actor(make_actor(openrlhf)) for _ in range(2)]
    with pytest.raises(ValueError, match="aux_loss_coef: expected 0 with a patched Actor"):
        make_trainer(
            openrlhf,
            integration.make_trainer(base, rewards),
            actors,
            make_examples(),
            aux_loss_coef=0.1,
        )

    class Silent(integration.make_trainer(base, TokenRewards(make_examples()))):
        def _get_batch_logps(self, per_token_logps, attention_mask, prompt_id_lens):
            return base._get_batch_logps(self, per_token_logps, attention_mask, prompt_id_lens)

    trainer = make_trainer(
        openrlhf, Silent, [make_actor(openrlhf) for _ in range(2)], make_examples()
    )
    with pytest.raises(TypeError, match="expected a DPOTrainer that calls _get_batch_logps"):
        trainer.fit(trainer.args, num_update_steps_per_epoch=1)


# -- all of it


def train_as_the_command_line_does(openrlhf, examples):
    """What openrlhf.cli.train_dpo does with the two names."""
    actors = [make_actor(openrlhf, seed=seed, dtype=torch.float64) for seed in range(2)]
    trainer = make_trainer(openrlhf, openrlhf.trainer.DPOTrainer, actors, examples)
    trainer.fit(trainer.args, num_update_steps_per_epoch=1)
    return actors, trainer.strategy.steps


def test_install(openrlhf, tmp_path):
    examples = make_examples()
    write_annotated(tmp_path / "annotated.parquet", examples, {})
    integration.install(TokenRewards(examples), alpha=3.0)
    integration.install(tmp_path / "annotated.parquet", alpha=ALPHA)
    actors, (step,) = train_as_the_command_line_does(openrlhf, examples)
    assert_step(step, dense_step(actors, examples, ALPHA, DPO), 1e-10)


def test_install_without_openrlhf(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "openrlhf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openrlhf", None)
    with pytest.raises(ImportError, match="openrlhf: expected OpenRLHF to be installed"):
        integration.install(TokenRewards([]))


def test_example(openrlhf, tmp_path, monkeypatch):
    examples = make_examples()
    write_annotated(tmp_path / "annotated.parquet", examples, {})
    monkeypatch.chdir(tmp_path)
    run, found = runpy.run_path, []

    def run_module(name, **kwargs):
        found.append(
            (name, kwargs["run_name"], *train_as_the_command_line_does(openrlhf, examples))
        )

    monkeypatch.setattr(runpy, "run_module", run_module)
    run(str(Path(__file__).parents[2] / "examples" / "openrlhf_treg.py"), run_name="__main__")
    ((name, run_name, actors, (step,)),) = found
    assert (name, run_name) == ("openrlhf.cli.train_dpo", "__main__")
    assert_step(step, dense_step(actors, examples, 0.25, DPO), 1e-10)
