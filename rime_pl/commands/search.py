"""``rime search "a woman cook with dark skin"``: the top pictures of a run in either mode, as table and PNG.

Searches the demo pictures of the run's corpus, or with ``--images`` a folder of one's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rime_pl.datamodules.shards import Entry, ShardReader, read_corpus, read_split
from rime_pl.errors import RimeError
from rime_pl.inference.retriever import MODES, Found, Retriever, load, open_picture
from rime_pl.report.sheets import Card, SheetRow, sheet
from rime_pl.run_folder import RUNS, RunFolder
from rime_pl.types import Item, Mode

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass
class Instructions:
    """The task instructions that the run was trained with."""

    query: str = ""  # of a text that asks for a picture
    target: str = ""  # of a picture in the gallery


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rime search``."""
    parser.add_argument("query", help="what to look for, in words")
    parser.add_argument("--run", type=Path, help="folder of a run; default: the newest finished one in runs/")
    parser.add_argument(
        "--mode", choices=[*MODES, "both"], default="both", help="default: both, side by side"
    )
    parser.add_argument(
        "--images", type=Path, help="folder of pictures; default: the demo pictures of the run"
    )
    parser.add_argument("--top_k", "--top-k", type=int, default=8, help="pictures shown (default: 8)")
    parser.add_argument(
        "--output", type=Path, default=Path("search.png"), help="PNG sheet (default: search.png)"
    )
    parser.add_argument("--instruction", help="task instruction of the query; default: the corpus' own")
    parser.add_argument(
        "--batch_size", "--batch-size", type=int, default=32, help="pictures encoded at a time"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    """Load, index (cached), search, show."""
    if args.top_k < 1:
        raise RimeError(f"--top_k {args.top_k}: at least 1 picture must be shown.")
    console = Console()
    modes: Sequence[Mode] = MODES if args.mode == "both" else (args.mode,)
    trained = RunFolder.with_adapter(args.run or RUNS)
    corpus = trained.corpus
    instructions = instructions_of(corpus) if corpus else Instructions()
    if args.images:
        gallery = folder_pictures(args.images)
    elif corpus:
        gallery = demo_pictures(corpus)
    else:
        raise RimeError(
            f"{trained}: its corpus is gone, so there are no demo pictures. Give --images FOLDER."
        )
    retriever = load(trained.path, args.device)
    retriever.index(gallery, modes, args.batch_size, instructions.target, progress=True)
    query = Item(args.query, (), "", instructions.query if args.instruction is None else args.instruction)
    found = search_modes(retriever, query, modes, args.top_k)
    console.print(f"run {trained}   gallery: {len(gallery)} pictures   query: {args.query}", highlight=False)
    for mode, result in found.items():
        console.print(result_table(mode, result))
    rows = [sheet_row(query, mode, result) for mode, result in found.items()]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, f"{args.query}   ({len(gallery)} pictures)").save(args.output)
    console.print(f"pictures: {args.output}", highlight=False)
    return 0


def search_modes(retriever: Retriever, query: Item, modes: Sequence[Mode], top_k: int) -> dict[Mode, Found]:
    """One search per mode, each for the second time: the first forward of a process is slow."""
    for mode in modes:
        retriever.search(query, mode, top_k)
    return {mode: retriever.search(query, mode, top_k) for mode in modes}


def demo_pictures(corpus: Path) -> list[Item]:
    """The distinct pictures of the test gallery, and its distractors."""
    entries = read_split(corpus, "test")
    if "distractors" in read_corpus(corpus)["splits"]:
        entries += read_split(corpus, "distractors")
    distinct: dict[str, Entry] = {}
    for entry in entries:
        if any(name.startswith("t0.") for name in entry.members):
            distinct.setdefault(entry.target_content, entry)
    if not distinct:
        raise RimeError(f"{corpus}: the test split holds no pictures to search. Give --images FOLDER.")
    reader = ShardReader(list(distinct.values()))
    return [reader.read(number).target for number in range(len(reader))]


def instructions_of(corpus: Path) -> Instructions:
    """The instructions of the first task that asks in words alone for a picture."""
    tasks: dict[str, Entry] = {}
    for entry in read_split(corpus, "test"):
        tasks.setdefault(entry.dataset, entry)
    reader = ShardReader(list(tasks.values()))
    for number in range(len(reader)):
        pair = reader.read(number)
        if pair.query is not None and pair.query.text and not pair.query.images and pair.target.images:
            return Instructions(pair.query.instruction, pair.target.instruction)
    return Instructions()


def folder_pictures(folder: Path) -> list[Item]:
    """All pictures of a folder and those below it, by name.

    Raises:
        RimeError: If there is no such folder, no picture in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise RimeError(f"--images {folder}: no such folder.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise RimeError(f"--images {folder}: no pictures in it ({', '.join(sorted(SUFFIXES))}).")
    return [Item("", (open_picture(path),), str(path.relative_to(folder))) for path in paths]


def result_table(mode: Mode, found: Found) -> Table:
    """Rank, score and name of each picture; the query's rewrite and the time in the title."""
    wrote = f'\nthe query as rewritten: "{found.rewrite}"' if found.rewrite is not None else ""
    title = f"{mode}: query in {found.encode_ms:.1f} ms, search in {found.search_ms:.2f} ms{wrote}"
    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("cosine", justify="right")
    table.add_column("picture")
    if found.rewrite is not None:
        table.add_column("its rewrite")
    for rank, hit in enumerate(found.hits, 1):
        cells = [str(rank), f"{hit.score:.3f}", hit.item.content_id]
        table.add_row(*cells, *([hit.rewrite or ""] if found.rewrite is not None else []))
    return table


def sheet_row(query: Item, mode: Mode, found: Found) -> SheetRow:
    """One row of the PNG; nothing is marked, as nobody knows what is right."""
    cards = [
        Card(hit.item, f"{rank}.  {hit.score:.3f}\n{hit.item.content_id}")
        for rank, hit in enumerate(found.hits, 1)
    ]
    notes = [f"rewritten: {found.rewrite}"] if found.rewrite is not None else []
    title = f"{mode}   {found.encode_ms:.1f} ms + {found.search_ms:.2f} ms"
    return SheetRow(Card(query, "query"), cards, title, notes)
