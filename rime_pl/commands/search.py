"""``rime search "a firefighter"``: the best pictures in each mode, as a table and a PNG sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


def run(
    query: str,
    *,
    run: Path | None = None,
    mode: Literal["discriminative", "generative", "both"] = "both",
    images: Path | None = None,
    top_k: int = 8,
    output: Path = Path("search.png"),
    instruction: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> int:
    """Search the demo pictures of a run's corpus, or a folder of pictures, with a trained model.

    The pictures are encoded once and kept in the run's folder, so that a second search is fast.

    Args:
        query: What to look for, in words.
        run: Folder of a run (default: the one in runs/ that finished last).
        mode: Embeddings to compare; both shows them one after the other.
        images: Folder of pictures (default: the demo pictures of the run's corpus).
        top_k: Number of pictures shown.
        output: PNG sheet of the pictures found.
        instruction: Task instruction of the query (default: the one of the corpus).
        batch_size: Pictures encoded at a time.
        device: Device of the model, such as cpu or cuda (default: cuda if there is one).
    """
    if top_k < 1:
        raise RimeError(f"--top_k must be 1 or more, but is {top_k}.")
    modes: Sequence[Mode] = MODES if mode == "both" else (mode,)
    stage = RunFolder.with_adapter(run or RUNS)
    instructions = instructions_of(stage.corpus) if stage.corpus else Instructions()
    if images:
        gallery = folder_pictures(images)
    elif stage.corpus:
        gallery = demo_pictures(stage.corpus)
    else:
        raise RimeError(
            f"{stage.path}: the corpus of this run is gone, with its demo pictures. Give --images FOLDER."
        )
    retriever = load(stage.path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    retriever.index(gallery, modes, batch_size, instructions.target, progress=True)
    item = Item(query, (), "", instructions.query if instruction is None else instruction)
    found = search_modes(retriever, item, modes, top_k)
    Console().print(f"run {stage.path}   gallery: {len(gallery)} pictures   query: {query}", highlight=False)
    show(found, item, output, f"{query}   ({len(gallery)} pictures)")
    return 0


def show(found: dict[Mode, Found], query: Item, output: Path, title: str) -> None:
    """Print a table for each mode and write the sheet of pictures."""
    console = Console()
    for mode, result in found.items():
        console.print(result_table(mode, result))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet([sheet_row(query, mode, result) for mode, result in found.items()], title).save(output)
    console.print(f"pictures: {output}", highlight=False)


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
