"""Samples per second from shards to training batches, next to bare tar files and to webdataset.

`python -m benchmarks.loading` writes shards of JPEG pictures of random colours, 64 and 448 pixels a side, and
reads them in this process, on one thread, with the files in the cache of the system. Each round reads all
samples once in each way; the last line is JSON with medians: bare tarfile with PIL, webdataset with PIL,
our reader in the order of the shards and shuffled, and our loader, which also makes tokens and patches.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
import webdataset
from PIL import Image

from benchmarks.miniature import PROMPT, make_proportioned
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.types import Item, Pair

SIDES = (64, 448)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512, help="Samples (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="Measured rounds (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory(prefix="rime-loading-") as folder:
        base = make_proportioned(Path(folder) / "base")
        for side in SIDES:
            corpus = write_pictures(Path(folder) / str(side), side, args.samples)
            found[f"{side} px"] = measure(ways(corpus, base), args.samples, args.rounds)
            print(f"{side} px: {found[f'{side} px']}", flush=True)
    print(json.dumps(found))


def write_pictures(
    corpus: Path, side: int, samples: int, samples_per_shard: int = 512, kind: str = "JPEG"
) -> Path:
    """Write a corpus in which a text finds a picture."""
    rng = random.Random(0)
    small = [Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3)) for _ in range(32)]
    pairs = []
    for number in range(samples):
        data = io.BytesIO()
        small[number % len(small)].resize((side, side)).save(data, kind, quality=90)
        query = Item(f"picture {number}", (), f"q{number}", "Find it.", rewrite=f"the picture {number}")
        shown = Item("", (Image.open(data),), f"t{number}", "Find it.", rewrite=f"a picture {number}")
        pairs.append(Pair(f"{number:06}", "pictures", "all", query, shown))
    write_corpus(
        corpus,
        "pictures",
        "CC0",
        {"train": pairs},
        {"train": samples},
        seed=0,
        samples_per_shard=samples_per_shard,
    )
    return corpus


def ways(corpus: Path, base: Path) -> dict[str, Callable[[], int]]:
    """Return each way to read all samples once; it returns how many it has read."""
    shards = sorted(map(str, corpus.rglob("*.tar")))
    reader = ShardReader(read_split(corpus, "train"))
    order = list(range(len(reader)))
    shuffled = random.Random(0).sample(order, len(order))

    def tars() -> int:
        count = 0
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    data = tar.extractfile(member)
                    if data is not None and member.name.endswith("jpg"):
                        Image.open(data).convert("RGB")
                        count += 1
        return count

    def web() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
        return sum(1 for _ in samples)

    def ours(numbers: list[int]) -> int:
        return sum(reader.read(number) is not None for number in numbers)

    data = RimeDataModule(str(corpus), str(base), PROMPT, batch_size=32)
    data.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.setup("fit")

    def loader() -> int:
        return sum(len(batch) for batch in data.train_dataloader())

    return {
        "tarfile": tars,
        "webdataset": web,
        "in order": lambda: ours(order),
        "shuffled": lambda: ours(shuffled),
        "with tokens and patches": loader,
    }


def measure(ways: dict[str, Callable[[], int]], samples: int, rounds: int) -> dict[str, int]:
    """Return the samples per second of each way, by the time of the processor."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, read in ways.items():
            start = time.process_time()
            count = read()
            if round_number:  # the first round only warms up
                seen[name].append(count / (time.process_time() - start))
            if count < 0.9 * samples:  # a loader leaves out the last, smaller batch
                raise SystemExit(f"{name} must read {samples} samples, but read {count}.")
    return {name: round(statistics.median(rates)) for name, rates in seen.items()}


if __name__ == "__main__":
    main()
