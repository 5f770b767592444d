"""Few annotated pairs: who they are, how often they come, and what the generative terms learn from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from rime_pl.backbone.mllm import Backbone
from rime_pl.datamodules.annotation import is_annotated
from rime_pl.datamodules.batch_plan import BatchPlan
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.errors import RimeError
from rime_pl.modules.cma import CMAModule
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Pair
from tests.micro import PROMPT


def data(corpus: Path, base: Path, **settings: object) -> RimeDataModule:
    module = RimeDataModule(str(corpus), str(base), PROMPT, **settings)  # type: ignore[arg-type]
    module.setup(TrainerFn.FITTING)
    return module


def batches(module: RimeDataModule) -> list[Batch]:
    return list(module.train_dataloader())  # type: ignore[arg-type]


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    names = [f"train-000000.tar/sample-{n}" for n in range(2000)]
    tenth, half = ({name for name in names if is_annotated(name, share)} for share in (0.1, 0.5))
    assert tenth < half and 150 < len(tenth) < 250 and 900 < len(half) < 1100


def test_seeds_choose_annotated_pairs_independently() -> None:
    """Two choices of a tenth share a tenth of themselves; seed 0 is the choice without a seed."""
    names = [f"train-000000.tar/sample-{n}" for n in range(4000)]
    chosen = [{name for name in names if is_annotated(name, 0.1, seed)} for seed in (None, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    for first, second in ((0, 2), (0, 3), (2, 3)):
        assert 330 < len(chosen[second]) < 470
        assert 10 < len(chosen[first] & chosen[second]) < 80
    assert chosen[2] < {name for name in names if is_annotated(name, 0.5, 1)}


def test_a_run_shows_the_rewrites_that_its_seed_chooses(scenes_corpus: Path, micro_base: Path) -> None:
    settings = {"batch_size": 4, "annotated_share": 0.5, "annotated_seed": 2}
    module = data(scenes_corpus, micro_base, require_rewrites=False, **settings)
    keys = {key: known for b in batches(module) for key, known in zip(b.keys, b.query.annotated, strict=True)}
    assert all(bool(known) == is_annotated(key, 0.5, 2) for key, known in keys.items())
    assert any(bool(known) != is_annotated(key, 0.5) for key, known in keys.items())
    resumed = data(scenes_corpus, micro_base, require_rewrites=False, batch_size=4, annotated_share=0.5)
    resumed.trainer = None
    with pytest.raises(RimeError, match=r"data.annotated_seed must be 2, as in the checkpoint, but is None"):
        resumed.load_state_dict(module.state_dict())


def test_every_batch_holds_its_part_of_annotated_samples() -> None:
    """10 of 100 samples are annotated and half of each batch is: each comes round about as often."""
    annotated = np.arange(100) % 10 == 0

    def made() -> BatchPlan:
        return BatchPlan(["a"], np.zeros(100, int), lambda rows: rows, 10, 0, annotated, 0.5)

    plan = made()
    seen: Counter[int] = Counter()
    for position in range(2 * len(plan)):
        batch = plan.batch(position).indices
        assert (
            len(batch) == len(set(batch)) == 10 and [annotated[n] for n in batch] == [True] * 5 + [False] * 5
        )
        seen.update(batch)
    counts = [seen[n] for n in range(100) if annotated[n]]
    assert sum(counts) == 100 and max(counts) - min(counts) <= 2
    assert plan.batch(7) == made().batch(7)


def test_batches_show_the_share_alone(scenes_corpus: Path, micro_base: Path) -> None:
    module = data(scenes_corpus, micro_base, batch_size=4, annotated_share=0.5, require_rewrites=False)
    for batch in batches(module):
        expected = [is_annotated(key, 0.5) for key in batch.keys]
        assert expected == [True, True, False, False]
        assert batch.query.annotated.tolist() == expected == batch.target.annotated.tolist()
    with pytest.raises(RimeError, match=r"Each batch of 8 must hold 4 annotated pairs"):
        data(scenes_corpus, micro_base, batch_size=8, annotated_share=0.2)
    with pytest.raises(RimeError, match=r"annotated_share must be greater than 0 and at most 1, but is 0"):
        data(scenes_corpus, micro_base, annotated_share=0)


def test_rl_takes_the_rest(scenes_corpus: Path, micro_base: Path) -> None:
    settings = {"batch_size": 2, "annotated_share": 0.5}
    rest = data(scenes_corpus, micro_base, rewrites="unannotated", **settings)
    keys = {key for batch in batches(rest) for key in batch.keys}
    assert keys and not any(is_annotated(key, 0.5) for key in keys)
    known = data(scenes_corpus, micro_base, rewrites="annotated", **settings)
    assert all(is_annotated(key, 0.5) for batch in batches(known) for key in batch.keys)
    with pytest.raises(RimeError, match=r"data.rewrites=unannotated and .* leave no training pair"):
        data(scenes_corpus, micro_base, rewrites="unannotated", batch_size=2)


def test_anchors_and_samples(scenes_corpus: Path, micro_base: Path) -> None:
    module = data(scenes_corpus, micro_base, batch_size=2, eval_batch_size=4)
    tables: dict[str, list[int]] = {}
    for batch in module.anchor_batches(5):
        tables.setdefault(batch.dataset, []).extend(batch.target_content.tolist())
    assert all(len(table) == len(set(table)) <= 5 for table in tables.values()) and len(tables) > 3
    again = [batch.keys for batch in data(scenes_corpus, micro_base, batch_size=2).anchor_batches(5)]
    assert {key for keys in again for key in keys} == {
        key for batch in module.anchor_batches(5) for key in batch.keys
    }
    assert sum(len(batch) for batch in module.sample_batches(6)) == 6


def test_what_an_unannotated_row_reads_changes_no_generative_term(
    shared_backbone: Backbone, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    """Rows 4 and 5 have no rewrite: with other completions there, only nothing may change."""
    bare = [
        replace(p, query=replace(p.query, rewrite=None), target=replace(p.target, rewrite=None))
        for p in train_pairs[4:6]
        if p.query
    ]
    batch = processor.training_batch([*train_pairs[:4], *bare])
    module = CMAModule(shared_backbone.config)
    module.backbone = shared_backbone
    found = []
    for swap in (False, True):
        logged: dict[str, float] = {}
        module.log = lambda key, value, into=logged, **_: into.update({key: float(value)})  # type: ignore[method-assign]
        if swap:
            rewrites = processor.completions([p.query.rewrite for p in train_pairs[:6] if p.query])
            batch.query.completions = rewrites
        with torch.no_grad():
            module.training_step(batch, 0)
        found.append(logged)
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    alone = processor.training_batch(train_pairs[:4])
    logged = {}
    module.log = lambda key, value, **_: logged.update({key: float(value)})  # type: ignore[method-assign]
    with torch.no_grad():
        module.training_step(alone, 0)
    for part in ("info_nce_gen", "cma", "ce"):
        assert logged[f"train/loss_{part}"] == pytest.approx(found[0][f"train/loss_{part}"], abs=1e-4), part
    assert logged["train/loss_info_nce_disc"] != pytest.approx(found[0]["train/loss_info_nce_disc"], abs=1e-3)
