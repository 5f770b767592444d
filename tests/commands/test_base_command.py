"""`rime base`: what it says when it is asked for tasks that are not there."""

from pathlib import Path

import pytest

from rime_pl.__main__ import main


def test_unknown_tasks_are_named(
    scenes_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["base", "--data", str(scenes_corpus), "--output", str(tmp_path / "base"), "--num_threads", "1"]
    assert main([*words, "--tasks", "twin", "twins"]) == 2
    assert "--tasks twins: no such task in" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
