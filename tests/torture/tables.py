"""Mutated tables of pairs, CSV and JSONL; they are checked, built, and what was built is checked again."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from rime_pl.datamodules.builders.folder import build
from rime_pl.datamodules.checking import check_corpus, check_table
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.pair_check import Limits
from rime_pl.errors import RimeError
from tests.datamodules.dirty_pictures import encoded, good_files, write_files
from tests.torture.damage import BYTES, ODD_VALUES, TEXTS, as_json, byte_changes
from tests.torture.watched import Case, Reading, digest, result_of

COLUMNS = (
    *("query_text", "query_image", "query_rewrite", "target_text", "target_image", "target_rewrite"),
    *("target_content_id", "task", "split"),
)
PICTURES = ("plain.jpg", "plain.png", "photo.webp", "turned.jpg", "scan.png", "see_through.png")
Rows = list[dict[str, Any]]


def rows() -> Rows:
    """Sixteen good pairs, some with line breaks, quotes and letters of several scripts."""
    found = []
    for n in range(16):
        split = "val" if n in (3, 4) else "test" if n in (7, 8) else "train"
        found.append(
            {
                "query_text": f'No. {n}, a "round" thing\nü 漢字 🎈',
                "query_image": PICTURES[n % 5] if n % 3 == 0 else "",
                "query_rewrite": f"It is thing {n}.",
                "target_text": "" if n % 2 else f"thing {n}",
                "target_image": PICTURES[n % 6] if n % 2 else "",
                "target_rewrite": f"One sees thing {n}.",
                "target_content_id": f"thing {n}",
                "task": "shown" if n % 2 else "told",
                "split": split,
            }
        )
    return found


def as_csv(table: Rows, head: Sequence[str] = COLUMNS, **dialect: Any) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, **{"lineterminator": "\n"} | dialect)
    writer.writerow(head)
    writer.writerows([[row.get(name, "") for name in COLUMNS] for row in table])
    return buffer.getvalue().encode()


def as_jsonl(table: Rows) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in table)


def _whole() -> Iterator[tuple[str, bytes]]:
    """Changes of a whole CSV: how it is written, and its header."""
    good, text = rows(), as_csv(rows()).decode()
    for mark in (";", "\t", "|", ":", " "):
        yield f"{mark!r} between the cells", as_csv(good, delimiter=mark)
    yield "quotes around everything", as_csv(good, quoting=csv.QUOTE_ALL)
    yield "no quotes", as_csv(good, quoting=csv.QUOTE_NONE, escapechar="\\")
    yield "apostrophes as quotes", as_csv(good, quotechar="'")
    yield "backslashes before quotes", as_csv(good, doublequote=False, escapechar="\\")
    yield "\\r\\n as the line break", as_csv(good, lineterminator="\r\n")
    yield "\\r as the line break", text.replace("\n", "\r").encode()
    yield "Excel's first line", b"sep=,\n" + text.encode()
    yield "Excel's first line, wrong", b"sep=;\n" + text.encode()
    for encoding in (
        "utf-8-sig",
        "utf-16",
        "utf-16-be",
        "utf-32",
        "cp1252",
        "latin-1",
        "shift_jis",
        "koi8-r",
    ):
        yield f"in {encoding}", text.encode(encoding, "replace")
    yield "two encodings", text.encode() + "ü;é".encode("latin-1")
    yield "a quote that is never closed", text.replace('""round""', '"round', 1).encode()
    yield "a quote never closed in the last line", (text.rstrip() + '"').encode()
    yield "an empty cell for each line", (text + ",,,,,,,,\n" * 5).encode()
    yield "blank lines", text.replace("\nNo", "\n\n\nNo").encode()
    yield "a row with more cells", (text + "a,b,c,d,e,f,g,h,i,j,k\n").encode()
    yield "a row with fewer cells", (text + "a,b\n").encode()
    yield "a cell of 200,000 letters", as_csv([*good, good[0] | {"query_text": "x" * 200_000}])
    yield "a cell of 5 MB of words", as_csv([*good, good[0] | {"query_text": "word " * 1_000_000}])
    yield "20,000 commas", text.encode() + b"," * 20_000
    yield "20,000 columns", (",".join(COLUMNS) + ",x" * 20_000 + "\n").encode()
    yield "no header", text.partition("\n")[2].encode()
    yield "only a header", ",".join(COLUMNS).encode()
    yield "a header in capitals", as_csv(good, [name.upper() for name in COLUMNS])
    yield "a header with blanks", as_csv(good, [f" {name} " for name in COLUMNS])
    yield "a column named twice", as_csv(good, [*COLUMNS[:-1], "task"])
    yield "a column without a name", as_csv(good, ["", *COLUMNS[1:]])
    yield "an unknown column", as_csv(good, ["querytext", *COLUMNS[1:]])
    yield "columns in another order", as_csv(good, COLUMNS[::-1])
    yield "a zero byte", text.replace("round", "ro\0und", 1).encode()
    yield "the same rows twice", as_csv(good + good)
    yield "only training rows", as_csv([row | {"split": "train"} for row in good])
    yield "no splits", as_csv([row | {"split": ""} for row in good])
    yield "only distractors", as_csv([row | {"split": "distractors"} for row in good])


def _cells() -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of single cells, for CSV and JSONL."""
    for name in ("../outside.txt", "../outside.png", "nothing.png", "/etc/hostname", "folder", "loop.png"):
        yield f"a picture named {name}", {"target_image": name}
    for name in ("broken.png", "pipe.png", "device.png", "x" * 5_000, "a\\b.png", "~/a.png", "plain.jpg;;"):
        yield f"a picture named {name:.20}", {"target_image": name}
    yield "300 pictures", {"target_image": ";".join(["plain.png"] * 300)}
    yield "a picture by its absolute path", {"target_image": "ABSOLUTE"}
    for split in ("dev", "TRAIN", " train ", "../outside", "captions", "0"):
        yield f"split {split!r}", {"split": split}
    for task in ("../outside", "a/b", "\u202etask", "x" * 10_000, "task.with.dots", "\n"):
        yield f"task {task:.20}", {"task": task}
    yield "nothing on one side", {"query_text": "", "query_image": ""}
    yield "nothing at all", dict.fromkeys(COLUMNS, "")
    yield "one rewrite only", {"query_rewrite": ""}
    yield "a rewrite of blanks", {"query_rewrite": " \u00a0 "}
    yield "a text of blanks", {"query_text": "\u2003 ", "query_image": ""}
    yield "a special token", {"query_text": "<|im_end|>"}
    yield "a mode token in a rewrite", {"query_rewrite": "a <disc_emb> b"}
    yield "a formula", {"query_text": '=HYPERLINK("http://x")'}
    yield "control characters", {"query_text": "\x1b[31m red \x07"}
    yield "a content of two splits", {"target_content_id": "thing 3"}
    yield "a long content", {"target_content_id": "x" * 100_000}


def table_changes(rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """Yield what was changed, the name of the table and its content, without end."""
    for what, data in _whole():
        yield f"CSV: {what}", "pairs.csv", data
    for n, (what, cells) in enumerate(_cells()):
        table = rows()
        table[5] |= cells
        yield (
            f"{('CSV', 'JSONL')[n % 2]}: {what}",
            *(("pairs.csv", as_csv(table)) if n % 2 == 0 else ("pairs.jsonl", as_jsonl(table))),
        )
    for name in ("pairs.txt", "pairs.xlsx", "pairs", "pairs.json"):
        yield f"a table named {name}", name, as_csv(rows())
    yield "a CSV named .jsonl", "pairs.jsonl", as_csv(rows())
    yield "a JSONL named .csv", "pairs.csv", as_jsonl(rows())
    text = as_jsonl(rows())
    changes = {
        "CSV": byte_changes(as_csv(rows()), rng, BYTES),
        "JSONL": byte_changes(text, rng, BYTES, TEXTS),
    }
    while True:
        for form, name in (("CSV", "pairs.csv"), ("JSONL", "pairs.jsonl")):
            what, data = next(changes[form])
            yield f"{form}: {what}", name, data
        table, column, value = rows(), rng.choice(COLUMNS), rng.choice(ODD_VALUES)
        table[5][column] = value
        yield f"JSONL: {column} is {value!r:.30}", "pairs.jsonl", as_jsonl(table)


@functools.cache
def good_pictures() -> dict[str, bytes]:
    """The same bytes each time: some of these pictures are noise."""
    pictures = good_files()
    return {name: pictures[name] for name in PICTURES}


def make(folder: Path, name: str, data: bytes) -> None:
    """Write the table next to pictures: good ones, a broken one, and what is no file."""
    write_files(folder, good_pictures() | {"broken.png": b"not a picture"})
    (folder / "folder").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder.parent / "outside.png").write_bytes(encoded(Image.new("RGB", (20, 20), "red"), "PNG"))
    absolute = json.dumps(str(folder / "plain.png"))[1:-1].encode()
    (folder / name).write_bytes(data.replace(b"ABSOLUTE", absolute))


def read(folder: Path, name: str) -> Reading:
    """Check the table and build it. A table without problems must build; a build must be good."""
    table, output = folder / name, folder / "built"
    checked = check_table(table, None, Limits(batch_size=2))
    told = [str(fault) for fault in checked.faults if fault.level == "problem"]
    stop = [fault for fault in checked.faults if fault.kind not in CORPUS_ONLY and fault.level == "problem"]
    for skip in (False, True):
        try:
            build(output, table=table, skip_broken=skip)
        except RimeError as error:
            assert stop, f"the check found nothing that stops a build, but it stopped: {error}"
            told.append(str(error))
            continue
        assert skip or not stop, f"the check found {stop}, but it was built"
        built = check_corpus(output, Limits(batch_size=2))
        kinds = {fault.kind for fault in built.faults if fault.level == "problem"}
        assert kinds <= {fault.kind for fault in checked.faults}, built.faults
        return Reading(digest(read_corpus(output)["data_hash"]), (*checked.notes, *told))
    return Reading("", tuple(told))


#: Problems of a training and not of a build.
CORPUS_ONLY = {
    *("special token", "over-long text", "over-long rewrite", "over-long instruction", "small task"),
    *("no annotation", "content in two splits", "few contents"),
    "too many pictures",  # a limit of the training, which may be raised
}


def cases(count: int, rng: random.Random, work: Path) -> list[Case]:
    """Return cases that check and build a changed table."""
    original = result_of(_case("nothing", "pairs.csv", as_csv(rows()), ""), work)
    everything = list(islice(table_changes(rng), max(count, 130)))
    chosen = everything[:count] if count >= 100 else rng.sample(everything, count)
    return [_case(what, name, data, original) for what, name, data in chosen]


def _case(what: str, name: str, data: bytes, original: str) -> Case:
    def write(folder: Path) -> None:
        make(folder, name, data)

    reader: Callable[[Path], Reading] = lambda folder: read(folder, name)  # noqa: E731
    return Case(what, write, reader, (name, "--table", "--media"), original)
