"""Encode and search with a real but untrained micro model, so rankings have no meaning."""

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rime_pl
from rime_pl.errors import DataError, RimeError
from rime_pl.inference import batching, sources
from rime_pl.inference.retriever import CACHE, Retriever
from rime_pl.media import open_picture
from rime_pl.types import Clip, Item, Page

#: Those of the scenes.
INSTRUCTION, TASKS = "Find the picture.", ("composed", "count", "describe", "relative", "table", "twin")


def test_encode_takes_texts_pictures_paths_and_items(
    loaded: Retriever, pictures: list[Item], tmp_path: Path
) -> None:
    picture = pictures[0].media[0]
    picture.save(tmp_path / "one.png")
    items = ["a red ring", tmp_path / "one.png", picture, Item("a red ring", (picture,), "")]
    for mode in ("discriminative", "generative"):
        vectors = loaded.encode(items, mode=mode)
        assert vectors.shape == (4, 64) and vectors.dtype == torch.float32
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(4), atol=1e-5)
        assert torch.allclose(vectors[1], vectors[2], atol=1e-5)  # the same picture from disk and from memory
        assert not torch.allclose(vectors[2], vectors[3], atol=1e-3)


def test_one_item_is_not_a_sequence_and_gives_one_vector(
    loaded: Retriever, pictures: list[Item], tmp_path: Path
) -> None:
    picture = pictures[0].media[0]
    picture.save(tmp_path / "one.png")
    for one in ("a red ring", tmp_path / "one.png", picture, Item("a red ring")):
        vector = loaded.encode(one)
        assert vector.shape == (loaded.dimension,) == (64,)
        assert torch.allclose(vector, loaded.encode([one])[0], atol=1e-6)
    assert isinstance(vector.numpy(), np.ndarray) and vector.numpy().dtype == np.float32
    assert loaded.rewrite("a red ring") == loaded.rewrite(["a red ring"])[0]
    several = loaded.encode(text for text in ("a red ring", "a star"))  # a generator
    assert several.shape == (2, 64)
    for images in (picture, (picture,), (tmp_path / "one.png",), str(tmp_path / "one.png")):
        assert torch.allclose(loaded.encode(Item(media=images)), loaded.encode(picture), atol=1e-6)


def test_an_item_as_a_user_writes_it() -> None:
    item = rime_pl.Item("a red ring")
    assert item == Item("a red ring", (), "") and rime_pl.Item is Item
    assert rime_pl.Item(media=(Image.new("RGB", (8, 8)),)).text == ""


def test_a_text_that_names_a_picture_file_is_warned_of(
    loaded: Retriever, pictures: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures[0].media[0].save("ring.png")
    for items in ("ring.png", ["a ring", "ring.png"]):
        with pytest.warns(UserWarning, match=r"'ring.png' is embedded as a text, .* Give Path\('ring.png'\)"):
            loaded.encode(items)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.encode([Path("ring.png"), "no_such.png", "a ring"])
        assert not sources._is_file("x" * 5000 + ".png") and not sources._is_file("a\0.png")


def test_photos_are_turned_and_put_on_white_as_in_training(loaded: Retriever, tmp_path: Path) -> None:
    drawn = Image.new("RGB", (40, 60), "white")
    drawn.paste("red", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file holds the picture lying on its side
    drawn.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    shown = drawn.convert("RGBA")
    shown.putalpha(Image.new("L", drawn.size, 255))
    shown.paste((0, 0, 0, 0), (0, 20, 40, 60))
    shown.save(tmp_path / "transparent.png")
    vectors = loaded.encode([drawn, tmp_path / "turned.png", tmp_path / "transparent.png", shown])
    for vector in vectors[1:]:
        assert torch.allclose(vector, vectors[0], atol=1e-5)


def test_pictures_are_opened_for_their_batch_and_not_kept(
    loaded: Retriever, pictures: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path, item in zip(paths, pictures * 2, strict=False):
        item.media[0].save(path)
    opened: list[weakref.ref[Image.Image]] = []
    alive: list[int] = []

    def watched(source: Path, name: str = "") -> Image.Image:
        gc.collect()
        alive.append(sum(ref() is not None for ref in opened))
        picture = open_picture(source, name)
        opened.append(weakref.ref(picture))
        return picture

    open_picture = sources.open_picture
    monkeypatch.setattr(sources, "open_picture", watched)
    monkeypatch.setattr(batching, "_cores", lambda: 2)
    loaded.encode(paths, batch_size=2)
    assert len(opened) == 8 and max(alive) <= 1, "when the second of a batch is opened"
    smallest = min(item.media[0].width * item.media[0].height for item in pictures)
    monkeypatch.setattr(batching, "MAX_PIXELS", smallest)
    alive.clear()
    loaded.encode(paths, batch_size=32)
    assert len(alive) == 8 and max(alive) <= 1, "large pictures make a batch smaller"
    loaded.index(paths, ["discriminative"], batch_size=2)
    gc.collect()
    assert all(ref() is None for ref in opened), "the gallery holds paths"
    hits = loaded.search(paths[3], top_k=8).hits
    (found,) = [hit for hit in hits if hit.place == 3]
    assert found.item.media[0].size == pictures[3].media[0].size and found.name == str(paths[3])


def test_queries_and_targets_get_the_instructions_of_their_training(
    loaded: Retriever, pictures: list[Item]
) -> None:
    assert sorted(loaded.tasks) == list(loaded.tasks) == [*TASKS]
    query, target = loaded.encode_query("a red ring"), loaded.encode_target(pictures)
    assert torch.allclose(query, loaded.encode(Item("a red ring", instruction=INSTRUCTION)), atol=1e-6)
    assert not torch.allclose(query, loaded.encode("a red ring"), atol=1e-4)
    assert torch.allclose(target, loaded.encode(pictures), atol=1e-6)  # scenes: no instruction on this side
    assert torch.allclose(query, loaded.encode_query("a red ring", task="describe"), atol=1e-6)
    loaded.index(pictures)
    hits = loaded.search("a red ring", top_k=6).hits
    expected = dict(enumerate((target @ query).tolist()))
    assert {hit.place: hit.score for hit in hits} == pytest.approx(expected, abs=1e-5)
    written = loaded.encode_query(["a red ring"], "generative", task="describe")
    assert torch.allclose(
        written, loaded.encode(["a red ring"], "generative", instruction=INSTRUCTION), atol=1e-6
    )


def test_an_unknown_task_is_refused_with_the_known_ones(loaded: Retriever) -> None:
    with pytest.raises(RimeError, match=r"task must be one .*'describe', .* but is 'descrbe'"):
        loaded.encode_query("a red ring", task="descrbe")
    with pytest.raises(RimeError, match=r"task must be one .*'describe', .* but is 'nope'"):
        loaded.encode_target("a red ring", task="nope")


def test_encode_equals_the_backbone_and_batches_change_nothing(
    loaded: Retriever, pictures: list[Item]
) -> None:
    prompts = loaded.backbone.processor.prompts(pictures)
    with torch.no_grad():
        expected = loaded.backbone(prompts).disc
    assert torch.allclose(loaded.encode(pictures, batch_size=2), expected, atol=1e-5)
    assert torch.allclose(loaded.encode(pictures), expected, atol=1e-6)


def test_instruction_is_used_where_the_item_has_none(loaded: Retriever) -> None:
    bare, instructed = Item("a ring", (), ""), Item("a ring", (), "", "Find it.")
    plain, named = loaded.encode([bare]), loaded.encode([bare], instruction="Find it.")
    own = loaded.encode([instructed], instruction="Other.")
    assert not torch.allclose(plain, named, atol=1e-4)
    assert torch.allclose(named, own, atol=1e-6)


def test_search_finds_the_picture_itself_and_takes_any_pair_of_modes(
    loaded: Retriever, pictures: list[Item]
) -> None:
    loaded.index(pictures, instruction="")
    found = loaded.search(pictures[3], "discriminative", top_k=4, instruction="")
    assert len(found.hits) == 4 and found.hits[0].place == 3
    assert found.hits[0].item.content_id == found.hits[0].name == pictures[3].content_id
    assert found.hits[0].score == pytest.approx(1.0, abs=1e-4)
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert found.rewrite is None and found.encode_ms > 0
    crossed = loaded.search(pictures[3], "discriminative", top_k=99, target_mode="generative")
    assert len(crossed.hits) == len(pictures) and crossed.hits[0].rewrite is not None
    assert loaded.search("a ring", "generative").rewrite is not None


def test_gallery_is_encoded_once_for_each_adapter_mode_and_content(
    loaded: Retriever, pictures: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.index(pictures[:3])
    before = loaded.search("a ring").hits
    assert loaded.run is not None
    files = sorted((loaded.run.path / CACHE).iterdir())
    monkeypatch.setattr(loaded, "encode_modes", None)  # encoding anything again would fail
    loaded.index(pictures[:3])
    assert sorted((loaded.run.path / CACHE).iterdir()) == files
    monkeypatch.undo()
    assert [hit.score for hit in loaded.search("a ring").hits] == [hit.score for hit in before]
    orders = (pictures[:2], pictures[1::-1], pictures[:1])
    assert len({sources.content_digest(items, words) for words in ("", "Find it.") for items in orders}) == 6


def test_a_gallery_that_changes_while_it_is_encoded_is_not_kept(
    loaded: Retriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, encode = tmp_path / "a.png", Retriever.encode_modes
    first, second = (Image.new("RGB", (41, 43), colour) for colour in ("red", "blue"))
    first.save(file)

    def changing(self: Retriever, *args: Any, **kwargs: Any) -> Any:
        second.save(file)
        return encode(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "encode_modes", changing)
        loaded.index([file], ["discriminative"], instruction="")
    first.save(file)
    loaded.index([file], ["discriminative"], instruction="")
    assert loaded.search(file, instruction="").hits[0].score == pytest.approx(1.0, abs=1e-4)


def test_what_is_kept_of_a_gallery_tells_kinds_of_media_times_and_sizes_apart() -> None:
    picture, wide = Image.new("RGB", (40, 20)), Image.new("RGB", (20, 40))  # the same bytes
    media = [picture, wide, Page(picture), *(Clip((picture,), (time,)) for time in (0.0, 1.0))]
    items = [Item("", (medium,)) for medium in media]
    items += [Item("", (picture, Page(picture))), Item("", (Page(picture), picture))]
    items += [Item("a", (picture,)), Item("", (picture,), instruction="a")]
    assert len({sources.content_digest([item], "") for item in items}) == len(items)


def test_a_damaged_cache_is_made_again(loaded: Retriever, pictures: list[Item]) -> None:
    loaded.index(pictures[:2], ["discriminative"])
    scores = [hit.score for hit in loaded.search("a ring").hits]
    assert loaded.run is not None
    for file in (loaded.run.path / CACHE).iterdir():
        file.write_bytes(b"no tensor")
    with pytest.warns(UserWarning, match="is damaged and will be made again"):
        loaded.index(pictures[:2], ["discriminative"])
    assert [hit.score for hit in loaded.search("a ring").hits] == scores


def test_unusable_items_of_a_gallery_are_left_out_and_tried_again(
    loaded: Retriever, pictures: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, item in zip(paths, pictures, strict=False):
        item.media[0].save(path)

    def fails_on(name: str) -> None:
        def opened(source: Any, said: str = "") -> Image.Image:
            if source == tmp_path / name:
                raise DataError(f"{source}: a package is missing.")
            return open_picture(source, said)

        monkeypatch.setattr(sources, "open_picture", opened)

    fails_on("0.png")
    loaded.index(paths, skip_unusable=True, batch_size=2)
    assert loaded.unusable == {0: f"{paths[0]}: a package is missing."}
    for number in (1, 2, 3):
        found = loaded.search(paths[number], top_k=9, instruction="")
        assert len(found.hits) == 3 and 0 not in [hit.place for hit in found.hits]
    loaded.index(paths, skip_unusable=True, instruction="")
    assert loaded.search(paths[2], instruction="").hits[0].place == 2
    with pytest.raises(DataError, match="a package is missing"):
        loaded.encode(paths)
    with pytest.raises(DataError, match=r"none of 1 is. The first: .*0\.png: a package is missing"):
        loaded.index(paths[:1], skip_unusable=True)
    monkeypatch.undo()  # the package is installed: what was kept is made again
    loaded.index(paths, skip_unusable=True, instruction="")
    assert not loaded.unusable and loaded.search(paths[0], instruction="").hits[0].place == 0


def test_a_kept_gallery_raises_and_names_what_a_new_one_would(
    loaded: Retriever, pictures: list[Item], tmp_path: Path
) -> None:
    places = [tmp_path / name for name in ("here", "there")]
    for place in places:
        place.mkdir()
        pictures[0].media[0].save(place / "a.png")
        (place / "b.png").write_bytes(b"no picture")
    here, there = (sorted(place.iterdir()) for place in places)
    with pytest.raises(DataError) as anew:
        loaded.index(here)
    loaded.index(here, skip_unusable=True)
    with pytest.raises(DataError) as kept:
        loaded.index(here)
    assert str(kept.value) == str(anew.value) and not loaded.unusable
    loaded.index(there, skip_unusable=True)  # the same bytes, so the same embeddings
    assert list(loaded.unusable) == [1] and str(there[1]) in loaded.unusable[1]
    there[1].unlink()
    with pytest.raises(
        DataError, match=r"item 1 must be a picture or video file, but there is none: .*b\.png"
    ):
        loaded.index(there)


def test_an_item_with_too_many_pictures_is_refused_before_one_is_opened(
    loaded: Retriever, pictures: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures[0].media[0].save(tmp_path / "a.png")
    monkeypatch.setattr(sources, "open_picture", None)
    for call in (loaded.encode, loaded.index):
        with pytest.raises(
            DataError, match=r"item 1 must have at most 16 pictures, clips and pages, but has 17\. Use"
        ):
            call(["a ring", Item(media=(tmp_path / "a.png",) * 17)])  # type: ignore[arg-type]


def test_wrong_use_is_an_error(loaded: Retriever, run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RimeError, match="mode must be 'discriminative' or 'generative', but is 'gen'"):
        loaded.encode(["a"], mode="gen")
    with pytest.raises(RimeError, match="list of items is empty"):
        loaded.encode([])
    with pytest.raises(RimeError, match="list of items is empty"):
        loaded.index([])
    with pytest.raises(RimeError, match=r"needs a gallery in mode 'discriminative', but indexed is: nothing"):
        Retriever(loaded.backbone).search("a")
    with pytest.raises(
        RimeError, match=r"item 1 must be a picture or video file, but there is none: .*missing\.png"
    ):
        loaded.encode(["a", tmp_path / "missing.png"])
    for nothing in ("", " ", Item(), Item(instruction="Find it.")):
        with pytest.raises(RimeError, match=r"^the item must have a text or a medium, but has neither"):
            loaded.encode([nothing])
    with pytest.raises(RimeError, match=r"^the item: field 'text' must not contain '<gen_emb>'"):
        loaded.encode("a <gen_emb>")
    for wrong in (3, None, np.zeros((4, 4, 3), np.uint8), b"bytes"):
        with pytest.raises(RimeError, match=r"item 1 must be a text \(str\), a path .*, but is a "):
            loaded.encode(["a", wrong])
    for wrong in (3, None, {"a": 1}, b"bytes"):
        with pytest.raises(
            RimeError, match="items must be a list of texts, paths, pictures or Items, but are a"
        ):
            loaded.encode(wrong)
    with pytest.raises(
        RimeError,
        match=r"the item: media must be pictures, clips, pages or paths to .* videos, but one is a int",
    ):
        loaded.encode(Item("a", (3,)))
    with pytest.raises(RimeError, match="batch_size must be 1 or more, but is 0"):
        loaded.encode("a", batch_size=0)
    with pytest.raises(
        RimeError, match="device must be one that torch can use here, such as 'cpu', but is 'gpu'"
    ):
        rime_pl.load(run_folder, device="gpu")
    loaded.index("a", ["discriminative"])
    with pytest.raises(RimeError, match="query must be one text, path, picture or Item, not a list"):
        loaded.search(["a", "b"])
    with pytest.raises(RimeError, match="top_k must be 1 or more, but is 0"):
        loaded.search("a", top_k=0)
    Image.new("RGB", (1000, 3)).save(tmp_path / "line.png")
    with pytest.raises(RimeError, match=r"line\.png: the longer side may be .* 1000 x 3 pixels"):
        loaded.encode([tmp_path / "line.png"])
    with pytest.raises(RimeError, match="no finished run here"):
        rime_pl.load(tmp_path)
