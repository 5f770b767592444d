"""The table and picture of `rime compare`, from run folders written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from rime_pl.commands.compare import (
    controls,
    pooled_difference,
    previous_run,
    read_variant,
    stage_of,
    train_controls,
)
from rime_pl.commands.settings import read_settings
from rime_pl.errors import RimeError
from rime_pl.study.comparison import COMPARISONS, comparison_figure, comparison_markdown
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION

CROSSED = {"old-old": 0.5, "new-old": 0.6, "old-new": 0.51, "new-new": 0.62}


def variant(seed: int, recall: float, seconds: float | None, stage: str) -> dict[str, Any]:
    return {
        "seed": seed,
        "recall@1": dict.fromkeys(MODE_PAIRS, recall),
        "trace": dict.fromkeys(REWRITE_ABLATION, recall),
        "rewrite": {"slot_f1": recall, "mean_length": 10 * recall},
        "crossed": CROSSED if stage == "refine_rl" else None,
        "curves": {"reward_spread": 0.25, "kl": 0.125} if stage == "refine_rl" else {},
        "per_task": {"twin": dict.fromkeys(MODE_PAIRS, recall)},
        "gallery": 40,
        "chance": 1 / 40,
        "seconds_per_step": seconds,
        "steps": 7,
    }


def result(*seeds: tuple[float, float | None], stage: str = "cma") -> dict[str, Any]:
    shown = COMPARISONS[stage]
    return {
        "stage": stage,
        "runs": [
            {name: variant(seed, recall, seconds, stage) for name in shown.variants}
            for seed, (recall, seconds) in enumerate(seeds)
        ],
        "differences": {
            d.name: {"mean": 0.02, "lower": -0.01, "upper": 0.05, "seeds": [0.01, 0.03]}
            for d in shown.differences
        },
    }


def test_means_and_spread_of_the_seeds_and_the_least_disturbed_time() -> None:
    table = comparison_markdown(result((0.5, 2.0), (0.7, None), (0.6, 1.5)))
    assert "| CMA, decisive | 7 | 1.50 | 0.600 (0.50-0.70) |" in table
    assert "seeds 0, 1, 2" in table and "minus after as many further SFT steps | +0.020 |" in table
    assert "| SFT (before) | 7 | - | 0.500 |" in comparison_markdown(result((0.5, None)))


def test_refine_rl_shows_who_writes_and_who_embeds_and_its_curves() -> None:
    table = comparison_markdown(result((0.5, 2.0), stage="refine_rl"))
    assert "| new rewrites | 0.600 | 0.620 |" in table and "| old rewrites | 0.500 | 0.510 |" in table
    assert "| Refine-RL | 0.250 | 0.125 |" in table
    fewer = result((0.5, 2.0), stage="refine_rl")
    del fewer["runs"][0]["shuffled"], fewer["differences"]["gen_minus_shuffled"]
    assert "shuffled" not in comparison_markdown(fewer).replace("trace shuffled", "")
    assert len(comparison_figure(fewer).axes[0].patches) == 7 * len(MODE_PAIRS)


def test_what_is_written_is_drawn_against_its_length() -> None:
    study = result((0.5, 2.0), (0.7, 1.0), stage="sft")
    lengths = comparison_figure(study).axes[2]
    assert len(lengths.collections) == 5 and len(lengths.collections[0].get_offsets()) == 2
    assert lengths.collections[0].get_offsets()[:, 0].tolist() == [0, 0]  # the discriminative mode alone
    assert "minus with pauses | +0.020 |" in comparison_markdown(study)


def test_a_bar_for_each_variant_and_a_dot_for_each_seed() -> None:
    modes, probe = comparison_figure(result((0.5, 2.0), (0.7, 1.0))).axes
    assert len(modes.patches) == 4 * len(MODE_PAIRS)
    assert {bar.get_height() for bar in modes.patches} == {0.6}
    assert all(len(line.get_ydata()) == 2 for line in (*modes.lines, *probe.lines))


def folder(
    path: Path,
    ranks: list[int],
    steps_timed: int = 5,
    stage: str = "cma",
    before: Path | None = None,
    seed: int = 3,
) -> Path:
    """As much of a finished run as the comparison reads."""
    path.mkdir(parents=True)
    after: dict[str, Any] = {
        "recall@1": dict.fromkeys(MODE_PAIRS, 0.5),
        "trace": dict.fromkeys(REWRITE_ABLATION, 0.5),
        "rewrite": {"slot_f1": 0.5, "mean_length": 4.0},
    }
    summary = {"after": after, "per_task": {"twin": after}, "gallery": 4, "chance": 0.25}
    (path / "summary.json").write_text(json.dumps(summary | {"seconds": {"fit": 10.0}}))
    (path / "manifest.json").write_text(
        json.dumps(
            {"stage": stage, "seed": seed, "data": "data/mine", "steps": 9, "steps_timed": steps_timed}
        )
    )
    rows = [
        {"key": str(n), "task": "twin", "ranks": dict.fromkeys([*MODE_PAIRS, "trace/empty"], rank)}
        for n, rank in enumerate(ranks)
    ]
    (path / "ranks.json").write_text(json.dumps(rows[::-1]))  # the file's order says nothing
    adapter = str(before / "adapter") if before else None
    config = {"recall": {"headline_tasks": ["twin"]}, "model": {"init_adapter_from": adapter}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "done.json").write_text("{}")
    return path


def test_differences_pair_the_queries_of_all_seeds(tmp_path: Path) -> None:
    before, after = folder(tmp_path / "before", [1, 2, 2, 1]), folder(tmp_path / "after", [1, 1, 2, 1])
    seeds = [{"before": before, "decisive": after}] * 2
    difference = pooled_difference(seeds, "decisive", "before", "disc-disc")
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["lower"] >= 0.0  # no query is lost: paired, the difference is never negative
    # a query that two seeds saw is not two queries: twice the same seed says no more than once
    once = pooled_difference(seeds[:1], "decisive", "before", "disc-disc")
    assert {**difference, "seeds": once["seeds"]} == once
    with pytest.raises(RimeError, match=r"before/ranks.json has no crossed/new-old"):
        pooled_difference(seeds, "decisive", "before", "crossed/new-old")
    same = pooled_difference(seeds, "decisive", "decisive", "gen-gen", "disc-disc")
    assert same == {"mean": 0.0, "lower": 0.0, "upper": 0.0, "seeds": [0.0, 0.0]}


def test_seconds_per_step_are_of_the_steps_that_were_timed(tmp_path: Path) -> None:
    assert read_variant(folder(tmp_path / "resumed", [1], steps_timed=5))["seconds_per_step"] == 2.0
    assert read_variant(folder(tmp_path / "ended", [1], steps_timed=0))["seconds_per_step"] is None


def test_the_controls_of_refine_rl_go_on_from_the_adapter_before(tmp_path: Path) -> None:
    before = folder(tmp_path / "cma", [1])  # 2 s a step
    refined = folder(tmp_path / "rl", [1], steps_timed=4, stage="refine_rl", before=before)  # 2.5 s a step
    found = dict(controls("refine_rl", refined))
    adapter = found["further_steps"].index("--model.init_adapter_from") + 1
    assert found["further_steps"][adapter] == str(before / "adapter")
    assert found["further_steps"][-2:] == ["--data.steps_per_epoch", "9"]
    assert found["further_seconds"][-1] == str(round(9 * 2.5 / 2))
    assert found["shuffled"][:4] == ["refine-rl", "fit", "--config", str(refined / "config.yaml")]
    untimed = folder(tmp_path / "again", [1], steps_timed=0, stage="refine_rl", before=before)
    with pytest.raises(RimeError, match=r"again: neither .* was timed .* --skip further_seconds"):
        dict(controls("refine_rl", untimed))
    assert "further_seconds" not in dict(controls("refine_rl", untimed, ["further_seconds"]))


def test_equal_seconds_are_counted_by_the_least_disturbed_run(tmp_path: Path) -> None:
    """Of either kind two runs a seed: the controls show that alignment takes 1 s a step, and RL 1.25 s."""
    before = folder(tmp_path / "cma", [1])  # 2 s a step
    refined = folder(tmp_path / "rl", [1], steps_timed=4, stage="refine_rl", before=before)  # 2.5 s a step
    second = folder(tmp_path / "again", [1], steps_timed=2, stage="refine_rl", before=before)  # 5 s a step
    found = controls("refine_rl", second, seeds=[second, refined])
    assert next(found)[0] == "further_steps" and next(found)[0] == "shuffled"
    folder(second / "controls" / "further_steps", [1], steps_timed=10)
    folder(refined / "controls" / "shuffled", [1], steps_timed=8)
    name, words = next(found)
    assert name == "further_seconds" and words[-1] == str(round(9 * 1.25 / 1))
    threads(refined / "controls" / "shuffled", 2)  # faster for another reason: not counted
    assert dict(controls("refine_rl", second, seeds=[second, refined]))["further_seconds"][-1] == str(
        round(9 * 2.5 / 1)
    )
    for run in (before, second / "controls" / "further_steps"):
        threads(run, 2)  # alignment with two threads alone, RL with others
    with pytest.raises(RimeError, match=r"cma: neither .* num_threads=None, as the runs of --run were"):
        dict(controls("refine_rl", second, seeds=[second, refined]))


def threads(run: Path, number: int) -> None:
    manifest = run / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"device": {"threads": number}}))


def test_the_controls_of_all_seeds_are_trained_in_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that each seed's further alignment has as many steps as every other's."""
    before = folder(tmp_path / "cma", [1])
    runs = [folder(tmp_path / name, [1], stage="refine_rl", before=before) for name in ("0", "1")]
    trained: list[tuple[str, str]] = []

    def train(run: Path, name: str, words: list[str]) -> None:
        trained.append((run.name, name))
        folder(Path(words[-1]), [1], steps_timed=5 if run.name == "0" else 10, stage="refine_rl")

    monkeypatch.setattr("rime_pl.commands.compare._train", train)
    seeds = train_controls("refine_rl", runs, ["ancestor", "batch_anchors", "rollout_anchors"])
    names = ["further_steps", "shuffled", "further_seconds"]
    assert trained == [(seed, name) for name in names for seed in ("0", "1")]
    assert [list(seed) for seed in seeds] == [["before", *names, "refined"]] * 2
    train_controls("refine_rl", runs, ["ancestor", "batch_anchors", "rollout_anchors"])
    assert len(trained) == 6  # what is finished is taken as it is
    manifest = runs[1] / "controls" / "further_seconds" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"steps": 4}))  # of an older comparison
    with pytest.raises(RimeError, match=r"0/controls/further_seconds: 9, .*1/controls/further_seconds: 4"):
        train_controls("refine_rl", runs, ["ancestor", "batch_anchors", "rollout_anchors"])


@pytest.mark.parametrize("stage", sorted(COMPARISONS))
def test_a_stage_takes_the_words_of_its_controls(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rime_pl.commands.compare._room_for_steps", lambda folder: (96, 0.5))
    before = folder(tmp_path / "before", [1])
    run = folder(tmp_path / "run", [1], stage=stage, before=before)
    recipe = Path(__file__).parents[2] / "configs/tiny"
    names = set(COMPARISONS[stage].variants) - {"before", COMPARISONS[stage].subject}
    found = dict(controls(stage, run))
    assert found.keys() == names
    for words in found.values():
        of = words[0].replace("-", "_")
        read_settings([recipe / f"{of}.yaml"], of, words[4:])  # refuses what the stage does not know


def test_curves_are_read_back_from_tensorboard(tmp_path: Path) -> None:
    run = folder(tmp_path / "rl", [1], stage="refine_rl")
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for step, value in enumerate((0.5, 1.5)):
            writer.add_scalar("train/kl", value, step)
            writer.add_scalar("train/grad_norm", 2 * value, step)
    assert read_variant(run)["curves"] == {
        "kl": 1.0,
        "grad_norm": 2.0,
        "kl_highest": 1.5,
        "grad_norm_highest": 3.0,
    }


def test_a_run_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    with pytest.raises(RimeError, match=r"--run .*unfinished: no finished run"):
        stage_of([tmp_path / "unfinished"])
    first = folder(tmp_path / "first", [1])
    with pytest.raises(RimeError, match=r"--run .*first: it started from no adapter"):
        previous_run(first)
    with pytest.raises(RimeError, match=r"moved: no manifest.json here"):
        read_variant(tmp_path / "moved")
    with pytest.raises(RimeError, match=r"of cma, refine_rl; give runs of one stage"):
        stage_of([first, folder(tmp_path / "rl", [1], stage="refine_rl")])
