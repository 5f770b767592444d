"""Keys and values with room for the next tokens, so that writing a token does not copy those before it.

Called by decoding.py beside it. The cache of transformers makes a new tensor of all keys and values in each
layer for each token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

#: The room has a multiple of this many columns, so its size follows from the number of tokens alone.
_ROOM = 32


class GrowingLayer(DynamicLayer):
    """Keys and values (N, H, L, W) of a layer: the first L columns of a wider tensor.

    Whoever puts another tensor in ``keys`` or ``values`` need not know of it: the next token gets new room.
    A copy shares what was read until then, and writes into room of its own.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._drop_room()

    def __copy__(self) -> GrowingLayer:
        assert self.keys is not None and self.values is not None, "it was made with keys and values"
        return GrowingLayer(self.keys, self.values)

    def _drop_room(self) -> None:
        self._room: tuple[Tensor, ...] = ()
        self._shown: tuple[Tensor, ...] = ()  # the keys and values that lie in the room

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (N, H, C, W) and return all keys and values."""
        assert self.keys is not None and self.values is not None, "it was made with keys and values"
        before = self.keys.shape[2]
        after = before + key_states.shape[2]
        old = (self.keys, self.values)
        lie_there = bool(self._shown) and all(a is b for a, b in zip(old, self._shown, strict=True))
        if not lie_there or after > self._room[0].shape[2]:
            rows, heads, _, width = self.keys.shape
            columns = -(-after // _ROOM) * _ROOM
            self._room = tuple(each.new_empty(rows, heads, columns, width) for each in old)
            for room, each in zip(self._room, old, strict=True):
                room[:, :, :before] = each
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in self._room)
        self._shown = (self.keys, self.values)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, and free the room of all."""
        super().batch_select_indices(indices)
        self._drop_room()


def with_room(cache: Cache) -> Cache:
    """Return a cache whose layers grow in place; layers that see a window only stay as they are."""
    cache.layers = [_growing(layer) for layer in cache.layers]
    return cache


def _growing(layer: Any) -> Any:
    if type(layer) is not DynamicLayer:
        return layer
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None, "a prompt was read"
    return GrowingLayer(keys, values)
