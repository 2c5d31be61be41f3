"""Axolotl's `rl: dpo` (and `rl: ipo`) with T-REG, without logits.

In the YAML, beside what is there:

    plugins:
      - treg.integrations.axolotl.TRegPlugin
    trainer_cls: treg.integrations.axolotl.TRegDPOTrainer
    treg_token_rewards: annotated.parquet       # of `treg annotate`
    treg_alpha: 0.25

The plugin brings the treg_ options. The class is named beside it: for preference training Axolotl
calls a plugin's get_trainer_cls for a class that it then gives no model; and it goes on without a
plugin that it cannot import, but not without the class.

The trainer is a subclass of AxolotlDPOTrainer with a loss of its own, because the TRL that Axolotl
pins makes whole logits inside `_compute_loss`. Read and run against Axolotl 0.18.0 and 0.19.0 (TRL
1.8.0 and 1.9.0), and with TRL 1.16.

B pairs, T padded length.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator
from torch import Tensor, nn

from treg.heads import check_sequences, install_head, run_head
from treg.heads.logprobs import token_logprobs
from treg.integrations.common import looked_up, parameters_of
from treg.losses import LossOptions
from treg.losses.pairwise import DISCOPOP_TAU
from treg.ops import fused_treg_loss
from treg.results import TRegLoss
from treg.rewards.lookup import TokenRewards
from treg.trainer.metrics import PairMetrics

TRAINER = f"{__name__}.TRegDPOTrainer"
# TRL's loss types that are objectives of treg.losses, and whether they use label_smoothing
LOSS_TYPES = {
    "sigmoid": False,
    "hinge": False,
    "ipo": False,
    "exo_pair": True,
    "nca_pair": False,
    "robust": True,
    "bco_pair": False,
    "sppo_hard": False,
    "apo_zero": False,
    "apo_down": False,
    "discopop": False,
}
NOT_THE_MODELS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
STATISTICS = ("entropy", "mean_logit", "is_top1")


class TRegArgs(BaseModel):
    """Options of the YAML.

    treg_token_rewards: an annotated file; rewards are found by the token ids of a sequence.
    treg_alpha: >= 0, weight of the regularizer; 0 is plain DPO, which needs no file.
    treg_tail: tokens at the end of a sequence that may differ from the annotated ones, see
    `treg.rewards.lookup.TokenRewards`.
    """

    treg_token_rewards: str | None = None
    treg_alpha: float = 0.25
    treg_tail: int = 0

    @model_validator(mode="after")
    def check_treg(self) -> "TRegArgs":
        rl = getattr(self, "rl", None)  # of the options that Axolotl merges these into
        rl = getattr(rl, "value", rl)
        if rl not in ("dpo", "ipo"):
            raise ValueError(f"rl: expected dpo or ipo with treg's plugin, got {rl!r}")
        trainer = getattr(self, "trainer_cls", None)
        if trainer != TRAINER:
            raise ValueError(f"trainer_cls: expected {TRAINER} with treg's plugin, got {trainer!r}")
        if (getattr(self, "context_parallel_size", None) or 1) > 1:
            raise ValueError(
                f"context_parallel_size: expected 1 with T-REG, got {self.context_parallel_size}"
            )
        if not self.treg_alpha >= 0:
            raise ValueError(f"treg_alpha: expected a number >= 0, got {self.treg_alpha!r}")
        if self.treg_alpha and not self.treg_token_rewards:
            fix = "run `treg annotate`, or set treg_alpha: 0"
            raise ValueError(
                f"treg_token_rewards: expected the path of an annotated file, got none; {fix}"
            )
        return self


@dataclass
class TRegTrainingArgs:
    """What the plugin adds to the trainer's arguments; see `TRegArgs`."""

    treg_token_rewards: str | None = field(
        default=None, metadata={"help": "Annotated file with token rewards."}
    )
    treg_alpha: float = field(default=0.25, metadata={"help": "Weight of the T-REG regularizer."})
    treg_tail: int = field(
        default=0, metadata={"help": "Tokens at the end of a sequence that may differ."}
    )


class TRegPlugin(BasePlugin):
    """The treg_ options."""

    def get_input_args(self) -> str:
        return f"{__name__}.TRegArgs"

    def get_training_args_mixin(self) -> str:
        return f"{__name__}.TRegTrainingArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {name: cfg[name] for name in TRegArgs.model_fields if cfg[name] is not None}


def __getattr__(name: str) -> Any:
    """TRegDPOTrainer, when it is asked for.

    Its base must not be imported before all plugins are registered.
    """
    if name != "TRegDPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

    globals()[name] = make_trainer(AxolotlDPOTrainer)
    return globals()[name]


def make_trainer(base: type) -> type:
    """A subclass of AxolotlDPOTrainer whose loss is T-REG's, without logits.

        L = base(rho_w, rho_l) + treg_alpha * ( w_w L_reg(y_w) + w_l L_reg(y_l) )

    See `treg.ops.fused_treg_loss`. The base may be any trl.DPOTrainer from 1.8 on. The head runs
    inside the model's forward, on completion tokens only, in three matrix products a row (two with
    adapters). The reference is TRL's: another model, the model without its adapters, or log-probs
    computed beforehand. Evaluation has the regularizer too. What TRL logs is logged, as means over
    tokens of all processes, and treg/reg_loss, treg/weight, treg/reward_chosen,
    treg/reward_rejected.

    Raises:
        TypeError: another base; arguments without the plugin's. ValueError: what has no counterpart
        in `treg.losses`: loss types other than LOSS_TYPES or several of them, ld_alpha,
        use_weighting, a divergence other than reverse_kl, label_smoothing where TRL does not use
        it; mixtures of experts with a router loss, the Liger loss; a head that cannot be read; in
        training: a sequence that was not annotated.
    """
    _check_base(base)

    class TRegDPOTrainer(base):
        _treg_base = base

        def __init__(self, model: Any, ref_model: Any = None, *, args: Any, **kwargs: Any):
            _check_plugin(args)
            self._treg_options = _options(args)
            _install_heads(model, ref_model)  # before anything wraps their forward
            super().__init__(model, ref_model, args=args, **kwargs)
            # again: an adapter may have taken the head's place
            _install_again(self.accelerator, self.model, self.ref_model)
            _check_no_router_loss(self)
            self._treg_rewards = None
            if args.treg_alpha:
                self._treg_rewards = looked_up(args.treg_token_rewards, args.treg_tail)

        def _compute_loss(self, model, inputs, return_outputs):
            _check_no_outputs(return_outputs)
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            given = {name: x for name, x in inputs.items() if name not in NOT_THE_MODELS}
            ref = self._treg_reference(inputs, labels, given)
            target = labels[:, 1:]
            scored = target != -100
            lengths = scored.sum(-1).cpu().numpy()
            rewards = _rewards(self._treg_rewards, inputs, scored)

            def head_fn(hidden: Tensor, operands: dict[str, Any]) -> TRegLoss:
                # virtual tokens of prompt-learning adapters stand before the sequence
                rows = hidden[:, -labels.shape[1] :][:, :-1][scored]
                ends = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
                return fused_treg_loss(
                    rows,
                    target=target[scored],
                    token_rewards=rewards,
                    ref_logps=ref,
                    cu_seqlens=ends,
                    outputs=STATISTICS,
                    **operands,
                    **vars(self._treg_options),
                )

            result = run_head(model, head_fn, **given)
            self._treg_record(result, lengths, rewards, ref, inputs["attention_mask"])
            return result.loss

        @torch.no_grad()
        def _treg_reference(self, inputs: dict, labels: Tensor, given: dict) -> Tensor:
            """Summed log-probs [2B] of the reference."""
            if self.precompute_ref_logps:
                return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            if self.ref_model is not None:
                return _summed_logprobs(self.ref_model, labels, given)
            from trl.trainer.utils import use_adapter

            bare = self.accelerator.unwrap_model(self.model)
            with use_adapter(bare, adapter_name="ref" if "ref" in bare.peft_config else None):
                return _summed_logprobs(self.model, labels, given)

        def _treg_record(
            self,
            result: TRegLoss,
            lengths: np.ndarray,
            rewards: Tensor | None,
            ref: Tensor,
            attention_mask: Tensor,
        ) -> None:
            mode = "train" if self.model.training else "eval"
            if self._treg_options.objective.length_normalised:
                result = _with_summed_rewards(result, lengths)
            metrics = PairMetrics()
            metrics.record(result, lengths, rewards, ref)
            for name, value in metrics.means(self.accelerator).items():
                self._metrics[mode][name].append(value)
            if mode == "train":
                self._total_train_tokens += int(
                    self.accelerator.gather_for_metrics(attention_mask.sum()).sum()
                )
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    return TRegDPOTrainer


def _check_base(base: type) -> None:
    found = parameters_of(base, "_compute_loss")
    if found != ["self", "model", "inputs", "return_outputs"]:
        raise TypeError(
            "base: expected a trl.DPOTrainer with _compute_loss(model, inputs, return_outputs), as "
            f"of TRL 1.8 to 1.16, got {base.__name__} with {found}"
        )


def _check_no_router_loss(trainer: Any) -> None:
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "router_aux_loss_coef: expected 0 with T-REG, got a router loss; set it to 0"
        )


def _check_plugin(args: Any) -> None:
    if not hasattr(args, "treg_alpha"):
        raise TypeError(
            f"args: expected the plugin's treg_alpha, got {type(args).__name__} without; add "
            "treg.integrations.axolotl.TRegPlugin to plugins"
        )


def _check_no_outputs(return_outputs: bool) -> None:
    if return_outputs:
        raise ValueError(
            "return_outputs: expected False, got True: there are no logits; use "
            "prediction_loss_only and no compute_metrics"
        )


def _install_heads(*models: Any) -> None:
    """Of models; a name stands for a model that is not loaded yet."""
    for model in models:
        if isinstance(model, nn.Module):
            check_sequences(install_head(model))


def _install_again(accelerator: Any, *models: Any) -> None:
    """Of the trainer's own models, which may be wrapped."""
    for model in models:
        if model is not None:
            install_head(accelerator.unwrap_model(model))


def _rewards(source: TokenRewards | None, inputs: dict, scored: Tensor) -> Tensor | None:
    """rhat of the scored tokens, [N]; scored is [2B, T-1]."""
    if source is None:
        return None
    return source(inputs["input_ids"], inputs["attention_mask"])[:, 1:][scored]


def _summed_logprobs(model: nn.Module, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[2B] float64."""
    return token_logprobs(model, labels, **inputs).logprobs.double().sum(-1)


def _with_summed_rewards(result: TRegLoss, lengths: np.ndarray) -> TRegLoss:
    """Rewards that are sums over tokens, as TRL logs them, of those that are means."""
    chosen, rejected = torch.from_numpy(lengths).to(result.chosen_rewards.device).chunk(2)
    return result._replace(
        chosen_rewards=result.chosen_rewards * chosen,
        rejected_rewards=result.rejected_rewards * rejected,
    )


def _options(args: Any) -> LossOptions:
    """TRL's arguments as those of `treg.losses`; ValueError where there is no counterpart."""
    types = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
    one_type = len(types) == 1 and types[0] in LOSS_TYPES
    tau_fits = types[0] != "discopop" or args.discopop_tau == DISCOPOP_TAU
    requirements = (
        ("loss_type", f"one of {sorted(LOSS_TYPES)}", one_type),
        ("loss_weights", "none", args.loss_weights in (None, [1.0])),
        ("ld_alpha", "None", args.ld_alpha is None),
        ("use_weighting", "False", not args.use_weighting),
        ("f_divergence_type", "reverse_kl", args.f_divergence_type == "reverse_kl"),
        ("discopop_tau", str(DISCOPOP_TAU), tau_fits),
        ("use_liger_kernel", "False", not args.use_liger_kernel),
    )
    for name, wanted, met in requirements:
        if not met:
            raise ValueError(
                f"{name}: expected {wanted} with T-REG in Axolotl, got {getattr(args, name)!r}"
            )
    (loss_type,) = types
    if args.label_smoothing and not LOSS_TYPES[loss_type]:
        raise ValueError(
            f"label_smoothing: expected 0 for loss_type={loss_type!r}, where TRL takes no notice "
            f"of it, got {args.label_smoothing}; use robust"
        )
    return LossOptions(loss_type, args.beta, args.treg_alpha, label_smoothing=args.label_smoothing)
