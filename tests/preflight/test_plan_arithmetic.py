"""The arithmetic of a plan, in closed form."""

from __future__ import annotations

import dataclasses

import pytest

from rime_pl.preflight.plan.arithmetic import (
    GIB,
    GPUS,
    UTILISATION,
    Work,
    hour_class,
    predict_hours,
    shard,
    step_flops,
)

WORK = Work(
    decoder=1000,
    vision=50,
    vocabulary=20,
    width=4,
    layers=2,
    tokens=60,
    row=30,
    patches=8,
    labels=6,
    recompute=False,
    tower_backward=False,
)


def test_flops_term_by_term() -> None:
    decoder, attention, tower, logits = (
        2 * 2 * 1000 * 60,
        4 * 2 * 30 * 4 * 60 * 3.5,
        2 * 50 * 8,
        3 * 2 * 6 * 4 * 20,
    )
    assert step_flops(WORK) == decoder + attention + tower + logits
    again = dataclasses.replace(WORK, recompute=True, tower_backward=True)
    assert step_flops(again) == 1.5 * decoder + attention / 3.5 * 4.5 + 3 * tower + logits
    cached = dataclasses.replace(WORK, cached=True)
    without_tower = 1.5 * decoder + attention / 3.5 * 4.5 + logits / 3 * 4
    assert step_flops(cached) == without_tower + 2 * tower
    assert step_flops(dataclasses.replace(cached, tower_backward=True)) == without_tower + 3 * tower
    kept = dataclasses.replace(cached, tower_backward=True, reuse_vision=True)
    assert step_flops(kept) == without_tower + tower


def test_hours_follow_from_the_stated_utilisation() -> None:
    rows = {row.gpu: row for row in predict_hours(1e15, 30 * GIB, num_steps=3600)}
    assert rows.keys() == GPUS.keys()
    assert rows["A100 40GB"].seconds_per_step == pytest.approx(1e15 / (312e12 * UTILISATION))
    assert rows["A100 40GB"].hours == pytest.approx(rows["A100 40GB"].seconds_per_step)
    assert rows["A100 40GB"].fits and not rows["RTX 4090"].fits
    assert {row.source for row in rows.values()} == {"predicted"}
    assert predict_hours(1e15, 0, None)[0].label == "-"


def test_classes_have_no_gaps() -> None:
    assert [hour_class(h) for h in (0.99, 1, 2.99, 3, 99, 100)] == [
        "< 1 h", "1-3 h", "1-3 h", "3-10 h", "30-100 h", "> 100 h",
    ]  # fmt: skip


def test_sharding_splits_what_it_names() -> None:
    parts = {"4-bit weights": 1000, "embedding table": 300}
    assert shard(parts, ["4-bit weights"], 4, num_layers=10) == {
        "4-bit weights": 250,
        "embedding table": 300,
        "gathered layers": 200,
    }
    assert shard(parts, ["4-bit weights"], 1, num_layers=10) == parts
