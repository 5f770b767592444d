"""`rime search --index FOLDER` and `rime search --calibrate`: what `rime search` does with an index.

Called by search.py beside it; `rime index` and `rime demo` choose their run here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from rime_pl.datamodules.faults import counted
from rime_pl.errors import RimeError
from rime_pl.inference.calibration import SPLIT, calibrate, keep, measure
from rime_pl.inference.hits import Found
from rime_pl.inference.index_folder import IndexFolder
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.search import CANDIDATES, Index, Strategy, open_index
from rime_pl.inference.sources import Source
from rime_pl.report.adaptive_curve import Shown, adaptive_figure
from rime_pl.report.figures import save_figure
from rime_pl.run_folder import RUNS, RunFolder
from rime_pl.types import Item, Mode


@dataclass(frozen=True)
class IndexSettings:
    """How an index is searched.

    Args:
        query_media: Picture or video that is the query, or a part of it beside the words.
        index: Index to search, made by `rime index`, in the place of pictures.
        media: Folder of the media of the index, if they are not where they were.
        target_mode: Vectors of the index that are compared (default: the mode of the query).
        strategy: Way to search the index. one-pass compares all items; two-step finds candidates in the
            discriminative mode and ranks them again; adaptive writes a rewrite only where that mode is
            unsure.
        candidates: Items that two-step ranks again.
        threshold: Margin below which adaptive writes a rewrite (default: the one that calibrate has chosen).
        faiss: Whether FAISS searches approximately (default: from a million items on).
        calibrate: Whether to choose the threshold of adaptive on the validation split, and search nothing.
    """

    query_media: Path | None = None
    index: Path | None = None
    media: Path | None = None
    target_mode: Literal["discriminative", "generative"] | None = None
    strategy: Strategy = "one-pass"
    candidates: int = CANDIDATES
    threshold: float | None = None
    faiss: bool | None = None
    calibrate: bool = False

    def called(self, text: str) -> str:
        """Return what a person calls the query."""
        return " + ".join(part for part in (text, str(self.query_media or "")) if part.strip())

    def query(self, text: str) -> Source:
        """Return the query.

        Raises:
            RimeError: If it has neither words nor a medium, or there is no such file.
        """
        if self.query_media is None:
            if not text.strip():
                raise RimeError("The query must have at least one word, but is empty.")
            return text
        if not self.query_media.is_file():
            raise RimeError(
                f"--query_media must be a picture or video, but there is none: {self.query_media}."
            )
        return Item(text, (self.query_media,)) if text.strip() else self.query_media  # type: ignore[arg-type]


def _there(folder: Path) -> bool:
    """Return whether a folder is there, and this person may know it."""
    try:
        return folder.is_dir()
    except OSError:
        return False


def choose_run(
    run: Path | None, console: Console, index: Path | None = None, to_build: bool = False
) -> RunFolder:
    """Return the run that is named, or else the one that made the index, or else the last that finished.

    Args:
        run: The folder that was named.
        console: Where the choice is told.
        index: Folder of an index.
        to_build: Whether the index is to be built; then it need not be complete.

    Raises:
        RimeError: If there is no such run, or the index is none, or not complete.
    """
    made_by = IndexFolder(index).facts.run if index else ""
    if index and not to_build:
        IndexFolder(index).refuse_incomplete()
    if run:
        stage, why = RunFolder.with_adapter(run), ""
    elif made_by and _there(RunFolder(made_by).adapter):
        stage, why = RunFolder(made_by), f" (it made {index})"
    else:
        gone = f"; {made_by}, which made {index}, is not there" if made_by else ""
        stage, why = RunFolder.newest(RUNS), f" (finished last in {RUNS}{gone})"
    console.print(f"run: {stage}{why}")
    return stage


def search_index(
    retriever: Retriever,
    query: Source,
    mode: str,
    top_k: int,
    instruction: str,
    given: IndexSettings,
) -> tuple[dict[str, Found], Index]:
    """Return the results by what a table calls them, and the index."""
    assert given.index is not None
    index = open_index(given.index, retriever, given.media, given.faiss)
    modes: tuple[Mode | None, ...] = (None,)
    if mode != "both":
        modes = (mode,)  # type: ignore[assignment]
    elif given.strategy == "one-pass":
        modes = MODES if given.target_mode else tuple(one for one in MODES if one in index.facts.modes)
    found: dict[str, Found] = {}
    for one in modes:
        options = (one, given.target_mode, top_k, given.strategy, given.candidates, given.threshold)
        index.search(query, *options, instruction=instruction)  # the first forward of a process is slow
        result = index.search(query, *options, instruction=instruction)
        name: str = one or given.strategy
        if given.strategy == "adaptive":
            wrote = "no rewrite" if result.rewrite is None else "with a rewrite"
            name = f"adaptive, {wrote} (margin {result.margin:.3f})"
        found[name] = result
    return found, index


def choose_threshold(retriever: Retriever, console: Console) -> int:
    """Choose the threshold of the adaptive search, and write it and its curve into the run folder."""
    found = calibrate(measure(retriever, SPLIT, progress=True))
    file = keep(retriever, found)
    curves = {
        f"rewritten queries against {mode} vectors": [Shown(p.share, p.recall, p.low, p.high) for p in points]
        for mode, points in found.curves.items()
    }
    chosen, points = found.chosen, found.curves[found.target_mode]
    title = f"adaptive rewrites, {counted(found.queries, 'query', 'queries')} of the split {SPLIT}"
    shown = Shown(chosen.share, chosen.recall, chosen.low, chosen.high)
    picture = file.with_suffix(".png")
    save_figure(adaptive_figure(curves, [shown], title), picture)
    rows: Mapping[str, object] = {"never": points[0], "chosen": chosen, "always": points[-1]}
    for name, point in rows.items():
        assert isinstance(point, type(chosen))
        console.print(
            f"{name:<7} rewrites for {point.share:4.0%} of the queries: recall@1 {point.recall:.3f} "
            f"({point.low:.3f} to {point.high:.3f})"
        )
    if chosen.margin == 0:
        console.print("threshold: 0, so adaptive never writes a rewrite: none raised recall@1 here")
    else:
        console.print(f"threshold: a margin below {chosen.margin:.4f}, against {found.target_mode} vectors")
    console.print(f"kept: {file}   picture: {picture}")
    return 0
