"""``rime search "a firefighter"``: the best pictures in each mode, as a table and a PNG sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console

from rime_pl.backbone.adapters import read_contract
from rime_pl.datamodules.faults import first_lines
from rime_pl.datamodules.shards import Entry, ShardReader, read_corpus, read_split
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.errors import RimeError
from rime_pl.inference.retriever import MODES, Found, Hit, Retriever, load
from rime_pl.inference.sources import SUFFIXES, Source
from rime_pl.prompts import PromptConfig
from rime_pl.report.sheets import Card, SheetRow, sheet
from rime_pl.report.table import Table
from rime_pl.run_folder import RUNS, RunFolder
from rime_pl.training_texts import MAX_SAMPLES, TaskInstructions, TrainingTexts
from rime_pl.types import Item, Mode, Side


def run(
    query: str,
    *,
    run: Path | None = None,
    mode: Literal["discriminative", "generative", "both"] = "both",
    images: Path | None = None,
    top_k: int = 8,
    output: Path = Path("search.png"),
    task: str | None = None,
    instruction: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
    base: str | None = None,
) -> int:
    """Search the demo pictures of a run's corpus, or a folder of pictures, with a trained model.

    Embeddings are kept in the run's folder. Pictures that cannot be used are left out, and listed at the end.

    Args:
        query: What to look for, in words.
        run: Folder of a run (default: the one in runs/ that finished last).
        mode: Embeddings to compare; both shows them one after the other.
        images: Folder of pictures (default: the demo pictures of the run's corpus).
        top_k: Number of pictures shown.
        output: PNG sheet of the pictures found.
        task: Task whose instructions are used (default: the first that asks in words alone for a picture).
        instruction: Instruction of the query in the place of the task's.
        batch_size: Pictures encoded at a time.
        device: Device of the model, such as cpu or cuda (default: cuda if there is one).
        base: Folder or Hugging Face name of the base model (default: where it was in training).
    """
    _check(top_k, output)
    modes: Sequence[Mode] = MODES if mode == "both" else (mode,)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    stage = RunFolder.with_adapter(run) if run else RunFolder.newest(RUNS)
    console.print(f"run: {stage}" + ("" if run else f" (finished last in {RUNS})"))
    gallery: Sequence[Source] = folder_pictures(images) if images else demo_pictures(stage, console)
    retriever = _load(stage, device, base, console)
    asked = _instruction(retriever, "query", task) if instruction is None else instruction
    retriever.encode(query, instruction=asked)  # raises before minutes go into the gallery
    target = _instruction(retriever, "target", task)
    retriever.index(gallery, modes, batch_size, None, target, progress=True, skip_unusable=True)
    if words := retriever.unknown_words(query):
        console.print(f"in no training text: {', '.join(words)}. The model may not know what this means.")
    found = search_modes(retriever, query, modes, top_k, asked)
    pictures = f"{len(gallery) - len(retriever.unusable)} pictures"
    console.print(f"gallery: {pictures}   query: {query}")
    show(found, Item(query, instruction=asked), output, f"{query}   ({pictures})", images)
    _list_unusable(retriever, console)
    return 0


def _check(top_k: int, output: Path) -> None:
    if top_k < 1:
        raise RimeError(f"--top_k must be 1 or more, but is {top_k}.")
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise RimeError(f"--output must be the name of a picture, such as search.png, but is {output}.")


def _load(stage: RunFolder, device: str | None, base: str | None, console: Console) -> Retriever:
    """Load the model; its instructions come from the corpus if the adapter is of an earlier version."""
    retriever = load(stage.path, device or ("cuda" if torch.cuda.is_available() else "cpu"), base)
    retriever.tasks = retriever.tasks or corpus_tasks(stage)
    if not retriever.tasks:
        console.print(
            "warning: the adapter does not keep the instructions of its tasks, and its corpus is gone. "
            "Pictures are embedded without one, and so is the query unless you give --instruction."
        )
    return retriever


def _list_unusable(retriever: Retriever, console: Console) -> None:
    if unusable := retriever.unusable.values():
        console.print(f"{len(unusable)} pictures cannot be used and were left out:\n{first_lines(unusable)}")


def _instruction(retriever: Retriever, side: Side, task: str | None) -> str:
    return retriever.instruction(side, task) if retriever.tasks or task else ""


def show(found: dict[Mode, Found], query: Item, output: Path, title: str, images: Path | None = None) -> None:
    """Print a table for each mode and write the sheet of pictures; file names count from ``images``."""
    console = Console(highlight=False, markup=False, emoji=False)  # brackets in a rewrite are no markup
    for mode, result in found.items():
        console.print(result_table(mode, result, images).terminal())
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet([sheet_row(query, mode, result, images) for mode, result in found.items()], title).save(output)
    console.print(f"pictures: {output}")


def search_modes(
    retriever: Retriever, query: str, modes: Sequence[Mode], top_k: int, instruction: str
) -> dict[Mode, Found]:
    """One search per mode, each for the second time: the first forward of a process is slow."""
    for mode in modes:
        retriever.search(query, mode, top_k, instruction=instruction)
    return {mode: retriever.search(query, mode, top_k, instruction=instruction) for mode in modes}


class DemoPictures(Sequence[Source]):
    """The targets of samples in shards, each read when it is asked for."""

    def __init__(self, entries: list[Entry], max_images: int) -> None:
        self.reader = ShardReader(entries, max_images=max_images)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> Any:
        return self.reader.read(range(len(self))[index], "target").target


def demo_pictures(stage: RunFolder, console: Console | None = None) -> DemoPictures:
    """The distinct pictures of the test gallery of a run's corpus, and its distractors.

    A corpus that has changed since is told on the console.

    Raises:
        RimeError: If the corpus is gone, or has no pictures.
    """
    corpus = stage.corpus
    if not corpus:
        places = " or ".join(map(str, stage.corpus_places())) or "any place that the run names"
        raise RimeError(
            f"{stage.path}: the corpus of this run, with its demo pictures, must be there, but is not in "
            f"{places}. Copy it there, or give --images FOLDER."
        )
    trained_on = stage.manifest.get("data_hash")
    if console and trained_on and trained_on != read_corpus(corpus)["data_hash"]:
        console.print(f"warning: {corpus} holds other samples than when the run was trained.")
    entries = read_split(corpus, "test")
    if "distractors" in read_corpus(corpus)["splits"]:
        entries += read_split(corpus, "distractors")
    distinct: dict[str, Entry] = {}
    for entry in entries:
        if any(name.startswith("t0.") for name in entry.members):
            distinct.setdefault(entry.target_content, entry)
    if not distinct:
        raise RimeError(f"{corpus}: the test split holds no pictures to search. Give --images FOLDER.")
    prompt = PromptConfig(**read_contract(stage.adapter)["prompt"])
    return DemoPictures(list(distinct.values()), prompt.image_limit)


def corpus_tasks(stage: RunFolder) -> dict[str, TaskInstructions]:
    """The instructions of a run whose adapter does not keep them, from its corpus; none if that is gone."""
    texts = TrainingTexts()
    if stage.corpus:
        for pair in read_texts(TextReader(read_split(stage.corpus, "train")), MAX_SAMPLES):
            texts.add(pair, words=False)
    return texts.tasks()


def folder_pictures(folder: Path) -> list[Path]:
    """The paths of all pictures of a folder and those below it, by name.

    Raises:
        RimeError: If there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise RimeError(f"--images {folder}: no such folder.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise RimeError(f"--images {folder}: no pictures in it ({', '.join(sorted(SUFFIXES))}).")
    return paths


def _name(hit: Hit, images: Path | None) -> str:
    return str(Path(hit.name).relative_to(images)) if images else hit.name


def result_table(mode: Mode, found: Found, images: Path | None = None) -> Table:
    """Rank, score and name of each picture; the query's rewrite and the time in the title."""
    title = f"{mode}: query in {found.encode_ms:.1f} ms, search in {found.search_ms:.2f} ms"
    head = ["#", "cosine", "picture"]
    rows = [[str(n), f"{hit.score:.3f}", _name(hit, images)] for n, hit in enumerate(found.hits, 1)]
    if found.rewrite is None:
        return Table(title, head, rows)
    rewritten = [[*row, hit.rewrite or ""] for row, hit in zip(rows, found.hits, strict=True)]
    return Table(title, [*head, "its rewrite"], rewritten, f'the query as rewritten: "{found.rewrite}"')


def sheet_row(query: Item, mode: Mode, found: Found, images: Path | None = None) -> SheetRow:
    """One row of the PNG; nothing is marked, as nobody knows what is right."""
    cards = [
        Card(hit.item.thumbnail(), f"{rank}.  {hit.score:.3f}\n{_name(hit, images)}")
        for rank, hit in enumerate(found.hits, 1)
    ]
    notes = [f"rewritten: {found.rewrite}"] if found.rewrite is not None else []
    title = f"{mode}   {found.encode_ms:.1f} ms + {found.search_ms:.2f} ms"
    return SheetRow(Card(query, "query"), cards, title, notes)
