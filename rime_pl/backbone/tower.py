"""The vision tower: patches in, features out, for the decoder of one forward or of several.

Called by mllm.py. Where the tower trains or its weights are divided among processes, a process without media
must run it, too: DDP waits for the gradients of all that trains, and FSDP2 for every process to gather a
layer. Such a process sends one zero picture through, and none of its features goes on.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def encode(model: Any, pixels: Tensor, grid: Tensor, clips: list[bool], trains: bool) -> dict[str, Any]:
    """Run the tower once over M media: to it, a picture is what a clip of two equal frames is.

    Args:
        model: The Hugging Face model, with its tower.
        pixels: (patches, patch_dim) float32, of all media.
        grid: (M, 3) int64, see ``Prompts``.
        clips: M times whether it is a clip.
        trains: Whether features have a gradient.

    Returns:
        The features of pictures with pages ("image") and those of clips ("video"), where there are any.
    """
    features = _run(model, pixels, grid, trains)
    return {
        kind: _of_kind(features, [clip == (kind == "video") for clip in clips])
        for kind in ("image", "video")
        if (kind == "video") in clips
    }


def encode_nothing(model: Any, device: torch.device, trains: bool) -> dict[str, Any]:
    """Run the tower over one zero picture of the smallest size, and return its features for no token.

    They are empty, so they change no value. But they hang on the tower, deepstack layers included, so each of
    its trained weights gets a gradient of zeros.

    Returns:
        As :func:`encode`, of pictures without a token.
    """
    vision = model.config.vision_config
    merge = int(vision.spatial_merge_size)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, merge, merge]], device=device)
    features = _run(model, torch.zeros(merge**2, width, device=device), grid, trains)
    return {"image": _of_kind(features, [True], tokens=0)}


def _run(model: Any, pixels: Tensor, grid: Tensor, trains: bool) -> Any:
    # Qwen2-VL asks for gradients of its patches where activations are recomputed, so no_grad is needed
    with nullcontext() if trains else torch.no_grad():
        return model.model.get_image_features(pixels, grid, return_dict=True)


def _of_kind(features: Any, chosen: list[bool], tokens: int | None = None) -> Any:
    """Return the features of some of the media, at most ``tokens`` of each (default: all).

    The last hidden state of the tower is left out: it is large, and the decoder does not read it.
    """

    def pick(value: Any) -> Any:
        if isinstance(value, list):  # of each layer
            return [pick(one) for one in value]
        return tuple(one[:tokens] for one, wanted in zip(value, chosen, strict=True) if wanted)

    names = [name for name in ("pooler_output", "deepstack_features") if features.get(name) is not None]
    return type(features)(**{name: pick(features[name]) for name in names})
