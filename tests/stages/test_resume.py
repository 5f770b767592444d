"""Killed anywhere, started again with the same command: the same bits as the uninterrupted run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rime_pl.__main__ import main
from tests.stages.runs import ENDING, read_json, refine_rl_arguments, run_killed, scalars, stage_arguments

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def uninterrupted(scenes_corpus: Path, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "sft"
    assert main(stage_arguments("sft", scenes_corpus, micro_base, folder)) == 0
    return folder


@pytest.mark.parametrize(
    "step", [1, 2, 3, 5]
)  # within an epoch, before its last step, at the boundary, in the last
def test_killed_and_started_again(
    step: int, uninterrupted: Path, scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    arguments = stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "sft")
    run_killed(step, arguments)
    assert not (tmp_path / "sft" / "done.json").exists()
    time.sleep(1.1)  # TensorBoard names event files by the second
    assert main(arguments) == 0

    whole, resumed = (
        load_file(f / "adapter" / "adapter_model.safetensors") for f in (uninterrupted, tmp_path / "sft")
    )
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert scalars(tmp_path / "sft", "train/loss") == scalars(uninterrupted, "train/loss")
    mine, theirs = (read_json(f / "summary.json")["history"] for f in (tmp_path / "sft", uninterrupted))
    assert [entry["step"] for entry in mine] == [entry["step"] for entry in theirs]
    assert [entry["recall@1/gen-gen"] for entry in mine] == [entry["recall@1/gen-gen"] for entry in theirs]


def test_resume_with_another_seed_or_other_data_is_refused(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    arguments = stage_arguments(
        "sft", scenes_corpus, micro_base, tmp_path / "sft", "--trainer.max_epochs", "1"
    )
    assert main(arguments) == 0
    (tmp_path / "sft" / "done.json").unlink()
    assert main([*arguments, "--seed_everything", "5"]) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize("step", [2, 6])  # in the middle of an epoch, and at its border; two updates a batch
def test_refine_rl_killed_and_started_again(
    step: int, scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    """The rollouts depend on seed and position alone: the same bits."""
    assert main(stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "sft", *ENDING)) == 0
    adapter = tmp_path / "sft" / "adapter"
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert main(refine_rl_arguments(scenes_corpus, micro_base, whole, adapter)) == 0
    arguments = refine_rl_arguments(scenes_corpus, micro_base, folder, adapter)
    run_killed(step, arguments)
    time.sleep(1.1)  # TensorBoard names event files by the second
    assert main(arguments) == 0
    first, second = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, folder))
    assert all(first[name].equal(second[name]) for name in first)
    for key in ("train/loss", "train/reward", "train/kl"):
        assert scalars(whole, key) == scalars(folder, key)
    assert max(scalars(whole, "train/reward_spread").values()) > 0.1, "else nothing was learned from"
