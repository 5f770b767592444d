"""Lightning must cast nothing: the backbone chooses its own dtypes, and a cast destroys packed 4-bit bytes.

Called by every stage before it builds the model, and by `rime doctor`.
"""

from __future__ import annotations

from rime_pl.errors import RimeError

_REMEDY = "Set --trainer.precision 32-true, and half precision with --model.backbone.dtype bfloat16."


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
        raise RimeError(f"{given}: FSDP2 would cast the packed 4-bit bytes. {_REMEDY}")
    if str(trainer_precision).endswith("-true"):
        raise RimeError(f"{given}: weights that the backbone keeps in float32 would be cast. {_REMEDY}")
    return f"{given}: Lightning casts activations without the backbone knowing. {_REMEDY}"
