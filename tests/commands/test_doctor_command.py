"""Every check of `rime doctor` is well on a good run and provoked by a bad one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rime_pl.__main__ import main
from rime_pl.backbone.adapters import WEIGHTS_FILE, adapter_state, save_adapter, state_hash
from rime_pl.backbone.mllm import Backbone
from rime_pl.datamodules.shards import read_split
from rime_pl.preflight import doctor as installation
from rime_pl.preflight.doctor import Check, batch, check_adapter, check_backbone, precision
from rime_pl.processing import CONTRACT_FILE
from tests.micro import micro_config

RECIPE = Path(__file__).parents[2] / "configs/tiny/sft.yaml"


def levels(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.level for check in checks}


def test_this_installation_is_well() -> None:
    found = levels(installation.check_installation(wants_gpu=False))
    assert "problem" not in found.values(), found
    assert found["versions"] == found["4-bit layers on cpu"] == "ok"


PAIR = {"torch": "2.14.1", "torchvision": "0.29.1"}


@pytest.mark.parametrize(
    ("check", "level", "words"),
    [
        (
            installation.versions(PAIR, {"torchvision": ["torch>=2.14.0", "gdown; extra == 'gdown'"]}),
            "ok",
            "met",
        ),
        (
            installation.versions({"torch": "2.14.1", "torchvision": "0.28.0"}, {}),
            "problem",
            "torch 2.14.1 needs torchvision 0.29, but 0.28.0 is installed",
        ),
        (installation.versions({"torch": "2.14.1"}, {}), "problem", "needs torchvision 0.29"),
        (installation.versions({"torch": "9.9.0", "torchvision": "0.29.1"}, {}), "problem", "torch 9.9.0"),
        (
            installation.versions(PAIR, {"peft": ["accelerate>=0.21"]}),
            "problem",
            "peft needs accelerate>=0.21, but none is installed",
        ),
        (
            installation.versions(PAIR, {"rime_pl": ["torch>=2.15"]}),
            "problem",
            "rime_pl needs torch>=2.15, but 2.14.1 is installed",
        ),
        (
            installation.bad_versions({"lightning": "2.6.2"}),
            "problem",
            "lightning 2.6.2 is a compromised release",
        ),
        (installation.bad_versions({"pytorch-lightning": "2.6.3"}), "problem", "compromised"),
        (installation.cpu_features("DEFAULT"), "warning", "no vector instructions"),
        (installation.gpu(False, True, "13.0"), "problem", "torch finds none"),
        (installation.gpu(False, True, "13.0", "550.54.14"), "problem", "driver 550.54.14 is too old"),
        (installation.gpu(False, False, "13.0"), "ok", "none"),
        (precision("bf16-mixed", False, True), "warning", "trainer.precision=bf16-mixed"),
        (precision("bf16-mixed", True, True), "problem", "cast the packed 4-bit bytes"),
        (precision("bf16-true", False, False), "problem", "in float32 would be cast"),
        (precision("32-true", True, True), "ok", "casts nothing"),
        (batch(7, 2), "problem", "data.batch_size is 7, on 2 process(es)"),
        (batch(1, 1), "problem", "data.batch_size is 1"),
        (batch(8, 2), "ok", "4 pairs on each of 2 process(es), 7 negatives"),
    ],
    ids=lambda value: value.name if isinstance(value, Check) else None,
)
def test_provoked(check: Check, level: str, words: str) -> None:
    assert check.level == level and words in check.seen
    assert check.remedy or level == "ok"


def test_a_broken_4_bit_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "four_bit_error", lambda device: float("nan"))
    assert installation.four_bit(torch.device("cpu")).level == "problem"

    def missing(device: torch.device) -> float:
        raise RuntimeError("no native library")

    monkeypatch.setattr(installation, "four_bit_error", missing)
    check = installation.four_bit(torch.device("cpu"))
    assert check.level == "problem" and "no native library" in check.seen


@pytest.mark.parametrize(
    ("whole", "cut", "level", "says"),
    [
        (0.092, 0.093, "ok", "error of 0.09, which is that of rounding"),
        (0.092, 0.258, "warning", "no multiple of 64 wide are read back with an error of 0.26, not 0.09"),
        (0.258, 0.258, "problem", "read back with an error of 0.26, not 0.09"),
        (float("nan"), 0.09, "problem", "an error of nan"),
    ],
)
def test_four_bit_weights_that_are_read_otherwise_are_told(
    whole: float, cut: float, level: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes 0.50.2 reads them otherwise on CPUs with AVX512."""
    monkeypatch.setattr(installation, "reading_error", lambda width, device: cut if width % 64 else whole)
    check = installation.four_bit_weights(torch.device("cpu"))
    assert check.level == level and says in check.seen


def test_rows_of_whole_blocks_are_read_as_they_were_rounded() -> None:
    assert 0.08 < installation.reading_error(128, torch.device("cpu")) < 0.1


def test_driver_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert installation.driver_version(file) is None
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\n")
    assert installation.driver_version(file) == "550.54.14"


# -- settings -------------------------------------------------------------------------------------------


def test_backbone_settings(micro_base: Path, tmp_path: Path) -> None:
    assert set(levels(check_backbone(micro_config(micro_base))).values()) == {"ok"}
    nothing = micro_config(micro_base, lora_targets=".*no_such_layer")
    assert levels(check_backbone(nothing))["LoRA targets"] == "problem"
    tower = micro_config(micro_base, lora_targets=r".*visual\.blocks\.\d+\.mlp\.linear_fc1")
    assert "not in the language model" in check_backbone(tower)[-1].seen
    missing = micro_config(tmp_path / "nothing")
    assert levels(check_backbone(missing)) == {"checkpoint": "problem"}


# -- the corpus -----------------------------------------------------------------------------------------


def seen_by_doctor(base: Path, corpus: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The lines about the corpus; the exit code must fit to them."""
    name = ["--model.backbone.name_or_path", str(base), "--data.path", str(corpus), "--data.batch_size", "4"]
    code = main(["doctor", "--config", str(RECIPE), *name, *words])
    told = capsys.readouterr().out
    found = told[re.search(r"^\w+ +corpus:", told, re.MULTILINE).start() :]  # type: ignore[union-attr]
    assert code == ("problem  corpus" in found)
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installation and the model are looked at in other tests."""
    monkeypatch.setattr(installation, "check_installation", lambda wants_gpu: [])
    monkeypatch.setattr(installation, "check_backbone", lambda config: [])


@pytest.mark.usefixtures("quick")
def test_a_good_corpus_and_settings_that_do_not_fit(
    micro_base: Path, scenes_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = seen_by_doctor(micro_base, scenes_corpus, capsys)
    assert found.startswith("ok ") and "48 training pairs, and every sample can be read" in found
    for words, message in (
        (["--data.batch_size", "9"], "data.batch_size must be at most 8, but is 9"),
        (["--data.tasks", "[nothing]"], "data.tasks must name tasks"),
        (["--data.annotated_share", "1e-9"], "must have a rewrite on both sides"),
        (["--model.backbone.prompt.max_text_tokens", "1"], "tokens, but max_text_tokens is 1"),
    ):
        assert message in seen_by_doctor(micro_base, scenes_corpus, capsys, *words), words
    short = ["--model.backbone.prompt.max_rewrite_tokens", "1"]
    assert "problem  corpus" in seen_by_doctor(micro_base, scenes_corpus, capsys, *short)
    for allowed in (
        ["--data.too_long", "cut"],
        ["--data.rewrites", "none"],
        ["--data.max_broken_share", "1"],
    ):
        assert "problem  corpus" not in seen_by_doctor(micro_base, scenes_corpus, capsys, *short, *allowed)
    advice = "set data.too_long to cut, or raise model.backbone.prompt.max_rewrite_tokens."
    assert advice in seen_by_doctor(micro_base, scenes_corpus, capsys, *short)
    cut = seen_by_doctor(micro_base, scenes_corpus, capsys, *short, "--data.too_long", "cut")
    assert "max_rewrite_tokens is 1. It is cut there." in cut and "data.too_long" not in cut


@pytest.mark.usefixtures("quick")
def test_a_corpus_that_cannot_be_trained_on(
    micro_base: Path, scenes_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Path(shutil.copytree(scenes_corpus, tmp_path / "corpus"))
    broken = read_split(corpus, "train")[0]
    offset, size = broken.members["json"]
    with broken.shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * size)
    (corpus / "val/val-000000.tar").unlink()
    found = seen_by_doctor(micro_base, corpus, capsys)
    assert broken.name in found and "val-000000.tar: this file is missing" in found
    assert f"`rime shards check --path {corpus}`" in found
    assert "does not exist" in seen_by_doctor(micro_base, tmp_path / "none", capsys)


# -- adapters -------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path, shared_backbone: Backbone) -> Path:
    folder = tmp_path / "run/sft/adapter"
    peft, processor = shared_backbone.peft, shared_backbone.processor
    state = adapter_state(peft)
    save_adapter(folder, peft, state, processor, shared_backbone.config, shared_backbone.base_hash)
    return folder


def change_contract(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    contract = json.loads((folder / CONTRACT_FILE).read_text())
    change(contract)
    (folder / CONTRACT_FILE).write_text(json.dumps(contract))


def test_a_good_adapter(adapter: Path) -> None:
    found = check_adapter(adapter.parent)
    assert check_adapter(adapter) == found, "the folder that --model.init_adapter_from takes"
    assert found.level == "ok" and "<disc_emb>" in found.seen
    assert check_adapter(adapter.parents[2]).level == "problem", "no finished run in there yet"
    (adapter.parent / "done.json").touch()
    assert check_adapter(adapter.parents[2]).level == "ok", "the newest finished run below"


def test_another_pooling_token(adapter: Path) -> None:
    change_contract(adapter, lambda contract: contract.update(gen_token_id=5))
    found = check_adapter(adapter.parent)
    assert found.level == "problem" and "gen_token_id must be that of this run" in found.seen


def test_another_base(adapter: Path) -> None:
    change_contract(adapter, lambda contract: contract.update(base_hash="0" * 64))
    found = check_adapter(adapter.parent)
    assert found.level == "problem" and "with fingerprint 000000000000, but gives" in found.seen


def test_a_base_that_is_gone(adapter: Path, tmp_path: Path) -> None:
    found = check_adapter(adapter.parent, str(tmp_path / "gone"))
    assert found.level == "warning" and str(tmp_path / "gone") in found.seen
    found = check_adapter(adapter.parent, "some/base")
    assert found.level == "warning" and "some/base is not on this machine" in found.seen, (
        "nothing is downloaded"
    )


def test_token_rows_that_are_missing(adapter: Path) -> None:
    state = {n: t for n, t in load_file(adapter / WEIGHTS_FILE).items() if "trainable_tokens" not in n}
    save_file(state, adapter / WEIGHTS_FILE)
    change_contract(adapter, lambda contract: contract.update(weights_hash=state_hash(state)))
    found = check_adapter(adapter.parent)
    assert (
        found.level == "problem"
        and "trainable_tokens" in found.seen
        and "must have the same shape" in found.seen
    )


def test_damaged_weights_and_missing_files(adapter: Path, tmp_path: Path) -> None:
    state = load_file(adapter / WEIGHTS_FILE)
    save_file({n: t + 1 for n, t in state.items()}, adapter / WEIGHTS_FILE)
    assert "damaged" in check_adapter(adapter.parent).seen
    (adapter / WEIGHTS_FILE).write_bytes(b"half a file")
    assert "damaged" in check_adapter(adapter.parent).seen
    (adapter / "tokenizer.json").unlink()
    found = check_adapter(adapter.parent)
    assert found.level == "problem" and "cannot be read" in found.seen and "adapter" in found.seen
    (adapter / CONTRACT_FILE).write_text("{")
    assert check_adapter(adapter.parent).level == "problem"
    found = check_adapter(tmp_path / "empty")
    assert found.level == "problem" and "no finished run here" in found.seen and "--adapter" in found.remedy
    assert "--run" not in found.seen + found.remedy, "the option is --adapter"


# -- the command ----------------------------------------------------------------------------------------


def test_the_command(
    micro_base: Path, scenes_corpus: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", "--config", str(RECIPE), "--model.backbone.name_or_path", str(micro_base)]
    words += ["--data.path", str(scenes_corpus), "--data.batch_size", "4"]
    assert main([*words, "--adapter", str(adapter.parent)]) == 0
    told = capsys.readouterr().out
    assert "ok       adapter: unchanged since it was saved" in told and "0 problem" in told
    assert main([*words, "--model.temprature", "0.1"]) == 1
    told = capsys.readouterr().out
    assert "problem  settings" in told and "--model.temprature" in told and "->" in told
    assert main(["doctor", "--adapter", str(adapter / "nothing")]) == 1
    assert main(["doctor", "--model.temperature", "0.1"]) == 2
    assert "Add --config" in capsys.readouterr().err
