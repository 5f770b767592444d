"""The fingerprint sees a change of each part of a base model, and nothing that is no change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from rime_pl.backbone.fingerprint import base_fingerprint, embedding_fingerprint
from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError

WEIGHTS = "model.safetensors"


@pytest.fixture
def changed(micro_base: Path, tmp_path: Path) -> Callable[[Callable[[str, Tensor], Tensor]], Path]:
    """A copy of the base model whose tensors went through a function of name and tensor."""

    def copy(change: Callable[[str, Tensor], Tensor]) -> Path:
        folder = shutil.copytree(micro_base, tmp_path / "changed", dirs_exist_ok=True)
        state = {name: change(name, tensor) for name, tensor in load_file(micro_base / WEIGHTS).items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return copy


@pytest.mark.parametrize(
    "part",
    [
        "layers.1.mlp.down_proj",
        "layers.0.self_attn.q_proj",
        "layers.1.input_layernorm",
        "visual.patch_embed",
        "visual.blocks.0",
        "visual.merger",
        "embed_tokens",
        "",
    ],
)
def test_a_change_of_any_part_is_seen(part: str, changed: Callable[..., Path], micro_base: Path) -> None:
    names: list[str] = []

    def change(name: str, tensor: Tensor) -> Tensor:
        if part not in name or (not part and "embed_tokens" in name):
            return tensor
        names.append(name)
        return tensor * 1.01

    assert base_fingerprint(str(changed(change))) != base_fingerprint(str(micro_base)) and names


def test_the_earlier_rule_does_not_see_the_decoder(changed: Callable[..., Path], micro_base: Path) -> None:
    other = changed(lambda name, tensor: tensor if "embed_tokens" in name else torch.zeros_like(tensor))
    hashes = {
        embedding_fingerprint(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))
        for folder in (micro_base, other)
    }
    assert len(hashes) == 1 and base_fingerprint(str(other)) != base_fingerprint(str(micro_base))


def test_type_shape_and_number_of_files(changed: Callable[..., Path], micro_base: Path) -> None:
    """Equal values in another type are no change; one more row is."""
    half = base_fingerprint(str(changed(lambda name, tensor: tensor.bfloat16())))
    assert base_fingerprint(str(changed(lambda name, tensor: tensor.bfloat16().float()))) == half
    longer = changed(lambda name, t: torch.cat([t, t[-1:]]) if "embed_tokens" in name else t)
    assert base_fingerprint(str(longer)) != base_fingerprint(str(micro_base))
    model = AutoModelForImageTextToText.from_pretrained(micro_base, dtype=torch.float32)
    parts = micro_base.parent / "parts"
    model.save_pretrained(parts, max_shard_size="200KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 1
    assert base_fingerprint(str(parts)) == base_fingerprint(str(micro_base))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_ignores_the_defaults_under_which_a_model_is_built(
    device: str, micro_base: Path, shared_backbone: Backbone
) -> None:
    """Lightning builds under `with device:` and, for half precision, with another default dtype."""
    base = AutoModelForImageTextToText.from_pretrained(micro_base, dtype=torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            assert base_fingerprint(str(micro_base)) == shared_backbone.base_hash
            assert embedding_fingerprint(base) == shared_backbone.old_base_hash
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_checkpoint_without_safetensors_is_refused(micro_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(micro_base, tmp_path / "base")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(RimeError, match=r"must give a checkpoint in safetensors files.*save_pretrained"):
        base_fingerprint(str(folder))
