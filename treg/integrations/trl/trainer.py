"""DPOTrainer with T-REG: TRL's own loss, metrics, evaluation and reference, on log-probs of
treg.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import trl.trainer.utils
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DPOConfig, DPOTrainer

from treg.checks import check_number
from treg.data import Pair, RowProblem, pair_tokens
from treg.data.annotated import ID_COLUMNS, REF_COLUMNS, REWARD_COLUMNS
from treg.data.examples import check_made_with
from treg.data.reading import json_object
from treg.heads import HeadSpec, check_sequences, install_head
from treg.heads.logprobs import token_logprobs
from treg.integrations.trl.data import (
    RewardCollator,
    columns_of,
    each_of,
    mapped,
    prepared,
    read_dataset,
    text_pairs,
)
from treg.integrations.trl.patch import STATISTICS
from treg.losses.regularizer import token_regularizer
from treg.rewards import DEFAULT_SOURCE, Context, load_source, make_options, source_class
from treg.rewards.annotate import PART_PAIRS, annotate_pairs
from treg.rewards.base import ResponsePairs

log = logging.getLogger(__name__)


@dataclass
class TRegDPOConfig(DPOConfig):
    """DPOConfig, and

    treg_alpha: weight of the regularizer, >= 0; 0 is the plain objective.
    treg_rewards: the source of token rewards where the trainer makes them itself, a key of
        `treg.rewards.SOURCES` or "package.module:Class".
    treg_rewards_options: values of the fields of the source's Options, as a dict or as JSON.
    treg_prompts: its option `prompts`, a YAML file with contrastive prompts.
    treg_tokens_per_batch: tokens of one forward then.
    treg_memory_budget: bytes of temporaries of the head, see `treg.ops.linear_logprobs`.
    treg_ignore_fingerprint: train also where the annotated data were made with another model or
    tokenizer.
    """

    treg_alpha: float = field(default=0.25, metadata={"help": "Weight of the T-REG regularizer."})
    treg_rewards: str = field(
        default=DEFAULT_SOURCE,
        metadata={"help": "Source of token rewards, or package.module:Class for your own."},
    )
    treg_rewards_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the source, as JSON."}
    )
    treg_prompts: str | None = field(
        default=None, metadata={"help": "YAML file with the contrastive prompts."}
    )
    treg_tokens_per_batch: int = field(
        default=16384, metadata={"help": "Tokens of a forward that makes rewards."}
    )
    treg_memory_budget: int | None = field(
        default=None, metadata={"help": "Bytes of temporaries of the head."}
    )
    treg_ignore_fingerprint: bool = field(
        default=False, metadata={"help": "Accept data of another model."}
    )

    def __post_init__(self):
        check_number("treg_alpha", self.treg_alpha)
        if self.treg_alpha < 0:
            raise ValueError(
                f"treg_alpha: expected a number >= 0 (0: no regularizer), got {self.treg_alpha!r}"
            )
        # refused here, before any model loads
        make_options(self.treg_rewards, self.source_options)
        streams = source_class(self.treg_rewards).streams
        if self.treg_alpha and ("token_rewards" not in streams or "token_weights" in streams):
            raise ValueError(
                "treg_rewards: expected a source of token_rewards and no token_weights, got "
                f"{self.treg_rewards!r}, which gives {', '.join(streams)}; TRegTrainer takes both"
            )
        super().__post_init__()

    @property
    def source_options(self) -> dict[str, Any]:
        """The options of the source of token rewards, by name."""
        options = json_object("treg_rewards_options", self.treg_rewards_options)
        if self.treg_prompts is not None:
            if "prompts" in options:
                raise ValueError(
                    "treg_prompts: expected None beside prompts in treg_rewards_options, got "
                    f"{self.treg_prompts!r}"
                )
            options["prompts"] = self.treg_prompts
        return options


class TRegDPOTrainer(DPOTrainer):
    """DPOTrainer with T-REG.

        L   = L_TRL + treg_alpha * sum_t c_t * ( - rhat_t * lp_t )
        c_t = | d L_TRL / d lp_t |, detached

    Paper: T-REG, arXiv 2412.02685, Eq. 2, to which this is equal for loss_type="sigmoid".
    Differs: it is defined here for every loss of TRL (see `treg.losses.regularizer`); where several
    are summed, c_t is the slope of the sum, an "sft" term included.

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
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = TRegDPOConfig(f"{name.split('/')[-1] or 'model'}-T-REG")
        elif not isinstance(args, TRegDPOConfig):
            raise TypeError(f"args: expected a TRegDPOConfig, got {type(args).__name__}")
        args, files = copy.copy(args), {}
        train_dataset = read_dataset(train_dataset, "train_dataset", files)
        eval_dataset = mapped(eval_dataset, lambda x, name: read_dataset(x, name, files))
        given = [x for x in (train_dataset, *each_of(eval_dataset)) if x is not None]
        annotated = (
            args.ld_alpha is None
            and bool(given)
            and all(set(REF_COLUMNS) <= columns_of(x) for x in given)
        )
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
        if self._is_vision_dataset and args.treg_alpha > 0:
            raise ValueError(
                "train_dataset: expected text for treg_alpha > 0, got images; set treg_alpha=0"
            )
        for x in (self.model, self.ref_model):
            if x is not None:
                self._head_of(x)
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
        if args.treg_alpha > 0:
            self.train_dataset = self._with_rewards(self.train_dataset, "train_dataset")
            self.eval_dataset = mapped(self.eval_dataset, self._with_rewards)
            self.data_collator = RewardCollator(
                self.data_collator, args.max_length, args.truncation_mode
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Token ids that are there already are taken as they are."""
        if not set(ID_COLUMNS) <= columns_of(dataset):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return prepared(dataset, dataset_name, args)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return (
            dataset
            if set(REF_COLUMNS) <= columns_of(dataset)
            else super()._precompute_ref_logps(dataset, name, batch_size)
        )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [
            name for name in REWARD_COLUMNS if name not in self._signature_columns
        ]

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """As DPOTrainer's; a dataset that is given here needs token rewards of its own."""
        sets = [x for x in each_of(eval_dataset) if isinstance(x, Dataset | IterableDataset)]
        if self.args.treg_alpha > 0 and not all(set(REWARD_COLUMNS) <= columns_of(x) for x in sets):
            raise ValueError(
                f"eval_dataset: expected the columns {', '.join(REWARD_COLUMNS)}; run `treg "
                "annotate` on the data, or give them to the trainer at its construction"
            )
        annotated = (
            bool(sets)
            and all(set(REF_COLUMNS) <= columns_of(x) for x in sets)
            and self.ld_alpha is None
        )
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
            for i in range(rank * PART_PAIRS, len(pairs), size * PART_PAIRS):
                part = pairs[i : i + PART_PAIRS]
                rows, refused = annotate_pairs(source, context, part, reference=False)
                for row in rows:
                    chosen, rejected = (row[column].tolist() for column in REWARD_COLUMNS)
                    found.append((row["index"], chosen, rejected))
                problems += refused
        return sorted(gather_object(found) if size > 1 else found), problems

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        kept, grad = [], torch.is_grad_enabled()
        # in evaluation too the slope of the loss is needed, but not that of the model
        with torch.inference_mode(False), torch.enable_grad():
            inputs = {
                k: x.clone() if isinstance(x, Tensor) and x.is_inference() else x
                for k, x in inputs.items()
            }
            rewards = inputs.pop("token_rewards", None)
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
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        new = not hasattr(getattr(bare, "get_base_model", lambda: bare)(), "_treg_head")
        spec = install_head(bare)
        if new:
            check_sequences(spec)
        return spec

    def _headed(
        self, model: Any, outputs: tuple[str, ...] = (), kept: list | None = None, grad: bool = True
    ) -> Callable:
        """model, with the log-probs of treg where TRL asks for those of its own head; they are
        added to kept.
        """
        spec = self._head_of(model)
        if not self.use_weighting:
            outputs = tuple(name for name in outputs if name != "log_sum_sq_probs")

        def call(*, labels=None, fused_lm_head=False, **inputs):
            with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
                if not fused_lm_head:
                    return model(**inputs)
                with _router_logits(spec, bool(inputs.get("output_router_logits"))) as routed:
                    names = tuple(STATISTICS[name] for name in outputs)
                    found = token_logprobs(
                        model,
                        labels,
                        outputs=names,
                        memory_budget=self.args.treg_memory_budget,
                        **inputs,
                    )
                aux_loss = (
                    _balance(spec, routed[-1], inputs.get("attention_mask")) if routed else None
                )
            logps = found.logprobs
            if kept is not None:
                logps = logps if grad else logps.detach().requires_grad_()
                kept.append(logps)
            statistics = {name: getattr(found, STATISTICS[name]) for name in outputs}
            return SimpleNamespace(log_probs=logps, aux_loss=aux_loss, **statistics)

        return call

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        """The reference model, in eval mode."""
        model, adapter = self.ref_model, contextlib.nullcontext()
        if model is None:
            model = self.accelerator.unwrap_model(self.model)
            if hasattr(model, "peft_config"):
                adapter = trl.trainer.utils.use_adapter(
                    model, "ref" if "ref" in model.peft_config else None
                )
        training = model.training
        try:
            with adapter:
                yield model.eval()
        finally:
            model.train(training)

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


@contextlib.contextmanager
def _router_logits(spec: HeadSpec, wanted: bool) -> Iterator[list]:
    """What the backbone returns as router_logits meanwhile."""
    found: list = []
    if not wanted:
        yield found
        return
    hook = spec.backbone.register_forward_hook(
        lambda module, args, output: found.append(getattr(output, "router_logits", None))
    )
    try:
        yield found
    finally:
        hook.remove()


def _balance(spec: HeadSpec, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts, as its own forward computes it."""
    config = spec.model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if router_logits is None or experts is None:
        raise ValueError(
            f"router_aux_loss_coef: expected 0 for {type(spec.model).__name__}, which returns no "
            "router_logits that a balancing loss can be made of"
        )
    return load_balancing_loss_func(
        router_logits, experts, config.num_experts_per_tok, attention_mask
    )
