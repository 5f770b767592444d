"""Mutated adapters and checkpoints; they are loaded and encode, or are resumed and train one more batch."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rime_pl.backbone.adapters import CONTRACT_FILE, WEIGHTS_FILE, state_hash
from rime_pl.checkpoints import global_step, logged_step
from rime_pl.inference.loading import load
from tests.torture.damage import (
    BYTES,
    ODD_VALUES,
    TEXTS,
    as_json,
    byte_changes,
    changed,
    json_changes,
    places,
)
from tests.torture.sources import Sources, first_step
from tests.torture.watched import MARKER, Case, Reading, digest, result_of

QUERY = "a red ring"


class Payload:
    """Makes the marker when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


# -- adapters --------------------------------------------------------------------------------------------


def _weights(change: Callable[[dict[str, torch.Tensor]], Any], matching: bool) -> Callable[[Path], object]:
    """Change tensors of the adapter; ``matching`` writes the hash of the new ones, as a program would."""

    def make(adapter: Path) -> None:
        state = load_file(adapter / WEIGHTS_FILE)
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, adapter / WEIGHTS_FILE)
        if matching:
            contract = json.loads((adapter / CONTRACT_FILE).read_text())
            (adapter / CONTRACT_FILE).write_text(json.dumps(contract | {"weights_hash": state_hash(state)}))

    return make


def _first(state: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = sorted(state)[0]
    state[name] = change(state[name])


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a tensor of NaN": lambda state: _first(state, lambda t: torch.full_like(t, float("nan"))),
    "one value infinite": lambda state: _first(
        state, lambda t: t.flatten().index_fill(0, torch.tensor(0), float("inf")).view_as(t)
    ),
    "a tensor in float16": lambda state: _first(state, torch.Tensor.half),
    "a tensor in float64": lambda state: _first(state, torch.Tensor.double),
    "a tensor of whole numbers": lambda state: _first(state, torch.Tensor.int),
    "a tensor of complex numbers": lambda state: _first(state, lambda t: t.to(torch.complex64)),
    "a tensor turned": lambda state: _first(state, lambda t: t.T),
    "a tensor flat": lambda state: _first(state, torch.Tensor.flatten),
    "a tensor empty": lambda state: _first(state, lambda t: t[:0]),
    "a tensor twice as long": lambda state: _first(state, lambda t: torch.cat([t, t])),
    "a tensor missing": lambda state: state.pop(sorted(state)[0]),
    "all tensors missing": lambda state: state.clear(),
    "a tensor more": lambda state: state.update(more=torch.ones(3)),
    "a tensor renamed": lambda state: state.update(renamed=state.pop(sorted(state)[0])),
    "a name of 10,000 letters": lambda state: state.update({"x" * 10_000: torch.ones(1)}),
    "values of 1e38": lambda state: _first(state, lambda t: torch.full_like(t, 1e38)),
}
#: What the weights must be refused for, though their hash fits.
WRONG = ("NaN", "infinite", "float16", "float64", "whole", "complex")


def _header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Change the header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + data[8 + size :]


def _safetensors(data: bytes) -> Iterator[tuple[str, bytes]]:
    name = next(one for one in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if one[0] != "_")
    for what, value in (
        ("offsets behind the end", {"data_offsets": [0, 1 << 50]}),
        ("offsets turned", {"data_offsets": [64, 0]}),
        ("negative offsets", {"data_offsets": [-8, 64]}),
        ("an unknown type", {"dtype": "Q4"}),
        ("another type", {"dtype": "I8"}),
        ("a shape of 2^60", {"shape": [1 << 60]}),
        ("a shape of -1", {"shape": [-1, 4]}),
        ("a shape that is a text", {"shape": "4x4"}),
    ):
        yield f"header: {what}", _header(data, lambda header, value=value: header[name].update(value))
    yield "header: 2^63 bytes long", (1 << 63).to_bytes(8, "little") + data[8:]
    yield "header: 0 bytes long", bytes(8) + data[8:]
    yield "header: no JSON", data[:8] + b"x" + data[9:]


def adapter_changes(
    adapter: Path, rng: random.Random
) -> Iterator[tuple[str, Callable[[Path], object], bool]]:
    """Yield what was changed, the change of an adapter folder, and whether it must be refused."""

    def content(name: str, data: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(data)

    for what, change in TENSORS.items():
        yield f"weights: {what}, the hash fits", _weights(change, True), any(one in what for one in WRONG)
        yield f"weights: {what}", _weights(change, False), True
    weights = (adapter / WEIGHTS_FILE).read_bytes()
    for what, data in _safetensors(weights):
        yield f"weights, {what}", content(WEIGHTS_FILE, data), True
    yield "weights: a pickle", lambda folder: _pickled(folder / WEIGHTS_FILE), True
    yield "a pickle beside the weights", lambda folder: _pickled(folder / "adapter_model.bin"), False
    yield "the weights are a folder", lambda folder: _folder(folder / WEIGHTS_FILE), True
    yield "the contract is a folder", lambda folder: _folder(folder / CONTRACT_FILE), True
    for name in sorted(one.name for one in adapter.iterdir()):
        yield f"{name} is missing", lambda folder, name=name: (folder / name).unlink(), False
    contract = json.loads((adapter / CONTRACT_FILE).read_text())
    texts = {
        one: byte_changes((adapter / one).read_bytes(), rng, TEXTS, BYTES)
        for one in sorted(file.name for file in adapter.iterdir())
    }
    values = json_changes(contract, rng)
    while True:
        for _ in range(6):
            what, value = next(values)
            yield f"{CONTRACT_FILE}: {what}", content(CONTRACT_FILE, as_json(value)), False
        for name in (CONTRACT_FILE, WEIGHTS_FILE, rng.choice(sorted(texts))):
            what, data = next(texts[name])
            yield f"{name}: {what}", content(name, data), False


def _pickled(file: Path) -> None:
    torch.save({"x": Payload()}, file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def adapter_cases(sources: Sources, count: int, rng: random.Random, work: Path) -> list[Case]:
    """Return cases that load a run with a changed adapter, and encode with it."""
    changes = adapter_changes(sources.run.adapter, rng)
    everything = list(islice(changes, max(count, 140)))
    chosen = everything[:count] if count >= 110 else rng.sample(everything, count)

    def read(folder: Path) -> Reading:
        retriever = load(folder / "sft")
        vector = retriever.encode(QUERY)
        assert torch.isfinite(vector).all(), "an embedding is not finite"
        return Reading(digest(vector.tolist(), retriever.unknown_words(QUERY), str(retriever.tasks)))

    def case(what: str, change: Callable[[Path], object], must: bool) -> Case:
        def write(folder: Path) -> None:
            shutil.copytree(sources.run.path, folder / "sft", ignore=shutil.ignore_patterns("checkpoints"))
            change(folder / "sft" / "adapter")

        return Case(what, write, read, ("inside/sft",), original, must)

    original = ""
    original = result_of(case("nothing", lambda folder: None, False), work)
    return [case(*one) for one in chosen]


# -- checkpoints -----------------------------------------------------------------------------------------


def _pickles(good: dict[str, Any]) -> Iterator[tuple[str, Callable[[Path], object], bool]]:
    for name in ("callbacks", "loops", "state_dict", "hyper_parameters", "more"):
        value = good | {name: Payload()}
        yield f"a pickle that runs a command in {name}", lambda file, v=value: torch.save(v, file), True
    yield "a pickle alone", lambda file: file.write_bytes(pickle.dumps(Payload())), True
    yield (
        "a pickle in an old format",
        lambda file: torch.save(good | {"more": Payload()}, file, _use_new_zipfile_serialization=False),
        True,
    )
    yield "a run's own class", lambda file: torch.save(good | {"more": Reading("x")}, file), True
    yield "not a dictionary", lambda file: torch.save([1, 2], file), True
    yield "an empty dictionary", lambda file: torch.save({}, file), True
    yield "a folder", lambda file: (file.unlink(), file.mkdir()), True


def _tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    return lambda state: _first(state["state_dict"], change)


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
    "a tensor of NaN": (_tensor(lambda t: torch.full_like(t, float("nan"))), True),
    "a tensor infinite": (_tensor(lambda t: torch.full_like(t, float("inf"))), True),
    "a tensor in float16": (_tensor(torch.Tensor.half), False),
    "a tensor turned": (_tensor(lambda t: t.T.contiguous()), True),
    "a tensor empty": (_tensor(lambda t: t[:0]), True),
    "a tensor missing": (lambda state: state["state_dict"].popitem(), True),
    "a tensor more": (lambda state: state["state_dict"].update(more=torch.ones(3)), True),
    "a tensor that is a number": (
        lambda state: state["state_dict"].update({next(iter(state["state_dict"])): 3}),
        True,
    ),
    "no tensors": (lambda state: state["state_dict"].clear(), True),
    "no optimizer": (lambda state: state["optimizer_states"].clear(), True),
    "two optimizers": (lambda state: state["optimizer_states"].append(state["optimizer_states"][0]), True),
    "an optimizer that is a number": (lambda state: state.update(optimizer_states=[3]), True),
    "an optimizer without groups": (lambda state: state["optimizer_states"][0].pop("param_groups"), True),
    "an optimizer with fewer parameters": (
        lambda state: state["optimizer_states"][0]["param_groups"][0]["params"].pop(),
        True,
    ),
    "an optimizer state of another shape": (lambda state: _moment(state, lambda t: t.flatten()[:1]), True),
    "an optimizer state of NaN": (
        lambda state: _moment(state, lambda t: torch.full_like(t, float("nan"))),
        True,
    ),
    "an optimizer state missing": (lambda state: state["optimizer_states"][0]["state"].popitem(), True),
    "another base model": (lambda state: state.update(base_hash="x"), True),
    "another start": (lambda state: state.update(start_hash="x"), True),
    "a step of -1": (lambda state: state.update(global_step=-1), True),
    "a step of 2^70": (lambda state: state.update(global_step=1 << 70), True),
    "an epoch of -1": (lambda state: state.update(epoch=-1), False),
}


def _moment(state: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    one = next(iter(state["optimizer_states"][0]["state"].values()))
    one["exp_avg"] = change(one["exp_avg"])


def checkpoint_changes(
    file: Path, rng: random.Random
) -> Iterator[tuple[str, Callable[[Path], object], bool]]:
    """Yield what was changed, the change of a checkpoint, and whether it must be refused."""

    def states(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
        def make(path: Path) -> None:
            state = torch.load(path, weights_only=True)
            change(state)
            torch.save(state, path)

        return make

    def placed(place: tuple[Any, ...], new: Any) -> Callable[[Path], object]:
        return lambda path: torch.save(changed(torch.load(path, weights_only=True), place, new), path)

    def without(name: str) -> Callable[[Path], object]:
        return states(lambda state: state.pop(name))

    good = torch.load(file, weights_only=True)
    yield from _pickles(good)
    for what, (change, must) in STATES.items():
        yield what, states(change), must
    for name in good:
        yield f"{name} is missing", without(name), False
    data = file.read_bytes()
    for what, new in islice(byte_changes(data, rng), len(BYTES)):
        harmless = new == data or "garbage" in what
        yield what, lambda path, new=new: path.write_bytes(new), not harmless
    everywhere = [place for place in places(good) if place[0] not in ("state_dict", "hyper_parameters")]
    simple = [value for value in ODD_VALUES if value != -(10**400)]
    while True:
        place, new = rng.choice(everywhere), rng.choice(simple)
        yield f"{'.'.join(map(str, place))} is {new!r:.30}", placed(place, new), False


def checkpoint_cases(sources: Sources, count: int, rng: random.Random, work: Path) -> list[Case]:
    """Return cases that resume a run from a changed checkpoint and train one more batch."""
    halfway = sources.halfway
    everything = list(islice(checkpoint_changes(halfway.last_checkpoint, rng), max(count, 90)))
    chosen = everything[:count] if count >= 80 else rng.sample(everything, count)

    def read(folder: Path) -> Reading:
        file = folder / "sft/checkpoints/last.ckpt"
        step, batches = global_step(file), logged_step(file)
        return Reading(digest(step, batches, first_step(sources.arguments(folder / "sft"))))

    def case(what: str, change: Callable[[Path], object], must: bool) -> Case:
        def write(folder: Path) -> None:
            shutil.copytree(halfway.path, folder / "sft")
            change(folder / "sft/checkpoints/last.ckpt")

        return Case(what, write, read, ("inside/sft", "model.", "data.", "trainer."), original, must)

    original = ""
    original = result_of(case("nothing", lambda file: None, False), work)
    return [case(*one) for one in chosen]
