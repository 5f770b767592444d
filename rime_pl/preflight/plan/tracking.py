"""Bytes of living tensors while a step runs, what they were at the peak, and the step's FLOPs.

Called by predict.py on tensors without values, and by the tests on real ones: the same ruler for both.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rime_pl.metrics.flops import flops_of


class LiveBytes(TorchDispatchMode):
    """Count each new storage from the operation that makes it until it is freed, and FLOPs.

    FLOPs are those of metrics/flops.py.

    Args:
        known: Tensors that were there before: weights. Views of them cost nothing.
        vocabulary: Tensors of this width belong to the part "logits"; 0: none do.

    Example:
        >>> with LiveBytes() as live:
        ...     kept = torch.zeros(100)
        ...     _ = (torch.zeros(50) + 1).sum()
        >>> live.peak.total()  # 100 kept, 50 and 50 at the same time; 4 bytes each
        800
        >>> with LiveBytes() as live:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> live.flops  # a multiplication and an addition count as two
        60
    """

    def __init__(self, known: Iterable[Tensor] = (), vocabulary: int = 0) -> None:
        super().__init__()
        self.part = "activations"
        self.flops = 0
        #: The highest of each moment: the part at work, whether gradients are recorded, and the number of the
        #: pass. A model of another depth has the same moments, but another may be the highest.
        self.peaks: dict[tuple[str, bool, int], Counter[str]] = {}
        self._pass = 0
        self._vocabulary = vocabulary
        self._alive: Counter[str] = Counter()
        self._owner: dict[int, tuple[str, int]] = {}  # storage -> its part and bytes
        #: Kept alive, or a new storage could get the address of one that is gone and would not be counted.
        self._known = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in known)}

    @property
    def peak(self) -> Counter[str]:
        """Bytes by part when most was alive; tensors that were there before the step do not count."""
        return max(self.peaks.values(), key=Counter.total, default=Counter())

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Count what is made inside as ``part``."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def count_forward(self, module: nn.Module, part: str) -> None:
        """Count what a module makes in its forward as ``part``, also where the backward pass repeats it."""
        forward = module.forward

        @wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.counting(part):
                return forward(*args, **kwargs)

        module.forward = counted  # type: ignore[method-assign]

    def next_pass(self, *_: object) -> None:
        """Begin another pass; a hook before the decoder's forward."""
        self._pass += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # asked for more often than all else
            return out
        packet = func._overloadpacket
        self.flops += flops_of(func, args, kwargs or {}, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if str(packet) == "bitsandbytes.gemm_4bit":
            self._at(unpacked_bytes(*args))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._owner or not size:
            return
        part = "logits" if self._vocabulary and tensor.shape[-1:] == (self._vocabulary,) else self.part
        self._owner[key] = (part, size)
        self._alive[part] += size
        weakref.finalize(storage, self._gone, key)
        self._at()

    def _gone(self, key: int) -> None:
        part, size = self._owner.pop(key)
        self._alive[part] -= size

    def _at(self, inside: int = 0) -> None:
        """Keep what is alive, with the bytes ``inside`` an operation, if it is the most of this moment."""
        moment = (self.part, torch.is_grad_enabled(), self._pass)
        if moment not in self.peaks or self._alive.total() + inside > self.peaks[moment].total():
            self.peaks[moment] = self._alive + Counter({self.part: inside})


def unpacked_bytes(inputs: Tensor, packed: Tensor, shape: list[int], absmax: Any, block: int, *_: Any) -> int:
    """Return the bytes that a 4-bit product takes inside: the unpacked weight, and its scales in float32.

    Its backward unpacks in operations of their own, which are seen as they are.
    """
    elements = shape[0] * shape[1]
    return elements * inputs.element_size() + 4 * -(-elements // block)
