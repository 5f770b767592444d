"""`rime run` with real stages; what it decides is tested in tests/commands/test_run_command.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from rime_pl.__main__ import main
from rime_pl.run_folder import RunFolder
from tests.stages.runs import ROOT

pytestmark = pytest.mark.long
SHORT = {
    "data.steps_per_epoch": "2",
    "data.batch_size": "4",
    "data.eval_batch_size": "8",
    "trainer.max_epochs": "1",
    "checkpoint.every_n_steps": "1",
    "num_threads": "1",
    "model.backbone.prompt.max_rewrite_tokens": "24",
    "model.backbone.lora_r": "4",
}


def test_a_stage_and_what_is_missing_before_it(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cma = ["run", "cma", "--corpus", str(scenes_corpus), "--base", str(micro_base), "--seed", "1"]
    cma += [
        word
        for stage in ("sft", "cma")
        for key, value in SHORT.items()
        for word in (f"--{stage}.{key}", value)
    ]
    first, aligned = (RunFolder(Path("runs/scenes-tiny-seed1") / stage) for stage in ("sft", "cma"))

    assert main(cma) == 0
    assert f"cma: training into {aligned} (differs from the recipe: " in capfd.readouterr().out
    assert aligned.finished and aligned.before() == first and aligned.manifest["seed"] == 1
    assert aligned.manifest["differs_from_recipe"]["trainer.max_epochs"] == {"value": 1, "recipe": 2}
    assert [Path(file).name for file in aligned.manifest["recipe"]] == ["cma.yaml", "cma.yaml"]

    assert main(cma) == 0  # what the stage itself wrote as its settings is recognised
    said = capfd.readouterr().out
    assert f"sft: found finished in {first}" in said and f"cma: found finished in {aligned}" in said
    aligned.marker.unlink()  # as after a kill during the test
    assert main([*cma, "--data.batch_size", "500", "--print_folder"]) == 0
    assert capfd.readouterr().out == f"{aligned}-2\n"
    assert main([*cma, "--dry_run"]) == 0
    assert f"cma: resuming at step 2 in {aligned}" in capfd.readouterr().out
    assert main([*cma, "--data.batch_size", "500"]) == 2
    assert "cma stopped (exit code 2) before its first checkpoint" in capfd.readouterr().err
    assert not RunFolder(f"{aligned}-2").config.exists()  # the name stays free for settings that work
