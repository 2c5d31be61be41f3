"""verl as far as treg sees it: itself where it can be imported, else a stand-in.

The stand-in has the signatures, layouts and order of calls of verl 0.9.1:
utils/kernel/linear_cross_entropy.py, models/transformers/dense_common.py,
experimental/reward_loop/reward_manager (base.py, naive.py), experimental/agent_loop/agent_loop.py,
trainer/ppo (core_algos.py, ray_trainer.py), protocol.py.
"""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

try:
    import verl  # noqa: F401

    REAL = True
except ImportError:
    REAL = False

KERNEL = "verl.utils.kernel.linear_cross_entropy"
MANAGERS = "verl.experimental.reward_loop.reward_manager"
AGENT_LOOP = "verl.experimental.agent_loop.agent_loop"
# needs Megatron; what matters here is that it imports by value
FUSED = "verl.models.mcore.model_forward_fused"
CORE, TRAINER = "verl.trainer.ppo.core_algos", "verl.trainer.ppo.ray_trainer"


def stub_modules() -> dict[str, ModuleType]:
    """verl as far as treg sees it."""
    pydantic = pytest.importorskip("pydantic")

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
        ):
            raise AssertionError("verl's own kernel needs a GPU")

    class NaiveRewardManager:
        def __init__(
            self,
            config,
            tokenizer,
            compute_score,
            reward_router_address=None,
            reward_model_tokenizer=None,
        ):
            self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score

        async def run_single(self, data):
            item = data[-1:][0]
            width = item.batch["responses"].shape[-1]
            length = item.batch["attention_mask"][-width:].sum()
            score = self.compute_score(
                data_source=item.non_tensor_batch["data_source"],
                solution_str=self.tokenizer.decode(
                    item.batch["responses"][:length], skip_special_tokens=True
                ),
                ground_truth=item.non_tensor_batch["reward_model"]["ground_truth"],
                extra_info=item.non_tensor_batch.get("extra_info", {}),
            )
            return {"reward_score": score, "reward_extra_info": {"acc": score}}

    class AgentLoopOutput(pydantic.BaseModel):
        prompt_ids: list[int]
        response_ids: list[int]
        response_mask: list[int]
        reward_score: float | None = None
        metrics: dict

        def as_dict(self):
            output = self.model_dump(exclude_unset=True)
            for name, source in (("prompts", "prompt_ids"), ("responses", "response_ids")):
                output[name] = torch.tensor(output.pop(source), dtype=torch.int64)
            output["response_mask"] = torch.tensor(output["response_mask"], dtype=torch.int64)
            score = output.pop("reward_score", None)
            if score is not None:
                output["rm_scores"] = torch.zeros_like(output["response_mask"], dtype=torch.float32)
                output["rm_scores"][-1] = score
            return output

    found = {name: ModuleType(name) for name in (KERNEL, MANAGERS, AGENT_LOOP, CORE, TRAINER)}
    found[KERNEL].LinearCrossEntropy = LinearCrossEntropy
    found[KERNEL].linear_cross_entropy = LinearCrossEntropy.apply
    found[MANAGERS].get_reward_manager_cls = {"naive": NaiveRewardManager}.__getitem__
    found[AGENT_LOOP].AgentLoopOutput = AgentLoopOutput
    estimators(found[CORE], found[TRAINER])
    for name in list(found):
        for parent in ("verl", *(name.rsplit(".", n)[0] for n in range(1, name.count(".")))):
            found.setdefault(parent, ModuleType(parent))
    found["verl"].__version__ = "0.9.1"
    return found


def masked_whiten(x, mask):
    mean = (x * mask).sum() / (mask.sum() + 1e-8)
    variance = ((x - mean) ** 2 * mask).sum() / (mask.sum() + 1e-8)
    return (x - mean) * (variance * mask.sum() / (mask.sum() - 1) + 1e-8).rsqrt()


def gae(token_level_rewards, values, response_mask, gamma, lam):
    following, last, found = 0, 0, []
    for t in reversed(range(token_level_rewards.shape[1])):
        here = response_mask[:, t]
        step = token_level_rewards[:, t] + gamma * following - values[:, t]
        following = values[:, t] * here + (1 - here) * following
        last = (step + gamma * lam * last) * here + (1 - here) * last
        found.append(last)
    advantages = torch.stack(found[::-1], 1)
    return masked_whiten(advantages, response_mask), advantages + values


def grpo(
    token_level_rewards,
    response_mask,
    index,
    epsilon=1e-6,
    norm_adv_by_std_in_grpo=True,
    config=None,
):
    scores = token_level_rewards.sum(-1)
    found = torch.empty_like(scores)
    for uid in set(index):
        own = torch.tensor([x == uid for x in index])
        mean, std = scores[own].mean(), scores[own].std()
        if own.sum() == 1:
            mean, std = 0.0, 1.0
        found[own] = (scores[own] - mean) / (std + epsilon if norm_adv_by_std_in_grpo else 1)
    return (found[:, None] * response_mask,) * 2


def rloo(token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **others):
    scores = token_level_rewards.sum(-1)
    found = scores.clone()
    for i, uid in enumerate(index):
        rest = [scores[j] for j, other in enumerate(index) if other == uid and j != i]
        found[i] -= torch.stack(rest).mean() if rest else 0.0
    return (found[:, None] * response_mask,) * 2


def reinforce_plus_plus(token_level_rewards, response_mask, config=None, **others):
    returns, after = torch.zeros_like(token_level_rewards), 0
    for t in reversed(range(token_level_rewards.shape[1])):
        after = token_level_rewards[:, t] + config["gamma"] * after
        returns[:, t] = after
        after = after * response_mask[:, t]
    return masked_whiten(returns, response_mask) * response_mask, returns


def estimators(core: ModuleType, trainer: ModuleType) -> None:
    """verl's registry of advantages, those of its own that ours are compared with, and its call."""
    registry: dict[str, Any] = {
        "grpo": grpo,
        "rloo": rloo,
        "reinforce_plus_plus": reinforce_plus_plus,
    }

    def register_adv_est(name):
        def decorator(function):
            if registry.get(name, function) is not function:
                raise ValueError(f"{name} is registered already")
            registry[name] = function
            return function

        return decorator

    def compute_advantage(
        data,
        adv_estimator,
        gamma=1.0,
        lam=1.0,
        num_repeat=1,
        norm_adv_by_std_in_grpo=True,
        config=None,
    ):
        if adv_estimator == "gae":
            names = ("token_level_rewards", "values", "response_mask")
            found = gae(*(data.batch[name] for name in names), gamma, lam)
        else:
            names = ("token_level_rewards", "response_mask")
            given = {name: data.batch[name] for name in names} | {"config": config}
            if "uid" in data.non_tensor_batch:
                given["index"] = data.non_tensor_batch["uid"]
            if adv_estimator == "grpo":
                given["norm_adv_by_std_in_grpo"] = norm_adv_by_std_in_grpo
            found = registry[adv_estimator](**given)
        data.batch["advantages"], data.batch["returns"] = found
        return data

    core.register_adv_est, core.ADV_ESTIMATOR_REGISTRY = register_adv_est, registry
    core.compute_gae_advantage_return = gae
    trainer.compute_advantage = compute_advantage


class StubProto:
    """DataProto: rows by a slice, one row without its batch dimension by an index."""

    def __init__(self, batch, non_tensor_batch):
        self.batch, self.non_tensor_batch = batch, non_tensor_batch

    def __getitem__(self, at):
        return StubProto(
            *({k: x[at] for k, x in part.items()} for part in (self.batch, self.non_tensor_batch))
        )


def patchable(monkeypatch) -> Iterator[SimpleNamespace]:
    """verl's modules, with one that imported the kernel by value; what is patched in them is
    undone.
    """
    if not REAL:
        for name, module in stub_modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    loop = asyncio.new_event_loop()  # verl's managers keep the one in which they are made
    asyncio.set_event_loop(loop)
    kernel, agent_loop = importlib.import_module(KERNEL), importlib.import_module(AGENT_LOOP)
    importlib.import_module(MANAGERS)
    monkeypatch.setattr(kernel, "linear_cross_entropy", kernel.linear_cross_entropy)
    monkeypatch.setattr(agent_loop.AgentLoopOutput, "as_dict", agent_loop.AgentLoopOutput.as_dict)
    core, trainer = importlib.import_module(CORE), importlib.import_module(TRAINER)
    monkeypatch.setattr(trainer, "compute_advantage", trainer.compute_advantage)
    before = dict(core.ADV_ESTIMATOR_REGISTRY)
    fused = ModuleType(FUSED)
    fused.linear_cross_entropy = kernel.linear_cross_entropy
    monkeypatch.setitem(sys.modules, FUSED, fused)
    yield SimpleNamespace(
        kernel=kernel, agent_loop=agent_loop, fused=fused, core=core, trainer=trainer
    )
    core.ADV_ESTIMATOR_REGISTRY.clear()
    core.ADV_ESTIMATOR_REGISTRY.update(before)
    asyncio.set_event_loop(None)
    loop.close()


class Config(dict):
    """As much of verl's configuration as is asked for."""

    __getattr__ = dict.__getitem__


def objects(values):
    """As verl makes them: an object of each value."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def proto(batch, others):
    """A DataProto. batch: tensors of one number of rows. others: lists of as many objects."""
    others = {name: objects(values) for name, values in others.items()}
    if not REAL:
        return StubProto(batch, others)
    from tensordict import TensorDict
    from verl import DataProto

    return DataProto(
        batch=TensorDict(batch, batch_size=len(next(iter(batch.values())))),
        non_tensor_batch=others,
    )
