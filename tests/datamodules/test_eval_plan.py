"""What evaluation reads: queries, galleries, distractors, memory splits, limits, modes, several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colour_corpus import make_splits, on_rank, with_broken_image

from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.errors import DataError, RimeError

MakeData = Callable[..., RimeDataModule]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_val_loaders_hold_each_query_and_each_distinct_target(make_data: MakeData, num_workers: int) -> None:
    data = make_data(eval_batch_size=4, num_workers=num_workers)
    data.setup("validate")
    queries, gallery = ([*loader] for loader in data.val_dataloader())
    assert [batch.side for batch in queries + gallery] == ["query"] * len(queries) + ["target"] * len(gallery)
    assert all(len(set(batch.datasets)) == 1 and len(batch) <= 4 for batch in queries)
    assert sorted(key.split("/")[1] for batch in queries for key in batch.keys) == sorted(
        pair.key for pair in make_splits()["val"]
    )
    contents = [content for batch in gallery for content in batch.content_ids.tolist()]
    assert len(contents) == len(set(contents)) == 6 + 7
    assert {r for batch in queries for r in batch.relevant_ids.tolist()} == set(contents)
    assert not any(batch.distractor.any() for batch in gallery)


def test_evaluation_decodes_the_pictures_of_one_side(make_data: MakeData, tmp_path: Path) -> None:
    """A picture of the target that cannot be read does not stop the queries, which are texts."""
    path, name = with_broken_image(tmp_path, "val")
    data = make_data(path=path)
    data.setup("validate")
    queries, gallery = data.val_dataloader()
    assert name in [key for batch in queries for key in batch.keys] and not data.broken
    with pytest.raises(DataError, match=r"1 of 18 samples"):
        list(gallery)


@pytest.mark.parametrize("distractors", [True, False])
def test_test_gallery_with_and_without_distractors(make_data: MakeData, distractors: bool) -> None:
    data = make_data(distractors=distractors)
    data.setup("test")
    gallery = [*data.test_dataloader()[1]]
    contents = [content for batch in gallery for content in batch.content_ids.tolist()]
    flags = [flag for batch in gallery for flag in batch.distractor.tolist()]
    # 15 distractors, of which five show what is a target anyway
    assert len(contents) == len(set(contents)) == 5 + 5 + (10 if distractors else 0)
    assert sum(flags) == (10 if distractors else 0)


def test_the_queries_of_memory_splits_are_asked_at_the_test_only(make_data: MakeData) -> None:
    """A memory split is any split; its items without a query are no distractors."""

    def read(split: str, memory: list[str] | None) -> tuple[set[str], int, int]:
        data = make_data(distractors=False, memory_splits=memory)
        data.setup("test")
        queries, gallery = data.test_dataloader() if split == "test" else data.val_dataloader()
        keys = {key for batch in queries for key in batch.keys}
        flags = [flag for batch in gallery for flag in batch.distractor.tolist()]
        return {key.split("-")[0] for key in keys}, len(flags), sum(flags)

    assert read("test", None)[0] == {"test"}
    splits, size, _ = read("test", ["val"])
    assert splits == {"test", "val"} and size > read("test", None)[1]
    assert read("val", ["val"]) == read("val", None)
    with pytest.raises(DataError, match="split 'seen' is missing"):
        read("test", ["seen"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_on_ranks_covers_all_with_equally_many_batches(
    make_data: MakeData, world_size: int
) -> None:
    def read(data: RimeDataModule) -> list[list[Any]]:
        data.setup("test")
        return [[*loader] for loader in data.test_dataloader()]

    alone = read(make_data(eval_batch_size=3))
    ranks = [read(on_rank(make_data(eval_batch_size=3), rank, world_size)) for rank in range(world_size)]
    for side in (0, 1):
        assert len({len(rank[side]) for rank in ranks}) == 1
        ids = {i for rank in ranks for batch in rank[side] for i in batch.item_ids.tolist()}
        assert ids == {i for batch in alone[side] for i in batch.item_ids.tolist()}


def test_a_limit_that_leaves_no_query_of_a_headline_task_is_refused_before_training(
    make_data: MakeData,
) -> None:
    tasks = make_data().query_tasks("val")
    assert len(tasks) > 1 and make_data(limit_val_queries=len(tasks)).query_tasks("val") == tasks
    with pytest.raises(RimeError, match=rf"limit_val_queries must be at least {len(tasks)}, .* but is 1\."):
        make_data(limit_val_queries=1).query_tasks("val")


def test_limit_val_queries_is_even_over_tasks_and_fixed_by_the_seed(make_data: MakeData) -> None:
    def keys(**settings: Any) -> list[str]:
        data = make_data(limit_val_queries=6, **settings)
        data.setup("validate")
        queries, gallery = data.val_dataloader()
        assert sum(len(batch) for batch in gallery) == 13
        return [key for batch in queries for key in batch.keys]

    chosen = keys()
    assert sum("big" in key for key in chosen) == sum("small" in key for key in chosen) == 3
    assert keys() == chosen
    assert keys(seed=1) != chosen


@pytest.mark.parametrize("seed", [0, 1])
def test_a_limited_gallery_holds_the_right_answers_and_some_others(make_data: MakeData, seed: int) -> None:
    def gallery(limit: int | None) -> tuple[set[int], set[int], int]:
        data = make_data(limit_val_queries=4, limit_val_gallery=limit, seed=seed)
        data.setup("validate")
        queries, targets = ([*loader] for loader in data.val_dataloader())
        assert data.evaluation("test").left_out == 0
        right = {one for batch in queries for one in batch.relevant_ids.tolist()}
        return (
            right,
            {one for batch in targets for one in batch.content_ids.tolist()},
            data.evaluation("val").left_out,
        )

    right, whole, left_out = gallery(None)
    assert len(whole) == 13 and left_out == 0 and right < whole
    for limit in (0, 1, 2):
        right, some, left_out = gallery(limit)
        assert right <= some and left_out == 13 - len(some)
        # the same for every seed: the lowest hashes of what no query asks for
        assert some - right == set(sorted(whole - right)[:limit])
    assert gallery(100)[1:] == (whole, 0)
    with pytest.raises(RimeError, match=r"data.limit_val_gallery must be 0 or more, but is -1"):
        make_data(limit_val_gallery=-1)


def test_validation_asks_for_the_modes_of_its_setting_and_the_test_for_both(make_data: MakeData) -> None:
    data = make_data(val_modes=["discriminative"])
    data.setup("validate")
    assert not any(batch.generative for loader in data.val_dataloader() for batch in loader)
    assert all(batch.generative for loader in data.test_dataloader() for batch in loader)
    assert len(data.sample_batches(4)) == 0  # of Refine-RL, which would write rewrites for them
    whole = make_data()
    whole.setup("validate")
    assert all(batch.generative for loader in whole.val_dataloader() for batch in loader)
    assert len(whole.sample_batches(4)) == 2
    for modes in ([], ["generative"]):
        with pytest.raises(RimeError, match=r"data.val_modes must be null, for both modes, or hold discrim"):
            make_data(val_modes=modes)
