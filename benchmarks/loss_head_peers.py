"""Other projects' ways to the same gradients, one small function each, and METHODS: all of them
with this project's.

Each call was checked against the source of the version named in pyproject.toml, of quack-kernels
0.6.5 and verl 0.9.1.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from loss_head_cases import IGNORE, Batch
from loss_head_methods import GPU, GRADIENTS, OWN, Method, dense_logits, scored_only, step
from torch import Tensor

__all__ = ["METHODS", "step"]
BFLOAT16 = (torch.bfloat16,)


def trl_selective(b: Batch) -> Tensor:
    """Dense logits and TRL's selective_log_softmax, on a GPU its fused kernel over them; softcap as
    in transformers.
    """
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(
        dense_logits(b), b.target.clamp(min=0), row_mask=b.target != IGNORE
    ).float()


def trl_chunked(b: Batch) -> Tensor:
    """TRL's chunked log-probs, called as its fused language-model head does: 4 products, 3 with a
    frozen head.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def logprobs(hidden, target):
        return ChunkedLogProbFunction.apply(
            hidden, b.weight, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, b.softcap, 1.0, ()
        )[0]

    if not b.hidden.is_cuda:
        return scored_only(
            logprobs(b.hidden.flatten(0, 1), b.target.clamp(min=0).flatten()).view(b.target.shape),
            b,
        )
    scored = b.target != IGNORE
    logps = logprobs(b.hidden[scored], b.target[scored])
    return logps.new_zeros(b.target.shape).masked_scatter(scored, logps)


def liger_dpo(b: Batch) -> tuple[Tensor, None]:
    """Liger's LigerFusedLinearDPOLoss, a pair at a time: 3 products over all rows.

    Plain DPO with no reference at all (use_ref_model=False), its cheapest form: it takes no
    precomputed reference log-probs, and its reference model would cost one more product. No T-REG
    term, no softcap. Compiled on a GPU only.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(compiled=b.hidden.is_cuda, use_ref_model=False)
    loss, _ = loss_fn(b.weight, b.hidden, b.target)
    return loss, None


def liger_scaled_ce(b: Batch) -> Tensor:
    """Liger's LigerFusedLinearScaledCrossEntropyFunction (FSLCE), negative log-probs per token: 4
    products.

    On compute capability 9.0 CuTe kernels, which need bfloat16 and the packages nvidia-cutlass-dsl
    >= 4.6 and apache-tvm-ffi (liger-kernel[cutedsl]); elsewhere its torch fallback in chunks of 512
    rows. Both make dweight of a frozen head too. No softcap.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    nll = Function.apply(b.hidden.flatten(0, 1), b.weight, b.target.flatten())
    return -nll.view(b.target.shape).float()


def liger_mean_ce(b: Batch) -> tuple[Tensor, None]:
    """Liger's LigerFusedLinearCrossEntropyLoss, mean over the scored tokens: 3 products; no weights
    per token.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_fn = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, softcap=b.softcap)
    return loss_fn(b.weight, b.hidden.flatten(0, 1), b.target.flatten()), None


def quack_mean_ce(b: Batch) -> tuple[Tensor, None]:
    """QuACK's chunked_linear_cross_entropy, mean over the scored tokens: 3 products; no weights per
    token: a yardstick.

    With its defaults: chunks of 4096 rows, and where it can (capability 9.0, bfloat16, V a multiple
    of 128) the pipeline that never stores logits.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss = chunked_linear_cross_entropy(
        b.hidden.flatten(0, 1), b.weight, b.target.flatten(), ignore_index=IGNORE
    )
    return loss, None


def torch_linear_cross_entropy(b: Batch) -> Tensor:
    """PyTorch's linear_cross_entropy(reduction="none") in its chunked form (torch >= 2.13): 4
    products. No softcap.
    """
    options = torch.nn.LinearCrossEntropyOptions()
    hidden, target = b.hidden.flatten(0, 1), b.target.flatten()
    nll = F.linear_cross_entropy(hidden, b.weight, target, reduction="none", options=options)
    return -nll.view(b.target.shape).float()


def cce(b: Batch) -> Tensor:
    """cut-cross-entropy's kernels with their default gradient filter: 4 products, fewer where the
    filter finds any.
    """
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(
        b.hidden, b.weight, b.target, softcap=b.softcap, reduction="none", impl="cce"
    ).float()


def cce_exact(b: Batch) -> Tensor:
    """The same without a filter; versions that have the preset also add up in float32."""
    from cut_cross_entropy import linear_cross_entropy

    preset = importlib.util.find_spec("cut_cross_entropy.cce_utils") is not None  # after 25.1.1
    how = {"impl": "cce_exact"} if preset else {"impl": "cce", "filter_eps": None}
    return -linear_cross_entropy(
        b.hidden, b.weight, b.target, softcap=b.softcap, reduction="none", **how
    ).float()


def verl_kernel(b: Batch) -> Tensor:
    """verl's Triton kernel, log-probs and (unused) entropy per token: 4 products, dweight of a
    frozen head too.

    Wants D to be a multiple of 128. No softcap.
    """
    linear_cross_entropy = _verl().linear_cross_entropy
    logps, _ = linear_cross_entropy(
        b.hidden.flatten(0, 1), b.weight, b.target.clamp(min=0).flatten(), 1.0, "none"
    )
    return scored_only(logps.view(b.target.shape), b)


def _verl() -> types.ModuleType:
    """verl's kernel module, without its packages' __init__, which want ray and a dozen others."""
    name = "verl.utils.kernel.linear_cross_entropy"
    if "verl" not in sys.modules:
        spec = importlib.util.find_spec("verl")
        if spec is None:
            raise ImportError("No module named 'verl'")
        root = Path(spec.submodule_search_locations[0])
        for package, folder in (("verl", root), ("verl.utils", root / "utils")):
            module = types.ModuleType(package)
            module.__path__ = [str(folder)]
            sys.modules[package] = module
    return importlib.import_module(name)


METHODS = {
    **OWN,
    "trl_selective": Method(trl_selective, "logprobs", "trl", devices=GPU, products=(3, 2, 1)),
    "trl_chunked": Method(trl_chunked, "logprobs", "trl.kernels", products=(4, 3, 1)),
    "liger_dpo": Method(
        liger_dpo,
        "loss",
        "liger_kernel.chunked_loss",
        modes=GRADIENTS,
        softcap=False,
        loss="dpo",
        products=(3, 2, None),
    ),
    "liger_scaled_ce": Method(
        liger_scaled_ce,
        "logprobs",
        "liger_kernel.ops",
        softcap=False,
        dtypes=BFLOAT16,
        products=(4, 4, 1),
    ),
    "liger_mean_ce": Method(
        liger_mean_ce,
        "loss",
        "liger_kernel.transformers",
        devices=GPU,
        modes=GRADIENTS,
        loss="ce",
        products=(3, 2, None),
    ),
    "quack_mean_ce": Method(
        quack_mean_ce,
        "loss",
        "quack.linear_cross_entropy",
        devices=GPU,
        modes=GRADIENTS,
        softcap=False,
        dtypes=BFLOAT16,
        loss="ce",
        products=(3, 2, None),
    ),
    "torch_linear_cross_entropy": Method(
        torch_linear_cross_entropy, "logprobs", softcap=False, products=(4, 3, 1)
    ),
    "cce": Method(cce, "logprobs", "cut_cross_entropy", devices=GPU),
    "cce_exact": Method(
        cce_exact, "logprobs", "cut_cross_entropy", devices=GPU, products=(4, 3, 1)
    ),
    "verl": Method(verl_kernel, "logprobs", devices=GPU, softcap=False, products=(4, 4, 1)),
}
# exact, per token, 4 products with a trainable head
FOUR_PRODUCTS = (
    "trl_chunked",
    "liger_scaled_ce",
    "torch_linear_cross_entropy",
    "cce",
    "cce_exact",
    "verl",
)
