"""`rime claims`: write the page of the claims from what `rime compare` wrote, now and in earlier calls."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from rime_pl.errors import RimeError
from rime_pl.report.figures import save_figure
from rime_pl.run_folder import write_json
from rime_pl.study.claims import claims_figure, claims_page, overview, picture, pool, read_records
from rime_pl.study.comparison import comparison_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rime claims`."""
    add, page = parser.add_argument, Path("docs/results")
    add("--compared", type=Path, nargs="+", default=[], help="folders of `rime compare` (default: none)")
    add("--output", type=Path, default=page, help="folder of claims.template.md (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print."""
    template, kept = args.output / "claims.template.md", args.output / "claims"
    if not template.is_file():
        raise RimeError(
            f"--output must be a folder with claims.template.md, but {args.output} has none. Run `rime "
            "claims` in a checkout of the repository."
        )
    kept.mkdir(exist_ok=True)
    for record in pool(args.compared):
        write_json(kept / f"{record['stage']}-{record['corpus']}.json", record)
    records = read_records(kept)
    for stage, found in records.items():
        for corpus, record in found.items():
            save_figure(comparison_figure(record), args.output / picture(stage, corpus))
        if found:
            save_figure(claims_figure(found), args.output / picture(stage))
    (args.output / "claims.md").write_text(claims_page(template.read_text(), records))
    Console().print(overview(records).terminal(), f"written: {args.output}/claims.md")
    return 0
