"""Two processes equal one where one has only text and the other pictures and clips, and none waits forever.

The tower is frozen, trained or sharded. One pair of processes runs all steps of tower_steps.py, and the tests
read the results. A pair in which a process waits for the other for PATIENCE seconds fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, apart_pairs, save_family
from tests.scaling.rl_steps import refine_rl_step
from tests.scaling.test_two_processes import TOLERANCE, assert_equal_gradients, run_pair
from tests.scaling.tower_steps import FAST, LONG, REINFORCED, Case, one_process

#: Seconds for all steps of a pair, on a busy machine. A hang ends after PATIENCE seconds.
TIME_LIMIT = 600


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        save_family(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def ranks(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of rank 0, which has only text, and of rank 1."""
    return run_steps(tmp_path_factory.mktemp("tower"), bases, "fast")


@pytest.fixture(scope="module")
def ranks_of_long_cases(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_steps(tmp_path_factory.mktemp("tower"), bases, "long")


def run_steps(folder: Path, bases: Path, cases: str) -> list[dict[str, Any]]:
    return run_pair("tests.scaling.tower_steps", folder, bases, cases, seconds=TIME_LIMIT)


def assert_equals_one_process(case: Case, name: str, ranks: list[dict[str, Any]], bases: Path) -> None:
    one = one_process(case, bases)
    texts, media = (seen[name] for seen in ranks)
    assert texts["media"] == 0 < media["media"]
    for seen in (texts, media):
        assert seen["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        assert_equal_gradients(seen["gradients"], one["gradients"])
        assert seen["share"] == (0.5 if case.sharded == "tower" else 1), "of the frozen weights of the tower"
    for seen in (texts, media):
        (first, others), (second, more) = seen["evaluated"]
        torch.testing.assert_close(torch.cat([first, second]), one["evaluated"][0], atol=1e-5, rtol=0)
        assert others + more == one["evaluated"][1]
    trained = [one for one in texts["gradients"] if ".visual." in one]
    assert bool(trained) == (case.tower != "none")
    for of_texts, of_media in zip(texts["calls"], media["calls"], strict=True):  # in each step
        assert len(of_texts) == (case.calls or 0)
        assert len(of_media) == case.calls or (case.calls is None and of_media)
        assert set(of_texts) <= {4}, "a zero picture has 4 patches"


@pytest.mark.parametrize("name", FAST)
def test_a_rank_with_only_text_and_one_with_pictures_and_clips(
    name: str, ranks: list[dict[str, Any]], bases: Path
) -> None:
    assert_equals_one_process(FAST[name], name, ranks, bases)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_a_rank_with_only_text_and_one_with_pictures_and_clips_in_all_cases(
    name: str, ranks_of_long_cases: list[dict[str, Any]], bases: Path
) -> None:
    assert_equals_one_process(LONG[name], name, ranks_of_long_cases, bases)


@pytest.mark.parametrize(("family", "tower"), REINFORCED)
def test_refine_rl_on_a_rank_with_only_text_and_one_with_pictures_and_clips(
    family: str, tower: str, ranks: list[dict[str, Any]], bases: Path
) -> None:
    """A frozen tower as the mean over ranks, a trained one under DDP, one item at a time."""
    whole = refine_rl_step(bases / family, apart_pairs(), lora_tower=tower, load_in_4bit=False)
    assert any(".visual." in name for name in whole["gradients"]) == (tower != "none")
    for seen in ranks:
        assert_equal_gradients(seen[f"refine_rl {family} {tower}"]["gradients"], whole["gradients"])
