"""`python -m tests.stages.killed ...` is `rime ...`, but every process is killed before step $RIME_KILL_STEP.

A module and not `python -c`: Lightning starts further processes by the module's name.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from rime_pl import cli
from rime_pl.__main__ import main
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.sft import SFTModule


class Killed:
    """As a power cut would: no handler runs."""

    global_step: int

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == int(os.environ["RIME_KILL_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)


class KilledSFT(Killed, SFTModule):
    pass


class KilledRefineRL(Killed, RefineRLModule):
    pass


if __name__ == "__main__":
    cli.STAGES |= {"sft": KilledSFT, "refine_rl": KilledRefineRL}
    sys.exit(main())
