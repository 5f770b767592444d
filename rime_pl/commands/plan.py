"""`rime plan`: what a run will need, before it starts and without weights; what to change if it does not fit.

rime plan --config configs/cma.yaml --config configs/data/openmoji/cma.yaml --memory 24 --data.batch_size 64
"""

from __future__ import annotations

from json import dumps

from rich.console import Console

from rime_pl.commands.settings import StageWords
from rime_pl.commands.settings import parse_with_settings as parse
from rime_pl.preflight.plan.planning import make_plan
from rime_pl.preflight.plan.tables import plan_tables

__all__ = ["parse", "run"]


def run(
    settings: StageWords,
    *,
    memory: float | None = None,
    steps: int | None = None,
    image_tokens: int = 256,
    rewrite_tokens: int | None = None,
    json: bool = False,
) -> int:
    """Predict memory, time and disk of a run; no weights are read and nothing is trained.

    Args:
        settings: Settings of the run, read from --config.
        memory: Memory of a GPU in GiB. The plan then says whether the run fits, and what to change if not.
        steps: Optimizer steps of the run, for its hours (default: from settings and corpus).
        image_tokens: Visual tokens of an item, where the corpus is not there.
        rewrite_tokens: Tokens of a rewrite, where the corpus is not there (default: the budget).
        json: Whether to print JSON instead of tables.
    """
    plan = make_plan(settings.read(), memory, steps, image_tokens, rewrite_tokens)
    if json:
        print(dumps(plan, indent=1))
    else:
        Console().print(*(table.terminal() for table in plan_tables(plan)))
    return 0
