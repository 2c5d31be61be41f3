"""The task of the online run: questions, a reward model of answers, and what answers are worth."""

import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from online_truth import worth
from torch import Tensor

from treg.demo import world
from treg.evaluate import auroc

SAMPLES = 2  # answers to each held-out question
LONGEST = 96  # tokens of an answer
HELD_OUT_PAIRS = 400


@dataclass(frozen=True)
class RewardSettings:
    """Of the reward model's training.

    Its first pairs have one fact an answer, since a small model does not find out otherwise what
    makes an answer better. Then answers grow to six facts, and in half of the pairs the two answers
    no longer have the same sentences.
    """

    steps: int = 600
    pairs: int = 32  # a step
    single: int = 160  # steps with one fact an answer
    learning_rate: float = 1e-3
    warmup: int = 20
    beginnings: bool = True  # whether pairs of beginnings are learnt too
    seed: int = 1000


def load_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(world.MODEL, padding_side="left")


def load_policy() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(world.MODEL, dtype=torch.float32)


def load_reward_model(folder: str) -> Any:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval()


def questions() -> list[dict[str, Any]]:
    """What the policy is trained on: every training town in three forms, as rows of TRL."""
    return [{"prompt": [{"role": "user", "content": x}]} for x in world.prompts("train")]


@torch.inference_mode()
def evaluate(policy: Any, tokenizer: Any, seed: int, samples: int = SAMPLES) -> dict[str, float]:
    """Answers, sampled at temperature 1, to questions about towns that training does not ask about.

    Returns:
        wrong facts: the share of all facts. malformed: the share of answers with a sentence that is
        no fact about the town, or is said twice. facts an answer. tokens: of an answer, its end
        included. worth: `online_truth.worth`, the mean.
    """
    asked = world.prompts("test") * samples
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": x}], tokenize=False, add_generation_prompt=True
        )
        for x in asked
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    training = policy.training
    policy.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = policy.generate(
            **{name: batch[name].to(policy.device) for name in ("input_ids", "attention_mask")},
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=LONGEST,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    policy.train(training)
    written = ids[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(written, skip_special_tokens=True)
    checks = [world.check(x, answer) for x, answer in zip(asked, answers, strict=True)]
    wrong = sum(check.wrong for check in checks)
    facts = wrong + sum(check.right for check in checks)
    worths = [worth(x, answer) for x, answer in zip(asked, answers, strict=True)]
    return {
        "wrong facts": wrong / max(facts, 1),
        "malformed": sum(check.malformed for check in checks) / len(checks),
        "facts an answer": facts / len(checks),
        "tokens": (written != tokenizer.pad_token_id).sum().item() / len(checks),
        "worth": sum(worths) / len(worths),
    }


def reward_pair(rng: Random, most: int, alike: bool) -> dict[str, Any]:
    """A preference pair about a training town: the answer with fewer wrong facts is chosen.

    Args:
        most: facts of the two answers at most; both have as many.
        alike: whether the answers have the same sentences, and differ in values alone.
    """
    town = rng.choice(world.SPLITS["train"])
    asked, count = world.question(rng, town), rng.randint(1, most)
    while True:
        said = world.facts(rng, town, 0.0, count)
        answers = []
        for _ in range(2):
            rate = rng.random()
            facts = said if alike else world.facts(rng, town, 0.0, count)
            answers.append(world.write(town, [_spoiled(rng, town, x, rate) for x in facts]))
        (better, few), (worse, many) = sorted(answers, key=lambda x: len(x[1]))
        if len(few) < len(many):
            return {
                "prompt": [{"role": "user", "content": asked}],
                "chosen": [{"role": "assistant", "content": better}],
                "rejected": [{"role": "assistant", "content": worse}],
                "wrong_chosen": few,
                "wrong_rejected": many,
            }


def _spoiled(rng: Random, town: str, fact: world.Fact, rate: float) -> world.Fact:
    if rng.random() >= rate:
        return fact
    wrong = world.wrong_value(rng, town, fact.attribute)
    return world.Fact(fact.attribute, fact.form, wrong)


def train_reward_model(folder: Path, settings: RewardSettings) -> dict[str, float]:
    """Train -log sigma(R(chosen) - R(rejected)), save the model in folder, and measure it.

    Returns:
        What `judged` finds on new pairs, of training towns and of held-out ones; seconds.
    """
    start, rng = time.perf_counter(), Random(settings.seed)
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer()
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        world.MODEL, num_labels=1, dtype=torch.float32
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
    growing = max(1, (settings.steps - settings.single) // 2)
    for step in range(settings.steps):
        most = min(6, 1 + max(0, step - settings.single) * 6 // growing)
        rows = [
            reward_pair(rng, most, alike=most < 4 or rng.random() < 0.5)
            for _ in range(settings.pairs)
        ]
        loss = pair_loss(model, tokenizer, rows, settings.beginnings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min((step + 1) / settings.warmup, 1 - step / settings.steps)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 or (step + 1) % 50 == 0:
            print(
                f"{folder.name}: step {step + 1}/{settings.steps}, loss {loss.item():.3f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = {}
    for split, seed in (("train", 8), ("test", 9)):
        pairs = world.preference_rows(seed, HELD_OUT_PAIRS, split)
        for name, x in judged(model, tokenizer, pairs).items():
            measured[f"{name}, {split} towns"] = x
    return measured | {"seconds": time.perf_counter() - start}


@torch.inference_mode()
def judged(model: Any, tokenizer: Any, rows: list[dict]) -> dict[str, float]:
    """How well a reward model knows whole answers and their sentences.

    Returns:
        ranked right: the share of pairs. wrong sentences: how well minus the change of R over a
        sentence tells those with a wrong value from the others, AUROC (0.5 is chance).
    """
    found, said = scores(model, tokenizer, rows)
    better, worse = found.gather(1, said.last[:, None])[:, 0].chunk(2)
    changes, wrong = [], []
    for i, ended in enumerate(said.ended):
        places = torch.cat([said.first[i, None] - 1, ended.nonzero()[:, 0]])
        changes.append(found[i, places].diff())
        wrong.append(said.wrong[i, places].diff() > 0)
    return {
        "ranked right": (better > worse).double().mean().item(),
        "wrong sentences": auroc(-torch.cat(changes).numpy(), torch.cat(wrong).numpy()),
    }


@dataclass(frozen=True)
class Texts:
    """Conversations of 2 n answers, the chosen ones first, and what has been said at each token.

    wrong: [2 n, U] int64, the wrong facts that are complete after a token.
    ended: [2 n, U] bool, the tokens that end a sentence. first, last: [2 n] int64,
    the places of the answer's first token and of the conversation's last one.
    """

    wrong: Tensor
    ended: Tensor
    first: Tensor
    last: Tensor


def scores(model: Any, tokenizer: Any, rows: list[dict]) -> tuple[Tensor, Texts]:
    """R after every token of the conversations, [2 n, U], and what has been said there."""
    texts, starts, ends_of_wrong = [], [], []
    for side in ("chosen", "rejected"):
        for row in rows:
            answer = row[side][0]["content"]
            texts.append(tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False))
            starts.append(texts[-1].rindex(answer))
            ends_of_wrong.append([starts[-1] + end for _, end in row[f"wrong_{side}"]])
    batch = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    mask = batch["attention_mask"]
    ends = batch["offset_mapping"][:, :, 1]  # characters up to where each token ends
    wrong, ended = torch.zeros_like(ends), torch.zeros_like(ends, dtype=torch.bool)
    for i, text in enumerate(texts):
        for end in ends_of_wrong[i]:
            wrong[i] += ends[i] >= end
        stops = [j + 1 for j in range(starts[i], len(text)) if text[j] == "."]
        ended[i] = torch.isin(ends[i], torch.tensor(stops))
    hidden = model.model(batch["input_ids"], attention_mask=mask).last_hidden_state
    first = (ends <= torch.tensor(starts)[:, None]).logical_and(mask > 0).sum(1)
    said = Texts(wrong, ended, first, mask.sum(1) - 1)
    return model.score(hidden)[:, :, 0], said


def pair_loss(model: Any, tokenizer: Any, rows: list[dict], beginnings: bool) -> Tensor:
    """-log sigma(R(better) - R(worse)), the mean over pairs of whole answers, or of beginnings that
    say as many facts: after every token where both answers have the same sentences, else after
    every sentence.
    """
    found, said = scores(model, tokenizer, rows)
    n = len(rows)
    better, worse = found.gather(1, said.last[:, None])[:, 0].chunk(2)
    losses = [-torch.nn.functional.logsigmoid(better - worse)]
    if beginnings:
        for i in range(n):
            a, b = _beginnings(said, i, n)
            more = said.wrong[n + i, b] - said.wrong[i, a]
            gap = (found[i, a] - found[n + i, b]) * more.sign()
            losses.append(-torch.nn.functional.logsigmoid(gap[more != 0]))
    return torch.cat(losses).mean()


def _beginnings(said: Texts, i: int, n: int) -> tuple[Tensor, Tensor]:
    """Places in the answers of pair i that end comparable beginnings."""
    a, b = said.ended[i].nonzero()[:, 0], said.ended[n + i].nonzero()[:, 0]
    if torch.equal(a, b):
        places = torch.arange(int(said.last[i]))
        return places, places
    return a, b
