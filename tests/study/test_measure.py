"""Records are measured on the queries that all seeds share."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder
from rime_pl.study.design import Difference
from rime_pl.study.measure import SeedResult, Variants, curve_means, recipe_hash, seed_result
from rime_pl.study.record import Record, paired_difference, record_of
from tests.study.runs import change, run_folder

CURVES = {"kl": 1.0, "grad_norm": 2.0, "kl_highest": 1.5, "grad_norm_highest": 3.0}


def measure(seeds: list[Variants]) -> Record:
    return record_of(seed_result("cma", variants) for variants in seeds)


def test_differences_pair_the_queries_of_all_seeds(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "before", [1, 2, 2, 1])
    after = run_folder(tmp_path / "after", [1, 1, 2, 1])
    seeds: list[SeedResult] = [seed_result("cma", {"before": before, "cma": after})] * 2
    found = paired_difference(seeds, Difference("cma", "before", "disc-disc"))
    assert found["mean"] == pytest.approx(0.25)
    assert found["lower"] >= 0.0  # no query is lost: paired, the difference is never negative
    # a query that two seeds saw is not two queries: twice the same seed says no more than once
    once = paired_difference(seeds[:1], Difference("cma", "before", "disc-disc"))
    assert {**found, "seeds": once["seeds"]} == once
    same = paired_difference(seeds, Difference("cma", "cma", "gen-gen", second_mode="disc-disc"))
    assert same == {"mean": 0.0, "lower": 0.0, "upper": 0.0, "seeds": [0.0, 0.0]}


def test_a_result_holds_each_query_so_that_a_seed_can_join_later(tmp_path: Path) -> None:
    runs = {
        "before": run_folder(tmp_path / "before", [1, 2, 2, 1]),
        "cma": run_folder(tmp_path / "cma", [1, 1, 2, 1]),
    }
    found = seed_result("cma", runs)
    assert found["hits"]["cma"]["disc-disc"] == ["1101"] and found["hits"]["before"]["disc-disc"] == ["1001"]
    assert json.loads(json.dumps(found)) == found
    alone = record_of([found])
    assert alone["of_seeds"] == [found]
    assert alone["differences"]["cma disc-disc - before disc-disc"]["mean"] == 0.25


def test_what_is_compared_must_have_been_measured(tmp_path: Path) -> None:
    runs = {name: run_folder(tmp_path / name, [1, 2], stage="refine_rl") for name in ("before", "refine_rl")}
    with pytest.raises(RimeError, match=r"refine_rl/ranks.json must hold crossed/.*-old, but does not"):
        seed_result("refine_rl", runs)


def test_the_recipe_is_all_but_place_seed_and_machine(tmp_path: Path) -> None:
    def recipe(**settings: Any) -> str:
        run = run_folder(tmp_path / str(len(list(tmp_path.iterdir()))), [1])
        run.config.write_text(yaml.safe_dump({"model": {"temperature": 0.05}} | settings))
        return recipe_hash(RunFolder(run.path))

    same = recipe()
    assert recipe(seed_everything=3, num_threads=2, run_dir="runs/there", ckpt_path=None) == same
    assert recipe(data={"batch_size": 8}) != same
    assert recipe(model={"temperature": 0.1}) != same


def test_a_record_holds_the_variants_that_all_seeds_have(tmp_path: Path) -> None:
    names = ("before", "further_sft", "cma", "without_decisive")
    seeds = [
        {name: run_folder(tmp_path / f"{seed}/{name}", [1, 2], seed=seed) for name in names[: 4 - seed]}
        for seed in (0, 1)
    ]
    seeds[1]["cma"] = change(seeds[1]["cma"], "summary.json", seconds={"fit": 5.0})
    found = measure(seeds)
    assert list(found["variants"]) == ["before", "further_sft", "cma"]
    assert (found["corpus"], found["seeds"], found["gallery"]) == ("mine", [0, 1], 4)
    assert found["variants"]["cma"]["recall@1"]["gen-gen"] == [0.5, 0.5, 0.5]
    assert found["variants"]["cma"]["seconds_per_step"] == 1.0  # of the run that was disturbed least
    assert found["tasks"]["twin"]["gen-gen"] == [0.5, 0.5, 0.5]
    assert "cma trace/empty - cma gen-gen" not in found["differences"]
    assert found["differences"]["cma gen-gen - cma trace/empty"]["seeds"] == [0.0, 0.0]
    assert not any("without_decisive" in key for key in found["differences"])


def test_what_no_seed_measured_is_empty(tmp_path: Path) -> None:
    """Without annotations, the summary holds null for the reference rewrite."""
    run = run_folder(tmp_path / "cma", [1, 2])
    after = run.summary["after"]
    bare = after | {"trace": after["trace"] | {"reference": None, "room": None}}
    found = measure([{"cma": change(run, "summary.json", after=bare)}])
    trace = found["variants"]["cma"]["trace"]
    assert trace["reference"] == [] and trace["empty"] == [0.5, 0.5, 0.5]


def test_seconds_per_step_are_of_the_steps_that_were_timed(tmp_path: Path) -> None:
    assert run_folder(tmp_path / "resumed", [1], steps_timed=5).seconds_per_step == 2.0
    assert run_folder(tmp_path / "ended", [1], steps_timed=0).seconds_per_step is None


def test_curves_are_read_back_from_tensorboard(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "rl", [1], stage="refine_rl")
    assert curve_means(run) == {}
    with SummaryWriter(str(run.path / "tensorboard")) as writer:
        for step, value in enumerate((0.5, 1.5)):
            writer.add_scalar("train/kl", value, step)
            writer.add_scalar("train/grad_norm", 2 * value, step)
    assert curve_means(run) == CURVES
    with SummaryWriter(str(tmp_path / "sft" / "tensorboard")) as writer:
        writer.add_scalar("train/loss", 1.0, 0)
    assert curve_means(RunFolder(tmp_path / "sft")) == {}  # what Refine-RL logs is not there


def test_runs_of_different_lengths_are_not_averaged(tmp_path: Path) -> None:
    seeds = [{"cma": run_folder(tmp_path / name, [1, 2])} for name in ("0", "1")]
    seeds[1] = {"cma": change(seeds[1]["cma"], "manifest.json", steps=10)}
    with pytest.raises(RimeError, match=r"different numbers of training steps .*/0: 9, .*/1: 10\. If one"):
        measure(seeds)
