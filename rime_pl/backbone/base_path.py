"""Where the base model of an adapter lies, also after both were moved.

Called by mllm.py and by `rime doctor`. adapters.py keeps the places in the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.places import tried


def find_base(adapter: str | Path, contract: Mapping[str, Any], base: str | Path | None = None) -> str:
    """Return the folder or the Hugging Face name of the base model that an adapter was trained on.

    Args:
        adapter: Its folder.
        contract: Its contract; one of an earlier version has no ``base_paths``.
        base: The folder or name, where the caller knows it.

    Raises:
        RimeError: If the base model was a folder and lies in none of the places where it may be.
    """
    if base is not None:
        path = Path(base).expanduser()
        if isinstance(base, Path) and not path.is_dir():
            raise RimeError(f"base must be the folder of the base model, but {str(base)!r} does not exist.")
        return str(path if path.is_dir() else base)
    name, paths = contract["base"], contract.get("base_paths") or []
    looked = tried(paths, adapter, name)
    for path in looked:
        if path.is_dir():
            return str(path.resolve())
    if not paths:
        return str(name)
    raise RimeError(
        f"{adapter}: the base model {name} of this adapter must be there, but lies neither in "
        f"{' nor in '.join(map(str, looked))}. Copy it there, or give its folder as base (--base)."
    )
