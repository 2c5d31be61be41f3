"""How far a model's log-probs of the probe move when its weights do.

    python benchmarks/probe_distances.py --model FOLDER --data prefs.jsonl [--steps 40]

The probe is the text by which a served model is known again (`treg.data.served.SAME_MODEL`). It is
read by the model in float32, and by the same one in bfloat16, with its linear layers rounded to few
bits, and after steps of AdamW on chosen answers. A line each: the mean absolute difference, in
nats, of the probe's tokens and of those of four chosen answers.
"""

import argparse
import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treg.data import EncodeOptions, load_pairs
from treg.rewards.scorer import Scorer
from treg.rewards.server.probe import probe_ids

GROUP = 64  # weights of a row that are rounded together
LEARNING_RATE = 1e-5


def rounded(model: Any, bits: int) -> Any:
    """The linear layers with 2^bits equal steps from the least to the largest weight of a group."""
    for name, weight in model.named_parameters():
        if weight.dim() != 2 or "embed" in name or weight.shape[1] % GROUP:
            continue
        groups = weight.data.reshape(-1, GROUP)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = (high - low).clamp(min=1e-9) / (2**bits - 1)
        weight.data = (((groups - low) / step).round() * step + low).reshape(weight.shape)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    pairs, _ = load_pairs(given.data, tokenizer, EncodeOptions(384), limit=2 * given.steps + 8)
    ids = probe_ids(tokenizer)
    rows = [(x.prompt_ids.tolist(), x.chosen_ids.tolist()) for x in pairs]
    asked = [(ids[:1], ids[1:]), *rows[:4]]

    def logprobs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scorer = Scorer(model, tokenizer, tokens_per_batch=2048, share_prefix=False)
        with torch.inference_mode():
            probe, *answers = scorer.score(asked)
        return probe, torch.cat(answers)

    before = logprobs(base)

    def say(what: str, model: Any) -> None:
        probe, answers = (
            (a - b).abs().mean().item() for a, b in zip(logprobs(model), before, strict=True)
        )
        print(f"{what:28} probe {probe:.3f}   answers {answers:.3f}", flush=True)

    say("bfloat16", copy.deepcopy(base).bfloat16())
    for bits in (8, 5, 4):
        say(f"{bits} bits", rounded(copy.deepcopy(base), bits))
    optimizer = torch.optim.AdamW(base.parameters(), lr=LEARNING_RATE)
    for step, (context, completion) in enumerate(rows[4 : 4 + given.steps], 1):
        base.train()
        sequence = torch.tensor([context + completion])
        base(sequence, labels=sequence).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 5, 10, 20, given.steps):
            say(f"{step} steps at {LEARNING_RATE:g}", base)


if __name__ == "__main__":
    main()
