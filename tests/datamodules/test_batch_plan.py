"""The order of the data depends on seed and position, and on nothing else."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rime_pl.datamodules.batch_plan import BatchPlan, OrderSettings
from rime_pl.errors import RimeError

SIZES = {"a": 103, "b": 41, "c": 16}
DATASETS = [name for name, size in SIZES.items() for _ in range(size)]
CONTENTS = np.array([n % 30 for n in range(len(DATASETS))])


def made(
    datasets: list[str],
    contents: NDArray[np.int64],
    batch_size: int = 8,
    seed: int = 0,
    shards: NDArray[np.uint32] | None = None,
    factors: list[float] | None = None,
    annotated: NDArray[np.bool_] | None = None,
    annotated_share: float | None = None,
    **order: Any,
) -> BatchPlan:
    names = sorted(set(datasets))
    codes = np.array([names.index(name) for name in datasets], np.uint16)
    settings = OrderSettings(**order)
    return BatchPlan(
        *(names, codes, contents.__getitem__, batch_size, seed, annotated, annotated_share, shards),
        order=settings,
        weights=factors,
    )


def plan(seed: int = 0, batch_size: int = 8, **order: Any) -> BatchPlan:
    return made(DATASETS, CONTENTS, batch_size, seed, **order)


def one_pass(of: BatchPlan, number: int = 0) -> list[list[int]]:
    return [of.batch(position).indices for position in range(number * len(of), (number + 1) * len(of))]


def test_a_pass_holds_every_full_batch_of_every_task_once() -> None:
    batches = [plan().batch(position) for position in range(len(plan()))]
    assert Counter(batch.dataset for batch in batches) == {"a": 103 // 8, "b": 41 // 8, "c": 16 // 8}
    used = [index for batch in batches for index in batch.indices]
    assert len(used) == len(set(used))
    for batch in batches:
        assert len(batch.indices) == 8
        assert {DATASETS[index] for index in batch.indices} == {batch.dataset}
    assert plan().report() == "19 batches a pass; 8 pairs wait for another pass (a: 7, b: 1)"


def test_any_position_can_be_read_first() -> None:
    whole = [plan().batch(position) for position in range(3 * len(plan()))]
    order = list(range(len(whole)))
    random.Random(0).shuffle(order)
    other = plan()
    assert {position: other.batch(position) for position in order} == dict(enumerate(whole))


def test_passes_and_seeds_differ() -> None:
    first = one_pass(plan())
    assert first != one_pass(plan(), 1)
    assert first != one_pass(plan(seed=1))


FIRST = [22, 85, 40, 97, 27, 42, 26, 96]


def test_the_order_is_that_of_every_machine_and_version() -> None:
    """A checkpoint of today must go on with the same batches tomorrow."""
    assert plan().batch(0).indices == FIRST


def test_what_one_pass_drops_comes_in_another() -> None:
    assert {index for n in range(5) for batch in one_pass(plan(), n) for index in batch} == set(range(160))


def test_no_content_twice_in_a_batch_as_long_as_there_are_enough() -> None:
    shared = plan()
    for position in range(4 * len(shared)):
        assert len({CONTENTS[index] for index in shared.batch(position).indices}) == 8, position


def test_neighbouring_batches_share_no_more_contents_than_distant_ones() -> None:
    """5 samples of each of 320 contents: dealt in turn and not shuffled, neighbours would share 4 of 5."""
    contents = np.arange(1600) % 320
    batches = [set(contents[batch]) for batch in one_pass(made(["a"] * 1600, contents, 32))]
    near = [len(one & other) for one, other in itertools.pairwise(batches)]
    distant = [len(one & other) for one, other in itertools.combinations(batches, 2)]
    assert np.mean(near) < 2 * np.mean(distant)


def test_duplicates_fill_a_batch_when_they_cannot_be_avoided() -> None:
    few = made(["a"] * 40, np.arange(40) % 3)
    for batch in one_pass(few):
        assert len(set(batch)) == 8 and len({n % 3 for n in batch}) == 3


def test_many_samples_of_one_content_are_planned_fast() -> None:
    few = made(["a"] * 20000, np.zeros(20000, int), 64)
    assert len(few.batch(0).indices) == 64


def test_an_annotated_pair_and_another_of_one_content_go_to_different_batches() -> None:
    """Contents 0 to 9 twice: once annotated, once not."""
    annotated = np.arange(20) < 10
    both = made(["a"] * 20, np.arange(20) % 10, 4, annotated=annotated, annotated_share=0.5)
    for number in range(20):
        for batch in one_pass(both, number):
            assert annotated[batch].tolist() == [True, True, False, False]
            assert len({index % 10 for index in batch}) == 4


# -- weights, caps, blocks and small tasks --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_every_pass_is_the_multiset_of_the_settings(seed: int) -> None:
    """Random sizes of tasks and tars, weights, caps, batches, blocks and windows."""
    rng = random.Random(seed)
    sizes = {name: rng.randrange(30, 400) for name in "abcd"[: rng.randrange(1, 5)]}
    datasets = [name for name, size in sizes.items() for _ in range(size)]
    if seed % 2:
        rng.shuffle(datasets)  # tars of several tasks
    shards = np.cumsum([rng.random() < 1 / rng.choice((3, 40)) for _ in datasets]).astype(np.uint32)
    block = rng.choice((1, 2, 5))
    batch_size = block * rng.choice((1, 2, 4))
    weights = {name: rng.choice((0.3, 1.0, 1.0, 2.0, 2.5)) for name in sizes}
    caps = {name: rng.randrange(20, 500) for name in sizes if rng.random() < 0.4}
    settings = {"weights": weights, "caps": caps, "block_size": block, "window": rng.choice((1, 20, 16384))}
    of = made(
        datasets, np.arange(len(datasets)), batch_size, seed, shards, small_tasks="leave_out", **settings
    )
    unit, lost = block, 0
    for number in range(3):
        batches = [of.batch(number * len(of) + offset) for offset in range(len(of))]
        seen = Counter(index for batch in batches for index in batch.indices)
        blocks = Counter(name for batch in batches for name in batch.datasets)
        for batch in batches:
            assert len(batch.indices) == batch_size
            for place, name in enumerate(batch.datasets):
                assert {datasets[n] for n in batch.indices[place * unit : (place + 1) * unit]} == {name}
        for name, size in sizes.items():
            coming = min(size, caps.get(name, size))
            expected = int(weights[name] * coming + 1e-6) // unit
            lost += expected - blocks[name]
            assert expected - batch_size // unit < blocks[name] <= expected
            counts = [seen[index] for index, dataset in enumerate(datasets) if dataset == name]
            most = -(-expected * unit // size)
            assert sum(counts) == blocks[name] * unit and max(counts) <= most
            if weights[name] == 1 and name not in caps and batch_size == unit:
                assert sum(counts) == size - size % unit and max(counts) <= 1  # each once, the rest counted
    assert 0 <= lost < 3 * batch_size // unit


@pytest.mark.parametrize("size", [60, 64, 100])
def test_a_weight_below_1_and_a_cap_go_through_all_pairs(size: int) -> None:
    for settings in ({"weights": {"a": 0.25}}, {"caps": {"a": size // 4}}):
        few = made(["a"] * size, np.arange(size), 5, **settings)
        seen = Counter(index for number in range(4) for batch in one_pass(few, number) for index in batch)
        assert max(seen.values()) == 1 and len(seen) == 4 * (size // 4 // 5) * 5


def test_tars_are_shuffled_and_then_pairs_in_a_window() -> None:
    """With a window of 40 pairs, four batches of 10 come from at most five tars of 10."""
    shards = (np.arange(400) // 10).astype(np.uint32)
    of = made(["a"] * 400, np.arange(400), 10, shards=shards, window=40)
    batches = one_pass(of)
    for start in range(0, 40, 4):
        tars = {index // 10 for batch in batches[start : start + 4] for index in batch}
        assert len(tars) <= 5
    assert len({index // 10 for index in batches[0]}) > 1
    firsts = [batches[start][0] // 10 for start in range(0, 40, 4)]
    assert firsts != sorted(firsts)


def test_a_task_smaller_than_a_batch_is_refused_repeated_or_left_out() -> None:
    with pytest.raises(RimeError, match=r"batch_size must be at most 16, but is 17: .* task 'c' has only 16"):
        plan(batch_size=17)
    repeated = plan(batch_size=17, small_tasks="repeat")
    batches = [repeated.batch(n) for n in range(len(repeated))]
    (small,) = [batch.indices for batch in batches if batch.dataset == "c"]
    assert Counter(small).most_common()[0][1] == 2 and len(set(small)) == 16
    without = plan(batch_size=17, small_tasks="leave_out")
    assert {without.batch(n).dataset for n in range(len(without))} == {"a", "b"}
    assert without.report().endswith("; tasks smaller than a batch are left out (c: 16)")
    with pytest.raises(
        RimeError, match=r"has with its weight and cap only 4 of 16 training samples in a pass"
    ):
        plan(weights={"c": 0.25})
    with pytest.raises(RimeError, match=r"must fill a batch of 200 .* Use a smaller batch"):
        plan(batch_size=200, small_tasks="leave_out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"d": 2.0}}, r"data.order.weights must name tasks .* \['d'\] are not there. .* 'c'\]"),
        ({"caps": {"d": 2}}, r"data.order.caps must name tasks .* \['d'\] are not there"),
        ({"weights": {"a": 0.0}}, r"weights must be greater than 0, but that of 'a' is 0.0. To leave a task"),
        ({"weights": {"a": float("nan")}}, r"weights must be greater than 0, but that of 'a' is nan"),
        ({"caps": {"a": 0}}, r"data.order.caps must be 1 or more, but that of 'a' is 0"),
        (
            {"block_size": 3},
            r"data.batch_size must be a multiple of data.order.block_size, but 8 is none of 3",
        ),
        ({"block_size": 0}, r"data.order.block_size must be 1 or more, but is 0"),
        ({"window": 0}, r"data.order.window must be 1 or more, but is 0"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RimeError, match=message):
        plan(**settings)
    with pytest.raises(RimeError, match=r"data.batch_size must be at least 1, but is 0"):
        plan(batch_size=0)


def test_blocks_mix_tasks_in_a_batch() -> None:
    of = plan(batch_size=8, block_size=4)
    assert len(of) == (103 // 4 + 41 // 4 + 16 // 4) // 2
    mixed = [len(set(of.batch(n).datasets)) for n in range(len(of))]
    assert set(mixed) == {1, 2}
    assert "1 blocks of 4 pairs fill no batch" in of.report()


def test_the_weight_of_a_source_multiplies_that_of_its_task() -> None:
    of = made(DATASETS, CONTENTS, factors=[1.0, 2.0, 0.5])
    counts = Counter(of.batch(n).dataset for n in range(len(of)))
    assert counts == {"a": 12, "b": 82 // 8, "c": 1}


def test_pairs_of_two_sources_of_one_name_are_counted_together() -> None:
    codes = np.array([0] * 11 + [1] * 14 + [2] * 3)
    of = BatchPlan(
        ["a", "a", "b"], codes, lambda rows: rows, 4, 0, order=OrderSettings(small_tasks="leave_out")
    )
    assert of.report() == (
        "5 batches a pass; 5 pairs wait for another pass (a: 5); tasks smaller than a batch are left out "
        "(b: 3)"
    )


def test_samples_that_may_stand_in_for_a_broken_one() -> None:
    annotated = np.arange(160) % 2 == 0
    of = made(DATASETS, CONTENTS, annotated=annotated, annotated_share=0.5)
    others = of.following(41).tolist()
    assert others == [*range(43, 103, 2), *range(1, 41, 2)]
    assert list(itertools.islice(of.following(102), 2)) == [0, 2]
