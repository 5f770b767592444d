"""A run that validates in one mode on a limited gallery and is not tested, through the real command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rime_pl.__main__ import main
from rime_pl.run_folder import RunFolder
from tests.stages.runs import ENDING, scalars, stage_arguments

LESS = (
    "--data.limit_val_queries",
    "6",
    "--data.val_modes",
    "[discriminative]",
    "--data.limit_val_gallery",
    "0",
)
TEST = ("--data.test_modes",)


def test_less_evaluation_and_a_later_test(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "sft")
    words = stage_arguments("sft", scenes_corpus, micro_base, run.path, *ENDING, *LESS, *TEST, "[]")
    assert main(words) == 0
    assert "Not tested, because data.test_modes is []" in capsys.readouterr().out
    assert run.finished and not run.tested and run.adapter.is_dir()
    assert len(scalars(run.path, "val/limited_gallery/recall@1/disc-disc")) == 2
    history = run.summary["history"]
    assert [entry["step"] for entry in history] == [3, 6] and history[0]["gallery_left_out"] > 0

    # killed after its last checkpoint: the same command writes the adapter and the report
    shutil.rmtree(run.adapter)
    run.marker.unlink()
    assert main(words) == 0
    assert run.finished and (run.adapter / "adapter_config.json").is_file()

    later = RunFolder(tmp_path / "test")
    checkpoint = ("--ckpt_path", str(run.last_checkpoint))
    words = stage_arguments("sft", scenes_corpus, micro_base, later.path, *ENDING, *LESS, *TEST)
    words[1] = "test"
    assert main([*words[:-1], "--trainer.limit_test_batches", "0", *checkpoint]) == 2
    assert "limit_test_batches must not be 0" in capsys.readouterr().err
    assert main([*words, "[]", *checkpoint]) == 2
    assert "data.test_modes is [], which is no test" in capsys.readouterr().err
    assert main([*words, "[discriminative]", *checkpoint]) == 0
    assert set(later.summary["after"]["recall@1"]) == {"disc-disc"}
    assert set(later.ranks[0]["ranks"]) == {"disc-disc"} and "rewrite" not in later.ranks[0]
    assert "the generative mode was not tested" in later.summary_text.read_text()


def test_no_test_batches_are_no_test(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning's own way to leave the test out."""
    none = ("--trainer.limit_test_batches", "0", "--data.val_modes", "[discriminative]")
    run = RunFolder(tmp_path / "sft")
    assert main(stage_arguments("sft", scenes_corpus, micro_base, run.path, *ENDING, *none)) == 0
    assert "Not tested" in capsys.readouterr().out and run.finished and not run.tested
