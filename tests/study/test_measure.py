"""Records are measured on the queries that all seeds share."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder
from rime_pl.study.comparison import differences_table
from rime_pl.study.design import Difference
from rime_pl.study.measure import SeedResult, Variants, curve_means, recipes, seed_result
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
    assert found["hits"]["cma"]["disc-disc"] == {"twin": "1101"}
    assert found["hits"]["before"]["disc-disc"] == {"twin": "1001"}
    assert json.loads(json.dumps(found)) == found
    alone = record_of([found])
    assert alone["of_seeds"] == [found]
    assert alone["differences"]["cma disc-disc - before disc-disc"]["mean"] == 0.25


def test_what_is_compared_must_have_been_measured(tmp_path: Path) -> None:
    runs = {name: run_folder(tmp_path / name, [1, 2], stage="refine_rl") for name in ("before", "refine_rl")}
    with pytest.raises(RimeError, match=r"refine_rl/ranks.json must hold crossed/.*-old, but does not"):
        seed_result("refine_rl", runs)


def test_the_recipe_is_all_but_place_seed_and_machine(tmp_path: Path) -> None:
    def recipe(before: RunFolder | None = None, **settings: Any) -> dict[str, str]:
        run = run_folder(tmp_path / f"{len(list(tmp_path.iterdir()))}", [1], before=before)
        run.config.write_text(yaml.safe_dump(yaml.safe_load(run.config.read_text()) | settings))
        return recipes(RunFolder(run.path))

    same = recipe()
    assert set(same) == {"base", "cma"}
    assert recipe(seed_everything=3, num_threads=2, run_dir="there", ckpt_path="there") == same
    assert (
        recipe(data={"path": "there", "annotated_seed": 2, "num_workers": 1, "cache": {"folder": "x"}})
        == same
    )
    assert recipe(trainer={"max_epochs": 3.0}) == same  # as a file or a command may say it
    assert recipe(trainer={"max_epochs": 4})["cma"] != same["cma"]
    # what a run started from counts: settings, not places
    befores = [
        run_folder(tmp_path / name, [1], stage="sft", batch_size=size) for name, size in (("a", 8), ("b", 16))
    ]
    first, second = (recipe(before=before) for before in befores)
    assert first["cma"] == second["cma"] == same["cma"] and first["sft"] != second["sft"]
    befores[0].config.unlink()
    assert recipe(before=befores[0]) == {"start": "unknown", "cma": same["cma"]}


def test_the_recipe_of_a_base_model_is_how_it_was_made(tmp_path: Path) -> None:
    def base(name: str, made_with: Any) -> str:
        folder, run = tmp_path / f"base-{name}", run_folder(tmp_path / name, [1])
        folder.mkdir()
        (folder / "rime_base.json").write_text(json.dumps({"seed": 0, "made_with": made_with}))
        config = yaml.safe_load(run.config.read_text())
        config["model"]["backbone"]["name_or_path"] = str(folder)
        run.config.write_text(yaml.safe_dump(config))
        return recipes(RunFolder(run.path))["base"]

    small = base("a", {"hidden_size": 128, "num_threads": 2})
    assert base("b", {"hidden_size": 128, "num_threads": 1}) == small
    assert base("c", {"hidden_size": 192, "num_threads": 2}) != small
    assert base("d", None) != base("e", None)  # of an earlier version: only the model itself is known


def test_a_record_holds_the_variants_that_all_seeds_have(tmp_path: Path) -> None:
    names = ("before", "further_sft", "cma", "without_decisive")
    seeds = [
        {
            name: run_folder(tmp_path / f"{seed}/{name}", [1, 2], seed=seed, recall=0.5 + seed / 4)
            for name in names[: 4 - seed]
        }
        for seed in (0, 1)
    ]
    seeds[1]["cma"] = change(seeds[1]["cma"], "summary.json", seconds={"fit": 5.0})
    found = measure(seeds)
    assert list(found["variants"]) == ["before", "further_sft", "cma"]
    assert (found["corpus"], found["seeds"], found["gallery"]) == ("mine", [0, 1], 4)
    assert found["lacking"] == {"without_decisive": [1]}
    assert "CMA without the decisive term - CMA (not in seed 1)" in differences_table(found).conclusion
    assert found["variants"]["cma"]["recall@1"]["gen-gen"] == [0.625, 0.5, 0.75]
    assert found["variants"]["cma"]["seconds_per_step"] == 1.0  # of the run that was disturbed least
    assert found["tasks"]["twin"]["gen-gen"] == [0.625, 0.5, 0.75]
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
    seeds = [{"cma": run_folder(tmp_path / str(seed), [1, 2], seed=seed)} for seed in (0, 1)]
    with pytest.raises(RimeError, match=r"seed 0 of cma on mine is there twice"):
        measure(seeds[:1] * 2)
    seeds[1] = {"cma": change(seeds[1]["cma"], "manifest.json", steps=10)}
    with pytest.raises(
        RimeError, match=r"seed 1 .* with seed 0: it has 10 instead of 9 training steps of cma"
    ):
        measure(seeds)
