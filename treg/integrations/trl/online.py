"""GRPOTrainer with token-level credit: TRL's generation, reward functions, loss and logging, on
log-probs and advantages of treg.
"""

import contextlib
from collections.abc import Sequence, Sized
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from treg.heads.logprobs import token_logprobs
from treg.integrations.trl.completions import CompletionRewards
from treg.integrations.trl.config import own_copy
from treg.integrations.trl.credit import (
    Completions,
    advantages_of,
    needs_logprobs,
    own_tokens,
    reward_of_tokens,
    share_within,
    units_of,
)
from treg.integrations.trl.heads import as_reference, head_of
from treg.integrations.trl.online_config import TRegGRPOConfig
from treg.integrations.trl.routers import balance, router_logits
from treg.integrations.trl.sharing import SharedGroups

# of a batch, what goes on to a model that sees images
NOT_FORWARDED = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask"),
    *("advantages", "num_items_in_batch", "importance_sampling_ratio"),
    *("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"),
}


class TRegGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are of tokens.

        r_t = weight * rhat_t + [t is the last token] * (the other rewards, weighted and summed)
        A_t = `treg.rl.token_advantages` of r within a prompt's completions

    rhat_t is of a source of `treg.rewards`, such as "redistribution" (RED), whose sum over a
    completion is one more reward function. Each token's A_t takes the place of the completion's
    advantage in TRL's loss, whatever its loss_type. With credit="sequence" the step is TRL's own.

    Paper: RED, arXiv 2411.08302, Eq. 6 to 8 (token_rewards="redistribution", kl_in_reward);
    MA-RLHF, arXiv 2410.02743 (credit="macro"); GRPO's process supervision, arXiv 2402.03300,
    section 4.1.3 (credit_baseline="process").
    Differs: RED and MA-RLHF train a critic. There is none here. With token rewards the baseline is
    the mean reward of a step over the prompt's completions (credit_baseline="process"), else their
    mean reward, as the value of every token up to the last ("group").

    With kl_in_reward, credit/kl is the mean over tokens of log pi - log pi_ref, in nats.

    A completion that the source refuses, such as one too long for a reward model, has no advantage
    and no part in a baseline or in the logged rewards, whatever other functions say of it;
    credit/refused is their share. credit/within says how far tokens of a completion are told apart:
    of the sum of squares of the advantages, the part that lies within completions.

    Log-probs and entropies are by `treg.heads`, which refuses by name a head that it cannot read
    right; models that see images keep TRL's. What completions begin with, their prompt above all,
    is run once for all of a batch that share it (treg_share_prompt): of G completions of R tokens a
    model sees P + G R tokens instead of G (P + R).

    Differs: positions count from the first token of each prompt, as they do in generation. TRL
    gives a model none, so padding on the left counts. Of models with rotary positions that is the
    same; of those with absolute ones (GPT-2) TRL's log-probs are not those of the samples.

    Args:
        reward_funcs: as in GRPOTrainer; may be None where args has token_rewards.
        The others: as in GRPOTrainer.
    Raises:
        ValueError: token_rewards with images, tools or environments; a source that needs a
            reference where there is none; cast_lm_head_to_fp32; neither token_rewards nor reward
            functions; data without rows, or without a column "prompt".
    """

    _tag_names: ClassVar = ["trl", "grpo", "treg"]
    _name = "GRPO with token credit"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: TRegGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        **kwargs: Any,
    ):
        args = own_copy(args, TRegGRPOConfig, model, "GRPO")
        if args.cast_lm_head_to_fp32:
            raise ValueError(
                "cast_lm_head_to_fp32: expected False, got True; treg's head rounds no logits to "
                "16 bits"
            )
        args.settle()
        self._check_given(args, reward_funcs, kwargs)
        self._check_prompts(train_dataset=train_dataset, eval_dataset=eval_dataset)
        self._shared = SharedGroups(self, args)
        self._rewards = None if args.token_rewards is None else CompletionRewards(args)
        if self._rewards is not None:
            self._check_text_alone(kwargs)
            reward_funcs, reward_processing_classes = self._with_source(
                args, reward_funcs, reward_processing_classes
            )
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            **kwargs,
        )
        if self._is_vlm and self._rewards is not None:
            raise ValueError(
                "processing_class: expected a tokenizer with token_rewards, got a processor of "
                "images"
            )
        for x in () if self._is_vlm else (self.model, self.ref_model):
            if x is not None:
                self._shared.try_on(head_of(self.accelerator, x))
        if self._rewards is not None:
            self._rewards.load(self)

    @staticmethod
    def _check_given(args: TRegGRPOConfig, funcs: Any, kwargs: dict[str, Any]) -> None:
        none = funcs is None or (isinstance(funcs, list) and not funcs)
        if none and args.token_rewards is None and not kwargs.get("environment_factory"):
            raise ValueError(
                "reward_funcs: expected at least one where token_rewards is None, got none; give "
                "reward_funcs, or set token_rewards in args"
            )

    @staticmethod
    def _check_prompts(**data: Any) -> None:
        """ValueError for a dataset that has no rows, or whose columns are known and no prompt."""
        for name, given in data.items():
            for x in given.values() if isinstance(given, dict) else [given]:
                if isinstance(x, Sized) and len(x) == 0:
                    raise ValueError(
                        f"{name}: expected rows with a prompt, got a dataset of 0 rows; look at "
                        "what loads or filters it"
                    )
                columns = getattr(x, "column_names", None)
                if columns and "prompt" not in columns:
                    raise ValueError(
                        f"{name}: expected a column 'prompt', of text or of messages, got "
                        f"{', '.join(columns)}; rename one with rename_column"
                    )

    @staticmethod
    def _check_text_alone(kwargs: dict[str, Any]) -> None:
        for name in ("tools", "environment_factory", "rollout_func"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name}: expected None with token_rewards, whose sources judge single "
                    "answers, got some; set token_rewards=None: the credit of the reward functions "
                    "stays"
                )

    def _with_source(self, args: TRegGRPOConfig, funcs: Any, tokenizers: Any) -> tuple[list, Any]:
        """Reward functions and their processing classes with the source as one more; its weight is
        added to args.
        """
        funcs = [] if funcs is None else funcs
        funcs = list(funcs) if isinstance(funcs, list) else [funcs]
        weight, given = args.token_rewards_weight, args.reward_weights
        if given is not None and len(given) != len(funcs):
            raise ValueError(
                f"reward_weights: expected {len(funcs)}, one for each of reward_funcs, got "
                f"{len(given)}; that of the token rewards is token_rewards_weight"
            )
        if args.reward_weights is not None or weight != 1.0:
            args.reward_weights = [*(args.reward_weights or [1.0] * len(funcs)), weight]
        if tokenizers is not None:
            tokenizers = [*(tokenizers if isinstance(tokenizers, list) else [tokenizers]), None]
        return [*funcs, self._rewards], tokenizers

    def as_reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The reference model, in eval mode."""
        return as_reference(self.accelerator, self.model, self.ref_model)

    def _generate(self, prompts: list):
        found = super()._generate(prompts)
        # what TRL pads and forgets: (ids of prompts, ids of completions, the policy's own tokens)
        self._generated = found[:3]
        if self._rewards is not None:
            self._rewards.prompt_ids = found[0]
        return found

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._rewards is not None:
            # a sum without the token rewards cannot be compared with whole ones
            refused = found[:, self.reward_funcs.index(self._rewards)].isnan()
            found = found.masked_fill(refused[:, None], torch.nan)
        self._rewards_per_func = found
        return found

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        if self._rewards is not None:
            counts = torch.tensor([[self._rewards.refused, len(inputs)]], dtype=torch.float64)
            counts = self.accelerator.gather(counts.to(self.accelerator.device)).sum(0).tolist()
            self._metrics[mode]["credit/refused"].append(counts[0] / counts[1])
        if self.args.credit != "sequence":
            output["advantages"] = self._token_advantages(output, mode)
        return output

    def _token_advantages(self, output: dict[str, Any], mode: str) -> Tensor:
        """A_t of this process' completions, [B, C] float32, and what is logged of them."""
        _, ids, kept = self._generated
        width, device = output["completion_ids"].shape[1], output["completion_ids"].device
        start = self.accelerator.process_index * len(ids)
        mine = slice(start, start + len(ids))
        given = Completions(
            ids,
            own_tokens(ids, kept, width, device),
            self._policy_logprobs(output) if needs_logprobs(self.args) else None,
            output.get("ref_per_token_logps"),
        )
        token_rewards, scores, judged = self._split_rewards(width, mine)
        given.mask[~judged] = False
        if self.args.kl_in_reward:
            self._log_kl(given, mode)
        rewards = reward_of_tokens(given, token_rewards, scores, self.args)
        units = units_of(given, self.args, self._tokenizer)
        rewards, mask = self._of_all(rewards), self._of_all(given.mask.long()).bool()
        units = None if units is None else self._of_all(units)
        group = self.num_generations if mode == "train" else self.num_generations_eval
        advantages = advantages_of(rewards, mask, units, group, self.args)
        self._metrics[mode]["credit/within"].append(share_within(advantages, mask))
        self._log_advantages(advantages, mask)
        return advantages[mine, :width].float()

    def _split_rewards(self, width: int, mine: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of this process' completions: token rewards [B, C] and the sum of the other rewards [B],
        weighted, float64; and [B] bool: those that are judged.

        Raises:
            ValueError: a reward that is infinite.
        """
        endless = self._rewards_per_func.isinf()  # of all processes, so that all stop
        if endless.any():
            row, column = endless.nonzero()[0].tolist()
            raise ValueError(
                "reward_funcs: expected finite numbers or None, got "
                f"{self._rewards_per_func[row, column].item()} from "
                f"{self.reward_func_names[column]!r}; bound what it gives"
            )
        found = self._rewards_per_func[mine].double()
        weights = self.reward_weights.to(found)
        judged = ~found.isnan().all(1)
        token_rewards = found.new_zeros(len(found), width)
        if self._rewards is not None:
            column = self.reward_funcs.index(self._rewards)
            for i, row in enumerate(self._rewards.found):
                if row is not None:
                    token_rewards[i, : len(row)] = row.to(token_rewards)
            token_rewards *= weights[column]
            found = found.clone()
            found[:, column] = 0.0
        return token_rewards, (found * weights).nansum(1), judged

    def _policy_logprobs(self, output: dict[str, Any]) -> Tensor:
        """[B, C] of the policy that wrote the completions."""
        known = output.get("old_per_token_logps")
        if known is not None:
            return known
        args, training = self.args, self.model.training
        rows = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        others = {name: x for name, x in output.items() if name not in NOT_FORWARDED}
        with torch.no_grad():
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].shape[1],
                batch_size=rows,
                **others,
            )
        return logps

    def _of_all(self, x: Tensor) -> Tensor:
        """[B, C] of this process -> of all, one after the other, padded with 0 to one width."""
        if self.accelerator.num_processes == 1:
            return x
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    def _log_kl(self, given: Completions, mode: str) -> None:
        """The mean over all processes' tokens of log pi - log pi_ref. TRL logs it with its loss,
        which has none here.
        """
        assert given.logprobs is not None and given.ref_logprobs is not None
        moved = (given.logprobs - given.ref_logprobs)[given.mask].double()
        sums = torch.stack([moved.sum(), moved.new_tensor(len(moved))])[None]
        total, count = self.accelerator.gather(sums).sum(0).tolist()
        self._metrics[mode]["credit/kl"].append(total / max(count, 1))

    def _log_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """In the table of completions, their mean over tokens takes the place of TRL's."""
        means = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        table: Any = self._logs["advantages"]
        for _ in range(min(len(means), len(table))):
            table.pop()
        table.extend(means.tolist())

    def _compute_loss(self, model, inputs):
        if not self.args.kl_in_reward:
            return super()._compute_loss(model, inputs)
        beta, self.beta = self.beta, 0.0
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **others,
    ):
        if self._is_vlm:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **others,
            )
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-logits_to_keep] = -100
        size = batch_size or len(input_ids)
        parts = [
            self._scores(model, x, mask, y, compute_entropy, compute_aux_loss)
            for x, mask, y in zip(
                *(t.split(size) for t in (input_ids, attention_mask, labels)), strict=True
            )
        ]
        logps, entropies, losses = zip(*parts, strict=True)
        return (
            torch.cat(logps)[:, -logits_to_keep:],
            torch.cat(entropies)[:, -logits_to_keep:] if compute_entropy else None,
            torch.stack(losses).mean() if compute_aux_loss else None,
        )

    def _scores(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        entropy: bool,
        aux_loss: bool,
    ) -> Sequence[Any]:
        """Log-probs and entropies [B, T-1], and the routers' loss, of some rows."""
        spec = head_of(self.accelerator, model)
        flags = {"output_router_logits": True} if aux_loss else {}
        inputs = {"input_ids": ids, "attention_mask": mask}
        # as transformers' generate() does
        if spec.takes_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with self.accelerator.autocast(), router_logits(spec, aux_loss) as routed:
            shared = self._shared.rows(model, spec, inputs)
            found = token_logprobs(
                model,
                labels,
                outputs=("entropy",) if entropy else (),
                entropy_gradient=entropy and self._entropy_bonus_enabled,
                temperature=self.temperature,
                memory_budget=self.args.treg_memory_budget,
                share_prompt=shared,
                **inputs,
                **flags,
            )
        loss = balance(spec, routed[-1], mask, shared or None) if routed else None
        return found.logprobs, found.entropy, loss
