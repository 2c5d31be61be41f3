"""Token credit in TRL's GRPO: a reward model's score, redistributed over the tokens (RED).

    python examples/trl_grpo.py
    python examples/trl_grpo.py --model MODEL --reward_model REWARD_MODEL --data prompts.jsonl

The first trains a small chat model on questions about invented towns; what it takes for a reward
model is a random one, to show the calls alone: examples/online has one that is trained. Needs the
extras `train` and `trl`. Options of trl.GRPOConfig and those of TRegGRPOConfig are passed on, e.g.
--credit macro --macro_length 5. Writes grpo-out.
"""

import json
import tempfile
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

import treg.demo
from treg.demo import world
from treg.integrations.trl import TRegGRPOConfig, TRegGRPOTrainer

DEMO_MODEL = str(Path(treg.demo.__file__).parent / "model")


def questions(path: str | None) -> Dataset:
    """Rows with a prompt: messages, or plain text."""
    if path is not None:
        lines = Path(path).read_text().splitlines()
        return Dataset.from_list([json.loads(line) for line in lines])
    asked = world.prompts("train")
    return Dataset.from_list([{"prompt": [{"role": "user", "content": x}]} for x in asked])


def random_judge(folder: str) -> str:
    """The demo's chat model with a score of random weights in the place of its head."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    judge = AutoModelForSequenceClassification.from_pretrained(
        DEMO_MODEL, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    judge.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = HfArgumentParser(
        TRegGRPOConfig, description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO_MODEL, help="name or folder; without, the demo's")
    parser.add_argument("--reward_model", help="a sequence classifier; without, a random one")
    parser.add_argument("--data", help="JSONL with prompts; without, questions about towns")
    parser.set_defaults(
        output_dir="grpo-out",
        max_steps=5,
        learning_rate=1e-5,
        num_generations=8,
        max_completion_length=64,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
    )
    config, more = parser.parse_args_into_dataclasses()

    with tempfile.TemporaryDirectory() as folder:
        judge = more.reward_model or random_judge(folder)
        config.token_rewards = "redistribution"
        config.token_rewards_options = {"model": judge}
        trainer = TRegGRPOTrainer(
            more.model,
            args=config,
            train_dataset=questions(more.data),
            processing_class=AutoTokenizer.from_pretrained(more.model),
        )
        trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
