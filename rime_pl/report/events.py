"""What TensorBoard's files of a run hold: curves, and the last picture and text of each name.

Called by the study, and by `rime report`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

#: What TensorBoard adds to the name of a text.
_TEXT = "/text_summary"
#: How much of each name is kept: 0 is all; of one, TensorBoard keeps the last.
_KEPT = {"scalars": 0, "images": 1, "tensors": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1}


@dataclass
class Events:
    """Everything that a run has logged."""

    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name -> step and value
    pictures: dict[str, bytes] = field(default_factory=dict)  # name -> the last one, a PNG
    texts: dict[str, str] = field(default_factory=dict)  # name -> the last one


def read_events(folder: str | Path) -> Events:
    """Return what the event files in a folder hold; nothing if there are none.

    What a resumed run has logged twice counts once. A file that breaks off is read as far as it goes.
    """
    if not Path(folder).is_dir():
        return Events()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    events = EventAccumulator(str(folder), size_guidance=_KEPT).Reload()
    names = events.Tags()
    return Events(
        {name: [(one.step, one.value) for one in events.Scalars(name)] for name in names["scalars"]},
        {name: events.Images(name)[-1].encoded_image_string for name in names["images"]},
        {
            name.removesuffix(_TEXT): b"\n".join(events.Tensors(name)[-1].tensor_proto.string_val).decode(
                errors="replace"
            )
            for name in names["tensors"]
            if name.endswith(_TEXT)
        },
    )
