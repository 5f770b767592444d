"""The commands of the controls, and the order in which they are trained."""

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rime_pl.errors import RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.run_folder import RunFolder
from rime_pl.study.controls import commands, rewrite_length, run_before, train_controls
from rime_pl.study.design import COMPARISONS
from tests.micro import PROMPT, read_pairs
from tests.study.runs import change, run_folder
from tests.study.runs import trained as trained_by

ANCHORS = ["ume_r1", "batch_anchors", "greedy_anchors", "rollout_anchors"]


def of(run: RunFolder, *skip: str, seeds: list[RunFolder] | None = None) -> dict[str, list[str]]:
    return dict(commands(run, skip, seeds or [run]))


def test_the_controls_of_refine_rl_go_on_from_the_adapter_before(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "cma", [1])  # 2 s a step
    refined = run_folder(
        tmp_path / "rl", [1], steps_timed=4, stage="refine_rl", before=before
    )  # 2.5 s a step
    found = of(refined)
    adapter = found["further_cma"].index("--model.init_adapter_from") + 1
    assert found["further_cma"][adapter] == str(before.adapter)
    assert found["further_cma"][-2:] == ["--data.steps_per_epoch", "9"]
    assert found["further_cma_same_seconds"][-1] == str(round(9 * 2.5 / 2))
    assert found["shuffled_rewards"][:4] == ["refine-rl", "fit", "--config", str(refined.config)]
    assert set(found["rollout_anchors"]) < set(found["ume_r1"])
    untimed = run_folder(tmp_path / "again", [1], steps_timed=0, stage="refine_rl", before=before)
    with pytest.raises(RimeError, match=r"again or one of its controls must be timed .* `--skip further_cma"):
        of(untimed)
    assert "further_cma_same_seconds" not in of(untimed, "further_cma_same_seconds")


def test_the_same_time_is_counted_by_the_least_disturbed_run(tmp_path: Path) -> None:
    """Of each kind two runs a seed: the controls show that CMA takes 1 s a step, and RL 1.25 s."""
    before = run_folder(tmp_path / "cma", [1])  # 2 s a step
    refined = run_folder(
        tmp_path / "rl", [1], steps_timed=4, stage="refine_rl", before=before
    )  # 2.5 s a step
    second = run_folder(
        tmp_path / "again", [1], steps_timed=2, stage="refine_rl", before=before
    )  # 5 s a step
    found = commands(second, [], [second, refined])
    assert next(found)[0] == "further_cma" and next(found)[0] == "shuffled_rewards"
    cma = run_folder(second.path / "controls" / "further_cma", [1], steps_timed=10)
    rl = run_folder(refined.path / "controls" / "shuffled_rewards", [1], steps_timed=8)
    name, words = next(found)
    assert name == "further_cma_same_seconds" and words[-1] == str(round(9 * 1.25 / 1))
    change(rl, "manifest.json", device={"threads": 2})  # faster for another reason: not counted
    again = of(second, seeds=[second, refined])
    assert again["further_cma_same_seconds"][-1] == str(round(9 * 2.5 / 1))
    for run in (before, cma):
        change(run, "manifest.json", device={"threads": 2})  # CMA with two threads only, RL with others
    with pytest.raises(RimeError, match=r"cma or one of its controls must be timed with num_threads=None"):
        of(second, seeds=[second, refined])


def test_the_controls_of_all_seeds_are_trained_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that further CMA for the same time takes equally many steps with each seed."""
    before = run_folder(tmp_path / "cma", [1])
    runs = [run_folder(tmp_path / name, [1], stage="refine_rl", before=before) for name in ("0", "1")]
    trained: list[tuple[str, str]] = []

    def train(run: RunFolder, name: str, words: list[str]) -> None:
        trained.append((run.path.name, name))
        trained_by(words, steps_timed=5 if run.path.name == "0" else 10, stage="refine_rl")

    monkeypatch.setattr("rime_pl.study.controls._train", train)
    seeds = train_controls(runs, ANCHORS)
    names = ["further_cma", "shuffled_rewards", "further_cma_same_seconds"]
    assert trained == [(seed, name) for name in names for seed in ("0", "1")]
    assert [list(seed) for seed in seeds] == [["before", *names, "refine_rl"]] * 2
    train_controls(runs, ANCHORS)
    assert len(trained) == 6  # what is finished is taken as it is
    timed = seeds[1]["further_cma_same_seconds"]
    change(timed, "manifest.json", steps=8)  # by the times of another call
    train_controls(runs, ANCHORS)
    old = seeds[1]["shuffled_rewards"]
    change(old, "manifest.json", steps=4)  # left by an earlier comparison
    with pytest.raises(RimeError, match=r"0/controls/shuffled_rewards: 9, .*1/controls/shuffled_rewards: 4"):
        train_controls(runs, ANCHORS)


@pytest.mark.parametrize("stage", sorted(COMPARISONS))
def test_a_stage_takes_the_words_of_its_controls(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rime_pl.commands.settings import complete_settings

    monkeypatch.setattr("rime_pl.study.controls.chain_of_thought_lengths", lambda run: (48, 0.5))
    monkeypatch.setattr("rime_pl.study.controls.rewrite_length", lambda run: 9)
    run = run_folder(tmp_path / "run", [1], stage=stage, before=run_folder(tmp_path / "before", [1]))
    found = of(run)
    shown = COMPARISONS[stage]
    assert found.keys() == set(shown.variants) - {"before", shown.subject}
    for words in found.values():
        stage_of_words = words[0].replace("-", "_")
        recipe = Path(__file__).parents[2] / "configs/tiny" / f"{stage_of_words}.yaml"
        # refuses what the stage does not know
        complete_settings(stage_of_words, ["--config", str(recipe), *words[4:]])


def test_a_run_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    with pytest.raises(RimeError, match=r"--run must name finished runs, but .*unfinished has no done.json"):
        train_controls([RunFolder(tmp_path / "unfinished")])
    first = run_folder(tmp_path / "first", [1])
    with pytest.raises(RimeError, match=r"first must start from the adapter of an earlier stage"):
        run_before(first)
    with pytest.raises(RimeError, match=r"must name runs of one stage, but names runs of cma, refine_rl"):
        train_controls([first, run_folder(tmp_path / "rl", [1], stage="refine_rl")])
    with pytest.raises(
        RimeError, match=r"--skip must name controls \(further_sft, without_decisive\), but .* mine"
    ):
        train_controls([run_folder(tmp_path / "cma", [1], before=first)], ["mine"])


def test_a_control_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode = 1

    monkeypatch.setattr("subprocess.run", lambda words: Failed)
    run = run_folder(tmp_path / "cma", [1], before=run_folder(tmp_path / "sft", [1]))
    with pytest.raises(RimeError, match=r"the control further_sft of .*cma failed.* `--skip further_sft`"):
        train_controls([run])


def test_a_finished_control_of_other_settings_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another weight of the cross-entropy was chosen since: the old control is named."""
    monkeypatch.setattr("rime_pl.study.controls.chain_of_thought_lengths", lambda run: (48, 0.5))
    monkeypatch.setattr(
        "rime_pl.study.controls._train", lambda run, name, words: trained_by(words, stage="sft")
    )
    run = run_folder(tmp_path / "sft", [1], stage="sft")
    others = ["discriminative_only", "filler_tokens", "latent_tokens"]
    [found] = train_controls([run], others, 16.0)
    assert found["chain_of_thought"].settings["model"]["lambda_ce"] == 16
    assert found["chain_of_thought_same_tokens"].settings["model"]["lambda_ce"] == 16
    assert train_controls([run], others, 16.0)[0].keys() == found.keys()
    message = r"_same_tokens must have been trained with --model.lambda_ce 4.0, but was with 16.0. Delete"
    with pytest.raises(RimeError, match=message):
        train_controls([run], others, 4.0)


def test_latent_tokens_are_as_many_as_a_rewrite_has(scenes_corpus: Path, micro_base: Path) -> None:
    """Counted by the tokenizer here, over the training rewrites of both sides."""
    processor = RimeProcessor.from_pretrained(str(micro_base), PROMPT)
    data = {"path": str(scenes_corpus), "tasks": None}
    backbone = {"name_or_path": str(micro_base), "prompt": asdict(PROMPT)}
    run: Any = SimpleNamespace(settings={"data": data, "model": {"backbone": backbone}})
    texts = [
        item.rewrite
        for pair in read_pairs(scenes_corpus, "train")
        for item in (pair.query, pair.target)
        if item
    ]
    lengths = [len(processor.tokenizer.tokenize(text)) for text in texts if text]
    assert len(lengths) == len(texts) and rewrite_length(run) == math.ceil(sum(lengths) / len(lengths))
