"""A stage run through the real command line on the micro corpus: what the tests of this folder share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
RECALL = ["--recall.headline_tasks", "[relative, describe]"]
#: SFT whose model has learned in six steps to end a rewrite now and then: what never ends is worth nothing,
#: and reinforcement learning would have nothing to learn from.
ENDING = ("--model.optimizer.learning_rate", "3e-2", "--model.optimizer.warmup_steps", "1")


def stage_arguments(stage: str, corpus: Path, base: Path, run_dir: Path, *more: str) -> list[str]:
    """`rime` arguments of a short run: 2 epochs of 3 steps, 4 pairs each."""
    return [
        stage,
        "fit",
        *("--config", str(ROOT / f"configs/tiny/{stage}.yaml")),
        *("--data.path", str(corpus)),
        *("--model.backbone.name_or_path", str(base)),
        *("--run_dir", str(run_dir)),
        *("--data.steps_per_epoch", "3", "--data.batch_size", "4", "--data.eval_batch_size", "8"),
        *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
        *("--checkpoint.every_n_steps", "1", "--num_threads", "1"),
        *("--model.backbone.prompt.max_rewrite_tokens", "24", "--model.backbone.lora_r", "4"),
        *RECALL,
        *more,
    ]


def refine_rl_arguments(corpus: Path, base: Path, run_dir: Path, adapter: Path, *more: str) -> list[str]:
    """The same length of run: 4 rewrites of at most 8 tokens, on the pairs that nobody annotated."""
    return stage_arguments(
        "refine_rl",
        *(corpus, base, run_dir),
        *("--model.init_adapter_from", str(adapter)),
        *("--model.rollouts.num_generations", "4", "--model.rollouts.max_new_tokens", "8"),
        *("--model.reward.num_anchors", "6"),
        *("--model.optimizer.learning_rate", "1e-3", "--model.policy.num_updates", "2"),
        *("--data.annotated_share", "0.5"),
        *("--data.batch_size", "2", *more),
    )


def run_process(arguments: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """`rime ...` in a process of its own, one thread, no network."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rime_pl.__main__", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, **kwargs)


def run_killed(step: int, arguments: list[str]) -> None:
    """The same, killed before a step of the optimiser."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.stages.killed", *arguments]
    environment = env | {"RIME_KILL_STEP": str(step)}
    killed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert killed.returncode < 0, killed.stderr[-3000:]  # of two processes, torch's launcher ends by SIGTERM


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def scalars(run_dir: Path, key: str) -> dict[int, float]:
    """step -> value of a TensorBoard scalar; a step logged twice keeps the last."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(key)}
