"""The code in a model card runs as it is written there, and its numbers are those of the run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rime_pl
from rime_pl.export.exporting import Order, export
from rime_pl.inference.sources import to_item
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.types import MODE_PAIRS, Item
from tests.families import noise

KINDS = [("qwen3_vl", "sentence-transformers", 3), ("qwen2_vl", "huggingface", 2), ("qwen2_5_vl", "peft", 2)]


def blocks(card: str) -> list[str]:
    """Return the blocks of Python in a card."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize(("family", "to", "count"), KINDS)
def test_the_snippets_run_and_give_our_vectors(
    family: str,
    to: str,
    count: int,
    exported: Callable[..., Path],
    family_run: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise(5, 90, 60).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found = blocks((exported(family, to) / "README.md").read_text())
    assert len(found) == count
    for code in found:
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "card", "exec"), names)
        if "discriminative" in names:
            run = rime_pl.load(family_run(family))
            photo = Item("in green", (tmp_path / "photo.jpg",), instruction="Find the cat.")
            assert float(names["discriminative"][0] @ run.encode(photo)) >= 0.9999
            assert names["rewrite"] == run.rewrite(photo)
            # a random model writes bytes that are no text, and the text of them has other tokens
            processor = run.backbone.processor
            processor.prompt.max_rewrite_tokens = 1000
            prompts = processor.prompts([to_item(photo)])
            with torch.no_grad():
                read = run.backbone(prompts, processor.completions([names["rewrite"]])).gen
            assert float(names["generative"][0] @ read[0]) >= 0.9999
        if "documents" in names:
            assert names["documents"].shape == (3, 64) and names["query"].shape == (64,)


def metadata(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


def test_metadata_and_results(family_run: Callable[[str], Path], tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(family_run("qwen2_vl"), tmp_path / "run"))
    recall = dict(zip(MODE_PAIRS, (0.91, 0.82, 0.85, 0.84), strict=True))
    after = {
        "recall@1": recall,
        "ci": {pair: [value - 0.02, value + 0.02] for pair, value in recall.items()},
        "dimensions": {"32": recall},
    }
    write_json(run.path / "summary.json", {"after": after, "queries": 400, "gallery": 99, "chance": 0.0101})
    write_json(run.path / "manifest.json", {"data": "data/photos"})
    run.config.write_text(yaml.safe_dump({"model": {"dimensions": [32]}}))
    order = Order(
        "sentence-transformers",
        run.path,
        tmp_path / "photo-finder",
        truncate_dim=32,
        base_name="Qwen/Qwen2-VL-2B-Instruct",
        licence="apache-2.0",
    )
    export(order, lambda line: None)
    card = (order.output / "README.md").read_text()
    facts = metadata(card)
    assert facts["library_name"] == "sentence-transformers" and facts["pipeline_tag"] == "feature-extraction"
    assert facts["base_model"] == "Qwen/Qwen2-VL-2B-Instruct" and facts["base_model_relation"] == "finetune"
    assert facts["license"] == "apache-2.0" and facts["datasets"] == ["photos"]
    metrics = [metric for result in facts["model-index"][0]["results"] for metric in result["metrics"]]
    assert {one["name"]: one["value"] for one in metrics} == {f"recall@1 {p}": v for p, v in recall.items()}
    assert "| gen-disc | 0.850 | 0.83 - 0.87 |" in card and "| 32 | 0.910 |" in card
    assert "The server was not tested" in card
    config = json.loads((order.output / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [32]
    from sentence_transformers import SentenceTransformer

    short = SentenceTransformer(str(order.output), device="cpu")
    whole = torch.tensor(short.encode("a cat", truncate_dim=64))
    assert torch.allclose(torch.tensor(short.encode("a cat")), whole[:32], atol=1e-6)


def test_an_adapter_names_its_relation(exported: Callable[..., Path]) -> None:
    facts = metadata((exported("qwen2_5_vl", "peft") / "README.md").read_text())
    assert facts["base_model_relation"] == "adapter" and facts["library_name"] == "peft"
    assert facts["license"] == "unknown" and "model-index" not in facts
