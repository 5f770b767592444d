"""The callback inside a real Trainer, on hand-made embeddings whose recalls are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from replay import Replay, eval_batch, loaders, splits, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from rime_pl.callbacks.retrieval_recall import RetrievalRecall
from rime_pl.callbacks.rewrite_samples import RewriteSamples
from rime_pl.errors import DataError, RimeError
from rime_pl.metrics.modes import is_generative
from rime_pl.types import MODE_PAIRS, EvalBatch, Evaluation


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


def test_recall_is_told_for_each_length_that_was_trained(tmp_path: Path) -> None:
    """The vectors are unit vectors of 12 numbers: with 6, half of the items are the zero vector."""
    module = Replay()
    module.dimensions = [6, 11]  # type: ignore[assignment]
    logged = trainer(tmp_path, RetrievalRecall()).validate(module, loaders(splits()), verbose=False)[0]
    whole = logged["val/recall@1/disc-disc"]
    assert logged["val/dimensions/6/disc-disc"] < logged["val/dimensions/11/disc-disc"] <= whole == 1.0
    assert set(MODE_PAIRS) == {name.split("/")[3] for name in logged if name.startswith("val/dimensions/6/")}


def queries(*batches: list[int], unannotated: tuple[int, ...] = ()) -> dict[str, list[EvalBatch]]:
    return {
        "query": [eval_batch("query", numbers, unannotated=unannotated) for numbers in batches],
        "target": [eval_batch("target", list(range(12)))],
    }


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_rewrites_of_others_are_deranged_over_the_split_and_not_over_a_batch(
    stage: str, tmp_path: Path
) -> None:
    """Also when each batch holds one query, none gets its own rewrite."""
    given = []
    for batches in ([[n] for n in range(9)], [[0, 1, 2, 3, 4], [5, 6, 7, 8, 0]], [list(range(9))]):
        module = Replay()
        logged = getattr(trainer(tmp_path, RetrievalRecall()), stage)(
            module, loaders(queries(*batches)), verbose=False
        )[0]
        prefix = "val" if stage == "validate" else "test"
        assert logged[f"{prefix}/trace/shuffled"] == 0.0
        assert logged[f"{prefix}/trace/num_shuffled"] == logged[f"{prefix}/trace/num_reference"] == 9
        given.append(module.given)
    assert given[0] == {item: [100 + (item + 3) % 9] for item in range(9)}  # the next one of the same task
    assert given[0] == given[1] == given[2]


def test_a_query_without_a_partner_is_left_out_and_counted(tmp_path: Path) -> None:
    """Task "pictures" has one query, so no other query's rewrite is of its kind."""
    callback, module = RetrievalRecall(), Replay()
    trainer(tmp_path, callback).test(module, loaders(queries([0, 3], [1])), verbose=False)
    assert module.given == {0: [103], 3: [100], 1: None}
    trace = callback.results["overall"]["trace"]
    assert trace["num_shuffled"] == 2 and trace["shuffled"] == 0.0 and trace["own-minus-shuffled"] == 1.0
    lonely = callback.results["per_task"]["pictures"]["trace"]
    assert lonely["shuffled"] is None and lonely["own-minus-shuffled"] is None and lonely["own"] == 1.0
    assert {row["key"][-1]: row["ranks"]["trace/shuffled"] for row in callback.ranks} == {
        "0": 12,
        "1": None,
        "3": 12,
    }


def test_without_annotation_there_is_no_reference_and_no_headroom(tmp_path: Path) -> None:
    callback = RetrievalRecall()
    batches = queries([0, 1, 2], [3, 4, 5], unannotated=tuple(range(6)))
    logged = trainer(tmp_path, callback).validate(Replay(), loaders(batches), verbose=False)[0]
    assert "val/trace/reference" not in logged and "val/trace/room" not in logged
    assert logged["val/trace/num_reference"] == 0
    assert logged["val/trace/own-minus-empty"] == pytest.approx(2 / 3)
    trace = callback.results["overall"]["trace"]
    assert trace["reference"] is None and trace["room"] is None


def test_headroom_compares_the_annotated_queries_only(tmp_path: Path) -> None:
    """Of task "hard", whose own rewrites find nothing, only query 2 has a reference rewrite."""
    callback = RetrievalRecall()
    batches = queries([0, 1, 2, 3, 4, 5, 6, 7, 8], unannotated=(0, 1, 3, 4, 5, 6, 7, 8))
    trainer(tmp_path, callback).validate(Replay(), loaders(batches), verbose=False)
    trace = callback.results["overall"]["trace"]
    assert (trace["reference"], trace["room"], trace["num_reference"]) == (1.0, 1.0, 1)
    assert trace["own"] == pytest.approx(2 / 3)


def test_a_loader_that_gives_other_queries_the_second_time_is_refused(tmp_path: Path) -> None:
    class Other:
        times = 0

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Any:
            self.times += 1
            return iter([eval_batch("query", [self.times, self.times + 3])])

    target = DataLoader([eval_batch("target", list(range(12)))], batch_size=None)
    with pytest.raises(RimeError, match=r"must give the same queries each time .*rewrite_ablation to false"):
        trainer(tmp_path, RetrievalRecall()).validate(Replay(), [Other(), target], verbose=False)


def test_headline_tasks_choose_what_the_overall_numbers_average(tmp_path: Path) -> None:
    callback = RetrievalRecall(headline_tasks=["names", "pictures"])
    logged = trainer(tmp_path, callback).validate(Replay(), loaders(splits()), verbose=False)[0]
    assert logged["val/recall@1/gen-gen"] == 1.0
    assert logged["val/recall@1/gen-gen/hard"] == 0.0
    with pytest.raises(RimeError, match=r"headline_tasks .* \['name'\] .*'hard', 'names', 'pictures'"):
        trainer(tmp_path, RetrievalRecall(headline_tasks=["name"])).validate(
            Replay(), loaders(splits()), verbose=False
        )


class _Data(pl.LightningDataModule):
    """Has these tasks in each split, and no batches: whoever asks for one fails."""

    def query_tasks(self, split: str) -> set[str]:
        return {"names", "hard"} if split == "val" else {"names"}

    def evaluation(self, split: str) -> Evaluation:
        return Evaluation()


class _OneMode(pl.LightningDataModule):
    """Validates in the discriminative mode only, and tests in both."""

    def _loaders(self, split: str) -> list[DataLoader]:
        generative = self.evaluation(split).generative
        return loaders(
            {
                side: [replace(batch, generative=generative) for batch in batches]
                for side, batches in splits().items()
            }
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(2, 1))

    def val_dataloader(self) -> list[DataLoader]:
        return self._loaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        return self._loaders("test")

    def query_tasks(self, split: str) -> set[str]:
        return {"names", "pictures", "hard"}

    def evaluation(self, split: str) -> Evaluation:
        return Evaluation(generative=split == "test")


def test_one_mode_in_validation_gives_only_what_was_measured(tmp_path: Path) -> None:
    callback, module = RetrievalRecall(), Replay()
    run = trainer(tmp_path, callback, RewriteSamples(), max_epochs=1)
    run.loggers = [TensorBoardLogger(tmp_path, name="tensorboard", version="")]
    run.fit(module, datamodule=_OneMode())
    logged = {name.removeprefix("val/") for name in run.callback_metrics if name.startswith("val/")}
    assert "recall@1/disc-disc" in logged and "mrr/disc-disc" in logged
    assert not [name for name in logged if is_generative(name)] and module.given == {}
    [entry] = callback.history
    assert entry["recall@1/disc-disc"] == 1.0 and not [name for name in entry if is_generative(name)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["val/retrieval/disc-disc"]
    text = events.Tensors("val/rewrites/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| (not measured) | right |" in text and "gen-gen" not in text
    assert set(callback.results["overall"]["milliseconds"]) == {"discriminative"}
    run.test(module, datamodule=_OneMode(), verbose=False)
    assert set(callback.results["overall"]["recall@1"]) == set(MODE_PAIRS)
    assert callback.results["overall"]["trace"]["shuffled"] == 0.0 and callback.ranks[0]["rewrite"] == "own 0"


class _LimitedGallery(_OneMode):
    def evaluation(self, split: str) -> Evaluation:
        return Evaluation(left_out=5) if split == "val" else Evaluation()


def test_results_on_a_limited_gallery_have_names_of_their_own(tmp_path: Path) -> None:
    callback, module = RetrievalRecall(), Replay()
    run = trainer(tmp_path, callback, RewriteSamples(), max_epochs=1)
    run.loggers = [TensorBoardLogger(tmp_path, name="tensorboard", version="")]
    run.fit(module, datamodule=_LimitedGallery())
    names = {name for name in run.callback_metrics if name.startswith("val/")}
    assert names and all(name.startswith("val/limited_gallery/") for name in names)
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()
    assert tags["images"] and all(name.startswith("val/limited_gallery/") for name in tags["images"])
    assert callback.history[0]["gallery_left_out"] == callback.results["gallery_left_out"] == 5
    logged = run.test(module, datamodule=_LimitedGallery(), verbose=False)[0]
    assert logged["test/recall@1/disc-disc"] == 1.0 and "gallery_left_out" not in callback.results
    watching = EarlyStopping("val/recall@1/disc-disc")
    again = trainer(tmp_path, RetrievalRecall(), watching, max_epochs=1)
    with pytest.raises(RimeError, match=r"watches val/recall@1/disc-disc.* 5 items .* val/limited_gallery/"):
        again.fit(Replay(), datamodule=_LimitedGallery())
    whole = trainer(
        tmp_path, RetrievalRecall(), EarlyStopping("val/limited_gallery/recall@1/disc-disc"), max_epochs=1
    )
    with pytest.raises(RimeError, match=r"watches val/limited_gallery/recall@1/disc-disc"):
        whole.fit(Replay(), datamodule=_OneMode())


@pytest.mark.parametrize("name", ["recall@1/gen-gen", "trace/own", "oracle/recall@1", "mrr/disc-gen/names"])
def test_a_checkpoint_by_a_result_that_is_not_measured_is_refused(name: str, tmp_path: Path) -> None:
    for watching in (EarlyStopping(f"val/{name}"), ModelCheckpoint(monitor=f"val/{name}")):
        run = trainer(tmp_path, RetrievalRecall(), watching, max_epochs=1)
        with pytest.raises(RimeError, match=rf"{type(watching).__name__} must watch .* watches val/{name}"):
            run.fit(Replay(), datamodule=_OneMode())
    trainer(tmp_path, RetrievalRecall(), EarlyStopping("val/recall@1/disc-disc"), max_epochs=1).fit(
        Replay(), datamodule=_OneMode()
    )


def test_headline_tasks_are_checked_before_training(tmp_path: Path) -> None:
    for wanted, split in (["name"], "val"), (["hard"], "test"):
        callback = RetrievalRecall(headline_tasks=wanted)
        with pytest.raises(RimeError, match=f"must name tasks of the {split} split, but .* are not there"):
            trainer(tmp_path, callback).fit(Replay(), datamodule=_Data())


def test_memory_tasks_are_never_in_the_mean(tmp_path: Path) -> None:
    callback = RetrievalRecall(memory_tasks=["hard"])
    logged = trainer(tmp_path, callback).validate(Replay(), loaders(splits()), verbose=False)[0]
    assert logged["val/recall@1/gen-gen"] == 1.0 and logged["val/recall@1/gen-gen/hard"] == 0.0
    assert callback.results["memory"] == ["hard"]
    # 12 queries, of which a third is about what training has shown
    assert callback.results["queries"] == 6
    with pytest.raises(RimeError, match=r"headline_tasks must not name memory tasks, but names \['hard'\]"):
        trainer(tmp_path, RetrievalRecall(headline_tasks=["hard"], memory_tasks=["hard"])).validate(
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


def test_missing_right_answers_count_as_not_found_and_are_reported(tmp_path: Path) -> None:
    batches = splits()
    batches["target"] = batches["target"][:1]  # contents 0 to 4
    callback = RetrievalRecall()
    with pytest.warns(UserWarning, match=r"4 of 9 queries .*val-000000.tar/0005.*content_id.*as not found"):
        trainer(tmp_path, callback).validate(Replay(), loaders(batches), verbose=False)
    assert callback.results["missing"] == 4
    assert callback.results["overall"]["recall@1"]["disc-disc"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_task_without_any_right_answer_is_an_error_unless_batches_are_limited(tmp_path: Path) -> None:
    batches = splits()
    batches["target"] = [eval_batch("target", [0, 1, 3, 4, 6, 7])]
    with pytest.raises(DataError, match=r"3 of 9 queries .*No query of the tasks \['hard'\]"):
        trainer(tmp_path, RetrievalRecall()).validate(Replay(), loaders(batches), verbose=False)
    callback = RetrievalRecall()
    with pytest.warns(UserWarning, match="count as not found"):
        trainer(tmp_path, callback, limit_val_batches=2).validate(Replay(), loaders(batches), verbose=False)
    assert callback.results["per_task"]["hard"]["recall@1"]["disc-disc"] == 0.0


def test_wrong_output_of_the_step_is_refused(tmp_path: Path) -> None:
    class Silent(Replay):
        def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return None

    with pytest.raises(RimeError, match="must return an EvalOutput, but one returned a NoneType"):
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
    callback._start(module, Evaluation())
    for side in ("query", "target"):
        for batch in batches[side]:
            callback._add(batch, module.validation_step(batch, 0))
    assert callback._finish(module, batches["query"], limited=False, split="test")
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
