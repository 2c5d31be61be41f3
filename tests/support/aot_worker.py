"""Compile every kernel for one architecture without a device, through the real launchers; print one
JSON row each.

    python tests/support/aot_worker.py sm90

A process of its own: it must not run under Triton's interpreter. A stand-in driver takes the
launches, so that Triton specialises the real arguments, compiles what a device would run, checks
shared memory, and runs nothing. The tensors have the shapes of a real head and are never touched,
so they take no memory.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from aot_code import LIMITS, contents, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROWS, VOCAB, HIDDEN = 4096, 128256, 4096  # Llama-3 8B
ODD_VOCAB, ONE_MORE = 50257, 128257  # GPT-2, and Llama-3 with a token for padding
GEMMA_2 = 256000, 3584  # 9B; its head has a softcap and nothing else
TILED = ("_tile_kernel", "_gradient_kernel")


def target_of(arch: str) -> GPUTarget:
    return (
        GPUTarget("cuda", int(arch[2:]), 32)
        if arch.startswith("sm")
        else GPUTarget("hip", arch, 64)
    )


class FakeDriver:
    """Enough of a driver for `kernel[grid](cpu tensors)`."""

    def __init__(self, arch: str):
        self.target, self.arch = target_of(arch), arch
        self.utils = self

    def launcher_cls(self, src, metadata):
        return lambda *args, **kwargs: None

    def get_device_properties(self, device):
        return {
            "max_shared_mem": LIMITS[self.arch].block_shared,
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": self.target.warp_size,
        }

    def load_binary(self, name, binary, shared, device):
        return None, None, 0, 0, 1024

    def unload_module(self, module):
        pass

    def is_active(self):
        return True

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def fake_device(arch: str):
    before = driver._active
    driver.set_active(FakeDriver(arch))
    try:
        yield
    finally:
        driver._active = before


def scalars_of(options: bool):
    from treg_kernels.tiles import Scalars

    return Scalars.of(1.0, 30.0, 0.7) if options else Scalars.of(1.0, None, 1.0)


def run_head(
    kind: str,
    dtype: torch.dtype,
    rows=ROWS,
    shape=(VOCAB, HIDDEN),
    padding=0,
    begin=0,
    options="",
    statistics=False,
    tile=None,
):
    """One of configs.KINDS.

    options: "all" for bias, softcap and temperature, "softcap" for that alone. padding: elements
    between two rows. begin: of hidden in its storage.
    """
    import treg_kernels as K
    from treg_kernels.forward import STATISTICS
    from treg_kernels.tiles import Scalars

    V, D = shape
    hidden = torch.empty(begin + rows * (D + padding), dtype=dtype)[begin:]
    hidden = hidden.view(rows, D + padding)[:, :D]
    weight = torch.empty(V, D + padding, dtype=dtype)[:, :D]
    target, row = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    out = None if kind == "forward" else torch.empty(rows, V + -V % 64, dtype=dtype)[:, :V]
    head = (
        hidden,
        weight,
        target,
        torch.empty(V, dtype=dtype) if options == "all" else None,
        Scalars.of(1.0, 30.0, 1.0) if options == "softcap" else scalars_of(options == "all"),
        -100,
    )
    rest = {"product": lambda *operands: None, "tile": tile}
    if kind == "gradient":
        K.logits_gradient(*head, torch.empty(rows, 2), row, out, **rest)
    else:
        K.logprob_forward(*head, STATISTICS if statistics else (), out, **rest)


def head_cases(arch: str) -> Iterator[tuple[str, Callable]]:
    """Name and launch of the forward, with and without a stash, and of the gradient: rows, options,
    layouts, dtypes.
    """
    from treg_kernels import configs

    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    few, options = {"rows": 64}, {"options": "all"}
    odd, unaligned = {"shape": (ODD_VOCAB, HIDDEN)}, {"shape": (ODD_VOCAB, HIDDEN), "padding": 1}
    flat = next((t for t in configs.CANDIDATES[configs.architecture()] if t.flat), None)
    everything, vendor = {**options, "statistics": True}, {"tile": configs.ROWS}
    cases = [
        *((kind, bf16, "", {}) for kind in configs.KINDS),
        ("stash", bf16, "64 rows", few),
        ("stash", bf16, "V = 50257", odd),
        ("stash", bf16, "unaligned", unaligned),
        ("forward", bf16, "all options and statistics", everything),
        ("stash", bf16, "all options", options),
        ("gradient", bf16, "all options", options),
        ("forward", bf16, "vendor's product", vendor),
        ("gradient", bf16, "vendor's product", vendor),
        ("forward", f16, "", {}),
        ("forward", f32, "all options and statistics", everything),
        ("stash", f32, "", {}),
        ("gradient", f32, "", {}),
    ]
    if arch == "sm90":
        cases += [
            ("forward", bf16, "64 rows", few),
            ("gradient", bf16, "64 rows", few),
            ("forward", bf16, "all options", options),
            ("gradient", bf16, "unaligned", unaligned),
            ("gradient", bf16, "V = 50257", odd),
            *(
                (kind, bf16, name, what)
                for name, what in (
                    ("one loop over all tiles", {"tile": flat}),
                    ("V = 128257", {"shape": (ONE_MORE, HIDDEN)}),
                    ("hidden at an odd offset", {"begin": 1}),
                    ("softcap, Gemma-2", {"options": "softcap", "shape": GEMMA_2}),
                )
                for kind in configs.KINDS
            ),
            ("stash", bf16, "vendor's product, all options and statistics", vendor | everything),
        ]
    for kind, dtype, name, what in cases:
        words = ", ".join(filter(None, (kind, str(dtype).removeprefix("torch."), name)))
        yield words, functools.partial(run_head, kind, dtype, **what)


def run_filtered(dtype: torch.dtype, options: bool, *, add: bool):
    """The gradient of active tiles alone, of 256 columns for each of the forward's partial
    results.
    """
    from treg_kernels import active, filtered

    hidden, weight = torch.empty(ROWS, HIDDEN, dtype=dtype), torch.empty(VOCAB, HIDDEN, dtype=dtype)
    target, row = torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS)
    norm = torch.empty(ROWS, 2)
    tops = torch.empty(ROWS, -(-VOCAB // 256))
    kept = active.active_tiles(tops, 256, norm, row, target, torch.empty(()), VOCAB)
    slab = torch.empty(filtered.slab_shape(ROWS, VOCAB), dtype=dtype)
    wide = torch.float32 if add else dtype
    filtered.filtered_gradients(
        hidden,
        weight,
        target,
        torch.empty(VOCAB, dtype=dtype) if options else None,
        scalars_of(options),
        norm,
        row,
        kept,
        slab,
        torch.empty_like(hidden),
        torch.empty(VOCAB, HIDDEN, dtype=wide),
        torch.empty(VOCAB, dtype=wide) if options else None,
        add=add,
    )


def filtered_cases() -> Iterator[tuple[str, Callable]]:
    for name, dtype, options in (
        ("bfloat16", torch.bfloat16, False),
        ("bfloat16, all options, added up", torch.bfloat16, True),
        ("float32, all options, added up", torch.float32, True),
    ):
        yield f"filtered, {name}", functools.partial(run_filtered, dtype, options, add=options)


def run_objective(name: str, dtype: torch.dtype, everything: bool):
    from treg_kernels.bases import BASES
    from treg_kernels.objective import pair_objective

    row, stats = torch.zeros(64, dtype=dtype), torch.zeros(11, 4, dtype=dtype)
    if everything:
        tokens = (
            row,
            torch.zeros(64, dtype=torch.int64),
            row,
            row,
            row,
            torch.zeros(9, dtype=torch.int32),
        )
    else:
        tokens = (
            row,
            torch.zeros(64, dtype=torch.bool),
            None,
            None,
            None,
            9,
        )
    pair_objective(
        *tokens,
        1,
        2,
        stats[0].clone(),
        stats,
        row,
        base=BASES[name],
        beta=0.1,
        alpha=0.25,
        options=(0.1,),
        static=not everything,
        length_normalised=everything,
        nll=everything,
    )


def objective_cases() -> Iterator[tuple[str, Callable]]:
    """Two with all options, and DPO with none; test_objective.py compiles the others."""
    for name in ("dpo", "orpo"):
        yield (
            f"objective {name}, float32, all options",
            functools.partial(run_objective, name, torch.float32, True),
        )
    yield (
        "objective dpo, float64, no options",
        functools.partial(run_objective, "dpo", torch.float64, False),
    )


def run_rows(dtype: torch.dtype, listed: bool):
    """Hidden states times their scale: every factor and listed rows, or one factor and all rows."""
    from treg_kernels.rows import scale_rows

    hidden, row = torch.empty(ROWS, HIDDEN, dtype=dtype), torch.empty(ROWS)
    rows = torch.empty(ROWS, dtype=torch.int64) if listed else None
    factors = [row, torch.empty(1), row] if listed else [row]
    scale_rows(hidden, rows, factors, torch.empty_like(hidden), clean=listed)


def rows_cases() -> Iterator[tuple[str, Callable]]:
    yield "rows, bfloat16", functools.partial(run_rows, torch.bfloat16, False)
    yield "rows, float32, listed", functools.partial(run_rows, torch.float32, True)


def run_kl(dtype: torch.dtype, what: str, reverse: bool, options: bool):
    """KL divergence from products: its values alone, with stashes, or with a gradient for known
    coefficients.
    """
    from treg_kernels.kl import kl_rows, stash_sum

    a, ref_a = torch.empty(ROWS, VOCAB), torch.empty(ROWS, VOCAB)
    out, other = (torch.empty(ROWS, VOCAB, dtype=dtype) for _ in range(2))
    biases = [torch.empty(VOCAB, dtype=dtype) if options else None] * 2
    coefs = torch.empty(ROWS), torch.empty(ROWS)
    given = {
        "values": {"stashes": []},
        "stashes": {"stashes": [out, other]},
        "gradient": {"stashes": [], "coefs": coefs, "out": out},
    }
    target = None if what == "values" else torch.empty(ROWS, dtype=torch.int64)
    scalars = scalars_of(options)
    kl_rows(a, ref_a, *biases, scalars, scalars, target, -100, reverse=reverse, **given[what])
    if what == "stashes":
        stash_sum([out, other], coefs, out)


def kl_cases() -> Iterator[tuple[str, Callable]]:
    for name, *rest in (
        ("values, forward", torch.bfloat16, "values", False, False),
        ("stashes, bfloat16, forward", torch.bfloat16, "stashes", False, False),
        ("stashes, bfloat16, reverse, all options", torch.bfloat16, "stashes", True, True),
        ("gradient, float16, forward, all options", torch.float16, "gradient", False, True),
        ("gradient, float32, reverse", torch.float32, "gradient", True, False),
    ):
        yield f"kl, {name}", functools.partial(run_kl, *rest)


def compiled(cases: Iterable[tuple[str, Callable]]) -> Iterator[tuple[str, CompiledKernel, str]]:
    """Launch everything: each case's kernels, and the case that has compiled it first."""
    from treg_kernels import active, backward, combine, filtered, forward, kl, objective, rows

    found = [
        f
        for module in (forward, combine, backward, objective, active, filtered, kl, rows)
        for f in vars(module).values()
    ]
    functions = list(dict.fromkeys(f for f in found if isinstance(f, JITFunction)))
    seen: dict[str, str] = {}
    for case, launch in cases:
        for function in functions:
            function.device_caches.clear()
        launch()
        for function in functions:
            for cache in function.device_caches.values():
                for kernel in cache[0].values():
                    yield case, kernel, seen.setdefault(kernel.hash, case)


def row_of(case: str, kernel: CompiledKernel, arch: str) -> dict:
    """A row of the report."""
    from treg_kernels import configs

    name, meta = kernel.src.fn.__name__, kernel.metadata
    values = {kernel.src.fn.arg_names[at[0]]: value for at, value in kernel.src.constants.items()}
    block = [
        value for key, value in values.items() if key.startswith("BLOCK") and isinstance(value, int)
    ]
    row = {
        "case": case,
        "kernel": name,
        "block": "x".join(map(str, block)),
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        **resources(kernel, arch),
    }
    if name in TILED:
        tiles = [
            *configs.TILES[configs.architecture()],
            *configs.TILES["sm80"],
            configs.FLOAT32,
            configs.ROWS,
        ]
        row["programs"] = next(
            t.programs for t in tiles if t[:5] == (*block, meta.num_warps, meta.num_stages)
        )
        row["source"] = values["SOURCE"]
    if arch == "sm90" and row["matrix"]:
        row |= contents(kernel.asm["cubin"], sides=name in TILED)
    return row


def report_of(arch: str) -> dict:
    """rows: of each kernel, by the case that compiles it first. again: of a case that takes a tile
    kernel of an earlier one, that case.
    """
    rows, again = [], {}
    with fake_device(arch):
        cases = [*head_cases(arch), *filtered_cases(), *objective_cases(), *kl_cases()]
        cases += rows_cases()
        for case, kernel, first in compiled(cases):
            if first == case:
                rows.append(row_of(case, kernel, arch))
            elif kernel.src.fn.__name__ in TILED:
                again[case] = first
    return {"rows": rows, "again": again}


if __name__ == "__main__":
    json.dump(report_of(sys.argv[1]), sys.stdout)
