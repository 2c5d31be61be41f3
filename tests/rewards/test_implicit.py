"""The implicit rewards of one model against another, both of which may share the run's weights."""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from judges import causal_lm, folder, judge, step_away
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.data.annotated import model_fingerprint, read_annotated
from treg.data.fingerprints import sampled_fingerprint
from treg.rewards import SOURCES, Context, load_source
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.implicit import implicit_rewards
from treg.rewards.response import ResponsePairs

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
ROWS = [
    {"prompt": "what is better?", "chosen": "the old owl 🦊", "rejected": "the sun and the moon"},
    {"prompt": "the fox?", "chosen": "it is 42, said the owl", "rejected": "no"},
]
PAIRS, _ = load_pairs(ROWS, TOKENIZER, EncodeOptions(256))
RESPONSES = [response for pair in ResponsePairs(PAIRS, TOKENIZER) for response in pair]


def source(model, *, context=None, **options):
    context = Context(MODEL, TOKENIZER) if context is None else context
    return load_source("implicit", {"model": model} | options, context)


def rewards(made, given=RESPONSES):
    assert [made.check(response) for response in given] == [None] * len(given)
    return [found["token_rewards"] for found in made.score(given)]


def dense(model, response):
    """Log-probs [tokens], float64, from dense logits of one sequence."""
    ids = torch.tensor([[*response.prompt_ids.tolist(), *response.ids.tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    start = len(response.prompt_ids)
    logps = logits.log_softmax(-1)[start - 1 : -1]
    return logps.gather(-1, ids[0, start:, None])[:, 0]


def expected(model, base, beta=0.1):
    return [beta * (dense(model, x) - dense(base, x)) for x in RESPONSES]


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def adapter(model=MODEL, name="", **config):
    """A folder with a LoRA adapter on a model, with random weights on both of its sides."""
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | config
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    if config.get("modules_to_save"):
        step_away(adapted.get_submodule("base_model.model.lm_head.modules_to_save"), 3)
    path = folder("adapter")
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(path)
    return str(path), adapted.eval()


# -- values


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_two_models(beta):
    found = rewards(source(causal_lm(1), base=causal_lm(2), beta=beta))
    same(found, expected(load(causal_lm(1)), load(causal_lm(2)), beta))
    assert max(x.abs().max() for x in found) > 0.1 * beta  # the two differ


def test_a_model_against_the_runs():
    same(rewards(source(causal_lm(1))), expected(load(causal_lm(1)), MODEL))


def test_identities():
    one, two = causal_lm(1), causal_lm(2)
    found = rewards(source(one, base=two))
    for a, b in zip(found, rewards(source(two, base=one)), strict=True):
        assert torch.equal(a, -b)
    for a, b in zip(found, rewards(source(one, base=two, beta=0.2)), strict=True):
        torch.testing.assert_close(2 * a, b)
    for nothing in (source(one, base=one), source(causal_lm(0))):
        assert not any(x.any() for x in rewards(nothing))
    # what a base adds up to: one - two = (one - run) - (two - run)
    for a, b, c in zip(found, rewards(source(one)), rewards(source(two)), strict=True):
        torch.testing.assert_close(a, b - c, rtol=1e-5, atol=1e-5)


def test_numbers_by_hand():
    policy, base = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -0.5])
    np.testing.assert_allclose(implicit_rewards(policy, base), [0.1, 0.0, -0.25], rtol=1e-6)
    found = implicit_rewards(policy, base, beta=0.05, clip=0.05)  # RTO's numbers
    np.testing.assert_allclose(found, [0.05, 0.0, -0.05], rtol=1e-6)
    found = implicit_rewards(policy, base, beta=2.0, clip=3.0)
    np.testing.assert_allclose(found, [2.0, 0.0, -3.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"base: expected the shape of policy \[3\], got \[2\]"):
        implicit_rewards(policy, base[1:])


def test_clip():
    free = rewards(source(causal_lm(1), beta=0.5))
    bound = 0.3 * max(x.abs().max().item() for x in free)
    for a, b in zip(rewards(source(causal_lm(1), beta=0.5, clip=bound)), free, strict=True):
        assert torch.equal(a, b.clamp(-bound, bound))
    assert any((x > bound).any() for x in free) and any((x < -bound).any() for x in free)


# -- adapters

ADAPTERS = {
    "layers": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "a copy of the head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_the_runs_model(kind, inference):
    """It gives PEFT's own numbers, and the run's model the bits and flags that it had."""
    path, adapted = adapter(**ADAPTERS[kind])
    model = tiny_llama(len(TOKENIZER))
    context = Context(model, TOKENIZER)
    rows = [(x.prompt_ids.tolist(), x.ids.tolist()) for x in RESPONSES]
    with torch.inference_mode(inference):
        before, names = context.scorer.score(rows), [x for x, _ in model.named_modules()]
        made = source(path, context=context)
        same(rewards(made), expected(adapted, MODEL))
        assert all(map(torch.equal, before, context.scorer.score(rows)))
    assert [x for x, _ in model.named_modules()] == names
    assert all(x.requires_grad for x in model.parameters())
    assert model_fingerprint(model, adapters=True) == model_fingerprint(MODEL, adapters=True)


@pytest.mark.parametrize("changed", [{"lora_alpha": 32}, {"use_rslora": True}], ids=str)
def test_the_scale_of_an_adapter_is_in_its_settings(changed):
    """The same weights times another factor give other rewards, so they make another file."""
    path, _ = adapter(lora_alpha=8)
    config = Path(path) / "adapter_config.json"
    before = source(path, context=Context(tiny_llama(len(TOKENIZER)), TOKENIZER))
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    after = source(path, context=Context(tiny_llama(len(TOKENIZER)), TOKENIZER))
    assert not torch.allclose(rewards(before)[0], rewards(after)[0])
    assert before.settings() != after.settings()


def test_a_model_without_adapters_has_the_fingerprint_that_it_had():
    """Files of earlier versions know their model by it."""
    digest = hashlib.sha256()
    for name, parameter in MODEL.named_parameters():
        flat = parameter.detach().flatten()
        at = np.linspace(0, len(flat) - 1, min(64, len(flat))).astype(int)
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(flat[at].bfloat16().float().numpy().tobytes())
    wanted = digest.hexdigest()[:16]
    assert sampled_fingerprint(MODEL) == sampled_fingerprint(MODEL, adapters=True) == wanted
    assert model_fingerprint(MODEL) == model_fingerprint(MODEL, adapters=True)


def test_one_copy_of_the_weights_serves_all():
    """Two adapters and the run's model: what they hold beyond its weights are the adapters."""
    (one, first), (two, second) = adapter(), adapter(target_modules=["o_proj", "lm_head"])
    model = tiny_llama(len(TOKENIZER))
    made = source(one, base=two, context=Context(model, TOKENIZER))
    same(rewards(made), expected(first, second))
    same(rewards(source(two, base=one)), expected(second, first))
    own = {x.data_ptr() for x in model.parameters()}
    for scorer in (made._policy, made._base):
        parameters = dict(scorer.spec.model.named_parameters())
        assert own < {x.data_ptr() for x in parameters.values()}
        for name, parameter in parameters.items():
            assert (".lora_" in name) != (parameter.data_ptr() in own)


def test_an_adapter_knows_its_base(tmp_path):
    """By its name, or by the weights that the name leads to."""
    for where in ("base", "moved"):
        MODEL.save_pretrained(tmp_path / where)
    model = load(tmp_path / "moved")
    path, adapted = adapter(name=str(tmp_path / "base"))
    same(rewards(source(path, context=Context(model, TOKENIZER))), expected(adapted, MODEL))
    here, _ = adapter(name=f"{tmp_path}/base/../moved/")
    source(here, context=Context(model, TOKENIZER))
    step_away(model, 5)
    with pytest.raises(ValueError, match=r"rewards\.model: expected an adapter of the run's model"):
        source(path, context=Context(model, TOKENIZER))


class AddsToTheModel(SOURCES["implicit"]):
    """A source that puts an adapter on the run's model itself."""

    def __init__(self, options, context):
        super().__init__(options, context)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        peft.inject_adapter_in_model(config, context.model, "mine")


def test_a_files_fingerprint_is_that_of_the_model_without_its_source(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "adds", AddsToTheModel)
    path, _ = adapter()
    options = AnnotateOptions(rewards="adds", rewards_options={"model": path})
    model = tiny_llama(len(TOKENIZER))
    annotate(model, TOKENIZER, ROWS, tmp_path / "a.parquet", options, progress=False)
    assert model_fingerprint(model, adapters=True) != model_fingerprint(MODEL)
    _, meta = read_annotated(tmp_path / "a.parquet")
    assert meta["fingerprint"]["model"] == model_fingerprint(MODEL)


# -- with the rest


def test_a_file(tmp_path):
    output = tmp_path / "a.parquet"
    given = {"model": causal_lm(1), "clip": 0.2}
    options = AnnotateOptions(rewards="implicit", rewards_options=given)
    annotate(MODEL, TOKENIZER, ROWS, output, options, progress=False)
    examples, meta = read_annotated(output)
    wanted = expected(load(causal_lm(1)), MODEL)
    found = [x[f"{side}_token_rewards"] for x in examples for side in ("chosen", "rejected")]
    same(map(torch.tensor, found), [x.clamp(-0.2, 0.2) for x in wanted])
    settings = meta["streams"]["token_rewards"]["settings"]
    assert settings == {
        "model": model_fingerprint(load(causal_lm(1))),
        "base": "reference",
        "beta": 0.1,
        "clip": 0.2,
        "dtype": "torch.float32",
    }
    for other in ({"model": causal_lm(2)}, given | {"base": causal_lm(2)}):
        with pytest.raises(ValueError, match=r"made with .*, now it is"):
            again = replace(options, rewards_options=other)
            annotate(MODEL, TOKENIZER, ROWS, output, again, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True], ids=["whole", "lora"])
def test_what_the_trainer_saves(tmp_path, use_peft):
    """A checkpoint of DPO gives the rewards that DPO's loss is made of."""
    from treg.trainer import TRegConfig, TRegTrainer

    model = load(causal_lm(0))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    annotate(model, TOKENIZER, ROWS, tmp_path / "a.parquet", progress=False)
    args = TRegConfig(
        str(tmp_path / "out"),
        alpha=0.0,
        learning_rate=1e-2,
        max_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
    )
    trainer = TRegTrainer(
        copy.deepcopy(model),
        args=args,
        train_dataset=str(tmp_path / "a.parquet"),
        processing_class=TOKENIZER,
        peft_config=config if use_peft else None,
    )
    trainer.train()
    made = source(str(tmp_path / "out" / "checkpoint-2"), context=Context(model, TOKENIZER))
    found = rewards(made)
    same(found, expected(trainer.model.eval(), model))
    assert max(x.abs().max() for x in found) > 1e-3


# -- what is refused


def without(*names, model=None):
    """A folder of a causal LM without some of its files."""
    path = folder("part")
    (load(causal_lm(1)) if model is None else model).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    for name in names:
        (path / name).unlink()
    return str(path)


def another_tokenizer():
    path = folder("another")
    tiny_llama(len(TOKENIZER)).save_pretrained(path)
    tiny_tokenizer(crossing=True).save_pretrained(path)
    return str(path)


def prompt_tuning():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    path = folder("prompt")
    peft.get_peft_model(copy.deepcopy(MODEL), config).save_pretrained(path)
    return str(path)


def more_layers():
    path, _ = adapter(tiny_llama(len(TOKENIZER), num_hidden_layers=3))
    return path


def another_head():
    """An adapter on the head of a model whose head is another: PEFT saves the head with it."""
    model = copy.deepcopy(MODEL)
    step_away(model.lm_head, 7)
    return adapter(model, target_modules=["lm_head"])[0]


def head_of_a_judge():
    return judge("llama", num_labels=1)


REFUSED = {
    "no folder": (lambda: "./none", r"rewards\.model: no such folder: \./none"),
    "an empty folder": (lambda: str(folder("empty")), r"rewards\.model: expected a folder or hub"),
    "no weights": (
        lambda: without("model.safetensors"),
        r"rewards\.model: expected a folder or hub name of a causal LM",
    ),
    "a judge": (head_of_a_judge, r"rewards\.model: .* a causal LM, .* lacks lm_head\.weight"),
    "another vocabulary": (
        lambda: without(model=tiny_llama(500)),
        r"rewards\.model: expected the vocabulary of the run's model, \d+ tokens, got .* with 500",
    ),
    "another tokenizer": (another_tokenizer, r"rewards\.model: .* tokenizer gives other ids"),
    "virtual tokens": (prompt_tuning, r"rewards\.model: .* got PROMPT_TUNING, whose virtual"),
    "another base": (
        lambda: adapter(name=causal_lm(2))[0],
        r"rewards\.model: expected an adapter of the run's model ''",
    ),
    "a base that is gone": (
        lambda: adapter(name="gone/away/base")[0],
        r"rewards\.model: expected an adapter of the run's model '', .*, of 'gone/away/base'",
    ),
    "more layers": (more_layers, r"rewards\.model: .* fits LlamaForCausalLM, .* differs in"),
    "fewer layers": (
        lambda: adapter(tiny_llama(len(TOKENIZER), num_hidden_layers=1))[0],
        r"rewards\.model: .* fits LlamaForCausalLM, .* differs in",
    ),
    "other sizes": (
        lambda: adapter(tiny_llama(len(TOKENIZER), hidden_size=64))[0],
        r"rewards\.model: expected an adapter that fits LlamaForCausalLM",
    ),
    "another head": (another_head, r"rewards\.model: .* differs in .*lm_head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    path, message = REFUSED[case]
    state = copy.deepcopy(MODEL.state_dict())
    with pytest.raises(ValueError, match=message):
        source(path())
    assert all(torch.equal(x, state[name]) for name, x in MODEL.state_dict().items())
    assert all(x.requires_grad for x in MODEL.parameters())


def test_a_base_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"rewards\.base: no such folder: \./none"):
        source(causal_lm(1), base="./none")


def test_an_adapter_beside_adapters_is_refused():
    """Those of the run's model would be scored too, or not at all."""
    _, adapted = adapter()
    path, _ = adapter()
    with pytest.raises(ValueError, match=r"rewards\.model: expected a whole model beside a run's"):
        source(path, context=Context(adapted, TOKENIZER))


def test_a_folder_without_a_tokenizer_is_taken():
    found = rewards(source(without("tokenizer.json", "tokenizer_config.json")))
    same(found, expected(load(causal_lm(1)), MODEL))


def test_another_template_is_no_other_tokenizer():
    path = without()
    own = tiny_tokenizer(chat=False)
    own.save_pretrained(path)
    assert own.chat_template is None
    source(path)


@pytest.mark.parametrize("option", ["beta", "clip"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True, "0.1"])
def test_numbers_that_are_refused(option, value):
    with pytest.raises(ValueError, match=rf"{option}: expected a .*number.*, got {value!r}"):
        source(causal_lm(1), **{option: value})


@pytest.mark.parametrize("which", ["model", "base"])
def test_a_pair_that_either_model_does_not_hold(which):
    options = {"model": causal_lm(1), "base": causal_lm(2)}
    options[which] = causal_lm(1, max_position_embeddings=8)
    problem = source(**options).check(RESPONSES[0])
    assert isinstance(problem, RowProblem) and problem.where == "row 0"
    assert problem.reason == "pair too long" and "the models have 8 positions" in problem.detail
