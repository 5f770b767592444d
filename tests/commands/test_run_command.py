"""`rime run` with stages that only leave files: what is started, found again, resumed, never overwritten."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from rime_pl.__main__ import main
from rime_pl.backbone.adapters import CONTRACT_FILE, WEIGHTS_FILE
from rime_pl.commands import run as command
from rime_pl.corpus_places import BASE_MARKER, BASE_RECORD
from rime_pl.datamodules.split_index import FORMAT_VERSION
from rime_pl.errors import StoppedError
from rime_pl.miniature.tiny import TinyConfig
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.run_lock import locked

RUNS = Path("runs/scenes-tiny-seed0")
ARGUMENTS = ["--corpus", "scenes"]
CHECKPOINT = {
    "global_step": 7,
    "loops": {},
    "state_dict": {},
    "optimizer_states": [{}],
    "base_hash": "b",
    "pytorch-lightning_version": "2",
}

CONTRACT = {"base": "b", "base_hash": "h", "disc_token_id": 1, "gen_token_id": 2, "prompt": {}}
CONTRACT |= {"backbone": {"name_or_path": "b"}}


class Stages:
    """In place of processes: writes what each would leave, and keeps what was started."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []
        self.fails = ""  # "early": before the first checkpoint; "late": after it

    def start(self, words: list[str]) -> int:
        self.started.append(words)
        folder = Path(words[-1])
        if words[0] == "shards":
            folder.mkdir(parents=True)
            splits = {"captions": {"shards": [], "samples": 0}}
            write_json(folder / "corpus.json", {"format": FORMAT_VERSION, "data_hash": "d", "splits": splits})
        elif words[0] == "base":
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(parents=True)
            corpus = Path(words[words.index("--data") + 1])
            about = json.loads((corpus / "corpus.json").read_text())
            write_json(folder / BASE_RECORD, {"data_hash": about["data_hash"]})
            (folder / BASE_MARKER).touch()
            (folder / "model.safetensors").write_text(f"weights {len(self.started)}")
        else:
            return self.train(RunFolder(folder))
        return 0

    def train(self, run: RunFolder) -> int:
        assert run.config.is_file() and not run.finished, "claimed before the stage starts"
        (run.path / "tensorboard").mkdir(exist_ok=True)
        if self.fails == "early":
            return 2
        run.last_checkpoint.parent.mkdir(exist_ok=True)
        torch.save(CHECKPOINT, run.last_checkpoint)
        if self.fails:
            return 2
        run.adapter.mkdir(exist_ok=True)
        (run.adapter / WEIGHTS_FILE).touch()
        write_json(run.adapter / CONTRACT_FILE, CONTRACT | {"weights_hash": f"{run} {len(self.started)}"})
        run.summary_text.write_text(f"table of {run}\n")
        write_json(run.marker, {})
        return 0

    def folders(self) -> list[str]:
        """The folders of the runs that were started since the last call, below ``RUNS``."""
        started, self.started = self.started, []
        return [str(Path(words[-1]).relative_to(RUNS)) for words in started if words[1] == "fit"]


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.chdir(tmp_path)
    fake = Stages()
    monkeypatch.setattr(command, "_start", fake.start)
    return fake


def test_everything_that_is_missing_is_made_in_order(stages: Stages, capsys) -> None:
    assert main(["run", "cma", *ARGUMENTS, "--seed", "0"]) == 0
    assert [words[:2] for words in stages.started] == [
        ["shards", "scenes"],
        ["base", "--data"],
        ["sft", "fit"],
        ["cma", "fit"],
    ]
    assert stages.started[3][-4:] == [
        *("--model.init_adapter_from", str(RUNS / "sft/adapter")),
        *("--run_dir", str(RUNS / "cma")),
    ]
    assert capsys.readouterr().out.splitlines() == [
        "data: building data/scenes",
        "base: making models/tiny-scenes",
        f"sft: training into {RUNS}/sft (as in the recipe)",
        f"cma: training into {RUNS}/cma (as in the recipe)",
    ]
    stages.started = []
    assert main(["run", "cma", *ARGUMENTS]) == 0
    assert not stages.started
    said = capsys.readouterr().out
    assert f"cma: found finished in {RUNS}/cma" in said and said.endswith(f"table of {RUNS}/cma\n\n")


@pytest.mark.parametrize(("threads", "options"), [("1", ["--num_threads", "1"]), ("null", [])])
def test_the_base_takes_as_many_threads_as_the_first_stage(
    threads: str, options: list[str], stages: Stages
) -> None:
    assert main(["run", "cma", *ARGUMENTS, "--sft.num_threads", threads, "--num_threads", "3"]) == 0
    base = stages.started[1]
    assert base[0] == "base" and base[base.index("--seed") :] == ["--seed", "0", *options]


def test_a_base_model_of_another_recipe_is_told(stages: Stages, capsys) -> None:
    """One that fewer steps had made was once taken without a word after the recipe had changed."""
    assert main(["run", "sft", "--corpus", "mini", "--num_threads", "1"]) == 0
    record = Path("models/tiny-mini") / BASE_RECORD
    of_now = asdict(TinyConfig(vision_steps=1000, num_steps=1200))
    made = of_now | {"tasks": None, "picture_side": 96, "max_pictures": 4000, "num_threads": 1}
    for change, said in (
        ({}, ""),
        (
            {"vision_steps": 600, "num_threads": 2},
            "num_threads 2 instead of 1, vision_steps 600 instead of 1000",
        ),
        ({"hidden_size": 160}, "hidden_size 160 instead of 192"),
        (None, "an earlier version made it"),
    ):
        kept = {} if change is None else {"made_with": made | change}
        write_json(record, {"data_hash": "d", **kept})
        capsys.readouterr()
        assert main(["run", "sft", "--corpus", "mini", "--num_threads", "1"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "base: found in models/tiny-mini" in out and said in out
        assert ("remove models/tiny-mini" in out) == bool(said)


def test_openmoji_gets_its_own_base(stages: Stages) -> None:
    assert main(["run", "base"]) == 0
    output = "models/tiny-openmoji"
    assert stages.started[1][:5] == ["base", "--data", "data/openmoji", "--output", output]
    assert stages.started[1][5:] == [
        *("--seed", "0"),
        *("--tasks", "name_to_picture", "picture_to_name", "composed", "word_to_picture", "picture_to_word"),
        *("--vision_steps", "400"),
    ]


def test_other_settings_get_their_own_folder(stages: Stages, capsys) -> None:
    assert main(["run", "cma", *ARGUMENTS]) == 0
    stages.folders()
    plain = ["run", "cma", *ARGUMENTS, "--model.lambda_dec", "0"]
    capsys.readouterr()
    assert main([*plain, "--print_folder"]) == 0 and capsys.readouterr().out == f"{RUNS / 'cma-2'}\n"
    assert main(plain) == 0 and stages.folders() == ["cma-2"]
    assert "(differs from the recipe: model.lambda_dec 0.0 instead of 1.0)" in capsys.readouterr().out
    origin = RunFolder(RUNS / "cma-2").origin
    assert origin["differs_from_recipe"] == {"model.lambda_dec": {"value": 0.0, "recipe": 1.0}}
    assert origin["data_hash"] == "d" and origin["start_hash"].startswith(str(RUNS / "sft"))
    assert main(["run", "cma", *ARGUMENTS, "--sft.data.batch_size", "16"]) == 0
    assert stages.folders() == ["sft-2", "cma-3"]  # CMA of the recipe, but from another start
    assert main(plain) == 0 and main(["run", "cma", *ARGUMENTS]) == 0 and not stages.folders()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model.temperature", "-0.1", "model.temperature must be greater than 0, but is -0.1"),
        ("model.temperature", ".nan", "--model.temperature must be a finite number, but is nan"),
        ("model.lambda_ce", "-1", "model.lambda_ce must be 0 or more, but is -1.0"),
        ("model.lambda_cma", "-1", "model.lambda_cma must be 0 or more, but is -1.0"),
        ("model.lambda_dec", "-1", "model.lambda_dec must be 0 or more, but is -1.0"),
        ("model.optimizer.learning_rate", "-1e-4", "learning_rate must be 0 or more, but is -0.0001"),
        ("model.optimizer.warmup_steps", "-1", "model.optimizer.warmup_steps must be 0 or more, but is -1"),
        ("model.optimizer.weight_decay", "-1", "model.optimizer.weight_decay must be 0 or more"),
        ("model.micro_batches.size", "0", "model.micro_batches.size must be 1 or more, but is 0"),
        ("model.backbone.lora_r", "0", "model.backbone.lora_r must be at least 1 and at most"),
        ("model.backbone.lora_alpha", "-8", "model.backbone.lora_alpha must be at least 1 and at most"),
        ("model.backbone.lora_dropout", "1.0", "lora_dropout must be at least 0 and less than 1, but is 1.0"),
        ("model.backbone.prompt.max_rewrite_tokens", "0", "max_rewrite_tokens must be 1 or more, but is 0"),
        ("model.backbone.prompt.max_media", "0", "max_media must be 1 or more, but is 0"),
        ("model.backbone.prompt.gen_token", "<disc_emb>", "must be a token of its own"),
        ("data.batch_size", "0", "data.batch_size must be 1 or more, but is 0"),
        ("data.eval_batch_size", "0", "data.eval_batch_size must be 1 or more, but is 0"),
        ("data.steps_per_epoch", "0", "data.steps_per_epoch must be 1 or more, but is 0"),
        ("data.num_workers", "-1", "data.num_workers must be 0 or more, but is -1"),
        ("data.limit_val_queries", "0", "data.limit_val_queries must be 1 or more, but is 0"),
        (
            "data.max_broken_share",
            "1.5",
            "data.max_broken_share must be at least 0 and at most 1, but is 1.5",
        ),
        ("data.tasks", "[]", "data.tasks must name a task, or be null for all of them"),
        ("data.annotated_share", "0", "data.annotated_share must be greater than 0 and at most 1, but is 0"),
        ("recall.ks", "[0]", r"recall.ks must hold numbers of 1 or more"),
        ("recall.chunk_size", "0", r"recall.chunk_size must be 1 or more"),
        ("samples.num_samples", "0", "samples.num_samples must be 1 or more, but is 0"),
        ("checkpoint.every_n_steps", "0", "checkpoint.every_n_steps must be 1 or more, but is 0"),
        ("num_threads", "0", "num_threads must be at least 1 and at most 1024, but is 0"),
        ("trainer.accumulate_grad_batches", "0", "accumulate_grad_batches must be at least 1, but is 0"),
        ("trainer.accumulate_grad_batches", "-1", "accumulate_grad_batches must be at least 1, but is -1"),
        ("model.temperature", "null", "model.temperature must be"),
        ("trainer.gradient_clip_val", "-1", "trainer.gradient_clip_val must be at least 0, but is -1"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_before_anything_starts(
    setting: str, value: str, message: str, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "cma", *ARGUMENTS, "--dry_run", f"--{setting}", value]) == 2
    assert message in capsys.readouterr().err and not stages.started


def test_a_seed_that_cannot_be_is_refused(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("-1", str(2**32)):
        assert main(["run", "sft", *ARGUMENTS, "--dry_run", "--seed", seed]) == 2
        assert (
            f"seed_everything must be at least 0 and at most 4294967295, but is {seed}"
            in capsys.readouterr().err
        )
    assert not stages.started


def test_refine_rl_starts_after_an_sft_and_a_cma_with_few_rewrites(stages: Stages) -> None:
    assert main(["run", "cma", *ARGUMENTS]) == 0
    stages.folders()
    assert main(["run", "refine-rl", *ARGUMENTS]) == 0
    assert [word for word in stages.started[0] if "annotated" in word] == ["--data.annotated_share"]
    assert stages.started[2][0] == "refine-rl" and str(RUNS / "cma-2/adapter") in stages.started[2]
    assert stages.folders() == ["sft-2", "cma-2", "refine_rl"]
    assert main(["run", "refine-rl", *ARGUMENTS]) == 0 and not stages.folders()


def test_an_unfinished_run_is_resumed_and_one_that_never_began_leaves_its_name_free(
    stages: Stages, capsys
) -> None:
    stages.fails = "late"
    assert main(["run", "sft", *ARGUMENTS]) == 2
    capsys.readouterr()
    stages.fails = "early"
    for size in ("16", "8"):  # neither got as far as a checkpoint
        assert main(["run", "sft", *ARGUMENTS, "--data.batch_size", size]) == 2
        left = RUNS / "sft-2"
        assert not RunFolder(left).config.exists() and not (left / "tensorboard").exists()
    stages.fails = ""
    stages.folders()
    assert main(["run", "sft", *ARGUMENTS, "--data.batch_size", "4"]) == 0
    capsys.readouterr()
    assert main(["run", "sft", *ARGUMENTS]) == 0 and stages.folders() == ["sft-2", "sft"]
    assert f"sft: resuming at step 7 in {RUNS}/sft" in capsys.readouterr().out


def test_an_sft_trained_anew_or_other_shards_are_another_start(stages: Stages) -> None:
    assert main(["run", "cma", *ARGUMENTS]) == 0
    RunFolder(RUNS / "sft").marker.unlink()  # trained again in the same place: other weights
    stages.folders()
    assert main(["run", "cma", *ARGUMENTS]) == 0 and stages.folders() == ["sft", "cma-2"]
    corpus = Path("data/scenes/corpus.json")
    write_json(corpus, json.loads(corpus.read_text()) | {"data_hash": "other"})
    assert main(["run", "cma", *ARGUMENTS]) == 0 and stages.folders() == ["sft-2", "cma-3"]


def test_a_base_made_anew_is_another_start(stages: Stages) -> None:
    assert main(["run", "sft", *ARGUMENTS]) == 0 and stages.folders() == ["sft"]
    assert main(["run", "sft", *ARGUMENTS]) == 0 and stages.folders() == []
    (Path("models/tiny-scenes") / BASE_MARKER).unlink()
    shutil.rmtree("models/tiny-scenes")
    assert main(["run", "sft", *ARGUMENTS]) == 0 and stages.folders() == ["sft-2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "--recipe", "2b"], "the recipe 2b names a base model, so there is none to make"),
        (["base", "--base", "mine"], "--base mine names a base model, so there is none to make"),
        (["cma", "--corpsu", "scenes"], "--corpsu is not an option of `rime run`. Did you mean --corpus?"),
        (["cma", "--sed", "3"], "Did you mean --seed?"),
    ],
)
def test_what_cannot_be_meant_is_refused(stages: Stages, words: list[str], message: str, capsys) -> None:
    assert main(["run", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_typing_error_is_told_before_anything_starts(stages: Stages, capsys) -> None:
    assert main(["run", "refine-rl", *ARGUMENTS, "--cma.model.lamda_dec", "0"]) == 2
    assert "lamda_dec" in capsys.readouterr().err and not stages.started and not list(Path().iterdir())


def test_looking_changes_nothing(stages: Stages, capsys) -> None:
    assert main(["run", "refine-rl", *ARGUMENTS, "--dry_run"]) == 0
    assert f"refine_rl: training into {RUNS}/refine_rl" in capsys.readouterr().out
    for goal, place in (("data", "data/scenes"), ("base", "models/tiny-scenes"), ("sft", f"{RUNS}/sft")):
        assert main(["run", goal, *ARGUMENTS, "--print_folder"]) == 0
        assert capsys.readouterr().out == f"{place}\n"
    assert not stages.started and not list(Path().iterdir())


def test_a_start_of_ones_own_needs_no_run_before(stages: Stages) -> None:
    assert main(["run", "cma", *ARGUMENTS, "--model.init_adapter_from", "mine/adapter"]) == 0
    assert stages.folders() == ["cma"]


def test_a_run_that_another_process_trains_is_left_alone(stages: Stages, capsys) -> None:
    stages.fails = "late"
    assert main(["run", "sft", *ARGUMENTS]) == 2
    run = RunFolder(RUNS / "sft")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with locked(run):
        stages.folders()
        for look in ([], ["--dry_run"]):
            capsys.readouterr()
            assert main(["run", "sft", *ARGUMENTS, *look]) == (0 if look else 2)
            said = capsys.readouterr()
            assert f"sft: {run} is in use by process {os.getpid()} on " in said.out
        assert not stages.folders()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_stage_that_failed_before_its_first_checkpoint_leaves_no_folder(stages: Stages, capsys) -> None:
    stages.fails = "early"
    assert main(["run", "cma", *ARGUMENTS]) == 2
    assert "sft stopped (exit code 2)" in (said := capsys.readouterr().err)
    assert "Give a setting to this stage as --sft.NAME VALUE." in said  # one without belongs to cma
    assert not RUNS.exists()


class Stopped:
    """A stage that gets Ctrl-C together with `rime run`, saves its checkpoint and ends."""

    def __init__(self, code: int, presses: int) -> None:
        self.code, self.presses, self.terminated = code, presses, False

    def wait(self) -> int:
        self.presses -= 1
        if self.presses >= 0:
            raise KeyboardInterrupt
        return self.code

    def terminate(self) -> None:
        self.terminated = True


@pytest.mark.parametrize(
    ("code", "presses"), [(130, 0), (130, 1), (130, 2), (-2, 1), (0, 1), (143, 0), (-15, 0)]
)
def test_a_stopped_stage_stops_rime_run(code: int, presses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Stopped(code, presses)
    monkeypatch.setattr("subprocess.Popen", lambda words: process)
    with pytest.raises(StoppedError, match="sft was stopped") as stopped:
        command._make("sft", ["sft", "fit"])
    assert 128 + stopped.value.signum == (143 if code in (143, -15) else 130)
    assert process.terminated is (presses == 2)
