"""What is counted over the evaluated items."""

from __future__ import annotations

from rime_pl.callbacks.evaluated_items import Record, modality


def test_the_targets_of_a_task_are_those_of_the_gallery_that_it_searches() -> None:
    """A picture and its name have one content, and lie in two galleries."""

    def record(task: str, content: int, kinds: str, gallery: str) -> Record:
        return Record("key", task, False, content, kinds, gallery, None)

    queries = [record("name", 7, "text", "pictures"), record("picture", 7, "picture", "names")]
    targets = [record("", 7, "picture", "pictures"), record("", 7, "text", "names")]
    records = {"query": dict(enumerate(queries)), "target": dict(enumerate(targets))}
    assert modality("name", records) == {"query": "text", "target": "picture"}
    assert modality("picture", records) == {"query": "picture", "target": "text"}
