"""Writes a folder as a stranger has it: pictures and a table of captions, taken from OpenMoji.

docs/how-to/your-own-data.md tells what a tiny model learns from such a folder; the numbers come from here:

    python -m benchmarks.own_data --output own --pictures 600
    rime run cma --corpus own

With --shuffle, each training picture has the caption of another one. What a model still finds then, it did
not learn from the pairs.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

from rime_pl.datamodules.builders.openmoji import words
from rime_pl.datamodules.builders.openmoji.pictures import Picture, load_pictures


def chosen(kind: str, count: int, seed: int) -> list[Picture]:
    """Return pictures in random order: people in several skin tones, or things, each once."""
    pictures = [one for one in load_pictures(72) if bool(one.concept.tone) == (kind == "people")]
    if not 10 <= count <= len(pictures):
        raise SystemExit(f"--pictures must be 10 to {len(pictures)} for {kind}, but is {count}.")
    return random.Random(f"own {seed}").sample(pictures, count)


def rows_of(pictures: Sequence[Picture], seed: int, shuffle: bool) -> list[dict[str, str]]:
    """Return the rows of the table: a tenth of the pictures for validation, a fifth for the test."""
    rng = random.Random(f"captions {seed}")
    captions = [rng.choice(words.names(one.concept)) for one in pictures]
    val, test = len(pictures) // 10, len(pictures) // 5
    splits = ["val"] * val + ["test"] * test + ["train"] * (len(pictures) - val - test)
    if shuffle:
        first = val + test
        captions[first:] = [*captions[first + 1 :], captions[first]]  # the pictures are in random order
    return [
        {"image": f"{number:04d}.png", "caption": caption, "split": split}
        for number, (caption, split) in enumerate(zip(captions, splits, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder to write")
    parser.add_argument("--pictures", type=int, default=600, help="Number of pictures (default: 600)")
    parser.add_argument("--kind", choices=["people", "things"], default="people", help="What they show")
    parser.add_argument("--shuffle", action="store_true", help="Whether training captions change places")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice and of the captions")
    given = parser.parse_args()
    pictures = chosen(given.kind, given.pictures, given.seed)
    rows = rows_of(pictures, given.seed, given.shuffle)
    given.output.mkdir(parents=True)
    for row, picture in zip(rows, pictures, strict=True):
        picture.image.save(given.output / row["image"])
    with (given.output / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
