"""What the first call costs in a process that has imported torch and nothing else."""

import functools
import json
import subprocess
import sys

from surroundings import environment

MAX_SECONDS = 0.3
MAX_BYTES = 20 << 20
# What torch.compile and GPUs need, and an eager call on a CPU does not.
HEAVY = {"torch._dynamo", "torch._inductor", "torch.distributed", "sympy", "triton"}

FIRST_CALL = """
import gc, json, resource, sys, time
import torch

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.manual_seed(0)
hidden = torch.randn(8, 16, requires_grad=True)
weight = torch.randn(32, 16, requires_grad=True)
target = torch.arange(8)
cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
rewards = torch.linspace(-1.0, 1.0, 8)
modules, before, began = set(sys.modules), resident(), time.process_time()
from treg.ops import fused_treg_loss

out = fused_treg_loss(
    hidden, weight, target, rewards, cu_seqlens=cu_seqlens, beta=0.1, alpha=0.5,
    ref_logps=torch.zeros(2),
)
out.loss.backward()
seconds = time.process_time() - began
print(json.dumps({
    "seconds": seconds,
    "bytes": resident() - before,
    "modules": sorted(set(sys.modules) - modules),
    "loss": out.loss.item(),
    "gradient": weight.grad.abs().sum().item(),
}))
"""


@functools.cache
def first_calls() -> list[dict]:
    """Of three processes. Their time is that of the CPU, whatever else the machine does."""
    env = {key: value for key, value in environment().items() if key != "TRITON_INTERPRET"}
    found = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def test_the_first_call_imports_neither_compiler_nor_triton():
    for call in first_calls():
        assert call["loss"] > 0 and call["gradient"] > 0
        assert "treg.ops" in call["modules"]
        assert HEAVY & set(call["modules"]) == set()


def test_the_first_call_is_quick():
    assert min(call["seconds"] for call in first_calls()) <= MAX_SECONDS


def test_the_first_call_is_small():
    assert min(call["bytes"] for call in first_calls()) <= MAX_BYTES
