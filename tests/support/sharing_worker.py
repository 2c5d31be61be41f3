"""Trainings in which a pair's prompt is run once, in two processes, for trainer/test_sharing.py.

torchrun --nproc_per_node 2 tests/support/sharing_worker.py DIR
"""

import faulthandler
import gc
import os
import sys
from pathlib import Path

import numpy as np
import torch
from placed import by_place
from trainer_worker import (
    VOCAB,
    Gradients,
    make_model,
    make_pairs,
    make_trainer,
    perturb,
    shared_trainer,
    with_reference,
)

ALIKE = ("padded", "lora")  # of trainer_worker.SHARED
SEEN_FIRST = 24  # places of a row that the check of a few tokens looks at


def one_long_pair() -> list[dict]:
    """Four pairs, of which one alone is longer in a shared row than SEEN_FIRST."""
    pairs, random = make_pairs(4), np.random.default_rng(1)
    for side in ("chosen", "rejected"):
        pairs[2][f"{side}_ids"] = random.integers(3, VOCAB, 14).astype(np.int32)
        pairs[2][f"{side}_token_rewards"] = random.uniform(-0.5, 0.5, 14).astype(np.float32)
    return pairs


def placed_trainer(output_dir: Path, batch: int, callbacks=(), **options):
    """A step on `one_long_pair` of a model that is `by_place`."""
    pairs = with_reference(one_long_pair(), make_model())
    return make_trainer(
        output_dir,
        by_place(perturb(make_model()), SEEN_FIRST),
        pairs,
        callbacks=list(callbacks),
        per_device_train_batch_size=batch,
        max_steps=1,
        **options,
    )


def alike(name: str, folder: Path) -> None:
    gradients = Gradients()
    options = {"share_prompt": True, "ddp_backend": "gloo"}
    trainer = shared_trainer(name, folder / name, 2, [gradients], **options)
    trainer.train()
    metrics = trainer.evaluate()
    if os.environ["RANK"] == "0":
        torch.save((gradients.steps, trainer.state.log_history, metrics), folder / f"{name}.pt")


def placed(asked: bool | None, folder: Path) -> None:
    gradients, error = Gradients(), ""
    options = {"share_prompt": asked, "ddp_backend": "gloo"}
    trainer = placed_trainer(folder / "placed", 2, [gradients], **options)
    try:
        trainer.train()
    except ValueError as problem:
        error = str(problem)
    found = (gradients.steps, trainer._sharing.on, error)
    torch.save(found, folder / f"placed-{asked}-{os.environ['RANK']}.pt")


def main(folder: Path) -> None:
    for name in ALIKE:
        alike(name, folder)
    for asked in (None, True):
        placed(asked, folder)
    gc.collect()  # see trainer_worker.ddp
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(280, exit=True)
    main(Path(sys.argv[1]))
