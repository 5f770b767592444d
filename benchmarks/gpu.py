"""Print seconds, memory and throughput of every stage on one GPU, with a random 2B-shaped model in 4 bits.

`make gpu-check-all` runs tests/gpu first, to see that the results are right. docs/reference/gpu.md explains
the columns. If a run fails, its row holds the error, the others go on, and the exit code is 1.

`make gpu-check` adds `--ragged`: the short check for a GPU that is lent for minutes, with the Python that is
there and without a network. Items have 1 to 4 pictures and 100 to 1,300 visual tokens, each stage runs once,
and no run begins after 6 minutes. Without bitsandbytes the decoder is not packed, in all runs, and the output
says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers.utils import is_flash_attn_2_available

from rime_pl.generation.rewriting import write_rewrites
from rime_pl.metrics.flops import CountedFlops, product_flops_per_second
from rime_pl.miniature.random_checkpoint import SHAPES
from rime_pl.preflight.doctor import driver_version
from rime_pl.preflight.plan.planning import GIB
from rime_pl.report.manifest import build_manifest
from rime_pl.report.table import Table
from tests.gpu.bench import MICRO, Bench, cases
from tests.gpu.watch import Run, memory_of, now, peak_since, release

NAMES = [*cases(MICRO), "embed"]
RAGGED_NAMES = ["sft", "cma", "sft_cached", "refine_rl", "embed"]  # of --ragged
MINUTES = 6.0  # after which --ragged begins no run
PLANNED = ("sft", "cma", "refine_rl")  # runs whose peak `rime plan` predicts
#: Head of a column, key in the JSON, and what it is divided by.
COLUMNS = {
    "items": ("items", 1),
    "load, s": ("load_seconds", 1),
    "step, s": ("seconds", 1),
    "peak, GiB": ("peak", GIB),
    "predicted peak, GiB": ("predicted_peak", GIB),
    "plan error, %": ("plan_error", 0.01),
    "utilisation": ("utilisation", 1),
    "items per second": ("items_per_second", 1),
    "tokens per second": ("tokens_per_second", 1),
}


@torch.no_grad()
def embed(bench: Bench) -> dict[str, Run]:
    """Embed queries with a picture in both modes, from tokens and patches on the device."""
    before, start = release(bench.device), now(bench.device)
    backbone = bench.backbone().eval()
    load = now(bench.device) - start
    prompts = bench.batch(bench.sizes.pairs).query.prompts.to(bench.device)
    written: list[int] = []

    def generative() -> None:
        rewrites = write_rewrites(backbone, prompts, bench.sizes.new_tokens)
        backbone(prompts, rewrites.completions)
        written.append(int(rewrites.lengths.sum()))

    modes = {"embed_discriminative": lambda: backbone(prompts), "embed_generative": generative}
    runs = {}
    for name, work in modes.items():
        release(bench.device)
        run = Run(len(prompts), int(prompts.attention_mask.sum()), load)
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        run.seconds, run.peak = timer.timeit(3).mean, peak_since(before, bench.device)  # after two to warm up
        with CountedFlops() as counted:
            work()
        dtype = getattr(torch, bench.config().dtype)
        product = product_flops_per_second(bench.device, dtype)
        run.utilisation = counted.flops / run.seconds / product
        runs[name] = run
    runs["embed_generative"].tokens = written[-1]
    return runs


def measure(bench: Bench, name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of one run; the error in place of the results if it fails."""
    if name == "sft_flash" and not is_flash_attn_2_available():
        return {name: {"skipped": "flash_attn is not installed"}}
    try:
        runs = embed(bench) if name == "embed" else {name: bench.run(bench.cases[name])}
        return {name: row(run) for name, run in runs.items()}
    except Exception as error:  # one run must not take the others with it
        traceback.print_exc()
        return {name: {"error": f"{type(error).__name__}: {error}"}}


def row(run: Run) -> dict[str, Any]:
    """Return the results of a run, with items and tokens per second."""
    assert run.seconds, "a run has at least one timed step"
    rates = {"items_per_second": run.items / run.seconds, "tokens_per_second": run.tokens / run.seconds}
    return asdict(run) | rates


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = []
    for name, values in rows.items():
        numbers = [(values.get(key), unit) for key, unit in COLUMNS.values()]
        shown = [None if value is None else value / unit for value, unit in numbers]
        cells = ["-" if n is None else f"{n:.3g}" if n < 100 else f"{n:,.0f}" for n in shown]
        note = " ".join(str(values.get("error") or values.get("skipped") or "").replace("|", "/").split())
        lines.append([name, *cells, note[:200]])
    return Table("", ["run", *COLUMNS, "note"], lines).markdown()


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all numbers: seconds and bytes")
    names = f"{', '.join(NAMES)} (default: all)"
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="RUN", help=names)
    parser.add_argument("--ragged", action="store_true", help="short check with pictures of many sizes")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"no run begins after these (default with --ragged: {MINUTES:g})",
    )
    parser.add_argument("--no_gradient_checkpointing", action="store_true", help="more memory, less time")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="2b", help="model size (default: 2b)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="device (default: cuda)")
    args = parser.parse_args(arguments)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}. Make it, or name another.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("nothing was measured, because torch finds no CUDA device on this machine.")
    args.only = args.only or (RAGGED_NAMES if args.ragged else NAMES)
    if args.minutes is None:
        args.minutes = MINUTES if args.ragged else math.inf
    return args


def main(arguments: list[str] | None = None) -> int:
    args = read_arguments(arguments)
    device, checkpointing = torch.device(args.device, 0), not args.no_gradient_checkpointing
    facts: dict[str, Any] = {"driver": driver_version(), "cuda": torch.version.cuda}
    facts["memory_bytes"] = memory_of(device)
    packed, start = importlib.util.find_spec("bitsandbytes") is not None, time.monotonic()
    facts |= {"shape": args.shape, "gradient_checkpointing": checkpointing, "ragged": args.ragged}
    facts |= {"load_in_4bit": packed, "runs": {}}
    found = build_manifest(facts, {})
    rows: dict[str, dict[str, Any]] = found["runs"]

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="rime-gpu-") as folder:
        bench = Bench(
            *(Path(folder), device, args.shape),
            checkpointing=checkpointing,
            ragged=args.ragged,
            load_in_4bit=packed,
        )
        for name in args.only:
            late = time.monotonic() - start > 60 * args.minutes
            rows |= {name: {"skipped": "the minutes are over"}} if late else measure(bench, name)
            print(f"{name}: {rows.get(name, {}).get('error', 'done')}", file=sys.stderr, flush=True)
            write()
        for stage in PLANNED:  # last, because a plan takes the processor's time and not the card's
            if "seconds" in rows.get(stage, {}):
                planned = rows[stage]["predicted_peak"] = bench.predicted_peak(bench.cases[stage])
                if peak := rows[stage].get("peak"):
                    rows[stage]["plan_error"] = planned / peak - 1
                write()
    card, versions = found["device"]["name"], ", ".join(map(" ".join, found["versions"].items()))
    if not packed:
        print("bitsandbytes is not installed, so the decoder is not packed to 4 bits in these runs.")
    print(f"{card}, driver {found['driver']}, {versions}, {found['created']}\n\n{table(rows)}")
    return int(any("error" in values for values in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
