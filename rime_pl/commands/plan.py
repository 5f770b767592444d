"""`rime plan`: what a run will need, before it starts and without weights; what to change if too much.

rime plan --config configs/cma.yaml --config configs/data/openmoji.yaml --memory 24 --data.batch_size 64
"""

from __future__ import annotations

import argparse
import json

from rime_pl.commands.settings import add_config_arguments, read_settings
from rime_pl.preflight.plan.planning import make_plan, to_json
from rime_pl.preflight.plan.tables import print_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, required=True)
    parser.add_argument("--memory", type=float, help="GiB of a GPU; what to change if the run does not fit")
    parser.add_argument("--steps", type=int, help="optimiser steps of the run (default: from the data)")
    parser.add_argument(
        "--image_tokens",
        type=int,
        default=256,
        help="visual tokens of an item, without a corpus (%(default)s)",
    )
    parser.add_argument(
        "--rewrite_tokens",
        type=int,
        help="tokens of a rewrite, without a corpus (default: prompt.max_rewrite_tokens)",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    settings = read_settings(args.config, args.stage, args.settings)
    plan = to_json(make_plan(settings, args.memory, args.steps, args.image_tokens, args.rewrite_tokens))
    if args.json:
        print(json.dumps(plan, indent=1))
    else:
        print_plan(plan)
    return 0
