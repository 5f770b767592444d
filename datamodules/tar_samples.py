"""Finds the samples in a tar, and the members in the bytes of a sample.

A sample is a run of members with the same name up to the first dot (the rule of WebDataset). index_writer.py
scans whole tars with it when an index is made; shards.py looks into the bytes of one sample when it is read.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from rime_pl.errors import DataError, RimeError

BLOCK = 512  # bytes of a tar header; contents are padded to whole blocks
_READ = 1 << 20  # bytes that are read at once
_PLAIN = b"0\0"  # the type of a regular file, of new and of old tars


@dataclass
class TarSample:
    """One sample of a tar."""

    key: str
    start: int  # byte of its first header
    end: int = 0  # byte after its last block
    members: dict[str, bytes] = field(default_factory=dict)  # "json", "q0.png" ... -> content
    fault: tuple[str, str] | None = None  # kind and words, if it cannot be used


def scan(tar: Path) -> Iterator[TarSample]:
    """Yield the samples of a tar in order; one with a member that is no plain file carries a fault.

    Nothing is unpacked, so no name of a member ever becomes a path.

    Raises:
        DataError: If the tar is damaged or truncated, wherever that is, or is no tar.
        RimeError: If the machine fails to read it.
    """
    sample, end, last = None, 0, tar.stat().st_size
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as opened:
            for member in opened:
                if member.size < 0 or member.offset < end:  # tarfile would read the same members without end
                    raise tarfile.ReadError("a size is negative")
                key, _, extension = _name(member).partition(".")
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key, end)
                end = int(opened.offset or 0)
                if end > last:
                    raise tarfile.ReadError("unexpected end of data")
                sample.end = end
                sample.fault = sample.fault or _fault(member, extension, sample)
                content = None if sample.fault else opened.extractfile(member)
                sample.members[extension] = b"" if content is None else content.read()
            _refuse_rest(file, end)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{tar}: must be a whole tar, but is damaged or truncated after byte {end} ({error}). Copy it or "
            "build it again."
        ) from error
    except OSError as error:
        raise RimeError(f"{tar} must be readable, but the machine fails to read it: {error}.") from error
    if sample is not None:
        yield sample


def _refuse_rest(file: BinaryIO, end: int) -> None:
    """Raise a ReadError unless only zero blocks follow.

    tarfile takes a header that it cannot read for the end, so one that is cut off or has a flipped bit would
    hide all samples behind it.
    """
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise tarfile.ReadError("the zero block at its end is missing")
    while block:
        if block.strip(b"\0"):
            raise tarfile.ReadError("what follows is no header of a member")
        block = file.read(_READ)


def _name(member: tarfile.TarInfo) -> str:
    """Return the name without the folders, if it has only plain ones."""
    return member.name.removeprefix("./").rpartition("/")[2]


def _fault(member: tarfile.TarInfo, extension: str, sample: TarSample) -> tuple[str, str] | None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        return "path outside its folder", f"member {member.name!r} must be a plain name, but leads elsewhere."
    if not member.isreg() or member.issparse():  # a sparse file may claim terabytes of zeros
        return (
            "no plain file",
            f"member {member.name!r} must be a plain file, but is a link, folder, device or sparse file.",
        )
    if not sample.key or not extension:
        return "no sample name", f"member {member.name!r} must be called KEY.EXTENSION, but is not."
    if extension in sample.members:
        return "duplicate member", f"member {member.name!r} must be there once, but is there again."
    return None


def members_of(block: bytes, key: str) -> dict[str, tuple[int, int]]:
    """Return where the members of a sample lie in its bytes: name -> (offset, size).

    Args:
        block: All bytes of the sample, from its first header on.
        key: Key that its members must have.

    Raises:
        ValueError: If the bytes are not those of this sample.
    """
    found: dict[str, tuple[int, int]] = {}
    position = 0
    while position + BLOCK <= len(block):
        header = block[position : position + BLOCK]
        if header[156:157] not in _PLAIN or header[345:346] != b"\0" or header[124] & 0x80:
            return _members_by_tarfile(block, key)  # long names, folders, sizes above 8 GiB
        name = header[:100].split(b"\0", 1)[0].decode(errors="replace")
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        if size < 0:  # the position would never come to the end
            raise ValueError("a member has a negative size")
        _add(found, name, key, position + BLOCK, size)
        position += BLOCK + -(-size // BLOCK) * BLOCK
    if position != len(block):
        raise ValueError(f"its members end at byte {position} of {len(block)}")
    return found


def _members_by_tarfile(block: bytes, key: str) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as opened:
            position = 0
            for member in opened:
                if member.size < 0 or member.offset < position or member.issparse():
                    raise ValueError(f"member {member.name!r} has no size that can be")
                _add(found, _name(member), key, member.offset_data, member.size)
                position = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if position > len(block):
                    raise ValueError(f"member {member.name!r} ends behind its sample")
    except (tarfile.TarError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if position != len(block):
        raise ValueError(f"its members end at byte {position} of {len(block)}")
    return found


def _add(found: dict[str, tuple[int, int]], name: str, key: str, offset: int, size: int) -> None:
    of, _, extension = name.removeprefix("./").partition(".")
    if of != key or not extension:
        raise ValueError(f"its bytes hold {name!r}")
    if extension in found:
        raise ValueError(f"it holds {name!r} twice")
    found[extension] = (offset, size)


def with_todays_names(side: dict[str, Any]) -> dict[str, Any]:
    """Return a side of a sample whose media have today's name: format 1 called them ``images``.

    >>> with_todays_names({"text": "", "images": ["q0.png"]})["media"]
    ['q0.png']
    """
    return side if "media" in side or "images" not in side else side | {"media": side["images"]}
