"""The policy's forward and backward of a GRPO step in TRL: its own, and treg's with each prompt run
for every completion and once for all.

    python benchmarks/online_step.py [--prompts 1] [--length 256] [--answer 64] [--group 8]
        [--ragged] [--rounds 5] [--out benchmarks/results/cpu/online_step.json]

A Llama with random weights, random tokens and advantages; no generation, no reference, no
optimizer. Rows come shuffled, as TRL gives them. With --ragged prompts have half to one and a half
of that length, completions a quarter of theirs or more. The losses are compared before anything is
timed. On a CPU one thread is taken, and the times are the process' own, with which other work
hardly counts.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# this tree, whether or not one is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from end_to_end_cases import Counter, Shape, make_model, make_tokenizer, twin
from loss_head_cases import DEVICE
from loss_head_measure import Alternation, environment

SHAPE = Shape(256, 6, 4, 8000, 4096)
NAMES = {"treg shared": True, "treg apart": False, "TRL": None}


def make_batch(args: argparse.Namespace) -> dict[str, Any]:
    """What TRL computes its loss of: prompts padded on the left, completions on the right."""
    random, rows = np.random.default_rng(0), []
    for _ in range(args.prompts):
        n = args.length * random.uniform(0.5, 1.5) if args.ragged else args.length
        prompt = random.integers(6, SHAPE.vocab, int(n))
        for _ in range(args.group):
            n = args.answer * random.uniform(0.25, 1) if args.ragged else args.answer
            rows.append((prompt, random.integers(6, SHAPE.vocab, int(n))))
    random.shuffle(rows)
    batch: dict[str, Any] = {}
    for side, name in enumerate(("prompt", "completion")):
        width = max(len(row[side]) for row in rows)
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            n = len(row[side])
            span = slice(width - n, width) if name == "prompt" else slice(n)
            ids[i, span], mask[i, span] = torch.from_numpy(row[side]), 1
        batch |= {f"{name}_ids": ids.to(DEVICE), f"{name}_mask": mask.to(DEVICE)}
    batch["advantages"] = torch.from_numpy(random.normal(size=len(rows))).float().to(DEVICE)
    return batch | {"num_items_in_batch": batch["completion_mask"].sum()}


def step_of(share: bool | None, model: Any, batch: dict[str, Any], folder: str) -> Any:
    """A step, which gives its loss and the tokens that it ran. share: None of TRL's own."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from treg.integrations.trl import TRegGRPOConfig, TRegGRPOTrainer

    kind, config, more = TRegGRPOTrainer, TRegGRPOConfig, {"treg_share_prompt": share}
    if share is None:
        kind, config, more = GRPOTrainer, GRPOConfig, {}
    trainer = kind(
        twin(model),
        lambda completions, **_: [0.0] * len(completions),
        config(
            folder,
            use_cpu=DEVICE == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            per_device_train_batch_size=len(batch["advantages"]),
            num_generations=len(batch["advantages"]),
            **more,
        ),
        Dataset.from_list([{"prompt": "w6"}]),
        processing_class=make_tokenizer(SHAPE),
    )
    trainer.current_gradient_accumulation_steps = 1  # train() sets it
    policy = trainer.model.train()

    def run() -> tuple[float, int]:
        policy.zero_grad(set_to_none=True)
        with Counter(policy) as counter:
            loss = trainer.compute_loss(policy, batch)
        loss.backward()
        return loss.item(), counter.tokens

    return run


def measured(args: argparse.Namespace) -> dict[str, Any]:
    model, batch = make_model(SHAPE), make_batch(args)
    with tempfile.TemporaryDirectory() as folder:
        calls = {name: step_of(x, model, batch, folder) for name, x in NAMES.items()}
        for call in calls.values():  # the first one of shared rows compares log-probs
            call()
        losses, tokens = zip(*(call() for call in calls.values()), strict=True)
        assert max(losses) - min(losses) < 1e-4, losses
        run = Alternation(calls, clock=time.process_time)
        for _ in range(args.rounds):
            run.round()
    found = {}
    for name, count in zip(calls, tokens, strict=True):
        ratio = run.ratio(name, "treg apart")
        found[name] = {"seconds": run.median(name), "tokens": count, "/ apart": ratio}
        print(f"{name:<12} {run.median(name):7.3f} s {count:6d} tokens  {ratio['ratio']:.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("prompts", 1), ("length", 256), ("answer", 64), ("group", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    found = measured(args)
    if args.out is not None:
        given = {k: x for k, x in vars(args).items() if k != "out"}
        record = {"environment": environment(), "given": given, "shape": dataclasses.asdict(SHAPE)}
        args.out.write_text(json.dumps(record | {"steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
