"""Two processes train and rank as one does, on the same global batches: DDP, and FSDP2 with a 4-bit base."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from rime_pl.__main__ import main
from tests.stages.runs import (
    ENDING,
    ROOT,
    read_json,
    refine_rl_arguments,
    run_process,
    scalars,
    stage_arguments,
)

pytestmark = pytest.mark.long
# two passes on each of two processes
PARTS = ("--data.batch_size", "4", "--model.rollouts.items_per_pass", "1", "--data.annotated_share", "0.1")


@pytest.fixture(scope="module")
def single(scenes_corpus: Path, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of each stage, by one process."""
    folder = tmp_path_factory.mktemp("single")
    assert main(stage_arguments("sft", scenes_corpus, micro_base, folder / "sft")) == 0
    start = ("--model.init_adapter_from", str(folder / "sft" / "adapter"))
    assert main(stage_arguments("cma", scenes_corpus, micro_base, folder / "cma", *start)) == 0
    assert main(stage_arguments("sft", scenes_corpus, micro_base, folder / "ending", *ENDING)) == 0
    adapter = folder / "ending" / "adapter"
    assert main(refine_rl_arguments(scenes_corpus, micro_base, folder / "refine_rl", adapter, *PARTS)) == 0
    return folder


@pytest.mark.parametrize(
    ("stage", "overlay"),
    [("sft", "ddp"), ("sft", "fsdp"), ("cma", "ddp"), ("cma", "fsdp"), ("refine_rl", "ddp")],
)
def test_two_processes_equal_one(
    stage: str, overlay: str, single: Path, scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    more = ["--config", str(ROOT / f"configs/overlays/{overlay}.yaml")]
    if stage == "cma":
        more += ["--model.init_adapter_from", str(single / "sft" / "adapter")]
    arguments = stage_arguments(stage, scenes_corpus, micro_base, tmp_path / stage, *more)
    if stage == "refine_rl":
        adapter, folder = single / "ending" / "adapter", tmp_path / stage
        arguments = refine_rl_arguments(scenes_corpus, micro_base, folder, adapter, *more, *PARTS)
    done = run_process(arguments, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]

    for key in ("loss", "reward", "grad_norm") if stage == "refine_rl" else ("loss",):
        one, two = (scalars(folder / stage, f"train/{key}") for folder in (single, tmp_path))
        assert one.keys() == two.keys()
        assert len(one) == 6
        for step in list(one)[:5]:  # the policy loss is near 0: the advantages of a group cancel
            assert two[step] == pytest.approx(one[step], rel=1e-5 if key == "loss" else 1e-4, abs=1e-6), key
    if stage == "refine_rl":
        assert max(scalars(single / stage, "train/reward_spread").values()) > 0.1, "else nothing was learned"
    summaries = [read_json(folder / stage / "summary.json")["after"] for folder in (single, tmp_path)]
    assert summaries[0]["recall@1"] == summaries[1]["recall@1"]
    assert summaries[0]["trace"] == summaries[1]["trace"]  # both give a query the same other rewrite
    adapters = [
        load_file(folder / stage / "adapter" / "adapter_model.safetensors") for folder in (single, tmp_path)
    ]
    for name, tensor in adapters[0].items():
        difference = (adapters[1][name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert difference < 2e-2, (name, float(difference))  # Adam divides small gradients by small gradients
