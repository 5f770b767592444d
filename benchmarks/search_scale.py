"""Search over a large index: exact against FAISS, in milliseconds for each query, and FAISS's recall.

`python -m benchmarks.search_scale` writes an index of made-up vectors into a folder, which needs no model: a
mixture of 2,000 clusters, and queries that are items with noise. It searches the parts exactly, as they are
read from disk and in memory, and by FAISS. The last line is JSON: recall@10 of FAISS is the share of the ten
exact nearest items that it finds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.inference.approximate import Approximate
from rime_pl.inference.index_folder import PART, Facts, IndexFolder, Record, read_blocks, table_of, write_part
from rime_pl.metrics.top_k import top_k

_CLUSTERS = 2000


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000, help="Items (default: %(default)s)")
    parser.add_argument(
        "--dimension", type=int, default=128, help="Numbers of a vector (default: %(default)s)"
    )
    parser.add_argument("--queries", type=int, default=64, help="Queries of a batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="Threads (default: %(default)s)")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    import faiss

    faiss.omp_set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="rime-scale-") as name:
        folder = IndexFolder(name)
        queries = write_index(folder, args.items, args.dimension, args.queries)
        parts = folder.parts()
        (_, exact), from_disk = timed(lambda: top_k(queries, read_blocks(parts, "discriminative"), 10))
        kept = torch.cat(list(read_blocks(parts, "discriminative")))
        _, in_memory = timed(lambda: top_k(queries, kept.split(PART), 10))
        approximate, build = timed(lambda: Approximate.of(folder, parts, "discriminative"))
        (_, rows), visited = timed(lambda: approximate.nearest(queries, 10))
    found = [len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), rows.tolist(), strict=True)]
    share = 1000 / args.queries
    result = {
        "items": args.items,
        "recall@10": round(sum(found) / len(found), 4),
        "exact_from_disk_ms": round(share * from_disk, 3),
        "exact_in_memory_ms": round(share * in_memory, 3),
        "faiss_ms": round(share * visited, 3),
        "faiss_build_s": round(build, 1),
    }
    print(json.dumps(result))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the seconds that it took."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def write_index(folder: IndexFolder, items: int, dimension: int, queries: int) -> Tensor:
    """Write an index and return queries (Q, D): some of its items with noise."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(_CLUSTERS, dimension, generator=generator)
    facts = Facts("", dimension, ["discriminative"], "", count=items)
    folder.write_facts(facts)
    chosen: list[Tensor] = []
    for number, start in enumerate(range(0, items, PART)):
        size = min(PART, items - start)
        of = torch.randint(_CLUSTERS, (size,), generator=generator)
        vectors = F.normalize(centres[of] + torch.randn(size, dimension, generator=generator), dim=1)
        records = [Record(str(start + row), (start + row).to_bytes(8, "big")) for row in range(size)]
        path = folder.path / f"part-{number:05d}.parquet"
        write_part(path, table_of(facts, records, {"discriminative": vectors}, [None] * size))
        if len(chosen) < queries:
            chosen.append(vectors[0])
    noisy = torch.stack(chosen)
    return F.normalize(noisy + 0.3 * torch.randn(noisy.shape, generator=generator) / dimension**0.5, dim=1)


if __name__ == "__main__":
    main(sys.argv[1:])
