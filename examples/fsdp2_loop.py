"""The fused loss in a loop of your own, data-parallel with FSDP2: a few steps on a small chat model
and invented towns.

    torchrun --nproc_per_node 2 examples/fsdp2_loop.py

It runs on a CPU or on GPUs, in 1, 2, 4 or 8 processes.

What treg needs is between the two lines of dashes: the head is read once, before sharding, and the
loss runs inside the model's forward, so that FSDP2's hooks gather its weight and reduce its
gradient. Needs the extra `train`.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import treg.demo
from treg.data import EncodeOptions, PairCollator, load_pairs
from treg.demo.world import preference_rows
from treg.heads import install_head, run_head
from treg.ops import fused_treg_loss, linear_logprobs

MODEL = Path(treg.demo.__file__).parent / "model"
STEPS = 5
PAIRS = 8  # of a step, in all processes together
BETA = 0.1
ALPHA = 0.0  # alpha > 0 takes token rewards: see `treg annotate`


def load_model(device):
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)


def shard(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(rank: int, size: int, device: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pairs, _ = load_pairs(preference_rows(0, STEPS * PAIRS, "train"), tokenizer, EncodeOptions(256))
    mesh = init_device_mesh(device, (size,))
    policy, reference = load_model(device), load_model(device)
    # ----------------------------------------------------------------------------
    for model in (policy, reference):
        install_head(model)
        shard(model, mesh)

    def rows(hidden, batch):
        return hidden.flatten(0, 1)[batch["scored"]]

    def reference_logps(batch, inputs):
        def head(hidden, operands):
            return linear_logprobs(rows(hidden, batch), target=batch["target"], **operands).logprobs

        with torch.no_grad():
            return run_head(reference, head, **inputs)

    def loss_of(batch, inputs, ref):
        cu_seqlens = torch.tensor([0, *batch["lengths"].cumsum()], dtype=torch.int32)

        def head(hidden, operands):
            return fused_treg_loss(
                rows(hidden, batch),
                target=batch["target"],
                token_rewards=None,
                ref_logps=ref,
                cu_seqlens=cu_seqlens,
                beta=BETA,
                alpha=ALPHA,
                **operands,
            )

        return run_head(policy, head, **inputs)

    # ----------------------------------------------------------------------------

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    collate = PairCollator(tokenizer.pad_token_id)
    for step in range(STEPS):
        mine = pairs[step * PAIRS : (step + 1) * PAIRS][rank::size]
        batch = collate([pair.example for pair in mine])
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                batch[name] = value.to(device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out = loss_of(batch, inputs, reference_logps(batch, inputs))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = out.loss.detach().clone()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}: loss {loss / size:.6f}")


if __name__ == "__main__":
    device = "cpu"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    dist.init_process_group()
    train(dist.get_rank(), dist.get_world_size(), device)
    dist.destroy_process_group()
