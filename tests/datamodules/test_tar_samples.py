"""Damaged and hostile tars: a scan names what is wrong, and never loses samples or reads without end."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from rime_pl.datamodules.tar_samples import BLOCK, members_of, scan
from rime_pl.errors import DataError

pytestmark = pytest.mark.timeout(30)

#: Bytes of a sample of ``whole``: a header and a content, in a block each.
SAMPLE = 2 * BLOCK


def header(name: str, size: bytes = b"00000000012\0", kind: bytes = b"0") -> bytes:
    """A header with a right checksum, whatever its size and type are."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def whole(count: int = 4) -> bytes:
    """A tar of samples k0, k1 ..., each a JSON of 10 bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"k{number}.json")
            info.size = 10
            tar.addfile(info, io.BytesIO(b"0123456789"))
    return buffer.getvalue()


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def keys(folder: Path, data: bytes) -> list[str]:
    (folder / "a.tar").write_bytes(data)
    return [sample.key for sample in scan(folder / "a.tar")]


def test_padding_is_no_fault(tmp_path: Path) -> None:
    expected = ["k0", "k1", "k2", "k3"]
    assert keys(tmp_path, whole()) == expected
    assert keys(tmp_path, whole()[: 4 * SAMPLE + BLOCK]) == expected  # one zero block, not two
    assert keys(tmp_path, whole() + bytes(1 << 21)) == expected
    assert keys(tmp_path, bytes(10_240)) == []


NEGATIVE = b"-0000001000\0"
HOSTILE: dict[str, bytes] = {
    "cut in a header": whole()[: 2 * SAMPLE + 100],
    "cut in a member": whole()[: 2 * SAMPLE + BLOCK + 5],
    "cut in the padding of a member": whole()[: 3 * SAMPLE - 5],
    "cut between two samples": whole()[: 2 * SAMPLE],
    "cut before the end block": whole()[: 4 * SAMPLE],
    "cut in the end block": whole()[: 4 * SAMPLE + 100],
    "a flipped bit in a checksum": flipped(whole(), 2 * SAMPLE + 148),
    "a flipped bit in a name": flipped(whole(), 2 * SAMPLE),
    "a flipped bit in a size": flipped(whole(), 2 * SAMPLE + 132),
    "a flipped bit in the end block": flipped(whole(), 4 * SAMPLE + 7),
    "two tars in one file": whole() + whole(),
    "no tar": b"no tar at all" * 100,
    "empty": b"",
    "a negative size": header("k9.json", NEGATIVE) + whole(),
    "a negative size behind a sample": whole()[:SAMPLE] + header("k9.json", NEGATIVE) + whole()[SAMPLE:],
    "a negative size in binary": whole()[:SAMPLE] + header("k9.json", b"\xff" * 11 + b"\x00") + whole(),
    "a size of 8 exabytes": header("k9.json", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7) + whole(),
    "long names without end": header("././@LongLink", b"0" * 11 + b"\0", b"L") * 3000 + whole(),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_tar_that_is_not_whole_is_a_stop_that_names_it(tmp_path: Path, fault: str) -> None:
    with pytest.raises(DataError, match=r"a\.tar: must be a whole tar, but is damaged or truncated after"):
        keys(tmp_path, HOSTILE[fault])


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (tarfile.SYMTYPE, "no plain file"),
        (tarfile.LNKTYPE, "no plain file"),
        (tarfile.CHRTYPE, "no plain file"),
        (tarfile.BLKTYPE, "no plain file"),
        (tarfile.FIFOTYPE, "no plain file"),
        (tarfile.DIRTYPE, "no plain file"),
        (tarfile.GNUTYPE_SPARSE, "no plain file"),
    ],
)
def test_a_member_that_is_no_plain_file_is_a_fault_and_is_not_read(
    tmp_path: Path, kind: bytes, fault: str
) -> None:
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        info = tarfile.TarInfo("k.json")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    (sample,) = scan(file)
    assert sample.fault is not None and sample.fault[0] == fault
    assert sample.members == {"json": b""}


def test_a_sparse_file_that_claims_a_terabyte_is_not_read(tmp_path: Path) -> None:
    """PAX headers give its size; its type is that of a plain file."""
    file = tmp_path / "a.tar"
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("k.json")
        info.pax_headers, info.size = sparse, BLOCK
        tar.addfile(info, io.BytesIO(b"0\n".ljust(BLOCK, b"\0")))
    (sample,) = scan(file)
    assert sample.fault is not None and sample.fault[0] == "no plain file" and sample.members["json"] == b""


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd.json",
        "../k.json",
        "a/../../k.json",
        "..\\k.json",
        "C:\\k.json",
        "C:/k.json",
        "//host/k.json",
    ],
)
def test_no_name_of_a_member_becomes_a_path(tmp_path: Path, name: str) -> None:
    """A name that leads elsewhere is a fault; one of another system is the name of a sample, and no path."""
    folder = tmp_path / "inside"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    (sample,) = scan(folder / "a.tar")
    leads_elsewhere = name.startswith("/") or ".." in name.split("/")
    assert (sample.fault is not None and sample.fault[0] == "path outside its folder") == leads_elsewhere
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "a.tar"]


# -- the bytes of one sample ---------------------------------------------------------------------------


LONG = header("././@LongLink", b"0" * 11 + b"\0", b"L")
BAD_BYTES: dict[str, bytes] = {
    "another sample": whole()[SAMPLE : 2 * SAMPLE],
    "cut in the content": whole()[: SAMPLE - 5],
    "a negative size": header("k0.json", NEGATIVE) + bytes(BLOCK),
    "a negative size in binary": header("k0.json", b"\xff" * 12) + bytes(BLOCK),
    "a size behind the end": header("k0.json", b"00000077777\0") + bytes(BLOCK),
    "a size that is no number": header("k0.json", b"0000000012x\0") + bytes(BLOCK),
    "a member twice": whole()[:SAMPLE] * 2,
    "zero blocks": bytes(SAMPLE),
    "long names without end": LONG * 3000,
    "a damaged header behind a long name": LONG + flipped(header("k0.json"), 148) + bytes(BLOCK),
}


@pytest.mark.parametrize("fault", BAD_BYTES)
def test_bytes_that_are_not_those_of_a_sample_are_refused(fault: str) -> None:
    assert members_of(whole()[:SAMPLE], "k0") == {"json": (BLOCK, 10)}
    with pytest.raises(ValueError):
        members_of(BAD_BYTES[fault], "k0")
