"""The distinct targets of a corpus, as items of an index. `rime index CORPUS` scans them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rime_pl.corpus_places import BUILT_IN
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.faults import counted
from rime_pl.datamodules.shards import DISTRACTORS, read_split
from rime_pl.datamodules.stored import StoredReader, look_of
from rime_pl.errors import DataError, RimeError
from rime_pl.inference.collection import Each, Scan, Stamp
from rime_pl.inference.index_folder import Record


def scan_corpus(
    corpus: Path,
    splits: Sequence[str] | None = None,
    galleries: Sequence[str] | None = None,
    each: Each = lambda done, total: None,
) -> Scan:
    """Return the targets of a corpus; of targets that show the same, the first.

    Args:
        corpus: Its folder.
        splits: Names of splits (default: of a built-in corpus test and distractors, of others all).
        galleries: Names of galleries (default: all).
        each: Called with what is done.

    Raises:
        RimeError: If there is no such split or gallery, or no target.
    """
    chosen = _chosen(corpus, splits)
    source = " ".join([*chosen, "galleries:", *galleries] if galleries else chosen)
    entries = {split: read_split(corpus, split) for split in chosen}
    found, looks, again = Scan("corpus", corpus, source), set[bytes](), 0
    known, done, total = set[str](), 0, sum(map(len, entries.values()))
    for split, samples in entries.items():
        reader, stamps = StoredReader(samples), dict[Path, Stamp]()
        for row, entry in enumerate(samples):
            done += 1
            each(done, total)
            known.add(entry.gallery)
            if galleries is not None and entry.gallery not in galleries:
                continue
            try:
                stamp = stamps.get(entry.shard) or stamps.setdefault(entry.shard, Stamp.of(entry.shard))
                target = reader.read(row, "target").target
                look = look_of(target)
            except DataError as error:
                found.refuse(entry.name, str(error))
                continue
            if look in looks:
                again += 1
                continue
            looks.add(look)
            record = Record(entry.name, look, (f"{split}#{row}",), target.text, target.instruction)
            found.add(record, (stamp,))
    if unknown := sorted(set(galleries or ()) - known):
        raise RimeError(f"--galleries must name galleries of {corpus}, {sorted(known)}, but has {unknown}.")
    found.notes.append(f"targets of the splits {', '.join(chosen)} of {corpus}.")
    if again:
        found.notes.append(f"{counted(again, 'target shows', 'targets show')} the same as an earlier one.")
    return found


def _chosen(corpus: Path, splits: Sequence[str] | None) -> Sequence[str]:
    about = read_corpus(corpus)
    built_in = about.get("name") in BUILT_IN  # what its training has seen is no part of a demo
    there = list(about["splits"])
    if unknown := sorted(set(splits or ()) - set(there)):
        raise RimeError(f"--splits must name splits of {corpus}, {sorted(there)}, but has {unknown}.")
    if splits:
        return [*dict.fromkeys(splits)]
    return [name for name in there if not built_in or name in ("test", DISTRACTORS)]
