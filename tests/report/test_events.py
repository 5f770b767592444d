"""What TensorBoard's files give back: all values of a curve, the last picture and text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from rime_pl.report.events import Events, read_events


def write(folder: Path, start: int = 0, purge_step: int | None = None) -> None:
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    for step in range(start, start + 30):
        writer.add_scalar("train/loss", 100 * start + step, step)
    for side in (3, 5):
        writer.add_text("test/rewrites", f"| side |\n| --- |\n| {side} |", side)
        writer.add_image("test/sheet", np.full((side, side, 3), 200, np.uint8), side, dataformats="HWC")
    writer.close()


def test_all_values_and_the_last_picture_and_text(tmp_path: Path) -> None:
    write(tmp_path)
    found = read_events(tmp_path)
    assert found.scalars == {"train/loss": [(step, float(step)) for step in range(30)]}
    assert found.texts == {"test/rewrites": "| side |\n| --- |\n| 5 |"}
    assert Image.open(io.BytesIO(found.pictures["test/sheet"])).size == (5, 5)


def test_steps_that_a_resumed_run_trained_again_count_once(tmp_path: Path) -> None:
    write(tmp_path)
    for file in tmp_path.iterdir():
        file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))  # of an earlier time
    write(tmp_path, start=20, purge_step=20)
    curve = read_events(tmp_path).scalars["train/loss"]
    assert [step for step, _ in curve] == list(range(50))
    assert dict(curve)[19] == 19 and dict(curve)[20] == 2020


def test_a_file_that_breaks_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    write(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    curve = read_events(tmp_path).scalars["train/loss"]
    assert 5 < len(curve) < 30 and curve[5] == (5, 5.0)


def test_no_folder_and_an_empty_one_hold_nothing(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none") == read_events(tmp_path) == Events()
