"""A step of SFT with each attention kernel; a part of `rime gpu-check`."""

from __future__ import annotations

import importlib.util

from transformers.utils import is_flash_attn_2_available

from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.gpu.bench import Bench
from rime_pl.preflight.gpu.report import Part

KERNELS = ("sdpa", "eager", "flash_attention_2")


def attention(bench: Bench, out: Part) -> None:
    """``model.backbone.attn_implementation``; every kernel has to find the same loss."""
    batch = bench.batch(bench.num_pairs)
    out.add("pairs", "pairs of a step", bench.num_pairs)
    for kernel in KERNELS:
        missing = why_missing(kernel)
        if missing:
            out.add(f"{kernel}_step_seconds", f"{kernel}: a step", None, shown=missing)
            continue
        with out.attempt(kernel):
            seen = bench.fit(SFTModule(bench.config(kernel), warmup_steps=0), batch)
            out.add(f"{kernel}_step_seconds", f"{kernel}: a step", seen.seconds, "s")
            out.add(f"{kernel}_step_peak_bytes", f"{kernel}: peak", seen.step_peak, "bytes")
            out.add(f"{kernel}_loss", f"{kernel}: first loss", seen.losses[0], shown=f"{seen.losses[0]:.4f}")


def why_missing(kernel: str) -> str:
    """Empty where the kernel can be used."""
    if kernel != "flash_attention_2" or is_flash_attn_2_available():
        return ""
    return "not installed" if importlib.util.find_spec("flash_attn") is None else "installed, not usable here"
