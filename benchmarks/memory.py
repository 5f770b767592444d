"""Memory of a step whose batch is 128 times larger, and the error of `rime plan`.

`python -m benchmarks.memory` runs one SFT step with 32 and one with 4,096 pairs, each in its own process,
with micro-batches of 32 rows. It prints the ratio of their peaks above the imports, which should be
near 1. What must grow with the batch is listed and subtracted: inputs, embeddings and their gradients. The
items are only texts, because pictures would just add inputs. Then it compares `rime plan` with measured
peaks (plan_error.py). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.miniature import make_backbone, make_base, silent
from benchmarks.plan_error import errors as plan_errors
from rime_pl.backbone.mllm import Backbone
from rime_pl.miniature.tiny import TinyConfig
from rime_pl.modules.settings import MicroBatchSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.types import Batch, Completions, Prompts, Rows

SIZES = (32, 4096)
MICRO_BATCH = 32
PROMPT_TOKENS, COMPLETION_TOKENS = 48, 24
#: Narrow, with a wide MLP, so that the activations of a micro-batch are much larger than its embeddings.
SHAPE = TinyConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=768,
    vision_hidden_size=64,
    vision_layers=1,
    vision_heads=2,
    vision_intermediate_size=64,
)
VOCABULARY = 1843


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, help="internal: measure this many pairs in this process")
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()
    if args.size:
        print(json.dumps(measure(args.size, args.base)))
        return
    with tempfile.TemporaryDirectory(prefix="rime-memory-") as folder:
        base = make_base(Path(folder), SHAPE, VOCABULARY)
        seen = [in_a_process(size, base) for size in SIZES]
    for size, one in zip(SIZES, seen, strict=True):
        parts = ", ".join(f"{name} {value / 2**20:.1f} MiB" for name, value in one["grows"].items())
        print(
            f"{size} pairs: peak above the imports {one['peak'] / 2**20:.1f} MiB; grows with the batch: "
            f"{parts}; {one['seconds']:.1f} s"
        )
    small, large = (one["peak"] - sum(one["grows"].values()) for one in seen)
    plan_error = plan_errors()["plan_error"]
    print(json.dumps({"peak_4096_over_32": round(large / small, 3), "plan_error": plan_error}))


def in_a_process(size: int, base: Path) -> dict:
    """Return peak and seconds of one step, in a new process that returns freed memory at once."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable, "-m", "benchmarks.memory", "--size", str(size), "--base", str(base)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=env, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: int, base: Path) -> dict:
    """Return peak and seconds of one step of ``size`` pairs, in this process."""
    torch.set_num_threads(1)
    baseline = _peak()
    backbone = make_backbone(base, load_in_4bit=False)
    module = silent(SFTModule(backbone.config, micro_batches=MicroBatchSettings(size=MICRO_BATCH)), backbone)
    batch = random_batch(backbone, size)
    start = time.perf_counter()
    module.backward(module.training_step(batch, 0))
    seconds = time.perf_counter() - start
    width = backbone.language_model.config.text_config.hidden_size
    embeddings = 4 * size * width * 4  # both modes of both sides, float32
    grows = {"inputs": input_bytes(batch), "embeddings": embeddings, "their gradients": embeddings}
    return {"peak": _peak() - baseline, "grows": grows, "seconds": seconds}


def random_batch(backbone: Backbone, size: int) -> Batch:
    """Return a batch of random words, all rows annotated and of the same length."""
    processor = backbone.processor
    generator = torch.Generator().manual_seed(0)

    def rows() -> Rows:
        prompt = torch.randint(300, 800, (size, PROMPT_TOKENS), generator=generator)
        prompt[:, -4] = processor.disc_id
        completion = torch.randint(300, 800, (size, COMPLETION_TOKENS), generator=generator)
        completion[:, -2], completion[:, -1] = processor.gen_id, processor.turn_end_id
        none = torch.zeros(size, dtype=torch.int64)
        prompts = Prompts(prompt, torch.ones_like(prompt), None, None, none)
        return Rows(
            prompts, Completions(completion, torch.ones_like(completion)), torch.ones(size, dtype=torch.bool)
        )

    return Batch(rows(), rows(), torch.arange(size), torch.arange(size) + size, "random")


def input_bytes(batch: Batch) -> int:
    tensors = [batch.query_content, batch.target_content]
    for side in batch.sides:
        tensors += [side.prompts.input_ids, side.prompts.attention_mask, side.prompts.num_media]
        tensors += [side.completions.ids, side.completions.mask, side.annotated]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak() -> int:
    """Return the largest resident size of this process so far, in bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
