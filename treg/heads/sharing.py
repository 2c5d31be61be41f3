"""A prompt run once: shared rows out of ordinary batches, and the check of a first batch that
nothing changes but rounding.

A batch of pairs has 2B sequences, the B chosen ones first, and i and B + i share what they begin
with. In shared rows (`treg.data.tree`) that stands once: P + R_w + R_l tokens of the model where
the sequences alone have 2P + R_w + R_l. Of a batch of other sequences, such as the G completions of
each prompt in online training, those that begin alike are found: P + G R tokens instead of
G (P + R).
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treg.data.tree import (
    IntArray,
    groups_alike,
    model_inputs,
    places_in,
    shared_groups,
    shared_pairs,
)
from treg.heads.attention import check_attention
from treg.heads.checks import evaluated
from treg.heads.install import check_branches, run_head
from treg.heads.spec import HeadSpec, Operands, name_of
from treg.ops import linear_logprobs

log = logging.getLogger(__name__)

# of the spread that padding makes, how much sharing may make: of the root of the mean square, and
# of the largest difference
TIMES_RMS, TIMES_MAX = 4, 8
# nats: a root of the mean square that is rounding whatever padding makes, and one that is not.
# What depends on places in a row depends on padding too, so its spread alone proves nothing.
LIMITS = {
    torch.float64: (1e-4, 1e-3),
    torch.float32: (1e-4, 1e-3),
    torch.float16: (3e-3, 2e-2),
    torch.bfloat16: (2e-2, 2e-1),
}
CHECKED = 8  # sequences of the first batch
ELSEWHERE = "another process found a difference"


@dataclass(frozen=True)
class SharedRows:
    """A batch in rows that its sequences share.

    inputs: what a model whose head is installed takes: input_ids and position_ids [rows, width],
        and branches [n, 5].
    places: int64, of the shape of the batch's input_ids: where each of its tokens stands in the
        flattened rows; 0 where there is padding.
    """

    inputs: dict[str, Any]
    places: Tensor

    def apart(self, hidden: Tensor, places: Tensor | None = None) -> Tensor:
        """Hidden states [rows, width, D] of these rows as those of the batch, [S, T, D]; of
        padding what stands anywhere.

        Args:
            places: those of some tokens alone, of any shape, which is then the result's instead of
                [S, T].
        """
        places = self.places if places is None else places
        return hidden.flatten(0, 1)[places.to(hidden.device)]


def share_prompts(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    pairs: bool = True,
    packed: bool | None = None,
) -> SharedRows:
    """A batch in rows that its sequences share.

    Args:
        input_ids: [S, T], padded on either side; or [1, L], all S sequences one after the other,
            then position_ids tell where they begin.
        attention_mask: of the shape of input_ids, 0 where there is padding; None: there is none.
        position_ids: of a row of several sequences, [1, L]: 0 where one begins. Of padded rows they
            are needed where padding is on the left: without them a model counts it as tokens.
        pairs: whether S is 2B, the B chosen ones first, and i and B + i share what they begin with.
            Else the sequences come in any order, and those that begin alike are found.
        packed: whether all goes into one row, without padding; else what shares a beginning has a
            row. None: as the batch has it. One row costs least where attention runs branch by
            branch (sdpa, flex_attention), but not where it takes a mask of the whole row (eager).
    Returns:
        Rows on the device of input_ids: [B, T'] of pairs, [groups, T'] or [1, L']. They are made by
        the host, which waits for tensors of a device once each.
    Raises:
        ValueError: of pairs an odd number of sequences; an empty sequence; an attention_mask of
            another shape, or with holes; positions that are not 0, 1, 2, ... in each sequence, or
            none beside padding on the left.
    """
    places = _sequences(input_ids, attention_mask, position_ids)
    packed = len(input_ids) == 1 if packed is None else packed
    if pairs and len(places) % 2:
        raise ValueError(
            "input_ids: expected an even number of sequences, the chosen ones first, got the "
            f"lengths {list(map(len, places))}; other ones take pairs=False"
        )
    ids = input_ids.cpu().numpy().reshape(-1)
    sequences = [ids[x] for x in places]
    if pairs:
        tree = shared_pairs(sequences, packed=packed)
    else:
        tree = shared_groups(sequences, groups_alike(sequences), packed=packed)
    found = places_in(tree, places, ids.size)
    device = input_ids.device
    inputs = model_inputs(tree, device)
    return SharedRows(inputs, torch.from_numpy(found).reshape(input_ids.shape).to(device))


def _sequences(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> list[IntArray]:
    """The places of each sequence's tokens in the flattened rows."""
    rows, width = input_ids.shape
    kept = np.ones((rows, width), dtype=bool)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {list(input_ids.shape)}, got "
                f"{list(attention_mask.shape)}; a mask of pairs of tokens cannot be shared"
            )
        kept = attention_mask.cpu().numpy() != 0
    places, positions = np.flatnonzero(kept), None
    if position_ids is not None:
        positions = np.broadcast_to(position_ids.cpu().numpy(), kept.shape)[kept]
    if rows == 1 and positions is not None:
        starts = np.flatnonzero(positions == 0)
        sequences: list[IntArray] = [*np.split(places, starts[starts > 0])]
    else:
        sequences = [*np.split(places, np.cumsum(kept.sum(1))[:-1])]
    if not all(map(len, sequences)):
        raise ValueError(
            "input_ids: expected sequences with tokens, got the lengths "
            f"{list(map(len, sequences))}"
        )
    if any(len(x) != x[-1] - x[0] + 1 for x in sequences):
        raise ValueError(
            "attention_mask: expected padding at the ends of a sequence alone, got some within one"
        )
    if positions is None and not kept[:, 0].all():
        raise ValueError(
            "position_ids: expected some beside padding on the left, got none; give "
            "(attention_mask.cumsum(1) - 1).clamp(min=0)"
        )
    if positions is not None:
        expected = np.concatenate([np.arange(len(x)) for x in sequences])
        if not np.array_equal(positions, expected):
            raise ValueError(
                "position_ids: expected 0, 1, 2, ... from the first token of each sequence, got "
                f"{_shortened(positions)}; leave them out for padded rows"
            )
    return sequences


def _shortened(values: IntArray) -> str:
    return f"[{', '.join(map(str, values[:12].tolist()))}{', ...' if len(values) > 12 else ''}]"


@dataclass
class PromptSharing:
    """Whether a trainer's batches share prompts, settled at the first of them.

    asked: True: whatever speaks against it is an error. None: it is a warning, and prompts are not
        shared.
    on: whether they are shared.
    option: what asks for it, for errors.
    """

    asked: bool | None
    on: bool = True
    option: str = "share_prompt"
    settled: bool = field(default=False, init=False)

    def give_up(self, reason: Exception | str) -> None:
        """Do without, unless it was asked for.

        Raises:
            ValueError: it was asked for.
        """
        if self.asked:
            cause = reason if isinstance(reason, Exception) else None
            raise ValueError(f"{self.option}: {reason}; set {self.option}=False") from cause
        log.warning("%s is off, each answer runs its prompt: %s", self.option, reason)
        self.on = False

    def try_on(self, spec: HeadSpec) -> None:
        """Give up if a few tokens already show that a model cannot.

        Raises:
            ValueError: as `give_up`.
        """
        try:
            check_attention(spec.model)  # of which the check of a few tokens tries another one
        except ValueError as error:
            self.give_up(ValueError(f"{name_of(spec.model)}: {error}"))
            return
        try:
            check_branches(spec)
        except ValueError as error:
            self.give_up(error)

    def settle(
        self,
        model: nn.Module,
        apart: Mapping[str, Any],
        shared: SharedRows | Callable[[], SharedRows],
        dtype: torch.dtype,
        agreed: Callable[[bool], bool] = bool,
    ) -> None:
        """Compare the log-probs of the first batch, some sequences of it, with those of its
        sequences apart.

        Args:
            model: as it is trained, wrapped or not; its head is installed.
            apart: input_ids and attention_mask or position_ids, as `share_prompts` takes them.
            shared: the same in rows that they share; or what makes these, and what it cannot put
                into rows speaks against sharing.
            dtype: what the model computes in.
            agreed: whether all processes have found so, from whether this one has.
        Raises:
            ValueError: they differ by more than padding on one side from padding on the other, and
                sharing was asked for.
        """
        self.settled = True
        problem = ""
        if not isinstance(shared, SharedRows):
            try:
                shared = shared()
            except ValueError as error:
                problem = str(error)
            # before the forwards, in which processes wait for each other
            if not agreed(not problem):
                self.give_up(problem or ELSEWHERE)
                return
        assert isinstance(shared, SharedRows)
        try:
            found = compare(model, apart, shared)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if not found.same(dtype):
                problem = f"the first batch's log-probs are not the same: {found}"
        if not agreed(not problem):
            self.give_up(problem or ELSEWHERE)


@dataclass(frozen=True)
class Comparison:
    """How log-probs differ, in nats: rms and largest between shared and apart, and between padding
    on the right and on the left.
    """

    rms: float
    largest: float
    padding_rms: float
    padding_largest: float

    def same(self, dtype: torch.dtype) -> bool:
        """Whether sharing changes no more than roundings of dtype do."""
        least, most = LIMITS[precision_of(dtype)]
        # not ">": a difference that is NaN is none
        return self.rms <= min(max(TIMES_RMS * self.padding_rms, least), most) and (
            self.largest <= max(TIMES_MAX * self.padding_largest, 10 * least)
        )

    def __str__(self) -> str:
        return (
            f"they differ by {self.rms:.2e} nats (at most {self.largest:.2e}), and padding on the "
            f"left or right by {self.padding_rms:.2e} (at most {self.padding_largest:.2e})"
        )


def precision_of(dtype: torch.dtype) -> torch.dtype:
    """dtype, or what has the precision of float32's products on this machine."""
    tf32 = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if tf32 and dtype == torch.float32 else dtype


@torch.no_grad()
def compare(model: nn.Module, apart: Mapping[str, Any], shared: SharedRows) -> Comparison:
    """The log-probs of some sequences of a batch in rows that they share, and apart with padding on
    the right and on the left. The model runs in eval mode, three times, whatever the batch.
    """
    ids = apart["input_ids"]
    sequences = _sequences(ids, apart.get("attention_mask"), apart.get("position_ids"))
    # the longest among them: of some models it says what positions mean
    by_length = sorted(sequences, key=len)
    few = CHECKED // 2
    chosen = by_length if len(by_length) <= CHECKED else by_length[:few] + by_length[-few:]
    flat, places = ids.reshape(-1), shared.places.reshape(-1)
    tokens = [flat[torch.from_numpy(x).to(flat.device)] for x in chosen]
    targets = torch.cat([x[1:] for x in tokens])
    rows = torch.cat([places[torch.from_numpy(x[:-1]).to(places.device)] for x in chosen])
    with evaluated(model):
        right = _padded_logprobs(model, tokens, targets, left=False)
        left = _padded_logprobs(model, tokens, targets, left=True)
        with_sharing = _logprobs(model, shared.inputs, rows, targets)
    return Comparison(*spread(with_sharing, right), *spread(left, right))


def spread(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Root of the mean square, and largest, of differences of log-probs."""
    if not found.numel():
        return 0.0, 0.0
    # minus infinity in both: a token that the model rules out
    differences = torch.where(found == expected, 0.0, found - expected)
    return math.sqrt(differences.square().mean().item()), differences.abs().max().item()


def _padded_logprobs(
    model: nn.Module, tokens: list[Tensor], targets: Tensor, *, left: bool
) -> Tensor:
    """Log-probs of the tokens of sequences after their first ones, as padded rows."""
    width = max(map(len, tokens))
    ids = tokens[0].new_zeros(len(tokens), width)
    mask = torch.zeros_like(ids)
    rows = []
    for i, x in enumerate(tokens):
        start = width - len(x) if left else 0
        ids[i, start : start + len(x)] = x
        mask[i, start : start + len(x)] = 1
        rows.append(torch.arange(len(x) - 1, device=ids.device) + i * width + start)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if left:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return _logprobs(model, inputs, torch.cat(rows), targets)


def _logprobs(model: nn.Module, inputs: Mapping[str, Any], rows: Tensor, targets: Tensor) -> Tensor:
    def head_fn(hidden: Tensor, operands: Operands) -> Tensor:
        states = hidden.flatten(0, 1)[rows.to(hidden.device)]
        return linear_logprobs(states, target=targets.to(states.device), **operands).logprobs

    return run_head(model, head_fn, **inputs).double()
