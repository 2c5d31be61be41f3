"""Gradients of a tiny model under DDP and FSDP2, for test_sharded.py.

torchrun --nproc_per_node 2 tests/support/sharded_worker.py DIR

writes DIR/<layout>.pt: loss, log-probs of pair 0, gradients.
"""

import faulthandler
import functools
import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from treg.heads import check_sequences, install_head, run_head
from treg.heads.logprobs import token_logprobs
from treg.losses import LossOptions, treg_loss
from treg.losses.regularizer import token_regularizer
from treg.ops import fused_treg_loss, linear_logprobs

B, T, V = 2, 7, 48
BFLOAT16_OUT = MixedPrecisionPolicy(
    output_dtype=torch.bfloat16
)  # as accelerate sets it beside bfloat16 parameters


def make_model(tied: bool = False, lora: bool = False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=2,
            target_modules=["q_proj", "lm_head"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )


def make_batch() -> dict[str, torch.Tensor]:
    """B pairs that begin alike, chosen first: [2B, T]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (2 * B, T), generator=generator)
    ids[B:, :3] = ids[:B, :3]
    labels = ids.masked_fill(torch.arange(T) < torch.tensor([[2], [3], [2], [3]]), -100)
    rewards = torch.rand(2 * B, T - 1, generator=generator) - 0.5
    return {
        "ids": ids,
        "labels": labels,
        "rewards": rewards,
        "ref": -10 * torch.rand(2 * B, generator=generator),
    }


def bare_head() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [2B, T-1, D] and a weight [V, D]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2 * B, T - 1, 16, generator=generator), torch.randn(
        V, 16, generator=generator
    ).requires_grad_()


def pairs_of(batch: dict, rank: int, size: int) -> dict:
    """Every size-th pair."""
    rows = [*range(rank, B, size), *range(B + rank, 2 * B, size)]
    return {k: x[rows] for k, x in batch.items()}


def fused(model, batch):
    """Three products, the gradients taken in the forward."""
    target = batch["labels"][:, 1:]

    def head_fn(hidden, operands):
        return fused_treg_loss(
            hidden[:, :-1],
            target=target,
            token_rewards=batch["rewards"],
            ref_logps=batch["ref"],
            **operands,
        )

    found = run_head(model, head_fn, input_ids=batch["ids"])
    return found.loss, found.token_logps


def composed(model, batch, **options):
    """Log-probs first, the loss outside of the model."""
    logps = token_logprobs(model, batch["labels"], input_ids=batch["ids"], **options).logprobs
    mask = batch["labels"][:, 1:] != -100
    return treg_loss(
        logps, batch["rewards"], batch["ref"], LossOptions(), mask=mask
    ).loss.mean(), logps


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(tail: str, **more):
    """FSDP2 as users write it: layers, then the tail with the head (None: left to the root;
    "grouped", "own").
    """

    def wrap(model):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        if tail == "grouped":
            fully_shard([base.model.norm, base.lm_head], mesh=mesh, reshard_after_forward=False)
        elif tail == "own":
            fully_shard(base.lm_head, mesh=mesh, **more)
        return fully_shard(model, mesh=mesh, **more)

    return wrap


def by_accelerate(efficient: bool = False):
    """What accelerate does with a model under FSDP2; its launcher does so on GPUs only."""

    def wrap(model):
        from accelerate.utils import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=efficient,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            torch_device_mesh=mesh,
            device=torch.device("cpu"),
            mixed_precision="no",
            is_main_process=dist.get_rank() == 0,
            parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
        )
        return fsdp2_prepare_model(accelerator, model)

    return wrap


def sequence_parallel(hidden, weight, batch, group=None):
    """The README's recipe on this rank's part of every sequence; gradients of both, the weight's
    summed.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    part = slice(rank * (T - 1) // size, (rank + 1) * (T - 1) // size)
    hidden = hidden[:, part].clone().requires_grad_()
    logps = linear_logprobs(hidden, weight, batch["labels"][:, 1:][:, part]).logprobs
    mine, total = logps.sum(1), logps.sum(1).detach()
    dist.all_reduce(total, group=group)
    chosen, rejected = (0.1 * (mine + (total - mine.detach()) - batch["ref"])).chunk(2)
    loss = -F.logsigmoid(chosen - rejected).mean()
    loss = loss + token_regularizer(loss, logps, batch["rewards"][:, part], 0.25)
    loss.backward()
    dist.all_reduce(weight.grad, group=group)
    parts = [torch.empty_like(hidden) for _ in range(size)]  # of one size: T - 1 is even
    dist.all_gather(parts, hidden.grad)
    return {"dhidden": torch.cat(parts, 1), "dweight": weight.grad}


LAYOUTS = {
    "ddp": (ddp, {}),
    "root": (fsdp("root"), {}),
    "root-tied": (fsdp("root"), {"tied": True}),
    "grouped": (fsdp("grouped"), {}),
    "own": (fsdp("own"), {}),
    "own-resharded": (fsdp("own", reshard_after_forward=True), {}),
    "own-bfloat16-out": (fsdp("own", mp_policy=BFLOAT16_OUT), {}),
    "root-bfloat16-out": (fsdp("root", mp_policy=BFLOAT16_OUT), {}),
    "root-lora": (fsdp("root"), {"lora": True}),
    "own-lora": (fsdp("own"), {"lora": True}),
    "accelerate": (by_accelerate(), {}),
    "accelerate-tied": (by_accelerate(), {"tied": True}),
    "accelerate-lora": (by_accelerate(), {"lora": True}),
    "accelerate-efficient": (by_accelerate(efficient=True), {}),
    "own-late": (fsdp("own"), {}),
    "accelerate-late": (by_accelerate(), {}),
}
WAYS = {
    "fused": fused,
    "composed": composed,
    "shared": functools.partial(composed, share_prompt=True),
}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(layout: str, way: str, folder: Path) -> None:
    """One backward; in a function of its own, so that nothing of it outlives the process group."""
    wrap, options = LAYOUTS[layout]
    model = make_model(**options)
    if layout.endswith("late"):  # the head is installed on a model that is sharded already
        wrapped = wrap(model)
        check_sequences(install_head(model))
    else:
        check_sequences(install_head(model))
        wrapped = wrap(model)
    batch = pairs_of(make_batch(), dist.get_rank(), dist.get_world_size())
    loss, logps = WAYS[way](wrapped, batch)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    grads = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    if dist.get_rank() == 0:
        found = {"loss": total / dist.get_world_size(), "logps": logps.detach(), "grads": grads}
        torch.save(found, folder / f"{layout}-{way}.pt")


def save_sequence_parallel(folder: Path) -> None:
    """In a function of its own, as `train`."""
    found = sequence_parallel(*bare_head(), make_batch())
    if dist.get_rank() == 0:
        torch.save(found, folder / "sequence_parallel.pt")


def main(folder: str) -> None:
    faulthandler.dump_traceback_later(280, exit=True)
    dist.init_process_group("gloo")
    for layout in LAYOUTS:
        for way in WAYS:
            train(layout, way, Path(folder))
            gc.collect()
    save_sequence_parallel(Path(folder))
    gc.collect()
    dist.barrier()  # until both are done, neither takes the group down
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
