"""Feeds mutated inputs to all that reads them, and writes the table of docs/results/torture-mutations.md.

    python -m tests.torture.mutations --seed 0 [--only KIND] [--count N] [--show]

Each kind of file has a file beside this one: it says what is changed, and which of our functions read it.
watched.py runs each input in a process with a time limit and a memory limit. `make torture` calls this.
"""

from __future__ import annotations

import argparse
import datetime
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rime_pl.processing import RimeProcessor
from rime_pl.report.table import Table
from tests.micro import PROMPT
from tests.torture import commands, corpora, pictures, reports, runs, settings, tables
from tests.torture.sources import Sources
from tests.torture.watched import BAD, GOOD, MEMORY, SECONDS, Case, Outcome, watch

PAGE = Path(__file__).parents[2] / "docs/results/torture-mutations.md"
#: Kind of file -> number of inputs.
KINDS = {
    "pictures": 200,
    "tars": 150,
    "indices": 120,
    "tables": 160,
    "settings": 120,
    "adapters": 110,
    "checkpoints": 80,
    "run folders": 120,
    "real commands": 32,
}
#: Kinds that need a trained run.
TRAINED = {"adapters", "checkpoints", "real commands"}
HEAD = {
    "same": "read, the same result",
    "other": "read as what it now says",
    "refused": "refused by name",
    "counted": "listed or left out by name",
    "accepted": "wrongly accepted",
    "hang": "hangs",
    "traceback": "tracebacks",
    "memory": "too much memory",
    "outside": "files outside",
    "unpickled": "unpickled",
    "nameless": "messages without a name",
}


def make_cases(kind: str, sources: Sources, count: int, rng: random.Random, work: Path) -> list[Case]:
    """Return the cases of one kind."""
    if kind in ("pictures", "tars", "indices"):
        processor = RimeProcessor.from_pretrained(str(sources.base), PROMPT)
        if kind == "pictures":
            return pictures.cases(processor, count, rng)
        return corpora.cases(kind, sources.colours, processor, count, rng, work)
    if kind == "tables":
        return tables.cases(count, rng, work)
    if kind == "settings":
        return settings.cases(sources, count, rng)
    if kind == "adapters":
        return runs.adapter_cases(sources, count, rng, work)
    if kind == "checkpoints":
        return runs.checkpoint_cases(sources, count, rng, work)
    if kind == "run folders":
        return reports.cases(sources, count, rng, work)
    return commands.cases(sources, count, rng)


def torture(counts: Mapping[str, int], seed: int, folder: Path) -> dict[str, list[Outcome]]:
    """Return how each input of each kind ended."""
    sources = Sources(folder / "sources")
    sources.build(trained=not TRAINED.isdisjoint(counts))
    found = {}
    for kind, count in counts.items():
        began = time.monotonic()
        cases = make_cases(kind, sources, count, random.Random(f"{kind} {seed}"), folder / "work")
        found[kind] = watch(cases, folder / "work")
        print(f"{kind}: {len(cases)} inputs, {time.monotonic() - began:.0f} s", flush=True)
    return found


def faults(outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Return a description of each input that ended badly."""
    return [
        f"{kind}: {one.change}: {', '.join(sorted(one.ends))}\n{one.said}"
        for kind, of_kind in outcomes.items()
        for one in of_kind
        if one.ends & set(BAD)
    ]


def table(outcomes: Mapping[str, Sequence[Outcome]], command: str) -> Table:
    """Return the table of the page."""
    rows = []
    for kind, of_kind in outcomes.items():
        ends = Counter(end for one in of_kind for end in one.ends)
        rows.append([kind, str(len(of_kind)), *(str(ends[end]) for end in (*GOOD, *BAD))])
    total = [sum(int(row[n]) for row in rows) for n in range(1, len(rows[0]))]
    rows.append(["all", *map(str, total)])
    bad = len(faults(outcomes))
    said = f"{total[0]} mutated inputs, {bad or 'none'} of which ended badly."
    note = f"`{command}`, {datetime.date.today().isoformat()}. "
    note += f"Each input had {SECONDS} s and {MEMORY >> 30} GiB of memory."
    return Table("", ["kind of file", "inputs", *(HEAD[end] for end in (*GOOD, *BAD))], rows, said, note)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="one kind of file")
    parser.add_argument("--count", type=int, help="inputs of each kind")
    parser.add_argument("--show", action="store_true", help="print how each input ended")
    parser.add_argument("--output", type=Path, default=PAGE, help="page to write, if all are given")
    given = parser.parse_args(words)
    counts = {kind: given.count or n for kind, n in KINDS.items() if given.only in (None, kind)}
    folder = Path(tempfile.mkdtemp(prefix="mutations-"))
    try:
        outcomes = torture(counts, given.seed, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for one in (one for of_kind in outcomes.values() for one in of_kind if given.show):
        print(f"[{', '.join(sorted(one.ends))}] {one.change}: {one.said.strip()[-400:]!r}")
    found = table(outcomes, f"python -m tests.torture.mutations --seed {given.seed}")
    bad = faults(outcomes)
    print("\n\n".join([*bad, found.markdown()]))
    if not given.only and not given.count:
        given.output.write_text(page(found))
    return int(bool(bad))


def page(found: Table) -> str:
    """Return the page of the results."""
    return INTRODUCTION + found.markdown() + EXPLANATION


INTRODUCTION = """# Mutated inputs

Read this page to see how rime_pl takes damaged and hostile files. `make torture` makes this table again.

A script changes good files and gives them to the functions that read them: bits flipped, files cut, false
sizes in headers, names that lead out of the folder, values of another type, pickles that run a command, YAML
tags, NaN. Each input is read in a process with limits of time and memory. The folder around it is compared
before and after.

"""
EXPLANATION = """

- **Read, the same result:** the change does not matter, such as bytes behind the end of a picture.
- **Read as what it now says:** another good file, such as a table with another text, or a flipped bit in the
  pixels of a JPEG, which has no checksum.
- **Refused by name:** an error of one or two sentences that names the file or the setting.
- **Listed or left out by name:** `rime shards check`, `rime runs` or a training goes on and says what is
  wrong.
- **Wrongly accepted:** inputs that must not be read, such as NaN weights or a learning rate of -1, and were.
- **Tracebacks:** every exception that is not an error for the user. A contradiction counts, too, such as a
  check that finds nothing in a corpus that training cannot use.

The kinds are in `tests/torture/`. "Real commands" are processes of `rime` with one input of each kind.
"""


if __name__ == "__main__":
    sys.exit(main())
