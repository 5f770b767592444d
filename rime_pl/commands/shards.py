"""Build a corpus folder (WebDataset shards), check one or the table of one, or look at what is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from rime_pl.commands.shards_inspect import inspect
from rime_pl.datamodules import plain_tars
from rime_pl.datamodules.builders import folder
from rime_pl.datamodules.builders.mini import builder as mini
from rime_pl.datamodules.builders.openmoji import builder as openmoji
from rime_pl.datamodules.builders.public import karpathy, llava_hound, mmeb_train, pages, ume_json
from rime_pl.datamodules.builders.scenes import builder as scenes
from rime_pl.datamodules.checking import check_corpus, check_table
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.faults import by_kind, counted, listed
from rime_pl.datamodules.pair_check import Checked, Limits
from rime_pl.errors import RimeError
from rime_pl.report.table import Table


def check(
    *,
    table: Path | None = None,
    media: Path | None = None,
    path: Path | None = None,
    base: str | None = None,
    batch_size: int = Limits.batch_size,
    max_text_tokens: int = Limits.max_text_tokens,
    max_rewrite_tokens: int = Limits.max_rewrite_tokens,
    max_media: int = Limits.max_media,
    val_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    shown: int = 100,
) -> Checked:
    """List all faults of a table (--table, --media) or a corpus (--path) before training.

    The exit code is 1 if there is a problem. Warnings alone give 0.

    Args:
        table: CSV, TSV, JSONL or Parquet file, as for `rime shards folder`; not given for a corpus.
        media: Folder of the files that the picture columns name; the folder of the table if not given.
        path: Corpus folder, made by `rime shards`; not given for a table.
        base: Checkpoint whose processor counts tokens; 4 characters count as a token if not given.
        batch_size: Number of pairs in a training batch (data.batch_size).
        max_text_tokens: Largest number of tokens of a text (model.backbone.prompt.max_text_tokens).
        max_rewrite_tokens: Largest number of tokens of a rewrite (model.backbone.prompt.max_rewrite_tokens).
        max_media: Largest number of pictures of an item (model.backbone.prompt.max_media).
        val_share: Share of the contents in the validation split, for rows without a split.
        test_share: Share of the contents in the test split, for rows without a split.
        seed: Seed of the split, for rows without a value in column 'split'.
        shown: Number of faults that are printed.
    """
    if (table is None) == (path is None):
        raise RimeError("`rime shards check` needs --table FILE or --path CORPUS, one of them.")
    limits = Limits(batch_size, max_text_tokens, max_rewrite_tokens, max_media)
    processor = None
    if base:
        from rime_pl.processing import RimeProcessor  # transformers takes seconds, so only if it is needed
        from rime_pl.prompts import PromptConfig

        processor = RimeProcessor.from_pretrained(base, PromptConfig())
    if path is not None:
        found = check_corpus(path, limits, processor)
    else:
        assert table is not None
        found = check_table(table, media, limits, processor, (val_share, test_share), seed)
    _print_check(found, str(path or table), "samples" if path else "rows", shown)
    return found


#: ``rime shards NAME``: the options are the arguments of the function.
SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "openmoji": openmoji.build,
    "scenes": scenes.build,
    "mini": mini.build,
    "folder": folder.build,
    "mmeb-train": mmeb_train.build,
    "coco": karpathy.build_coco,
    "flickr30k": karpathy.build_flickr30k,
    "colpali": pages.build_colpali,
    "visrag": pages.build_visrag,
    "ume-r1": ume_json.build_ume_r1,
    "rime-json": ume_json.build_rime_json,
    "llava-hound": llava_hound.build,
    "check": check,
    "inspect": inspect,
    "index": plain_tars.index,
}


def run(name: str, options: dict[str, Any]) -> int:
    """Build a corpus and print what is in it, or check or inspect one.

    Args:
        name: A key of ``SUBCOMMANDS``.
        options: Arguments of its function.
    """
    result = SUBCOMMANDS[name](**options)
    if name == "inspect":
        return 0
    if isinstance(result, Checked):
        return int(result.problems > 0)
    output = options["path" if name == "index" else "output"]
    corpus = read_corpus(output)
    rows = [
        [split, task, str(samples)]
        for split, about in corpus["splits"].items()
        for task, samples in about["tasks"].items()
    ]
    title = f"{output}  ({corpus['licence']})"
    Console().print(Table(title, ["split", "task", "samples"], rows).terminal())
    if name == "folder":
        _tell_kept(options["output"])
    return 0


def _tell_kept(output: Path) -> None:
    """Tell how many samples a build has kept that `rime shards check` calls a problem."""
    found = check_corpus(output, pictures=False)
    if found.kept:
        have = counted(found.faulty_kept, "sample that was kept has", "samples that were kept have")
        Console(highlight=False, markup=False, soft_wrap=True).print(
            f"By the limits of the recipe 2b, {have} a problem: {by_kind(found.kept)}. "
            f"`rime shards check --path {output}` lists them; for another recipe, give its limits there."
        )


def _print_check(found: Checked, name: str, what: str, shown: int) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    head = ["split", "task", "pairs", "contents", "with pictures", "annotated on both sides", "on one side"]
    rows = []
    for (split, task), counts in found.counts.items():
        numbers = (counts.pairs, len(counts.contents), counts.with_pictures)
        rows.append([split, task, *map(str, (*numbers, counts.annotated, counts.half_annotated))])
    console.print(Table(f"{name}: {what} that can be read", head, rows).terminal())
    if found.kept:
        have = counted(found.faulty_kept, "has", "have").replace(" ", f" of these {what} ")
        console.print(f"{have} a problem all the same; it is listed below.")
    for note in found.notes:
        console.print(note)
    totals = []
    for level in ("problem", "warning"):
        faults = [fault for fault in found.faults if fault.level == level]
        totals.append(counted(len(faults), level, f"{level}s"))
        if faults:
            console.print(f"\n{totals[-1]}:\n{listed(faults, shown)}")
    console.print(f"\n{', '.join(totals)}")
