"""A device that is not there is named before anything is loaded."""

from __future__ import annotations

import pytest

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.precision import check_device
from rime_pl.errors import RimeError
from rime_pl.processing import RimeProcessor


@pytest.mark.parametrize(
    ("device", "found", "told"),
    [
        ("cuda", 0, "The device is cuda, but torch finds no GPU. Use cpu"),
        ("cuda:3", 2, "The device is cuda:3, but torch finds 2 GPU. Use cpu"),
        ("gpu", 0, "The device must be cpu or cuda, or cuda:N, but is gpu"),
    ],
)
def test_a_device_that_is_not_there(
    device: str,
    found: int,
    told: str,
    backbone_config: BackboneConfig,
    processor: RimeProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    with pytest.raises(RimeError, match=told):
        Backbone(backbone_config, processor, device)


@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:1", "meta"])
def test_a_device_that_is_there(device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_device(device)
