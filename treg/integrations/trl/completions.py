"""Token rewards of a policy's completions: a source of `treg.rewards` as a reward function of
TRL's.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treg.data import RowProblem
from treg.integrations.sampled import Told, reference_at, scored
from treg.integrations.trl.online_config import REFERENCE_NAMES, SOURCE_NAMES, named
from treg.rewards import Context, NoReference, Response, load_source

# what TRL hands to a reward function beside the columns of the data
NOT_COLUMNS = {"trainer_state", "log_extra", "log_metric", "environments"}
FIX = (
    "set token_rewards_model, or beta != 0, which makes a reference, or train adapters, whose "
    "reference is the model below them"
)


class CompletionRewards:
    """A source whose numbers, summed over a completion, are its reward.

    Args:
        args: a TRegGRPOConfig with token_rewards.
    """

    def __init__(self, args: Any):
        self.args = args
        self.__name__ = args.token_rewards.rpartition(":")[2]
        self.prompt_ids: Sequence[Sequence[int]] = ()
        # of the last call: [T] of each completion; None where the source refuses it
        self.found: list[Tensor | None] = []
        self.refused = 0
        self._told = Told(f"{self.__name__}: a completion has no reward, its tokens no advantage")

    def load(self, trainer: Any) -> None:
        """Load the source. trainer: a TRegGRPOTrainer with its models."""
        device, path = trainer.accelerator.device, self.args.token_rewards_model
        model: Any = NoReference("token_rewards", device, FIX)
        self.reference: Callable = contextlib.nullcontext
        if path is not None:
            with named(REFERENCE_NAMES):
                model = reference_at(path, device)
        elif trainer.ref_model is not None or hasattr(trainer.model, "peft_config"):
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                model = NoReference("token_rewards", device, "set token_rewards_model")
            else:
                self.reference = trainer.as_reference
                bare = trainer.accelerator.unwrap_model
                model = bare(trainer.model if trainer.ref_model is None else trainer.ref_model)
        self.tokenizer = trainer.processing_class
        self.template_kwargs = dict(trainer.chat_template_kwargs)
        context = Context(
            model, self.tokenizer, tokens_per_batch=self.args.token_rewards_tokens_per_batch
        )
        # what a library draws while it loads a model must not change what the policy samples
        with torch.random.fork_rng(devices=[]), named(SOURCE_NAMES):
            self.source = load_source(self.args.token_rewards, self.args.source_options, context)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        """The sum of the token rewards of each completion; None where the source refuses it."""
        rows = [
            {name: values[i] for name, values in columns.items() if name not in NOT_COLUMNS}
            for i in range(len(prompts))
        ]
        responses = [
            self._response(*given)
            for given in zip(prompts, self.prompt_ids, completion_ids, rows, strict=True)
        ]
        self.found = self._scored(responses)
        self.refused = sum(x is None for x in self.found)
        return [None if x is None else x.double().sum().item() for x in self.found]

    def _response(
        self,
        prompt: Any,
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        row: Mapping[str, Any],
    ) -> Response:
        texts = [prompt] if isinstance(prompt, str) else [x.get("content") for x in prompt]
        if not all(isinstance(x, str) for x in texts):
            raise ValueError(
                "prompt: expected text or messages of text with token_rewards, got "
                f"{str(prompt)[:200]}"
            )
        return Response.sampled(
            prompt,
            prompt_ids,
            ids,
            self.tokenizer,
            where="a completion",
            row=row,
            template_kwargs=self.template_kwargs,
        )

    @torch.inference_mode()
    def _scored(self, responses: Sequence[Response]) -> list[Tensor | None]:
        # a source may run the reference to say what it refuses
        with self.reference():
            found = scored(self.source, responses)
        for x in found:
            if isinstance(x, RowProblem):
                self._told(x)
        return [None if isinstance(x, RowProblem) else x for x in found]
