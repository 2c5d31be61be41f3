"""Values of the ops against float64 where Triton's interpreter cannot tell: real vocabularies,
copy-engine tails, the vendor's products, streams, CUDA graphs.

Each case is a function of `Sizes` that gives a `Trial`: what is run, and what it should give by
`treg.ops.reference` in float64, all rows and all words. Vocabularies are real, rows are few.

    rms, max, relative    of found - exact; relative = its 2-norm over that of exact
    logprobs              rms <= 1e-5 nats, or twice that of exact sums of the vendor's float32
                          products where that is more; max <= 20 times as much
    kl, float32 sums      relative <= 1e-4 of bfloat16 operands: a matrix unit may truncate, and a
                          rounding to bfloat16 would be 2e-3; 1e-5 in float32
    dhidden, dweight      relative <= 5e-3 in bfloat16: four roundings to 8 bits, which mostly
                          cancel; 1e-5 in float32
    bits                  max = 0: the same call gives the same bits
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from loss_head_cases import DEVICE, IGNORE, LOGIT_STD
from torch import Tensor

from treg.ops import fused_treg_loss, linear_kl, linear_logprobs, reference
from treg.ops.head import Head, make_tiles
from treg.ops.head.gemm import add_transposed, logits_into, split_product, times_weight

Results = dict[str, Tensor]
NATS = 1e-5
FLOAT32_SUMS = ("kl", "logits", "sum", "parts")


class Skipped(Exception):
    """Why a case has nothing to show here."""


@dataclass(frozen=True)
class Sizes:
    """Real sizes in bfloat16, or small ones in float32, for the interpreter."""

    tiny: bool = False

    def of(self, real: int, small: int) -> int:
        return small if self.tiny else real

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16


@dataclass(frozen=True)
class Trial:
    """What a case runs, and how it is judged."""

    run: Callable[[], Results]
    exact: Callable[[], Results]
    vendor: Callable[[], Tensor] | None = None  # log-probs by the vendor's float32 products
    bits: bool = False
    launch: Callable[[], object] | None = None  # launches alone, where run does more


@dataclass(frozen=True)
class Problem:
    """Rows and a head. Logits have a standard deviation of LOGIT_STD."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    upstream: Tensor  # [N] float32, d loss / d lp

    @classmethod
    def of(cls, s: Sizes, N: int, V: int, D: int) -> "Problem":
        g = torch.Generator(DEVICE).manual_seed(N + V)

        def normal(*size):
            return torch.randn(size, generator=g, device=DEVICE)

        weight = (normal(V, D) * (LOGIT_STD / D**0.5)).to(s.dtype)
        target = torch.randint(V, (N,), generator=g, device=DEVICE)
        hidden = (normal(N, D) + weight[target]).to(s.dtype)
        return cls(hidden, weight, target, normal(N))

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """hidden and weight, which require gradients; in their own dtype they stay where they
        are.
        """
        found = (x.detach() if dtype is None else x.to(dtype) for x in (self.hidden, self.weight))
        hidden, weight = (x.requires_grad_() for x in found)
        return hidden, weight


def gradients(loss: Tensor, leaves: tuple[Tensor, Tensor]) -> Results:
    dhidden, dweight = torch.autograd.grad(loss, leaves)
    return {"dhidden": dhidden, "dweight": dweight}


def vendor_logprobs(p: Problem, softcap: float | None = None) -> Tensor:
    """By exact sums of float32 logits, which the vendor's library adds up."""
    logits = torch.mm(p.hidden, p.weight.T, out_dtype=torch.float32).double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = logits.log_softmax(-1).gather(1, p.target.clamp(min=0)[:, None])[:, 0]
    return found.masked_fill(p.target == IGNORE, 0.0)


def of_rows(p: Problem, **options) -> Trial:
    """`linear_logprobs` and its gradients."""

    def step(fn: Callable, dtype: torch.dtype | None, **more) -> Results:
        leaves = p.leaves(dtype)
        logps = fn(*leaves, p.target, **options, **more).logprobs
        loss = (logps * p.upstream).sum()
        return {"logprobs": logps.detach()} | gradients(loss, leaves)

    return Trial(
        lambda: step(linear_logprobs, None, impl="triton"),
        lambda: step(reference.linear_logprobs, torch.float64),
        lambda: vendor_logprobs(p, **options),
    )


def of_pairs(p: Problem, lengths: list[int], budget: int | None = None, **options) -> Trial:
    """`fused_treg_loss` of pairs and its gradients; lengths: of all chosen sequences, then of the
    rejected ones. Packed, but where all have the same length.

    The references put every margin near -8: there its weight hardly moves with the log-probs'
    rounding, and errors are those of the products.
    """
    V = p.weight.shape[0]
    likely = LOGIT_STD**2 / 2 - torch.tensor(float(V)).log().item()  # a token's mean log-prob
    shift = [40.0] * (len(lengths) // 2) + [-40.0] * (len(lengths) // 2)
    rewards, even = torch.tanh(p.upstream) / 2, len(set(lengths)) == 1
    shape = (len(lengths), lengths[0]) if even else (-1,)
    rest = {
        "token_rewards": rewards.view(shape),
        "ref_logps": torch.tensor(
            [n * likely + x for n, x in zip(lengths, shift, strict=True)], device=DEVICE
        ),
        "cu_seqlens": None if even else torch.tensor([0, *lengths]).cumsum(0).int(),
        **options,
    }

    def step(fn: Callable, dtype: torch.dtype | None, **more) -> Results:
        leaves = p.leaves(dtype)
        hidden, weight = leaves
        out = fn(hidden.view(*shape, hidden.shape[1]), weight, p.target.view(shape), **rest, **more)
        return {"logprobs": out.token_logps.detach().view(-1)} | gradients(out.loss, leaves)

    return Trial(
        lambda: step(fused_treg_loss, None, impl="triton", memory_budget=budget),
        lambda: step(reference.fused_treg_loss, torch.float64),
        lambda: vendor_logprobs(p, options.get("softcap")),
    )


def stash_bytes(p: Problem, rows: int) -> int:
    """A budget for the stash of so many rows."""
    tiles = make_tiles("triton", Head(p.weight))
    return tiles.fixed_bytes + rows * tiles.row_bytes(stash=True)


# -- the cases


def llama(s: Sizes, N: int, small: int, V: int = 128256, few: int = 520) -> Problem:
    return Problem.of(s, s.of(N, small), s.of(V, few), s.of(4096, 40))


def _graph(s: Sizes, rehearse: bool) -> Trial:
    """Forward and backward in a CUDA graph, replayed with other rows in the same memory.

    Without a rehearsal the vendor's library has been called before, also in autograd's thread, and
    none of the kernels.
    """
    p, other = llama(s, 200, 9), llama(s, 200, 9)
    other = replace(other, hidden=other.hidden.flip(0).contiguous(), target=other.target.flip(0))
    here = of_rows(p)

    def run() -> Results:
        if DEVICE != "cuda":
            raise Skipped("a CPU has no CUDA graphs")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if rehearse:
                here.run()
            else:
                _products(p)
                x = p.hidden[:, :64].clone().requires_grad_()
                (x @ x.T).sum().backward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = here.run()
        p.hidden.copy_(other.hidden)
        p.target.copy_(other.target)
        graph.replay()
        torch.cuda.synchronize()
        return found

    there = of_rows(other)
    return Trial(run, there.exact, there.vendor, launch=here.run)


def vocabulary_50257(s: Sizes) -> Trial:
    return of_rows(Problem.of(s, s.of(300, 21), s.of(50257, 257), s.of(768, 40)))


def vocabulary_128257(s: Sizes) -> Trial:
    return of_pairs(llama(s, 257, 20, 128257, 257), _lengths(s.of(257, 20), 2))


def tails(s: Sizes) -> Trial:
    """Neither N, V nor D is a multiple of a tile; rows are of 16 bytes all the same."""
    return of_rows(Problem.of(s, s.of(393, 33), s.of(128200, 264), s.of(1032, 40)))


def several_groups(s: Sizes) -> Trial:
    N = s.of(1000, 40)
    p = llama(s, N, N)
    return of_pairs(p, _lengths(N, 4), stash_bytes(p, -(-2 * N // 7)))


def one_long_pair(s: Sizes) -> Trial:
    N = s.of(600, 40)
    p = llama(s, N, N)
    return of_pairs(p, _lengths(N, 1), stash_bytes(p, max(17, N // 3)))


def pair_computed_again(s: Sizes) -> Trial:
    """A pair longer than the budget, with an objective that takes a fourth product."""
    N = s.of(600, 40)
    p = llama(s, N, N)
    budget = stash_bytes(p, max(17, N // 3))
    return of_pairs(p, _lengths(N, 1), budget, loss_type="ipo")


def softcap(s: Sizes) -> Trial:
    """Gemma-2's head, with logits that the cap bends."""
    p = Problem.of(s, s.of(200, 20), s.of(256000, 512), s.of(3584, 40))
    p = replace(p, hidden=4 * p.hidden)
    return of_pairs(p, _lengths(len(p.target), 1), softcap=30.0)


def ignored_rows(s: Sizes) -> Trial:
    """Runs of rows that are not scored, and NaN in their hidden: it adds nothing anywhere."""
    p = llama(s, 700, 60)
    N = len(p.target)
    at = torch.arange(N, device=DEVICE)
    return _poisoned(p, (at < N // 2) | (at % 5 == 0), of_rows)


def padded_pairs(s: Sizes) -> Trial:
    """So few rows that all are computed, those of the prompts too."""
    length = s.of(100, 10)
    p = llama(s, 4 * length, 4 * length)
    at = torch.arange(4 * length, device=DEVICE) % length
    return _poisoned(p, at < length // 3, lambda p: of_pairs(p, [length] * 4))


def _poisoned(p: Problem, ignored: Tensor, trial: Callable[[Problem], Trial]) -> Trial:
    p = replace(p, target=p.target.masked_fill(ignored, IGNORE))
    clean = trial(replace(p, hidden=p.hidden.masked_fill(ignored[:, None], 0.0)))
    poisoned = p.hidden.masked_fill(ignored[:, None], float("nan"))
    return replace(clean, run=trial(replace(p, hidden=poisoned)).run)


def odd_offset(s: Sizes) -> Trial:
    """hidden begins at an element whose address is no multiple of 16 bytes."""
    p = llama(s, 300, 20)
    storage = torch.zeros(p.hidden.numel() + 1, dtype=p.hidden.dtype, device=DEVICE)
    hidden = storage[1:].view(p.hidden.shape)
    hidden.copy_(p.hidden)
    return of_rows(replace(p, hidden=hidden))


def two_threads(s: Sizes) -> Trial:
    """Each on a stream of its own: the bits of each alone."""
    steps = [of_rows(llama(s, 100 + i, 9 + i)).run for i in range(2)]

    def named(found: list[Results]) -> Results:
        return {f"{name} {i}": x for i, some in enumerate(found) for name, x in some.items()}

    return Trial(
        lambda: named(_together(steps)),
        lambda: named([step() for step in steps]),
        bits=True,
        launch=lambda: [step() for step in steps],
    )


def kl_forward(s: Sizes) -> Trial:
    return _kl(s, "forward")


def kl_reverse(s: Sizes) -> Trial:
    return _kl(s, "reverse")


def _kl(s: Sizes, direction: str) -> Trial:
    """`linear_kl` with log-probs; the reference is narrower."""
    V, N = s.of(151936, 264), s.of(200, 12)
    p = Problem.of(s, N, V, s.of(2048, 40))
    other = Problem.of(s, N, V, s.of(1024, 24))
    target = p.target.masked_fill(torch.arange(N, device=DEVICE) % 4 == 0, IGNORE)

    def step(fn: Callable, dtype: torch.dtype | None, **more) -> Results:
        leaves = p.leaves(dtype)
        fixed = [x if dtype is None else x.to(dtype) for x in (other.hidden, other.weight)]
        out = fn(*leaves, *fixed, target=target, direction=direction, **more)
        up = p.upstream.to(out.kl.dtype)
        found = {"kl": out.kl.detach(), "logprobs": out.logprobs.detach()}
        return found | gradients(out.kl @ up + out.logprobs @ up.flip(0), leaves)

    return Trial(
        lambda: step(linear_kl, None, impl="triton"),
        lambda: step(reference.linear_kl, torch.float64),
        lambda: vendor_logprobs(replace(p, target=target)),
    )


def products(s: Sizes) -> Trial:
    """The vendor's products with float32 sums of 16-bit operands: mm, addmm and bmm with
    out_dtype.
    """
    p = llama(s, 128, 16)

    def exact() -> Results:
        h, w = p.hidden.double(), p.weight.double()
        logits = h @ w.T
        tile = logits.to(s.dtype).double()
        return {"logits": logits, "sum": 2 * tile.T @ h, "parts": tile @ w, "dhidden": tile @ w}

    return Trial(lambda: _products(p), exact)


def _products(p: Problem) -> Results:
    (N, D), V = p.hidden.shape, p.weight.shape[0]
    logits = torch.empty(N, V, device=DEVICE)
    logits_into(p.hidden, p.weight, logits)
    total = torch.empty(V, D, device=DEVICE)
    tile = (p.hidden.double() @ p.weight.double().T).to(p.hidden.dtype)
    for first in (True, False):
        add_transposed(total, tile, p.hidden, first=first)
    out = torch.empty_like(p.hidden)
    times_weight(tile, p.weight, out)
    parts = split_product(tile, p.weight, 8).sum(0)
    return {"logits": logits, "sum": total, "parts": parts, "dhidden": out}


def _lengths(N: int, pairs: int) -> list[int]:
    """2 * pairs sequences of N rows in all, of unequal lengths."""
    mean, many = N // (2 * pairs), 2 * pairs
    found = [max(1, mean + (i % 3 - 1) * mean // 7) for i in range(many - 1)]
    return [*found, N - sum(found)]


def _together(steps: list[Callable[[], Results]]) -> list[Results]:
    if DEVICE != "cuda":
        raise Skipped("a CPU has no streams")
    found: list = [None] * len(steps)

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                found[i] = steps[i]()
            stream.synchronize()
        except Exception as e:
            found[i] = e

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(steps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in found:
        if isinstance(x, Exception):
            raise x
    return found


ALONE = "CUDA graph, cold kernel"  # in a process that has run no kernel before
GRAPHS = (ALONE, "CUDA graph, after a rehearsal")
CASES: dict[str, Callable[[Sizes], Trial]] = {
    ALONE: lambda s: _graph(s, rehearse=False),
    GRAPHS[1]: lambda s: _graph(s, rehearse=True),
    "V = 50257": vocabulary_50257,
    "V = 128257": vocabulary_128257,
    "N = 1": lambda s: of_rows(llama(s, 1, 1)),
    "N = 5": lambda s: of_rows(llama(s, 5, 5)),
    "N = 2048": lambda s: of_rows(llama(s, 2048, 70)),
    "tails of N, V and D": tails,
    "several groups": several_groups,
    "one long pair": one_long_pair,
    "one long pair, computed again": pair_computed_again,
    "softcap": softcap,
    "ignored rows, NaN in them": ignored_rows,
    "padded pairs, NaN in prompts": padded_pairs,
    "products with out_dtype": products,
    "two threads": two_threads,
    "hidden at an odd offset": odd_offset,
    "linear_kl, forward": kl_forward,
    "linear_kl, reverse": kl_reverse,
}


# -- judging


def errors(found: Results, exact: Results) -> dict[str, dict[str, float]]:
    """rms, max and relative of each result."""
    result = {}
    for name, x in found.items():
        wanted = exact[name].double()
        gap = x.double() - wanted
        size = wanted.norm().item()
        result[name] = {
            "rms": gap.square().mean().sqrt().item(),
            "max": gap.abs().max().item(),
            "relative": gap.norm().item() / size if size else float("inf"),
        }
    return result


def limits(name: str, trial: Trial, s: Sizes, vendor_rms: float) -> dict[str, float]:
    """Of one result; see the head of this file."""
    if trial.bits:
        return {"max": 0.0}
    if name == "logprobs":
        rms = max(NATS, 2 * vendor_rms)
        return {"rms": rms, "max": 20 * rms}
    if s.dtype == torch.float32:
        return {"relative": 1e-5}
    return {"relative": 1e-4 if name in FLOAT32_SUMS else 5e-3}


def judged(trial: Trial, s: Sizes) -> dict:
    """{"passed", "errors", "limits"} of a trial."""
    found = trial.run()
    exact = trial.exact()
    measured = errors(found, exact)
    vendor = 0.0
    if trial.vendor is not None and DEVICE == "cuda":
        vendor = errors({"logprobs": trial.vendor()}, exact)["logprobs"]["rms"]
    allowed = {name: limits(name, trial, s, vendor) for name in measured}
    passed = all(
        measured[name][kind] <= limit  # of NaN this is false
        for name, kinds in allowed.items()
        for kind, limit in kinds.items()
    )
    return {
        "passed": passed,
        "errors": _short(measured),
        "limits": _short(allowed),
        "vendor_rms_nats": float(f"{vendor:.3g}"),
    }


def _short(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {k: float(f"{x:.3g}") for k, x in row.items()} for name, row in table.items()}


def run(name: str, s: Sizes) -> dict:
    """The result of a case, whatever happens: what raises has failed, by its error."""
    try:
        return judged(CASES[name](s), s)
    except Skipped as e:
        return {"skipped": str(e)}
    except Exception as e:
        return {"passed": False, "error": chain(e)}


def chain(error: BaseException | None) -> str:
    """An error and all in whose handling it was raised, the first cause last: a capture that breaks
    raises another error at its end.
    """
    parts = []
    while error is not None and len(parts) < 8:
        parts.append(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        error = error.__cause__ or error.__context__
    return " <- ".join(parts)


def launch(name: str, s: Sizes) -> None:
    """The launches of a case, without its oracle."""
    trial = CASES[name](s)
    (trial.launch or trial.run)()
