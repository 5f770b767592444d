"""`rime compare`: train the controls of finished runs, then write tables, picture and JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from rime_pl.report.figures import save_figure
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.study.comparison import comparison_figure, comparison_tables, differences_table
from rime_pl.study.controls import train_controls
from rime_pl.study.measure import measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rime compare`."""
    add = parser.add_argument
    add("--run", type=Path, nargs="+", required=True, help="finished runs of one stage, one per seed")
    add("--output", type=Path, required=True, help="folder for compare.json, compare.md and compare.png")
    add("--skip", nargs="+", default=[], metavar="CONTROL", help="controls to leave out (default: none)")


def run(args: argparse.Namespace) -> int:
    """Train, measure, write and print."""
    runs = [RunFolder(path) for path in args.run]
    seeds = train_controls(runs, args.skip)
    record = measure(runs[0].stage, seeds)
    tables = [differences_table(record), *comparison_tables(record)]
    folders = [{name: str(one.path) for name, one in variants.items()} for variants in seeds]
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "compare.json", record | {"folders": folders})
    (args.output / "compare.md").write_text("\n\n".join(table.markdown() for table in tables) + "\n")
    save_figure(comparison_figure(record), args.output / "compare.png")
    Console().print(
        *(table.terminal() for table in tables), f"written: {args.output}/compare.{{json,md,png}}"
    )
    return 0
