"""What a method is, and those that need no other package: this project's, dense PyTorch, bare
matrix products.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from loss_head_cases import DEVICE, IGNORE, MASKS, MODES, Batch, Case
from torch import Tensor

import treg
from treg.ops import fused_treg_loss, linear_logprobs

GEMM_ROWS = 16384  # of one bare product: more do not run faster, and [N, V] stops fitting


@dataclass(frozen=True)
class Method:
    """A function of a batch and where it applies."""

    fn: Callable
    gives: str  # "logprobs" [2B, T]; "loss": a scalar, and log-probs or None; "products": nothing
    package: str | None = None  # must import, else the method is skipped
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = MODES
    masks: tuple[str, ...] = MASKS
    softcap: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    loss: str = "treg"  # what a method that gives a loss computes, see `loss_of`
    products: tuple[int | None, ...] = (
        None,
        None,
        None,
    )  # matrix products a row, by mode; None: it depends

    def applies_to(self, case: Case, device: str = DEVICE) -> bool:
        fits = device in self.devices and case.mode in self.modes and case.dtype in self.dtypes
        return fits and case.mask in self.masks and (self.softcap or case.softcap is None)

    def missing(self) -> str | None:
        """Why the package does not import, or None."""
        try:
            if self.package is not None:
                importlib.import_module(self.package)
        except (
            Exception
        ) as e:  # ImportError, and whatever else a package does when it meets this machine
            return f"{self.package} does not import: {type(e).__name__}: {e}"
        return None


def step(method: Method, batch: Batch) -> dict[str, Tensor]:
    """What is timed: forward and backward to gradients, or log-probs under no_grad. Its results by
    name.
    """
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
        loss = loss_of(method.loss, batch, logps)
    leaves = batch.leaves
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return found if logps is None else {"logprobs": logps.detach(), **found}


def loss_of(name: str, b: Batch, logps: Tensor) -> Tensor:
    """T-REG; "dpo": plain DPO without a reference; "ce": the mean negative log-prob of the scored
    tokens.
    """
    scored = b.target != IGNORE
    if name == "ce":
        return -logps.masked_fill(~scored, 0.0).sum() / scored.sum()
    ref = (
        b.ref_logps.to(logps.dtype)
        if name == "treg"
        else torch.zeros_like(b.ref_logps, dtype=logps.dtype)
    )
    return treg.losses.treg_loss(
        *(logps, b.token_rewards, ref),
        treg.losses.LossOptions(alpha=0.25 if name == "treg" else 0.0),
        mask=scored,
    ).loss.mean()


def scored_only(logps: Tensor, b: Batch) -> Tensor:
    return logps.masked_fill(b.target == IGNORE, 0.0)


# -- this project


def treg_fused(b: Batch, **options) -> tuple[Tensor, Tensor]:
    """`fused_treg_loss`: 3 products with a trainable head, 2 with a frozen one."""
    out = fused_treg_loss(
        b.hidden, b.weight, b.target, b.token_rewards, b.ref_logps, softcap=b.softcap, **options
    )
    return out.loss, out.token_logps


def treg_packed(b: Batch) -> tuple[Tensor, Tensor]:
    """The same on the scored rows alone, gathered here: what `fused_treg_loss` is given packed."""
    rows = b.scored
    out = fused_treg_loss(
        b.hidden.flatten(0, 1)[rows],
        b.weight,
        b.target.flatten()[rows],
        b.token_rewards.flatten()[rows],
        b.ref_logps,
        cu_seqlens=b.cu_seqlens,
        softcap=b.softcap,
    )
    logps = out.token_logps.new_zeros(b.target.numel()).index_copy(0, rows, out.token_logps)
    return out.loss, logps.view(b.target.shape)


def treg_logprobs(b: Batch) -> Tensor:
    """`linear_logprobs`, then the loss: 3 products for the rows that the budget keeps, else 4;
    frozen 2, forward 1.
    """
    return linear_logprobs(b.hidden, b.weight, b.target, softcap=b.softcap).logprobs


# -- dense PyTorch: 3 products and [N, V] logits


def dense_log_softmax(b: Batch) -> Tensor:
    """logits.float().log_softmax(-1).gather, a softcap in float32: what most code has, and exact
    but for the logits.
    """
    return _dense(b.hidden, b.weight, b.target, b.softcap)


def dense_compiled(b: Batch) -> Tensor:
    """The same under torch.compile."""
    return _compiled()(b.hidden, b.weight, b.target, b.softcap)


def _dense(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ignored = target == IGNORE
    logps = (
        logits.log_softmax(-1).gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    )
    return logps.masked_fill(ignored, 0.0)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_dense, dynamic=False)


def dense_logsumexp(b: Batch) -> Tensor:
    """gather - logsumexp, a sequence at a time, as in the float32 branch of TRL's
    selective_log_softmax; leaner.

    A softcap is in the logits' dtype, as in transformers.
    """
    logits = dense_logits(b)
    lse = torch.stack([x.float().logsumexp(-1) for x in logits])
    at_target = logits.gather(-1, b.target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return scored_only(at_target.float() - lse, b)


def dense_logits(b: Batch) -> Tensor:
    """[2B, T, V], a softcap in their dtype."""
    logits = b.hidden @ b.weight.T
    return logits if b.softcap is None else b.softcap * torch.tanh(logits / b.softcap)


# -- bare matrix products of the vendor's library: the speed of light of a scheme of so many
# --------------------------


def products(b: Batch, logits: int = 1, dhidden: bool = False, dweight: bool = False) -> None:
    """The products of a head alone, over at most GEMM_ROWS rows at a time: logits so many times,
    and gradients.
    """
    weight, total = b.weight.detach(), None
    for rows in b.hidden.detach().flatten(0, 1).split(GEMM_ROWS):
        for _ in range(logits):
            tile = rows @ weight.T
        if dhidden:
            torch.mm(tile, weight)
        if dweight:
            total = torch.mm(tile.T, rows) if total is None else total.addmm_(tile.T, rows)


GRADIENTS = ("trainable", "frozen")
GPU = ("cuda",)
_bare = functools.partial(Method, gives="products", devices=GPU)
OWN = {
    "treg_fused": Method(treg_fused, "loss", modes=GRADIENTS, products=(3, 2, None)),
    "treg_packed": Method(treg_packed, "loss", modes=GRADIENTS, masks=("realistic",)),
    "treg_smallest": Method(
        functools.partial(treg_fused, memory_budget="least"),
        "loss",
        devices=GPU,
        modes=("trainable",),
    ),
    "treg_fused_exact_logits": Method(  # bfloat16 inputs, logits not rounded
        functools.partial(treg_fused, logits_dtype=torch.float32),
        "loss",
        devices=("cpu",),
        modes=GRADIENTS,
        dtypes=(torch.bfloat16,),
    ),
    "treg_logprobs": Method(treg_logprobs, "logprobs", products=(None, 2, 1)),
    "dense_log_softmax": Method(dense_log_softmax, "logprobs", products=(3, 2, 1)),
    "dense_logsumexp": Method(dense_logsumexp, "logprobs", products=(3, 2, 1)),
    "dense_compiled": Method(dense_compiled, "logprobs", devices=GPU, products=(3, 2, 1)),
    "gemm_1": _bare(products, modes=("forward",), products=(1, 1, 1)),
    "gemm_2": _bare(
        functools.partial(products, dhidden=True), modes=("frozen",), products=(2, 2, 2)
    ),
    "gemm_3": _bare(
        functools.partial(products, dhidden=True, dweight=True), modes=GRADIENTS, products=(3, 3, 3)
    ),
    "gemm_4": _bare(
        functools.partial(products, logits=2, dhidden=True, dweight=True),
        modes=("trainable",),
        products=(4, 4, 4),
    ),
}
