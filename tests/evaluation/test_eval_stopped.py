"""`rime eval` killed at random moments, and shared by two processes: the same scores, each part made once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rime_pl.__main__ import main
from rime_pl.evaluation import embedding
from rime_pl.evaluation.digests import item_digest
from rime_pl.inference.retriever import Retriever
from tests.datamodules.benchmarks.official_copies import write_image_task
from tests.datamodules.benchmarks.official_documents import write_document_task

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
PART = 3


def words(root: Path, run: Path, output: Path, cache: Path) -> list[str]:
    paths = ["--root", str(root), "--run", str(run), "--output", str(output), "--cache", str(cache)]
    return ["eval", "mmeb-v2", *paths, "--modes", "gen-gen", "disc-gen", "--accelerator", "cpu"]


def scores(output: Path) -> Any:
    """What a kill must not change: all but the times."""
    found = json.loads((output / "result.json").read_text())
    return {name: task["results"] for name, task in found["tasks"].items()}


def vectors(cache: Path) -> dict[tuple[str, str], torch.Tensor]:
    """The embedding of each content, by mode."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for file in cache.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            rows = [row.numpy().tobytes().hex() for row in opened.get_tensor("digests")]
            for mode in ("discriminative", "generative"):
                if mode in opened.keys():  # noqa: SIM118
                    found |= dict(zip([(mode, row) for row in rows], opened.get_tensor(mode), strict=True))
    return found


def digests(cache: Path) -> Counter[tuple[str, str]]:
    """How often each content is in the parts, by mode."""
    found: Counter[tuple[str, str]] = Counter()
    for file in cache.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            modes = [name for name in opened.keys() if name != "digests"]  # noqa: SIM118
            rows = [row.numpy().tobytes().hex() for row in opened.get_tensor("digests")]
            found.update((mode, row) for mode in modes for row in rows)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("CIRR", "MSCOCO_i2t", "WebQA", "NIGHTS", "OK-VQA"):
        write_image_task(tmp_path / "root", name, rows=12)
    write_document_task(tmp_path / "root", "ViDoSeek-doc")
    return tmp_path / "root"


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_killed_twenty_times(run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PART", PART)
    log = tmp_path / "log"
    log.touch()
    encode = Retriever.encode_modes

    def logged(self: Retriever, items: Any, modes: Any, *more: Any) -> Any:
        with log.open("a") as file:
            file.writelines(f"{mode} {item_digest(item).hex()}\n" for item in items for mode in modes)
        return encode(self, items, modes, *more)

    assert (
        main(words(root, run, tmp_path / "whole", tmp_path / "whole-cache")) == 1
    )  # other tasks are missing
    monkeypatch.setattr(Retriever, "encode_modes", logged)
    random.seed(0)
    killed = 0
    while killed < KILLS:
        killed += killed_after(random.randint(0, 2), random.uniform(0, 0.15), log, root, run, tmp_path)
    assert main(words(root, run, tmp_path / "out", tmp_path / "cache")) == 1
    assert scores(tmp_path / "out") == scores(tmp_path / "whole")
    parts = digests(tmp_path / "cache")
    assert parts == digests(tmp_path / "whole-cache") and set(parts.values()) == {1}
    started = Counter(tuple(line.split()) for line in log.read_text().splitlines())
    assert started.keys() == parts.keys()
    again = sum(started.values()) - len(parts)
    assert 0 < again <= killed * PART * 2, "at most the part in two modes that a kill has interrupted"


def killed_after(parts: int, seconds: float, log: Path, root: Path, run: Path, tmp_path: Path) -> int:
    """Start the command in a process of its own, and kill it some parts later; 0 if it ended before."""
    before = log.stat().st_size
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(words(root, run, tmp_path / "out", tmp_path / "cache")))
    for _ in range(parts):
        while log.stat().st_size == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        before = log.stat().st_size
    time.sleep(seconds)
    try:
        os.kill(child, signal.SIGKILL)
        return int(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
    except (ProcessLookupError, ChildProcessError):
        raise AssertionError("all was embedded before the last kill: make the tasks larger") from None


@pytest.mark.long
def test_two_processes_give_what_one_gives(run: Path, root: Path, tmp_path: Path) -> None:
    for name, content in (("NIGHTS", b"no picture"), ("OK-VQA", b"")):  # one process finds it, both go on
        sorted((root / "image-tasks" / name).glob("*.png"))[1].write_bytes(content)
    assert main(words(root, run, tmp_path / "one", tmp_path / "one-cache")) == 1
    command = [sys.executable, "-m", "rime_pl", *words(root, run, tmp_path / "two", tmp_path / "two-cache")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--devices", "2"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("results: ") == 1, "only the first tells"
    for name in ("NIGHTS", "OK-VQA"):
        assert done.stdout.count(f"{name} failed: mmeb-v2, {name}: ") == 1
        assert name not in scores(tmp_path / "one")
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    # of a task that fails, the process without a fault goes on to the end
    assert digests(tmp_path / "one-cache") <= digests(tmp_path / "two-cache")
    assert set(digests(tmp_path / "two-cache").values()) == {1}
    one, two = (vectors(tmp_path / name) for name in ("one-cache", "two-cache"))
    # A task that failed leaves more behind, so a part may hold other contents. It is then another batch,
    # whose sums are rounded otherwise.
    found, expected = torch.stack([two[key] for key in one]), torch.stack([*one.values()])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
