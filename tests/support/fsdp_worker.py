"""Two steps of both trainers, for test_sharded.py; under FSDP2 where the environment is that of
accelerate's launcher.

[ACCELERATE_USE_FSDP=true ...] torchrun --nproc_per_node N \\
    tests/support/fsdp_worker.py ANNOTATED DIR BATCH

accelerate leaves FSDP out on a CPU; the state is told here that it is there, and all else is
accelerate's own.
"""

import faulthandler
import functools
import gc
import json
import os
import sys
from pathlib import Path

import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

import treg.demo
from treg.integrations.trl import TRegDPOConfig, TRegDPOTrainer
from treg.trainer import TRegConfig, TRegTrainer

MODEL = Path(treg.demo.__file__).parent / "model"
FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"


def allow_fsdp_on_a_cpu() -> None:
    original = accelerate.state.AcceleratorState.__init__

    @functools.wraps(original)
    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type != DistributedType.FSDP:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = init


def train(kind: type, config: type, data: str, folder: str, batch: str, **options) -> list[dict]:
    """The log of two steps; under FSDP2 a pair's prompt is run once."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    options = (
        dict(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=int(batch),
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=1e-3,
            beta=0.1,
            bf16=False,
            seed=0,
            dataloader_pin_memory=False,
        )
        | options
    )
    trainer = kind(model, None, config(**options), train_dataset=data)
    trainer.train()
    assert isinstance(trainer.model_wrapped, FSDPModule) == FSDP
    return trainer.state.log_history


def main(data: str, folder: str, batch: str) -> None:
    faulthandler.dump_traceback_later(280, exit=True)
    allow_fsdp_on_a_cpu()
    found = {}
    for kind, config, options in (
        (TRegTrainer, TRegConfig, {"alpha": 0.5, "share_prompt": FSDP}),
        (TRegDPOTrainer, TRegDPOConfig, {"treg_alpha": 0.5, "treg_share_prompt": FSDP}),
    ):
        found[kind.__name__] = train(kind, config, data, folder, batch, **options)
        gc.collect()
    if int(os.environ["RANK"]) == 0:
        Path(folder, f"{'fsdp' if FSDP else 'alone'}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
