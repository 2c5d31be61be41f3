"""What is benchmarked: shapes of a language-model head and the tensors of one batch of preference
pairs.
"""

import csv
import functools
from dataclasses import dataclass, replace

import torch
from make_lengths import LENGTHS
from torch import Tensor

from treg.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
LOGIT_STD = 3.0
REF_SHIFT = 40.0  # nats
MODES = ("trainable", "frozen", "forward")
MASKS = ("all", "realistic")
# D, V, softcap
HEADS = {
    "llama-3-8b": (4096, 128256, None),
    "qwen2.5-7b": (3584, 152064, None),
    "gemma-2-9b": (3584, 256000, 30.0),
    "qwen3": (2048, 151936, None),
    "gemma-3-270m": (640, 262144, None),
}
ROWS = (16384, 4096, 2048, 65536, 512, 128)  # the most telling first
LEAST_REALISTIC = 2048  # one real pair, padded, is about as long


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
    mask: str = "all"  # "realistic": real prompts and padding are not scored, see `real_pairs`
    head: str = ""
    nominal_rows: int = 0  # a realistic batch of whole pairs comes as near to it as it can

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.length

    @property
    def flops_per_product(self) -> int:
        """FLOP of one matrix product, 2 N D V: a scheme of k products does k times as much."""
        return 2 * self.rows * self.hidden * self.vocab


@dataclass(frozen=True)
class Batch:
    """The tensors of a case. Every number of hidden and weight is one of bfloat16: all dtypes hold
    the same ones.
    """

    hidden: Tensor  # [2B, T, D], chosen sequences first
    weight: Tensor  # [V, D]
    target: Tensor  # [2B, T]
    token_rewards: Tensor  # [2B, T], uniform in [-0.5, 0.5]
    ref_logps: Tensor  # [2B] sums, nats
    logprobs: Tensor  # [2B, T], dense, computed in float32
    scored: (
        Tensor  # [n] indices of the scored ones of 2B * T rows: what a collator that packs knows
    )
    cu_seqlens: Tensor  # [2B+1] int32 on the CPU: where each sequence's scored rows begin
    softcap: float | None
    mode: str

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that take a gradient, by the gradient's name."""
        return {
            f"d{n}": getattr(self, n)
            for n in ("hidden", "weight")
            if getattr(self, n).requires_grad
        }


def batch_of(case: Case) -> Batch:
    """Tensors on DEVICE, the same numbers at every call; those of the last two cases are kept.

    Logits have a standard deviation of LOGIT_STD, the target's a mean of its square. So wide a
    spread leaves a gradient filter (cut-cross-entropy's) no tile to skip; with logits near 0 it
    would skip nearly all of them. ref_logps put a pair's margin near -8, where its weight w =
    sigmoid(-m) is close to 1 and hardly moves with the rounding of many log-probs: errors of the
    gradients are then those of the products.
    """
    kept = _tensors(replace(case, name="", mode="", head="", nominal_rows=0))
    hidden = kept.hidden.detach().requires_grad_(case.mode != "forward")
    weight = kept.weight.detach().requires_grad_(case.mode == "trainable")
    return replace(kept, hidden=hidden, weight=weight, mode=case.mode)


@functools.lru_cache(maxsize=2)
def _tensors(case: Case) -> Batch:
    g = torch.Generator(DEVICE).manual_seed(0)
    shape = (2 * case.pairs, case.length)

    def normal(*size):
        return torch.randn(size, generator=g, device=DEVICE)

    weight = (normal(case.vocab, case.hidden) * (LOGIT_STD / case.hidden**0.5)).bfloat16()
    target = torch.randint(case.vocab, shape, generator=g, device=DEVICE)
    hidden = (normal(*shape, case.hidden) + weight[target]).bfloat16()
    scored = scored_mask(case)
    target = target.masked_fill(~scored.to(DEVICE), IGNORE)
    logprobs = chunked_logprobs(hidden.float(), weight.float(), target, case.softcap)
    sums = logprobs.sum(1)
    sums[: case.pairs] += REF_SHIFT
    sums[case.pairs :] -= REF_SHIFT
    return Batch(
        hidden.to(case.dtype),
        weight.to(case.dtype),
        target,
        torch.rand(shape, generator=g, device=DEVICE) - 0.5,
        sums + normal(shape[0]),
        logprobs,
        *_places(scored),
        case.softcap,
        case.mode,
    )


def blank_batch(case: Case) -> Batch:
    """`batch_of` without its numbers: shapes, dtypes, targets and scored rows, zeros else.

    For whoever wants the launches of a step and not its results.
    """
    shape, scored = (2 * case.pairs, case.length), scored_mask(case)

    def zeros(*size, dtype=torch.float32, leaf=False):
        return torch.zeros(size, dtype=dtype, device=DEVICE, requires_grad=leaf)

    return Batch(
        zeros(*shape, case.hidden, dtype=case.dtype, leaf=case.mode != "forward"),
        zeros(case.vocab, case.hidden, dtype=case.dtype, leaf=case.mode == "trainable"),
        torch.zeros(shape, dtype=torch.int64).masked_fill(~scored, IGNORE).to(DEVICE),
        zeros(*shape),
        zeros(shape[0]),
        zeros(*shape),
        *_places(scored),
        case.softcap,
        case.mode,
    )


def _places(scored: Tensor) -> tuple[Tensor, Tensor]:
    """`Batch.scored` and `Batch.cu_seqlens` of a mask."""
    return (
        scored.flatten().nonzero().squeeze(1).to(DEVICE),
        torch.cat([torch.zeros(1), scored.sum(1).cumsum(0)]).to(torch.int32),
    )


def scored_mask(case: Case) -> Tensor:
    """[2B, T] bool, on the CPU. A realistic row i is scored where the token after it belongs to the
    response.
    """
    at = torch.arange(case.length).expand(2 * case.pairs, -1)
    if case.mask == "all":
        return at >= round(case.ignored * case.length)
    pairs = real_pairs()[: case.pairs]
    prompt = torch.tensor([p for p, _, _ in pairs] * 2).unsqueeze(1)
    response = torch.tensor([c for _, c, _ in pairs] + [r for _, _, r in pairs]).unsqueeze(1)
    return (at >= prompt - 1) & (at < prompt + response - 1)


@functools.cache
def real_pairs() -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected response of real pairs, in random order; see
    `make_lengths.py`.
    """
    with LENGTHS.open() as file:
        return [
            (int(x["prompt"]), int(x["chosen"]), int(x["rejected"])) for x in csv.DictReader(file)
        ]


def real_shape(rows: int) -> tuple[int, int]:
    """(pairs, length) of the first real pairs, padded to the longest, whose number of positions is
    nearest to rows.
    """
    longest, found = 0, (1, 0)
    for k, (prompt, chosen, rejected) in enumerate(real_pairs(), 1):
        longest = max(longest, prompt + max(chosen, rejected))
        if k == 1 or abs(2 * k * longest - rows) < abs(2 * found[0] * found[1] - rows):
            found = k, longest
        if 2 * k * longest > 2 * rows:
            break
    return found


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None
) -> Tensor:
    """Dense log-probs [...] of the specification for hidden [..., D], without gradients, a few rows
    at a time.
    """
    pieces = (x.split(chunk_rows(weight)) for x in (hidden.flatten(0, -2), target.flatten()))
    with torch.no_grad():
        found = [
            reference.linear_logprobs(h, weight, y, softcap=softcap, ignore_index=IGNORE).logprobs
            for h, y in zip(*pieces, strict=True)
        ]
    return torch.cat(found).view(target.shape)


def chunk_rows(weight: Tensor) -> int:
    """Rows whose logits take 64 MiB in float64 on a CPU, 2 GiB on a GPU."""
    return max(1, (2**31 if weight.is_cuda else 2**26) // (8 * weight.shape[0]))


def gpu_cases() -> list[Case]:
    """The matrix, the cells that bars are set on first."""
    cells = [
        (head, N, mask, mode) for mask in MASKS for N in ROWS for head in HEADS for mode in MODES
    ]
    cases = [gpu_case(*cell) for cell in cells if cell[2] == "all" or cell[1] >= LEAST_REALISTIC]
    return sorted(cases, key=lambda case: case.name not in FIRST)  # stable


def gpu_case(head: str, N: int, mask: str, mode: str) -> Case:
    D, V, softcap = HEADS[head]
    pairs, length = (max(1, N // 2048), min(1024, N // 2)) if mask == "all" else real_shape(N)
    return Case(
        f"{head}-N{N}-{mask}-{mode}",
        pairs,
        length,
        D,
        V,
        torch.bfloat16,
        mode,
        softcap,
        mask=mask,
        head=head,
        nominal_rows=N,
    )


def tiny(case: Case) -> Case:
    """The same cell with hardly any work: to try what runs cells."""
    return replace(case, pairs=2, length=8 if case.mask == "all" else 600, hidden=32, vocab=97)


# cells that a bar is set on (`gpu_bars.py`): measured first, and cool as well as hot
FIRST = {
    *(f"llama-3-8b-N16384-all-{mode}" for mode in MODES),
    "llama-3-8b-N2048-all-trainable",
    "llama-3-8b-N16384-realistic-trainable",
    *(f"gemma-2-9b-N16384-all-{mode}" for mode in MODES),
}
CASES = gpu_cases() if DEVICE == "cuda" else []  # of a CPU: `cpu_plan`
