"""Check the device and `trainer.precision`: Lightning must not cast weights, the backbone chooses its types.

Called before a model is built, and by `rime doctor`. A cast destroys packed 4-bit bytes.
"""

from __future__ import annotations

import torch

from rime_pl.errors import RimeError

_REMEDY = "Set --trainer.precision 32-true, and half precision with --model.backbone.dtype bfloat16."


def check_device(device: str | torch.device | None) -> None:
    """Raise if the device is no device, or a GPU on a machine without one.

    Raises:
        RimeError: If nothing can be computed on the device.
    """
    try:
        wanted = torch.device(device or "cpu")
    except RuntimeError as error:
        raise RimeError(f"The device must be cpu or cuda, or cuda:N, but is {device}.") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count() or 'no'} GPU"
        raise RimeError(f"The device is {device}, but torch finds {found}. Use cpu, or see `rime doctor`.")


def check_precision(trainer_precision: str | int | None, sharded: bool, load_in_4bit: bool) -> str | None:
    """Refuse a `trainer.precision` that casts weights; return a warning for one that casts activations.

    Args:
        trainer_precision: The setting `trainer.precision`.
        sharded: Whether FSDP2 shards the model.
        load_in_4bit: The setting `model.backbone.load_in_4bit`.

    Raises:
        RimeError: If Lightning would cast weights.
    """
    if trainer_precision in (None, "32-true", "32", 32):
        return None
    given = f"trainer.precision={trainer_precision}"
    if sharded and load_in_4bit:
        raise RimeError(f"{given} is not allowed here: FSDP2 would cast the packed 4-bit bytes. {_REMEDY}")
    if str(trainer_precision).endswith("-true"):
        raise RimeError(
            f"{given} is not allowed: weights that the backbone keeps in float32 would be cast. {_REMEDY}"
        )
    return f"{given} lets Lightning cast activations, which the backbone does not expect. {_REMEDY}"
