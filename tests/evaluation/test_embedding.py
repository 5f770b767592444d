"""Each content is embedded once, a stopped command goes on, and errors name the item."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import DataError, RimeError
from rime_pl.evaluation import embedding
from rime_pl.evaluation.digests import as_source, item_digest
from rime_pl.evaluation.embedding import Embedder, Rows, make_trainer, sides_of, store_of
from rime_pl.inference.retriever import Retriever
from rime_pl.run_folder import RunFolder
from rime_pl.types import Clip, Item, Page
from tests.evaluation.made_tasks import global_task, local_task, texts, with_main

PAIRS = ("disc-disc", "gen-disc")


@pytest.fixture
def model(shared_backbone: Backbone) -> Retriever:
    return Retriever(shared_backbone, name="micro")


@pytest.fixture
def embedded(model: Retriever, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Number of items and modes of each call of the model."""
    calls: list[tuple[int, tuple[str, ...]]] = []
    encode = model.encode_modes

    def counted(items: Any, modes: Any, *more: Any) -> Any:
        calls.append((len(items), tuple(modes)))
        return encode(items, modes, *more)

    monkeypatch.setattr(model, "encode_modes", counted)
    return calls


def embed(
    model: Retriever, cache: Path, task: Any, pairs: Any = PAIRS, progress: Any = None
) -> tuple[Any, Any]:
    embedder = Embedder(model, store_of(cache, model), 4, progress or (lambda done, total: None))
    return embedder, embedder.embed(make_trainer("cpu", 1), task.name, sides_of(task, pairs))


def test_vectors_equal_those_of_the_retriever(model: Retriever, tmp_path: Path) -> None:
    for task in (local_task(tmp_path), global_task(tmp_path)):
        embedder, found = embed(model, tmp_path / "cache", task)
        for items, digests, modes in (
            (task.queries, found.queries, ("discriminative", "generative")),
            (task.candidates, found.candidates, ("discriminative",)),
        ):
            expected = model.encode_modes([as_source(item) for item in items], modes, 4)
            for mode in modes:
                vectors = embedder.store.vectors(digests, mode)
                assert vectors.shape == (len(items), model.dimension) and vectors.dtype == torch.float32
                assert torch.allclose(vectors, expected[mode].embeddings, atol=1e-5)
        assert embedder.store.rewrites(found.queries) == expected_rewrites(model, task.queries)
        cost = embedder.store.cost(found.queries, ("discriminative", "generative"))
        assert 0 < cost.ms_per_item["discriminative"] < cost.ms_per_item["generative"]
        assert cost.rewrite_tokens is not None and 0 < cost.rewrite_tokens <= 32


def expected_rewrites(model: Retriever, items: Any) -> Any:
    return model.encode_modes(list(items), ("generative",), 4)["generative"].rewrites


def test_a_content_is_embedded_once_over_tasks_sides_modes_and_calls(
    model: Retriever, tmp_path: Path, embedded: list[tuple[int, tuple[str, ...]]]
) -> None:
    first = local_task(tmp_path, count=6)
    embed(model, tmp_path / "cache", first, ("disc-disc",))
    assert embedded == [(6, ("discriminative",)), (10, ("discriminative",))]
    embedded.clear()
    embed(model, tmp_path / "cache", first, ("disc-disc",))
    assert embedded == []
    embed(model, tmp_path / "cache", first, PAIRS)  # the generative mode of the queries is new
    assert embedded == [(6, ("generative",))]
    embedded.clear()
    # texts 3 to 5 and two pictures are those of the first task
    embed(model, tmp_path / "cache", global_task(tmp_path, count=5), PAIRS)
    assert embedded == [(2, ("discriminative", "generative")), (7, ("discriminative",))]
    embedded.clear()
    same = with_main(first, queries=first.candidates, labels=[{0: 1.0}] * 10, pools=None, name="Same")
    embed(model, tmp_path / "other cache", same, ("disc-disc",))
    assert embedded == [(10, ("discriminative",))]  # queries and candidates are the same contents


def test_a_stopped_command_goes_on_and_damage_is_made_again(
    model: Retriever,
    tmp_path: Path,
    embedded: list[tuple[int, tuple[str, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding, "PART", 4)
    task, cache = local_task(tmp_path), tmp_path / "cache"
    told: list[tuple[int, int]] = []
    _, found = embed(model, cache, task, ("disc-disc",), lambda *numbers: told.append(numbers))
    assert [count for count, _ in embedded] == [4, 2, 4, 4, 2]
    assert told[0] == (0, 16) and told[-1] == (16, 16) and sorted(told) == told
    files = sorted(cache.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 5
    before = store_of(cache, model).vectors(found.candidates, "discriminative")
    files[1].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-100])
    (cache / files[2].parent.name / f"{files[1].stem}.half-1").write_bytes(b"of a process that was killed")
    embedded.clear()
    with pytest.warns(UserWarning, match="is damaged and will be made again"):
        embedder, _ = embed(model, cache, task, ("disc-disc",))
    assert sorted(count for count, _ in embedded) == [2, 4]
    assert embedder.store.vectors(found.candidates, "discriminative").equal(before)
    assert not list(cache.rglob("*.half-*"))


def test_vectors_that_are_damaged_within_are_refused(model: Retriever, tmp_path: Path) -> None:
    _, found = embed(model, tmp_path, local_task(tmp_path / "task"), ("disc-disc",))
    file = max(tmp_path.rglob("*.safetensors"), key=lambda one: one.stat().st_size)
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        told = opened.metadata()
    tensors["discriminative"][0, 0] = torch.nan
    save_file(tensors, file, told)
    with pytest.raises(RimeError, match="holds damaged embeddings: each must have the length 1"):
        for digests in (found.queries, found.candidates):
            store_of(tmp_path, model).vectors(digests, "discriminative")


def test_sizes_of_pictures_in_the_adapter_are_part_of_the_store(model: Retriever, tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    stores = []
    for size in (100, 200):
        (adapter / "processor_config.json").write_text(f'{{"longest_edge": {size}}}')
        of_run = Retriever(model.backbone, name="micro", run=RunFolder(tmp_path / "run"))
        stores.append(store_of(tmp_path, of_run).folder)
    assert stores[0] != stores[1]


def test_another_model_has_a_store_of_its_own(model: Retriever, tmp_path: Path) -> None:
    other = Retriever(model.backbone, name="other")
    assert store_of(tmp_path, model).folder != store_of(tmp_path, other).folder
    with pytest.raises(RimeError, match="must have a name"):
        store_of(tmp_path, Retriever(model.backbone))


@pytest.mark.parametrize("lazy", [False, True])
def test_an_item_that_cannot_be_embedded_is_named(model: Retriever, tmp_path: Path, lazy: bool) -> None:
    task = local_task(tmp_path)
    bad = Item("a <|im_end|> ring", (Image.new("RGB", (32, 32)),) if lazy else ())
    broken = with_main(task, queries=[*texts(3), bad, *texts(2, 7)])
    with pytest.raises(DataError, match=r"Local: query 3: field 'text' must not contain '<\|im_end\|>'"):
        embed(model, tmp_path / "cache", broken)
    (tmp_path / "7.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"Local: .*7\.png must be a picture"):
        embed(model, tmp_path / "cache", task)
    (tmp_path / "7.png").unlink()
    with pytest.raises(DataError, match=r"Local: candidate 7 cannot be read: .*7\.png"):
        embed(model, tmp_path / "cache", task)


def test_a_blank_item_is_refused_by_the_retriever_and_embedded_here(model: Retriever, tmp_path: Path) -> None:
    blank = Item("", content_id="blank")
    with pytest.raises(RimeError, match="must have a text or a medium"):
        model.encode([blank])
    assert model.encode([as_source(blank)]).shape == (1, model.dimension)
    assert as_source(texts(1)[0]) is not None and isinstance(Rows([blank], [0])[0], Item)


def test_what_decides_an_embedding_decides_the_hash(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "c.png")
    items: list[Any] = [
        Item("a", ()),
        Item("", (), instruction="a"),
        Item("a", (tmp_path / "a.png",)),
        Item("a", (tmp_path / "c.png",)),
        Item("a", (picture,)),
        Item("a", (picture, picture)),
        Item("a", (Image.new("RGB", (16, 4), "red"),)),
    ]
    palettes = [Image.new("P", (8, 8)) for _ in "ab"]
    for palette, colour in zip(palettes, ((255, 0, 0), (0, 0, 255)), strict=True):
        palette.putpalette(colour)
    two = (picture, Image.new("RGB", (8, 8), "blue"))
    items += [Item("a", (palettes[1],)), Item("a", (Page(picture),)), Item("a", (Clip(two, (0.0, 1.0)),))]
    items += [Item("a", (Clip(two, (0.0, 2.0)),)), Item("a", (Clip(two[::-1], (0.0, 1.0)),))]
    assert len({item_digest(item) for item in items}) == len(items)
    assert item_digest(Item("a", (palettes[0],))) == item_digest(items[4])  # as the model sees it
    assert item_digest(items[2]) == item_digest(Item("a", (str(tmp_path / "b.png"),), "7"))  # type: ignore[arg-type]
