"""Count the FLOPs of a step, and measure what the device can do: their ratio is the utilisation.

Called by callbacks/utilisation.py, by `rime plan` (which simulates a step) and by the benchmarks.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

#: Rows and columns of the measured matrix product: large enough for the full speed of the device.
SIZES = {"cuda": 4096, "cpu": 1024}
#: Seconds that measuring takes, after one product that warms up.
MEASURED_SECONDS = 0.2


class CountedFlops(TorchDispatchMode):
    """Count the FLOPs of all operations inside, also those of the backward pass and of recomputation.

    torch.utils.flop_counter.FlopCounterMode is not used itself: it keeps activations alive, and knows neither
    4-bit products nor attention on a CPU.

    Source: the formulas are those of torch.utils.flop_counter.

    Example:
        >>> with CountedFlops() as counted:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> counted.flops  # a multiplication and an addition count as two
        60
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, out)
        return out


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the FLOPs of one operation, by torch's own formulas and ours; 0 for all but products.

    Source: torch.utils.flop_counter, and ours for 4-bit products and for attention on a CPU.

    Example:
        >>> one = torch.ones(2, 3)
        >>> flops_of(torch.ops.aten.add.Tensor, (one, one), {}, one)
        0
    """
    packet = func._overloadpacket
    formula: Any = flop_registry.get(packet) or _FORMULAS.get(str(packet))
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def product_flops_per_second(
    device: torch.device, dtype: torch.dtype, seconds: float = MEASURED_SECONDS
) -> float:
    """Return the FLOPs per second of a square matrix product, with the threads of now.

    Args:
        device: CPU or GPU.
        dtype: Type of both factors.
        seconds: Time to measure for, in seconds; at least one product is measured.

    Source: ours.

    Example:
        >>> product_flops_per_second(torch.device("cpu"), torch.float32, seconds=0.0) > 0
        True
    """
    size = SIZES.get(device.type, SIZES["cpu"])
    numbers = torch.Generator(device).manual_seed(0)  # not that of the run
    factor = torch.randn(size, size, generator=numbers, device=device, dtype=torch.float32).to(dtype)
    product = factor @ factor
    _finish(device)
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < seconds:
        for _ in range(20 if device.type == "cuda" else 1):  # many at a time: a GPU waits for nobody
            torch.mm(factor, factor, out=product)
            count += 1
        _finish(device)
    return 2 * size**3 * count / (time.perf_counter() - start)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_4bit(inputs: Tensor, packed: Tensor, shape: list[int], *_: Any, **__: Any) -> int:
    return 2 * inputs.numel() * shape[0]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, *_repeated(query, key, value))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, *_repeated(query, key, value))


def _repeated(query: Tensor, *shared: Tensor) -> list[torch.Size]:
    """Return the shapes of keys and values as if each query head had its own: older torch asks for that."""
    heads = query.shape[1]
    return [torch.Size((one.shape[0], heads, *one.shape[2:])) for one in shared]


#: Products that torch has no formula for: 4-bit weights, and attention on a CPU.
_FORMULAS = {
    "bitsandbytes.gemm_4bit": _product_4bit,
    "bitsandbytes.gemv_4bit": _product_4bit,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
