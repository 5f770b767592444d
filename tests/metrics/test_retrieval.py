"""Ranks: equal to a naive loop and to pytrec_eval, and the same on one and on two processes."""

from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rime_pl.metrics.retrieval import (
    RecallMetric,
    first_rows,
    recall_at,
    reciprocal_ranks,
    retrieval_ranks,
)

PAIRS = {"disc-disc": ("disc", "disc"), "gen-disc": ("gen", "disc")}


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def naive_ranks(queries: Tensor, gallery: Tensor, contents: Tensor, relevant: Tensor) -> list[int]:
    """One loop per query over the full matrix, written out from the definition."""
    ranks = []
    for query, wanted in zip(queries.double(), relevant.tolist(), strict=True):
        scores = {c: float(query @ g) for c, g in zip(contents.tolist(), gallery.double(), strict=True)}
        ahead = [c for c, score in scores.items() if c != wanted and score >= scores[wanted] - 1e-9]
        ranks.append(1 + len(ahead))
    return ranks


@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_ranks_equal_the_naive_loop(chunk_size: int) -> None:
    gallery, queries = unit(53, 8, seed=0), unit(31, 8, seed=1)
    contents = torch.randperm(53, generator=torch.Generator().manual_seed(2)) * 17 - 300
    relevant = contents[torch.randint(53, (31,), generator=torch.Generator().manual_seed(3))]
    ranks = retrieval_ranks(queries, gallery, contents, relevant, chunk_size)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == naive_ranks(queries, gallery, contents, relevant)


def test_pytrec_eval_agrees_on_recall_and_mrr() -> None:
    gallery, queries = unit(60, 6, seed=4), unit(25, 6, seed=5)
    contents = torch.arange(60)
    relevant = torch.randint(60, (25,), generator=torch.Generator().manual_seed(6))
    ranks = retrieval_ranks(queries, gallery, contents, relevant)
    scores = queries.double() @ gallery.double().T
    # half of all cosines are negative: RetrievalRecall of torchmetrics would treat them as "not retrieved"
    assert (scores < 0).any()
    run = {str(q): {str(d): float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}
    truth = {str(q): {str(d): 1} for q, d in enumerate(relevant.tolist())}
    peer = pytrec_eval.RelevanceEvaluator(truth, {"recall_1,5,10", "recip_rank"}).evaluate(run)
    for query, rank in enumerate(ranks):
        assert peer[str(query)]["recip_rank"] == pytest.approx(float(reciprocal_ranks(rank)))
        for k in (1, 5, 10):
            assert peer[str(query)][f"recall_{k}"] == float(recall_at(rank, k))


@pytest.mark.parametrize("width", [3, 1536])
def test_constant_embeddings_get_the_worst_rank(width: int) -> None:
    # odd sizes: the blocks at the edges of a matrix product round differently, which must not break the tie
    vector = unit(1, width, seed=7)
    gallery, queries = vector.expand(77, -1), vector.expand(13, -1)
    relevant = torch.arange(13)
    ranks = retrieval_ranks(queries, gallery, torch.arange(77), relevant, chunk_size=10)
    assert ranks.tolist() == [77] * 13


def test_embeddings_that_are_not_a_number_get_the_worst_rank() -> None:
    gallery, queries = unit(9, 4, seed=8), torch.full((2, 4), float("nan"))
    assert retrieval_ranks(queries, gallery, torch.arange(9), torch.tensor([0, 8])).tolist() == [9, 9]


def test_a_missing_target_ranks_behind_the_whole_gallery() -> None:
    gallery = unit(5, 4, seed=9)
    ranks = retrieval_ranks(gallery[:2], gallery, torch.arange(5), torch.tensor([99, 1]))
    assert ranks.tolist() == [6, 1]


def test_duplicates_in_the_gallery_are_refused() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        retrieval_ranks(unit(1, 4, seed=0), unit(2, 4, seed=0), torch.tensor([3, 3]), torch.tensor([3]))


def test_first_rows_keeps_the_first_in_order() -> None:
    keys, order = torch.tensor([4, 9, 4, 9, 1]), torch.tensor([3, 4, 2, 1, 0])
    assert first_rows(keys, order).tolist() == [3, 4, 2]


def rows(side: str, seed: int, count: int) -> dict:
    """``count`` items of one side in two galleries; contents repeat in the gallery (duplicates)."""
    index = torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    relevant = index % 11 if side == "target" else torch.randint(11, (count,), generator=generator)
    return {
        "side": side,
        "vectors": {"disc": unit(count, 8, seed=seed), "gen": unit(count, 8, seed=seed + 100)},
        "item_ids": index,
        "relevant_ids": relevant,
        "gallery_ids": index % 2 if side == "target" else relevant % 2,
        "task_ids": index % 3,
        "distractor": (index >= 22) & torch.tensor(side == "target"),
    }


def part(batch: dict, index: Tensor) -> dict:
    vectors = {view: vector[index] for view, vector in batch["vectors"].items()}
    return {k: (v[index] if isinstance(v, Tensor) else v) for k, v in {**batch, "vectors": vectors}.items()}


def test_of_duplicates_the_lowest_item_id_is_kept_and_a_real_item_before_a_distractor() -> None:
    batch = rows("target", 0, 4)
    batch["relevant_ids"] = torch.tensor([5, 6, 5, 7])
    batch["gallery_ids"] = torch.zeros(4, dtype=torch.int64)
    batch["distractor"] = torch.tensor([True, False, False, False])
    query = part(rows("query", 1, 1), torch.tensor([0]))
    query["relevant_ids"], query["gallery_ids"] = torch.tensor([5]), torch.tensor([0])
    query["vectors"] = {view: -vector[:1] for view, vector in batch["vectors"].items()}
    batch["vectors"]["disc"][2] = -batch["vectors"]["disc"][0]  # the real duplicate: a perfect match
    metric = RecallMetric({"disc-disc": ("disc", "disc")})
    metric.update(**batch)
    metric.update(**query)
    for distractors in (False, True):
        table = metric.ranks(distractors)
        assert table.gallery_sizes.tolist() == [3]
        assert table.ranks["disc-disc"].tolist() == [1]


def test_distractors_never_improve_a_rank_and_galleries_stay_separate() -> None:
    metric = RecallMetric(PAIRS)
    queries, targets = rows("query", 0, 40), rows("target", 1, 60)
    targets["relevant_ids"][22:] += 1000  # distractors hold other contents
    metric.update(**queries)
    metric.update(**targets)
    few, many = metric.ranks(), metric.ranks(distractors=True)
    assert (many.gallery_sizes > few.gallery_sizes).all() and few.found().all()
    for pair, (view, other) in PAIRS.items():
        assert (many.ranks[pair] >= few.ranks[pair]).all()
        for q in range(40):
            same = (targets["gallery_ids"] == queries["gallery_ids"][q]).nonzero()[:, 0]
            kept = same[(same < 22)]
            kept = kept[first_rows(targets["relevant_ids"][kept], torch.arange(len(kept)))]
            expected = naive_ranks(
                queries["vectors"][view][[q]],
                targets["vectors"][other][kept],
                targets["relevant_ids"][kept],
                queries["relevant_ids"][[q]],
            )
            assert few.ranks[pair][q].item() == expected[0]


def test_batches_their_order_and_repeated_rows_change_nothing() -> None:
    whole, pieces = RecallMetric(PAIRS), RecallMetric(PAIRS)
    for batch in (rows("query", 0, 41), rows("target", 1, 57)):
        whole.update(**batch)
        shuffled = torch.randperm(len(batch["item_ids"]), generator=torch.Generator().manual_seed(9))
        for index in [*shuffled.split(7), shuffled[:5]]:
            pieces.update(**part(batch, index))
    one, other = whole.ranks(True), pieces.ranks(True)
    assert one.item_ids.tolist() == other.item_ids.tolist() == list(range(41))
    assert one.task_ids.tolist() == other.task_ids.tolist()
    for pair in PAIRS:
        assert one.ranks[pair].tolist() == other.ranks[pair].tolist()
    assert {k: float(v) for k, v in whole.compute().items()} == {
        k: float(v) for k, v in pieces.compute().items()
    }


def test_chunks_change_nothing_and_no_block_is_larger() -> None:
    class Largest(TorchDispatchMode):
        scores = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                self.scores = max(self.scores, out.numel())
            return out

    tables, largest = [], []
    for chunk_size in (4096, 8):
        metric = RecallMetric(PAIRS, chunk_size=chunk_size)
        for batch in (rows("query", 0, 41), rows("target", 1, 57)):
            metric.update(**batch)
        with Largest() as mode:
            tables.append(metric.ranks(distractors=True).ranks)
        largest.append(mode.scores)
    assert largest[1] == 8 * 8 < largest[0]
    assert all(tables[0][pair].tolist() == tables[1][pair].tolist() for pair in PAIRS)


def work(rank: int, folder: str, queries_of_second: bool) -> None:
    """One of two processes: it takes every second row, padded so that both have the same number."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    metric, sent, send = RecallMetric(PAIRS, chunk_size=5), [], torch.distributed.all_gather

    def all_gather(found: list[Tensor], block: Tensor) -> None:
        sent.append(len(block))
        send(found, block)

    torch.distributed.all_gather = all_gather  # type: ignore[assignment]
    for batch in (rows("query", 0, 41), rows("target", 1, 57)):
        count = len(batch["item_ids"])
        index = torch.arange(rank, count + rank, 2) % count  # wraps around: a repeat on the second process
        if batch["side"] == "target" or rank == 0 or queries_of_second:
            for piece in index.split(6):
                metric.update(**part(batch, piece))
        if batch["side"] == "query" and rank == 0 and not queries_of_second:
            metric.update(**part(batch, torch.arange(1, count, 2)))
    table = metric.ranks(distractors=True)
    assert max(sent) == 5  # the processes exchange blocks, never the whole
    recalls = {name: float(value) for name, value in metric.compute().items()}
    saved = (table.item_ids, table.gallery_sizes, table.ranks, recalls)
    torch.save(saved, Path(folder) / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("queries_of_second", [True, False], ids=["uneven", "no-query-on-second"])
def test_two_processes_equal_one(tmp_path: Path, queries_of_second: bool) -> None:
    metric = RecallMetric(PAIRS)
    metric.update(**rows("query", 0, 41))
    metric.update(**rows("target", 1, 57))
    single = metric.ranks(distractors=True)
    context = torch.multiprocessing.get_context("fork")  # spawn would import torch twice more
    processes = [context.Process(target=work, args=(r, str(tmp_path), queries_of_second)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        item_ids, sizes, ranks, recalls = torch.load(tmp_path / f"rank{rank}.pt")
        assert item_ids.tolist() == single.item_ids.tolist()
        assert sizes.tolist() == single.gallery_sizes.tolist()
        assert {pair: found.tolist() for pair, found in ranks.items()} == {
            pair: found.tolist() for pair, found in single.ranks.items()
        }
        assert recalls == {name: float(value) for name, value in metric.compute().items()}


def test_a_metric_of_shorter_embeddings_equals_one_that_was_given_them() -> None:
    generator = torch.Generator().manual_seed(0)
    views = {"disc-gen": ("disc", "gen"), "trace/x": ("x", "gen"), "disc-disc": ("disc", "disc")}
    ids, zero = torch.arange(20), torch.zeros(20, dtype=torch.int64)
    whole, short = RecallMetric(views, (1, 3)), RecallMetric({"disc-gen": ("disc", "gen")}, (1, 3))
    for side, names in (("query", ("disc", "x")), ("target", ("disc", "gen"))):
        vectors = {
            name: torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=-1)
            for name in names
        }
        whole.update(side, vectors, ids, ids, zero, zero, zero.bool())  # type: ignore[arg-type]
        cut = {name: torch.nn.functional.normalize(rows[:, :3], dim=-1) for name, rows in vectors.items()}
        kept = {name: rows for name, rows in cut.items() if name in ("disc" if side == "query" else "gen")}
        short.update(side, kept, ids, ids, zero, zero, zero.bool())  # type: ignore[arg-type]
    assert whole.cut(3, ["disc-gen"]).compute() == short.compute() != whole.compute()
