"""A DPO training step in TRL: its own, with its chunked log-probs swapped for treg's, and with
T-REG.

The record, in turns, and a look at it:

    python benchmarks/bench_trl.py [--rounds 15] [--out benchmarks/results/cpu/trl.json]
    pytest benchmarks/bench_trl.py --benchmark-only

A Llama of two layers, D 256, V 32000, float32; 4 pairs, prompts of 64 tokens, completions of 32 to
224; the reference runs in every step. On a CPU TRL's own head runs all positions, which the swapped
function cannot know; TRegDPOTrainer runs the scored ones.
"""

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from loss_head_measure import Alternation, environment
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOTrainer

from treg.integrations.trl import TRegDPOConfig, TRegDPOTrainer, patch_chunked_logprobs

VOCAB, HIDDEN, PAIRS, PROMPT, COMPLETION = 32000, 256, 4, 64, (32, 224)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def pairs() -> Dataset:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(PAIRS):
        row = {"prompt_ids": random.integers(2, VOCAB, PROMPT).tolist()}
        for side in ("chosen", "rejected"):
            n = random.integers(*COMPLETION)
            row[f"{side}_ids"] = random.integers(2, VOCAB, n).tolist()
            row[f"{side}_token_rewards"] = (random.random(n) - 0.5).tolist()
        rows.append(row)
    return Dataset.from_list(rows)


class Own(TRegDPOTrainer):
    """TRL's loss, head and reference on the same token ids."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return DPOTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def step_of(kind: type, alpha: float, folder: str, model: LlamaForCausalLM) -> Callable[[], float]:
    """One training step without the optimizer; its loss."""
    config = TRegDPOConfig(
        folder,
        treg_alpha=alpha,
        use_cpu=DEVICE == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=PAIRS,
        dataloader_pin_memory=False,
    )
    trainer = kind(
        copy.deepcopy(model),
        copy.deepcopy(model),
        config,
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1  # train() sets it
    [batch] = trainer.get_train_dataloader()
    policy = trainer.accelerator.prepare_model(trainer.model).train()

    def run() -> float:
        policy.zero_grad(set_to_none=True)
        return trainer.training_step(policy, dict(batch)).item()

    return run


def swapped(run: Callable[[], float]) -> Callable[[], float]:
    def with_treg() -> float:
        undo = patch_chunked_logprobs()
        try:
            return run()
        finally:
            undo()

    return with_treg


def alternation(folder: str) -> Alternation:
    """The steps, warm, with equal losses where they must be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    calls = {
        "TRL": step_of(Own, 0.0, folder, model),
        "TRL, function swapped": swapped(step_of(Own, 0.0, folder, model)),
        "TRegDPOTrainer, alpha 0": step_of(TRegDPOTrainer, 0.0, folder, model),
        "TRegDPOTrainer, alpha 0.25": step_of(TRegDPOTrainer, 0.25, folder, model),
    }
    losses = {name: call() for name, call in calls.items()}
    for name in list(calls)[:3]:
        assert abs(losses[name] - losses["TRL"]) < 1e-5, losses
    return Alternation(calls)


def times(run: Alternation) -> dict[str, object]:
    return {
        "rounds": len(run.seconds["TRL"]),
        "median_seconds": {name: run.median(name) for name in run.calls},
        "ratios": {f"{name} / TRL": run.ratio(name, "TRL") for name in run.calls if name != "TRL"},
    }


def test_step(benchmark, tmp_path):
    run = alternation(str(tmp_path))
    benchmark.pedantic(run.round, rounds=3)
    benchmark.extra_info.update(environment(), **times(run))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "trl.json"
    )
    args = parser.parse_args()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        run = alternation(folder)
        for _ in range(args.rounds):
            run.round()
    load.append(os.getloadavg()[0])
    found = {"environment": environment(), "time": times(run), "load_average": load}
    for name, seconds in found["time"]["median_seconds"].items():
        ratio = found["time"]["ratios"].get(f"{name} / TRL")
        rest = (
            ""
            if ratio is None
            else "{ratio:6.2f}   (a round: {least:.2f} to {greatest:.2f})".format(**ratio)
        )
        print(f"{name:<30} {seconds:7.3f} s {rest}")
    print(f"load average before and after: {load[0]:.1f}, {load[1]:.1f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
