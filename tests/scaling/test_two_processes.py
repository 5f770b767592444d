"""Two processes with half a batch each give the loss and gradients of one process with the whole batch.

One pair of processes runs all steps, because importing the stack takes seconds; the tests read the results.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rime_pl.generation.rewriting import write_rewrites
from rime_pl.scaling.gather import all_gather_rows, all_reduce_sum, rank, world_size
from tests.scaling.batches import apart, global_batch, local_batch, of_one_task
from tests.scaling.rl_steps import refine_rl_step
from tests.scaling.steps import CASES, FURTHER, Case, micro_module, step

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # relative to the norm of each tensor, because single elements near 0 say nothing


@pytest.fixture(scope="module")
def ranks(
    micro_base: Path, scenes_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The results of rank 0 and rank 1."""
    return run_pair("tests.scaling.steps", tmp_path_factory.mktemp("pair"), micro_base, scenes_corpus, "fast")


@pytest.fixture(scope="module")
def ranks_of_long_cases(
    micro_base: Path, scenes_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run_pair("tests.scaling.steps", tmp_path_factory.mktemp("long"), micro_base, scenes_corpus, "long")


def run_pair(module: str, folder: Path, *arguments: Path | str, seconds: float = 300) -> list[dict[str, Any]]:
    """Run two processes of a module, and return the results of each.

    Args:
        module: Its ``__main__`` takes the rank, the folder of the results and ``arguments``.
        folder, arguments: See above.
        seconds: After this time, a hang is assumed.
    """
    command = [sys.executable, "-m", module]
    pair = [
        subprocess.Popen(
            [*command, str(number), str(folder), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    end = time.monotonic() + seconds
    try:
        for process in pair:
            output, _ = process.communicate(timeout=max(1, end - time.monotonic()))
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in pair:
            process.kill()
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


def assert_equal_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, f"{name}: a zero gradient proves nothing"
        error = ((got[name] - gradient).norm() / gradient.norm()).item()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


def test_rows_arrive_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["gather"]["rows"][:, 0].tolist() == [1, 1, 2, 2]
        assert seen["gather"]["numbers"].tolist() == [0, 1]


def test_the_gradient_of_gathered_rows_is_the_sum_over_ranks(ranks: list[dict[str, Any]]) -> None:
    """Rank r weights element n by n * (r + 1), so the sum of both ranks is 3 * n."""
    wanted = 3 * torch.arange(12, dtype=torch.float32).view(4, 3)
    for number, seen in enumerate(ranks):
        assert seen["gather"]["grad"].equal(wanted[2 * number : 2 * number + 2])


def test_completions_are_padded_to_the_widest(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["gather"]["ids"].tolist() == [[7, 7, 0], [8, 8, 8]]
        assert seen["gather"]["mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("name", FURTHER)
def test_hard_negatives_and_positives_of_all_ranks_count(
    name: str, ranks: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    """The ranks hold different numbers of them, in one case one rank holds none."""
    stage, rows, tokens = FURTHER[name]
    one = step(stage, micro_base, scenes_corpus, rows, tokens)
    assert abs(one["loss"] - step(stage, micro_base, scenes_corpus)["loss"]) > 1e-3, "they must matter"
    for seen in ranks:
        assert seen[f"further {name}"]["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        assert_equal_gradients(seen[f"further {name}"]["gradients"], one["gradients"])


@pytest.mark.parametrize("stage", ["sft", "cma"])
def test_a_step_of_two_processes_equals_one(
    stage: str, ranks: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    one = step(stage, micro_base, scenes_corpus)
    for seen in ranks:
        assert seen[stage]["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        assert_equal_gradients(seen[stage]["gradients"], one["gradients"])


def test_the_batch_of_these_tests_can_show_a_mistake(micro_base: Path, scenes_corpus: Path) -> None:
    """Half of the batch gives another loss, so the tests would notice if only local negatives were used."""
    pairs = global_batch(scenes_corpus)
    module = micro_module("cma", micro_base)
    whole = module.training_step(module.model.processor.training_batch(pairs), 0)
    halves = [
        module.training_step(module.model.processor.training_batch(half), 0)
        for half in (pairs[:4], pairs[4:])
    ]
    assert abs(sum(halves) / 2 - whole) / whole > 0.01


def test_sharded_step_equals_one_process(
    ranks: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    one = step("cma", micro_base, scenes_corpus)
    for seen in ranks:
        assert seen["sharded"]["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        assert_equal_gradients(seen["sharded"]["gradients"], one["gradients"])


def test_a_sharded_bfloat16_base_trains_in_float32(
    ranks: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    """A layer has frozen bfloat16 and trained float32 weights; sums round differently than in one process."""
    module = micro_module("cma", micro_base, dtype="bfloat16")
    loss = module.training_step(local_batch(module, global_batch(scenes_corpus)), 0)
    loss.backward()
    for rank_saw in ranks:
        seen = rank_saw["sharded bfloat16"]
        assert seen["loss"] == pytest.approx(float(loss), rel=1e-2)
        assert [name for name in seen["before"] if not seen["before"][name].equal(seen["after"][name])] == []
        for name, p in module.named_parameters():
            if p.requires_grad:
                assert seen["gradients"][name].dtype == torch.float32, name
                cosine = torch.cosine_similarity(seen["gradients"][name].flatten(), p.grad.flatten(), dim=0)
                assert cosine > 0.9, f"{name}: {float(cosine):.3f}"


def test_sharding_does_not_change_the_packed_bytes(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        before, after = seen["sharded"]["before"], seen["sharded"]["after"]
        assert before and before.keys() == after.keys()
        assert [name for name in before if not before[name].equal(after[name])] == []
        assert seen["sharded"]["share"] < 1, "each rank must store less than the whole"


def test_sharded_ranks_write_what_one_process_writes(
    ranks: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    module = micro_module("cma", micro_base).eval()
    batch = local_batch(module, global_batch(scenes_corpus))
    rewrites = write_rewrites(module.model, batch.query.prompts, max_new_tokens=4)
    expected = module.model.processor.decode(rewrites.completions)
    assert [text for part in ranks[0]["sharded"]["rewrites"] for text in part] == expected


def assert_cached_case_equals_one_process(
    case: Case, seen: list[dict[str, Any]], base: Path, corpus: Path
) -> None:
    """One process takes the whole batch at once, without micro-batches."""
    module = micro_module("cma", base, **case.settings())
    loss = module.training_step(local_batch(module, apart(global_batch(corpus))), 0)
    loss.backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad and p.grad is not None}
    for rank_saw in seen:
        assert rank_saw["loss"] == pytest.approx(float(loss), rel=TOLERANCE)
        assert_equal_gradients(rank_saw["gradients"], gradients)
    one, other = seen
    assert one["micro_batches"] != other["micro_batches"], "otherwise equal numbers of forwards prove nothing"
    assert one["forwards"] == other["forwards"]
    assert one["share"] == (0.5 if case.strategy == "fsdp" and case.shard_base else 1)


@pytest.mark.parametrize("name", CASES["fast"])
def test_cached_steps_of_two_processes_equal_one(
    name: str, ranks: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    """The queries of one rank are texts, those of the other have pictures."""
    seen = [rank_saw[name] for rank_saw in ranks]
    assert_cached_case_equals_one_process(CASES["fast"][name], seen, micro_base, scenes_corpus)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES["long"])
def test_cached_steps_of_two_processes_equal_one_in_all_cases(
    name: str, ranks_of_long_cases: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    seen = [rank_saw[name] for rank_saw in ranks_of_long_cases]
    assert_cached_case_equals_one_process(CASES["long"][name], seen, micro_base, scenes_corpus)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_bytes_that_are_nan_as_numbers_survive_sharding(
    dtype: str, ranks: list[dict[str, Any]]
) -> None:
    for seen in ranks:
        before, after = seen["nan"][dtype]["before"], seen["nan"][dtype]["after"]
        assert before == after and before[0]


def test_a_start_with_damaged_bytes_is_refused(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert "those of decoder layer 0 changed" in seen["damaged"]
        assert "model.backbone.shard_base=false" in seen["damaged"]


def test_one_process_needs_no_group() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert all_gather_rows(rows) is rows and (rank(), world_size()) == (0, 1)
    assert all_reduce_sum(rows).equal(rows) and not all_reduce_sum(rows).requires_grad


def test_refine_rl_samples_and_learns_the_same(
    ranks: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    """Rewrites, rewards, anchors and mean gradients do not depend on which process holds an item."""
    whole = refine_rl_step(micro_base, of_one_task(scenes_corpus))
    for seen in ranks:
        for side in (0, 1):
            halves = [texts[side] for texts in seen["refine_rl"]["texts"]]
            assert halves[0] + halves[1] == whole["texts"][0][side]
        for name, value in whole["logged"].items():
            if name != "train/grad_norm":  # here it is the norm of one rank only
                assert seen["refine_rl"]["logged"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for name, gradient in whole["gradients"].items():
            assert gradient.norm() > 0, name
            error = (seen["refine_rl"]["gradients"][name] - gradient).norm() / gradient.norm()
            assert error < 1e-3, f"{name}: {float(error):.1e}"
    assert whole["logged"]["train/kl"] > 1e-5


def test_refine_rl_in_parts_exchanges_its_gradients_once(
    ranks: list[dict[str, Any]], micro_base: Path, scenes_corpus: Path
) -> None:
    whole = refine_rl_step(micro_base, of_one_task(scenes_corpus))["gradients"]
    for seen in (one["refine_rl ddp"] for one in ranks):
        assert seen["exchanged"] == seen["trained"] > 0
        assert seen["gradients"].keys() == whole.keys()
        for name, gradient in whole.items():
            error = (seen["gradients"][name] - gradient).norm() / gradient.norm()
            assert error < 1e-3, f"{name}: {float(error):.1e}"
