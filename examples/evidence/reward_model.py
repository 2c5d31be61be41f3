"""Train a small reward model on UltraFeedback's pairs, and say what it can tell apart.

    python reward_model.py --model MODEL --train train.jsonl --eval eval.jsonl --output FOLDER

The loss is -log sigmoid(R(chosen) - R(rejected)), once at the end of both answers and once at a
beginning of both, the same share of each, since RED reads the model at beginnings. One forward
gives both numbers. The embeddings and the lower layers stay as they are: they need no backward.
"""

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from pairs import SIDES, conversation_ids, fitting_rows
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HEAD_FASTER = 10  # it begins at 0, and the layers below learn nothing until it has grown
BEGINNINGS = (0.25, 0.5, 0.75)  # shares of an answer at which held-out pairs are read


def load(folder: str, trained_layers: int) -> Any:
    """The model with a head of one number; only its last layers, final norm and head have
    gradients.
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.zeros_(model.score.weight)  # else pairs begin with differences by chance
    model.requires_grad_(False)
    for part in (*model.model.layers[-trained_layers:], model.model.norm, model.score):
        part.requires_grad_(True)
    return model


def scores_of_pair(
    model: Any, tokenizer: Any, row: dict[str, Any], shares: tuple[float, ...]
) -> Tensor:
    """R after the given shares of both answers' tokens, 1 being the end of the conversation.

    Returns:
        [2, len(shares)], the chosen answer first.
    """
    read = [conversation_ids(tokenizer, row, side) for side in SIDES]
    longest = max(len(ids) for ids, _ in read)
    ids = torch.zeros(2, longest, dtype=torch.long)  # what is padded is to the right: causal
    places = torch.zeros(2, len(shares), dtype=torch.long)
    for i, (tokens, before) in enumerate(read):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        last = len(tokens) - 1
        places[i] = torch.tensor([before + int(x * (last - before)) for x in shares])
    hidden = model.model(input_ids=ids).last_hidden_state
    return model.score(hidden).squeeze(-1).gather(1, places)


def train(model: Any, tokenizer: Any, rows: list[dict[str, Any]], args: Any) -> list[float]:
    """One pass over the pairs.

    Returns:
        The loss of each step.
    """
    rng, start, losses = Random(args.seed), time.perf_counter(), []
    rng.shuffle(rows)
    below = [x for x in model.model.parameters() if x.requires_grad]
    groups = [
        {"params": below, "highest": args.learning_rate},
        {"params": [*model.score.parameters()], "highest": HEAD_FASTER * args.learning_rate},
    ]
    parameters = [x for group in groups for x in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = len(rows) // args.batch
    for step in range(steps):
        total = 0.0
        for row in rows[step * args.batch : (step + 1) * args.batch]:
            found = scores_of_pair(model, tokenizer, row, (1.0, rng.uniform(0.1, 0.9)))
            loss = -logsigmoid(found[0] - found[1]).mean() / args.batch
            loss.backward()
            total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = min(1.0, (step + 1) / 5) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * rate
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{steps}, loss {total:.3f}, {seconds:.0f} s", flush=True)
    return losses


@torch.inference_mode()
def judged(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of pairs whose chosen answer has the higher R, at the end and at beginnings of both;
    beside them, how often the longer answer is the chosen one.
    """
    shares = (*BEGINNINGS, 1.0)
    right = torch.zeros(len(shares))
    longer = 0.0
    for row in rows:
        found = scores_of_pair(model, tokenizer, row, shares)
        right += (found[0] > found[1]).float()
        chosen, rejected = (len(conversation_ids(tokenizer, row, side)[0]) for side in SIDES)
        longer += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
    accuracies = {
        f"after {x:.0%}": y.item() / len(rows) for x, y in zip(shares, right, strict=True)
    }
    return accuracies | {"longer answer": longer / len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a Llama-like model")
    parser.add_argument("--train", required=True, help="UltraFeedback's pairs as JSONL")
    parser.add_argument("--eval", required=True, help="held-out pairs, likewise")
    parser.add_argument("--output", type=Path, required=True, help="folder of the reward model")
    parser.add_argument("--most_tokens", type=int, default=384, help="longer pairs are left out")
    parser.add_argument("--eval_tokens", type=int, default=384, help="the same of held-out pairs")
    parser.add_argument("--layers", type=int, default=6, help="how many of the last are trained")
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load(args.model, args.layers)
    rows = fitting_rows(args.train, tokenizer, args.most_tokens)
    held_out = fitting_rows(args.eval, tokenizer, args.eval_tokens)
    print(f"{len(rows)} pairs, {len(held_out)} held out", flush=True)
    losses = train(model.train(), tokenizer, rows, args)
    model.eval()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    record = {
        "pairs": len(rows),
        "held-out pairs": len(held_out),
        "loss of the last ten steps": sum(losses[-10:]) / len(losses[-10:]),
        "held-out pair accuracy": judged(model, tokenizer, held_out),
        "seconds": round(time.perf_counter() - start),
        "settings": {x: getattr(args, x) for x in ("layers", "batch", "learning_rate", "seed")},
    }
    (args.output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
