r"""OpenRLHF's online training with token rewards: its own command line, with a call before it.

    python examples/openrlhf_online.py \
        --actor.model_name_or_path SFT_MODEL --reward.model_name_or_path REWARD_MODEL \
        --data.prompt_dataset prompts.jsonl --algo.advantage.estimator dr_grpo \
        --rollout.n_samples_per_prompt 8 ...

The flags are those of openrlhf.cli.train_ppo_ray. The token rewards are those of RTO, arXiv
2404.18922: how much likelier a token is to a model that DPO has trained. The reward model's score
stands at the end.
"""

import runpy

from treg.integrations import openrlhf

openrlhf.install_online(
    rewards="implicit",
    rewards_options={"model": "DPO_MODEL", "base": "SFT_MODEL", "beta": 0.05, "clip": 0.05},
    alpha=1.0,
)
runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
