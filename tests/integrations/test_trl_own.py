"""Objectives that TRL lacks, in TRegDPOTrainer: loss and gradients of a step are those of the
reference on dense logits in float64.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from dense_step import exact_step, reference_logits
from tiny import tiny_llama, tiny_tokenizer
from transformers import TrainerCallback

from treg.integrations.trl import TRegDPOConfig, TRegDPOTrainer
from treg.integrations.trl.own import TRL_LOSSES, OwnLoss, own_options
from treg.losses import OBJECTIVES, LossOptions

SIDES = ("chosen", "rejected")
VOCAB, BETA = 400, 0.3
NAMES = [name for name in OBJECTIVES if name not in TRL_LOSSES]
# one of each kind: with a reference, without, with a likelihood, with numbers of pairs, with KL
KINDS = ("tgdpo", "d2po", "sepo", "orpo", "figa", "bfpo", "tdpo2", "sparsepo")
SCALARS = {
    "figa": {"gate": 7.0},
    "bfpo": {"tau": 0.5},
    "simpo": {"gamma": 0.2},
    "sepo": {"gamma": 0.1, "keep": 0.5},
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def make_model(seed=0):
    model = tiny_llama(VOCAB)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters() if seed else ():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def make_pairs(loss_type, count=4):
    random, row, pairs = np.random.default_rng(0), OBJECTIVES[loss_type], []
    for _ in range(count):
        pair = {"prompt_ids": random.integers(3, VOCAB, random.integers(2, 6)).tolist()}
        for side in SIDES:
            n = random.integers(1, 8)
            pair[f"{side}_ids"] = random.integers(3, VOCAB, n).tolist()
            pair[f"{side}_token_rewards"] = (random.random(n) - 0.5).tolist()
            if "token_weights" in row.needs:
                pair[f"{side}_token_weights"] = random.random(n).tolist()
        for name in row.pair_columns:
            pair[name] = float(random.random() < 0.5)
        pairs.append(pair)
    return pairs


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def make_trainer(tmp_path, model, pairs, ref_model=None, eval_pairs=None, peft=None, **options):
    collator = options.pop("data_collator", None)
    config = TRegDPOConfig(
        str(tmp_path),
        beta=BETA,
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
        **options,
    )
    return TRegDPOTrainer(
        model,
        ref_model,
        config,
        collator,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
        eval_dataset=None if eval_pairs is None else Dataset.from_list(eval_pairs),
        peft_config=peft,
    )


def exact(model, ref_logits, pairs, loss_type, **options):
    return exact_step(
        model, ref_logits, pairs, loss_type, beta=BETA, scalars=SCALARS.get(loss_type), **options
    )


def check_step(trainer, out, expected, rel=1e-5):
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    [line] = [x for x in trainer.state.log_history if "loss" in x]
    assert line["loss"] == pytest.approx(out.loss.item(), rel=rel)
    total = torch.cat([x.flatten() for x in expected.values()]).norm()
    assert total > 1e-4 and gradients.found.keys() == expected.keys()
    for name, x in expected.items():
        off = (gradients.found[name].double() - x).norm()
        assert off <= rel * max(x.norm(), 1e-2 * total), f"{name}: {off / x.norm():.1e}"
    margins = (out.chosen_rewards - out.rejected_rewards).mean().item()
    assert line["rewards/margins"] == pytest.approx(margins, rel=1e-4, abs=1e-6)
    assert line["treg/empty_answers"] == pytest.approx((out.kept == 0).double().mean().item())
    return line


def test_what_trl_lacks():
    assert {*KINDS} <= {*NAMES} and not {*NAMES} & {*TRL_LOSSES}


@pytest.mark.parametrize("loss_type", KINDS)
def test_a_step_is_the_references(tmp_path, loss_type):
    base, model, pairs = make_model(), make_model(1), make_pairs(loss_type)
    out, expected = exact(model, reference_logits(base, pairs), pairs, loss_type)
    options = {"loss_type": [loss_type], "treg_loss_scalars": SCALARS.get(loss_type)}
    trainer = make_trainer(tmp_path, model, pairs, base, pairs, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    check_step(trainer, out, expected)


@pytest.mark.parametrize("loss_type", ["tgdpo", "d2po", "messagewise"])
def test_log_probs_of_the_data(tmp_path, loss_type):
    """Annotated per token, they take the reference's place: it does not run."""
    base, model, pairs = make_model(), make_model(1), make_pairs(loss_type)
    ref_logits = reference_logits(base, pairs)
    out, expected = exact(model, ref_logits, pairs, loss_type, alpha=0.2)
    target = torch.tensor([x for side in SIDES for p in pairs for x in p[f"{side}_ids"]])
    logps = ref_logits.log_softmax(-1).gather(1, target[:, None])[:, 0].tolist()
    for side in SIDES:
        for pair in pairs:
            n = len(pair[f"{side}_ids"])
            pair[f"ref_{side}_token_logps"], logps = logps[:n], logps[n:]
    options = {"loss_type": loss_type, "treg_alpha": 0.2}
    trainer = make_trainer(tmp_path, model, pairs, **options)
    assert trainer.ref_model is None
    check_step(trainer, out, expected)


@pytest.mark.parametrize("loss_type", ["tis_dpo", "tdpo2"])
def test_adapters(tmp_path, loss_type):
    peft = pytest.importorskip("peft")
    pairs = make_pairs(loss_type)
    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(tmp_path, make_model(), pairs, loss_type=[loss_type], peft=lora)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    model = peft.get_peft_model(make_model(), lora)
    model.load_state_dict(trainer.model.state_dict())
    out, expected = exact(model.eval(), reference_logits(make_model(), pairs), pairs, loss_type)
    check_step(trainer, out, expected)


def test_the_reference_makes_rewards_where_the_data_have_none(tmp_path):
    rows = [
        {"prompt": "the fox? ", "chosen": "the old owl", "rejected": "the sun and the moon"},
        {"prompt": "what is better? ", "chosen": "it is 42", "rejected": "no"},
    ]
    trainer = make_trainer(tmp_path, make_model(1), rows, make_model(), loss_type=["tgdpo"])
    trainer.train()
    assert {"chosen_token_rewards", "rejected_token_rewards"} <= set(trainer.train_dataset[0])
    assert trainer.args.treg_alpha == 0.0


BAD = [
    ({"loss_type": ["tgdpo", "sigmoid"]}, "loss_type: expected 'tgdpo' by itself"),
    ({"loss_type": ["tgdpo"], "ld_alpha": 0.5}, "ld_alpha: expected None for loss_type='tgdpo'"),
    ({"loss_type": "figa", "treg_alpha": 0.3}, "alpha: expected 0 for loss_type='figa'"),
    ({"treg_loss_scalars": {"tau": 1.0}}, "treg_loss_scalars: expected none for a loss of TRL's"),
    (
        {"loss_type": ["d2po"], "treg_loss_scalars": {"x": 1}},
        "scalars: expected options of loss",
    ),
    ({"loss_type": ["sepo"], "treg_loss_scalars": "[1]"}, "treg_loss_scalars: expected"),
    ({"loss_type": ["tgdpoo"]}, "loss_type: expected one of .* did you mean 'tgdpo'?"),
    ({"loss_type": ["d2po"], "loss_weights": [0.5]}, "loss_weights: expected None for loss_type="),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TRegDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_the_policy_is_not_its_own_reference(tmp_path):
    """Sums that TRL makes beforehand are no log-probs of tokens."""
    pairs, options = make_pairs("d2po"), {"loss_type": ["d2po"]}
    with pytest.raises(ValueError, match="precompute_ref_log_probs: expected False for loss_type="):
        make_trainer(*(tmp_path, make_model(), pairs), precompute_ref_log_probs=True, **options)
    free = {"loss_type": ["confpo"], "precompute_ref_log_probs": True}
    assert make_trainer(tmp_path, make_model(), pairs, **free).ref_model is None
    trainer = make_trainer(tmp_path, make_model(1), pairs, make_model(), **options)
    trainer.ref_model = None
    with pytest.raises(ValueError, match="ref_model: expected a reference that runs, got none"):
        trainer.train()


def test_the_arguments_stay_what_they_were(tmp_path):
    options = {"loss_type": ["d2po"], "label_smoothing": 0.1}
    trainer = make_trainer(tmp_path, make_model(1), make_pairs("d2po"), make_model(), **options)
    assert trainer.args.loss_type == ["d2po"] and trainer.args.label_smoothing == 0.1
    assert trainer.args.loss_weights is None
    assert trainer._own.options.label_smoothing == 0.1


def with_reference(pairs, value=-1.0):
    found = []
    for pair in pairs:
        more = {f"ref_{s}_token_logps": [value] * len(pair[f"{s}_ids"]) for s in SIDES}
        found.append(pair | more)
    return found


def test_other_data_to_evaluate(tmp_path):
    """What they lack, or have beside it, is named."""
    pairs = make_pairs("tgdpo")
    trainer = make_trainer(tmp_path, make_model(1), pairs, make_model(), loss_type=["tgdpo"])
    bare = [{k: x for k, x in p.items() if "rewards" not in k} for p in pairs]
    with pytest.raises(ValueError, match="eval_dataset: expected the columns chosen_token_rewards"):
        trainer.evaluate(Dataset.from_list(bare))
    weighted = [
        p | {f"{s}_token_weights": [0.5] * len(p[f"{s}_ids"]) for s in SIDES} for p in pairs
    ]
    for other in (weighted, with_reference(pairs)):
        with pytest.raises(ValueError, match="eval_dataset: expected the streams of train_dataset"):
            trainer.evaluate(Dataset.from_list(other))
    assert trainer.evaluate(Dataset.from_list(pairs))["eval_loss"] > 0


def test_log_probs_of_what_is_cut(tmp_path):
    """A cut end leaves those of the beginning as they are; a cut beginning does not."""
    pairs = with_reference(make_pairs("d2po"))
    options = {"loss_type": ["d2po"], "max_length": 8}
    make_trainer(tmp_path, make_model(), pairs, **options).train()
    with pytest.raises(ValueError, match=r"max_length: expected at least .* log-probs are of all"):
        make_trainer(tmp_path, make_model(), pairs, **options, truncation_mode="keep_end")


def test_a_collator_of_ones_own_is_kept(tmp_path):
    """Also one that has an attribute `inner`."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Counting(DataCollatorForPreference):
        inner, calls = None, 0

        def __call__(self, *args, **kwargs):
            Counting.calls += 1
            return super().__call__(*args, **kwargs)

    collator = Counting(pad_token_id=0)
    trainer = make_trainer(
        *(tmp_path, make_model(1), make_pairs("d2po"), make_model()),
        loss_type=["d2po"],
        data_collator=collator,
    )
    trainer.train()
    assert Counting.calls == 1


def test_a_kl_term_is_refused_where_weights_are_sharded():
    with pytest.raises(ValueError, match="loss_type: expected one without a KL term under FSDP"):
        OwnLoss(LossOptions("tdpo1"), None).check_weights(sharded=True)
    OwnLoss(LossOptions("tdpo1"), None).check_weights(sharded=False)
    OwnLoss(LossOptions("d2po"), None).check_weights(sharded=True)


def test_alpha_where_none_is_given(tmp_path):
    def config(**options):
        return TRegDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)

    assert config().treg_alpha == 0.25 and own_options(config()) is None
    assert config(loss_type="tgdpo").treg_alpha == 0.0
    assert config(loss_type="simpo").treg_alpha == 0.25
    assert own_options(config(loss_type="tgdpo", treg_alpha=0.1)).alpha == 0.1


def test_what_the_data_lack_is_named(tmp_path):
    pairs = make_pairs("bfpo")
    without = [{k: x for k, x in pair.items() if k != "rejected_safe"} for pair in pairs]
    with pytest.raises(ValueError, match="train_dataset: expected the columns rejected_safe for"):
        make_trainer(tmp_path, make_model(), without, make_model(1), loss_type=["bfpo"])
    extra = [p | {f"{s}_kl_weights": [1.0] * len(p[f"{s}_ids"]) for s in SIDES} for p in pairs]
    with pytest.raises(ValueError, match="train_dataset: expected no chosen_kl_weights"):
        make_trainer(tmp_path, make_model(), extra, make_model(1), loss_type=["bfpo"])
    with pytest.raises(ValueError, match="expected the columns chosen_token_weights, rejected"):
        make_trainer(tmp_path, make_model(), pairs, make_model(1), loss_type=["sparsepo"])
    pairs[0]["chosen_safe"] = float("nan")
    trainer = make_trainer(tmp_path, make_model(), pairs, make_model(1), loss_type=["bfpo"])
    with pytest.raises(ValueError, match="number in the column chosen_safe of every pair, got nan"):
        trainer.train()
