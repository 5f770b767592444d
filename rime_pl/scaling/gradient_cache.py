"""Gradient cache: train on thousands of pairs with the memory of one micro-batch, with exact gradients.

Called by the modules of the contrastive stages, in ``encode`` and ``backward``. A contrastive loss needs all
embeddings at once, but not all activations. A first pass without a graph gives the embeddings. The loss of
the stage gives the gradient of each embedding. A second pass, one micro-batch at a time, brings these
gradients to the weights.

Source: GradCache, arXiv 2101.06983. Differences: the cross-entropy is a third output; frozen parts need not
run twice; it works with the automatic optimisation of Lightning (docs/decisions/0006-gradient-cache.md).

Shape legend: R rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rime_pl.errors import RimeError
from rime_pl.types import EncodedSide

#: Number of a micro-batch -> its embeddings and part of the cross-entropy. Called twice for each number.
Run = Callable[[int], EncodedSide]


@dataclass
class _Pending:
    """One side of a batch between its two passes."""

    run: Run
    groups: list[Tensor]  # row numbers of each micro-batch
    random_states: list[_RandomState]
    autocast: torch.autocast
    side: EncodedSide  # leaves of the graph; their .grad is the cache


class GradientCache:
    """Holds the sides of one training step until their second pass."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def encode(self, run: Run, groups: list[Tensor], device: torch.device) -> EncodedSide:
        """Run the first pass over all micro-batches of one side; only the results are kept.

        Args:
            run: See :data:`Run`; must give the same result for the same number and random state.
            groups: Row numbers of each micro-batch; together 0 to R - 1.
            device: Device of the model, whose random state is kept for the second pass.

        Returns:
            The side in row order, detached from the model. A loss on it gives gradients to these tensors.

        Raises:
            RimeError: If the second pass of an earlier step is missing.
        """
        if any(pending.side.disc.grad is not None for pending in self._pending):
            raise RimeError(
                "With model.micro_batches, loss.backward() stops at the embeddings, so the last step has no "
                "gradients. Call module.backward(loss) instead, as Lightning does."
            )
        random_states, parts = [], []
        with torch.no_grad():
            for number in range(len(groups)):
                random_states.append(_RandomState(device))
                parts.append(run(number))
            side = in_row_order(parts, groups)
        for leaf in _tensors(side):
            leaf.requires_grad_()
        if torch.is_grad_enabled():
            self._pending.append(_Pending(run, groups, random_states, _autocast_now(device), side))
        return side

    def replay(self, model: nn.Module) -> None:
        """Run the second pass, which brings the gradients of the embeddings to the weights.

        Processes exchange gradients only once, in the last micro-batch.

        Args:
            model: The model that trains, also under DDP or FSDP2.
        """
        pending, self._pending = self._pending, []
        jobs = [(side, number) for side in pending for number in range(len(side.groups))]
        for job, (side, number) in enumerate(jobs):
            with torch.enable_grad(), side.autocast, side.random_states[number].restored():
                outputs, gradients = _with_gradients(side.run(number), side.side, side.groups[number])
            _into_weights(outputs, gradients, model, last=job + 1 == len(jobs))


def in_row_order(parts: list[EncodedSide], groups: list[Tensor]) -> EncodedSide:
    """Return one side in row order from its parts, whose row numbers are in ``groups``.

    Parts without wrong rewrites hold the last rows.
    """
    place = torch.cat(groups).argsort()
    wrong = [(part.wrong, rows) for part, rows in zip(parts, groups, strict=True) if part.wrong is not None]
    return EncodedSide(
        disc=torch.cat([part.disc for part in parts])[place],
        gen=torch.cat([part.gen for part in parts])[place],
        cross_entropy=torch.stack([part.cross_entropy for part in parts]).sum(),
        wrong=torch.cat([w for w, _ in wrong])[torch.cat([r for _, r in wrong]).argsort()] if wrong else None,
    )


def _tensors(side: EncodedSide) -> list[Tensor]:
    """Return the scalar first, then the embeddings."""
    return [side.cross_entropy, *(each for each in (side.disc, side.gen, side.wrong) if each is not None)]


def _with_gradients(part: EncodedSide, side: EncodedSide, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of a micro-batch, and the gradients of the loss for them."""
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in _tensors(side)]
    return _tensors(part), [gradients[0], *(gradient[rows] for gradient in gradients[1:])]


def _into_weights(outputs: list[Tensor], gradients: list[Tensor], model: nn.Module, last: bool) -> None:
    """Add the gradients of ``sum (output * gradient)`` to those of the parameters."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if last or isinstance(model, FSDPModule):
        torch.autograd.backward(outputs, gradients)
        return
    # Not .backward(), because DDP would exchange the first gradient of a parameter as if it were complete.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class _RandomState:
    """The state of the random generators of CPU and device when it is created; dropout uses them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.on_device = None if device.type == "cpu" else _generator(device).get_rng_state(device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the generators repeat their numbers; afterwards they continue from where they were."""
        now = _RandomState(self.device)
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            _generator(self.device).set_rng_state(self.on_device, self.device)


def _generator(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _autocast_now(device: torch.device) -> torch.autocast:
    """Return the present autocast (of ``trainer.precision=bf16-mixed``), because backward runs outside it."""
    return torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
    )
