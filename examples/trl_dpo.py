"""Token rewards in TRL: another class, another config; the rest is TRL's.

    python examples/trl_dpo.py
    accelerate launch --multi_gpu --num_processes 2 examples/trl_dpo.py
    python examples/trl_dpo.py --model MODEL --data annotated.parquet

The first trains a small chat model on invented towns, the second does so data-parallel (on a CPU
too), the third takes what `treg annotate` wrote. Needs the extras `train` and `trl`. Options of
trl.DPOConfig and the treg_ ones are passed on, e.g. --treg_alpha 0. Writes trl-out.
"""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import treg.demo
from treg.demo.world import preference_rows
from treg.integrations.trl import TRegDPOConfig, TRegDPOTrainer

DEMO_MODEL = str(Path(treg.demo.__file__).parent / "model")


def pairs_about_towns() -> Dataset:
    rows = preference_rows(seed=0, count=24, split="train")
    return Dataset.from_list(rows).select_columns(["prompt", "chosen", "rejected"])


def main() -> None:
    parser = HfArgumentParser(
        TRegDPOConfig, description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO_MODEL, help="name or folder; without, the demo's")
    parser.add_argument(
        "--data", help="by `treg annotate`; without, pairs about towns, judged before training"
    )
    parser.set_defaults(
        output_dir="trl-out",
        max_steps=10,
        learning_rate=1e-4,
        per_device_train_batch_size=4,
        logging_steps=1,
        treg_alpha=0.5,
        bf16=False,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
    )
    config, more = parser.parse_args_into_dataclasses()

    trainer = TRegDPOTrainer(
        AutoModelForCausalLM.from_pretrained(more.model, dtype="float32"),
        AutoModelForCausalLM.from_pretrained(more.model, dtype="float32"),  # the reference
        config,
        train_dataset=more.data or pairs_about_towns(),
        processing_class=AutoTokenizer.from_pretrained(more.model),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
