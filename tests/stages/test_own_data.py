"""Corpora that differ from those of this repository, through the real command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rime_pl.__main__ import main
from tests.stages.runs import read_json, stage_arguments


def test_a_corpus_to_test_on_only(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Path(shutil.copytree(scenes_corpus, tmp_path / "corpus"))
    about = read_json(corpus / "corpus.json")
    about["splits"] = {"test": about["splits"]["test"]}
    (corpus / "corpus.json").write_text(json.dumps(about))
    words = stage_arguments("sft", corpus, micro_base, tmp_path / "run")
    assert main(words) == 2
    assert "Training needs a corpus with the split 'train'" in capsys.readouterr().err
    words = stage_arguments("sft", corpus, micro_base, tmp_path / "tested")
    assert main([words[0], "test", *words[2:]]) == 0
    manifest = read_json(tmp_path / "tested" / "manifest.json")
    assert manifest["broken_samples"] == {} and manifest["cut_texts"] == []
    assert read_json(tmp_path / "tested" / "summary.json")["queries"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--data.annotated_share", "1e-9"), "must have a rewrite on both sides, but of 48 none has"),
        (("--model.backbone.prompt.max_pixels", "9"), "max_pixels must be at least 576"),
    ],
)
def test_what_would_train_nothing_is_refused_before_the_model_is_loaded(
    settings: tuple[str, str], message: str, scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    assert main(stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "run", *settings)) == 2
    said = capsys.readouterr()
    assert message in said.err and "part" not in said.out
