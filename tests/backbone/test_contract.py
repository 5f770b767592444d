"""A contract of another shape than ours is refused by the name of its field."""

from __future__ import annotations

from typing import Any

import pytest

from rime_pl.backbone.contract import wrong_field

GOOD: dict[str, Any] = {
    **{"base": "models/b", "base_hash": "h", "weights_hash": "w", "disc_token_id": 1, "gen_token_id": 2},
    "prompt": {"disc_token": "<disc_emb>", "max_rewrite_tokens": 32},
    "backbone": {"name_or_path": "models/b", "lora_r": 4, "lora_dropout": 0, "dtype": "float32"},
}
TASK = {"query": ["Find."], "target": [""], "from_text": True, "to_picture": True}


@pytest.mark.parametrize("more", [{}, {"base_paths": None, "tasks": None}, {"tasks": {"a": TASK}, "new": 3}])
def test_good_contracts(more: dict[str, Any]) -> None:
    assert wrong_field(GOOD | more) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": None}, "field 'base' must be str, but is None"),
        ({"disc_token_id": True}, "field 'disc_token_id' must be int, but is True"),
        ({"base_paths": ["a", 3]}, "field 'base_paths' must be list[str] | None, but is ['a', 3]"),
        ({"backbone": []}, "field 'backbone' must be dict, but is []"),
        ({"backbone": {}}, "field 'backbone.name_or_path' is missing"),
        ({"backbone": GOOD["backbone"] | {"rank": 3}}, "field 'backbone.rank' is unknown"),
        ({"backbone": GOOD["backbone"] | {"lora_r": "4"}}, "field 'backbone.lora_r' must be int, but is '4'"),
        (
            {"backbone": GOOD["backbone"] | {"dtype": "int8"}},
            "field 'backbone.dtype' must be Literal",
        ),
        ({"backbone": GOOD["backbone"] | {"lora_r": 0}}, "model.backbone.lora_r must be at least 1"),
        ({"prompt": {"system": "x"}}, "field 'prompt.system' is unknown"),
        ({"prompt": {"gen_token": ""}}, "model.backbone.prompt.gen_token must be a token of its own"),
        ({"tasks": {"a": 3}}, "tasks.a must hold an object, but holds 3"),
        ({"tasks": {"a": TASK | {"query": []}}}, "field 'tasks.a' must have an instruction for query and"),
        ({"tasks": {"a": {"query": ["x"]}}}, "field 'tasks.a.target' is missing"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    assert wrong_field(GOOD | change).startswith(said)


def test_no_object_and_a_missing_field() -> None:
    assert wrong_field([1]) == "the file must hold an object, but holds [1]"
    assert wrong_field({"base": "x"}) == "field 'base_hash' is missing"
