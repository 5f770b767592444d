"""Where no bar is seen, a line now and then says how far a command is; in a terminal none does."""

from __future__ import annotations

import io
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console

from rime_pl import bars
from rime_pl.bars import Bar, Lines, track
from rime_pl.callbacks.progress import EpochsFromOne


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "EVERY", 0.0)


def console(terminal: bool = False) -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    return Console(file=shown, force_terminal=terminal, width=40, _environ={"TERM": "xterm"}), shown


def test_a_file_is_told_counts_and_values(at_once: None) -> None:
    place, shown = console()
    with Bar(console=place, transient=True) as bar:
        rows = bar.add_task("reading [a] rows", total=2000)
        loss = bar.add_task("training", total=None, loss=0.25)
        bar.advance(rows, 1500)
        bar.update(loss, completed=3)
    assert shown.getvalue().splitlines() == [
        "reading [a] rows: 1,500 of 2,000; training: 0, loss 0.250",
        "reading [a] rows: 1,500 of 2,000; training: 3, loss 0.250",
    ]


def test_elements_that_are_taken_are_told(at_once: None) -> None:
    place, shown = console()
    assert list(track(iter("ab"), "reading", total=2, transient=True, console=place)) == ["a", "b"]
    assert "reading: 2 of 2" in shown.getvalue()
    assert list(track("ab", "reading", off=True, console=place)) and shown.getvalue().count("2 of 2") == 1


def test_lines_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 129.0, 130.0, 131.0, 159.0, 160.0])
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: next(times)))
    lines, (place, shown) = Lines(), console()
    for number in range(5):
        lines.tell(place, partial("line {}".format, number))
    assert shown.getvalue() == "line 1\nline 4\n" and not list(times)


@pytest.mark.parametrize("options", [{"terminal": True}, {"off": True}])
def test_a_terminal_or_a_bar_that_is_off_writes_no_line(options: dict[str, bool], at_once: None) -> None:
    place, shown = console(options.pop("terminal", False))
    with Bar(console=place, transient=True, **options) as bar:
        task = bar.add_task("reading", total=9)
        bar.advance(task)
    assert "1 of 9" not in shown.getvalue()


def test_a_training_tells_a_file_how_far_it_is(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make train-cma > log` said nothing between the table of the model and the end of the last epoch."""
    place, shown = console()
    bar = EpochsFromOne()
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: place)

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).square().mean()
            self.log("train/loss", float(batch_idx), prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = L.Trainer(
        **{"max_epochs": 2, "callbacks": [bar], "accelerator": "cpu", "logger": False},
        **{"enable_checkpointing": False, "enable_model_summary": False},
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(3, 1)))
    said = [line for line in shown.getvalue().splitlines() if line.startswith("Epoch") and " batches" in line]
    assert said == [
        f"Epoch {epoch} of 2: {n} of 3 batches, train/loss {n - 1}.000" for epoch in (1, 2) for n in (1, 2, 3)
    ]
