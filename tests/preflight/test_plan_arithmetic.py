"""The arithmetic of a plan, in closed form."""

from __future__ import annotations

import pytest

from rime_pl.preflight.plan.planning import GIB, GPUS, UTILISATION, hours, shard


def test_hours_follow_from_the_stated_utilisation() -> None:
    rows = {row["gpu"]: row for row in hours(1e15, 30 * GIB, num_steps=3600)}
    assert rows.keys() == GPUS.keys()
    assert rows["A100 40GB"]["seconds_per_step"] == pytest.approx(1e15 / (312e12 * UTILISATION))
    assert rows["A100 40GB"]["class"] == "10-30 h"  # 3600 steps of 12.8 seconds
    assert rows["A100 40GB"]["fits"] and not rows["RTX 4090"]["fits"]
    assert hours(1e15, 0, None)[0]["class"] == "-"


def test_classes_have_no_gaps() -> None:
    one_hour = 3600 / hours(1e15, 0, 1)[0]["seconds_per_step"] * 1e15  # FLOP of an hour's step on that GPU
    classes = [hours(one_hour * number, 0, 1)[0]["class"] for number in (0.99, 1.01, 2.99, 3.01, 99, 101)]
    assert classes == ["< 1 h", "1-3 h", "1-3 h", "3-10 h", "30-100 h", "> 100 h"]


def test_sharding_splits_what_it_names() -> None:
    parts = {"4-bit weights": 1000, "other frozen weights": 300}
    assert shard(parts, 4, num_layers=10) == {
        "4-bit weights": 250,
        "other frozen weights": 300,
        "gathered layers": 200,
    }
    assert shard(parts, 1, num_layers=10) == parts
