"""Where the base model of an adapter lies, also after both were moved, and whether it can be one.

``find_base`` is called by mllm.py and by `rime doctor`; adapters.py keeps the places in the contract.
``check_base`` is called by `rime run`, before minutes go into data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.places import tried

#: Kinds of model in a config.json that a base model may be of, and what people call them.
FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
#: No organisation of the hub, also where the folder is not there yet.
_OUR_FOLDERS = ("models", "runs", "data")
#: A checkpoint has one of them: the second is that of older ones.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


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


def check_base(named: str) -> None:
    """Refuse a base model that does not exist, is not complete, or is of a family that is not supported.

    A name of the Hugging Face hub is looked up among the downloads only; one that is not there passes.

    Args:
        named: Folder or Hugging Face name.

    Raises:
        RimeError: If it cannot be a base model.
    """
    folder = Path(named).expanduser()
    if not folder.is_dir():
        downloaded = _downloaded(named, folder)
        if downloaded is not None:
            _check_family(named, downloaded)
        return
    if (folder / "config.json").is_file():
        _check_family(named, folder / "config.json")
    elif any((folder / name).is_file() for name in ("rime.json", "adapter/rime.json")):
        raise RimeError(
            f"--base {named}: this folder holds a trained adapter, but --base must name the model that it "
            'was trained on. "base" in its rime.json says which one.'
        )
    else:
        raise RimeError(f"--base {named}: a base model must have a config.json, but this folder has none.")
    missing = [] if any(folder.glob("*.safetensors")) else ["weights (*.safetensors)"]
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        missing.append(f"processor ({' or '.join(_PROCESSOR_FILES)})")
    if missing:
        raise RimeError(
            f"--base {named}: a base model must be complete, but this folder has no "
            f"{' and no '.join(missing)}. Download it or make it again."
        )


def _downloaded(named: str, folder: Path) -> Path | None:
    """Return the config.json of a download, None if there is none; refuse what can only be a folder."""
    parts = Path(named).parts
    hub = len(parts) == 2 and named.count("/") == 1 and parts[0] not in (".", "..", "~", "/")
    if not hub or parts[0] in _OUR_FOLDERS or Path(parts[0]).is_dir() or folder.exists():
        known = [path.name for path in folder.parent.glob("*") if (path / "config.json").is_file()]
        near = "".join(
            f" Did you mean {folder.with_name(name)}?" for name in get_close_matches(folder.name, known, 1)
        )
        wrong = "is a file" if folder.exists() else "does not exist"
        raise RimeError(
            f"--base {named}: must be the folder of a base model or a name of the Hugging Face hub, such as "
            f"Qwen/Qwen2-VL-2B-Instruct, but {wrong}.{near}"
        )
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(named, "config.json")
    except ValueError as error:  # of the hub's client, about letters that no name has
        raise RimeError(f"--base {named}: is neither a folder nor a name of the hub ({error}).") from error
    return Path(found) if isinstance(found, str) else None


def _check_family(named: str, config: Path) -> None:
    try:
        kind = json.loads(config.read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RimeError(
            f"--base {named}: config.json must be a JSON object with 'model_type', but is none "
            f"({error!r:.90})."
        ) from error
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise RimeError(
            f"--base {named}: must be a {', '.join([*FAMILIES.values()][:-1])} or {[*FAMILIES.values()][-1]} "
            f"checkpoint, but its config.json says {kind!r:.90}."
        )
