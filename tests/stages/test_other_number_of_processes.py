"""Killed on 2 processes and continued on 1, and the reverse: curve and metrics of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from rime_pl.__main__ import main
from tests.stages.runs import ROOT, read_json, run_killed, run_process, scalars, stage_arguments

pytestmark = pytest.mark.long
CACHED = ("--model.micro_batches.size", "1")
TOWER = ("--model.backbone.lora_tower", "all")
SHARDED = ("--model.backbone.shard_tower", "true")


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

    continued(arguments(first), arguments(then), tmp_path / "sft", uninterrupted)


def test_a_tower_that_trains_goes_on_sharded(scenes_corpus: Path, micro_base: Path, tmp_path: Path) -> None:
    """Started on one process, and continued under FSDP2, whose processes write its evaluation and adapter."""
    folders = tmp_path / "whole" / "sft", tmp_path / "sft"
    whole, alone = (stage_arguments("sft", scenes_corpus, micro_base, folder, *TOWER) for folder in folders)
    assert main(whole) == 0
    both = [*alone, "--config", str(ROOT / "configs/overlays/fsdp.yaml"), *CACHED, *SHARDED]
    continued(alone, both, folders[1], folders[0])
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    assert adapters[0].keys() == adapters[1].keys() and any(".visual." in name for name in adapters[0])
    for name, tensor in adapters[0].items():
        difference = (adapters[1][name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert difference < 2e-2, (name, float(difference))


def continued(first: list[str], then: list[str], run: Path, uninterrupted: Path) -> None:
    """Kill the first command, and compare the run that the second one goes on with."""
    run_killed(4, first)
    assert not (run / "done.json").exists()
    done = run_process(then, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(step 4)" in done.stdout

    whole, both = (scalars(folder, "train/loss") for folder in (uninterrupted, run))
    assert whole.keys() == both.keys() and len(whole) == 6
    # Adam divides small gradients by small gradients: differences grow from step to step
    assert [both[step] for step in whole] == pytest.approx(list(whole.values()), rel=1e-4)
    seen, expected = (read_json(f / "summary.json") for f in (run, uninterrupted))
    assert seen["after"]["recall@1"] == expected["after"]["recall@1"]
    for mine, theirs in zip(seen["history"], expected["history"], strict=True):
        recalls = [name for name in theirs if name.startswith("recall@")]
        assert recalls and [mine[name] for name in recalls] == [theirs[name] for name in recalls]
