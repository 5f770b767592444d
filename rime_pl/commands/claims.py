"""`rime claims`: one page with the claims of the paper, checked on the runs that `rime compare` looked at.

`make claims` trains everything that is missing, for three seeds, and then calls this. What was compared
before and is not given again stays on the page: its record is kept beside it.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from rime_pl.commands.compare import Variants, manifest_of, measured, refuse_unlike
from rime_pl.errors import RimeError
from rime_pl.report.figures import save_figure
from rime_pl.study.claims import (
    CORPORA,
    TITLES,
    Record,
    claims_figure,
    claims_page,
    figure_name,
    make_record,
)
from rime_pl.study.comparison import COMPARISONS, comparison_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compared",
        type=Path,
        nargs="+",
        required=True,
        help="folders that `rime compare` wrote (compare.json), of any stages, corpora and seeds; "
        "other parts of the page stay as they are",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/explanation"),
        help="folder for claims.md, its pictures and the records in claims/ (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    results = pooled(args.compared)
    folder = args.output / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    for stage, of_stage in results.items():
        for corpus, result in of_stage.items():
            record = make_record(result, date.today().isoformat())
            (folder / f"{stage}-{corpus}.json").write_text(json.dumps(record, indent=1) + "\n")
            save_figure(comparison_figure(result), args.output / figure_name(stage, corpus))
    records = read_records(folder)
    for stage in results:
        save_figure(claims_figure(records[stage]), args.output / figure_name(stage))
    page = claims_page(records)
    (args.output / "claims.md").write_text(page)
    print(f"{page.split('## 1.')[0]}\nwritten: {args.output}/claims.md")
    return 0


def read_records(folder: Path) -> dict[str, dict[str, Record]]:
    """Stage -> corpus -> record, in the order of the page."""
    records: dict[str, dict[str, Record]] = {}
    for stage in TITLES:
        corpora = [file.stem.removeprefix(f"{stage}-") for file in sorted(folder.glob(f"{stage}-*.json"))]
        for corpus in sorted(corpora, key=lambda name: (name not in CORPORA[stage], name)):
            record = json.loads((folder / f"{stage}-{corpus}.json").read_text())
            records.setdefault(stage, {})[corpus] = record
    return records


def pooled(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """Stage -> corpus -> numbers over all seeds found in the folders."""
    seeds: dict[tuple[str, str], dict[int, Variants]] = {}
    for folder in folders:
        file = folder / "compare.json"
        if not file.is_file():
            raise RimeError(
                f"--compared {folder}: no compare.json here. `rime compare --output {folder}` writes it."
            )
        compared = json.loads(file.read_text())
        if "folders" not in compared:
            raise RimeError(f"--compared {folder}: an older version wrote it; run `rime compare` again.")
        stage = compared["stage"]
        for names in compared["folders"]:
            variants = {name: Path(run) for name, run in names.items()}
            manifest = manifest_of(variants[COMPARISONS[stage].subject])
            of_corpus = seeds.setdefault((stage, Path(manifest["data"]).name), {})
            if of_corpus.get(manifest["seed"], variants) != variants:
                raise RimeError(
                    f"--compared {folder}: seed {manifest['seed']} of {stage} on {manifest['data']} was "
                    "given already, from another run. Give each seed once."
                )
            of_corpus[manifest["seed"]] = variants
    results: dict[str, dict[str, Any]] = {}
    for stage in TITLES:
        for (of, corpus), runs in sorted(seeds.items()):
            if of == stage:
                shared = set.intersection(*(set(variants) for variants in runs.values()))
                for name in sorted(shared):
                    refuse_unlike([variants[name] for variants in runs.values()])
                kept = [{n: v for n, v in runs[seed].items() if n in shared} for seed in sorted(runs)]
                results.setdefault(stage, {})[corpus] = measured(stage, kept)
    return results
