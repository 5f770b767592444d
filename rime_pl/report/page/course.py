"""How training went: losses, recall in validation, health, and the parts of the reward of Refine-RL.

Called by page.py. The curves come from TensorBoard's files; docs/reference/metrics.md explains each.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from rime_pl.report.elements import el
from rime_pl.report.figures import CURVES
from rime_pl.report.page import charts
from rime_pl.report.page.facts import RunFacts
from rime_pl.report.page.parts import details, figure
from rime_pl.types import MODE_PAIRS

HEALTH = ("learning_rate", "grad_norm", "pairs_per_second", "peak_memory_gib", "utilisation")
#: Curves of Refine-RL: the parts of the reward, and what they do to the policy.
REWARD = (
    *("reward", "reward_format", "reward_embedding", "reward_excess_length", "reward_spread", "gain"),
    *("no_signal", "rewrite_length", "entropy", "kl", "k2", "drift", "clip_fraction"),
)
NO_CURVES = "This run has logged no curves yet, or its folder tensorboard is gone."


def curves(runs: Sequence[RunFacts]) -> list[Element]:
    """Return recall in validation, the losses and the health of training."""
    without = [el("p", f"{run.heading}: {NO_CURVES}") for run in runs if not run.events.scalars]
    names = dict.fromkeys(name for run in runs for name in run.events.scalars)
    if not names:
        return without
    losses = sorted(name for name in names if name.startswith(("train/loss", "train/negatives")))
    health = [name for name in (f"train/{one}" for one in HEALTH) if name in names]
    rewards = {f"train/{one}" for one in REWARD}
    known = {*losses, *health, *rewards}
    rest = [name for name in names if name.startswith("train/") and name not in known]
    content = [*_validation(runs), el("h3", "Losses"), _panels(runs, losses)]
    content += [el("h3", "Health"), _panels(runs, health)] if health else []
    content += [details(f"Further curves of training ({len(rest)})", _panels(runs, rest))] if rest else []
    return [*content, *without]


def _validation(runs: Sequence[RunFacts]) -> list[Element]:
    """Return recall@1 of the validation split: one panel for a run, or one for each pair of several runs."""
    prefixes = [p for p in ("val", "val/limited_gallery") if any(_logged(run, p) for run in runs)]
    if not prefixes:
        return [el("h3", "Recall in validation"), el("p", "No validation was logged.")]
    content = []
    for prefix in prefixes:
        names = [
            pair for pair in MODE_PAIRS if any(f"{prefix}/recall@1/{pair}" in r.events.scalars for r in runs)
        ]
        if len(runs) > 1:
            panels = _panels(runs, [f"{prefix}/recall@1/{pair}" for pair in names])
        else:
            found = runs[0].events.scalars
            lines = [
                charts.Line(
                    pair, CURVES[pair], found[f"{prefix}/recall@1/{pair}"], len(set(pair.split("-"))) > 1
                )
                for pair in names
            ]
            title = f"{prefix}/recall@1"
            panels = el("div", figure(charts.curves(title, lines), title), class_="panels")
        content.append(panels)
    limited = "The gallery of validation was limited, which makes each query easier."
    notes = [el("p", limited, class_="note")] if "val/limited_gallery" in prefixes else []
    return [el("h3", "Recall in validation"), *content, *notes]


def _logged(run: RunFacts, prefix: str) -> bool:
    return any(f"{prefix}/recall@1/{pair}" in run.events.scalars for pair in MODE_PAIRS)


def _panels(runs: Sequence[RunFacts], names: Sequence[str]) -> Element:
    """Return a panel for each curve, with a line for each run that has it."""
    panels = []
    for name in names:
        lines = [
            charts.Line(run.letter, run.colour, run.events.scalars[name])
            for run in runs
            if run.events.scalars.get(name)
        ]
        if lines:
            most = max(len(line.points) for line in lines)
            size = -(-most // charts.MAX_POINTS)
            averaged = f" (means of {size} steps)" if size > 1 else ""
            panels.append(figure(charts.curves(name, lines), f"{name}{averaged}"))
    return el("div", *panels, class_="panels")


def rewards(runs: Sequence[RunFacts]) -> list[Element]:
    """Return the parts of the reward; a sentence for the runs of other stages."""
    trained = [run for run in runs if run.stage == "refine_rl"]
    if not trained:
        return [el("p", "No run here is of Refine-RL, so there is no reward.")]
    names = [f"train/{name}" for name in REWARD]
    logged = [run for run in trained if any(name in run.events.scalars for name in names)]
    without = [el("p", f"{run.heading}: {NO_CURVES}") for run in trained if run not in logged]
    if not logged:
        return without
    text = (
        "Means over all rewrites that were sampled in a step. Each batch holds one task, and tasks differ, "
    )
    text += "so these curves are noisy; val/reward always has the same queries."
    return [el("p", text), _panels(logged, ["val/reward", *names]), *without]
