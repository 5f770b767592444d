"""The report of a finished stage: all files of its run folder that a person or a program reads.

Called by ``cli.finish`` on the first process. The marker comes last: with it the run counts as finished.
``run_folder.RunFolder`` reads these files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rime_pl.report.figures import save_figure, summary_figure
from rime_pl.report.manifest import build_manifest
from rime_pl.report.summary import Summary, build_summary
from rime_pl.report.tables import summary_tables
from rime_pl.run_folder import RunFolder, write_json

#: How a run that was not tested is tested after all.
TEST_LATER = "`rime STAGE test --ckpt_path RUN/checkpoints/last.ckpt` tests it into a folder of its own."


def write_report(
    run_dir: str | Path,
    stage: str,
    results: Mapping[str, Any] | None,
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
        stage: ``sft``, ``cma`` or ``refine_rl``.
        results, history, ranks: From ``RetrievalRecall`` after the test; without one, results is None and
            no ranks are written.
        before: Summary of the stage that this one started from, on the same data; None without one.
        seconds: Wall seconds of each part; with the key ``fit`` the run counts as finished.
        facts: Further values for the manifest, next to versions and machine.
        console: The terminal for the table (default: standard output).
    """
    run = RunFolder(run_dir)
    folder = run.path
    folder.mkdir(parents=True, exist_ok=True)
    summary = build_summary(results, history, seconds, before, stage)
    manifest = build_manifest({"stage": stage, **facts}, seconds)
    write_json(folder / "manifest.json", manifest)
    if results is not None:
        write_json(folder / "ranks.json", list(ranks))
    write_json(folder / "summary.json", summary)
    run.summary_text.write_text(summary_text(summary))
    save_figure(summary_figure(summary, f"{stage}: {folder}"), folder / "summary.png")
    print_summary(summary, console or Console())
    if "fit" in seconds:
        write_json(run.marker, {"stage": stage, "created": manifest["created"]})
    return summary


def print_summary(summary: Summary, console: Console) -> None:
    """Print all tables of a summary, or that there are none."""
    if not summary["after"]:
        console.print(
            "Not tested, because data.test_modes is [] or trainer.limit_test_batches 0. " + TEST_LATER,
            soft_wrap=True,
        )
    console.print(*(table.terminal() for table in summary_tables(summary)))


def summary_text(summary: Summary, width: int = 110) -> str:
    """Return all tables as plain text, for ``summary.txt``."""
    console = Console(width=width, color_system=None)
    with console.capture() as page:
        print_summary(summary, console)
    return "\n".join(line.rstrip() for line in page.get().splitlines()) + "\n"
