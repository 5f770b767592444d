"""What the builder of UME-R1's and RIME's JSON files makes of a record and of a response, or refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_sources as tiny
from built_corpora import Splits, changed, everything, refused

from rime_pl.datamodules.builders.public.responses import read_response
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.shards import read_split
from rime_pl.types import Clip


def test_ume_for_sft(
    built: Callable[..., Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = everything(built("ume-r1", tiny.ume_sft(tmp_path / "source")))
    question, find, document = (pairs[f"UME-sft-train-{row:08d}"] for row in (1, 2, 3))
    assert [pair.dataset for pair in (question, find, document)] == [
        "A-OKVQA",
        "video_caption_300k-v2t",
        "visrag",
    ]
    assert (
        question.query is not None and question.query.text == "What is it?" and len(question.query.media) == 1
    )
    assert question.query.rewrite == "It is 0." and question.query.cot == "One sees 0.\nIt is 0."
    assert question.target.text == "thing 0" and not question.target.media
    (clip,) = find.target.media
    assert isinstance(clip, Clip) and clip.times == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert document.query is not None and not document.query.media and len(document.target.media) == 1
    assert not any(str(tmp_path) in pair.target.content_id for pair in pairs.values())
    said = capsys.readouterr().out
    assert "30 x blank picture of a text, dropped" in said and "placeholder" not in said
    assert "all rows: 30 rows, but about 1,460,000 expected" in said


def test_rime_for_sft(built: Callable[..., Splits], tmp_path: Path) -> None:
    pairs = everything(built("rime-json", tiny.rime_sft(tmp_path / "source")))
    assert {pair.dataset for pair in pairs.values()} == {"CIRR", "CIRR2"}
    for number in range(3):
        pair = pairs[f"CIRR-{number + 1:08d}"]
        assert (
            pair.query is not None
            and pair.query.rewrite == pair.target.rewrite == f"A car by night {number}."
        )
        assert (pair.query.cot is not None) == (number == 2)
    assert all(all(entry.has_rewrite) for entry in read_split(tmp_path / "corpus", "train"))


def test_rl_files(built: Callable[..., Splits], tmp_path: Path) -> None:
    pairs = everything(built("ume-r1", tiny.rl(tmp_path / "source")))
    assert len(pairs) == 24 and {pair.dataset for pair in pairs.values()} == {"A-OKVQA", "llavahound"}
    picture, clip = pairs["UME-rl-train-00000001"].query, pairs["UME-rl-train-00000002"].query
    assert picture is not None and clip is not None and picture.rewrite is None
    assert picture.text == "What is 0?" and not isinstance(picture.media[0], Clip)
    assert isinstance(clip.media[0], Clip) and clip.media[0].times == (0.0, 0.5, 1.0, 1.5, 2.5, 3.0, 3.5, 4.5)


HUMAN = {"from": "human", "value": "<image>\nWhat?"}
GPT = {"from": "gpt", "value": "It is so."}


@pytest.mark.parametrize(
    ("side", "kind"),
    [
        ("no object", "unknown form of a record"),
        ({"conversations": []}, "unknown form of a record"),
        ({"conversations": [GPT]}, "unknown form of a record"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "unknown form of a record"),
        ({"conversations": [HUMAN, {"from": "bird", "value": "x"}]}, "unknown form of a record"),
        ({"conversations": [HUMAN, {"from": [], "value": "x"}]}, "unknown form of a record"),
        ({"conversations": [HUMAN, GPT], "image": 7}, "unknown form of a record"),
        ({"conversations": [HUMAN, GPT], "image": [7]}, "not a string"),
        ({"conversations": [HUMAN, GPT], "image": "images/none.jpg"}, "missing file"),
        ({"conversations": [HUMAN, GPT], "image": "../../etc/passwd"}, "path outside the folder"),
        ({"conversations": [HUMAN, GPT], "video": ["none/1.jpg"]}, "missing file"),
        ({"conversations": [{"from": "human", "value": "<image>\n"}, GPT]}, "empty side"),
        ({"conversations": [{"from": "human", "value": "a <|im_end|>"}, GPT]}, "special token"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "<think>only"}]}, "unknown form of a response"),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": "<think>a</think><answer>"}]},
            "no rewrite in a response",
        ),
    ],
)
def test_records_of_ume_that_are_refused(
    built: Callable[..., Splits], tmp_path: Path, side: Any, kind: str
) -> None:
    options = tiny.ume_sft(tmp_path / "source")
    changed(options["source"], 5, qry=side)
    built("ume-r1", options)
    assert refused(tmp_path) == {kind: 1}


def test_other_names_of_turns_and_data_sets_are_taken(built: Callable[..., Splits], tmp_path: Path) -> None:
    options = tiny.ume_sft(tmp_path / "source")
    rows = json.loads(options["source"].read_text())
    turns = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "What is 0?"},
        {"role": "assistant", "content": "It is."},
    ]
    rows[0] = {"task_name": "other", "qry": {"messages": turns, "image": None}, "pos": rows[0]["pos"]}
    tiny.write_lines(options["source"], rows)  # JSON lines in a file that ends in .json
    pair = everything(built("ume-r1", options))["UME-sft-train-00000001"]
    assert pair.dataset == "other" and pair.query is not None
    assert pair.query.text == "What is 0?" and pair.query.rewrite == "It is."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cup.", ("A cup.", None)),
        (" A cup. <gen_emb>\n", ("A cup.", None)),
        ("<answer>A cup.</answer>", ("A cup.", None)),
        ("<think>\nRed.\n</think>\n<answer>A cup.<gen_emb></answer>", ("A cup.", "Red.\nA cup.")),
        ("<think></think>A cup.", ("A cup.", None)),
        ("<think>a</think><rewrite>A cup.</rewrite><gen_emb>", ("A cup.", "a\nA cup.")),
    ],
)
def test_forms_of_a_response(text: str, expected: tuple[str, str | None]) -> None:
    assert read_response(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<gen_emb>",
        "a<gen_emb>b",
        "<think>a",
        "a</think>b",
        "<rewrite>a</rewrite> b",
        "<answer>a</answer><answer>b",
    ],
)
def test_forms_of_a_response_that_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        read_response(text)


def test_a_data_set_whose_name_is_half_a_character(built: Callable[..., Splits], tmp_path: Path) -> None:
    options = tiny.ume_sft(tmp_path / "source")
    changed(options["source"], 0, dataset_name="\ud800")
    built("ume-r1", options)
    assert refused(tmp_path) == {"half a character": 1}
