"""Sources of token rewards, one file each. A source gives every token of a response a number."""

from treg.rewards.base import Context, TokenRewardSource
from treg.rewards.contrastive import (
    ContrastiveOptions,
    ContrastivePrompts,
    ContrastiveSource,
    contrastive_rewards,
)
from treg.rewards.controls import ConstantSource, RandomSource, ShuffledSource
from treg.rewards.edits import EditsSource
from treg.rewards.entropy import EntropySource
from treg.rewards.implicit import ImplicitSource
from treg.rewards.messagewise import MessagewiseSource
from treg.rewards.redistribution import RedistributionSource
from treg.rewards.registry import (
    DEFAULT_SOURCE,
    SOURCES,
    columns_read,
    load_source,
    make_options,
    nearest,
    source_class,
    streams_given,
)
from treg.rewards.response import Response
from treg.rewards.several import SeveralSource
from treg.rewards.spans import SpansSource
from treg.rewards.surprise import SurpriseSource

__all__ = [
    "DEFAULT_SOURCE",
    "SOURCES",
    "Context",
    "ContrastiveOptions",
    "ContrastivePrompts",
    "Response",
    "TokenRewardSource",
    "columns_read",
    "contrastive_rewards",
    "load_source",
    "make_options",
    "nearest",
    "source_class",
    "streams_given",
]

SOURCES |= {
    "contrastive": ContrastiveSource,
    "redistribution": RedistributionSource,
    "implicit": ImplicitSource,
    "messagewise": MessagewiseSource,
    "entropy": EntropySource,
    "surprise": SurpriseSource,
    "spans": SpansSource,
    "edits": EditsSource,
    "several": SeveralSource,
    "constant": ConstantSource,
    "random": RandomSource,
    "shuffled": ShuffledSource,
}
