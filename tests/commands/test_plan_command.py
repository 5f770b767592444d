"""`rime plan` through the command line, on the micro checkpoint without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rime_pl.__main__ import main
from rime_pl.preflight.plan.predict import StagePlan

RECIPE = Path(__file__).parents[2] / "configs/tiny/cma.yaml"


@pytest.fixture(scope="module")
def without_weights(micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "base"
    shutil.copytree(micro_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def plan(base: Path, corpus: Path, *more: str) -> int:
    words = ["--model.backbone.name_or_path", str(base), "--data.path", str(corpus), "--data.batch_size", "4"]
    return main(["plan", "--config", str(RECIPE), *words, *more])


def test_json_needs_no_weights(
    without_weights: Path, scenes_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(without_weights, scenes_corpus, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["negatives_per_query"] == 3 and told["steps"] == 200 and "read from" in told["lengths"]
    sft, cma = told["stages"]
    assert (sft["stage"], cma["stage"]) == ("sft", "cma") and cma["peak"] > sft["peak"]
    assert sft["peak"] == sum(sft["parts"].values()) and min(sft["parts"].values()) >= 0
    assert told["disk_bytes"]["adapter"] == 4 * told["trained_parameters"]
    assert all(row["seconds_per_step"] > 0 for row in told["hours"]) and not told["changes"]


@pytest.mark.long
def test_what_to_change_if_it_does_not_fit(
    without_weights: Path, scenes_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(without_weights, scenes_corpus, "--json", "--memory", "0.001") == 0
    told = json.loads(capsys.readouterr().out)
    _, cma = told["stages"]
    smaller = {change["setting"]: change["peak"] for change in told["changes"]}
    assert smaller["--model.backbone.gradient_checkpointing true"] < cma["peak"]
    fewer = next(peak for setting, peak in smaller.items() if setting.startswith("--data.batch_size 2 "))
    assert fewer < cma["peak"]
    one_row = next(p for setting, p in smaller.items() if setting.startswith("--model.micro_batches.size 1 "))

    assert plan(without_weights, scenes_corpus, "--json", "--model.micro_batches.size", "1") == 0
    cached = json.loads(capsys.readouterr().out)
    peak = cached["stages"][1]["peak"]
    assert peak < cma["peak"] and peak == pytest.approx(one_row, rel=0.1)
    assert cached["negatives_per_query"] == 3 and cached["flops_per_step"] > told["flops_per_step"]


@pytest.mark.long
def test_refine_rl_is_planned_by_its_own_settings(
    without_weights: Path,
    scenes_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    recipe = ["plan", "--config", str(RECIPE.parent / "refine_rl.yaml"), "--data.path", str(scenes_corpus)]
    recipe += ["--model.backbone.name_or_path", str(without_weights), "--model.rollouts.num_generations", "4"]
    assert main([*recipe, "--json", "--memory", "0.001"]) == 0
    told = json.loads(capsys.readouterr().out)
    (only,) = told["stages"]
    assert only["stage"] == "refine_rl" and only["peak"] == sum(only["parts"].values())
    assert told["negatives_per_query"] is None and told["steps"] == 120
    changes = {change["setting"].split(" (")[0]: change["peak"] for change in told["changes"]}
    assert (
        changes["--model.rollouts.items_per_pass 1"]
        < changes["--model.rollouts.items_per_pass 4"]
        < only["peak"]
    )
    assert changes["--model.rollouts.num_generations 2"] < only["peak"]
    assert changes["--model.rollouts.max_new_tokens 16"] < only["peak"]
    assert main([*recipe, "--model.rollouts.sides", "query", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["peak"] < only["peak"]
    assert main([*recipe, "--model.reward.embedder", "policy", "--json"]) == 0
    policy = json.loads(capsys.readouterr().out)["flops_per_step"]
    assert main([*recipe, "--model.policy.num_updates", "2", "--json"]) == 0
    twice = json.loads(capsys.readouterr().out)["flops_per_step"]
    assert told["flops_per_step"] < policy < twice  # one pass forward more; one with its gradient more
    overlay = str(RECIPE.parents[1] / "overlays/fsdp.yaml")
    assert main([*recipe, "--config", overlay]) == 2
    assert "not with FSDP2" in capsys.readouterr().err
    assert main(recipe) == 0
    assert "longer than its FLOPs say" in capsys.readouterr().out


def test_steps_are_those_of_the_pairs_that_the_stage_takes(
    without_weights: Path,
    scenes_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = ["--data.steps_per_epoch", "null", "--trainer.max_epochs", "1", "--data.annotated_share", "0.5"]
    whole += ["--data.batch_size", "2", "--data.annotated_batch_share", "null"]
    monkeypatch.setattr(
        "rime_pl.preflight.plan.planning.predict_stage", lambda *_: StagePlan("cma", {}, 0, "", 1.0, 1, 1)
    )
    steps = {}
    for rewrites in ("all", "annotated", "unannotated"):
        assert plan(without_weights, scenes_corpus, "--json", *whole, "--data.rewrites", rewrites) == 0
        steps[rewrites] = json.loads(capsys.readouterr().out)["steps"]
    assert 0 < steps["annotated"] < steps["all"] > steps["unannotated"] > 0
    # each task may lose a batch to rounding
    assert abs(steps["annotated"] + steps["unannotated"] - steps["all"]) <= 3


def test_tables_and_assumed_lengths(
    without_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert plan(without_weights, tmp_path, "--image_tokens", "4", "--steps", "10", "--memory", "64") == 0
    told = capsys.readouterr().out
    for words in (
        "negatives per query",
        "64 words, 4 visual tokens, 32 of rewrite",
        "4-bit weights",
        "peak",
    ):
        assert words in told
    assert "cma fits in 64 GiB" in told and "predicted" in told


def test_several_processes_share(
    without_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    for overlay in ((), ("--config", str(RECIPE.parents[1] / "overlays/fsdp.yaml"))):
        assert plan(without_weights, tmp_path, "--image_tokens", "4", "--json", *overlay) == 0
        seen.append(json.loads(capsys.readouterr().out))
    one, two = (told["stages"][0]["parts"] for told in seen)
    assert (
        two["4-bit weights"] * 2 == one["4-bit weights"]
        and two["other frozen weights"] == one["other frozen weights"]
    )
    assert two["backward"] < 0.7 * one["backward"] and seen[1]["negatives_per_query"] == 3
    assert plan(without_weights, tmp_path, *overlay, "--data.batch_size", "7") == 2
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
