"""What filter_eps leaves out: the share of active tiles, and the error of the gradients, on real
hidden states.

    python benchmarks/filter_share.py --data FOLDER [--out benchmarks/results/cpu/filter_share.json]

FOLDER holds lm/tinystories-656k, prefs/ultrafeedback_train.jsonl and the tokenizer tok/qwen2.5.

models     a DPO batch of each model: before any training (all pairs weigh 1/2) and after some
           steps (they do not).
           entries: the share of single (token, word) whose |coef| p reaches eps or that are
           targets, which is the least that any choice of tiles could take; row_blocks: of (token,
           128 words) with one such, the least that tiles of one row could. Errors are those of the
           gradient, in the 2-norm, against eps = 0.
targets    the share of tiles that hold a target of the real text under a large vocabulary. Such
           tiles are always active: below it no model and no eps can come.
synthetic  time of a step with peaked logits that no model made: it shows what a share costs, not
           which share to expect.

Both models are small, and so are their vocabularies (887 and 2048): a tile of 128 columns is a
seventh or a sixteenth of the vocabulary, and a word in the mean is as likely as 2**-10. The shares
of a model with 128000 words, in the mean as likely as 2**-17, are not known from these; the
targets' floor alone is.
"""

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from loss_head_measure import environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from treg.data import EncodeOptions, load_pairs
from treg.demo import world
from treg.demo.world import MODEL
from treg.ops import linear_logprobs
from treg.ops.call import Batch, Call
from treg.ops.head import Head
from treg.ops.head.gradients import Needs
from treg.ops.head.memory import DEFAULT_BUDGET
from treg.ops.head.selection import RowSelection
from treg.ops.head.torch_tiles import TorchTiles, block_tops
from treg.ops.plans.filtered import TILE, filtered_gradients

EPSILONS = {f"2**{k}": 2.0**k for k in (-16, -14, -12, -10)}
PAIRS, STEPS, BETA = 16, 24, 0.1
NEEDS = Needs(True, True, False)


def states(model, pair) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states and targets of both completions of a pair, chosen first."""
    found = []
    for completion in (pair.chosen_ids, pair.rejected_ids):
        ids = torch.tensor([*pair.prompt_ids.tolist(), *completion.tolist()])
        hidden = model.model(ids[None, :-1]).last_hidden_state[0]
        found.append((hidden[len(pair.prompt_ids) - 1 :], ids[len(pair.prompt_ids) :]))
    return found


def margin(model, pair) -> torch.Tensor:
    """Log-prob of the chosen completion less that of the rejected."""
    weight = model.lm_head.weight
    chosen, rejected = (
        linear_logprobs(h, weight, y).logprobs.sum() for h, y in states(model, pair)
    )
    return chosen - rejected


def trained(model, pairs, start: list[torch.Tensor]):
    """The model after STEPS of DPO on these pairs."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(STEPS):
        for i in range(step % 2, len(pairs), 2):
            (-F.logsigmoid(BETA * (margin(model, pairs[i]) - start[i])) / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def forward(hidden, weight, target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, lse and the tops of blocks of a tile's width."""
    z = hidden @ weight.T
    return z, z.logsumexp(1), block_tops(z, target.unsqueeze(1), TILE)


def filtered(tiles, hidden, target, lse, coef, tops, eps):
    """The gradients from the tiles that eps leaves, and their share."""
    call = Call(
        impl="torch",
        dtype=hidden.dtype,
        logits_dtype=tiles.logits_dtype,
        ignore_index=tiles.head.ignore_index,
        outputs=(),
        needs=NEEDS,
        budget=DEFAULT_BUDGET["cpu"],
        filter_eps=eps,
    )
    rows = RowSelection.all(len(target))
    taken = Batch(call, tiles, hidden, target, rows, hidden.dtype, hidden.dtype)
    norm = torch.stack([lse, torch.zeros_like(lse)], 1)
    return filtered_gradients(taken, coef, norm, tops)


@torch.no_grad()
def batch(model, pairs, start: list[torch.Tensor]) -> dict[str, object]:
    """Shares and errors for each eps, of the gradient of the DPO loss of these pairs."""
    weights = torch.stack(
        [torch.sigmoid(-BETA * (margin(model, p) - s)) for p, s in zip(pairs, start, strict=True)]
    )
    rows = [
        (h, y, sign * w)
        for p, w in zip(pairs, weights, strict=True)
        for (h, y), sign in zip(states(model, p), (-1.0, 1.0), strict=True)
    ]
    hidden, target = torch.cat([h for h, _, _ in rows]), torch.cat([y for _, y, _ in rows])
    coef = torch.cat([(BETA * c / len(pairs)).expand(len(y)) for _, y, c in rows]).contiguous()
    weight = model.lm_head.weight.detach()
    z, lse, tops = forward(hidden, weight, target)
    held = coef.abs().unsqueeze(1) * torch.exp(z - lse.unsqueeze(1)) / coef.abs().max()
    held.scatter_(1, target.unsqueeze(1), 1.0)

    def gradients(eps):
        return filtered(TorchTiles(Head(weight)), hidden, target, lse, coef, tops, eps)

    exact, _ = gradients(0.0)
    found = {}
    for name, eps in EPSILONS.items():
        got, share = gradients(eps)
        entries = held >= eps
        row_blocks = torch.stack([block.any(1) for block in entries.split(TILE, 1)])
        found[name] = {
            "active_share": share.item(),
            "row_blocks": row_blocks.float().mean().item(),
            "entries": entries.float().mean().item(),
        }
        for kind in ("dhidden", "dweight"):
            x, y = getattr(got, kind).double().flatten(), getattr(exact, kind).double().flatten()
            found[name][kind] = {
                "error": ((x - y).norm() / y.norm()).item(),
                "one_minus_cosine": 1 - F.cosine_similarity(x, y, 0).item(),
            }
    return {
        "rows": len(target),
        "vocabulary": len(weight),
        "hidden_size": weight.shape[1],
        "nats_a_token": -(z.gather(1, target.unsqueeze(1)).squeeze(1) - lse).mean().item(),
        "pair_weights": {
            "least": weights.min().item(),
            "median": weights.median().item(),
            "greatest": weights.max().item(),
        },
        "eps": found,
    }


def model_cases(folder: Path | str, source) -> dict[str, object]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = load_pairs(source, tokenizer, EncodeOptions(max_length=512))[0][:PAIRS]
    with torch.no_grad():
        start = [margin(model, pair) for pair in pairs]
    after = trained(model, pairs, start)
    return {
        "before training": batch(model, pairs, start),
        f"after {STEPS} steps": batch(after, pairs, start),
    }


def target_floor(folder: Path, source: Path) -> dict[str, object]:
    """The share of tiles with a target, over rows of all completions one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs, _ = load_pairs(source, tokenizer)
    ids = [
        x for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids) for x in side.tolist()
    ]
    tiles, columns = torch.tensor(ids).split(TILE), -(-len(tokenizer) // TILE)
    share = statistics.mean(len((rows // TILE).unique()) / columns for rows in tiles)
    return {"rows": len(ids), "vocabulary": len(tokenizer), "share": share}


def synthetic(N: int = 2048, D: int = 512, V: int = 32000, rounds: int = 5) -> dict[str, object]:
    """Seconds of the parts of a step, in turn; targets are drawn from the head's own
    distribution.
    """
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * 1.5 / D**0.5
    hidden[:, 0] = 1.0
    weight[:, 0] = -1.1 * torch.log1p(
        torch.arange(V)
    )  # frequent words first, as vocabularies have them
    _, lse, _ = forward(hidden, weight, torch.zeros(N, dtype=torch.int64))
    target = torch.multinomial(
        torch.exp(hidden @ weight.T - lse.unsqueeze(1)), 1, generator=g
    ).squeeze(1)
    coef = torch.randn(N, generator=g)
    _, _, tops = forward(hidden, weight, target)
    leaves, tiles = (
        (hidden.requires_grad_(), weight.requires_grad_()),
        TorchTiles(Head(weight.detach())),
    )

    def exact():
        torch.autograd.grad(linear_logprobs(*leaves, target).logprobs, leaves, coef)

    @torch.no_grad()
    def score():
        linear_logprobs(*leaves, target)

    def backward(eps):
        return lambda: filtered(tiles, hidden.detach(), target, lse, coef, tops, eps)

    shares = {name: backward(eps)()[1].item() for name, eps in EPSILONS.items()}
    calls = {
        "exact forward and backward": exact,
        "forward alone": score,
        "filtered backward, eps 0": backward(0.0),
    }
    calls |= {f"filtered backward, eps {name}": backward(eps) for name, eps in EPSILONS.items()}
    seconds = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(x) for name, x in seconds.items()}
    return {
        "rows": N,
        "vocabulary": V,
        "hidden_size": D,
        "dtype": "float32",
        "active_share": shares,
        "median_seconds": medians,
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "filter_share.json"
    )
    args = parser.parse_args()
    text = args.data / "prefs" / "ultrafeedback_train.jsonl"
    found = {
        "environment": environment(),
        "models": {
            "tinystories-656k on UltraFeedback": model_cases(
                args.data / "lm" / "tinystories-656k", str(text)
            ),
            "the demo's model on its own pairs": model_cases(
                MODEL, world.preference_rows(0, 8 * PAIRS, "train")
            ),
        },
        "targets": {
            "qwen2.5 on UltraFeedback": target_floor(args.data / "tok" / "qwen2.5", str(text))
        },
        "synthetic": synthetic(),
    }
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
