"""rime_pl: train and study multimodal embeddings that rewrite before they embed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rime_pl.clips import read_frames, read_pages, read_video
    from rime_pl.inference.retriever import Retriever
    from rime_pl.types import Clip, Item, Page

__version__ = "0.1.0"
__all__ = ["Clip", "Item", "Page", "load", "read_frames", "read_pages", "read_video"]

#: Name -> the module that has it; imported when it is asked for, because that takes seconds.
_LATER = dict.fromkeys(("Clip", "Item", "Page"), "rime_pl.types") | dict.fromkeys(
    ("read_frames", "read_pages", "read_video"), "rime_pl.clips"
)


def load(
    run: str | Path,
    device: str = "cpu",
    base: str | Path | None = None,
    dtype: str | None = None,
    load_in_4bit: bool | None = None,
    attn_implementation: str | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> Retriever:
    """Load a trained model: ``rime_pl.load("runs/mine/cma").encode_query("a cat")``.

    Args:
        run: Folder of a stage, or a folder above it if there is only one adapter below; or a folder that
            `rime export` wrote, or a released checkpoint.
        device: Device of the model, e.g. "cuda".
        base: Folder or Hugging Face name of the base model of an adapter (default: where it was in training).
        dtype: "float32" or "bfloat16" (default: as in training).
        load_in_4bit: Storage of the decoder as NF4 (default: as in training).
        attn_implementation: Attention kernel, such as "sdpa" (default: as in training).
        prompt: What the files of a released checkpoint do not tell, such as ``rewrite_instruction``.
    """
    from rime_pl.inference.loading import load as load_model  # here, because it is slow to import
    from rime_pl.quiet import quiet_while_loading

    with quiet_while_loading():
        return load_model(run, device, base, dtype, load_in_4bit, attn_implementation, prompt)


def __getattr__(name: str) -> Any:
    """Import a name of ``__all__`` when it is asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
