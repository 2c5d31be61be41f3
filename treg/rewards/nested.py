"""Sources that work on the token rewards of another source, which `of` names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from treg.data import RowProblem
from treg.data.reading import json_object
from treg.rewards.base import Context, check_response, score_once
from treg.rewards.registry import load_source, make_options, streams_given
from treg.rewards.response import Response


@dataclass(frozen=True)
class NestedOptions:
    """of: the other source, a name as `--rewards` takes it. of_options: values of its options by
    name, or the same as JSON.

    Raises:
        ValueError: no such source, options that it refuses, one that gives no token rewards, or
            that is this source again, at whatever depth.
    """

    of: str = field(
        default="contrastive", metadata={"help": "The source whose token rewards are taken."}
    )
    of_options: str | dict[str, Any] | None = field(
        default=None, metadata={"help": "Its options by name, a JSON object."}
    )

    def __post_init__(self):
        options = self.inner_options
        try:
            streams = streams_given(self.of, options)
        except ValueError as error:
            raise ValueError(
                f"{error}; options of {self.of!r} go into of_options, as JSON: "
                """--rewards.of_options '{"NAME": VALUE}'"""
            ) from error
        if "token_rewards" not in streams:
            raise ValueError(
                f"of: expected a source of token_rewards, got {self.of!r}, which gives "
                f"{', '.join(streams)}"
            )
        inner = make_options(self.of, self.inner_options)
        while isinstance(inner, NestedOptions):
            if type(inner) is type(self):
                raise ValueError(f"of: expected another source than this one, got {self.of!r}")
            inner = make_options(inner.of, inner.inner_options)

    @property
    def inner_options(self) -> dict[str, Any]:
        return json_object("of_options", self.of_options)


class NestedSource:
    """What such sources have in common."""

    def __init__(self, options: NestedOptions, context: Context):
        self.of = options.of
        self.context = context
        self.inner = load_source(options.of, options.inner_options, context)

    def settings(self) -> dict[str, Any]:
        """Those of the other source, under names that begin with "of."."""
        settings = {f"of.{name}": value for name, value in self.inner.settings().items()}
        return {"of": self.of} | settings

    def check(self, response: Response) -> RowProblem | None:
        return check_response(self.inner, response)

    def rewards(self, responses: Sequence[Response]) -> list[Tensor]:
        """The other source's token rewards, [T] float32 of each response."""
        found = score_once(self.inner, responses, self.context)
        return [streams["token_rewards"] for streams in found]
