"""The shape of an adapter's contract, ``rime.json``: which fields it has, and of which types.

Called by adapters.py when it reads one. A file that was cut or edited is refused by name, so that no reader
of a contract stumbles over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rime_pl.backbone.config import BackboneConfig
from rime_pl.errors import RimeError
from rime_pl.prompts import PromptConfig

_NEEDED: dict[str, Any] = {
    **{"base": str, "base_hash": str, "weights_hash": str},
    **{"disc_token_id": int, "gen_token_id": int, "prompt": dict, "backbone": dict},
}
#: Earlier versions did not write these.
_LATER: dict[str, Any] = {"base_paths": list[str] | None, "tasks": dict | None}
_TASK: dict[str, Any] = {"query": list[str], "target": list[str], "from_text": bool, "to_picture": bool}


def wrong_field(contract: Any) -> str:
    """Return what is wrong with a contract, in words; "" if nothing is.

    >>> wrong_field({"base": 3})
    "field 'base' must be str, but is 3"
    """
    settings = {name: kind for name, kind in get_type_hints(BackboneConfig).items() if name != "prompt"}
    return (
        _wrong("", contract, _NEEDED | _LATER, tuple(_NEEDED))
        or _wrong("backbone.", contract["backbone"], settings, ("name_or_path",), others=False)
        or _wrong("prompt.", contract["prompt"], get_type_hints(PromptConfig), others=False)
        or _wrong_value(contract)
        or _wrong_task(contract.get("tasks") or {})
    )


def _wrong_value(contract: Mapping[str, Any]) -> str:
    try:
        BackboneConfig(**contract["backbone"], prompt=PromptConfig(**contract["prompt"]))
    except RimeError as error:
        return str(error).removesuffix(".")
    return ""


def _wrong_task(tasks: Mapping[str, Any]) -> str:
    for name, task in tasks.items():
        if wrong := _wrong(f"tasks.{name}.", task, _TASK, tuple(_TASK)):
            return wrong
        if not task["query"] or not task["target"]:
            return f"field 'tasks.{name}' must have an instruction for query and target ('' for none)"
    return ""


def _wrong(
    where: str, values: Any, kinds: Mapping[str, Any], needed: Sequence[str] = (), others: bool = True
) -> str:
    """Return which field of an object is missing, unknown or of another type."""
    if not isinstance(values, dict):
        return f"{where.rstrip('.') or 'the file'} must hold an object, but holds {values!r:.90}"
    for name, kind in kinds.items():
        if name not in values and name in needed:
            return f"field '{where}{name}' is missing"
        if name in values and not _is(values[name], kind):
            known = getattr(kind, "__name__", str(kind))
            return f"field '{where}{name}' must be {known}, but is {values[name]!r:.90}"
    unknown = sorted(values.keys() - kinds.keys())
    return "" if others or not unknown else f"field '{where}{unknown[0]}' is unknown"


def _is(value: Any, kind: Any) -> bool:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is UnionType:
        return any(_is(value, one) for one in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(one, inner[0]) for one in value)
    if kind in (int, float):  # true and false are numbers to Python
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)
