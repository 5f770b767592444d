"""Tables and picture of a record."""

import pytest

from rime_pl.study.comparison import comparison_figure, comparison_tables, differences_table
from rime_pl.study.design import COMPARISONS
from rime_pl.types import MODE_PAIRS
from tests.study.runs import record


def page(found: dict) -> str:
    return "\n\n".join(table.markdown() for table in (differences_table(found), *comparison_tables(found)))


def test_tables_show_the_mean_and_the_range_of_the_seeds() -> None:
    found = record("cma", 0.5, 0.7, 0.6)
    assert "| CMA | 7 | 1.50 | 0.600 (0.50-0.70) |" in page(found) and "seeds 0, 1, 2." in page(found)
    assert "| disc-disc: CMA - further SFT for the same number of steps | +0.020 |" in page(found)
    found["variants"]["before"]["seconds_per_step"] = None
    assert "| SFT (before) | 7 | - | 0.600 (0.50-0.70) |" in page(found)
    assert "| CMA | 7 | 1.50 | 0.500 | 0.500 |" in page(record("cma", 0.5))  # one seed has no range


def test_a_rewrite_that_was_not_measured_is_a_dash_and_no_bar() -> None:
    """On a corpus without annotations there is no reference rewrite."""
    found = record("cma", 0.5, 0.7)
    for one in found["variants"].values():
        one["trace"] = one["trace"] | {"reference": []}
    assert "| CMA | 0.600 (0.50-0.70) | - | 0.600 (0.50-0.70) | 0.600 (0.50-0.70) |" in page(found)
    heights = [bar.get_height() for bar in comparison_figure(found).axes[1].patches]
    assert heights.count(0.6) == 3 * 4 and sum(height != height for height in heights) == 4


def test_differences_show_what_the_claim_needs_and_each_seed() -> None:
    table = differences_table(record("cma", 0.5, 0.7)).markdown()
    assert "| +0.020 | -0.010 to +0.050 | +0.010 | +0.030 | more than 0.30 | does not hold |" in table
    assert "| seed 0 | seed 1 | the claim needs | verdict |" in table
    assert "| disc-disc: CMA - SFT (before) | +0.020 | -0.010 to +0.050 | +0.010 | +0.030 | - | - |" in table


def test_refine_rl_shows_who_writes_and_who_embeds_and_its_curves() -> None:
    found = record("refine_rl", 0.5)
    assert "| new rewrites | 0.600 | 0.620 |" in page(found)
    assert "| old rewrites | 0.500 | 0.510 |" in page(found)
    assert "| run | reward_spread | kl |\n| --- | ---: | ---: |\n| Refine-RL | 0.250 | 0.125 |" in page(found)
    del found["variants"]["shuffled_rewards"]
    assert "shuffled" not in "\n".join(table.markdown() for table in comparison_tables(found))
    assert len(comparison_figure(found).axes[0].patches) == 8 * len(MODE_PAIRS)


def test_slot_f1_is_not_shown_beside_sft() -> None:
    assert "slot F1" in page(record("cma", 0.5)) and "slot F1" not in page(record("sft", 0.5))


def test_sft_is_drawn_by_its_length_too() -> None:
    found = record("sft", 0.5, 0.7)
    found["variants"]["discriminative_only"]["tokens"] = 0.0
    lengths = comparison_figure(found).axes[2]
    points = [container.lines[0] for container in lengths.containers]
    assert [float(point.get_xdata()[0]) for point in points] == pytest.approx([0.0, 6, 6, 6, 6, 6])
    assert [float(point.get_ydata()[0]) for point in points] == pytest.approx([0.6] * 6)


def test_a_bar_for_each_variant_with_the_range_of_the_seeds() -> None:
    figure = comparison_figure(record("cma", 0.5, 0.7))
    modes, ablation = figure.axes
    assert len(modes.patches) == 4 * len(MODE_PAIRS)
    assert {bar.get_height() for bar in (*modes.patches, *ablation.patches)} == {0.6}
    ranges = [segment for lines in modes.collections for segment in lines.get_segments()]
    assert len(ranges) == 4 * len(MODE_PAIRS)
    assert all([y for _, y in segment] == pytest.approx([0.5, 0.7]) for segment in ranges)
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "CMA"


@pytest.mark.parametrize("stage", sorted(COMPARISONS))
def test_every_difference_has_a_name_of_its_own(stage: str) -> None:
    shown = COMPARISONS[stage]
    assert len({d.key for d in shown.differences}) == len(shown.differences)
    assert len({shown.label(d) for d in shown.differences}) == len(shown.differences)
    assert all({d.first, d.second} <= set(shown.variants) for d in shown.differences)
