"""Which stage needs which run, with which settings, and where it lies: no stage is started here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rime_pl.corpus_places import find_corpus
from rime_pl.errors import RimeError
from rime_pl.pipeline import (
    CONFIGS,
    RECIPES,
    STAGES,
    Pipeline,
    describe,
    differences,
    find_recipe,
    find_run,
    sort_settings,
    with_few_rewrites,
)
from rime_pl.run_folder import ORIGIN, RunFolder, write_json

ROOT = Path(__file__).parents[1]


def pipeline(corpus: str = "data/openmoji", recipe: str = "tiny", seed: int = 0, **changes: Any) -> Pipeline:
    given = {stage: [] for stage in STAGES} | changes.pop("given", {})
    return Pipeline(Path(corpus), RECIPES[recipe], recipe, seed, changes.pop("base", None), given)


def test_a_stage_reads_its_recipe_and_at_most_one_file_of_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    of_corpus = ["configs/tiny/cma.yaml", "configs/data/openmoji/cma.yaml"]
    assert [str(file) for file in pipeline().configs("cma")] == of_corpus
    assert [str(file) for file in pipeline("data/mine", "2b").configs("cma")] == ["configs/cma.yaml"]


def test_words_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sft, given = RunFolder("runs/scenes-tiny-seed3/sft"), ["--model.lambda_dec", "0"]
    made = pipeline("data/scenes", seed=3, given={"cma": given})
    words = [
        *("--config", "configs/tiny/cma.yaml", "--config", "configs/data/scenes/cma.yaml"),
        *("--data.annotated_seed", "3"),
        *("--data.path", "data/scenes", "--seed_everything", "3"),
        *("--model.backbone.name_or_path", "models/tiny-scenes-seed3"),
        *("--model.init_adapter_from", "runs/scenes-tiny-seed3/sft/adapter"),
    ]
    assert made.words("cma", sft) == [*words[:6], *given, *words[6:]]
    assert made.words("cma", sft, as_recipe=True) == words
    assert made.folder == Path("runs/scenes-tiny-seed3")


def test_base_model_is_made_for_the_tiny_recipe_only() -> None:
    assert pipeline().tiny_base == Path("models/tiny-openmoji")
    assert pipeline(seed=2).tiny_base == Path("models/tiny-openmoji-seed2")
    assert pipeline(recipe="2b").tiny_base is None
    assert "--model.backbone.name_or_path" not in pipeline(recipe="2b").words("sft")
    other = pipeline(base="models/other")
    assert other.words("sft")[-2:] == ["--model.backbone.name_or_path", "models/other"]
    assert other.words("sft", as_recipe=True)[-1] == "models/tiny-openmoji"


def test_stages_before_the_goal() -> None:
    made = pipeline()
    assert made.stages_to("sft") == ["sft"]
    assert made.stages_to("refine_rl") == ["sft", "cma", "refine_rl"]
    assert made.stages_to("base") == made.stages_to("data") == []
    for word in (["--model.init_adapter_from", "mine"], ["--model.init_adapter_from=mine"]):
        assert pipeline(given={"cma": word}).stages_to("refine_rl") == ["cma", "refine_rl"]


def test_recipes_and_corpora_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert find_recipe("tiny") == find_recipe("configs/tiny") == ("tiny", CONFIGS / "tiny")
    assert find_recipe("2b") == find_recipe("configs") == ("2b", CONFIGS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RimeError, match=r"--recipe mine: no sft\.yaml"):
        find_recipe("mine")
    (tmp_path / "mine" / "sft.yaml").touch()
    without = Pipeline(Path("c"), tmp_path / "mine", "mine", 0, None, {})
    with pytest.raises(RimeError, match=r"sft.yaml must name a base model .*or give --base"):
        without.words("sft")
    (tmp_path / "mine" / "sft.yaml").write_text("model: {backbone: {name_or_path: models/tiny-big}}")
    assert without.tiny_base is None  # a model of one's own is not replaced by one for the corpus
    assert find_recipe("mine") == ("mine", (tmp_path / "mine").resolve())
    with pytest.raises(RimeError, match=r"--recipe .*mine: cma.yaml is missing"):
        Pipeline(Path("c"), tmp_path / "mine", "mine", 0, None, {}).file("cma")

    assert find_corpus("scenes") == (Path("data/scenes"), None)  # built on demand
    with pytest.raises(
        RimeError, match=r"--corpus shapes: no corpus\.json in shapes or in data/shapes, and no table"
    ):
        find_corpus("shapes")
    (tmp_path / "data" / "shapes").mkdir(parents=True)
    (tmp_path / "data" / "shapes" / "corpus.json").touch()
    assert find_corpus("shapes") == find_corpus("data/shapes") == (Path("data/shapes"), None)


@pytest.mark.parametrize(
    ("goal", "words", "message"),
    [
        ("sft", ["--cma.model.lambda_dec", "0"], "ends before cma"),
        ("sft", ["loud"], "loud is no setting of a stage"),
        ("base", ["--model.temperature", "1"], "--model.temperature is no setting.*`rime base --help`"),
        ("data", ["--scale", "0.1"], "--scale is no setting.*`rime shards --help`"),
        ("cma", ["--sft.run_dir", "x"], "--run_dir cannot be given to rime run"),
        ("cma", ["--seed_everything=3"], "use --seed"),
        ("cma", ["--seed-everything", "3"], "use --seed"),
        ("cma", ["--sft.model.backbone.name-or-path", "x"], "use --base"),
        ("cma", ["--data.path", "x"], "use --corpus"),
        ("cma", ["--model.backbone.name_or_path", "x"], "use --base"),
    ],
)
def test_settings_that_no_stage_can_take(goal: str, words: list[str], message: str) -> None:
    with pytest.raises(RimeError, match=message):
        sort_settings(goal, words)


def test_settings_go_to_the_stage_that_they_name() -> None:
    words = ["--sft.data.tasks", "[a,", "b]", "--model.kl_coef", "-1", "--refine-rl.sides", "query"]
    words += ["--sft.trainer.max-epochs=1", "--sft.config", "x.yaml", "-c", "mine.yaml"]
    assert sort_settings("refine_rl", words) == {
        "sft": ["--data.tasks", "[a,", "b]", "--trainer.max_epochs=1", "--config", "x.yaml"],
        "cma": [],
        "refine_rl": ["--model.kl_coef", "-1", "--sides", "query", "--config", "mine.yaml"],
    }


def test_sft_and_cma_see_as_few_rewrites_as_refine_rl_counts() -> None:
    def parse(share: float) -> Any:
        return lambda stage, words: {"data": {"annotated_share": share}}

    made = pipeline(given={"sft": ["--data.annotated_share", "0.5"], "cma": ["--model.lambda_dec", "0"]})
    few = with_few_rewrites(made, parse(0.1)).given
    assert few["sft"] == ["--data.annotated_share", "0.1", "--data.annotated_share", "0.5"]  # typed: it wins
    assert few["cma"] == ["--data.annotated_share", "0.1", "--model.lambda_dec", "0"]
    assert few["refine_rl"] == []
    assert with_few_rewrites(made, parse(1.0)) == made


def settings(temperature: float = 0.02, start: str | None = "sft/adapter") -> dict[str, Any]:
    return {"model": {"temperature": temperature, "init_adapter_from": start}, "run_dir": "runs/none"}


def begin(path: Path, start_hash: str = "a", finished: bool = True, **changes: Any) -> RunFolder:
    run = RunFolder(path)
    run.begin(settings(**changes) | {"run_dir": str(path)}, {"start_hash": start_hash})
    if finished:
        write_json(run.marker, {})
    return run


def test_same_settings_and_start_are_found_again(tmp_path: Path) -> None:
    start = {"start_hash": "a"}
    assert find_run(tmp_path, "cma", settings(), start) == RunFolder(tmp_path / "cma")
    first = begin(tmp_path / "cma")
    begin(tmp_path / "cma-2", finished=False, temperature=0.05)
    begin(tmp_path / "cma-old", temperature=0.1)  # no number: not one of ours
    assert find_run(tmp_path, "cma", settings(), start) == first
    unfinished = find_run(tmp_path, "cma", settings(0.05), start)
    assert unfinished == RunFolder(tmp_path / "cma-2") and not unfinished.finished
    assert find_run(tmp_path, "cma", settings(0.1), start) == RunFolder(tmp_path / "cma-3")


def test_a_run_from_before_a_setting_existed_is_found_again(tmp_path: Path) -> None:
    run = begin(tmp_path / "cma")
    newer = settings()
    newer["model"]["new"] = None  # the default: as if it did not exist
    assert find_run(tmp_path, "cma", newer, {}) == run
    newer["model"]["new"] = 3
    assert find_run(tmp_path, "cma", newer, {}) == RunFolder(tmp_path / "cma-2")


def test_another_start_is_another_run(tmp_path: Path) -> None:
    begin(tmp_path / "cma")
    second = RunFolder(tmp_path / "cma-2")
    assert find_run(tmp_path, "cma", settings(start="sft-2/adapter"), {"start_hash": "a"}) == second
    assert find_run(tmp_path, "cma", settings(), {"start_hash": "b"}) == second  # trained anew in its place
    assert find_run(tmp_path, "cma", settings(), {}) == RunFolder(tmp_path / "cma")  # not known yet
    by_hand = begin(tmp_path / "cma-2", temperature=0.3)
    (by_hand.path / ORIGIN).unlink()
    assert find_run(tmp_path, "cma", settings(0.3), {"start_hash": "b"}) == by_hand


def test_a_number_that_became_free_is_used_and_later_ones_are_still_found(tmp_path: Path) -> None:
    begin(tmp_path / "sft-2")
    begin(tmp_path / "sft-10", temperature=0.5)
    assert find_run(tmp_path, "sft", settings(), {}) == RunFolder(tmp_path / "sft-2")
    assert find_run(tmp_path, "sft", settings(0.5), {}) == RunFolder(tmp_path / "sft-10")
    assert find_run(tmp_path, "sft", settings(0.3), {}) == RunFolder(tmp_path / "sft")


@pytest.mark.parametrize("left", ["done.json", "adapter/weights", "checkpoints/last.ckpt"])
def test_a_folder_with_anything_trained_in_it_is_never_taken(left: str, tmp_path: Path) -> None:
    (tmp_path / "sft" / left).parent.mkdir(parents=True)
    (tmp_path / "sft" / left).touch()
    assert find_run(tmp_path, "sft", settings(), {}) == RunFolder(tmp_path / "sft-2")


def test_a_folder_of_an_older_version_is_not_recognised(tmp_path: Path) -> None:
    begin(tmp_path / "sft-2317397348", temperature=0.9)
    assert find_run(tmp_path, "sft", settings(), {}) == RunFolder(tmp_path / "sft")


def test_differences_are_told() -> None:
    recipe = {"model": {"temperature": 0.02, "tasks": None}, "trainer": {"strategy": "auto"}}
    changed = {"model": {"temperature": 0.05, "tasks": ["a"]}, "trainer": {"strategy": {"class_path": "X"}}}
    found = differences(changed, recipe)
    assert found["model.tasks"] == {"value": ["a"], "recipe": None}
    assert found["trainer.strategy"] == {"value": {"class_path": "X"}, "recipe": "auto"}
    assert re.search(
        r"model.temperature 0.05 instead of 0.02, model.tasks \['a'\] instead of None", describe(found)
    )
    assert differences(recipe, recipe) == {} and describe({}) == "as in the recipe"
