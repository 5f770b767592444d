"""Samples per second of a training stream, next to a bare loop over the same tars and to webdataset.

`python -m benchmarks.stream` writes shards of 64-pixel PNG and 448-pixel JPEG pictures. It reads them in one
process, as one worker does, with the files in the cache of the system. Our stream follows the plan of a
training and decodes; it makes no batches. Remote shards come from a local HTTP server into an empty cache.
Each round reads all samples once in each way. The last line is JSON: our speed over that of the bare loop and
over that of webdataset, and that of remote shards over the bare loop. Each is the median of the rounds, and
that of the worse kind of picture.
"""

from __future__ import annotations

import argparse
import io
import json
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import webdataset
from PIL import Image

from benchmarks.index import Plain
from benchmarks.loading import write_pictures
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.loading import TrainBatches
from rime_pl.datamodules.remote import CacheSettings
from rime_pl.prompts import PromptConfig

KINDS = {"64 px PNG": (64, "PNG"), "448 px JPEG": (448, "JPEG")}
_BATCH = 64
#: A Latin square in which each of four follows each other once.
ORDERS = ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2048, help="Samples (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="Measured rounds (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name, (side, kind) in KINDS.items():
        with tempfile.TemporaryDirectory(prefix="rime-stream-") as folder:
            corpus = write_pictures(Path(folder) / "corpus", side, args.samples, kind=kind)
            with served(corpus) as place:
                rates = measure(ways(corpus, place, Path(folder) / "cache", side), args.samples, args.rounds)
            medians = {way: round(statistics.median(rate)) for way, rate in rates.items()}
            print(f"{name}, samples/s: {medians}", flush=True)
            found.append(rates)
    ratios = {
        "over_bare": ("ours", "bare loop"),
        "over_webdataset": ("ours", "webdataset"),
        "remote_over_bare": ("remote", "bare loop"),
    }
    print(
        json.dumps(
            {name: min(ratio(rates[a], rates[b]) for rates in found) for name, (a, b) in ratios.items()}
        )
    )


def ratio(mine: list[float], theirs: list[float]) -> float:
    """Return the median over the rounds of the ratio of two speeds of one round."""
    return round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 3)


def ways(corpus: Path, place: str, cache: Path, side: int) -> dict[str, Callable[[int], int]]:
    """Return each way to read all samples, given the number of the round; it returns how many it read."""
    shards = sorted(map(str, corpus.rglob("*.tar")))

    def bare(_: int) -> int:
        count = 0
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    data = tar.extractfile(member)
                    assert data is not None
                    if member.name.endswith("json"):
                        json.loads(data.read())
                    else:
                        picture = Image.open(io.BytesIO(data.read())).convert("RGB")
                        assert picture.size == (side, side)
                        count += 1
        return count

    def web(_: int) -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
        return sum(sample[f"t0.{'png' if side == 64 else 'jpg'}"].size == (side, side) for sample in samples)

    local = stream(str(corpus), CacheSettings())

    def ours(_: int) -> int:
        return read(local)

    def remote(number: int) -> int:
        return read(stream(place, CacheSettings(str(cache / str(number)))))

    return {"bare loop": bare, "webdataset": web, "ours": ours, "remote": remote}


def stream(place: str, cache: CacheSettings) -> TrainBatches:
    """Return the batches of a training, of which only the pairs are read."""
    data = RimeDataModule(place, "no model", PromptConfig(), _BATCH, cache=cache)
    data.processor = Plain()  # type: ignore[assignment]
    data.plan_training()
    batches = data.train_dataloader().batches
    assert isinstance(batches, TrainBatches)
    return batches


def read(batches: TrainBatches) -> int:
    """Read one pass, sample by sample."""
    count = 0
    for position in range(len(batches.plan)):
        for index in batches.plan.batch(position).indices:
            count += len(batches.reader.read(index).target.media)
    return count


@contextmanager
def served(corpus: Path) -> Iterator[str]:
    """Serve a folder over HTTP by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        "127.0.0.1",
        "--directory",
        str(corpus),
    ]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def measure(ways: dict[str, Callable[[int], int]], samples: int, rounds: int) -> dict[str, list[float]]:
    """Return the samples per second of each way in each round; the first round only warms up.

    In four rounds each way follows each other way once, so that none gains from its place.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for place in ORDERS[number % len(ORDERS)]:
            name, way = [*ways.items()][place]
            start = time.perf_counter()
            count = way(number)
            if number:
                rates[name].append(count / (time.perf_counter() - start))
            if count != samples:
                raise SystemExit(f"{name} must read {samples} samples, but read {count}.")
    return rates


if __name__ == "__main__":
    main()
