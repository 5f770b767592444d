"""Memory, first batch and open files of a training split of ten million pairs.

`python -m benchmarks.index` writes an index of 20,000 shard names, which are links to a few tars of small
pictures, and reads it as one rank of a run does: data module, plan, workers that decode. No tokens
are made, whose memory would hide that of the index. The rank is a process of its own. The last line is JSON:
anonymous memory of the rank over that after its imports, largest growth of the private memory of a worker
since its start, seconds to the first batch, and open files of the process that has most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.loading import write_pictures
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.split_index import COLUMNS, COLUMNS_FILE, FACTS, SplitIndex
from rime_pl.prompts import PromptConfig
from rime_pl.types import Batch, Completions, Pair, Prompts, Rows, content_hash

_TARS = 4
_WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000_000, help="Pairs (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=20_000, help="Shard names (default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, default=16, help="Batches that are read (default: %(default)s)"
    )
    parser.add_argument("--rank", type=Path, help="Folder that a measured process reads; set by this program")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rank:
        print(json.dumps(measure(args.rank, args.batches)))
        return
    with tempfile.TemporaryDirectory(prefix="rime-index-") as folder:
        corpus = write(Path(folder), args.pairs, args.shards)
        size = (corpus / "train" / COLUMNS_FILE).stat().st_size
        print(
            f"{args.pairs:,} pairs in {args.shards:,} shards, {size / args.pairs:.0f} bytes a pair",
            flush=True,
        )
        words = [sys.executable, "-m", "benchmarks.index", "--rank", folder, "--batches", str(args.batches)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout.strip().splitlines()[-1])


def write(folder: Path, pairs: int, shards: int) -> Path:
    """Write a corpus whose shards are links to a few tars, and whose index is theirs, repeated."""
    per_shard = pairs // shards
    if per_shard * shards != pairs or shards % _TARS:
        raise SystemExit(f"--shards must divide --pairs and be a multiple of {_TARS}.")
    corpus = write_pictures(folder / "corpus", 64, per_shard * _TARS, per_shard)
    train = SplitIndex(corpus / "train")
    names = [f"many-{number:06}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        os.link(corpus / "train" / train.shards[number % _TARS].name, corpus / "train" / name)
    facts = json.loads((corpus / "train" / FACTS).read_text())
    facts["shards"] = [[name, *facts["shards"][number % _TARS][1:]] for number, name in enumerate(names)]
    (corpus / "train" / FACTS).write_text(json.dumps(facts))
    with (corpus / "train" / f"{COLUMNS_FILE}.new").open("wb") as file:
        for name in COLUMNS:
            column = train.columns[name]
            for _ in range(shards // _TARS):
                file.write(column.tobytes())
    (corpus / "train" / f"{COLUMNS_FILE}.new").replace(corpus / "train" / COLUMNS_FILE)
    about = read_corpus(corpus)
    about["splits"]["train"] |= {"shards": names, "samples": pairs}
    (corpus / "corpus.json").write_text(json.dumps(about))
    return corpus


def kib(file: str, start: str) -> int:
    """Return the bytes of the lines of a file of /proc that begin with ``start``."""
    lines = Path(file).read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(start))


class Plain:
    """A processor that makes no tokens: a batch of the hashes of the contents."""

    def check(self, pair: Pair, sides: object, cut: bool) -> tuple[Pair, list[str]]:
        return pair, []

    def training_batch(self, pairs: Sequence[Pair], position: int, further: bool = False) -> Batch:
        queries, targets = ([getattr(pair, side) for pair in pairs] for side in ("query", "target"))
        assert all(item.media[0].size[0] >= 64 for item in targets)
        query, target = (
            torch.tensor([content_hash(item.content_id) for item in items]) for items in (queries, targets)
        )
        return Batch(
            query=self._rows(query[:, None]),
            target=self._rows(target[:, None]),
            query_content=query,
            target_content=target,
            dataset=pairs[0].dataset,
            keys=[pair.key for pair in pairs],
            position=position,
        )

    def _rows(self, ids: torch.Tensor) -> Rows:
        ones = torch.ones_like(ids)
        prompts = Prompts(ids, ones, None, None, torch.zeros(len(ids), dtype=torch.int64))
        return Rows(prompts, Completions(torch.zeros_like(ids), ones), torch.ones(len(ids), dtype=torch.bool))


class Watch(threading.Thread):
    """Looks at the memory and the open files of this process and its workers, ten times a second.

    What a worker shares with the rank after the fork counts for the rank, so its anonymous memory is taken.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = kib("/proc/self/status", "RssAnon")
        self.starts: dict[int, int] = {}
        self.rank, self.worker, self.descriptors, self.ended = 0, 0, 0, False

    def run(self) -> None:
        while not self.ended:
            self.look()
            time.sleep(0.1)

    def look(self) -> None:
        self.rank = max(self.rank, kib("/proc/self/status", "RssAnon") - self.before)
        for pid in [os.getpid(), *self._workers()]:
            try:
                self.descriptors = max(self.descriptors, len(list(Path(f"/proc/{pid}/fd").iterdir())))
                if pid != os.getpid():
                    private = kib(f"/proc/{pid}/smaps_rollup", "Private_")
                    self.worker = max(self.worker, private - self.starts.setdefault(pid, private))
            except OSError:
                continue

    def _workers(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def measure(folder: Path, batches: int) -> dict[str, float]:
    """Read the first batches as a rank does; return the numbers of the last line."""
    import lightning as L

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    data = RimeDataModule(
        *(str(folder / "corpus"), "no model", PromptConfig()),
        batch_size=1024,
        num_workers=_WORKERS,
        steps_per_epoch=batches,
    )
    data.trainer, data.processor = trainer, Plain()  # type: ignore[assignment]
    data.setup("fit")
    reading = iter(data.train_dataloader())
    rows = len(next(reading))
    first = time.perf_counter() - start
    rows += sum(map(len, reading))
    watch.ended = True
    watch.join()
    watch.look()
    if rows != batches * 1024:
        raise SystemExit(f"{batches} batches must hold {batches * 1024} pairs, but hold {rows}.")
    return {
        "gb_per_rank": round(watch.rank / 1e9, 3),
        "worker_mb": round(watch.worker / 1e6, 1),
        "first_batch_s": round(first, 1),
        "descriptors": watch.descriptors,
    }


if __name__ == "__main__":
    main()
