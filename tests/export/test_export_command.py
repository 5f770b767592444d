"""`rime export` from the command line: its output, and errors before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rime_pl.__main__ import main


def test_the_command_writes_a_folder(
    family_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--to", "peft", "--run", str(family_run("qwen2_vl")), "--output", str(tmp_path / "mine")]
    assert main(["export", *words, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "peft: lowest cosine" in said and f"written: {tmp_path / 'mine'} (README.md, parity.json)" in said
    assert main(["export", *words, "--device", "cpu"]) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "onnx"], "--to"),
        (["--to", "peft", "--rewrite_instruction", "x"], "prompt is for a released checkpoint"),
        (["--to", "peft", "--truncate-dim", "8"], "--truncate_dim is not for --to peft"),
    ],
)
def test_wrong_options_are_named(
    words: list[str],
    said: str,
    family_run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--run", str(family_run("qwen2_vl")), "--output", str(tmp_path / "mine")]
    assert main(["export", *words, *given]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
