"""A cache with room holds what the cache of transformers holds, whatever is done to it."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rime_pl.generation.growing_cache import GrowingLayer, with_room


def read(rows: int = 3, length: int = 5) -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(torch.rand(rows, 2, length, 4), torch.rand(rows, 2, length, 4))
    return layer


def pair() -> tuple[DynamicLayer, GrowingLayer]:
    plain = read()
    assert plain.keys is not None and plain.values is not None
    return plain, GrowingLayer(plain.keys, plain.values)


def same(plain: DynamicLayer, growing: GrowingLayer) -> bool:
    assert plain.keys is not None and plain.values is not None and growing.keys is not None
    assert growing.values is not None and plain.get_seq_length() == growing.get_seq_length()
    return plain.keys.equal(growing.keys) and plain.values.equal(growing.values)


@pytest.mark.parametrize("seed", range(8))
def test_it_holds_what_the_plain_one_holds(seed: int) -> None:
    """Tokens, dropped rows, copies that go on alone, tensors put in from outside; longer than the room."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pairs = [pair()]
    for _ in range(120):
        plain, growing = rng.choice(pairs)
        assert plain.keys is not None and plain.values is not None
        what = rng.random()
        if what < 0.8:
            width = rng.choice([1, 1, 1, 3])
            new = [torch.rand(len(plain.keys), 2, width, 4) for _ in range(2)]
            expected, found = plain.update(*new), growing.update(*new)
            assert all(a.equal(b) for a, b in zip(expected, found, strict=True))
        elif what < 0.88:
            rows = torch.tensor(sorted(rng.sample(range(len(plain.keys)), rng.randint(1, len(plain.keys)))))
            plain.batch_select_indices(rows)
            growing.batch_select_indices(rows)
        elif what < 0.96 and len(pairs) < 6:
            pairs.append((copy.copy(plain), copy.copy(growing)))
        else:
            plain.keys, plain.values = plain.keys + 1, plain.values + 1
            growing.keys, growing.values = plain.keys, plain.values
        assert all(same(*each) for each in pairs)
    assert max(plain.get_seq_length() for plain, _ in pairs) > 32


@pytest.mark.parametrize("name", ["keys", "values"])
def test_one_of_the_two_may_be_replaced(name: str) -> None:
    """The new tensor counts, not the old one that lies in the room."""
    plain, growing = pair()
    for _ in range(2):
        new = [torch.rand(3, 2, 1, 4) for _ in range(2)]
        plain.update(*new)
        growing.update(*new)
        replaced = torch.rand(getattr(plain, name).shape)
        for layer in (plain, growing):
            setattr(layer, name, replaced)
    new = [torch.rand(3, 2, 1, 4) for _ in range(2)]
    plain.update(*new)
    growing.update(*new)
    assert same(plain, growing)


def test_a_token_copies_nothing_while_there_is_room() -> None:
    _, growing = pair()
    places = set()
    for _ in range(20):
        keys, _ = growing.update(torch.rand(3, 2, 1, 4), torch.rand(3, 2, 1, 4))
        places.add(keys.data_ptr())
    assert len(places) == 1


def test_dropped_rows_free_the_room() -> None:
    _, growing = pair()
    growing.update(torch.rand(3, 2, 1, 4), torch.rand(3, 2, 1, 4))
    growing.batch_select_indices(torch.tensor([0]))
    assert growing.keys is not None and growing.keys.untyped_storage().nbytes() == 2 * 6 * 4 * 4


def test_layers_that_see_a_window_stay_as_they_are() -> None:
    class Window(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers = [read(), Window()]
    assert [type(layer) for layer in with_room(cache).layers] == [GrowingLayer, Window]
