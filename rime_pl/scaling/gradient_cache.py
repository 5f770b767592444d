"""Gradient cache: a batch of thousands of pairs in the memory of a micro-batch, with exact gradients.

Used by ``RimeModule.encode`` and ``RimeModule.backward``. A contrastive loss needs all embeddings at once,
but not all activations: a first pass without graph gives the embeddings, the stage's own loss gives the
gradient with respect to each of them, and a second pass, one micro-batch at a time, carries these gradients
into the weights.

Source: GradCache, arXiv 2101.06983. Differences: the cross-entropy rides along as a third output; frozen
parts need not run twice; Lightning's automatic optimisation stays (docs/decisions/0006-gradient-cache.md).

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

#: Micro-batch number -> its embeddings and share of the cross-entropy. Called twice for each number.
Run = Callable[[int], EncodedSide]


@dataclass
class _Pending:
    """One side between its two passes."""

    run: Run
    groups: list[Tensor]  # row numbers of each micro-batch
    random_states: list[_RandomState]
    autocast: torch.autocast
    side: EncodedSide  # leaves: their .grad is what is cached


class GradientCache:
    """The sides of one training step that wait for their second pass."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def encode(self, run: Run, groups: list[Tensor], device: torch.device) -> EncodedSide:
        """First pass: all micro-batches of one side, nothing kept but what comes out.

        Args:
            run: See :data:`Run`; must do the same again when called with the same number and random state.
            groups: Row numbers of each micro-batch; together 0 to R - 1.
            device: Of the model; its random state is kept for the second pass.

        Returns:
            The side in row order, cut off from the model: a loss on it puts gradients on these leaves.

        Raises:
            RimeError: If an earlier step's second pass never ran, so that its gradients are missing.
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
        for leaf in (side.disc, side.gen, side.cross_entropy):
            leaf.requires_grad_()
        if torch.is_grad_enabled():
            self._pending.append(_Pending(run, groups, random_states, _autocast_now(device), side))
        return side

    def replay(self, model: nn.Module) -> None:
        """Second pass, after the loss has put its gradients on the leaves: on into the model's weights.

        Args:
            model: Whose parameters are trained; DDP's hooks or FSDP2's sharding may sit on them. Processes
                exchange gradients once, in the last micro-batch.
        """
        pending, self._pending = self._pending, []
        jobs = [(side, number) for side in pending for number in range(len(side.groups))]
        for job, (side, number) in enumerate(jobs):
            with torch.enable_grad(), side.autocast, side.random_states[number].restored():
                outputs, gradients = _with_gradients(side.run(number), side.side, side.groups[number])
            _into_weights(outputs, gradients, model, last=job + 1 == len(jobs))


def in_row_order(parts: list[EncodedSide], groups: list[Tensor]) -> EncodedSide:
    """One side from its micro-batches, whose row numbers ``groups`` holds."""
    place = torch.cat(groups).argsort()
    return EncodedSide(
        disc=torch.cat([part.disc for part in parts])[place],
        gen=torch.cat([part.gen for part in parts])[place],
        cross_entropy=torch.stack([part.cross_entropy for part in parts]).sum(),
    )


def _with_gradients(part: EncodedSide, side: EncodedSide, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A micro-batch's outputs beside the gradients that the loss wants for them."""
    gradients = [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for leaf in (side.disc, side.gen, side.cross_entropy)
    ]
    return [part.disc, part.gen, part.cross_entropy], [gradients[0][rows], gradients[1][rows], gradients[2]]


def _into_weights(outputs: list[Tensor], gradients: list[Tensor], model: nn.Module, last: bool) -> None:
    """Backward of ``sum (output * gradient)``, added to what the parameters already hold."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if last or isinstance(model, FSDPModule):
        torch.autograd.backward(outputs, gradients)
        return
    # Not .backward(): DDP's hooks take the first gradient that a parameter gets for the whole one.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class _RandomState:
    """The state of the CPU's and the device's generators at the time of making: dropout draws from them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.on_device = None if device.type == "cpu" else _generator(device).get_rng_state(device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the generators draw as they did then; afterwards as if nothing had been drawn."""
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
    """The autocast that is on now (``trainer.precision=bf16-mixed``): backward runs outside of it."""
    return torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
    )
