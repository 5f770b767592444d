"""What a stage prints: the data, the table of what trains, the progress, the result, and nothing else."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import pytest

from rime_pl.quiet import MESSAGES, quiet_other_libraries
from tests.stages.runs import run_process, stage_arguments

NOISE = (
    "litlogger",
    "Tip:",
    "gemm_4bit",
    "FLOPs",
    "Loading weights",
    "Writing model shards",
    "available:",
    "Seed set to",
    "estimate number of stepping",
    "`Trainer.fit` stopped",
    "num_workers",
    "Warning",
    "deprecated",
)


def test_a_stage_prints_what_trains_the_progress_and_the_result(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    short = ("--trainer.max_epochs", "1", "--data.steps_per_epoch", "1")
    words = stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "run", *short)
    done = run_process(words, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.strip() == ""
    for noise in NOISE:
        assert noise not in done.stdout, noise
    before, _, results = done.stdout.partition("Retrieval on the test split")
    table, epoch, test = re.split(r"\n(?=Epoch|Testing)", before.rstrip())
    data, order, table = table.split("\n", 2)
    assert data.startswith("48 of 48 pairs annotated (composed: 8 of 8, ")
    assert order == "12 batches a pass"
    assert table.startswith("part") and table.splitlines()[-1].startswith("total")
    assert re.match(r"Epoch 1 of 1 .* 1/1 .*train/loss: \d", epoch)
    assert test.startswith("Testing") and "2/2" in test and "\n" not in test
    assert "gen-gen" in results


@pytest.mark.parametrize(
    ("logger", "beginning"), [(name, words) for name, all_ in MESSAGES.items() for words in all_]
)
def test_each_message_of_the_table_is_dropped_and_others_are_not(
    logger: str, beginning: str, caplog: pytest.LogCaptureFixture
) -> None:
    speaking = logging.getLogger(logger)
    kept = list(speaking.filters)
    try:
        quiet_other_libraries()
        with caplog.at_level(logging.INFO, logger=logger):
            speaking.info("%s, and so on", beginning)
            speaking.warning("[rank: 1] %s, and so on", beginning)
            speaking.warning("the disk is full")
    finally:
        speaking.filters[:] = kept
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"]


def test_warnings_that_a_user_can_act_on_stay() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        quiet_other_libraries()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will go", FutureWarning, stacklevel=1)
        warnings.warn("The number of training batches (3) is smaller than the logging interval", stacklevel=1)
    assert [str(warning.message)[:10] for warning in caught] == ["The number"]
    shown = warnings.formatwarning("The disk is slow.", UserWarning, "retriever.py", 3)
    assert shown == "warning: The disk is slow.\n"
