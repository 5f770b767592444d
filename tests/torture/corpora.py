"""Mutated corpora: tars, the index of each tar, and corpus.json; and all that reads them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rime_pl.datamodules.checking import check_corpus
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.pair_check import Limits
from rime_pl.datamodules.plain_tars import index
from rime_pl.errors import DataError
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, EvalBatch
from tests.datamodules.colour_corpus import make_pairs, write
from tests.datamodules.dirty_pictures import bad_files
from tests.micro import PROMPT
from tests.torture.damage import TEXTS, as_json, byte_changes, json_changes
from tests.torture.watched import Case, Reading, digest, result_of

TAR, INDEX = "train/train-000001.tar", "train/index.json"
#: Each message of a corpus names one of these; its folder is part of every path.
NAMES = (".tar", ".json", "inside", "data.")


def build(folder: Path) -> Path:
    """A corpus of few small pictures in tars of 8 samples."""
    splits = {
        "train": make_pairs("big", 20, 12) + make_pairs("small", 8, 8),
        "val": make_pairs("big", 4, 3, start=40) + make_pairs("small", 3, 3, start=60),
        "test": make_pairs("big", 4, 3, start=80) + make_pairs("small", 3, 3, start=95),
    }
    return write(folder, splits, samples_per_shard=8)


def read(folder: Path, processor: RimeProcessor, share: float) -> Reading:
    """Check the corpus, then read all of it as a training does that accepts ``share`` broken samples."""
    checked = check_corpus(folder, Limits(batch_size=4), processor)
    told = [str(fault) for fault in checked.faults if fault.level == "problem"]
    data = RimeDataModule(str(folder), "no-model", PROMPT, 4, eval_batch_size=4, max_broken_share=share)
    data.processor = processor
    data.setup("fit")
    seen: list[object] = [sorted(data.state_dict().items(), key=str)]
    for loader in (data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
        seen += [_of_batch(batch) for batch in loader]
    seen += [(pair.key, pair.target.text, pair.query and pair.query.text) for pair in data.training_texts()]
    assert told or not data.broken, f"the check found nothing, but training did: {data.broken}"
    return Reading(digest(*seen[1:]), (*told, *data.broken.values()))


def _of_batch(batch: Batch | EvalBatch) -> object:
    sides = batch.sides if isinstance(batch, Batch) else ()
    prompts = [side.prompts for side in sides] if isinstance(batch, Batch) else [batch.prompts]
    pixels = [0.0 if p.pixel_values is None else float(p.pixel_values.double().sum()) for p in prompts]
    return batch.keys, [p.input_ids.tolist() for p in prompts], pixels


# -- tars ------------------------------------------------------------------------------------------------

Members = list[tuple[tarfile.TarInfo, bytes]]


def members(tar: Path) -> Members:
    with tarfile.open(tar) as opened:
        return [(one, (opened.extractfile(one) or io.BytesIO()).read()) for one in opened]


def write_tar(tar: Path, content: Members, form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(tar, "w", format=form) as opened:
        for info, data in content:
            opened.addfile(info, io.BytesIO(data))


def index_of(folder: Path) -> None:
    """Make the index of the tars anew, if they can have one."""
    with contextlib.suppress(DataError):
        index(folder, skip_broken=True)


def _renamed(name: str) -> Callable[[Members, Path], Members]:
    def change(content: Members, folder: Path) -> Members:
        content[1][0].name = name.format(folder=folder)
        return content

    return change


def _typed(kind: bytes, target: str) -> Callable[[Members, Path], Members]:
    def change(content: Members, folder: Path) -> Members:
        info, _ = content[1]
        info.type, info.linkname, info.size = kind, target.format(folder=folder), 0
        content[1] = info, b""
        return content

    return change


def _filled(place: int, data: bytes) -> Callable[[Members, Path], Members]:
    def change(content: Members, folder: Path) -> Members:
        info, _ = content[place]
        info.size = len(data)
        content[place] = info, data
        return content

    return change


def _sample(**new: Any) -> Callable[[Members, Path], Members]:
    """Change fields of the first sample's JSON: ``query__text`` is the text of its query."""

    def change(content: Members, folder: Path) -> Members:
        value = json.loads(content[0][1])
        for name, one in new.items():
            *above, last = name.split("__")
            functools.reduce(lambda at, key: at[key], above, value)[last] = one
        return _filled(0, as_json(value))(content, folder)

    return change


def _pieces(content: Members, folder: Path) -> Members:
    return [content[0], content[1], content[1], *content[2:]]


TAR_CHANGES: dict[str, Callable[[Members, Path], Members]] = {
    "a member named ../../outside.txt": _renamed("../../outside.txt"),
    "a member named as an absolute path": _renamed("{folder}/../outside.txt"),
    "a member with ../ behind its key": _renamed("big-0008.../../../outside.txt"),
    "a member name of 90 letters": _renamed("big-0008." + "q" * 80),
    "a member name with a line break": _renamed("big-0008.q0\n.png"),
    "a member without a name": _renamed(""),
    "a member without a key": _renamed(".png"),
    "a link to a file outside": _typed(tarfile.SYMTYPE, "../../../outside.txt"),
    "a link to /etc/hostname": _typed(tarfile.SYMTYPE, "/etc/hostname"),
    "a hard link outside": _typed(tarfile.LNKTYPE, "../../../outside.txt"),
    "a hard link to itself": _typed(tarfile.LNKTYPE, "big-0008.t0.png"),
    "a device": _typed(tarfile.CHRTYPE, ""),
    "a pipe": _typed(tarfile.FIFOTYPE, ""),
    "a folder": _typed(tarfile.DIRTYPE, ""),
    "a member twice": _pieces,
    "a sample twice": lambda content, folder: content + content[:4],
    "samples in another order": lambda content, folder: content[::-1],
    "the JSON of a sample missing": lambda content, folder: content[1:],
    "a picture missing": lambda content, folder: content[:1] + content[2:],
    "nothing in it": lambda content, folder: [],
    "a stranger's file in it": lambda content, folder: [*content, (tarfile.TarInfo("README"), b"")],
    **{f"a picture is {name}": _filled(1, data) for name, data in bad_files().items()},
    **{
        f"JSON: {name}": _filled(0, damage(b'{"key": "x"}', random.Random(0)))
        for name, damage in TEXTS.items()
    },
    "JSON: pictures outside": _sample(target__media=["../../../outside.txt"]),
    "JSON: a picture by its absolute path": _sample(target__media=["/etc/hostname"]),
    "JSON: a picture of another sample": _sample(target__media=["../big-0009.t0.png"]),
    "JSON: no pictures and no text": _sample(target__media=[]),
    "JSON: pictures as a text": _sample(target__media="t0.png"),
    "JSON: a picture 3,000 times": _sample(target__media=["t0.png"] * 3_000),
    "JSON: 3,000 hard negatives": _sample(
        hard_negatives=[{"text": "x", "media": [], "content_id": "y"}] * 3_000
    ),
    "JSON: a hard negative that is a number": _sample(hard_negatives=[3]),
    "JSON: a text of 3 MB": _sample(query__text="word " * 600_000),
    "JSON: a rewrite of 3 MB": _sample(query__rewrite="word " * 600_000),
    "JSON: an instruction of 1 MB": _sample(query__instruction="word " * 200_000),
    "JSON: a text without spaces of 1 MB": _sample(query__text="x" * 1_000_000),
    "JSON: a special token": _sample(query__text="<|im_end|>"),
    "JSON: a picture token": _sample(query__text="<|image_pad|>"),
    "JSON: a mode token": _sample(query__rewrite="yes <gen_emb> no"),
    "JSON: half a character": _sample(query__text="\ud800"),
    "JSON: control characters": _sample(query__text="\0\x01\x1b[31m\u202e"),
    "JSON: a text of blanks": _sample(query__text=" \u00a0\t"),
    "JSON: a rewrite of blanks": _sample(query__rewrite=" \u2003"),
    "JSON: a text that is a number": _sample(query__text=3),
    "JSON: a query that is a list": _sample(query=[]),
    "JSON: no query": _sample(query=None),
    "JSON: another task": _sample(dataset="small"),
    "JSON: another content": _sample(target__content_id="else"),
    "JSON: a content of 1 MB": _sample(target__content_id="x" * 1_000_000),
    "JSON: unknown fields": _sample(more={"a": [1, 2]}, query__more=3),
}


def _size_field(digits: bytes, rewritten: bool) -> Callable[[Path], None]:
    """The header of a member says another size; its checksum fits."""

    def change(folder: Path) -> None:
        data = bytearray((folder / TAR).read_bytes())
        at = next(info.offset for info, _ in members(folder / TAR)[1:])
        data[at + 124 : at + 136] = digits
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        (folder / TAR).write_bytes(data)
        if rewritten:
            index_of(folder)

    return change


FILES: dict[str, Callable[[Path], object]] = {
    "a member says 8 GB": _size_field(b"77777777777\0", False),
    "a member says 8 GB, and so does the index": _size_field(b"77777777777\0", True),
    "a member says 2^60 bytes, and so does the index": _size_field(
        b"\x80" + (1 << 60).to_bytes(11, "big"), True
    ),
    "a member says -1 bytes": _size_field(b"\xff" * 12, False),
    "a member's size is no number": _size_field(b"no number!!\0", False),
    "the tar is a folder": lambda folder: ((folder / TAR).unlink(), (folder / TAR).mkdir()),
    "the tar is a link to nothing": lambda folder: _linked(folder, "nothing"),
    "the tar is a link outside": lambda folder: _linked(folder, folder.parent / "outside.txt"),
    "the tar is a device": lambda folder: _linked(folder, "/dev/zero"),
    "the tar is a pipe": lambda folder: ((folder / TAR).unlink(), os.mkfifo(folder / TAR)),
    "the tar is another": lambda folder: shutil.copy(folder / "train/train-000000.tar", folder / TAR),
    "the tar of another split": lambda folder: shutil.copy(folder / "val/val-000000.tar", folder / TAR),
    "the tar is packed": lambda folder: _packed(folder),
    "the index is a folder": lambda folder: ((folder / INDEX).unlink(), (folder / INDEX).mkdir()),
    "the index is a device": lambda folder: _linked(folder, "/dev/zero", INDEX),
    "the split is a file": lambda folder: (shutil.rmtree(folder / "val"), (folder / "val").write_text("x")),
    "a split is missing": lambda folder: shutil.rmtree(folder / "val"),
}


def _linked(folder: Path, target: str | Path, name: str = TAR) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def _packed(folder: Path) -> None:
    with tarfile.open(folder / "packed", "w:gz") as opened:
        opened.add(folder / TAR, "x.tar")
    (folder / "packed").replace(folder / TAR)


def _rebuilt(change: Callable[[Members, Path], Members], fits: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_tar(folder / TAR, change(members(folder / TAR), folder), tarfile.GNU_FORMAT)
        if fits:
            index_of(folder)

    return make


def tar_changes(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield changes without end: tars rebuilt with their index or without, and changed bytes."""
    for name, change in TAR_CHANGES.items():
        yield f"{name}, and the index fits", _rebuilt(change, fits=True)
    yield from FILES.items()
    for name, change in TAR_CHANGES.items():
        yield f"{name}, the index does not know", _rebuilt(change, fits=False)
    yield from _changed_bytes(TAR, rng)


def _changed_bytes(name: str, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    def changer(what: str, start: int) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            file = folder / name
            changes = byte_changes(file.read_bytes(), random.Random(start))
            file.write_bytes(next(data for each, data in changes if each == what))

        return change

    names = [what for what, _ in islice(byte_changes(b"x", rng), 20)]
    while True:
        for what in names:
            yield f"{Path(name).name}: {what}", changer(what, rng.randrange(1 << 30))


# -- indices ---------------------------------------------------------------------------------------------


def index_changes(corpus: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield changes of corpus.json and of the index of a tar, by turns, without end."""

    def text(name: str, data: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(data)

    files = {name: (corpus / name).read_bytes() for name in ("corpus.json", INDEX)}
    values = {name: json_changes(json.loads(data), rng) for name, data in files.items()}
    texts = {name: byte_changes(data, rng, TEXTS) for name, data in files.items()}
    splits = json.loads(files["corpus.json"])["splits"]
    for name in ("../outside", "/etc", "val/../../outside", "", ".", "train", "x" * 300, "\0", "\ud800"):
        new = {**splits, name: splits["val"]} if name != "train" else {"train": splits["train"]}
        yield (
            f"corpus.json: a split named {name!r:.30}",
            text("corpus.json", as_json(json.loads(files["corpus.json"]) | {"splits": new})),
        )
    while True:
        for name in files:
            for _ in range(3):
                what, value = next(values[name])
                yield f"{Path(name).name}: {what}", text(name, as_json(value))
            what, data = next(texts[name])
            yield f"{Path(name).name}: {what}", text(name, data)


def cases(
    kind: str, corpus: Path, processor: RimeProcessor, count: int, rng: random.Random, work: Path
) -> list[Case]:
    """Return cases of kind "tars" or "indices"; every other one accepts that most samples are broken."""
    changes = tar_changes(rng) if kind == "tars" else index_changes(corpus, rng)
    few = list(islice(changes, max(count, 130 if kind == "tars" else count)))
    chosen = few[:count] if count >= 100 else rng.sample(few, count)

    def case(number: int, what: str, change: Callable[[Path], object]) -> Case:
        def make(folder: Path) -> None:
            shutil.copytree(corpus, folder, dirs_exist_ok=True)
            change(folder)

        share = 0.9 * (number % 2)
        return Case(what, make, lambda folder: read(folder, processor, share), NAMES, original)

    original = ""
    original = result_of(case(0, "nothing", lambda folder: None), work)
    return [case(number, what, change) for number, (what, change) in enumerate(chosen)]
