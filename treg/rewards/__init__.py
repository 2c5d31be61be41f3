"""Sources of token rewards, one file each. A source gives rhat_t for every token of a response."""

from treg.rewards.contrastive import ContrastivePrompts, contrastive_rewards

__all__ = ["ContrastivePrompts", "contrastive_rewards"]
