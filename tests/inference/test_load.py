"""Which run a folder means, and where the base model of its adapter is found."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import set_tqdm_hook

import rime_pl
from rime_pl.errors import RimeError
from rime_pl.inference.retriever import Retriever
from rime_pl.places import places_of
from rime_pl.processing import CONTRACT_FILE
from rime_pl.quiet import MESSAGES


def test_repr_names_run_base_dimension_and_modes(
    loaded: Retriever, run_folder: Path, micro_base: Path
) -> None:
    for word in (str(run_folder / "cma"), str(micro_base), "dimension=64", "discriminative", "describe"):
        assert word in repr(loaded)
    assert "run=None" in repr(Retriever(loaded.backbone))


def test_loading_in_python_is_quiet_and_leaves_the_program_its_warnings(
    run_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = {name: list(logging.getLogger(name).filters) for name in MESSAGES}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        rime_pl.load(run_folder)
        assert warnings.filters == filters and set_tqdm_hook(None) is None
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated: the program's own", FutureWarning, stacklevel=1
        )
    assert [str(each.message)[-17:] for each in caught] == ["the program's own"]
    assert kept == {name: logging.getLogger(name).filters for name in MESSAGES}
    said = capfd.readouterr()
    assert not said.out and not said.err  # no bar of weights that load at once


def test_a_folder_with_several_runs_is_refused_with_their_paths(run_folder: Path, tmp_path: Path) -> None:
    for name in ("sft", "cma"):
        shutil.copytree(run_folder / "cma", tmp_path / "runs" / "x" / name)
    with pytest.raises(RimeError, match="must be one run, but holds 2") as error:
        rime_pl.load(tmp_path / "runs")
    for name in ("sft", "cma"):
        assert f"\n  {tmp_path / 'runs' / 'x' / name}" in str(error.value)
    assert "cma" in repr(rime_pl.load(tmp_path / "runs" / "x" / "cma"))


def test_a_run_loads_from_another_folder_and_after_a_move(
    run_folder: Path, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model was named relative to the working folder, as ``rime run`` does."""
    work = tmp_path / "work"
    shutil.copytree(run_folder / "cma", work / "runs" / "x" / "cma")
    shutil.copytree(micro_base, work / "models" / "micro")
    adapter = work / "runs" / "x" / "cma" / "adapter"
    contract = json.loads((adapter / CONTRACT_FILE).read_text())
    contract["base"] = contract["backbone"]["name_or_path"] = "models/micro"
    monkeypatch.chdir(work)
    contract["base_paths"] = places_of("models/micro", adapter)
    (adapter / CONTRACT_FILE).write_text(json.dumps(contract))
    assert contract["base_paths"] == [str(work / "models" / "micro"), "../../../../models/micro"]
    vector = rime_pl.load("runs/x").encode("a red ring")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(rime_pl.load(work / "runs" / "x").encode("a red ring"), vector)
    moved = work.rename(tmp_path / "moved")
    loaded = rime_pl.load("../moved/runs/x")
    assert torch.equal(loaded.encode("a red ring"), vector)
    assert f"base={str(moved / 'models' / 'micro')!r}" in repr(loaded)
    shutil.move(moved / "models" / "micro", tmp_path / "base")
    with pytest.raises(RimeError, match=r"the base model models/micro .* lies neither in") as error:
        rime_pl.load(moved / "runs" / "x")
    for place in (work / "models/micro", moved / "models/micro", tmp_path / "elsewhere/models/micro"):
        assert str(place) in str(error.value)
    assert torch.equal(
        rime_pl.load(moved / "runs" / "x", base=tmp_path / "base").encode("a red ring"), vector
    )
    with pytest.raises(
        RimeError, match=r"base must be the folder of the base model, but '.*nowhere' does not"
    ):
        rime_pl.load(moved / "runs" / "x", base=tmp_path / "nowhere")


def test_a_damaged_tokenizer_is_named(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder / "cma", tmp_path / "run"))
    (run / "adapter" / "tokenizer.json").write_text("3")
    with pytest.raises(RimeError, match=r"no processor could be loaded from '.*run/adapter'"):
        rime_pl.load(run)


def test_an_embedding_that_is_no_number_is_refused(
    loaded: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = torch.full((1, 64), float("nan"))
    monkeypatch.setattr(loaded, "_encode_batch", lambda *args, **kwargs: (vector, []))
    with pytest.raises(RimeError, match=r"demo/cma.* an embedding must be finite, but one is not"):
        loaded.encode("a red ring")


def test_an_old_adapter_whose_base_is_gone_says_what_to_give(
    old_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = json.loads((old_run / "adapter" / CONTRACT_FILE).read_text())
    (old_run / "adapter" / CONTRACT_FILE).write_text(json.dumps(contract | {"base": "models/gone"}))
    with pytest.raises(RimeError, match=r"models/gone must be a folder.* Give the folder as base") as error:
        rime_pl.load(old_run)
    assert str(Path.cwd()) in str(error.value) and "huggingface.co" not in str(error.value)
