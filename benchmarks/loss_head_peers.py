"""The ways to get a preference loss and its gradients from hidden states, one small function each."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from loss_head_cases import DEVICE, IGNORE, Batch, Case
from torch import Tensor

from treg.losses import treg_loss
from treg.ops import fused_treg_loss, linear_logprobs


def step(method: "Method", batch: Batch) -> dict[str, Tensor]:
    """What is timed: forward and backward to gradients, or log-probs under no_grad. Its results by name."""
    if method.gives == "products":
        method.fn(batch)
        return {}
    if batch.mode == "forward":
        with torch.no_grad():
            return {"logprobs": method.fn(batch)}
    if method.gives == "loss":
        loss, logps = method.fn(batch)
    else:
        logps = method.fn(batch)
        scored = batch.target != IGNORE
        loss = treg_loss(logps, batch.token_rewards, batch.ref_logps, mask=scored).loss.mean()
    leaves = batch.leaves
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return found if logps is None else {"logprobs": logps.detach(), **found}


# -- this project ------------------------------------------------------------------------------------------------


def treg_fused(b: Batch, **options) -> tuple[Tensor, Tensor]:
    """`fused_treg_loss`: 3 products with a trainable head, 2 with a frozen one."""
    out = fused_treg_loss(b.hidden, b.weight, b.target, b.token_rewards, b.ref_logps, softcap=b.softcap, **options)
    return out.loss, out.token_logps


def treg_fused_exact_logits(b: Batch) -> tuple[Tensor, Tensor]:
    """The same with logits_dtype=torch.float32: bfloat16 inputs, logits not rounded."""
    return treg_fused(b, logits_dtype=torch.float32)


def treg_logprobs(b: Batch) -> Tensor:
    """`linear_logprobs`, then the loss: 3 products for the rows that the budget keeps, else 4; frozen 2, forward 1."""
    return linear_logprobs(b.hidden, b.weight, b.target, softcap=b.softcap).logprobs


# -- dense PyTorch: 3 products and [N, V] logits ------------------------------------------------------------------


def dense_log_softmax(b: Batch) -> Tensor:
    """logits.float().log_softmax(-1).gather, a softcap in float32: what most code has, and exact but for the logits."""
    logp = _softcap((b.hidden @ b.weight.T).float(), b).log_softmax(-1)
    return _scored(logp.gather(-1, _labels(b)).squeeze(-1), b)


def dense_logsumexp(b: Batch) -> Tensor:
    """gather - logsumexp, a sequence at a time, as in the float32 branch of TRL's selective_log_softmax; leaner.

    A softcap is in the logits' dtype, as in transformers.
    """
    logits = _softcap(b.hidden @ b.weight.T, b)
    lse = torch.stack([x.float().logsumexp(-1) for x in logits])
    return _scored(logits.gather(-1, _labels(b)).squeeze(-1).float() - lse, b)


def trl_selective(b: Batch) -> Tensor:
    """Dense logits and TRL's selective_log_softmax, on a GPU its fused kernel over them; softcap as in transformers."""
    from trl.trainer.utils import selective_log_softmax

    logits = _softcap(b.hidden @ b.weight.T, b)
    return selective_log_softmax(logits, b.target.clamp(min=0), row_mask=b.target != IGNORE).float()


def _softcap(logits: Tensor, b: Batch) -> Tensor:
    return logits if b.softcap is None else b.softcap * torch.tanh(logits / b.softcap)


def _labels(b: Batch) -> Tensor:
    return b.target.clamp(min=0).unsqueeze(-1)


def _scored(logps: Tensor, b: Batch) -> Tensor:
    return logps.masked_fill(b.target == IGNORE, 0.0)


# -- fused peers -------------------------------------------------------------------------------------------------


def liger_dpo(b: Batch) -> tuple[Tensor, None]:
    """Liger's LigerFusedLinearDPOLoss, a pair at a time: 3 products over all rows.

    Plain DPO with no reference at all (use_ref_model=False), its cheapest form: it takes no precomputed reference
    log-probs, and its reference model would cost one more product. No T-REG term, no softcap. Compiled on a GPU only.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(compiled=b.hidden.is_cuda, use_ref_model=False)
    loss, _ = loss_fn(b.weight, b.hidden, b.target)
    return loss, None


def trl_chunked(b: Batch) -> Tensor:
    """TRL's chunked log-probs, called as its fused language-model head does: 4 products, 3 with a frozen head."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def logprobs(hidden, target):
        return ChunkedLogProbFunction.apply(
            hidden, b.weight, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, b.softcap, 1.0, ()
        )[0]

    if not b.hidden.is_cuda:
        return _scored(logprobs(b.hidden.flatten(0, 1), b.target.clamp(min=0).flatten()).view(b.target.shape), b)
    scored = b.target != IGNORE
    logps = logprobs(b.hidden[scored], b.target[scored])
    return logps.new_zeros(b.target.shape).masked_scatter(scored, logps)


def torch_linear_cross_entropy(b: Batch) -> Tensor:
    """PyTorch's linear_cross_entropy(reduction="none") in its chunked form: 4 products. No softcap."""
    options = torch.nn.LinearCrossEntropyOptions()
    hidden, target = b.hidden.flatten(0, 1), b.target.flatten()
    nll = F.linear_cross_entropy(hidden, b.weight, target, reduction="none", options=options)
    return -nll.view(b.target.shape).float()


def cut_cross_entropy(b: Batch) -> Tensor:
    """cut-cross-entropy's kernels with their default gradient filter: 4 products, fewer where the filter finds any."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(b.hidden, b.weight, b.target, softcap=b.softcap, reduction="none", impl="cce").float()


# -- bare matrix products of the vendor's library: the speed of light of a scheme of so many --------------------------


def gemm_1(b: Batch) -> Tensor:
    """logits"""
    return b.hidden.detach().flatten(0, 1) @ b.weight.detach().T


def gemm_2(b: Batch) -> Tensor:
    """logits, dhidden"""
    logits = gemm_1(b)
    torch.mm(logits, b.weight.detach())
    return logits


def gemm_3(b: Batch) -> None:
    """logits, dhidden, dweight"""
    torch.mm(gemm_2(b).T, b.hidden.detach().flatten(0, 1))


def gemm_4(b: Batch) -> None:
    """logits, logits, dhidden, dweight"""
    gemm_1(b)
    gemm_3(b)


@dataclass(frozen=True)
class Method:
    """A function of a batch and where it applies."""

    fn: Callable
    gives: str  # "logprobs" [2B, T]; "loss": a scalar, and log-probs or None; "products": nothing
    package: str | None = None  # must import, else the method is skipped
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = ("trainable", "frozen", "forward")
    softcap: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    plain_dpo: bool = False  # its loss is DPO without a reference, not T-REG

    def applies_to(self, case: Case) -> bool:
        fits = DEVICE in self.devices and case.mode in self.modes and case.dtype in self.dtypes
        return fits and (self.softcap or case.softcap is None)

    def missing(self) -> str | None:
        """Why the package does not import, or None."""
        try:
            if self.package is not None:
                importlib.import_module(self.package)
        except (ImportError, RuntimeError) as e:  # RuntimeError: how lazy modules of transformers and TRL report it
            return f"{self.package} does not import: {e}"
        return None


GRADIENTS = ("trainable", "frozen")
GPU = ("cuda",)
METHODS = {
    "treg_fused": Method(treg_fused, "loss", modes=GRADIENTS),
    "treg_fused_exact_logits": Method(
        treg_fused_exact_logits, "loss", devices=("cpu",), modes=GRADIENTS, dtypes=(torch.bfloat16,)
    ),
    "treg_logprobs": Method(treg_logprobs, "logprobs"),
    "dense_log_softmax": Method(dense_log_softmax, "logprobs"),
    "dense_logsumexp": Method(dense_logsumexp, "logprobs"),
    "trl_selective": Method(trl_selective, "logprobs", "trl", devices=GPU),
    "trl_chunked": Method(trl_chunked, "logprobs", "trl.kernels"),
    "liger_dpo": Method(liger_dpo, "loss", "liger_kernel.chunked_loss", modes=GRADIENTS, softcap=False, plain_dpo=True),
    "torch_linear_cross_entropy": Method(torch_linear_cross_entropy, "logprobs", softcap=False),
    "cut_cross_entropy": Method(cut_cross_entropy, "logprobs", "cut_cross_entropy", devices=GPU),
    "gemm_1": Method(gemm_1, "products", devices=GPU, modes=("forward",)),
    "gemm_2": Method(gemm_2, "products", devices=GPU, modes=("frozen",)),
    "gemm_3": Method(gemm_3, "products", devices=GPU, modes=GRADIENTS),
    "gemm_4": Method(gemm_4, "products", devices=GPU, modes=("trainable",)),
}
