"""What `rime search` prints and draws of its results, and where it writes; no model is loaded for it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from rime_pl.__main__ import main
from rime_pl.commands.search import SHEET, folder_pictures, result_table, sheet_row, show
from rime_pl.inference.hits import Found, Hit, IndexHit
from rime_pl.inference.index_folder import Record
from rime_pl.inference.indexed_media import Files
from rime_pl.inference.sources import Source
from rime_pl.types import Item


def found(gallery: Sequence[Source], rewrite: str | None = None) -> Found:
    hits = [Hit(number, 0.5, rewrite, gallery) for number in range(len(gallery))]
    return Found(hits, rewrite, 1.0, 2.0)


def printed(table: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table.terminal())
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_time_of_the_query_and_that_of_the_comparison_are_told_apart() -> None:
    one = found([Path("a.png")])
    assert "generative: query in 1.0 ms, search in 2.00 ms" in printed(result_table("generative", one))
    assert sheet_row(Item("x"), "generative", one).title == "generative   1.0 ms + 2.00 ms"


def test_names_and_rewrites_do_not_steer_the_terminal() -> None:
    text = printed(result_table("generative", found([Path("\x1b[2Ja\r.png")], "\x1b]0;title\x07 a mug")))
    assert "\x1b[2J" not in text and "\r" not in text and "\x07" not in text and "\x1b]" not in text
    assert "\ufffd[2Ja\ufffd.png" in text and "a mug" in text


def test_a_sheet_shows_the_first_results_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = [Item(f"item {number}", content_id=f"{number}") for number in range(SHEET + 20)]
    show({"generative": found(gallery)}, Item("x"), tmp_path / "sheet.png", "title")
    assert f"sheet.png (the first {SHEET})" in capsys.readouterr().out.replace("\n", "")
    assert Image.open(tmp_path / "sheet.png").width < (SHEET + 2) * 170


class Unreadable(Sequence[Source]):
    """A gallery whose items this user may not read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        raise PermissionError(13, "Permission denied", "a.png")


def test_an_item_that_may_not_be_read_any_more_is_shown_by_its_name() -> None:
    class Named(Hit):
        name = "a.png"

    row = sheet_row(Item("x"), "generative", Found([Named(0, 0.5, None, Unreadable())], None, 1.0, 2.0))
    assert row.found[0].item == Item("a.png")


def test_a_text_of_an_index_is_shown_beside_its_name() -> None:
    def hit(id: str, text: str, media: tuple[str, ...] = ()) -> IndexHit:
        record = Record(id, b"", media, text)
        return IndexHit(0, 0.5, None, Unreadable(), record, Files(None))

    hits = [hit("line 5", "a red\nmug"), hit("a.png", "caption", ("a.png",)), hit("line 6", "x" * 99)]
    text = printed(result_table("generative", Found(hits, None, 1.0, 2.0)))
    assert "line 5: a red mug" in text and "caption" not in text and f"line 6: {'x' * 59}…" in text


@pytest.mark.parametrize("output", ["folder.png", "file.txt/a.png", "file.txt/below/a.png"])
def test_a_sheet_that_cannot_be_written_is_told_first(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").write_text("")
    assert main(["search", "a mug", "--output", str(tmp_path / output), "--run", "nowhere"]) == 2
    assert "--output must be a file in a folder" in capsys.readouterr().err


def test_a_sheet_is_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "sheet.png")
    show({"generative": found([Item("a")])}, Item("x"), tmp_path / "link.png", "title")
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "sheet.png").width > 148


def test_a_folder_that_is_no_index_is_told_before_the_scan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert main(["index", "nowhere", "--output", str(tmp_path), "--run", "nowhere"]) == 2
    assert "--output must be an index or an empty folder" in capsys.readouterr().err


def test_a_sheet_of_before_is_no_picture_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.png", "search.png", "below/search.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    names = [
        path.relative_to(tmp_path).as_posix() for path in folder_pictures(tmp_path, tmp_path / "search.png")
    ]
    assert names == ["a.png", "below/search.png"]


def test_a_query_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    words = ["--query_media", str(tmp_path / "a.png"), "--output", str(tmp_path / "." / "a.png")]
    assert main(["search", *words, "--run", "nowhere"]) == 2
    assert "--output must be another file than --query_media" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before
