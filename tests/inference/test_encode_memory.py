"""The memory of `encode` does not grow with the number of photos; the full measurement is a benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_four_times_as_many_photos_need_no_more_memory() -> None:
    command = [sys.executable, "-m", "benchmarks.encode_memory", "--photos", "12", "48"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    (growth,) = json.loads(done.stdout.splitlines()[-1]).values()
    # 36 photos more take 1,300 MB where all are kept. A thread opens photos ahead, so the moment decides how
    # many batches of at most four photos of 36 MB are there at once.
    assert growth < 150, done.stdout
