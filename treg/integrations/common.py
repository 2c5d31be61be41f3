"""What several of the files here check of a trainer and its options."""

import inspect
from pathlib import Path

from treg.rewards.lookup import TokenRewards


def parameters_of(kind: type, name: str) -> list[str] | str:
    """Names of a method's parameters, self first; "none" without such a method."""
    method = getattr(kind, name, None)
    return list(inspect.signature(method).parameters) if method else "none"


def rewards_source(
    token_rewards: str | Path | TokenRewards | None, alpha: float, tail: int
) -> TokenRewards | None:
    """Where rewards are looked up, None for alpha 0. ValueError: alpha < 0, or > 0 without a
    source.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha: expected a number >= 0, got {alpha!r}")
    if token_rewards is None and alpha:
        raise ValueError(
            f"token_rewards: expected an annotated file for alpha={alpha}, got None; run `treg "
            "annotate`"
        )
    if token_rewards is None or not alpha:
        return None
    if isinstance(token_rewards, TokenRewards):
        return token_rewards
    return TokenRewards(token_rewards, tail=tail)
