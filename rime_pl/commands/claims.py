"""`rime claims`: write the page of the claims from what `rime compare` wrote, now and in earlier calls."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rime_pl.errors import RimeError
from rime_pl.report.figures import save_figure
from rime_pl.run_folder import write_json
from rime_pl.study import comparison


def run(*, compared: list[Path] | None = None, output: Path = Path("docs/results")) -> int:
    """Write the page of the claims, from the records of earlier calls and from new comparisons.

    Args:
        compared: Folders that `rime compare` wrote, of any stage, corpus and seed.
        output: Folder of claims.template.md, in a checkout of the repository.
    """
    template, kept = output / "claims.template.md", output / "claims"
    if not template.is_file():
        raise RimeError(
            f"--output must be a folder with claims.template.md, but {output} has none. Run `rime "
            "claims` in a checkout of the repository."
        )
    kept.mkdir(exist_ok=True)
    for record in comparison.pool(compared or []):
        write_json(kept / f"{record['stage']}-{record['corpus']}.json", record)
    records = comparison.read_records(kept)
    for stage, found in records.items():
        for corpus, record in found.items():
            save_figure(comparison.comparison_figure(record), output / comparison.picture(stage, corpus))
        if found:
            save_figure(comparison.claims_figure(found), output / comparison.picture(stage))
    (output / "claims.md").write_text(comparison.claims_page(template.read_text(), records))
    Console().print(comparison.overview(records).terminal(), f"written: {output}/claims.md")
    return 0
