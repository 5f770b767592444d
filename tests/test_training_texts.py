"""The instructions and the words of the training texts that an adapter keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rime_pl import training_texts
from rime_pl.errors import RimeError
from rime_pl.training_texts import (
    WORDS_FILE,
    TrainingTexts,
    choose_task,
    tasks_from_json,
    tasks_to_json,
    unknown_words,
    write_words,
)
from rime_pl.types import Item, Pair

PICTURE = (Image.new("RGB", (1, 1)),)


def pair(task: str, query: Item | None, target: Item, *negatives: Item) -> Pair:
    return Pair("key", task, "gallery", query, target, negatives)


@pytest.fixture
def texts() -> TrainingTexts:
    texts = TrainingTexts()
    for wording in ("Find it.", "Look for it.", "Find it."):
        target = Item(media=PICTURE, instruction="A picture.")
        texts.add(pair("to_picture", Item("a Cat", instruction=wording), target))
    changed = Item("now red", PICTURE, instruction="Change it.")
    texts.add(pair("change", changed, Item(media=PICTURE)))
    texts.add(pair("name", Item(media=PICTURE), Item("dog", rewrite="A hound."), Item("wolf")))
    texts.add(pair("name", None, Item("a distractor")))
    return texts


def test_instructions_of_each_task_and_side(texts: TrainingTexts) -> None:
    tasks = texts.tasks()
    assert list(tasks) == ["change", "name", "to_picture"]
    assert tasks["to_picture"].query == ("Find it.", "Look for it."), "the most frequent first"
    assert tasks["to_picture"].of("target") == "A picture." and tasks["change"].of("target") == ""
    assert tasks_from_json(json.loads(json.dumps({"tasks": tasks_to_json(tasks)}))) == tasks
    assert tasks_from_json({}) == {}


def test_default_is_the_first_task_from_text_to_picture(texts: TrainingTexts) -> None:
    tasks = texts.tasks()
    assert choose_task(tasks) == tasks["to_picture"] and choose_task(tasks, "name") == tasks["name"]
    assert choose_task({"name": tasks["name"]}) == tasks["name"], "the only one"
    with pytest.raises(RimeError, match=r"task must be given, .* There are: 'change', 'name'"):
        choose_task({name: tasks[name] for name in ("change", "name")})
    with pytest.raises(RimeError, match="trained on, 'change', 'name', 'to_picture', but is 'names'"):
        choose_task(tasks, "names")
    with pytest.raises(RimeError, match="an earlier version saved it without them"):
        choose_task({}, "name")


def test_words_that_no_training_text_contains(
    texts: TrainingTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unknown_words(tmp_path, "a zebra") == [], "nothing is kept"
    write_words(tmp_path, texts.words)
    assert unknown_words(tmp_path, "A zebra and a CAT, a wolf, a hound, a gnu") == ["zebra", "gnu"]
    (tmp_path / WORDS_FILE).unlink()
    monkeypatch.setattr(training_texts, "MAX_WORDS", 3)
    write_words(tmp_path, texts.words)
    assert not (tmp_path / WORDS_FILE).exists(), "a list that is cut would call known words unknown"
