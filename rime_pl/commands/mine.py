"""`rime mine`: give the training pairs of a corpus hard negatives, found with a trained checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import TaskID

from rime_pl.backbone.adapters import read_contract
from rime_pl.bars import Bar
from rime_pl.commands.mine_report import Groups, write_report
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.faults import counted, first_lines
from rime_pl.datamodules.mining.choosing import Embedded, Mined, mine, modes_of
from rime_pl.datamodules.mining.items import Catalogue, StoredItems
from rime_pl.datamodules.mining.rules import Rules
from rime_pl.datamodules.mining.writing import TRAIN, write_mined, write_trace
from rime_pl.datamodules.shards import read_split
from rime_pl.errors import RimeError
from rime_pl.inference.loading import load
from rime_pl.inference.parts import PARTS, encode_in_parts
from rime_pl.inference.retriever import Retriever
from rime_pl.processing import RimeProcessor
from rime_pl.run_folder import RunFolder
from rime_pl.teacher.writing import refuse_output
from rime_pl.types import MODE_PAIRS, Item, Mode, Pair, Side

#: Mode pairs that find candidates if none are named.
DEFAULT_MODES = ("disc-disc", "gen-gen")


def run(
    *,
    run: Path,
    corpus: Path,
    output: Path,
    modes: list[str] | None = None,
    rules: Rules = Rules(),
    existing: Literal["keep", "replace"] | None = None,
    query_pictures: bool = False,
    batch_size: int = 32,
    device: str | None = None,
    base: str | None = None,
) -> int:
    """Give the training pairs of a corpus hard negatives, found with a trained checkpoint.

    A hard negative is a wrong target that the checkpoint finds nearly as near as the right one. Candidates
    are the targets of the training split, within one task and one gallery. What equals a right answer is
    dropped first, then what is too near to be wrong. Other splits are copied as they are. The output is a new
    corpus: train on it with --data.hard_negatives. Beside it lies a report with 20 examples. Look at them.

    Args:
        run: Folder of the run whose checkpoint finds the negatives.
        corpus: Corpus folder, made by `rime shards`.
        output: Corpus folder to write.
        modes: Mode pairs, query - target, that find candidates: disc-disc, gen-gen, gen-disc or disc-gen.
            Several give the union (default: disc-disc gen-gen). With gen, the model writes a rewrite of each
            item, which takes long. A pair of different modes needs a checkpoint of CMA.
        rules: Which candidates become hard negatives.
        existing: keep puts new negatives behind those that the corpus has already, replace drops the old
            ones; needed if it has some.
        query_pictures: Whether the picture of the query itself may be a negative, for tasks that ask for a
            changed picture.
        batch_size: Largest number of items in a forward.
        device: Device of the model, such as cpu or cuda (default: cuda if there is one).
        base: Folder or Hugging Face name of the base model (default: where it was in training).
    """
    stage, about = RunFolder.with_adapter(run), read_corpus(corpus)
    pairs = _checked(DEFAULT_MODES if modes is None else modes, batch_size)
    _refuse_untrained(stage, pairs)
    refuse_output(output, corpus)
    order = Order(stage, corpus, about, output, pairs, rules, existing, query_pictures, batch_size)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    catalogue = order.look(console)
    model = load(stage.path, device or ("cuda" if torch.cuda.is_available() else "cpu"), base)
    console.print(f"run: {stage}")
    _warn_of_two_spaces(stage, pairs, console)
    return order.mine(catalogue, model, console)


def _checked(modes: Sequence[str], batch_size: int) -> list[str]:
    if not modes or (unknown := [name for name in modes if name not in MODE_PAIRS]):
        named = repr(unknown[0]) if modes else "none"
        raise RimeError(
            f"--modes must name mode pairs, query - target, some of {' '.join(MODE_PAIRS)}, but "
            f"names {named}."
        )
    if batch_size < 1:
        raise RimeError(f"--batch_size must be 1 or more, but is {batch_size}.")
    return list(dict.fromkeys(modes))


def _refuse_untrained(stage: RunFolder, pairs: Sequence[str]) -> None:
    """Raise if a mode pair needs what the run did not train: its scores would be noise."""
    written = [pair for pair in pairs if "gen" in pair]
    if written and stage.settings.get("data", {}).get("rewrites") == "none":
        raise RimeError(
            f"--modes must be disc-disc, because {stage} was trained without rewrites (data.rewrites none), "
            f"but names {written[0]}."
        )


def _warn_of_two_spaces(stage: RunFolder, pairs: Sequence[str], console: Console) -> None:
    mixed = [pair for pair in pairs if len(set(pair.split("-"))) > 1]
    model = stage.settings.get("model", {})
    if mixed and "lambda_ce" in model and "lambda_cma" not in model:
        console.print(
            f"warning: {stage} is a run of SFT, whose two modes lie in two spaces, so the candidates of "
            f"{' and '.join(mixed)} are nearly by chance. Use a run of CMA."
        )


@dataclass(frozen=True)
class Order:
    """What is to be mined, and how."""

    run: RunFolder
    corpus: Path
    about: dict[str, Any]  # corpus.json
    output: Path
    modes: list[str]
    rules: Rules
    existing: Literal["keep", "replace"] | None
    query_pictures: bool
    batch_size: int

    def look(self, console: Console) -> Catalogue:
        """Look at every training sample once, and refuse what would be lost silently."""
        if TRAIN not in self.about["splits"]:
            raise RimeError(
                f"{self.corpus} must have the split 'train', but has {list(self.about['splits'])}."
            )
        catalogue = Catalogue(read_split(self.corpus, TRAIN))
        with _bars(console, {f"reading {self.corpus.name}": len(catalogue.entries)}) as (each,):
            catalogue.look(each)
        if catalogue.with_negatives and self.existing is None:
            have = counted(catalogue.with_negatives, "training pair has", "training pairs have")
            raise RimeError(
                f"--existing must say what becomes of old negatives: {have} hard negatives already. "
                "`--existing keep` puts the new ones behind them, `--existing replace` drops them."
            )
        return catalogue

    def mine(self, catalogue: Catalogue, model: Retriever, console: Console) -> int:
        """Embed, choose, write and report; return the exit code."""
        unusable: dict[str, str] = {}
        found: dict[tuple[str, str], Mined] = {}
        of_side = {
            side: list(dict.fromkeys(modes_of(pair)[number] for pair in self.modes))
            for number, side in enumerate(("queries", "targets"))
        }
        groups = catalogue.groups.values()
        totals = {
            "embedding items": sum(len(group.queries) + len(group.targets) for group in groups),
            "comparing queries": sum(len(group.asked) for group in groups),
        }
        with _bars(console, totals) as (each, compared):
            for name, group in sorted(catalogue.groups.items()):
                embed = partial(self._embed, catalogue, model, unusable, each)
                queries = embed(group.queries, of_side["queries"])
                targets = embed(list(group.targets), of_side["targets"])
                found[name] = mine(
                    *(group, catalogue, (queries, targets), self.modes, self.rules),
                    *(self.existing == "keep", self.query_pictures, _device(model), compared),
                )
        chosen = {row: choices for mined in found.values() for row, choices in mined.chosen.items()}
        others = sum(len(told["shards"]) for split, told in self.about["splits"].items() if split != TRAIN)
        with _bars(console, {f"writing {self.output.name}": len(catalogue.entries) + others}) as (each,):
            keep = self.existing == "keep"
            write_mined(
                *(self.corpus, self.about, self.output, catalogue, chosen, keep, self._record(model, found)),
                each,
            )
        return self._tell(catalogue, found, unusable, console)

    def _embed(
        self,
        catalogue: Catalogue,
        model: Retriever,
        unusable: dict[str, str],
        each: Callable[[int], object],
        numbers: list[int],
        modes: Sequence[Mode],
    ) -> Embedded:
        """Return the embeddings of some items; those that cannot be embedded are added to ``unusable``."""
        items = Usable(StoredItems(catalogue, numbers), model.backbone.processor, self._cuts)
        digests = [catalogue.identities[number].look for number in numbers]
        vectors = encode_in_parts(model, items, digests, modes, self.batch_size, each)
        unusable.update({items.items.name(row): says for row, says in vectors.unusable.items()})
        place = {number: row for row, number in enumerate(numbers) if row not in vectors.unusable}
        return Embedded(place, vectors.of_mode)

    @property
    def _cuts(self) -> bool:
        """Whether the run cuts texts that are too long; otherwise each breaks its sample."""
        settings = self.run.settings if self.run.config.is_file() else {}
        return bool(settings.get("data", {}).get("too_long") == "cut")

    def _record(self, model: Retriever, found: Groups) -> dict[str, Any]:
        """Return what the corpus.json of the output says of its negatives."""
        contract = read_contract(self.run.adapter)
        return {
            "run": str(self.run),
            "adapter": contract["weights_hash"],
            "base": contract["base_hash"],
            "corpus": self.about["data_hash"],
            "modes": self.modes,
            **asdict(self.rules),
            "range_max": self.rules.last_rank,
            "existing": self.existing,
            "query_pictures": self.query_pictures,
            "negatives": sum(len(choices) for mined in found.values() for choices in mined.chosen.values()),
        }

    def _tell(
        self, catalogue: Catalogue, found: Groups, unusable: Mapping[str, str], console: Console
    ) -> int:
        """Print the tables, write the report beside the corpus, and return the exit code."""
        folder = self.output.with_name(f"{self.output.name}.mined")
        folder.mkdir(parents=True, exist_ok=True)
        tables = write_report(folder, catalogue, found, self.rules, f"{self.corpus}, mined with {self.run}")
        chosen = {row: choices for mined in found.values() for row, choices in mined.chosen.items()}
        write_trace(folder / "negatives.jsonl", catalogue, chosen)
        for table in tables:
            console.print(table.terminal())
        broken, others = list(catalogue.broken.values()), list(unusable.values())
        if broken:
            were = counted(len(broken), "sample cannot be read and was", "samples cannot be read and were")
            console.print(f"{were} left out:\n{first_lines(broken)}")
        if others:
            are = counted(len(others), "item cannot be embedded and is", "items cannot be embedded and are")
            console.print(f"{are} no candidate; its pair gets no negatives:\n{first_lines(others)}")
        console.print(f"embeddings: kept in {self.run.path / PARTS}; delete them when you need the room")
        console.print(f"written: {self.output}\nlook at the examples: {folder / 'report.md'}")
        if not any(chosen.values()):
            console.print(
                "No pair got a hard negative. The first table says which rule drops the candidates."
            )
            return 1
        return 0


class Usable(Sequence[Item]):
    """Items as a training would take them: what breaks a sample there is an error here, too.

    Args:
        items: Of a corpus.
        processor: That of the model.
        cut: Whether texts that are too long are cut.
    """

    def __init__(self, items: StoredItems, processor: RimeProcessor, cut: bool) -> None:
        self.items, self.processor, self.cut = items, processor, cut

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Usable(self.items[index], self.processor, self.cut)
        item, name = self.items[index], self.items.name(index)
        side: Side = "query" if self.items.place(index).field == "query" else "target"
        pair, _ = self.processor.check(Pair(name, "", "", item, item), (side,), self.cut)
        return pair.query if side == "query" else pair.target


def _device(model: Retriever) -> torch.device:
    found = next(model.backbone.parameters()).device
    return torch.device("cpu") if found.type == "mps" else found


@contextmanager
def _bars(console: Console, totals: Mapping[str, int]) -> Iterator[list[Any]]:
    """Show progress bars, and give for each the function that advances it by 1 or by a number."""
    with Bar(console=console, transient=True) as progress:
        tasks = [progress.add_task(title, total=total) for title, total in totals.items()]
        yield [partial(_advance, progress, task) for task in tasks]


def _advance(progress: Bar, task: TaskID, count: int = 1) -> None:
    progress.advance(task, count)
