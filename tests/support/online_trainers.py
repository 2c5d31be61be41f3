"""Small trainings of TRL's GRPO and its like, for tests and for processes that they start."""

import torch
from datasets import Dataset
from tiny import tiny_tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from treg.integrations.trl import TRegGRPOConfig, TRegGRPOTrainer

VOCAB, WIDTH, GROUP = 400, 12, 4
PROMPTS = ["the old owl", "what is", "Once upon a time there was", "a fox"]


def vowels(completions, **kwargs):
    """A reward function: how many vowels are in what was written."""
    texts = [x if isinstance(x, str) else x[0]["content"] for x in completions]
    return [float(sum(text.count(c) for c in "aeiou")) for text in texts]


CONFIGS = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}


class Steps(TrainerCallback):
    """Gradients of every step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def make_trainer(tmp_path, model, kind=TRegGRPOTrainer, reward_funcs=vowels, **options):
    """The trainer, and its steps. model: one, or its folder, which a reference needs."""
    config = TRegGRPOConfig if issubclass(kind, TRegGRPOTrainer) else CONFIGS[kind]
    steps = Steps()
    more = {x: options.pop(x) for x in ("peft_config", "eval_dataset") if x in options}
    rows = options.pop("rows", None) or [{"prompt": x} for x in options.pop("prompts", PROMPTS)]
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": WIDTH,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 2,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
        "model_init_kwargs": {"dtype": torch.float32} if isinstance(model, str) else None,
    } | options
    trainer = kind(
        model,
        reward_funcs,
        config(**options),
        Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[steps],
        **more,
    )
    return trainer, steps


def plain_ids():
    """The ids of END and of tokens that are whole ASCII characters."""
    tokenizer = tiny_tokenizer()
    plain = [i for i in range(VOCAB) if tokenizer.decode([i]).isascii()]
    return [i for i in plain if i == 1 or i not in tokenizer.all_special_ids]


def readable(**more):
    """Options of a generation that writes ASCII and often ends."""
    ids = set(plain_ids())
    suppressed = {"suppress_tokens": [i for i in range(VOCAB) if i not in ids]}
    return {"generation_kwargs": suppressed | more}
