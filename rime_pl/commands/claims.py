"""`rime claims`: write the page of the claims from what `rime compare` wrote, now and in earlier calls."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rime_pl.errors import RimeError
from rime_pl.report.figures import save_figure
from rime_pl.run_folder import write_json
from rime_pl.study import comparison
from rime_pl.study.record import pool


def run(*, compared: list[Path] | None = None, output: Path = Path("docs/results")) -> int:
    """Write the page of the claims, from the records of earlier calls and from new comparisons.

    Args:
        compared: Folders that `rime compare` wrote, of any stage, corpus and seed. A seed that
            the kept records have, too, is replaced. Other seeds of these records stay if they were trained in
            the same way, and else are left out and named.
        output: Folder of claims.template.md, in a checkout of the repository.
    """
    template, kept = output / "claims.template.md", output / "claims"
    if not template.is_file():
        raise RimeError(
            f"--output must be a folder with claims.template.md, but {output} has none. Run `rime "
            "claims` in a checkout of the repository."
        )
    kept.mkdir(exist_ok=True)
    earlier = comparison.read_records(kept)
    new, left_out = pool(compared or [], [record for found in earlier.values() for record in found.values()])
    for record in new:
        write_json(kept / f"{record['stage']}-{record['corpus']}.json", record)
    records = comparison.read_records(kept)
    for stage, found in records.items():
        for corpus, record in found.items():
            save_figure(comparison.comparison_figure(record), output / comparison.picture(stage, corpus))
        if found:
            save_figure(comparison.claims_figure(found), output / comparison.picture(stage))
    (output / "claims.md").write_text(comparison.claims_page(template.read_text(), records))
    console = Console()
    for told in left_out:
        console.print(f"left out: {told}", markup=False)
    console.print(comparison.overview(records).terminal(), f"written: {output}/claims.md")
    return 0
