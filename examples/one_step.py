r"""One T-REG step on a small model built on the spot, fused and dense: the same numbers, in less
memory and time.

    python examples/one_step.py [--pairs 2] [--length 256] [--hidden 256] [--vocab 32000] \
        [--dtype float32]

A two-layer transformer gives hidden states, its own start is the reference model, and random token
rewards stand in for those of contrastive prompts. Needs torch alone. On a GPU the fused loss runs
in Triton, on a CPU in torch.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from treg.ops import fused_treg_loss, linear_logprobs, reference

LOSSES = {"fused": fused_treg_loss, "dense": reference.fused_treg_loss}


class TinyLM(nn.Module):
    """Embedding, two causal transformer layers, and a head that is only ever read as a weight."""

    def __init__(self, vocab: int, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        layer = nn.TransformerEncoderLayer(
            hidden, 4, 4 * hidden, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(hidden), enable_nested_tensor=False
        )
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[S, T] token ids -> [S, T, D] hidden states."""
        mask = nn.Transformer.generate_square_subsequent_mask(
            ids.shape[1], device=ids.device, dtype=self.embed.weight.dtype
        )
        return self.layers(self.embed(ids), mask=mask, is_causal=True)


def make_step(
    args: argparse.Namespace, device: str
) -> tuple[TinyLM, torch.Tensor, dict[str, torch.Tensor]]:
    """The policy, token ids [2B, T+1] (chosen first; a quarter of each is prompt), and what T-REG
    needs beside them.
    """
    torch.manual_seed(0)
    model = TinyLM(args.vocab, args.hidden).to(device, getattr(torch, args.dtype))
    ids = torch.randint(0, args.vocab, (2 * args.pairs, args.length + 1), device=device)
    target = ids[:, 1:].clone()
    target[:, : args.length // 4] = -100
    rewards = torch.rand(target.shape, device=device) - 0.5
    with torch.no_grad():
        ref = linear_logprobs(model(ids[:, :-1]), model.head.weight, target).logprobs.sum(-1)
        model.layers.norm.weight.mul_(1.1)  # the policy has moved away from its reference
    return model, ids, {"target": target, "token_rewards": rewards, "ref_logps": ref}


def step(
    loss_fn, model: TinyLM, ids: torch.Tensor, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Forward, loss, backward: the loss and the gradients."""
    model.zero_grad()
    loss = loss_fn(model(ids[:, :-1]), model.head.weight, **batch, beta=0.1, alpha=0.25).loss
    loss.backward()
    layers = torch.cat([p.grad.flatten() for p in model.layers.parameters()])
    return {
        "loss": loss.detach(),
        "head gradient": model.head.weight.grad.clone(),
        "layer gradients": layers,
    }


def seconds(
    loss_fn, model: TinyLM, ids: torch.Tensor, batch: dict[str, torch.Tensor], rounds: int = 3
) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        step(loss_fn, model, ids, batch)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_mib(which: str, args: argparse.Namespace, device: str) -> float:
    """Memory of one step beyond what was held before it. On a CPU a process of its own measures
    it.
    """
    if device == "cpu":
        flags = [f"--{k}={v}" for k, v in vars(args).items() if k != "memory_of"]
        out = subprocess.run(
            [sys.executable, __file__, f"--memory-of={which}", *flags],
            capture_output=True,
            text=True,
            check=True,
        )
        return float(out.stdout)
    given = make_step(args, device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(LOSSES[which], *given)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (at most) of this process."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status: expected a line that begins with {field}, got none")


def measure_resident(which: str, args: argparse.Namespace, device: str) -> float:
    small = make_step(
        argparse.Namespace(pairs=1, length=8, hidden=16, vocab=64, dtype=args.dtype), device
    )
    step(LOSSES[which], *small)  # libraries load before the measurement
    given = make_step(args, device)
    before = resident_mib("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # VmHWM starts again from VmRSS
    step(LOSSES[which], *given)
    return resident_mib("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value, text in (
        ("pairs", 2, "preference pairs"),
        ("length", 256, "tokens of a sequence"),
        ("hidden", 256, "hidden size"),
        ("vocab", 32000, "vocabulary"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--memory-of", choices=["fused", "dense"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.memory_of:
        print(measure_resident(args.memory_of, args, device))
        return

    model, ids, batch = make_step(args, device)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    exact = step(LOSSES["dense"], copy.deepcopy(model).double(), ids, wide)
    scored = int((batch["target"] != -100).sum())
    print(
        f"T-REG, one step: {args.pairs} pairs, {scored} scored tokens, hidden {args.hidden}, "
        f"vocabulary {args.vocab}, {args.dtype} on {device}, torch {torch.__version__}"
    )
    print(f"{'':28}{'fused':>12}{'dense':>12}")
    steps = {name: step(loss_fn, model, ids, batch) for name, loss_fn in LOSSES.items()}

    print_row("loss", [found["loss"].item() for found in steps.values()], ".7f")
    for name, expected in exact.items():
        errors = [relative_error(found[name], expected) for found in steps.values()]
        print_row(f"error of the {name}", errors, ".1e")
    times = [seconds(loss_fn, model, ids, batch) for loss_fn in LOSSES.values()]
    print_row("seconds", times, ".3f")
    peaks = [peak_mib(name, args, device) for name in LOSSES]
    print_row("extra memory, MiB", peaks, ".0f")
    print(
        "error: relative, against the dense step in float64. "
        "seconds: the model's forward and backward included."
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def print_row(name: str, values: list[float], form: str) -> None:
    print(f"{name:28}" + "".join(f"{value:>12{form}}" for value in values))


if __name__ == "__main__":
    main()
