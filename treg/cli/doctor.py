"""What this machine has, which implementation will run, and whether it gives right numbers."""

import importlib.metadata
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from treg.cli.options import parse, words
from treg.ops import fused_treg_loss, reference, resolve_impl

PACKAGES = words(
    """
    torch triton numpy transformers accelerate datasets pyarrow jinja2 matplotlib peft liger-kernel
    trl
    """
)


def versions() -> dict[str, str]:
    """Package -> version, or "not installed"."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[str]:
    """The GPUs by name, capability and memory; the CPU where there is none."""
    if not torch.cuda.is_available():
        return [f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            f"cuda:{i} {p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        )
    return found


def self_test() -> tuple[str, dict[str, float], float]:
    """The T-REG loss and its gradients on random inputs against dense float64.

    Returns:
        The implementation that ran, the relative error of the loss, dhidden and dweight, and the
        seconds it took.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=g, dtype=torch.float64)
    weight = torch.randn(2000, 64, generator=g, dtype=torch.float64)
    target = torch.randint(2000, (256,), generator=g)
    rest = {
        "token_rewards": torch.rand(256, generator=g) - 0.5,
        "ref_logps": torch.full((4,), -700.0),
        "cu_seqlens": torch.tensor([0, 70, 130, 200, 256], dtype=torch.int32),
    }

    def differentiate(loss_fn: Callable, dtype: torch.dtype, where: str) -> list[Tensor]:
        h = hidden.detach().to(where, dtype).requires_grad_()
        w = weight.detach().to(where, dtype).requires_grad_()
        given = {k: x if k == "cu_seqlens" else x.to(where) for k, x in rest.items()}
        loss = loss_fn(h, w, target.to(where), **given).loss
        gradients = torch.autograd.grad(loss, (h, w))
        return [x.detach().double().cpu() for x in (loss, *gradients)]

    expected = differentiate(reference.fused_treg_loss, torch.float64, "cpu")
    found = differentiate(fused_treg_loss, torch.float32, device)
    errors = {}
    for name, exact, got in zip(("loss", "dhidden", "dweight"), expected, found, strict=True):
        errors[name] = ((got - exact).norm() / exact.norm()).item()
    impl = resolve_impl(None, torch.empty(0, device=device))
    return impl, errors, time.perf_counter() - start


def run(argv: list[str]) -> int:
    parse("doctor", argv, ())
    for name, version in versions().items():
        print(f"{name:14} {version}")
    for device in devices():
        print(f"{'device':14} {device}")
    impl, errors, seconds = self_test()
    print(f"{'runs':14} impl={impl!r}")
    ok = max(errors.values()) < 1e-5
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(
        f"{'self-test':14} {'ok' if ok else 'FAILED'}: relative errors against float64: {listed}; "
        f"{seconds:.1f} s"
    )
    return 0 if ok else 1
