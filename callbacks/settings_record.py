"""Writes down the settings of a run once all checks have passed: ``config.yaml``, and HPARAMS in TensorBoard.

Added to every stage by ``cli``. Before that moment a refused run has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from rime_pl.run_folder import RunFolder, write_text
from rime_pl.types import MODE_PAIRS

#: What the HPARAMS tab shows next to the settings.
METRICS = [f"test/recall@1/{pair}" for pair in MODE_PAIRS]


class SettingsRecord(Callback):
    """Writes the settings when the first batch is about to be trained.

    Args:
        run: Folder of the run.
        settings: All settings, as plain data.
    """

    def __init__(self, run: RunFolder, settings: dict[str, Any]) -> None:
        self.run, self.settings = run, settings

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        write_text(self.run.config, yaml.safe_dump(self.settings, sort_keys=False))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._tell(logger)

    def _tell(self, logger: TensorBoardLogger) -> None:
        values = dict(flat(self.settings))
        writer: Any = logger.experiment
        for part in hparams(values, dict.fromkeys(METRICS)):
            writer.file_writer.add_summary(part)
        logger.log_hyperparams(values, metrics={})
        Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)  # Lightning's is empty
        logger.save()


def flat(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, str | float]]:
    """Yield each setting with its full name; TensorBoard takes texts and numbers.

    >>> dict(flat({"data": {"batch_size": 8, "tasks": None}, "seed_everything": 0}))
    {'data.batch_size': 8, 'data.tasks': 'None', 'seed_everything': 0}
    """
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{name}.")
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            yield f"{above}{name}", value if number else str(value)
