"""Token rewards of any source as a reward manager of verl.

R tokens of a response.
"""

import asyncio
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from treg.integrations.sampled import SampledOptions, SampledRewards
from treg.integrations.verl.modules import imported, version
from treg.rewards import DEFAULT_SOURCE, Response
from treg.rewards.lookup import TokenRewards

NO_BASE = "none"


def install_token_scores() -> None:
    """Let the scores of `TRegRewardManager` through where verl scores responses as they come.

    verl's agent loop takes one number for a response and puts it at its last token; with this it
    takes a list, one number for each token. Where verl scores whole batches,
    `TRegRewardManager.assemble_rm_scores` is all it needs.

    For the trainers of verl.trainer.ppo.v1, which verl.trainer.main_ppo runs. Its deprecated
    trainer (trainer.use_v1=False) and those of verl.experimental that build on it take one number a
    response alone, and stop at a list.

    Raises:
        ImportError: verl is not installed. RuntimeError: a version whose AgentLoopOutput has no
            as_dict.
    """
    output_type = imported("verl.experimental.agent_loop.agent_loop").AgentLoopOutput
    original = getattr(output_type, "as_dict", None)
    if original is None:
        raise RuntimeError(
            f"verl: expected AgentLoopOutput.as_dict, as of verl 0.9, got version {version()}"
        )

    def as_dict(self) -> dict[str, Any]:
        scores = self.reward_score
        if not isinstance(scores, list):
            return original(self)
        output = original(self.model_copy(update={"reward_score": None}))
        output["rm_scores"] = _checked(scores, len(output["responses"]))
        return output

    output_type.as_dict = as_dict


@dataclass(frozen=True)
class RewardOptions(SampledOptions):
    """What stands under reward.reward_kwargs.treg in verl's configuration.

    rewards, rewards_options, alpha, model, refused, device, tokens_per_batch: see
        `treg.integrations.sampled.SampledOptions`.
    annotated: a file of `treg annotate` in the place of a source, where the responses are not the
        policy's own, and tail (see `treg.rewards.lookup.TokenRewards`).
    base: the reward manager of verl that gives the score of a response, or "none": there is no
        score but what the token rewards add up to. None: "naive". With redistribution it must be
        said, for its token rewards are a score already: "none" leaves verl's out, a manager adds
        its own. Where that is the same reward model's, it would count twice.
    """

    annotated: str | None = None
    tail: int = 0
    base: str | None = None

    prefix: ClassVar[str] = "reward_kwargs.treg."

    def __post_init__(self):
        super().__post_init__()
        given = f"got model={self.model!r} and annotated={self.annotated!r}"
        if self.annotated is None and self.model is None and self.needs_reference:
            raise ValueError(
                "reward_kwargs.treg: expected a model that judges responses, or an annotated file, "
                f"for the source {self.rewards!r}, {given}"
            )
        if self.annotated is not None and self.model is not None:
            raise ValueError(
                f"reward_kwargs.treg: expected a model or an annotated file, not both, {given}"
            )
        if self.annotated is not None and (self.rewards_options or self.rewards != DEFAULT_SOURCE):
            raise ValueError(
                "reward_kwargs.treg.rewards: expected none beside an annotated file, which has its "
                f"rewards, got {self.rewards!r} with {dict(self.rewards_options)}"
            )
        if self.annotated is None and self.tail:
            raise ValueError(
                "reward_kwargs.treg.tail: expected 0 without an annotated file, which it is of, "
                f"got {self.tail}"
            )
        if self.base is None and self.add_up_to_a_score:
            raise ValueError(
                "reward_kwargs.treg.base: expected 'none' or the name of a reward manager with "
                f"rewards={self.rewards!r}, whose token rewards are the score of a reward model, "
                "got nothing; 'none' leaves verl's own score out, 'naive' adds it"
            )

    @classmethod
    def of(cls, config: Any) -> "RewardOptions":
        """From verl's whole configuration."""
        given = _plain((config.reward.get("reward_kwargs") or {}).get("treg") or {})
        known = list(inspect.signature(cls).parameters)
        if unknown := given.keys() - set(known):
            raise ValueError(
                f"reward_kwargs.treg: expected keys among {known}, got {sorted(unknown)}"
            )
        return cls(**given)


def _plain(given: Any) -> Any:
    """Mappings and lists of verl's configuration as dict and list."""
    if isinstance(given, Mapping):
        return {key: _plain(value) for key, value in given.items()}
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [_plain(value) for value in given]
    return given


class TRegRewardManager:
    """Token rewards of a source, with the score of verl's reward manager `base`.

        r_t = alpha * rhat_t + [t is the last token] * score(y)

    rhat_t is what the source gives, as in `treg annotate`; `RewardOptions` say which source. Where
    base is "none" there is no score. The default source, T-REG's, says how much likelier token t is
    in a better rewriting of the response than in a worse one, by the model, in [-0.5, 0.5]; 0 for
    what ends the response.

    RED (arXiv 2411.08302) is `rewards: redistribution` with `base: none`: sum_t rhat_t is then
    R(x, y) - R(x, empty), the reward model's score, and with beta_c below 1 (Eq. 7) the rest of
    R(x, y) stands at the end. No reference model is loaded. Its Eq. 8 is verl's
    algorithm.use_kl_in_reward.

    What makes advantages of r_t: GAE and REINFORCE++ take it as it is. GRPO, RLOO and whatever else
    of verl's sums the rewards of a response see score + alpha * sum_t rhat_t: longer responses then
    weigh more, and no token is told from another. `install_advantages` has those that keep tokens
    apart.

    The interface is RewardManagerBase's of verl 0.9. Each of reward.num_workers processes loads the
    models once, when the first response comes; they have a GPU only if Ray gives them one.
    reward_extra_info gains token_reward, sum_t rhat_t; with a base, sequence_score; with
    refused="zero", token_reward_refused, 1 of a response that the source refused. A response
    without any token has no place for a score: with refused="zero" its list is empty.

    Raises:
        ValueError: options, several turns, images, a response without rewards.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ):
        self.options, self.tokenizer = RewardOptions.of(config), tokenizer
        self.base = None
        if self.options.base != NO_BASE:
            managers = imported("verl.experimental.reward_loop.reward_manager")
            self.base = managers.get_reward_manager_cls(self.options.base or "naive")(
                config=config,
                tokenizer=tokenizer,
                compute_score=compute_score,
                reward_router_address=reward_router_address,
                reward_model_tokenizer=reward_model_tokenizer,
            )
        self.template_kwargs = _plain(
            config.get("data", {}).get("apply_chat_template_kwargs", None) or {}
        )
        self.lock = threading.Lock()
        self.sampled = SampledRewards(self.options, tokenizer)
        self.annotated: TokenRewards | None = None  # read when there is something to score

    async def run_single(self, data: Any) -> dict[str, Any]:
        """data: DataProto of one trajectory. reward_score: a list, r_t of each token of its last
        response.
        """
        found: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        if self.base is not None:
            found = await self.base.run_single(data)
            extra["sequence_score"] = float(found["reward_score"])
        item = data[-1:][0]
        rewards = await asyncio.get_running_loop().run_in_executor(None, self.token_rewards, item)
        if self.options.refused == "zero":
            extra["token_reward_refused"] = float(rewards is None)
        if rewards is None:
            rewards = torch.zeros(len(_sequence(item)[1]))
        extra["token_reward"] = float(rewards.sum())
        scores = self.options.weight * rewards
        if len(scores):
            scores[-1] += extra.get("sequence_score", 0.0)
        return {
            "reward_score": scores.tolist(),
            "reward_extra_info": {**found.get("reward_extra_info", {}), **extra},
        }

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: Sequence[Sequence[float]]) -> Tensor:
        """[B, R] float32 of B results of run_single, 0 after the end of a response."""
        found = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        lengths = data.batch["attention_mask"][:, data.batch["prompts"].shape[1] :].sum(1).tolist()
        for row, given, length in zip(found, scores, lengths, strict=True):
            row[:length] = _checked(given, length)
        return found

    def token_rewards(self, item: Any) -> Tensor | None:
        """rhat [R] of the response of a DataProtoItem; None where it is refused."""
        prompt, response = _sequence(item)
        if (item.non_tensor_batch.get("__num_turns__") or 0) > 2:
            raise ValueError(
                "__num_turns__: expected a single answer, got several turns; what tools say has no "
                "reward"
            )
        with self.lock:  # verl scores many responses at once
            if self.options.annotated is not None and len(response):
                self.annotated = self.annotated or TokenRewards(
                    self.options.annotated, tail=self.options.tail
                )
                return self.annotated(torch.cat([prompt, response])[None])[0, len(prompt) :]
            messages = item.non_tensor_batch.get("raw_prompt")
            return self.sampled(self._response(messages, prompt, response))

    def _response(self, messages: Any, prompt: Tensor, response: Tensor) -> Response:
        messages = None if messages is None else list(messages)
        if not messages or not all(
            isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages
        ):
            raise ValueError(f"raw_prompt: expected messages of text, got {str(messages)[:200]}")
        return Response.sampled(
            messages,
            prompt.tolist(),
            response.tolist(),
            self.tokenizer,
            where="a response",
            template_kwargs=self.template_kwargs,
        )


def _sequence(item: Any) -> tuple[Tensor, Tensor]:
    """Ids of prompt [P] and response [R] of a DataProtoItem, without padding."""
    prompt, response = item.batch["prompts"].cpu(), item.batch["responses"].cpu()
    lengths = [item.non_tensor_batch.get(name) for name in ("prompt_len", "response_len")]
    if (
        None not in lengths
    ):  # of the agent loop, whose mask does not tell where padding lies between the two
        return prompt[: int(lengths[0])], response[: int(lengths[1])]
    mask = item.batch["attention_mask"].cpu().bool()
    return prompt[mask[: len(prompt)]], response[mask[len(prompt) :]]


def _checked(scores: Sequence[float], length: int) -> Tensor:
    if not isinstance(scores, list) or len(scores) != length:
        got = f"{len(scores)} scores" if isinstance(scores, list) else type(scores).__name__
        raise ValueError(
            f"reward_score: expected a list of {length} scores, one for each token, got {got}"
        )
    return torch.tensor(scores, dtype=torch.float32)
