"""Killed on 2 processes and continued on 1, and the reverse: curve and metrics of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rime_pl.__main__ import main
from tests.stages.runs import ROOT, read_json, run_killed, run_process, scalars, stage_arguments

pytestmark = pytest.mark.long
CACHED = ("--model.micro_batches.size", "1")


@pytest.fixture(scope="module")
def uninterrupted(scenes_corpus: Path, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, the whole batch at once."""
    folder = tmp_path_factory.mktemp("whole") / "sft"
    assert main(stage_arguments("sft", scenes_corpus, micro_base, folder)) == 0
    return folder


@pytest.mark.parametrize(("first", "then"), [("ddp", ""), ("", "ddp"), ("fsdp", ""), ("", "fsdp")])
def test_continued_on_another_number_of_processes(
    first: str, then: str, uninterrupted: Path, scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    def arguments(overlay: str) -> list[str]:
        more = ("--config", str(ROOT / f"configs/overlays/{overlay}.yaml")) if overlay else ()
        return stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "sft", *more, *CACHED)

    run_killed(4, arguments(first))
    assert not (tmp_path / "sft" / "done.json").exists()
    done = run_process(arguments(then), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(step 4)" in done.stdout

    whole, both = (scalars(folder, "train/loss") for folder in (uninterrupted, tmp_path / "sft"))
    assert whole.keys() == both.keys() and len(whole) == 6
    # Adam divides small gradients by small gradients: differences grow from step to step
    assert [both[step] for step in whole] == pytest.approx(list(whole.values()), rel=1e-4)
    seen, expected = (read_json(f / "summary.json") for f in (tmp_path / "sft", uninterrupted))
    assert seen["after"]["recall@1"] == expected["after"]["recall@1"]
    for mine, theirs in zip(seen["history"], expected["history"], strict=True):
        recalls = [name for name in theirs if name.startswith("recall@")]
        assert recalls and [mine[name] for name in recalls] == [theirs[name] for name in recalls]
