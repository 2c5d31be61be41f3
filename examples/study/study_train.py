"""One run of the study: pairs, token rewards, training, and what is measured of a policy."""

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import study_judge
import torch
import transformers
from study_methods import DPO_MODEL, JUDGE, METHODS, SIGNALS, Method
from torch import Tensor

from treg.data import SIDES, EncodeOptions
from treg.data.annotated import read_annotated
from treg.demo import rumours as world
from treg.demo import run as demo
from treg.demo.detection import ALL, REWARD, detection
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.trainer import TRegTrainer

HELD_OUT_SEED = 100_000
LONGEST = 192  # tokens of an answer


@dataclass(frozen=True)
class Settings:
    """All that is common to the runs.

    rates: learning rates by name. every: steps between two measurements of the marked tokens, on
    the first `watched` held-out pairs. samples: answers to each held-out question.
    """

    pairs: int = 200
    batch: int = 10
    epochs: int = 1
    beta: float = 0.1
    rates: dict[str, float] = field(
        default_factory=lambda: {"dpo": 2e-4, "simpo": 2e-4, "sft": 6e-4}
    )
    held_out: int = 128
    watched: int = 32
    every: int = 4
    samples: int = 2
    judge_steps: int = 400


class Task:
    """The world, the model that all start from, and what is made of them for one seed.

    folder: for what is made once and used by many runs.
    """

    def __init__(self, settings: Settings, folder: Path, seed: int):
        self.settings, self.seed, self.common = settings, seed, folder
        self.folder = folder / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(world.MODEL)
        self.start: Any = load(str(world.MODEL), self.device)
        self.rows = world.preference_rows(seed, settings.pairs, "train")
        self.held_out = world.preference_rows(
            HELD_OUT_SEED + seed, settings.held_out, "test", decoys=0.5
        )

    # -- token rewards

    def examples(self, method: Method) -> list[dict]:
        """The training pairs with a method's token rewards, and some of their labels wrong."""
        file = self.folder / f"{method.signal}.parquet"
        found = read_annotated(file)[0]
        # the same pairs are wrong whatever the method, and those of less noise are among them
        drawn = Random(self.seed).sample(range(len(found)), len(found))
        wrong = set(drawn[: round(method.noise * len(found))])
        return [demo.swapped(x) if i in wrong else x for i, x in enumerate(found)]

    def make_signal(self, name: str) -> dict[str, float]:
        """Annotate the training pairs; AUROC of -r as a detector of wrong values."""
        signal = SIGNALS[name]
        models = {DPO_MODEL: self.folder / "dpo", JUDGE: self.common / "judge"}
        given = {k: str(models.get(v, v)) if v in models else v for k, v in signal.options.items()}
        options = AnnotateOptions(
            EncodeOptions(512),
            tokens_per_batch=8192,
            per_token=True,
            rewards=signal.source,
            rewards_options=given,
            shaping=signal.shaping,
        )
        file = self.folder / f"{name}.parquet"
        annotate(self.start, self.tokenizer, self.rows, file, options, progress=False, strict=True)
        return detection(file, self.rows, self.tokenizer)[REWARD]

    def make_dpo(self) -> None:
        """DPO's own model, for the method that uses its rewards."""
        if not (self.folder / "dpo" / "config.json").exists():
            policy, _ = self.train(METHODS["DPO"])
            policy.save_pretrained(self.folder / "dpo")
            self.tokenizer.save_pretrained(self.folder / "dpo")

    # -- training

    def train(self, method: Method, watch: bool = False) -> tuple[Any, list[dict]]:
        """A policy, and how far it has moved the marked tokens as training went on."""
        settings = self.settings
        policy = copy.deepcopy(self.start)
        arguments: dict[str, Any] = {
            "loss_type": method.loss,
            "beta": settings.beta,
            "alpha": method.alpha,
            "learning_rate": settings.rates[method.rate] * method.faster,
            "num_train_epochs": settings.epochs,
            "per_device_train_batch_size": settings.batch,
        }
        args = demo.config(self.folder, self.seed, **(arguments | method.changes))
        trainer = TRegTrainer(policy, None, args, self.examples(method), None, self.tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        watching = Watching(self, settings.every)
        if watch:
            trainer.add_callback(watching)
        trainer.train()
        return policy, watching.curve

    # -- what is measured

    @torch.no_grad()
    def token_logps(self, model: Any, rows: Sequence[dict]) -> list[Tensor]:
        """log p of the answers' tokens, chosen and rejected of each row in turn; [T], nats."""
        pairs = []
        for row in rows:
            for side in SIDES:
                pairs.append((row["prompt"][0]["content"], row[side][0]["content"]))
        return self.answer_logps(model, pairs)

    @torch.no_grad()
    def answer_logps(self, model: Any, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        """The same of (question, answer)s, their end of turn included."""
        model.eval()
        prompts = [self._prompt(x) for x, _ in pairs]
        answers = [[*self._ids(answer), self.tokenizer.eos_token_id] for _, answer in pairs]
        order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]) + len(answers[i]))
        found: list[Tensor] = [torch.empty(0)] * len(pairs)
        for at in range(0, len(order), 64):
            some = order[at : at + 64]
            rows = [torch.tensor(prompts[i] + answers[i]) for i in some]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            # padding is on the right, where causal attention does not look
            logps = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            picked = logps.gather(-1, ids[:, 1:, None])[:, :, 0].cpu()
            for row, i in enumerate(some):
                begin = len(prompts[i]) - 1
                found[i] = picked[row, begin : begin + len(answers[i])]
        return found

    def _prompt(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def reference(self, rows: Sequence[dict]) -> list[Tensor]:
        return self.token_logps(self.start, rows)

    def kinds(self, rows: Sequence[dict]) -> list[Tensor]:
        """Of each answer's tokens: 1 that state a right value, -1 a wrong one, 0 all others."""
        found = []
        for row in rows:
            for side in SIDES:
                places = self.tokenizer(
                    row[side][0]["content"],
                    add_special_tokens=False,
                    return_offsets_mapping=True,
                )["offset_mapping"]
                kind = torch.zeros(len(places) + 1)
                for mark in row[f"{side}_marks"]:
                    for t, (start, end) in enumerate(places):
                        if start < mark["end"] and end > mark["start"]:
                            kind[t] = 1 if mark["value"] > 0 else -1
                found.append(kind)
        return found

    def shift(
        self, policy: Any, rows: Sequence[dict], before: Sequence[Tensor]
    ) -> dict[str, float]:
        """Mean of log pi - log pi_ref, nats: over tokens of right values, of wrong ones, others."""
        after = self.token_logps(policy, rows)
        moved = torch.cat([a - b for a, b in zip(after, before, strict=True)])
        kind = torch.cat(self.kinds(rows))
        names = {"good": kind > 0, "bad": kind < 0, "other": kind == 0}
        return {name: moved[where].mean().item() for name, where in names.items()}

    def measured(self, policy: Any) -> dict[str, float]:
        """Of sampled answers to held-out questions, and of held-out pairs.

        Returns:
            wrong facts: the share of all facts; rumours: the share that repeats the rumour;
            malformed: the share of answers with a sentence that is none of this world, or a fact
            said twice. facts, remarks, tokens: an answer. ornate: the share of free words. KL: the
            mean of sum_t log pi - log pi_ref over the sampled answers, nats. ranked right: the
            share of pairs whose chosen answer has the larger sum of log pi - log pi_ref; with
            decoys, against decoys: where the look of the chosen answer is the one that chosen
            answers of training have, and where it is the other. good, bad, other: `shift`.
        """
        asked = world.prompts("test") * self.settings.samples
        answers = demo.sampled(policy, self.tokenizer, asked, self.seed, LONGEST)
        checks = [world.check(q, x) for q, x in zip(asked, answers, strict=True)]
        n, facts = len(checks), sum(x.right + x.wrong for x in checks)
        spoken = list(zip(asked, answers, strict=True))
        now, then = self.answer_logps(policy, spoken), self.answer_logps(self.start, spoken)
        result = {
            "wrong facts": sum(x.wrong for x in checks) / max(facts, 1),
            "rumours": sum(x.repeated for x in checks) / max(facts, 1),
            "malformed": sum(x.malformed for x in checks) / n,
            "facts": facts / n,
            "remarks": sum(x.remarks for x in checks) / n,
            "ornate": sum(x.ornate for x in checks) / max(sum(x.free for x in checks), 1),
            "tokens": sum(len(x) for x in now) / n,
            "KL": sum((a - b).sum().item() for a, b in zip(now, then, strict=True)) / n,
        }
        before = self.reference(self.held_out)
        result |= self.shift(policy, self.held_out, before)
        if policy is self.start:
            return result  # it ranks no pair: all of its margins are 0
        after = self.token_logps(policy, self.held_out)
        sums = [(a - b).sum() for a, b in zip(after, before, strict=True)]
        right = torch.tensor([w > l for w, l in zip(sums[::2], sums[1::2], strict=True)]).double()
        usual = torch.tensor([row["decoys"] for row in self.held_out])
        result["ranked right"] = right.mean().item()
        result["with decoys"] = right[usual].mean().item()
        result["against decoys"] = right[~usual].mean().item()
        return result


class Watching(transformers.TrainerCallback):
    """Measures how far the marked tokens of held-out pairs have moved, every so many steps."""

    def __init__(self, task: Task, every: int):
        self.task, self.every = task, every
        self.rows = task.held_out[: task.settings.watched]
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.task.reference(self.rows)
        self._measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(model, state.global_step)

    def _measure(self, model: Any, step: int) -> None:
        self.curve.append({"step": step, **self.task.shift(model, self.rows, self.before)})
        model.train()


def load(folder: str, device: str) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()


# -- what processes are given to do


def prepare_judge(settings: Settings, folder: Path) -> dict[str, float]:
    """The reward model, which all seeds share."""
    quiet()
    return study_judge.train_judge(
        folder / "judge", settings.judge_steps, lambda text: print(text, flush=True)
    )


def prepare(settings: Settings, folder: Path, seed: int, signals: Sequence[str]) -> dict[str, Any]:
    """The token rewards of a seed; what they are worth as detectors, by signal."""
    quiet()
    task = Task(settings, folder, seed)
    found = {}
    for name in signals:
        if name == "own":
            task.make_dpo()
        found[name] = task.make_signal(name)
        print(f"seed {seed}: {name}, AUROC {found[name][ALL]:.3f}", flush=True)
    return found


def run_once(settings: Settings, folder: Path, name: str, seed: int) -> dict[str, Any]:
    """A row of the record. name: a key of METHODS, or "before"."""
    quiet()
    start, cpu = time.perf_counter(), time.process_time()
    task = Task(settings, folder, seed)
    policy, curve = task.start, []
    if name != "before":
        policy, curve = task.train(METHODS[name], watch=True)
    seconds = time.perf_counter() - start
    row = {"method": name, "seed": seed, **task.measured(policy), "seconds": seconds}
    return row | {"cpu seconds": time.process_time() - cpu, "curve": curve}


def large(settings: Settings) -> Settings:
    """For a GPU."""
    return replace(settings, pairs=2000, batch=20, held_out=512, watched=128, samples=10)


def quick(settings: Settings) -> Settings:
    """Whether it runs at all."""
    return replace(settings, pairs=20, held_out=8, watched=4, samples=1, judge_steps=8)


def quiet() -> None:
    """One thread a process, and no lines but the study's own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    demo.quiet()
