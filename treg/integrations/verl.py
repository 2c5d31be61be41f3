"""verl: treg's log-probs and entropies in the place of its fused head, T-REG's rewards as its own.

A module that verl imports in each of its workers, say treg_verl.py on their PYTHONPATH:

    from treg.integrations import verl

    verl.install_op()
    verl.install_token_scores()    # for TRegRewardManager

`install_op` takes effect with actor_rollout_ref.model.use_fused_kernels=True and
impl_backend=triton. On the command line of verl.trainer.main_ppo:

    actor_rollout_ref.model.external_lib=treg_verl
    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://treg.integrations.verl
    reward.reward_manager.name=TRegRewardManager +reward.reward_kwargs.treg.model=REFERENCE
    +reward.reward_kwargs.treg.alpha=0.1

Written against verl 0.9.1, whose kernel's signature is the same on its main branch of August 2026.

N tokens, V vocabulary, D hidden size, P and R tokens of a prompt and a response.
"""

import asyncio
import importlib
import inspect
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from treg.checks import check_number, check_tensor
from treg.data import SIDES, Pair, Preference
from treg.ops import VocabShard, linear_logprobs
from treg.ops.entropy import differentiable_entropy
from treg.ops.head import Head
from treg.ops.head.head import autocast_dtype
from treg.rewards import (
    DEFAULT_SOURCE,
    Context,
    Response,
    TokenRewardSource,
    load_source,
    streams_given,
)
from treg.rewards.base import check_response, score_checked
from treg.rewards.lookup import TokenRewards

KERNEL = "verl.utils.kernel.linear_cross_entropy"
SIGNATURE = ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]
REDUCTIONS = {"none": lambda x: x, "sum": Tensor.sum, "mean": Tensor.mean}


def install_op() -> None:
    """Put `linear_cross_entropy` where verl looks its own up.

    That is in its module, and in those that have imported it.

    Raises:
        ImportError: verl is not installed, or has no such kernel. RuntimeError: a version with
            another signature.
    """
    kernel = _import(KERNEL)
    function = getattr(kernel, "LinearCrossEntropy", None)
    found = list(inspect.signature(function.forward).parameters)[1:] if function else None
    if found != SIGNATURE:
        raise RuntimeError(
            f"verl: expected linear_cross_entropy({', '.join(SIGNATURE)}), as of verl 0.9, "
            f"got {found} in version {_version()}"
        )
    original = kernel.linear_cross_entropy
    for name, module in list(sys.modules.items()):
        if not name.startswith("verl."):
            continue
        if vars(module).get("linear_cross_entropy") is original:
            vars(module)["linear_cross_entropy"] = linear_cross_entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's fused head by treg: log-probs of labels and entropies, without [N, V] logits.

        z = h W^T / temperature          lp = z[y] - logsumexp_v z[v]
        H = - sum_v p_v log p_v          dH / dz_v = - p_v (log p_v + H)

    Both have exact gradients. The one through H (entropy_coeff) costs three more matrix products a
    row, and nothing where it is 0 throughout. Any D is fine; verl's kernel wants a multiple of 128.

    Args:
        hidden: [N, D], or [..., D] with labels [...].
        weight: [V, D]; with a group, this process' V / size rows.
        labels: int64, already rolled. -100: log-prob and entropy are 0, which verl leaves
            undefined; what hidden holds there has no part in any gradient.
        temperature: > 0. A number or a tensor of one element; or a tensor of the shape of labels,
            or [N], with one for each row. Rows of equal temperature go through the head together:
            few distinct values cost little. None: 1. With a group it is the same in all processes.
        reduction: of the log-probs: "none", "sum" or "mean".
        dist_process_group: over which the vocabulary is split evenly, or None. As in verl, each
            process then gets all log-probs and a share of the gradient of hidden, and the gradient
            is the sum over the group, which Megatron takes with sequence_parallel=True.
    Returns:
        log-probs [N] (or a scalar) and entropies [N], float32, nats; flat, whatever hidden's shape.
    Raises:
        ValueError: another reduction, a temperature of another shape or one that is not finite and
            > 0, and what `treg.ops.linear_logprobs` refuses.
    """
    reduction = "none" if reduction is None else str(reduction).lower()
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'sum' or 'mean', got {reduction!r}")
    groups = _rows_of_temperatures(1.0 if temperature is None else temperature, labels)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if len(groups) == 1:
        ((number, _),) = groups
        logps, entropy = _scores(hidden, weight, labels, number, dist_process_group)
    else:
        parts = [
            _scores(hidden[rows], weight, labels[rows], number, dist_process_group)
            for number, rows in groups
        ]
        place = torch.cat([rows for _, rows in groups]).argsort()
        logps = torch.cat([part[0] for part in parts])[place]
        entropy = torch.cat([part[1] for part in parts])[place]
    return REDUCTIONS[reduction](logps), entropy


def _rows_of_temperatures(
    temperature: float | Tensor, labels: Tensor
) -> list[tuple[float, Tensor | slice]]:
    """Each distinct temperature in increasing order, with the numbers of its rows."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, positive=True)
        return [(float(temperature), slice(None))]
    check_tensor("temperature", temperature)
    if temperature.dtype == torch.bool or temperature.is_complex():
        raise ValueError(
            "temperature: expected a number or a tensor of numbers, got a tensor of "
            f"{temperature.dtype}"
        )
    if temperature.requires_grad:
        raise ValueError(
            "temperature: expected no gradient through it, got a tensor that requires one; "
            "detach it"
        )
    if temperature.numel() == 1:
        return _rows_of_temperatures(temperature.item(), labels)
    if temperature.shape not in (labels.shape, (labels.numel(),)):
        raise ValueError(
            f"temperature: expected a number, or a tensor of shape {list(labels.shape)} (that of "
            f"labels), [{labels.numel()}] or one element, got {list(temperature.shape)}"
        )
    # They are few: which rows have which is found on the host.
    numbers, which = temperature.reshape(-1).double().cpu().unique(return_inverse=True)
    bad = ~(numbers.isfinite() & (numbers > 0))
    if bool(bad.any()):
        raise ValueError(f"temperature: expected finite values > 0, got {numbers[bad][0].item()}")
    if len(numbers) <= 1:  # none where there are no rows
        return [(number, slice(None)) for number in numbers.tolist() or [1.0]]
    return [
        (number, (which == i).nonzero().squeeze(1).to(labels.device))
        for i, number in enumerate(numbers.tolist())
    ]


def _scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, group: Any
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of hidden [N, D], both differentiable; see
    `linear_cross_entropy`.
    """
    rows, shard = hidden, None
    size = 1 if group is None else dist.get_world_size(group)
    if size > 1:
        shard, rows = VocabShard.even(weight, group), hidden.view_as(hidden)
        if rows.requires_grad:
            # The op sums this gradient over the group: each process is to have a share of it.
            rows.register_hook(lambda grad: grad / size)
    dtype = autocast_dtype(hidden, weight) or hidden.dtype
    rounded = hidden.device.type == "cpu" and dtype == torch.bfloat16
    found = linear_logprobs(
        rows,
        weight,
        labels,
        temperature=temperature,
        outputs=("lse", "entropy"),
        shard=shard,
        # Log-probs and entropies of logits that are not rounded to 16 bits.
        logits_dtype=torch.float32 if rounded else None,
    )
    entropy = differentiable_entropy(
        found.entropy,
        hidden,
        labels,
        Head(weight, temperature=temperature),
        lse=None if shard is None else found.lse,
    )
    return found.logprobs, entropy


def install_token_scores() -> None:
    """Let the scores of `TRegRewardManager` through where verl scores responses as they come.

    verl's agent loop takes one number for a response and puts it at its last token; with this it
    takes a list, one number for each token. Where verl scores whole batches,
    `TRegRewardManager.assemble_rm_scores` is all it needs.

    Raises:
        ImportError: verl is not installed. RuntimeError: a version whose AgentLoopOutput has no
            as_dict.
    """
    output_type = _import("verl.experimental.agent_loop.agent_loop").AgentLoopOutput
    original = getattr(output_type, "as_dict", None)
    if original is None:
        raise RuntimeError(
            f"verl: expected AgentLoopOutput.as_dict, as of verl 0.9, got version {_version()}"
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
class RewardOptions:
    """What stands under reward.reward_kwargs.treg in verl's configuration.

    alpha: >= 0.
    model: a causal LM with the policy's tokenizer, the reference of the source; or
    annotated: a file of `treg annotate`, where the responses are not the policy's own, and tail
        (see `treg.rewards.lookup.TokenRewards`).
    rewards: the source of token rewards, a key of `treg.rewards.SOURCES` or "package.module:Class".
    rewards_options: values of the fields of its Options.
    base: the reward manager that gives the score of a response.
    device, tokens_per_batch: of the model.
    """

    alpha: float = 0.1
    model: str | None = None
    annotated: str | None = None
    tail: int = 0
    base: str = "naive"
    device: str | None = None
    tokens_per_batch: int = 16384
    rewards: str = DEFAULT_SOURCE
    rewards_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_number("reward_kwargs.treg.alpha", self.alpha)
        if self.alpha < 0:
            raise ValueError(
                f"reward_kwargs.treg.alpha: expected a number >= 0, got {self.alpha!r}"
            )
        if (self.model is None) == (self.annotated is None):
            raise ValueError(
                "reward_kwargs.treg: expected a model that judges responses, or an annotated file, "
                f"got model={self.model!r} and annotated={self.annotated!r}"
            )
        if self.annotated is not None and (self.rewards_options or self.rewards != DEFAULT_SOURCE):
            raise ValueError(
                "reward_kwargs.treg.rewards: expected none beside an annotated file, which has its "
                f"rewards, got {self.rewards!r} with {dict(self.rewards_options)}"
            )
        if self.model is not None and self.tail:
            raise ValueError(
                "reward_kwargs.treg.tail: expected 0 beside a model, for it is of an annotated "
                f"file, got {self.tail}"
            )
        # refused here, before a model is loaded
        streams = streams_given(self.rewards, self.rewards_options)
        if "token_rewards" not in streams or "token_weights" in streams:
            raise ValueError(
                "reward_kwargs.treg.rewards: expected a source of token_rewards and no "
                f"token_weights, got {self.rewards!r}, which gives {', '.join(streams)}"
            )

    @classmethod
    def of(cls, config: Any) -> "RewardOptions":
        """From verl's whole configuration."""
        given = dict(config.reward.get("reward_kwargs", {}).get("treg", {}))
        known = list(inspect.signature(cls).parameters)
        if unknown := given.keys() - set(known):
            raise ValueError(
                f"reward_kwargs.treg: expected keys among {known}, got {sorted(unknown)}"
            )
        return cls(**given)


class TRegRewardManager:
    """verl's reward manager `base` with T-REG's token rewards, as `RewardOptions` say.

        r_t = alpha * rhat_t + [t is the last token] * score(y)

    rhat_t is what the source gives, as in `treg annotate`. The default source says how much
    likelier token t is in a better rewriting of the response than in a worse one, by the model, in
    [-0.5, 0.5]; 0 for what ends the response.

    GAE and REINFORCE++ take r_t as it is. GRPO, RLOO and whatever else sums the rewards of a
    response see score + alpha * sum_t rhat_t: longer responses then weigh more, and no token is
    told from another.

    The interface is RewardManagerBase's of verl 0.9. Each of reward.num_workers processes loads the
    model once, when the first response comes; they have a GPU only if Ray gives them one.
    reward_extra_info gains sequence_score and token_reward, the two sums.

    Raises:
        ValueError: options, several turns, images, a response without rewards or too long for the
            model.
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
        managers = _import("verl.experimental.reward_loop.reward_manager")
        self.base = managers.get_reward_manager_cls(self.options.base)(
            config=config,
            tokenizer=tokenizer,
            compute_score=compute_score,
            reward_router_address=reward_router_address,
            reward_model_tokenizer=reward_model_tokenizer,
        )
        self.template_kwargs = dict(
            config.get("data", {}).get("apply_chat_template_kwargs", None) or {}
        )
        self.lock = threading.Lock()
        self.source: Any = None  # once there is something to score: a source, or TokenRewards

    async def run_single(self, data: Any) -> dict[str, Any]:
        """data: DataProto of one trajectory. reward_score: a list, r_t of each token of its last
        response.
        """
        found = await self.base.run_single(data)
        rewards = await asyncio.get_running_loop().run_in_executor(
            None, self.token_rewards, data[-1:][0]
        )
        score = float(found["reward_score"])
        scores = self.options.alpha * rewards
        scores[-1] += score
        sums = {"sequence_score": score, "token_reward": float(rewards.sum())}
        return {
            "reward_score": scores.tolist(),
            "reward_extra_info": {**found.get("reward_extra_info", {}), **sums},
        }

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: Sequence[Sequence[float]]) -> Tensor:
        """[B, R] float32 of B results of run_single, 0 after the end of a response."""
        found = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        lengths = data.batch["attention_mask"][:, data.batch["prompts"].shape[1] :].sum(1).tolist()
        for row, given, length in zip(found, scores, lengths, strict=True):
            row[:length] = _checked(given, length)
        return found

    @torch.inference_mode()
    def token_rewards(self, item: Any) -> Tensor:
        """rhat [R] of the response of a DataProtoItem."""
        prompt, response = _sequence(item)
        if not len(response):
            raise ValueError("responses: expected at least one token, got an empty response")
        if (item.non_tensor_batch.get("__num_turns__") or 0) > 2:
            raise ValueError(
                "__num_turns__: expected a single answer, got several turns; what tools say has no "
                "reward"
            )
        with self.lock:  # verl scores many responses at once
            if self.options.annotated is not None:
                self.source = self.source or TokenRewards(
                    self.options.annotated, tail=self.options.tail
                )
                return self.source(torch.cat([prompt, response])[None])[0, len(prompt) :]
            answer = self._response(item.non_tensor_batch.get("raw_prompt"), prompt, response)
            if self.source is None:
                self.source = self._load_source()
            return self._scored(self.source, answer)

    def _response(self, messages: Any, prompt: Tensor, response: Tensor) -> Response:
        messages = None if messages is None else list(messages)
        if not messages or not all(
            isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages
        ):
            raise ValueError(f"raw_prompt: expected messages of text, got {str(messages)[:200]}")
        # what the response says is read from its ids, as that of a truncated pair
        answer = [{"role": "assistant", "content": ""}]
        row = Preference(messages, answer, answer, template_kwargs=self.template_kwargs)
        ids = response.numpy().astype(np.int32)
        pair = Pair(prompt.numpy().astype(np.int32), ids, ids, row, 0, cut=SIDES)
        # a response of verl's stands alone: there is no other answer
        return replace(Response.of_pair(pair, SIDES[0], self.tokenizer), other_ids=None)

    def _load_source(self) -> TokenRewardSource:
        from transformers import AutoModelForCausalLM

        options = self.options
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
        context = Context(model, self.tokenizer, tokens_per_batch=options.tokens_per_batch)
        return load_source(options.rewards, options.rewards_options, context)

    def _scored(self, source: TokenRewardSource, response: Response) -> Tensor:
        problem = check_response(source, response)
        if problem is not None:
            raise ValueError(
                f"responses: expected ones that the source {self.options.rewards!r} can judge, "
                f"got {problem.reason}: {problem.detail}; if it is too long, lower "
                "data.max_response_length"
            )
        (streams,) = score_checked(source, [response])
        return streams["token_rewards"]


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


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"verl: expected verl >= 0.9 with {name}: {error}") from error


def _version() -> str:
    return getattr(sys.modules.get("verl"), "__version__", "unknown")
