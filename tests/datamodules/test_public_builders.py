"""Every builder of a training set: from a tiny source to shards, to three training steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_sources as tiny
import torch

from rime_pl.backbone.mllm import Backbone
from rime_pl.commands.shards import SUBCOMMANDS
from rime_pl.datamodules.shards import ShardReader, read_corpus, read_split
from rime_pl.modules.sft import SFTModule
from rime_pl.options.parser import arguments
from rime_pl.types import Pair

Write = Callable[[Path], dict[str, Any]]
#: Name of the builder, and what writes its source and returns its options.
BUILDERS: dict[str, tuple[str, Write]] = {
    "mmeb-train": ("mmeb-train", tiny.mmeb_train),
    "coco": ("coco", tiny.karpathy),
    "flickr30k": ("flickr30k", partial(tiny.karpathy, name="flickr30k")),
    "colpali, page": ("colpali", partial(tiny.colpali, task="page")),
    "colpali, qa": ("colpali", partial(tiny.colpali, task="qa")),
    "visrag": ("visrag", tiny.visrag),
    "ume-r1, SFT": ("ume-r1", tiny.ume_sft),
    "ume-r1, RL": ("ume-r1", tiny.rl),
    "rime-json, SFT": ("rime-json", tiny.rime_sft),
    "rime-json, RL": ("rime-json", partial(tiny.rl, name="RIME-rl.json")),
    "llava-hound": ("llava-hound", tiny.llava_hound),
    "folder, captions": ("folder", tiny.captions),
    "folder, videos and pages": ("folder", tiny.videos_and_pages),
}


def build(builder: str, tmp_path: Path, options: dict[str, Any], **more: Any) -> Path:
    output = tmp_path / "corpus"
    settings = {**tiny.SHARES, "workers": 1, **options, **more}
    given = {"output": output, **{name: value for name, value in settings.items() if value is not None}}
    SUBCOMMANDS[builder](**arguments(SUBCOMMANDS[builder], given))
    return output


def read_all(corpus: Path) -> dict[str, list[Pair]]:
    splits = {}
    for split in read_corpus(corpus)["splits"]:
        reader = ShardReader(read_split(corpus, split))
        splits[split] = [reader.read(number) for number in range(len(reader))]
    return splits


@pytest.fixture(scope="module")
def backbone(make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone()


@pytest.mark.parametrize("case", BUILDERS)
def test_from_the_source_to_three_training_steps(case: str, tmp_path: Path, backbone: Backbone) -> None:
    builder, write = BUILDERS[case]
    corpus = build(builder, tmp_path, write(tmp_path / "source"))
    splits = read_all(corpus)
    pairs = [backbone.processor.check(pair)[0] for pair in splits["train"]]
    assert all(pair.source and pair.target.content_id for pair in pairs)
    groups = [{pair.target.content_id for pair in splits[split]} for split in ("train", "val", "test")]
    if all(pair.target.media for split in splits.values() for pair in split):
        assert not any(groups[n] & groups[(n + 1) % 3] for n in range(3))
    module, losses = SFTModule(backbone.config), []
    module.backbone = backbone
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before = [parameter.detach().clone() for parameter in trained]
    for step in range(3):
        batch = backbone.processor.training_batch([pairs[(step + n) % len(pairs)] for n in range(4)])
        loss = module.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    assert any(not old.equal(new) for old, new in zip(before, trained, strict=True))


def test_mmeb_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = build("mmeb-train", tmp_path, tiny.mmeb_train(tmp_path / "source"))
    pairs = [pair for split in read_all(corpus).values() for pair in split]
    assert len(pairs) == 6 * 24  # the rows of train-* are not read again
    by_key = {pair.key.partition("/")[2]: pair for pair in pairs}
    cirr = by_key["CIRR-original-00000-of-00001-00000003"]
    assert cirr.source == "CIRR/original-00000-of-00001.parquet row 3"
    assert cirr.query is not None and cirr.query.text == "Make 2." and len(cirr.query.media) == 1
    assert cirr.query.instruction.endswith("with the described changes:")
    assert cirr.target.text == "" and cirr.target.instruction == "Represent the given image."
    assert cirr.target.content_id == "images/CIRR/Train/pos_2.jpg"
    web = by_key["WebQA-original-00000-of-00001-00000001"]
    assert web.query is not None and web.query.text == "Which is 0?" and not web.query.media
    assert web.target.text == "Bird 0" and len(web.target.media) == 1
    crop = by_key["MSCOCO-original-00000-of-00001-00000002"].query
    assert crop is not None and crop.text == '"cycle 1"' and "isolate the object" in crop.instruction
    said = capsys.readouterr().out
    assert "24 x placeholder without a medium, dropped" in said
    assert "A-OKVQA: 24 rows, but about 17,100 expected (-17,076)" in said and "VisDial: 0 rows" in said
    about = read_corpus(corpus)
    assert about["rows"]["CIRR"] == {"read": 24, "expected": 26100} and about["refused"] == {}


def test_mmeb_train_of_chosen_subsets_and_the_other_wording(tmp_path: Path) -> None:
    options = tiny.mmeb_train(tmp_path / "source")
    folder = tmp_path / "source" / "CIRR"
    (folder / "original-00000-of-00001.parquet").rename(folder / "diverse_instruction-00000-of-00001.parquet")
    corpus = build("mmeb-train", tmp_path, options, subsets=["CIRR"], instructions="diverse")
    assert read_corpus(corpus)["rows"] == {"CIRR": {"read": 24, "expected": 26100}}
    assert json.loads((corpus / "corpus.json").read_text())["arguments"]["instructions"] == "diverse"
