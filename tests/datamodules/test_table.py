"""Tables as spreadsheets and scripts write them: delimiters, encodings, line breaks, quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rime_pl.datamodules.builders.table import Table, read_table
from rime_pl.datamodules.checking import check_table
from rime_pl.datamodules.pair_check import Limits
from rime_pl.errors import DataError

HEADER = "query_text,target_text,target_rewrite\n"


def read(tmp_path: Path, content: str | bytes, kind: str = "csv") -> Table:
    table = tmp_path / f"pairs.{kind}"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(table)


def texts(found: Table) -> list[tuple[str, str]]:
    assert not found.faults, found.faults
    return [(row.pair.query.text, row.pair.target.text) for row in found.rows if row.pair.query]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_one_that_makes_the_columns_known(tmp_path: Path, delimiter: str) -> None:
    lines = (["query_text", "target_text", "task"], ["red, round; big", "a | b", "t"])
    content = "\n".join(delimiter.join(f'"{cell}"' for cell in line) for line in lines)
    found = read(tmp_path, content)
    assert texts(found) == [("red, round; big", "a | b")] and found.rows[0].pair.dataset == "t"


def test_what_excel_writes(tmp_path: Path) -> None:
    content = "sep=;\r\nquery_text;target_text;\r\nM\u00fctze;Hut;\r\n"
    found = read(tmp_path, content.encode("utf-8-sig"))
    assert texts(found) == [("M\u00fctze", "Hut")] and found.rows[0].where == "pairs.csv line 3"
    assert texts(read(tmp_path, content.replace("sep=;\r\n", "").encode("utf-16"))) == [("M\u00fctze", "Hut")]


def test_several_pictures_in_a_cell_of_a_table_with_semicolons(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("")
    found = read(tmp_path, 'query_image;target_text\n"a.png; b.png";two\na.png;one\n')
    assert [len(row.files["query"]) for row in found.rows] == [2, 1]
    unquoted = read(tmp_path, "query_image;target_text\na.png; b.png;two\n")
    (fault,) = unquoted.faults
    assert fault.kind == "too many values" and "Put quotes around a value that holds a ';'" in fault.says


def test_a_table_that_is_not_utf_8_is_read_and_said(tmp_path: Path) -> None:
    found = read(tmp_path, (HEADER + "hat,Hut,\ncap,M\u00fctze,\n").encode("cp1252"))
    assert texts(found) == [("hat", "Hut"), ("cap", "M\u00fctze")]
    assert found.notes == [
        "pairs.csv is not UTF-8, so it was read as Windows-1252. Line 3 then holds 'M\u00fctze'. If that is "
        "wrong, save the table as UTF-8."
    ]
    assert not read(tmp_path, HEADER + "cap,M\u00fctze,\n").notes


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs.csv line 2: the table must be UTF-8, but holds byte 0x81"):
        read(tmp_path, HEADER.encode() + b"a,\x81b,\n")
    with pytest.raises(DataError, match=r"must be a text file, but .*pairs.csv holds zero bytes"):
        read(tmp_path, b"PK\x03\x04\0\0")
    with pytest.raises(DataError, match=r"ends in '.xlsx'. Save it as CSV \(UTF-8\)"):
        read(tmp_path, b"PK", "xlsx")


def test_line_breaks_in_quotes_do_not_shift_the_line_numbers(tmp_path: Path) -> None:
    content = HEADER + 'a,"two\nlines",\nb,,\n"c\n\nd",,\n\ne,f,\n'
    found = read(tmp_path, content)
    assert [row.where for row in found.rows] == ["pairs.csv lines 2 to 3", "pairs.csv line 9"]
    assert [fault.where for fault in found.faults] == ["pairs.csv line 4", "pairs.csv lines 5 to 7"]


def test_a_quote_that_is_never_closed_swallows_no_rows_in_silence(tmp_path: Path) -> None:
    found = read(tmp_path, HEADER + 'a,b,\n"5 inch,c,\nd,e,\n')
    assert [str(fault) for fault in found.faults] == [
        "pairs.csv line 3: malformed CSV (a quote opens here and is never closed). "
        'Write a quote inside a quoted value as "".'
    ]
    (fault,) = read(tmp_path, HEADER + 'a,b,\n"5" inch,c,\nd,e,\n').faults
    assert str(fault).startswith("pairs.csv line 3: malformed CSV")


def test_headers(tmp_path: Path) -> None:
    assert texts(read(tmp_path, "query_text , target_text\na,b\n")) == [("a", "b")]
    with pytest.raises(DataError, match=r"line 1: columns \['title'\] are unknown. Known are"):
        read(tmp_path, "query_text,title\na,b\n")
    with pytest.raises(DataError, match=r"line 1: .* \['query_text'\] are named twice"):
        read(tmp_path, "query_text,target_text,query_text\na,b,c\n")
    with pytest.raises(DataError, match=r"must begin with a line of column names"):
        read(tmp_path, "")
    (fault,) = read(tmp_path, "query_text,target_text\na,b,c\n").faults
    assert fault.says.startswith("the row has 3 values, but the header names 2 columns")


def test_every_fault_of_a_row_is_told(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        '{"query_image": ["gone.png", 7], "target_text": 5, "split": "dev", "task": ["t"]}\n'
        '{"query_text": "\\ud800", "target_image": "' + "long " * 100 + '"}\n'
        '{"query_text": "  ", "target_text": null}\n'
        '{"query_text": "a", "target_image": "mugs\\\\1.png"}\n'
        "[1]\n",
        "jsonl",
    )
    assert [(fault.where[-1], fault.kind) for fault in found.faults] == [
        *(("5", "malformed line"),),
        *(("1", kind) for kind in ("not a string", "not a string", "not a string", "unknown split")),
        *(("2", "not a string"), ("2", "missing file"), ("3", "empty row"), ("4", "missing file")),
    ]
    assert "Write '/' in the place of '\\'" in found.faults[-1].says


def test_a_picture_that_is_missing_hides_no_other_fault(tmp_path: Path) -> None:
    """A wrong --media makes every picture missing; the texts are checked all the same."""
    (tmp_path / "pairs.csv").write_text(
        "query_text,target_image,target_rewrite\n,gone.png,one\n<|im_end|>,gone.png,\nlong,gone.png,one\n".replace(
            "long", "word " * 2000
        )
    )
    found = check_table(tmp_path / "pairs.csv", limits=Limits(batch_size=1))
    kinds = [(fault.where[-1], fault.kind) for fault in found.faults if " line " in fault.where]
    assert sorted(kinds) == [
        *(("2", "missing file"), ("2", "no query"), ("3", "missing file"), ("3", "special token")),
        *(("4", "half annotated"), ("4", "missing file"), ("4", "over-long text")),
    ]


def test_names_are_stripped_and_texts_are_not(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "query_text,target_text,task,split\n a ,b, mugs ,train \n").rows
    assert row.pair.query is not None and row.pair.query.text == " a "
    assert (row.pair.dataset, row.split) == ("mugs", "train")


def test_a_picture_folder_that_is_not_there_is_one_fault(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("query_text,target_image\na,b.png\n")
    with pytest.raises(DataError, match=r"--media must be the folder of the pictures, but .*nowhere is no"):
        read_table(tmp_path / "pairs.csv", tmp_path / "nowhere")
