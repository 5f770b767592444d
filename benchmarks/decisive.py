"""What the decisive term costs: a CMA step with it over one without it, in the same run, on one thread.

`make bench` runs it. The last line holds the ratios of seconds (medians over interleaved rounds) with NF4
and the LoRA dropout of the recipe: none for the tiny one, 0.05 for the one in 2B proportions. Also printed:
the other dropout, and the term with a forward of its own for the wrong rewrites.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.contrastive_step import Step, measure
from benchmarks.miniature import (
    IMAGE_SIZE,
    PICTURE_SIZE,
    PROPORTIONED,
    VOCABULARY,
    make_backbone,
    make_base,
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
    kinds = {"tiny": (TinyConfig(), IMAGE_SIZE, 0.0), "proportioned": (PROPORTIONED, PICTURE_SIZE, 0.05)}
    ratios = {}
    with tempfile.TemporaryDirectory(prefix="rime-bench-") as folder:
        for kind, (config, side, usual) in kinds.items():
            base = make_base(Path(folder) / kind, config, VOCABULARY, side)
            for dropout in (0.0, 0.05):
                backbone = make_backbone(base, load_in_4bit=True, lora_dropout=dropout)
                seconds = measure(steps, backbone, picture_pairs(args.pairs, side=side), args.rounds)
                ratio = {name: value / seconds["without"] for name, value in seconds.items()}
                words = ", ".join(f"{name} {seconds[name]:.3f} s ({ratio[name]:.3f})" for name in seconds)
                print(f"{kind}, dropout {dropout}: {words}", flush=True)
                if dropout == usual:
                    ratios[kind] = round(ratio["with"], 3)
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
