"""TRegDPOTrainer with a pair's prompt run once: loss, metrics and gradients are those of the
sequences apart, and the backbone sees fewer tokens.
"""

import copy
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from causal_lms import build
from datasets import Dataset
from placed import by_place
from tiny import tiny_llama, tiny_tokenizer
from transformers import TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from treg.integrations.trl import TRegDPOConfig, TRegDPOTrainer
from treg.losses import OBJECTIVES

SIDES = ("chosen", "rejected")
VOCAB = 400
# of a log line: not the times, nor what counts them
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def make_pairs(loss_type="dpo", count=4, vocab=VOCAB, prompt=6, seed=0):
    """Some completions begin alike, one is of one token."""
    random, row, pairs = np.random.default_rng(seed), OBJECTIVES.get(loss_type), []
    for i in range(count):
        pair = {"prompt_ids": random.integers(3, vocab, random.integers(2, prompt)).tolist()}
        for side in SIDES:
            n = int(random.integers(3, 9)) if i else 1
            ids = random.integers(3, vocab, n).tolist()
            if side == "rejected" and i == 1:
                ids[:2] = pair["chosen_ids"][:2]
            pair[f"{side}_ids"] = ids
            pair[f"{side}_token_rewards"] = (random.random(n) - 0.5).tolist()
            if row is not None and "token_weights" in row.needs:
                pair[f"{side}_token_weights"] = random.random(n).tolist()
        pairs.append(pair)
    return pairs


def perturbed(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def make_trainer(tmp_path, model, pairs, ref_model=None, eval_pairs=None, **options):
    peft = options.pop("peft_config", None)
    collator = options.pop("data_collator", None)
    defaults = dict(
        beta=0.3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        max_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
    )
    return TRegDPOTrainer(
        model,
        ref_model,
        TRegDPOConfig(str(tmp_path), **defaults | options),
        collator,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
        eval_dataset=None if eval_pairs is None else Dataset.from_list(eval_pairs),
        peft_config=peft,
    )


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def seen_by(model):
    """The ids that a model's backbone sees, of each forward with a mask of ones or of its own."""
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0]))
    return seen


def step(trainer):
    """Log line, gradients, and evaluation before, of one step."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    before = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.train()
    line = {k: x for k, x in trainer.state.log_history[-2].items() if k not in TIMES}
    evaluated = {k: x for k, x in before.items() if "time" not in k and "per_second" not in k}
    return line, gradients.found, evaluated


def assert_same_steps(found, expected):
    """Loss to 1e-6, metrics and each gradient to 1e-5."""
    (line, grads, evaluated), (line_apart, grads_apart, evaluated_apart) = found, expected
    for a, b in ((line, line_apart), (evaluated, evaluated_apart)):
        assert a.keys() == b.keys()
        for name, x in b.items():
            exact = name.endswith("loss")
            assert a[name] == pytest.approx(x, rel=1e-6 if exact else 1e-5, abs=1e-6), name
    assert grads.keys() == grads_apart.keys()
    total = torch.cat([x.flatten() for x in grads_apart.values()]).norm()
    assert total > 1e-4
    for name, x in grads_apart.items():
        off = (grads[name] - x).norm()
        assert off <= 1e-5 * max(x.norm(), 1e-2 * total), f"{name}: {off / x.norm():.1e}"


def shared_tokens(pairs, cut=slice(None)):
    """The nodes of the tries of pairs."""
    count = 0
    for pair in pairs:
        both = [tuple((pair["prompt_ids"] + pair[f"{side}_ids"])[cut]) for side in SIDES]
        count += len({x[:n] for x in both for n in range(1, len(x) + 1)})
    return count


CASES = {
    "sigmoid": {},
    "plain": {"treg_alpha": 0.0},
    "several": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "weighted": {"use_weighting": True},
    "length": {"ld_alpha": 0.5},
    "precomputed": {"precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "cut": {"max_length": 8},
    "cut, the end kept": {"max_length": 8, "truncation_mode": "keep_end"},
    "tdpo2": {"loss_type": "tdpo2"},
    "sparsepo": {"loss_type": "sparsepo"},
    "d2po": {"loss_type": "d2po"},
    "sepo": {"loss_type": "sepo"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_sequences_apart(tmp_path, name):
    options = CASES[name]
    loss_type = options.get("loss_type", "dpo")
    pairs = make_pairs(loss_type if isinstance(loss_type, str) else "dpo")
    found = []
    for share in (True, False):
        model, reference = perturbed(tiny_llama(VOCAB)), tiny_llama(VOCAB)
        trainer = make_trainer(
            *(tmp_path / str(share), model, pairs, reference, pairs),
            treg_share_prompt=share,
            **options,
        )
        found.append(step(trainer))
        assert trainer._shared.sharing.on == share
    assert_same_steps(*found)


@pytest.mark.parametrize("share", [None, False])
def test_the_tokens_that_models_see(tmp_path, share):
    """By default too. TRL's sequences keep their last tokens."""
    pairs = make_pairs(prompt=30)
    model, reference = perturbed(tiny_llama(VOCAB)), tiny_llama(VOCAB)
    seen = seen_by(model), seen_by(reference)
    trainer = make_trainer(tmp_path, model, pairs, reference, treg_share_prompt=share)
    for x in seen:
        x.clear()
    trainer.train()
    sequences = [p["prompt_ids"] + p[f"{side}_ids"] for p in pairs for side in SIDES]
    longest = max(map(len, sequences))
    assert shared_tokens(pairs) < 0.75 * sum(map(len, sequences))
    for ids in seen:
        if share is False:
            assert [x.shape for x in ids] == [(8, longest)]
            continue
        # the first batch's comparison: padded on both sides, and shared; then the step
        *compared, trained = ids
        assert len(compared) == 3 and trained.shape[0] == 4
        widths = [shared_tokens([pair]) for pair in pairs]
        assert trained.shape == (4, max(widths))
        padding = tiny_tokenizer().pad_token_id
        kept = [int(n) for n in (trained != padding).sum(1)]
        assert sum(kept) <= shared_tokens(pairs)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_adapters(tmp_path, accumulation):
    """The reference is the policy without them."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    pairs, found = make_pairs(), []
    for share in (True, False):
        trainer = make_trainer(
            *(tmp_path / str(share), tiny_llama(VOCAB), pairs),
            peft_config=copy.deepcopy(config),
            treg_share_prompt=share,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        perturbed(trainer.model)
        found.append(step(trainer))
        assert trainer._shared.sharing.on == share
    assert_same_steps(*found)


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral", "gpt2", "mixtral"])
def test_other_models(tmp_path, model_type):
    """Sliding windows of 8 that are exceeded, absolute positions; of a mixture of experts the
    balance of the routers is that of all tokens of both sequences.
    """
    pairs, found = make_pairs(vocab=82, prompt=20), []
    more = {"router_aux_loss_coef": 0.5} if model_type == "mixtral" else {}
    for share in (True, False):
        torch.manual_seed(0)
        model, reference = build(model_type), build(model_type)
        trainer = make_trainer(
            *(tmp_path / str(share), model, pairs, reference),
            treg_share_prompt=share,
            **more,
        )
        found.append(step(trainer))
        assert trainer._shared.sharing.on == share
    assert_same_steps(*found)
    assert ("aux_loss" in found[0][0]) == (model_type == "mixtral")


def test_autocast(tmp_path):
    """In bfloat16 no further from float32 than the sequences apart."""
    pairs, found = make_pairs(prompt=20), {}
    for name, options in {
        "shared": {"bf16": True, "treg_share_prompt": True},
        "apart": {"bf16": True, "treg_share_prompt": False},
        "exact": {"treg_share_prompt": False},
    }.items():
        model, reference = perturbed(tiny_llama(VOCAB)), tiny_llama(VOCAB)
        trainer = make_trainer(tmp_path / name, model, pairs, reference, **options)
        found[name] = step(trainer)
    exact = torch.cat([x.flatten() for x in found["exact"][1].values()])
    assert found["shared"][1].keys() == found["exact"][1].keys()
    off = {
        name: (torch.cat([x.flatten() for x in found[name][1].values()]) - exact).norm()
        for name in ("shared", "apart")
    }
    assert off["shared"] <= 2 * off["apart"] < 0.2 * exact.norm()


# -- where prompts are not shared
# -


def prompt_tuning():
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}


class WithTypes(DataCollatorForPreference):
    """What a llama does not take, but sharing must not drop."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        return batch | {"cache_position": torch.arange(batch["input_ids"].shape[1])}


def flash(model):
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


REFUSED = {
    "prompt tuning": (prompt_tuning, r"no (PeftType\.)?PROMPT_TUNING adapters"),
    "torch_compile": (
        lambda: {"torch_compile": True, "torch_compile_backend": "eager"},
        "expected torch_compile=False",
    ),
    "other inputs": (
        lambda: {"data_collator": WithTypes(pad_token_id=1)},
        "expected input_ids, attention_mask, position_ids, got cache_position",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_speaks_against_it_is_named(tmp_path, name, caplog):
    options, message = REFUSED[name]
    pairs = make_pairs()
    reference = None if name == "prompt tuning" else tiny_llama(VOCAB)
    with pytest.raises(ValueError, match=f"treg_share_prompt: .*({message}).*; set treg_share_pr"):
        make_trainer(
            *(tmp_path, tiny_llama(VOCAB), pairs, reference), treg_share_prompt=True, **options()
        ).train()
    if name == "torch_compile":  # tested for its numbers in test_trl.py
        return
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, tiny_llama(VOCAB), pairs, reference, **options())
        trainer.train()
    assert not trainer._shared.sharing.on
    assert caplog.text.count("is off, each answer runs its prompt") == 1


def test_flash_attention_is_named(tmp_path, caplog):
    """Before the first batch; it is not installed here."""
    model, pairs = flash(tiny_llama(VOCAB)), make_pairs()
    options = {"treg_alpha": 0.0, "loss_type": "simpo"}  # without a reference
    with pytest.raises(
        ValueError, match=r"treg_share_prompt: .*attn_implementation: expected sdpa"
    ):
        make_trainer(tmp_path, model, pairs, treg_share_prompt=True, **options)
    make_trainer(tmp_path, flash(tiny_llama(VOCAB)), pairs, **options)
    assert "attn_implementation: expected sdpa, eager, flex_attention" in caplog.text


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_a_difference_that_the_first_batch_shows(tmp_path, caplog, which):
    """Then the step is that of the sequences apart, or none."""
    pairs = make_pairs(prompt=20)
    assert max(shared_tokens([pair]) for pair in pairs) > 24

    def trainer_of(share):
        models = {"policy": perturbed(tiny_llama(VOCAB)), "reference": tiny_llama(VOCAB)}
        by_place(models[which], 24)  # beyond what is checked first
        return make_trainer(
            *(tmp_path / str(share), models["policy"], pairs, models["reference"]),
            treg_share_prompt=share,
        )

    found = []
    for share in (None, False):
        trainer = trainer_of(share)
        found.append(step(trainer))
        assert not trainer._shared.sharing.on
    assert "the first batch's log-probs are not the same" in caplog.text
    assert_same_steps(*found)
    with pytest.raises(ValueError, match="treg_share_prompt: the first batch's log-probs are not"):
        trainer_of(True).train()


def test_images_are_not_shared(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(VOCAB), make_pairs(), tiny_llama(VOCAB))
    trainer._is_vision_dataset = True
    trainer._shared._tried.clear()
    trainer._shared.try_on(trainer._head_of(trainer.model))
    assert not trainer._shared.sharing.on
