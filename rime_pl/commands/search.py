"""``rime search "a firefighter"``: the best pictures in each mode, as a table and a PNG sheet."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console

from rime_pl.backbone.adapters import read_contract
from rime_pl.commands.conflicts import SEARCH, refuse_ignored
from rime_pl.commands.search_index import IndexSettings, choose_run, choose_threshold, search_index
from rime_pl.corpus_places import BUILT_IN
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.faults import counted, first_lines, printable
from rime_pl.datamodules.shards import DISTRACTORS, ShardReader, read_split
from rime_pl.datamodules.split_index import Entry
from rime_pl.datamodules.tar_files import TarFiles
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.errors import DataError, RimeError
from rime_pl.inference.hits import Found, Hit, IndexHit
from rime_pl.inference.index_folder import IndexFolder
from rime_pl.inference.indexed_media import called, short
from rime_pl.inference.loading import load
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.sources import SUFFIXES, Source, to_item
from rime_pl.options.parser import parse_with_optional
from rime_pl.prompts import PromptConfig
from rime_pl.report.sheets import Card, SheetRow, sheet
from rime_pl.report.table import Table
from rime_pl.run_folder import RunFolder
from rime_pl.training_texts import MAX_SAMPLES, TaskInstructions, TrainingTexts
from rime_pl.types import Item, Mode, Side

#: Results that a sheet shows; a wider one would take gigabytes.
SHEET = 50


def parse(function: Any, prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments; the words of the query may be left out next to a picture, or to calibrate."""
    instead = "calibrate" if any(word.startswith("--calibrate") for word in words) else "query_media"
    return refuse_ignored(SEARCH, function, parse_with_optional(function, prog, words, instead))


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
    common: IndexSettings = IndexSettings(),  # noqa: B008 - frozen
) -> int:
    """Search the pictures of a run's corpus, a folder of pictures, or an index, with a trained model.

    Embeddings are kept in the run's folder. Pictures that cannot be used are left out, and listed at the end.

    Args:
        query: What to look for, in words.
        run: Folder of a run (default: the one that made the index, or else the one in runs/ that finished
            last).
        mode: Embeddings to compare; both shows them one after the other.
        images: Folder of pictures (default: those of the run's corpus; of the built-in corpora those of
            the splits test and distractors).
        top_k: Number of pictures shown.
        output: PNG sheet of the pictures found.
        task: Task whose instructions are used (default: the first that asks in words alone for a picture).
        instruction: Instruction of the query in the place of the task's.
        batch_size: Pictures encoded at a time.
        device: Device of the model, such as cpu or cuda (default: cuda if there is one).
        base: Folder or Hugging Face name of the base model (default: where it was in training).
        common: How an index is searched.
    """
    _check(top_k, output, common)
    asked = "" if common.calibrate else common.query(query)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    stage = choose_run(run, console, common.index)
    indexed = common.calibrate or common.index is not None
    gallery: Sequence[Source] = () if indexed else _gallery(stage, images, output, console)
    retriever = load_with_tasks(stage, device, base, console, gallery)
    if common.calibrate:
        return choose_threshold(retriever, console)
    call = _Call(retriever, query, asked, mode, top_k, output, task, instruction, common, console)
    return call.search_pictures(gallery, images, batch_size) if not indexed else call.search_index()


@dataclass(frozen=True)
class _Call:
    """One call of the command."""

    retriever: Retriever
    words: str  # of the query
    query: Source
    mode: str
    top_k: int
    output: Path
    task: str | None
    instruction: str | None
    given: IndexSettings
    console: Console

    def search_index(self) -> int:
        wording = self._wording()
        found, index = search_index(self.retriever, self.query, self.mode, self.top_k, wording, self.given)
        self._tell_unknown()
        title = f"{self.given.index}, {counted(len(index), 'item', 'items')}"
        called = self.given.called(self.words)
        self.console.print(f"index: {title}   query: {called}")
        show(found, to_item(self.query, wording), self.output, f"{called}   ({title})")
        return 0

    def search_pictures(self, gallery: Sequence[Source], images: Path | None, batch_size: int) -> int:
        wording, target = self._wording(), _instruction(self.retriever, "target", self.task)
        modes: Sequence[Mode] = MODES if self.mode == "both" else (self.mode,)  # type: ignore[assignment]
        self.retriever.index(gallery, modes, batch_size, None, target, progress=True, skip_unusable=True)
        self._tell_unknown()
        found = search_modes(self.retriever, self.query, modes, self.top_k, wording)
        pictures = counted(len(gallery) - len(self.retriever.unusable), "picture", "pictures")
        called = self.given.called(self.words)
        self.console.print(f"gallery: {pictures}{_place(gallery)}   query: {called}")
        show(found, to_item(self.query, wording), self.output, f"{called}   ({pictures})", images)
        _list_unusable(self.retriever, self.console)
        return 0

    def _wording(self) -> str:
        """Return the instruction of the query, which is tried before minutes go into the gallery."""
        if self.instruction is not None:
            wording = self.instruction
        else:
            wording = _instruction(self.retriever, "query", self.task)
        _try(self.retriever, self.query, wording)
        return wording

    def _tell_unknown(self) -> None:
        if words := self.retriever.unknown_words(self.words):
            told = f"in no training text: {', '.join(words)}. The model may not know what this means."
            self.console.print(told)


def _gallery(stage: RunFolder, images: Path | None, output: Path, console: Console) -> Sequence[Source]:
    return folder_pictures(images, output) if images else corpus_pictures(stage, console)


def _check(top_k: int, output: Path, given: IndexSettings) -> None:
    if top_k < 1:
        raise RimeError(f"--top_k must be 1 or more, but is {top_k}.")
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise RimeError(f"--output must be the name of a picture, such as search.png, but is {output}.")
    folder = next(place for place in output.absolute().parents if place.exists())
    if output.is_dir() or not folder.is_dir():
        raise RimeError(
            f"--output must be a file in a folder, but {output} is a folder, or {folder} is none."
        )
    if given.query_media is not None and given.query_media.resolve() == output.resolve():
        raise RimeError(f"--output must be another file than --query_media, but both are {output}.")
    if given.index is not None:
        _ = IndexFolder(given.index).facts  # refuses a folder that is none, before the model is loaded


def load_with_tasks(
    stage: RunFolder, device: str | None, base: str | None, console: Console, gallery: Sequence[Source] = ()
) -> Retriever:
    """Load the model; its instructions come from the corpus if the adapter is of an earlier version.

    The gallery learns which tokens are special to the model, so that it can leave out samples with them.
    """
    retriever = load(stage.path, device or ("cuda" if torch.cuda.is_available() else "cpu"), base)
    if isinstance(gallery, CorpusPictures):
        gallery.special = retriever.backbone.processor.special_pattern
    retriever.tasks = retriever.tasks or corpus_tasks(stage)
    if not retriever.tasks:
        console.print(
            "warning: the adapter does not keep the instructions of its tasks, and its corpus is gone. "
            "Pictures are embedded without one, and so is the query unless you give --instruction."
        )
    return retriever


def _place(gallery: Sequence[Source]) -> str:
    return f", of {gallery.place}" if isinstance(gallery, CorpusPictures) else ""


def _try(retriever: Retriever, query: Source, instruction: str) -> None:
    """Raise what is wrong with the query before minutes go into the gallery."""
    try:
        retriever.encode(query, instruction=instruction)
    except DataError as error:
        raise DataError(str(error).replace("the item", "the query", 1)) from error


def _list_unusable(retriever: Retriever, console: Console) -> None:
    if unusable := retriever.unusable.values():
        were = counted(len(unusable), "picture cannot be used and was", "pictures cannot be used and were")
        console.print(f"{were} left out:\n{first_lines(unusable)}")


def _instruction(retriever: Retriever, side: Side, task: str | None) -> str:
    return retriever.instruction(side, task) if retriever.tasks or task else ""


def show(
    found: Mapping[Any, Found], query: Item, output: Path, title: str, images: Path | None = None
) -> None:
    """Print a table for each mode and write the sheet of pictures; file names count from ``images``."""
    console = Console(highlight=False, markup=False, emoji=False)  # brackets in a rewrite are no markup
    for mode, result in found.items():
        console.print(result_table(mode, result, images).terminal())
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet([sheet_row(query, mode, result, images) for mode, result in found.items()], title).save(output)
    most = max(len(result.hits) for result in found.values())
    console.print(f"pictures: {output}" + (f" (the first {SHEET})" if most > SHEET else ""))


def search_modes(
    retriever: Retriever, query: Source, modes: Sequence[Mode], top_k: int, instruction: str
) -> dict[str, Found]:
    """One search per mode, each for the second time: the first forward of a process is slow."""
    for mode in modes:
        retriever.search(query, mode, top_k, instruction=instruction)
    return {mode: retriever.search(query, mode, top_k, instruction=instruction) for mode in modes}


class CorpusPictures(Sequence[Source]):
    """The targets of samples in shards, each read when it is asked for.

    Args:
        entries: The samples.
        max_media: Largest number of pictures of an item.
        place: What a person calls these pictures.
    """

    def __init__(self, entries: Sequence[Entry], max_media: int, place: str) -> None:
        self.reader = ShardReader(entries, max_media=max_media)
        self.place = place
        self.special: re.Pattern[str] | None = None  # tokens that no text may contain

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> Any:
        entry = self.reader.entries[index]
        pair = self.reader.read(range(len(self))[index], "target")
        item = pair.target
        for field, text in (("text", item.text), ("instruction", item.instruction)):
            if self.special and (token := self.special.search(text)):
                raise DataError(
                    f"{entry.name}: field 'target.{field}' must not contain {token.group()!r}, because it is "
                    "a special token of the model. Remove it from the text."
                )
        return replace(item, content_id=called(pair))


def corpus_pictures(stage: RunFolder, console: Console | None = None) -> CorpusPictures:
    """The distinct pictures of a run's corpus; of a built-in one those of the test and its distractors.

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
    about = read_corpus(corpus)
    trained_on = stage.manifest.get("data_hash")
    if console and trained_on and trained_on != about["data_hash"]:
        console.print(f"warning: {corpus} holds other samples than when the run was trained.")
    built_in = about.get("name") in BUILT_IN  # its pictures of the training are not part of the demo
    splits = [name for name in about["splits"] if name == DISTRACTORS or name == "test" or not built_in]
    entries = (entry for name in splits for entry in read_split(corpus, name))
    tars, distinct = TarFiles(), dict[tuple[str, ...], Entry]()
    for entry in entries:
        if parts := [part for name, part in entry.members.items() if re.match(r"t\d+\.", name)]:
            files = [] if built_in else [tars.read(entry.shard, *part) for part in parts]
            hashes = [hashlib.sha256(file).hexdigest() for file in files]
            distinct.setdefault((entry.target_content, *hashes), entry)
    names = f"{', '.join(splits[:-1])} and {splits[-1]}" if splits[1:] else "".join(splits)
    place = f"the split{'s' if splits[1:] else ''} {names} of {corpus}"
    if not distinct:
        raise RimeError(
            f"{corpus}: {place} must hold pictures to search, but has none. Give --images FOLDER."
        )
    prompt = PromptConfig(**read_contract(stage.adapter)["prompt"])
    return CorpusPictures(list(distinct.values()), prompt.media_limit, place)


def corpus_tasks(stage: RunFolder) -> dict[str, TaskInstructions]:
    """The instructions of a run whose adapter does not keep them, from its corpus; none if that is gone."""
    texts = TrainingTexts()
    if stage.corpus:
        for pair in read_texts(TextReader(read_split(stage.corpus, "train")), MAX_SAMPLES):
            texts.add(pair, words=False)
    return texts.tasks()


def folder_pictures(folder: Path, output: Path) -> list[Path]:
    """The paths of all pictures of a folder and those below it, by name, without the sheet of a search.

    Raises:
        RimeError: If there is no such folder, or no picture in it.
    """
    if folder.is_file():
        raise RimeError(f"--images must be a folder of pictures, but {folder} is a file.")
    if not folder.is_dir():
        raise RimeError(f"--images {folder}: no such folder.")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    paths = sorted(path for path in found if path.name != output.name or path.resolve() != output.resolve())
    if not paths:
        raise RimeError(f"--images {folder}: no pictures in it ({', '.join(sorted(SUFFIXES))}).")
    return paths


def _name(hit: Hit, images: Path | None) -> str:
    """Return what a person calls a hit, on one line: the name, and the text of an item of an index."""
    name = str(Path(hit.name).relative_to(images)) if images else hit.name
    text = hit.text if isinstance(hit, IndexHit) and not hit.media else ""
    return printable(f"{name}: {short(text)}" if text and name != short(text) else name)


def result_table(mode: str, found: Found, images: Path | None = None) -> Table:
    """Rank, score and name of each picture; the query's rewrite and the time in the title."""
    title = f"{mode}: query in {found.encode_ms:.1f} ms, search in {found.search_ms:.2f} ms"
    of_index = any(isinstance(hit, IndexHit) for hit in found.hits)
    head = ["#", "cosine", "item" if of_index else "picture"]
    rows = [[str(n), f"{hit.score:.3f}", _name(hit, images)] for n, hit in enumerate(found.hits, 1)]
    if found.rewrite is None:
        return Table(title, head, rows)
    rewritten = [[*row, printable(hit.rewrite or "")] for row, hit in zip(rows, found.hits, strict=True)]
    return Table(
        title, [*head, "its rewrite"], rewritten, f'the query as rewritten: "{printable(found.rewrite)}"'
    )


def sheet_row(query: Item, mode: str, found: Found, images: Path | None = None) -> SheetRow:
    """One row of the PNG; nothing is marked, as nobody knows what is right."""
    cards = [
        Card(_item(hit), f"{rank}.  {hit.score:.3f}\n{_name(hit, images)}")
        for rank, hit in enumerate(found.hits[:SHEET], 1)
    ]
    notes = [f"rewritten: {found.rewrite}"] if found.rewrite is not None else []
    title = f"{mode}   {found.encode_ms:.1f} ms + {found.search_ms:.2f} ms"
    return SheetRow(Card(query, "query"), cards, title, notes)


def _item(hit: Hit) -> Item:
    """Return what a card shows: the item, or its name where its media are not there any more."""
    try:
        return hit.item.thumbnail()
    except (RimeError, OSError):
        return Item(hit.name)
