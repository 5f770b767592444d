"""Nothing waits for a network that is not there, and nothing asks for one that is not needed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from rime_pl.__main__ import main
from rime_pl.errors import RimeError
from rime_pl.preflight.doctor import check_backbone
from rime_pl.preflight.plan import weightless
from rime_pl.preflight.plan.weightless import local_folder, read_architecture, read_own_processor
from tests.micro import micro_config

RECIPE = Path(__file__).parents[2] / "configs/tiny/cma.yaml"
SECONDS = 20  # on a busy machine; the client of the hub alone tries for minutes


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never answers, in place of the network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(weightless, "HUB_SECONDS", 0.5)
        yield


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("silent_hub")
def test_a_base_model_that_is_nowhere_is_refused_within_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(RimeError, match=r"'models/tiny-openmoji' \(the hub does not answer within 0.5 s\)"):
        read_architecture("models/tiny-openmoji")
    (found,) = check_backbone(replace(micro_config(tmp_path), name_or_path="models/tiny-openmoji"))
    assert found.level == "problem" and "does not answer" in found.seen
    assert main(["plan", "--config", str(RECIPE)]) == 2
    said = capsys.readouterr().err
    assert "does not answer" in said and "Traceback" not in said
    assert time.monotonic() - start < SECONDS


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("silent_hub")
def test_what_lies_on_this_machine_needs_no_network(
    micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(HfApi, "model_info", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--base"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("a" * 40)
    (cached / "snapshots" / ("a" * 40)).symlink_to(micro_base)
    assert local_folder("some/base") == str(cached / "snapshots" / ("a" * 40))
    for name in ("some/base", str(micro_base)):
        assert read_architecture(name).model_type == "qwen3_vl"
        assert read_own_processor(replace(micro_config(tmp_path), name_or_path=name)) is not None
    assert read_architecture("Qwen/Qwen2-VL-2B-Instruct").model_type == "qwen2_vl", "this shape is built in"
