"""The adaptive search of a run as a further row of its table: a rewrite only where the search is unsure.

Called by `rime compare`. The threshold and the mode of the targets are chosen on the validation split, as
`rime search --calibrate` does; the test split only measures them. The result is kept in the run folder.
"""

from __future__ import annotations

from typing import Any

from rime_pl.inference.adaptive import point
from rime_pl.inference.calibration import SPLIT, calibrate, measure
from rime_pl.inference.loading import load
from rime_pl.metrics.bootstrap import macro_mean
from rime_pl.run_files import read_facts
from rime_pl.run_folder import RunFolder, write_json

FILE = "adaptive_test.json"
#: What a record holds of it, each as mean, lowest and highest seed.
RESULTS = ("recall@1", "share", "never", "always")


def measure_adaptive(run: RunFolder) -> dict[str, Any]:
    """Return what an adaptive search finds on the test split; from the run folder if it was measured before.

    Returns:
        ``recall@1`` with the threshold; ``share`` of queries that got a rewrite; recall ``never`` (disc-disc)
        and ``always`` (a rewrite for each query); ``target_mode``, ``margin`` (null: always) and ``model``.
        Recalls are means over the headline tasks.
    """
    file, model = run.path / FILE, load(run.path)
    if file.is_file() and (known := read_facts(file)).get("model") == model.name:
        return dict(known)
    chosen = calibrate(measure(model, SPLIT))
    asked = measure(model, "test").asked(chosen.target_mode)
    found = point(asked, chosen.chosen.margin)
    result = {
        "model": model.name,
        "target_mode": chosen.target_mode,
        "margin": chosen.json(model.name)["margin"],
        "recall@1": found.recall,
        "share": found.share,
        "never": macro_mean(asked.groups(asked.never)),
        "always": macro_mean(asked.groups(asked.always)),
    }
    write_json(file, result)
    return result


def known_adaptive(run: RunFolder) -> dict[str, Any] | None:
    """Return what was measured of a run before; None if nothing was."""
    file = run.path / FILE
    return dict(read_facts(file)) if file.is_file() else None
