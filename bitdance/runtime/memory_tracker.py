"""Counts the bytes of tensors, also of fake ones, which have shapes but no data."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Tracks the bytes of all tensors that are created in its context and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in self._storages:
                self._storages.add(storage._cdata)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        return result

    def _remove(self, key: int, size: int) -> None:
        self._storages.remove(key)
        self.current -= size
