"""What can be a base model: told before minutes go into data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rime_pl.__main__ import main
from rime_pl.backbone.base_path import FAMILIES, check_base
from rime_pl.errors import RimeError
from tests import families


def folder(path: Path, model_type: str | None = "qwen3_vl", *files: str) -> Path:
    path.mkdir(parents=True)
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name in files or ("model.safetensors", "processor_config.json"):
        (path / name).touch()
    return path


def test_the_families_are_those_that_are_tested() -> None:
    assert tuple(FAMILIES) == families.FAMILIES


def test_a_base_model_passes(micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_base(str(micro_base))
    for family in FAMILIES:
        check_base(str(folder(tmp_path / family, family)))
    check_base(
        str(folder(tmp_path / "older", "qwen2_vl", "model-1-of-2.safetensors", "preprocessor_config.json"))
    )
    monkeypatch.chdir(tmp_path)
    check_base("Qwen/Qwen2-VL-2B-Instruct")  # of the hub; whether it can be downloaded is seen later


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("models/tiny-mugz", r"does not exist\. Did you mean models/tiny-mugs\?"),
        ("./nowhere/at-all", "does not exist"),
        ("mine", "must be the folder of a base model or a name of the Hugging Face hub.* does not exist"),
        ("a/b/c", "does not exist"),
        ("no name/of the hub", "is neither a folder nor a name of the hub"),
        ("file.txt", "is a file"),
        (
            "models/llava",
            "must be a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, but its config.json says 'llava'",
        ),
        ("models/number", "config.json says 3"),
        ("models/broken", "config.json must be a JSON object with 'model_type', but is none"),
        ("models/empty", "must have a config.json, but this folder has none"),
        ("models/adapter", "holds a trained adapter, but --base must name the model that it was trained on"),
        ("models/run", "holds a trained adapter"),
        ("models/no-weights", r"has no weights \(\*\.safetensors\)\. Download"),
        ("models/no-processor", r"has no processor \(processor_config\.json or preprocessor_config\.json\)"),
    ],
)
def test_what_cannot_be_a_base_model_is_refused(
    named: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models"
    folder(models / "tiny-mugs")
    folder(models / "llava", "llava")
    folder(models / "number", 3)  # type: ignore[arg-type]
    (folder(models / "broken") / "config.json").write_text("[")
    folder(models / "empty", None, "notes.txt")
    folder(models / "adapter", None, "rime.json")
    folder(models / "run" / "adapter", None, "rime.json")
    folder(models / "no-weights", "qwen3_vl", "processor_config.json")
    folder(models / "no-processor", "qwen3_vl", "model.safetensors")
    (tmp_path / "file.txt").touch()
    with pytest.raises(RimeError, match=f"--base {named}: .*{message}"):
        check_base(named)


def test_rime_run_refuses_it_before_data_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for goal in ("data", "sft", "cma"):
        assert main(["run", goal, "--corpus", "scenes", "--base", "models/none"]) == 2
        assert "--base models/none: must be the folder of a base model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
