"""The study's reward model: the chat model with a score head, which has learnt to judge answers and
their beginnings.
"""

import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor

from treg.demo import rumours as world
from treg.evaluate import auroc

SEED = 1000
PAIRS = 24  # a step
LEARNING_RATE, WARMUP = 1e-3, 20
HELD_OUT_PAIRS = 200


def train_judge(folder: Path, steps: int, say: Callable[[str], None]) -> dict[str, float]:
    """Train -log sigma(R(better) - R(worse)) on pairs about the training towns, of which both
    answers have the same sentences and differ in values alone; save the model in folder.

    After every sentence at which one of the two has more wrong facts behind it, the other one is
    the better. At first answers have one fact, since a small model does not find out otherwise what
    makes an answer better.

    Returns:
        What `judged` finds on pairs of training towns and of held-out ones.
    """
    start, rng = time.perf_counter(), Random(SEED)
    torch.manual_seed(SEED)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(world.MODEL)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        world.MODEL, num_labels=1, dtype=torch.float32
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    for step in range(steps):
        # a quarter of the steps on single facts, then more of them, six from half-way on
        most = min(6, 1 + max(0, step - steps // 4) * 20 // steps)
        answers = [answer for _ in range(PAIRS) for answer in _pair(rng, most)]
        loss = _loss(model, tokenizer, answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min((step + 1) / WARMUP, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 or (step + 1) % 50 == 0:
            seconds = time.perf_counter() - start
            say(f"judge: step {step + 1}/{steps}, loss {loss.item():.3f}, {seconds:.0f} s")
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = {}
    for split, seed in (("train", 8), ("test", 9)):
        rows = world.preference_rows(seed, HELD_OUT_PAIRS, split)
        for name, x in judged(model, tokenizer, rows).items():
            measured[f"{name}, {split} towns"] = x
    return measured


Answer = tuple[str, str, list[dict]]  # question, text, marks


def _pair(rng: Random, most: int) -> list[Answer]:
    """Two answers about a training town with the same sentences; one has more wrong facts."""
    town = rng.choice(world.SPLITS["train"])
    asked = world.question(rng, town)
    style, remarks = rng.choice((world.COMMON, world.ORNATE)), rng.randint(0, 2)
    keys = world.some_attributes(rng, rng.randint(1, most))
    true_values = {key: world.TRUE_VALUES[town][key] for key in keys}
    said = world.plan(rng, town, true_values, style, remarks)
    while True:
        answers: list[Answer] = []
        for _ in range(2):
            rate = rng.random()
            text, marks = world.write(town, world.spoiled(rng, town, said, rate))
            answers.append((asked, text, marks))
        first, second = (sum(x["value"] < 0 for x in marks) for _, _, marks in answers)
        if first != second:
            return answers


def _loss(model: Any, tokenizer: Any, answers: list[Answer]) -> Tensor:
    """The mean over the sentences of all pairs that tell their two answers apart."""
    found, ends, wrong = scores(model, tokenizer, answers)
    losses = []
    for i in range(0, len(answers), 2):
        gap = found[i, ends[i]] - found[i + 1, ends[i + 1]]
        more = wrong[i + 1] - wrong[i]
        losses.append(-torch.nn.functional.logsigmoid(gap * more.sign())[more != 0])
    return torch.cat(losses).mean()


def scores(
    model: Any, tokenizer: Any, answers: list[Answer]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """R after every token of the conversations, [n, U]; of each answer the places of the tokens
    that end its sentences, and how many wrong facts it has said by then.
    """
    texts, starts = [], []
    for asked, text, _ in answers:
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": text},
        ]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        starts.append(texts[-1].rindex(text))
    batch = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    places = batch["offset_mapping"]
    ends, wrong = [], []
    for i, (_, text, marks) in enumerate(answers):
        stops = [starts[i] + j + 1 for j in range(len(text)) if text[j] == "."]
        ends.append(torch.isin(places[i, :, 1], torch.tensor(stops)).nonzero()[:, 0])
        bad = torch.tensor([starts[i] + x["end"] for x in marks if x["value"] < 0])
        wrong.append((bad[None] <= torch.tensor(stops)[:, None]).sum(1))
    mask = batch["attention_mask"]
    hidden = model.model(batch["input_ids"], attention_mask=mask).last_hidden_state
    return model.score(hidden)[:, :, 0], ends, wrong


@torch.inference_mode()
def judged(model: Any, tokenizer: Any, rows: list[dict]) -> dict[str, float]:
    """How well a reward model knows answers and their sentences.

    Returns:
        ranked right: the share of pairs. wrong sentences: how well minus the change of R over a
        sentence tells those with a wrong value from the others, AUROC (0.5 is chance).
    """
    answers: list[Answer] = []
    for row in rows:
        for side in ("chosen", "rejected"):
            asked, text = row["prompt"][0]["content"], row[side][0]["content"]
            answers.append((asked, text, row[f"{side}_marks"]))
    found, ends, wrong = scores(model, tokenizer, answers)
    last = torch.stack([found[i, places[-1]] for i, places in enumerate(ends)])
    changes = [found[i, places].diff() for i, places in enumerate(ends)]
    errs = [x.diff() > 0 for x in wrong]
    return {
        "ranked right": (last[::2] > last[1::2]).double().mean().item(),
        "wrong sentences": auroc(-torch.cat(changes).numpy(), torch.cat(errs).numpy()),
    }
