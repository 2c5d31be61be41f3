"""OpenRLHF's online training with token rewards of any source.

    from treg.integrations import openrlhf

    openrlhf.install_online(rewards="redistribution", rewards_options={"model": RM}, score=False)
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)

OpenRLHF hands on one number a response: from a reward model, a URL or a Python file. So token
rewards are made where advantages are, in the process of the trainer.

B responses of a batch, T tokens of prompt and response, A = T - 1.
"""

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from treg.integrations.sampled import SampledOptions, SampledRewards
from treg.rewards import Response

TRAINER = "openrlhf.trainer.ppo_trainer"
# those that make advantages of the rewards of a response
METHODS = (
    "compute_advantages_and_returns",
    "get_advantages_and_returns",
    "get_cumulative_returns",
)
HOOK = "worker_process_setup_hook"


@dataclass(frozen=True)
class OnlineOptions(SampledOptions):
    """Options of `install_online`.

    rewards, rewards_options, alpha, model, refused, device, tokens_per_batch: see
        `treg.integrations.sampled.SampledOptions`. device is one that the trainer's process sees,
        to which Ray gives no GPU: the CPU, unless it is said.
    score: whether OpenRLHF's own reward of a response counts too. None: it does. With
        redistribution it must be said, for its token rewards are a score already: False leaves
        OpenRLHF's out, True adds it. Where that is the same reward model's, it would count twice.
    """

    score: bool | None = None

    prefix: ClassVar[str] = ""

    def __post_init__(self):
        super().__post_init__()
        if self.model is None and self.needs_reference:
            raise ValueError(
                f"model: expected a model that judges responses, for the source {self.rewards!r}, "
                "got None"
            )
        if self.score not in (True, False, None):
            raise ValueError(f"score: expected True, False or None, got {self.score!r}")
        if self.score is None and self.add_up_to_a_score:
            raise ValueError(
                f"score: expected True or False with rewards={self.rewards!r}, whose token rewards "
                "are the score of a reward model, got None; False leaves OpenRLHF's own reward "
                "out, True adds it"
            )


def install_online(**options: Any) -> None:
    """From now on Ray starts so that OpenRLHF's trainers make experience with token rewards.

    Call it before openrlhf.cli.train_ppo_ray runs, which starts Ray. Every process of Ray is then
    told to take `make_experience_maker`'s class when it imports OpenRLHF's trainer.

    Args:
        options: the fields of `OnlineOptions`. A second call takes the place of the first.
    Raises:
        ImportError: Ray is not installed. RuntimeError: Ray runs already. ValueError: options;
        when Ray starts: a runtime_env that has such a hook of its own.
    """
    made = OnlineOptions(**options)
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f"openrlhf: expected OpenRLHF to be installed with Ray (pip install openrlhf): {error}"
        ) from error
    if ray.is_initialized():
        raise RuntimeError(
            "ray: expected it to start later, so that its processes know of token rewards, but it "
            "runs already; call install_online first"
        )
    original: Any = getattr(ray.init, "_treg_original", ray.init)

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> Any:
        environment = dict(kwargs.get("runtime_env") or {})
        if HOOK in environment:
            raise ValueError(
                f"runtime_env: expected no {HOOK} beside treg's, got {environment[HOOK]!r}"
            )
        environment[HOOK] = _in_process(made)
        return original(*args, **kwargs | {"runtime_env": environment})

    setattr(init, "_treg_original", original)  # noqa: B010
    ray.init = init


def make_experience_maker(base: type, options: OnlineOptions) -> type:
    """A subclass of OpenRLHF's RemoteExperienceMaker with token rewards.

        r_t = alpha * rhat_t + [t is the last token] * (score - b) - kl_coef * kl_t

    The reward of a response is score + alpha * sum_t rhat_t. OpenRLHF does with it what it does
    with any: length penalties, the baseline b of rloo, reinforce_baseline, dr_grpo and
    flash_reinforce, clipping. What comes out is the sum over the response: token rewards say where
    in the response it is earned. Returns, GAE and the normalization over tokens are OpenRLHF's.

    group_norm is refused. It divides by the standard deviation of the group's sums, which may be
    next to 0 where tokens differ. dr_grpo is the same without the division.

    info gains token_reward, sum_t rhat_t; with refused="zero", token_reward_refused, 1 of a
    response that the source refused.

    Args:
        base: openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker, or a subclass.
    Raises:
        TypeError: a class without its methods;
        when it is made: ValueError: group_norm;
        in training: ValueError: several turns, images, rewards that are not one number a response,
            a response that the source refuses.
    """
    missing = [name for name in METHODS if not hasattr(base, name)]
    if missing:
        raise TypeError(
            "base: expected OpenRLHF's RemoteExperienceMaker (as of 0.11), got "
            f"{base.__name__} without {missing}"
        )

    class TRegExperienceMaker(base):
        _treg_base = base

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.advantage_estimator == "group_norm":
                raise ValueError(
                    "algo.advantage.estimator: expected one that does not divide by the group's "
                    "standard deviation with token rewards, got group_norm; dr_grpo is the same "
                    "without"
                )
            self._treg_sampled = SampledRewards(options, self.tokenizer)
            self._treg_shifts: Iterator[Tensor] = iter(())

        @torch.no_grad()
        def compute_advantages_and_returns(self, experiences):
            shifts = [_with_token_rewards(x, self._treg_sampled) for x in experiences]
            self._treg_shifts = iter(shifts)
            return super().compute_advantages_and_returns(experiences)

        # one of these two is called for each experience, in order

        def get_advantages_and_returns(self, values, rewards, *args, **kwargs):
            rewards = rewards + next(self._treg_shifts).to(rewards)
            return super().get_advantages_and_returns(values, rewards, *args, **kwargs)

        def get_cumulative_returns(self, rewards, *args, **kwargs):
            rewards = rewards + next(self._treg_shifts).to(rewards)
            return super().get_cumulative_returns(rewards, *args, **kwargs)

    return TRegExperienceMaker


def _with_token_rewards(experience: Any, sampled: SampledRewards) -> Tensor:
    """Add the sums of token rewards to the rewards of an experience.

    Returns:
        [B, A] float32: what moves them from the last tokens to their own. Each row sums to 0.
    """
    options = sampled.options
    count = len(experience.sequences)
    rewards = experience.rewards
    if tuple(rewards.shape) != (count,):
        raise ValueError(
            f"rewards: expected [{count}], one number for each response, got {list(rewards.shape)}"
        )
    found = torch.zeros(experience.action_mask.shape)
    refused = torch.zeros(count)
    for row in range(count):
        response = _response(experience, row, sampled.tokenizer)
        given = sampled(response)
        if given is None:
            refused[row] = 1.0
            continue
        first = len(response.prompt_ids) - 1
        found[row, first : first + len(given)] = given
    sums = found.sum(1)
    shifts = options.weight * found
    last = [int(x.nonzero().max()) if x.any() else 0 for x in experience.action_mask]
    shifts[range(count), last] -= options.weight * sums
    scores = torch.zeros_like(sums) if options.score is False else rewards.float()
    experience.rewards = scores + (options.weight * sums).to(scores)
    info = {"token_reward": sums, "reward": experience.rewards.clone()}
    if options.refused == "zero":
        info["token_reward_refused"] = refused
    experience.info.update(info)
    return shifts


def _response(experience: Any, row: int, tokenizer: Any) -> Response:
    """A response of an experience. action_mask is of the tokens one further right."""
    ids = experience.sequences[row].tolist()
    places = experience.action_mask[row].nonzero().flatten().tolist()
    prompt = experience.prompts[row]
    images = experience.images[row] if experience.images else None
    if not isinstance(prompt, str) or images:
        raise ValueError(f"prompts: expected text without images, got {str(prompt)[:200]}")
    if not places:
        return Response.sampled(prompt, ids, [], tokenizer, where="a response")
    first, last = places[0] + 1, places[-1] + 1
    if last - first + 1 != len(places):
        raise ValueError(
            "action_mask: expected a single answer, got several turns; what an environment says "
            "has no reward"
        )
    return Response.sampled(
        prompt, ids[:first], ids[first : last + 1], tokenizer, where="a response"
    )


def _in_process(options: OnlineOptions) -> Callable[[], None]:
    """What each process of Ray runs first."""

    def hook() -> None:
        if TRAINER in sys.modules:
            _patch(sys.modules[TRAINER], options)
        else:
            sys.meta_path.insert(0, _WhenImported(options))

    return hook


def _patch(trainer: Any, options: OnlineOptions) -> None:
    """Put the subclass where OpenRLHF's trainers look theirs up."""
    found = trainer.RemoteExperienceMaker
    base = getattr(found, "_treg_base", found)
    trainer.RemoteExperienceMaker = make_experience_maker(base, options)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Patches OpenRLHF's trainer when it is imported: most processes never do, and it is large."""

    def __init__(self, options: OnlineOptions):
        self.options = options

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            original = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                original(module)
                _patch(module, self.options)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec
