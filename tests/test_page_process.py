"""Hostile documents: each ends in pages or in a sentence, in the time that a page may take."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rime_pl import clips
from rime_pl.clips import count_pages, read_pages
from rime_pl.errors import DataError
from rime_pl.page_process import PageProcess
from tests.test_clips import write_pdf

pytestmark = pytest.mark.timeout(120)

ROOT = b"<</Type/Catalog/Pages 2 0 R>>"
PAGE = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]>>"
TEN_METRES = 28_346  # points


def pdf(*objects: bytes, more: bytes = b"") -> bytes:
    """A PDF of these objects, from number 1 on; the first is its root."""
    data, places = b"%PDF-1.7\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, one)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"xref\n0 %d\n0000000000 65535 f \n%btrailer<</Size %d/Root 1 0 R%b>>\nstartxref\n%d\n%%%%EOF"
    return data + end % (len(objects) + 1, table, len(objects) + 1, more, len(data))


def pages(count: int, kids: bytes = b"3 0 R") -> bytes:
    return b"<</Type/Pages/Kids[%b]/Count %d>>" % (kids, count)


def with_box(box: bytes) -> bytes:
    return pdf(ROOT, pages(1), PAGE.replace(b"[0 0 200 200]", box))


def stream(content: bytes, about: bytes = b"") -> bytes:
    return b"<<%b/Length %d>>stream\n%b\nendstream" % (about, len(content), content)


def forms_in_forms(depth: int, each: int = 10) -> bytes:
    """A page of forms, each of which draws ten others, and so on: some kilobytes, 10 ** depth forms."""
    form = b"/Type/XObject/Subtype/Form/BBox[0 0 200 200]"
    inner = b"/Resources<</XObject<</F %d 0 R>>>>"
    page = PAGE[:-2] + b"/Contents 4 0 R" + inner % 5 + b">>"
    levels = [stream(b"/F Do " * each, form + inner % number) for number in range(6, 5 + depth)]
    return pdf(ROOT, pages(1), page, stream(b"/F Do " * each), *levels, stream(b"0 0 9 9 re f", form))


ENCRYPTED = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O(%b)/U(%b)>>/ID[<00><00>]" % (b"x" * 32, b"y" * 32)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no pages": (pdf(ROOT, pages(0, b"")), "must be a PDF that can be read|must have pages, but has none"),
    "encrypted": (pdf(ROOT, pages(1), PAGE, more=ENCRYPTED), "cannot be opened: .*password"),
    "100,000 pages": (pdf(ROOT, pages(100_000), PAGE), "must have at most 5,000 pages, but has 100,000"),
    "4,000 pages, 1 there": (pdf(ROOT, pages(4000), PAGE), "page 2 cannot be rendered: Failed to load page"),
    "pages in a circle": (pdf(ROOT, pages(3, b"2 0 R"), PAGE), "page 1 cannot be rendered"),
    "ten metres": (with_box(b"[0 0 200 %d]" % TEN_METRES), "page 1 must have sides of at most 7 metres, but"),
    "a hair": (with_box(b"[0 0 1 15000]"), "at most 200 times the shorter one"),
    "empty": (b"", "must be a PDF that can be read"),
    "cut": (pdf(ROOT, pages(1), PAGE)[:40], "must be a PDF that can be read"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_document_that_cannot_be_used_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    data, says = HOSTILE[fault]
    (tmp_path / "a.pdf").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.pdf.*({says})"):
        list(read_pages(tmp_path / "a.pdf"))


@pytest.mark.parametrize("box", [b"[0 0 0 0]", b"[0 0 -5 nan]", b"[0 0 1e30 1e30]", b"[]"])
def test_a_box_that_is_none_becomes_a_letter(tmp_path: Path, box: bytes) -> None:
    (tmp_path / "a.pdf").write_bytes(with_box(box))
    assert [page.image.size for page in read_pages(tmp_path / "a.pdf", side=110)] == [(85, 110)]


def test_a_page_that_takes_hours_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "_pages", PageProcess())
    (tmp_path / "slow.pdf").write_bytes(forms_in_forms(12))
    good = write_pdf(tmp_path / "good.pdf", [(200, 200)])
    assert count_pages(tmp_path / "slow.pdf") == 1  # and the process is there
    monkeypatch.setattr(clips, "PAGE_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"slow.pdf, page 1 cannot be rendered: it takes longer than 1 sec"):
        list(read_pages(tmp_path / "slow.pdf"))
    assert time.monotonic() - began < 20
    monkeypatch.setattr(clips, "PAGE_SECONDS", 60.0)
    assert len(list(read_pages(good))) == 1
    (tmp_path / "deep.pdf").write_bytes(forms_in_forms(3))
    assert len(list(read_pages(tmp_path / "deep.pdf"))) == 1


def test_a_crash_is_one_page_and_the_next_one_is_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = PageProcess()
    monkeypatch.setattr(clips, "_pages", process)
    path = write_pdf(tmp_path / "a.pdf", [(200, 200)])
    assert count_pages(path) == 1 and process._process is not None
    crashed = process._process
    crashed.kill()
    crashed.wait()
    with monkeypatch.context() as patch:  # it was alive when the request was sent
        patch.setattr(process, "_running", lambda: crashed)
        with pytest.raises(DataError, match=r"cannot be opened: PDFium has crashed, or needs more memory"):
            count_pages(path)
    assert count_pages(path) == 1 and process._process is not crashed


def test_the_process_imports_nothing_heavy() -> None:
    """Torch takes seconds and 300 MB, and a page needs neither."""
    words = "import rime_pl.page_process, sys; print({'torch', 'numpy', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
