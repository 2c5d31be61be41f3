"""Token rewards in OpenRLHF's online training: against its own advantages and numbers by formula.

Runs against OpenRLHF itself where it can be imported. Elsewhere a stub stands in, with the methods
and order of calls of OpenRLHF 0.11.2: trainer/ppo_utils/experience_maker.py, models/utils.py.
"""

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from beginnings import expected
from judges import judge, judge_tokenizer
from tiny import tiny_tokenizer

from treg.integrations import openrlhf as integration
from treg.integrations.openrlhf import online
from treg.integrations.sampled import SampledRewards
from treg.rl import gae

try:
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    REAL = True
except ImportError:
    REAL = False

    class RemoteExperienceMaker:
        def __init__(self, actor, critic, reward, initial, kl_controller, strategy, tokenizer):
            self.args, self.strategy = strategy.args, strategy
            self.advantage_estimator = strategy.args.algo.advantage.estimator
            self.tokenizer, self.kl_ctl = tokenizer, kl_controller

        def compute_advantages_and_returns(self, experiences):
            args, name = self.args, self.advantage_estimator
            for experience in experiences:
                experience.rewards = experience.rewards.float()
                coefficient = getattr(args.reward, "stop_properly_penalty_coef", None)
                if coefficient is not None:
                    experience.rewards[experience.truncated] = coefficient
            lengths = [len(x.index) for x in experiences]
            indices = torch.tensor([i for x in experiences for i in x.index])
            raw = torch.cat([x.rewards for x in experiences])
            rewards = torch.empty_like(raw)
            rewards[indices] = raw
            rewards = rewards.reshape(-1, args.rollout.n_samples_per_prompt)
            if name == "rloo":
                others = args.rollout.n_samples_per_prompt - 1
                rewards = rewards - (rewards.sum(-1, keepdim=True) - rewards) / others
            elif name in ("reinforce_baseline", "dr_grpo"):
                rewards = rewards - rewards.mean(-1, keepdim=True)
            elif name == "flash_reinforce":
                rewards = rewards - rewards.mean()
            rewards = rewards.reshape(-1)[indices].split(lengths)
            for experience, reward in zip(experiences, rewards, strict=True):
                mask = experience.action_mask
                last = mask.size(1) - 1 - mask.long().fliplr().argmax(1, keepdim=True)
                placed = torch.zeros_like(experience.kl).scatter_(1, last, reward[:, None])
                placed = placed - self.kl_ctl.value * experience.kl
                if name == "gae":
                    experience.advantages, experience.returns = self.get_advantages_and_returns(
                        experience.values,
                        placed,
                        mask,
                        args.algo.advantage.gamma,
                        args.algo.advantage.lambd,
                    )
                else:
                    experience.returns = self.get_cumulative_returns(
                        placed, mask, args.algo.advantage.gamma
                    )
                    experience.advantages = experience.returns.clone()
            if name in ("gae", "reinforce", "reinforce_baseline"):
                every = torch.cat([x.advantages.flatten() for x in experiences])
                mask = torch.cat([x.action_mask.flatten() for x in experiences])
                mean = (every * mask).sum() / mask.sum()
                variance = ((every - mean).square() * mask).sum() / mask.sum()
                for experience in experiences:
                    experience.advantages = (experience.advantages - mean) * variance.rsqrt()
            return experiences

        def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
            values, rewards = action_mask * values, action_mask * rewards
            following, last, found = 0.0, 0.0, []
            for t in reversed(range(rewards.shape[1])):
                last = rewards[:, t] + gamma * following - values[:, t] + gamma * lambd * last
                following = values[:, t]
                found.append(last)
            advantages = torch.stack(found[::-1], 1)
            return advantages, advantages + values

        def get_cumulative_returns(self, rewards, action_mask, gamma):
            rewards, after, found = action_mask * rewards, 0.0, []
            for t in reversed(range(rewards.shape[1])):
                after = rewards[:, t] + gamma * after
                found.append(after)
            return torch.stack(found[::-1], 1)


TOKENIZER = tiny_tokenizer()
PROMPT = "<|im_start|>user\nwhat is better?<|im_end|>\n<|im_start|>assistant\n"
TEXTS = ["the owl", "it is the sun", "no", "the moon, said the fox", "42", "the answer is 42"]
SCORES = [0.5, -1.0, 2.0, 0.0, 1.0, -0.5]
KL_COEF = 0.1


def ids_of(text, end=True):
    return TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] * end


def experience(texts, index, end=True):
    """As OpenRLHF has it: padded on the right; action_mask is of the tokens one further right."""
    prompt = ids_of(PROMPT, end=False)
    rows = [torch.tensor(prompt + ids_of(text, end)) for text in texts]
    sequences = torch.nn.utils.rnn.pad_sequence(rows, True, TOKENIZER.pad_token_id)
    attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in rows], True)
    action = attention[:, 1:].clone()
    action[:, : len(prompt) - 1] = 0
    generator = torch.Generator().manual_seed(len(texts[0]))
    kl, values = torch.randn(2, *action.shape, generator=generator)
    return SimpleNamespace(
        sequences=sequences,
        attention_mask=attention,
        action_mask=action,
        kl=kl,
        values=values,
        rewards=torch.tensor([SCORES[i] for i in index]),
        index=list(index),
        prompts=[PROMPT] * len(texts),
        images=[None] * len(texts),
        truncated=torch.zeros(len(texts), dtype=torch.bool),
        response_length=action.sum(1),
        info={},
    )


def experiences():
    """Three answers to each of two prompts, in two micro batches, shuffled as by length."""
    return [experience([TEXTS[i] for i in index], index) for index in ((3, 0, 4), (5, 1, 2))]


def strategy(estimator="rloo", gamma=1.0, **reward):
    advantage = SimpleNamespace(estimator=estimator, gamma=gamma, lambd=0.9, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=3, max_new_tokens=64),
        reward=SimpleNamespace(clip_range=None, **reward),
    )
    return SimpleNamespace(args=args)


def make_maker(options, estimator="rloo", *, base=RemoteExperienceMaker, **how):
    kind = base if options is None else integration.make_experience_maker(base, options)
    controller = SimpleNamespace(value=KL_COEF)
    return kind(None, None, None, None, controller, strategy(estimator, **how), TOKENIZER)


def numbers(response):
    """Token rewards that differ: of the ids alone."""
    return torch.tensor([((int(i) * 37) % 11) / 10 - 0.4 for i in response.ids])


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setattr(SampledRewards, "__call__", lambda self, response: numbers(response))
    return integration.OnlineOptions(rewards="constant", alpha=0.5)


def placed(one):
    """alpha * rhat at the tokens of an experience, [B, A] float64."""
    found = torch.zeros(one.action_mask.shape, dtype=torch.float64)
    for row, mask in zip(range(len(found)), one.action_mask.bool(), strict=True):
        ids = one.sequences[row, 1:][mask]
        found[row, mask] = 0.5 * numbers(SimpleNamespace(ids=ids)).double()
    return found


LINEAR = ["rloo", "reinforce_baseline", "dr_grpo", "flash_reinforce", "reinforce", "gae"]


@pytest.mark.parametrize("score", [True, False])
@pytest.mark.parametrize("estimator", LINEAR)
def test_advantages_by_formula(estimator, score, given):
    """r_t = alpha rhat_t - kl_coef kl_t, at the end + score - b; b is of score + sum alpha rhat."""
    options = integration.OnlineOptions(rewards="constant", alpha=0.5, score=score)
    batch = experiences()
    rewards, total = [placed(x) for x in batch], torch.zeros(6, dtype=torch.float64)
    for one, row in zip(batch, rewards, strict=True):
        total[one.index] = row.sum(1) + (one.rewards.double() if score else 0.0)
    groups = total.reshape(2, 3)
    baseline = {
        "rloo": (groups.sum(1, keepdim=True) - groups) / 2,
        "flash_reinforce": groups.mean().expand(2, 3),
    }.get(estimator, groups.mean(1, keepdim=True).expand(2, 3))
    if estimator in ("reinforce", "gae"):
        baseline = torch.zeros(2, 3)
    wanted = []
    for one, row in zip(batch, rewards, strict=True):
        mask = one.action_mask.bool()
        r = (row - KL_COEF * one.kl.double()) * mask
        last = mask.size(1) - 1 - mask.long().fliplr().argmax(1)
        scores = one.rewards.double() if score else torch.zeros(len(r))
        r[range(len(r)), last] += scores - baseline.reshape(-1)[one.index]
        if estimator == "gae":
            wanted.append(gae(r, one.values.double(), lam=0.9, mask=mask).advantages)
        else:
            wanted.append(r.flip(1).cumsum(1).flip(1) * mask)
    if estimator in ("reinforce", "reinforce_baseline", "gae"):
        every = torch.cat([a[x.action_mask.bool()] for a, x in zip(wanted, batch, strict=True)])
        mean, std = every.mean(), every.std(correction=0)
        wanted = [(a - mean) / std for a in wanted]
    found = make_maker(options, estimator).compute_advantages_and_returns(batch)
    for one, advantages in zip(found, wanted, strict=True):
        mask = one.action_mask.bool()
        torch.testing.assert_close(
            one.advantages[mask].double(), advantages[mask], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("estimator", LINEAR)
def test_rewards_at_the_end_are_openrlhfs_own(estimator, monkeypatch):
    """A token reward that stands where the score does is more of the score."""

    def at_end(self, response):
        return torch.eye(len(response.ids))[-1] * response.ids[0]

    monkeypatch.setattr(SampledRewards, "__call__", at_end)
    batch, plain = experiences(), experiences()
    for one in plain:
        first = one.action_mask.long().argmax(1) + 1
        one.rewards = one.rewards + 0.5 * one.sequences[range(3), first]
    options = integration.OnlineOptions(rewards="constant", alpha=0.5)
    found = make_maker(options, estimator).compute_advantages_and_returns(batch)
    wanted = make_maker(None, estimator).compute_advantages_and_returns(plain)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.advantages, other.advantages)
        torch.testing.assert_close(one.rewards, other.rewards)


def test_penalties_are_of_the_sum(given):
    """A response that was cut has the reward that OpenRLHF gives it, whatever its tokens have."""
    batch = experiences()
    batch[0].truncated[1] = True
    maker = make_maker(given, "reinforce", stop_properly_penalty_coef=-0.5)
    seen = []
    inner = RemoteExperienceMaker.get_cumulative_returns

    def watched(self, rewards, *args, **kwargs):
        seen.append(rewards.clone())
        return inner(self, rewards, *args, **kwargs)

    maker.kl_ctl.value = 0.0
    kind = type(maker)._treg_base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "get_cumulative_returns", watched)
        maker.compute_advantages_and_returns(batch)
    sums = placed(experiences()[0]).sum(1)
    assert seen[0][1].sum().item() == pytest.approx(-0.5, abs=1e-5)
    assert seen[0][0].sum().item() == pytest.approx(SCORES[3] + sums[0].item(), abs=1e-5)


@pytest.mark.parametrize("end", [True, False], ids=["ended", "cut"])
@pytest.mark.parametrize("beta_c", [1.0, 0.5])
def test_redistribution(beta_c, end):
    """Plain text, as OpenRLHF's prompts are; by separate forwards of the reward model."""
    path = judge("llama", judge_tokenizer)
    options = integration.OnlineOptions(
        rewards="redistribution",
        rewards_options={"model": path, "beta_c": beta_c},
        score=False,
        device="cpu",
    )
    one = experience(TEXTS[:2], (0, 1), end)
    sampled = SampledRewards(options, TOKENIZER)
    shifts = online._with_token_rewards(one, sampled)
    for row in range(2):
        places = one.action_mask[row].nonzero().flatten()
        response = SimpleNamespace(
            prompt=PROMPT,
            text=TEXTS[row],
            prompt_ids=np.array(ids_of(PROMPT, end=False)),
            ids=np.array(ids_of(TEXTS[row], end)),
            tokenizer=TOKENIZER,
            content=len(ids_of(TEXTS[row], end=False)),
        )
        wanted, whole, empty = expected(path, response, beta_c=beta_c)
        total = beta_c * (whole - empty) + (1 - beta_c) * whole
        assert one.rewards[row].item() == pytest.approx(total, abs=1e-4)
        assert one.info["token_reward"][row].item() == pytest.approx(total, abs=1e-4)
        found = shifts[row].clone()
        found[places[-1]] += one.rewards[row]
        np.testing.assert_allclose(found[places], wanted, atol=1e-4)
        assert not np.delete(shifts[row].numpy(), places).any()


def test_refused_responses(given, monkeypatch, caplog):
    monkeypatch.undo()
    one = experience(TEXTS[:2], (0, 1))
    one.action_mask[1] = 0
    sampled = SampledRewards(integration.OnlineOptions(rewards="constant"), TOKENIZER)
    with pytest.raises(ValueError, match="got empty response: it has no token"):
        online._with_token_rewards(one, sampled)
    options = integration.OnlineOptions(rewards="constant", refused="zero", alpha=1.0)
    one = experience(TEXTS[:2], (0, 1))
    one.action_mask[1] = 0
    shifts = online._with_token_rewards(one, SampledRewards(options, TOKENIZER))
    assert shifts[0].any() and not shifts[1].any() and one.rewards[1] == SCORES[1]
    assert one.info["token_reward_refused"].tolist() == [0.0, 1.0]


def test_experiences_that_are_refused(given):
    sampled = SampledRewards(given, TOKENIZER)
    turns = experience(TEXTS[3:5], (0, 1))
    turns.action_mask[0, turns.action_mask[0].long().argmax() + 1] = 0
    with pytest.raises(ValueError, match="action_mask: expected a single answer"):
        online._with_token_rewards(turns, sampled)
    seen = experience(TEXTS[:1], (0,))
    seen.images = ["a.png"]
    with pytest.raises(ValueError, match="prompts: expected text without images"):
        online._with_token_rewards(seen, sampled)
    wide = experience(TEXTS[:2], (0, 1))
    wide.rewards = wide.rewards[:, None]
    with pytest.raises(ValueError, match=r"rewards: expected \[2\], one number .* got \[2, 1\]"):
        online._with_token_rewards(wide, sampled)


RED = {"rewards": "redistribution", "rewards_options": {"model": "a"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RED, r"score: expected True or False with rewards='redistribution', .* got None"),
        ({"rewards": "contrastive"}, "model: expected a model that judges responses"),
        ({"rewards": "constant", "score": "no"}, "score: expected True, False or None"),
        ({"rewards": "constant", "alpha": -1}, "alpha: expected a number >= 0"),
        ({"rewards": "messagewise"}, "no token_weights, got 'messagewise'"),
    ],
)
def test_options_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        integration.install_online(**options)


def test_makers_that_are_refused(given):
    with pytest.raises(ValueError, match=r"estimator: expected .* got group_norm; dr_grpo is"):
        make_maker(given, "group_norm")
    with pytest.raises(TypeError, match=r"got Other without .*get_cumulative_returns"):
        integration.make_experience_maker(type("Other", (), {}), given)


# -- processes of Ray


def test_ray_is_told_before_it_starts(monkeypatch, tmp_path):
    """Its processes patch OpenRLHF's trainer when they import it."""
    started = []
    ray = ModuleType("ray")
    ray.is_initialized = lambda: bool(started)
    ray.init = lambda **given: started.append(given)
    monkeypatch.setitem(sys.modules, "ray", ray)
    integration.install_online(rewards="random")
    integration.install_online(rewards="constant")
    with pytest.raises(ValueError, match="runtime_env: expected no worker_process_setup_hook"):
        ray.init(runtime_env={"worker_process_setup_hook": "a.b"})
    ray.init(runtime_env={"env_vars": {"A": "1"}}, num_cpus=2)
    assert len(started) == 1 and started[0]["num_cpus"] == 2
    assert started[0]["runtime_env"]["env_vars"] == {"A": "1"}
    with pytest.raises(RuntimeError, match="ray: expected it to start later"):
        integration.install_online(rewards="constant")

    for name in [x for x in sys.modules if x.split(".")[0] == "openrlhf"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "openrlhf" / "trainer"
    package.mkdir(parents=True)
    methods = "".join(f"    def {name}(self): pass\n" for name in online.METHODS)
    (package / "ppo_trainer.py").write_text(f"class RemoteExperienceMaker:\n{methods}")
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    hook = started[0]["runtime_env"]["worker_process_setup_hook"]
    hook()
    assert online.TRAINER not in sys.modules
    trainer = importlib.import_module(online.TRAINER)
    assert trainer.RemoteExperienceMaker.__name__ == "TRegExperienceMaker"
    base = trainer.RemoteExperienceMaker._treg_base
    hook()  # in a process that has it already, and again
    assert trainer.RemoteExperienceMaker._treg_base is base
    for name in [x for x in sys.modules if x.split(".")[0] == "openrlhf"]:
        monkeypatch.delitem(sys.modules, name)


def test_example(monkeypatch):
    ray, ran = ModuleType("ray"), []
    ray.is_initialized = lambda: False
    ray.init = before = lambda **given: None
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(runpy, "run_module", lambda name, **how: ran.append(name))
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "openrlhf_online.py"))
    assert ran == ["openrlhf.cli.train_ppo_ray"] and ray.init is not before


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="openrlhf: expected OpenRLHF to be installed with Ray"):
        integration.install_online(rewards="constant")
