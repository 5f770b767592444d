"""Bytes of living tensors while a step runs, and what they were at the peak.

Called by rehearsal.py on tensors without data, and by the tests on real ones: the same ruler for both.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Largest:
    """The largest tensor that a step made."""

    bytes: int = 0
    operation: str = ""  # e.g. "aten.index_copy"
    shape: tuple[int, ...] = ()


@dataclass
class Peak:
    """What was alive when most was; tensors that were there before the step do not count."""

    bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)  # part -> bytes, in the sum exactly ``bytes``


class LiveBytes(TorchDispatchMode):
    """Counts each new storage from the operation that makes it until it is freed.

    Args:
        known: Tensors that were there before: weights. Views of them cost nothing.
        lengths: What ``tolist()`` gives on tensors without data, in turn (patches of one image); the vision
            towers ask for nothing else.

    Example:
        >>> with LiveBytes() as live:
        ...     kept = torch.zeros(100)
        ...     _ = (torch.zeros(50) + 1).sum()
        >>> live.peak.bytes  # 100 kept, 50 and 50 at the same time; 4 bytes each
        800
    """

    def __init__(self, known: Iterable[Tensor] = (), lengths: Callable[[], int] | None = None) -> None:
        super().__init__()
        self.part = "activations"
        self.peak = Peak()
        self.largest = Largest()
        self._lengths = lengths
        self._alive: Counter[str] = Counter()
        self._total = 0
        self._owner: dict[int, tuple[str, int]] = {}  # storage -> its part and bytes
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """What is made inside belongs to ``part``."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a living tensor under another part, e.g. a finished gradient."""
        key = tensor.untyped_storage()._cdata
        if key in self._owner:
            old, size = self._owner[key]
            self._owner[key] = (part, size)
            self._alive[old] -= size
            self._alive[part] += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._lengths is not None and func is torch.ops.aten._local_scalar_dense.default:
            return self._lengths()
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, func)
        inside = unpacked_bytes(func, args)
        if inside:
            self._at(self._total + inside, inside)
        return out

    def _see(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._owner or not size:
            return
        self._owner[key] = (self.part, size)
        self._alive[self.part] += size
        self._total += size
        weakref.finalize(storage, self._gone, key)
        if size > self.largest.bytes:
            self.largest = Largest(size, str(func).removesuffix(".default"), tuple(tensor.shape))
        self._at(self._total, 0)

    def _gone(self, key: int) -> None:
        part, size = self._owner.pop(key)
        self._alive[part] -= size
        self._total -= size

    def _at(self, total: int, inside: int) -> None:
        if total > self.peak.bytes:
            parts = dict(self._alive)
            if inside:
                parts["4-bit unpacking"] = parts.get("4-bit unpacking", 0) + inside
            self.peak = Peak(total, {part: size for part, size in parts.items() if size})


def unpacked_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What bitsandbytes takes inside its 4-bit product: the weight, unpacked, and its scales in float32.

    Its backward unpacks in operations of their own, which are seen as they are.

    Args:
        func: An operation.
        args: Its arguments: of ``gemm_4bit(A, B, shapeB, absmax, blocksize, ...)``.
    """
    if str(func) != "bitsandbytes.gemm_4bit.default":
        return 0
    activations, shape, block = args[0], args[2], args[4]
    elements = shape[0] * shape[1]
    return elements * activations.element_size() + 4 * -(-elements // block)
