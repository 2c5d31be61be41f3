"""The trainer against the same steps from dense logits, and against itself: in parts, resumed, in
two processes.
"""

import copy
import gc
import pickle
import re
import signal
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
import trainer_worker
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from trainer_worker import (
    BETA,
    SHARED,
    SIDES,
    At,
    Gradients,
    assert_same,
    dense_logps,
    first_step,
    make_config,
    make_model,
    make_pairs,
    make_trainer,
    perturb,
    resumable,
    shared_trainer,
    tokenizer,
    with_lora,
    with_reference,
)
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import treg.trainer
from treg.data import PairCollator, first_pairs
from treg.data.annotated import model_fingerprint, tokenizer_fingerprint, write_annotated
from treg.data.batches import PER_TOKEN_OR_SEQUENCE
from treg.files import last_checkpoint
from treg.losses import LossOptions
from treg.trainer import TRegConfig, TRegTrainer

pytest.importorskip("peft")
GAMMA = 0.2


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Every training ends with a garbage collection, which would look through all that has been
    imported.
    """
    gc.freeze()
    yield
    gc.unfreeze()


def oracle(model, ref, pairs, loss_type="dpo", alpha=0.25, weighting="gradient", gamma=0.0):
    """The mean loss of pairs. ref: a function like dense_logps, without its model, or None."""
    losses = []
    for pair in pairs:
        rho, reg = [], []
        for side in SIDES:
            logps = dense_logps(model, pair, side)
            ratio = logps if ref is None else logps - ref(pair, side)
            if f"{side}_token_weights" in pair:
                ratio = ratio * torch.from_numpy(pair[f"{side}_token_weights"])
            norm = len(logps) if loss_type in ("simpo", "ipo") else 1
            rewards = torch.from_numpy(pair[f"{side}_token_rewards"])
            rho.append(BETA * ratio.sum() / norm)
            reg.append(-BETA * (rewards * logps).sum() / norm)
        margin = rho[0] - rho[1] - gamma
        if loss_type == "ipo":
            off = margin / BETA - 1 / (2 * BETA)
            base, w = off**2, (2 * off / BETA).abs()
        else:
            base, w = -F.logsigmoid(margin), torch.sigmoid(-margin)
        w = 1.0 if weighting == "static" else w.detach()
        losses.append(base + alpha * w * sum(reg))
    return torch.stack(losses).mean()


def exact_step(model, pairs, ref_model=None, **options):
    """The oracle's loss and gradients in float64. ref_model: a model, "adapters" for model without
    them, or None.
    """
    model = copy.deepcopy(model).double()

    def ref(pair, side):
        with torch.no_grad():
            if ref_model != "adapters":
                return dense_logps(ref_model, pair, side)
            with model.disable_adapter():
                return dense_logps(model, pair, side)

    loss = oracle(model, None if ref_model is None else ref, pairs, **options)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    return loss.item(), dict(zip(named, grads, strict=True))


LOSSES = [
    {},
    {"alpha": 0.0},
    {"weighting": "static"},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "alpha": 0.0},
    {"loss_type": "simpo", "gamma": GAMMA},
    {"loss_type": "simpo", "weighting": "static"},
]
CASES = [
    *(
        ("llama", lora, source, loss)
        for lora in (False, True)
        for source in ("sums", "tokens", "model", *(["adapters"] if lora else []))
        for loss in (LOSSES[:5] if source == "sums" else LOSSES[:1])
    ),
    *(
        (family, lora, "model", LOSSES[0])
        for family in ("tied", "gemma2", "cohere")
        for lora in (False, True)
    ),
    *(("llama", lora, "none", loss) for lora in (False, True) for loss in LOSSES[5:]),
    ("gemma2", False, "sums", LOSSES[3]),
    ("tied", True, "adapters", LOSSES[2]),
]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family, lora, source, loss", CASES)
def test_gradient_is_that_of_dense_logits(tmp_path, family, lora, source, loss, packing):
    base = make_model(family)
    model = copy.deepcopy(base)
    model = with_lora(model) if lora else perturb(model)
    pairs = make_pairs(5)
    ref_model = {"none": None, "adapters": "adapters"}.get(source, base.double())
    expected, grads = exact_step(model, pairs, ref_model, **loss)
    if source in ("sums", "tokens"):
        pairs = with_reference(pairs, base, per_token=source == "tokens")
    given = base.float() if source == "model" else None
    found, log = first_step(tmp_path, model, pairs, given, packing=packing, **loss)
    assert_same(found, grads)
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


def with_weights(pairs):
    rng = np.random.default_rng(3)
    return [
        pair | {f"{s}_token_weights": rng.uniform(0, 2, len(pair[f"{s}_ids"])) for s in SIDES}
        for pair in pairs
    ]


@pytest.mark.parametrize(
    "source, loss",
    [("tokens", {}), ("model", {"alpha": 0.0}), ("none", {"loss_type": "simpo", "alpha": 0.0})],
)
def test_gradient_with_token_weights(tmp_path, source, loss):
    base = make_model()
    pairs = with_weights(make_pairs(5))
    model, reference = perturb(copy.deepcopy(base)), None if source == "none" else base.double()
    expected, grads = exact_step(model, pairs, reference, **loss)
    plain, _ = exact_step(model, make_pairs(5), reference, **loss)
    assert abs(plain - expected) > 1e-3
    if source == "tokens":
        pairs = with_reference(pairs, base, per_token=True)
    if loss:  # weights alone
        pairs = [{k: x for k, x in pair.items() if "token_rewards" not in k} for pair in pairs]
    given = base.float() if source == "model" else None
    found, log = first_step(tmp_path, model, pairs, given, **loss)
    assert_same(found, grads)
    assert log["loss"] == pytest.approx(expected, rel=1e-5)
    assert "treg/reward_chosen" not in log or not loss


def test_token_weights_need_the_references_log_probs_of_tokens(tmp_path):
    pairs = with_reference(with_weights(make_pairs(2)), make_model())
    message = "train_dataset: expected the columns ref_chosen_token_logps, .*--per_token"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_model(), pairs)
    assert make_trainer(tmp_path, make_model(), pairs, make_model())._source == "model"


def test_weights_in_some_pairs_only(tmp_path):
    pairs = with_reference(make_pairs(2), make_model(), per_token=True)
    pairs[1] = with_weights([pairs[1]])[0]
    with pytest.raises(
        ValueError, match=r"expected no chosen_token_weights in every pair.* pair 1"
    ):
        make_trainer(tmp_path, make_model(), pairs)


def prompted(kind):
    import peft

    return getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)


def with_adapter(kind):
    from peft import LoraConfig, get_peft_model

    if kind == "head":
        config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    else:
        config = prompted(kind)
    return perturb(get_peft_model(make_model(), config), 0.3)


@pytest.mark.parametrize("kind", ["head", "PromptTuningConfig", "PrefixTuningConfig"])
def test_gradient_of_other_adapters(tmp_path, kind):
    """On the head itself, and virtual tokens before the sequence; the reference is the model
    without them.
    """
    model, pairs = with_adapter(kind), make_pairs(5)
    expected, grads = exact_step(model, pairs, "adapters")
    found, log = first_step(tmp_path, model, pairs)
    assert_same(found, grads)
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_virtual_tokens_are_not_packed(tmp_path):
    model = with_adapter("PromptTuningConfig")
    with pytest.raises(ValueError, match=r"packing: expected False with .*PROMPT_TUNING"):
        make_trainer(tmp_path, model, make_pairs(2), packing=True)


# -- one step in parts
# -


def steps(tmp_path, pairs, batch, accumulation=1, **options):
    """The gradients of every step of an epoch, and the model after it."""
    gradients, model = Gradients(), make_model().double()
    trainer = make_trainer(
        tmp_path,
        perturb(model),
        pairs,
        callbacks=[gradients],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    trainer.train()
    return trainer, gradients.steps, dict(model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": True}, {"packing": True, "token_budget": 36}],
    ids=["padded", "packed", "packs"],
)
def test_one_by_eight_is_eight_by_one(tmp_path, options):
    """The last step has fewer items; packs have different numbers of pairs."""
    pairs = with_reference(make_pairs(27 if "token_budget" in options else 11), make_model())
    trainer, expected, after = steps(tmp_path, pairs, 8, **options)
    sizes = [len(x) if isinstance(x, list) else 1 for x in trainer.train_dataset]
    assert len(expected) == 2 and len(sizes) % 8
    assert len(set(sizes)) > 1 or "token_budget" not in options
    _, found, after_found = steps(tmp_path, pairs, 1, 8, **options)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, 1e-6)
    assert_same(after_found, after, 1e-6)


def test_packs_have_the_gradient_of_their_pairs(tmp_path):
    pairs = with_reference(make_pairs(9), make_model())
    trainer, found, _ = steps(tmp_path, pairs, 9, packing=True, token_budget=60)
    assert 1 < len(trainer.train_dataset) < 9
    _, expected, _ = steps(tmp_path, pairs, 9)
    assert_same(found[0], expected[0], 1e-6)


# -- stopped and resumed
# -


def history(trainer):
    """Log lines without times and without the summary, whose loss is that of the last run alone."""
    lines = [x for x in trainer.state.log_history if "train_runtime" not in x]
    return [
        {k: x for k, x in line.items() if "runtime" not in k and "per_second" not in k}
        for line in lines
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = resumable(tmp_path_factory.mktemp("whole"))
    trainer.train()
    trainer.save_model()
    return trainer


def assert_resumed(trainer, whole):
    trainer.save_model()
    files = [Path(x.args.output_dir, "model.safetensors").read_bytes() for x in (trainer, whole)]
    assert files[0] == files[1]
    assert history(trainer) == history(whole)


def stop_after(step):
    return At(step, lambda control: setattr(control, "should_training_stop", True))


@pytest.mark.parametrize("step", [2, 4], ids=["first epoch", "second epoch"])
def test_resumed_is_uninterrupted(tmp_path, uninterrupted, step):
    stopped = resumable(tmp_path, [stop_after(step)])
    stopped.train()
    assert stopped.state.global_step == step < uninterrupted.state.global_step
    trainer = resumable(tmp_path)
    trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert_resumed(trainer, uninterrupted)
    assert len(history(trainer)) == 6 + 3


@pytest.mark.parametrize(
    "when, newest, whole", [("step:5", 4, 4), ("save:4", 4, 2)], ids=["training", "saving"]
)
def test_killed_and_resumed_is_uninterrupted(tmp_path, uninterrupted, when, newest, whole):
    process = processes.start(trainer_worker.__file__, "killed", tmp_path, when)
    assert process.wait() == -signal.SIGKILL, process.said()
    assert max(int(x.name.rpartition("-")[2]) for x in tmp_path.glob("checkpoint-*")) == newest
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{whole}"
    trainer = resumable(tmp_path)
    trainer.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
    assert_resumed(trainer, uninterrupted)


def test_tokens_are_counted_across_a_resume_between_log_lines(tmp_path, uninterrupted):
    resumable(tmp_path, [stop_after(4)], logging_steps=3).train()
    trainer = resumable(tmp_path, logging_steps=3)
    trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    found = {x["step"]: x["num_tokens"] for x in trainer.state.log_history if "num_tokens" in x}
    expected = {
        x["step"]: x["num_tokens"] for x in uninterrupted.state.log_history if "num_tokens" in x
    }
    assert found == {step: expected[step] for step in (3, 6)}


def test_last_checkpoint_is_whole(tmp_path):
    """Of another trainer, without a seal: each file that a resume reads, and a state that can be
    read; tests/cli/test_runs.py has the sealed ones.
    """
    assert last_checkpoint(tmp_path) is None
    for step, text in (
        ("9", '{"global_step": 9}'),
        ("10", '{"global_step": 10}'),
        ("11", '{"global_step'),
        ("12", None),
        ("13", '{"global_step": 9}'),
        ("x", '{"global_step": 10}'),
    ):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"x": 1}, folder / name)
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-10"


# -- metrics
# -


@torch.no_grad()
def hand_metrics(model, ref_model, pairs):
    """For dpo with gradient weighting; per-token lists are of all completions."""
    found = {f"{name}/{side}": [] for name in ("rewards", "logps") for side in SIDES}
    found |= {
        name: [] for name in ("reg", "rhat/chosen", "rhat/rejected", "same", "entropy", "top1")
    }
    found |= {f"logits/{side}": [] for side in SIDES}
    found |= {"squares": [], "lengths": []}
    for pair in pairs:
        for side in SIDES:
            n = len(pair[f"{side}_ids"])
            ids = torch.from_numpy(np.concatenate([pair["prompt_ids"], pair[f"{side}_ids"]])).long()
            logits = model(input_ids=ids[None]).logits[0, -n - 1 : -1]
            logps = logits.log_softmax(-1)
            lp, rhat = (
                dense_logps(model, pair, side),
                torch.from_numpy(pair[f"{side}_token_rewards"]),
            )
            ratio = lp - dense_logps(ref_model, pair, side)
            found[f"rewards/{side}"].append(BETA * ratio.sum())
            found[f"logps/{side}"].append(lp.sum())
            found["reg"].append(-BETA * (rhat * lp).sum())
            found[f"rhat/{side}"] += rhat
            found["squares"].append(rhat.square().sum())
            found["lengths"].append(torch.tensor(n))
            found["same"] += ((rhat > 0) == (ratio > 0)).double()[rhat != 0]
            found["entropy"] += -(logps.exp() * logps).sum(-1)
            found["top1"] += (logits.argmax(-1) == ids[-n:]).double()
            found[f"logits/{side}"] += logits.mean(-1)
    found = {k: torch.stack(x).double() for k, x in found.items()}
    margin = found["rewards/chosen"] - found["rewards/rejected"]
    reg = found["reg"].view(-1, 2).sum(-1)
    w = torch.sigmoid(-margin)
    squares, lengths = (found[name].view(-1, 2).sum(-1) for name in ("squares", "lengths"))
    numbers = {
        "loss": -F.logsigmoid(margin) + 0.25 * w * reg,
        **{k: x for k, x in found.items() if k.startswith(("rewards/", "logps/"))},
        "rewards/accuracies": (margin > 0).double(),
        "rewards/margins": margin,
        "treg/reg_loss": reg,
        "treg/weight": w,
        "treg/reward_chosen": found["rhat/chosen"],
        "treg/reward_rejected": found["rhat/rejected"],
        "treg/alignment": found["same"],
        "treg/gradient_ratio": 0.25 * ((w**2 * squares).sum() / (w**2 * lengths).sum()).sqrt(),
    }
    numbers |= {"entropy": found["entropy"], "mean_token_accuracy": found["top1"]}
    numbers |= {k: x for k, x in found.items() if k.startswith("logits/")}
    return {k: x.mean().item() for k, x in numbers.items()}


def tokens(pairs):
    return sum(
        2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) - 2 for p in pairs
    )


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_metrics_are_those_by_hand(tmp_path, packing):
    model, ref_model = perturb(make_model(), 0.1), make_model()
    pairs, held_out = make_pairs(6), make_pairs(5, seed=1)
    for pair in (pairs[0], held_out[0]):
        pair["chosen_token_rewards"][:] = 0.0
    expected = hand_metrics(model, ref_model, pairs)
    trainer = make_trainer(
        tmp_path,
        model,
        pairs,
        ref_model,
        held_out,
        packing=packing,
        learning_rate=0.0,
        num_train_epochs=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        per_device_eval_batch_size=2,
    )
    trainer.train()
    trained = [x for x in trainer.state.log_history if "loss" in x]
    for i, line in enumerate(trained, 1):
        assert line.pop("num_tokens") == i * tokens(pairs)
        line = {
            k: x
            for k, x in line.items()
            if k not in ("grad_norm", "learning_rate", "epoch", "step")
        }
        assert line == pytest.approx(expected, rel=1e-4)
    assert len(trained) == 2
    expected = hand_metrics(model, ref_model, held_out)
    assert 0 < expected["rewards/accuracies"] < 1 and 0 < expected["treg/alignment"] < 1
    evaluated = [x for x in history(trainer) if "eval_loss" in x]
    line = {k: x for k, x in evaluated[0].items() if k not in ("epoch", "step")}
    assert line == pytest.approx({f"eval_{k}": x for k, x in expected.items()}, rel=1e-4)
    assert evaluated[1] | {"epoch": 1.0, "step": 1} == evaluated[0]


def test_statistics_of_tokens_at_logged_steps_only(tmp_path, monkeypatch):
    asked, original = [], treg.trainer.trainer.fused_treg_loss
    monkeypatch.setattr(
        treg.trainer.trainer,
        "fused_treg_loss",
        lambda *a, **k: asked.append(k["outputs"]) or original(*a, **k),
    )
    pairs = with_reference(make_pairs(4), make_model())
    trainer = make_trainer(tmp_path, make_model(), pairs, max_steps=4, logging_steps=2)
    trainer.train()
    assert asked == [(), treg.trainer.trainer.STATISTICS] * 2
    assert sum("entropy" in x for x in trainer.state.log_history) == 2


@pytest.mark.parametrize("per_token", [False, True])
def test_metrics_need_their_columns(tmp_path, per_token):
    pairs = with_reference(make_pairs(4), make_model(), per_token)
    _, line = first_step(
        tmp_path, perturb(make_model()), pairs, include_num_input_tokens_seen="non_padding"
    )
    assert ("treg/alignment" in line) == per_token and "treg/reward_chosen" in line
    assert line["num_tokens"] == tokens(pairs)  # once, though transformers counts them as well
    for pair in pairs:
        for side in SIDES:
            del pair[f"{side}_token_rewards"]
    _, line = first_step(tmp_path, perturb(make_model()), pairs, alpha=0.0)
    assert (
        not [k for k in line if "treg/reward" in k or "alignment" in k]
        and "rewards/margins" in line
    )


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("per_token", [False, True], ids=["sums", "tokens"])
def test_first_pairs_of_a_batch(packing, per_token):
    pairs = with_reference(make_pairs(5), make_model(), per_token)
    collate = PairCollator(packing=packing)
    batch, few = collate(pairs), collate(pairs[:2])
    found = first_pairs(batch, 2)
    names = [k for k in PER_TOKEN_OR_SEQUENCE[1:] if k in batch]
    assert {"target", "lengths", "token_rewards", "ref_logps"} <= set(names)
    for k in names:
        assert np.array_equal(found[k], few[k]), k
    ids = [x["input_ids"].flatten()[x["scored"]] for x in (found, few)]
    assert torch.equal(*ids)
    assert all(found[k] is x for k, x in batch.items() if k not in PER_TOKEN_OR_SEQUENCE)
    assert all(np.array_equal(x, batch[k]) for k, x in first_pairs(batch, 5).items())


def test_several_evaluation_sets(tmp_path):
    model = make_model()
    sets = {k: with_reference(make_pairs(n, seed=n), model) for k, n in (("a", 2), ("b", 3))}
    trainer = make_trainer(tmp_path, perturb(model), None, eval_dataset=sets)
    found = trainer.evaluate()
    for name, pairs in sets.items():
        ref_model = make_model()
        expected = exact_step(model, pairs, ref_model.double())[0]
        assert found[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(sets["a"]).metrics["test_loss"] == pytest.approx(found["eval_a_loss"])


# -- memory, precision, dropout, files
# -


@pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning"
)  # the name that all supported releases know
@pytest.mark.parametrize("lora, reentrant", [(False, False), (True, False), (True, True)])
def test_checkpointed_activations_leave_the_gradient(tmp_path, lora, reentrant):
    pairs = with_reference(make_pairs(4), make_model())
    found, calls = {}, {}
    for on in (False, True):
        model = make_model()
        model, attention, calls[on] = (
            with_lora(model) if lora else perturb(model),
            model.model.layers[0].self_attn,
            [],
        )
        attention.register_forward_hook(lambda *_, seen=calls[on]: seen.append(1))
        found[on], _ = first_step(
            tmp_path,
            model,
            pairs,
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
    assert len(calls[True]) == len(calls[False]) + 1
    assert_same(found[True], found[False], 1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_autocast_is_close(tmp_path, lora):
    found, ref_model = {}, make_model()
    for bf16 in (False, True):
        model = with_lora(make_model()) if lora else perturb(make_model())
        given = None if lora else ref_model
        found[bf16], log = first_step(
            tmp_path, model, make_pairs(6), given, bf16=bf16, packing=True
        )
        assert all(x.dtype == torch.float32 for x in found[bf16].values())
        assert np.isfinite(log["loss"])
    assert_same(found[True], found[False], 0.1)
    with pytest.raises(AssertionError):
        assert_same(found[True], found[False], 1e-4)


@pytest.mark.parametrize("disable", [True, False])
@pytest.mark.parametrize("name", ["module", "number", "lora"])
def test_dropout(tmp_path, name, disable):
    from peft import LoraConfig, get_peft_model

    if name == "number":  # a float attribute of a layer
        torch.manual_seed(0)
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=64,
                hidden_size=16,
                ffn_dim=32,
                num_hidden_layers=2,
                dropout=0.5,
                num_attention_heads=2,
                word_embed_proj_dim=16,
                init_std=0.3,
            )
        )
    else:
        model = make_model()
    if name == "module":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
    if name == "lora":
        model = perturb(
            get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
        )
    make_trainer(tmp_path, model, make_pairs(1), make_model(), disable_dropout=disable)
    ids = torch.arange(3, 20)[None]
    a, b = (model.train()(input_ids=ids).logits for _ in range(2))
    assert torch.equal(a, b) == (
        disable and name != "lora"
    )  # an adapter's dropout is its own option


def test_reference_of_adapters_has_no_dropout(tmp_path):
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = make_trainer(tmp_path, with_lora(model), make_pairs(2), disable_dropout=False)
    batch = trainer._unpack(trainer._prepare_inputs(trainer.data_collator(trainer.train_dataset)))
    trainer.model.train()
    a, b = (trainer._reference(trainer.model, batch)["ref_logps"] for _ in range(2))
    assert (
        torch.equal(a, b)
        and trainer.model.training
        and trainer.model.base_model.model.model.layers[0].training
    )


def test_a_checkpoint_in_16_bits_trains_in_32(tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path / "model")
    pairs = with_reference(make_pairs(2), make_model())
    trainer = TRegTrainer(
        str(tmp_path / "model"), None, make_config(tmp_path), pairs, processing_class=tokenizer()
    )
    assert trainer.model.dtype == torch.float32


def test_data_come_before_a_reference_model(tmp_path, monkeypatch):
    ref_model = make_model()
    trainer = make_trainer(
        tmp_path,
        perturb(make_model()),
        with_reference(make_pairs(4), ref_model),
        ref_model,
        max_steps=1,
    )
    monkeypatch.setattr(ref_model, "forward", None)
    trainer.train()
    assert trainer.ref_model is None


def test_every_pair_has_the_same_columns(tmp_path):
    for missing in ("ref_chosen_logps", "rejected_token_rewards", "prompt_ids"):
        pairs = with_reference(make_pairs(3), make_model())
        del pairs[2][missing]
        with pytest.raises(
            ValueError, match=f"train_dataset: expected .*{missing}.* in every pair.* in pair 2"
        ):
            make_trainer(tmp_path, make_model(), pairs)


@pytest.mark.parametrize(
    "options", [{"label_smoothing_factor": 0.1}, {"train_sampling_strategy": "group_by_length"}]
)
def test_options_without_a_meaning(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_config(tmp_path, **options)


@pytest.mark.parametrize(
    "name", ["compute_metrics", "compute_loss_func", "model_init", "preprocess_logits_for_metrics"]
)
def test_arguments_without_a_meaning(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected None"):
        TRegTrainer(
            make_model(),
            None,
            make_config(tmp_path),
            make_pairs(2),
            processing_class=tokenizer(),
            **{name: print},
        )


def test_saved_model_is_plain(tmp_path):
    model = make_model("tied")
    trainer = make_trainer(
        tmp_path, perturb(model), with_reference(make_pairs(4), make_model("tied")), max_steps=1
    )
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and "forward" not in vars(loaded)
    assert not [k for k in vars(loaded) if "treg" in k]
    assert "treg" not in (tmp_path / "config.json").read_text()
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[k]) for k, x in loaded.state_dict().items())
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    again = TRegTrainer(
        str(tmp_path), None, make_config(tmp_path), with_reference(make_pairs(1), model)
    )
    assert again.processing_class.get_vocab() == tokenizer().get_vocab()
    assert torch.equal(again.model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_saved_adapter_loads(tmp_path):
    from peft import LoraConfig, PeftModel

    config = make_config(tmp_path, max_steps=2, learning_rate=1.0)
    trainer = TRegTrainer(
        make_model(),
        None,
        config,
        make_pairs(4),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists() and not (
        tmp_path / "model.safetensors"
    ).exists()
    loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    ids = torch.arange(3, 20)[None]
    found = loaded(input_ids=ids).logits
    assert torch.equal(found, trainer.model.eval()(input_ids=ids).logits)
    assert not torch.equal(found, make_model()(input_ids=ids).logits)


def test_model_card_names_the_papers(tmp_path):
    model = make_model()
    pairs = with_reference(make_pairs(2), model)
    trainer = make_trainer(
        tmp_path, model, pairs, eval_dataset=pairs, eval_strategy="epoch", loss_type="ipo"
    )
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(tags="mine")
        card = (tmp_path / "README.md").read_text()
        assert card.count("arxiv.org/abs/2412.02685") == 1
        assert card.count("IPO, arXiv 2310.12036, Eq. 17: loss_type=ipo, beta=0.3, alpha=0.25") == 1
        header = ModelCard.load(tmp_path / "README.md").data
        assert {"treg", "ipo", "mine"} == {*header.tags} - {"preference-optimization"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_trained_model_is_independent(copied, tmp_path):
    model, pairs = make_model(), with_reference(make_pairs(4), make_model())
    make_trainer(tmp_path / "first", model, pairs, max_steps=1).train()
    before = {k: x.clone() for k, x in model.state_dict().items()}
    other = copied(model)
    make_trainer(tmp_path / "second", other, pairs, max_steps=1).train()
    ids = torch.arange(3, 20)[None]
    logits = [x.eval()(input_ids=ids).logits for x in (model, other)]
    for x, expected in zip((model, other), logits, strict=True):
        found = x(input_ids=ids, head_fn=lambda hidden, operands: hidden @ operands["weight"].T)
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(*logits)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_liger_leaves_the_head(tmp_path):
    pytest.importorskip("liger_kernel")
    without_layers = {"rope": False, "rms_norm": False, "swiglu": False}
    pairs = with_reference(make_pairs(4), make_model())
    found = first_step(
        tmp_path,
        perturb(make_model()),
        pairs,
        use_liger_kernel=True,
        liger_kernel_config=without_layers,
    )[0]
    assert_same(found, first_step(tmp_path, perturb(make_model()), pairs)[0], 1e-6)
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    for given in (None, without_layers, {"rope": False, "fused_linear_cross_entropy": True}):
        config = make_config(tmp_path, use_liger_kernel=True, liger_kernel_config=given)
        assert config.liger_kernel_config == (given or {}) | off
    assert make_config(tmp_path).liger_kernel_config is None


# -- what is refused
# -

RAW = [
    {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"},
    {"prompt": "w6", "chosen": " w7", "rejected": " w8 w9"},
]


@pytest.mark.parametrize("eval_only", [False, True])
@pytest.mark.parametrize(
    "data, options, message",
    [
        (RAW, {}, r"token rewards, got raw ones.*treg annotate.*alpha=0"),
        (RAW, {"alpha": 0.0}, r"ref_chosen_logps, ref_rejected_logps.*ref_model"),
        (make_pairs(2), {}, r"ref_chosen_logps, ref_rejected_logps.*ref_model"),
        (
            [{k: x for k, x in p.items() if "rewards" not in k} for p in make_pairs(2)],
            {},
            r"chosen_token_rewards",
        ),
    ],
)
def test_data_that_lack_something(tmp_path, data, options, message, eval_only):
    name = "eval_dataset" if eval_only else "train_dataset"
    with pytest.raises(ValueError, match=f"(?s)^{name}: .*{message}"):
        make_trainer(
            tmp_path,
            make_model(),
            None if eval_only else data,
            eval_dataset=data if eval_only else None,
            **options,
        )


def test_raw_data_with_a_reference_model(tmp_path):
    trainer = make_trainer(
        tmp_path, perturb(make_model()), RAW, make_model(), RAW, alpha=0.0, max_steps=1
    )
    trainer.train()
    expected = [
        {"prompt_ids": [4, 5], "chosen_ids": [6, 7, 1], "rejected_ids": [8, 1]},
        {"prompt_ids": [9], "chosen_ids": [10, 1], "rejected_ids": [11, 12, 1]},
    ]
    assert [{k: x.tolist() for k, x in pair.items()} for pair in trainer.train_dataset] == expected
    assert {k: x.kept for k, x in trainer.data_reports.items()} == {
        "train_dataset": 2,
        "eval_dataset": 2,
    }


@pytest.mark.parametrize("foreign", ["model", "tokenizer", None])
def test_fingerprint(tmp_path, foreign):
    model = make_model()
    path = tmp_path / "data.parquet"
    made_with = {"model": model_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer())}
    other = perturb(make_model())
    if foreign:
        made_with[foreign] = model_fingerprint(other)
    rows = [
        row | {"index": i, "where": ""}
        for i, row in enumerate(with_reference(make_pairs(2), model))
    ]
    write_annotated(path, rows, {"fingerprint": made_with})
    if foreign is None:
        make_trainer(tmp_path, model, path)
        make_trainer(tmp_path, with_lora(make_model()), path)
        make_trainer(tmp_path, other, path, ref_model=make_model())
        return
    with pytest.raises(
        ValueError, match=f"annotated with this {foreign}.*{made_with[foreign]}.*ignore_fingerprint"
    ):
        make_trainer(tmp_path, model, path)
    make_trainer(tmp_path, model, path, ignore_fingerprint=True)
    if foreign == "model":
        make_trainer(tmp_path, model, path, ref_model=other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "dqo"}, "loss_type.*did you mean 'dpo'"),
        ({"beta": 0.0}, "beta"),
        ({"alpha": -1.0}, "alpha"),
        ({"gamma": 1.0}, "gamma"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"weighting": "none"}, "weighting"),
        ({"max_length": 1}, "max_length"),
        ({"token_budget": 100}, "token_budget.*packing"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_options_are_checked_before_any_model(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_token_budget_below_the_longest_pair(tmp_path):
    pairs = with_reference(make_pairs(4), make_model())
    longest = max(tokens([p]) for p in pairs)
    options = dict(packing=True, share_prompt=False)
    make_trainer(tmp_path, make_model(), pairs, **options, token_budget=longest)
    with pytest.raises(ValueError, match=rf"token_budget: .* {longest} tokens, got {longest - 1}"):
        make_trainer(tmp_path, make_model(), pairs, **options, token_budget=longest - 1)


def test_models_that_cannot_serve(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="ref_model: expected another model"):
        make_trainer(tmp_path, model, make_pairs(2), ref_model=model)


# -- two processes
# -


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    processes.run(trainer_worker.__file__, "ddp", folder, ranks=2)
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_are_one(tmp_path, two_processes, name):
    gradients = Gradients()
    trainer = shared_trainer(name, tmp_path, 4, [gradients])
    trainer.train()
    metrics = trainer.evaluate()
    # of marked tokens, where the reference's log-prob of each token is there
    assert ("eval_shift/good" in metrics) == (SHARED[name][1] != "sums")
    for rank in range(2):
        found, lines, evaluated = torch.load(two_processes / f"{name}-{rank}.pt")
        for a, b in zip(found, gradients.steps, strict=True):
            assert_same({k.removeprefix("module."): x for k, x in a.items()}, b, 1e-6)
        lines = [x for x in lines if "loss" in x]
        expected = [x for x in trainer.state.log_history if "loss" in x]
        assert len(lines) == 2
        for a, b in zip(lines, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        shared = [k for k in metrics if "runtime" not in k and "per_second" not in k]
        assert {k: evaluated[k] for k in shared} == pytest.approx(
            {k: metrics[k] for k in shared}, rel=1e-5
        )
    weights = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    assert (two_processes / name / "saved-0" / weights).exists()
    assert not (two_processes / name / "saved-1").exists()


@pytest.mark.parametrize("given", [{"tau": 0.2}, '{"tau": 0.2}'], ids=["dict", "JSON"])
def test_other_options_of_an_objective(given, tmp_path):
    """Of a configuration in Python, and of the command line."""
    config = TRegConfig(str(tmp_path), loss_type="discopop", loss_scalars=given)
    assert config.loss_options == LossOptions("discopop", scalars={"tau": 0.2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1", "loss_scalars: expected a JSON object"),
        ("[1]", "loss_scalars: expected values by name"),
        ('{"tau": "a"}', "tau: expected a finite number"),
        ({"margin": 1.0}, "scalars: expected options of loss_type='discopop', which takes tau"),
    ],
)
def test_bad_options_of_an_objective(given, message, tmp_path):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        TRegConfig(str(tmp_path), loss_type="discopop", loss_scalars=given)
