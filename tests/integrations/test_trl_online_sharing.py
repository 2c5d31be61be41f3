"""TRegGRPOTrainer with a prompt run once for its completions: loss, metrics and gradients are those
of the sequences apart, and the backbone sees fewer tokens.
"""

import copy
import logging

import pytest
import torch

pytest.importorskip("trl")

import online_sharing_worker
import processes
from online_sharing_worker import GROUP, SEEN_FIRST, VOCAB, ending, online_trainer
from placed import by_place
from tiny import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from treg.heads.logprobs import token_logprobs

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ROTARY = {"intermediate_size": 64, "num_key_value_heads": 2}
MODELS = {
    "qwen2": ROTARY,
    "gemma2": ROTARY | {"head_dim": 8, "sliding_window": 8},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mixtral": ROTARY | {"num_local_experts": 4},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "mamba": {"state_size": 8},
}
# of a log line: not the times, nor what counts them
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def model_of(kind):
    if kind == "llama":
        return ending(tiny_llama(VOCAB))
    config = AutoConfig.for_model(kind, **SIZES | MODELS[kind])
    torch.manual_seed(0)
    return ending(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    model_of("llama").save_pretrained(path)
    return str(path)


def step(tmp_path, model, share, **options):
    """Log lines and gradients of a training."""
    model = model if isinstance(model, str) else copy.deepcopy(model)
    trainer, steps = online_trainer(
        tmp_path / str(share), model, treg_share_prompt=share, **options
    )
    trainer.train()
    return trainer, trainer.state.log_history, steps.gradients


def assert_same_steps(found, expected):
    """Loss to 1e-6, metrics and each gradient to 1e-5."""
    (_, lines, steps), (_, lines_apart, steps_apart) = found, expected
    for line, line_apart in zip(lines, lines_apart, strict=True):
        assert line.keys() == line_apart.keys()
        for name, x in line_apart.items():
            if name in TIMES or "time" in name:
                continue
            exact = name == "loss"
            assert line[name] == pytest.approx(x, rel=1e-6 if exact else 1e-5, abs=1e-6), name
    assert len(steps) == len(steps_apart) > 0
    for gradients, apart in zip(steps, steps_apart, strict=True):
        assert gradients.keys() == apart.keys()
        total = torch.cat([x.flatten() for x in apart.values()]).norm()
        assert total > 1e-4
        for name, x in apart.items():
            off = (gradients[name] - x).norm()
            assert off <= 1e-5 * max(x.norm(), 1e-2 * total), f"{name}: {off / x.norm():.1e}"


CASES = {
    "one batch": {},
    "micro-batches": {
        "per_device_train_batch_size": GROUP,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
    },
    "old log-probs": {
        "per_device_train_batch_size": GROUP,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
    },
    "batches of one": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": GROUP,
    },
    "reference": {"beta": 0.3, "num_iterations": 2, "max_steps": 2},
    "entropy bonus": {"entropy_coef": 0.3, "temperature": 0.7},
    "high entropies": {"top_entropy_quantile": 0.5},
    "truncated": {"mask_truncated_completions": True, "max_completion_length": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "alike": {"temperature": 0.05, "entropy_coef": 0.1},
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_sequences_apart(tmp_path, folder, name):
    found = [step(tmp_path, folder, share, **CASES[name]) for share in (True, False)]
    assert found[0][0]._shared.sharing.on and not found[1][0]._shared.sharing.on
    assert_same_steps(*found)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_adapters(tmp_path, folder, beta):
    """The reference is the policy without them."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    found = []
    for share in (True, False):
        torch.manual_seed(3)
        more = {"beta": beta, "peft_config": copy.deepcopy(config)}
        found.append(step(tmp_path, folder, share, **more))
        assert found[-1][0]._shared.sharing.on == share
    assert_same_steps(*found)
    assert (found[0][1][0].get("kl", 0.0) > 0) == (beta > 0)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "gpt2", "mixtral"])
def test_other_models(tmp_path, kind):
    """A softcap and sliding windows that are exceeded, absolute positions; a mixture's balance is
    that of all tokens of all sequences.
    """
    more = {"model_init_kwargs": None} if kind != "mixtral" else {"router_aux_loss_coef": 0.5}
    model = model_of(kind)
    found = [step(tmp_path, model, share, **more) for share in (True, False)]
    assert found[0][0]._shared.sharing.on
    assert_same_steps(*found)
    assert ("aux_loss" in found[0][1][0]) == (kind == "mixtral")


def test_positions_are_those_of_the_samples(tmp_path):
    """Of a model with absolute ones padding on the left does not count, shared or apart; in TRL's
    own call it does.
    """
    trainer, _ = online_trainer(tmp_path, model_of("gpt2"), treg_share_prompt=False)
    rows = [([7, 8, 9, 10, 11], [20, 21]), ([7, 8], [30, 31, 32])]
    ids = torch.tensor([[7, 8, 9, 10, 11, 20, 21, 0], [0, 0, 0, 7, 8, 30, 31, 32]])
    mask = (ids != 0).long()
    labels = ids.masked_fill(mask == 0, -100)
    model = trainer.model.eval()
    found = {}
    for share in (True, False):
        trainer._shared.sharing.on = share
        with torch.no_grad():
            found[share], *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, 3)
    theirs = token_logprobs(model, labels, input_ids=ids, attention_mask=mask).logprobs[:, -3:]
    for i, (prompt, completion) in enumerate(rows):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) - 1 + t, x].item() for t, x in enumerate(completion)]
        for share in (True, False):
            assert found[share][i, : len(completion)].tolist() == pytest.approx(expected, abs=1e-5)
    assert (theirs[1] - found[False][1]).abs().max() > 1e-2


def seen_by(model):
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0]))
    return seen


def test_the_tokens_that_models_see(tmp_path, folder):
    """By default too, policy and reference."""
    trainer, _ = online_trainer(tmp_path, folder, beta=0.1)
    batches, seen = [], {}
    made = trainer._generate_and_score_completions

    def kept(inputs):
        batches.append(made(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = kept
    for name in ("model", "ref_model"):
        seen[name] = seen_by(getattr(trainer, name))
    trainer.train()
    (batch,) = batches
    parts = [
        torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1)
        for name in ("ids", "mask")
    ]
    sequences = [tuple(ids[mask == 1].tolist()) for ids, mask in zip(*parts, strict=True)]
    once = len({x[:n] for x in sequences for n in range(1, len(x) + 1)})
    assert once < 0.75 * sum(map(len, sequences))
    # the first batch's comparison: padded on both sides, and shared; then the step
    assert [x.shape for x in seen["ref_model"][-2:]] == [(1, once)] * 2
    assert [x.shape for x in seen["model"][-2:]] == [(1, once)] * 2
    assert len(seen["ref_model"]) == 4


# -- where prompts are not shared
# -


@pytest.mark.parametrize(
    ("kind", "said"), [("bloom", "ALiBi"), ("mamba", "layers of type linear_attention")]
)
def test_models_that_cannot(tmp_path, kind, said, caplog):
    """A step is then TRL's."""
    model = model_of(kind)
    with pytest.raises(ValueError, match=f"treg_share_prompt: .*{said}"):
        step(tmp_path, model, True)
    with caplog.at_level(logging.WARNING):
        found = [step(tmp_path, model, share) for share in (None, False)]
    assert not found[0][0]._shared.sharing.on
    assert caplog.text.count("treg_share_prompt is off, each answer runs its prompt") == 1
    assert_same_steps(*found)


def test_a_difference_that_the_first_batch_shows(tmp_path, caplog):
    model = by_place(tiny_llama(VOCAB), SEEN_FIRST)
    found = [step(tmp_path, model, share) for share in (None, False)]
    assert "the first batch's log-probs are not the same" in caplog.text
    assert not found[0][0]._shared.sharing.on
    assert_same_steps(*found)
    with pytest.raises(ValueError, match="treg_share_prompt: the first batch's log-probs are not"):
        step(tmp_path, model, True)


def test_prompt_tuning_and_flash_attention_are_named(tmp_path, folder, caplog):
    peft = pytest.importorskip("peft")
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"treg_share_prompt: .*PROMPT_TUNING adapters"):
        online_trainer(tmp_path, folder, peft_config=tuning, treg_share_prompt=True)
    model = tiny_llama(VOCAB)
    model.config._attn_implementation_internal = "flash_attention_2"
    online_trainer(tmp_path, model)
    assert "attn_implementation: expected sdpa, eager, flex_attention" in caplog.text


@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_a_mask_with_holes_runs_apart(tmp_path, asked, first, caplog):
    """That batch alone, unless it is the first one, or sharing was asked for."""
    trainer, _ = online_trainer(tmp_path, tiny_llama(VOCAB), treg_share_prompt=asked)
    ids = torch.tensor([[5, 6, 7, 20, 21, 22], [5, 6, 7, 30, 31, 32]])
    mask, holes = torch.ones(2, *ids.shape, dtype=torch.int64)
    holes[0, 3] = 0

    def logps(mask):
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)[0]

    if not first:
        logps(mask)
    if asked:
        with pytest.raises(ValueError, match=r"treg_share_prompt: attention_mask: .* treg_share_p"):
            logps(holes)
        return
    with caplog.at_level(logging.WARNING):
        found = logps(holes), logps(holes)
    assert caplog.text.count("attention_mask: expected padding at the ends") == 1
    assert trainer._shared.sharing.on == (not first)
    trainer._shared.sharing.on = False
    assert torch.equal(logps(holes), found[0]) and torch.equal(*found)


def test_completions_that_are_masked_wholly(tmp_path):
    trainer, _ = online_trainer(tmp_path, tiny_llama(VOCAB), treg_share_prompt=True)
    ids = torch.tensor([[0, 6, 7, 20, 21, 22], [5, 6, 7, 30, 31, 32], [0, 6, 7, 20, 21, 0]])
    mask = (ids != 0).long()
    for none in ([0], [0, 2], [0, 1, 2]):
        mask[none, 3:] = 0
        found = []
        for share in (True, False):
            trainer._shared.sharing.on = share
            with torch.no_grad():
                found.append(
                    trainer._get_per_token_logps_and_entropies(
                        *(trainer.model, ids, mask, 3), compute_entropy=True
                    )[:2]
                )
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            assert not a[none].any()


# -- two processes
# -


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    processes.run(online_sharing_worker.__file__, folder, ranks=2)
    return folder


def test_two_processes_in_shared_rows(two_processes):
    for rank in range(2):
        shared, apart = (
            torch.load(two_processes / f"alike-{share}-{rank}.pt") for share in (True, False)
        )
        assert shared[2] and not apart[2]
        assert_same_steps((None, shared[1], shared[0]), (None, apart[1], apart[0]))


def test_what_one_of_two_processes_finds_counts_for_both(two_processes):
    found = [torch.load(two_processes / f"placed-None-{rank}.pt") for rank in range(2)]
    assert found == [(1, False, "")] * 2
    errors = [torch.load(two_processes / f"placed-True-{rank}.pt") for rank in range(2)]
    said = sorted(error for *_, error in errors)
    assert said[0].startswith("treg_share_prompt: another process found a difference")
    assert said[1].startswith("treg_share_prompt: the first batch's log-probs are not the same")
