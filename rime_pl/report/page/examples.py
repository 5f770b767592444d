"""Sample queries with what was found for them, right and wrong; and what a rewrite changes, in numbers.

Called by page.py. The callback RewriteSamples keeps the sheets and the table of the samples in TensorBoard's
files; ranks.json holds every test query.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from PIL import Image

from rime_pl.errors import DataError
from rime_pl.media import open_picture
from rime_pl.report.elements import el
from rime_pl.report.page.facts import RunFacts
from rime_pl.report.page.parts import details, of_each, percent
from rime_pl.report.sheets import cards_of
from rime_pl.report.table import Table

#: Samples that are shown of a run, and queries of ranks.json.
MAX_SAMPLES = 24
MAX_QUERIES = 10
#: Where the callback logs, best first: the test, then the last validation.
SPLITS = {
    "test": "the test split",
    "val": "the validation split, at its last evaluation",
    "val/limited_gallery": "the validation split with a smaller gallery, at its last evaluation",
}
SHEETS = ("gen-gen", "disc-disc")
_NOTES = 2  # of each row of a sheet: reference and own rewrite


def examples(runs: Sequence[RunFacts]) -> list[Element]:
    """Return sample queries with pictures, and the queries that only one mode answers."""
    return of_each(runs, lambda run: [*_samples(run), *_outcomes(run)])


def _samples(run: RunFacts) -> list[Element]:
    prefix = next((p for p in SPLITS if f"{p}/rewrites" in run.events.texts), None)
    if prefix is None:
        return [el("p", "This run has kept no samples yet, or its folder tensorboard is gone.")]
    rows = markdown_rows(run.events.texts[f"{prefix}/rewrites"])
    cards, told = {}, []
    for name in SHEETS:
        if data := run.events.pictures.get(f"{prefix}/retrieval/{name}"):
            try:
                sheet = open_picture(data, f"the sheet {prefix}/retrieval/{name}")
            except DataError as error:
                told.append(el("p", str(error), class_="fault"))
                continue
            cards[name] = cards_of(sheet, len(rows), _NOTES)
            if not cards[name]:  # another version has drawn it
                told.append(
                    el("div", picture(sheet, f"{name}: sample queries and what they find"), class_="scroll")
                )
    text = f"The first results for {len(rows)} sample queries of {SPLITS[prefix]}. Green is right, red is "
    text += "wrong. Below a picture: its place, its cosine and its text or rewrite."
    if len(rows) > MAX_SAMPLES:
        text += f" The first {MAX_SAMPLES} are shown here, and all in TensorBoard."
    shown = [_sample(number, row, cards) for number, row in enumerate(rows[:MAX_SAMPLES])]
    return [el("p", text), *told, *shown]


def _sample(number: int, row: Mapping[str, str], cards: Mapping[str, list[list[Image.Image]]]) -> Element:
    """Return one sample query: its words, its rewrites, and the cards of what each mode finds."""
    facts = [
        part
        for name in ("reference rewrite", "generated rewrite")
        for part in (el("dt", name), el("dd", row.get(name, "-")))
    ]
    verdicts: list[Element] = []
    queries: list[Element] = []
    strips: list[Element] = []
    for name in SHEETS:
        if (said := row.get(name)) is None:
            continue
        right = said == "right"
        verdicts.append(
            el("span", f"{name}: {'right' if right else 'wrong'}", class_="right" if right else "wrong")
        )
        if not right:
            facts += [el("dt", f"{name} finds first"), el("dd", said.removeprefix("wrong: "))]
        if cards.get(name):
            query, *found = cards[name][number]
            queries = queries or [el("div", el("h5", "query"), picture(query, "the query"))]
            images = [picture(one, f"{name}, place {place}") for place, one in enumerate(found, 1)]
            scrolls = {"class_": "cards", "tabindex": "0", "role": "region", "aria_label": f"{name}, found"}
            strips += [el("h5", name), el("div", *images, **scrolls)]
    words = re.sub(r"^\[\d+ media\] ", "", row.get("query", "")) if queries else row.get("query", "")
    heading = el("h4", words or "(picture)", " ", *verdicts)
    task = el("p", f"task: {row.get('task', '-')}", class_="note")
    shown = el("div", *queries, el("div", *strips, class_="found"), class_="strips")
    return el("section", heading, task, el("dl", *facts), shown, class_="sample")


def markdown_rows(table: str) -> list[dict[str, str]]:
    """Return the rows of a Markdown table by the names of its columns.

    >>> markdown_rows("| a | b |\\n| --- | --- |\\n| x\\\\|y | |")
    [{'a': 'x|y', 'b': ''}]
    """
    lines = [line.strip().removeprefix("|").removesuffix("|") for line in table.splitlines()]
    cells = [[cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    return [dict(zip(cells[0], row, strict=False)) for row in cells[2:]]


def picture(image: Image.Image, alt: str) -> Element:
    """Return an ``img`` that holds its own bytes, as WebP."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=82, method=4)
    data = base64.b64encode(file.getvalue()).decode()
    size = {"width": str(image.width), "height": str(image.height)}
    return el("img", src=f"data:image/webp;base64,{data}", alt=alt, **size)


def _outcomes(run: RunFacts) -> list[Element]:
    """Return how often only one of the two modes puts the right target first, with queries of each kind."""
    both = ("gen-gen", "disc-disc")
    rows = [row for row in run.ranks if all(row["ranks"].get(pair) for pair in both)]
    if not rows:
        return []
    kinds: dict[tuple[bool, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        right = (row["ranks"]["gen-gen"] == 1, row["ranks"]["disc-disc"] == 1)
        kinds.setdefault(right, []).append(row)
    names = {
        (True, True): "right in both modes",
        (True, False): "right with the rewrite only (gen-gen)",
        (False, True): "right without the rewrite only (disc-disc)",
        (False, False): "wrong in both modes",
    }
    counts = [
        [name, str(len(kinds.get(k, ()))), percent(len(kinds.get(k, ())) / len(rows))]
        for k, name in names.items()
    ]
    note = "All test queries, those of memory tasks too; each query counts the same here."
    content = [
        Table("What the rewrite changes", ["first place", "queries", "share"], counts, note=note).html()
    ]
    for kind in ((True, False), (False, True)):
        if found := kinds.get(kind):
            cells = [
                [
                    row["task"],
                    str(row["key"]),
                    row.get("rewrite", "-"),
                    *(str(row["ranks"][pair]) for pair in both),
                ]
                for row in found[:MAX_QUERIES]
            ]
            head = ["task", "key", "own rewrite", "rank, gen-gen", "rank, disc-disc"]
            some = f"the first {len(cells)} of {len(found)}" if len(found) > len(cells) else str(len(found))
            content.append(details(f"Queries that are {names[kind]}: {some}", Table("", head, cells).html()))
    return content
