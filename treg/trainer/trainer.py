"""A thin trainer: transformers' own loop over preference pairs, with the fused loss inside the
model's forward.
"""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from treg.data import LOSS_KEYS, PairCollator, first_pairs, pack_pairs
from treg.data.batches import LOSS_STREAMS
from treg.data.mixture import sources_of
from treg.heads import check_sequences, install_head, run_head
from treg.ops import TRegLoss, fused_treg_loss, linear_logprobs
from treg.trainer.card import keep_from_hub, write_card
from treg.trainer.checkpoints import SealedCheckpoints
from treg.trainer.config import TRegConfig
from treg.trainer.data import example_loader, reference_source
from treg.trainer.metrics import PairMetrics
from treg.trainer.sharing import computed_in, in_shared_rows, sharing_of

log = logging.getLogger(__name__)

STATISTICS = ("entropy", "mean_logit", "is_top1")


class TRegTrainer(SealedCheckpoints):
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
            alpha=0, anything that `treg.data.load_pairs` reads; or several of these, as paths in a
            list or as a `treg.data.Mixture` with weights. eval_dataset also as a dict of them.
            Token rewards and token weights go into the loss wherever the data have them.
        processing_class: the tokenizer; None: the model's.
        peft_config: wraps the model with adapters.
    Raises:
        ValueError: data without token rewards and alpha > 0, annotations of another model, no
            reference, token weights without the reference's log-prob of each token, a head that
            cannot be read.
    """

    args: TRegConfig

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
        _check_arguments(model, ref_model, args, kwargs)
        policy, tokenizer = _loaded(model, processing_class)
        if args.disable_dropout:
            _disable_dropout(policy)
            _disable_dropout(ref_model)
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        adapters = hasattr(policy, "disable_adapter")
        _check_adapters(policy, adapters, args.packing)
        self.loss_options = options = args.loss_options
        reference = policy if ref_model is None else ref_model
        load = example_loader(args, tokenizer, reference, ref_model is not None or not adapters)
        loaded = {}
        for name, data in _named_datasets(train_dataset, eval_dataset).items():
            loaded[name] = None if data is None else load(data, name)
        self.data_reports = load.reports
        self.trained_on = [str(x) for x in sources_of(train_dataset) if isinstance(x, (str, Path))]
        self.data_shares = load.shares
        self._source = reference_source(options, loaded, ref_model, adapters)
        train_dataset, *rest = loaded.values()
        if isinstance(eval_dataset, Mapping):
            eval_dataset = dict(zip(eval_dataset, rest, strict=True))
        else:
            eval_dataset = rest[0]
        models = [policy]
        if ref_model is not None and self._source == "model":
            models.append(ref_model)
        for x in models:
            check_sequences(install_head(x), packing=args.packing)
        self._sharing = sharing_of(args, models)
        share = self._sharing.on
        if args.token_budget is not None and train_dataset is not None:
            train_dataset = pack_pairs(train_dataset, args.token_budget, share_prompt=share)
        if getattr(policy.config, "output_router_logits", False):
            log.warning(
                "output_router_logits: the router's auxiliary loss is not part of this trainer's "
                "loss"
            )
        collator = PairCollator(
            tokenizer.pad_token_id or 0,
            args.packing,
            pair_columns=options.objective.pair_columns,
            share_prompt=share,
        )
        kwargs.setdefault("data_collator", collator)
        super().__init__(
            policy,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        # what transformers before 5.19 reads for loss_is_scaled_for_ga
        self.model_accepts_loss_kwargs = True
        if self.loss_options.with_kl and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"loss_type: expected one without a KL term under FSDP and DeepSpeed, got "
                f"{args.loss_type!r}, whose reference runs in every step"
            )
        self.ref_model = None
        if ref_model is not None and self._source == "model":
            self.ref_model = self._prepared_reference(ref_model)
        self._metrics = {"train": PairMetrics(), "eval": PairMetrics()}

    def _prepared_reference(self, ref_model: nn.Module) -> nn.Module:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "ref_model: expected None under FSDP and DeepSpeed; annotate the data with it first"
            )
        ref_model.requires_grad_(False).eval()
        return self.accelerator.prepare_model(ref_model, evaluation_mode=True)

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
        models = [x for x in (model, self.ref_model) if x is not None]
        in_shared_rows(batch, self._sharing, models, self._dtype, self.accelerator)
        reference = self._reference(model, batch)
        streams = {name: batch[name] for name in LOSS_STREAMS}
        objective = self.loss_options.objective

        def head_fn(hidden: Tensor, operands: dict) -> TRegLoss:
            operands |= reference
            for name in ("ref_hidden", "ref_weight"):
                if name in reference:  # a reference may be kept in another dtype
                    operands[name] = reference[name].to(hidden.dtype)
            return fused_treg_loss(
                _scored_rows(hidden, batch),
                target=batch["target"],
                pair_values=batch["pair_values"],
                cu_seqlens=batch["cu_seqlens"],
                reduction=reduction,
                outputs=outputs,
                memory_budget=self.args.memory_budget,
                **streams,
                **operands,
                **vars(self.loss_options),
            )

        result = run_head(model, head_fn, **batch["model"])
        self._metrics[mode].record(
            result,
            batch["lengths"],
            batch["token_rewards"],
            reference.get("ref_logps"),
            weighted=objective.credit is not None or batch["token_weights"] is not None,
            alpha=self._alpha_of_ratio(),
            length_normalised=objective.length_normalised,
        )
        return result

    @property
    def shares_prompts(self) -> bool:
        """Whether what a pair begins with is run once, as far as is known by now."""
        return self._sharing.on

    def _dtype(self) -> torch.dtype:
        """What the model computes in."""
        spec = install_head(self.accelerator.unwrap_model(self.model))
        return computed_in(self.args, spec.projection.weight)

    def _alpha_of_ratio(self) -> float:
        """alpha where T-REG's gradient is a factor of the objective's at each token, else 0."""
        options = self.loss_options
        factor = options.weighting == "gradient" and not options.objective.nll
        return options.alpha if factor else 0.0

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
        batch: dict[str, Any] = {k: x for k, x in inputs.items() if k in LOSS_KEYS}
        batch["model"] = {k: x for k, x in inputs.items() if k not in LOSS_KEYS}
        lengths, device = batch["lengths"], batch["target"].device
        batch["pairs"] = len(lengths) // 2
        batch["cu_seqlens"] = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        for name in (*LOSS_STREAMS, "ref_logps"):
            batch[name] = _on_device(batch.get(name), device)
        numbers = _on_device(batch.get("pair_values"), device)
        if numbers is not None:
            columns = self.loss_options.objective.pair_columns
            numbers = dict(zip(columns, numbers, strict=True))
        batch["pair_values"] = numbers
        return batch

    @torch.no_grad()
    def _reference(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """What `fused_treg_loss` takes of the reference: its log-probs, [2B] sums or [N] of each
        token from the data, [N] from a model; or its hidden states and its head.
        """
        if self._source == "none":
            return {}
        if self._source == "data":
            return {"ref_logps": batch["ref_logps"]}
        head_fn = (
            self._states_of_reference if self.loss_options.with_kl else self._logps_of_reference
        )
        return self._run_reference(model, functools.partial(head_fn, batch), batch)

    def _logps_of_reference(self, batch: dict, hidden: Tensor, operands: dict) -> dict[str, Any]:
        rows = _scored_rows(hidden, batch)
        logps = linear_logprobs(
            rows, target=batch["target"], memory_budget=self.args.memory_budget, **operands
        ).logprobs
        return {"ref_logps": logps}

    def _states_of_reference(self, batch: dict, hidden: Tensor, operands: dict) -> dict[str, Any]:
        found = {"ref_hidden": _scored_rows(hidden, batch)}
        return found | {f"ref_{name}": x for name, x in operands.items()}

    def _run_reference(self, model: nn.Module, head_fn: Any, batch: dict[str, Any]) -> Any:
        """head_fn's result within the reference's forward."""

        if self.ref_model is not None:
            return run_head(self.ref_model, head_fn, **batch["model"])
        bare: Any = self.accelerator.unwrap_model(model)
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
        pairs = sum(len(batch["lengths"]) // 2 for batch in batch_samples)
        tokens = sum(int(batch["num_tokens"]) for batch in batch_samples)
        if self.accelerator.num_processes > 1:  # the host waits for the device here
            counts = torch.tensor([pairs, tokens], device=device)
            totals: Any = self.accelerator.reduce(counts, "sum")
            pairs, tokens = totals.tolist()
        if self.args.include_num_input_tokens_seen == "no":  # else transformers counts them
            self.state.num_input_tokens_seen += tokens
        return pairs / self.accelerator.num_processes

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
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics=(output.metrics or {}) | named)

    def init_hf_repo(self, *args, **kwargs) -> None:
        if self.is_world_process_zero():
            keep_from_hub(Path(self.args.output_dir or "."))
        super().init_hf_repo(*args, **kwargs)

    def create_model_card(self, **given: Any) -> None:
        """The model's card: see `treg.trainer.card.write_card` for the arguments."""
        if self.is_world_process_zero():
            write_card(self, **given)


def _check_arguments(
    model: Any, ref_model: Any, args: TRegConfig, kwargs: Mapping[str, Any]
) -> None:
    """ValueError for arguments of the trainer that cannot go together."""
    own = (
        "model_init",
        "compute_loss_func",
        "compute_metrics",
        "preprocess_logits_for_metrics",
    )
    for name in own:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None, got {kwargs[name]!r}; the loss and its metrics are the "
                "trainer's"
            )
    if model is None:
        raise ValueError("model: expected a causal LM, got None")
    if ref_model is model:
        raise ValueError(
            "ref_model: expected another model than the one that trains; pass a copy of it"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"expected one GPU a process, got {args.n_gpu}; start with `accelerate launch`"
        )


def _check_adapters(model: Any, adapters: bool, packing: bool) -> None:
    """ValueError for adapters with virtual tokens in rows of several sequences."""
    if adapters and model.active_peft_config.is_prompt_learning and packing:
        kind = model.active_peft_config.peft_type
        raise ValueError(
            f"packing: expected False with {kind}, whose virtual tokens begin a row, got True"
        )


def _loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model, loaded if it is a name or path, and its tokenizer if none is given."""
    if isinstance(model, (str, Path)):
        model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        )
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(
            model.config._name_or_path, trust_remote_code=False
        )
    return model, tokenizer


def _named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The datasets by the names of their arguments."""
    if isinstance(eval_dataset, Mapping):
        evals = {f"eval_dataset[{name!r}]": data for name, data in eval_dataset.items()}
    else:
        evals = {"eval_dataset": eval_dataset}
    return {"train_dataset": train_dataset} | evals


def _on_device(values: np.ndarray | None, device: torch.device) -> Tensor | None:
    if values is None:
        return None
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a pageable copy would wait for the device
    return tensor.to(device, non_blocking=True)


def _scored_rows(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """[N, D] of [S, T, D] hidden states; the virtual tokens of prompt-learning adapters stand
    before the T.
    """
    width = batch["model"]["input_ids"].shape[1]
    return hidden[:, -width:].flatten(0, -2)[batch["scored"]]


def _disable_dropout(model: nn.Module | None) -> None:
    """Of the model's own; an adapter's dropout is an option of the adapter."""
    if model is None:
        return
    for path, module in model.named_modules():
        if "lora_dropout" in path:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [k for k, x in vars(module).items() if "dropout" in k and isinstance(x, float)]:
            setattr(module, name, 0.0)
