"""A failed build leaves the corpus that was there: bad rows, Ctrl-C, a full disk, a kill, another build."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from colour_corpus import make_pairs, make_splits, write

from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.datamodules.shards import read_split
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Pair


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished corpus."""
    return write(tmp_path / "corpus", make_splits())


def stream(output: Path, pairs: Any, **settings: Any) -> None:
    write_corpus(output, "x", "CC0", {"train": pairs}, {"train": 9}, seed=0, **settings)


def failing(error: BaseException) -> Iterator[Pair]:
    yield from make_pairs("a", 5, 5)
    raise error


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("line 7: no picture"), "line 7: no picture"),
        (KeyboardInterrupt(), "^$"),
        (OSError(28, "No space left on device"), "cannot be built: .*No space left.*as it was"),
    ],
    ids=["bad row", "Ctrl-C", "full disk"],
)
def test_a_failed_build_leaves_the_old_corpus(output: Path, error: BaseException, told: str) -> None:
    before = contents(output)
    with pytest.raises(RimeError if isinstance(error, OSError) else type(error), match=told):
        stream(output, failing(error), samples_per_shard=2)
    assert contents(output) == before and len(read_split(output, "train")) == 50
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_failed_first_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "new", failing(KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_corpus_is_not_replaced(tmp_path: Path, output: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_text("mine")
    with pytest.raises(RimeError, match=r"must be a new folder or a corpus.* also holds holiday.jpg\. Move"):
        stream(photos, make_pairs("a", 2, 2))
    assert (photos / "holiday.jpg").read_text() == "mine"
    (output / "train" / "notes.txt").write_text("mine")
    with pytest.raises(RimeError, match=r"also holds train/notes.txt\. Move"):
        stream(output, make_pairs("a", 2, 2))
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RimeError, match=r"must be a folder, but .*/file is a file"):
        stream(file, make_pairs("a", 2, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "file", "photos"]


def test_an_empty_folder_and_a_link_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    stream(tmp_path / "empty", make_pairs("a", 2, 2))
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    stream(tmp_path / "link", make_pairs("a", 3, 3))
    assert (tmp_path / "link").is_symlink() and len(read_split(tmp_path / "empty", "train")) == 3


def test_a_killed_build_leaves_the_old_corpus_and_the_next_one_cleans_up(output: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from colour_corpus import make_pairs\n"
        "from test_replacing import stream\n"
        "from pathlib import Path\n"
        "def pairs():\n"
        "    yield from make_pairs('a', 5, 5)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "stream(Path(sys.argv[1]), pairs(), samples_per_shard=2)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(output)], env={**os.environ, "PYTHONPATH": path}, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert len(read_split(output, "train")) == 50
    assert (output.parent / ".corpus.building" / "train").is_dir()
    stream(output, make_pairs("a", 3, 3))
    assert len(read_split(output, "train")) == 3
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_kill_between_the_two_renames_is_finished_by_the_next_build(output: Path) -> None:
    output.rename(output.parent / ".corpus.old")
    with pytest.raises(KeyboardInterrupt):
        stream(output, failing(KeyboardInterrupt()))
    assert read_corpus(output)["name"] == "colours"
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_two_builds_of_one_corpus_do_not_mix(output: Path) -> None:
    building = output.parent / ".corpus.building"
    building.mkdir()
    (building / "file").write_text("of the other build")
    lock = os.open(building, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(RimeError, match=r"Another process builds .*corpus just now"):
            stream(output, make_pairs("a", 3, 3))
        assert (building / "file").exists()
    finally:
        os.close(lock)
    assert len(read_split(output, "train")) == 50


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(RimeError, match=r"corpus cannot be built: .*Permission denied"):
        stream(output, make_pairs("a", 3, 3))
