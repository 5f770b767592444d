"""docs/how-to/add-a-loss.md is exact: its three changes are applied to a copy, which then trains."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.runs import ROOT, scalars, stage_arguments

PAGE = ROOT / "docs/how-to/add-a-loss.md"
MOST_LINES_OF_CODE = 30
MAY_CHANGE = {"rime_pl/losses/uniformity.py", "rime_pl/modules/cma.py", "configs/tiny/cma.yaml"}


def patches() -> list[str]:
    return re.findall(r"```diff\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def lines_of_code(added: list[str]) -> int:
    """Added lines without blank ones and docstrings."""
    text = re.sub(r'""".*?"""', "", "\n".join(added), flags=re.DOTALL)
    return sum(bool(line.strip()) for line in text.splitlines())


def test_the_page_changes_one_loss_one_module_and_one_recipe() -> None:
    changed = {re.findall(r"^\+\+\+ b/(\S+)", patch, flags=re.MULTILINE)[0] for patch in patches()}
    assert changed == MAY_CHANGE
    added = [line[1:] for patch in patches() for line in patch.splitlines() if re.match(r"\+(?!\+\+)", line)]
    count = lines_of_code(added)
    assert 0 < count <= MOST_LINES_OF_CODE
    assert f"It has {count} lines of code." in PAGE.read_text()


@pytest.mark.long
def test_a_copy_with_the_page_applied_trains(scenes_corpus: Path, micro_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for folder in ("rime_pl", "callbacks", "datamodules", "configs"):
        shutil.copytree(
            ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for patch in patches():
        subprocess.run(["git", "apply"], input=patch, text=True, cwd=copy, check=True)
    run, threads = tmp_path / "run", {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = stage_arguments("cma", scenes_corpus, micro_base, run, "--trainer.max_epochs", "1")
    words[words.index("--config") + 1] = str(copy / "configs/tiny/cma.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "rime_pl", *words],
        env={**os.environ, **threads, "PYTHONPATH": str(copy)},
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    uniform, total = (scalars(run, f"train/{name}") for name in ("loss_uniform", "loss"))
    parts = ("info_nce_gen", "info_nce_disc", "ce", "cma", "decisive")
    others = [scalars(run, f"train/loss_{name}") for name in parts]
    assert len(uniform) == 3
    for step, value in uniform.items():
        expected = sum(part[step] for part in others) + 0.1 * value
        assert total[step] == pytest.approx(expected, rel=1e-4)
    spec = importlib.util.spec_from_file_location("uniformity", copy / "rime_pl/losses/uniformity.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module) == (0, 1)
