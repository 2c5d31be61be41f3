r"""verl with treg: its fused head exact and for any model, and token rewards of contrastive prompts
in PPO.

    PYTHONPATH=examples python -m verl.trainer.main_ppo ... \
        actor_rollout_ref.model.external_lib=verl_treg \
        actor_rollout_ref.model.use_fused_kernels=True \
        actor_rollout_ref.model.fused_kernel_options.impl_backend=triton \
        reward.reward_manager.source=importlib \
        reward.reward_manager.module.path=pkg://treg.integrations.verl \
        reward.reward_manager.name=TRegRewardManager \
        +reward.reward_kwargs.treg.model=REFERENCE +reward.reward_kwargs.treg.alpha=0.1 \
        reward.num_workers=1

verl imports this module in each of its workers. The first line alone is the head, the second alone
the rewards.
"""

from treg.integrations import verl

verl.install_op()
verl.install_token_scores()
