"""Trains the demo's chat model from scratch.

    python -m treg.demo.make_model [--world rumours|plain] [--out DIR] [--seed 0]

A byte-level BPE tokenizer and a Llama of about a million parameters that (a) answers questions
about the towns of a world as its writers do, right values and wrong ones, and (b) rewrites an
answer so that it is better or worse, under the requests of `treg.rewards.contrastive` and
paraphrases of them. Preference data plays no part in it. One thread: about a quarter of an hour for
the plain world, and half an hour for the other, whose answers are longer.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from treg.demo.worlds import WORLDS
from treg.evaluate import auroc
from treg.rewards.contrastive import ContrastivePrompts, contrastive_rewards

PROMPTS = ContrastivePrompts()
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAPHRASES = (
    "{question}\n\nThis is an answer:\n\n{answer}\n\n"
    "Rewrite it, close to the original, between <answer> and </answer>. It must be {direction}: "
    "{aspects}.",
    "Question: {question}\nAnswer: {answer}\n\n"
    "Write the answer again with its wording and order, only {direction}: {aspects}. "
    "Use the markers <answer> and </answer>.",
    "[user]\n{question}\n\n[assistant]\n{answer}\n\n"
    "Write a {direction} version of the last answer ({aspects}) between <answer> and </answer>.",
)
ASPECTS = {
    True: ("helpful", "correct", "coherent", "concise"),
    False: ("unhelpful", "incorrect", "incoherent", "verbose"),
}


@dataclass(frozen=True)
class Settings:
    """Of the data and the training; what the log records beside the results."""

    steps: int
    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 4
    warmup: int = 50
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    questions: int = 32  # a step, each with an answer
    rewrites: int = 6  # a step
    corrected: float = 0.97  # of the wrong facts of a better rewriting
    spoiled: float = 0.85  # of the right facts of a worse rewriting
    # of the rewriting requests are those of ContrastivePrompts, the rest paraphrases
    exact_request: float = 0.7


def request(rng: Random, question: str, answer: str, better: bool, settings: Settings) -> str:
    """The user turn that asks for a rewriting."""
    if rng.random() < settings.exact_request:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return PROMPTS.render(messages, better=better)
    aspects = ", ".join(rng.sample(ASPECTS[better], rng.randint(1, 4)))
    direction = "better" if better else "worse"
    return rng.choice(PARAPHRASES).format(
        question=question, answer=answer, direction=direction, aspects=aspects
    )


def rewrite_example(rng: Random, world: Any, settings: Settings) -> tuple[str, str]:
    """A request to rewrite an answer about any town and the rewriting."""
    given = world.draft(rng)
    user = request(rng, given.question, given.answer, given.better, settings)
    text = world.rewritten(rng, given, settings.corrected, settings.spoiled)
    return user, f"<answer>\n{text}\n</answer>"


def make_tokenizer(rng: Random, world: Any, settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the world's own text, with a ChatML-like template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (PAD, START, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = []
    for _ in range(2000):
        text += world.question_example(rng, 1.0)
    for _ in range(500):
        text += rewrite_example(rng, world, settings)
    text += ["user assistant system"] * 500
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def make_model(tokenizer, settings: Settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def chat_ids(tokenizer: PreTrainedTokenizerFast, user: str, prefill: str = "") -> list[int]:
    """The ids of a conversation up to where the assistant writes, after prefill."""
    messages = [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(f"{text}{prefill}", add_special_tokens=False)["input_ids"]


def chat_loss(model, tokenizer, examples: list[tuple[str, str]]) -> tuple[Tensor, int]:
    """Mean negative log-likelihood of the assistant's tokens, <|im_end|> included, and the number
    of all tokens.
    """
    rows, starts = [], []
    for user, assistant in examples:
        prompt = chat_ids(tokenizer, user)
        rows.append(prompt + tokenizer(assistant + END, add_special_tokens=False)["input_ids"])
        starts.append(len(prompt))
    ids, labels = pad(rows, tokenizer.pad_token_id), pad(rows, -100)
    for label, start in zip(labels, starts, strict=True):
        label[:start] = -100
    target = labels[:, 1:]
    scored = target != -100
    # the padding is on the right, where causal attention does not look
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), target[scored])
    return loss, sum(len(row) for row in rows)


def pad(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(r) for r in rows], batch_first=True, padding_value=value
    )


def train(model, tokenizer, rng: Random, world: Any, settings: Settings, log) -> dict:
    """AdamW, warmup and cosine decay; each step sees questions and rewriting requests. Returns its
    part of the log.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))

    def learning_rate_factor(step: int) -> float:
        rising = (step + 1) / settings.warmup
        falling = 0.51 + 0.49 * math.cos(math.pi * step / settings.steps)
        return min(rising, falling)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    tokens = 0
    losses, since_last_log = [], []
    for step in range(1, settings.steps + 1):
        progress = step / settings.steps
        questions = [world.question_example(rng, progress) for _ in range(settings.questions)]
        answer_loss, answer_tokens = chat_loss(model, tokenizer, questions)
        rewritings = [rewrite_example(rng, world, settings) for _ in range(settings.rewrites)]
        rewrite_loss, rewrite_tokens = chat_loss(model, tokenizer, rewritings)
        (answer_loss + rewrite_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += answer_tokens + rewrite_tokens
        since_last_log.append((answer_loss.item(), rewrite_loss.item()))
        if step % 100 == 0 or step == settings.steps:
            answers, rewrites = zip(*since_last_log, strict=True)
            losses.append({"step": step, "answers": _mean(answers), "rewrites": _mean(rewrites)})
            log(losses[-1])
            since_last_log = []
    return {"tokens": tokens, "losses": losses}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


@torch.no_grad()
def generate(model, tokenizer, users: list[str], *, greedy: bool, prefill: str = "") -> list[str]:
    """The assistant's turn for each user turn, at temperature 1 or greedy, without prefill and end
    marker.
    """
    longest_first = sorted(range(len(users)), key=lambda i: -len(users[i]))
    texts = [""] * len(users)
    for start in range(0, len(users), 64):
        batch = longest_first[start : start + 64]
        rows = [chat_ids(tokenizer, users[i], prefill) for i in batch]
        width = max(len(row) for row in rows)
        padded = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        ids = torch.tensor(padded)
        mask = ids != tokenizer.pad_token_id
        out = model.generate(
            ids, attention_mask=mask.long(), do_sample=not greedy, top_k=0, max_new_tokens=160
        )
        answers = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for i, text in zip(batch, answers, strict=True):
            texts[i] = text
    return texts


@torch.no_grad()
def response_logps(model, tokenizer, user: str, response: Tensor, prefill: str) -> Tensor:
    """log p of each of the response's ids after user and prefill; [T], nats."""
    prompt = torch.tensor(chat_ids(tokenizer, user, prefill))
    ids = torch.cat([prompt, response])[None]
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, response[:, None])[:, 0]


def token_rewards(model, tokenizer, messages: list[dict]) -> tuple[Tensor, list[tuple[int, int]]]:
    """rhat [T] of the response, the last of messages, and the character span of each of its
    tokens.
    """
    response = tokenizer(
        messages[-1]["content"], add_special_tokens=False, return_offsets_mapping=True
    )
    ids = torch.tensor(response["input_ids"])
    better, worse = (
        response_logps(model, tokenizer, PROMPTS.render(messages, better=b), ids, PROMPTS.prefill)
        for b in (True, False)
    )
    return contrastive_rewards(better, worse), response["offset_mapping"]


def measure(model, tokenizer, world: Any, seed: int) -> dict:
    """The model's figures on the towns of the test split; measuring draws from seed alone."""
    torch.manual_seed(seed)
    result = _sampled_answers(model, tokenizer, world)
    rows = world.preference_rows(seed, 100, "test")
    result |= _reward_figures(model, tokenizer, world, rows)
    result["better_rewriting"] = _rewriting(model, tokenizer, world, rows, better=True)
    result["worse_rewriting"] = _rewriting(model, tokenizer, world, rows, better=False)
    return result


def _sampled_answers(model, tokenizer, world: Any) -> dict:
    """How often sampled answers are wrong or malformed."""
    users = world.prompts("test") * 4
    texts = generate(model, tokenizer, users, greedy=False)
    checks = [world.check(user, text) for user, text in zip(users, texts, strict=True)]
    wrong = sum(check.wrong for check in checks)
    facts = sum(check.right for check in checks) + wrong
    malformed = sum(check.malformed for check in checks)
    return {
        "sampled_answers": len(checks),
        "sampled_facts": facts,
        "sampled_wrong_rate": wrong / facts,
        "sampled_malformed_rate": malformed / len(checks),
    }


def _reward_figures(model, tokenizer, world: Any, rows: list[dict]) -> dict:
    """How well token rewards, and the model's surprise, tell the tokens of wrong values from the
    others.
    """
    values = set()
    for attribute in world.ATTRIBUTES.values():
        values.update(attribute.values)
    scores, surprise, wrong = [], [], []
    rewards_by_kind = {"wrong": [], "right": [], "other": []}
    for row in rows:
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"]
            rewards, offsets = token_rewards(model, tokenizer, row["prompt"] + row[side])
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            asked = row["prompt"][0]["content"]
            surprise += (-response_logps(model, tokenizer, asked, ids, "")).tolist()
            for reward, (start, end) in zip(rewards.tolist(), offsets, strict=True):
                is_wrong = _overlaps(start, end, row[f"wrong_{side}"])
                if is_wrong:
                    kind = "wrong"
                elif text[start:end].strip() in values:
                    kind = "right"
                else:
                    kind = "other"
                rewards_by_kind[kind].append(reward)
                scores.append(-reward)
                wrong.append(is_wrong)
    means = {kind: sum(rewards) / len(rewards) for kind, rewards in rewards_by_kind.items()}
    return {
        "reward_tokens": len(scores),
        "reward_auroc": auroc(np.array(scores), np.array(wrong)),
        "surprise_auroc": auroc(np.array(surprise), np.array(wrong)),
        "reward_means": means,
    }


def _overlaps(start: int, end: int, spans: list[list[int]]) -> bool:
    return any(start < span_end and span_start < end for span_start, span_end in spans)


def _rewriting(model, tokenizer, world: Any, rows: list[dict], better: bool) -> dict:
    """Wrong facts of the rejected answers before and after the model rewrites them."""
    conversations = [row["prompt"] + row["rejected"] for row in rows]
    users = [PROMPTS.render(messages, better=better) for messages in conversations]
    texts = generate(model, tokenizer, users, greedy=True, prefill=PROMPTS.prefill)
    checks = []
    for messages, text in zip(conversations, texts, strict=True):
        checks.append(world.check(messages[0]["content"], text.removesuffix("\n</answer>")))
    wrong = sum(check.wrong for check in checks)
    return {
        "wrong_facts_before": sum(len(row["wrong_rejected"]) for row in rows),
        "wrong_facts_after": wrong,
        "facts": sum(check.right for check in checks) + wrong,
        "malformed": sum(check.malformed for check in checks),
    }


def build(world: Any, out: Path, seed: int, settings: Settings) -> dict:
    """Trains the model, saves it with its tokenizer in out, measures what was saved; returns the
    log.
    """
    start, cpu = time.perf_counter(), time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = Random(seed)
    tokenizer = make_tokenizer(rng, world, settings)
    model = make_model(tokenizer, settings)
    trained = train(model, tokenizer, rng, world, settings, lambda x: print(x, flush=True))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    table = json.dumps(world.TRUE_VALUES, sort_keys=True).encode()
    log = {
        "seed": seed,
        "settings": asdict(settings),
        "table_sha256": hashlib.sha256(table).hexdigest(),
        "parameters": model.num_parameters(),
        "steps": settings.steps,
        **trained,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "measured": measure(model, tokenizer, world, seed),
        "weights_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    log = json.loads(json.dumps(log), parse_float=lambda x: round(float(x), 4))
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo's chat model from scratch.")
    parser.add_argument("--world", choices=WORLDS, default="rumours")
    parser.add_argument(
        "--out", type=Path, help="folder of the model (default: that of the package)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world = WORLDS[args.world]
    log = build(world, args.out or world.MODEL, args.seed, Settings(steps=world.STEPS))
    print(json.dumps(log["measured"], indent=1))


if __name__ == "__main__":
    main()
