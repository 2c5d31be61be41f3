"""A thin trainer: transformers' own loop over preference pairs, with the fused loss inside the
model's forward.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from treg.data import LOSS_KEYS, ExampleLoader, PairCollator, first_pairs, pack_pairs
from treg.data.annotated import REF_COLUMNS, REF_TOKEN_COLUMNS
from treg.heads import check_sequences, install_head, run_head
from treg.ops import fused_treg_loss, linear_logprobs
from treg.results import TRegLoss
from treg.trainer.config import TRegConfig
from treg.trainer.metrics import PairMetrics

log = logging.getLogger(__name__)

STATISTICS = ("entropy", "mean_logit", "is_top1")
CARD = """
## Objective

loss_type={loss_type}, beta={beta}, alpha={alpha}, gamma={gamma}, label_smoothing={label_smoothing},
weighting={weighting}. With alpha > 0 a regularizer pulls the policy's implicit token rewards towards those that the
reference model gives under contrastive prompts: *T-REG: Preference Optimization with Token-Level Reward Regularization*
([arXiv 2412.02685](https://arxiv.org/abs/2412.02685)), over *Direct Preference Optimization*
([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)).

```bibtex
@inproceedings{{zhou2025treg,
  title     = {{T-REG: Preference Optimization with Token-Level Reward Regularization}},
  author    = {{Zhou, Wenxuan and others}},
  booktitle = {{Annual Meeting of the Association for Computational Linguistics}},
  year      = {{2025}},
  eprint    = {{2412.02685}}
}}
```
"""


class TRegTrainer(Trainer):
    """Trains a causal LM on preference pairs with T-REG or any objective of `treg.losses`.

    The head is read by `treg.heads`; only the hidden states of scored tokens reach it, inside the
    model's own forward, so that what wraps the model (DDP, PEFT, accelerate) sees a forward like
    any other.

    Args:
        model: a causal LM, a PEFT model, or a name or path, which is loaded in float32.
        ref_model: the reference, and the model that annotated the data. It runs only if the data
            have no reference log-probs. None: the model as it starts; with PEFT, the model with its
            adapters disabled.
        args: TRegConfig.
        train_dataset, eval_dataset: the path of an annotated file, or its examples; or, with
            alpha=0, anything that `treg.data.load_pairs` reads. eval_dataset also as a dict of
            them.
        processing_class: the tokenizer; None: the model's.
        peft_config: wraps the model with adapters.
    Raises:
        ValueError: data without token rewards and alpha > 0, annotations of another model, no
            reference, a head that cannot be read.
    """

    # the loss is divided by the pairs of a whole step, so that 1 x 8 and 8 x 1 are the same step
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: nn.Module | None = None,
        args: TRegConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        args = TRegConfig("treg-output") if args is None else args
        for name in (
            "model_init",
            "compute_loss_func",
            "compute_metrics",
            "preprocess_logits_for_metrics",
        ):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: expected None, got {kwargs[name]!r}; the loss and its metrics are the trainer's"
                )
        if model is None or ref_model is model:
            raise ValueError(
                "ref_model: expected another model than the one that trains; pass a copy of it"
                if model is not None
                else "model: expected a causal LM, got None"
            )
        if isinstance(model, (str, Path)):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        if args.disable_dropout:
            for x in (model, ref_model):
                _disable_dropout(x)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.n_gpu > 1:
            raise ValueError(
                f"expected one GPU a process, got {args.n_gpu}; start with `accelerate launch`"
            )
        self.loss_options = args.loss_options
        adapters = hasattr(model, "disable_adapter")
        if adapters and model.active_peft_config.is_prompt_learning and args.packing:
            kind = model.active_peft_config.peft_type
            raise ValueError(
                f"packing: expected False with {kind}, whose virtual tokens begin a row, got True"
            )
        load = ExampleLoader(
            processing_class,
            model if ref_model is None else ref_model,
            max_length=args.max_length,
            need_rewards=args.alpha > 0,
            adapters=ref_model is not None or not adapters,
            check_fingerprint=not args.ignore_fingerprint,
        )
        sets = {"train_dataset": train_dataset}
        several = isinstance(eval_dataset, Mapping)
        evals = (
            {f"eval_dataset[{k!r}]": x for k, x in eval_dataset.items()}
            if several
            else {"eval_dataset": eval_dataset}
        )
        loaded = {name: None if x is None else load(x, name) for name, x in (sets | evals).items()}
        self.data_reports = load.reports
        self._source = self._reference_source(loaded, ref_model, adapters)
        train_dataset, *rest = loaded.values()
        eval_dataset = dict(zip(eval_dataset, rest, strict=True)) if several else rest[0]
        if args.token_budget is not None and train_dataset is not None:
            train_dataset = pack_pairs(train_dataset, args.token_budget)

        for x in (model, ref_model if self._source == "model" else None):
            if x is not None:
                check_sequences(install_head(x), packing=args.packing)
        if getattr(model.config, "output_router_logits", False):
            log.warning(
                "output_router_logits: the router's auxiliary loss is not part of this trainer's loss"
            )
        kwargs.setdefault(
            "data_collator", PairCollator(processing_class.pad_token_id or 0, args.packing)
        )
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = (
            True  # what transformers before 5.19 reads for loss_is_scaled_for_ga
        )
        self.ref_model = None
        if self._source == "model":
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "ref_model: expected None under FSDP and DeepSpeed; annotate the data with it first"
                )
            ref_model.requires_grad_(False).eval()
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self._metrics = {"train": PairMetrics(), "eval": PairMetrics()}

    def _reference_source(self, sets: dict, ref_model: nn.Module | None, adapters: bool) -> str:
        """Where reference log-probs come from: "none", the "data" where all have them, the "model",
        the "adapters".
        """
        if self.loss_options.objective.reference_free:
            return "none"
        lack = [
            k
            for k, x in sets.items()
            if x is not None and not x[0].keys() & {*REF_COLUMNS, *REF_TOKEN_COLUMNS}
        ]
        if lack and ref_model is None and not adapters:
            raise ValueError(
                f"{lack[0]}: expected the columns {', '.join(REF_COLUMNS)}, found none; run `treg annotate`, give a "
                "ref_model, or train adapters"
            )
        return "data" if not lack else "adapters" if ref_model is None else "model"

    # -- loss
    # -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self._unpack(inputs)
        every = self.state.logging_steps
        logged = (
            self.args.logging_strategy == "steps"
            and every
            and (self.state.global_step + 1) % every == 0
        )
        result = self._run(model, batch, "train", "sum", STATISTICS if logged else ())
        loss = result.loss / (batch["pairs"] if num_items_in_batch is None else num_items_in_batch)
        return (loss, result) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs, metrics = self._prepare_inputs(inputs), self._metrics["eval"]
        before = dict(metrics.sums)
        kept = self._kept(len(inputs["lengths"]) // 2)
        batch = self._unpack(first_pairs(inputs, max(kept, 1)))
        with torch.no_grad(), self.compute_loss_context_manager():
            result = self._run(model, batch, "eval", "none", STATISTICS)
        metrics.add("loss", result.loss)
        if not kept:  # the names must be the same in every process
            metrics.sums = dict.fromkeys(metrics.sums, (0.0, 0.0)) | before
        return result.loss.mean(), None, None

    def _run(
        self, model: nn.Module, batch: dict, mode: str, reduction: str, outputs: tuple[str, ...]
    ) -> TRegLoss:
        """The loss of a batch, inside the model's forward; its metrics are added up under mode."""
        ref = self._reference_logps(model, batch)
        options = self.loss_options

        def head_fn(hidden: Tensor, operands: dict) -> TRegLoss:
            return fused_treg_loss(
                _scored_rows(hidden, batch),
                target=batch["target"],
                token_rewards=batch["token_rewards"],
                ref_logps=ref,
                cu_seqlens=batch["cu_seqlens"],
                reduction=reduction,
                outputs=outputs,
                memory_budget=self.args.memory_budget,
                **operands,
                loss_type=options.loss_type,
                beta=options.beta,
                alpha=options.alpha,
                gamma=options.gamma,
                label_smoothing=options.label_smoothing,
                weighting=options.weighting,
            )

        result = run_head(model, head_fn, **batch["model"])
        self._metrics[mode].record(result, batch["lengths"], batch["token_rewards"], ref)
        return result

    def _kept(self, pairs: int) -> int:
        """Pairs of an evaluation batch that count: the last batch of several processes is filled up
        with repeats.
        """
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if not state.end_of_dataloader or state.remainder <= 0 or pairs != size:
            return pairs
        return min(max(state.remainder - self.args.process_index * size, 0), pairs)

    def _unpack(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A collated batch on the device: the model's own arguments under `model`, the loss's
        beside them.
        """
        batch = dict(inputs)
        batch |= {"model": {k: batch.pop(k) for k in list(batch) if k not in LOSS_KEYS}}
        lengths, device = batch["lengths"], batch["target"].device
        batch["pairs"] = len(lengths) // 2
        batch["cu_seqlens"] = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        for name in ("token_rewards", "ref_logps"):
            x = None if batch.get(name) is None else torch.from_numpy(batch[name])
            if x is not None and device.type == "cuda":
                x = x.pin_memory()  # a pageable copy would wait for the device
            batch[name] = None if x is None else x.to(device, non_blocking=True)
        return batch

    @torch.no_grad()
    def _reference_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        """Reference log-probs: [2B] sums or [N] of each token from the data, [N] from a model."""
        if self._source in ("none", "data"):
            return batch["ref_logps"] if self._source == "data" else None

        def head_fn(hidden: Tensor, operands: dict) -> Tensor:
            rows = _scored_rows(hidden, batch)
            return linear_logprobs(
                rows, target=batch["target"], memory_budget=self.args.memory_budget, **operands
            ).logprobs

        if self.ref_model is not None:
            return run_head(self.ref_model, head_fn, **batch["model"])
        bare = self.accelerator.unwrap_model(model)
        training = bare.training
        try:
            with bare.eval().disable_adapter():  # no dropout or noise in the reference
                return run_head(bare, head_fn, **batch["model"])
        finally:
            bare.train(training)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Pairs of all batches of an optimizer step over all processes, divided by the processes
        (DDP averages).

        The step's tokens are counted here too, in the state, which is what a checkpoint keeps.
        """
        if not batch_samples or "lengths" not in batch_samples[0]:
            return None
        counts = [
            sum(len(b["lengths"]) // 2 for b in batch_samples),
            sum(int(b["num_tokens"]) for b in batch_samples),
        ]
        if self.accelerator.num_processes > 1:  # the host waits for the device here
            counts = self.accelerator.reduce(torch.tensor(counts, device=device), "sum").tolist()
        if self.args.include_num_input_tokens_seen == "no":  # else transformers counts them
            self.state.num_input_tokens_seen += counts[1]
        return counts[0] / self.accelerator.num_processes

    # -- metrics
    # --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {
                **logs,
                **self._metrics["train"].means(self.accelerator),
                "num_tokens": self.state.num_input_tokens_seen,
            }
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._metrics["eval"] = PairMetrics()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._metrics["eval"].means(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{k}": x for k, x in means.items()})
        return output

    def create_model_card(self, *args, tags: str | list[str] | None = None, **kwargs) -> None:
        """transformers' model card, with the objective, its numbers and the papers."""
        own = ["treg", "preference-optimization", self.loss_options.loss_type]
        super().create_model_card(
            *args, tags=[*([tags] if isinstance(tags, str) else tags or []), *own], **kwargs
        )
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            card.write_text(card.read_text() + CARD.format(**vars(self.loss_options)))


def _scored_rows(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """[N, D] of [S, T, D] hidden states; the virtual tokens of prompt-learning adapters stand
    before the T.
    """
    return hidden[:, -batch["model"]["input_ids"].shape[1] :].flatten(0, -2)[batch["scored"]]


def _disable_dropout(model: nn.Module | None) -> None:
    """Of the model's own; an adapter's dropout is an option of the adapter."""
    for path, module in () if model is None else model.named_modules():
        if "lora_dropout" in path:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [k for k, x in vars(module).items() if "dropout" in k and isinstance(x, float)]:
            setattr(module, name, 0.0)
