"""`rime gpu-check` on the CPU: the same code with a micro Qwen2-VL, and what it says without a GPU."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy

from reproduce.compare import EXPECTED, compare, judge
from reproduce.compare import main as compare_main
from rime_pl.__main__ import main
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.commands import gpu_check
from rime_pl.errors import RimeError
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.generation.rollouts import random_numbers, sample_rollouts, score_rollouts
from rime_pl.miniature.random_checkpoint import (
    SHAPES,
    Qwen2VLForConditionalGeneration,
    model_config,
    save_checkpoint,
    synthetic_pairs,
)
from rime_pl.modules.base import RimeModule
from rime_pl.preflight.gpu import sharded
from rime_pl.preflight.gpu.bench import Bench
from rime_pl.preflight.gpu.report import Part
from rime_pl.preflight.gpu.stages import run_stage
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig

ROOT = Path(__file__).parents[2]
MICRO = ["gpu-check", "--shape", "micro", "--device", "cpu", "--batch_size", "3"]


@dataclass
class Report:
    """One run of all parts."""

    code: int
    lines: dict[str, dict[str, str]]  # section -> what -> seen
    run: dict[str, Any]  # --json

    def figures(self, part: str) -> dict[str, Any]:
        return self.run["parts"][part]["figures"]


def sections(text: str) -> dict[str, dict[str, str]]:
    """The tables of a Markdown text by their headings."""
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if line.startswith("## "):
            found[line[3:]] = {}
        elif found and line.startswith("| ") and line != "| what | seen |":
            what, seen = line.strip("| ").split(" | ")
            found[list(found)[-1]][what] = seen
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    file, text = tmp_path_factory.mktemp("gpu") / "run.json", io.StringIO()
    with redirect_stdout(text):
        code = main([*MICRO, "--json", str(file)])
    return Report(code, sections(text.getvalue()), json.loads(file.read_text()))


def test_every_part_runs_on_the_cpu(report: Report) -> None:
    problems = {name: part["problems"] for name, part in report.run["parts"].items() if part["problems"]}
    assert problems == {} and report.code == 0
    assert list(report.run["parts"]) == list(gpu_check.PARTS)
    assert report.run["environment"]["shape"] == "micro"
    assert "transformers" in report.lines["Machine"]["versions"]
    assert report.lines["Machine"]["date"].count("-") == 2


@pytest.mark.parametrize("stage", ["sft", "cma", "refine_rl"])
def test_each_stage_trains_what_shall_train(report: Report, stage: str) -> None:
    seen = report.figures(stage)
    assert all(math.isfinite(loss) for loss in seen["losses"]) and len(seen["losses"]) == 3
    assert seen["intact"] is True
    assert seen["moved"] > 0.99, "every LoRA matrix and both token rows, all of their numbers"
    assert seen["step_seconds"] > 0 and seen["step_peak_bytes"] > 0
    if stage != "refine_rl":
        assert seen["losses"][2] < seen["losses"][0], "three steps on one batch must learn something"


@pytest.mark.parametrize("stage", ["sft", "cma"])
def test_measured_memory_is_beside_the_plan(report: Report, stage: str) -> None:
    seen = report.figures(stage)
    assert seen["plan_error"] == pytest.approx(seen["plan_bytes"] / seen["step_peak_bytes"] - 1)
    assert abs(seen["plan_error"]) < 0.15


def test_refine_rl_has_rewards_and_a_plan_that_it_keeps_within(report: Report) -> None:
    seen = report.figures("refine_rl")
    assert -0.05 < seen["plan_error"] < 0.5, "the plan takes every rewrite at its full length"
    assert 0 < seen["reward_format"] < 1 and seen["no_signal"] < 1
    assert 0 < seen["rewrite_length"] <= seen["new_tokens"]


def test_the_gradient_cache_is_exact_and_its_memory_that_of_a_micro_batch(report: Report) -> None:
    seen = report.figures("cache")
    assert abs(seen["loss_difference"]) < 1e-4
    assert seen["cached_over_plain"] == pytest.approx(seen["cached_seconds"] / seen["plain_seconds"])
    assert seen["cached_peak_bytes"] < seen["plain_peak_bytes"]
    assert seen["large_pairs"] == 4 * seen["large_rows"] and seen["large_seconds"] is None
    assert 0.9 < seen["growth"] < 1.1


def test_kernels_agree_and_a_missing_one_is_named(report: Report) -> None:
    seen = report.figures("attention")
    assert seen["eager_loss"] == pytest.approx(seen["sdpa_loss"], rel=1e-4)
    assert seen["eager_step_seconds"] > 0 and seen["sdpa_step_peak_bytes"] > 0
    if "flash_attention_2_loss" not in seen:
        said = report.lines["Attention kernels"]["flash_attention_2: a step"]
        assert said in ("not installed", "installed, not usable here")


def test_sharding_over_one_process_changes_nothing(report: Report) -> None:
    seen = report.figures("fsdp")
    assert seen["intact"] is True and seen["moved"] > 0.99 and seen["backend"] == "gloo"
    assert abs(seen["loss_difference"]) < 1e-4
    assert not torch.distributed.is_initialized()


def test_the_strategy_is_that_of_the_overlay() -> None:
    overlay = yaml.safe_load((ROOT / "configs/overlays/fsdp.yaml").read_text())["trainer"]["strategy"]
    ours = sharded.overlay()
    assert overlay["class_path"].rsplit(".", 1)[-1] == type(ours).__name__ == ModelParallelStrategy.__name__
    expected = overlay["init_args"] | {"data_parallel_size": 1}
    assert {name: getattr(ours, f"_{name}") for name in expected} == expected


def test_throughput_follows_from_the_stages(report: Report) -> None:
    seen = report.figures("throughput")
    for stage in ("sft", "cma"):
        rate = 3 / report.figures(stage)["step_seconds"]
        assert seen[f"{stage}_pairs_per_second"] == pytest.approx(rate)
        assert seen[f"{stage}_tokens_per_second"] > 10 * rate
    rl = report.figures("refine_rl")
    written = rl["rewrite_length"] * rl["pairs"] * 2 * rl["num_generations"]
    assert seen["refine_rl_tokens_per_second"] == pytest.approx(written / rl["step_seconds"])
    assert 0 < seen["disc_ms"] < seen["gen_ms"] and 0 < seen["gen_tokens"] <= 4


def test_the_page_has_the_lines_that_are_printed(report: Report) -> None:
    page = sections((ROOT / "docs/reference/gpu.md").read_text())
    for title, lines in report.lines.items():
        assert lines.keys() <= page[title].keys(), title


# -- failures -------------------------------------------------------------------------------------------


def test_a_failing_part_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: Bench, out: Part) -> None:
        out.add("before", "what came before", 1.5, "s")
        raise ValueError("no | such\nkernel")

    def fine(bench: Bench, out: Part) -> None:
        out.add("pairs", "pairs of a step", bench.num_pairs)

    monkeypatch.setitem(gpu_check.PARTS, "sft", ("SFT", broken))
    monkeypatch.setitem(gpu_check.PARTS, "fsdp", ("FSDP2 on one process", fine))
    file = tmp_path / "run.json"
    assert main([*MICRO, "--only", "fsdp, sft", "--json", str(file)]) == 1
    found = sections(capsys.readouterr().out)
    assert found["SFT"] == {"what came before": "1.5 s", "FAILED": "ValueError: no / such kernel"}
    assert found["FSDP2 on one process"] == {"pairs of a step": "3"}
    parts = json.loads(file.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {"sft": "failed", "fsdp": "ok"}


def test_a_stage_that_failed_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def out_of_memory(self: Bench, module: RimeModule, *args: Any, **settings: Any) -> None:
        calls.append(module)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Bench, "fit", out_of_memory)
    bench = Bench(tmp_path, "micro", torch.device("cpu"), 2, True)
    with pytest.raises(torch.OutOfMemoryError):
        run_stage(bench, "sft")
    with pytest.raises(RimeError, match="it failed before"):
        run_stage(bench, "sft")
    assert len(calls) == 1


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check"]) == 0
    assert "no CUDA device: nothing was checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch_size", "1"], "--batch_size=1 must be 2 or more"),
        (["--only", "sft,speed"], "--only=sft,speed: speed is no part. Parts: sft, cma,"),
        (["--only", ","], "--only=,: nothing is no part"),
        (["--json", "nowhere/run.json"], "--json=nowhere/run.json: no folder nowhere"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MICRO, *arguments]) == 2
    assert said in capsys.readouterr().err


# -- reproduce/ -----------------------------------------------------------------------------------------


def test_every_claim_is_about_a_figure_that_is_measured(report: Report) -> None:
    for name in json.loads(EXPECTED.read_text())["claims"]:
        part, key = name.split(".")
        assert key == "status" or key in report.figures(part), name


@pytest.mark.parametrize(
    ("claim", "seen", "verdict"),
    [
        ({"is": "ok"}, "failed", "refuted"),
        ({"is": True}, True, "confirmed"),
        ({"finite": True}, [1.0, 2.0], "confirmed"),
        ({"finite": True}, [1.0, "nan"], "refuted"),
        ({"finite": True}, [], "refuted"),
        ({"within": 0.15}, -0.2, "refuted"),
        ({"at_most": 1.6}, 1.6, "confirmed"),
        ({"at_least": 1.0}, 0.5, "refuted"),
        ({"at_most": 1.6}, None, "not yet known"),
        (None, 0.4, "not yet known"),
    ],
)
def test_verdicts(claim: dict[str, Any] | None, seen: Any, verdict: str) -> None:
    assert judge(claim, seen) == verdict


def test_a_run_is_compared(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(report.run))
    assert compare_main([str(file)]) == 2
    assert "shape is micro" in capsys.readouterr().err
    environment = report.run["environment"] | {"shape": "2b", "device type": "cuda"}
    run = report.run | {"environment": environment, "parts": dict(report.run["parts"])}
    run["parts"]["sft"] = {"status": "failed", "problems": ["out of memory"], "figures": {}}
    file.write_text(json.dumps(run))
    assert compare_main([str(file)]) == 1
    said = capsys.readouterr().out
    assert "problem        sft: out of memory" in said
    rows = {name: verdict for name, verdict, *_ in compare(json.loads(EXPECTED.read_text()), run)}
    assert rows["sft.status"] == "refuted" and rows["sft.intact"] == "not yet known"
    assert rows["cma.intact"] == "confirmed" and rows["cma.step_seconds"] == "not yet known"


# -- the checkpoint -------------------------------------------------------------------------------------


def test_2b_shape_is_that_of_the_released_checkpoint() -> None:
    """Parameters of a Qwen2-VL-2B: 1.54 billion in the decoder (tied), 0.67 billion in the vision tower."""
    from rime_pl.miniature.tiny import train_tokenizer

    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(model_config(SHAPES["2b"], train_tokenizer(["a"], 300)))
    vision = sum(p.numel() for p in model.model.visual.parameters())
    decoder = sum(p.numel() for p in model.model.language_model.parameters())
    assert decoder == 1_543_714_304 and round(vision / 1e6) == 665


@torch.no_grad()
def test_qwen2_vl_rows_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    """The other family of backbones: one by one equals the batch, and it writes rewrites."""
    shape = SHAPES["micro"]
    save_checkpoint(tmp_path, shape, torch.device("cpu"))
    config = BackboneConfig(
        str(tmp_path), dtype="float32", prompt=PromptConfig(system_prompt="You are a helpful assistant.")
    )
    processor = RimeProcessor.from_pretrained(str(tmp_path), config.prompt)
    backbone = Backbone(config, processor).eval()
    assert len(linear_4bit_modules(backbone)) == 7 * shape.num_layers
    items = [item for pair in synthetic_pairs(2, shape) for item in (pair.query, pair.target) if item]
    keys = [str(n) for n in range(len(items))]
    rows = processor.rows(items, keys)
    together = backbone(rows.prompts, rows.completions)
    features = backbone.encode_images(rows.prompts)
    shared = backbone(rows.prompts, rows.completions, image_features=features)
    torch.testing.assert_close(shared.gen, together.gen, atol=1e-4, rtol=0)
    for number, item in enumerate(items):
        row = processor.rows([item], keys)
        alone = backbone(row.prompts, row.completions)
        torch.testing.assert_close(alone.disc[0], together.disc[number], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone.gen[0], together.gen[number], atol=1e-4, rtol=0)
    rewrites = write_rewrites(backbone, rows.prompts, max_new_tokens=4)
    for number, item in enumerate(items):
        alone_ids = write_rewrites(backbone, processor.prompts([item]), max_new_tokens=4).completions
        assert (
            alone_ids.ids[0].tolist() == rewrites.completions.ids[number][: alone_ids.ids.shape[1]].tolist()
        )
    numbers = random_numbers(0, 0, keys, 2, 5)
    drawn = sample_rollouts(backbone, rows.prompts, numbers, image_features=features)
    scored = score_rollouts(backbone, rows.prompts, drawn, image_features=features)
    repeated = rows.prompts.select(torch.arange(len(items)).repeat_interleave(2))
    torch.testing.assert_close(
        scored.gen, backbone(repeated, drawn.completions).gen, atol=1e-4, rtol=0, msg="a shared prompt"
    )
