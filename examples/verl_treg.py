r"""verl with treg: its fused head exact and for any model, token rewards of any source, and
advantages that keep tokens apart.

    export VERL_USE_EXTERNAL_MODULES=verl_treg PYTHONPATH=examples
    python -m verl.trainer.main_ppo ... \
        actor_rollout_ref.model.use_fused_kernels=True \
        actor_rollout_ref.model.fused_kernel_options.impl_backend=triton \
        reward.reward_manager.source=importlib \
        reward.reward_manager.module.path=pkg://treg.integrations.verl \
        reward.reward_manager.name=TRegRewardManager reward.num_workers=1 \
        +reward.reward_kwargs.treg.rewards=redistribution \
        +reward.reward_kwargs.treg.rewards_options.model=REWARD_MODEL \
        +reward.reward_kwargs.treg.base=none \
        algorithm.adv_estimator=treg_process

That is RED, arXiv 2411.08302, in GRPO with process supervision: the reward model's score of a
response, redistributed over its tokens, is all the reward there is. For T-REG's contrastive prompts
beside verl's own score, +reward.reward_kwargs.treg.model=REFERENCE takes the place of the three
lines with a plus.

verl imports this module in each of its processes, also on other machines if they have both
variables. The first line alone is the head, the second the rewards, the third the advantages.
"""

from treg.integrations import verl

verl.install_op()
verl.install_token_scores()
verl.install_advantages()
