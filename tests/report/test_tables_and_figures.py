"""The report of a run, from made-up numbers: what is printed, drawn and written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from rime_pl.commands.runs import row
from rime_pl.errors import RimeError
from rime_pl.report.elements import html
from rime_pl.report.figures import summary_figure
from rime_pl.report.manifest import build_manifest, git_state
from rime_pl.report.sheets import Card, SheetRow, sheet
from rime_pl.report.stage import summary_text, write_report
from rime_pl.report.summary import build_summary
from rime_pl.report.table import Table
from rime_pl.run_folder import RunFolder, write_text
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION, Item
from tests.report.pages import Read


def overall(*recalls: float, empty: float = 0.1) -> dict[str, Any]:
    first = dict(zip(MODE_PAIRS, recalls, strict=True))
    trace = dict(zip(REWRITE_ABLATION, (recalls[1], 0.97, 0.05, empty), strict=True))
    trace |= {
        "own-minus-empty": recalls[1] - empty,
        "own-minus-shuffled": recalls[1] - 0.05,
        "room": 0.97 - recalls[1],
    }
    return {
        "recall@1": first,
        "recall@5": dict.fromkeys(MODE_PAIRS, 0.981),
        "recall@10": dict.fromkeys(MODE_PAIRS, 0.992),
        "oracle": {"recall@1": 0.955, "recall@5": 0.985, "recall@10": 0.995},
        "ci": {pair: [value - 0.03, value + 0.02] for pair, value in first.items()},
        "trace": trace,
        "rewrite": {"mean_length": 14.25, "well_formed": 0.998},
        "milliseconds": {"discriminative": 4.1, "generative": 33.4},
    }


BEFORE = {"after": overall(0.931, 0.783, 0.302, 0.274), "per_task": {}}
RESULTS = {
    "overall": overall(0.934, 0.925, 0.916, 0.887),
    "per_task": {
        "name to picture": {
            **overall(0.95, 0.94, 0.93, 0.92),
            "gallery": 214,
            "chance": 1 / 214,
            "queries": 210,
        }
    },
    "all_gallery": {
        **overall(0.811, 0.822, 0.803, 0.794),
        "gallery": 3953,
        "chance": 1 / 3953,
        "queries": 210,
    },
    "memory": [],
    "gallery": 214,
    "chance": 1 / 214,
    "queries": 210,
}
HISTORY = [
    {"epoch": e, "step": 50 * (e + 1), **{f"recall@1/{pair}": 0.4 + 0.1 * e for pair in MODE_PAIRS}}
    for e in range(3)
]


def test_curves_hold_only_what_was_validated() -> None:
    """data.val_modes was changed when the run was resumed."""
    part = [{k: v for k, v in HISTORY[0].items() if "gen" not in k}, *HISTORY[1:]]
    drawn = summary_figure(build_summary(RESULTS, part, {})).axes[1].get_lines()
    points = {str(line.get_label()): len(line.get_xdata()) for line in drawn}  # type: ignore[arg-type]
    assert points == {"disc-disc": 3, "gen-gen": 2, "gen-disc": 2, "disc-gen": 2}


def test_curves_of_a_limited_gallery_say_so() -> None:
    limited = [{**entry, "gallery_left_out": 99} for entry in HISTORY]
    titles = [
        summary_figure(build_summary(RESULTS, history, {})).axes[1].get_title(loc="left")
        for history in (HISTORY, limited, [*limited, HISTORY[0]])
    ]
    assert "without" not in titles[0] and titles[1].endswith("gallery without 99 items")
    assert titles[2].endswith("gallery without 0 / 99 items")


def test_a_run_that_was_not_tested_says_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "sft")
    write_report(run.path, "sft", None, HISTORY, [], BEFORE, {"fit": 1.0}, {"seed": 0, "data_hash": "x"})
    assert "Not tested, because data.test_modes is []" in run.summary_text.read_text()
    assert run.finished and not run.tested and run.summary["after"] == {}
    assert not (run.path / "ranks.json").exists() and (run.path / "summary.png").is_file()
    cells = row(run, tmp_path)
    assert cells[4:9] == ["finished, not tested", *"----"]
    write_text(run.config, "data: {test_modes: []}")
    with pytest.raises(RimeError, match=r"sft must have been tested in both modes, .* data.test_modes \[\]"):
        run.need_both_modes()


def test_a_test_of_one_mode_shows_one_mode(tmp_path: Path) -> None:
    def only(results: dict[str, Any]) -> dict[str, Any]:
        groups = {name: results[name] for name in results if name.startswith(("recall@", "ci"))}
        kept = {name: {"disc-disc": values["disc-disc"]} for name, values in groups.items()}
        return results | kept | {"milliseconds": {"discriminative": 4.1}}

    def without(results: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in only(results).items() if k not in ("oracle", "trace", "rewrite")}

    results = RESULTS | {
        "overall": without(RESULTS["overall"]),
        "all_gallery": without(RESULTS["all_gallery"]),
        "per_task": {name: without(task) for name, task in RESULTS["per_task"].items()},
    }
    for before in (None, BEFORE):
        summary = build_summary(results, [], {}, before)
        text = summary_text(summary)
        assert "the generative mode was not tested" in text and "disc-disc" in text
        assert not [pair for pair in MODE_PAIRS[1:] if pair in text] and "nan" not in text
        summary_figure(summary)


def test_summary_has_the_shape_that_programs_read() -> None:
    summary = build_summary(RESULTS, HISTORY, {"fit": 12.3456}, BEFORE, "cma")
    assert summary["before"]["recall@1"]["gen-disc"] == 0.302
    assert summary["after"]["recall@1"]["gen-disc"] == 0.916
    assert (
        summary["after"]["trace"]["empty"] == 0.1 and summary["per_task"]["name to picture"]["gallery"] == 214
    )
    assert summary["seconds"] == {"fit": 12.35} and summary["history"] == HISTORY
    assert build_summary(RESULTS, [], {})["before"] is None
    json.dumps(summary)


@pytest.mark.parametrize("width", [80, 110])
def test_table_shows_every_number_under_its_name(width: int) -> None:
    text = summary_text(build_summary(RESULTS, HISTORY, {}, BEFORE), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text  # nothing is cut off in a narrow terminal
    row = next(line for line in text.splitlines() if line.startswith(" gen-disc"))
    assert " ".join(row.split()) == "gen-disc 0.302 -> 0.916 0.89 - 0.94 0.981 -> 0.981 0.992 -> 0.992"
    for words in ("recall@1", "recall@10", "chance of recall@1: 0.0047", "gallery: 214", "0.803", "3953"):
        assert words in text
    for words in ("own - empty", "0.825", "14.2", "0.998", "33.4", "headroom", "another query's rewrite"):
        assert words in text
    assert any(line.startswith(" name to") for line in text.splitlines())


def test_table_without_before_trace_or_distractors() -> None:
    bare = {**RESULTS, "all_gallery": None, "per_task": {}, "overall": {**RESULTS["overall"]}}
    del bare["overall"]["trace"]
    text = summary_text(build_summary(bare, [], {}))
    assert "->" not in text and "ablation" not in text and "0.916" in text


def test_memory_tasks_have_a_table_that_says_what_they_are() -> None:
    seen = {**overall(0.6, 0.5, 0.4, 0.3), "gallery": 1860, "chance": 1 / 1860, "queries": 1110}
    results = {**RESULTS, "memory": ["words"], "per_task": {**RESULTS["per_task"], "words": seen}}
    summary = build_summary(results, HISTORY, {}, BEFORE)
    assert summary["memory"] == ["words"] and summary["after"] == RESULTS["overall"]
    text = " ".join(summary_text(summary).split())
    assert "Memory of things seen: words" in text and "gen-disc 0.400 0.981 0.992" in text
    assert "Training showed these targets" in text and "1110 queries; gallery: 1860 distinct" in text
    assert "Memory" not in summary_text(build_summary(RESULTS, HISTORY, {}, BEFORE))


def test_what_was_not_measured_is_a_dash_in_every_place() -> None:
    """Without annotation, and for queries without a partner, there is nothing to report."""
    after = overall(0.934, 0.925, 0.916, 0.887)
    after["trace"] |= {"reference": None, "room": None, "num_reference": 0, "num_shuffled": 200}
    summary = build_summary({**RESULTS, "overall": after}, HISTORY, {}, BEFORE)
    assert json.loads(json.dumps(summary, allow_nan=False))["after"]["trace"]["room"] is None
    rows = [" ".join(line.split()) for line in summary_text(summary).splitlines()]
    assert "reference rewrite 0.970 -" in rows and "headroom (reference - own) 0.187 -" in rows
    assert any(row.startswith("0 of 210 queries have a reference rewrite") for row in rows)
    assert any(row.startswith("200 of 210 queries have another query") for row in rows)
    drawn = summary_figure(summary).axes[2]
    assert [bar.get_height() for bar in drawn.patches] == [0.925, 0.05, 0.1]
    assert "-" in [text.get_text() for text in drawn.texts]


def test_table_shows_who_writes_and_who_embeds_after_refine_rl() -> None:
    crossed = {"old-old": 0.5, "new-old": 0.6, "old-new": 0.51, "new-new": 0.62}
    results = {**RESULTS, "overall": {**RESULTS["overall"], "crossed": crossed}}
    text = summary_text(build_summary(results, [], {}, BEFORE))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "new rewrites 0.600 0.620" in rows and "old rewrites 0.500 0.510" in rows


def test_a_table_is_rendered_for_the_terminal_and_as_markdown() -> None:
    table = Table(
        "Recall",
        ["mode", "disc-\ndisc", "own -\nempty", "note"],
        [["a|b", "+0.5", "-", "no"], ["3", "12", "", "[x]"]],
        conclusion="It rises.",
        note="Two modes.",
    )
    assert table.markdown() == (
        "**Recall**\n\nIt rises.\n\n"
        "| mode | disc-disc | own - empty | note |\n| --- | ---: | ---: | --- |\n"
        "| a\\|b | +0.5 | - | no |\n| 3 | 12 |  | [x] |\n\nTwo modes."
    )
    console = Console(width=60, color_system=None)
    with console.capture() as page:
        console.print(table.terminal())
    lines = [line.rstrip() for line in page.get().splitlines()]
    assert lines[:2] == ["Recall", "It rises."] and "Two modes." in lines
    assert any(line.endswith("[x]") for line in lines)  # brackets are no markup
    assert Table("", ["mode"], []).markdown() == "| mode |\n| --- |"


def test_a_table_as_html_escapes_its_texts_and_scrolls() -> None:
    hostile = "<script>'\"&\x00"
    shown = html(Table(hostile, [hostile, "own -\nempty"], [[hostile, "0.5"]], hostile, hostile).html())
    read = Read(shown)
    assert "script" not in read.tags and "\x00" not in shown and read.text.count("<script>'\"&\ufffd") == 5
    assert "own - empty" in read.text and ("td", "class", "number") in read.attributes
    assert ("div", "tabindex", "0") in read.attributes and ("th", "scope", "row") in read.attributes
    assert html(Table("", ["mode"], []).html()).count("<tr>") == 1


def colours(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]


def test_figure_draws_the_numbers() -> None:
    figure = summary_figure(build_summary(RESULTS, HISTORY, {}, BEFORE, "cma"), "title")
    bars, curves, ablation = figure.axes
    assert [round(bar.get_height(), 3) for bar in bars.patches] == [
        *BEFORE["after"]["recall@1"].values(),
        *RESULTS["overall"]["recall@1"].values(),
    ]
    assert [list(line.get_ydata()) for line in curves.lines] == [[0.4, 0.5, 0.6000000000000001]] * 4
    assert [bar.get_height() for bar in ablation.patches] == [0.925, 0.97, 0.05, 0.1]
    names = [label.get_text() for label in ablation.get_xticklabels()]
    assert names == ["own", "reference", "another query's", "empty"]
    assert (colours(figure) != 255).any()


def test_figure_of_a_first_stage_without_history() -> None:
    bars, curves, _ = summary_figure(build_summary(RESULTS, [], {})).axes
    assert len(bars.patches) == 4 and curves.texts[0].get_text() == "no validation during training"


def test_report_writes_all_files_and_the_marker_only_after_training(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"stage": "cma", "results": RESULTS, "history": HISTORY, "before": BEFORE}
    arguments |= {
        "ranks": [{"key": "test-000000.tar/1", "ranks": {"gen-gen": 1}}],
        "facts": {"data_hash": "abc"},
    }
    write_report(tmp_path, seconds={"test": 1.0}, **arguments)
    assert not (tmp_path / "done.json").exists()
    write_report(tmp_path, seconds={"fit": 2.0, "test": 1.0}, **arguments)
    names = {"done.json", "manifest.json", "ranks.json", "summary.json", "summary.png", "summary.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["data_hash"] == "abc" and manifest["wall_seconds"] == 3.0
    assert Image.open(tmp_path / "summary.png").size[0] > 1000


def test_manifest_outside_of_a_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"git_commit": "unknown", "git_changed": None}
    manifest = build_manifest({"seed": 3}, {"fit": 1.0}, ["rime", "cma"])
    assert manifest["seed"] == 3 and manifest["argv"] == ["rime", "cma"]
    assert "torch" in manifest["versions"] and manifest["device"]["threads"] >= 1


def test_sheet_grows_with_rows_and_never_overflows() -> None:
    picture = Item("a very long name of a thing " * 9, (Image.new("RGB", (300, 200), "red"),), "c")
    words = Item("word " * 100, (), "c")
    row = SheetRow(Card(words, "q"), [Card(picture, "x" * 400), Card(words)], "title " * 99, ["note " * 99])
    one, two = sheet([row]), sheet([row, row], "a title")
    assert one.width == two.width and one.height < two.height < 2 * one.height + 60
    assert picture.thumbnail(64).media[0].size == (64, 43)
    assert picture.media[0].size == (300, 200)
