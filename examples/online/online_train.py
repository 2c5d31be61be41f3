"""The methods of the online run, and one training run of one of them."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import online_task as task
import torch
import transformers
from datasets import Dataset

from treg.demo import run as demo
from treg.integrations.trl import TRegGRPOConfig, TRegGRPOTrainer

TRUTH = "online_truth:TruthSource"
# the reward models: one that has learnt to judge beginnings of answers too, and one that has not
JUDGE, WHOLE = "judge", "whole-answer judge"
JUDGES = {JUDGE: task.RewardSettings(), WHOLE: task.RewardSettings(beginnings=False)}
RED = {"token_rewards": "redistribution", "token_rewards_options": {"model": JUDGE}}
SHUFFLED = {
    "token_rewards": "shuffled",
    "token_rewards_options": {"of": "redistribution", "of_options": {"model": JUDGE}},
}
ORACLE = {"token_rewards": TRUTH}
# each token's own reward and, less and less, those after it; minus the mean reward of a token
TOKENS = {"credit": "gae", "credit_lambda": 0.95, "credit_baseline": "process"}
# the same over macro actions of five tokens
MACRO = TOKENS | {"credit": "macro", "macro": "ngram", "macro_length": 5}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    judge: the reward model whose score of an answer is a reward function. changes: arguments of
    TRegGRPOConfig; a reward model's name stands for its folder. faster: what the learning rate is
    multiplied by.
    """

    judge: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    faster: float = 1.0


METHODS = {
    "sequence": Method(judge=JUDGE),
    "sequence, twice the rate": Method(judge=JUDGE, faster=2.0),
    "macro": Method(judge=JUDGE, changes=MACRO | {"credit_baseline": "group"}),
    "RED": Method(changes=RED | TOKENS),
    "RED, macro": Method(changes=RED | MACRO),
    "RED, group baseline": Method(changes=RED | TOKENS | {"credit_baseline": "group"}),
    "RED, shuffled": Method(changes=SHUFFLED | TOKENS),
    "sequence, whole-answer judge": Method(judge=WHOLE),
    "RED, whole-answer judge": Method(
        changes=RED | TOKENS | {"token_rewards_options": {"model": WHOLE}}
    ),
    "truth, sequence": Method(changes=ORACLE | {"credit": "sequence"}),
    "truth, tokens": Method(changes=ORACLE | TOKENS),
    "truth, each token alone": Method(changes=ORACLE | TOKENS | {"credit_lambda": 0.0}),
    "RED, returns": Method(changes=RED | TOKENS | {"credit_lambda": 1.0}),
    "RED, sentences": Method(changes=RED | MACRO | {"macro": "sentence", "credit_lambda": 0.0}),
}
# added when the others were known: they are not run unless they are named
FOLLOW_UPS = ("RED, returns", "RED, sentences")


@dataclass(frozen=True)
class Settings:
    """Of every training run."""

    steps: int = 30
    prompts: int = 4  # a step
    generations: int = 8  # answers to a prompt
    learning_rate: float = 1e-4
    every: int = 5  # steps between two measurements
    samples: int = task.SAMPLES  # answers to each held-out question


class Measuring(transformers.TrainerCallback):
    """Measures the policy as training goes on, and says so."""

    def __init__(self, name: str, seed: int, settings: Settings, tokenizer: Any):
        self.title, self.seed, self.settings = f"{name}, seed {seed}", seed, settings
        self.tokenizer = tokenizer
        self.curve: list[dict[str, float]] = []
        self.rewards: list[float] = []
        self.seconds = 0.0  # of measuring
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.settings.every == 0 or state.global_step == args.max_steps:
            self._measure(model, state.global_step)
        elif state.global_step == 1:
            self._say("step 1")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in (logs or {}):
            self.rewards.append(logs["reward"])

    def _measure(self, policy: Any, step: int) -> None:
        start = time.perf_counter()
        found = task.evaluate(policy, self.tokenizer, self.seed, self.settings.samples)
        self.seconds += time.perf_counter() - start
        self.curve.append({"step": step, **found})
        self._say(
            f"step {step}/{self.settings.steps}, wrong facts {found['wrong facts']:.1%}, malformed "
            f"{found['malformed']:.1%}"
        )

    def _say(self, text: str) -> None:
        print(f"{self.title}: {text}, {time.perf_counter() - self.start:.0f} s", flush=True)


def judges_of(value: Any) -> set[str]:
    """The reward models that arguments name."""
    if isinstance(value, Mapping):
        return set().union(*map(judges_of, value.values()))
    return {value} & JUDGES.keys() if isinstance(value, str) else set()


def filled(value: Any, folders: Mapping[str, str]) -> Any:
    """Arguments with the folders of reward models instead of their names."""
    if isinstance(value, Mapping):
        return {name: filled(x, folders) for name, x in value.items()}
    return folders.get(value, value) if isinstance(value, str) else value


def train(
    name: str, seed: int, settings: Settings, folder: Path, judges: Mapping[str, str]
) -> dict[str, Any]:
    """One run: a row of the record.

    Args:
        name: a key of METHODS.
        folder: for what the trainer writes.
        judges: the folder of each reward model.
    Returns:
        method, seed, learning rate, seconds of training, CPU seconds of the whole run, the last
        measurement, rewards (those of training, by step), curve (measurements by step).
    """
    cpu = time.process_time()
    method, tokenizer = METHODS[name], task.load_tokenizer()
    rate = settings.learning_rate * method.faster
    args = TRegGRPOConfig(
        str(folder),
        seed=seed,
        dataloader_pin_memory=False,
        max_steps=settings.steps,
        learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=settings.prompts * settings.generations,
        num_generations=settings.generations,
        max_completion_length=task.LONGEST,
        temperature=1.0,
        beta=0.0,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=settings.every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **filled(method.changes, judges),
    )
    functions = [task.load_reward_model(judges[method.judge])] if method.judge else []
    torch.manual_seed(seed)
    trainer = TRegGRPOTrainer(
        task.load_policy(),
        functions,
        args,
        Dataset.from_list(task.questions()),
        processing_class=tokenizer,
        reward_processing_classes=[task.load_tokenizer() for _ in functions],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    measuring = Measuring(name, seed, settings, tokenizer)
    trainer.add_callback(measuring)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start - measuring.seconds
    return {
        "method": name,
        "seed": seed,
        "learning rate": rate,
        "seconds": seconds,
        "cpu seconds": time.process_time() - cpu,
        **measuring.curve[-1],
        "rewards": measuring.rewards,
        "curve": measuring.curve,
    }


def quiet() -> None:
    """One thread a process, and no lines but the run's own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    demo.quiet()
