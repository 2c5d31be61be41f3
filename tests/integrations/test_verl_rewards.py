"""verl's reward managers with token rewards of treg: against `treg annotate`, and against separate
forwards of a reward model.

Runs against verl itself where it can be imported, see tests/support/verl_stub.py.
"""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from beginnings import alone, expected
from judges import causal_lm, judge, judge_tokenizer
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from verl_stub import REAL, Config, proto

from treg.data import RowProblem
from treg.data.annotated import read_annotated
from treg.integrations import sampled
from treg.integrations import verl as integration
from treg.integrations.sampled import SampledRewards
from treg.rewards.annotate import AnnotateOptions, annotate

CHAT = [{"role": "user", "content": "What is better, the sun or the moon?"}]
ANSWERS = ["The owl said that the sun is better.", "The moon, says the little fox, and is happy."]


def make_config(**treg) -> Config:
    return Config(
        reward=Config(reward_kwargs={"treg": treg}), data=Config(apply_chat_template_kwargs=None)
    )


def compute_score(data_source, solution_str, ground_truth, extra_info, **_):
    return float(len(solution_str.strip())) if data_source == ground_truth else -1.0


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A reference model, and what `treg annotate` makes of the two answers with it."""
    folder = tmp_path_factory.mktemp("reference")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(folder / "model")
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ANSWERS)
    row = {"prompt": CHAT, "chosen": chosen, "rejected": rejected}
    annotate(model, tokenizer, [row], folder / "annotated.parquet", progress=False)
    (example,), _ = read_annotated(folder / "annotated.parquet")
    return SimpleNamespace(
        tokenizer=tokenizer,
        model=str(folder / "model"),
        file=str(folder / "annotated.parquet"),
        example=example,
    )


def make_proto(annotated, **more):
    """Both answers as a batch: prompts padded on the left, responses on the right."""
    example, pad = annotated.example, annotated.tokenizer.pad_token_id
    prompt = torch.from_numpy(example["prompt_ids"].astype(np.int64))
    responses = [
        torch.from_numpy(example[f"{side}_ids"].astype(np.int64)) for side in ("chosen", "rejected")
    ]
    width = max(map(len, responses)) + 2
    prompts = torch.cat([torch.full((3,), pad), prompt]).expand(2, -1)
    padded = torch.full((2, width), pad)
    mask = torch.zeros(2, prompts.shape[1] + width, dtype=torch.int64)
    mask[:, 3 : prompts.shape[1]] = 1
    for row, response in enumerate(responses):
        padded[row, : len(response)] = response
        mask[row, prompts.shape[1] : prompts.shape[1] + len(response)] = 1
    batch = {"prompts": prompts.contiguous(), "responses": padded, "attention_mask": mask}
    others = {
        "raw_prompt": [
            CHAT,
            np.array(CHAT, dtype=object),
        ],  # the agent loop makes arrays of the messages
        "data_source": ["a", "b"],
        "reward_model": [{"ground_truth": "a"}] * 2,
        "extra_info": [{}, {}],
        "__num_turns__": [2, 2],
    } | more
    return proto(batch, {name: values for name, values in others.items() if values is not None})


def make_manager(annotated, config):
    return integration.TRegRewardManager(
        config=config, tokenizer=annotated.tokenizer, compute_score=compute_score
    )


def run(manager, data) -> list[dict]:
    """Both answers at once, as verl's worker does."""

    async def each():
        return await asyncio.gather(*(manager.run_single(data[i : i + 1]) for i in range(2)))

    return asyncio.get_event_loop().run_until_complete(each())


def expected_scores(annotated, alpha):
    rows = []
    for side, text, right in (("chosen", ANSWERS[0], True), ("rejected", ANSWERS[1], False)):
        row = alpha * torch.from_numpy(annotated.example[f"{side}_token_rewards"].copy())
        row[-1] += len(text) if right else -1.0
        rows.append(row)
    return rows


@pytest.mark.parametrize("source", ["model", "annotated"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_scores_are_those_of_treg_annotate(source, alpha, annotated, verl_modules):
    options = {
        "model": {"model": annotated.model, "device": "cpu"},
        "annotated": {"annotated": annotated.file},
    }[source]
    manager = make_manager(annotated, make_config(alpha=alpha, **options))
    data = make_proto(annotated)
    found = run(manager, data)
    rows = expected_scores(annotated, alpha)
    for one, row in zip(found, rows, strict=True):
        torch.testing.assert_close(torch.tensor(one["reward_score"]), row, rtol=1e-4, atol=1e-5)
    assert [one["reward_extra_info"]["acc"] for one in found] == [len(ANSWERS[0]), -1.0]
    assert [one["reward_extra_info"]["sequence_score"] for one in found] == [len(ANSWERS[0]), -1.0]
    for one, side in zip(found, ("chosen", "rejected"), strict=True):
        total = annotated.example[f"{side}_token_rewards"].sum()
        assert one["reward_extra_info"]["token_reward"] == pytest.approx(total, abs=1e-4)

    scores = type(manager).assemble_rm_scores(data, [one["reward_score"] for one in found])
    assert scores.shape == data.batch["responses"].shape and scores.dtype == torch.float32
    for one, row in zip(scores, rows, strict=True):
        torch.testing.assert_close(one[: len(row)], row, rtol=1e-4, atol=1e-5)
        assert not one[len(row) :].any()


def test_requests_have_verls_template_arguments(annotated, verl_modules, tmp_path):
    config = make_config(model=annotated.model, device="cpu")
    config.data["apply_chat_template_kwargs"] = {"style": "short"}
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ANSWERS)
    row = {
        "prompt": CHAT,
        "chosen": chosen,
        "rejected": rejected,
        "chat_template_kwargs": {"style": "short"},
    }
    model = tiny_llama(len(annotated.tokenizer))
    annotate(model, annotated.tokenizer, [row], tmp_path / "annotated.parquet", progress=False)
    (example,), _ = read_annotated(tmp_path / "annotated.parquet")
    found = make_manager(annotated, config).token_rewards(make_proto(annotated)[0])
    torch.testing.assert_close(
        found, torch.tensor(example["chosen_token_rewards"]), rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(
        example["chosen_token_rewards"], annotated.example["chosen_token_rewards"], atol=1e-3
    )


def test_one_response_at_a_time(annotated, verl_modules, monkeypatch):
    """verl scores many at once; a model whose head is read is changed while it runs."""
    inside, most = [], []

    def scored(self, response):
        inside.append(response)
        time.sleep(0.05)
        most.append(len(inside))
        inside.pop()
        return torch.zeros(len(response.ids))

    monkeypatch.setattr(SampledRewards, "__call__", scored)
    run(make_manager(annotated, make_config(model=annotated.model)), make_proto(annotated))
    assert most == [1, 1]


def test_scores_of_a_running_agent_loop(annotated, verl_modules):
    """One response without padding, and its scores through AgentLoopOutput."""
    side = annotated.example["rejected_ids"].tolist()
    prompt = annotated.example["prompt_ids"].tolist()
    data = make_proto(annotated, prompt_len=[len(prompt)] * 2, response_len=[0, len(side)])
    # verl lays the mask over the two of them as if nothing lay between
    data.batch["prompts"] = torch.tensor([prompt + [0] * 4] * 2)
    data.batch["responses"] = torch.tensor([side + [0] * 3] * 2)
    lengths = len(prompt) + len(side)
    data.batch["attention_mask"] = torch.tensor([[1] * lengths + [0] * 7] * 2)
    manager = make_manager(annotated, make_config(alpha=0.5, annotated=annotated.file))
    # the score of such a batch is verl's affair
    manager.base.run_single = lambda data: asyncio.sleep(0, {"reward_score": 3})
    scores = asyncio.get_event_loop().run_until_complete(manager.run_single(data))["reward_score"]
    expected = 0.5 * torch.from_numpy(annotated.example["rejected_token_rewards"].copy())
    expected[-1] += 3
    torch.testing.assert_close(torch.tensor(scores), expected)

    integration.install_token_scores()
    integration.install_token_scores()
    metrics = {} if not REAL else verl_modules.agent_loop.AgentLoopMetrics()
    output = verl_modules.agent_loop.AgentLoopOutput(
        prompt_ids=prompt, response_ids=side, response_mask=[1] * len(side), metrics=metrics
    )
    output.reward_score = scores
    fields = output.as_dict()
    torch.testing.assert_close(fields["rm_scores"], expected)
    assert fields["responses"].tolist() == side and output.reward_score == scores
    output.reward_score = 2.5
    assert output.as_dict()["rm_scores"].tolist() == [0.0] * (len(side) - 1) + [2.5]
    output.reward_score = None
    assert "rm_scores" not in output.as_dict()
    output.reward_score = scores[1:]
    with pytest.raises(ValueError, match=f"expected a list of {len(side)} scores"):
        output.as_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a model that judges responses, or an annotated file"),
        ({"model": "a", "annotated": "b"}, "model='a' and annotated='b'"),
        ({"model": "a", "alpha": -1}, "alpha: expected a number >= 0"),
        ({"model": "a", "beta": 1}, r"expected keys among .*got \['beta'\]"),
        (
            {"model": "a", "rewards": "messagewise"},
            "rewards: expected .* no token_weights, got 'messagewise', which gives token_rewards, ",
        ),
    ],
)
def test_options_refuse(options, message, annotated, verl_modules):
    with pytest.raises(ValueError, match=message):
        make_manager(annotated, make_config(**options))


def test_manager_refuses(annotated, verl_modules):
    manager = make_manager(annotated, make_config(annotated=annotated.file))
    with pytest.raises(ValueError, match="__num_turns__"):
        run(manager, make_proto(annotated, **{"__num_turns__": [4, 4]}))
    other = make_proto(annotated)
    other.batch["responses"][0, 0] += 1
    with pytest.raises(ValueError, match="input_ids: expected sequences of"):
        run(manager, other)
    with pytest.raises(ValueError, match="reward_score: expected a list of"):
        type(manager).assemble_rm_scores(make_proto(annotated), [[1.0], [2.0]])
    with pytest.raises(ValueError, match="got float"):
        type(manager).assemble_rm_scores(make_proto(annotated), [1.0, 2.0])
    empty = make_proto(annotated)
    empty.batch["attention_mask"][:, empty.batch["prompts"].shape[1] :] = 0
    with pytest.raises(ValueError, match="empty response"):
        manager.token_rewards(empty[0])


@pytest.mark.parametrize("prompt", [None, [[{"role": "user", "content": [{"type": "image"}]}]] * 2])
def test_judging_refuses_prompts_that_are_not_text(prompt, annotated, verl_modules):
    manager = make_manager(annotated, make_config(model=annotated.model))
    with pytest.raises(ValueError, match="raw_prompt: expected messages of text"):
        run(manager, make_proto(annotated, raw_prompt=prompt))


def test_judging_refuses_what_the_model_cannot_hold(annotated, verl_modules, tmp_path):
    tiny_llama(len(annotated.tokenizer), max_position_embeddings=64).save_pretrained(tmp_path)
    manager = make_manager(annotated, make_config(model=str(tmp_path), device="cpu"))
    with pytest.raises(ValueError, match="the model has 64 positions"):
        run(manager, make_proto(annotated))


def test_a_source_of_edits_has_nothing_to_compare_with(annotated, verl_modules):
    """A response of verl's comes without another answer."""
    manager = make_manager(annotated, make_config(model=annotated.model, rewards="edits"))
    with pytest.raises(ValueError, match=r"the source 'edits' .* got no other answer"):
        run(manager, make_proto(annotated))


def test_a_refusal_asks_nothing_of_the_model(annotated, verl_modules):
    """An own source may have a model whose head cannot be read."""

    class Refuses:
        def check(self, response):
            return RowProblem("no opinion")

    manager = make_manager(annotated, make_config(model=annotated.model))
    manager.sampled.source = Refuses()
    with pytest.raises(ValueError, match=r"responses: expected ones .* got no opinion"):
        run(manager, make_proto(annotated))


# -- other sources


def without_models(*args, **kwargs):
    raise AssertionError("a reference model was loaded")


def made_by(annotated, folder, source, options):
    """Rewards of both answers by `treg annotate`."""
    model = tiny_llama(len(annotated.tokenizer))
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ANSWERS)
    row = {"prompt": CHAT, "chosen": chosen, "rejected": rejected}
    how = AnnotateOptions(rewards=source, rewards_options=options)
    path = folder / "other.parquet"
    annotate(model, annotated.tokenizer, [row], path, options=how, progress=False)
    (example,), _ = read_annotated(path)
    return [example[f"{side}_token_rewards"] for side in ("chosen", "rejected")]


SOURCES = {
    "entropy": ("entropy", {}, True),
    "surprise": ("surprise", {"unit": "word"}, True),
    "constant": ("constant", {"value": 0.3}, False),
    "random": ("random", {"seed": 3}, False),
    "shuffled": ("shuffled", {"of": "constant"}, False),
    "implicit": ("implicit", {"model": causal_lm}, True),
    "two models": ("implicit", {"model": causal_lm, "base": lambda: causal_lm(2)}, False),
    "messagewise": (
        "several",
        {
            "sources": [{"stream": "token_rewards", "name": "messagewise", "of": "surprise"}],
        },
        True,
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_give_what_they_give_treg_annotate(
    source, annotated, verl_modules, tmp_path, monkeypatch
):
    name, given, reference = SOURCES[source]
    options = {key: value() if callable(value) else value for key, value in given.items()}
    wanted = made_by(annotated, tmp_path, name, options)
    treg = {"rewards": name, "rewards_options": options, "alpha": 0.5, "device": "cpu"}
    if reference:
        treg["model"] = annotated.model
    else:
        monkeypatch.setattr(sampled, "reference_at", without_models)
    if reference and source != "messagewise":
        with pytest.raises(ValueError, match="expected a model that judges responses"):
            make_manager(annotated, make_config(**treg | {"model": None}))
    found = run(make_manager(annotated, make_config(**treg)), make_proto(annotated))
    for one, rewards, score in zip(found, wanted, (len(ANSWERS[0]), -1.0), strict=True):
        row = 0.5 * torch.from_numpy(rewards.copy())
        row[-1] += score
        torch.testing.assert_close(torch.tensor(one["reward_score"]), row, rtol=1e-4, atol=1e-5)


def ending(annotated, how):
    """The ids of an answer as engines leave them."""
    ids = annotated.example["rejected_ids"].tolist()
    stop = ids.index(annotated.tokenizer.eos_token_id)
    return {"ended": ids[: stop + 1], "cut": ids[: stop - 3], "nothing": ids[stop : stop + 1]}[how]


def proto_of(annotated, ids):
    """Twice the same response of these ids."""
    prompt = torch.from_numpy(annotated.example["prompt_ids"].astype(np.int64))
    batch = {
        "prompts": prompt.repeat(2, 1),
        "responses": torch.tensor([ids + [annotated.tokenizer.pad_token_id] * 3] * 2),
        "attention_mask": torch.tensor([[1] * (len(prompt) + len(ids)) + [0] * 3] * 2),
    }
    others = {"raw_prompt": [CHAT] * 2, "data_source": ["a", "b"]}
    others |= {"reward_model": [{"ground_truth": "a"}] * 2, "extra_info": [{}, {}]}
    return proto(batch, others)


@pytest.mark.parametrize("tokenizer", [None, judge_tokenizer], ids=["same", "other"])
@pytest.mark.parametrize("how", ["ended", "cut"])
@pytest.mark.parametrize("beta_c", [1.0, 0.5])
def test_redistribution_without_verls_score(
    beta_c, how, tokenizer, annotated, verl_modules, monkeypatch
):
    """Eq. 6-7 by forwards of the reward model on each beginning; no reference is loaded, and
    nothing is asked for a score.
    """
    monkeypatch.setattr(sampled, "reference_at", without_models)
    path, ids = judge("llama", tokenizer), ending(annotated, how)
    options = {"model": path, "beta_c": beta_c}
    config = make_config(rewards="redistribution", rewards_options=options, base="none")
    manager = integration.TRegRewardManager(config, annotated.tokenizer, without_models)
    found = run(manager, proto_of(annotated, ids))
    text = annotated.tokenizer.decode(ids, skip_special_tokens=True)
    response = SimpleNamespace(
        prompt=CHAT,
        text=text,
        prompt_ids=annotated.example["prompt_ids"],
        ids=np.array(ids),
        tokenizer=annotated.tokenizer,
        content=len(ids) - (how == "ended"),
    )
    wanted, whole, empty = expected(path, response, beta_c=beta_c)
    for one in found:
        np.testing.assert_allclose(one["reward_score"], wanted, atol=1e-4)
        total = beta_c * (whole - empty) + (1 - beta_c) * whole
        assert sum(one["reward_score"]) == pytest.approx(total, abs=1e-4)
        assert one["reward_extra_info"] == {"token_reward": pytest.approx(total, abs=1e-4)}


def test_redistribution_and_verls_score(annotated, verl_modules):
    """Both, where that is said."""
    options = {"rewards": "redistribution", "rewards_options": {"model": judge()}}
    both = make_manager(annotated, make_config(base="naive", **options))
    alone = make_manager(annotated, make_config(base="none", **options))
    ids = ending(annotated, "ended")
    data = proto_of(annotated, ids)
    scores = (len(ANSWERS[1]), -1.0)
    for one, other, score in zip(run(both, data), run(alone, data), scores, strict=True):
        wanted = torch.tensor(other["reward_score"])
        wanted[-1] += score
        torch.testing.assert_close(torch.tensor(one["reward_score"]), wanted)
        assert one["reward_extra_info"]["sequence_score"] == score


SIMPLE = ("contrastive", "implicit", "entropy", "surprise", "constant", "random")


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("redistribution", {"model": judge}),
        ("redistribution", {"model": lambda: judge("llama", judge_tokenizer)}),
        *((name, {"model": causal_lm} if name == "implicit" else {}) for name in SIMPLE),
    ],
    ids=["RED", "RED of other tokens", *SIMPLE],
)
def test_a_response_of_its_end_alone(source, options, annotated, verl_modules):
    """The only token has all there is: R(x, y) - R(x, empty), a log-ratio, or nothing."""
    options = {key: value() for key, value in options.items()}
    config = make_config(
        rewards=source, rewards_options=options, base="none", alpha=1.0, model=annotated.model
    )
    ids = ending(annotated, "nothing")
    manager = integration.TRegRewardManager(config, annotated.tokenizer, None)
    (score,) = run(manager, proto_of(annotated, ids))[0]["reward_score"]
    if source == "redistribution":
        tokenizer = AutoTokenizer.from_pretrained(options["model"])
        classifier = AutoModelForSequenceClassification.from_pretrained(options["model"]).eval()
        turns = [*CHAT, {"role": "assistant", "content": ""}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        before = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        read = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (before, whole)]
        empty, full = (alone(classifier, x) for x in read)
        assert score == pytest.approx(full - empty, abs=1e-4)
    elif source == "implicit":
        policy = AutoModelForCausalLM.from_pretrained(options["model"])
        base = tiny_llama(len(annotated.tokenizer))
        ids = torch.from_numpy(annotated.example["prompt_ids"].astype(np.int64))[None]
        end = annotated.tokenizer.eos_token_id
        a, b = (m(input_ids=ids).logits[0, -1].log_softmax(-1)[end].item() for m in (policy, base))
        assert score == pytest.approx(0.1 * (a - b), abs=1e-4)
    else:
        assert score == 0.0


def test_refused_responses_without_token_rewards(annotated, verl_modules, tmp_path, caplog):
    tiny_llama(len(annotated.tokenizer), max_position_embeddings=64).save_pretrained(tmp_path)
    config = make_config(model=str(tmp_path), device="cpu", refused="zero")
    manager = make_manager(annotated, config)
    found = run(manager, make_proto(annotated))
    for one, score in zip(found, (len(ANSWERS[0]), -1.0), strict=True):
        assert one["reward_score"] == [*[0.0] * (len(one["reward_score"]) - 1), score]
        assert one["reward_extra_info"]["token_reward_refused"] == 1.0
        assert one["reward_extra_info"]["token_reward"] == 0.0
    assert sum("the model has 64 positions" in x for x in caplog.messages) == 1
    nothing = proto_of(annotated, [])
    found = run(manager, nothing)
    assert [one["reward_score"] for one in found] == [[], []]
    assert not type(manager).assemble_rm_scores(nothing, [[], []]).any()


def test_options_as_omegaconf_has_them(annotated, verl_modules):
    omegaconf = pytest.importorskip("omegaconf")
    treg = {
        "rewards": "several",
        "rewards_options": {
            "sources": [
                {"stream": "flat", "name": "constant", "value": 0.5},
                {"stream": "noise", "name": "random"},
            ],
            "mix": {"flat": 2.0, "noise": 0.0},
        },
        "alpha": 1.0,
    }
    config = omegaconf.OmegaConf.create({"reward": {"reward_kwargs": {"treg": treg}}, "data": {}})
    found = run(make_manager(annotated, config), make_proto(annotated))
    assert found[0]["reward_score"][:3] == [1.0] * 3


RED = {"rewards": "redistribution", "rewards_options": {"model": "a"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RED, r"treg\.base: expected 'none' or .*'redistribution', .* got nothing; 'none' leaves"),
        (
            {
                "rewards": "shuffled",
                "rewards_options": {"of": "redistribution", "of_options": {"model": "a"}},
            },
            "base: expected 'none'",
        ),
        ({"rewards": "implicit", "rewards_options": {"model": "a"}}, "for the source 'implicit'"),
        ({"rewards": "constant", "refused": "drop"}, "refused: expected one of error, zero"),
        ({"rewards": "constant", "tokens_per_batch": 0}, "tokens_per_batch: expected a whole"),
        ({"rewards": "constant", "tail": 1}, "tail: expected 0 without an annotated file"),
    ],
)
def test_more_options_refuse(options, message, annotated, verl_modules):
    with pytest.raises(ValueError, match=message):
        make_manager(annotated, make_config(**options))


def test_a_source_that_turns_out_to_need_a_reference(annotated, verl_modules):
    options = {"sources": [{"stream": "token_rewards", "name": "surprise"}]}
    with pytest.raises(ValueError, match=r"expected a model that judges responses"):
        make_manager(annotated, make_config(rewards="several", rewards_options=options))
    options = {"model": causal_lm(), "base": causal_lm(2)}
    manager = make_manager(annotated, make_config(rewards="implicit", rewards_options=options))
    # its vocabulary is compared with the reference's
    run(manager, make_proto(annotated))
