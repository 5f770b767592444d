"""Scores of a task, the label order of the official code, and averages that reproduce published ones."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rime_pl.datamodules.benchmarks.mmeb_v2_table import FIXED, mmeb_v2_table
from rime_pl.errors import DataError, RimeError
from rime_pl.evaluation.averages import (
    UVRB_ABILITIES,
    Place,
    mmeb_v2_averages,
    mrmr_averages,
    uvrb_averages,
)
from rime_pl.evaluation.published import PUBLISHED
from rime_pl.evaluation.scoring import check, official_grades, score
from tests.evaluation.made_tasks import global_task, local_task, with_main

TABLE = [Place(one.modality, one.group, FIXED.get(one.name, one.name)) for one in mmeb_v2_table()]
#: GVE-7B on the data sets of UVRB, in the order of the paper's table (arXiv 2510.27571).
GVE = {
    **{"MSRVTT": 0.464, "DiDeMo": 0.433, "CRB-G": 0.865, "CRB-S": 0.847, "VDC-O": 0.794, "CRB-T": 0.539},
    **{"CMRB": 0.398, "DREAM-E": 0.302, "LoVR-TH": 0.542, "PEV-K": 0.413, "LoVR-V": 0.680, "VDC-D": 0.948},
    **{"MS-TI": 0.343, "MS-TV": 0.280, "MSRVTT-I2V": 0.899, "LoVR-C2V": 0.415},
}


def test_averages_of_mmeb_v2_reproduce_published_ones() -> None:
    """The overall is the mean of 78 tasks, not of modalities or meta-tasks."""
    qwen, vlm2vec = PUBLISHED["mmeb-v2"]
    values = {place.name: qwen.values[place.modality] for place in TABLE}
    found = mmeb_v2_averages(values, TABLE)
    assert found["tasks"] == "78 of 78"
    assert found["overall"] == pytest.approx(qwen.values["overall"], abs=5e-5)
    values = {place.name: vlm2vec.values[place.group] for place in TABLE}
    found = mmeb_v2_averages(values, TABLE)
    assert found["overall"] == pytest.approx(vlm2vec.values["overall"], abs=5e-4)
    for modality, value in found["modalities"].items():
        assert value == pytest.approx(vlm2vec.values[modality], abs=5e-4)
    assert found["meta_tasks"]["V-MRET"] == pytest.approx(0.368)


def test_a_missing_task_leaves_its_means_out() -> None:
    values = {place.name: 0.5 for place in TABLE if place.name != "CIRR"}
    found = mmeb_v2_averages(values, TABLE)
    assert found["tasks"] == "77 of 78" and found["overall"] is None
    assert found["modalities"] == {"image": None, "video": 0.5, "visdoc": 0.5}
    assert found["meta_tasks"]["I-RET"] is None and found["meta_tasks"]["I-CLS"] == 0.5
    assert mmeb_v2_averages({}, TABLE)["tasks"] == "0 of 78"


def test_averages_of_uvrb_reproduce_published_ones() -> None:
    values = dict(GVE)
    found, (row,) = uvrb_averages(values), PUBLISHED["uvrb"]
    for ability in UVRB_ABILITIES:
        # the values of the data sets are rounded themselves
        assert found[ability] == pytest.approx(row.values[ability], abs=1.01e-3), ability
    del values["MS-TV"]
    found = uvrb_averages(values)
    assert found["tasks"] == "15 of 16" and found["CG"] is not None
    assert [name for name in UVRB_ABILITIES if found[name] is None] == ["A-AVG", "D-AVG", "CMP"]
    with pytest.raises(RimeError, match=r"must be one of MSRVTT, .* but is 'MSRVTT_I2V'"):
        uvrb_averages({"MSRVTT_I2V": 1.0})


def test_both_means_of_mrmr_say_what_they_are() -> None:
    parts = {
        "knowledge": {"Art": 0.1, "Humanities": 0.2, "Medicine": 0.3, "Science": 0.4},
        "theorem": {"Business": 0.5, "Engineering": 0.6, "Math": 0.7, "Physics": 0.8},
    }
    values = {"knowledge": 0.2, "theorem": 0.7, "traffic": 0.9, "design": 1.0, "negation": 0.25}
    found = mrmr_averages(values, parts)
    assert found["mean_over_11_columns"] == pytest.approx((3.6 + 0.9 + 1.0 + 0.25) / 11)
    assert found["mean_over_5_datasets"] == pytest.approx(3.05 / 5)
    assert list(found["columns"])[-3:] == ["traffic", "design", "negation"] and len(found["columns"]) == 11
    assert mrmr_averages(values, {})["mean_over_11_columns"] is None
    assert mrmr_averages({"design": 1.0}, {})["tasks"] == "1 of 5"


def test_scores_of_a_task_with_categories_and_ties(tmp_path: Path) -> None:
    task = with_main(local_task(tmp_path), categories=["a", "a", "b", "b", "b", "b"])
    vectors = F.normalize(torch.eye(10) + 0.1, dim=-1)
    scored, found = score(task, "gen-disc", vectors[:6], vectors)
    assert scored.main == scored.scores["hit@1"] == 1.0 and scored.categories == {"a": 1.0, "b": 1.0}
    assert scored.ties == scored.tied_queries == 0 and scored.compatible == {}
    assert found.first[:, 0].tolist() == list(range(6)) and found.first.shape == (6, 4)
    mixed = vectors[:6].clone()
    mixed[2] = vectors[3]
    scored, _ = score(task, "gen-disc", mixed, vectors)
    assert scored.main == pytest.approx(5 / 6) and scored.categories == {"a": 1.0, "b": 0.75}
    same = torch.ones_like(vectors)
    collapsed, _ = score(task, "disc-disc", same[:6], same)
    assert collapsed.main == 0.0 and collapsed.tied_queries == 6 and collapsed.ties == 18
    with pytest.raises(DataError, match=r"Local: its metric must be one of hit@1, .* but is 'R@1'"):
        score(with_main(task, metric="R@1"), "disc-disc", same[:6], same)


def test_the_label_order_of_the_official_code_gives_other_grades(tmp_path: Path) -> None:
    """Its set of numbers is in the order of the numbers, its grades are in that of the file."""
    task = with_main(global_task(tmp_path), names=list(range(9)))
    vectors = F.normalize(torch.eye(9) + 0.1, dim=-1)
    rising, _ = score(task, "disc-disc", vectors[:5], vectors)
    assert rising.compatible == {} and rising.compatible_note == ""
    falling = with_main(task, labels=[{n + 2: 2.0, n: 1.0} for n in range(5)])
    scored, _ = score(falling, "disc-disc", vectors[:5], vectors)
    assert scored.scores == pytest.approx(rising.scores)
    names = [task.names[place] for place in falling.labels[0]]
    assert official_grades(names, falling.labels[0]) == {0: 2.0, 2: 1.0}
    assert scored.compatible["ndcg_linear@1"] == 1.0 and scored.scores["ndcg_linear@1"] == 0.5
    assert not any("hit" in name for name in scored.compatible)
    texts = with_main(falling, names=[f"page {n}" for n in range(9)])
    scored, _ = score(texts, "disc-disc", vectors[:5], vectors)
    assert scored.compatible == {} and "order in a set" in scored.compatible_note


def test_what_would_make_scores_wrong_is_refused(tmp_path: Path) -> None:
    task = local_task(tmp_path)
    check(task)
    for changes, says in (
        ({"labels": [{0: 1.0}] * 5}, "labels must be as many as the 6 queries, but are 5"),
        ({"labels": [{}, *task.labels[1:]]}, r"query 0 must have right candidates, .* but has \{\}"),
        ({"labels": [{9: 1.0}, *task.labels[1:]]}, r"query 0 .* all in its pool .*\{9: 1.0\}"),
        ({"labels": [{0: 0.0}, *task.labels[1:]]}, "grades above 0"),
        ({"labels": [{10: 1.0}, *task.labels[1:]], "pools": None}, "query 0"),
        ({"names": ["0.png"] * 10}, "a name of its own, but there are 1 distinct names"),
        ({"pools": task.pools[:2]}, "pools must be as many"),  # type: ignore[index]
        ({"info": [{}]}, "info must be as many"),
    ):
        with pytest.raises(DataError, match=f"Local: .*{says}"):
            check(with_main(task, **changes))
