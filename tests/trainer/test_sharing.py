"""TRegTrainer with a pair's prompt run once, against the same step of the sequences apart."""

import logging
from itertools import chain
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import sharing_worker
import torch
from causal_lms import build
from placed import by_place
from sharing_worker import ALIKE, SEEN_FIRST, one_long_pair, placed_trainer
from trainer_worker import (
    SIDES,
    VOCAB,
    At,
    Gradients,
    assert_same,
    make_model,
    make_pairs,
    make_trainer,
    perturb,
    resumable,
    shared_trainer,
    with_lora,
    with_reference,
)

from treg.data import PairCollator, pair_tokens
from treg.files import last_checkpoint
from treg.heads import PromptSharing
from treg.trainer import TRegTrainer
from treg.trainer.sharing import give_up_by_arguments

TIMES = ("runtime", "_time", "per_second", "total_flos")
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "mixtral")


def long_pairs(n=4, seed=0):
    """Prompts and answers beyond windows of 8 tokens; two answers begin alike, two are of a token
    each, of one pair the chosen one begins the other.
    """
    random, pairs = np.random.default_rng(seed), make_pairs(n, seed)
    for i, pair in enumerate(pairs):
        pair["prompt_ids"] = random.integers(3, VOCAB, random.integers(4, 16)).astype(np.int32)
        for side in SIDES:
            ids = random.integers(3, VOCAB, 1 if i == 0 else random.integers(5, 12))
            if side == "rejected" and i == 1:
                ids[:3] = pair["chosen_ids"][:3]
            if side == "rejected" and i == 2:
                ids = np.concatenate([pair["chosen_ids"], ids])
            pair[f"{side}_ids"] = ids.astype(np.int32)
            rewards = random.uniform(-0.5, 0.5, len(ids))
            pair[f"{side}_token_rewards"] = rewards.astype(np.float32)
    return pairs


def model_of(family, seed=0):
    torch.manual_seed(seed)
    model = build(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    return model


def step(tmp_path, model, pairs, ref_model=None, *, share, **options):
    """Gradients of the first step, its log line, what an evaluation said before, the trainer."""
    gradients = Gradients()
    options = {"per_device_train_batch_size": len(pairs)} | options
    trainer = make_trainer(
        *(tmp_path / str(share), model, pairs, ref_model),
        callbacks=[gradients],
        max_steps=1,
        share_prompt=share,
        **options,
    )
    before = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.train()
    line = next(x for x in trainer.state.log_history if "loss" in x)
    return gradients.steps[0], line, before, trainer


def assert_same_steps(found, expected, rel=1e-5):
    """Loss to a tenth of rel, all else to rel."""
    assert_same(found[0], expected[0], rel)
    for a, b in zip(found[1:3], expected[1:3], strict=True):
        names = {name for name in b if not any(time in name for time in TIMES)}
        assert names <= a.keys()
        for name in names:
            exact = rel / 10 if name.endswith("loss") and "reg" not in name else rel
            assert a[name] == pytest.approx(b[name], rel=exact, abs=1e-6), name


def both(tmp_path, make, pairs, make_reference=None, **options):
    """The same step in shared rows, which it must be, and apart."""
    found = []
    for share in (True, False):
        reference = None if make_reference is None else make_reference()
        found.append(step(tmp_path, make(), pairs, reference, share=share, **options))
        assert found[-1][-1]._sharing.on == share
    return found


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models(tmp_path, family, layout):
    pairs = with_reference(long_pairs(), model_of(family))
    assert_same_steps(
        *both(tmp_path, lambda: perturb(model_of(family)), pairs, packing=layout == "packed")
    )


def test_a_budget_of_tokens(tmp_path):
    """Packs of shared rows hold more pairs; a step of all of them is the same."""
    pairs, found = with_reference(long_pairs(6), make_model()), []
    for share, packs in ((True, 2), (False, 4)):
        budget = max(pair_tokens(x, share_prompt=share) for x in pairs) + 40
        options = {"packing": True, "token_budget": budget, "gradient_accumulation_steps": 8}
        options |= {"per_device_train_batch_size": 1, "num_train_epochs": 1}
        result = step(tmp_path, perturb(make_model()), pairs, share=share, **options)
        assert 1 < len(result[-1].train_dataset) <= packs + 1
        found.append(result)
    assert_same(found[0][0], found[1][0])
    assert found[0][1]["loss"] == pytest.approx(found[1][1]["loss"], rel=1e-6)


SOURCES = {
    "a model": ({}, True, False),
    "adapters": ({}, False, True),
    "adapters, packed": ({"packing": True}, False, True),
    "a model for KL": ({"loss_type": "tdpo2"}, True, False),
    "adapters for KL": ({"loss_type": "tdpo1"}, False, True),
    "no reference": ({"loss_type": "simpo"}, False, False),
}


@pytest.mark.parametrize("name", SOURCES)
def test_references(tmp_path, name):
    """It runs in the rows of the policy; evaluation as well."""
    options, runs, lora = SOURCES[name]

    def make():
        return with_lora(make_model()) if lora else perturb(make_model())

    assert_same_steps(
        *both(
            *(tmp_path, make, long_pairs(), make_model if runs else None),
            eval_dataset=long_pairs(3, seed=5),
            per_device_eval_batch_size=2,
            **options,
        )
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing(tmp_path, lora, reentrant):
    pytest.importorskip("peft")
    options = {"gradient_checkpointing": True}
    options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}

    def make():
        return with_lora(make_model()) if lora else perturb(make_model())

    pairs = long_pairs()
    found = both(tmp_path, make, pairs, None if lora else make_model, **options)
    assert_same_steps(*found)
    plain = step(
        tmp_path, make(), pairs, None if lora else make_model(), share=True
    )  # without checkpoints
    assert_same(found[0][0], plain[0])


@pytest.mark.parametrize("packing", [False, True])
def test_autocast(tmp_path, packing):
    """In bfloat16 no further from float32 than the sequences apart; no gradient is lost to what the
    comparison of the first batch has cast.
    """
    pairs = with_reference(long_pairs(), make_model())
    found = both(tmp_path, lambda: perturb(make_model()), pairs, packing=packing, bf16=True)
    exact = step(tmp_path, perturb(make_model()), pairs, share=False)[0]
    off = []
    for grads, *_ in found:
        assert all(x.norm() > 0 for x in grads.values()) and grads.keys() == exact.keys()
        off.append(sum((grads[n] - x).square().sum() for n, x in exact.items()).sqrt())
    total = sum(x.square().sum() for x in exact.values()).sqrt()
    assert off[0] <= 2 * off[1] < 0.2 * total


def test_workers_and_several_steps(tmp_path):
    pairs = with_reference(long_pairs(6), make_model())
    options = {"dataloader_num_workers": 2, "per_device_train_batch_size": 2}
    assert_same_steps(*both(tmp_path, lambda: perturb(make_model()), pairs, **options))


def test_resumed_is_uninterrupted(tmp_path):
    """The first batch after a checkpoint settles it again."""

    def trained(folder, callbacks=(), resume=None):
        options = {"share_prompt": True, "packing": False, "token_budget": None, "max_steps": 4}
        trainer = resumable(folder, callbacks, **options)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer._sharing.settled and trainer._sharing.on
        return dict(trainer.model.named_parameters())

    stop = At(2, lambda control: setattr(control, "should_training_stop", True))
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", [stop])
    found = trained(tmp_path / "parts", resume=last_checkpoint(tmp_path / "parts"))
    assert all(torch.equal(x, whole[name]) for name, x in found.items())


# -- what the model sees
# -


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("share", [None, False])
def test_the_tokens_that_models_see(tmp_path, share, packing):
    """P + R_w + R_l without the last tokens, less what answers begin with; by default too."""
    pairs, seen = long_pairs(), []
    model, reference = perturb(make_model()), make_model()
    trainer = make_trainer(
        *(tmp_path, model, pairs, reference),
        max_steps=1,
        per_device_train_batch_size=4,
        share_prompt=share,
        packing=packing,
    )
    for x in (model, reference):
        x.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0]))
    trainer.train()
    tries, apart = [], 0
    for pair in pairs:
        rows = [[*pair["prompt_ids"], *pair[f"{side}_ids"]][:-1] for side in SIDES]
        beginnings = (x[:n] for x in rows for n in range(1, len(x) + 1))
        tries.append(len({tuple(x) for x in beginnings}))
        apart += sum(map(len, rows))
    lengths = [sum(len(pair[f"{x}_ids"]) for x in ("prompt", *SIDES)) - 2 for pair in pairs]
    assert [x - y for x, y in zip(lengths, tries, strict=True)][1:] != [0, 0, 0]
    assert all(x >= y for x, y in zip(lengths, tries, strict=True)) and sum(tries) < 0.75 * apart
    if share is False:
        assert len(seen) == 2
        assert all(x.shape[0] == (1 if packing else 8) for x in seen)
        assert not packing or [x.numel() for x in seen] == [apart, apart]
        return
    assert len(seen) == 2 * 3 + 2  # a comparison of each, then the step: reference, policy
    for ids in seen[-2:]:
        assert ids.shape == ((1, sum(tries)) if packing else (4, max(tries)))


def test_a_part_of_a_large_first_batch_is_compared(tmp_path):
    pairs, seen = with_reference(long_pairs(12), make_model()), []
    model = perturb(make_model())
    trainer = make_trainer(tmp_path, model, pairs, max_steps=1, per_device_train_batch_size=12)
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0]))
    trainer.train()
    assert [len(x) for x in seen] == [8, 8, 12, 12]


# -- where prompts are not shared
# -


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_difference_that_the_first_batch_shows(tmp_path, layout, caplog):
    """Then the step is that of the sequences apart, or none. The check of a few tokens saw none."""
    pairs = with_reference(one_long_pair()[:3], make_model())
    assert sum(pair_tokens(x, share_prompt=True) for x in pairs) > SEEN_FIRST

    def run(share):
        return step(
            *(tmp_path, by_place(perturb(make_model()), SEEN_FIRST), pairs),
            share=share,
            packing=layout == "packed",
        )

    found, expected = run(None), run(False)
    assert not found[-1]._sharing.on and found[-1]._sharing.settled
    assert "the first batch's log-probs are not the same: they differ by" in caplog.text
    assert_same_steps(found, expected, 1e-6)
    with pytest.raises(ValueError, match=r"share_prompt: the first batch's .*share_prompt=False"):
        run(True)


def test_packs_that_are_made_for_shared_rows_are_not_run_apart(tmp_path):
    """They would be longer than the budget."""
    pairs = with_reference(one_long_pair(), make_model())
    options = {"packing": True, "token_budget": 60, "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match="share_prompt: the first batch's log-probs are not"):
        step(tmp_path, by_place(perturb(make_model()), SEEN_FIRST), pairs, share=None, **options)


def prompted(kind="PromptTuningConfig"):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        make_model(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )


def flash():
    model = make_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (prompted, {}, r"expected no (PeftType\.)?PROMPT_TUNING adapters"),
        (lambda: prompted("PrefixTuningConfig"), {}, r"no (PeftType\.)?PREFIX_TUNING adapters"),
        (make_model, {"torch_compile": True}, "expected torch_compile=False"),
        (flash, {}, "attn_implementation: expected sdpa, eager, flex_attention"),
    ],
    ids=["prompt", "prefix", "torch_compile", "flash_attention_2"],
)
def test_what_speaks_against_it_is_named_at_once(tmp_path, make, options, message, packed, caplog):
    pairs = with_reference(make_pairs(4), make_model())
    if packed:
        options = options | {"packing": True, "token_budget": 60}
    if packed and make not in (make_model, flash):
        pytest.skip("virtual tokens are not packed")
    with pytest.raises(ValueError, match=f"share_prompt: .*{message}.*; set share_prompt=False"):
        make_trainer(tmp_path, make(), pairs, share_prompt=True, **options)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, make(), pairs, **options)
    assert not trainer._sharing.on and not trainer.data_collator.share_prompt
    assert caplog.text.count("is off, each answer runs its prompt") == 1
    assert not trainer._sharing.asked
    caplog.clear()
    make_trainer(tmp_path, make(), pairs, share_prompt=False, **options)
    assert "runs its prompt" not in caplog.text


def test_a_collator_of_ones_own(tmp_path, caplog):
    """Without shared rows in its batches."""
    pairs, found = with_reference(long_pairs(), make_model()), []

    def trainer_of(share):
        made = make_trainer(tmp_path, perturb(make_model()), pairs, share_prompt=share, max_steps=1)
        gradients = Gradients()
        trainer = TRegTrainer(
            *(made.model, None, made.args, pairs, None, made.processing_class),
            data_collator=PairCollator(),
            callbacks=[gradients],
        )
        return trainer, gradients

    for share in (None, False):
        trainer, gradients = trainer_of(share)
        trainer.train()
        found.append(gradients.steps[0])
    assert_same(found[0], found[1], 1e-6)
    assert "the data_collator gives no `shared`" in caplog.text
    with pytest.raises(ValueError, match=r"share_prompt: the data_collator gives no `shared`"):
        trainer_of(True)[0].train()


# -- two processes
# -


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    processes.run(sharing_worker.__file__, folder, ranks=2)
    return folder


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_in_shared_rows_are_one_apart(tmp_path, two_processes, name):
    gradients = Gradients()
    trainer = shared_trainer(name, tmp_path, 4, [gradients], share_prompt=False)
    trainer.train()
    metrics = trainer.evaluate()
    found, lines, evaluated = torch.load(two_processes / f"{name}.pt")
    for a, b in zip(found, gradients.steps, strict=True):
        assert_same({k.removeprefix("module."): x for k, x in a.items()}, b, 1e-6)
    lines = [x for x in lines if "loss" in x]
    expected = [x for x in trainer.state.log_history if "loss" in x]
    for a, b in zip([*lines, evaluated], [*expected, metrics], strict=True):
        names = {k for k in b if not any(time in k for time in TIMES)}
        assert {k: a[k] for k in names} == pytest.approx({k: b[k] for k in names}, rel=1e-5)


def test_what_one_of_two_processes_finds_counts_for_both(tmp_path, two_processes):
    gradients = Gradients()
    placed_trainer(tmp_path, 4, [gradients], share_prompt=False).train()
    for rank in range(2):
        found, on, error = torch.load(two_processes / f"placed-None-{rank}.pt")
        assert not on and not error
        steps = [{k.removeprefix("module."): x for k, x in a.items()} for a in found]
        assert_same(steps[0], gradients.steps[0])
    errors = [torch.load(two_processes / f"placed-True-{rank}.pt") for rank in range(2)]
    assert not list(chain(*(steps for steps, *_ in errors)))
    said = sorted(error for *_, error in errors)
    assert said[0].startswith("share_prompt: another process found a difference")
    assert said[1].startswith("share_prompt: the first batch's log-probs are not the same")


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"cp_size": 1, "sp_size": 4}])
def test_sequences_that_ranks_have_parts_of_are_not_shared(sizes):
    args = SimpleNamespace(torch_compile=False, parallelism_config=SimpleNamespace(**sizes))
    sharing = PromptSharing(None)
    give_up_by_arguments(sharing, make_model(), args)
    assert not sharing.on
    with pytest.raises(ValueError, match="share_prompt: expected sequences that are whole"):
        give_up_by_arguments(PromptSharing(True), make_model(), args)
