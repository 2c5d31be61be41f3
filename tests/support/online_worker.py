"""One of several processes of a TRegGRPOTrainer whose groups lie across them: each leaves what it
has generated and its advantages in a folder.

    python online_worker.py FOLDER POLICY JUDGE
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tiny import tiny_tokenizer

from treg.integrations.trl import TRegGRPOConfig, TRegGRPOTrainer


class Seen(TRegGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rank, width = os.environ["RANK"], output["completion_ids"].shape[1]
        seen = {
            "prompts": [x["prompt"] for x in inputs],
            "ids": self._generated[1],
            "advantages": output["advantages"].tolist(),
            "width": width,
        }
        (folder / f"rank{rank}.json").write_text(json.dumps(seen))
        return output


if __name__ == "__main__":
    folder, policy, judge = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tokenizer = tiny_tokenizer()
    plain = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isascii()]
    args = TRegGRPOConfig(
        str(folder / "out"),
        token_rewards="redistribution",
        token_rewards_options={"model": judge},
        credit="gae",
        credit_lambda=0.9,
        credit_baseline="group",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=2,
        num_generations=4,
        max_completion_length=12,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": torch.float32},
        generation_kwargs={
            "suppress_tokens": [i for i in range(len(tokenizer)) if i not in plain or i in (0, 2)]
        },
    )
    rows = Dataset.from_list([{"prompt": x} for x in ("the old owl", "what is")])
    Seen(policy, None, args, rows, processing_class=tokenizer).train()
