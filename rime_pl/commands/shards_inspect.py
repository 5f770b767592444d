"""`rime shards inspect`: what is in a corpus, as tables and a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.faults import counted, first_lines
from rime_pl.datamodules.inspection import (
    KINDS,
    SIDES,
    Inspection,
    SideLengths,
    TaskInspection,
    inspect_corpus,
    shown_pairs,
)
from rime_pl.errors import RimeError
from rime_pl.report.table import Table
from rime_pl.types import Pair


def inspect(
    *,
    corpus: Path,
    split: list[str] | None = None,
    output: Path = Path("inspect.png"),
    pairs: int = 8,
    samples: int = 200,
    seed: int = 0,
    base: str | None = None,
) -> None:
    """Show what is in a corpus: counts, modalities, lengths, and a contact sheet of some pairs.

    Counts and modalities are those of all pairs, from the index. Lengths, sizes and broken samples are those
    of some pairs of each task and split, which are read. `rime shards check` reads all of them.

    Args:
        corpus: Corpus folder.
        split: Splits to look at; all if not given.
        output: Contact sheet, a PNG file with all splits; or a folder, with a file for each split.
        pairs: Number of pairs of each split on the contact sheet.
        samples: Number of pairs of each task and split that are read.
        seed: Seed of the choice of these pairs.
        base: Checkpoint whose processor counts tokens; letters only if not given.
    """
    for name, value in (("pairs", pairs), ("samples", samples)):
        if value < 1:
            raise RimeError(f"--{name} must be 1 or more, but is {value}.")
    in_folder = output.is_dir() or not output.suffix
    if not in_folder and Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise RimeError(f"--output must be a picture, such as inspect.png, or a folder, but is {output}.")
    splits = read_corpus(corpus)["splits"]
    if unknown := sorted(set(split or ()) - splits.keys()):
        raise RimeError(f"--split {' '.join(unknown)}: {corpus} has only {', '.join(splits)}.")
    from rime_pl.report.contact_sheet import strip  # matplotlib takes a second

    found = inspect_corpus(corpus, split, samples, pairs, seed, _counter(base), strip)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for table in tables(found, str(corpus), samples, seed):
        console.print(table.terminal())
    _tell_broken(found, console)
    _draw(found, corpus, output, in_folder, pairs, seed, console)


def _counter(base: str | None) -> Callable[[str], int] | None:
    """Return the function that counts tokens; None without a base model."""
    if base is None:
        return None
    from rime_pl.processing import RimeProcessor  # transformers takes seconds, so only if it is needed
    from rime_pl.prompts import PromptConfig

    tokenizer = RimeProcessor.from_pretrained(base, PromptConfig()).tokenizer
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


Row = tuple[str, str, TaskInspection]  # split, task
Columns = list[tuple[str, str]]  # head and value; of each side the same heads, or none


def tables(found: Inspection, name: str, samples: int, seed: int) -> Iterator[Table]:
    """Yield what was found; tables and columns that would hold nothing are left out.

    Args:
        found: From ``inspect_corpus``.
        name: What the corpus is called.
        samples: Largest number of pairs of each task and split that were read.
        seed: Seed of their choice.
    """
    rows = [(split, name, task) for split, tasks in found.items() for name, task in tasks.items()]
    head = ["split", "task", "pairs", "queries", "distinct\ntargets", "rewrites on\nboth sides"]
    cells = [
        [
            split,
            name,
            *map("{:,}".format, (one.pairs, one.queries, one.contents)),
            _share(one.annotated, one.pairs),
        ]
        for split, name, one in rows
    ]
    yield Table(f"{name}: all pairs", head, cells)
    yield _modalities(rows)
    most = counted(samples, "pair", "pairs")
    note = f"Read were {most} of each task and split, or all if there are fewer; seed {seed}."
    yield from _lengths(rows, "Texts", _text_columns, note)
    yield from _lengths(rows, "Rewrites", _rewrite_columns, note)
    yield from _lengths(rows, "Pictures, pages and frames of clips, in pixels", _media_columns, note)
    yield from _lengths(rows, "Clips", _clip_columns, note)
    head = ["split", "task", "read", "broken", "hard negatives\n(mean)", "further right\ntargets (mean)"]
    cells = [
        [split, name, str(one.read), str(len(one.broken)), _mean(one.hard_negatives), _mean(one.positives)]
        for split, name, one in rows
    ]
    yield Table("Pairs that were read", head, cells, note=note)


def _modalities(rows: Sequence[Row]) -> Table:
    """Return which media the sides hold; of all pairs, from the index."""
    shown = [
        kind for kind in KINDS if any(one.counts[side].kinds[kind] for *_, one in rows for side in SIDES)
    ]
    with_text = any(one.counts[side].with_text for *_, one in rows for side in SIDES)
    head = ["split", "task", "side", *shown, *(["+ text"] if with_text else []), "rewrites"]
    cells = []
    for split, name, one in rows:
        for side in SIDES:
            counts = one.counts[side]
            numbers = [f"{counts.kinds[kind]:,}" if counts.kinds[kind] else "-" for kind in shown]
            numbers += [_share(counts.with_text, counts.items)] if with_text else []
            cells.append([split, name, side, *numbers, _share(counts.rewrites, counts.items)])
    note = "mixed: several kinds of media; + text: share of the items that have media and a text"
    return Table("What the sides hold: items of all pairs", head, cells, note=note if with_text else "")


def _text_columns(side: SideLengths) -> Columns:
    return [*_three("letters:", side.letters), *_three("tokens:", side.tokens)]


def _rewrite_columns(side: SideLengths) -> Columns:
    return [*_three("letters:", side.rewrite_letters), *_three("tokens:", side.rewrite_tokens)]


def _media_columns(side: SideLengths) -> Columns:
    if not side.media:
        return []
    several = sum(number > 1 for number in side.media)
    return [
        ("several", _share(several, len(side.media))),
        ("median\nwidth", f"{np.median(side.widths):.0f}"),
        ("median\nheight", f"{np.median(side.heights):.0f}"),
        ("smallest\nside", str(min(*side.widths, *side.heights))),
        ("largest\nside", str(max(*side.widths, *side.heights))),
    ]


def _clip_columns(side: SideLengths) -> Columns:
    return [*_three("frames:", side.frames), *_three("seconds:", side.seconds)]


def _lengths(
    rows: Sequence[Row], title: str, columns: Callable[[SideLengths], Columns], note: str
) -> Iterator[Table]:
    """Yield a table of lengths of both sides; none if there are no numbers."""
    found = [(split, task, side, columns(one.lengths[side])) for split, task, one in rows for side in SIDES]
    head = next(([name for name, _ in values] for *_, values in found if values), [])
    cells = [[*place, *(value for _, value in values)] for *place, values in found if values]
    if cells:
        yield Table(title, ["split", "task", "side", *head], cells, note=note)


def _three(name: str, values: Sequence[float]) -> Columns:
    """Return median, 95th percentile and maximum; nothing without values."""
    if not values:
        return []
    form = ".0f" if all(isinstance(value, int) for value in values) else ".1f"
    found = np.median(values), np.percentile(values, 95), max(values)
    heads = (f"{name}\nmedian", "\n95 %", "\nmost")
    return [(head, format(value, form)) for head, value in zip(heads, found, strict=True)]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}".replace("%", " %") if whole and part else "-"


def _mean(values: Sequence[int]) -> str:
    return f"{np.mean(values):.1f}" if any(values) else "-"


def _tell_broken(found: Inspection, console: Console) -> None:
    broken = [error for tasks in found.values() for task in tasks.values() for error in task.broken]
    if broken:
        read = sum(task.read for tasks in found.values() for task in tasks.values())
        are = counted(len(broken), "is broken", "are broken").replace(
            " ", f" of {read} pairs that were read ", 1
        )
        console.print(f"{are}. `rime shards check` lists all of the corpus.\n{first_lines(broken)}")


def _draw(
    found: Inspection, corpus: Path, output: Path, in_folder: bool, most: int, seed: int, console: Console
) -> None:
    """Write the contact sheet, one for each split if the output is a folder."""
    from rime_pl.report.contact_sheet import Section, contact_sheet
    from rime_pl.report.drawing import missing_letters

    sections, texts = {}, []
    for split, tasks in found.items():
        pairs = shown_pairs(tasks, most)
        of = sum(task.pairs for task in tasks.values())
        sections[split] = Section(
            f"split {split}: {len(pairs)} of {of:,} pairs, chosen with seed {seed}", pairs
        )
        texts += [text for pair in pairs for text in _texts(pair)]
    (output if in_folder else output.parent).mkdir(parents=True, exist_ok=True)
    name = corpus.resolve().name
    several = [(output / f"{split}.png", [one]) for split, one in sections.items()]
    for file, those in several if in_folder else [(output, [*sections.values()])]:
        contact_sheet(those, name).save(file)
        console.print(f"contact sheet: {file}")
    if missing := missing_letters(texts):
        console.print(
            f"no font on this machine has {missing[:10]!r}{' and others' if missing[10:] else ''}, so the "
            "sheet shows boxes there. Install a font of this script, such as one of Noto."
        )


def _texts(pair: Pair) -> Iterator[str]:
    for item in (pair.query, pair.target):
        if item is not None:
            yield from (item.text, item.instruction, item.rewrite or "")
