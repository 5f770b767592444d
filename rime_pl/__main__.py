"""The command `rime`: hands over to a stage (cli.py) or to one of rime_pl/commands, and prints errors.

Nothing heavy is imported before it is known what is wanted, so that `rime --help` answers at once.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import re
import sys
import warnings

#: Further commands: name -> what it does. Each is rime_pl/commands/<name>.py.
COMMANDS = {
    "run": "train a stage, and before it whatever it needs and is missing",
    "shards": "build a corpus as WebDataset shards: openmoji, scenes, or your own folder",
    "base": "make the tiny base model from a corpus' captions",
    "search": "search the pictures of a finished run, or a folder of your own",
    "compare": "run the controls beside a finished run and write their table and picture",
    "claims": "write the page of the three claims from what compare wrote, over seeds and corpora",
    "plan": "predict memory, time and disk of a run before it starts, and what to change if it will not fit",
    "doctor": "check installation, settings and a run's adapter; each problem with its remedy",
    "gpu_check": "seconds and memory of every stage on this GPU, with a random 2B-shaped model in 4 bits",
}
#: Warnings about what one library calls in another: nobody who runs a stage can act on them.
NOT_OURS = (
    "`is_gradient_checkpointing` is deprecated",  # peft, in transformers
    "`isinstance(treespec, LeafSpec)` is deprecated",  # lightning, in torch
)
#: Commands that take a stage's settings, such as --model.temperature 0.05, behind their own options.
TAKE_SETTINGS = ("run", "plan", "doctor")
STAGES = {
    "sft": "stage 1: learn to rewrite and to embed, jointly",
    "cma": "stage 2: cross-mode alignment, any mode retrieves any mode",
    "refine_rl": "stage 3: reinforcement learning of the rewrite, against discriminative anchors",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    from rime_pl.errors import RimeError

    argv = sys.argv[1:] if argv is None else argv
    keep_freed_memory()
    for words in NOT_OURS:
        warnings.filterwarnings("ignore", message=f".*{re.escape(words)}")
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, rest = argv[0].replace("-", "_"), argv[1:]
    try:
        if name in STAGES:
            from rime_pl.cli import run_stage

            return run_stage(name, rest)
        if name in COMMANDS:
            command = importlib.import_module(f"rime_pl.commands.{name}")
            parser = argparse.ArgumentParser(prog=f"rime {argv[0]}", description=COMMANDS[name])
            command.add_arguments(parser)
            if name in TAKE_SETTINGS:
                parsed, settings = parser.parse_known_args(rest)
                return command.run(argparse.Namespace(**vars(parsed), settings=settings))
            return command.run(parser.parse_args(rest))
    except RimeError as error:
        print(f"rime: error: {error}", file=sys.stderr)
        return 2
    print(f"rime: error: no command {argv[0]!r}.\n\n{overview()}", file=sys.stderr)
    return 2


def overview() -> str:
    """What `rime --help` prints."""
    lines = [
        "usage: rime COMMAND ...",
        "",
        "stages (rime STAGE fit --config FILE; --help lists every field):",
    ]
    lines += [f"  {name.replace('_', '-'):<10} {text}" for name, text in STAGES.items()]
    lines += ["", "commands (rime COMMAND --help):"]
    lines += [f"  {name.replace('_', '-'):<10} {text}" for name, text in COMMANDS.items()]
    lines += ["", 'first steps:  make train-cma    then    rime search "a woman cook with dark skin"']
    return "\n".join(lines)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of handing it back after every large tensor.

    On a CPU each training step frees and takes hundreds of MB; page faults made it 1.8 times slower.
    """
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no mallopt
        return
    for option, value in (
        (m_mmap_threshold, 1 << 30),
        (m_trim_threshold, (1 << 31) - 1),
        (m_top_pad, 1 << 28),
    ):
        mallopt(option, value)


if __name__ == "__main__":
    sys.exit(main())
