"""All three stages on pictures, clips and pages, through the real command line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rime_pl.__main__ import main
from rime_pl.datamodules.builders.mini import builder as mini
from tests.micro import build_base
from tests.stages.runs import ENDING, ROOT, read_json, refine_rl_arguments, scalars, stage_arguments

MODALITIES = {
    "composed": ("picture + text", "picture"),
    "motion": ("clip + text", "clip"),
    "finish": ("clip + text", "picture"),
    "sum": ("text", "page"),
    "update": ("page + text", "page"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a finished run of each stage on a small mini corpus."""
    folder = tmp_path_factory.mktemp("mini")
    corpus = folder / "data"
    mini.build(
        corpus, size=48, train_per_task=8, val_per_task=2, test_per_task=8, captions=9, test_contents=20
    )
    base = build_base(folder / "base", corpus)

    def more(stage: str) -> list[str]:
        return ["--config", str(ROOT / f"configs/data/mini/{stage}.yaml"), "--data.path", str(corpus)]

    tasks = ["--recall.headline_tasks", f"[{', '.join(mini.TASKS)}]"]
    sft = stage_arguments("sft", corpus, base, folder / "sft", *more("sft"), *ENDING, *tasks)
    assert main(sft) == 0
    start = ("--model.init_adapter_from", str(folder / "sft/adapter"))
    cma = stage_arguments("cma", corpus, base, folder / "cma", *more("cma"), *start, *tasks)
    assert main(cma) == 0
    adapter, refine = folder / "cma/adapter", folder / "refine_rl"
    assert main(refine_rl_arguments(corpus, base, refine, adapter, *more("refine_rl"), *tasks)) == 0
    return folder


@pytest.mark.parametrize("stage", ["sft", "cma", "refine_rl"])
def test_each_task_is_told_with_what_it_asks_and_finds(stage: str, runs: Path) -> None:
    summary = read_json(runs / stage / "summary.json")
    controls = {f"{task}_{name}" for task in mini.CLIP_TASKS for name in mini.CONTROLS}
    assert set(summary["per_task"]) == {*mini.TASKS, *controls}
    for name, found in summary["per_task"].items():
        asked, shown = MODALITIES[name.partition("_")[0]]
        assert found["modality"] == {"query": asked, "target": shown}
        assert set(found["recall@1"]) == {"disc-disc", "gen-gen", "gen-disc", "disc-gen"}
    mean = sum(summary["per_task"][name]["recall@1"]["gen-gen"] for name in mini.TASKS) / len(mini.TASKS)
    assert summary["after"]["recall@1"]["gen-gen"] == pytest.approx(mean), "controls are not in the mean"
    assert "clip + text -" in (runs / stage / "summary.txt").read_text()


def test_each_stage_trains_the_adapter_of_the_one_before(runs: Path) -> None:
    states = [
        load_file(runs / stage / "adapter/adapter_model.safetensors") for stage in ("sft", "cma", "refine_rl")
    ]
    for before, after in itertools.pairwise(states):
        assert any(not torch.equal(before[name], after[name]) for name in before)
    losses = scalars(runs / "cma", "train/loss")
    assert len(losses) == 6 and all(value > 0 for value in losses.values())
