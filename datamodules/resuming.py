"""What a run that goes on must share with the run before it. Used by datamodule.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rime_pl.errors import RimeError

#: Settings that a resumed run must share with the run that it continues.
SAME = (
    "data_hash",
    "corpus_weights",
    "seed",
    "batch_size",
    "tasks",
    "annotated_share",
    "annotated_seed",  # null in an earlier version, as for seed 0
    "annotated_batch_share",
    "order",
    "rewrites",
    "completion",
    "hard_negatives",
    "positives",
)
#: Settings that a checkpoint of the version before this one lacks; its order of the data was another one.
_NEW = ("corpus_weights", "order")


def refuse_other(checkpoint: Mapping[str, Any], mine: Mapping[str, Any], path: str) -> None:
    """Raise a RimeError if the data or a setting of the data differs from the checkpoint's.

    Args:
        checkpoint: State of the data module in the checkpoint.
        mine: The settings of this run, by the names in ``SAME``.
        path: ``data.path``, for the message.
    """
    if any(name not in checkpoint for name in _NEW):
        raise RimeError(
            "The checkpoint is of an earlier version, whose order of the data was another one. Start "
            "the run again, with --run_dir set to a new folder."
        )
    for name, value in mine.items():
        if (trained_with := checkpoint.get(name)) != value:
            setting = f"data_hash of data.path={path}" if name == "data_hash" else f"data.{name}"
            raise RimeError(
                f"{setting} must be {trained_with!r}, as in the checkpoint, but is {value!r}. "
                "Resume with the same data and settings, or set --run_dir to a new folder."
            )
