"""Memory of `encode` over photos of 12 megapixels: it must not grow with their number.

`python -m benchmarks.encode_memory` writes 20 photos and links to them, embeds 300 and then 2,000 of them
with a small model with random weights, in one process, and prints the peak after each. The last line is JSON.
`--photos 30 120` measures other numbers: decoding takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks.miniature import make_backbone, make_proportioned
from rime_pl.inference.retriever import Retriever

NUMBERS = (300, 2000)
FILES = 20
SIZE = (4000, 3000)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, nargs=2, default=NUMBERS, help="two numbers of photos, rising")
    few, many = parser.parse_args(words).photos
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rime-photos-") as folder:
        base = make_proportioned(Path(folder) / "base")
        retriever = Retriever(make_backbone(base, load_in_4bit=False).eval())
        paths = write_photos(Path(folder), many)
        peaks = [peak_after(retriever, paths[:count]) for count in (few, many)]
    print(json.dumps({f"peak_{many}_minus_{few}_mib": round((peaks[1] - peaks[0]) / 2**20, 1)}))


def write_photos(folder: Path, count: int) -> list[Path]:
    """Write ``FILES`` photos of flat colours, and links to them until there are ``count``."""
    photos = []
    for number in range(FILES):
        photos.append(folder / f"photo{number}.jpg")
        Image.new("RGB", SIZE, (12 * number, 255 - 12 * number, 128)).save(photos[-1])
    paths = []
    for number in range(count):
        paths.append(folder / f"{number}.jpg")
        paths[-1].symlink_to(photos[number % FILES])
    return paths


def peak_after(retriever: Retriever, paths: list[Path]) -> int:
    """Embed the photos and return the largest resident size of this process so far, in bytes (Linux)."""
    start = time.perf_counter()
    retriever.encode(paths)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{len(paths)} photos: peak {peak / 2**20:.0f} MiB, {time.perf_counter() - start:.0f} s", flush=True
    )
    return peak


if __name__ == "__main__":
    main(sys.argv[1:])
