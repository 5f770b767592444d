"""The callback inside a real Trainer, on hand-made embeddings whose recalls are known."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.retrieval_recall import RetrievalRecall
from rime_pl.types import (
    Completions,
    DataError,
    EvalBatch,
    EvalOutput,
    Item,
    ModeEmbeddings,
    Prompts,
    RimeError,
    content_hash,
)

WIDTH = 16
TASKS = ("names", "pictures", "hard")


def eval_batch(side: str, numbers: list[int], distractors: tuple[int, ...] = ()) -> EvalBatch:
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
        items=[Item(f"text {i}", (picture,), f"c{i}", rewrite=f"reference {i}") for i in numbers],
    )


def one_hot(places: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(places), WIDTH).float()


class Replay(pl.LightningModule):
    """Returns embeddings in which disc is right, gen is wrong for task ``hard``, empty is always wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.outputs = True

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        numbers = batch.item_ids.tolist()
        right = one_hot(numbers)
        wrong = one_hot([(i + 1) % 12 for i in numbers])
        hard = torch.tensor([[i % 3 == 2 and batch.side == "query"] for i in numbers])
        traces = {"reference": right, "shuffled": wrong, "empty": wrong} if batch.side == "query" else {}
        return EvalOutput(
            embeddings=ModeEmbeddings(right, torch.where(hard, wrong, right)),
            traces=traces,
            rewrites=[f"own {i}" for i in numbers],
            rewrite_lengths=torch.full((len(numbers),), 4 if batch.side == "query" else 8),
            well_formed=torch.tensor([i % 4 != 0 for i in numbers]),
            seconds={"discriminative": 0.001 * len(numbers), "generative": 0.01 * len(numbers)},
        )

    test_step = validation_step


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


def test_validation_logs_the_known_recalls(tmp_path: Path) -> None:
    callback = RetrievalRecall()
    run = trainer(tmp_path, callback)
    logged = run.validate(Replay(), loaders(splits()), verbose=False)[0]
    assert logged["val/recall@1/disc-disc"] == 1.0
    assert logged["val/recall@1/gen-gen"] == pytest.approx(2 / 3)  # macro over tasks, one is always wrong
    assert logged["val/recall@1/gen-disc"] == pytest.approx(2 / 3)
    assert logged["val/recall@1/disc-gen"] == 1.0
    assert logged["val/recall@1/gen-gen/hard"] == 0.0
    assert logged["val/oracle/recall@1"] == 1.0
    # the wrong score is 0 for all but one item: ties count against, so the rank is the last
    assert logged["val/recall@10/gen-gen"] == pytest.approx(2 / 3)
    assert logged["val/trace/own"] == pytest.approx(2 / 3) and logged["val/trace/reference"] == 1.0
    assert logged["val/trace/own-minus-empty"] == pytest.approx(2 / 3)
    assert logged["val/trace/room"] == pytest.approx(1 / 3)
    assert logged["val/gallery"] == 12 and logged["val/chance"] == pytest.approx(1 / 12)
    assert logged["val/queries"] == 9  # the repeat of query 0 is dropped
    assert logged["val/rewrite/mean_length"] == pytest.approx((9 * 4 + 12 * 8) / 21)
    assert logged["val/rewrite/well_formed"] == pytest.approx(1 - (3 + 3) / 21)
    assert logged["val/milliseconds/discriminative"] == pytest.approx(1.0)
    assert logged["val/milliseconds/generative"] == pytest.approx(10.0)
    low, high = callback.results["overall"]["ci"]["gen-gen"]
    assert low == high == pytest.approx(2 / 3)  # within a task all queries agree
    assert callback.results["all_gallery"] is None


def test_headline_tasks_choose_what_the_overall_numbers_average(tmp_path: Path) -> None:
    callback = RetrievalRecall(headline_tasks=["names", "pictures"])
    logged = trainer(tmp_path, callback).validate(Replay(), loaders(splits()), verbose=False)[0]
    assert logged["val/recall@1/gen-gen"] == 1.0
    assert logged["val/recall@1/gen-gen/hard"] == 0.0
    with pytest.raises(RimeError, match=r"headline_tasks names \['name'\].*'hard', 'names', 'pictures'"):
        trainer(tmp_path, RetrievalRecall(headline_tasks=["name"])).validate(
            Replay(), loaders(splits()), verbose=False
        )


def test_test_split_adds_distractors_and_keeps_ranks(tmp_path: Path) -> None:
    callback = RetrievalRecall(ks=[1, 5])
    logged = trainer(tmp_path, callback).test(Replay(), loaders(splits((12, 13))), verbose=False)[0]
    assert callback.results["gallery"] == 12 and callback.results["all_gallery"]["gallery"] == 14
    assert logged["test/all_gallery/recall@1/disc-disc"] == 1.0
    assert "recall@10" not in callback.results["overall"]
    assert len(callback.ranks) == 9 and callback.history == []
    hard = next(row for row in callback.ranks if row["task"] == "hard")
    assert hard["key"] == "val-000000.tar/0002" and hard["rewrite"] == "own 2"
    assert hard["ranks"]["disc-disc"] == 1 and hard["ranks"]["gen-gen"] == 12
    assert hard["ranks_all_gallery"]["gen-gen"] == 14 and hard["ranks"]["trace/reference"] == 1


def test_history_leaves_out_the_sanity_check_and_survives_a_resume(tmp_path: Path) -> None:
    steps = DataLoader(torch.zeros(2, 1))
    callback = RetrievalRecall()
    run = trainer(tmp_path, callback, max_epochs=2, num_sanity_val_steps=2)
    run.fit(Replay(), steps, loaders(splits()))
    assert [(entry["epoch"], entry["step"]) for entry in callback.history] == [(0, 2), (1, 4)]
    assert callback.history[0]["recall@1/gen-gen"] == pytest.approx(2 / 3)
    run.save_checkpoint(tmp_path / "last.ckpt")

    resumed = RetrievalRecall()
    again = trainer(tmp_path, resumed, max_epochs=3)
    again.fit(Replay(), steps, loaders(splits()), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert [entry["step"] for entry in resumed.history] == [2, 4, 6]
    assert resumed.history[:2] == callback.history


def test_validating_the_same_step_again_replaces_its_entry(tmp_path: Path) -> None:
    callback = RetrievalRecall()
    for _ in range(2):
        trainer(tmp_path, callback).validate(Replay(), loaders(splits()), verbose=False)
    assert len(callback.history) == 1


def test_missing_right_answer_names_the_pair_unless_batches_are_limited(tmp_path: Path) -> None:
    batches = splits()
    batches["target"] = batches["target"][:1]
    with pytest.raises(DataError, match=r"4 of 9 queries .*val-000000.tar/0005.*content_id"):
        trainer(tmp_path, RetrievalRecall()).validate(Replay(), loaders(batches), verbose=False)
    callback = RetrievalRecall()
    with pytest.warns(UserWarning, match="count as not found"):
        trainer(tmp_path, callback, limit_val_batches=2).validate(Replay(), loaders(batches), verbose=False)
    assert callback.results["overall"]["recall@1"]["disc-disc"] < 1


def test_wrong_output_of_the_step_is_told(tmp_path: Path) -> None:
    class Silent(Replay):
        def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return None

    with pytest.raises(RimeError, match="must return an EvalOutput"):
        trainer(tmp_path, RetrievalRecall()).validate(Silent(), loaders(splits()), verbose=False)


def evaluate(rank: int, folder: str) -> None:
    """One of two processes: every second item, wrapped around to equal length, then the hooks by hand."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    shard = {
        "query": [eval_batch("query", [[0, 2, 4, 6, 8], [1, 3, 5, 7, 0]][rank])],
        "target": [eval_batch("target", [*range(rank, 14, 2)], (12, 13))],
    }
    torch.save(evaluated(shard), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def evaluated(batches: dict[str, list[EvalBatch]]) -> tuple[dict, list]:
    callback, module = RetrievalRecall(), Replay()
    callback._start(module)
    for side in ("query", "target"):
        for batch in batches[side]:
            callback._add(batch, module.validation_step(batch, 0))
    assert callback._finish(limited=False, split="test")
    return callback.results, callback.ranks


def test_two_processes_report_what_one_reports(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")  # spawn would import the whole stack twice more
    processes = [context.Process(target=evaluate, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    results, ranks = evaluated(splits((12, 13)))
    for rank in range(2):
        other, other_ranks = torch.load(tmp_path / f"rank{rank}.pt")
        assert other_ranks == ranks
        assert other["overall"].pop("milliseconds") == pytest.approx(results["overall"]["milliseconds"])
        expected = {**results["overall"]}
        expected.pop("milliseconds")
        assert other.pop("overall") == expected
        assert other == {name: value for name, value in results.items() if name != "overall"}
