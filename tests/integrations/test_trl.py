"""TRL's DPOTrainer with treg: TRL's own numbers without the regularizer, dense ones with it."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl")

import trl.trainer.utils
from datasets import Dataset
from helpers import assert_within_budget, error
from huggingface_hub import ModelCard
from judges import judge, judge_tokenizer
from tiny import tiny_llama, tiny_tokenizer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

import treg.integrations.trl.trainer
from treg.data import EncodeOptions
from treg.data.annotated import read_annotated
from treg.integrations.trl import TRegDPOConfig, TRegDPOTrainer, patch_chunked_logprobs
from treg.integrations.trl.data import RewardCollator
from treg.rewards import SOURCES
from treg.rewards.annotate import AnnotateOptions, annotate

SIDES = ("chosen", "rejected")
VOCAB, BETA, ALPHA = 400, 0.3, 0.5


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def make_model(**config):
    return tiny_llama(VOCAB, **config)


def make_pairs(count=4, seed=0, vocab=VOCAB):
    """Annotated pairs, without reference log-probs."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        pair = {"prompt_ids": random.integers(3, vocab, random.integers(2, 6)).tolist()}
        for side in SIDES:
            n = random.integers(1, 8)
            pair[f"{side}_ids"] = random.integers(3, vocab, n).tolist()
            pair[f"{side}_token_rewards"] = (random.random(n) - 0.5).tolist()
        pairs.append(pair)
    return pairs


def dataset(pairs):
    return Dataset.from_list(pairs)


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def make_trainer(
    tmp_path, model, pairs, ref_model=None, kind=TRegDPOTrainer, callbacks=(), **options
):
    config = TRegDPOConfig if issubclass(kind, TRegDPOTrainer) else DPOConfig
    options = (
        dict(
            output_dir=str(tmp_path),
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
            learning_rate=1e-3,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_grad_norm=0.0,
        )
        | options
    )
    peft_config = options.pop("peft_config", None)
    eval_pairs = options.pop("eval_pairs", None)
    return kind(
        model,
        ref_model,
        config(**options),
        train_dataset=dataset(pairs),
        processing_class=tiny_tokenizer(),
        eval_dataset=None if eval_pairs is None else dataset(eval_pairs),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


class Own(TRegDPOTrainer):
    """TRL's own computation, on the same pre-tokenized pairs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("token_rewards", None)
        return DPOTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def compute_ref_log_probs(self, model, inputs):
        return DPOTrainer.compute_ref_log_probs(self, model, inputs)


def train(trainer):
    """Gradients of every step, and the log."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps, trainer.state.log_history


def perturbed(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def assert_same(found, expected, rel):
    assert found.keys() == expected.keys()
    total = torch.cat([x.double().flatten() for x in expected.values()]).norm()
    assert total > 0
    for name, x in expected.items():
        off = (found[name].double() - x.double()).norm()
        assert off <= rel * max(x.double().norm(), 1e-2 * total), (
            f"{name}: {off / x.double().norm():.1e}"
        )


TRL_OPTIONS = {
    **{
        name: {"loss_type": [name]}
        for name in (
            "sigmoid",
            "hinge",
            "ipo",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "sft",
            "sigmoid_norm",
        )
    },
    # its slopes make of float32's roundings 8e-6 of the gradient where both run the same rows
    "discopop": {"loss_type": ["discopop"], "treg_share_prompt": False},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "several": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "weighted": {"use_weighting": True},
    "length": {"ld_alpha": 0.5},
    "divergence": {"f_divergence_type": "js_divergence"},
    "precomputed": {"precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True},
    "cut": {"max_length": 8},
    "cut, the end kept": {"max_length": 8, "truncation_mode": "keep_end"},
}


@pytest.mark.parametrize("name", TRL_OPTIONS)
def test_without_the_regularizer_it_is_trl(tmp_path, name):
    """Loss, every metric and every gradient of one step."""
    reference = make_model()
    found = {}
    for kind in (TRegDPOTrainer, Own):
        model = perturbed(make_model())
        trainer = make_trainer(
            tmp_path,
            model,
            make_pairs(),
            copy.deepcopy(reference),
            kind,
            treg_alpha=0.0,
            **TRL_OPTIONS[name],
        )
        found[kind] = train(trainer)
    (ours, log), (theirs, expected) = found[TRegDPOTrainer], found[Own]
    assert_same(ours[0], theirs[0], 1e-5)
    timing = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
    assert log[0].keys() == expected[0].keys()
    for key in log[0].keys() - timing:
        assert log[0][key] == pytest.approx(expected[0][key], rel=1e-5, abs=1e-6), key


# -- with the regularizer
# -


def log_probs(model, pair, side):
    """By the model's own logits of this one sequence; virtual tokens may precede."""
    completion = torch.tensor(pair[f"{side}_ids"])
    ids = torch.cat([torch.tensor(pair["prompt_ids"]), completion])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, -len(completion) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]


def dense_loss(model, reference, pairs, base, alpha=ALPHA):
    """base: a loss of chosen and rejected log-probs [tokens] and reference sums; then the paper's
    regularizer.
    """
    losses = []
    for pair in pairs:
        logps = [log_probs(model, pair, side) for side in SIDES]
        with torch.no_grad():
            ref = [reference(pair, side).sum() for side in SIDES]
        loss = base(*logps, *ref)
        slopes = torch.autograd.grad(loss, logps, retain_graph=True)
        for side, lp, slope in zip(SIDES, logps, slopes, strict=True):
            rewards = torch.tensor(pair[f"{side}_token_rewards"], dtype=torch.float64)
            loss = loss - alpha * (slope.abs() * rewards * lp).sum()
        losses.append(loss)
    return torch.stack(losses).mean()


def sigmoid(w, l, ref_w, ref_l):
    return -F.logsigmoid(BETA * (w.sum() - ref_w - l.sum() + ref_l))


def ipo(w, l, ref_w, ref_l):
    return ((w.sum() - ref_w) / len(w) - (l.sum() - ref_l) / len(l) - 1 / (2 * BETA)) ** 2


def sppo(w, l, ref_w, ref_l):
    return (w.sum() - ref_w - 0.5 / BETA) ** 2 + (l.sum() - ref_l + 0.5 / BETA) ** 2


def papers(w, l, ref_w, ref_l, rewards_w, rewards_l, alpha):
    """T-REG as printed: Eq. 1, 2."""
    rho_w, rho_l = BETA * (w.sum() - ref_w), BETA * (l.sum() - ref_l)
    reg = -BETA * ((rewards_w * w).sum() + (rewards_l * l).sum())
    return -F.logsigmoid(rho_w - rho_l) + alpha * torch.sigmoid(rho_l - rho_w).detach() * reg


def of(model):
    return lambda pair, side: log_probs(model, pair, side)


def gradients(model, loss):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize(
    "options, base",
    [
        ({}, sigmoid),
        ({"loss_type": ["ipo"]}, ipo),
        ({"loss_type": ["sppo_hard"]}, sppo),
        ({"precompute_ref_log_probs": True}, sigmoid),
        ({"gradient_checkpointing": True}, sigmoid),
    ],
)
def test_the_regularizer_is_the_dense_one(tmp_path, options, base):
    reference, model, pairs = make_model(), perturbed(make_model()), make_pairs()
    exact = copy.deepcopy(model).double()
    expected = dense_loss(exact, of(copy.deepcopy(reference).double()), pairs, base)
    trainer = make_trainer(
        tmp_path, model, pairs, reference, treg_alpha=ALPHA, eval_pairs=pairs, **options
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    steps, log = train(trainer)
    assert_same(steps[0], gradients(exact, expected), 1e-5)
    [line] = [x for x in log if "loss" in x]
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)
    mean = {
        side: np.mean(np.concatenate([x[f"{side}_token_rewards"] for x in pairs])) for side in SIDES
    }
    reg = sum(
        -BETA * (torch.tensor(x[f"{side}_token_rewards"]) * log_probs(exact, x, side)).sum().item()
        for x in pairs
        for side in SIDES
    )
    assert line["treg/reward_chosen"] == pytest.approx(mean["chosen"], rel=1e-5)
    assert line["treg/reward_rejected"] == pytest.approx(mean["rejected"], rel=1e-5)
    assert line["treg/reg_loss"] == pytest.approx(reg / len(pairs), rel=1e-4)


def test_the_oracle_is_the_paper():
    model, reference, pairs = perturbed(make_model()).double(), make_model().double(), make_pairs()
    printed = []
    for pair in pairs:
        logps, ref = ([log_probs(x, pair, side) for side in SIDES] for x in (model, reference))
        rewards = [
            torch.tensor(pair[f"{side}_token_rewards"], dtype=torch.float64) for side in SIDES
        ]
        printed.append(papers(*logps, *(x.sum().detach() for x in ref), *rewards, ALPHA))
    loss, expected = dense_loss(model, of(reference), pairs, sigmoid), torch.stack(printed).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same(gradients(model, loss), gradients(model, expected), 1e-10)


def peft_configs():
    peft = pytest.importorskip("peft")
    lora = {"r": 2, "task_type": "CAUSAL_LM"}
    return {
        "layers": peft.LoraConfig(**lora, target_modules=["q_proj", "v_proj"]),
        "head": peft.LoraConfig(**lora, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "tokens": peft.LoraConfig(
            **lora, target_modules=["q_proj"], trainable_token_indices=[3, 5]
        ),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }


@pytest.mark.parametrize("kind", ["layers", "head", "tokens", "prompt"])
def test_adapters(tmp_path, kind):
    """The reference is the model without; what TRL rejects or fails on as well."""
    pairs = make_pairs()
    trainer = make_trainer(
        tmp_path, make_model(), pairs, treg_alpha=ALPHA, peft_config=peft_configs()[kind]
    )
    perturbed(trainer.model)
    exact = pytest.importorskip("peft").get_peft_model(make_model(), peft_configs()[kind])
    exact.load_state_dict(trainer.model.state_dict())
    exact = exact.double().eval()

    def reference(pair, side):
        with exact.disable_adapter():
            return log_probs(exact, pair, side)

    expected = dense_loss(exact, reference, pairs, sigmoid)
    steps, log = train(trainer)
    assert_same(steps[0], gradients(exact, expected), 1e-5)
    assert log[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_an_adapter_on_the_head_is_refused_by_trl(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tmp_path, make_model(), make_pairs(), peft_config=config)


def test_two_by_two_is_four_by_one(tmp_path):
    found = []
    for options in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        trainer = make_trainer(
            tmp_path, perturbed(make_model()), make_pairs(), make_model(), **options
        )
        found.append(train(trainer)[0][0])
    assert_same(found[1], found[0], 1e-5)


def test_a_mixture_of_experts_keeps_its_balance(tmp_path):
    """TRL's auxiliary loss of the routers, by its own head and by treg's."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def model():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=4,
                initializer_range=0.3,
                output_router_logits=True,
            )
        )

    found = []
    for kind in (TRegDPOTrainer, Own):
        trainer = make_trainer(
            tmp_path,
            perturbed(model()),
            make_pairs(),
            model(),
            kind,
            treg_alpha=0.0,
            router_aux_loss_coef=0.5,
        )
        found.append(train(trainer))
    assert found[0][1][0]["aux_loss"] == pytest.approx(found[1][1][0]["aux_loss"], rel=1e-5) != 0
    assert found[0][1][0]["loss"] == pytest.approx(found[1][1][0]["loss"], rel=1e-5)
    assert_same(found[0][0][0], found[1][0][0], 1e-5)


# TRL 1.16 gives wrong log-probs for the first three and fails on the others
MISREAD = ("recurrent_gemma", "xlstm", "inkling_text", "llama4_text", "mpt")


@pytest.mark.parametrize("model_type", MISREAD)
def test_heads_that_trl_misreads(tmp_path, model_type):
    """One step's loss against the model's own logits, padded rows included; what TRL's own head
    gives is printed.
    """
    from causal_lms import CAUSAL_LMS, build

    if model_type not in CAUSAL_LMS:
        pytest.skip("not in this transformers")
    options = {
        "treg_alpha": 0.0,
        "router_aux_loss_coef": 0.0 if model_type == "llama4_text" else None,
    }

    def model(seed):
        torch.manual_seed(seed)
        made = build(model_type)
        if model_type == "mpt":
            made.config.logit_scale = "inv_sqrt_d_model"
        return made

    pairs = make_pairs(vocab=82)
    expected = dense_loss(model(0), of(model(1)), pairs, sigmoid, alpha=0.0).item()
    found = make_trainer(
        tmp_path, model(0), pairs, model(1), eval_pairs=pairs, **options
    ).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)
    try:
        theirs = make_trainer(
            tmp_path, model(0), pairs, model(1), Own, eval_pairs=pairs, **options
        ).evaluate()
        print(
            f"{model_type}: exact {expected:.6f}, treg {found['eval_loss']:.6f}, "
            f"TRL {theirs['eval_loss']:.6f}"
        )
    except Exception as error:
        print(
            f"{model_type}: exact {expected:.6f}, treg {found['eval_loss']:.6f}, "
            f"TRL: {type(error).__name__}"
        )


def test_routers_that_cannot_be_balanced_are_named(tmp_path):
    """A backbone that is asked for router logits and gives none."""
    trainer = make_trainer(
        tmp_path, make_model(), make_pairs(), make_model(), eval_pairs=make_pairs()
    )
    trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 0.1
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: expected 0 for LlamaForCausalLM"):
        trainer.evaluate()


# -- data

TEXTS = [
    {
        "prompt": "who asked the owl?",
        "chosen": "the old fox asked the owl.",
        "rejected": "the moon is happy.",
    },
    {
        "prompt": "is 3 + 4 = 7?",
        "chosen": "yes, 3 + 4 = 7.",
        "rejected": "the answer is 42, says the wood.",
    },
    {"prompt": "hello", "chosen": "hello, little fox", "rejected": "no"},
]


def messages(row):
    return {
        k: [{"role": "user" if k == "prompt" else "assistant", "content": x}]
        for k, x in row.items()
    }


def annotated(tmp_path, model, **options):
    """A file by treg annotate of the rows as messages."""
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(messages(row)) + "\n" for row in TEXTS))
    file = tmp_path / "annotated.parquet"
    annotate(
        model,
        tiny_tokenizer(),
        source,
        file,
        AnnotateOptions(EncodeOptions(256), **options),
        progress=False,
    )
    return file


def trainer_of(tmp_path, model, data, ref_model=None, **options):
    options = (
        dict(
            output_dir=str(tmp_path / "out"),
            beta=BETA,
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_steps=1,
            gradient_checkpointing=False,
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
            seed=0,
            per_device_train_batch_size=3,
            dataloader_pin_memory=False,
            max_grad_norm=0.0,
        )
        | options
    )
    return TRegDPOTrainer(
        model,
        ref_model,
        TRegDPOConfig(**options),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )


def test_an_annotated_file_is_what_the_trainer_makes_itself(tmp_path):
    """Same ids, rewards and references, so the same gradients; no reference model is loaded for the
    file.
    """
    file = annotated(tmp_path, make_model())
    trainer = trainer_of(tmp_path, make_model(), str(file))
    assert trainer.ref_model is None
    perturbed(trainer.model)
    expected, log = train(trainer)
    for convert in (messages, dict):
        rows = Dataset.from_list([convert(row) for row in TEXTS])
        itself = trainer_of(tmp_path, perturbed(make_model()), rows, make_model())
        found = sorted(itself.train_dataset.to_list(), key=lambda x: x["chosen_ids"])
        if convert is dict:
            assert all(np.any(x["chosen_token_rewards"]) for x in found)
            continue
        wanted = sorted(read_annotated(file)[0], key=lambda x: x["chosen_ids"].tolist())
        for a, b in zip(found, wanted, strict=True):
            for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
                assert list(a[name]) == b[name].tolist()
            for side in SIDES:
                np.testing.assert_allclose(
                    a[f"{side}_token_rewards"], b[f"{side}_token_rewards"], atol=1e-5
                )
        steps, lines = train(itself)
        assert_same(steps[0], expected[0], 1e-4)
        assert lines[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-5)


def test_an_annotated_file_that_went_through_datasets(tmp_path):
    """Shuffled and back: the same gradients, and the model that made it is known all the same."""
    file = annotated(tmp_path, make_model())
    expected, _ = train(trainer_of(tmp_path, perturbed(make_model()), str(file), make_model()))
    count = len(read_annotated(file)[0])
    turned = (
        Dataset.from_parquet(str(file))
        .select(range(count - 1, -1, -1))
        .select(range(count - 1, -1, -1))
    )
    trainer = trainer_of(tmp_path, perturbed(make_model()), turned, make_model())
    assert trainer.ref_model is None
    steps, _ = train(trainer)
    assert_same(steps[0], expected[0], 1e-6)
    with pytest.raises(ValueError, match="expected data annotated with this model"):
        trainer_of(tmp_path, make_model(initializer_range=0.2), turned)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_turns_of_others_are_not_scored(tmp_path, alpha):
    """Of an annotated completion of several turns: the file's reference is the policy's own sum, so
    that the first margins are 0, and the user's tokens are not among those that are counted.
    """
    asked = [{"role": "user", "content": "what is better?"}]
    more = [{"role": "user", "content": "are you sure?"}, {"role": "assistant", "content": "yes"}]
    rows = [
        {
            "prompt": asked,
            "chosen": [{"role": "assistant", "content": x}, *more],
            "rejected": [{"role": "assistant", "content": y}],
        }
        for x, y in (("the sun", "the moon"), ("the old fox", "an owl"), ("it is 42", "no"))
    ]
    file = tmp_path / "annotated.parquet"
    annotate(make_model(), tiny_tokenizer(), rows, file, progress=False)
    examples, _ = read_annotated(file)
    assert not all(x["chosen_scored"].all() for x in examples)
    trainer = trainer_of(tmp_path, make_model(), str(file), treg_alpha=alpha)
    batch = trainer.data_collator([dict(x) for x in trainer.train_dataset.to_list()])
    counted = [int(x["chosen_scored"].sum()) for x in examples]
    counted += [int(x["rejected_scored"].sum()) for x in examples]
    assert batch["completion_mask"].sum(-1).tolist() == counted
    _, log = train(trainer)
    assert abs(log[0]["rewards/margins"]) < 1e-5


@pytest.mark.parametrize("source", ["contrastive", "redistribution"])
def test_a_source_reads_plain_rows_as_treg_annotate_does(tmp_path, source):
    """TRL ends their texts with the end-of-sequence token, which is no part of an answer."""
    options = {"model": judge("llama", judge_tokenizer)} if source == "redistribution" else {}
    file = tmp_path / "plain.parquet"
    chosen = AnnotateOptions(
        EncodeOptions(256, chat=False), rewards=source, rewards_options=options
    )
    annotate(make_model(), tiny_tokenizer(), TEXTS, file, chosen, progress=False)
    trainer = trainer_of(
        tmp_path,
        make_model(),
        Dataset.from_list(TEXTS),
        make_model(),
        treg_rewards=source,
        treg_rewards_options=options,
    )
    for found, wanted in zip(trainer.train_dataset, read_annotated(file)[0], strict=True):
        for side in SIDES:
            assert found[f"{side}_ids"] == wanted[f"{side}_ids"].tolist()
            name, scored = f"{side}_token_rewards", wanted[f"{side}_scored"]
            # merges across the boundary leave a token of the prompt in a completion of TRL's
            assert scored[1:].all()
            np.testing.assert_allclose(
                np.asarray(found[name])[scored], wanted[name][scored], atol=1e-5
            )


def test_adapters_are_off_while_rewards_are_made(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    rows, found = Dataset.from_list([messages(row) for row in TEXTS]), []
    for model, reference in (
        (peft.get_peft_model(make_model(), config), None),
        (make_model(), make_model()),
    ):
        trainer = TRegDPOTrainer(
            make_model() if reference is None else model,
            reference,
            TRegDPOConfig(
                str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[]
            ),
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            peft_config=config if reference is None else None,
        )
        found.append(trainer.train_dataset["chosen_token_rewards"])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_source_knows_every_pair(tmp_path, monkeypatch):
    """The longest first, as in treg annotate: a shared beginning is judged on it."""
    module, found = treg.integrations.trl.trainer, []
    load = module.load_source
    monkeypatch.setattr(module, "load_source", lambda *args: found.append(args[2]) or load(*args))
    rows = [messages(row) for row in sorted(TEXTS, key=lambda row: len(str(row)))]
    trainer_of(tmp_path, make_model(), Dataset.from_list(rows), make_model())
    lengths = [
        sum(len(x.prompt_ids) + len(x.ids) for x in responses) for responses in found[0].pairs
    ]
    assert len(lengths) == len(rows) and lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_token_weights_are_refused(tmp_path, monkeypatch):
    """TRL's margins take none: a file or a source of them would be trained without."""

    class Weights(SOURCES["contrastive"]):
        streams = ("token_rewards", "token_weights")

    monkeypatch.setitem(SOURCES, "weights", Weights)
    options = {"treg_rewards": "weights", "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match=r"treg_rewards: .* no token_weights, got 'weights'"):
        TRegDPOConfig(str(tmp_path), **options)
    TRegDPOConfig(str(tmp_path), treg_alpha=0.0, **options)  # it is not asked
    weighted = make_pairs()
    for pair in weighted:
        for side in SIDES:
            pair[f"{side}_token_weights"] = [1.0] * len(pair[f"{side}_ids"])
    for alpha in (0.0, 0.25):
        with pytest.raises(ValueError, match="expected train without chosen_token_weights"):
            make_trainer(tmp_path, make_model(), weighted, make_model(), treg_alpha=alpha)
    trainer = make_trainer(tmp_path, make_model(), make_pairs(), make_model())
    with pytest.raises(ValueError, match=r"expected .* without chosen_token_weights"):
        trainer.evaluate(dataset(weighted))


def test_pairs_that_cannot_be_judged_are_left_out(tmp_path, caplog):
    rows = [*map(messages, TEXTS), messages({"prompt": "a", "chosen": "b", "rejected": "b"})]
    trainer = trainer_of(tmp_path, make_model(), Dataset.from_list(rows), make_model())
    assert len(trainer.train_dataset) == 3
    assert (
        "1 of 4 pairs get no token rewards and are left out: identical completions" in caplog.text
    )


def test_data_of_another_model(tmp_path):
    file = annotated(tmp_path, make_model())
    with pytest.raises(ValueError, match=r"annotated with this model .*treg_ignore_fingerprint"):
        trainer_of(tmp_path, perturbed(make_model()), file)
    trainer_of(tmp_path, perturbed(make_model()), file, make_model())
    trainer_of(tmp_path, perturbed(make_model()), file, treg_ignore_fingerprint=True)


def test_bad_input(tmp_path):
    file = annotated(tmp_path, make_model())
    with pytest.raises(
        ValueError, match=r"max_length: expected at least \d+, the length of a sequence of train"
    ):
        trainer_of(tmp_path, make_model(), file, max_length=12)
    with pytest.raises(ValueError, match=r"train_dataset: expected a dataset, or a parquet file"):
        trainer_of(tmp_path, make_model(), str(tmp_path / "pairs.jsonl"))
    with pytest.raises(TypeError, match=r"args: expected a TRegDPOConfig, got DPOConfig"):
        TRegDPOTrainer(
            make_model(),
            args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=file,
        )
    with pytest.raises(ValueError, match="treg_alpha: expected a number >= 0"):
        TRegDPOConfig(str(tmp_path), treg_alpha=-1.0)
    bare = [{k: x for k, x in pair.items() if "rewards" not in k} for pair in make_pairs()]
    with pytest.raises(ValueError, match=r"train_dataset: expected the columns .*treg annotate"):
        make_trainer(tmp_path, make_model(), bare, make_model())
    trainer = make_trainer(tmp_path, make_model(), make_pairs(), make_model())
    with pytest.raises(ValueError, match=r"eval_dataset: expected the columns .*treg annotate"):
        trainer.evaluate(dataset(bare))
    wrong = make_pairs()
    wrong[0]["chosen_token_rewards"].append(0.0)
    with pytest.raises(ValueError, match="chosen_token_rewards: expected one a token"):
        make_trainer(tmp_path, make_model(), wrong, make_model()).train()
    with pytest.raises(ValueError, match="pads on the right"):
        RewardCollator(lambda x: {"input_ids": torch.zeros(2, 20)}, None, "keep_start")(
            make_pairs(1)
        )


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("bad", [VOCAB, -1])
def test_ids_without_an_embedding_are_named(tmp_path, side, bad):
    """Not an IndexError, or a device's assert."""
    pairs = make_pairs(3)
    model, reference = make_model(), make_model()
    trainer = make_trainer(tmp_path, model, pairs, reference)
    pairs[2][f"{side}_ids"][-1] = bad
    message = rf"expected token ids from 0 to {VOCAB - 1}.* {bad} in {side}_ids of pair 2"
    with pytest.raises(ValueError, match=f"train_dataset: {message}"):
        make_trainer(tmp_path, model, pairs, reference)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, pairs, reference, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match=f"eval_dataset: {message}"):
        make_trainer(tmp_path, model, make_pairs(3), reference, eval_pairs=pairs)
    with pytest.raises(ValueError, match=f"eval_dataset: {message}"):
        trainer.evaluate(dataset(pairs))


def test_references_of_cut_sequences_are_refused_later_too(tmp_path):
    """In a stream, and in what evaluate() is given; with ld_alpha they are not used there
    either.
    """
    model = make_model()
    rows = Dataset.from_list(
        [x | {f"ref_{side}_logps": -1.0 for side in SIDES} for x in make_pairs()]
    )
    with pytest.raises(ValueError, match="max_length: expected at least"):
        trainer_of(tmp_path, model, rows.to_iterable_dataset(), max_length=6).train()
    trainer = trainer_of(tmp_path, make_model(), dataset(make_pairs()), make_model(), max_length=6)
    with pytest.raises(ValueError, match="max_length: expected at least"):
        trainer.evaluate(rows)
    found = []
    for data in (rows.to_iterable_dataset(), dataset(make_pairs())):
        trainer = trainer_of(
            tmp_path, make_model(), data, make_model(), ld_alpha=0.3, per_device_train_batch_size=4
        )
        found.append(train(trainer)[1][0]["loss"])
    trainer = trainer_of(tmp_path, make_model(), dataset(make_pairs()), make_model(), ld_alpha=0.3)
    found.append(trainer.evaluate(rows)["eval_loss"])
    trainer = trainer_of(tmp_path, make_model(), dataset(make_pairs()), make_model(), ld_alpha=0.3)
    found.append(trainer.evaluate(dataset(make_pairs()))["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[2] == pytest.approx(
        found[3], rel=1e-5
    )


def test_a_stream_of_annotated_pairs(tmp_path):
    """Its reference log-probs are used as those of a dataset are."""
    rows = Dataset.from_list(
        [x | {f"ref_{side}_logps": -20.0 for side in SIDES} for x in make_pairs()]
    )
    found = []
    for data in (rows, rows.to_iterable_dataset()):
        trainer = trainer_of(tmp_path, perturbed(make_model()), data, per_device_train_batch_size=4)
        assert trainer.ref_model is None
        found.append(train(trainer))
    assert_same(found[1][0][0], found[0][0][0], 1e-5)
    assert found[1][1][0]["loss"] == pytest.approx(found[0][1][0]["loss"], rel=1e-5)


def test_annotated_data_are_evaluated_after_training(tmp_path):
    file = annotated(tmp_path, make_model())
    data = Dataset.from_list(read_annotated(file)[0])
    config = TRegDPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, beta=BETA
    )
    trainer = TRegDPOTrainer(
        make_model(), None, config, train_dataset=data, processing_class=tiny_tokenizer()
    )
    assert not config.precompute_ref_log_probs  # the caller's own
    trainer.train()
    found = trainer.evaluate(data)["eval_loss"]
    examples = [
        {k: np.asarray(x).tolist() for k, x in pair.items()} for pair in read_annotated(file)[0]
    ]
    sums = {id(x): x for x in examples}

    def reference(pair, side):
        return torch.tensor([sums[id(pair)][f"ref_{side}_logps"]], dtype=torch.float64)

    expected = dense_loss(copy_of(trainer.model), reference, examples, sigmoid, alpha=0.25)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    with torch.inference_mode():
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(found, rel=1e-6)


def copy_of(model):
    """In float64, without what trainers put on a model."""
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    return fresh.double()


def test_trls_own_defaults(tmp_path):
    """bfloat16 by autocast over a float32 model, and a reference that TRL has wrapped before treg
    sees it.
    """
    path = tmp_path / "model"
    make_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    config = TRegDPOConfig(
        str(tmp_path), use_cpu=True, max_steps=1, logging_steps=1, report_to=[], save_strategy="no"
    )
    assert config.bf16 and config.gradient_checkpointing
    trainer = TRegDPOTrainer(str(path), args=config, train_dataset=dataset(make_pairs()))
    trainer.train()
    expected = dense_loss(
        make_model(), of(make_model()), make_pairs(), sigmoid_of(config.beta), alpha=0.25
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=0.05)


def sigmoid_of(beta):
    return lambda w, l, ref_w, ref_l: -F.logsigmoid(beta * (w.sum() - ref_w - l.sum() + ref_l))


def test_torch_compile(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    found = [
        train(make_trainer(tmp_path, perturbed(make_model()), make_pairs(), make_model(), **more))[
            1
        ][0]["loss"]
        for more in ({}, options)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_model_without_anything_to_train_is_no_success(tmp_path):
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"base: expected a loss that is differentiable in logps"):
        make_trainer(tmp_path, model, make_pairs(), make_model()).train()


def test_evaluation_builds_no_graph_of_the_model(tmp_path, monkeypatch):
    seen = []
    original = treg.integrations.trl.trainer.token_logprobs

    def spy(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(treg.integrations.trl.trainer, "token_logprobs", spy)
    trainer = make_trainer(
        tmp_path, make_model(), make_pairs(), make_model(), eval_pairs=make_pairs()
    )
    trainer.evaluate()
    assert seen and all(x.logprobs.grad_fn is None for x in seen)


def test_length_weights_use_references_of_their_own(tmp_path):
    """ld_alpha weighs tokens within the sums: the annotated sums are left aside, the reference
    runs.
    """
    file = annotated(tmp_path, make_model())
    trainer = trainer_of(tmp_path, make_model(), file, make_model(), ld_alpha=0.5)
    assert (
        trainer.ref_model is not None
        and "ref_chosen_logps" not in trainer.train_dataset.column_names
    )


# -- the swapped function
# -


@pytest.fixture
def patched():
    undo = patch_chunked_logprobs()
    yield
    undo()


def trl_losses(tmp_path, steps=20, **options):
    rows = Dataset.from_list([messages(row) for row in TEXTS] * 4)
    options = (
        dict(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_steps=steps,
            logging_steps=1,
            learning_rate=1e-3,
            per_device_train_batch_size=3,
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        )
        | options
    )
    trainer = DPOTrainer(
        make_model(),
        make_model(),
        DPOConfig(**options),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_dpo_losses_over_20_steps(tmp_path):
    expected = trl_losses(tmp_path)
    undo = patch_chunked_logprobs()
    try:
        assert patch_chunked_logprobs() == undo
        found = trl_losses(tmp_path)
    finally:
        undo()
    assert len(found) == 20 and max(expected) - min(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert trl.trainer.utils._ChunkedLogProbFunction is trl.kernels.ChunkedLogProbFunction


ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize(
    "bias, scale, cap, temperature",
    [
        (False, 1.0, None, 1.0),
        (True, 0.7, None, 1.0),
        (False, 1.0, 5.0, 0.8),
        (True, -0.5, 3.0, 2.0),
    ],
)
def test_the_function_is_trls(patched, bias, scale, cap, temperature):
    """Every output and gradient of TRL's own autograd function."""
    generator = torch.Generator().manual_seed(0)

    def operands():
        generator.manual_seed(0)
        shapes = [(9, 16), (50, 16), *([(50,)] if bias else [])]
        made = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        return made if bias else [*made, None]

    target = torch.randint(50, (9,), generator=generator)
    coef = torch.randn(9, generator=generator)
    results = []
    for function in (trl.trainer.utils._ChunkedLogProbFunction, trl.kernels.ChunkedLogProbFunction):
        given = operands()
        found = function.apply(*given, target, temperature, 32, cap, scale, ALL)
        (found[0] * coef).sum().backward()
        results.append([x.detach() for x in found] + [x.grad for x in given if x is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bias, scale, cap, temperature",
    [
        (False, 1.0, None, 1.0),
        (True, 0.7, None, 1.0),
        (False, 1.0, 5.0, 0.8),
        (True, -0.5, 3.0, 2.0),
    ],
)
@pytest.mark.parametrize("upstream", ["both", "entropy alone", "some rows"])
def test_an_entropy_bonus_is_trls(patched, bias, scale, cap, temperature, upstream):
    """Gradients of a policy loss minus a bonus, as GRPO has it, by TRL's own autograd function."""
    made = [torch.randn(9, 16), torch.randn(50, 16), torch.randn(50) if bias else None]
    target = torch.randint(50, (9,))
    advantage, mask = torch.randn(9), torch.ones(9)
    if upstream == "some rows":
        mask[[0, 3, 8]] = 0.0
    results = []
    for function in (trl.trainer.utils._ChunkedLogProbFunction, trl.kernels.ChunkedLogProbFunction):
        given = [None if x is None else x.clone().requires_grad_() for x in made]
        logps, entropy, *_ = function.apply(*given, target, temperature, 32, cap, scale, ALL)
        policy = 0.0 if upstream == "entropy alone" else -(advantage * logps * mask).sum()
        (policy - 0.3 * (entropy * mask).sum() / mask.sum()).backward()
        results.append([entropy.detach(), *(x.grad for x in given if x is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_what_ignored_rows_hold_has_no_part(patched, value):
    made, target = (torch.randn(9, 16), torch.randn(50, 16)), torch.randint(50, (9,))
    target[[0, 4, 8]] = -100
    found = []
    for filling in (0.0, value):
        hidden, weight = (x.clone().requires_grad_() for x in made)
        hidden.data[target == -100] = filling
        logps, entropy, *_ = trl.trainer.utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 0.8, 32, outputs=("entropy",)
        )
        gradients = torch.autograd.grad((logps - 0.3 * entropy).sum(), (hidden, weight))
        found.append((logps, entropy, *gradients))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.any()


def dense_logps_and_entropy(hidden, weight, target, temperature):
    """As TRL's own dense path has them."""
    logits = hidden @ weight.T / temperature
    return (
        trl.trainer.utils.selective_log_softmax(logits, target),
        trl.trainer.utils.entropy_from_logits(logits),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entropy_bonus_against_dense_logits(patched, dtype):
    """In float64, and no further from it than twice TRL's dense path."""
    hidden, weight = torch.randn(30, 16).to(dtype), torch.randn(50, 16).to(dtype)
    target, advantage = torch.randint(50, (30,)), torch.randn(30)

    def swapped(h, w, y, temperature):
        return trl.trainer.utils._ChunkedLogProbFunction.apply(
            h, w, None, y, temperature, 32, outputs=("entropy",)
        )[:2]

    def gradients(function, kind):
        given = [x.to(kind).requires_grad_() for x in (hidden, weight)]
        logps, entropy = function(*given, target, 0.8)
        loss = -(advantage * logps).mean() - 0.5 * entropy.mean()
        return torch.autograd.grad(loss, given)

    exact = gradients(dense_logps_and_entropy, torch.float64)
    plain = gradients(dense_logps_and_entropy, dtype)
    found = gradients(swapped, dtype)
    for name, a, b, c in zip(("dhidden", "dweight"), found, exact, plain, strict=True):
        assert_within_budget(name, a, b, error(c, b), dtype)


def grpo_losses(tmp_path, **options):
    """The losses of three steps of GRPO, and the trained head."""
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = GRPOTrainer(
        make_model(),
        lambda completions, **_: [float(len(x)) + 0.1 * i for i, x in enumerate(completions)],
        args,
        Dataset.from_list([{"prompt": "The owl said"}, {"prompt": "The moon"}] * 8),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    history = trainer.state.log_history
    losses = [line["loss"] for line in history if "loss" in line]
    return losses, trainer.model.get_output_embeddings().weight.detach().clone()


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_coef": 0.5},
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 100.0},
    ],
    ids=["static", "adaptive"],
)
def test_grpo_with_an_entropy_bonus(tmp_path, options):
    expected, head = grpo_losses(tmp_path, **options)
    plain, _ = grpo_losses(tmp_path)
    assert not np.allclose(plain, expected, rtol=1e-3, atol=1e-3)
    undo = patch_chunked_logprobs()
    try:
        found, found_head = grpo_losses(tmp_path, **options)
    finally:
        undo()
    assert len(found) == 3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_head, head, rtol=1e-4, atol=1e-5)


def test_versions_of_trl_that_are_not_known(monkeypatch):
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, something):
            return hidden

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(
        RuntimeError, match=r"trl .*expected .*chunk_size.* got hidden, weight, something"
    ):
        patch_chunked_logprobs()
    monkeypatch.delattr(trl.trainer.utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match="got none"):
        patch_chunked_logprobs()


def test_sharded_weights_are_not_for_the_swapped_function(patched):
    weight = torch.randn(20, 8)
    weight.ds_shape = weight.shape
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        trl.trainer.utils._ChunkedLogProbFunction.apply(
            torch.randn(3, 8), weight, None, torch.tensor([1, 2, 3]), 1.0, 32
        )


def test_the_card_cites_both_papers(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), make_pairs(), make_model())
    trainer.create_model_card("mine")
    card = (tmp_path / "README.md").read_text()
    assert "2412.02685" in card and "T-REG" in card and "rafailov2023direct" in card
    assert "treg" in ModelCard.load(tmp_path / "README.md").data.tags


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_dataset: no such file"):
        trainer_of(tmp_path, make_model(), str(tmp_path / "anotated.parquet"))
