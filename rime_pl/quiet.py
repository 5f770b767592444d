"""What other libraries print and a user can do nothing about: each message by its logger and its beginning.

The command line calls it once, before anything heavy is imported; `rime_pl.load` for as long as it loads. A
warning that a user can act on is not in these tables.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Logger -> beginnings of messages that it need not pass on.
MESSAGES: dict[str, tuple[str, ...]] = {
    "bitsandbytes.backends.cpu.ops": (
        "Failed to load CPU gemm_4bit_forward",  # an optional kernel; the built-in one is used
    ),
    "lightning.fabric.utilities.seed": (
        "Seed set to",  # it is in config.yaml
    ),
    "lightning.pytorch.utilities.rank_zero": (
        "💡 Tip",  # advertisement of other products
        "GPU available:",  # trainer.accelerator decides, and `rime doctor` looks
        "TPU available:",
        "HPU available:",
        "LOCAL_RANK:",
        "You are using a CUDA device",  # about float32 products; ours are in model.backbone.dtype
        "Loading `train_dataloader` to estimate",
        "`Trainer.fit` stopped: `max_epochs",  # as planned
        "`Trainer.fit` stopped: `max_steps",
        "Restoring states from the checkpoint path",  # the command line has said which
        "Restored all states from the checkpoint",
        "Loaded model weights from the checkpoint",
    ),
}
#: Warnings about what one library calls in another.
WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",  # peft, in transformers
    "`isinstance(treespec, LeafSpec)` is deprecated",  # lightning, in torch
    "predict returned None",  # on purpose: the parts are on disk
    "Total length of `DataLoader` across ranks is zero",  # all is embedded already
)
#: Seconds after which tqdm shows a bar: weights of a small model load in less, a download takes more.
BAR_DELAY = "2"


class DropMessages(logging.Filter):
    """Drops the records whose text begins like one of ``beginnings``, whichever process they come from."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not re.sub(r"^\[rank: \d+\] ", "", record.getMessage()).startswith(self.beginnings)


def quiet_other_libraries() -> None:
    """Drop the messages and warnings of the tables above, print warnings plainly, and delay tqdm's bars."""
    os.environ.setdefault("TQDM_DELAY", BAR_DELAY)  # tqdm reads it when it is imported
    warnings.formatwarning = plain_warning
    for name, beginnings in MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, DropMessages) for each in logger.filters):
            logger.addFilter(DropMessages(beginnings))
    _ignore_warnings()


def plain_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return a warning as a line of a terminal: file and line of the source say nothing to a user."""
    return f"warning: {message}\n"


@contextmanager
def quiet_while_loading() -> Iterator[None]:
    """Do the same inside somebody's program, and leave its warnings, loggers and bars as they were."""
    filters = [(logging.getLogger(name), DropMessages(beginnings)) for name, beginnings in MESSAGES.items()]
    with warnings.catch_warnings():
        _ignore_warnings()
        for logger, drop in filters:
            logger.addFilter(drop)
        from transformers.utils.logging import set_tqdm_hook  # here, because it is slow to import

        before = set_tqdm_hook(_late_bar)
        try:
            yield
        finally:
            set_tqdm_hook(before)
            for logger, drop in filters:
                logger.removeFilter(drop)


def _ignore_warnings() -> None:
    for words in WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{re.escape(words)}")


def _late_bar(bar: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    return bar(*args, **{"delay": float(BAR_DELAY), **settings})
