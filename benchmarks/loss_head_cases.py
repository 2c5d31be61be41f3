"""What is benchmarked: shapes of a language-model head and the tensors of one batch of preference pairs."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treg import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
LOGIT_STD = 3.0
REF_SHIFT = 40.0  # nats
MODES = ("trainable", "frozen", "forward")


@dataclass(frozen=True)
class Case:
    """B pairs of two sequences of T tokens through a [V, D] head; N = 2 B T rows."""

    name: str
    pairs: int
    length: int
    hidden: int  # D
    vocab: int  # V
    dtype: torch.dtype
    mode: str = "trainable"  # "frozen": no dweight; "forward": log-probs only, under no_grad
    softcap: float | None = None
    ignored: float = 0.0  # share of each sequence, at its start, that is not scored

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.length

    @property
    def flops_per_product(self) -> int:
        """FLOP of one matrix product, 2 N D V: a scheme of k products does k times as much."""
        return 2 * self.rows * self.hidden * self.vocab


@dataclass(frozen=True)
class Batch:
    """The tensors of a case. Every number of hidden and weight is one of bfloat16: all dtypes hold the same ones."""

    hidden: Tensor  # [2B, T, D], chosen sequences first
    weight: Tensor  # [V, D]
    target: Tensor  # [2B, T]
    token_rewards: Tensor  # [2B, T], uniform in [-0.5, 0.5]
    ref_logps: Tensor  # [2B] sums, nats
    softcap: float | None
    mode: str

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that take a gradient, by the gradient's name."""
        return {f"d{n}": getattr(self, n) for n in ("hidden", "weight") if getattr(self, n).requires_grad}


@functools.lru_cache(maxsize=2)
def batch_of(case: Case) -> Batch:
    """Tensors on DEVICE, the same numbers at every call; those of the last two cases are kept.

    Logits have a standard deviation of LOGIT_STD, the target's a mean of its square. So wide a spread leaves a
    gradient filter (cut-cross-entropy's) no tile to skip; with logits near 0 it would skip nearly all of them.
    ref_logps put a pair's margin near -8, where its weight w = sigmoid(-m) is close to 1 and hardly moves with the
    rounding of many log-probs: errors of the gradients are then those of the products.
    """
    g = torch.Generator(DEVICE).manual_seed(0)
    shape = (2 * case.pairs, case.length)

    def normal(*size):
        return torch.randn(size, generator=g, device=DEVICE)

    weight = (normal(case.vocab, case.hidden) * (LOGIT_STD / case.hidden**0.5)).bfloat16()
    target = torch.randint(case.vocab, shape, generator=g, device=DEVICE)
    hidden = (normal(*shape, case.hidden) + weight[target]).bfloat16()
    target[:, : round(case.ignored * case.length)] = IGNORE
    sums = chunked_logprobs(hidden.float(), weight.float(), target, case.softcap).sum(1)
    sums[: case.pairs] += REF_SHIFT
    sums[case.pairs :] -= REF_SHIFT
    return Batch(
        hidden.to(case.dtype).requires_grad_(case.mode != "forward"),
        weight.to(case.dtype).requires_grad_(case.mode == "trainable"),
        target,
        torch.rand(shape, generator=g, device=DEVICE) - 0.5,
        sums + normal(shape[0]),
        case.softcap,
        case.mode,
    )


def chunked_logprobs(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """Dense log-probs [2B, T] of the specification, without gradients, a few rows at a time."""
    pieces = (x.flatten(0, 1).split(chunk_rows(weight)) for x in (hidden, target.unsqueeze(-1)))
    with torch.no_grad():
        found = [
            reference.linear_logprobs(h, weight, y.squeeze(-1), softcap=softcap, ignore_index=IGNORE).logprobs
            for h, y in zip(*pieces, strict=True)
        ]
    return torch.cat(found).view(target.shape)


def chunk_rows(weight: Tensor) -> int:
    """Rows whose logits take 64 MiB in float64 on a CPU, 2 GiB on a GPU."""
    return max(1, (2**31 if weight.is_cuda else 2**26) // (8 * weight.shape[0]))


# heads of Llama-3-8B, Qwen2.5-7B and Gemma-2-9B
_GPU_HEADS = {
    "llama-3-8b": (4096, 128256, None),
    "qwen2.5-7b": (3584, 152064, None),
    "gemma-2-9b": (3584, 256000, 30.0),
}


def _gpu_cases() -> list[Case]:
    return [
        Case(f"{head}-N{2048 * pairs}-{mode}", pairs, 1024, D, V, torch.bfloat16, mode, softcap)
        for head, (D, V, softcap) in _GPU_HEADS.items()
        for pairs in (1, 2, 8)
        for mode in MODES
    ]


def _cpu_cases() -> list[Case]:
    base = Case("cpu-fp32-trainable", 2, 128, 256, 8000, torch.float32)
    half = replace(base, name="cpu-bf16-trainable", dtype=torch.bfloat16)
    return [
        base,
        half,
        replace(half, name="cpu-bf16-frozen", mode="frozen"),
        replace(half, name="cpu-bf16-forward", mode="forward"),
        replace(half, name="cpu-bf16-softcap", softcap=30.0),
        replace(half, name="cpu-bf16-half-ignored", ignored=0.5),
    ]


CASES = _gpu_cases() if DEVICE == "cuda" else _cpu_cases()
