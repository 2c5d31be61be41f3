"""Attention in rows whose tokens see their own branch alone (`treg.data.tree`).

transformers' models ask for their attention masks in one place, by a function of two positions
which says whether one sees the other: causal, sliding, chunked. Within `branching` that function is
asked about positions in a token's own sequence, and answers no across branches. So each layer has
the mask that it would have for every sequence alone.

With sdpa no mask of a whole row is made: branches of about one size are one call of the model's own
attention function, each one's queries over the keys of its path. A beginning is then plain causal
attention, with the kernel of that.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from treg.data.tree import LENGTH, PARENT, SHARED, START, IntArray
from treg.heads.tables import BY_PLACE

# attention implementations of transformers that take any mask
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
# types of layers that see by a mask of positions alone, in configs that name them
LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# a call's padded queries times keys over those that count, and its keys over the places in the rows
MOST_PADDING, MOST_KEYS = 1.25, 2
MaskFunction = Callable[[Any, Any, Any, Any], Any]  # (batch, head, query, key) -> may it see it

_BRANCHES: ContextVar["Branches | None"] = ContextVar("branches", default=None)


def run_branching(
    model: PreTrainedModel, backbone: nn.Module, branches: IntArray, inputs: dict[str, Any]
) -> Any:
    """What a backbone gives of rows of branches.

    Args:
        model: what the backbone is part of, for errors.
        branches: [n, 5] int64, see `treg.data.tree`.
        inputs: of the backbone: input_ids and position_ids [rows, width], no attention_mask.
    Raises:
        ValueError: the model's attention takes no mask, or one that the model makes itself; inputs
            that are not those.
    """
    check_attention(model)
    if not {"input_ids", "position_ids"} <= inputs.keys() or "past_key_values" in inputs:
        raise ValueError(
            "expected input_ids and position_ids alone, got other inputs of the model, as the "
            "virtual tokens of prompt-learning adapters make them"
        )
    ids: Tensor = inputs["input_ids"]
    # of ones: without any, transformers would take positions that start over for packed sequences
    mask = torch.ones_like(ids)
    with branching(branches, *ids.shape) as found:
        result = backbone(**inputs, attention_mask=mask)
    if not found.asked:
        raise ValueError("the model makes its attention masks itself, or has none")
    return result


def check_attention(model: PreTrainedModel) -> None:
    """ValueError for an attention implementation that takes no mask of branches, and for layers
    that are known to look at more than a mask of positions.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation: expected {', '.join(IMPLEMENTATIONS)}, which take any mask, got "
            f"{config._attn_implementation!r}; load the model with attn_implementation='sdpa'"
        )
    others = sorted({*(getattr(config, "layer_types", None) or ())} - LAYERS)
    if others:
        raise ValueError(f"it has layers of type {', '.join(others)}")
    if config.model_type in BY_PLACE:
        raise ValueError(f"it has {BY_PLACE[config.model_type]}")
    if getattr(config, "attn_temperature_tuning", False):
        raise ValueError("attn_temperature_tuning scales its queries by places in the row")


@contextlib.contextmanager
def branching(branches: IntArray, rows: int, width: int) -> Iterator["Branches"]:
    """Within it, the masks that models ask for are those of branches (`treg.data.tree`) in rows of
    that width.
    """
    _register()
    found = Branches(branches, rows, width)
    token = _BRANCHES.set(found)
    try:
        yield found
    finally:
        _BRANCHES.reset(token)


class Branches:
    """The branches of a batch, as its attention needs them.

    asked: how many masks were asked for.
    """

    def __init__(self, branches: IntArray, rows: int, width: int):
        self.branches = branches
        self.rows = rows
        self.width = width
        self.asked = 0
        self._groups: dict[torch.device, tuple[list[Group], Tensor | None]] = {}

    def seen_by(self, mask_function: MaskFunction, device: torch.device | str) -> MaskFunction:
        """mask_function of positions, as one of places in the rows."""
        branch, position, limit = (x.to(device) for x in self._places)

        def seen(row: Any, head: Any, query: Any, key: Any) -> Any:
            at = position[row, key]
            own = at < limit[branch[row, query], branch[row, key]]
            return own & mask_function(row, head, position[row, query], at)

        return seen

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Branch [rows, width] and position [rows, width] of each place, and limit [n+1, n+1]: how
        many positions of a branch (column) another one (row) sees. Padding is branch n.
        """
        n = len(self.branches)
        branch = np.full((self.rows, self.width), n)
        position = np.zeros_like(branch)
        limit = np.zeros((n + 1, n + 1), dtype=np.int64)
        limit[n, n] = 1
        for b, (row, start, length, _, shared) in enumerate(self.branches):
            branch[row, start : start + length] = b
            position[row, start : start + length] = np.arange(shared, shared + length)
            limit[b, b] = shared + length
            for other, seen in self._ancestors(b):
                limit[b, other] = seen
        return torch.from_numpy(branch), torch.from_numpy(position), torch.from_numpy(limit)

    def _ancestors(self, branch: int) -> Iterator[tuple[int, int]]:
        """The branches that one goes on from, the nearest first, and how many positions of each it
        sees.
        """
        seen = int(self.branches[branch, SHARED])
        while (branch := int(self.branches[branch, PARENT])) >= 0:
            yield branch, seen
            seen = min(seen, int(self.branches[branch, SHARED]))

    @cached_property
    def paths(self) -> list[IntArray]:
        """Of each branch, the places in the flattened rows of all that its last token sees."""
        found = []
        for b, (row, start, length, _, shared) in enumerate(self.branches):
            first = row * self.width + start
            spans = [np.arange(first, first + length)]
            for other, seen in self._ancestors(b):
                own = seen - int(self.branches[other, SHARED])
                first = row * self.width + self.branches[other, START]
                spans.append(np.arange(first, first + own))
            found.append(np.concatenate(spans[::-1]))
            assert len(found[-1]) == shared + length
        return found

    def groups(self, device: torch.device) -> tuple[list["Group"], Tensor | None]:
        """The branches in groups of about one size, each for one call of attention, and where each
        token [rows * width] stands in their outputs, one after the other; None: where it is.
        """
        if device not in self._groups:
            self._groups[device] = self._grouped(device)
        return self._groups[device]

    def _grouped(self, device: torch.device) -> tuple[list["Group"], Tensor | None]:
        whole = np.array([len(path) for path in self.paths])
        own = self.branches[:, LENGTH]
        arrays, count = [], 0
        places = np.zeros(self.rows * self.width, dtype=np.int64)
        for branches in self._alike(own, whole):
            queries = np.zeros((len(branches), own[branches].max()), dtype=np.int64)
            keys = np.zeros((len(branches), whole[branches].max()), dtype=np.int64)
            for i, b in enumerate(branches):
                path, n = self.paths[b], own[b]
                queries[i, :n] = path[len(path) - n :]
                keys[i, : len(path)] = path
                places[path[len(path) - n :]] = np.arange(count, count + n)
                count += queries.shape[1]
            arrays += [queries, keys, own[branches][:, None], whole[branches][:, None]]
        *made, moved = _on_device([*arrays, places], device)
        groups = [
            Group(*made[i : i + 4], query_runs=_runs(arrays[i]), key_runs=_runs(arrays[i + 1]))
            for i in range(0, len(made), 4)
        ]
        in_order = count == len(places) and bool((places == np.arange(count)).all())
        return groups, None if in_order else moved

    def _alike(self, own: IntArray, whole: IntArray) -> list[list[int]]:
        """The branches in groups that are worth one call each: padding them to one size costs
        little, and their keys are few beside the rows. Beginnings go with beginnings.

        Args:
            own, whole: how many tokens each branch has, and sees.
        """
        found: list[list[int]] = []
        begins = self.branches[:, PARENT] < 0
        area = queries = keys = 0
        for b in np.lexsort((own, whole, ~begins)).tolist():
            n = len(found[-1]) + 1 if found else 1
            new = area + int(own[b] * whole[b])
            wider, longer = max(queries, int(own[b])), max(keys, int(whole[b]))
            padded = n * wider * longer <= MOST_PADDING * new
            few = n * longer <= MOST_KEYS * self.rows * self.width
            if found and padded and few and begins[found[-1][-1]] == begins[b]:
                found[-1].append(b)
                area, queries, keys = new, wider, longer
            else:
                found.append([b])
                area, queries, keys = int(own[b] * whole[b]), int(own[b]), int(whole[b])
        return found


def _runs(places: IntArray) -> list[slice] | None:
    """The places of one branch as slices; None: there are several branches."""
    if len(places) > 1:
        return None
    (row,) = places
    edges = np.flatnonzero(np.diff(row) != 1) + 1
    return [slice(int(x[0]), int(x[-1]) + 1) for x in np.split(row, edges)]


def _on_device(arrays: list[IntArray], device: torch.device) -> list[Tensor]:
    """Arrays of int64 on a device, by one copy that nothing waits for."""
    whole = torch.from_numpy(np.concatenate([x.ravel() for x in arrays]))
    if device.type == "cuda":
        whole = whole.pin_memory()
    parts = whole.to(device, non_blocking=True).split([x.size for x in arrays])
    return [part.view(x.shape) for part, x in zip(parts, arrays, strict=True)]


@dataclass(frozen=True)
class Group:
    """Branches for one call of attention, padded to one size.

    queries: [n, own], keys: [n, whole] int64, places in the flattened rows; of padding some place
        that is there. own, whole: how many of them count, [n, 1] int64. query_runs, key_runs: the
        same places as slices where there is one branch, whose gradient is a copy and no sum.
    """

    queries: Tensor
    keys: Tensor
    own: Tensor
    whole: Tensor
    query_runs: list[slice] | None
    key_runs: list[slice] | None

    def mask(self, make: Any) -> Tensor | None:
        """[n, 1, own, whole] bool; None: plain causal. make: transformers' sdpa_mask of a layer."""
        (n, own), whole = self.queries.shape, self.keys.shape[1]
        device = self.queries.device
        if own == whole:
            longest = make(batch_size=1, q_length=own, kv_length=own, device=device)
            if longest is None:  # what is padded comes after all that counts
                return None
        # a query of padding is the last one that counts: it sees something
        query = self.whole - self.own + torch.arange(own, device=device)
        query = query.minimum(self.whole - 1)[:, None, :, None]
        key = torch.arange(whole, device=device)[None, None, None]
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
        seen = make.keywords["mask_function"](zero, zero, query, key)
        return (seen & (key < self.whole[:, None, :, None])).expand(n, 1, own, whole)


class BranchMask(Tensor):
    """The boolean mask [rows, 1, width, width] of a layer, made only where something reads it.

    `attend` does not: it takes masks of groups of branches. To everything else this is the mask.
    """

    branches: Branches
    make: Any  # transformers' sdpa_mask, with the layer's mask_function
    of_groups: dict[int, Tensor | None]

    @staticmethod
    def __new__(cls, branches: Branches, make: Any, device: torch.device) -> "BranchMask":
        shape = (branches.rows, 1, branches.width, branches.width)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(self, branches: Branches, make: Any, device: torch.device):
        self.branches = branches
        self.make = make
        self.of_groups = {}

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"BranchMask({list(self.shape)}, {len(self.branches.branches)} branches)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._to_copy.default and options.get("dtype") in (None, torch.bool):
            # a model whose layers are on several devices takes its masks along
            mask: BranchMask = args[0]
            device = torch.device(options.get("device") or mask.device)
            return BranchMask(mask.branches, mask.make, device)
        args, kwargs = tree_map_only(BranchMask, lambda mask: mask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    @cached_property
    def dense(self) -> Tensor:
        branches = self.branches
        seen = branches.seen_by(self.make.keywords["mask_function"], self.device)
        mask = self.make(
            batch_size=branches.rows,
            q_length=branches.width,
            kv_length=branches.width,
            mask_function=seen,
            allow_is_causal_skip=False,
            device=self.device,
        )
        return mask.contiguous()

    def attend(self, function: Callable, module: Any, *states: Tensor, **kwargs: Any) -> Any:
        """function(module, query, key, value, mask, **kwargs) of all branches, put together.

        states: query, key, value [rows, heads, width, head size].
        """
        groups, places = self.branches.groups(states[0].device)
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in states)
        outputs = []
        for i, group in enumerate(groups):
            if i not in self.of_groups:
                self.of_groups[i] = group.mask(self.make)
            found, _ = function(
                module,
                _taken(query, group.queries, group.query_runs),
                _taken(key, group.keys, group.key_runs),
                _taken(value, group.keys, group.key_runs),
                self.of_groups[i],
                **kwargs,
            )
            outputs.append(found.flatten(0, 1))  # [n * own, heads, head size]
        rows, width = len(self), self.shape[-1]
        found = torch.cat(outputs)
        if places is not None:
            found = found.index_select(0, places)
        return found.unflatten(0, (rows, width)), None


def _taken(x: Tensor, places: Tensor, runs: list[slice] | None) -> Tensor:
    """[n, heads, length, head size]: rows of x [places, heads, head size]; places: [n, length]."""
    if runs is None:
        taken = x.index_select(0, places.flatten())
    else:
        taken = torch.cat([x[run] for run in runs]) if len(runs) > 1 else x[runs[0]]
    return taken.unflatten(0, places.shape).transpose(1, 2)


def _register() -> None:
    """Let transformers' masks and its sdpa heed branches; without any they are as they were."""
    for name in IMPLEMENTATIONS:
        original = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(original, "heeds_branches"):
            mask = _sdpa_mask if name == "sdpa" else _mask
            AttentionMaskInterface.register(name, _heeding(original, mask))
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not hasattr(original, "heeds_branches"):
        AttentionInterface.register("sdpa", _heeding(original, _attention))


def _heeding(original: Callable, function: Callable) -> Callable:
    wrapped: Any = functools.partial(function, original)
    functools.update_wrapper(wrapped, original)
    wrapped.heeds_branches = True
    return wrapped


def _current() -> Branches | None:
    # a graph of torch.compile has none, and cannot ask
    return None if torch.compiler.is_compiling() else _BRANCHES.get()


def _mask(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """A mask of transformers, by its mask_function."""
    branches = _current()
    if branches is None:
        return original(*args, **kwargs)
    kwargs = _of_positions(branches, *args, **kwargs)
    seen = branches.seen_by(kwargs["mask_function"], kwargs["device"])
    return original(**kwargs | {"mask_function": seen})


def _sdpa_mask(original: Callable, *args: Any, **kwargs: Any) -> Any:
    branches = _current()
    if branches is None:
        return original(*args, **kwargs)
    kwargs = _of_positions(branches, *args, **kwargs)
    shape = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "device")
    make = functools.partial(original, **{k: x for k, x in kwargs.items() if k not in shape})
    return BranchMask(branches, make, torch.device(kwargs["device"]))


def _of_positions(branches: Branches, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a mask that is asked for, if it can be one of branches.

    Raises:
        ValueError: it is one of other tokens, or not a function of positions.
    """
    branches.asked += 1
    size = tuple(kwargs.get(name) for name in ("batch_size", "q_length", "kv_length"))
    if args or size != (branches.rows, branches.width, branches.width):
        raise ValueError(
            f"the model asks for a mask of batch, queries and keys {size}, expected "
            f"{(branches.rows, branches.width, branches.width)}"
        )
    if kwargs.get("use_vmap") or "mask_function" not in kwargs:
        raise ValueError("the model has a mask of its own that is no function of positions")
    return kwargs | {"attention_mask": None}


def _attention(
    original: Callable,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' sdpa, branch by branch where that is its mask."""
    mask = attention_mask
    if not isinstance(mask, BranchMask):
        return original(module, query, key, value, mask, *args, **kwargs)
    whole = all(len(x) == len(mask) and x.shape[2] == mask.shape[2] for x in (query, key, value))
    if args or not whole or kwargs.get("position_bias") is not None:
        return original(module, query, key, value, mask.dense, *args, **kwargs)
    return mask.attend(original, module, query, key, value, **kwargs)
