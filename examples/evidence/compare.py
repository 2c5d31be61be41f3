"""How far trained models are from one another: held-out pairs, log-probs and weights.

    python compare.py --start MODEL --runs dpo=FOLDER paper=FOLDER --data held-out.jsonl \\
        --output training.json

The first run is the one that the others are compared with. A margin of a pair is
(log pi(chosen) - log pi_start(chosen)) - (the same of rejected), times beta.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from treg.data import EncodeOptions, load_pairs
from treg.rewards.scorer import Scorer

Logps = list[tuple[Tensor, Tensor]]  # of each pair: chosen [T], rejected [T]


@torch.inference_mode()
def logps_of(model: Any, tokenizer: Any, pairs: list[Any]) -> Logps:
    """The log-prob of each token of the answers."""
    scorer = Scorer(model, tokenizer, tokens_per_batch=2048, share_prefix=True)
    rows = [
        (pair.prompt_ids.tolist(), ids.tolist())
        for pair in pairs
        for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    found = scorer.score(rows)
    return list(zip(found[::2], found[1::2], strict=True))


def margins(logps: Logps, start: Logps, beta: float) -> Tensor:
    """[pairs], float64."""
    return torch.tensor(
        [
            beta * float((c - c0).double().sum() - (r - r0).double().sum())
            for (c, r), (c0, r0) in zip(logps, start, strict=True)
        ],
        dtype=torch.float64,
    )


def flat(logps: Logps) -> Tensor:
    return torch.cat([x.double() for pair in logps for x in pair])


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, float]:
    """Of two models' weights: the norm of the difference, and the largest one."""
    differences = [(a[name] - b[name]).double() for name in a]
    norm = sum(float(x.square().sum()) for x in differences) ** 0.5
    return norm, max(float(x.abs().max()) for x in differences)


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def gradient_ratios(folder: str) -> list[float]:
    """What training logged at each step; empty where there was nothing to log."""
    file = Path(folder) / "trainer_state.json"
    if not file.exists():
        return []
    logged = json.loads(file.read_text())["log_history"]
    return [x["treg/gradient_ratio"] for x in logged if "treg/gradient_ratio" in x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", required=True, help="the model before training")
    parser.add_argument("--runs", nargs="+", required=True, help="NAME=FOLDER")
    parser.add_argument("--data", required=True, help="held-out pairs")
    parser.add_argument("--max_length", type=int, default=384)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.start)
    pairs, _ = load_pairs(args.data, tokenizer, EncodeOptions(max_length=args.max_length))
    pairs = list(pairs)
    model = load(args.start)
    start, before = logps_of(model, tokenizer, pairs), model.state_dict()
    found: dict[str, Any] = {"held-out pairs": len(pairs), "beta": args.beta, "runs": {}}
    first: tuple[Logps, dict[str, Tensor], Tensor] | None = None
    for run in args.runs:
        name, _, folder = run.partition("=")
        model = load(folder)
        logps, weights = logps_of(model, tokenizer, pairs), model.state_dict()
        margin = margins(logps, start, args.beta)
        first = first or (logps, weights, margin)
        difference = (flat(logps) - flat(first[0])).abs()
        moved = (flat(logps) - flat(start)).abs()
        found["runs"][name] = {
            "accuracy": float((margin > 0).double().mean()),
            "margin": float(margin.mean()),
            "gradient ratios": gradient_ratios(folder),
            "log-probs moved, mean": float(moved.mean()),
            "weights moved, norm": distance(weights, before)[0],
            "from the first run": {
                "pairs ranked otherwise": int(((margin > 0) != (first[2] > 0)).sum()),
                "log-probs, mean": float(difference.mean()),
                "log-probs, largest": float(difference.max()),
                "weights, norm": distance(weights, first[1])[0],
                "weights, largest": distance(weights, first[1])[1],
            },
        }
        print(name, json.dumps(found["runs"][name]), flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
