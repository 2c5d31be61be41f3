"""A DPO training step in TRL: its own, with its chunked log-probs swapped for treg's, and with
T-REG.

The record, in turns, and a look at it:

    python benchmarks/bench_trl.py [--rounds 15] [--out benchmarks/results/cpu/trl.json]
    pytest benchmarks/bench_trl.py --benchmark-only

A Llama of two layers, D 256, V 32000, float32; 4 pairs, prompts of 64 tokens, completions of 32 to
224; the reference runs in every step. On a CPU TRL's own head runs all positions, which the swapped
function cannot know; TRegDPOTrainer runs the scored ones. The look takes fewer pairs and words, as
there is time for, and one round. TRL is imported when it runs: that takes many seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cpu_look
import numpy as np
import pytest
import torch
from loss_head_measure import Alternation, environment

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, HIDDEN, PAIRS, PROMPT, COMPLETION = 32000, 256, 4, 64, (32, 224)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def dataset(pairs: int, vocab: int) -> Dataset:
    from datasets import Dataset

    random = np.random.default_rng(0)
    rows = []
    for _ in range(pairs):
        row = {"prompt_ids": random.integers(2, vocab, PROMPT).tolist()}
        for side in ("chosen", "rejected"):
            n = random.integers(*COMPLETION)
            row[f"{side}_ids"] = random.integers(2, vocab, n).tolist()
            row[f"{side}_token_rewards"] = (random.random(n) - 0.5).tolist()
        rows.append(row)
    return Dataset.from_list(rows)


def own_trainer() -> type:
    """TRL's loss, head and reference on the same token ids."""
    from trl import DPOTrainer

    from treg.integrations.trl import TRegDPOTrainer

    class Own(TRegDPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return DPOTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return Own


def step_of(
    kind: type, alpha: float, folder: str, model: LlamaForCausalLM, pairs: int
) -> Callable[[], float]:
    """One training step without the optimizer; its loss."""
    from treg.integrations.trl import TRegDPOConfig

    config = TRegDPOConfig(
        folder,
        treg_alpha=alpha,
        use_cpu=DEVICE == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=pairs,
        dataloader_pin_memory=False,
    )
    trainer = kind(
        copy.deepcopy(model),
        copy.deepcopy(model),
        config,
        train_dataset=dataset(pairs, model.config.vocab_size),
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
    from treg.integrations.trl import patch_chunked_logprobs

    def with_treg() -> float:
        undo = patch_chunked_logprobs()
        try:
            return run()
        finally:
            undo()

    return with_treg


def alternation(folder: str, pairs: int = PAIRS, vocab: int = VOCAB) -> Alternation:
    """The steps, warm, with equal losses where they must be."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from treg.integrations.trl import TRegDPOTrainer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    own = own_trainer()
    calls = {
        "TRL": step_of(own, 0.0, folder, model, pairs),
        "TRL, function swapped": swapped(step_of(own, 0.0, folder, model, pairs)),
        "TRegDPOTrainer, alpha 0": step_of(TRegDPOTrainer, 0.0, folder, model, pairs),
        "TRegDPOTrainer, alpha 0.25": step_of(TRegDPOTrainer, 0.25, folder, model, pairs),
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


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_step(benchmark, tmp_path, capsys):
    pytest.importorskip("trl", exc_type=ImportError)
    size, rounds = (PAIRS, VOCAB), 3
    if DEVICE == "cpu":
        session = cpu_look.session()
        size, rounds = cpu_look.size_or_skip(session, "trl"), 1
        with capsys.disabled():
            print(f"\nTRL training step: {size[0]} pairs, V {size[1]}", flush=True)
    run = alternation(str(tmp_path), *size)
    benchmark.pedantic(run.round, rounds=rounds)
    benchmark.extra_info.update(environment(), **times(run))
    if DEVICE == "cpu":
        note = f"{size[0]} pairs D {HIDDEN} V {size[1]}"
        for name in list(run.calls)[1:]:
            session.add(f"{name}: training step", name, run.seconds, note)


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
