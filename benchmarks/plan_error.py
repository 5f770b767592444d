"""Is `rime plan` right? Its prediction against the memory of real steps, each in a process of its own.

    python -m benchmarks.plan_error      (also the end of benchmarks/memory.py)

Measured: the highest resident memory (VmHWM, reset after loading) of two training steps under Lightning,
minus the resident memory after all imports and before the model is loaded. A step of a model of 0.4 million
parameters comes first, because a first step imports and starts what no model is to blame for (its own bytes
are printed). glibc is told to give freed blocks back (MALLOC_MMAP_THRESHOLD_), else the figure is that of
its free lists. Linux only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lightning as L
import torch
from torch.utils.data import DataLoader

from rime_pl.backbone.config import BackboneConfig
from rime_pl.miniature.random_checkpoint import SHAPES, Shape, save_checkpoint, synthetic_pairs
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.settings import MicroBatchSettings, OptimizerSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan.predict import predict_stage
from rime_pl.preflight.plan.weightless import read_architecture
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Batch

MIB = 2**20
NUM_STEPS = 2  # from the second on the optimiser has its states
SMALL = Shape(512, 6, 8, 2, 2048, (8, 12, 12), 16000, 4, 256, 4, image_size=112, num_words=24)
LARGE = Shape(768, 10, 12, 4, 3072, (8, 12, 12), 24000, 4, 256, 4, image_size=112, num_words=24)


@dataclass(frozen=True)
class Case:
    """A model, a stage and how it is trained."""

    shape: Shape
    stage: str
    batch_size: int
    gradient_checkpointing: bool
    micro_batch_size: int | None = None


CASES = {
    "small, SFT": Case(SMALL, "sft", 4, False),
    "large, SFT, checkpointing": Case(LARGE, "sft", 8, True),
    "small, CMA, checkpointing": Case(SMALL, "cma", 8, True),
    "small, SFT, gradient cache": Case(SMALL, "sft", 16, False, micro_batch_size=4),
}


def settings(case: Case, folder: Path) -> tuple[BackboneConfig, RimeProcessor, Batch]:
    """Backbone settings and a batch whose rows differ in length."""
    config = BackboneConfig(
        str(folder),
        dtype="float32",
        gradient_checkpointing=case.gradient_checkpointing,
        prompt=PromptConfig(max_rewrite_tokens=8 * case.shape.num_words),
    )
    processor = RimeProcessor.from_pretrained(str(folder), config.prompt)
    pairs = synthetic_pairs(case.batch_size, case.shape)
    for side in (pairs[0].query, pairs[0].target):
        assert side is not None and side.rewrite is not None
        object.__setattr__(side, "rewrite", side.rewrite[: len(side.rewrite) // 2])
    return config, processor, processor.training_batch(pairs)


def predict(case: Case, folder: Path) -> int:
    """Bytes of weights, optimiser and step."""
    config, _, batch = settings(case, folder)
    return predict_stage(module_of(case, config), read_architecture(str(folder)), batch).peak


def module_of(case: Case, config: BackboneConfig) -> RimeModule:
    """The stage with the settings of the case, without its backbone."""
    stage = CMAModule if case.stage == "cma" else SFTModule
    micro_batches = MicroBatchSettings(size=case.micro_batch_size)
    return stage(config, optimizer=OptimizerSettings(warmup_steps=0), micro_batches=micro_batches)


class Watch(L.Callback):
    """Starts the ruler after loading."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew


def measure(case: Case, folder: Path) -> tuple[int, int]:
    """Bytes above the process without a model, and what the first step of a micro model took before."""
    start = _resident("VmRSS")
    with tempfile.TemporaryDirectory(prefix="rime-plan-") as micro:
        save_checkpoint(Path(micro), SHAPES["micro"], torch.device("cpu"))
        train(Case(SHAPES["micro"], case.stage, 2, case.gradient_checkpointing), Path(micro))
    gc.collect()
    before = _resident("VmRSS")
    train(case, folder)
    return _resident("VmHWM") - before, before - start


def train(case: Case, folder: Path) -> None:
    """``NUM_STEPS`` steps on one batch."""
    config, _, batch = settings(case, folder)
    module = module_of(case, config)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=NUM_STEPS,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Batch] = DataLoader([batch] * NUM_STEPS, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)


def _resident(line: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in status if text.startswith(line))


def in_own_process(name: str, folder: Path) -> tuple[int, int]:
    """``measure`` where nothing has run before."""
    command = [sys.executable, "-m", "benchmarks.plan_error", "--measure", name, "--folder", str(folder)]
    allocator = {"MALLOC_MMAP_THRESHOLD_": str(MIB // 4), "MALLOC_TRIM_THRESHOLD_": str(MIB // 4)}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, env=os.environ | allocator, cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name}: the measuring process failed.\n{done.stderr[-3000:]}")
    bytes_above, warm_up = json.loads(done.stdout.splitlines()[-1])
    return bytes_above, warm_up


def errors() -> dict[str, float]:
    """Relative error of each case's prediction, printed as it is measured; the largest one first."""
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory(prefix="rime-plan-") as folder:
            save_checkpoint(Path(folder), case.shape, torch.device("cpu"))
            (measured, warm_up), predicted = in_own_process(name, Path(folder)), predict(case, Path(folder))
        found[name] = round(abs(predicted / measured - 1), 4)
        line = f"measured {measured / MIB:7.1f} MiB  predicted {predicted / MIB:7.1f} MiB  {found[name]:.1%}"
        print(f"{name:<28} {line}  (first step of a micro model: {warm_up / MIB:.1f} MiB)", flush=True)
    return {"plan_error": max(found.values()), **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measure", choices=sorted(CASES), help="measure this case in this process, print bytes"
    )
    parser.add_argument("--folder", type=Path, help="its checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(measure(CASES[args.measure], args.folder)))
        return
    print(json.dumps(errors()))


if __name__ == "__main__":
    main()
