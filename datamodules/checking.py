"""Checks a table or a corpus before anything is trained on it: every fault at once, and what is in it.

Called by ``rime shards check`` and `rime doctor`. Nothing is written.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rime_pl.bars import track
from rime_pl.datamodules.builders.folder import deal, missing_splits
from rime_pl.datamodules.builders.planning import SPLITS
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.table import read_table
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.faults import Fault
from rime_pl.datamodules.pair_check import COMPARED, DEFAULT_LIMITS, Checked, Limits, PairCheck
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.datamodules.split_index import Entry
from rime_pl.datamodules.texts import TextReader
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Pair

if TYPE_CHECKING:  # transformers takes seconds, and most checks need no processor
    from rime_pl.datamodules.datamodule import RimeDataModule
    from rime_pl.processing import RimeProcessor

#: Faults of samples that a run leaves out as broken, up to ``data.max_broken_share``.
_BROKEN = {
    *("broken sample", "special token", "too many pictures"),
    *("over-long instruction", "over-long text", "over-long rewrite"),
}


def check_table(
    table: Path,
    media: Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    processor: RimeProcessor | None = None,
    shares: tuple[float, float] = (0.1, 0.1),
    seed: int = 0,
) -> Checked:
    """Return every fault of a table of pairs; each picture is decoded.

    Args:
        table: CSV, TSV, JSONL or Parquet file, as for ``rime shards folder``.
        media: Folder of the media; that of the table if None.
        limits: What the training will take.
        processor: Counts tokens and knows the special ones; None estimates 4 characters a token.
        shares: Shares of the contents in val and test, for rows without a split.
        seed: Seed of that split.

    Raises:
        DataError: If the table as a whole cannot be read.
    """
    found = read_table(table, media, caption_rewrites=True)  # as the build does by default
    rows = deal(found.rows, seed, *shares)
    check = PairCheck(limits, processor, found.faults, found.notes, joint="_")
    everything = [(split, row) for split in SPLITS for row in rows[split]]
    for row in found.faulty:
        check.texts(row.where, row.pair)
    for split, row in track(everything, f"pictures of {table.name}", transient=True):
        check.texts(row.where, row.pair)
        if check.many_media(row.where, {side: len(files) for side, files in row.files.items()}):
            continue
        try:
            pair = row.draft().pair(row.pair.key, row.where)
        except Refused as refused:
            found.faults += [Fault(one.kind, row.where, one.says) for one in (refused, *refused.more)]
            continue
        check.looks(split, row.where, pair)
        check.add(split, row.where, pair)
    found.faults[:] = dict.fromkeys(found.faults)  # two pairs of a row may show one picture
    try:
        missing_splits(table, {split: check.found.pairs(split) for split in SPLITS})
    except RimeError as error:
        said = str(error).removeprefix(f"{table}: ")
        found.faults.append(Fault("missing split", table.name, said))
    return check.finished(table.name)


def check_corpus(
    path: str | Path,
    limits: Limits = DEFAULT_LIMITS,
    processor: RimeProcessor | None = None,
    pictures: bool = True,
) -> Checked:
    """Return every fault of a finished corpus; each sample is read and each picture decoded.

    Args:
        path: Corpus folder.
        limits: What the training will take.
        processor: Counts tokens and knows the special ones; None estimates 4 characters a token.
        pictures: Whether pictures are decoded and tars compared with their index; False looks at texts only.

    Raises:
        DataError: If the folder is no finished corpus.
    """
    corpus = read_corpus(path)
    check = PairCheck(limits, processor, [], [], joint=".")
    for split, about in corpus["splits"].items():
        for name, pair in track(
            _samples(path, split, check.found.faults, limits.max_media, pictures),
            f"split {split}",
            about.get("samples"),
            transient=True,
        ):
            check.texts(name, pair)
            if pictures:
                check.looks(split, name, pair)
            check.add(split, name, pair)
    for split in COMPARED[1:]:
        if check.found.pairs("train") and not check.found.pairs(split):
            said = f"split {split!r} must have samples, because a training validates and tests, but has none."
            check.found.faults.append(Fault("missing split", str(path), said))
    return check.finished(str(path))


def check_training(data: RimeDataModule) -> Checked:
    """Return every fault of the corpus of a run that has not started; what its settings allow is a warning.

    Args:
        data: With a processor, or None to estimate 4 characters a token; not set up.
    """
    prompt = data.prompt
    most = prompt.max_text_tokens or sys.maxsize, prompt.max_rewrite_tokens, prompt.media_limit
    limits = Limits(data.batch_size, *most, of_run=True, cut=data.too_long == "cut")
    found = Checked()
    try:
        found = check_corpus(data.path, limits, data.processor)
        for path in [*data.corpora.weights][1:]:
            of_path = check_corpus(path, limits, data.processor).faults
            found.faults += [
                replace(fault, where=f"{path}: {fault.where}")
                for fault in of_path
                if fault.kind != "missing split"
            ]
        data.plan_training()
    except RimeError as error:
        found.faults.append(Fault("refused", "this run", str(error)))
    allowed = {"small task", "no annotation"}  # the run itself refuses them, or needs no rewrites
    if data.too_long == "cut":
        allowed |= {"over-long text", "over-long rewrite"}
    if data.rewrites == "none":
        allowed.add("over-long rewrite")
    broken = {fault.where for fault in found.faults if fault.kind in _BROKEN - allowed}
    # where: "val-000000.tar/key"
    of_split = Counter(where.partition("/")[0].rpartition("-")[0] for where in broken)
    if all(count <= data.max_broken_share * found.pairs(split) for split, count in of_split.items()):
        allowed |= _BROKEN
    found.faults = [replace(one, level="warning") if one.kind in allowed else one for one in found.faults]
    if not data.require_rewrites:  # these settings answer it
        found.faults = [one for one in found.faults if one.kind != "few annotations"]
    return found


def _samples(
    path: str | Path, split: str, faults: list[Fault], max_media: int, pictures: bool
) -> Iterator[tuple[str, Pair]]:
    try:
        entries = read_split(path, split)
    except DataError as error:
        faults.append(Fault("broken split", f"{path}, split {split!r}", str(error)))
        return
    for changed in [file for part in entries.parts for file in part.changed_files()] if pictures else []:
        what = "tar" if changed.suffix == ".tar" else "file of the index"
        said = f"the {what} must be as it was built, but its bytes have changed. Copy it or build it again."
        faults.append(Fault(f"changed {what}", changed.name, said))
    reader = (ShardReader if pictures else TextReader)(entries, max_media=max_media)
    for number, entry in enumerate(entries):
        try:
            yield entry.name, reader.read(number)
        except DataError as error:
            kind = "too many pictures" if _has_many_images(entry, max_media) else "broken sample"
            faults.append(Fault(kind, entry.name, str(error).removeprefix(f"{entry.name}: ")))


def _has_many_images(entry: Entry, most: int) -> bool:
    try:
        pictures_of = Counter(name[:1] for name in entry.members if name[:1] in "qt")  # q: query
    except DataError:
        return False
    return max(pictures_of.values(), default=0) > most
