"""Held-out queries with their rewrite before and after reinforcement learning, and what each is worth.

Added to every stage by ``cli``; a stage without a before writes nothing. ``rewrites.md`` in the run folder,
and the same table as text in TensorBoard, after each validation.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from rime_pl.callbacks.progress import batches_trained
from rime_pl.types import RewriteChange

FILE = "rewrites.md"


class RewriteChanges(Callback):
    """Writes the table.

    Args:
        run_dir: Folder of the run.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        module: Any = pl_module  # a RimeModule; callbacks do not import the modules
        changes: list[RewriteChange] = module.rewrite_changes()
        if not changes or not trainer.is_global_zero:
            return
        table = change_table(changes)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        step = batches_trained(trainer)
        title = f"# Rewrites before and after, step {step}"
        (self.run_dir / FILE).write_text(f"{title}\n\n{table}\n")
        if isinstance(trainer.logger, TensorBoardLogger):
            writer = trainer.logger.experiment
            writer.add_text("val/rewrites_before_and_after", table, step)
            writer.add_scalar("val/reward", fmean(one.reward_after for one in changes), step)


def change_table(changes: list[RewriteChange]) -> str:
    """Markdown, one line a query, and the means below.

    >>> change = RewriteChange("k", "t", "a|b", "ref", "old", "new", 0.5, 1.25)
    >>> print(change_table([change]).splitlines()[2])
    | t | a\\|b | ref | old | 0.50 | new | 1.25 |
    """
    head = ["task", "query", "reference", "before", "reward", "after", "reward"]
    rows = [head, ["---"] * len(head)]
    for one in changes:
        rows.append(
            [
                one.task,
                one.query or "(picture)",
                one.reference or "(none)",
                one.before or "(empty)",
                f"{one.reward_before:.2f}",
                one.after or "(empty)",
                f"{one.reward_after:.2f}",
            ]
        )
    before = fmean(one.reward_before for one in changes)
    after = fmean(one.reward_after for one in changes)
    changed = sum(one.before != one.after for one in changes)
    lines = ["| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in row) + " |" for row in rows]
    note = (
        f"Mean reward {before:.3f} before, {after:.3f} after; {changed} of {len(changes)} rewrites changed."
    )
    return "\n".join([*lines, "", note])
