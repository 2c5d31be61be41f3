"""Bytes of tensors alive at once."""

import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts every storage that an operation returns, from its making until it is freed.

    Inputs made before and what an operation frees before it returns are not seen. collect: run the
    garbage collector at each large allocation, since Triton's interpreter leaves cycles that hold a
    launch's tensors.
    """

    def __init__(self, *, collect: bool = False):
        super().__init__()
        self.collect = collect
        self.peak = 0
        self._known: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note(tree_leaves((args, kwargs)), self._known.add)
        result = func(*args, **(kwargs or {}))
        if self.collect and any(
            isinstance(x, torch.Tensor) and self._large_and_new(x) for x in tree_leaves(result)
        ):
            gc.collect()
        for key in [k for k, (ref, _) in self._alive.items() if ref.expired()]:
            del self._alive[key]
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._alive and storage._cdata not in self._known:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(n for _, n in self._alive.values()))
        return result

    def _large_and_new(self, x):
        storage = x.untyped_storage()
        return (
            storage.nbytes() > 1 << 18
            and storage._cdata not in self._alive
            and storage._cdata not in self._known
        )

    def _note(self, leaves, add):
        for x in leaves:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._alive:
                add(x.untyped_storage()._cdata)
