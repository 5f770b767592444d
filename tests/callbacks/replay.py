"""A module that replays hand-made embeddings whose recalls are known, and a small Trainer around it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rime_pl.types import Completions, EvalBatch, EvalOutput, Item, Prompts, Written, content_hash

WIDTH = 16
TASKS = ("names", "pictures", "hard")


def eval_batch(
    side: str, numbers: list[int], distractors: tuple[int, ...] = (), unannotated: tuple[int, ...] = ()
) -> EvalBatch:
    """Item i of either side has content ``c<i>``; task and gallery by i."""
    rows = len(numbers)
    ids, ones = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1, dtype=torch.int64)
    content = torch.tensor([content_hash(f"c{i}") for i in numbers])
    picture = Image.new("RGB", (8, 8), (40, 90, 160))
    return EvalBatch(
        side=side,  # type: ignore[arg-type]
        prompts=Prompts(ids, ones, None, None, torch.zeros(rows, dtype=torch.int64)),
        completions=Completions(ids, ones),
        item_ids=torch.tensor(numbers),
        content_ids=content,
        relevant_ids=content,
        distractor=torch.tensor([i in distractors for i in numbers]),
        datasets=[TASKS[i % 3] if side == "query" else "" for i in numbers],
        galleries=["all"] * rows,
        keys=[f"val-000000.tar/{i:04d}" for i in numbers],
        items=[
            Item(f"text {i}", (picture,), f"c{i}", rewrite=None if i in unannotated else f"reference {i}")
            for i in numbers
        ],
    )


def one_hot(places: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(places), WIDTH).float()


class Replay(pl.LightningModule):
    """Returns embeddings in which disc is right, gen is wrong for task ``hard``, empty is always wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.given: dict[int, list[int] | None] = {}  # item -> tokens of the rewrite of another

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        numbers = batch.item_ids.tolist()
        right = one_hot(numbers)
        wrong = one_hot([(i + 1) % 12 for i in numbers])
        hard = torch.tensor([[i % 3 == 2 and batch.side == "query"] for i in numbers])
        traces = {"reference": right, "empty": wrong} if batch.side == "query" else {}
        seconds = {"discriminative": 0.001 * len(numbers)}
        if not batch.generative:
            return EvalOutput(right, seconds)
        written = Written(
            gen=torch.where(hard, wrong, right),
            completions=Completions(100 + batch.item_ids.unsqueeze(1), torch.ones(len(numbers), 1)),
            ablation=traces,
            rewrites=[f"own {i}" for i in numbers],
            lengths=torch.full((len(numbers),), 4 if batch.side == "query" else 8),
            well_formed=torch.tensor([i % 4 != 0 for i in numbers]),
        )
        return EvalOutput(right, seconds | {"generative": 0.01 * len(numbers)}, written)

    test_step = validation_step

    def embed_rewritten(self, batch: EvalBatch, rewrites: list[list[int] | None]) -> torch.Tensor:
        """The token of item i's rewrite is 100 + i, and it finds item i. Notes which item got which."""
        self.given.update(zip(batch.item_ids.tolist(), rewrites, strict=True))
        return one_hot([0 if rewrite is None else rewrite[0] - 100 for rewrite in rewrites])


def loaders(batches: dict[str, list[EvalBatch]]) -> list[DataLoader]:
    return [DataLoader(batches[side], batch_size=None) for side in ("query", "target")]


def splits(distractors: tuple[int, ...] = ()) -> dict[str, list[EvalBatch]]:
    gallery = [*range(12), *distractors]
    return {
        "query": [eval_batch("query", [0, 1, 2, 3, 4]), eval_batch("query", [5, 6, 7, 8, 0])],  # 0 twice
        "target": [eval_batch("target", gallery[:5]), eval_batch("target", gallery[5:], distractors)],
    }


def trainer(tmp_path: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
