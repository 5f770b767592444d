"""Speed, memory and exactness of the ranking behind the scores of public benchmarks.

`python -m benchmarks.ranking` ranks 1,000 queries among 1,000 candidates as torchmetrics does, and compares
ranks with pytrec_eval. Then a process of its own ranks 10,000 queries among 100,000 candidates of width
1,536, with up to three graded answers each, and tells how much memory it needs beyond the embeddings. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import pytrec_eval
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalNormalizedDCG, RetrievalRecall

from rime_pl.metrics.ranking import Ranking, graded_scores, rank_graded

Labels = list[dict[int, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="Threads of torch (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=10_000, help="Queries (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=100_000, help="Candidates (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1536, help="Embedding width (default: %(default)s)")
    parser.add_argument(
        "--measured", action="store_true", help="Be the measured process; set by this program"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measured:
        print(json.dumps(measure(args.queries, args.candidates, args.width)))
        return
    result = compare()
    print(result, flush=True)
    words = [sys.executable, "-m", "benchmarks.ranking", "--measured", *sys.argv[1:]]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    print(json.dumps(result | json.loads(done.stdout.strip().splitlines()[-1])))


def data(queries: int, candidates: int, width: int, labels: int) -> tuple[Tensor, Tensor, Labels]:
    """Return random normalised embeddings and up to ``labels`` graded answers of each query."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for count in (queries, candidates):
        side = torch.randn(count, width, generator=generator)
        sides.append(side.div_(side.norm(dim=-1, keepdim=True)))
    places = torch.randint(candidates, (queries, labels), generator=generator).tolist()
    return sides[0], sides[1], [{place: float(n + 1) for n, place in enumerate(row)} for row in places]


def compare() -> dict[str, float]:
    """Return the ratio of times to torchmetrics, and the share of ranks that equal pytrec_eval's."""
    queries, gallery, labels = data(1000, 1000, 256, 3)
    times = [
        (
            timed(lambda: graded_scores(rank_graded(queries, gallery, labels))),
            timed(lambda: with_torchmetrics(queries, gallery, labels)),
        )
        for _ in range(4)  # by turns, and the first time memory is taken
    ]
    ours, theirs = map(min, zip(*times, strict=True))
    scores = (queries.double() @ gallery.double().T).tolist()
    run = {str(n): {str(place): score for place, score in enumerate(row)} for n, row in enumerate(scores)}
    equal = 0
    found: Ranking = rank_graded(queries, gallery, labels)
    for n, one in enumerate(labels):
        for j, place in enumerate(one):  # the rank of each right answer, as of the only one
            asked = {str(n): {str(place): 1}}
            told = pytrec_eval.RelevanceEvaluator(asked, {"recip_rank"}).evaluate({str(n): run[str(n)]})
            equal += round(1 / told[str(n)]["recip_rank"]) == int(found.ranks[n, j])
    return {
        "times_torchmetrics": round(theirs / ours, 1),
        "seconds_1000x1000": round(ours, 4),
        "ranks_equal_to_pytrec_eval": round(equal / sum(map(len, labels)), 6),
    }


def with_torchmetrics(queries: Tensor, gallery: Tensor, labels: Labels) -> None:
    """Compute three scores at one k; ours are eight at three k."""
    size = len(gallery)
    target = torch.zeros(len(queries), size, dtype=torch.int64)
    for n, one in enumerate(labels):
        target[n, list(one)] = torch.tensor([int(grade) for grade in one.values()])
    scores = F.sigmoid(queries @ gallery.T).flatten()
    indexes = torch.arange(len(queries)).repeat_interleave(size)
    for metric, right in (
        (RetrievalHitRate(top_k=10), target > 0),
        (RetrievalRecall(top_k=10), target > 0),
        (RetrievalNormalizedDCG(top_k=10), target),
    ):
        metric(scores, right.flatten(), indexes)


def timed(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(queries: int, candidates: int, width: int) -> dict[str, float]:
    """Return gigabytes beyond the embeddings and seconds of a large ranking, in this process."""
    small = data(64, 256, width, 3)
    graded_scores(rank_graded(*small, keep=10))  # libraries take their memory
    inputs = data(queries, candidates, width, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    scores = graded_scores(rank_graded(*inputs, keep=10))
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "extra_gb": round((after - before) / 1e9, 3),
        "seconds_large": round(seconds, 1),
        "recall@10": round(float(scores["recall@10"].mean()), 6),
        "ndcg_linear@10": round(float(scores["ndcg_linear@10"].mean()), 6),
    }


if __name__ == "__main__":
    main()
