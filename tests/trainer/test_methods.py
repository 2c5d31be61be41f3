"""Every objective with token credit of its own, through the trainer: the gradient of a step is that
of the reference on dense logits in float64.
"""

import contextlib
import copy

import numpy as np
import pytest
from dense_step import exact_step, reference_logits
from trainer_worker import (
    BETA,
    SIDES,
    assert_same,
    first_step,
    make_model,
    make_pairs,
    make_trainer,
    perturb,
    with_lora,
    with_reference,
)

from treg.data import PairCollator, first_pairs
from treg.losses import OBJECTIVES

pytest.importorskip("peft")

NAMES = [name for name, row in OBJECTIVES.items() if not row.alpha]
WITH_KL = [name for name in NAMES if "kl" in OBJECTIVES[name].needs]
# an untrained model is sure of nothing; a target of 50 nats would hide everything else
SCALARS = {"figa": {"gate": 5.0}, "bfpo": {"tau": 0.5}}


def annotated(loss_type, n=5):
    """Pairs with what the objective needs."""
    row, rng, pairs = OBJECTIVES[loss_type], np.random.default_rng(3), []
    for pair in make_pairs(n):
        for side in SIDES:
            length = len(pair[f"{side}_ids"])
            if "token_weights" in row.needs:
                pair[f"{side}_token_weights"] = rng.uniform(0, 2, length).astype(np.float32)
                pair[f"{side}_kl_weights"] = rng.uniform(0, 2, length).astype(np.float32)
        for name in row.pair_columns:
            pair[name] = bool(rng.random() < 0.5)
        pairs.append(pair)
    return pairs


def exact(model, ref_logits, pairs, loss_type, **options):
    return exact_step(
        model, ref_logits, pairs, loss_type, beta=BETA, scalars=SCALARS.get(loss_type), **options
    )


# where the reference comes from, and the layout; the KL divergence needs the reference itself
CASES = [
    (name, source, packing)
    for name in NAMES
    for source, packing in (("tokens", True), ("model", False), ("adapters", True))
    if name not in WITH_KL or source != "tokens"
]


@pytest.mark.parametrize(("loss_type", "source", "packing"), CASES)
def test_gradient_is_that_of_dense_logits(tmp_path, loss_type, source, packing):
    base = make_model()
    model = copy.deepcopy(base)
    model = with_lora(model) if source == "adapters" else perturb(model)
    pairs = annotated(loss_type)
    with model.disable_adapter() if source == "adapters" else contextlib.nullcontext():
        ref_logits = reference_logits(model if source == "adapters" else base, pairs)
    out, grads = exact(model, ref_logits, pairs, loss_type)
    if source == "tokens":
        pairs = with_reference(pairs, base, per_token=True)
    given = base if source == "model" else None
    options = {"loss_type": loss_type, "loss_scalars": SCALARS.get(loss_type)}
    found, log = first_step(tmp_path, model, pairs, given, packing=packing, **options)
    assert_same(found, grads)
    assert log["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    if "treg/kept" in log:
        count = sum(len(pair[f"{side}_ids"]) for pair in pairs for side in SIDES)
        assert log["treg/kept"] == pytest.approx(out.kept.sum().item() / count)
        assert log["treg/empty_answers"] == pytest.approx((out.kept == 0).double().mean().item())
    assert ("kl" in log) == (loss_type in WITH_KL)


@pytest.mark.parametrize("family", ["tied", "gemma2", "cohere"])
def test_kl_of_heads_with_options(tmp_path, family):
    base = make_model(family)
    model = perturb(copy.deepcopy(base))
    pairs = annotated("tdpo2")
    out, grads = exact(model, reference_logits(base, pairs), pairs, "tdpo2", alpha=0.3)
    found, log = first_step(tmp_path, model, pairs, base, loss_type="tdpo2", alpha=0.3)
    assert_same(found, grads)
    assert log["loss"] == pytest.approx(out.loss.item(), rel=1e-5)


def test_a_reference_in_another_dtype(tmp_path):
    base = make_model()
    model = perturb(copy.deepcopy(base))
    pairs = annotated("tdpo1")
    # weights that bfloat16 holds exactly, so that the two references differ by activations alone
    half = copy.deepcopy(base).bfloat16()
    rounded = reference_logits(copy.deepcopy(half).float(), pairs)
    out, grads = exact(model, rounded, pairs, "tdpo1")
    far = reference_logits(perturb(copy.deepcopy(base), 0.1), pairs)
    other, _ = exact(model, far, pairs, "tdpo1")
    found, log = first_step(tmp_path, model, pairs, half, loss_type="tdpo1")
    assert log["loss"] == pytest.approx(out.loss.item(), rel=2e-2)
    assert abs(log["loss"] - other.loss.item()) > 0.1 * other.loss.item()
    assert_same(found, grads, 0.1)


def test_alpha_is_that_of_the_objective_where_none_is_given(tmp_path):
    pairs = with_reference(annotated("d2po"), make_model(), per_token=True)
    bare = [{k: x for k, x in pair.items() if "rewards" not in k} for pair in pairs]
    assert make_trainer(tmp_path, make_model(), bare, loss_type="d2po").loss_options.alpha == 0
    with pytest.raises(
        ValueError, match="train_dataset: expected the columns chosen_token_rewards"
    ):
        make_trainer(tmp_path, make_model(), bare, loss_type="d2po", alpha=0.1)


@pytest.mark.parametrize("loss_type", ["tgdpo", "sepo", "figa"])
def test_rewards_are_needed(tmp_path, loss_type):
    pairs = with_reference(annotated(loss_type), make_model(), per_token=True)
    bare = [{k: x for k, x in pair.items() if "rewards" not in k} for pair in pairs]
    message = f"expected the columns chosen_token_rewards, .*another loss_type than '{loss_type}'"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_model(), bare, loss_type=loss_type)


def test_kl_needs_a_reference_that_runs(tmp_path):
    pairs = with_reference(annotated("tdpo1"), make_model(), per_token=True)
    with pytest.raises(ValueError, match="ref_model: expected a model for loss_type='tdpo1'"):
        make_trainer(tmp_path, make_model(), pairs, loss_type="tdpo1")


def test_sums_of_the_reference_are_not_enough(tmp_path):
    pairs = with_reference(annotated("d2po"), make_model())
    message = "train_dataset: expected the columns ref_chosen_token_logps, .*--per_token"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_model(), pairs, loss_type="d2po")


def test_weights_of_kl_are_for_losses_that_take_them(tmp_path):
    pairs = with_reference(annotated("sparsepo"), make_model(), per_token=True)
    with pytest.raises(ValueError, match="train_dataset: expected no chosen_kl_weights"):
        make_trainer(tmp_path, make_model(), pairs, loss_type="d2po")


@pytest.mark.parametrize("value", [None, "yes", float("nan"), [1.0]])
def test_numbers_of_pairs(tmp_path, value):
    pairs = with_reference(annotated("bfpo"), make_model())
    pairs[3] = pairs[3] | {"rejected_safe": value}
    message = r"train_dataset: expected a finite number in the column rejected_safe .*in pair 3"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_model(), pairs, loss_type="bfpo")
    del pairs[3]["rejected_safe"]
    with pytest.raises(ValueError, match=r"got none in pair 3; .*--keep_columns rejected_safe"):
        make_trainer(tmp_path, make_model(), pairs, loss_type="bfpo")


def test_raw_rows_bring_their_numbers(tmp_path):
    rows = [
        {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5", "chosen_safe": 1},
        {"prompt": "w6", "chosen": " w7", "rejected": " w8 w9", "chosen_safe": False},
    ]
    rows = [row | {"rejected_safe": 0.0} for row in rows]
    trainer = make_trainer(
        tmp_path, perturb(make_model()), rows, make_model(), rows, loss_type="bfpo", max_steps=1
    )
    trainer.train()
    assert [pair["chosen_safe"] for pair in trainer.train_dataset] == [1, False]
    assert trainer.evaluate()["eval_loss"] > 0


def test_first_pairs_of_a_batch_with_numbers():
    pairs = annotated("bfpo")
    collator = PairCollator(pair_columns=OBJECTIVES["bfpo"].pair_columns)
    kept, whole = first_pairs(collator(pairs), 2), collator(pairs[:2])
    assert np.array_equal(kept["pair_values"], whole["pair_values"])
    assert kept["pair_values"].shape == (2, 2)
