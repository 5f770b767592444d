"""The report of a finished stage: all files of its run folder that a person or a program reads.

Called by ``cli.finish`` on the first process. ``done.json`` comes last: with it the run counts as finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rime_pl.report.figures import save_figure, summary_figure
from rime_pl.report.manifest import build_manifest
from rime_pl.report.summary import Summary, build_summary
from rime_pl.report.tables import print_summary, summary_text

#: Marker of a finished run.
DONE = "done.json"


def write_report(
    run_dir: str | Path,
    stage: str,
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    ranks: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    facts: Mapping[str, Any],
    console: Console | None = None,
) -> Summary:
    """Write manifest, summary (json, txt, png), ranks and, after training, the marker; print the table.

    Args:
        run_dir: Folder of the stage.
        stage: ``sft``, ``cma``.
        results, history, ranks: Of ``RetrievalRecall`` after the test.
        before: Summary of the stage that this one started from, on the same data; None without one.
        seconds: Wall seconds of each part; with the key ``fit`` the run counts as finished.
        facts: What the manifest holds beside versions and machine.
        console: Where the table is printed.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    summary = build_summary(results, history, seconds, before, stage)
    manifest = build_manifest({"stage": stage, **facts}, seconds)
    _write_json(folder / "manifest.json", manifest)
    _write_json(folder / "ranks.json", list(ranks))
    _write_json(folder / "summary.json", summary)
    (folder / "summary.txt").write_text(summary_text(summary))
    save_figure(summary_figure(summary, f"{stage}: {folder}"), folder / "summary.png")
    print_summary(summary, console)
    if "fit" in seconds:
        _write_json(folder / DONE, {"stage": stage, "created": manifest["created"]})
    return summary


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a kill while writing leaves no half file."""
    half_written = path.with_suffix(".half")
    half_written.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    half_written.replace(path)
