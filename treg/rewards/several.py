"""Several sources in one pass, one stream each; and their weighted sum.

    s_t              what a source gives, after its own steps of shaping     the stream of its name
    token_rewards_t  = sum over streams of weight * s_t                      with `mix`

The forward passes that sources have in common run once, and so does a source that is named twice
with the same options, here or as what another one works on. A response that one of them refuses is
left out.

In YAML:

    rewards:
      name: several
      sources:
        - {stream: contrastive, name: contrastive}
        - {stream: surprise, name: surprise, unit: word, shape: [centre, clip=2]}
      mix: {contrastive: 1.0, surprise: 0.1}

On the command line a source is STREAM=NAME, a NAME that is the stream's as well, or a JSON object
with the same keys; a weight is STREAM=NUMBER.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from treg.data import RowProblem
from treg.data.annotated import NO_STREAMS
from treg.data.reading import json_object
from treg.rewards.base import Context, check_response, score_once
from treg.rewards.options import numbers_by_name
from treg.rewards.registry import load_source, make_options, nearest, source_class, streams_given
from treg.rewards.response import Response
from treg.rewards.shaping import Step, parse_steps, rewarded, shape

KEYS = ("stream", "name", "take", "shape")


@dataclass(frozen=True)
class Entry:
    """One source: the stream that it makes, its name and options, which of its own streams is
    taken, and how that is shaped.
    """

    stream: str
    name: str
    options: Mapping[str, Any]
    take: str
    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, given: Any) -> "Entry":
        """From what `sources` holds.

        Raises:
            ValueError: what is no source, or what it refuses.
        """
        values = _entry_values(given)
        missing = [key for key in ("stream", "name") if not isinstance(values.get(key), str)]
        if missing:
            raise ValueError(f"sources: expected {' and '.join(missing)} in {given!r}, found none")
        stream, name = values.pop("stream"), values.pop("name")
        if not stream.isidentifier() or stream in NO_STREAMS:
            raise ValueError(
                f"sources: expected a name that can be part of a column's, got {stream!r}; give "
                "STREAM=NAME"
            )
        own = {x.name for x in fields(source_class(name).Options)} & {*KEYS}
        if own:
            raise ValueError(
                f"sources: expected a source without options named {', '.join(KEYS)}, which say "
                f"something else here, got {name!r} with {', '.join(sorted(own))}; rename them"
            )
        steps = parse_steps(values.pop("shape", None))
        take = values.pop("take", None)
        streams = streams_given(name, values)
        if take is None:
            take = "token_rewards" if "token_rewards" in streams else streams[0]
        if take not in streams:
            raise ValueError(
                f"sources: {stream}: expected take to be one of {', '.join(streams)}, got {take!r}"
            )
        return cls(stream, name, values, take, steps)


def _entry_values(given: Any) -> dict[str, Any]:
    if isinstance(given, str) and not given.lstrip().startswith("{"):
        stream, equals, name = given.partition("=")
        return {"stream": stream, "name": name if equals else stream}
    return json_object("sources", given)


@dataclass(frozen=True)
class SeveralOptions:
    """sources: of each the keys stream and name, shape and take where they are wanted, and its own
    options; or the same as JSON, or STREAM=NAME. take: which of a source's streams, by default its
    token_rewards. mix: weights of streams, whose sum is token_rewards.
    """

    sources: list[str | dict[str, Any]] | str | dict[str, Any] = field(
        default_factory=lambda: ["contrastive", "surprise"],
        metadata={
            "help": "Sources: STREAM=NAME, or JSON whose other keys are the source's options: "
            '{"stream": "red", "name": "redistribution", "model": "FOLDER", "shape": ["centre"]}.'
        },
    )
    mix: list[str] | dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "token_rewards as a weighted sum of streams: STREAM=WEIGHT."},
    )

    def __post_init__(self):
        names = [entry.stream for entry in self.entries]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"sources: expected sources of different streams, got {', '.join(names) or 'none'}"
            )
        for entry in self.entries:
            if source_class(entry.name).Options is type(self):
                raise ValueError(f"sources: expected single sources, got {entry.name!r} within it")
            make_options(entry.name, entry.options)
        for stream in self.weights:
            if stream not in names:
                raise ValueError(
                    f"mix: expected streams among {', '.join(names)}, got {stream!r}"
                    f"{nearest(stream, names)}"
                )
        if self.weights and "token_rewards" in names:
            raise ValueError(
                "mix: expected no source with the stream token_rewards beside it, got one; give "
                "that stream another name"
            )

    @cached_property
    def entries(self) -> list[Entry]:
        given = self.sources
        return [Entry.parse(x) for x in ([given] if isinstance(given, (str, dict)) else given)]

    @cached_property
    def weights(self) -> dict[str, float]:
        """The weight of each stream in the mix."""
        return numbers_by_name("mix", self.mix, "STREAM=NUMBER")

    @property
    def streams(self) -> tuple[str, ...]:
        mixed = ("token_rewards",) if self.weights else ()
        return (*mixed, *(entry.stream for entry in self.entries))


class SeveralSource:
    """Streams of several sources."""

    Options: ClassVar[type] = SeveralOptions

    def __init__(self, options: SeveralOptions, context: Context):
        self.options = options
        self.context = context
        self.sources = [load_source(x.name, x.options, context) for x in options.entries]

    @property
    def streams(self) -> tuple[str, ...]:
        return self.options.streams

    def settings(self) -> dict[str, Any]:
        return {"sources": self.described, "mix": self.options.weights}

    @cached_property
    def described(self) -> dict[str, dict[str, Any]]:
        """Of each stream of a source: the source, its settings, the shaping, and what is taken.
        Made once: settings may hold fingerprints of models.
        """
        found = {}
        for entry, source in zip(self.options.entries, self.sources, strict=True):
            found[entry.stream] = {
                "source": entry.name,
                "settings": source.settings(),
                "shaping": list(map(str, entry.steps)),
                "take": entry.take,
            }
        return found

    def check(self, response: Response) -> RowProblem | None:
        """The first problem that a source has."""
        problems = (check_response(source, response) for source in self.sources)
        return next((problem for problem in problems if problem is not None), None)

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = [{} for _ in responses]
        for entry, source in zip(self.options.entries, self.sources, strict=True):
            scored = score_once(source, responses, self.context)
            for response, streams, values in zip(responses, found, scored, strict=True):
                taken = values[entry.take]
                streams[entry.stream] = shape(taken, rewarded(response, taken), entry.steps)
        if self.options.weights:
            for streams in found:
                streams["token_rewards"] = self._mixed(streams)
        return found

    def _mixed(self, streams: Mapping[str, Tensor]) -> Tensor:
        weights = self.options.weights.items()
        terms = [weight * streams[stream] for stream, weight in weights]
        return sum(terms[1:], terms[0])
