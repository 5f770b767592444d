"""`make gpu-check-all` on a machine without a GPU says so, and fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_check_that_checks_nothing_fails() -> None:
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu", "-m", "gpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout
    assert "torch finds no CUDA device on this machine, so nothing was checked." in done.stdout + done.stderr
