"""DPOTrainer with T-REG: TRL's own loss, metrics, evaluation and reference, on log-probs of
treg.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from trl import DPOTrainer

from treg.data import Pair, RowProblem, pair_tokens
from treg.data.annotated import ID_COLUMNS, REF_COLUMNS, REWARD_COLUMNS
from treg.data.batches import LOSS_STREAMS, MASK_COLUMNS
from treg.data.examples import check_made_with
from treg.heads import HeadSpec
from treg.heads.logprobs import score_tokens, token_logprobs
from treg.integrations.trl.config import TRegDPOConfig, own_copy
from treg.integrations.trl.data import (
    RewardCollator,
    ScoredCollator,
    check_ids,
    columns_of,
    each_of,
    mapped,
    prepared,
    read_dataset,
    tensor_of,
    text_pairs,
)
from treg.integrations.trl.heads import as_reference, head_of
from treg.integrations.trl.own import REF_STREAM, OwnLoss, own_options
from treg.integrations.trl.patch import STATISTICS
from treg.integrations.trl.routers import balance, router_logits
from treg.integrations.trl.sharing import SharedBatches
from treg.losses.regularizer import token_regularizer
from treg.results import PairLoss
from treg.rewards import Context, load_source
from treg.rewards.annotate import PART_PAIRS, annotate_pairs
from treg.rewards.cutting import cut_parts, part_tokens
from treg.rewards.response import ResponsePairs
from treg.trainer.card import PAPER

log = logging.getLogger(__name__)

# of a batch, for objectives that TRL lacks
OWN_INPUTS = (*LOSS_STREAMS, REF_STREAM, "pair_values")


class TRegDPOTrainer(DPOTrainer):
    """DPOTrainer with T-REG.

        L   = L_TRL + treg_alpha * sum_t c_t * ( - rhat_t * lp_t )
        c_t = | d L_TRL / d lp_t |, detached

    Paper: T-REG, arXiv 2412.02685, Eq. 2, to which this is equal for loss_type="sigmoid".
    Differs: it is defined here for every loss of TRL (see `treg.losses.regularizer`); where several
    are summed, c_t is the slope of the sum, an "sft" term included.

    With an objective of `treg.losses.OBJECTIVES` that TRL lacks, `treg.losses.treg_loss` takes the
    place of L_TRL and of the sum; rewards/* are then the implicit rewards of that objective. Those
    with a KL term run the reference in every step.

    The head is read by `treg.heads`, which refuses by name what it cannot read right. Everything
    else is TRL's.

    Args:
        train_dataset, eval_dataset: what DPOTrainer takes, or the path of a file that `treg
            annotate` wrote, or a Dataset with its columns. Annotated data bring token ids, token
            rewards and, unless ld_alpha is set, reference log-probs, so that no reference model is
            needed. For other data with treg_alpha > 0 the reference makes the rewards before
            training starts, once in every run: `treg annotate` keeps them.
        ref_model: as in DPOTrainer; beside annotated reference log-probs it is not run, only
            compared with the model that annotated the file.
        The others: as in DPOTrainer.
    """

    _tag_names: ClassVar = ["trl", "dpo", "treg"]
    _name = "T-REG DPO"
    _paper: ClassVar = PAPER | {
        "citation": f"{PAPER['citation']}\n\n{DPOTrainer._paper['citation']}"
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TRegDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        args = own_copy(args, TRegDPOConfig, model, "T-REG")
        files: dict = {}
        options = own_options(args)
        self._own = None if options is None else OwnLoss(options, args.treg_memory_budget)
        if self._own is not None:
            self._own.check_arguments(args)
        self._shared = SharedBatches(self, args)
        train_dataset = read_dataset(train_dataset, "train_dataset", files)
        eval_dataset = mapped(eval_dataset, lambda x, name: read_dataset(x, name, files))
        given = [x for x in (train_dataset, *each_of(eval_dataset)) if x is not None]
        annotated = args.ld_alpha is None and bool(given) and all(map(self._no_reference, given))
        args.precompute_ref_log_probs |= annotated
        super().__init__(
            model,
            None if annotated else ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            **kwargs,
        )
        if self._is_vision_dataset and (args.treg_alpha > 0 or self._own is not None):
            raise ValueError(
                "train_dataset: expected text for treg_alpha > 0 and for objectives of treg, got "
                "images; set treg_alpha=0 and a loss_type of TRL's"
            )
        for x in (self.model, self.ref_model):
            if x is not None:
                self._shared.try_on(self._head_of(x))
        if self._own is not None:
            # TRL's own loss counts for nothing; its metrics and its routers' loss stay
            self.loss_types, self.loss_weights, self.label_smoothing = ["sigmoid"], [0.0], 0.0
            self._own.check_weights(sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        reference = next(x for x in (ref_model, self.ref_model, self.model) if x is not None)
        adapters = reference is not self.model or not hasattr(self.model, "disable_adapter")
        for path, meta in () if args.treg_ignore_fingerprint else files.items():
            check_made_with(
                path,
                meta,
                self.processing_class,
                reference,
                adapters=adapters,
                fix="set treg_ignore_fingerprint",
            )
        check_ids(self.train_dataset, "train_dataset", self.model)
        mapped(self.eval_dataset, lambda x, name: check_ids(x, name, self.model))
        sets = [*each_of(self.train_dataset), *each_of(self.eval_dataset)]
        if any(set(MASK_COLUMNS) & columns_of(x) for x in sets):
            self.data_collator = ScoredCollator(
                self.data_collator, args.max_length, args.truncation_mode
            )
        if args.treg_alpha > 0 or (self._own is not None and self._own.needs_rewards):
            self.train_dataset = self._with_rewards(self.train_dataset, "train_dataset")
            self.eval_dataset = mapped(self.eval_dataset, self._with_rewards)
            self.data_collator = RewardCollator(
                self.data_collator, args.max_length, args.truncation_mode
            )
        if self._own is not None:
            self._own_collator()

    def _own_collator(self) -> None:
        """Let the collator gather what the own objective takes of each set."""
        sets = {"train_dataset": self.train_dataset}
        if isinstance(self.eval_dataset, Mapping):
            sets |= {f"eval_dataset[{name!r}]": x for name, x in self.eval_dataset.items()}
        else:
            sets["eval_dataset"] = self.eval_dataset
        given = {name: x for name, x in sets.items() if x is not None}
        found = {name: self._own.streams_of(columns_of(x), name) for name, x in given.items()}
        if len(set(found.values())) > 1:
            raise ValueError(f"eval_dataset: expected the streams of train_dataset, got {found}")
        inner = self.data_collator
        if isinstance(inner, RewardCollator):
            inner = inner.inner
        self.data_collator = RewardCollator(
            inner,
            self.args.max_length,
            self.args.truncation_mode,
            next(iter(found.values())),
            self._own.options.objective.pair_columns,
        )

    def _no_reference(self, dataset: Any) -> bool:
        """Whether a dataset brings all that the loss takes of the reference."""
        if self._own is None:
            return set(REF_COLUMNS) <= columns_of(dataset)
        free = self._own.options.objective.reference_free
        return free or self._own.brings_reference(columns_of(dataset))

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Token ids that are there already are taken as they are."""
        if not set(ID_COLUMNS) <= columns_of(dataset):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return prepared(dataset, dataset_name, args, weights_taken=self._own is not None)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        check_ids(dataset, name, self.model)
        if self._no_reference(dataset):
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        more = REWARD_COLUMNS if self._own is None else self._own.columns()
        more = (*more, *MASK_COLUMNS)
        self._signature_columns += [x for x in more if x not in self._signature_columns]

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """As DPOTrainer's; a dataset that is given here needs token rewards of its own."""
        sets = [x for x in each_of(eval_dataset) if isinstance(x, Dataset | IterableDataset)]
        for x in sets:
            check_ids(x, "eval_dataset", self.model)
        if self._own is not None:
            for x in sets:
                given = self._own.streams_of(columns_of(x), "eval_dataset")
                if given != self.data_collator.streams:
                    raise ValueError(
                        "eval_dataset: expected the streams of train_dataset, "
                        f"{', '.join(self.data_collator.streams) or 'none'}, got "
                        f"{', '.join(given) or 'none'}"
                    )
        elif self.args.treg_alpha > 0 and not all(
            set(REWARD_COLUMNS) <= columns_of(x) for x in sets
        ):
            raise ValueError(
                f"eval_dataset: expected the columns {', '.join(REWARD_COLUMNS)}; run `treg "
                "annotate` on the data, or give them to the trainer at its construction"
            )
        annotated = bool(sets) and all(map(self._no_reference, sets)) and self.ld_alpha is None
        with self._precomputed(
            False if annotated else self.precompute_ref_logps
        ):  # TRL makes none then
            return super().evaluate(eval_dataset, *args, **kwargs)

    def _with_rewards(self, dataset: Any, name: str) -> Any:
        """The dataset with token rewards, made by the source where there are none."""
        if set(REWARD_COLUMNS) <= columns_of(dataset):
            return dataset
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        text = {"chosen", "rejected"} <= columns_of(dataset)
        if isinstance(dataset, IterableDataset) or sharded or not text:
            got = "sharded weights" if sharded else type(dataset).__name__
            raise ValueError(
                f"{name}: expected the columns {', '.join(REWARD_COLUMNS)}, got {got} without; run "
                "`treg annotate` on the data, or set treg_alpha=0"
            )
        pairs, problems = text_pairs(dataset)
        found, refused = self._rewards_of(pairs)
        left = len(dataset) - len(found)
        if left:
            why = ", ".join(sorted({p.reason for p in [*problems, *refused]}))
            log.warning(
                "%s: %d of %d pairs get no token rewards and are left out: %s",
                name,
                left,
                len(dataset),
                why,
            )
        if not found:
            raise ValueError(f"{name}: expected pairs that can be given token rewards, found none")
        index, *rewards = zip(*found, strict=True)
        dataset = dataset.select(index)
        for column, values in zip(REWARD_COLUMNS, rewards, strict=True):
            dataset = dataset.add_column(column, list(values))
        return dataset

    def _rewards_of(
        self, pairs: list[Pair]
    ) -> tuple[list[tuple[int, list, list]], list[RowProblem]]:
        """(index, chosen rewards, rejected rewards) of pairs, over all processes, and what the
        source refuses in this one.
        """
        size, rank = self.accelerator.num_processes, self.accelerator.process_index
        found, problems = [], []
        longest_first = sorted(pairs, key=lambda pair: -pair_tokens(vars(pair)))
        with torch.inference_mode(), self._as_reference() as model:
            context = Context(
                model,
                self.processing_class,
                tokens_per_batch=self.args.treg_tokens_per_batch,
                pairs=ResponsePairs(longest_first, self.processing_class),
            )
            source = load_source(self.args.treg_rewards, self.args.source_options, context)
            for part in cut_parts(pairs, PART_PAIRS, part_tokens(model))[rank::size]:
                rows, refused = annotate_pairs(source, context, part, reference=False)
                for row in rows:
                    chosen, rejected = (row[column].tolist() for column in REWARD_COLUMNS)
                    found.append((row["index"], chosen, rejected))
                problems += refused
        return sorted(gather_object(found) if size > 1 else found), problems

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._own is not None:
            return self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        kept, grad = [], torch.is_grad_enabled()
        # in evaluation too the slope of the loss is needed, but not that of the model
        with torch.inference_mode(False), torch.enable_grad():
            inputs = {
                k: x.clone() if isinstance(x, Tensor) and x.is_inference() else x
                for k, x in inputs.items()
            }
            rewards = tensor_of(inputs.pop("token_rewards", None))
            if "ref_chosen_logps" not in inputs:
                reference = self.model if self.ref_model is None else self.ref_model
                if reference is self.model and not hasattr(self.model, "peft_config"):
                    fix = "a data_collator must pass on what its examples have"
                    raise ValueError(
                        f"inputs: expected {', '.join(REF_COLUMNS)}, got {', '.join(inputs)}; {fix}"
                    )
                inputs |= dict(
                    zip(REF_COLUMNS, self.compute_ref_log_probs(reference, inputs), strict=True)
                )
            with self._precomputed(True):
                policy = self._headed(model, tuple(STATISTICS), kept, grad=grad)
                found = super().compute_loss(policy, inputs, return_outputs, num_items_in_batch)
            loss, *rest = found if return_outputs else (found,)
            if rewards is not None:
                logps, rewards = kept[0], rewards[:, 1:].to(kept[0].device)
                scored = inputs["completion_mask"][:, 1:].bool().to(logps.device)
                alpha = self.args.treg_alpha
                loss = loss + token_regularizer(loss, logps, rewards, alpha, mask=scored)
                self._record(logps.detach(), rewards, scored)
        loss = loss if grad else loss.detach()
        return (loss, *rest) if return_outputs else loss

    def _own_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """The loss of an objective that TRL lacks, beside what TRL makes of the same log-probs."""
        own, kept, grad = self._own, [], torch.is_grad_enabled()
        streams = {k: tensor_of(x) for k, x in inputs.items() if k in OWN_INPUTS}
        inputs = {k: x for k, x in inputs.items() if k not in OWN_INPUTS}
        completion = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(completion == 0, -100)
        scored = completion[:, 1:].bool()
        ref_logps, score = None, None
        if REF_STREAM in streams:
            ref_logps = streams[REF_STREAM][:, 1:].to(scored.device)
        elif not own.options.objective.reference_free:
            if self.ref_model is None and not hasattr(self.model, "peft_config"):
                raise ValueError(
                    "ref_model: expected a reference that runs, got none: the policy cannot be its "
                    "own; give one, or data with the reference's log-prob of each token"
                )
            left_out = ("completion_mask", *REF_COLUMNS)
            given = {k: x for k, x in inputs.items() if k not in left_out}
            with torch.no_grad(), self._as_reference() as reference:
                shared = self._shared.rows(reference, self._head_of(reference), given)
                if own.options.with_kl:
                    states = own.reference_states(reference, labels, given, shared)
                    score = functools.partial(own.score_with_kl, states)
                else:
                    options = {"memory_budget": own.memory_budget, "share_prompt": shared}
                    ref_logps = token_logprobs(reference, labels, **options, **given).logprobs
        sums = torch.zeros(len(labels), device=labels.device)
        if ref_logps is not None:
            sums = torch.where(scored, ref_logps, 0.0).sum(1)
        inputs |= dict(zip(REF_COLUMNS, sums.chunk(2), strict=True))
        with torch.set_grad_enabled(grad), self._precomputed(True):
            policy = self._headed(model, tuple(STATISTICS), kept, grad=grad, score=score)
            found = super().compute_loss(policy, inputs, return_outputs, num_items_in_batch)
            loss, *rest = found if return_outputs else (found,)
            logps, others = kept
            ref_logps = others.get("ref_logprobs", ref_logps)
            result = own(logps, scored.to(logps.device), streams, ref_logps, others.get("kl"))
            loss = loss + result.loss.mean()
        self._record_own(result, scored)
        return (loss, *rest) if return_outputs else loss

    def _record_own(self, result: PairLoss, scored: Tensor) -> None:
        """The objective's implicit rewards in place of TRL's, and what its weights keep."""
        chosen, rejected = result.chosen_rewards, result.rejected_rewards
        rewards = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
        }
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, x in rewards.items():
            metrics[name][-1] = self.accelerator.gather(x.detach()).mean().item()
        kept = torch.stack([result.kept.sum(), scored.sum().to(result.kept)])
        kept, count = self.accelerator.gather(kept[None]).sum(0).tolist()
        metrics["treg/kept"].append(kept / max(count, 1))
        empty = self.accelerator.gather((result.kept == 0).double())
        metrics["treg/empty_answers"].append(empty.mean().item())

    def compute_ref_log_probs(self, model, inputs):
        inputs = {k: x for k, x in inputs.items() if k != "token_rewards"}
        return super().compute_ref_log_probs(self._headed(model), inputs)

    @contextlib.contextmanager
    def _precomputed(self, yes: bool) -> Iterator[None]:
        """Whether TRL takes the reference log-probs to be in the batch."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, yes
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    def _head_of(self, model: Any) -> HeadSpec:
        """The head of a model, which may be wrapped; read and checked at the first time."""
        return head_of(self.accelerator, model)

    def _headed(
        self,
        model: Any,
        outputs: tuple[str, ...] = (),
        kept: list | None = None,
        grad: bool = True,
        score: Callable | None = None,
    ) -> Callable:
        """model, with the log-probs of treg where TRL asks for those of its own head; they are
        added to kept, and after them whatever else score gives. score: of the names of statistics,
        what `score_tokens` takes.
        """
        spec = self._head_of(model)
        if not self.use_weighting:
            outputs = tuple(name for name in outputs if name != "log_sum_sq_probs")

        def call(*, labels=None, fused_lm_head=False, **inputs):
            with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
                if not fused_lm_head:
                    return model(**inputs)
                shared = self._shared.rows(model, spec, inputs)
                with router_logits(spec, bool(inputs.get("output_router_logits"))) as routed:
                    names = tuple(STATISTICS[name] for name in outputs)
                    if score is None:
                        budget = self.args.treg_memory_budget
                        options = {"memory_budget": budget, "share_prompt": shared}
                        found = token_logprobs(
                            model, labels, outputs=names, **options, **inputs
                        )._asdict()
                    else:
                        found = score_tokens(
                            model, labels, score(names), share_prompt=shared, **inputs
                        )
                mask, rows = inputs.get("attention_mask"), shared or None
                aux_loss = balance(spec, routed[-1], mask, rows) if routed else None
            logps = found["logprobs"]
            if kept is not None:
                logps = logps if grad else logps.detach().requires_grad_()
                kept.extend((logps, found))
            statistics = {name: found[STATISTICS[name]] for name in outputs}
            return SimpleNamespace(log_probs=logps, aux_loss=aux_loss, **statistics)

        return call

    def _as_reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The reference model, in eval mode."""
        return as_reference(self.accelerator, self.model, self.ref_model)

    def _record(self, logps: Tensor, rewards: Tensor, scored: Tensor) -> None:
        """Metrics of a batch; as TRL's, over all processes."""
        pairs = logps.shape[0] // 2
        sums = [-(self.beta * rewards * logps).sum(), rewards.new_tensor(pairs)]
        for side in (slice(pairs), slice(pairs, None)):
            sums += [(rewards[side] * scored[side]).sum(), scored[side].sum()]
        totals = (
            self.accelerator.gather_for_metrics(torch.stack([x.double() for x in sums])[None])
            .sum(0)
            .tolist()
        )
        metrics = self._metrics["train" if self.model.training else "eval"]
        for i, name in enumerate(("treg/reg_loss", "treg/reward_chosen", "treg/reward_rejected")):
            metrics[name].append(totals[2 * i] / max(totals[2 * i + 1], 1))
