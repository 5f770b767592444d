"""`rime gpu-check`: does the real path run on this machine's GPU, and what does it cost?

Random weights in the shape of Qwen2-VL-2B (no download) are saved, loaded in 4 bits through the very
backbone that training uses, and taken through the parts below under Lightning's trainer. A part that fails
says so in its section, and the others run. docs/reference/gpu.md says what each line means.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import bitsandbytes
import lightning as L
import torch
import transformers

from rime_pl.errors import RimeError
from rime_pl.miniature.random_checkpoint import SHAPES
from rime_pl.preflight.gpu.attention import attention
from rime_pl.preflight.gpu.bench import Bench
from rime_pl.preflight.gpu.cached import cache
from rime_pl.preflight.gpu.report import Part, Value, markdown, to_json
from rime_pl.preflight.gpu.sharded import fsdp
from rime_pl.preflight.gpu.stages import cma, refine_rl, sft
from rime_pl.preflight.gpu.throughput import throughput
from rime_pl.preflight.gpu.watch import memory_of, release

#: Name in --only -> title of its section, and what it does.
PARTS: dict[str, tuple[str, Callable[[Bench, Part], None]]] = {
    "sft": ("SFT", sft),
    "cma": ("CMA", cma),
    "refine_rl": ("Refine-RL", refine_rl),
    "cache": ("Gradient cache", cache),
    "attention": ("Attention kernels", attention),
    "fsdp": ("FSDP2 on one process", fsdp),
    "throughput": ("Throughput", throughput),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="2b", help="dimensions (%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs of an ordinary step (%(default)s)")
    parser.add_argument("--no_gradient_checkpointing", action="store_true", help="keep activations in memory")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same for machines, part by part")


def run(args: argparse.Namespace) -> int:
    names = chosen_parts(args.only)
    if args.batch_size < 2:
        raise RimeError(f"--batch_size={args.batch_size} must be 2 or more; one pair has no negatives.")
    if args.json and not args.json.parent.is_dir():
        raise RimeError(f"--json={args.json}: no folder {args.json.parent}; make it, or name another.")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked. `--shape micro --device cpu` runs this code on the CPU.")
        return 0
    device = torch.device(args.device)
    known = environment(device) | {
        "shape": args.shape,
        "gradient checkpointing": not args.no_gradient_checkpointing,
    }
    parts: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="rime-gpu-check-") as folder:
        tell(f"writing random weights of the shape {args.shape} to {folder} ...")
        bench = Bench(Path(folder), args.shape, device, args.batch_size, not args.no_gradient_checkpointing)
        for name in names:
            parts.append(run_part(name, bench))
            if args.json:
                args.json.write_text(json.dumps(to_json(known, parts), indent=1, allow_nan=False) + "\n")
    print(markdown(known, parts))
    return 1 if any(part.problems for part in parts) else 0


def chosen_parts(only: str) -> list[str]:
    """The parts of ``--only`` in their order.

    Raises:
        RimeError: If there is one that nobody knows, or none.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise RimeError(
            f"--only={only}: {', '.join(unknown) or 'nothing'} is no part. Parts: {', '.join(PARTS)}."
        )
    return [name for name in PARTS if name in names]


def run_part(name: str, bench: Bench) -> Part:
    """One part; what goes wrong in it is in its problems."""
    title, work = PARTS[name]
    part = Part(name, title)
    start = time.perf_counter()
    with part.attempt():
        work(bench, part)
    release(bench.device)
    part.seconds = time.perf_counter() - start
    tell(f"{title}: {'FAILED' if part.problems else 'done'}, {part.seconds:.0f} s")
    return part


def tell(text: str) -> None:
    """Progress goes where the report does not."""
    print(text, file=sys.stderr, flush=True)


def environment(device: torch.device) -> dict[str, Value]:
    """Machine and versions, the head of the report."""
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "lightning": L.__version__,
        "Python": platform.python_version(),
    }
    on_gpu = device.type == "cuda"
    memory = memory_of(device)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "device type": device.type,
        "memory": None if memory is None else f"{memory / 2**30:.1f} GiB",
        "date": date.today().isoformat(),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "CUDA": torch.version.cuda if on_gpu else None,
    }
