"""Trainings of TRL's GRPO in which completions share their prompt, for
integrations/test_trl_online_sharing.py: here, and in two processes.

torchrun --nproc_per_node 2 tests/support/online_sharing_worker.py DIR
"""

import faulthandler
import gc
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from placed import by_place
from tiny import tiny_llama, tiny_tokenizer
from transformers import TrainerCallback

from treg.integrations.trl import TRegGRPOConfig, TRegGRPOTrainer

VOCAB, WIDTH, GROUP = 400, 9, 4
PROMPTS = ["the old owl", "what is", "Once upon a time there was a little fox", "a fox"]
SEEN_FIRST = 24  # places of a row that the check of a few tokens looks at


def vowels(completions, **kwargs):
    return [float(sum(text.count(c) for c in "aeiou")) for text in completions]


class Steps(TrainerCallback):
    """Gradients of every step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def online_trainer(folder, model, prompts=PROMPTS, kind=TRegGRPOTrainer, **options):
    """model: one, or its folder, which a reference needs."""
    steps = Steps()
    more = {x: options.pop(x) for x in ("peft_config",) if x in options}
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": WIDTH,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 1,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
        "model_init_kwargs": {"dtype": torch.float32} if isinstance(model, str) else None,
    } | options
    config = TRegGRPOConfig if kind is TRegGRPOTrainer else kind._config
    data = Dataset.from_list([{"prompt": x} for x in prompts])
    trainer = kind(
        *(model, vowels, config(**options), data),
        processing_class=tiny_tokenizer(),
        callbacks=[steps],
        **more,
    )
    return trainer, steps


def ending(model):
    """A model that often ends at once, so that completions are of all lengths."""
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 3.0
    return model


def alike(share: bool, folder: Path) -> None:
    trainer, steps = online_trainer(
        *(folder / "out", ending(tiny_llama(VOCAB))),
        per_device_train_batch_size=GROUP,
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        treg_share_prompt=share,
        ddp_backend="gloo",
    )
    trainer.train()
    found = (steps.gradients, trainer.state.log_history, trainer._shared.sharing.on)
    torch.save(found, folder / f"alike-{share}-{os.environ['RANK']}.pt")


def placed(asked: bool | None, folder: Path) -> None:
    """One process has a prompt that is long enough to show a difference."""
    prompts = ["a fox", "Here is a conversation: the system says hello, the user is happy"]
    trainer, steps = online_trainer(
        *(folder / "out", by_place(tiny_llama(VOCAB), SEEN_FIRST), prompts),
        per_device_train_batch_size=GROUP,
        max_completion_length=3,
        treg_share_prompt=asked,
        ddp_backend="gloo",
    )
    error = ""
    try:
        trainer.train()
    except ValueError as problem:
        error = str(problem)
    found = (len(steps.gradients), trainer._shared.sharing.on, error)
    torch.save(found, folder / f"placed-{asked}-{os.environ['RANK']}.pt")


def main(folder: Path) -> None:
    for share in (True, False):
        alike(share, folder)
    for asked in (None, True):
        placed(asked, folder)
    gc.collect()  # see trainer_worker.ddp
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(280, exit=True)
    main(Path(sys.argv[1]))
