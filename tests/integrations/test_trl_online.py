"""TRL's GRPOTrainer with token credit: TRL's own steps with credit="sequence", hand-computed
advantages with a source.
"""

import functools
import itertools
import json
import math
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import online_worker
import processes
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from judges import judge, judge_tokenizer
from online_trainers import GROUP, PROMPTS, VOCAB, WIDTH, make_trainer, readable, vowels
from peft import LoraConfig
from tiny import tiny_llama, tiny_tokenizer, usr
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from treg.data import RowProblem
from treg.integrations.trl import TRegGRPOConfig, TRegGRPOTrainer
from treg.integrations.trl.credit import MACROS, Completions, own_tokens, share_within, units_of


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def model_folder(tmp_path_factory, **config):
    folder = tmp_path_factory.mktemp("policy")
    model = tiny_llama(VOCAB, **config)
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return model_folder(tmp_path_factory)


def train(tmp_path, model, kind=TRegGRPOTrainer, **options):
    trainer, steps = make_trainer(tmp_path, model, kind, **options)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return trainer, steps.gradients, losses


def assert_same_steps(found, expected, tolerance=1e-5):
    _, gradients, losses = found
    _, their_gradients, their_losses = expected
    assert losses == pytest.approx(their_losses, abs=tolerance)
    assert len(gradients) == len(their_gradients) > 0
    for mine, theirs in zip(gradients, their_gradients, strict=True):
        assert mine.keys() == theirs.keys()
        assert any(x.abs().max() > 1e-4 for x in theirs.values())
        for name, x in theirs.items():
            torch.testing.assert_close(mine[name], x, atol=tolerance, rtol=1e-4, msg=name)


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
VARIANTS = [
    *({"loss_type": x} for x in LOSS_TYPES),
    {"beta": 0.1},
    {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    {"num_iterations": 2, "beta": 0.05, "epsilon_high": 0.3},
    {"entropy_coef": 0.1},
    {"top_entropy_quantile": 0.5},
    {"temperature": 0.7, "gradient_accumulation_steps": 2},
    {"scale_rewards": "batch", "mask_truncated_completions": True},
    {"multi_objective_aggregation": "normalize_then_sum"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_with_sequence_credit_is_trls(options, policy, tmp_path):
    found = train(tmp_path, policy, credit="sequence", **options)
    assert_same_steps(found, train(tmp_path, policy, GRPOTrainer, **options))


# -- token credit


class Seen(TRegGRPOTrainer):
    """Keeps what was generated, its advantages, and the policy's log-probs of it."""

    def _policy_logprobs(self, output):
        found = super()._policy_logprobs(output)
        self.logps_seen = [*getattr(self, "logps_seen", []), found]
        return found

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        prompts = [x["prompt"] for x in inputs]
        ids = self._generated[1]
        self.seen = [*getattr(self, "seen", []), (prompts, ids, output)]
        return output


def scores_alone(path, texts):
    """R of every beginning of the tokens of each text, each by a forward of its own, and how many
    characters each token has completed.
    """
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        with torch.no_grad():
            scores = [
                model(torch.tensor([ids[: n + 1]])).logits[0, 0].item() for n in range(len(ids))
            ]
        found.append((scores, [end for _, end in offsets]))
    return found


def red_by_hand(path, prompts, completions):
    """RED's token rewards: the reward model's score after what a token completes, less the score
    before it; what is left at the end goes to the last token.
    """
    tokenizer, rewards = tiny_tokenizer(), []
    texts = [tokenizer.decode([i for i in ids if i != 1]) for ids in completions]
    judged = scores_alone(path, [p + t for p, t in zip(prompts, texts, strict=True)])
    for prompt, ids, (scores, ends) in zip(prompts, completions, judged, strict=True):

        def after(characters, scores=scores, ends=ends, prompt=prompt):
            whole = [k for k, end in enumerate(ends) if end <= len(prompt) + characters]
            return scores[whole[-1]]

        potentials = [after(0)]
        for n in range(1, len(ids) + 1):
            potentials.append(after(len(tokenizer.decode([i for i in ids[:n] if i != 1]))))
        row = [b - a for a, b in itertools.pairwise(potentials)]
        row[-1] += scores[-1] - potentials[-1]
        rewards.append(row)
    return rewards


def process_by_hand(rewards, lam):
    """Discounted sums of token rewards, less their mean over the group and over its deviation."""
    found = []
    for start in range(0, len(rewards), GROUP):
        group = rewards[start : start + GROUP]
        flat = torch.tensor([x for row in group for x in row], dtype=torch.float64)
        for row in group:
            normal = [(x - flat.mean()) / (flat.std() + 1e-4) for x in row]
            sums = [sum(lam**k * x for k, x in enumerate(normal[t:])) for t in range(len(row))]
            found.append([x.item() for x in sums])
    return found


def advantages_by_hand(rewards, lam, *, scaled=True):
    """GAE whose values are the mean reward of the group, over its root mean square."""
    found = []
    for start in range(0, len(rewards), GROUP):
        group = rewards[start : start + GROUP]
        mean = sum(map(sum, group)) / GROUP
        rows = []
        for row in group:
            advantage, advantages = 0.0, []
            for t in reversed(range(len(row))):
                last = t == len(row) - 1
                advantage = row[t] + (0.0 if last else mean) - mean + lam * advantage
                advantages.insert(0, advantage)
            rows.append(advantages)
        squares = [sum(a * a for a in row) / len(row) for row in rows]
        scale = math.sqrt(sum(squares) / (GROUP - 1)) + 1e-4 if scaled else 1.0
        found += [[a / scale for a in row] for row in rows]
    return found


@pytest.mark.parametrize("tokenizer", [None, judge_tokenizer], ids=["one", "another"])
@pytest.mark.parametrize("baseline", [None, "group"])
@pytest.mark.parametrize("credit", ["returns", "gae"])
def test_red_gives_the_advantages_of_separate_prefix_forwards(
    credit, baseline, tokenizer, policy, tmp_path
):
    """With the policy's tokenizer, and with a reward model that has another."""
    path = judge("llama", tokenizer)
    trainer, *_ = train(
        tmp_path,
        policy,
        Seen,
        reward_funcs=None,
        token_rewards="redistribution",
        token_rewards_options={"model": path},
        credit=credit,
        credit_lambda=0.9,
        credit_baseline=baseline,
        max_steps=1,
        **readable(),
    )
    ((prompts, ids, output),) = trainer.seen
    rewards = red_by_hand(path, prompts, ids)
    by_hand = process_by_hand if baseline is None else advantages_by_hand
    expected = by_hand(rewards, 1.0 if credit == "returns" else 0.9)
    assert max(map(max, expected)) > 0.5
    for row, values in zip(output["advantages"], expected, strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values), atol=2e-4, rtol=1e-4)
        assert not row[len(values) :].any()
    sums = [sum(row) for row in rewards]
    (logged,) = [x for x in trainer.state.log_history if "reward" in x]
    assert logged["rewards/redistribution/mean"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("credit", ["returns", "macro"])
def test_the_reward_at_the_end_alone_is_sequence_credit(credit, scale_rewards, policy, tmp_path):
    """With lambda 1 every token has the advantage of its completion; macro actions change nothing
    then.
    """
    options = {"scale_rewards": scale_rewards, "beta": 0.1}
    found = train(tmp_path, policy, credit=credit, credit_lambda=1.0, **options)
    assert_same_steps(found, train(tmp_path, policy, GRPOTrainer, **options))
    assert found[0].state.log_history[0]["credit/within"] == pytest.approx(0.0, abs=1e-10)


def test_rloo_is_token_credit_with_its_baseline(policy, tmp_path):
    """TRL's RLOO has one ratio a completion; at the policy that wrote them its gradient is that of
    dr_grpo, which sums over tokens and divides by a constant.
    """
    options = {"max_steps": 1, "reward_funcs": vowels}
    *_, theirs, _ = train(tmp_path, policy, RLOOTrainer, beta=0.0, **options)
    *_, mine, _ = train(
        tmp_path,
        policy,
        credit="returns",
        credit_baseline="rloo",
        credit_scale="none",
        loss_type="dr_grpo",
        **options,
    )
    for name, x in theirs[0].items():
        torch.testing.assert_close(mine[0][name] * WIDTH, x, atol=1e-5, rtol=1e-4, msg=name)


def test_all_rewards_equal_give_no_advantage(policy, tmp_path):
    for credit in ("returns", "gae", "macro"):
        trainer, gradients, _ = train(
            tmp_path,
            policy,
            Seen,
            reward_funcs=lambda completions, **_: [1.0] * len(completions),
            credit=credit,
            credit_lambda=1.0,
            max_steps=1,
        )
        assert not trainer.seen[0][2]["advantages"].any()
        assert all(not x.any() for x in gradients[0].values())


def by_ngrams(rewards, length):
    """The sums of each `length` tokens, and back: what each token's has got."""
    summed = [[sum(row[t : t + length]) for t in range(0, len(row), length)] for row in rewards]

    def spread(rows):
        return [
            [values[t // length] for t in range(len(row))]
            for values, row in zip(rows, rewards, strict=True)
        ]

    return summed, spread


def test_macro_actions_are_gae_over_their_sums(policy, tmp_path):
    """With reward models of tokens; the scale counts tokens, so it is taken out of both."""
    given = {"macro_length": 3, "credit_lambda": 0.5, "credit_scale": "none", "max_steps": 1}
    given["credit_baseline"] = "group"
    trainer, *_ = train(tmp_path, policy, Seen, credit="macro", **given, **red(), **readable())
    ((prompts, ids, output),) = trainer.seen
    summed, spread = by_ngrams(red_by_hand(judge("llama"), prompts, ids), 3)
    expected = spread(advantages_by_hand(summed, 0.5, scaled=False))
    for row, values in zip(output["advantages"], expected, strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_share_within_completions_is_that_of_the_sum_of_squares(size):
    """Of 1 + 9 + 4, the tokens of the first completion differ from their mean by 1 each."""
    mask = torch.tensor([[True, True], [True, False]])
    advantages = size * torch.tensor([[1.0, 3.0], [2.0, 7.0]])
    assert share_within(advantages, mask) == pytest.approx(2 / 14)
    assert share_within(torch.zeros(2, 2), mask) == 0.0


TEXT = "The fox asked the old owl: what? The sun. 3 + 4 = 7; said the user"


@pytest.mark.parametrize("macro", MACROS)
def test_macro_actions_are_where_they_are_said_to_be(macro):
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(TEXT)["input_ids"], tokenizer("moon")["input_ids"]]
    mask = own_tokens(ids, None, len(ids[0]) + 2, "cpu")
    logprobs = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    args = SimpleNamespace(credit="macro", macro=macro, macro_length=4)
    units = units_of(Completions(ids, mask, logprobs), args, tokenizer)
    pieces = [tokenizer.decode([i]) for i in ids[0]]
    starts = [len("".join(pieces[:t])) for t in range(len(pieces))]
    firsts = [at + len(x) - len(x.lstrip()) for at, x in zip(starts, pieces, strict=True)]
    until = [TEXT[: first + 1] for first in firsts]
    found = units[0, : len(pieces)].tolist()
    if macro == "random":
        lengths = [len(list(run)) for _, run in itertools.groupby(found)]
        assert set(lengths[:-1]) <= {2, 3, 5, 10}
        return
    falls = logprobs[0].diff()[: len(pieces) - 1] < 0
    expected = {
        "ngram": [t // 4 for t in range(len(pieces))],
        "word": [len(x.split()) - 1 for x in until],
        "sentence": [len(re.findall(r"[.?] ", x)) for x in until],
        "perplexity": [0, *falls.long().cumsum(0).tolist()],
    }
    assert found == expected[macro]
    assert found[-1] > 2 or macro == "sentence"


def test_kl_in_the_reward_is_that_of_the_tokens(policy, tmp_path):
    """RED, Eq. 8: beta times the difference of log-probs, by token; none of it in the loss."""
    options = {"beta": 0.5, "learning_rate": 0.05}
    trainer, *_ = train(
        tmp_path, policy, Seen, credit="returns", kl_in_reward=True, **options, **readable()
    )
    _, ids, output = trainer.seen[-1]
    logps, ref = trainer.logps_seen[-1], output["ref_per_token_logps"]
    rewards = []
    for i, row in enumerate(ids):
        own = [-0.5 * (logps[i, t] - ref[i, t]).item() for t in range(len(row))]
        own[-1] += vowels([tiny_tokenizer().decode([x for x in row if x != 1])])[0]
        rewards.append(own)
    assert max(abs(x) for row in rewards for x in row[:-1]) > 1e-3  # it has moved
    for row, values in zip(output["advantages"], advantages_by_hand(rewards, 1.0), strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values), atol=1e-4, rtol=1e-4)
    assert "kl" not in trainer.state.log_history[0]
    moved = [(logps[i, t] - ref[i, t]).item() for i, row in enumerate(ids) for t in range(len(row))]
    logged = [x["credit/kl"] for x in trainer.state.log_history if "credit/kl" in x]
    assert logged[-1] == pytest.approx(sum(moved) / len(moved), abs=1e-4)
    assert abs(logged[-1]) > 1e-3


# -- what is refused, and what comes at the edges

REFUSED = [
    ({"credit": "token"}, "credit: expected one of sequence, returns, gae, macro, got 'token'"),
    ({"macro": "parse"}, "macro: expected one of ngram, random, perplexity, word, sentence"),
    ({"credit_baseline": "mean"}, "credit_baseline: expected one of "),
    ({"credit_scale": "std"}, "credit_scale: expected one of "),
    ({"credit_lambda": 1.5}, r"credit_lambda: expected a number in \[0, 1\], got 1.5"),
    ({"credit_gamma": float("nan")}, "credit_gamma: expected a finite number"),
    ({"macro_length": 0}, "macro_length: expected a whole number >= 1, got 0"),
    ({"credit": "gea"}, "got 'gea'; did you mean 'gae'"),
    ({"credit_scale": "std"}, "one of group, batch, tokens, none, or None for scale_rewards, got"),
    ({"credit": "gae", "macro": "word"}, "macro: expected 'ngram', its default, where credit is"),
    ({"token_rewards": "redistributed"}, "^token_rewards: .* did you mean 'redistribution'"),
    (
        {"token_rewards": "redistribution", "token_rewards_options": {"modle": "x"}},
        r"^token_rewards_options\.modle: .* did you mean 'model'",
    ),
    ({"token_rewards_model": "x"}, "token_rewards_model: expected None without token_rewards"),
    ({"token_rewards": "redistribution"}, "model"),
    ({"token_rewards": "messagewise"}, "token_weights"),
    ({"credit": "gae", "multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
    ({"credit": "gae", "kl_in_reward": True}, "kl_in_reward: expected False with .* beta=0"),
    (
        {"kl_in_reward": True, "beta": 0.1, "credit": "gae", "mask_truncated_completions": True},
        "mask_truncated_completions: expected False with kl_in_reward",
    ),
    (
        {"credit": "macro", "macro": "perplexity", "mask_truncated_completions": True},
        "mask_truncated_completions: expected False .*'perplexity'",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_options_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TRegGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def red(path=None, **options):
    return {
        "token_rewards": "redistribution",
        "token_rewards_options": {"model": path or judge("llama")} | options,
        "reward_funcs": None,
    }


def test_a_source_without_its_reference_is_refused(policy, tmp_path):
    with pytest.raises(
        ValueError, match="token_rewards: expected a source that needs no reference"
    ):
        train(tmp_path, policy, token_rewards="contrastive", reward_funcs=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"token_rewards": "surprise", "token_rewards_model": "/no/such"},
            "^token_rewards_model: no such folder: /no/such",
        ),
        (
            {
                "token_rewards": "redistribution",
                "token_rewards_options": {"model": "/no/such"},
            },
            r"^token_rewards_options\.model: no such folder: /no/such",
        ),
        ({}, "reward_funcs: expected at least one where token_rewards is None, got none"),
    ],
    ids=["reference", "judge", "neither"],
)
def test_what_cannot_be_loaded_is_said_by_the_names_of_the_config(
    options, message, policy, tmp_path
):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, policy, reward_funcs=None, **options)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_data_without_prompts_are_refused_before_training(name, policy, tmp_path):
    data = {"train_dataset": Dataset.from_list([{"prompt": "a"}])}
    data[name] = Dataset.from_list([{"question": "a"}])
    config = TRegGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"{name}: expected a column 'prompt', .* got question"):
        TRegGRPOTrainer(policy, vowels, config, **data)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("rows", [{}, {"prompt": []}], ids=["no columns", "no rows"])
def test_data_without_rows_are_refused_before_training(name, rows, policy, tmp_path):
    data = {"train_dataset": Dataset.from_list([{"prompt": "a"}])}
    data[name] = Dataset.from_dict(rows)
    config = TRegGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    message = f"{name}: expected rows with a prompt, got a dataset of 0 rows"
    with pytest.raises(ValueError, match=message):
        TRegGRPOTrainer(policy, vowels, config, **data)


@pytest.mark.parametrize("reference", ["its own", "a folder", "below an adapter"])
def test_a_source_takes_the_reference_that_there_is(reference, policy, tmp_path):
    more = {
        "its own": {"beta": 0.1},
        "a folder": {"token_rewards_model": policy},
        "below an adapter": {"peft_config": LoraConfig(target_modules=["q_proj"])},
    }[reference]
    trainer, *_ = train(
        tmp_path, policy, Seen, token_rewards="surprise", reward_funcs=None, **more, **readable()
    )
    (first, *_) = trainer.seen
    assert trainer.state.log_history[0]["rewards/surprise/std"] > 0
    assert first[2]["advantages"].isfinite().all() and first[2]["advantages"].abs().max() > 0.1


def test_tools_are_refused_with_token_rewards(policy, tmp_path):
    trainer_of = functools.partial(TRegGRPOTrainer, policy, None)
    config = TRegGRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        token_rewards="redistribution",
        token_rewards_options={"model": judge("llama")},
    )
    with pytest.raises(ValueError, match="tools: expected None with token_rewards"):
        trainer_of(config, Dataset.from_list([{"prompt": "a"}]), tools=[len])
    with pytest.raises(TypeError, match="args: expected a TRegGRPOConfig, got GRPOConfig"):
        trainer_of(GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_logits_that_are_cast_are_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32: expected False"):
        make_trainer(tmp_path, policy, cast_lm_head_to_fp32=True)


@pytest.mark.parametrize("prompts", [PROMPTS, [[usr(x)] for x in PROMPTS]], ids=["text", "turns"])
def test_completions_that_are_empty_cut_or_garbage_train(prompts, tmp_path_factory, tmp_path):
    """A policy that often ends at once, whose other tokens are bytes of no character."""
    model = tiny_llama(VOCAB)
    model.generation_config.eos_token_id = model.config.eos_token_id = 1
    with torch.no_grad():
        model.lm_head.weight[1] *= 4.0
    folder = tmp_path_factory.mktemp("ends")
    model.save_pretrained(folder)
    trainer, gradients, _ = train(
        tmp_path, str(folder), Seen, prompts=prompts, max_steps=8, temperature=1.5, **red()
    )
    lengths = [len(row) for _, ids, _ in trainer.seen for row in ids]
    ended = [row[-1] == 1 for _, ids, _ in trainer.seen for row in ids]
    assert 1 in lengths and WIDTH in lengths and any(ended) and not all(ended)
    assert all(x.isfinite().all() for step in gradients for x in step.values())
    assert all(output["advantages"].isfinite().all() for *_, output in trainer.seen)


def test_a_completion_that_is_too_long_for_the_reward_model_has_no_advantage(
    policy, tmp_path, caplog
):
    path, long = judge("llama", max_position_embeddings=100), "the old owl " * 60
    trainer, *_ = train(
        *(tmp_path, policy, Seen),
        prompts=["a fox", long],
        credit="returns",
        max_steps=1,
        **red(path),
        **readable(),
    )
    ((prompts, _, output),) = trainer.seen
    assert set(prompts) == {"a fox", long}
    for row, prompt in zip(output["advantages"], prompts, strict=True):
        assert bool(row.any()) == (prompt == "a fox")
    assert trainer.state.log_history[0]["credit/refused"] == 0.5
    assert "answer too long for the reward model" in caplog.text


def test_what_a_source_refuses_has_no_part_in_sequence_credit_either(policy, tmp_path):
    """Another function scores it, so that TRL alone would compare that score with whole sums."""
    trainer, *_ = train(
        *(tmp_path, policy, Seen),
        max_steps=1,
        credit="sequence",
        prompts=PROMPTS[:2],
        **red(judge("llama", max_position_embeddings=14)) | {"reward_funcs": [vowels]},
        **readable(),
    )
    ((_, _, output),) = trainer.seen
    column = trainer.reward_funcs.index(trainer._rewards)
    judged = torch.tensor([x is not None for x in trainer._rewards.found]).view(-1, GROUP)
    advantages = output["advantages"].view(-1, GROUP)
    assert judged.any() and not judged.all()
    assert not advantages[~judged].any()
    sums = advantages.new_tensor(
        [
            float("nan") if x is None else x.double().sum().item() + y
            for x, y in zip(
                trainer._rewards.found,
                vowels(trainer.processing_class.batch_decode(trainer._generated[1])),
                strict=True,
            )
        ]
    ).view(-1, GROUP)
    assert trainer._rewards_per_func[:, column].isnan().tolist() == (~judged).flatten().tolist()
    for found, row, kept in zip(advantages, sums, judged, strict=True):
        mine = row[kept]
        size = mine.std() if len(mine) > 1 else torch.zeros(())
        expected = (mine - mine.mean()) / (size + 1e-4)
        torch.testing.assert_close(found[kept], expected, atol=1e-4, rtol=1e-4)


def test_weights_are_those_of_the_rewards(policy, tmp_path):
    """The source's is one more; credit="sequence" is TRL's own step on the sums."""

    def sums(prompts, completion_ids, **_):
        return [sum(row) for row in red_by_hand(judge("llama"), prompts, completion_ids)]

    # one step: after it the two policies are as far apart as roundings make them
    options = {"reward_weights": [0.5], "beta": 0.1, "max_steps": 1} | readable()
    given = red() | {"reward_funcs": [vowels], "token_rewards_weight": 2.0, "credit": "sequence"}
    found = train(tmp_path, policy, **options | given)
    options["reward_weights"] = [0.5, 2.0]
    expected = train(tmp_path, policy, GRPOTrainer, **options, reward_funcs=[vowels, sums])
    assert_same_steps(found, expected, 1e-4)


def test_evaluation_has_a_loss(policy, tmp_path):
    rows = Dataset.from_list([{"prompt": x} for x in PROMPTS])
    trainer, _ = make_trainer(
        tmp_path,
        policy,
        eval_dataset=rows,
        per_device_eval_batch_size=1,
        num_generations_eval=1,
        **red(),
        **readable(),
    )
    found = trainer.evaluate()
    assert math.isfinite(found["eval_loss"]) and found["eval_credit/refused"] == 0.0
    assert len(trainer._logs["advantages"]) == len(trainer._logs["completion"])


def test_a_group_that_lies_in_two_processes_has_one_baseline(policy, tmp_path):
    """Two completions of a prompt in each of two processes; the completions differ in width too."""
    path = judge("llama")
    processes.run(online_worker.__file__, tmp_path, policy, path, ranks=2)
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    prompts, ids, advantages = (
        [row for x in seen for row in x[name]] for name in ("prompts", "ids", "advantages")
    )
    assert len(set(prompts)) == 1 and len(set(map(tuple, ids))) == GROUP
    expected = advantages_by_hand(red_by_hand(path, prompts, ids), 0.9)
    for row, values in zip(advantages, expected, strict=True):
        assert row[: len(values)] == pytest.approx(values, abs=2e-4)


def test_token_rewards_and_others_are_weighted_and_discounted(policy, tmp_path):
    """gamma times lambda is the discount of what follows; the other reward is at the end."""
    given = {"token_rewards_weight": 2.0, "reward_weights": [0.5], "reward_funcs": [vowels]}
    credit = {"credit": "gae", "credit_gamma": 0.8, "credit_lambda": 0.5, "credit_scale": "none"}
    trainer, *_ = train(
        *(tmp_path, policy, Seen),
        **red() | given | credit | readable(),
        credit_baseline="none",
        max_steps=1,
    )
    ((prompts, ids, output),) = trainer.seen
    rewards = [[2.0 * x for x in row] for row in red_by_hand(judge("llama"), prompts, ids)]
    said = [{"content": tiny_tokenizer().decode([x for x in row if x != 1])} for row in ids]
    for row, score in zip(rewards, vowels([[x] for x in said]), strict=True):
        row[-1] += 0.5 * score
    expected = [
        [sum(0.4**k * x for k, x in enumerate(row[t:])) for t in range(len(row))] for row in rewards
    ]
    for row, values in zip(output["advantages"], expected, strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values), atol=2e-4, rtol=1e-4)
    # the table of completions has their means
    means = [sum(values) / len(values) for values in expected]
    assert list(trainer._logs["advantages"]) == pytest.approx(means, abs=2e-4)


@dataclass(frozen=True)
class BonusOptions:
    pass


class Bonus:
    """A source that gives each token the number in a column; it refuses the negative ones."""

    Options: ClassVar[type] = BonusOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)
    seen: ClassVar[list] = []

    def __init__(self, options, context):
        pass

    def settings(self):
        return {}

    def check(self, response):
        negative = response.row["bonus"] < 0
        return RowProblem("negative bonus", "it is below 0") if negative else None

    def score(self, responses):
        self.seen.extend(responses)
        return [
            {"token_rewards": torch.full((len(x.ids),), float(x.row["bonus"]))} for x in responses
        ]


def test_a_source_sees_columns_and_the_template_and_may_refuse_what_others_score(policy, tmp_path):
    rows = [{"prompt": [usr(x)], "bonus": 0.5 - i} for i, x in enumerate(PROMPTS[:2])]
    Bonus.seen.clear()
    trainer, *_ = train(
        *(tmp_path, policy, Seen),
        rows=rows,
        token_rewards=f"{__name__}:Bonus",
        reward_funcs=[vowels],
        credit="returns",
        credit_baseline="group",
        chat_template_kwargs={"style": "brief"},
        max_steps=1,
        **readable(),
    )
    ((prompts, ids, output),) = trainer.seen
    assert {x.template_kwargs["style"] for x in Bonus.seen} == {"brief"}
    scored = [prompt == rows[0]["prompt"] for prompt in prompts]
    assert sum(scored) == len(Bonus.seen) == GROUP
    for row, fine in zip(output["advantages"], scored, strict=True):
        assert bool(row.any()) == fine
    first = next(i for i, fine in enumerate(scored) if fine)
    assert Bonus.seen[0].ids.tolist() == list(ids[first])


class EveryThird(Bonus):
    """Refuses every third completion."""

    def check(self, response):
        self.asked = getattr(self, "asked", 0) + 1
        return RowProblem("third", "it is one of them") if self.asked % 3 == 0 else None


def test_what_a_source_refuses_has_no_part_in_the_baseline(policy, tmp_path):
    rows = [{"prompt": x, "bonus": 0.25} for x in PROMPTS[:2]]
    trainer, *_ = train(
        *(tmp_path, policy, Seen),
        rows=rows,
        token_rewards=f"{__name__}:EveryThird",
        reward_funcs=[vowels],
        credit="returns",
        credit_baseline="group",
        credit_scale="none",
        max_steps=1,
        **readable(),
    )
    ((_, ids, output),) = trainer.seen
    fine = [i for i in range(2 * GROUP) if (i + 1) % 3]
    rewards = [[0.25] * len(row) for row in ids]
    for row, said in zip(rewards, ids, strict=True):
        row[-1] += vowels([tiny_tokenizer().decode([x for x in said if x != 1])])[0]
    for i in range(2 * GROUP):
        group = [sum(rewards[k]) for k in fine if k // GROUP == i // GROUP]
        mean = sum(group) / len(group)
        expected = [sum(rewards[i][t:]) - mean if i in fine else 0.0 for t in range(len(ids[i]))]
        found = output["advantages"][i]
        torch.testing.assert_close(found[: len(ids[i])], torch.tensor(expected))
        assert not found[len(ids[i]) :].any()


def test_tokens_of_tools_are_not_the_policys():
    mask = own_tokens([[5, 6, 7], [8]], [[1, 0, 1], [1]], 4, "cpu")
    assert mask.tolist() == [[True, False, True, False], [True, False, False, False]]


def test_perplexity_is_the_references_where_there_is_one():
    mask = torch.ones(1, 3, dtype=torch.bool)
    falls, rises = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-3.0, -2.0, -1.0]])
    args = SimpleNamespace(credit="macro", macro="perplexity")
    given = Completions([[5, 6, 7]], mask, rises)
    assert units_of(given, args, None).tolist() == [[0, 0, 0]]
    assert units_of(replace(given, ref_logprobs=falls), args, None).tolist() == [[0, 1, 2]]


def test_weights_of_another_number_of_rewards_are_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="reward_weights: expected 1, one for each of reward_f"):
        make_trainer(
            tmp_path, policy, **red() | {"reward_funcs": vowels}, reward_weights=[1.0, 2.0]
        )


class Drawing(Bonus):
    """It draws from the random numbers of the process when it is loaded."""

    def __init__(self, options, context):
        torch.rand(7)


def test_a_source_that_draws_when_it_is_loaded_changes_no_sample(policy, tmp_path):
    rows = [{"prompt": x, "bonus": 0.25} for x in PROMPTS[:2]]
    given = {"rows": rows, "reward_funcs": [vowels], "max_steps": 1}
    samples = []
    for kind in ("Bonus", "Drawing"):
        source = f"{__name__}:{kind}"
        trainer, *_ = train(tmp_path, policy, Seen, token_rewards=source, **given)
        samples.append(trainer.seen[0][1])
    assert samples[0] == samples[1]


def test_an_infinite_reward_is_refused_by_the_name_of_its_function(policy, tmp_path):
    def endless(completions, **_):
        return [float("inf"), *[None] * (len(completions) - 1)]

    message = "reward_funcs: expected finite numbers or None, got inf from 'endless'"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, policy, credit="gae", reward_funcs=[vowels, endless])
