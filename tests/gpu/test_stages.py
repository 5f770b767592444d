"""Every stage trains on the device: finite losses, moved weights, intact packed bytes, planned memory.

The bounds on a GPU are wider than on the CPU, because bfloat16 rounds.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from rime_pl.backbone.mllm import Backbone, load_backbone
from rime_pl.types import Batch
from tests.gpu.bench import Bench, Case, fsdp_strategy
from tests.gpu.conftest import FindRun
from tests.gpu.watch import Run, tensors_of

OVERLAY = Path(__file__).parents[2] / "configs/overlays/fsdp.yaml"


def on_cpu(bench: Bench) -> bool:
    return bench.device.type == "cpu"


def check_trained(bench: Bench, run: Run) -> None:
    """Only what should train has changed."""
    assert run.losses and all(math.isfinite(loss) for loss in run.losses)
    assert run.intact, "the packed 4-bit weights must not change"
    assert run.moved > (0.99 if on_cpu(bench) else 0.9), "every LoRA matrix and both token rows must move"


@pytest.mark.parametrize("stage", ["sft", "cma", "refine_rl"])
def test_a_stage_trains_what_should_train(bench: Bench, find_run: FindRun, stage: str) -> None:
    run = find_run(stage)
    check_trained(bench, run)
    assert run.seconds and run.seconds > 0 and run.peak and run.peak > 0
    if on_cpu(bench) and stage != "refine_rl":
        assert run.losses[2] < run.losses[0], "three steps on one batch must learn something"


@pytest.mark.parametrize("stage", ["sft", "cma"])
def test_memory_is_within_the_plan(bench: Bench, find_run: FindRun, stage: str) -> None:
    peak = find_run(stage).peak
    assert peak and abs(bench.predicted_peak(bench.cases[stage]) / peak - 1) < 0.15


def test_the_plan_of_refine_rl_is_an_upper_bound(bench: Bench, find_run: FindRun) -> None:
    """The plan takes every rewrite at its full length."""
    peak = find_run("refine_rl").peak
    assert peak
    error = bench.predicted_peak(bench.cases["refine_rl"]) / peak - 1
    assert -0.05 < error < 0.5 if on_cpu(bench) else error > -0.15


def test_refine_rl_has_rewards(bench: Bench, find_run: FindRun) -> None:
    run = find_run("refine_rl")
    logged = run.logged
    assert 0 < logged["train/reward_format"] < 1, "some rewrites must end by themselves, and some must not"
    assert logged["train/no_signal"] < 1
    assert 0 < logged["train/rewrite_length"] <= bench.sizes.new_tokens
    rewrites = 2 * run.items * bench.sizes.num_generations
    assert run.tokens == pytest.approx(rewrites * logged["train/rewrite_length"], abs=1)


def test_the_gradient_cache_is_exact(bench: Bench, find_run: FindRun) -> None:
    """The second loss follows an optimiser step, so the gradients agree too."""
    plain, cached = find_run("sft_at_once"), find_run("sft_cached")
    assert cached.losses[:2] == pytest.approx(plain.losses[:2], rel=1e-4 if on_cpu(bench) else 0.02)
    assert cached.peak and plain.peak and cached.peak < plain.peak
    if not on_cpu(bench):
        assert cached.seconds and plain.seconds and cached.seconds <= 1.6 * plain.seconds


def test_a_large_batch_takes_the_memory_of_a_micro_batch(bench: Bench, find_run: FindRun) -> None:
    """Only inputs, kept vision features, embeddings and their gradients grow with the batch."""
    small, large = find_run("sft_one_micro_batch"), find_run("sft_large")
    assert large.items >= 4 * small.items and small.peak and large.peak
    above = [run.peak - growing_bytes(bench, bench.batch(run.items)) for run in (small, large)]
    assert (0.9 if on_cpu(bench) else 0) < above[1] / above[0] < 1.1


def growing_bytes(bench: Bench, batch: Batch) -> int:
    """The features have the type of the backbone; both embeddings of both sides are float32."""
    width, itemsize = bench.shape.hidden_size, getattr(torch, bench.config().dtype).itemsize
    ids = (batch.query.prompts.input_ids, batch.target.prompts.input_ids)
    visual_tokens = sum(int((rows == bench.processor.image_id).sum()) for rows in ids)
    embeddings = 2 * 4 * len(batch) * width * torch.float32.itemsize
    return sum(tensor.nbytes for tensor in tensors_of(batch)) + visual_tokens * width * itemsize + embeddings


def test_eager_attention_finds_the_same_loss(bench: Bench, find_run: FindRun) -> None:
    eager, sdpa = find_run("sft_eager"), find_run("sft")
    check_trained(bench, eager)
    assert eager.losses[0] == pytest.approx(sdpa.losses[0], rel=1e-4 if on_cpu(bench) else 0.05)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash_attn is not installed")
def test_flash_attention_finds_the_same_loss(bench: Bench, find_run: FindRun) -> None:
    if on_cpu(bench):
        pytest.skip("flash attention needs a GPU")
    flash, sdpa = find_run("sft_flash"), find_run("sft")
    check_trained(bench, flash)
    assert flash.losses[0] == pytest.approx(sdpa.losses[0], rel=0.05)


def test_fsdp_on_one_process_changes_nothing(bench: Bench, find_run: FindRun) -> None:
    """One device splits nothing, but the packed bytes pass through the parameters and hooks of FSDP2."""
    run = find_run("cma_fsdp")
    check_trained(bench, run)
    assert run.losses[0] == pytest.approx(find_run("cma").losses[0], rel=1e-4 if on_cpu(bench) else 0.02)
    assert not torch.distributed.is_initialized()


def test_the_strategy_is_that_of_the_overlay() -> None:
    overlay = yaml.safe_load(OVERLAY.read_text())["trainer"]["strategy"]
    ours = fsdp_strategy()
    assert overlay["class_path"].rsplit(".", 1)[-1] == type(ours).__name__
    expected = overlay["init_args"] | {"data_parallel_size": 1}
    assert {name: getattr(ours, f"_{name}") for name in expected} == expected


@torch.no_grad()
def test_a_saved_adapter_gives_the_same_embeddings(bench: Bench, tmp_path: Path) -> None:
    rows = bench.batch(2).query.to(bench.device)

    def embed(backbone: Backbone) -> Tensor:
        out = backbone.eval()(rows.prompts, rows.completions)
        assert out.gen is not None
        return torch.cat([out.disc, out.gen])

    backbone = bench.backbone()
    untrained = embed(backbone)
    torch.manual_seed(0)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.05)
    expected = embed(backbone)
    assert (expected - untrained).norm() > 0.1, "this adapter must matter"
    bench.save(backbone, tmp_path)
    found = embed(load_backbone(tmp_path, bench.device))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if on_cpu(bench) else 1e-3)


def test_a_run_that_failed_is_not_tried_again(
    bench: Bench, find_run: FindRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def out_of_memory(case: Case) -> None:
        calls.append(case)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(bench, "run", out_of_memory)
    monkeypatch.setitem(bench.cases, "broken", Case("sft", 2))
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception, match="broken failed: OutOfMemoryError: out of memory"):
            find_run("broken")
    assert len(calls) == 1
