"""`rime tune`: choose the weight of the cross-entropy for rewrite and chain of thought, on validation."""

from __future__ import annotations

from pathlib import Path

from rime_pl.run_folder import RunFolder, write_json
from rime_pl.study.tuning import ARMS, tune


def run(*, run: Path, output: Path) -> int:
    """Choose the weight of the cross-entropy for rewrite and chain of thought, on the validation split.

    Both get the same values, one training each. Finished ones are kept, so the command can be given again.

    Args:
        run: Finished SFT run, whose other settings hold.
        output: File to write, for `rime compare --tuned`.
    """
    found = tune(RunFolder(run))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, found)
    for arm in ARMS:
        tried = ", ".join(f"{value}: {recall:.3f}" for value, recall in found[arm]["tried"].items())
        print(f"{arm}: model.lambda_ce {found[arm]['chosen']:g} ({found['measure']} {tried})")
    print(f"written: {output}")
    return 0
