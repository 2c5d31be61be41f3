"""OpenRLHF: its DPO with T-REG, and token rewards in its online training.

    install           openrlhf.cli.train_dpo, without float32 logits
    install_online    openrlhf.cli.train_ppo_ray: PPO, REINFORCE++, RLOO, Dr. GRPO

Written against OpenRLHF 0.11.2.
"""

from treg.integrations.openrlhf.dpo import TAIL, install, make_trainer, patch_actor
from treg.integrations.openrlhf.online import (
    OnlineOptions,
    install_online,
    make_experience_maker,
)

__all__ = [
    "TAIL",
    "OnlineOptions",
    "install",
    "install_online",
    "make_experience_maker",
    "make_trainer",
    "patch_actor",
]
