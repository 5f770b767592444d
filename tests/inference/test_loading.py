"""What `rime_pl.load` takes besides a run, what it changes, and what it refuses by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import rime_pl
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.errors import RimeError
from rime_pl.export.exporting import Order, export
from rime_pl.processing import CONTRACT_FILE


@pytest.fixture(scope="module")
def whole(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the run."""
    output = tmp_path_factory.mktemp("exports") / "mine"
    export(Order("huggingface", run_folder / "cma", output), lambda line: None)
    return output


def test_an_export_is_loaded_like_a_run(run_folder: Path, whole: Path) -> None:
    run, loaded = rime_pl.load(run_folder), rime_pl.load(whole)
    assert torch.allclose(run.encode_query("a red ring"), loaded.encode_query("a red ring"), atol=1e-5)
    assert loaded.rewrite("a red ring") == run.rewrite("a red ring")
    assert loaded.tasks == run.tasks and loaded.run is None and str(whole) in repr(loaded)
    assert not [name for name, _ in loaded.backbone.named_parameters() if "lora" in name]


def test_the_name_of_a_model_tells_exports_and_settings_apart(
    run_folder: Path, whole: Path, tmp_path: Path
) -> None:
    export(Order("huggingface", run_folder / "cma", tmp_path / "half", dtype="bfloat16"), lambda line: None)
    export(
        Order("huggingface", run_folder / "cma", tmp_path / "other", weights="original"), lambda line: None
    )
    names = [
        rime_pl.load(folder).name for folder in (run_folder, whole, tmp_path / "half", tmp_path / "other")
    ]
    names += [rime_pl.load(whole, dtype="bfloat16").name, rime_pl.load(run_folder, dtype="bfloat16").name]
    assert len(set(names)) == len(names)
    moved = Path(shutil.copytree(whole, tmp_path / "moved"))
    assert rime_pl.load(moved).name == names[1]


def test_settings_change_what_is_loaded(run_folder: Path, whole: Path) -> None:
    assert not linear_4bit_modules(rime_pl.load(whole).backbone)
    half = rime_pl.load(run_folder, dtype="bfloat16", attn_implementation="eager")
    assert half.backbone.config.dtype == "bfloat16" and half.backbone.config.attn_implementation == "eager"
    run = rime_pl.load(run_folder)
    assert 0.99 < float(half.encode("a red ring") @ run.encode("a red ring")) < 1
    with pytest.warns(UserWarning, match="was trained on a base model in 4 bits and is loaded without them"):
        plain = rime_pl.load(run_folder, load_in_4bit=False)
    assert float(plain.encode("a red ring") @ run.encode("a red ring")) < 0.99999
    with pytest.warns(UserWarning, match="holds whole weights and is loaded in 4 bits"):
        packed = rime_pl.load(whole, load_in_4bit=True)
    assert linear_4bit_modules(packed.backbone)
    assert float(packed.encode("a red ring") @ run.encode("a red ring")) > 0.9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16', .* but is 'float16'"),
        ({"load_in_4bit": "yes"}, "load_in_4bit must be True, False or None, but is 'yes'"),
        ({"attn_implementation": "fast"}, "attn_implementation must be 'sdpa', 'eager' or a flash kernel"),
        ({"attn_implementation": "flash_attention_2"}, "needs half precision, but the dtype is float32"),
        ({"base": "models/x"}, "base is for an adapter, but .* holds a whole model"),
        ({"prompt": {"system_prompt": ""}}, "prompt is for a released checkpoint without rime.json"),
        ({"device": "gpu"}, "device must be one that torch can use here"),
    ],
)
def test_what_is_not_for_an_export_is_named(settings: dict[str, Any], said: str, whole: Path) -> None:
    with pytest.raises(RimeError, match=said):
        rime_pl.load(whole, **settings)


def test_a_prompt_is_not_for_a_run(run_folder: Path) -> None:
    with pytest.raises(RimeError, match=r"prompt is for a released checkpoint, but .* holds an adapter"):
        rime_pl.load(run_folder, prompt={"system_prompt": "x"})


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "weights.pt", "model.ckpt"])
def test_pickles_are_refused_by_name(name: str, run_folder: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder / "cma", tmp_path / "run"))
    copy = Path(shutil.copytree(whole, tmp_path / "whole"))
    for folder, place in ((run, run / "adapter"), (copy, copy)):
        (place / name).write_bytes(b"\x80\x04.")
        with pytest.raises(RimeError, match=f"{place / name} is a pickle, which can run code"):
            rime_pl.load(folder)


def test_an_adapter_by_itself_that_is_a_pickle(run_folder: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run_folder / "cma" / "adapter", tmp_path / "adapter"))
    assert rime_pl.load(adapter).encode("a red ring").shape == (64,)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(RimeError, match=r"adapter_model\.bin is a pickle"):
        rime_pl.load(adapter)


def test_a_base_model_that_is_a_pickle_is_not_read(
    run_folder: Path, micro_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(micro_base, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(RimeError, match=r"no checkpoint could be loaded|safetensors"):
        rime_pl.load(run_folder, base=base)


def test_changed_weights_and_tokens_are_refused(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "whole"))
    contract = json.loads((copy / CONTRACT_FILE).read_text())
    (copy / CONTRACT_FILE).write_text(json.dumps(contract | {"weights_hash": "v2-another"}))
    with pytest.raises(RimeError, match=r"the weights must be those that rime\.json was written for"):
        rime_pl.load(copy)
    (copy / CONTRACT_FILE).write_text(json.dumps(contract | {"disc_token_id": 3}))
    with pytest.raises(RimeError, match="the tokenizer must have the mode tokens <disc_emb> and <gen_emb>"):
        rime_pl.load(copy)
    (copy / CONTRACT_FILE).write_text("{")
    with pytest.raises(RimeError, match=r"rime.json is damaged"):
        rime_pl.load(copy)
