"""`rime base`: what it says to tasks that are not there, and to values of no use."""

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


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("picture_side", "23", "--picture_side must be 24 or more, but is 23."),
        ("max_pictures", "1", "--max_pictures must be 2 or more, but is 1."),
        ("learning_rate", "0", "--learning_rate must be above 0, but is 0.0."),
        ("learning_rate", "nan", "--learning_rate must be a number, but is 'nan'."),
    ],
)
def test_values_of_no_use_are_refused(
    option: str, value: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["base", "--data", str(tmp_path), "--output", str(tmp_path / "b"), f"--{option}", value]) == 2
    assert told in capsys.readouterr().err
