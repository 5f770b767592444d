"""`rime plan` through the command line, on the micro checkpoint without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rime_pl.__main__ import main
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.datamodules.shards import read_split
from rime_pl.preflight.plan.predict import StagePlan
from rime_pl.types import Batch, Item, Pair

RECIPE = Path(__file__).parents[2] / "configs/tiny/cma.yaml"


@pytest.fixture(scope="module")
def without_weights(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "base"
    shutil.copytree(micro_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def plan(base: Path, corpus: Path | None, *more: str, stage: str = "cma") -> int:
    words = ["--model.backbone.name_or_path", str(base), "--data.batch_size", "4"]
    words += ["--data.path", str(corpus)] if corpus else []
    return main(["plan", "--config", str(RECIPE.with_name(f"{stage}.yaml")), *words, *more])


Planned = list[tuple[Any, Batch, int]]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Modules, batches and numbers of further targets that are planned, without the simulation."""
    made: Planned = []

    def record(module: Any, architecture: object, batch: Batch, further: int) -> StagePlan:
        made.append((module, batch, further))
        return StagePlan(type(module).__module__.rpartition(".")[2], {"all": 2**40}, 1.0, 1, 1)

    monkeypatch.setattr("rime_pl.preflight.plan.planning.predict_stage", record)
    return made


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_json_needs_no_weights(
    without_weights: Path, scenes_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(without_weights, scenes_corpus, "--json") == 0
    found = told(capsys)
    assert found["negatives_per_query"] == 3 and found["steps"] == 200 and "read from" in found["lengths"]
    sft, cma = found["stages"]
    assert (sft["stage"], cma["stage"]) == ("sft", "cma") and cma["peak_bytes"] > sft["peak_bytes"]
    assert sft["peak_bytes"] == sum(sft["parts"].values()) and min(sft["parts"].values()) >= 0
    assert found["disk_bytes"]["adapter"] == 4 * found["trained_parameters"]
    assert all(row["seconds_per_step"] > 0 for row in found["hours"]) and not found["changes"]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (
            "cma",
            {
                "--model.micro_batches.size 1",
                "--model.backbone.gradient_checkpointing true",
                "--data.batch_size 2",
                "rewrites of at most 16 tokens",
            },
        ),
        (
            "refine_rl",
            {
                "--model.rollouts.items_per_pass 2",
                "--model.rollouts.items_per_pass 1",
                "--model.rollouts.passes_per_sampling 1",
                "--model.backbone.gradient_checkpointing true",
                "--model.rollouts.max_new_tokens 16",
                "--model.rollouts.num_generations 2",
                "--data.batch_size 2",
            },
        ),
    ],
)
def test_each_change_that_may_help_is_one_setting(
    stage: str,
    changes: set[str],
    without_weights: Path,
    scenes_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    planned: Planned,
) -> None:
    more = ["--model.rollouts.num_generations", "4"] if stage == "refine_rl" else []
    assert plan(without_weights, scenes_corpus, *more, "--memory", "1", "--json", stage=stage) == 0
    typed = [change["setting"].split(" (")[0] for change in told(capsys)["changes"]]
    assert set(typed) == changes
    for setting, (module, batch, _) in zip(typed, planned[-len(typed) :], strict=True):
        value = yaml.safe_load(setting.rpartition(" ")[2])
        match setting.split(" ")[0].lstrip("-").split("."):
            case "data", "batch_size":
                assert len(batch) == value
            case "model", group, name:
                settings = module.config if group == "backbone" else getattr(module, group)
                assert getattr(settings, name) == value
            case _:
                assert max(side.completions.ids.shape[1] for side in batch.sides) <= 16 + 2


def test_hard_negatives_and_further_positives_are_planned(
    without_weights: Path, scenes_corpus: Path, planned: Planned
) -> None:
    assert plan(without_weights, scenes_corpus, "--json") == 0
    assert {further for _, _, further in planned} == {0}
    planned.clear()
    more = ["--data.hard_negatives", "2", "--data.positives", "1"]
    assert plan(without_weights, scenes_corpus, *more, "--json") == 0
    assert {further for _, _, further in planned} == {3}


def test_refine_rl_is_planned_by_itself(
    without_weights: Path,
    scenes_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    planned: Planned,
) -> None:
    assert plan(without_weights, scenes_corpus, "--json", stage="refine_rl") == 0
    found = told(capsys)
    assert len(planned) == 2, "for its memory and for its time; no other stage"
    assert found["negatives_per_query"] is None and found["steps"] == 120
    assert plan(without_weights, scenes_corpus, stage="refine_rl") == 0
    assert "longer than its FLOPs say" in capsys.readouterr().out
    overlay = ["--config", str(RECIPE.parents[1] / "overlays/fsdp.yaml")]
    assert plan(without_weights, scenes_corpus, *overlay, stage="refine_rl") == 2
    assert "not with FSDP2" in capsys.readouterr().err


def test_steps_are_those_of_the_pairs_that_the_stage_takes(
    without_weights: Path,
    scenes_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    planned: Planned,
) -> None:
    whole = ["--data.steps_per_epoch", "null", "--trainer.max_epochs", "1", "--data.annotated_share", "0.5"]
    whole += ["--data.batch_size", "2", "--data.annotated_batch_share", "null"]
    whole += ["--data.require_rewrites", "false"]
    steps = {}
    for rewrites in ("all", "annotated", "unannotated"):
        assert plan(without_weights, scenes_corpus, "--json", *whole, "--data.rewrites", rewrites) == 0
        steps[rewrites] = told(capsys)["steps"]
    assert 0 < steps["annotated"] < steps["all"] > steps["unannotated"] > 0
    # each task may lose a batch to rounding
    assert abs(steps["annotated"] + steps["unannotated"] - steps["all"]) <= 3


@pytest.mark.parametrize(
    ("stage", "settings", "batches"),
    [
        ("cma", ["--trainer.max_steps", "30"], 30),  # before the end of 2 epochs of 100
        ("cma", ["--trainer.max_steps", "3000"], 200),
        ("cma", ["--trainer.limit_train_batches", "25"], 50),
        ("cma", ["--trainer.limit_train_batches", "0.5"], 100),
        ("cma", ["--trainer.accumulate_grad_batches", "4", "--trainer.max_steps", "30"], 120),
        ("refine_rl", ["--model.policy.num_updates", "4", "--trainer.max_steps", "30"], 8),
        ("refine_rl", ["--model.policy.num_updates", "4"], 120),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_run_ends_at_the_first_limit(
    stage: str,
    settings: list[str],
    batches: int,
    without_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    planned: Planned,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan(without_weights, None, "--json", *settings, stage=stage) == 0
    assert told(capsys)["steps"] == batches


def test_memory_is_for_the_longest_pairs_and_time_for_usual_ones(
    without_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], planned: Planned
) -> None:
    def pair(number: int) -> Pair:
        words = " ".join(["red"] * (40 if number in (7, 190) else 1))
        items = (
            Item(f"{side} {number} {words}", content_id=f"{side} {number}", rewrite="a") for side in "qt"
        )
        return Pair(f"{number:03}", "texts", "texts", *items)

    corpus = tmp_path / "corpus"
    splits = {"train": [pair(n) for n in range(200)], "val": [pair(200)], "test": [pair(201)]}
    write_corpus(
        corpus, "texts", "CC0", splits, {split: len(pairs) for split, pairs in splits.items()}, seed=0
    )
    capsys.readouterr()  # the progress of writing it
    assert plan(without_weights, corpus, "--json", "--data.batch_size", "2") == 0
    found = told(capsys)
    sft, longest, usual = (batch for _, batch, _ in planned)  # CMA once more for the time
    assert longest is sft and len(longest) == len(usual) == 2
    shortest = min(int(side.prompts.attention_mask.sum(1).min()) for side in longest.sides)
    assert shortest >= 40 > max(side.prompts.input_ids.shape[1] for side in usual.sides)
    assert found["longest_row"] > 40 and found["tokens_per_batch"] < 2 * 2 * 40
    assert "memory for the longest pairs, time for a mean of" in found["lengths"]


def test_a_corpus_that_is_misspelt_is_refused_and_one_not_built_yet_is_said(
    without_weights: Path,
    scenes_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    planned: Planned,
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/scenes").symlink_to(scenes_corpus)
    monkeypatch.chdir(tmp_path)
    for typed in ("data/scnes", "scene"):
        assert plan(without_weights, Path(typed)) == 2
        said = capsys.readouterr().err
        assert f"{typed!r} does not exist. Did you mean 'data/scenes'?" in said
    (tmp_path / "data/openmoji").mkdir()
    assert plan(without_weights, None) == 2, "half a corpus"
    assert "has no corpus.json" in capsys.readouterr().err
    (tmp_path / "data/openmoji").rmdir()
    assert plan(without_weights, None, "--json") == 0
    assert "assumed, because there is no data/openmoji yet" in told(capsys)["lengths"]
    assert not planned[0][1].query.prompts.attention_mask.eq(0).any()


def test_a_damaged_corpus_is_one_sentence(
    without_weights: Path,
    scenes_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    planned: Planned,
) -> None:
    corpus = Path(shutil.copytree(scenes_corpus, tmp_path / "corpus"))
    broken = read_split(corpus, "train")[0]
    offset, size = broken.members["json"]
    with broken.shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * size)
    assert plan(without_weights, corpus) == 2
    said = capsys.readouterr().err
    assert broken.name in said and "Traceback" not in said
    assert plan(without_weights, corpus, "--data.max_broken_share", "0.1", "--json") == 0
    broken.shard.write_bytes(b"")
    assert plan(without_weights, corpus) == 2
    assert "Is it truncated?" in capsys.readouterr().err


def test_limits_that_the_processor_refuses_are_told(
    without_weights: Path, scenes_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(without_weights, scenes_corpus, "--model.backbone.prompt.max_pixels", "9") == 2
    assert "max_pixels must be at least" in capsys.readouterr().err


def test_a_tower_that_nobody_divides_is_refused(
    without_weights: Path, scenes_corpus: Path, planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = ("--model.backbone.shard_tower", "true")
    assert plan(without_weights, scenes_corpus, *tower) == 2
    assert "model.backbone.shard_tower=true needs FSDP2" in capsys.readouterr().err
    overlay = ("--config", str(RECIPE.parents[1] / "overlays/fsdp.yaml"))
    assert plan(without_weights, scenes_corpus, *overlay, *tower) == 0 and planned


def test_tables_and_assumed_lengths(
    without_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    assert plan(without_weights, None, "--image_tokens", "4", "--steps", "10", "--memory", "64") == 0
    said = capsys.readouterr().out
    for words in (
        "negatives per query",
        "64 words, 4 visual tokens, 32 of rewrite",
        "4-bit weights",
        "peak",
        "on the longest pairs",
        "of a mean batch",
        "Not in it: start, reading and decoding of data, evaluation",
    ):
        assert words in said
    assert "cma fits in 64 GiB" in said and "predicted" in said


def test_several_processes_share(
    without_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    for overlay in ((), ("--config", str(RECIPE.parents[1] / "overlays/fsdp.yaml"))):
        assert plan(without_weights, None, "--image_tokens", "4", "--json", *overlay) == 0
        seen.append(json.loads(capsys.readouterr().out))
    one, two = (found["stages"][0]["parts"] for found in seen)
    assert (
        two["4-bit weights"] * 2 == one["4-bit weights"]
        and two["other frozen weights"] == one["other frozen weights"]
    )
    static = {
        "4-bit weights",
        "other frozen weights",
        "trained weights",
        "optimiser states",
        "gathered layers",
    }
    step_of_one, step_of_two = (sum(parts[n] for n in parts.keys() - static) for parts in (one, two))
    assert 0 < step_of_two < 0.7 * step_of_one and seen[1]["negatives_per_query"] == 3
    assert plan(without_weights, None, *overlay, "--data.batch_size", "7") == 2
    assert "must be a multiple of the number of processes, but is 7 with 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", str(RECIPE), "--data.batch_sise", "8"], "--data.batch_sise"),
        (
            ["--config", str(RECIPE.parents[1] / "overlays/ddp.yaml")],
            "the name of the file is not a stage. Add --stage",
        ),
        (["--config", str(RECIPE), "--model.backbone.name_or_path", "nothing/here"], "no config.json for"),
        (
            ["--config", str(RECIPE), "--model.backbone.name_or_path", "TEXT_ONLY"],
            "must be a Qwen2-VL, Qwen2.5",
        ),
    ],
)
def test_errors(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    words = [str(tmp_path) if word == "TEXT_ONLY" else word for word in words]
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
