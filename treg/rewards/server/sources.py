"""Sources of token rewards that log-probs alone do not serve."""

from collections.abc import Iterator, Mapping
from typing import Any

from treg.rewards.registry import make_options

# the source, and why
REFUSED = {
    "implicit": "compares the weights' own log-probs with those of models that run beside them",
    "entropy": "needs the entropy of each distribution, and servers give log-probs of tokens alone",
}


def sources_of(name: str, options: Mapping[str, Any]) -> Iterator[str]:
    """The names of a source and of those that it takes the rewards of.

    name, options: as of `treg.rewards.load_source`.
    """
    yield name
    made = make_options(name, options)
    for entry in getattr(made, "entries", ()):
        yield from sources_of(entry.name, entry.options)
    if hasattr(made, "inner_options"):
        yield from sources_of(made.of, made.inner_options)


def check_sources(name: str, options: Mapping[str, Any]) -> None:
    """ValueError where a source, or one that it takes the rewards of, needs the model itself."""
    for found in sources_of(name, options):
        if found in REFUSED:
            raise ValueError(
                "rewards: expected a source that a served model is enough for, such as "
                f"contrastive or surprise, got {found!r}, which {REFUSED[found]}; run it without "
                "--server, with a folder as --model"
            )
