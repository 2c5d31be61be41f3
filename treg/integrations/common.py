"""What several of the files here check of a trainer and its options."""

import inspect
from pathlib import Path

from treg.data.annotated import is_annotated, read_meta, streams_of
from treg.data.tables import source_name
from treg.rewards.lookup import TokenRewards


def parameters_of(kind: type, name: str) -> list[str] | str:
    """Names of a method's parameters, self first; "none" without such a method."""
    method = getattr(kind, name, None)
    return list(inspect.signature(method).parameters) if method else "none"


def rewards_source(
    token_rewards: str | Path | TokenRewards | None, alpha: float, tail: int
) -> TokenRewards | None:
    """Where rewards are looked up, None for alpha 0. ValueError: alpha < 0, or > 0 without a
    source; what `looked_up` refuses.
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
    return looked_up(token_rewards, tail)


def looked_up(token_rewards: str | Path | TokenRewards, tail: int) -> TokenRewards:
    """The rewards of an annotated file. ValueError: it has token weights as well, which a trainer's
    own margin does not take.
    """
    if isinstance(token_rewards, TokenRewards):
        return token_rewards
    name = source_name(token_rewards)
    if is_annotated(token_rewards) and "token_weights" in streams_of(read_meta(token_rewards)):
        raise ValueError(
            f"token_rewards: expected a file without token_weights, got {name}, which has "
            "them; annotate without, or train with treg.trainer.TRegTrainer, which takes both"
        )
    return TokenRewards(token_rewards, tail=tail)
