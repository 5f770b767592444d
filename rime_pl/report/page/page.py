"""The page of `rime report`: one HTML file that needs no script and asks no server for anything.

Called by commands/report.py, which reads the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree.ElementTree import Element

from rime_pl.errors import RimeError
from rime_pl.report.elements import el, html
from rime_pl.report.page.course import curves, rewards
from rime_pl.report.page.examples import examples
from rime_pl.report.page.facts import RunFacts
from rime_pl.report.page.origin import manifests, overview, settings
from rime_pl.report.page.results import ablation, cost, four_modes, modalities

STYLE = Path(__file__).with_name("page.css")
#: A browser then refuses all scripts and all requests, whatever stands in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Section = Callable[[Sequence[RunFacts]], list[Element]]
#: Anchor -> heading, what it shows, and the function that makes it.
SECTIONS: dict[str, tuple[str, str, Section]] = {
    "runs": ("Runs", "What this page is about.", overview),
    "modes": ("Four modes", "Query mode - target mode; a search may combine them.", four_modes),
    "tasks": ("Modalities and tasks", "Where the modes differ.", modalities),
    "cost": ("Recall and its cost", "A rewrite costs time, so it has to find more.", cost),
    "ablation": ("Rewrite ablation", "Does the model use what it writes?", ablation),
    "examples": ("Examples", "What the model writes and finds.", examples),
    "curves": ("Curves", "How training went.", curves),
    "reward": ("Reward", "The parts of the reward of Refine-RL.", rewards),
    "settings": ("Settings", "What was chosen.", settings),
    "manifest": ("Manifest", "What each run was made of.", manifests),
}


def page(runs: Sequence[RunFacts], now: datetime | None = None) -> str:
    """Return the page of some runs as HTML of ASCII characters.

    Args:
        runs: At least one.
        now: When it is made (default: now, UTC).
    """
    made = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    title = "Report of " + ", ".join(run.name for run in runs)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", **{"http-equiv_": "Content-Security-Policy", "content": POLICY}),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", title),
        el("style", STYLE.read_text(encoding="utf-8")),
    )
    links = [el("li", el("a", name, href=f"#{anchor}")) for anchor, (name, *_) in SECTIONS.items()]
    body = el(
        "body",
        el("header", el("h1", title), el("p", f"Made by rime report, {made}", class_="note")),
        el("nav", el("ul", *links), aria_label="Sections"),
        el("main", *(_section(anchor, runs) for anchor in SECTIONS)),
    )
    return "<!doctype html>\n" + html(el("html", head, body, lang="en")) + "\n"


def _section(anchor: str, runs: Sequence[RunFacts]) -> Element:
    name, shows, make = SECTIONS[anchor]
    try:
        content = make(runs)
    except (RimeError, KeyError, TypeError, ValueError) as error:
        content = [el("p", f"This part cannot be shown: {error}", class_="fault")]
    return el("section", el("h2", name), el("p", shows, class_="lead"), *content, id=anchor)
