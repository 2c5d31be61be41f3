"""Controls: rewards that know nothing of the answer. What a source is worth is what it does beyond
them.

    constant    r_t = value
    random      r_t ~ Normal(0, spread^2)
    shuffled    the rewards of another source, permuted within what each response says

What ends a response gets 0 from the first two; shuffled leaves there what the other source gives
it. The random ones are functions of the response's ids and the seed alone: neither batches nor a
restart change a bit.
"""

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from treg.data import RowProblem
from treg.rewards.base import Context, check_number
from treg.rewards.nested import NestedOptions, NestedSource
from treg.rewards.response import Response


@dataclass(frozen=True)
class ConstantOptions:
    """value: the reward of every token."""

    value: float = field(default=0.5, metadata={"help": "The reward of every token."})

    def __post_init__(self):
        check_number("value", self.value)


class _OfContent(abc.ABC):
    """Rewards of a response's content that no model has a part in; what ends it gets 0."""

    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: Any, context: Context):
        self.options = options

    def settings(self) -> dict[str, Any]:
        return asdict(self.options)

    def check(self, response: Response) -> RowProblem | None:
        return None

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        found = []
        for response in responses:
            rewards = torch.zeros(len(response.ids))
            rewards[response.judged] = self._content(response).float()
            found.append({"token_rewards": rewards})
        return found

    @abc.abstractmethod
    def _content(self, response: Response) -> Tensor:
        """[n] floating, for the tokens of `Response.judged`."""


class ConstantSource(_OfContent):
    """The same reward for every token of every response."""

    Options: ClassVar[type] = ConstantOptions

    def _content(self, response: Response) -> Tensor:
        return torch.full((len(response.judged),), float(self.options.value))


@dataclass(frozen=True)
class RandomOptions:
    """seed: of the random numbers. spread: their standard deviation."""

    seed: int = field(default=0, metadata={"help": "Seed of the random numbers."})
    spread: float = field(default=0.1, metadata={"help": "Standard deviation of the rewards."})

    def __post_init__(self):
        _check_seed(self.seed)
        check_number("spread", self.spread, positive=True)


class RandomSource(_OfContent):
    """Normal random numbers around 0."""

    Options: ClassVar[type] = RandomOptions

    def _content(self, response: Response) -> Tensor:
        numbers = _generator(self.options.seed, response).standard_normal(len(response.judged))
        return torch.from_numpy(numbers * self.options.spread)


@dataclass(frozen=True)
class ShuffledOptions(NestedOptions):
    """seed: of the permutations."""

    seed: int = field(default=0, metadata={"help": "Seed of the permutations."})

    def __post_init__(self):
        super().__post_init__()
        _check_seed(self.seed)


class ShuffledSource(NestedSource):
    """Another source's rewards, as large as they are and in the wrong places."""

    Options: ClassVar[type] = ShuffledOptions
    streams: ClassVar[tuple[str, ...]] = ("token_rewards",)

    def __init__(self, options: ShuffledOptions, context: Context):
        super().__init__(options, context)
        self.seed = options.seed

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"seed": self.seed}

    def score(self, responses: Sequence[Response]) -> list[dict[str, Tensor]]:
        found = []
        for response, rewards in zip(responses, self.rewards(responses), strict=True):
            judged = response.judged
            order = _generator(self.seed, response).permutation(len(judged))
            moved = rewards.clone()
            moved[judged] = rewards[judged[order]]
            found.append({"token_rewards": moved})
        return found


def _generator(seed: int, response: Response) -> np.random.Generator:
    """Random numbers that the seed and the response's ids determine."""
    text = f"{seed} ".encode() + response.ids.astype("<i4").tobytes()
    digest = hashlib.sha256(text).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected an integer, got {seed!r}")
