"""The report of `rime mine`: what the rules have dropped, and 20 random examples for the eye.

A margin cannot tell a hard negative from an unmarked right answer; only a person who looks can. So the page
shows each example with its right answers, its negatives and their scores.
"""

from __future__ import annotations

import html
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rime_pl.datamodules.mining.choosing import Choice, Mined
from rime_pl.datamodules.mining.items import Catalogue, StoredItems
from rime_pl.datamodules.mining.rules import RULES, Rules
from rime_pl.datamodules.shards import ShardReader
from rime_pl.errors import DataError
from rime_pl.report.sheets import Card, SheetRow, sheet
from rime_pl.report.table import Table
from rime_pl.types import Clip, Item, Page

#: The result of each task and gallery.
Groups = Mapping[tuple[str, str], Mined]
EXAMPLES = 20
_LONGEST = 300  # characters of a text on the page
_MARKDOWN = re.compile(r"([\\`*_\[\]|~])")


def write_report(folder: Path, catalogue: Catalogue, found: Groups, rules: Rules, title: str) -> list[Table]:
    """Write ``report.md`` and the contact sheet ``examples.png`` into a folder, and return the tables."""
    tables = [dropped(found), left(found, rules)]
    pages = [dropped(found, _cell), left(found, rules, _cell)]
    rows = examples(found, rules.seed)
    lines = [f"# Hard negatives of {escaped(title)}", *(table.markdown() for table in pages)]
    picture = folder / "examples.png"
    picture.unlink(missing_ok=True)
    shown = []
    for row, choices in rows:
        try:
            shown.append(_example(catalogue, row, choices))
        except DataError as error:
            lines.append(f"An example cannot be shown: {escaped(str(error))}")
    if shown:
        lines.append(
            f"## {len(shown)} random examples\n\nA negative that is right after all teaches the wrong thing. "
            "If you see some, use a larger margin.\n\n![Queries, right answers and negatives](examples.png)"
        )
        sheet([card_row for card_row, _ in shown], "green: a right answer; red: a hard negative").save(
            picture
        )
        lines += [text for _, text in shown]
    (folder / "report.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return tables


def dropped(found: Groups, name_of: Callable[[str], str] = str) -> Table:
    """Return the share of the candidates that each rule has dropped, of each task and mode pair."""
    counts = {(name, modes): mined.counts(modes) for name, mined in found.items() for modes in mined.verdicts}
    active = [rule for rule in RULES if any(count[rule] for count in counts.values())]
    rows = []
    for name, task in _names(found).items():
        for modes in found[name].verdicts:
            total = found[name].looked_at(modes)
            by_rule = [counts[name, modes][rule] for rule in active]
            shares = [_share(count, total) for count in (*by_rule, total - sum(by_rule))]
            rows.append([name_of(task), modes, f"{total:,}", *shares])
    note = "The first rule that drops a candidate counts it. Candidates are counted for each query."
    if idle := [rule for rule in RULES if rule not in active]:
        note += f" No candidate was dropped by: {', '.join(idle)}."
    head = [rule.replace(" ", "\n") for rule in active]
    return Table(
        "Candidates dropped by each rule", ["task", "modes", "looked\nat", *head, "left"], rows, note=note
    )


def left(found: Groups, rules: Rules, name_of: Callable[[str], str] = str) -> Table:
    """Return how many queries of each task got as many negatives as wanted, fewer, or none."""
    rows = []
    for name, task in _names(found).items():
        mined = found[name]
        counts = [len(choices) for choices in mined.chosen.values()]
        skipped = len(mined.not_measured)
        queries = len(counts) + skipped
        few = sum(count < rules.num_negatives for count in counts) + skipped
        none = sum(count == 0 for count in counts) + skipped
        mean = f"{sum(counts) / queries:.2f}" if queries else "-"
        shares = (_share(few, queries), _share(none, queries), _share(skipped, queries))
        rows.append([name_of(task), f"{queries:,}", f"{mined.candidates:,}", mean, *shares])
    few_head = f"fewer\nthan {rules.num_negatives}"
    head = ["task", "queries", "candidates", "negatives\n(mean)", few_head, "none", "not\nembedded"]
    return Table("Negatives of each query", head, rows)


def _names(found: Groups) -> dict[tuple[str, str], str]:
    """Return what the tables call each task and gallery: the task, if it has one gallery only."""
    tasks = Counter(task for task, _ in found)
    return {
        (task, gallery): task if tasks[task] == 1 else f"{task} ({gallery})"
        for task, gallery in sorted(found)
    }


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}".replace("%", " %") if total else "-"


def examples(found: Groups, seed: int) -> list[tuple[int, list[Choice]]]:
    """Return up to 20 random pairs with negatives, as evenly from the tasks as their numbers allow."""
    waiting = []
    for _, mined in sorted(found.items()):
        some = [(row, choices) for row, choices in sorted(mined.chosen.items()) if choices]
        waiting.append(random.Random(f"examples {seed}").sample(some, min(EXAMPLES, len(some))))
    result: list[tuple[int, list[Choice]]] = []
    while len(result) < EXAMPLES and any(waiting):
        for some in waiting:
            if some and len(result) < EXAMPLES:
                result.append(some.pop())
    return sorted(result)


def _example(catalogue: Catalogue, row: int, choices: Sequence[Choice]) -> tuple[SheetRow, str]:
    """Return a row of the contact sheet, and the texts for the page."""
    entry = catalogue.entries[row]
    pair = ShardReader(catalogue.entries, further=(0, 1000)).read(row)
    assert pair.query is not None, "only pairs with a query have negatives"
    items = StoredItems(catalogue, [choice.item for choice in choices])
    cards = [Card(item.thumbnail(), "right answer", True) for item in (pair.target, *pair.positives)]
    lines = [f"### {escaped(entry.name)} ({escaped(pair.dataset)})", f"query: {_words(pair.query)}"]
    lines += [f"- right: {_words(item)}" for item in (pair.target, *pair.positives)]
    for number, choice in enumerate(choices):
        item = items[number]
        scores = f"{choice.modes}, rank {choice.rank}, {choice.score:.3f} (right: {choice.lowest:.3f})"
        cards.append(
            Card(item.thumbnail(), f"{choice.score:.3f}, right {choice.lowest:.3f}\n{choice.modes}", False)
        )
        lines.append(f"- negative, {scores}, of {escaped(items.name(number))}: {_words(item)}")
    title = f"{entry.name}   {' '.join((pair.query.instruction, pair.query.text)).strip()}"
    query = Card(pair.query.thumbnail(), pair.query.text or "query")
    return SheetRow(query, cards, title), f"{lines[0]}\n\n{lines[1]}\n\n" + "\n".join(lines[2:])


def _words(item: Item) -> str:
    """Return the texts of an item, and what it shows."""
    kinds = [
        "clip" if isinstance(one, Clip) else "page" if isinstance(one, Page) else "picture"
        for one in item.media
    ]
    text = " ".join(f"{item.instruction} {item.text}".split())
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return escaped(" ".join(filter(None, (shown, f"({', '.join(kinds)})" if kinds else ""))))


def _cell(text: str) -> str:
    return escaped(text).replace(r"\|", "|")  # the table escapes it


def escaped(text: str) -> str:
    r"""Return a text as Markdown that shows it in one line, without markup and without HTML.

    >>> print(escaped("<b>[a](x)</b>\n| *1* &amp;"))
    &lt;b&gt;\[a\](x)&lt;/b&gt; \| \*1\* &amp;amp;
    """
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))
