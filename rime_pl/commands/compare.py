"""`rime compare`: train the controls of finished runs, then write tables, picture and JSON."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rime_pl.report.figures import save_figure
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.study.comparison import comparison_figure, comparison_tables, differences_table
from rime_pl.study.controls import train_controls
from rime_pl.study.measure import seed_result
from rime_pl.study.record import record_of
from rime_pl.study.switching import measure_adaptive
from rime_pl.study.tuning import read_tuned


def run(
    *,
    run: list[Path],
    output: Path,
    skip: list[str] | None = None,
    tuned: Path | None = None,
    adaptive: bool = False,
) -> int:
    """Train the controls of finished runs, one run for each seed, and compare them with the runs.

    A control that is there already is taken as it is.

    Args:
        run: Finished runs of one stage, one for each seed.
        output: Folder for compare.json, compare.md and compare.png.
        skip: Controls to leave out.
        tuned: File of `rime tune`, for runs of SFT: the weights of the cross-entropy (default: that of the
            runs, for the chain of thought, too).
        adaptive: Whether to measure an adaptive search, too: a rewrite only where the search is unsure.
    """
    runs = [RunFolder(path) for path in run]
    weights = [read_tuned(tuned, one) for one in runs] if tuned else []
    weight = weights[0]["chain_of_thought"]["chosen"] if weights else None
    seeds = train_controls(runs, skip or [], weight)
    if adaptive:
        for one in runs:
            measure_adaptive(one)
    found = weights[0] if weights else None
    record = record_of(seed_result(runs[0].stage, variants, found) for variants in seeds)
    tables = [differences_table(record), *comparison_tables(record)]
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "compare.json", record)
    (output / "compare.md").write_text("\n\n".join(table.markdown() for table in tables) + "\n")
    save_figure(comparison_figure(record), output / "compare.png")
    Console().print(*(table.terminal() for table in tables), f"written: {output}/compare.{{json,md,png}}")
    return 0
