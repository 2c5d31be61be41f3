"""verl: its fused head exact and for any model, token rewards of any source, advantages of tokens.

A module that verl imports in each of its processes, say treg_verl.py on their PYTHONPATH:

    from treg.integrations import verl

    verl.install_op()
    verl.install_token_scores()    # for TRegRewardManager
    verl.install_advantages()      # treg_grpo, treg_process, treg_rloo, treg_returns, ...

verl imports it where the environment says VERL_USE_EXTERNAL_MODULES=treg_verl, which Ray's
processes must have too (+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES), and
in the workers of the models with actor_rollout_ref.model.external_lib=treg_verl. `install_op` takes
effect with actor_rollout_ref.model.use_fused_kernels=True and impl_backend=triton. On the command
line of verl.trainer.main_ppo:

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://treg.integrations.verl
    reward.reward_manager.name=TRegRewardManager
    +reward.reward_kwargs.treg.model=REFERENCE
    algorithm.adv_estimator=treg_process

Written against verl 0.9.1, whose kernel's signature is the same on its main branch of August 2026.
"""

from treg.integrations.verl.advantages import AdvantageOptions, install_advantages
from treg.integrations.verl.head import install_op, linear_cross_entropy
from treg.integrations.verl.rewards import (
    RewardOptions,
    TRegRewardManager,
    install_token_scores,
)

__all__ = [
    "AdvantageOptions",
    "RewardOptions",
    "TRegRewardManager",
    "install_advantages",
    "install_op",
    "install_token_scores",
    "linear_cross_entropy",
]
