"""SFT, then CMA, through the real command line on the micro corpus; and what it says to bad input."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rime_pl.__main__ import main
from rime_pl.backbone.adapters import read_contract
from rime_pl.backbone.mllm import load_backbone
from rime_pl.backbone.quantization import packed_weights_hash
from rime_pl.cli import StageCLI, announce
from tests.micro import build_base
from tests.stages.runs import ENDING, read_json, refine_rl_arguments, scalars, stage_arguments


@pytest.fixture(scope="module")
def runs(scenes_corpus: Path, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a finished run of each stage."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(stage_arguments("sft", scenes_corpus, micro_base, folder / "sft", *ENDING)) == 0
    start = ("--model.init_adapter_from", str(folder / "sft" / "adapter"))
    assert main(stage_arguments("cma", scenes_corpus, micro_base, folder / "cma", *start)) == 0
    adapter = folder / "cma" / "adapter"
    assert main(refine_rl_arguments(scenes_corpus, micro_base, folder / "refine_rl", adapter)) == 0
    return folder


def test_a_run_leaves_everything_a_reader_needs(runs: Path) -> None:
    for name in (
        "config.yaml",
        "manifest.json",
        "summary.json",
        "summary.png",
        "summary.txt",
        "ranks.json",
        "done.json",
    ):
        assert (runs / "cma" / name).stat().st_size > 0, name
    manifest = read_json(runs / "cma" / "manifest.json")
    assert 1 <= manifest["negatives_per_query"]["generative"] <= 3
    assert manifest["negatives_per_query"]["discriminative"] <= 3
    assert manifest["steps"] == 6
    used = manifest["utilisation"]
    assert used["share"] == pytest.approx(used["flops_per_second"] / used["product_flops_per_second"])
    assert 0 < used["share"] < 1
    assert len(scalars(runs / "cma", "train/utilisation")) == 5, "the first step is counted, not timed"
    assert manifest["argv"]
    start, own = (read_contract(runs / stage / "adapter") for stage in ("sft", "cma"))
    assert manifest["base_hash"] == own["base_hash"] and manifest["base"] == own["base"]
    assert manifest["start_hash"] == start["weights_hash"] != own["weights_hash"]
    assert read_json(runs / "sft" / "manifest.json")["start_hash"] is None
    summary = read_json(runs / "cma" / "summary.json")
    assert summary["before"] == read_json(runs / "sft" / "summary.json")["after"]
    assert set(summary["after"]["recall@1"]) == {"disc-disc", "gen-gen", "gen-disc", "disc-gen"}
    assert {"own", "reference", "shuffled", "empty"} <= set(summary["after"]["trace"])
    assert len(summary["history"]) == 2


def test_every_part_of_the_loss_is_logged(runs: Path) -> None:
    parts = {
        name: scalars(runs / "cma", f"train/loss_{name}")
        for name in ("info_nce_gen", "info_nce_disc", "ce", "cma", "decisive")
    }
    total = scalars(runs / "cma", "train/loss")
    assert len(total) == 6
    for step, value in total.items():
        assert value == pytest.approx(sum(part[step] for part in parts.values()), rel=1e-5)
    assert all(value > 0 for value in parts["decisive"].values())


@pytest.mark.parametrize("stage", ["sft", "cma", "refine_rl"])
def test_how_training_goes_and_the_settings_are_in_tensorboard(stage: str, runs: Path) -> None:
    values = {
        name: scalars(runs / stage, f"train/{name}")
        for name in ("learning_rate", "grad_norm", "pairs_per_second", "peak_memory_gib")
    }
    assert all(len(steps) == 6 for steps in values.values()), values
    first, *others = values.pop("learning_rate").values()
    assert first == 0 and max(others) > 0, "the rate of the batch itself: warm-up starts at 0"
    assert all(min(steps.values()) > 0 for steps in values.values()), values
    events = EventAccumulator(str(runs / stage / "tensorboard"))
    events.Reload()
    kept = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"data.batch_size" in kept and b"model.backbone.lora_r" in kept
    shown = yaml.safe_load((runs / stage / "tensorboard" / "hparams.yaml").read_text())
    assert shown["model.backbone.lora_r"] == 4 and shown["seed_everything"] == 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def unfinished(runs: Path, tmp_path: Path) -> Path:
    """A copy of the SFT run, as if it had been killed before its adapter was written."""
    folder = Path(shutil.copytree(runs / "sft", tmp_path / "sft"))
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (("lora_alpha", "64"), "model.backbone.lora_alpha 64 instead of 32"),
        (("lora_r", "8"), "model.backbone.lora_r 8 instead of 4"),
        (
            ("prompt.rewrite_instruction", "Say it."),
            "model.backbone.prompt.rewrite_instruction Say it. instead",
        ),
    ],
)
def test_a_resumed_run_keeps_its_backbone(
    setting: tuple[str, str], told: str, unfinished: Path, scenes_corpus: Path, micro_base: Path, capsys
) -> None:
    before = contents(unfinished)
    words = stage_arguments("sft", scenes_corpus, micro_base, unfinished, *ENDING)
    assert main([*words, f"--model.backbone.{setting[0]}", setting[1]]) == 2
    said = capsys.readouterr().err
    assert "a resumed run must keep its backbone, but has" in said and told in said
    assert contents(unfinished) == before


def test_other_settings_of_a_resumed_run_are_printed(
    unfinished: Path, scenes_corpus: Path, micro_base: Path, capsys
) -> None:
    more = ("--model.temperature", "0.5", "--model.backbone.gradient_checkpointing", "true")
    words = stage_arguments("sft", scenes_corpus, micro_base, unfinished, *ENDING, *more)
    stage = StageCLI("sft", words[2:], "rime sft fit")
    announce(stage, "sft", stage.resume_from, 6)
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"changed since the run began: model\.backbone\.gradient_checkpointing True instead of False, "
        r"model\.temperature 0\.5 instead of 0\.\d+",
        last,
    )


def spoil(name: str, checkpoint: dict[str, Any]) -> None:
    optimizer = checkpoint["optimizer_states"][0]
    if name == "another shape":
        next(iter(optimizer["state"].values()))["exp_avg"] = torch.ones(1)
    elif name == "NaN":
        next(iter(optimizer["state"].values()))["exp_avg_sq"].fill_(float("nan"))
    elif name == "no groups":
        del optimizer["param_groups"]
    elif name == "schedule":
        checkpoint["lr_schedulers"][0]["_step_count"] = None
    else:
        checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["ready"] = "3"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("another shape", "exp_avg of the optimizer has other shapes than what trains"),
        ("NaN", "exp_avg_sq of the optimizer is not finite"),
        ("no groups", "does not fit this run, or is damaged (KeyError: 'param_groups')"),
        ("schedule", "lr_schedulers: _step_count cannot be None"),
        ("counter", "loops: fit_loop.epoch_progress.total.ready is no count"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    name: str, told: str, unfinished: Path, scenes_corpus: Path, micro_base: Path, capsys
) -> None:
    file = unfinished / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    spoil(name, checkpoint)
    torch.save(checkpoint, file)
    assert main(stage_arguments("sft", scenes_corpus, micro_base, unfinished, *ENDING)) == 2
    said = capsys.readouterr().err
    assert f"{file} does not fit this run, or is damaged" in said and told in said


def test_a_run_killed_before_its_adapter_was_written_gets_it(
    unfinished: Path, runs: Path, scenes_corpus: Path, micro_base: Path
) -> None:
    assert main(stage_arguments("sft", scenes_corpus, micro_base, unfinished, *ENDING)) == 0
    whole, again = (contents(folder / "adapter") for folder in (runs / "sft", unfinished))
    assert list(whole.values()) == list(again.values()) and (unfinished / "done.json").is_file()


def test_the_base_is_untouched_and_every_adapter_tensor_moved(
    runs: Path, micro_base: Path, make_backbone
) -> None:
    trained = load_backbone(runs / "cma" / "adapter")
    assert packed_weights_hash(trained) == packed_weights_hash(make_backbone())
    before, after = (
        load_file(runs / stage / "adapter" / "adapter_model.safetensors") for stage in ("sft", "cma")
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.abs().max() > 0 for name, tensor in before.items() if "lora_B" in name)
    assert sum(file.stat().st_size for file in (runs / "cma" / "checkpoints").iterdir()) < 5e6


def test_a_finished_run_is_not_trained_again(
    runs: Path, scenes_corpus: Path, micro_base: Path, capsys
) -> None:
    marker = (runs / "sft" / "done.json").stat().st_mtime_ns
    assert main(stage_arguments("sft", scenes_corpus, micro_base, runs / "sft")) == 0
    assert "is finished" in capsys.readouterr().out
    assert (runs / "sft" / "done.json").stat().st_mtime_ns == marker


def test_an_adapter_of_another_base_is_refused(
    runs: Path, scenes_corpus: Path, tmp_path: Path, capsys
) -> None:
    other = build_base(tmp_path / "other", scenes_corpus, seed=7)
    start = ("--model.init_adapter_from", str(runs / "sft" / "adapter"))
    assert main(stage_arguments("cma", scenes_corpus, other, tmp_path / "run", *start)) == 2
    assert "must give the base model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("--data.path", "nowhere"), "nowhere"),
        (("--model.temperature", "0"), "model.temperature"),
        (("--model.backbone.lora_targets", "no_such_layer"), "lora_targets"),
        (("--data.batch_size", "500"), "data.batch_size"),
        (("--model.backbone.prompt.max_rewrite_tokens", "2"), "rewrite"),
        (("--model.backbone.name_or_path", "no/such/model"), "name_or_path"),
        (("--trainer.precision", "bf16-true"), "model.backbone.dtype bfloat16"),
        (("--trainer.accelerator", "gpu"), "trainer.accelerator is gpu, but torch finds no GPU."),
        (("--model.backbone.lora_targets", "("), "model.backbone.lora_targets must be a regular expression"),
        (
            ("--model.backbone.prompt.system_prompt", "<disc_emb>"),
            "system_prompt must not contain",
        ),
    ],
)
def test_bad_settings_are_named(
    arguments: tuple[str, ...], culprit: str, scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    assert (
        main(stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "below" / "run", *arguments)) == 2
    )
    assert culprit in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "a refused run leaves no folder"


def test_an_unknown_config_key_is_named(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    words = stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "run", "--model.temprature", "0.1")
    assert main(words) == 2
    assert "--model.temprature is not a setting" in capsys.readouterr().err


def test_refine_rl_leaves_what_a_person_watches(runs: Path) -> None:
    folder = runs / "refine_rl"
    summary = read_json(folder / "summary.json")
    assert summary["before"] == read_json(runs / "cma" / "summary.json")["after"]
    crossed = summary["after"]["crossed"]
    assert set(crossed) == {"old-old", "old-new", "new-old", "new-new"}
    assert crossed["new-new"] == summary["after"]["recall@1"]["gen-gen"]
    assert crossed["old-old"] == summary["before"]["recall@1"]["gen-gen"]
    rows, tasks = read_json(folder / "ranks.json"), ("relative", "describe")  # the headline
    for name in ("old-old", "old-new", "new-old"):
        found = {
            task: [row["ranks"][f"crossed/{name}"] == 1 for row in rows if row["task"] == task]
            for task in tasks
        }
        assert crossed[name] == pytest.approx(mean(mean(hits) for hits in found.values()))
    assert 0 <= summary["after"]["rewrite"]["slot_f1"] <= 1
    assert "Mean reward" in (folder / "rewrites.md").read_text()
    watched = "reward reward_format reward_embedding reward_spread gain no_signal rewrite_length kl k2"
    for name in (*watched.split(), "drift", "clip_fraction", "entropy", "loss", "grad_norm"):
        assert len(scalars(folder, f"train/{name}")) == 6, name
    assert max(scalars(folder, "train/reward_spread").values()) > 0.1, "else nothing was learned from"
    before, after = (
        load_file(runs / stage / "adapter" / "adapter_model.safetensors") for stage in ("cma", "refine_rl")
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_diverged_run_names_step_samples_and_last_good_checkpoint(
    runs: Path, scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    settings = [
        "--model.policy.max_kl",
        "1e-9",
        "--model.policy.num_updates",
        "1",
    ]  # one: seen in the batch after
    adapter = runs / "cma" / "adapter"
    arguments = refine_rl_arguments(scenes_corpus, micro_base, tmp_path / "run", adapter, *settings)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(r"stopped at step \d \(batch \d, update \d\)", said) and "train-000000.tar/" in said
    last, diverged = (tmp_path / "run" / "checkpoints" / f"{name}.ckpt" for name in ("last", "diverged"))
    assert f"Last good checkpoint: {last}" in said and f"is put aside: {diverged}" in said
    good, bad = (torch.load(path, weights_only=False) for path in (last, diverged))
    assert good["global_step"] < bad["global_step"]  # saved after each batch: the last was not yet looked at
    start = load_file(adapter / "adapter_model.safetensors")
    values = {name: value for name, value in good["state_dict"].items() if "lora_B" in name}
    for name, value in values.items():  # without divergence: as the reference, so untouched
        assert value.equal(start[name.removeprefix("backbone.peft.").replace(".default", "")])
    assert not any(value.equal(bad["state_dict"][name]) for name, value in values.items())

    settings = [
        "--model.policy.max_kl",
        "1",
        "--model.optimizer.learning_rate",
        "1e-5",
    ]  # as the message says
    assert main([*arguments, *settings, "--model.init_adapter_from", str(runs / "sft" / "adapter")]) == 2
    assert "another adapter than the one that this run was started with" in capsys.readouterr().err
    assert main([*arguments, *settings]) == 0
    assert f"continuing from {last}" in capsys.readouterr().out
    finished = torch.load(last, weights_only=False)
    assert finished["lr_schedulers"][0]["base_lrs"] == [1e-5, 1e-5]
    assert {group["initial_lr"] for group in finished["optimizer_states"][0]["param_groups"]} == {1e-5}


def test_a_checkpoint_is_tested_into_a_folder_of_its_own(runs: Path, tmp_path: Path, capsys) -> None:
    """What was trained, not the adapter that it started from; the run's own report stays."""
    run, again = runs / "refine_rl", tmp_path / "again"
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    words = ["refine-rl", "test", "--config", str(run / "config.yaml")]
    assert main([*words, *checkpoint, "--run_dir", str(again)]) == 0
    first, second = (read_json(folder / "summary.json")["after"] for folder in (run, again))
    assert all(second[name] == first[name] for name in ("recall@1", "trace", "crossed"))
    assert read_json(again / "manifest.json")["steps"] == read_json(run / "manifest.json")["steps"]
    assert main([*words, *checkpoint, "--run_dir", str(run)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert main([*words, "--run_dir", str(tmp_path / "bare")]) == 2
    assert "needs --ckpt_path" in capsys.readouterr().err


def test_refine_rl_without_an_adapter_is_told_where_to_start(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    assert main(stage_arguments("refine_rl", scenes_corpus, micro_base, tmp_path / "run")) == 2
    assert "model.init_adapter_from is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.batch_size", "1"), "data.batch_size must be 2 or more, because a query needs the target"),
        (
            ("--model.backbone.attn_implementation", "x"),
            "attn_implementation must be 'sdpa', 'eager' or a flash kernel",
        ),
    ],
)
def test_what_would_be_a_traceback_or_train_nothing_is_refused(
    words: tuple[str, str], message: str, scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    assert main(stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "run", *words)) == 2
    assert message in capsys.readouterr().err


def test_no_settings_of_the_trainer_are_refused(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "null.yaml").write_text("num_threads: 1\ntrainer: null\n")
    words = ["sft", "fit", "--config", str(tmp_path / "null.yaml"), "--run_dir", str(tmp_path / "run")]
    words += ["--data.path", str(scenes_corpus), "--model.backbone.name_or_path", str(micro_base)]
    assert main(words) == 2
    assert "trainer must hold settings, but is null" in capsys.readouterr().err
