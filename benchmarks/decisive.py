"""What the decisive term costs: a CMA step with it over one without it, in the same run, on one thread.

`make bench` runs it. The last line holds the ratios of seconds (medians over interleaved rounds) with NF4
and the LoRA dropout of the recipe: none for the tiny one, 0.05 for the one in 2B proportions. Also printed:
the other dropout, and the term with a forward of its own for the wrong rewrites.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.contrastive_step import Step, measure, ratio
from benchmarks.miniature import (
    IMAGE_SIZE,
    PICTURE_SIZE,
    RANK,
    VOCABULARY,
    make_backbone,
    make_base,
    make_proportioned,
    picture_pairs,
    silent,
)
from rime_pl.backbone.mllm import Backbone
from rime_pl.miniature.tiny import TinyConfig
from rime_pl.modules.cma import CMAModule
from rime_pl.types import Batch, EncodedSide, Rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=32, help="Pairs in a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="Measured rounds (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    usual = {"tiny": 0.0, "proportioned": 0.05}
    ratios = {}
    with tempfile.TemporaryDirectory(prefix="rime-bench-") as folder:
        tiny = make_base(Path(folder) / "tiny", TinyConfig(), VOCABULARY)
        proportioned = make_proportioned(Path(folder) / "proportioned")
        for kind, base, side, rank in (
            ("tiny", tiny, IMAGE_SIZE, 16),
            ("proportioned", proportioned, PICTURE_SIZE, RANK),
        ):
            for dropout in (0.0, 0.05):
                backbone = make_backbone(base, load_in_4bit=True, lora_dropout=dropout, lora_r=rank)
                seconds = measure(steps, backbone, picture_pairs(args.pairs, side=side), args.rounds)
                words = ", ".join(
                    f"{name} {statistics.median(values):.3f} s ({ratio(seconds, name, 'without'):.3f})"
                    for name, values in seconds.items()
                )
                print(f"{kind}, dropout {dropout}: {words}", flush=True)
                if dropout == usual[kind]:
                    ratios[kind] = round(ratio(seconds, "with", "without"), 3)
    print(json.dumps(ratios))


def steps(backbone: Backbone, batch: Batch) -> dict[str, Step]:
    """Return the CMA step without the term, with it, and with a forward of its own for wrong rewrites."""
    modules = {
        "without": silent(CMAModule(backbone.config, lambda_dec=0.0), backbone),
        "with": silent(CMAModule(backbone.config), backbone),
        "with a forward of its own": silent(Apart(backbone.config), backbone),
    }

    def step(module: CMAModule) -> Step:
        return lambda: module.backward(module.training_step(batch, 0))

    return {name: step(module) for name, module in modules.items()}


class Apart(CMAModule):
    """CMA whose wrong rewrites do not share the prompts of the own ones."""

    def encode_queries(self, batch: Batch) -> EncodedSide:
        wrong = self.wrong_rewrites(batch, torch.arange(len(batch)))
        unlabelled = torch.zeros_like(batch.query.annotated)
        own = self.encode(batch.query)
        return replace(own, wrong=self.encode(Rows(batch.query.prompts, wrong, unlabelled)).gen)


if __name__ == "__main__":
    main()
