"""benchmarks/gpu.py on the CPU: what it prints and writes, and what it says without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from tests.gpu.bench import RAGGED, Bench, Case, cases, sizes_for
from tests.gpu.watch import Run

MICRO = ["--shape", "micro", "--device", "cpu"]


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_it_prints_a_table_and_writes_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "predicted_peak", lambda self, case: 2**30)
    file = tmp_path / "gpu.json"
    assert gpu.main([*MICRO, "--only", "sft", "embed", "--json", str(file)]) == 0
    found = read(file)
    assert found["device"]["name"] and found["shape"] == "micro" and found["git_commit"]
    assert "transformers" in found["versions"]
    sft = found["runs"]["sft"]
    assert sft["items_per_second"] == pytest.approx(3 / sft["seconds"])
    assert sft["tokens_per_second"] > 10 * sft["items_per_second"]
    assert sft["predicted_peak"] == 2**30
    disc, gen = found["runs"]["embed_discriminative"], found["runs"]["embed_generative"]
    assert 0 < disc["seconds"] < gen["seconds"] and 0 < gen["tokens"] <= 4 * gen["items"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and lines[2].startswith("| sft | 3 |")


def test_the_short_check_runs_without_bitsandbytes_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest),
    )
    file = tmp_path / "gpu.json"
    assert gpu.main([*MICRO, "--ragged", "--json", str(file)]) == 0
    found = read(file)
    assert found["load_in_4bit"] is False and found["ragged"] is True
    assert list(found["runs"]) == [*gpu.RAGGED_NAMES[:-1], "embed_discriminative", "embed_generative"]
    for name, values in found["runs"].items():
        assert values["seconds"] > 0 and 0 < values["utilisation"] < 1.5, name
    assert found["runs"]["sft"]["predicted_peak"] > 0
    assert "bitsandbytes is not installed" in capsys.readouterr().out


def test_no_run_begins_after_the_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "run", lambda self, case: Run(case.pairs, 100, seconds=2.0))
    file = tmp_path / "gpu.json"
    assert gpu.main([*MICRO, "--ragged", "--only", "sft", "--minutes", "0", "--json", str(file)]) == 0
    assert read(file)["runs"]["sft"] == {"skipped": "the minutes are over"}


def test_ragged_pictures_have_many_sizes_within_the_limits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, torch.device("cpu"), "micro", ragged=True)
    low, high = RAGGED["micro"]
    prompts = bench.batch(40).query.prompts
    tokens = (prompts.input_ids == bench.processor.image_id).sum(1)
    assert set(prompts.num_media.tolist()) == {1, 2, 3, 4}
    assert low / 2 <= tokens.min() < high / 2 < tokens.max() <= 1.3 * high


def test_a_failing_run_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Bench, case: Case) -> Run:
        if case.stage == "cma":
            raise torch.OutOfMemoryError("out of | memory")
        return Run(case.pairs, 100, seconds=2.0)

    monkeypatch.setattr(Bench, "run", run)
    monkeypatch.setattr(Bench, "predicted_peak", lambda self, case: 2**30)
    file = tmp_path / "gpu.json"
    assert gpu.main([*MICRO, "--only", "cma", "sft", "--json", str(file)]) == 1
    assert read(file)["runs"]["cma"] == {"error": "OutOfMemoryError: out of | memory"}
    printed = capsys.readouterr().out
    assert "| cma | - | - | - | - | - | - | - | - | - | OutOfMemoryError: out of / memory |" in printed
    assert "| sft | 3 | 0 | 2 | - | 1 | - | - | 1.5 | 50 |  |" in printed


def test_flash_attention_is_skipped_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_flash_attn_2_available", lambda: False)
    bench: Any = None
    assert gpu.measure(bench, "sft_flash") == {"sft_flash": {"skipped": "flash_attn is not installed"}}


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "nothing was measured, because torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only", "speed"], "invalid choice: 'speed'"), (["--json", "nowhere/gpu.json"], "no folder nowhere")],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([*MICRO, *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("gib", "pairs"), [(16, 24), (24, 24), (80, 80)])
def test_a_larger_card_takes_a_larger_batch(gib: int, pairs: int) -> None:
    sizes = sizes_for(gib * 2**30)
    assert sizes.cached_pairs == pairs
    assert cases(sizes)["sft_cached"].micro_batch == pairs // 8
