"""`python -m tests.stages.broken ...` is `rime ...`, but process $RIME_BROKEN_RANK cannot read batch 2.

A module and not `python -c`: Lightning starts further processes by the module's name.
"""

from __future__ import annotations

import os
import sys

from rime_pl.__main__ import main
from rime_pl.datamodules.loading import Fetched, TrainBatches
from rime_pl.errors import DataError

read = TrainBatches.__getitem__


def read_or_fail(self: TrainBatches, position: int) -> Fetched:
    if position == 2 and self.rank == int(os.environ["RIME_BROKEN_RANK"]):
        return Fetched(error=DataError("train-000000.tar/7: the picture is cut off."))
    return read(self, position)


if __name__ == "__main__":
    TrainBatches.__getitem__ = read_or_fail  # type: ignore[method-assign]
    sys.exit(main())
