"""One of several processes of a TRegGRPOTrainer whose groups lie across them: each leaves what it
has generated and its advantages in a folder.

    python online_worker.py FOLDER POLICY JUDGE
"""

import json
import os
import sys
from pathlib import Path

from online_trainers import PROMPTS, make_trainer, readable

from treg.integrations.trl import TRegGRPOTrainer


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
    make_trainer(
        folder / "out",
        policy,
        Seen,
        reward_funcs=None,
        token_rewards="redistribution",
        token_rewards_options={"model": judge},
        credit="gae",
        credit_lambda=0.9,
        credit_baseline="group",
        per_device_train_batch_size=2,
        max_steps=1,
        prompts=PROMPTS[:2],
        **readable(),
    )[0].train()
