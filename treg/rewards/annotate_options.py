"""How a preference file is annotated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treg.data import EncodeOptions
from treg.rewards.contrastive import ContrastivePrompts
from treg.rewards.kept import check_names
from treg.rewards.names import DEFAULT_SOURCE
from treg.rewards.registry import streams_given
from treg.rewards.shaping import Step, parse_steps, shaped_streams


@dataclass(frozen=True)
class AnnotateOptions:
    """How a preference file is annotated.

    encode: how rows become ids.
    prompts: the option of that name of the default source, contrastive prompts.
    tokens_per_batch: tokens of one forward, with padding.
    per_token: keep the reference's log-prob of each token, which token-weighted margins and
        `treg/alignment` need.
    share_prefix: run what rows begin with once (see `treg.rewards.scorer`).
    rewards: the source, a key of `treg.rewards.SOURCES` or "package.module:Class".
    rewards_options: values of the fields of the source's Options.
    reference: keep the reference's log-probs; objectives without a reference need none.
    shaping: steps such as ("centre", "clip=0.5") over the source's streams, see
        `treg.rewards.shaping`; weights stay as they are.
    keep_columns: columns of the source that are passed on into the file: numbers, strings, or lists
        of them.
    """

    encode: EncodeOptions = field(default_factory=EncodeOptions)
    prompts: ContrastivePrompts = field(default_factory=ContrastivePrompts)
    tokens_per_batch: int = 16384
    per_token: bool = False
    share_prefix: bool = True
    rewards: str = DEFAULT_SOURCE
    rewards_options: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = True
    shaping: Sequence[str] = ()
    keep_columns: Sequence[str] = ()

    def __post_init__(self):
        if not isinstance(self.tokens_per_batch, int) or self.tokens_per_batch < 1:
            raise ValueError(
                f"tokens_per_batch: expected a positive integer, got {self.tokens_per_batch!r}"
            )
        if self.per_token and not self.reference:
            raise ValueError(
                "per_token: expected False without the reference's log-probs, got True; set "
                "reference=True"
            )
        # refused here, before a model is loaded
        streams = streams_given(self.rewards, self.source_options)
        check_names(self.keep_columns, streams)
        if self.steps and not shaped_streams(streams):
            raise ValueError(
                f"shape: expected no steps for {self.rewards!r}, which gives {', '.join(streams)} "
                f"alone, got {', '.join(map(str, self.steps))}"
            )

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of shaping."""
        return parse_steps(self.shaping)

    @property
    def source_options(self) -> dict[str, Any]:
        """The options of the source by name, prompts among them where they are not the default."""
        given = dict(self.rewards_options)
        if self.prompts != ContrastivePrompts():
            if "prompts" in given:
                raise ValueError(
                    "prompts: expected them either in prompts or in rewards_options, got both"
                )
            given["prompts"] = self.prompts
        return given
