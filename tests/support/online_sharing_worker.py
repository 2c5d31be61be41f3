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
from online_trainers import GROUP, VOCAB, make_trainer
from placed import by_place
from tiny import tiny_llama

WIDTH = 9
PROMPTS = ["the old owl", "what is", "Once upon a time there was a little fox", "a fox"]
SEEN_FIRST = 24  # places of a row that the check of a few tokens looks at


def online_trainer(folder, model, prompts=PROMPTS, **options):
    """The trainer, and its steps."""
    short = {"max_completion_length": WIDTH, "max_steps": 1, "prompts": prompts}
    return make_trainer(folder, model, **short | options)


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
