"""Changes that any file can suffer, of its bytes and of values in JSON; the kinds add their own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

#: Change of the content of a file, by its name.
Damage = Callable[[bytes, random.Random], bytes]
#: Values that no reader of ours may stumble over, whatever stands there.
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    -(10**400),
    2**63,
    1 << 70,
    "",
    " ",
    "7",
    "\0",
    "\ud800",
    "x" * 100_000,
    "../outside.txt",
    "/etc/hostname",
    "~",
    [],
    [None],
    {},
    {"": {}},
    [[[[]]]],
)


def _flipped(data: bytes, rng: random.Random, start: float, end: float, count: int) -> bytes:
    found = bytearray(data)
    first, last = int(start * len(data)), max(int(start * len(data)) + 1, int(end * len(data)))
    for _ in range(count if data else 0):
        found[min(rng.randrange(first, last), len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(found)


def _piece(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(max(1, len(data)))
    return start, min(len(data), start + rng.randint(1, max(1, len(data) // 4)))


def _removed(data: bytes, rng: random.Random) -> bytes:
    start, end = _piece(data, rng)
    return data[:start] + data[end:]


def _doubled(data: bytes, rng: random.Random) -> bytes:
    start, end = _piece(data, rng)
    return data[:end] + data[start:]


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    start, end = _piece(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _noise(data: bytes, rng: random.Random) -> bytes:
    start, end = _piece(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


BYTES: dict[str, Damage] = {
    "empty": lambda data, rng: b"",
    "first byte only": lambda data, rng: data[:1],
    "cut in the header": lambda data, rng: data[: rng.randint(2, 40)],
    "cut at a quarter": lambda data, rng: data[: len(data) // 4],
    "cut in the middle": lambda data, rng: data[: len(data) // 2],
    "cut anywhere": lambda data, rng: data[: rng.randrange(max(1, len(data)))],
    "last byte missing": lambda data, rng: data[:-1],
    "one bit flipped in the header": lambda data, rng: _flipped(data, rng, 0, 0.05, 1),
    "one bit flipped": lambda data, rng: _flipped(data, rng, 0, 1, 1),
    "twenty bits flipped": lambda data, rng: _flipped(data, rng, 0, 1, 20),
    "a piece removed": _removed,
    "a piece twice": _doubled,
    "a piece zeroed": _zeroed,
    "a piece of noise": _noise,
    "noise only": lambda data, rng: rng.randbytes(max(1, len(data))),
    "zeros only": lambda data, rng: bytes(max(1, len(data))),
    "garbage behind the end": lambda data, rng: data + rng.randbytes(100),
    "itself behind the end": lambda data, rng: data + data,
    "first bytes missing": lambda data, rng: data[rng.randint(1, 16) :],
    "a web page": lambda data, rng: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
}
#: Changes of a JSON or YAML file as text.
TEXTS: dict[str, Damage] = {
    "null": lambda data, rng: b"null",
    "a number": lambda data, rng: b"3",
    "a list": lambda data, rng: b"[]",
    "an empty object": lambda data, rng: b"{}",
    "with a mark of its encoding": lambda data, rng: b"\xef\xbb\xbf" + data,
    "in UTF-16": lambda data, rng: data.decode(errors="replace").encode("utf-16"),
    "nested without end": lambda data, rng: b"[" * 100_000,
    "objects nested without end": lambda data, rng: b'{"a":' * 50_000,
    "a zero byte": lambda data, rng: data[:20] + b"\0" + data[20:],
    "a byte that is no UTF-8": lambda data, rng: data[: len(data) // 2] + b"\xff" + data[len(data) // 2 :],
    "a number of 10,000 digits": lambda data, rng: b'{"format": ' + b"9" * 10_000 + b"}",
    "twice": lambda data, rng: data + data,
}


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in JSON; of a long list only the first entry and the last."""
    inner = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        inner = [(0, value[0]), *([(len(value) - 1, value[-1])] if len(value) > 1 else [])]
    for key, one in inner:
        yield (*above, key)
        yield from places(one, (*above, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of JSON with another value at a place."""
    found = deepcopy(value)
    at = found
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = new
    return found


def without(value: Any, place: tuple[Any, ...]) -> Any:
    """Return a copy of JSON without what stands at a place."""
    found = deepcopy(value)
    at = found
    for key in place[:-1]:
        at = at[key]
    del at[place[-1]]
    return found


def json_changes(value: Any, rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Yield changes of JSON without end: by turns a value that is missing, and an odd one in its place."""
    everywhere = list(places(value))
    while True:
        for place in rng.sample(everywhere, len(everywhere)):
            name = ".".join(map(str, place))
            if rng.random() < 0.25:
                yield f"{name} is missing", without(value, place)
            else:
                new = rng.choice(ODD_VALUES)
                yield f"{name} is {new!r:.30}", changed(value, place, new)


def as_json(value: Any) -> bytes:
    """Return JSON as bytes; NaN and halves of characters are written as Python's reader takes them."""
    return json.dumps(value).encode()


def byte_changes(data: bytes, rng: random.Random, *tables: dict[str, Damage]) -> Iterator[tuple[str, bytes]]:
    """Yield changes of the bytes of a file without end, each of the tables once in a round."""
    damages = {name: damage for table in (tables or (BYTES,)) for name, damage in table.items()}
    while True:
        for name, damage in damages.items():
            yield name, damage(data, rng)
