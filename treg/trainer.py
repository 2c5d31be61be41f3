"""A thin trainer: transformers' own loop over preference pairs, with the fused loss inside the model's forward."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from treg.data import LOSS_KEYS, EncodeOptions, ExampleLoader, PairCollator, first_pairs, pack_pairs
from treg.heads import check_sequences, install_head
from treg.losses import LossOptions
from treg.ops import fused_treg_loss, linear_logprobs
from treg.results import TRegLoss

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


@dataclass
class TRegConfig(TrainingArguments):
    """TrainingArguments and what the loss needs.

    beta, alpha, gamma, label_smoothing, loss_type, weighting: as in `treg.ops.fused_treg_loss`.
    max_length: tokens of prompt and completion, where the trainer tokenizes.
    packing: sequences one after the other without padding instead of padded rows; the loss is the same.
    token_budget: with packing, each of the per_device_train_batch_size items of a batch is a pack of whole pairs of at
        most so many tokens, instead of one pair.
    memory_budget: bytes of temporaries of the loss; None: see `treg.ops.linear_logprobs`.
    disable_dropout: of policy and reference.
    ignore_fingerprint: train also where the annotated data were made with another model or tokenizer.
    """

    beta: float = field(default=0.1, metadata={"help": "Scale of the implicit reward, > 0."})
    alpha: float = field(default=0.25, metadata={"help": "Weight of the T-REG regularizer; 0 is the plain objective."})
    gamma: float = field(default=0.0, metadata={"help": "Margin of simpo."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of labels taken as wrong, in [0, 0.5)."})
    loss_type: str = field(default="dpo", metadata={"help": "A key of treg.losses.OBJECTIVES."})
    weighting: str = field(default="gradient", metadata={"help": "'gradient', or 'static' (w = 1)."})
    max_length: int | None = field(default=1024, metadata={"help": "Tokens of prompt and completion."})
    packing: bool = field(default=False, metadata={"help": "Lay sequences out one after the other, without padding."})
    token_budget: int | None = field(default=None, metadata={"help": "With packing: tokens of a pack of pairs."})
    memory_budget: int | None = field(default=None, metadata={"help": "Bytes of temporaries of the loss."})
    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off in policy and reference."})
    ignore_fingerprint: bool = field(default=False, metadata={"help": "Accept data annotated by another model."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the collator needs all."})

    def __post_init__(self):
        super().__post_init__()
        self.loss_options  # noqa: B018 - checked here, before any model is loaded
        EncodeOptions(self.max_length)
        if self.token_budget is not None and not self.packing:
            raise ValueError(f"token_budget: expected None without packing, got {self.token_budget}; set packing=True")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, got True; the collator needs every column")
        if self.use_liger_kernel:  # for its layers; with its own loss it would replace the forward that has the head
            own_loss_off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **own_loss_off}

    @property
    def loss_options(self) -> LossOptions:
        return LossOptions(self.loss_type, self.beta, self.alpha, self.gamma, self.label_smoothing, self.weighting)


class TRegTrainer(Trainer):
    """Trains a causal LM on preference pairs with T-REG or any objective of `treg.losses`.

    The head is read by `treg.heads`; only the hidden states of scored tokens reach it, inside the model's own forward,
    so that what wraps the model (DDP, PEFT, accelerate) sees a forward like any other.

    Args:
        model: a causal LM, a PEFT model, or a name or path.
        ref_model: the reference. None: the data's reference sums, if they are annotated; else, with PEFT, the model
            with its adapters disabled. Reference-free objectives need none.
        args: TRegConfig.
        train_dataset, eval_dataset: the path of an annotated file, or its examples; or, with alpha=0, anything that
            `treg.data.load_pairs` reads. eval_dataset also as a dict of them.
        processing_class: the tokenizer; None: the model's.
        peft_config: wraps the model with adapters.
    Raises:
        ValueError: data without token rewards and alpha > 0, annotations of another model, no reference, a head that
            cannot be read.
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
        if isinstance(model, (str, Path)):
            model = AutoModelForCausalLM.from_pretrained(model)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.n_gpu > 1:
            raise ValueError(f"expected one GPU a process, got {args.n_gpu}; start with `accelerate launch`")
        self.loss_options = loss_options = args.loss_options
        adapters = hasattr(model, "disable_adapter")
        if ref_model is model:
            raise ValueError("ref_model: expected another model than the one that trains; pass a copy of it")
        if adapters and model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"peft_config: expected adapters on layers, got {model.active_peft_config.peft_type}, which puts "
                "virtual tokens before the sequence; use LoRA or its kin"
            )
        self._source = "model" if ref_model is not None else "data or adapters" if adapters else "data"
        if loss_options.objective.reference_free:
            self._source = "none"
        load = ExampleLoader(
            processing_class, model if ref_model is None else ref_model, max_length=args.max_length,
            need_rewards=args.alpha > 0, need_reference=self._source == "data",
            check_fingerprint=not args.ignore_fingerprint,
        )  # fmt: skip
        train_dataset = None if train_dataset is None else load(train_dataset, "train_dataset")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {k: load(x, f"eval_dataset[{k!r}]") for k, x in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = load(eval_dataset, "eval_dataset")
        self.data_reports = load.reports
        if args.token_budget is not None and train_dataset is not None:
            train_dataset = pack_pairs(train_dataset, args.token_budget)

        for x in (model, ref_model):
            if x is not None:
                check_sequences(install_head(x), packing=args.packing)
                _disable_dropout(x) if args.disable_dropout else None
        kwargs.setdefault("data_collator", PairCollator(processing_class.pad_token_id or 0, args.packing))
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset,
                         processing_class=processing_class, **kwargs)  # fmt: skip
        self.model_accepts_loss_kwargs = True  # what transformers before 5.19 reads for loss_is_scaled_for_ga
        self.ref_model = None
        if self._source == "model":
            ref_model.requires_grad_(False).eval()
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self._sums: dict[str, dict[str, tuple]] = {"train": {}, "eval": {}}  # name -> (sum, count) since the last log

    # -- loss -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self._unpack(inputs)
        every = self.state.logging_steps
        logged = self.args.logging_strategy == "steps" and every and (self.state.global_step + 1) % every == 0
        result = self._run(model, batch, "train", "sum", STATISTICS if logged else ())
        loss = result.loss / (batch["pairs"] if num_items_in_batch is None else num_items_in_batch)
        return (loss, result) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs, before = self._prepare_inputs(inputs), dict(self._sums["eval"])
        kept = self._kept(len(inputs["lengths"]) // 2)
        batch = self._unpack(first_pairs(inputs, max(kept, 1)))
        with torch.no_grad(), self.compute_loss_context_manager():
            result = self._run(model, batch, "eval", "none", STATISTICS)
        self._add("eval", "loss", result.loss)
        if not kept:  # the names must be the same in every process
            self._sums["eval"] = dict.fromkeys(self._sums["eval"], (0.0, 0.0)) | before
        return result.loss.mean(), None, None

    def _run(self, model: nn.Module, batch: dict, mode: str, reduction: str, outputs: tuple[str, ...]) -> TRegLoss:
        """The loss of a batch, inside the model's forward; its metrics are added up under mode."""
        ref = self._reference_logps(model, batch)

        def head_fn(hidden: Tensor, operands: dict) -> TRegLoss:
            return fused_treg_loss(
                hidden.flatten(0, -2)[batch["scored"]], target=batch["target"], token_rewards=batch["token_rewards"],
                ref_logps=ref, cu_seqlens=batch["cu_seqlens"], reduction=reduction, outputs=outputs,
                memory_budget=self.args.memory_budget, **operands, **vars(self.loss_options),
            )  # fmt: skip

        result = model(**batch["model"], head_fn=head_fn)
        self._record(mode, batch, result, ref)
        return result

    def _kept(self, pairs: int) -> int:
        """Pairs of an evaluation batch that count: the last batch of several processes is filled up with repeats."""
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if not state.end_of_dataloader or state.remainder <= 0 or pairs != size:
            return pairs
        return min(max(state.remainder - self.args.process_index * size, 0), pairs)

    def _unpack(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A collated batch on the device: the model's own arguments under `model`, the loss's beside them."""
        batch = dict(inputs)
        batch |= {"model": {k: batch.pop(k) for k in list(batch) if k not in LOSS_KEYS}}
        lengths, device = batch["lengths"], batch["target"].device
        batch["pairs"] = len(lengths) // 2
        batch["cu_seqlens"] = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        for name in ("token_rewards", "ref_logps"):
            x = batch.get(name)
            batch[name] = None if x is None else torch.from_numpy(x).to(device)
        return batch

    @torch.no_grad()
    def _reference_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        """Reference log-probs: [2B] sums from the data, or [N] of each token, or what the data have of them."""
        if self._source == "none":
            return None
        if self.ref_model is None and batch["ref_logps"] is not None:
            return batch["ref_logps"]

        def head_fn(hidden: Tensor, operands: dict) -> Tensor:
            rows = hidden.flatten(0, -2)[batch["scored"]]
            return linear_logprobs(rows, target=batch["target"], memory_budget=self.args.memory_budget,
                                   **operands).logprobs  # fmt: skip

        if self.ref_model is not None:
            return self.ref_model(**batch["model"], head_fn=head_fn)
        with self.accelerator.unwrap_model(model).disable_adapter():
            return self.accelerator.unwrap_model(model)(**batch["model"], head_fn=head_fn)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Pairs of all batches of an optimizer step over all processes, divided by the processes (DDP averages).

        The step's tokens are counted here too, in the state, which is what a checkpoint keeps.
        """
        if not batch_samples or "lengths" not in batch_samples[0]:
            return None
        counts = [sum(len(b["lengths"]) // 2 for b in batch_samples), sum(int(b["num_tokens"]) for b in batch_samples)]
        if self.accelerator.num_processes > 1:  # the host waits for the device here
            counts = self.accelerator.reduce(torch.tensor(counts, device=device), "sum").tolist()
        if self.args.include_num_input_tokens_seen == "no":  # else transformers counts them
            self.state.num_input_tokens_seen += counts[1]
        return torch.tensor(counts[0] / self.accelerator.num_processes, device=device)

    # -- metrics --------------------------------------------------------------------------------------------------

    def _record(self, mode: str, batch: dict, result: TRegLoss, ref: Tensor | None) -> None:
        rewards, logps = batch["token_rewards"], result.token_logps
        rho_w, rho_l = result.chosen_rewards, result.rejected_rewards
        for name, x in (
            ("rewards/chosen", rho_w),
            ("rewards/rejected", rho_l),
            ("rewards/accuracies", rho_w > rho_l),
            ("rewards/margins", rho_w - rho_l),
            ("logps/chosen", result.chosen_logps),
            ("logps/rejected", result.rejected_logps),
            ("treg/reg_loss", result.reg_loss),
            ("treg/weight", result.weights),
        ):
            self._add(mode, name, x)
        if rewards is not None:
            for side, x in zip(("chosen", "rejected"), self._by_side(batch, rewards), strict=True):
                self._add(mode, f"treg/reward_{side}", x)
            if ref is not None and ref.shape == logps.shape:
                ratio = logps - ref
                counted = (rewards != 0) & (ratio != 0)
                self._add(mode, "treg/alignment", counted & ((rewards > 0) == (ratio > 0)), counted.sum())
        if result.entropy is not None:
            self._add(mode, "entropy", result.entropy)
            self._add(mode, "mean_token_accuracy", result.is_top1)
            for side, x in zip(("chosen", "rejected"), self._by_side(batch, result.mean_logit), strict=True):
                self._add(mode, f"logits/{side}", x)

    @staticmethod
    def _by_side(batch: dict, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N] -> its chosen and its rejected tokens."""
        n = int(batch["lengths"][: batch["pairs"]].sum())
        return x[:n], x[n:]

    def _add(self, mode: str, name: str, x: Tensor, count: Tensor | None = None) -> None:
        total, n = self._sums[mode].get(name, (0.0, 0.0))
        self._sums[mode][name] = (total + x.detach().double().sum(), n + (x.numel() if count is None else count))

    def _means(self, mode: str) -> dict[str, float]:
        """Means over all processes since the last call."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        flat = [torch.as_tensor(x, dtype=torch.float64, device=self.args.device) for s in sums.values() for x in s]
        totals = self.accelerator.reduce(torch.stack(flat), "sum").view(-1, 2).tolist()
        return {k: total / count for k, (total, count) in zip(sums, totals, strict=True) if count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._means("train"), "num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._sums["eval"] = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{k}": x for k, x in self._means("eval").items()})
        return output

    def create_model_card(self, *args, tags: str | list[str] | None = None, **kwargs) -> None:
        """transformers' model card, with the objective, its numbers and the papers."""
        own = ["treg", "preference-optimization", self.loss_options.loss_type]
        super().create_model_card(*args, tags=[*([tags] if isinstance(tags, str) else tags or []), *own], **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            card.write_text(card.read_text() + CARD.format(**vars(self.loss_options)))


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole. The trainer's state is what a checkpoint writes last."""
    folders = [x for x in Path(output_dir).glob("checkpoint-*") if x.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda x: -int(x.name.rpartition("-")[2])):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return folder
    return None


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [k for k, x in vars(module).items() if "dropout" in k and isinstance(x, float)]:
            setattr(module, name, 0.0)
