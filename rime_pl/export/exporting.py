"""Make an export: merge, write, compare, describe; the folder appears only when all of that went well.

Called by `rime export`.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from rime_pl import __version__
from rime_pl.backbone.adapters import contract_in
from rime_pl.backbone.base_path import find_base
from rime_pl.backbone.config import Dtype
from rime_pl.errors import RimeError
from rime_pl.export.card import Facts, write_card
from rime_pl.export.folders import reason_for_no_clips, write_adapter, write_checkpoint, write_modules
from rime_pl.export.measuring import Measured, corpus_of, measure
from rime_pl.export.merging import Weights, greedy, merged_model
from rime_pl.export.parity import (
    LEAST,
    Agreement,
    Vectors,
    as_json,
    cosines,
    in_peft,
    in_sentence_transformers,
    in_transformers,
    our_rewrites,
    our_vectors,
    rewritten,
)
from rime_pl.export.probes import NO_PROBE, OUTSIDE, affordable, probes
from rime_pl.inference.loading import load
from rime_pl.inference.retriever import Retriever
from rime_pl.processing import CONTRACT_FILE
from rime_pl.report.manifest import package_versions
from rime_pl.run_folder import write_json
from rime_pl.training_texts import choose_task
from rime_pl.types import Side

Kind = Literal["peft", "huggingface", "sentence-transformers"]
#: Names of a side in sentence-transformers.
SIDES: dict[str, Side] = {"query": "query", "document": "target"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is exported.

    Args:
        weights: Values that LoRA is merged into. trained are those of its training, dequantised if the base
            model is in 4 bits; original are those of the base model's files, for which LoRA was not trained.
        dtype: Type of the written weights, float32 or bfloat16 (default: that of the training).
        task: Task whose instructions are the prompts query and document (default: the first that asks in
            words alone for a picture).
        truncate_dim: Length to which sentence-transformers cuts vectors, one of model.dimensions (default:
            the whole length).
        measure: Whether recall on the run's test split is measured, of run and export, also for shorter,
            int8 and binary vectors.
        base_name: Hugging Face name of the base model, for the model card (default: as the run names it).
        licence: Licence of the weights, for the model card.
        device: Device for comparing and measuring, such as cpu or cuda (default: cuda if there is one).
        base: Folder or Hugging Face name of the base model (default: where it was in training).
    """

    weights: Weights = "trained"
    dtype: Dtype | None = None
    task: str | None = None
    truncate_dim: int | None = None
    measure: bool = False
    base_name: str | None = None
    licence: str = "unknown"
    device: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Order(Settings):
    """What is to be exported, as what, and where to."""

    to: Kind
    run: Path  # a run, or a folder with whole weights
    output: Path

    @property
    def place(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def export(
    order: Order, say: Callable[[str], None], prompt: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write an export and return what its parity.json holds.

    Args:
        order: What to do.
        say: Told what is done, line by line.
        prompt: For a released checkpoint, see ``loading.load``.

    Raises:
        RimeError: If something does not fit, or if a library gives other vectors than ours; then nothing is
            left of the export.
    """
    _refuse(order)
    source = load(order.run, order.place, order.base, prompt=prompt)
    dimensions = _dimensions(source)
    if order.truncate_dim is not None and order.truncate_dim not in dimensions:
        raise RimeError(
            "--truncate_dim must be a length that was trained (model.dimensions), "
            f"{' or '.join(map(str, dimensions)) or 'but none was'}, but is {order.truncate_dim}."
        )
    if order.measure:
        corpus_of(source, order.run)
    if not source.tasks:
        say("warning: the model keeps no instructions of tasks, so the prompts query and document are empty")
    prompts = _prompts(source, order.task)
    output = order.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{output.name}.half-", dir=output.parent))
    folder.chmod(0o755)  # as other new folders
    try:
        facts = Facts(order.to, str(order.output), order.licence, order.base_name, dimensions, prompts)
        parity = _Exported(order, source, folder, facts, say).make()
        folder.replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return parity


def _refuse(order: Order) -> None:
    if order.output.exists() and (not order.output.is_dir() or any(order.output.iterdir())):
        raise RimeError(f"--output {order.output} must be a new or empty folder, but is there already.")
    if order.to == "sentence-transformers" and find_spec("sentence_transformers") is None:
        raise RimeError(
            "--to sentence-transformers compares the vectors of that library with ours, but it is not "
            "installed. Run pip install 'rime_pl[sentence-transformers]'."
        )
    if order.to == "peft":
        given = {
            "weights": order.weights != "trained",
            "dtype": order.dtype,
            "truncate_dim": order.truncate_dim,
        }
        if unfit := [name for name, value in given.items() if value]:
            raise RimeError(f"--{unfit[0]} is not for --to peft, because an adapter is copied as it is.")
    if order.to != "sentence-transformers" and order.truncate_dim is not None:
        raise RimeError("--truncate_dim is for --to sentence-transformers only.")


def _dimensions(source: Retriever) -> list[int]:
    """Return the lengths that the run trained besides the whole one; an adapter alone does not say them."""
    if source.run is not None and source.run.config.is_file():
        return sorted(source.run.settings.get("model", {}).get("dimensions") or [])
    contract = Path(source.backbone.config.name_or_path) / CONTRACT_FILE
    return list(contract_in(contract).get("dimensions", [])) if contract.is_file() else []


def _prompts(source: Retriever, task: str | None) -> dict[str, str]:
    """Return the instructions of a task, as the prompts query and document."""
    if not source.tasks:
        return dict.fromkeys(SIDES, "")
    if task is None and not any(one.from_text and one.to_picture for one in source.tasks.values()):
        task = next(iter(source.tasks)) if len(source.tasks) == 1 else None
    chosen = choose_task(source.tasks, task)
    return {name: chosen.of(side) for name, side in SIDES.items()}


def _versions() -> dict[str, str]:
    found = {"rime_pl": __version__}
    if find_spec("sentence_transformers") is not None:
        found["sentence-transformers"] = metadata.version("sentence-transformers")
    return found


class _Exported:
    """One export on its way.

    Args:
        order: What to do.
        source: The trained model.
        folder: Where it is written, empty.
        facts: Of the card.
        say: Told what is done.
    """

    def __init__(
        self, order: Order, source: Retriever, folder: Path, facts: Facts, say: Callable[[str], None]
    ) -> None:
        self.order, self.source, self.folder, self.facts, self.say = order, source, folder, facts, say
        self.no_clips = reason_for_no_clips(source.backbone.processor)
        processor = source.backbone.processor
        self.items = probes(processor, facts.prompts["query"], not self.no_clips)
        self.embedded = affordable(processor, self.items)

    def make(self) -> dict[str, Any]:
        """Write everything into the folder and return its parity."""
        trained = our_vectors(self.source.backbone, self.embedded)
        rewrites = our_rewrites(self.source.backbone, self.embedded)
        contract = self._contract()
        if self.order.to == "peft":
            loaders = {"peft": self._peft(trained)}
            merge = None
        else:
            self._write(contract)
            exported = load(self.folder, self.order.place)
            ours = our_vectors(exported.backbone, self.embedded)
            merge = self._merge(trained, ours, rewrites, exported)
            loaders = self._compare(exported, ours)
        for name, agreement in loaders.items():
            self._accept(name, agreement, agreement.wrong() or agreement.wrong_rewrites())
        parity = self._parity(contract, loaders, merge)
        write_json(self.folder / "parity.json", parity)
        measured = self._measure() if self.order.measure else None
        write_card(self.folder, self.facts, self.source, contract, parity, measured)
        return parity

    def _contract(self) -> dict[str, Any]:
        backbone = self.source.backbone
        found = self.source.run.adapter if self.source.run else self.order.run.expanduser()
        path = found / CONTRACT_FILE
        contract = contract_in(path) if path.is_file() else {}
        dtype = self.order.dtype or backbone.config.dtype
        settings = {"load_in_4bit": False, "dtype": dtype, "attn_implementation": "sdpa"}
        base = self.order.base_name or contract.get("base") or backbone.config.name_or_path
        return {
            **backbone.processor.contract(),
            "base": base,
            "base_hash": contract.get("base_hash", backbone.base_hash),
            "backbone": {"name_or_path": base, **settings},
            "tasks": contract.get("tasks") or {},
            "dimensions": list(self.facts.dimensions),
            "merged": {
                "weights": self.order.weights,
                "trained_in_4bit": backbone.config.load_in_4bit,
                "adapter": contract.get("weights_hash", backbone.base_hash),
            },
        }

    def _write(self, contract: Mapping[str, Any]) -> None:
        backbone, order = self.source.backbone, self.order
        into = "the original" if order.weights == "original" else "its dequantised 4-bit"
        if not backbone.config.load_in_4bit:
            into = "its"
        self.say(f"merging LoRA into {into} weights, as {contract['backbone']['dtype']}")
        dtype = getattr(torch, contract["backbone"]["dtype"])
        model = merged_model(backbone, order.weights, dtype)
        write_checkpoint(model, backbone.processor, self.folder, contract, self.facts.dimensions)
        if order.to == "sentence-transformers":
            lengths = (self.facts.dimensions, order.truncate_dim)
            write_modules(self.folder, self.source.dimension, self.facts.prompts, *lengths)
        del model
        gc.collect()

    def _merge(
        self, trained: Vectors, ours: Vectors, rewrites: Mapping[str, str], exported: Retriever
    ) -> Agreement:
        """Compare the run with its merged weights. Of the original weights it is only told, not refused.

        Other rewrites are told, too: a rounded sum of weight and LoRA can choose another word.
        """
        written = rewritten(rewrites, our_rewrites(exported.backbone, self.embedded))
        before, after = self.source.backbone.processor, exported.backbone.processor
        tokens = {
            name: torch.equal(before.prompts([item]).input_ids, after.prompts([item]).input_ids)
            for name, item in self.items.items()
        }
        merge = Agreement(
            exported.backbone.config.attn_implementation, cosines(trained, ours), tokens, written
        )
        in_4bit = self.source.backbone.config.load_in_4bit
        if self.order.weights == "trained" or not in_4bit:  # without 4 bits both are the same weights
            rounded = exported.backbone.config.dtype != "float32" and not merge.wrong_tokens()
            remedy = "Give --dtype float32: a rounded sum loses small changes." if rounded else ""
            self._accept("the run itself", merge, merge.wrong(), remedy)
        else:
            self._accept("the run itself", merge, merge.wrong_tokens())
            self.say(
                f"merged into the base model's original weights: lowest cosine {merge.lowest():.4f} with the "
                "run, which learnt for 4-bit weights"
            )
        return merge

    def _compare(self, exported: Retriever, ours: Vectors) -> dict[str, Agreement]:
        given = (self.folder, exported.backbone, self.items, ours)
        loaders = {"transformers": in_transformers(*given)}
        if self.order.to == "sentence-transformers":
            loaders["sentence-transformers"] = in_sentence_transformers(*given)
        return loaders

    def _peft(self, trained: Vectors) -> Agreement:
        backbone = self.source.backbone
        stage = self.source.run
        if stage is None and not (self.order.run / "adapter_config.json").is_file():
            raise RimeError(f"--to peft needs a run with an adapter, but {self.order.run} is a whole model.")
        adapter = stage.adapter if stage else self.order.run
        base = find_base(adapter, contract_in(adapter / CONTRACT_FILE), self.order.base)
        named = self.order.base_name or base
        write_adapter(adapter, backbone.processor, self.folder, named, self.order.output)
        greedy(backbone).save_pretrained(self.folder)
        return in_peft(self.folder, base, backbone, self.items, trained)

    def _accept(self, name: str, agreement: Agreement, wrong: str, remedy: str = "") -> None:
        if wrong:
            raise RimeError(
                f"{self.order.output} was not written: in {name}, {wrong}. "
                f"{remedy or 'Please report it, with the versions of `rime doctor`.'}"
            )
        self.say(f"{name}: lowest cosine {agreement.lowest():.7f}, attention {agreement.attention}")
        if others := [probe for probe, share in agreement.rewritten.items() if share < 1]:
            mean = fmean(agreement.rewritten.values())
            self.say(
                f"warning: {name} writes another rewrite of: {', '.join(others)} (equal from the beginning: "
                f"mean share {mean:.2f})"
            )

    def _parity(
        self, contract: Mapping[str, Any], loaders: Mapping[str, Agreement], merge: Agreement | None
    ) -> dict[str, Any]:
        told = "of the run" if self.order.to == "peft" else "of the exported weights, by rime_pl.load"
        return {
            "least": LEAST,
            "compared_with": f"vectors {told}",
            "dtype": contract["backbone"]["dtype"] if merge else self.source.backbone.config.dtype,
            "device": self.order.place,
            "versions": package_versions() | _versions(),
            "probes": {name: item.kinds for name, item in self.items.items()},
            "compared_by_tokens_only": [name for name in self.items if name not in self.embedded],
            "left_out": self._left_out(),
            "run": as_json(merge) if merge else None,
            "loaders": {name: as_json(agreement) for name, agreement in loaders.items()},
        }

    def _left_out(self) -> dict[str, str]:
        found = {name: NO_PROBE for name in OUTSIDE if name not in self.items}
        return {"clip": self.no_clips, **found} if self.no_clips else found

    def _measure(self) -> Measured:
        exported = None if self.order.to == "peft" else load(self.folder, self.order.place)
        return measure(self.source, exported, self.order.run, self.say)
