"""The table and picture of `rime compare`, from run folders written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from rime_pl.commands.compare import pooled_difference, previous_run, read_variant, train_controls
from rime_pl.report.comparison import VARIANTS, comparison_figure, comparison_markdown
from rime_pl.types import MODE_PAIRS, TRACES, RimeError


def variant(seed: int, recall: float, seconds: float | None) -> dict[str, Any]:
    return {
        "seed": seed,
        "recall@1": dict.fromkeys(MODE_PAIRS, recall),
        "trace": dict.fromkeys(TRACES, recall),
        "per_task": {"twin": dict.fromkeys(MODE_PAIRS, recall)},
        "gallery": 40,
        "chance": 1 / 40,
        "seconds_per_step": seconds,
        "steps": 7,
    }


def result(*seeds: tuple[float, float | None]) -> dict[str, Any]:
    difference = {"mean": 0.02, "lower": -0.01, "upper": 0.05}
    return {
        "runs": [
            {name: variant(seed, recall, seconds) for name in VARIANTS}
            for seed, (recall, seconds) in enumerate(seeds)
        ],
        "disc_minus_control": difference,
        "disc_minus_before": difference,
        "gen_minus_disc": difference,
    }


def test_means_and_spread_of_the_seeds_and_the_least_disturbed_time() -> None:
    table = comparison_markdown(result((0.5, 2.0), (0.7, None), (0.6, 1.5)))
    assert "| CMA, decisive | 7 | 1.50 | 0.600 (0.50-0.70) |" in table
    assert "seeds 0, 1, 2" in table and "minus after as many further SFT steps | +0.020 |" in table
    assert "| SFT (before) | 7 | - | 0.500 |" in comparison_markdown(result((0.5, None)))


def test_a_bar_for_each_variant_and_a_dot_for_each_seed() -> None:
    modes, probe = comparison_figure(result((0.5, 2.0), (0.7, 1.0))).axes
    assert len(modes.patches) == len(VARIANTS) * len(MODE_PAIRS)
    assert {bar.get_height() for bar in modes.patches} == {0.6}
    assert all(len(line.get_ydata()) == 2 for line in (*modes.lines, *probe.lines))


def folder(path: Path, ranks: list[int], steps_timed: int = 5) -> Path:
    """As much of a finished run as the comparison reads."""
    path.mkdir(parents=True)
    after = {"recall@1": dict.fromkeys(MODE_PAIRS, 0.5), "trace": dict.fromkeys(TRACES, 0.5)}
    summary = {"after": after, "per_task": {"twin": after}, "gallery": 4, "chance": 0.25}
    (path / "summary.json").write_text(json.dumps(summary | {"seconds": {"fit": 10.0}}))
    (path / "manifest.json").write_text(json.dumps({"seed": 3, "steps": 9, "steps_timed": steps_timed}))
    rows = [
        {"key": str(n), "task": "twin", "ranks": dict.fromkeys(MODE_PAIRS, rank)}
        for n, rank in enumerate(ranks)
    ]
    (path / "ranks.json").write_text(json.dumps(rows[::-1]))  # the file's order says nothing
    (path / "config.yaml").write_text(
        "recall:\n  headline_tasks: [twin]\nmodel:\n  init_adapter_from: null\n"
    )
    return path


def test_differences_pair_the_queries_of_all_seeds(tmp_path: Path) -> None:
    before, after = folder(tmp_path / "before", [1, 2, 2, 1]), folder(tmp_path / "after", [1, 1, 2, 1])
    seeds = [{"before": before, "decisive": after}] * 2
    difference = pooled_difference(seeds, "decisive", "before", "disc-disc")
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["lower"] >= 0.0  # no query is lost: paired, the difference is never negative
    same = pooled_difference(seeds, "decisive", "decisive", "gen-gen", "disc-disc")
    assert same == {"mean": 0.0, "lower": 0.0, "upper": 0.0}


def test_seconds_per_step_are_of_the_steps_that_were_timed(tmp_path: Path) -> None:
    assert read_variant(folder(tmp_path / "resumed", [1], steps_timed=5))["seconds_per_step"] == 2.0
    assert read_variant(folder(tmp_path / "ended", [1], steps_timed=0))["seconds_per_step"] is None


def test_a_run_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    with pytest.raises(RimeError, match=r"--run .*unfinished: no finished CMA run"):
        train_controls(tmp_path / "unfinished")
    with pytest.raises(RimeError, match=r"--run .*first: it started from no adapter"):
        previous_run(folder(tmp_path / "first", [1]))
