"""Text and pictures arrive in TensorBoard, with the right answer marked where it was found."""

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from replay import Replay, eval_batch, loaders, splits, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from rime_pl.callbacks.rewrite_samples import RewriteSamples
from rime_pl.report import sheets
from rime_pl.types import EvalOutput, content_hash


def test_rewrites_and_retrieval_are_written_to_tensorboard(tmp_path: Path) -> None:
    callback = RewriteSamples(num_samples=4, top_k=3)
    run = trainer(tmp_path, callback)
    run.loggers = [TensorBoardLogger(tmp_path, name="tensorboard", version="")]
    run.validate(Replay(), loaders(splits()), verbose=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {"val/retrieval/gen-gen", "val/retrieval/disc-disc"}
    text = events.Tensors("val/rewrites/text_summary")[0].tensor_proto.string_val[0].decode()
    lines = text.splitlines()
    assert len(lines) == 2 + 4
    # one query of each of three tasks, then a second of the first; sorted by task
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| hard", "| hard", "| names", "| pictures"]
    hard, names = lines[2], lines[4]
    assert "reference 2" in hard and "own 2" in hard
    assert "wrong: own 3 | right |" in hard  # gen-gen finds the neighbour, disc-disc the right one
    assert "right | right |" in names


def test_samples_stand_where_lightning_logs_the_validation(tmp_path: Path) -> None:
    """At the last batch, counted from 0. A resume drops what stands at the number of batches trained."""
    run = trainer(tmp_path, RewriteSamples(), max_epochs=1)
    run.loggers = [TensorBoardLogger(tmp_path, name="tensorboard", version="")]
    run.fit(Replay(), DataLoader(list(range(4)), batch_size=1), loaders(splits()))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [one.step for one in events.Tensors("val/rewrites/text_summary")] == [3]
    assert [one.step for one in events.Images("val/retrieval/gen-gen")] == [3]


def test_samples_do_not_depend_on_order_and_leave_distractors_out() -> None:
    module = Replay()

    def seen(order: list[int]) -> RewriteSamples:
        callback = RewriteSamples(num_samples=2)
        for number in order:
            batch = eval_batch("query", [number])
            callback._add(batch, module.validation_step(batch, 0))
        gallery = eval_batch("target", [0, 1, 12], (12,))
        callback._add(gallery, module.validation_step(gallery, 0))
        return callback

    one, other = seen([0, 3, 6, 9, 1, 4]), seen([9, 6, 4, 1, 3, 0])
    assert [s.item_id for s in one._samples()] == [s.item_id for s in other._samples()] == [0, 1]
    contents = [{hit.content for hit in found} for found in one._best["gen"]]
    assert contents == [{content_hash("c0"), content_hash("c1")}] * 2


def test_only_pictures_that_may_be_shown_are_kept() -> None:
    """Of 300 gallery items; the best are those of the whole gallery, whatever the batches."""
    torch.manual_seed(0)
    numbers, found = list(range(300)), {}
    disc = torch.randn(300, 16)
    for size in (300, 7):
        callback = RewriteSamples(num_samples=4, top_k=3)
        for side, items in (("query", numbers[:60]), ("target", numbers)):
            for start in range(0, len(items), size):
                some = items[start : start + size]
                callback._add(eval_batch(side, some), EvalOutput(disc[some], {}))
        assert sum(len(known) for known in callback._queries.values()) == 0
        kept = [hit.item for hits in callback._best["disc"] for hit in hits]
        assert len(callback._samples()) == 4 and len(kept) == 4 * 3
        found[size] = [[(hit.content, hit.score) for hit in hits] for hits in callback._best["disc"]]
    for sample, whole, pieces in zip(callback._samples(), *found.values(), strict=True):
        scores = disc @ sample.vectors["disc"]
        expected = [content_hash(f"c{n}") for n in scores.topk(3).indices.tolist()]
        assert [content for content, _ in whole] == [content for content, _ in pieces] == expected


def test_no_logger_no_work(tmp_path: Path) -> None:
    callback = RewriteSamples()
    trainer(tmp_path, callback).validate(Replay(), loaders(splits()), verbose=False)
    assert callback._best == {} and callback._queries == {}


def test_sheet_frames_say_right_and_wrong() -> None:
    item = eval_batch("target", [0]).items[0]
    row = sheets.SheetRow(
        sheets.Card(item, "query"), [sheets.Card(item, "1.", True), sheets.Card(item, "2.", False)]
    )
    pixels = np.asarray(sheets.sheet([row]))
    left = sheets.GAP + sheets.SIDE + 2 * sheets.GAP
    middle = sheets.GAP + 6 + sheets.SIDE // 2
    for number, colour in enumerate((sheets.RIGHT, sheets.WRONG)):
        frame = pixels[middle, left + number * (sheets.SIDE + sheets.GAP) + 1]
        assert "#" + "".join(f"{value:02x}" for value in frame) == colour
