"""The model card of an export: what it is, how good it is, and code that runs as it is written there.

Called by exporting.py. The parts with code are in snippets.py; a test takes them out of a written card and
runs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rime_pl.export import snippets
from rime_pl.export.measuring import Measured
from rime_pl.inference.retriever import Retriever
from rime_pl.report.table import Table
from rime_pl.run_folder import RunFolder, write_json, write_text
from rime_pl.types import MODE_PAIRS

#: Ranges of the dimensions, for indexes that store int8.
RANGES_FILE = "int8_ranges.json"
_LIBRARIES = {"huggingface": "transformers", "peft": "peft", "sentence-transformers": "sentence-transformers"}


@dataclass(frozen=True)
class Facts:
    """What the user says of an export, and what its files say."""

    to: str
    output: str
    licence: str
    base_name: str | None
    dimensions: Sequence[int]
    prompts: Mapping[str, str]

    @property
    def name(self) -> str:
        """The name of the model: that of its folder."""
        return Path(self.output).name


def write_card(
    folder: Path,
    facts: Facts,
    source: Retriever,
    contract: Mapping[str, Any],
    parity: Mapping[str, Any],
    measured: Measured | None,
) -> None:
    """Write README.md, and the ranges of int8 where they were measured.

    Args:
        folder: Of the export.
        facts: Of the export.
        source: The trained model.
        contract: Of the export, or of its adapter.
        parity: As parity.json has it.
        measured: Recalls on the test split; None where they were not asked for.
    """
    stage = source.run if source.run is not None and source.run.reported else None
    results = _results(stage, measured)
    if measured is not None:
        write_json(folder / RANGES_FILE, measured.ranges)
    base = facts.base_name or source.backbone.config.name_or_path
    parts = [
        f"---\n{_metadata(facts, stage, contract, results)}\n---",
        f"# {facts.name}",
        _opening(facts, source, contract),
        *_tables(facts, stage, results, measured),
        snippets.of(facts.to, facts.output, base, facts.prompts, source.tasks, source.backbone, parity),
        _limits(source, parity),
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _results(stage: RunFolder | None, measured: Measured | None) -> dict[str, float]:
    """Return recall@1 of each mode pair: of these weights if they were measured, else those of the run."""
    if measured is not None:
        return dict(measured.export or measured.run)
    return dict(stage.summary["after"].get("recall@1", {})) if stage is not None and stage.tested else {}


def _corpus(stage: RunFolder | None) -> str:
    return Path(stage.manifest["data"]).name if stage is not None and stage.manifest.get("data") else ""


def _metadata(
    facts: Facts, stage: RunFolder | None, contract: Mapping[str, Any], results: Mapping[str, float]
) -> str:
    corpus = _corpus(stage)
    found = [
        EvalResult(
            task_type="retrieval",
            task_name="Retrieval, query mode - target mode",
            dataset_type=corpus or "unknown",
            dataset_name=f"{corpus or 'unknown'} (test)",
            metric_type="recall_at_1",
            metric_name=f"recall@1 {pair}",
            metric_value=round(value, 4),
        )
        for pair, value in results.items()
    ]
    data = ModelCardData(
        license=facts.licence,
        library_name=_LIBRARIES[facts.to],
        pipeline_tag="feature-extraction",
        base_model=facts.base_name or Path(contract["base"]).name,
        base_model_relation="adapter" if facts.to == "peft" else "finetune",
        datasets=[corpus] if corpus else None,
        tags=["rime", "multimodal", "feature-extraction", "sentence-similarity", "visual-document-retrieval"],
        model_name=facts.name,
        eval_results=found or None,
    )
    return str(data.to_yaml()).strip()


def _opening(facts: Facts, source: Retriever, contract: Mapping[str, Any]) -> str:
    base, merged = facts.base_name or Path(contract["base"]).name, contract.get("merged", {})
    first = [
        "Embeds texts, pictures, several pictures, clips and mixtures of them as vectors of "
        f"{source.dimension} numbers.",
        f"It was trained from `{base}` with rime_pl, after RIME "
        "([arXiv 2604.22280](https://arxiv.org/abs/2604.22280)).",
    ]
    if facts.dimensions:
        lengths = ", ".join(map(str, facts.dimensions))
        first.append(f"It was also trained for the lengths {lengths}: cut a vector and normalise it again.")
    if merged.get("trained_in_4bit") and facts.to != "peft":
        first.append(_MERGED[merged["weights"]])
    return " ".join(first) + "\n\n" + _MODES


_MERGED = {
    "trained": "LoRA was merged into the dequantised NF4 values for which it was trained.",
    "original": "LoRA was merged into the original values of the base model, but was trained for their NF4 "
    "values: `parity.json` says how far the vectors are from those of the run.",
}
_MODES = (
    "It has two modes. The *discriminative* vector needs one forward. The *generative* vector is read after "
    "the model has rewritten the item, which takes longer. Any mode of a query can search any mode of the "
    "targets if the training had cross-mode alignment."
)


def _tables(
    facts: Facts, stage: RunFolder | None, results: Mapping[str, float], measured: Measured | None
) -> list[str]:
    if not results:
        return []
    found = ["## Results", (_compared(measured) if measured else _of_run(stage, results)).markdown()]
    after = stage.summary["after"] if stage is not None and stage.tested else {}
    if lengths := after.get("dimensions"):
        pairs = [pair for pair in MODE_PAIRS if pair in next(iter(lengths.values()))]
        rows = [[size, *(f"{value[pair]:.3f}" for pair in pairs)] for size, value in lengths.items()]
        note = "Of the run: recall@1 with the first numbers of each vector."
        found.append(Table("Shorter vectors", ["length", *pairs], rows, note=note).markdown())
    if measured is not None:
        found.append(_stored(measured).markdown())
        found.append(f"`{RANGES_FILE}` has the least and the greatest value of each dimension, for int8.")
    return found


def _compared(measured: Measured) -> Table:
    """Return recall@1 of the run and of the exported weights, as both were measured by the export."""
    sides = {"recall@1 of the run": measured.run}
    if measured.export is not None:
        sides["recall@1 of these weights"] = measured.export
    rows = [[pair, *(f"{side[pair]:.3f}" for side in sides.values())] for pair in measured.run]
    note = f"{measured.queries} queries, {measured.gallery} targets, mean over {', '.join(measured.tasks)}."
    return Table("", ["query mode - target mode", *sides], rows, note=note)


def _of_run(stage: RunFolder | None, results: Mapping[str, float]) -> Table:
    """Return recall@1 as the run has measured it."""
    assert stage is not None, "results are those of a run"
    summary = stage.summary
    rows = [
        [pair, f"{value:.3f}", " - ".join(f"{bound:.2f}" for bound in summary["after"]["ci"].get(pair, ()))]
        for pair, value in results.items()
    ]
    note = (
        f"Test split of {_corpus(stage)}: {summary['queries']} queries, {summary['gallery']} distinct "
        f"targets in the smallest one, chance {summary['chance']:.4f}. Measured by the run before the merge."
    )
    return Table("", ["query mode - target mode", "recall@1", "95 % interval"], rows, note=note)


def _stored(measured: Measured) -> Table:
    lengths = list(next(iter(measured.stored.values())))
    rows = [[kind, *(f"{values[size]:.3f}" for size in lengths)] for kind, values in measured.stored.items()]
    note = "recall@1 of disc-disc. The targets are stored so, and the queries are float32."
    return Table("Stored vectors", ["type", *(f"{size} numbers" for size in lengths)], rows, note=note)


def _limits(source: Retriever, parity: Mapping[str, Any]) -> str:
    prompt = source.backbone.processor.prompt
    lines = [
        "Pictures must be upright, 8-bit RGB, and on white where they are transparent. "
        "`rime_pl.media.open_picture` makes them so. Other libraries open them in their own ways.",
        "Give a clip as its frames with their times. Files of videos are refused, because every library "
        "chooses other frames.",
        f"Vectors were compared on the items in `parity.json`, as {parity['dtype']} on {parity['device']}. "
        "Another type or attention kernel rounds differently.",
    ]
    if reason := parity["left_out"].get("clip"):
        lines.append(f"Clips are refused: {reason}")
    if prompt.max_text_tokens:
        lines.append(
            f"Training cut texts after {prompt.max_text_tokens} tokens, and so does rime_pl. Other libraries "
            "do not: cut longer texts yourself."
        )
    if prompt.max_page_pixels or prompt.min_page_pixels:
        lines.append("Pages of documents had sizes of their own. Other libraries read them as pictures.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
